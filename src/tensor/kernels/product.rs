//! The product itself, on plain memory: `input · weightᵀ`, the weight as it lies.
//!
//! Four rows of the weight meet up to four of the input while they are in registers, and sixteen sums are reduced together. Each sum
//! runs over the same lanes in the same order, whatever rows are beside it and wherever blocks and pieces end: a result depends on
//! its two rows alone. Rows whose length is no multiple of a vector are copied beside zeros.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::LazyLock;

use super::Kernel;
use super::lanes::{LANES, Lanes, Stored};
use super::strips::Coming;

/// Rows of the weight that are gone through together.
const GROUP: usize = LANES;
/// Bytes of a row that are gone through together, so that those of a group and of four rows stay in the nearest cache.
const PIECE: usize = 2 * 1024;
/// Bytes of the input that are gone through together, so that they stay in the second-level cache.
const TILE: usize = 256 * 1024;

/// One product, as plain memory.
pub struct Product {
    /// `[rows, inputs]` in f32, or in bf16 where it is `paired`.
    pub input: *const c_void,
    /// `[outputs, inputs]` in f32 or bf16.
    pub weight: *const c_void,
    /// `[rows, outputs]` in the weight's type, each row `stride` behind the last one.
    pub out: *mut c_void,
    pub stride: usize,
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub half: bool,
    /// Products of two bf16 numbers at a time.
    pub paired: bool,
    /// The weight comes from memory, and what comes next is asked for early.
    pub early: bool,
}

/// Whether the CPU multiplies pairs of bf16 numbers (AVX-512 BF16).
pub static PAIRED: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let paired = std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let paired = false;
    paired
});

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.paired {
                return pairs(self, thread, threads);
            }
            if self.half {
                run::<V, Single<u16, u16>>(self, thread, threads);
            } else {
                run::<V, Single<f32, f32>>(self, thread, threads);
            }
        }
    }
}

impl Product {
    /// The whole product with a weight of type `T` in this thread, its results in f32: queries with keys.
    ///
    /// # Safety
    /// As for [`Kernel::share`].
    #[inline(always)]
    pub unsafe fn alone<V: Lanes, T: Stored>(&self) {
        unsafe { run::<V, Single<T, f32>>(self, 0, 1) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs(product: &Product, thread: usize, threads: usize) {
    unsafe { run::<std::arch::x86_64::__m512, Pairs>(product, thread, threads) }
}

/// How two stored rows are multiplied.
///
/// # Safety
/// As for [`Lanes`].
pub(super) trait Format<V> {
    type Input: Stored;
    type Weight: Stored;
    type Out: Stored;
    type Vector: Copy;
    /// Numbers in a vector.
    const STEP: usize;
    /// Inputs of one output that lie side by side where sixteen outputs do.
    const UNIT: usize;
    unsafe fn input(from: *const Self::Input) -> Self::Vector;
    unsafe fn weight(from: *const Self::Weight) -> Self::Vector;
    /// [`Format::UNIT`] inputs, for every output of a vector.
    unsafe fn spread(from: *const Self::Input) -> Self::Vector;
    unsafe fn multiply_add(weight: Self::Vector, input: Self::Vector, sum: V) -> V;
}

/// Number by number, in f32.
pub(super) struct Single<T, O>(PhantomData<(T, O)>);

impl<V: Lanes, T: Stored, O: Stored> Format<V> for Single<T, O> {
    type Input = f32;
    type Weight = T;
    type Out = O;
    type Vector = V;
    const STEP: usize = LANES;
    const UNIT: usize = 1;

    #[inline(always)]
    unsafe fn input(from: *const f32) -> V {
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn weight(from: *const T) -> V {
        unsafe { T::load(from) }
    }

    #[inline(always)]
    unsafe fn spread(from: *const f32) -> V {
        unsafe { V::splat(*from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(weight: V, input: V, sum: V) -> V {
        unsafe { weight.multiply_add(input, sum) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Pairs;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Format;

    /// bf16 in the CPU's own terms: 32 products an instruction, summed in f32.
    pub struct Pairs;

    impl Format<__m512> for Pairs {
        type Input = u16;
        type Weight = u16;
        type Out = u16;
        type Vector = __m512i;
        const STEP: usize = 32;
        const UNIT: usize = 2;

        #[inline(always)]
        unsafe fn input(from: *const u16) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn weight(from: *const u16) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn spread(from: *const u16) -> __m512i {
            unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn multiply_add(weight: __m512i, input: __m512i, sum: __m512) -> __m512 {
            unsafe {
                let pairs = |vector| std::mem::transmute::<__m512i, __m512bh>(vector);
                _mm512_dpbf16_ps(sum, pairs(weight), pairs(input))
            }
        }
    }
}

/// Goes through the tasks of one thread: a tile of the input's rows with a group of the weight's.
#[inline(always)]
unsafe fn run<V: Lanes, F: Format<V>>(product: &Product, thread: usize, threads: usize) {
    let Product { rows, inputs, outputs, stride, .. } = *product;
    let length = inputs.next_multiple_of(F::STEP);
    let (mut input, weight, out) =
        (product.input.cast::<F::Input>(), product.weight.cast::<F::Weight>(), product.out.cast::<F::Out>());
    let (mut padded, mut filled, mut open) = (vec![], vec![], vec![]);
    if length != inputs {
        unsafe { pad(&mut padded, input, rows, inputs, length) };
        input = padded.as_ptr();
    }
    let (blocks, groups) = (rows.div_ceil(4), outputs.div_ceil(GROUP));
    let tiles = (rows * length * size_of::<F::Input>()).div_ceil(TILE).clamp(1, blocks.max(1));
    let start = |tile: usize| (blocks * tile / tiles * 4).min(rows);
    for task in tiles * groups * thread / threads..tiles * groups * (thread + 1) / threads {
        let (tile, first) = (task / groups, task % groups * GROUP);
        let count = (outputs - first).min(GROUP);
        unsafe {
            let mut weight = weight.add(first * inputs);
            if count < GROUP || length != inputs {
                filled.clear();
                pad(&mut filled, weight, count, inputs, length);
                filled.resize(GROUP * length, F::Weight::ZERO);
                weight = filled.as_ptr();
            }
            let rows = start(tile)..start(tile + 1);
            let coming = if product.early {
                let turns = GROUP / 4 * rows.len().div_ceil(4) * length.div_ceil(F::STEP);
                let next = product.weight.cast::<F::Weight>().wrapping_add((first + GROUP) * inputs);
                Coming::of(next.cast(), GROUP * inputs * size_of::<F::Weight>(), turns)
            } else {
                Coming::NONE
            };
            let group = Group { weight, input, out: out.add(first), length, stride, count };
            group.rows::<V, F>(rows, &mut open, coming);
        }
    }
}

/// Appends rows of `width`, each filled up to `length` with zeros.
unsafe fn pad<T: Stored>(out: &mut Vec<T>, from: *const T, rows: usize, width: usize, length: usize) {
    for row in unsafe { std::slice::from_raw_parts(from, rows * width) }.chunks_exact(width) {
        out.extend_from_slice(row);
        out.resize(out.len() + length - width, T::ZERO);
    }
}

/// Sixteen rows of the weight, and where their results go.
struct Group<W, X, O> {
    weight: *const W,
    input: *const X,
    out: *mut O,
    /// Of a row of the weight or of the input.
    length: usize,
    stride: usize,
    /// Rows of the weight that are wanted.
    count: usize,
}

impl<W: Stored, X: Stored, O: Stored> Group<W, X, O> {
    /// Meets `rows` of the input, piece by piece where rows are long; `open` keeps the sums meanwhile.
    #[inline(always)]
    unsafe fn rows<V: Lanes, F: Format<V, Weight = W, Input = X, Out = O>>(
        &self,
        rows: Range<usize>,
        open: &mut Vec<V>,
        mut coming: Coming,
    ) {
        let coming = &mut coming;
        let pieces = if rows.len() > 4 { (self.length * size_of::<W>()).div_ceil(PIECE) } else { 1 };
        let piece = self.length.div_ceil(pieces).next_multiple_of(F::STEP);
        unsafe {
            open.resize(if pieces > 1 { (rows.len() + 3) * GROUP } else { 0 }, V::zero());
            for start in (0..self.length).step_by(piece) {
                let range = start..(start + piece).min(self.length);
                let mut open = open.as_mut_ptr();
                let mut row = rows.start;
                while row < rows.end {
                    (row, open) = match rows.end - row {
                        1 => (row + 1, self.sums::<V, F, 1, 4>(row, &range, open, coming)),
                        2 => (row + 2, self.sums::<V, F, 2, 2>(row, &range, open, coming)),
                        3 => (row + 3, self.sums::<V, F, 3, 1>(row, &range, open, coming)),
                        _ => (row + 4, self.sums::<V, F, 4, 1>(row, &range, open, coming)),
                    };
                }
            }
        }
    }

    /// `M` rows of the input with the whole group, `P` times four rows at a time. Goes on from the sums in `open`, unless it is the
    /// first piece, leaves them there, unless it is the last, and returns what is behind them.
    #[inline(always)]
    unsafe fn sums<V: Lanes, F: Format<V, Weight = W, Input = X, Out = O>, const M: usize, const P: usize>(
        &self,
        row: usize,
        range: &Range<usize>,
        open: *mut V,
        coming: &mut Coming,
    ) -> *mut V {
        let mut open = open.cast::<[[[V; 4]; M]; P]>();
        let mut first = 0;
        while first < self.count {
            unsafe {
                let mut sums = if range.start == 0 { [[[V::zero(); 4]; M]; P] } else { *open };
                for (part, sums) in sums.iter_mut().enumerate() {
                    self.dots::<V, F, M>(first + 4 * part, row, range, sums, coming);
                }
                if range.end < self.length {
                    *open = sums;
                } else {
                    let out = self.out.add(row * self.stride + first);
                    self.put::<V, M, P>(&sums, out, (4 * P).min(self.count - first));
                }
                open = open.wrapping_add(1);
            }
            first += 4 * P;
        }
        open.cast()
    }

    /// Adds to the sums of four rows of the weight, from `first` on, with `M` of the input, from `row` on.
    #[inline(always)]
    unsafe fn dots<V: Lanes, F: Format<V, Weight = W, Input = X, Out = O>, const M: usize>(
        &self,
        first: usize,
        row: usize,
        range: &Range<usize>,
        sums: &mut [[V; 4]; M],
        coming: &mut Coming,
    ) {
        let length = self.length;
        unsafe {
            let (weight, input) = (self.weight.add(first * length), self.input.add(row * length));
            let mut at = range.start;
            while at < range.end {
                let mut w = [F::weight(weight.add(at)); 4];
                for (n, w) in w.iter_mut().enumerate().skip(1) {
                    *w = F::weight(weight.add(n * length + at));
                }
                coming.ask();
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = F::input(input.add(m * length + at));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = F::multiply_add(w, x, *sum);
                    }
                }
                at += F::STEP;
            }
        }
    }

    /// Writes the totals of the sums, `count` to a row.
    #[inline(always)]
    unsafe fn put<V: Lanes, const M: usize, const P: usize>(&self, sums: &[[[V; 4]; M]; P], out: *mut O, count: usize) {
        unsafe {
            let mut lines = [V::zero(); LANES];
            for (part, sums) in sums.iter().enumerate() {
                for (m, sums) in sums.iter().enumerate() {
                    for (n, sum) in sums.iter().enumerate() {
                        lines[4 * (P * m + part) + n] = *sum;
                    }
                }
            }
            let totals = V::totals(lines).map(O::narrow);
            for (m, totals) in totals.chunks_exact(4 * P).take(M).enumerate() {
                let out = out.add(m * self.stride);
                // A known count spares a call.
                if count == 4 * P {
                    std::ptr::copy_nonoverlapping(totals.as_ptr(), out, 4 * P);
                } else {
                    std::ptr::copy_nonoverlapping(totals.as_ptr(), out, count);
                }
            }
        }
    }
}
