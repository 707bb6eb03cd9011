//! Projections: a product with a weight matrix, in whichever form the weight has, and a bias.
//!
//! A form of weights is one `Product` and one line in `FORMS`. Those of fewer bits are tried in order: one that knows the scheme and
//! the device shows on a few rows that it computes what the scheme says ([`Quantized::product`]) before it is trusted; where none
//! does, the weights become floats again when they are loaded.

mod kernel;
mod operator;

use std::sync::{Mutex, PoisonError};

use tracing::warn;

use super::ModelError;
use super::quantized::{Matrix, Quantized, Scheme};
use crate::tensor::kernels::compact::Compact;
use crate::tensor::kernels::fixed::Fixed;
use crate::tensor::kernels::packed::Packed;
use crate::tensor::kernels::turns::{Rows, Turns};
use crate::tensor::kernels::{self, pointwise};
use crate::tensor::{Device, Dtype, Kind, Placement, Tensor};

/// `x · weightᵀ + bias`.
pub(super) struct Linear {
    weight: Box<dyn Product>,
    bias: Option<Fixed>,
    /// How the weight is held, if not as floats.
    scheme: Option<Scheme>,
}

/// A weight matrix as products take it.
trait Product: Send {
    /// `x · weightᵀ + bias`, `[..., inputs]` to `[..., outputs]`.
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError>;

    /// The product, without a bias, among other kernels' turns, from plain memory to plain memory; `None` where only tensors will do.
    fn turn(&self, _x: Rows, _out: Rows, _turns: &mut Turns) -> Option<()> {
        None
    }

    /// Bytes that it holds.
    fn bytes(&self) -> usize;

    /// Where these begin, and their bytes, if they lie in one piece that stays where it is.
    fn memory(&self) -> Option<(usize, usize)> {
        None
    }

    /// Told once of a model whose weights no cache keeps.
    fn read_from_memory(&mut self) {}
}

/// Makes a product of a quantised matrix, if it can.
type Form = fn(&Quantized, Placement) -> Result<Option<Box<dyn Product>>, ModelError>;

/// What computes with quantised weights as they are, the fastest first.
const FORMS: [(&str, Form); 5] = [
    ("kernel", kernel::form),
    ("_int_mm", operator::int8),
    ("_weight_int8pack_mm", operator::int8_weight_only),
    ("_weight_int4pack_mm", operator::int4),
    ("_scaled_mm", operator::fp8),
];

/// Rows that a form shows what it does on, and outputs at either end of the matrix that are looked at.
const SHOWN_ROWS: i64 = 3;
const SHOWN_OUTPUTS: usize = 128;

impl Linear {
    pub fn new(weight: Matrix, bias: Option<Tensor>, placement: Placement) -> Result<Self, ModelError> {
        let (scheme, weight) = match weight {
            Matrix::Plain(weight) => (None, plain(weight)?),
            Matrix::Halves(_) | Matrix::Blocks(_) => (None, compact(&weight, placement)?),
            Matrix::Quantized(weight) => quantized(weight, placement)?,
        };
        Ok(Self { weight, bias: bias.map(Fixed::of), scheme })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.weight.product(x, self.bias.as_deref())
    }

    /// [`Linear::forward`] among other kernels' turns, if it can.
    pub fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        self.weight.turn(x, out, turns)?;
        self.bias.as_ref().map_or(Some(()), |bias| pointwise::add_bias(out, bias.rows()?, turns))
    }

    pub fn scheme(&self) -> Option<Scheme> {
        self.scheme
    }

    pub fn read_from_memory(&mut self) {
        self.weight.read_from_memory();
    }

    /// Where its weights begin, and their bytes, if they lie in one piece.
    pub fn memory(&self) -> Option<(usize, usize)> {
        self.weight.memory()
    }

    /// Bytes of weights and bias.
    pub fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_deref().map_or(0, bytes)
    }
}

/// Several products of one input as one: their outputs side by side.
pub(super) fn join(weights: Vec<Matrix>, mut biases: Vec<Tensor>, placement: Placement) -> Result<Linear, ModelError> {
    if weights.is_empty() {
        return Err(ModelError::Torch("a product was made of no weights".into()));
    }
    let bias = match biases.len() {
        0 | 1 => biases.pop(),
        _ => Some(Tensor::f_cat(&biases, 0)?),
    };
    Linear::new(Matrix::join(weights, placement.dtype.kind())?, bias, placement)
}

/// `x · weightᵀ + bias`, by our own kernel where there is one.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
    match kernels::linear::linear(x, weight, bias)? {
        Some(out) => Ok(out),
        None => Ok(x.f_linear(weight, bias)?),
    }
}

/// Bytes of a tensor's numbers.
pub fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

fn plain(weight: Tensor) -> Result<Box<dyn Product>, ModelError> {
    Ok(match Packed::of(&weight)? {
        Some(packed) => Box::new(packed),
        None => Box::new(Plain(weight)),
    })
}

/// As they are where a kernel reads them; else the floats that they mean.
fn compact(weight: &Matrix, placement: Placement) -> Result<Box<dyn Product>, ModelError> {
    let compact = match weight {
        _ if placement != Placement::CPU_F32 => None,
        Matrix::Halves(weight) => Compact::of_halves(weight)?,
        Matrix::Blocks(weight) => Compact::of(&weight.codes, &weight.scales, &weight.minima)?,
        Matrix::Plain(_) | Matrix::Quantized(_) => None,
    };
    match compact {
        Some(compact) => Ok(Box::new(compact)),
        None => plain(weight.floats()?.f_to_device(placement.device)?.f_to_kind(placement.dtype.kind())?),
    }
}

/// The first form that does it right, and the scheme that it holds weights in; else floats.
fn quantized(weight: Quantized, placement: Placement) -> Result<(Option<Scheme>, Box<dyn Product>), ModelError> {
    let scheme = weight.scheme;
    for (name, form) in FORMS {
        let shown = form(&weight, placement).and_then(|product| match product {
            Some(product) => Ok(Some((error(&*product, &weight, placement)?, product))),
            None => Ok(None),
        });
        match shown {
            Ok(Some((error, product))) if error <= tolerance(placement.dtype) => return Ok((Some(scheme), product)),
            Ok(Some((error, _))) => told_once(name, scheme, placement, || {
                warn!(form = name, %scheme, error, "computes something else than the scheme says");
            }),
            Ok(None) => {}
            Err(error) => {
                told_once(name, scheme, placement, || warn!(form = name, %scheme, %error, "cannot be used on this device"))
            }
        }
    }
    told_once("floats", scheme, placement, || {
        let device = placement.device_name();
        warn!(%scheme, device, "nothing computes with these weights here, so they become floats: use another scheme to save their memory");
    });
    Ok((None, plain(weight.dequantized(placement.dtype.kind())?)?))
}

/// Whether something computes with a scheme's weights in this place as they are; else they become floats, for which there has to be
/// room. Found out once, on a small matrix of sizes that suit every form.
pub fn computes(scheme: Scheme, placement: Placement) -> bool {
    static FOUND: Mutex<Vec<(Scheme, Placement, bool)>> = Mutex::new(vec![]);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., computes)) = found.iter().find(|(known, place, _)| (*known, *place) == (scheme, placement)) {
        return *computes;
    }
    let held = || {
        let weight = Tensor::f_arange(256 * 256, (Kind::Float, Device::Cpu))?.f_sin()?.f_view([256, 256])?;
        Ok::<_, ModelError>(quantized(Quantized::of(&weight.f_to_device(placement.device)?, scheme)?, placement)?.0.is_some())
    };
    // What goes wrong here goes wrong when the model is loaded, too, and is told then.
    let computes = held().unwrap_or(false);
    found.push((scheme, placement, computes));
    computes
}

/// A product with `size` by `size` weights in a scheme, as models multiply with them in this place; `None` where they would become floats.
pub fn sample(
    scheme: Scheme,
    placement: Placement,
    size: i64,
) -> Result<Option<impl Fn(&Tensor) -> Result<Tensor, ModelError>>, ModelError> {
    let weight = Tensor::f_arange(size * size, (Kind::Float, placement.device))?.f_sin()?.f_view([size, size])?;
    let linear = Linear::new(Matrix::Quantized(Quantized::of(&weight, scheme)?), None, placement)?;
    Ok(linear.scheme().is_some().then_some(move |x: &Tensor| linear.forward(x)))
}

/// Says something of a form and a scheme in a place for the first matrix that it is true of: a model has hundreds.
fn told_once(what: &'static str, scheme: Scheme, placement: Placement, tell: impl FnOnce()) {
    static TOLD: Mutex<Vec<(&str, Scheme, Placement)>> = Mutex::new(vec![]);
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if !told.contains(&(what, scheme, placement)) {
        told.push((what, scheme, placement));
        tell();
    }
}

/// How far a form's results may be from the definition's, by the largest of them: what rounding in the type comes to.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-4,
        Dtype::F16 => 1e-2,
        Dtype::Bf16 => 2e-2,
    }
}

/// The largest difference between a form's results and the definition's, over the largest of these.
fn error(product: &dyn Product, weight: &Quantized, placement: Placement) -> Result<f64, ModelError> {
    let (inputs, outputs) = (weight.inputs() as i64, weight.outputs());
    // Numbers of all sizes that depend on nothing: libtorch's generator is not to be moved.
    let numbers = Tensor::f_arange(SHOWN_ROWS * inputs, (Kind::Float, Device::Cpu))?.f_mul_scalar(0.7)?.f_sin()?;
    let x = numbers.f_view([SHOWN_ROWS, inputs])?.f_to_device(placement.device)?.f_to_kind(placement.dtype.kind())?;
    let ours = product.product(&x, None)?;
    let mut worst = 0.0f64;
    let (rows, _) = weight.scheme.grid(weight.inputs());
    let count = SHOWN_OUTPUTS.next_multiple_of(rows).min(outputs);
    for first in [0, (outputs - count) / rows * rows] {
        let count = count.min(outputs - first);
        let right = weight.narrow(first, count)?.product(&x)?;
        let found = ours.f_narrow(-1, first as i64, count as i64)?.f_to_kind(Kind::Float)?;
        let largest = right.f_abs()?.f_max()?.f_double_value(&[])?;
        let difference = found.f_sub(&right)?.f_abs()?.f_max()?.f_double_value(&[])?;
        // What is not a number is as wrong as can be.
        let error = difference / largest.max(f64::MIN_POSITIVE);
        worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
    }
    Ok(worst)
}

/// `[outputs, inputs]` as it lies: for libtorch, and for training.
struct Plain(Tensor);

impl Product for Plain {
    /// Runs in the weight's own type. Where that is narrower than the residual stream's (a trainer keeps the stream in f32 and
    /// the projections in bf16), this is the place that narrows; otherwise the conversion is free.
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        linear(&x.f_to_kind(self.0.f_kind()?)?, &self.0, bias)
    }

    fn bytes(&self) -> usize {
        bytes(&self.0)
    }
}

/// Rearranged for our own kernel: for inference on the CPU.
impl Product for Packed {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        match Packed::product(self, &x.f_to_kind(self.kind())?)? {
            Some(out) => add(out, bias),
            None => Err(unsuited(x)),
        }
    }

    fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        Packed::turn(self, x, out, turns)
    }

    fn bytes(&self) -> usize {
        Packed::bytes(self)
    }

    fn memory(&self) -> Option<(usize, usize)> {
        Some(Packed::memory(self))
    }

    fn read_from_memory(&mut self) {
        Packed::read_from_memory(self);
    }
}

impl Product for Compact {
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
        match Compact::product(self, &x.f_to_kind(Kind::Float)?)? {
            Some(out) => add(out, bias),
            None => Err(unsuited(x)),
        }
    }

    fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        Compact::turn(self, x, out, turns)
    }

    fn bytes(&self) -> usize {
        Compact::bytes(self)
    }

    fn memory(&self) -> Option<(usize, usize)> {
        Some(Compact::memory(self))
    }

    fn read_from_memory(&mut self) {
        Compact::read_from_memory(self);
    }
}

fn add(out: Tensor, bias: Option<&Tensor>) -> Result<Tensor, ModelError> {
    match bias {
        Some(bias) => Ok(out.f_add(bias)?),
        None => Ok(out),
    }
}

fn unsuited(x: &Tensor) -> ModelError {
    ModelError::Torch(format!("a product for inference was given {:?}", x.size()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::quantized::{Activations, Codes, Sharing};

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    /// All schemes that have a name, and some that checkpoints of others may have.
    fn schemes() -> Vec<Scheme> {
        let others = [
            Scheme { sharing: Sharing::Group(32), ..Scheme::INT8 },
            Scheme { codes: Codes::Int4, sharing: Sharing::Row, activations: Activations::Rows },
            Scheme { activations: Activations::Kept, ..Scheme::FP8 },
            Scheme { sharing: Sharing::Group(128), ..Scheme::FP8_BLOCK },
            Scheme { activations: Activations::Groups(64), ..Scheme::INT8 },
            Scheme { sharing: Sharing::Group(32), activations: Activations::Groups(32), ..Scheme::INT8 },
            Scheme { activations: Activations::Groups(64), ..Scheme::INT4 },
            Scheme { activations: Activations::Mixed(64), ..Scheme::INT4 },
        ];
        Scheme::NAMED.iter().map(|(_, scheme)| *scheme).chain(others).collect()
    }

    #[test]
    fn every_scheme_computes_what_it_says() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let placement = Placement { device: Device::Cpu, dtype };
            for scheme in schemes() {
                for (outputs, inputs) in [(48, 64), (300, 192), (130, 256)] {
                    let weight = Quantized::of(&random(&[outputs, inputs]), scheme).unwrap();
                    let (x, bias) = (random(&[2, 5, inputs]).to_kind(dtype.kind()), random(&[outputs]).to_kind(dtype.kind()));
                    let right = weight.product(&x).unwrap() + bias.to_kind(Kind::Float);
                    let linear = Linear::new(Matrix::Quantized(weight), Some(bias), placement).unwrap();
                    let found = linear.forward(&x).unwrap();
                    assert_eq!((found.kind(), found.size()), (dtype.kind(), vec![2, 5, outputs]));
                    let error = (found.to_kind(Kind::Float) - &right).abs().max() / right.abs().max();
                    assert!(f64::try_from(error).unwrap() < tolerance(dtype), "{dtype:?} {scheme}: {outputs} x {inputs}");
                    assert!(!kernels::in_use() || linear.scheme() == Some(scheme), "{scheme}: the weights became floats");
                }
            }
        }
    }

    #[test]
    fn a_number_far_larger_than_its_neighbours_costs_them_little_once_mixed() {
        let (x, weight) = (random(&[64, 256]), random(&[96, 256]));
        let _ = x.narrow(1, 7, 1).g_mul_scalar_(60.0);
        let exact = x.matmul(&weight.transpose(0, 1));
        let loss = |scheme: Scheme| {
            let rounded = Quantized::of(&weight, scheme).unwrap();
            let share = |lost: Tensor, of: &Tensor| f64::try_from(lost.norm() / of.norm()).unwrap();
            assert!(share(rounded.dequantized(Kind::Float).unwrap() - &weight, &weight) < 0.02, "{scheme}: other weights");
            share(rounded.product(&x).unwrap() - &exact, &exact)
        };
        let (mixed, apart) = (loss(Scheme::INT8), loss(Scheme::INT8.storable()));
        assert!(mixed < 0.6 * apart, "{mixed} and {apart}");
        let ragged = Quantized::of(&random(&[8, 40]), Scheme::INT8).unwrap();
        assert_eq!(ragged.scheme, Scheme::INT8.storable(), "no whole sixteens");
    }

    #[test]
    fn schemes_are_read_as_they_are_written() {
        for scheme in schemes().into_iter().chain([Scheme::INT8.storable()]) {
            assert_eq!(scheme.to_string().parse(), Ok(scheme));
        }
        assert_eq!("int8-hadamard-64".parse(), Ok(Scheme::INT8));
        assert!("fp8-hadamard-64".parse::<Scheme>().is_err(), "floats have room for what is large");
    }

    /// Whatever libtorch has of operators is the same product, on this device at least.
    #[test]
    fn operators_compute_what_the_schemes_say() {
        let mut used = vec![];
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let placement = Placement { device: Device::Cpu, dtype };
            for scheme in schemes() {
                let weight = Quantized::of(&random(&[256, 512]), scheme).unwrap();
                for (name, form) in &FORMS[1..] {
                    if let Some(product) = form(&weight, placement).unwrap() {
                        let error = error(&*product, &weight, placement).unwrap();
                        assert!(error <= tolerance(dtype), "{name} {dtype:?} {scheme}: {error}");
                        used.push(*name);
                    }
                }
            }
        }
        used.sort_unstable();
        used.dedup();
        assert_eq!(
            used,
            ["_int_mm", "_weight_int4pack_mm", "_weight_int8pack_mm"],
            "the one for floats of eight bits needs a GPU"
        );
    }

    /// A form that is wrong, or breaks, is not used.
    #[test]
    fn what_computes_something_else_is_found_out() {
        let weight = Quantized::of(&random(&[64, 64]), Scheme::INT8).unwrap();
        let other = Quantized::of(&random(&[64, 64]), Scheme::INT8).unwrap();
        let product = kernel::form(&other, Placement::CPU_F32).unwrap();
        if let Some(product) = product {
            assert!(error(&*product, &weight, Placement::CPU_F32).unwrap() > 0.1);
        }
        let broken = Plain(Tensor::full([64, 64], f64::NAN, (Kind::Float, Device::Cpu)));
        assert_eq!(error(&broken, &weight, Placement::CPU_F32).unwrap(), f64::INFINITY);
    }

    /// No kernel here takes f16, and no operator of a CPU floats of eight bits.
    #[test]
    fn what_nothing_computes_with_becomes_floats_and_says_so() {
        let placement = Placement { device: Device::Cpu, dtype: Dtype::F16 };
        let weight = Quantized::of(&random(&[48, 64]), Scheme::FP8).unwrap();
        let floats = weight.dequantized(Kind::Half).unwrap();
        let linear = Linear::new(Matrix::Quantized(weight), None, placement).unwrap();
        assert_eq!((linear.scheme(), linear.bytes()), (None, 2 * 48 * 64));
        let x = random(&[3, 64]).to_kind(Kind::Half);
        assert_eq!(linear.forward(&x).unwrap(), x.linear(&floats, None::<&Tensor>));
    }

    #[test]
    fn parts_are_joined_whatever_their_form() {
        for scheme in schemes() {
            let parts = || [200, 128, 72].map(|outputs| random(&[outputs, 256]));
            let (plain, quantized) = (parts(), parts().map(|part| Quantized::of(&part, scheme).unwrap()));
            let x = random(&[4, 256]);
            let right: Vec<Tensor> = quantized.iter().map(|part| part.product(&x).unwrap()).collect();
            let right = Tensor::cat(&right, 1);
            let joined = join(quantized.into_iter().map(Matrix::Quantized).collect(), vec![], Placement::CPU_F32).unwrap();
            let error = (joined.forward(&x).unwrap() - &right).abs().max() / right.abs().max();
            assert!(f64::try_from(error).unwrap() < 1e-4, "{scheme}");
            let mixed = Quantized::of(&plain[0], scheme).unwrap();
            let [first, second] = [mixed.dequantized(Kind::Float).unwrap(), plain[1].shallow_clone()];
            let right = x.matmul(&Tensor::cat(&[first, second], 0).transpose(0, 1));
            let parts = vec![Matrix::Quantized(mixed), Matrix::Plain(plain[1].shallow_clone())];
            let error = (join(parts, vec![], Placement::CPU_F32).unwrap().forward(&x).unwrap() - &right).abs().max()
                / right.abs().max();
            assert!(f64::try_from(error).unwrap() < 1e-4, "{scheme} beside floats");
        }
    }
}
