//! Matrices as ggml's files have them: codes in groups that share a scale and a minimum.
//!
//! A weight is `code · scale + minimum`, in f32 the very number that the file means: unlike [`super::quantized`], where a scheme stands
//! between a model and its numbers, this is only a shorter way to write them. How they lie in files is left to [`crate::checkpoint::gguf`],
//! and the product to [`crate::tensor::kernels::compact`].

use super::ModelError;
use crate::tensor::{Kind, Tensor};

/// A matrix of codes.
#[derive(Debug)]
pub struct Blocks {
    /// `[outputs, inputs]`, uint8.
    pub codes: Tensor,
    /// `[outputs, groups]` each, f32.
    pub scales: Tensor,
    pub minima: Tensor,
}

impl Blocks {
    /// The weights, `[outputs, inputs]` in f32.
    pub fn floats(&self) -> Result<Tensor, ModelError> {
        let ((outputs, inputs), (_, groups)) = (self.codes.size2()?, self.scales.size2()?);
        let grouped = self.codes.f_to_kind(Kind::Float)?.f_view([outputs, groups, -1])?;
        // A code times its scale is exact, so that it does not matter that this is no fused multiply-add.
        let weights = grouped.f_mul(&self.scales.f_unsqueeze(2)?)?.f_add(&self.minima.f_unsqueeze(2)?)?;
        Ok(weights.f_view([outputs, inputs])?)
    }

    /// Several with the same inputs as one: their outputs side by side, in groups as short as the shortest.
    pub fn join(parts: &[Blocks]) -> Result<Self, ModelError> {
        let groups = parts.iter().map(|part| part.scales.size()[1]).max().unwrap_or(0);
        let joined = |of: fn(&Blocks) -> &Tensor| -> Result<Tensor, ModelError> {
            let spread = parts.iter().map(|part| {
                let own = of(part);
                own.f_repeat_interleave_self_int(groups / part.scales.size()[1].max(1), 1, None::<i64>)
            });
            Ok(Tensor::f_cat(&spread.collect::<Result<Vec<_>, _>>()?, 0)?)
        };
        let codes: Vec<&Tensor> = parts.iter().map(|part| &part.codes).collect();
        Ok(Self {
            codes: Tensor::f_cat(&codes, 0)?,
            scales: joined(|part| &part.scales)?,
            minima: joined(|part| &part.minima)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;

    /// Of 16 and 32 inputs, as a file has them whose values are stored in more bits than its queries.
    #[test]
    fn groups_of_different_lengths_are_joined() {
        let part = |outputs: i64, group: i64| Blocks {
            codes: Tensor::randint(64, [outputs, 96], (Kind::Uint8, Device::Cpu)),
            scales: Tensor::rand([outputs, 96 / group], (Kind::Float, Device::Cpu)),
            minima: Tensor::rand([outputs, 96 / group], (Kind::Float, Device::Cpu)),
        };
        let parts = [part(5, 32), part(3, 16), part(1, 32)];
        let right: Vec<Tensor> = parts.iter().map(|part| part.floats().unwrap()).collect();
        let joined = Blocks::join(&parts).unwrap();
        assert_eq!(joined.scales.size(), [9, 6]);
        assert!(joined.floats().unwrap().equal(&Tensor::cat(&right, 0)));
    }
}
