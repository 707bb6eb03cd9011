//! A step's choice in one pass over its logits: the best token of each row, and its probability.

use std::ffi::c_void;

use tch::TchError;

use super::lanes::{LANES, Lanes, Stored, exp, fold};
use super::{Kernel, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Fewer numbers are not worth other threads.
const PARALLEL_FROM: usize = 1 << 13;

/// The best token of each row of `logits: [rows, vocab]` and its probability among all, those of `forbidden` left out and `biases`
/// added; or `None` where libtorch should do it. A row with a number that is not finite has a probability that is not, either.
///
/// The probability is `1 / (1 + Σ others)` with the sum's own precision: 1 − 10⁻⁹ and 1 − 10⁻⁸ do not tie.
pub fn best(logits: &Tensor, forbidden: &[u32], biases: &[(u32, f32)]) -> Result<Option<Vec<(u32, f64)>>, TchError> {
    let (rows, vocab) = logits.size2()?;
    let (rows, vocab) = (rows as usize, vocab as usize);
    if rows == 0 || vocab == 0 || !plain(logits) {
        return Ok(None);
    }
    let mut found = vec![(0, f64::NAN); rows];
    let half = logits.kind() == Kind::BFloat16;
    let choice = Choice { logits: logits.data_ptr(), rows, vocab, forbidden, biases, found: found.as_mut_ptr(), half };
    // SAFETY: contiguous logits of this size and type, and a result for each row; both outlive the call.
    unsafe { launch(&choice, rows > 1 && rows * vocab >= PARALLEL_FROM) };
    Ok(Some(found))
}

struct Choice<'a> {
    logits: *const c_void,
    rows: usize,
    vocab: usize,
    forbidden: &'a [u32],
    biases: &'a [(u32, f32)],
    found: *mut (u32, f64),
    half: bool,
}

impl Kernel for Choice<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let mut buffer = vec![0f32; self.vocab];
        for row in self.rows * thread / threads..self.rows * (thread + 1) / threads {
            unsafe {
                let found = if self.half { self.row::<V, u16>(row, &mut buffer) } else { self.row::<V, f32>(row, &mut buffer) };
                *self.found.add(row) = found;
            }
        }
    }
}

impl Choice<'_> {
    #[inline(always)]
    unsafe fn row<V: Lanes, T: Stored>(&self, row: usize, logits: &mut [f32]) -> (u32, f64) {
        let stored = unsafe { std::slice::from_raw_parts(self.logits.cast::<T>().add(row * self.vocab), self.vocab) };
        let mut broken = 0u32;
        for (logit, stored) in logits.iter_mut().zip(stored) {
            *logit = stored.widen();
            broken |= u32::from(logit.is_nan() | (*logit == f32::INFINITY));
        }
        for (token, bias) in self.biases {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        for token in self.forbidden {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let (lines, rest) = logits.as_chunks::<LANES>();
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for line in lines {
            for (best, logit) in lanes.iter_mut().zip(line) {
                *best = if *logit > *best { *logit } else { *best };
            }
        }
        let best = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        let Some(token) = logits.iter().position(|logit| *logit == best).filter(|_| broken == 0 && best.is_finite()) else {
            return (0, f64::NAN);
        };
        logits[token] = f32::NEG_INFINITY;
        let (lines, rest) = logits.as_chunks::<LANES>();
        let mut sums = [0f32; LANES];
        for line in lines {
            for (sum, logit) in sums.iter_mut().zip(line) {
                *sum += exp(*logit - best);
            }
        }
        let rest: f32 = rest.iter().map(|logit| exp(*logit - best)).sum();
        (token as u32, 1.0 / (1.0 + f64::from(fold(sums)) + f64::from(rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_token_and_its_probability() {
        let logits = Tensor::from_slice(&[1.0f32, 3.0, 2.0, 0.0, 9.0, 2.0]).view([2, 3]);
        let found = best(&logits, &[1], &[(2, 0.5)]).unwrap().unwrap();
        let expected = [(2, 1.0 / (1.0 + (-1.5f64).exp())), (2, 1.0 / (1.0 + (-2.5f64).exp()))];
        for ((token, probability), (right, exact)) in found.iter().zip(expected) {
            assert!(*token == right && (probability - exact).abs() < 1e-6, "{found:?}");
        }
    }

    #[test]
    fn near_certainties_keep_their_order_and_broken_rows_show() {
        let logits = Tensor::from_slice(&[18.4f32, 0.0, 20.7, 0.0, f32::NAN, 1.0]).view([3, 2]);
        let found = best(&logits, &[], &[]).unwrap().unwrap();
        assert!(found[0].1 < found[1].1 && found[1].1 < 1.0 && found[2].1.is_nan(), "{found:?}");
        assert!(best(&logits, &[0, 1], &[]).unwrap().unwrap()[0].1.is_nan(), "nothing is left");
    }
}
