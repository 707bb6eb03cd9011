//! Quantised weights for libtorch's operators: on a GPU, and on a CPU whose kernels are not used.
//!
//! `_int_mm` multiplies whole numbers exactly; on a GPU it wants more than 16 rows, and sizes in eights. `_weight_int8pack_mm` and
//! `_weight_int4pack_mm` widen weights to bf16. `_scaled_mm` multiplies floats of eight bits; by rows it wants compute capability 8.9,
//! by blocks 9.0, and sizes in sixteens.

use super::{Placement, Product, add, bytes};
use crate::model::ModelError;
use crate::model::quantized::{Activations, Codes, Quantized, Scheme, Sharing, round_rows};
use crate::tensor::fused::Fused;
use crate::tensor::{Device, Dtype, Kind, Tensor};

/// Rows that `_int_mm` wants on a GPU.
const INT_ROWS_MIN: i64 = 17;
/// Tiles of inputs that the packed form of four bits has on a GPU.
const INNER_TILES: i64 = 8;

fn on_cpu(placement: Placement) -> bool {
    placement.device == Device::Cpu
}

/// Rows filled up with zeros to at least `least`, and a multiple of `step`.
fn fill_up(x: &Tensor, least: i64, step: i64) -> Result<Tensor, ModelError> {
    let rows = x.size2()?.0;
    let wanted = (rows.max(least) + step - 1) / step * step;
    Ok(if wanted == rows { x.shallow_clone() } else { x.f_constant_pad_nd([0, 0, 0, wanted - rows])? })
}

/// `x: [..., inputs]` as rows, and the shape of what comes out.
fn as_rows(x: &Tensor, outputs: i64) -> Result<(Tensor, Vec<i64>), ModelError> {
    let mut shape = x.size();
    let inputs = shape.pop().unwrap_or(0);
    shape.push(outputs);
    Ok((x.f_reshape([-1, inputs])?, shape))
}

/// [`round_rows`], in one pass where the device has it.
fn codes_of(x: &Tensor, codes: Codes, fused: Option<&Fused>) -> Result<(Tensor, Tensor), ModelError> {
    match fused.map_or(Ok(None), |fused| fused.rounded(x, codes == Codes::E4m3))? {
        Some(rounded) => Ok(rounded),
        None => round_rows(x, codes),
    }
}

/// Whole numbers by whole numbers.
pub(super) fn int8(weight: &Quantized, placement: Placement) -> Result<Option<Box<dyn Product>>, ModelError> {
    let sizes = on_cpu(placement) || (weight.inputs().is_multiple_of(8) && weight.outputs().is_multiple_of(8));
    if weight.scheme != Scheme::INT8_DYNAMIC || !sizes {
        return Ok(None);
    }
    // On the CPU the inputs lie one after the other; on a GPU the outputs do, as seen by the product.
    let transposed = weight.codes.f_transpose(0, 1)?;
    let codes = if on_cpu(placement) { transposed.f_contiguous()? } else { transposed };
    let least = if on_cpu(placement) { 1 } else { INT_ROWS_MIN };
    let step = if on_cpu(placement) { 1 } else { 8 };
    Ok(Some(Box::new(Whole { codes, scales: weight.scales.f_view([1, -1])?, least, step, fused: Fused::on(placement.device) })))
}

struct Whole {
    /// `[inputs, outputs]`.
    codes: Tensor,
    /// `[1, outputs]`.
    scales: Tensor,
    least: i64,
    step: i64,
    fused: Option<&'static Fused>,
}

impl Product for Whole {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let (rows, shape) = as_rows(x, self.codes.size2()?.1)?;
        let (codes, scales) = codes_of(&rows, Codes::Int8, self.fused)?;
        let sums = fill_up(&codes, self.least, self.step)?.f_internal_int_mm(&self.codes)?;
        let sums = sums.f_narrow(0, 0, rows.size2()?.0)?.f_to_kind(Kind::Float)?;
        add(sums.f_mul(&scales)?.f_mul(&self.scales)?.f_to_kind(x.kind())?.f_view(&*shape)?, bias)
    }

    fn bytes(&self) -> usize {
        bytes(&self.codes) + bytes(&self.scales)
    }
}

/// Weights of eight bits, widened.
pub(super) fn int8_weight_only(weight: &Quantized, placement: Placement) -> Result<Option<Box<dyn Product>>, ModelError> {
    if weight.scheme != Scheme::INT8_WEIGHT_ONLY || placement.dtype != Dtype::Bf16 {
        return Ok(None);
    }
    let scales = weight.scales.f_view([-1])?.f_to_kind(Kind::BFloat16)?;
    Ok(Some(Box::new(Widened8 { codes: weight.codes.shallow_clone(), scales })))
}

struct Widened8 {
    /// `[outputs, inputs]`.
    codes: Tensor,
    scales: Tensor,
}

impl Product for Widened8 {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let (rows, shape) = as_rows(x, self.codes.size2()?.0)?;
        let out = rows.f_contiguous()?.f_internal_weight_int8pack_mm(&self.codes, &self.scales)?;
        add(out.f_view(&*shape)?, bias)
    }

    fn bytes(&self) -> usize {
        bytes(&self.codes) + bytes(&self.scales)
    }
}

/// Weights of four bits in groups, widened.
pub(super) fn int4(weight: &Quantized, placement: Placement) -> Result<Option<Box<dyn Product>>, ModelError> {
    let Scheme { codes: Codes::Int4, sharing: Sharing::Group(group), activations: Activations::Kept } = weight.scheme else {
        return Ok(None);
    };
    let (outputs, inputs, cpu) = (weight.outputs(), weight.inputs(), on_cpu(placement));
    let inner = INNER_TILES as usize * 16;
    let sizes = if cpu { outputs.is_multiple_of(16) } else { outputs.is_multiple_of(8) && inputs.is_multiple_of(inner) };
    if placement.dtype != Dtype::Bf16 || ![32, 64, 128, 256].contains(&group) || !inputs.is_multiple_of(group) || !sizes {
        return Ok(None);
    }
    // The operators' codes run from 0 to 15 and mean (code − 8) · scale + zero.
    let codes = weight.codes.f_to_kind(Kind::Int)?.f_add_scalar(8)?;
    let packed = if cpu {
        codes.f_internal_convert_weight_to_int4pack_for_cpu(1)?
    } else {
        let codes = codes.f_to_kind(Kind::Uint8)?.f_view([outputs as i64, inputs as i64 / 2, 2])?;
        let first = codes.f_select(2, 0)?.f_mul_scalar(16)?;
        first.f_add(&codes.f_select(2, 1)?)?.f_contiguous()?.f_internal_convert_weight_to_int4pack(INNER_TILES)?
    };
    let scales = weight.scales.f_transpose(0, 1)?.f_unsqueeze(2)?;
    let scales = Tensor::f_cat(&[&scales, &scales.f_zeros_like()?], 2)?.f_contiguous()?.f_to_kind(Kind::BFloat16)?;
    Ok(Some(Box::new(Widened4 { packed, scales, group: group as i64, outputs: outputs as i64, cpu })))
}

struct Widened4 {
    packed: Tensor,
    /// `[groups, outputs, 2]`: scale and zero.
    scales: Tensor,
    group: i64,
    outputs: i64,
    cpu: bool,
}

impl Product for Widened4 {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let (rows, shape) = as_rows(x, self.outputs)?;
        let rows = rows.f_contiguous()?;
        let out = if self.cpu {
            rows.f_internal_weight_int4pack_mm_for_cpu(&self.packed, self.group, &self.scales)?
        } else {
            rows.f_internal_weight_int4pack_mm(&self.packed, self.group, &self.scales)?
        };
        add(out.f_view(&*shape)?, bias)
    }

    fn bytes(&self) -> usize {
        bytes(&self.packed) + bytes(&self.scales)
    }
}

/// Floats of eight bits by floats of eight bits, by rows or by blocks of 128.
pub(super) fn fp8(weight: &Quantized, placement: Placement) -> Result<Option<Box<dyn Product>>, ModelError> {
    let sizes = weight.inputs().is_multiple_of(16) && weight.outputs().is_multiple_of(16);
    if on_cpu(placement) || placement.dtype != Dtype::Bf16 || !sizes {
        return Ok(None);
    }
    let scales = match weight.scheme {
        Scheme::FP8 => weight.scales.f_view([1, -1])?.f_contiguous()?,
        Scheme::FP8_BLOCK if weight.inputs().is_multiple_of(128) => {
            // [⌈inputs / 128⌉ filled up to fours, ⌈outputs / 128⌉], one column after the other.
            let groups = weight.scales.size2()?.1;
            let filled = weight.scales.f_pad([0, (4 - groups % 4) % 4], "constant", 1.0)?;
            filled.f_contiguous()?.f_transpose(0, 1)?
        }
        _ => return Ok(None),
    };
    let codes = weight.codes.f_contiguous()?.f_transpose(0, 1)?;
    Ok(Some(Box::new(Scaled { codes, scales, blocks: weight.scheme == Scheme::FP8_BLOCK, fused: Fused::on(placement.device) })))
}

struct Scaled {
    /// `[inputs, outputs]`, one column after the other.
    codes: Tensor,
    scales: Tensor,
    blocks: bool,
    fused: Option<&'static Fused>,
}

impl Product for Scaled {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let (inputs, outputs) = self.codes.size2()?;
        let (rows, shape) = as_rows(x, outputs)?;
        let count = rows.size2()?.0;
        let filled = fill_up(&rows, 1, 4)?;
        let (codes, scales) = if self.blocks {
            let (codes, scales) = codes_of(&filled.f_view([-1, 128])?, Codes::E4m3, self.fused)?;
            // One column after the other.
            let scales = scales.f_view([-1, inputs / 128])?.f_transpose(0, 1)?.f_contiguous()?.f_transpose(0, 1)?;
            (codes.f_view([-1, inputs])?, scales)
        } else {
            codes_of(&filled, Codes::E4m3, self.fused)?
        };
        let none = None::<&Tensor>;
        let out = codes.f_internal_scaled_mm(&self.codes, &scales, &self.scales, none, none, Kind::BFloat16, false)?;
        add(out.f_narrow(0, 0, count)?.f_reshape(&*shape)?, bias)
    }

    fn bytes(&self) -> usize {
        bytes(&self.codes) + bytes(&self.scales)
    }
}
