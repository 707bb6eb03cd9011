//! Quantised weights for our own kernels, on the CPU: whole numbers with rounded rows by [`Int8`], everything else by [`Narrow`], which
//! widens weights where it uses them.

use super::{Placement, Product, add, unsuited};
use crate::model::ModelError;
use crate::model::quantized::{Activations, Codes, Quantized, Scheme, Sharing, rounded};
use crate::tensor::kernels::codes::{Form, Narrow};
use crate::tensor::kernels::int8::Int8;
use crate::tensor::{Device, Dtype, Tensor};

pub(super) fn form(weight: &Quantized, placement: Placement) -> Result<Option<Box<dyn Product>>, ModelError> {
    if placement.device != Device::Cpu || placement.dtype == Dtype::F16 {
        return Ok(None);
    }
    if weight.scheme == Scheme::INT8 {
        return Ok(Int8::of(&weight.codes, &weight.scales)?.map(|weight| Box::new(weight) as _));
    }
    let form = match weight.scheme.codes {
        Codes::Int8 => Form::Int8,
        Codes::Int4 => Form::Int4,
        Codes::E4m3 => Form::E4m3,
    };
    let group = match weight.scheme.sharing {
        Sharing::Row => weight.inputs(),
        Sharing::Group(length) | Sharing::Block(length) => length,
    };
    let narrow = Narrow::of(form, &weight.codes, &weight.scales_by_row()?, group)?;
    Ok(narrow.map(|weight_| Box::new(Widened { weight: weight_, scheme: weight.scheme }) as _))
}

impl Product for Int8 {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        match Int8::product(self, x)? {
            Some(out) => add(out, bias),
            None => Err(unsuited(x)),
        }
    }

    fn bytes(&self) -> usize {
        Int8::bytes(self)
    }
}

/// Weights that are widened, and rows that are rounded first where the scheme says so.
struct Widened {
    weight: Narrow,
    scheme: Scheme,
}

impl Product for Widened {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let out = match self.scheme.activations {
            Activations::Kept => self.weight.product(x)?,
            _ => self.weight.product(&rounded(x, self.scheme)?)?.map(|out| out.f_to_kind(x.kind())).transpose()?,
        };
        match out {
            Some(out) => add(out, bias),
            None => Err(unsuited(x)),
        }
    }

    fn bytes(&self) -> usize {
        self.weight.bytes()
    }
}
