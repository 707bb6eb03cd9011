//! The small operations between a forward's products, each in one pass: RMSNorm, sums and the gated unit.

use std::ffi::c_void;
use std::ops::Range;

use tch::TchError;

use super::lanes::{LANES, Lanes, Stored, exp};
use super::turns::{Rows, Turns};
use super::{Kernel, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Fewer results are not worth other threads.
const PARALLEL_FROM: usize = 4096;
/// The same where the threads are running already.
const TURN_FROM: usize = 1024;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, computed in f32; or `None` where libtorch should do it.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Option<Tensor>, TchError> {
    if weight.numel() == 0 || x.kind() != weight.kind() || !plain(x) || !plain(weight) {
        return Ok(None);
    }
    let out = Tensor::f_empty(x.size(), (x.kind(), tch::Device::Cpu))?;
    let all = || Norm::of_rows(Rows::of(x)?, None, Rows::of(weight)?, eps, Rows::of(&out)?);
    let Some(norm) = all() else { return Ok(None) };
    // SAFETY: contiguous tensors of these sizes and types, which outlive the call.
    unsafe { launch(&norm, norm.rows > 1 && x.numel() >= 4 * PARALLEL_FROM) };
    Ok(Some(out))
}

/// Rows of `table` into `out`, one for each of `tokens`; `None` if there are no such rows.
pub fn embed(table: Rows, tokens: &[i64], out: Rows, turns: &mut Turns) -> Option<()> {
    let known = |token: &i64| usize::try_from(*token).is_ok_and(|token| token < table.count);
    let fits = table.half == out.half && table.width == out.width && tokens.len() == out.count && tokens.iter().all(known);
    let parallel = out.count > 1 && out.numbers() >= TURN_FROM;
    fits.then(|| turns.push(Embedded { table, tokens: tokens.to_vec(), out }, parallel))
}

/// [`rms_norm`] into `out`.
pub fn norm(x: Rows, weight: Rows, eps: f64, out: Rows, turns: &mut Turns) -> Option<()> {
    push_norm(Norm::of_rows(x, None, weight, eps, out)?, turns)
}

/// Adds `more` to `x`, and the sum's [`rms_norm`] into `out`.
pub fn add_norm(x: Rows, more: Rows, weight: Rows, eps: f64, out: Rows, turns: &mut Turns) -> Option<()> {
    x.beside(&more).filter(|()| more.width == x.width)?;
    push_norm(Norm::of_rows(x, Some(more), weight, eps, out)?, turns)
}

fn push_norm(norm: Norm, turns: &mut Turns) -> Option<()> {
    let parallel = norm.rows > 1 && norm.rows * norm.width >= TURN_FROM;
    turns.push(norm, parallel);
    Some(())
}

/// Adds `bias: [width]` to every row of `x`.
pub fn add_bias(x: Rows, bias: Rows, turns: &mut Turns) -> Option<()> {
    (bias.count == 1 && bias.width == x.width && bias.half == x.half).then_some(())?;
    let parallel = x.count > 1 && x.numbers() >= TURN_FROM;
    turns.push(Bias { x, bias }, parallel);
    Some(())
}

/// `silu(gate) · up` of `gate_up: [..., 2 · width]`, `[..., width]`; or `None` where libtorch should do it.
pub fn swiglu(gate_up: &Tensor) -> Result<Option<Tensor>, TchError> {
    let mut shape = gate_up.size();
    let Some(last) = shape.last_mut() else { return Ok(None) };
    let width = (*last / 2) as usize;
    if width == 0 || !plain(gate_up) {
        return Ok(None);
    }
    *last = width as i64;
    let out = Tensor::f_empty(&shape, (gate_up.kind(), tch::Device::Cpu))?;
    let rows = gate_up.numel() / (2 * width);
    let gated = Gated { x: gate_up.data_ptr(), out: out.data_ptr(), rows, width, half: gate_up.kind() == Kind::BFloat16 };
    // SAFETY: as above.
    unsafe { launch(&gated, rows > 1 && rows * width >= PARALLEL_FROM) };
    Ok(Some(out))
}

/// [`swiglu`] into `out`.
pub fn gate(gate_up: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
    gate_up.beside(&out)?;
    let (rows, width) = (out.count, out.width);
    let gated = Gated { x: gate_up.data, out: out.data, rows, width, half: out.half };
    (gate_up.width == 2 * width).then(|| turns.push(gated, rows > 1 && rows * width >= TURN_FROM))
}

/// `x` in f32: as it is, or in memory of its own.
pub(super) fn widen(x: Rows, turns: &mut Turns) -> *const f32 {
    if !x.half {
        return x.data.cast_const().cast();
    }
    let out = turns.room(x.numbers());
    turns.push(Widen { x, out }, x.count > 1 && x.numbers() >= TURN_FROM);
    out
}

struct Embedded {
    table: Rows,
    tokens: Vec<i64>,
    out: Rows,
}

impl Kernel for Embedded {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let Self { table, tokens, out } = self;
        let bytes = table.width * if table.half { size_of::<u16>() } else { size_of::<f32>() };
        let rows = tokens.len() * thread / threads..tokens.len() * (thread + 1) / threads;
        for (row, token) in rows.clone().zip(&tokens[rows]) {
            unsafe {
                let from = table.data.cast::<u8>().add(*token as usize * bytes);
                std::ptr::copy_nonoverlapping(from, out.data.cast::<u8>().add(row * bytes), bytes);
            }
        }
    }
}

struct Norm {
    /// `[rows, width]`; what is added to it first is of the same shape, or null.
    x: *mut c_void,
    more: *const c_void,
    weight: *const c_void,
    out: *mut c_void,
    rows: usize,
    width: usize,
    eps: f32,
    half: bool,
}

impl Norm {
    fn of_rows(x: Rows, more: Option<Rows>, weight: Rows, eps: f64, out: Rows) -> Option<Self> {
        x.beside(&out).filter(|()| weight.count == 1 && weight.half == x.half)?;
        let more = more.map_or(std::ptr::null(), |more| more.data.cast_const());
        let Rows { data, count: rows, width, half } = x;
        (weight.width == width && out.width == width).then_some(Self {
            x: data,
            more,
            weight: weight.data,
            out: out.data,
            rows,
            width,
            eps: eps as f32,
            half,
        })
    }
}

impl Kernel for Norm {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let rows = self.rows * thread / threads..self.rows * (thread + 1) / threads;
        unsafe { if self.half { self.run::<V, u16>(rows) } else { self.run::<V, f32>(rows) } }
    }
}

impl Norm {
    #[inline(always)]
    unsafe fn run<V: Lanes, T: Stored>(&self, rows: Range<usize>) {
        for row in rows {
            unsafe {
                let x = std::slice::from_raw_parts_mut(self.x.cast::<T>().add(row * self.width), self.width);
                if !self.more.is_null() {
                    let more = std::slice::from_raw_parts(self.more.cast::<T>().add(row * self.width), self.width);
                    add(x, more);
                }
                let weight = std::slice::from_raw_parts(self.weight.cast::<T>(), self.width);
                let out = std::slice::from_raw_parts_mut(self.out.cast::<T>().add(row * self.width), self.width);
                normalise::<V, T>(x, weight, self.eps, |at, value| out[at] = T::narrow(value));
            }
        }
    }
}

/// Hands every normalised element to `put`.
#[inline(always)]
pub(super) unsafe fn normalise<V: Lanes, T: Stored>(x: &[T], weight: &[T], eps: f32, mut put: impl FnMut(usize, f32)) {
    let mut sum = unsafe { V::zero() };
    let whole = x.len() / LANES * LANES;
    let mut at = 0;
    while at < whole {
        let lanes: V = unsafe { T::load(x.as_ptr().add(at)) };
        sum = unsafe { lanes.multiply_add(lanes, sum) };
        at += LANES;
    }
    let mut total = unsafe { sum.total() };
    for value in &x[whole..] {
        total = value.widen().mul_add(value.widen(), total);
    }
    let scale = 1.0 / (total / x.len() as f32 + eps).sqrt();
    for (at, (value, weight)) in x.iter().zip(weight).enumerate() {
        put(at, value.widen() * scale * weight.widen());
    }
}

/// As libtorch adds: in f32, and rounded.
#[inline(always)]
fn add<T: Stored>(x: &mut [T], more: &[T]) {
    x.iter_mut().zip(more).for_each(|(x, more)| *x = T::narrow(x.widen() + more.widen()));
}

struct Bias {
    x: Rows,
    bias: Rows,
}

impl Kernel for Bias {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let rows = self.x.count * thread / threads..self.x.count * (thread + 1) / threads;
        unsafe { if self.x.half { self.run::<u16>(rows) } else { self.run::<f32>(rows) } }
    }
}

impl Bias {
    #[inline(always)]
    unsafe fn run<T: Stored>(&self, rows: Range<usize>) {
        let width = self.x.width;
        for row in rows {
            unsafe {
                let bias = std::slice::from_raw_parts(self.bias.data.cast::<T>(), width);
                add(std::slice::from_raw_parts_mut(self.x.data.cast::<T>().add(row * width), width), bias);
            }
        }
    }
}

/// bf16 to f32.
struct Widen {
    x: Rows,
    out: *mut f32,
}

impl Kernel for Widen {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let mine = self.x.numbers() * thread / threads..self.x.numbers() * (thread + 1) / threads;
        unsafe {
            let x = std::slice::from_raw_parts(self.x.data.cast::<u16>().add(mine.start), mine.len());
            let out = std::slice::from_raw_parts_mut(self.out.add(mine.start), mine.len());
            out.iter_mut().zip(x).for_each(|(out, x)| *out = x.widen());
        }
    }
}

struct Gated {
    x: *const c_void,
    out: *mut c_void,
    rows: usize,
    width: usize,
    half: bool,
}

impl Kernel for Gated {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let rows = self.rows * thread / threads..self.rows * (thread + 1) / threads;
        unsafe { if self.half { self.run::<u16>(rows) } else { self.run::<f32>(rows) } }
    }
}

impl Gated {
    #[inline(always)]
    unsafe fn run<T: Stored>(&self, rows: Range<usize>) {
        for row in rows {
            unsafe {
                let gate = std::slice::from_raw_parts(self.x.cast::<T>().add(2 * row * self.width), self.width);
                let up = std::slice::from_raw_parts(self.x.cast::<T>().add((2 * row + 1) * self.width), self.width);
                let out = std::slice::from_raw_parts_mut(self.out.cast::<T>().add(row * self.width), self.width);
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    let gate = gate.widen();
                    *out = T::narrow(gate / (1.0 + exp(-gate)) * up.widen());
                }
            }
        }
    }
}

/// `more + silu(x + bias)` into `out`, from its column `column` on; `None` if sizes do not fit or anything is not in f32.
pub fn activate(x: Rows, bias: Option<Rows>, more: Option<Rows>, out: Rows, column: usize, turns: &mut Turns) -> Option<()> {
    x.beside(&out).filter(|()| !x.half && column + x.width <= out.width)?;
    if let Some(bias) = bias {
        (bias.count == 1 && bias.width == x.width && !bias.half).then_some(())?;
    }
    if let Some(more) = more {
        x.beside(&more).filter(|()| more.width == x.width)?;
    }
    turns.push(Activated { x, bias, more, out, column }, x.count > 1 && x.numbers() >= PARALLEL_FROM);
    Some(())
}

struct Activated {
    x: Rows,
    bias: Option<Rows>,
    more: Option<Rows>,
    out: Rows,
    column: usize,
}

impl Kernel for Activated {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let Self { x, bias, more, out, column } = *self;
        for row in x.count * thread / threads..x.count * (thread + 1) / threads {
            unsafe {
                let x = x.data.cast::<f32>().add(row * x.width);
                let out = out.data.cast::<f32>().add(row * out.width + column);
                let bias = bias.map(|bias| bias.data.cast::<f32>());
                let more = more.map(|more| more.data.cast::<f32>().add(row * self.x.width));
                // Through pointers: what is added may be what is written.
                for at in 0..self.x.width {
                    let x = *x.add(at) + bias.map_or(0.0, |bias| *bias.add(at));
                    *out.add(at) = x / (1.0 + exp(-x)) + more.map_or(0.0, |more| *more.add(at));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn activations_are_right() {
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 9.0;
        let (x, bias, more) = (random(&[3, 70]), random(&[70]), random(&[3, 70]));
        let rows = |tensor: &Tensor| Rows::of(tensor).unwrap();
        for (bias, more, column) in [(None, None, 0), (Some(&bias), None, 26), (Some(&bias), Some(&more), 5)] {
            let out = random(&[3, 96]);
            let right = out.to_kind(Kind::Double);
            let sum = bias.map_or(x.shallow_clone(), |bias| &x + bias).to_kind(Kind::Double).silu();
            right.narrow(1, column, 70).copy_(&more.map_or(sum.shallow_clone(), |more| &sum + more));
            let mut turns = Turns::default();
            activate(rows(&x), bias.map(rows), more.map(rows), rows(&out), column as usize, &mut turns).unwrap();
            unsafe { turns.run() };
            let error = f64::try_from((out.to_kind(Kind::Double) - right).abs().max()).unwrap();
            assert!(error < 1e-5, "{error}");
        }
        // In place, and what does not fit.
        let (sum, mut turns) = (more.copy(), Turns::default());
        activate(rows(&x), None, Some(rows(&sum)), rows(&sum), 0, &mut turns).unwrap();
        unsafe { turns.run() };
        let error = f64::try_from((sum - (x.silu() + &more)).abs().max()).unwrap();
        assert!(error < 1e-5, "{error}");
        assert!(activate(rows(&x), None, None, rows(&more), 1, &mut turns).is_none(), "too few columns");
        assert!(activate(rows(&x), Some(rows(&more)), None, rows(&more), 0, &mut turns).is_none(), "no bias");
        assert!(activate(rows(&x), None, None, rows(&bias), 0, &mut turns).is_none(), "too few rows");
    }

    #[test]
    fn both_are_libtorchs_within_rounding() {
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
            let x = Tensor::randn([5, 70], (Kind::Float, Device::Cpu)).to_kind(kind);
            let weight = Tensor::rand([70], (Kind::Float, Device::Cpu)).to_kind(kind);
            let double = |x: &Tensor| x.to_kind(Kind::Double);
            let close = |ours: Tensor, right: Tensor| {
                let error = f64::try_from((double(&ours) - right).abs().max()).unwrap();
                assert!(error < 4.0 * tolerance, "{kind:?}: {error}");
            };
            let norm = rms_norm(&x, &weight, 1e-5).unwrap().unwrap();
            let x2 = double(&x);
            let right = &x2 / (x2.square().mean_dim(-1, true, Kind::Double) + 1e-5).sqrt() * double(&weight);
            close(norm, right);
            let gated = swiglu(&x).unwrap().unwrap();
            close(gated, x2.narrow(1, 0, 35).silu() * x2.narrow(1, 35, 35));
        }
    }
}
