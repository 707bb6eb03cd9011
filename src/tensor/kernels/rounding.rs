//! Rows of numbers to codes of eight bits, for products of whole numbers.
//!
//! A row's numbers are divided by the largest of it, or of a group of it, and rounded. One that is far larger than the others leaves these few codes.
//! So numbers may be mixed before, sixteen by sixteen, by a Hadamard matrix, which is its own inverse: each of them then has a part of the
//! large one. Where weights are mixed by the same matrix, the product stays what it was (QuaRot, arXiv 2404.00456, does so over whole rows).

use std::ffi::c_void;

use super::Kernel;
use super::lanes::{LANES, Lanes, Stored};

/// The largest code.
const LARGEST: f32 = 127.0;
/// Numbers that are mixed with one another.
pub const MIXED: usize = 16;

/// `x` times the Hadamard matrix of this size, over its norm. The additions and their order are what libtorch is asked for where weights are
/// mixed, so that both give the same bits.
#[inline(always)]
fn mix(x: [f32; MIXED]) -> [f32; MIXED] {
    let x = exchange::<8>(exchange::<4>(exchange::<2>(exchange::<1>(x))));
    x.map(|x| x * 0.25)
}

/// Sum and difference of each two numbers that are `BY` apart.
#[inline(always)]
fn exchange<const BY: usize>(x: [f32; MIXED]) -> [f32; MIXED] {
    std::array::from_fn(|at| if at & BY == 0 { x[at] + x[at ^ BY] } else { x[at ^ BY] - x[at] })
}

/// Where rounded rows are.
#[derive(Clone, Copy)]
pub(super) struct Between {
    /// `[rows, inputs]`, or null where they are not mixed.
    pub mixed: *mut f32,
    pub codes: *mut i8,
    /// Of each row's groups, as are the sums of their codes.
    pub scales: *mut f32,
    pub sums: *mut i32,
}

/// Rows to codes, each with a scale of its own.
pub(super) struct Rounding {
    /// `[rows, inputs]`, in bf16 or f32.
    pub input: *const c_void,
    pub half: bool,
    pub rows: usize,
    pub inputs: usize,
    /// Codes of a row, zeros behind the inputs included.
    pub stride: usize,
    /// Inputs of a group.
    pub group: usize,
    /// Whether each group has a scale of its own.
    pub apart: bool,
    pub to: Between,
}

impl Kernel for Rounding {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        for row in self.rows * thread / threads..self.rows * (thread + 1) / threads {
            unsafe {
                match (self.half, self.to.mixed.is_null()) {
                    (false, true) => self.round(row, self.of::<f32>(row)),
                    (true, true) => self.round(row, self.of::<u16>(row)),
                    (false, false) => self.round(row, self.mix(row, self.of::<f32>(row))),
                    (true, false) => self.round(row, self.mix(row, self.of::<u16>(row))),
                }
            }
        }
    }
}

impl Rounding {
    #[inline(always)]
    unsafe fn of<T>(&self, row: usize) -> &[T] {
        unsafe { std::slice::from_raw_parts(self.input.cast::<T>().add(row * self.inputs), self.inputs) }
    }

    /// The row, mixed.
    #[inline(always)]
    unsafe fn mix<T: Stored>(&self, row: usize, input: &[T]) -> &[f32] {
        let mixed = unsafe { std::slice::from_raw_parts_mut(self.to.mixed.add(row * self.inputs), self.inputs) };
        for (mixed, input) in mixed.as_chunks_mut().0.iter_mut().zip(input.as_chunks().0) {
            *mixed = mix(input.map(Stored::widen));
        }
        mixed
    }

    #[inline(always)]
    unsafe fn round<T: Stored>(&self, row: usize, input: &[T]) {
        let codes = unsafe { std::slice::from_raw_parts_mut(self.to.codes.add(row * self.stride), self.stride) };
        let (codes, rest) = codes.split_at_mut(self.inputs);
        rest.fill(0);
        let first = row * self.inputs.div_ceil(self.group);
        let whole = if self.apart { 0.0 } else { scale(input) };
        for (at, (codes, values)) in codes.chunks_mut(self.group).zip(input.chunks(self.group)).enumerate() {
            let scale = if self.apart { scale(values) } else { whole };
            // As libtorch would divide, so that the same numbers become the same codes.
            let divisor = if scale > 0.0 { scale } else { 1.0 };
            let mut sum = 0i32;
            for (code, value) in codes.iter_mut().zip(values) {
                // Adding a number of this size rounds, ties to even, and leaves the whole number in the lowest bits.
                const WHOLE: f32 = 12_582_912.0;
                *code = (value.widen() / divisor + WHOLE).to_bits() as u8 as i8;
                sum += i32::from(*code);
            }
            unsafe {
                *self.to.scales.add(first + at) = scale;
                *self.to.sums.add(first + at) = sum;
            }
        }
    }
}

/// What the largest of `values` is divided by to become the largest code; not a number if one of them is none.
#[inline(always)]
fn scale<T: Stored>(values: &[T]) -> f32 {
    // Sixteen at a time, so that they become vectors; a number that is none is remembered, as a comparison forgets it.
    let (lines, rest) = values.as_chunks::<LANES>();
    let (mut largest, mut broken) = ([0f32; LANES], [0u32; LANES]);
    for line in lines {
        for ((largest, broken), value) in largest.iter_mut().zip(&mut broken).zip(line) {
            let value = value.widen().abs();
            *largest = if value > *largest { value } else { *largest };
            *broken |= u32::from(!value.is_finite());
        }
    }
    let mut most = largest.into_iter().fold(0f32, f32::max);
    let mut any = broken.into_iter().fold(0, |any, broken| any | broken);
    for value in rest {
        let value = value.widen().abs();
        most = most.max(value);
        any |= u32::from(!value.is_finite());
    }
    if any != 0 { f32::NAN } else { most / LARGEST }
}
