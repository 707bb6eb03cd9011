//! Rotary position embedding in the half-rotation form that LLaDA, Dream, Llama and Qwen share (Su et al., arXiv 2104.09864).

use super::ModelError;
use crate::checkpoint::config::{ModelConfig, RopeScaling};
use crate::tensor::kernels::fixed::Fixed;
use crate::tensor::{Device, Kind, Tensor};

/// Tables of cosines and sines for every position, `[positions, head_dim]` in f32.
pub struct Rotary {
    cos: Fixed,
    sin: Fixed,
    /// `sin` with its first half negated: x · cos + (x with its halves swapped) · turned is x rotated, in three operations.
    turned: Tensor,
}

impl Rotary {
    /// `positions` is how many the tables hold; [`Rotary::window`] refuses what lies beyond.
    pub fn new(config: &ModelConfig, positions: usize, device: Device) -> Result<Self, ModelError> {
        let mut frequencies: Vec<f32> = Vec::with_capacity(config.head_dim / 2);
        for pair in 0..config.head_dim / 2 {
            // In f32 throughout, as the originals compute it: the tables must agree to the last bit that f32 gives.
            let exponent = (2 * pair) as f32 / config.head_dim as f32;
            frequencies.push(scale(1.0 / (config.rope_theta as f32).powf(exponent), config.rope_scaling));
        }
        let frequencies = Tensor::f_from_slice(&frequencies)?;
        let positions = Tensor::f_arange(positions as i64, (Kind::Float, Device::Cpu))?;
        let angles = positions.f_unsqueeze(1)?.f_mul(&frequencies.f_unsqueeze(0)?)?;
        let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
        let table = |left: &Tensor, right: &Tensor| Tensor::f_cat(&[left, right], -1)?.f_to_device(device);
        let turned = table(&sin.f_neg()?, &sin)?;
        Ok(Self { cos: Fixed::of(table(&cos, &cos)?), sin: Fixed::of(table(&sin, &sin)?), turned })
    }

    /// Positions that the tables hold.
    pub fn positions(&self) -> usize {
        self.cos.size()[0] as usize
    }

    /// Cosines and sines of all positions, `[positions, head_dim]` in f32.
    pub fn tables(&self) -> (&Fixed, &Fixed) {
        (&self.cos, &self.sin)
    }

    /// Cosines and sines of `length` positions from `start`, `[length, 1, head_dim]` in `kind`.
    pub fn window(&self, start: usize, length: usize, kind: Kind) -> Result<(Tensor, Tensor), ModelError> {
        if start + length > self.positions() {
            return Err(ModelError::TooLong { length: start + length, limit: self.positions() });
        }
        let cut = |table: &Tensor| table.f_narrow(0, start as i64, length as i64)?.f_unsqueeze(1)?.f_to_kind(kind);
        Ok((cut(&self.cos)?, cut(&self.sin)?))
    }

    /// Likewise of these positions.
    pub fn at(&self, positions: &[usize], kind: Kind) -> Result<(Tensor, Tensor), ModelError> {
        if let Some(last) = positions.iter().max().filter(|last| **last >= self.positions()) {
            return Err(ModelError::TooLong { length: last + 1, limit: self.positions() });
        }
        let index: Vec<i64> = positions.iter().map(|position| *position as i64).collect();
        self.pick(&Tensor::f_from_slice(&index)?.f_to_device(self.cos.device())?, &self.sin, kind)
    }

    /// Cosines of `positions: [seq]`, which are on the tables' device and within them, and sines with the first half negated.
    pub fn turning(&self, positions: &Tensor, kind: Kind) -> Result<(Tensor, Tensor), ModelError> {
        self.pick(positions, &self.turned, kind)
    }

    fn pick(&self, index: &Tensor, sines: &Tensor, kind: Kind) -> Result<(Tensor, Tensor), ModelError> {
        let pick = |table: &Tensor| table.f_index_select(0, index)?.f_unsqueeze(1)?.f_to_kind(kind);
        Ok((pick(&self.cos)?, pick(sines)?))
    }
}

/// Rotates `x: [batch, seq, heads, head_dim]` by tables of `[seq, 1, head_dim]`.
pub fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor, ModelError> {
    let half = x.size()[3] / 2;
    let turned = Tensor::f_cat(&[x.f_narrow(3, half, half)?.f_neg()?, x.f_narrow(3, 0, half)?], 3)?;
    Ok(x.f_mul(cos)?.f_add(&turned.f_mul(sin)?)?)
}

/// Llama 3.1's rule is that of `transformers`' `_compute_llama3_parameters`.
fn scale(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low, high, original } => {
            let wavelength = 2.0 * std::f64::consts::PI / frequency as f64;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor as f32
            } else {
                let smooth = ((original / wavelength - low) / (high - low)) as f32;
                (1.0 - smooth) * (frequency / factor as f32) + smooth * frequency
            }
        }
    }
}
