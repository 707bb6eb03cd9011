//! Runs one [`Window`] on the device: network, vocabulary head on the wanted rows, statistics.

use std::time::{Duration, Instant};

use crate::decode::{RowStatistics, Window};
use crate::model::statistics::statistics;
use crate::model::{ModelError, Transformer};
use crate::tensor::{Kind, Tensor};

/// Where a forward's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// The network up to the final hidden states.
    pub forward: Duration,
    /// The vocabulary head on the wanted rows.
    pub head: Duration,
    /// Logits to statistics.
    pub statistics: Duration,
}

/// What came of a window.
pub struct Outcome {
    pub rows: Vec<RowStatistics>,
    pub timing: Timing,
    /// Sequences that the network saw: two under guidance.
    pub forwards: usize,
}

/// Runs `window`; the statistics are those of its positions, in order.
pub fn run(model: &Transformer, window: &Window) -> Result<Outcome, ModelError> {
    tch::no_grad(|| {
        let started = Instant::now();
        let device = model.placement().device;
        let length = window.tokens.len() as i64;
        let vocab_size = model.config().vocab_size;
        let mut tokens: Vec<i64> = window.tokens.iter().map(|id| i64::from(*id)).collect();
        if let Some(guidance) = &window.guidance {
            tokens.extend(guidance.unconditional.iter().map(|id| i64::from(*id)));
        }
        if let Some(id) = tokens.iter().copied().find(|id| *id >= vocab_size as i64) {
            return Err(ModelError::TokenOutOfRange { id, vocab_size });
        }
        let tokens = Tensor::f_from_slice(&tokens)?.f_view([-1, length])?.f_to_device(device)?;
        let hidden = model.hidden(&tokens, window.attention)?;
        let forward = started.elapsed();

        let shift = i64::from(model.config().shift);
        let rows: Vec<i64> = window.positions.iter().map(|position| (i64::from(*position) - shift).max(0)).collect();
        let rows = Tensor::f_from_slice(&rows)?.f_to_device(device)?;
        let of =
            |sequence: i64| -> Result<Tensor, ModelError> { model.logits(&hidden.f_get(sequence)?.f_index_select(0, &rows)?) };
        let mut logits = of(0)?;
        if let Some(guidance) = &window.guidance {
            let unconditional = of(1)?.f_to_kind(Kind::Float)?;
            let difference = logits.f_to_kind(Kind::Float)?.f_sub(&unconditional)?;
            logits = unconditional.f_add(&difference.f_mul_scalar(guidance.scale + 1.0)?)?;
        }
        let head = started.elapsed() - forward;

        let rows = statistics(&logits, &window.sampling, window.noise_seed)?;
        let timing = Timing { forward, head, statistics: started.elapsed() - forward - head };
        Ok(Outcome { rows, timing, forwards: 1 + usize::from(window.guidance.is_some()) })
    })
}
