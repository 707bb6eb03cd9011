//! A quantised matrix as the tensors that a checkpoint keeps of it, and back.

use super::{Form, Layout};
use crate::model::TensorSpec;
use crate::model::quantized::{Codes, Quantized};
use crate::tensor::{Kind, TchError, Tensor};

/// The matrix that `stored` are the parts of, in the order of [`Form::parts`]; or what is wrong with them, by the part's name.
pub fn read(spec: &TensorSpec, form: &Form, stored: &[Tensor]) -> Result<Quantized, String> {
    let failed = |error: TchError| format!("tensor {}: {}", spec.name, error.to_string().lines().next().unwrap_or_default());
    let parts = form.parts(spec);
    let (Some(codes), Some(scales)) = (stored.first(), stored.get(1)) else {
        return Err(format!("tensor {} is missing", spec.name));
    };
    if let (Layout::Packed(_), Some(shape)) = (form.layout, stored.get(2)) {
        let said = Vec::<i64>::try_from(shape.f_to_kind(Kind::Int64).map_err(failed)?).map_err(failed)?;
        if said != spec.shape {
            return Err(format!("tensor {} says {said:?}, not {:?}", parts[2].name, spec.shape));
        }
    }
    let codes = match form.layout {
        Layout::Packed(bits) => unpack(codes, bits, spec.shape[1]).map_err(failed)?,
        _ => codes.shallow_clone(),
    };
    if let Some(problem) = wrong_codes(&codes, form.scheme.codes).map_err(failed)? {
        return Err(format!("tensor {} holds {problem}", parts[0].name));
    }
    let scales = scales.f_to_kind(Kind::Float).map_err(failed)?;
    if !all(&scales.f_isfinite().and_then(|finite| scales.f_gt(0.0)?.f_logical_and(&finite)).map_err(failed)?)
        .map_err(failed)?
    {
        return Err(format!("tensor {} holds a scale that is not above 0", parts[1].name));
    }
    let (rows, columns) = form.scheme.grid(spec.shape[1] as usize);
    let grid = [(spec.shape[0] as usize).div_ceil(rows) as i64, (spec.shape[1] as usize).div_ceil(columns) as i64];
    let scales = match form.whole {
        true => scales.f_view([1, 1]).and_then(|scale| scale.f_expand(grid, false)?.f_contiguous()),
        false => scales.f_view(grid),
    };
    Ok(Quantized { scheme: form.scheme, codes, scales: scales.map_err(failed)? })
}

/// The parts of a matrix, as [`Form::parts`] lists them; scales in the type `floats`.
pub fn write(quantized: &Quantized, form: &Form, floats: Kind) -> Result<Vec<Tensor>, TchError> {
    let codes = match form.layout {
        Layout::Packed(bits) => pack(&quantized.codes, bits)?,
        _ => quantized.codes.shallow_clone(),
    };
    let scales = quantized.scales.f_to_kind(floats)?;
    let mut parts = vec![codes, scales];
    if matches!(form.layout, Layout::Packed(_)) {
        parts.push(Tensor::f_from_slice(&quantized.codes.size())?);
    }
    Ok(parts)
}

fn all(flags: &Tensor) -> Result<bool, TchError> {
    Ok(flags.f_all()?.f_int64_value(&[])? != 0)
}

/// What codes may not be: floats of eight bits have two that are no number.
fn wrong_codes(codes: &Tensor, of: Codes) -> Result<Option<&'static str>, TchError> {
    let sound = match of {
        Codes::Int8 => return Ok(None),
        Codes::Int4 => codes.f_ge(-8)?.f_logical_and(&codes.f_le(7)?)?,
        Codes::E4m3 => codes.f_view_dtype(Kind::Uint8)?.f_bitwise_and(127)?.f_ne(127)?,
    };
    Ok(match (all(&sound)?, of) {
        (true, _) => None,
        (false, Codes::E4m3) => Some("NaN"),
        (false, _) => Some("codes outside -8 to 7"),
    })
}

/// Words of 32 bits, the first code in the lowest ones, as codes of so many bits (4 or 8): they are kept with half their range added.
fn unpack(words: &Tensor, bits: u32, columns: i64) -> Result<Tensor, TchError> {
    let (rows, _) = words.size2()?;
    let bytes = words.f_contiguous()?.f_view_dtype(Kind::Uint8)?;
    let whole = |bytes: Tensor| bytes.f_narrow(1, 0, columns)?.f_contiguous();
    match bits {
        4 => {
            let pairs = Tensor::f_stack(&[bytes.f_bitwise_and(15)?, bytes.f_bitwise_right_shift_tensor_scalar(4)?], -1)?;
            whole(pairs.f_view([rows, -1])?)?.f_view_dtype(Kind::Int8)?.f_sub_scalar(8)
        }
        _ => whole(bytes)?.f_bitwise_xor(128)?.f_view_dtype(Kind::Int8),
    }
}

/// The reverse; a row's last word is filled up with zeros.
fn pack(codes: &Tensor, bits: u32) -> Result<Tensor, TchError> {
    let (rows, columns) = codes.size2()?;
    let word = i64::from(32 / bits);
    let whole = |bytes: Tensor| bytes.f_constant_pad_nd([0, (word - columns % word) % word])?.f_contiguous();
    let bytes = match bits {
        4 => {
            let pairs = whole(codes.f_add_scalar(8)?.f_view_dtype(Kind::Uint8)?)?.f_view([rows, -1, 2])?;
            let high = pairs.f_select(2, 1)?.f_bitwise_left_shift_tensor_scalar(4)?;
            pairs.f_select(2, 0)?.f_bitwise_or_tensor(&high)?
        }
        _ => whole(codes.f_contiguous()?.f_view_dtype(Kind::Uint8)?.f_bitwise_xor(128)?)?,
    };
    bytes.f_contiguous()?.f_view_dtype(Kind::Int)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        for (bits, low) in [(4, -8), (8, -128)] {
            let count = -2 * low;
            let codes = Tensor::arange(3 * 61, (Kind::Int64, tch::Device::Cpu)).remainder(count) + low;
            let codes = codes.to_kind(Kind::Int8).view([3, 61]);
            let words = pack(&codes, bits).unwrap();
            assert_eq!((words.kind(), words.size()), (Kind::Int, vec![3, (61 * i64::from(bits) + 31) / 32]));
            assert_eq!(unpack(&words, bits, 61).unwrap(), codes);
        }
    }
}
