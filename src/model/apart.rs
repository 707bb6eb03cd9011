//! One forward as several side by side: each core takes whole sequences.
//!
//! Where every operation is split over the cores, they wait for one another some forty times in a forward, and whenever the system needs
//! one of them for something else, the others stand still. Sequences do not depend on one another, and on the CPU neither do their
//! rows' numbers ([`Transformer::rows_are_independent`]): cores that go separate ways give the same and meet once. Each then reads
//! all weights, though: that pays for many rows, of a model whose weights stay in the cache that the cores share, and whose operations
//! are short beside a wait.

use std::sync::LazyLock;

use super::forward::Segment;
use super::{ModelError, Transformer};
use crate::tensor::{Kind, Tensor, kernels, shared_cache};

/// Rows for each core from which on it pays (measured: docs/LOG.md).
const ROWS_FROM: usize = 24;
/// Rows of a share, where the segments allow it: what lies between a layer's operations then stays in a core's own cache, and is
/// small enough for the allocator to use the same memory again, rather than have the system clear new pages.
const ROWS_TO: usize = 256;
/// How much longer than its even part the longest share may be.
const UNEVEN: f64 = 1.3;

static SHARED_CACHE: LazyLock<u64> = LazyLock::new(|| shared_cache().unwrap_or(0));

impl Transformer {
    /// Whether the cache that the cores share keeps all weights from one forward to the next.
    pub(super) fn stays_in_cache(&self) -> bool {
        self.weight_bytes as u64 <= *SHARED_CACHE
    }

    /// Which segments are to be run by themselves, in even shares for all cores; `None` where they are too few, too small or too uneven to go separate ways.
    pub(super) fn shares(&self, segments: &[Segment]) -> Option<Vec<Vec<usize>>> {
        let threads = tch::get_num_threads().max(1) as usize;
        if threads == 1 || segments.len() < threads || !self.stays_in_cache() || !self.rows_are_independent() {
            return None;
        }
        let rows: Vec<usize> = segments.iter().map(|segment| segment.tokens.len()).collect();
        split(&rows, threads)
    }

    /// [`Transformer::forward`], every share of the segments by itself.
    pub(super) fn forward_apart(&self, segments: &[Segment], shares: &[Vec<usize>]) -> Result<Tensor, ModelError> {
        let run = |share: usize| {
            let segments: Vec<Segment> = shares[share].iter().map(|segment| segments[*segment]).collect();
            tch::no_grad(|| self.forward_together(&segments))
        };
        // SAFETY: forwards read the model's tensors and write to their own segments' caches, of which each is in one share.
        let hidden: Vec<Tensor> = unsafe { kernels::side_by_side(shares.len(), run) }.into_iter().collect::<Result<_, _>>()?;
        let hidden = Tensor::f_cat(&hidden, 0)?;
        if shares.iter().flatten().is_sorted() {
            return Ok(hidden);
        }
        let mut at = 0;
        let mut rows: Vec<Vec<i64>> = vec![vec![]; segments.len()];
        for segment in shares.iter().flatten() {
            let length = segments[*segment].tokens.len() as i64;
            rows[*segment] = (at..at + length).collect();
            at += length;
        }
        Ok(hidden.f_index_select(0, &Tensor::f_from_slice(&rows.concat())?.f_to_kind(Kind::Int64)?)?)
    }
}

/// Spreads segments of so many rows over shares for so many cores, the longest first, each to the share with least; `None` where it
/// does not pay.
fn split(rows: &[usize], cores: usize) -> Option<Vec<Vec<usize>>> {
    let all: usize = rows.iter().sum();
    if all < ROWS_FROM * cores {
        return None;
    }
    let count = cores * all.div_ceil(ROWS_TO * cores).clamp(1, rows.len() / cores);
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|segment| std::cmp::Reverse(rows[*segment]));
    let mut shares = vec![(0, vec![]); count];
    for segment in order {
        let (length, share) = shares.iter_mut().min_by_key(|(length, _)| *length)?;
        *length += rows[segment];
        share.push(segment);
    }
    let longest = shares.iter().map(|(length, _)| *length).max()?;
    let shares = shares.into_iter().map(|(_, mut share)| {
        share.sort_unstable();
        share
    });
    ((longest * count) as f64 <= all as f64 * UNEVEN).then(|| shares.collect())
}

#[cfg(test)]
mod tests {
    use super::split;
    use crate::checkpoint::config::ModelConfig;
    use crate::model::cache::KvCache;
    use crate::model::{Layout, RandomWeights, Segment, Transformer};
    use crate::tensor::{Device, Dtype, Placement};

    /// Behind caches of different lengths, in an order in which shares do not lie side by side.
    #[test]
    fn going_apart_changes_no_number() {
        let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar/config.json");
        let config = ModelConfig::from_json(&serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap()).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let placement = Placement { device: Device::Cpu, dtype };
            let model = Transformer::new(&config, placement, 64, &mut RandomWeights { placement }).unwrap();
            let texts: Vec<Vec<u32>> =
                (0..7u32).map(|text| (0..3 + 4 * text).map(|at| (at * 31 + text) % 900).collect()).collect();
            let run = |forward: &dyn Fn(&[Segment]) -> crate::tensor::Tensor| {
                let caches: Vec<KvCache> = texts.iter().map(|_| KvCache::new(&config, placement, 64).unwrap()).collect();
                let segments = texts.iter().zip(&caches);
                let segments = segments.map(|(tokens, cache)| Segment { tokens, layout: Layout::Causal, cache: Some(cache) });
                tch::no_grad(|| forward(&segments.collect::<Vec<_>>()))
            };
            let shares = vec![vec![1, 6], vec![0, 3, 4], vec![2, 5]];
            let apart = run(&|segments| model.forward_apart(segments, &shares).unwrap());
            assert!(apart.equal(&run(&|segments| model.forward_together(segments).unwrap())), "{dtype:?}");
            // Where it is known to pay, it is done.
            crate::tensor::set_threads(2);
            let chosen = run(&|segments| {
                let pays = model.stays_in_cache() && model.rows_are_independent();
                assert_eq!(model.shares(segments).is_some(), pays);
                model.forward(segments).unwrap()
            });
            assert!(apart.equal(&chosen), "{dtype:?}");
        }
    }

    #[test]
    fn shares_are_even_and_leave_none_out() {
        assert_eq!(split(&[1; 47], 2), None, "too few rows");
        assert_eq!(split(&[100, 1, 1], 2), None, "too uneven");
        assert_eq!(split(&[12; 4], 2), Some(vec![vec![0, 2], vec![1, 3]]));
        assert_eq!(split(&[1, 1, 40, 1, 1, 36], 2), Some(vec![vec![2], vec![0, 1, 3, 4, 5]]));
        assert_eq!(split(&[200; 8], 2).unwrap().len(), 8, "four for each of two cores, none above the most");
        assert_eq!(split(&[2000; 3], 2), None, "too uneven, and no more shares than segments");
        for cores in 1..=8 {
            let rows: Vec<usize> = (0..40).map(|segment| 10 * (1 + segment * 7 % 11)).collect();
            let shares = split(&rows, cores).unwrap();
            let mut all = shares.concat();
            all.sort_unstable();
            assert!(shares.len().is_multiple_of(cores) && all.iter().copied().eq(0..40), "{cores}: {shares:?}");
        }
    }
}
