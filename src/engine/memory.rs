//! How many tokens the memory has room for: what is free once a model is loaded, over what a token takes.

use crate::checkpoint::config::ModelConfig;
use crate::tensor::{Device, Placement, free_memory};

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
