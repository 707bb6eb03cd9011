//! Pieces by buckets come to what the whole comes to: on the CPU with a recorder that does the work again, on a GPU with the real one.

use std::rc::Rc;

use super::*;
use crate::checkpoint::config::ModelConfig;
use crate::model::cache::KvCache;
use crate::model::{Layout, RandomWeights, Segment};
use crate::tensor::{Dtype, Placement, seeded};

/// Does the work again and puts what comes of it where it was put at first, as a graph does.
#[derive(Default)]
struct Again {
    fails_at: Option<usize>,
    panics_at: Option<usize>,
    recorded: Rc<Cell<usize>>,
    /// Whether it was entered and not left.
    inside: Rc<Cell<bool>>,
}

struct Kept(Made);

impl Recorder for Again {
    fn enter(&self) -> Result<(), String> {
        assert!(!self.inside.replace(true), "entered twice");
        Ok(())
    }

    fn leave(&self) -> Result<(), String> {
        assert!(self.inside.replace(false), "left what was not entered");
        Ok(())
    }

    fn record(&self, work: &dyn Fn() -> Result<Made, ModelError>) -> Result<(Box<dyn Recording>, Made), String> {
        self.recorded.set(self.recorded.get() + 1);
        assert_ne!(self.panics_at, Some(self.recorded.get()), "as the test wants it");
        if self.fails_at == Some(self.recorded.get()) {
            return Err("the tape is full".into());
        }
        let made = work().map_err(|error| error.to_string())?;
        let kept = (made.0.shallow_clone(), made.1.shallow_clone());
        // What was there when it was recorded must not be what is read later.
        let _ = (made.0.shallow_clone().fill_(f64::NAN), made.1.shallow_clone().fill_(f64::NAN));
        Ok((Box::new(Kept(kept)), made))
    }
}

impl Recording for Kept {
    fn replay(&self, work: &dyn Fn() -> Result<Made, ModelError>) -> Result<(), ModelError> {
        let (stream, next) = work()?;
        self.0.0.shallow_clone().f_copy_(&stream)?;
        Ok(self.0.1.shallow_clone().f_copy_(&next)?)
    }
}

fn config(model: &str) -> ModelConfig {
    // From the folder that tests run in: on another machine the repository lies elsewhere than where the tests were built.
    ModelConfig::read(&std::path::Path::new(model).join("config.json")).unwrap()
}

fn network(config: &ModelConfig, placement: Placement) -> Transformer {
    let _generator = seeded(5);
    tch::no_grad(|| Transformer::new(config, placement, 128, &mut RandomWeights { placement })).unwrap()
}

/// Final states of several sequences, some of them over a cache, after two forwards each of which has its own numbers of rows.
fn run(model: &Transformer, lengths: &[usize]) -> Vec<Tensor> {
    let caches: Vec<KvCache> = lengths.iter().map(|_| KvCache::new(model.config(), model.placement(), 128).unwrap()).collect();
    let mut caches: Vec<Option<KvCache>> = caches.into_iter().map(Some).collect();
    let mut states = vec![];
    for turn in 0..2u32 {
        let texts: Vec<Vec<u32>> =
            lengths.iter().map(|length| (0..(*length as u32 + turn)).map(|at| (at * 31 + turn * 7) % 150).collect()).collect();
        let segments = texts.iter().zip(&caches);
        let segments: Vec<Segment> =
            segments.map(|(tokens, cache)| Segment { tokens, layout: Layout::Causal, cache: cache.as_ref() }).collect();
        states.push(tch::no_grad(|| model.forward_together(&segments)).unwrap());
        for (cache, tokens) in caches.iter_mut().zip(&texts) {
            let path: Vec<usize> = (0..tokens.len()).collect();
            cache.as_mut().unwrap().keep(&path).unwrap();
        }
    }
    states
}

#[test]
fn rows_find_the_next_bucket() {
    assert_eq!(
        [0, 1, 2, 3, 5, 33, 49, 256, 257, 512, 513].map(bucket),
        [None, Some(1), Some(2), Some(4), Some(8), Some(48), Some(64), Some(256), Some(384), Some(512), None]
    );
    assert!(BUCKETS.is_sorted());
}

#[test]
fn pieces_by_buckets_are_the_whole() {
    // Our own kernels compute each row in one order, so that filling changes no bit there.
    for model in ["models/nano-ar", "tests/fixtures/qwen3", "tests/fixtures/llada-tied"] {
        let config = config(model);
        let mut network = network(&config, Placement::CPU_F32);
        let exact = network.rows_are_independent();
        for lengths in [&[1][..], &[3, 9, 1], &[20, 13]] {
            let plain = run(&network, lengths);
            let recorded = Rc::new(Cell::new(0));
            network.graphs = Some(Graphs::new(Box::new(Again { recorded: recorded.clone(), ..Again::default() })));
            let replayed = run(&network, lengths);
            network.graphs = None;
            let rows = [lengths.iter().sum(), lengths.iter().sum::<usize>() + lengths.len()];
            let mut buckets = rows.map(|rows| bucket(rows).unwrap()).to_vec();
            buckets.dedup();
            assert_eq!(recorded.get(), buckets.len() * (config.layers + 1), "each piece of each bucket once");
            for (plain, replayed) in plain.iter().zip(&replayed) {
                let same = if exact { plain.equal(replayed) } else { plain.allclose(replayed, 1e-5, 1e-6, false) };
                assert!(same, "{model} {lengths:?}");
            }
        }
    }
}

#[test]
fn what_cannot_be_recorded_goes_without() {
    let config = config("models/nano-ar");
    let mut network = network(&config, Placement::CPU_F32);
    let plain = run(&network, &[5]);
    // The second piece of the first bucket; the second turn, of one row more, has the same bucket and does not try again.
    let recorded = Rc::new(Cell::new(0));
    network.graphs = Some(Graphs::new(Box::new(Again { fails_at: Some(2), recorded: recorded.clone(), ..Again::default() })));
    let without = run(&network, &[5]);
    assert_eq!(recorded.get(), 2);
    assert!(plain.iter().zip(&without).all(|(plain, without)| plain.equal(without)));
}

#[test]
fn a_panic_in_a_recording_leaves_the_recorder() {
    let mut network = network(&config("models/nano-ar"), Placement::CPU_F32);
    let inside = Rc::new(Cell::new(false));
    network.graphs = Some(Graphs::new(Box::new(Again { panics_at: Some(2), inside: inside.clone(), ..Again::default() })));
    let ran = catch_unwind(AssertUnwindSafe(|| run(&network, &[5])));
    assert!(ran.is_err() && !inside.get());
    assert_eq!(run(&network, &[5]).len(), 2, "the next forward records anew");
}

#[test]
fn a_cpu_has_no_graphs() {
    assert!(Graphs::open(Device::Cpu).is_err());
}

/// On a machine with a GPU: `cargo test --release -- --ignored cuda`, or the test binary with these arguments.
#[test]
#[ignore = "needs a GPU, and the shim of 'make cuda'"]
fn cuda_graphs_compute_what_the_plain_path_computes() {
    let device = crate::tensor::device("cuda:0").expect("a GPU");
    for model in ["models/nano-ar", "tests/fixtures/qwen3", "tests/fixtures/llada-tied"] {
        for (dtype, tolerance) in [(Dtype::F32, 1e-4), (Dtype::Bf16, 5e-2)] {
            let config = config(model);
            let mut network = network(&config, Placement { device, dtype });
            for lengths in [&[1][..], &[3, 9, 1], &[20, 13], &[60, 60, 60, 60]] {
                let plain = run(&network, lengths);
                network.graphs = Some(Graphs::open(device).expect("the shim"));
                // Twice: what was recorded in one forward is replayed in all that follow.
                for _ in 0..2 {
                    for (plain, replayed) in plain.iter().zip(&run(&network, lengths)) {
                        let (plain, replayed) = (plain.to_kind(Kind::Float), replayed.to_kind(Kind::Float));
                        let error = f64::try_from((&plain - &replayed).norm() / plain.norm()).unwrap();
                        assert!(error < tolerance, "{model} {dtype:?} {lengths:?}: {error}");
                    }
                }
                let recorded = network.graphs.take().unwrap().recorded;
                assert!(recorded.borrow().values().all(Option::is_some), "everything was recorded");
            }
        }
    }
}
