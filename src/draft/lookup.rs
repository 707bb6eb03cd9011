//! Prompt lookup: what followed the last few tokens where they stood before (Saxena, `prompt-lookup-decoding`). It needs no
//! weights and no training, so it is the control that heads must beat; text that repeats itself is where it shines.

use super::{Context, Draft, Drafter};
use crate::decode::autoregressive::adaptation::Shape;
use crate::decode::autoregressive::tree::Tree;
use crate::model::ModelError;

/// Longest run of tokens that is looked for; shorter ones follow.
const RUN_MAX: usize = 3;
/// Tokens that are searched at most, from the end.
const REACH: usize = 8192;

pub struct Lookup;

impl Drafter for Lookup {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        let tokens = &context.tokens[context.tokens.len().saturating_sub(REACH)..];
        let found = continuation(tokens, context.asked.shape.length);
        let beams = (!found.is_empty()).then_some(found);
        Ok(Draft { tree: Tree::from_beams(context.root(), beams), proposal: None, forwards: 0 })
    }

    fn limit(&self) -> Shape {
        Shape { width: 1, length: 10 }
    }

    fn usual(&self) -> Shape {
        Shape { width: 1, length: 5 }
    }

    /// Most text does not repeat itself.
    fn prior(&self) -> f64 {
        0.4
    }
}

/// Up to `length` tokens that followed the latest earlier occurrence of the longest run at the end of `tokens`.
fn continuation(tokens: &[u32], length: usize) -> &[u32] {
    for run in (1..=RUN_MAX.min(tokens.len().saturating_sub(1))).rev() {
        let (before, end) = tokens.split_at(tokens.len() - run);
        // Windows over all but the last token, so that what is found has something behind it.
        let starts = 0..tokens.len() - run;
        if let Some(start) = starts.rev().find(|start| &tokens[*start..start + run] == end) {
            let from = start + run;
            debug_assert!(start < before.len());
            return &tokens[from..tokens.len().min(from + length)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::continuation;

    #[test]
    fn the_longest_and_latest_match_counts() {
        assert_eq!(continuation(&[1, 2, 3, 4, 9, 2, 3], 2), [4, 9]);
        assert_eq!(continuation(&[5, 3, 7, 2, 3, 8, 2, 3], 3), [8, 2, 3]);
        assert_eq!(continuation(&[1, 1, 1], 4), [1]);
        assert_eq!(continuation(&[1, 2, 3], 4), [0u32; 0]);
        assert_eq!(continuation(&[1], 4), [0u32; 0]);
        assert_eq!(continuation(&[], 4), [0u32; 0]);
    }
}
