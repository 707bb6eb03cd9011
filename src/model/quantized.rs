//! Weights of fewer bits: codes (whole numbers, or floats of eight bits) and the scales that several of them share. A weight is its
//! code times its scale; codes are symmetric, so that 0 is 0.
//!
//! A [`Scheme`] says how; [`Quantized`] is one matrix of a checkpoint, or one made of floats when a model is loaded ([`Quantizing`]).
//! How a product with it is computed is left to [`mod@super::linear`]; how it lies in files, to [`crate::checkpoint`].

use std::fmt;
use std::str::FromStr;

use super::blocks::Blocks;
use super::{ModelError, Source, TensorSpec};
use crate::tensor::kernels::rounding::MIXED;
use crate::tensor::{Kind, Tensor};

/// What a weight is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// −127 to 127.
    Int8,
    /// −8 to 7.
    Int4,
    /// Four bits of exponent, three of mantissa, no infinities; up to 448.
    E4m3,
}

impl Codes {
    /// The largest code that a scale is made for.
    pub fn largest(self) -> f64 {
        match self {
            Self::Int8 => 127.0,
            Self::Int4 => 7.0,
            Self::E4m3 => 448.0,
        }
    }

    /// Type of the tensor that holds them, one an element.
    pub fn kind(self) -> Kind {
        match self {
            Self::Int8 | Self::Int4 => Kind::Int8,
            Self::E4m3 => Kind::Float8e4m3fn,
        }
    }
}

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// All of an output.
    Row,
    /// So many inputs of an output, side by side; the last group may be shorter.
    Group(usize),
    /// A square of so many outputs and inputs; those at the edges may be smaller.
    Block(usize),
}

/// What a product does with its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Takes it as it is: only weights are stored in fewer bits.
    Kept,
    /// Rounds each row to eight bits of the codes' sort (int8 beside int4), by its own largest number.
    Rows,
    /// Likewise, by the largest of so many numbers side by side.
    Groups(usize),
    /// Likewise, once [`mixed`]: what is far larger than its neighbours no longer costs them their codes. Weights are mixed before they are
    /// rounded, too, so that the product stays what it was.
    Mixed(usize),
}

/// How a matrix is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    pub codes: Codes,
    pub sharing: Sharing,
    pub activations: Activations,
}

impl Scheme {
    /// With a scale for 64 of a row's numbers, which are mixed before: it loses less than half of what rounding alone does (docs/LOG.md).
    pub const INT8: Self = Self { codes: Codes::Int8, sharing: Sharing::Row, activations: Activations::Mixed(64) };
    /// With a scale for a whole row, as most tools have it, and operators of GPUs.
    pub const INT8_DYNAMIC: Self = Self { activations: Activations::Rows, ..Self::INT8 };
    pub const INT8_WEIGHT_ONLY: Self = Self { activations: Activations::Kept, ..Self::INT8 };
    pub const INT4: Self = Self { codes: Codes::Int4, sharing: Sharing::Group(64), activations: Activations::Kept };
    pub const INT4_DYNAMIC: Self = Self { activations: Activations::Groups(64), ..Self::INT4 };
    pub const FP8: Self = Self { codes: Codes::E4m3, sharing: Sharing::Row, activations: Activations::Rows };
    /// DeepSeek's.
    pub const FP8_BLOCK: Self =
        Self { codes: Codes::E4m3, sharing: Sharing::Block(128), activations: Activations::Groups(128) };

    /// Those that go by a name.
    pub const NAMED: [(&str, Self); 7] = [
        ("int8", Self::INT8),
        ("int8-dynamic", Self::INT8_DYNAMIC),
        ("int8-weight-only", Self::INT8_WEIGHT_ONLY),
        ("int4", Self::INT4),
        ("int4-dynamic", Self::INT4_DYNAMIC),
        ("fp8", Self::FP8),
        ("fp8-block", Self::FP8_BLOCK),
    ];

    /// Outputs and inputs that share a scale, of a matrix with so many inputs.
    pub fn grid(&self, inputs: usize) -> (usize, usize) {
        match self.sharing {
            Sharing::Row => (1, inputs.max(1)),
            Sharing::Group(length) => (1, length.max(1)),
            Sharing::Block(length) => (length.max(1), length.max(1)),
        }
    }

    /// What of it a checkpoint can say: the conventions have no word for mixed numbers that every tool would know.
    pub fn storable(self) -> Self {
        match self.activations {
            Activations::Mixed(length) => Self { activations: Activations::Groups(length), ..self },
            _ => self,
        }
    }

    /// Without mixing where a matrix's inputs are no whole sixteens.
    fn for_inputs(self, inputs: usize) -> Self {
        if inputs.is_multiple_of(MIXED) { self } else { self.storable() }
    }

    /// The scheme for a vocabulary head beside this one: its rows decide between tokens and are few bytes of all but the smallest
    /// models, so that it keeps eight bits.
    pub fn for_head(self) -> Self {
        if self.codes == Codes::Int4 { Self { codes: Codes::Int8, sharing: Sharing::Row, ..self } } else { self }
    }
}

impl fmt::Display for Scheme {
    /// A name, or the parts where it has none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = Self::NAMED.iter().find(|(_, scheme)| scheme == self) {
            return f.write_str(name);
        }
        f.write_str(match self.codes {
            Codes::Int8 => "int8",
            Codes::Int4 => "int4",
            Codes::E4m3 => "fp8",
        })?;
        match self.sharing {
            // Unsaid, it would be the name of one with groups.
            Sharing::Row if self.codes == Codes::Int4 => f.write_str("-row")?,
            Sharing::Row => {}
            Sharing::Group(length) => write!(f, "-group-{length}")?,
            Sharing::Block(length) => write!(f, "-block-{length}")?,
        }
        match self.activations {
            Activations::Kept => f.write_str("-weight-only"),
            Activations::Rows => f.write_str("-dynamic"),
            Activations::Groups(length) => write!(f, "-dynamic-{length}"),
            Activations::Mixed(length) => write!(f, "-hadamard-{length}"),
        }
    }
}

impl FromStr for Scheme {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::NAMED.iter().find(|(known, _)| *known == name).map(|(_, scheme)| *scheme);
        found.or_else(|| spelt(name)).ok_or_else(|| {
            let known: Vec<_> = Self::NAMED.iter().map(|(name, _)| *name).collect();
            format!("unknown quantisation '{name}': use {}, or as in int8-group-64-dynamic", known.join(", "))
        })
    }
}

/// A scheme by its parts, as they are displayed: `int4-group-32-weight-only`.
fn spelt(name: &str) -> Option<Scheme> {
    let mut parts = name.split('-').peekable();
    let codes = match parts.next()? {
        "int8" => Codes::Int8,
        "int4" => Codes::Int4,
        "fp8" => Codes::E4m3,
        _ => return None,
    };
    // Scales of even groups, and few enough of them.
    let length = |text: &str| text.parse().ok().filter(|length| (8..=65_536).contains(length) && length % 8 == 0);
    let sharing = match parts.next_if(|part| ["row", "group", "block"].contains(part)) {
        None | Some("row") => Sharing::Row,
        Some("group") => Sharing::Group(length(parts.next()?)?),
        Some(_) => Sharing::Block(length(parts.next()?)?),
    };
    let activations = match (parts.next()?, parts.next()) {
        ("weight", Some("only")) => Activations::Kept,
        ("dynamic", None) => Activations::Rows,
        ("dynamic", Some(group)) => Activations::Groups(length(group)?),
        ("hadamard", Some(group)) if codes != Codes::E4m3 => Activations::Mixed(length(group)?),
        _ => return None,
    };
    parts.next().is_none().then_some(Scheme { codes, sharing, activations })
}

/// A matrix in codes and scales.
#[derive(Debug)]
pub struct Quantized {
    pub scheme: Scheme,
    /// `[outputs, inputs]`, one code an element.
    pub codes: Tensor,
    /// `[⌈outputs / rows⌉, ⌈inputs / columns⌉]` of the scheme's grid, f32.
    pub scales: Tensor,
}

/// By how much of what holds the largest weight a scale of four bits may fall short: the large ones lose, all others gain.
const SHRINK: [f64; 11] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6];

impl Quantized {
    /// `weight: [outputs, inputs]` in `scheme`. Scales hold the largest weight, those of int4 whatever gives the least squared error.
    pub fn of(weight: &Tensor, scheme: Scheme) -> Result<Self, ModelError> {
        let (outputs, inputs) = weight.size2()?;
        let scheme = scheme.for_inputs(inputs as usize);
        let (rows, columns) = scheme.grid(inputs as usize);
        let (rows, columns) = (rows as i64, columns as i64);
        let (down, across) = ((outputs + rows - 1) / rows, (inputs + columns - 1) / columns);
        let weight = weight.f_to_kind(Kind::Float)?;
        let weight = if let Activations::Mixed(_) = scheme.activations { mixed_weights(&weight)? } else { weight };
        let full = weight.f_constant_pad_nd([0, across * columns - inputs, 0, down * rows - outputs])?;
        // Those that share a scale, side by side.
        let shared =
            full.f_view([down, rows, across, columns])?.f_permute([0, 2, 1, 3])?.f_reshape([down, across, rows * columns])?;
        let largest = shared.f_abs()?.f_amax(-1, true)?;
        let whole = largest.f_div_scalar(scheme.codes.largest())?;
        // Where all weights are 0 any scale does.
        let whole = whole.f_where_self(&largest.f_gt(0.0)?, &whole.f_ones_like()?)?;
        let scales = match scheme.codes {
            Codes::Int4 => least_error(&shared, &whole)?,
            _ => whole,
        };
        let codes = encode(&shared.f_div(&scales)?, scheme.codes)?;
        let codes = codes.f_view([down, across, rows, columns])?.f_permute([0, 2, 1, 3])?;
        let codes = codes.f_reshape([down * rows, across * columns])?.f_narrow(0, 0, outputs)?.f_narrow(1, 0, inputs)?;
        Ok(Self { scheme, codes: codes.f_contiguous()?, scales: scales.f_view([down, across])? })
    }

    pub fn outputs(&self) -> usize {
        self.codes.size().first().map_or(0, |n| *n as usize)
    }

    pub fn inputs(&self) -> usize {
        self.codes.size().get(1).map_or(0, |n| *n as usize)
    }

    /// The scale of every output's groups, `[outputs, groups]`.
    pub fn scales_by_row(&self) -> Result<Tensor, ModelError> {
        let (rows, _) = self.scheme.grid(self.inputs());
        if rows == 1 {
            return Ok(self.scales.shallow_clone());
        }
        let scales = self.scales.f_repeat_interleave_self_int(rows as i64, 0, None::<i64>)?;
        Ok(scales.f_narrow(0, 0, self.outputs() as i64)?.f_contiguous()?)
    }

    /// The weights as floats, `[outputs, inputs]`.
    pub fn dequantized(&self, kind: Kind) -> Result<Tensor, ModelError> {
        let (_, columns) = self.scheme.grid(self.inputs());
        let scales = self.scales_by_row()?;
        let scales = match scales.size()[1] {
            1 => scales,
            _ => scales.f_repeat_interleave_self_int(columns as i64, 1, None::<i64>)?.f_narrow(1, 0, self.inputs() as i64)?,
        };
        let weight = self.codes.f_to_kind(Kind::Float)?.f_mul(&scales)?;
        let weight = if let Activations::Mixed(_) = self.scheme.activations { mixed_weights(&weight)? } else { weight };
        Ok(weight.f_to_kind(kind)?)
    }

    /// `x · weightᵀ` by definition, `[..., inputs]` to `[..., outputs]` in f32: what every way of computing it is held to.
    pub fn product(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let x = match self.scheme.activations {
            Activations::Kept => x.f_to_kind(Kind::Float)?,
            _ => rounded(x, self.scheme)?,
        };
        Ok(x.f_matmul(&self.dequantized(Kind::Float)?.f_transpose(0, 1)?)?)
    }

    /// Some of the outputs. Of blocks, whole ones.
    pub fn narrow(&self, first: usize, count: usize) -> Result<Self, ModelError> {
        let (rows, _) = self.scheme.grid(self.inputs());
        let codes = self.codes.f_narrow(0, first as i64, count as i64)?;
        let scales = self.scales.f_narrow(0, (first / rows) as i64, count.div_ceil(rows) as i64)?;
        Ok(Self { scheme: self.scheme, codes, scales })
    }

    /// The same weights with a scale for each output's groups, where blocks share them.
    fn by_row(self) -> Result<Self, ModelError> {
        let Sharing::Block(length) = self.scheme.sharing else { return Ok(self) };
        let scales = self.scales_by_row()?;
        Ok(Self { scheme: Scheme { sharing: Sharing::Group(length), ..self.scheme }, codes: self.codes, scales })
    }
}

/// The scale of each group that gives the least squared error, of those somewhat below `whole`.
fn least_error(shared: &Tensor, whole: &Tensor) -> Result<Tensor, ModelError> {
    let mut best: Option<(Tensor, Tensor)> = None;
    for factor in SHRINK {
        let scales = whole.f_mul_scalar(factor)?;
        let back = encode(&shared.f_div(&scales)?, Codes::Int4)?.f_to_kind(Kind::Float)?.f_mul(&scales)?;
        let error = back.f_sub(shared)?.f_square()?.f_sum_dim_intlist(-1, true, Kind::Float)?;
        best = Some(match best {
            None => (scales, error),
            Some((found, least)) => {
                let better = error.f_lt_tensor(&least)?;
                (scales.f_where_self(&better, &found)?, error.f_minimum(&least)?)
            }
        });
    }
    match best {
        Some((scales, _)) => Ok(scales),
        None => Ok(whole.shallow_clone()),
    }
}

/// Numbers over their scale as codes.
fn encode(scaled: &Tensor, codes: Codes) -> Result<Tensor, ModelError> {
    let bound = codes.largest();
    let rounded = match codes {
        Codes::Int8 => scaled.f_round()?.f_clamp(-bound, bound)?,
        Codes::Int4 => scaled.f_round()?.f_clamp(-bound - 1.0, bound)?,
        Codes::E4m3 => scaled.f_clamp(-bound, bound)?,
    };
    Ok(rounded.f_to_kind(codes.kind())?)
}

/// `x: [..., n]` as codes of its own and the scale of each row of them, `[..., 1]` in f32: what a product does with its input.
pub fn round_rows(x: &Tensor, codes: Codes) -> Result<(Tensor, Tensor), ModelError> {
    let codes = if codes == Codes::Int4 { Codes::Int8 } else { codes };
    let x = x.f_to_kind(Kind::Float)?;
    let largest = x.f_abs()?.f_amax(-1, true)?;
    let scales = largest.f_div_scalar(codes.largest())?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
    Ok((encode(&x.f_div(&scales)?, codes)?, scales))
}

/// `x: [..., inputs]` in f32, each sixteen numbers times a Hadamard matrix, which is its own inverse. To the bit as [`mod@crate::tensor::kernels::rounding`] does it.
pub fn mixed(x: &Tensor) -> Result<Tensor, ModelError> {
    let mut mixed = x.shallow_clone();
    for by in (0..MIXED.ilog2()).map(|at| 1 << at) {
        let pairs = mixed.f_reshape([-1, 2, by])?;
        let (first, second) = (pairs.f_select(1, 0)?, pairs.f_select(1, 1)?);
        mixed = Tensor::f_stack(&[first.f_add(&second)?, first.f_sub(&second)?], 1)?;
    }
    Ok(mixed.f_mul_scalar(1.0 / (MIXED as f64).sqrt())?.f_reshape(x.size())?)
}

/// Likewise by a product, which is ten times as fast: no bit of a weight depends on who else mixes.
fn mixed_weights(weight: &Tensor) -> Result<Tensor, ModelError> {
    let matrix = mixed(&Tensor::f_eye(MIXED as i64, (Kind::Float, weight.device()))?)?;
    Ok(weight.f_reshape([-1, MIXED as i64])?.f_matmul(&matrix)?.f_reshape(weight.size())?)
}

/// `x: [..., inputs]` after the rounding of `scheme`, in f32.
pub fn rounded(x: &Tensor, scheme: Scheme) -> Result<Tensor, ModelError> {
    let back = |(codes, scales): (Tensor, Tensor)| Ok::<_, ModelError>(codes.f_to_kind(Kind::Float)?.f_mul(&scales)?);
    match scheme.activations {
        Activations::Kept => Ok(x.f_to_kind(Kind::Float)?),
        Activations::Rows => back(round_rows(x, scheme.codes)?),
        Activations::Mixed(_) => mixed(&rounded(&mixed(&x.f_to_kind(Kind::Float)?)?, scheme.storable())?),
        Activations::Groups(length) => {
            let (shape, inputs) = (x.size(), x.size().last().copied().unwrap_or(0));
            let missing = (length as i64 - inputs % length as i64) % length as i64;
            let groups = x.f_constant_pad_nd([0, missing])?.f_reshape([-1, length as i64])?;
            let rows = back(round_rows(&groups, scheme.codes)?)?.f_reshape([-1, inputs + missing])?;
            Ok(rows.f_narrow(1, 0, inputs)?.f_reshape(&*shape)?)
        }
    }
}

/// A matrix of weights, in whichever form it came.
#[derive(Debug)]
pub enum Matrix {
    /// `[outputs, inputs]`.
    Plain(Tensor),
    /// Likewise, in floats of 16 bits for a network that computes in f32: the same numbers in fewer bytes.
    Halves(Tensor),
    Blocks(Blocks),
    Quantized(Quantized),
}

impl Matrix {
    /// Its weights, `[outputs, inputs]`: f32 unless they are plain and of another type.
    pub fn floats(&self) -> Result<Tensor, ModelError> {
        match self {
            Matrix::Plain(weight) => Ok(weight.shallow_clone()),
            Matrix::Halves(weight) => Ok(weight.f_to_kind(Kind::Float)?),
            Matrix::Blocks(weight) => weight.floats(),
            Matrix::Quantized(weight) => weight.dequantized(Kind::Float),
        }
    }

    /// Several with the same inputs as one: their outputs side by side. Parts of different forms become floats of type `kind`.
    pub fn join(mut parts: Vec<Matrix>, kind: Kind) -> Result<Self, ModelError> {
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        if parts.iter().all(|part| matches!(part, Matrix::Blocks(_))) {
            let blocks =
                parts.into_iter().filter_map(|part| if let Matrix::Blocks(blocks) = part { Some(blocks) } else { None });
            return Ok(Matrix::Blocks(Blocks::join(&blocks.collect::<Vec<_>>())?));
        }
        let halves = |part: &Matrix| if let Matrix::Halves(weight) = part { Some(weight.shallow_clone()) } else { None };
        if let Some(halves) = parts.iter().map(halves).collect::<Option<Vec<_>>>()
            && halves.iter().all(|half| half.kind() == halves[0].kind())
        {
            return Ok(Matrix::Halves(Tensor::f_cat(&halves, 0)?));
        }
        let floats = |part: &Matrix| -> Result<Tensor, ModelError> { Ok(part.floats()?.f_to_kind(kind)?) };
        let scheme = |part: &Matrix| if let Matrix::Quantized(weight) = part { Some(weight.scheme) } else { None };
        let first = parts.first().and_then(scheme);
        match first {
            Some(first) if parts.iter().all(|part| scheme(part) == Some(first)) => {}
            _ => return Ok(Matrix::Plain(Tensor::f_cat(&parts.iter().map(floats).collect::<Result<Vec<_>, _>>()?, 0)?)),
        }
        let quantized =
            parts.into_iter().filter_map(|part| if let Matrix::Quantized(weight) = part { Some(weight) } else { None });
        let mut quantized: Vec<Quantized> = quantized.collect();
        // Blocks can stand below one another only where they are whole.
        let whole = |weight: &Quantized| weight.outputs().is_multiple_of(weight.scheme.grid(weight.inputs()).0);
        if !quantized.iter().rev().skip(1).all(whole) {
            quantized = quantized.into_iter().map(Quantized::by_row).collect::<Result<_, _>>()?;
        }
        let scheme = quantized[0].scheme;
        let codes: Vec<_> = quantized.iter().map(|weight| &weight.codes).collect();
        let scales: Vec<_> = quantized.iter().map(|weight| &weight.scales).collect();
        // libtorch joins no floats of eight bits everywhere; their bytes it does.
        let bytes = codes.iter().map(|codes| codes.f_view_dtype(Kind::Uint8)).collect::<Result<Vec<_>, _>>()?;
        let codes = Tensor::f_cat(&bytes, 0)?.f_view_dtype(scheme.codes.kind())?;
        Ok(Matrix::Quantized(Quantized { scheme, codes, scales: Tensor::f_cat(&scales, 0)? }))
    }
}

/// A source whose projections are quantised as they come. What comes quantised stays as it is.
pub struct Quantizing<S> {
    pub source: S,
    pub scheme: Scheme,
}

impl<S: Source> Source for Quantizing<S> {
    type Error = S::Error;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, S::Error> {
        self.source.tensor(spec)
    }

    fn matrix(&mut self, spec: &TensorSpec) -> Result<Matrix, S::Error> {
        match self.source.matrix(spec)? {
            Matrix::Quantized(quantized) => Ok(Matrix::Quantized(quantized)),
            floats => Ok(Matrix::Quantized(Quantized::of(&floats.floats()?, self.scheme)?)),
        }
    }

    fn head(&mut self, spec: &TensorSpec, embedding: Option<&Tensor>) -> Result<Option<Matrix>, S::Error> {
        let floats = match (self.source.head(spec, embedding)?, embedding) {
            (Some(Matrix::Quantized(quantized)), _) => return Ok(Some(Matrix::Quantized(quantized))),
            (_, Some(embedding)) => embedding.shallow_clone(),
            (Some(head), None) => head.floats()?,
            (None, None) => return Ok(None),
        };
        Ok(Some(Matrix::Quantized(Quantized::of(&floats, self.scheme.for_head())?)))
    }
}
