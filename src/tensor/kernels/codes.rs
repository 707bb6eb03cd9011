//! Products of floats with weights of eight or four bits, which are widened where they are used: a row meets numbers as exact as its
//! own, and only the weights' bytes are fewer.
//!
//! Weights lie as in [`super::packed`], sixteen outputs side by side, two inputs after two. Weights of a group share a scale for each output, by which the
//! group's sum is multiplied; longer groups are cut into several of the same scale, as short sums of f32 lose less. A result depends
//! on its own row and output alone.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;

use tch::TchError;

use super::fixed::Fixed;
use super::lanes::{LANES, Lanes, Stored};
use super::pointwise::widen;
use super::strips::{Coming, Part, Strips};
use super::turns::{Rows, Turns};
use super::{Kernel, in_use, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Outputs side by side.
const PANEL: usize = LANES;
/// Inputs that are summed up by themselves at most.
const BLOCK: usize = 256;
/// Bytes of the input that are gone through together, so that they stay in the second-level cache.
const TILE: usize = 256 * 1024;
/// Products of fewer multiplications are not worth other threads.
const PARALLEL_FROM: usize = 64 * 1024;

/// What a weight is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Whole numbers of eight bits.
    Int8,
    /// Whole numbers of four bits, −8 to 7.
    Int4,
    /// Floats: a sign, four bits of exponent, three of mantissa.
    E4m3,
}

/// A weight matrix for [`Narrow::product`].
#[derive(Debug)]
pub struct Narrow {
    form: Form,
    /// Lines of 32 bytes, or of 16 where two inputs share a byte, interleaved by `strips`.
    data: Fixed,
    strips: Strips,
    /// `[panels, groups, 16]`.
    scales: Fixed,
    groups: usize,
    /// Inputs of a group.
    group: usize,
    inputs: usize,
    outputs: usize,
}

impl Narrow {
    /// `codes: [outputs, inputs]` (int8 for both kinds of whole numbers, one an element) with `scales: [outputs, ⌈inputs / group⌉]`;
    /// `None` where libtorch is to do the products. `group` is even, unless a row has one.
    pub fn of(form: Form, codes: &Tensor, scales: &Tensor, group: usize) -> Result<Option<Self>, TchError> {
        let (&[outputs, inputs], &[rows, groups]) = (codes.size().as_slice(), scales.size().as_slice()) else {
            return Ok(None);
        };
        let kind = if form == Form::E4m3 { Kind::Float8e4m3fn } else { Kind::Int8 };
        let fits = rows == outputs && group > 0 && groups == (inputs + group as i64 - 1) / group as i64;
        let whole = group.is_multiple_of(2) || groups == 1;
        if !in_use()
            || codes.kind() != kind
            || codes.device() != tch::Device::Cpu
            || outputs == 0
            || inputs == 0
            || !fits
            || !whole
        {
            return Ok(None);
        }
        let (panel, pairs) = (PANEL as i64, (inputs + 1) / 2);
        let panels = (outputs + panel - 1) / panel;
        let bytes = codes.f_view_dtype(Kind::Uint8)?.f_constant_pad_nd([0, pairs * 2 - inputs, 0, panels * panel - outputs])?;
        // Inputs of a pair one after the other, each with all outputs of the panel.
        let data = bytes.f_view([panels, panel, pairs, 2])?.f_permute([0, 2, 3, 1])?.f_contiguous()?;
        let data = match form {
            Form::Int4 => {
                let half = |at: i64| data.f_narrow(2, at, 1).and_then(|half| half.f_bitwise_and(15));
                half(0)?.f_add(&half(1)?.f_mul_scalar(16)?)?.f_contiguous()?
            }
            _ => data,
        };
        let strips = Strips::of(panels as usize);
        let data = strips.interleave(&data)?;
        let even = group.next_multiple_of(2).min((pairs * 2) as usize);
        let (cut, group) = match even.div_ceil(BLOCK) {
            1 => (1, even),
            // The largest even part that a group is made of.
            parts => {
                (parts..=even / 2).find(|parts| even.is_multiple_of(2 * parts)).map_or((1, even), |parts| (parts, even / parts))
            }
        };
        let scales =
            if cut > 1 { scales.f_repeat_interleave_self_int(cut as i64, 1, None::<i64>)? } else { scales.shallow_clone() };
        let scales = scales.f_to_kind(Kind::Float)?.f_constant_pad_nd([0, 0, 0, panels * panel - outputs])?;
        let scales = scales.f_view([panels, panel, -1])?.f_transpose(1, 2)?.f_contiguous()?;
        let (groups, data, scales) = (scales.size()[1] as usize, Fixed::of(data), Fixed::of(scales));
        Ok(Some(Self { form, data, strips, scales, groups, group, inputs: inputs as usize, outputs: outputs as usize }))
    }

    /// Has weights asked for ahead of their use: no cache keeps them from one product to the next.
    pub fn read_from_memory(&mut self) {
        self.strips.read_from_memory();
    }

    /// Where the weights begin, and their bytes.
    pub fn memory(&self) -> (usize, usize) {
        self.data.memory()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.numel() + self.scales.numel() * size_of::<f32>()
    }

    /// `x · weightᵀ` for `x: [..., inputs]` in f32 or bf16, `[..., outputs]` of the same type; `None` if it is none that the kernel reads.
    pub fn product(&self, x: &Tensor) -> Result<Option<Tensor>, TchError> {
        let mut shape = x.size();
        let Some(last) = shape.last_mut().filter(|last| **last == self.inputs as i64) else { return Ok(None) };
        *last = self.outputs as i64;
        if !plain(&x.f_contiguous()?) {
            return Ok(None);
        }
        let mut input = x.f_to_kind(Kind::Float)?.f_contiguous()?;
        if !self.inputs.is_multiple_of(2) {
            input = input.f_constant_pad_nd([0, 1])?.f_contiguous()?;
        }
        let (rows, half) = (x.numel() / self.inputs, x.kind() == Kind::BFloat16);
        let out = Tensor::f_empty(&shape, (x.kind(), tch::Device::Cpu))?;
        let product = self.kernel(input.data_ptr().cast(), out.data_ptr(), half, rows);
        // SAFETY: the tensors are contiguous, of the sizes and types that the product says, and outlive the call.
        unsafe { launch(&product, rows * self.inputs * self.outputs >= PARALLEL_FROM) };
        Ok(Some(out))
    }

    /// [`Narrow::product`] into `out`; `None` if sizes do not fit.
    pub fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        x.beside(&out)?;
        if x.width != self.inputs || out.width != self.outputs || !x.width.is_multiple_of(2) {
            return None;
        }
        turns.reuse();
        let input = widen(x, turns);
        turns.push(self.kernel(input, out.data, out.half, x.count), x.numbers() * self.outputs >= PARALLEL_FROM);
        Some(())
    }

    /// `[rows, inputs]`, filled up to whole pairs, to `[rows, outputs]`.
    fn kernel(&self, input: *const f32, out: *mut c_void, half: bool, rows: usize) -> Product {
        Product {
            form: self.form,
            input,
            weight: self.data.address().cast(),
            strips: self.strips,
            scales: self.scales.address().cast(),
            groups: self.groups,
            group: self.group / 2,
            out,
            half,
            rows,
            pairs: self.inputs.div_ceil(2),
            outputs: self.outputs,
        }
    }
}

/// One product, as plain memory.
struct Product {
    form: Form,
    /// `[rows, 2 · pairs]`.
    input: *const f32,
    weight: *const u8,
    strips: Strips,
    scales: *const f32,
    groups: usize,
    /// Pairs of a group.
    group: usize,
    /// `[rows, outputs]`, in bf16 or f32.
    out: *mut c_void,
    half: bool,
    rows: usize,
    pairs: usize,
    outputs: usize,
}

/// How two inputs of sixteen outputs are read.
trait Codes<V> {
    /// Of both.
    const BYTES: usize;
    unsafe fn pair(from: *const u8) -> (V, V);
}

struct OneByte<R>(PhantomData<R>);
struct Signed;
struct Float;
struct HalfByte;

impl<V: Lanes> Codes<V> for OneByte<Signed> {
    const BYTES: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn pair(from: *const u8) -> (V, V) {
        unsafe { (V::load_i8(from.cast()), V::load_i8(from.add(LANES).cast())) }
    }
}

impl<V: Lanes> Codes<V> for OneByte<Float> {
    const BYTES: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn pair(from: *const u8) -> (V, V) {
        unsafe { (V::load_e4m3(from), V::load_e4m3(from.add(LANES))) }
    }
}

impl<V: Lanes> Codes<V> for HalfByte {
    const BYTES: usize = LANES;

    #[inline(always)]
    unsafe fn pair(from: *const u8) -> (V, V) {
        unsafe { V::load_i4(from) }
    }
}

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            match self.form {
                Form::Int8 => self.run::<V, OneByte<Signed>>(thread, threads),
                Form::Int4 => self.run::<V, HalfByte>(thread, threads),
                Form::E4m3 => self.run::<V, OneByte<Float>>(thread, threads),
            }
        }
    }
}

impl Product {
    /// A thread's share of the strips, with all rows: each strip's weights come from memory once.
    #[inline(always)]
    unsafe fn run<V: Lanes, C: Codes<V>>(&self, thread: usize, threads: usize) {
        let tiles = (self.rows * self.pairs * 8).div_ceil(TILE).clamp(1, self.rows.max(1));
        for tile in 0..tiles {
            let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
            for strip in self.strips.share(thread, threads) {
                let (bytes, wide) = (self.pairs * strip.wide * C::BYTES, if rows.len() <= 4 { 3 } else { 2 });
                let next = self.weight.wrapping_add(strip.first * self.pairs * C::BYTES + bytes);
                let turns = self.pairs * strip.wide.div_ceil(wide) * rows.len().div_ceil(8);
                let coming = &mut strip.coming(rows.len(), next, bytes, turns);
                let mut from = 0;
                while from < strip.wide {
                    let part = Part { strip, from };
                    // As many sums as registers hold beside both weights of a pair.
                    from += unsafe {
                        match (strip.wide - from, rows.len()) {
                            _ if V::SUMS < 24 => self.part::<V, C, 1, 4>(part, &rows, coming),
                            (6, 1) => self.part::<V, C, 6, 1>(part, &rows, coming),
                            (4, ..=4) => self.part::<V, C, 4, 4>(part, &rows, coming),
                            (3.., ..=4) => self.part::<V, C, 3, 4>(part, &rows, coming),
                            (2.., _) => self.part::<V, C, 2, 8>(part, &rows, coming),
                            _ => self.part::<V, C, 1, 8>(part, &rows, coming),
                        }
                    };
                }
            }
        }
    }

    /// All `rows` with `P` panels, at most `M` at a time. Gives `P`.
    #[inline(always)]
    unsafe fn part<V: Lanes, C: Codes<V>, const P: usize, const M: usize>(
        &self,
        part: Part,
        rows: &Range<usize>,
        coming: &mut Coming,
    ) -> usize {
        let mut row = rows.start;
        while row < rows.end {
            let part = if row == rows.start { part } else { part.at_hand() };
            row += unsafe {
                match (rows.end - row).min(M) {
                    8.. => self.tile::<V, C, P, 8>(part, row, coming),
                    7 => self.tile::<V, C, P, 7>(part, row, coming),
                    6 => self.tile::<V, C, P, 6>(part, row, coming),
                    5 => self.tile::<V, C, P, 5>(part, row, coming),
                    4 => self.tile::<V, C, P, 4>(part, row, coming),
                    3 => self.tile::<V, C, P, 3>(part, row, coming),
                    2 => self.tile::<V, C, P, 2>(part, row, coming),
                    _ => self.tile::<V, C, P, 1>(part, row, coming),
                }
            };
        }
        P
    }

    /// `M` rows with `P` panels. Gives `M`.
    #[inline(always)]
    unsafe fn tile<V: Lanes, C: Codes<V>, const P: usize, const M: usize>(
        &self,
        part: Part,
        row: usize,
        coming: &mut Coming,
    ) -> usize {
        unsafe {
            let weight = self.weight.add((part.strip.first * self.pairs + part.from) * C::BYTES);
            let scales = self.scales.add(part.panel() * self.groups * PANEL);
            let input = self.input.add(row * 2 * self.pairs);
            let mut totals = [[V::zero(); P]; M];
            for group in 0..self.groups {
                let mut sums = [[V::zero(); P]; M];
                for pair in group * self.group..((group + 1) * self.group).min(self.pairs) {
                    let line = weight.add(pair * part.strip.wide * C::BYTES);
                    let mut w = [C::pair(line); P];
                    for (p, w) in w.iter_mut().enumerate().skip(1) {
                        *w = C::pair(line.add(p * C::BYTES));
                    }
                    part.ask_ahead::<P>(line, C::BYTES, M == 1);
                    coming.ask();
                    for (m, sums) in sums.iter_mut().enumerate() {
                        let x = input.add(2 * (m * self.pairs + pair));
                        let (first, second) = (V::splat(*x), V::splat(*x.add(1)));
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = w.1.multiply_add(second, w.0.multiply_add(first, *sum));
                        }
                    }
                }
                for (totals, sums) in totals.iter_mut().zip(sums) {
                    for (p, (total, sum)) in totals.iter_mut().zip(sums).enumerate() {
                        *total = sum.multiply_add(V::load(scales.add((p * self.groups + group) * PANEL)), *total);
                    }
                }
            }
            for (m, totals) in totals.into_iter().enumerate() {
                for (p, total) in totals.into_iter().enumerate() {
                    self.put(row + m, (part.panel() + p) * PANEL, total.store());
                }
            }
        }
        M
    }

    #[inline(always)]
    unsafe fn put(&self, row: usize, first: usize, values: [f32; LANES]) {
        let (at, count) = (row * self.outputs + first, (self.outputs - first).min(PANEL));
        unsafe {
            if self.half {
                write(self.out.cast::<u16>().add(at), values, count);
            } else {
                write(self.out.cast::<f32>().add(at), values, count);
            }
        }
    }
}

/// Writes the first `count` of sixteen results.
#[inline(always)]
pub(super) unsafe fn write<T: Stored>(out: *mut T, values: [f32; LANES], count: usize) {
    let values = values.map(T::narrow);
    unsafe {
        // A known count spares a call.
        if count == LANES {
            out.cast::<[T; LANES]>().write_unaligned(values);
        } else {
            std::ptr::copy_nonoverlapping(values.as_ptr(), out, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SHAPES, alike};
    use super::*;
    use tch::Device;

    const FORMS: [Form; 3] = [Form::Int8, Form::Int4, Form::E4m3];

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    /// Codes of all values that there are, and scales.
    fn weight(form: Form, outputs: i64, inputs: i64, group: i64) -> (Tensor, Tensor) {
        let options = (Kind::Int8, Device::Cpu);
        let codes = match form {
            Form::Int8 => Tensor::randint_low(-127, 128, [outputs, inputs], options),
            Form::Int4 => Tensor::randint_low(-8, 8, [outputs, inputs], options),
            Form::E4m3 => {
                // Every byte but the two that are no number.
                let bytes = Tensor::randint(254, [outputs, inputs], (Kind::Int64, Device::Cpu));
                let bytes = &bytes + bytes.ge(127).to_kind(Kind::Int64);
                bytes.to_kind(Kind::Uint8).view_dtype(Kind::Float8e4m3fn)
            }
        };
        (codes, Tensor::rand([outputs, (inputs + group - 1) / group], (Kind::Float, Device::Cpu)) + 0.1)
    }

    #[test]
    fn products_are_exact_within_rounding() {
        for form in FORMS {
            for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
                for (rows, inputs, outputs, group) in SHAPES {
                    let ((codes, scales), x) = (weight(form, outputs, inputs, group), random(&[rows, inputs], kind));
                    let narrow = Narrow::of(form, &codes, &scales, group as usize).unwrap().unwrap();
                    let ours = narrow.product(&x).unwrap().unwrap();
                    assert_eq!(ours.kind(), kind);
                    let scales = scales.repeat_interleave_self_int(group, 1, None::<i64>).narrow(1, 0, inputs);
                    let floats = codes.to_kind(Kind::Float).to_kind(Kind::Double) * scales.to_kind(Kind::Double);
                    let exact = x.to_kind(Kind::Double).matmul(&floats.transpose(0, 1));
                    let error = f64::try_from((ours.to_kind(Kind::Double) - &exact).abs().max() / exact.abs().max()).unwrap();
                    assert!(error < tolerance, "{form:?} {kind:?} {rows} x {inputs} x {outputs}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        for form in FORMS {
            for (inputs, outputs, group) in [(200, 301, 64), (1536, 48, 1536), (601, 130, 601)] {
                let ((codes, scales), x) = (weight(form, outputs, inputs, group), random(&[300, inputs], Kind::Float));
                let mut weight = Narrow::of(form, &codes, &scales, group as usize).unwrap().unwrap();
                weight.read_from_memory();
                alike(
                    &|first, rows| weight.product(&x.narrow(0, first, rows)).unwrap().unwrap(),
                    &format!("{form:?}, {inputs} inputs"),
                );
            }
        }
    }

    /// What the kinds of vectors that this CPU has read is the same.
    #[test]
    fn every_kind_of_vector_reads_the_same() {
        fn read<V: Lanes>(bytes: &[u8; LANES]) -> [[f32; LANES]; 4] {
            unsafe {
                let (low, high) = V::load_i4(bytes.as_ptr());
                [V::load_i8(bytes.as_ptr().cast()).store(), V::load_e4m3(bytes.as_ptr()).store(), low.store(), high.store()]
            }
        }
        for start in (0..=255u8).step_by(LANES) {
            let bytes: [u8; LANES] = std::array::from_fn(|lane| start + lane as u8);
            let right = read::<[f32; LANES]>(&bytes);
            for (lane, byte) in bytes.into_iter().enumerate() {
                let float = Tensor::from_slice(&[byte]).view_dtype(Kind::Float8e4m3fn).to_kind(Kind::Float);
                let float = f32::try_from(float).unwrap();
                assert!(float.is_nan() || right[1][lane] == float, "{byte}: {} and {float}", right[1][lane]);
                assert_eq!(right[0][lane], f32::from(byte as i8));
                assert_eq!((right[2][lane], right[3][lane]), (f32::from((byte as i8) << 4 >> 4), f32::from(byte as i8 >> 4)));
            }
            #[cfg(target_arch = "x86_64")]
            {
                if std::is_x86_feature_detected!("avx2") {
                    assert_eq!(read::<[std::arch::x86_64::__m256; 2]>(&bytes), right);
                }
                if std::is_x86_feature_detected!("avx512f") {
                    assert_eq!(read::<std::arch::x86_64::__m512>(&bytes), right);
                }
            }
        }
    }

    #[test]
    fn what_is_no_plain_case_is_left_alone() {
        let (codes, scales) = weight(Form::Int8, 8, 16, 8);
        assert!(Narrow::of(Form::E4m3, &codes, &scales, 8).unwrap().is_none(), "another type");
        assert!(Narrow::of(Form::Int8, &codes, &scales, 16).unwrap().is_none(), "scales that do not fit");
        assert!(Narrow::of(Form::Int8, &codes, &weight(Form::Int8, 8, 16, 3).1, 3).unwrap().is_none(), "odd groups");
        let weight = Narrow::of(Form::Int8, &codes, &scales, 8).unwrap().unwrap();
        assert!(weight.product(&random(&[1, 15], Kind::Float)).unwrap().is_none(), "sizes that do not fit");
        assert!(weight.product(&random(&[1, 16], Kind::Double)).unwrap().is_none(), "another type");
        assert_eq!(weight.product(&random(&[0, 16], Kind::Float)).unwrap().unwrap().size(), [0, 8], "no rows");
    }
}
