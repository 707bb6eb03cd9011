//! Products of whole numbers: weights of eight or four bits, and rows that are rounded to eight bits when they come.
//!
//! A row's numbers are divided by its own scale and rounded; the products of whole numbers are exact, whatever their order. Weights lie
//! as in [`super::packed`], sixteen outputs side by side, but four inputs at a time, which is what one instruction (AVX-512 VNNI)
//! multiplies and adds. It takes one factor without a sign: that is the weight, 128 (or 8) more than it means, for which as many times
//! the row's sum is taken off again; `words` has what CPUs without the instruction do. Weights of a group share a scale for each output,
//! by which the group's sum is multiplied. How rows become codes is `rounding`'s.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::LazyLock;

use tch::TchError;

use super::codes::write;
use super::fixed::Fixed;
use super::lanes::{LANES, Lanes};
use super::rounding::{Between, MIXED, Rounding};
use super::strips::{Coming, Part, Strips};
use super::turns::{Rows, Turns};
#[cfg(target_arch = "x86_64")]
use super::words::x86::Words;
use super::{Kernel, in_use, plain};
use crate::tensor::{Kind, Tensor};

/// Outputs side by side.
const PANEL: usize = LANES;
/// Inputs that one instruction takes.
const UNIT: usize = 4;
/// Bytes that are read together: one unit of eight bits for each output of a panel, or two of four.
const LINE: usize = PANEL * UNIT;
/// More inputs could overflow a sum of 32 bits.
const INPUTS_MAX: usize = 1 << 16;
/// Bytes of rounded input that are gone through together, so that they stay in the second-level cache.
const TILE: usize = 256 * 1024;
/// Products of fewer multiplications, and fewer numbers to round, are not worth other threads.
const PARALLEL_FROM: usize = 128 * 1024;
const ROUND_PARALLEL_FROM: usize = 4 * 1024;

/// How many bits a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    Eight,
    /// −8 to 7.
    Four,
}

impl Width {
    /// Inputs in a line.
    fn inputs(self) -> usize {
        if self == Self::Eight { UNIT } else { 2 * UNIT }
    }

    /// What is added to a code, so that none has a sign.
    fn offset(self) -> i32 {
        if self == Self::Eight { 128 } else { 8 }
    }
}

/// A weight matrix of whole numbers for [`Integers::product`].
#[derive(Debug)]
pub struct Integers {
    width: Width,
    /// Lines of 64 bytes, interleaved by `strips`.
    data: Fixed,
    strips: Strips,
    /// `[panels, groups, 16]`, or `[panels, 1, 16]` where an output has one.
    scales: Fixed,
    scaled: bool,
    /// Inputs of a group, whose sum is by itself.
    group: usize,
    /// Whether a row has a scale for each group of its numbers.
    apart: bool,
    /// Whether a row is mixed before it is rounded, as the weights were.
    mixed: bool,
    inputs: usize,
    outputs: usize,
}

impl Integers {
    /// `codes: [outputs, inputs]` (int8, one an element) with `scales: [outputs, ⌈inputs / group⌉]`; `None` where libtorch is to do the
    /// products. `group` is a multiple of 8, unless an output has one. Rows have a scale each, or one for each `apart` numbers, as many as
    /// weights that share theirs, or where these are all an output's.
    pub fn of(
        width: Width,
        codes: &Tensor,
        scales: &Tensor,
        group: usize,
        apart: Option<usize>,
    ) -> Result<Option<Self>, TchError> {
        let (&[outputs, inputs], &[rows, groups]) = (codes.size().as_slice(), scales.size().as_slice()) else {
            return Ok(None);
        };
        let usable = in_use() && codes.kind() == Kind::Int8 && codes.device() == tch::Device::Cpu && outputs > 0 && inputs > 0;
        let fits = rows == outputs && group > 0 && groups == (inputs + group as i64 - 1) / group as i64;
        let line = width.inputs();
        let wanted = apart.unwrap_or(group);
        let alike = groups == 1 || wanted == group;
        let whole = wanted.is_multiple_of(2 * UNIT) || wanted >= inputs as usize;
        if !usable || !fits || inputs as usize > INPUTS_MAX || wanted == 0 || !whole || !alike {
            return Ok(None);
        }
        let (panel, unit) = (PANEL as i64, UNIT as i64);
        let (panels, lines) = ((outputs + panel - 1) / panel, (inputs as usize).div_ceil(line) as i64);
        let length = lines * line as i64;
        let full = codes.f_constant_pad_nd([0, length - inputs, 0, panels * panel - outputs])?;
        // Every code without its sign; all fit a byte.
        let full = full.f_to_kind(Kind::Int16)?.f_add_scalar(i64::from(width.offset()))?.f_to_kind(Kind::Uint8)?;
        let data = full.f_view([panels, panel, length / unit, unit])?.f_permute([0, 2, 1, 3])?;
        let data = match width {
            Width::Eight => data,
            Width::Four => {
                let units = data.f_reshape([panels, lines, 2, panel * unit])?;
                units.f_select(2, 0)?.f_add(&units.f_select(2, 1)?.f_mul_scalar(16)?)?
            }
        };
        let strips = Strips::of(panels as usize);
        let data = strips.interleave(&data)?;
        let scales = scales.f_to_kind(Kind::Float)?.f_constant_pad_nd([0, 0, 0, panels * panel - outputs])?;
        let scales = scales.f_view([panels, panel, groups])?.f_transpose(1, 2)?.f_contiguous()?;
        let (group, apart) = (wanted.min(length as usize).next_multiple_of(line), apart.is_some());
        let (data, scales, scaled) = (Fixed::of(data), Fixed::of(scales), groups > 1);
        let (inputs, outputs) = (inputs as usize, outputs as usize);
        Ok(Some(Self { width, data, strips, scales, scaled, group, apart, mixed: false, inputs, outputs }))
    }

    /// The same for weights whose inputs have been mixed by [`super::rounding`]'s matrix; `None` where rows cannot be.
    pub fn mixed(self) -> Option<Self> {
        self.inputs.is_multiple_of(MIXED).then_some(Self { mixed: true, ..self })
    }

    /// The same weights under another handle.
    pub fn shallow_clone(&self) -> Self {
        Self { data: self.data.shallow_clone(), scales: self.scales.shallow_clone(), ..*self }
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
        let x = x.f_contiguous()?;
        if !plain(&x) {
            return Ok(None);
        }
        let (rows, half) = (x.numel() / self.inputs, x.kind() == Kind::BFloat16);
        let out = Tensor::f_empty(&shape, (x.kind(), tch::Device::Cpu))?;
        let mut turns = Turns::default();
        self.push(x.data_ptr(), out.data_ptr(), half, rows, &mut turns);
        // SAFETY: both tensors are contiguous, of these sizes and types.
        unsafe { turns.run() };
        Ok(Some(out))
    }

    /// [`Integers::product`] into `out`; `None` if sizes do not fit.
    pub fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        x.beside(&out)?;
        (x.width == self.inputs && out.width == self.outputs).then(|| self.push(x.data, out.data, x.half, x.count, turns))
    }

    /// `x: [rows, inputs]` to `out: [rows, outputs]`, both in bf16 or f32, among other kernels' turns.
    fn push(&self, x: *const c_void, out: *mut c_void, half: bool, rows: usize, turns: &mut Turns) {
        turns.reuse();
        let (codes, groups) = self.between(rows);
        let between = Between {
            codes: turns.room(codes),
            scales: turns.room(groups),
            sums: turns.room(groups),
            mixed: if self.mixed { turns.room(rows * self.inputs) } else { std::ptr::null_mut() },
        };
        let (rounding, product) = self.kernels(x, out, half, rows, &between);
        turns.push(rounding, rows > 1 && rows * self.inputs >= ROUND_PARALLEL_FROM);
        turns.push(product, rows * self.inputs * self.outputs >= PARALLEL_FROM);
    }

    /// Codes of so many rows, and scales and sums.
    fn between(&self, rows: usize) -> (usize, usize) {
        (rows * self.inputs.next_multiple_of(self.width.inputs()), rows * self.inputs.div_ceil(self.group))
    }

    /// What rounds the rows, and what multiplies them then.
    fn kernels(&self, x: *const c_void, out: *mut c_void, half: bool, rows: usize, between: &Between) -> (Rounding, Product) {
        let lines = self.inputs.div_ceil(self.width.inputs());
        let &Between { codes, scales, sums, .. } = between;
        let rounding = Rounding {
            input: x,
            half,
            rows,
            inputs: self.inputs,
            stride: lines * self.width.inputs(),
            group: self.group,
            apart: self.apart,
            to: *between,
        };
        let product = Product {
            width: self.width,
            input: codes,
            input_scales: scales,
            input_sums: sums,
            weight: self.data.address().cast(),
            strips: self.strips,
            weight_scales: self.scales.address().cast(),
            scaled: self.scaled,
            out,
            half,
            rows,
            lines,
            groups: self.inputs.div_ceil(self.group),
            group: self.group / self.width.inputs(),
            outputs: self.outputs,
        };
        (rounding, product)
    }
}

/// One product, as plain memory.
struct Product {
    width: Width,
    /// `[rows, lines]` of as many codes as a line has inputs, with a scale and a sum for each of a row's groups.
    input: *const i8,
    input_scales: *const f32,
    input_sums: *const i32,
    /// Lines of 64 bytes, interleaved, and `[panels, groups, 16]` where groups are `scaled` each, else `[panels, 16]`.
    weight: *const u8,
    strips: Strips,
    weight_scales: *const f32,
    scaled: bool,
    /// `[rows, outputs]`, in bf16 or f32.
    out: *mut c_void,
    half: bool,
    rows: usize,
    lines: usize,
    groups: usize,
    /// Lines of a group.
    group: usize,
    outputs: usize,
}

/// Whether there are vectors of whole numbers for this kind of CPU, so that products of them are no slower than those of floats.
pub const VECTORS: bool = cfg!(target_arch = "x86_64");

/// Whether the CPU multiplies four pairs of bytes at a time (AVX-512 VNNI).
static DOTS: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let dots = std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    let dots = false;
    dots
});

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if *DOTS {
                return dots(self, thread, threads);
            } else if std::is_x86_feature_detected!("avx512bw") {
                return wide_words(self, thread, threads);
            } else if std::is_x86_feature_detected!("avx2") {
                return words(self, thread, threads);
            }
            self.run::<[i32; LANES]>(thread, threads);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dots(product: &Product, thread: usize, threads: usize) {
    unsafe { product.run::<std::arch::x86_64::__m512i>(thread, threads) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
unsafe fn wide_words(product: &Product, thread: usize, threads: usize) {
    unsafe { product.run::<Words<std::arch::x86_64::__m512i>>(thread, threads) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn words(product: &Product, thread: usize, threads: usize) {
    unsafe { product.run::<Words<[std::arch::x86_64::__m256i; 2]>>(thread, threads) }
}

/// Sixteen running sums of whole numbers.
pub(super) trait Sums: Copy {
    /// How many fit the CPU's registers, beside what they are made from.
    const COUNT: usize;

    fn zero() -> Self;
    /// A line of bytes, as it is multiplied.
    type Line: Copy;
    unsafe fn line(from: *const u8) -> Self::Line;
    /// The lower and the upper halves of its bytes.
    fn halves(line: Self::Line) -> (Self::Line, Self::Line);
    /// Adds for each lane the products of the four bytes of `line` with the four codes in `input`.
    unsafe fn add(self, line: Self::Line, input: i32) -> Self;

    /// Sixteen floats.
    type Floats: Copy;
    fn floats() -> Self::Floats;
    fn splat(value: f32) -> Self::Floats;
    /// Those there, times `by`.
    unsafe fn times(from: *const f32, by: f32) -> Self::Floats;
    /// The sums less `excess`, times `factor`, added to `total`.
    fn onto(self, excess: i32, factor: Self::Floats, total: Self::Floats) -> Self::Floats;
    /// `total` times those there.
    unsafe fn scaled(total: Self::Floats, by: *const f32) -> Self::Floats;
    fn stored(total: Self::Floats) -> [f32; LANES];
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Sums};

    impl Sums for __m512i {
        const COUNT: usize = 24;

        #[inline(always)]
        fn zero() -> Self {
            unsafe { _mm512_setzero_si512() }
        }

        type Line = Self;

        #[inline(always)]
        unsafe fn line(from: *const u8) -> Self {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        fn halves(line: Self) -> (Self, Self) {
            unsafe {
                let low = _mm512_set1_epi32(0x0f0f_0f0f);
                (_mm512_and_si512(line, low), _mm512_and_si512(_mm512_srli_epi32::<4>(line), low))
            }
        }

        #[inline(always)]
        unsafe fn add(self, line: Self, input: i32) -> Self {
            unsafe { _mm512_dpbusd_epi32(self, line, _mm512_set1_epi32(input)) }
        }

        type Floats = __m512;

        #[inline(always)]
        fn floats() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        fn splat(value: f32) -> __m512 {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn times(from: *const f32, by: f32) -> __m512 {
            unsafe { _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(by)) }
        }

        #[inline(always)]
        fn onto(self, excess: i32, factor: __m512, total: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(self, _mm512_set1_epi32(excess))), factor, total) }
        }

        #[inline(always)]
        unsafe fn scaled(total: __m512, by: *const f32) -> __m512 {
            unsafe { _mm512_mul_ps(total, _mm512_loadu_ps(by)) }
        }

        #[inline(always)]
        fn stored(total: __m512) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), total) };
            lanes
        }
    }
}

impl Product {
    /// A thread's share of the strips, with all rows: each strip's weights come from memory once.
    #[inline(always)]
    unsafe fn run<S: Sums>(&self, thread: usize, threads: usize) {
        let bytes = self.rows * self.lines * self.width.inputs();
        let tiles = bytes.div_ceil(TILE).clamp(1, self.rows.max(1));
        for tile in 0..tiles {
            let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
            for strip in self.strips.share(thread, threads) {
                let (bytes, parts) = (self.lines * strip.wide * LINE, if rows.len() <= 4 { 1 } else { strip.wide.div_ceil(3) });
                let next = self.weight.wrapping_add(strip.first * self.lines * LINE + bytes);
                let coming = &mut strip.coming(rows.len(), next, bytes, self.lines * parts * rows.len().div_ceil(8));
                let mut from = 0;
                while from < strip.wide {
                    let part = Part { strip, from };
                    // As many sums as registers hold; few rows take more panels, or every sum would wait for its last addition.
                    from += unsafe {
                        match (strip.wide - from, rows.len()) {
                            _ if S::COUNT < 12 => self.part::<S, 1, 4>(part, &rows, coming),
                            (6, 1) => self.part::<S, 6, 1>(part, &rows, coming),
                            (3.., _) if S::COUNT < 24 => self.part::<S, 3, 4>(part, &rows, coming),
                            (2, _) if S::COUNT < 24 => self.part::<S, 2, 4>(part, &rows, coming),
                            (6, ..=4) => self.part::<S, 6, 4>(part, &rows, coming),
                            (4, ..=4) => self.part::<S, 4, 4>(part, &rows, coming),
                            (3.., _) => self.part::<S, 3, 8>(part, &rows, coming),
                            (2, _) => self.part::<S, 2, 8>(part, &rows, coming),
                            _ => self.part::<S, 1, 8>(part, &rows, coming),
                        }
                    };
                }
            }
        }
    }

    /// All `rows` with `P` panels, at most `M` at a time. Gives `P`.
    #[inline(always)]
    unsafe fn part<S: Sums, const P: usize, const M: usize>(
        &self,
        part: Part,
        rows: &Range<usize>,
        coming: &mut Coming,
    ) -> usize {
        let mut row = rows.start;
        while row < rows.end {
            let part = if row == rows.start { part } else { part.at_hand() };
            row += unsafe {
                match (self.width, (rows.end - row).min(M)) {
                    (Width::Eight, 8..) => self.tile::<S, false, P, 8>(part, row, coming),
                    (Width::Eight, 7) => self.tile::<S, false, P, 7>(part, row, coming),
                    (Width::Eight, 6) => self.tile::<S, false, P, 6>(part, row, coming),
                    (Width::Eight, 5) => self.tile::<S, false, P, 5>(part, row, coming),
                    (Width::Eight, 4) => self.tile::<S, false, P, 4>(part, row, coming),
                    (Width::Eight, 3) => self.tile::<S, false, P, 3>(part, row, coming),
                    (Width::Eight, 2) => self.tile::<S, false, P, 2>(part, row, coming),
                    (Width::Eight, _) => self.tile::<S, false, P, 1>(part, row, coming),
                    (Width::Four, 8..) => self.tile::<S, true, P, 8>(part, row, coming),
                    (Width::Four, 4..) => self.tile::<S, true, P, 4>(part, row, coming),
                    (Width::Four, 3) => self.tile::<S, true, P, 3>(part, row, coming),
                    (Width::Four, 2) => self.tile::<S, true, P, 2>(part, row, coming),
                    (Width::Four, _) => self.tile::<S, true, P, 1>(part, row, coming),
                }
            };
        }
        P
    }

    /// `M` rows with `P` panels of eight bits, or of four (`HALVES`). Gives `M`.
    #[inline(always)]
    unsafe fn tile<S: Sums, const HALVES: bool, const P: usize, const M: usize>(
        &self,
        part: Part,
        row: usize,
        coming: &mut Coming,
    ) -> usize {
        let length = self.lines * if HALVES { 2 } else { 1 };
        unsafe {
            let weight = self.weight.add((part.strip.first * self.lines + part.from) * LINE);
            let scale_groups = if self.scaled { self.groups } else { 1 };
            let scales = self.weight_scales.add(part.panel() * scale_groups * PANEL);
            let input = self.input.cast::<i32>().add(row * length);
            let mut totals = [[S::floats(); P]; M];
            for group in 0..self.groups {
                let mut sums = [[S::zero(); P]; M];
                for line in group * self.group..((group + 1) * self.group).min(self.lines) {
                    let from = weight.add(line * part.strip.wide * LINE);
                    let mut w = [S::line(from); P];
                    for (p, w) in w.iter_mut().enumerate().skip(1) {
                        *w = S::line(from.add(p * LINE));
                    }
                    part.ask_ahead::<P>(from, LINE, M == 1);
                    coming.ask();
                    if HALVES {
                        let mut halves = [S::halves(w[0]); P];
                        for (halves, w) in halves.iter_mut().zip(w).skip(1) {
                            *halves = S::halves(w);
                        }
                        for (m, sums) in sums.iter_mut().enumerate() {
                            let x = input.add(m * length + 2 * line);
                            let (first, second) = (x.read_unaligned(), x.add(1).read_unaligned());
                            for (sum, (low, high)) in sums.iter_mut().zip(halves) {
                                *sum = sum.add(low, first).add(high, second);
                            }
                        }
                    } else {
                        for (m, sums) in sums.iter_mut().enumerate() {
                            let x = input.add(m * length + line).read_unaligned();
                            for (sum, w) in sums.iter_mut().zip(w) {
                                *sum = sum.add(w, x);
                            }
                        }
                    }
                }
                for (m, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
                    let at = (row + m) * self.groups + group;
                    let (scale, excess) = (*self.input_scales.add(at), self.width.offset() * *self.input_sums.add(at));
                    for (p, (total, sum)) in totals.iter_mut().zip(sums).enumerate() {
                        let factor = if self.scaled {
                            S::times(scales.add((p * self.groups + group) * PANEL), scale)
                        } else {
                            S::splat(scale)
                        };
                        *total = sum.onto(excess, factor, *total);
                    }
                }
            }
            for (m, totals) in totals.into_iter().enumerate() {
                for (p, total) in totals.into_iter().enumerate() {
                    let total = if self.scaled { total } else { S::scaled(total, scales.add(p * PANEL)) };
                    self.put(row + m, (part.panel() + p) * PANEL, S::stored(total));
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

#[cfg(test)]
#[path = "integers_tests.rs"]
mod tests;
