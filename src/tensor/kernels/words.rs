//! Sums of whole numbers on CPUs without AVX-512 VNNI.
//!
//! On x86 bytes become words of sixteen bits, of which one instruction multiplies and adds pairs. (The one that does so with bytes
//! saturates: two products of a weight and a code do not fit sixteen bits.) A line's even bytes and its odd ones are words of two
//! vectors after a mask and a shift, and so are a row's four codes.

use super::integers::Sums;
use super::lanes::LANES;

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Sums};

    /// Words in AVX-512's registers, or in two of AVX2's.
    #[derive(Clone, Copy)]
    pub struct Words<V>(V);

    impl Sums for Words<__m512i> {
        const COUNT: usize = 12;

        type Line = (__m512i, __m512i);
        type Floats = __m512;

        #[inline(always)]
        fn zero() -> Self {
            Self(unsafe { _mm512_setzero_si512() })
        }

        #[inline(always)]
        unsafe fn line(from: *const u8) -> Self::Line {
            unsafe {
                let line = _mm512_loadu_si512(from.cast());
                (_mm512_and_si512(line, _mm512_set1_epi16(0xff)), _mm512_srli_epi16::<8>(line))
            }
        }

        #[inline(always)]
        fn halves((even, odd): Self::Line) -> (Self::Line, Self::Line) {
            unsafe {
                let low = _mm512_set1_epi16(0xf);
                let lower = (_mm512_and_si512(even, low), _mm512_and_si512(odd, low));
                (lower, (_mm512_srli_epi16::<4>(even), _mm512_srli_epi16::<4>(odd)))
            }
        }

        #[inline(always)]
        unsafe fn add(self, (even, odd): Self::Line, input: i32) -> Self {
            unsafe {
                let input = _mm512_set1_epi32(input);
                let evens = _mm512_madd_epi16(even, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(input)));
                let odds = _mm512_madd_epi16(odd, _mm512_srai_epi16::<8>(input));
                Self(_mm512_add_epi32(self.0, _mm512_add_epi32(evens, odds)))
            }
        }

        #[inline(always)]
        fn floats() -> __m512 {
            __m512i::floats()
        }

        #[inline(always)]
        fn splat(value: f32) -> __m512 {
            __m512i::splat(value)
        }

        #[inline(always)]
        unsafe fn times(from: *const f32, by: f32) -> __m512 {
            unsafe { __m512i::times(from, by) }
        }

        #[inline(always)]
        fn onto(self, excess: i32, factor: __m512, total: __m512) -> __m512 {
            self.0.onto(excess, factor, total)
        }

        #[inline(always)]
        unsafe fn scaled(total: __m512, by: *const f32) -> __m512 {
            unsafe { __m512i::scaled(total, by) }
        }

        #[inline(always)]
        fn stored(total: __m512) -> [f32; LANES] {
            __m512i::stored(total)
        }
    }

    impl Sums for Words<[__m256i; 2]> {
        const COUNT: usize = 6;

        type Line = [(__m256i, __m256i); 2];
        type Floats = [__m256; 2];

        #[inline(always)]
        fn zero() -> Self {
            Self([unsafe { _mm256_setzero_si256() }; 2])
        }

        #[inline(always)]
        unsafe fn line(from: *const u8) -> Self::Line {
            let half = |from: *const u8| unsafe {
                let line = _mm256_loadu_si256(from.cast());
                (_mm256_and_si256(line, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(line))
            };
            [half(from), half(from.wrapping_add(32))]
        }

        #[inline(always)]
        fn halves(line: Self::Line) -> (Self::Line, Self::Line) {
            let low = |word| unsafe { _mm256_and_si256(word, _mm256_set1_epi16(0xf)) };
            let high = |word| unsafe { _mm256_srli_epi16::<4>(word) };
            (line.map(|(even, odd)| (low(even), low(odd))), line.map(|(even, odd)| (high(even), high(odd))))
        }

        #[inline(always)]
        unsafe fn add(mut self, line: Self::Line, input: i32) -> Self {
            unsafe {
                let input = _mm256_set1_epi32(input);
                let (evens, odds) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(input)), _mm256_srai_epi16::<8>(input));
                for (sum, (even, odd)) in self.0.iter_mut().zip(line) {
                    *sum =
                        _mm256_add_epi32(*sum, _mm256_add_epi32(_mm256_madd_epi16(even, evens), _mm256_madd_epi16(odd, odds)));
                }
            }
            self
        }

        #[inline(always)]
        fn floats() -> [__m256; 2] {
            Self::splat(0.0)
        }

        #[inline(always)]
        fn splat(value: f32) -> [__m256; 2] {
            [unsafe { _mm256_set1_ps(value) }; 2]
        }

        #[inline(always)]
        unsafe fn times(from: *const f32, by: f32) -> [__m256; 2] {
            unsafe { Self::scaled(Self::splat(by), from) }
        }

        #[inline(always)]
        fn onto(self, excess: i32, factor: [__m256; 2], total: [__m256; 2]) -> [__m256; 2] {
            let onto = |half: usize| unsafe {
                let whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(self.0[half], _mm256_set1_epi32(excess)));
                _mm256_fmadd_ps(whole, factor[half], total[half])
            };
            [onto(0), onto(1)]
        }

        #[inline(always)]
        unsafe fn scaled(total: [__m256; 2], by: *const f32) -> [__m256; 2] {
            unsafe { [_mm256_mul_ps(total[0], _mm256_loadu_ps(by)), _mm256_mul_ps(total[1], _mm256_loadu_ps(by.add(8)))] }
        }

        #[inline(always)]
        fn stored(total: [__m256; 2]) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), total[0]);
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8), total[1]);
            }
            lanes
        }
    }
}

/// For CPUs whose vectors the compiler finds by itself.
impl Sums for [i32; LANES] {
    const COUNT: usize = 6;

    #[inline(always)]
    fn zero() -> Self {
        [0; LANES]
    }

    type Line = Self;

    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self {
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    fn halves(line: Self) -> (Self, Self) {
        (line.map(|four| four & 0x0f0f_0f0f), line.map(|four| four >> 4 & 0x0f0f_0f0f))
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
