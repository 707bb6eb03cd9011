//! Approximate caches for bidirectional models (Fast-dLLM, arXiv 2505.22618): the first step of a block runs the whole sequence and
//! keeps its keys, later ones run less and look at what was kept. What a token's keys ought to be changes with every commit, so texts
//! may differ from those without a cache; docs/BENCHMARKS.md has what that costs.

use std::ops::Range;

use crate::decode::Pattern;

/// What the later steps of a block run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// The block and all behind it, over the keys of what stands before.
    Prefix,
    /// The block alone, over the keys of all the rest; its own are replaced in place.
    Dual,
}

/// How keys are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    pub kind: CacheKind,
    /// Positions before the block that run with it: one where a row predicts the token behind it, since otherwise no row would predict
    /// the block's first.
    pub lead: usize,
}

impl Cache {
    /// Positions to run for a block at `block`, in a sequence of `length`.
    pub fn window(&self, block: Range<usize>, length: usize) -> Range<usize> {
        let end = match self.kind {
            CacheKind::Prefix => length,
            CacheKind::Dual => block.end,
        };
        block.start.saturating_sub(self.lead)..end
    }
}

/// Every position of `window` sees the whole sequence.
pub fn over_all(window: &Range<usize>, length: usize) -> Pattern {
    Pattern::Span { start: window.start, sees: vec![length; window.len()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_runs_alone_or_with_what_follows() {
        let (prefix, dual) = (Cache { kind: CacheKind::Prefix, lead: 0 }, Cache { kind: CacheKind::Dual, lead: 1 });
        assert_eq!(prefix.window(8..16, 40), 8..40);
        assert_eq!((dual.window(8..16, 40), dual.window(0..8, 40)), (7..16, 0..8));
        assert_eq!(over_all(&(7..9), 40), Pattern::Span { start: 7, sees: vec![40, 40] });
    }
}
