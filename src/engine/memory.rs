//! What models take of a device's memory: how many tokens there is room for once one is loaded, and before that whether there is room
//! for it at all.

use crate::checkpoint::config::ModelConfig;
use crate::tensor::{Device, Placement, free_memory, mebibytes};

/// Share of the free memory that sequences may take; the rest is for a forward's intermediate results, and for others.
const SHARE: f64 = 0.5;
/// Where the free memory is unknown: 1 GiB.
const UNKNOWN: u64 = 1 << 30;

/// Bytes that one resident token takes: its keys and values in every layer, or, where whole sequences are run again and again, its
/// part of a layer's intermediate results and a row of logits; whichever is more.
pub fn bytes_per_token(c: &ModelConfig, placement: Placement) -> usize {
    let size = placement.dtype.size();
    let kept = c.layers * 2 * c.kv_heads * c.head_dim * size;
    let passing = (6 * c.hidden_size + 3 * c.intermediate_size + c.heads * c.head_dim) * size + c.vocab_size * 4;
    kept.max(passing).max(1)
}

/// Bytes that are free, or a guess where nobody says.
pub fn free(device: Device) -> u64 {
    free_memory(device).unwrap_or(UNKNOWN)
}

/// Tokens that residents may have together where so many models share the memory; at least one context's worth, since nothing smaller
/// could serve the model.
pub fn room(config: &ModelConfig, placement: Placement, context: usize, sharers: usize) -> usize {
    let share = (free(placement.device) as f64 * SHARE) as usize / sharers.max(1);
    (share / bytes_per_token(config, placement)).max(context)
}

/// What a model takes of the memory.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of its draft heads.
    pub drafters: u64,
    /// Bytes of one token in the engine.
    pub token: u64,
    /// Fewer tokens than this are no use.
    pub tokens_min: usize,
    /// Tokens that it may have in its engine.
    pub tokens: usize,
    /// Bytes that are free on its device; `None` where nobody says.
    pub free: Option<u64>,
}

impl Need {
    pub fn bytes(&self) -> u64 {
        self.fixed().saturating_add(self.token.saturating_mul(self.tokens as u64))
    }

    /// With the fewest tokens that are of use.
    pub fn least(self) -> Self {
        Self { tokens: self.tokens_min, ..self }
    }

    fn fixed(&self) -> u64 {
        self.weights.saturating_add(self.drafters)
    }

    /// With as many tokens as there is room for; else the sum that shows why there is none. `others` are models with their bytes: under
    /// a `budget` those that are served and count in it, without one those that are to be loaded first.
    pub fn within(self, name: &str, budget: Option<u64>, others: &[(&str, u64)]) -> Result<Self, String> {
        let taken = others.iter().map(|(_, bytes)| bytes).sum();
        let free = self.free.unwrap_or(u64::MAX);
        let left = match budget {
            Some(budget) => budget.saturating_sub(taken).min(free),
            None => free.saturating_sub(taken),
        };
        let tokens = left.saturating_sub(self.fixed()) / self.token.max(1);
        let found = Self { tokens: self.tokens.min(usize::try_from(tokens).unwrap_or(usize::MAX)), ..self };
        if found.tokens >= self.tokens_min && self.fixed() <= left {
            return Ok(found);
        }
        let least = self.least();
        let heads = if self.drafters > 0 { format!("{} of draft heads, ", mebibytes(self.drafters)) } else { String::new() };
        let sum = format!(
            "there is no room for {name}: it needs {} ({} of weights, {heads}{} for {} tokens)",
            mebibytes(least.bytes()),
            mebibytes(self.weights),
            mebibytes(least.bytes() - self.fixed()),
            self.tokens_min,
        );
        let list: Vec<_> = others.iter().map(|(name, bytes)| format!("{name} {}", mebibytes(*bytes))).collect();
        let list = list.join(", ");
        let free = self.free.map_or_else(|| "an unknown amount".into(), mebibytes);
        Err(match (budget, others) {
            (Some(budget), _) => format!(
                "{sum}; of the budget of {} are taken {} ({list}), and {free} are free on the device: unload another model first",
                mebibytes(budget),
                mebibytes(taken),
            ),
            (None, []) => format!(
                "{sum}, and {free} are free on the device: try a smaller --context, a narrower --dtype or another --device"
            ),
            (None, _) => format!(
                "{sum}, and {free} are free on the device, of which other models need {} ({list}): name fewer models, a smaller --context or a narrower --dtype",
                mebibytes(taken)
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Need = Need { weights: 18 << 20, drafters: 2 << 20, token: 1 << 10, tokens_min: 512, tokens: 8192, free: None };

    #[test]
    fn a_model_gets_the_tokens_that_there_is_room_for() {
        let within = |budget: u64, taken| NEED.within("new", Some(budget << 20), &[("old", taken)]).map(|need| need.tokens);
        assert_eq!(within(128, 100 << 20), Ok(8192), "20 of weights and 8 for its tokens");
        assert_eq!(within(124, 100 << 20), Ok(4096));
        let refused = within(100, 90 << 20).unwrap_err();
        for part in [
            "new: it needs 20.5 MiB (18.0 MiB of weights, 2.0 MiB of draft heads, 0.5 MiB for 512 tokens)",
            "of 100.0 MiB are taken 90.0 MiB (old 90.0 MiB)",
        ] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(within(100, 200 << 20).is_err(), "more is taken than there is");
        let crowded = Need { free: Some(20 << 20), ..NEED };
        assert!(crowded.within("new", Some(1 << 30), &[]).is_err(), "others have taken the memory");
    }

    #[test]
    fn what_has_no_room_is_told_before_it_is_loaded() {
        let roomy = |free: u64| Need { free: Some(free << 20), ..NEED };
        assert_eq!(roomy(21).within("new", None, &[]).map(|need| need.tokens), Ok(1024));
        assert!(NEED.within("new", None, &[]).is_ok(), "where nobody says what is free, trying is all there is");
        let refused = roomy(20).within("new", None, &[]).unwrap_err();
        let told = "it needs 20.5 MiB (18.0 MiB of weights, 2.0 MiB of draft heads, 0.5 MiB for 512 tokens), and 20.0 MiB are free on the \
                    device: try a smaller --context";
        assert!(refused.contains(told), "{refused}");
        let refused = roomy(40).within("new", None, &[("first", 20 << 20)]).unwrap_err();
        assert!(
            refused.contains("40.0 MiB are free on the device, of which other models need 20.0 MiB (first 20.0 MiB)"),
            "{refused}"
        );
        assert!(roomy(41).within("new", None, &[("first", 20 << 20)]).is_ok());
        let bare = Need { drafters: 0, ..roomy(1) };
        assert!(!bare.within("new", None, &[]).unwrap_err().contains("draft heads"));
    }
}
