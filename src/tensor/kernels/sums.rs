//! Sixteen running sums of products of whole numbers, on whatever the CPU has for them, and the floats that they become.

use super::lanes::LANES;

/// Sixteen running sums of whole numbers.
pub(super) trait Sums: Copy {
    /// How many fit the CPU's registers, beside what they are made from.
    const COUNT: usize;

    fn zero() -> Self;
    /// A line of bytes.
    unsafe fn line(from: *const u8) -> Self;
    /// The lower and the upper halves of its bytes.
    fn halves(self) -> (Self, Self);
    /// Adds for each lane the products of the four bytes of `line` with the four codes in `input`.
    unsafe fn add(self, line: Self, input: i32) -> Self;

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

        #[inline(always)]
        unsafe fn line(from: *const u8) -> Self {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        fn halves(self) -> (Self, Self) {
            unsafe {
                let low = _mm512_set1_epi32(0x0f0f_0f0f);
                (_mm512_and_si512(self, low), _mm512_and_si512(_mm512_srli_epi32::<4>(self), low))
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

/// For CPUs without the instruction.
impl Sums for [i32; LANES] {
    const COUNT: usize = 6;

    #[inline(always)]
    fn zero() -> Self {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self {
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    fn halves(self) -> (Self, Self) {
        (self.map(|four| four & 0x0f0f_0f0f), self.map(|four| four >> 4 & 0x0f0f_0f0f))
    }

    #[inline(always)]
    unsafe fn add(mut self, line: Self, input: i32) -> Self {
        let input = input.to_ne_bytes();
        for (sum, line) in self.iter_mut().zip(line) {
            for (weight, input) in line.to_ne_bytes().into_iter().zip(input) {
                *sum += i32::from(weight) * i32::from(input as i8);
            }
        }
        self
    }

    type Floats = [f32; LANES];

    #[inline(always)]
    fn floats() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    fn splat(value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn times(from: *const f32, by: f32) -> [f32; LANES] {
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }.map(|value| value * by)
    }

    #[inline(always)]
    fn onto(self, excess: i32, factor: [f32; LANES], total: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| ((self[lane] - excess) as f32).mul_add(factor[lane], total[lane]))
    }

    #[inline(always)]
    unsafe fn scaled(total: [f32; LANES], by: *const f32) -> [f32; LANES] {
        let by = unsafe { by.cast::<[f32; LANES]>().read_unaligned() };
        std::array::from_fn(|lane| total[lane] * by[lane])
    }

    #[inline(always)]
    fn stored(total: [f32; LANES]) -> [f32; LANES] {
        total
    }
}
