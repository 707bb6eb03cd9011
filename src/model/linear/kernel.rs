//! Quantised weights for our own kernels, on the CPU: whole numbers with rounded rows by [`Integers`], everything else by [`Narrow`], which
//! widens weights where it uses them.

use super::{Placement, Product, add, unsuited};
use crate::model::ModelError;
use crate::model::quantized::{Activations, Codes, Quantized, Scheme, Sharing, mixed, rounded};
use crate::tensor::kernels::codes::{Form, Narrow};
use crate::tensor::kernels::integers::{Integers, Width};
use crate::tensor::kernels::turns::{Rows, Turns};
use crate::tensor::{Device, Dtype, Kind, Tensor};

pub(super) fn form(weight: &Quantized, placement: Placement) -> Result<Option<Box<dyn Product>>, ModelError> {
    if placement.device != Device::Cpu || placement.dtype == Dtype::F16 {
        return Ok(None);
    }
    let Scheme { codes, sharing, activations } = weight.scheme;
    let (form, width) = match codes {
        Codes::Int8 => (Form::Int8, Some(Width::Eight)),
        Codes::Int4 => (Form::Int4, Some(Width::Four)),
        Codes::E4m3 => (Form::E4m3, None),
    };
    let group = match sharing {
        Sharing::Row => weight.inputs(),
        Sharing::Group(length) | Sharing::Block(length) => length,
    };
    let scales = weight.scales_by_row()?;
    let (apart, mixes) = match activations {
        Activations::Kept | Activations::Rows => (None, false),
        Activations::Groups(length) => (Some(length), false),
        Activations::Mixed(length) => (Some(length), true),
    };
    if let (Some(width), true) = (width, activations != Activations::Kept)
        && let Some(found) = Integers::of(width, &weight.codes, &scales, group, apart)?
        && let Some(found) = if mixes { found.mixed() } else { Some(found) }
    {
        return Ok(Some(Box::new(found)));
    }
    let narrow = Narrow::of(form, &weight.codes, &scales, group)?;
    Ok(narrow.map(|narrow| Box::new(Widened { weight: narrow, scheme: weight.scheme }) as _))
}

impl Product for Integers {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        match Integers::product(self, x)? {
            Some(out) => add(out, bias),
            None => Err(unsuited(x)),
        }
    }

    fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        Integers::turn(self, x, out, turns)
    }

    fn bytes(&self) -> usize {
        Integers::bytes(self)
    }

    fn memory(&self) -> Option<(usize, usize)> {
        Some(Integers::memory(self))
    }

    fn read_from_memory(&mut self) {
        Integers::read_from_memory(self);
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
            Activations::Mixed(_) => {
                let rounded = rounded(&mixed(&x.f_to_kind(Kind::Float)?)?, self.scheme.storable())?;
                self.weight.product(&rounded)?.map(|out| out.f_to_kind(x.kind())).transpose()?
            }
            _ => self.weight.product(&rounded(x, self.scheme)?)?.map(|out| out.f_to_kind(x.kind())).transpose()?,
        };
        match out {
            Some(out) => add(out, bias),
            None => Err(unsuited(x)),
        }
    }

    fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        if self.scheme.activations == Activations::Kept { self.weight.turn(x, out, turns) } else { None }
    }

    fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    fn memory(&self) -> Option<(usize, usize)> {
        Some(self.weight.memory())
    }

    fn read_from_memory(&mut self) {
        self.weight.read_from_memory();
    }
}
