//! What the kernels compute in: sixteen running sums at a time, on whatever vectors the CPU has, and the types that weights are
//! stored in.

use half::f16;

/// Lanes of a running sum: a vector register of AVX-512 in f32.
pub const LANES: usize = 16;

/// [`LANES`] running sums. Every kind computes the same numbers, fused multiply-adds lane by lane.
///
/// # Safety
/// The CPU must have the kind's instructions, and pointers lead to as many elements.
pub trait Lanes: Copy {
    /// How many fit the CPU's registers, beside what they are made from.
    const SUMS: usize;

    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_bf16(from: *const u16) -> Self;

    /// Sixteen whole numbers of eight bits.
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe { Self::load(from.cast::<[i8; LANES]>().read_unaligned().map(f32::from).as_ptr()) }
    }

    /// The lower and the upper halves of sixteen bytes, each a whole number of four bits.
    #[inline(always)]
    unsafe fn load_i4(from: *const u8) -> (Self, Self) {
        let bytes = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        let (low, high) = (bytes.map(|byte| f32::from(byte << 4 >> 4)), bytes.map(|byte| f32::from(byte >> 4)));
        unsafe { (Self::load(low.as_ptr()), Self::load(high.as_ptr())) }
    }

    /// The lower and the upper halves of sixteen bytes, each a whole number of four bits without a sign.
    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> (Self, Self) {
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        let (low, high) = (bytes.map(|byte| f32::from(byte & 15)), bytes.map(|byte| f32::from(byte >> 4)));
        unsafe { (Self::load(low.as_ptr()), Self::load(high.as_ptr())) }
    }

    /// Sixteen whole numbers of eight bits without a sign.
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        unsafe { Self::load(from.cast::<[u8; LANES]>().read_unaligned().map(f32::from).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        let wide = unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(|bits| f16::from_bits(bits).to_f32());
        unsafe { Self::load(wide.as_ptr()) }
    }

    /// Sixteen floats of eight bits, with four of exponent. What is no number there is read as some number.
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        let wide = unsafe { from.cast::<[u8; LANES]>().read_unaligned() }.map(|byte| {
            // As the upper bits of an f32, whose exponent is larger by 120; the product takes it off, also from what has none.
            let float = f32::from_bits(u32::from(byte & 0x7f) << 20) * f32::from_bits((127 + 120) << 23);
            f32::from_bits(float.to_bits() | u32::from(byte & 0x80) << 24)
        });
        unsafe { Self::load(wide.as_ptr()) }
    }

    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self;
    unsafe fn store(self) -> [f32; LANES];

    /// Sum of the lanes, halves onto halves.
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        fold(unsafe { self.store() })
    }

    /// [`Lanes::total`] of each, to the bit.
    #[inline(always)]
    unsafe fn totals(sums: [Self; LANES]) -> [f32; LANES] {
        sums.map(|sum| unsafe { sum.total() })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    impl Lanes for __m512 {
        const SUMS: usize = 24;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_i4(from: *const u8) -> (Self, Self) {
            unsafe {
                let bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
                let low = _mm512_srai_epi32::<28>(_mm512_slli_epi32::<28>(bytes));
                (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srai_epi32::<4>(bytes)))
            }
        }

        #[inline(always)]
        unsafe fn load_u4(from: *const u8) -> (Self, Self) {
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                let low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
                (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes)))
            }
        }

        #[inline(always)]
        unsafe fn load_u8(from: *const u8) -> Self {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        /// As the upper bits of an f16, whose exponent is larger by 8.
        #[inline(always)]
        unsafe fn load_e4m3(from: *const u8) -> Self {
            unsafe {
                let bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast()));
                let sign = _mm256_and_si256(bytes, _mm256_set1_epi16(i16::MIN));
                let rest = _mm256_slli_epi16::<7>(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)));
                _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0))
            }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, by, sum) }
        }

        #[inline(always)]
        unsafe fn total(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self) }
        }

        /// Two vectors become one at every step, of which each keeps half the lanes: 45 instructions instead of 16 times 7.
        #[inline(always)]
        unsafe fn totals(sums: [Self; LANES]) -> [f32; LANES] {
            unsafe {
                let mut fours = [sums[0]; 4];
                for (i, four) in fours.iter_mut().enumerate() {
                    *four = quarters(halves(sums[i], sums[i + 4]), halves(sums[i + 8], sums[i + 12]));
                }
                ones(pairs(fours[0], fours[1]), pairs(fours[2], fours[3])).store()
            }
        }

        #[inline(always)]
        unsafe fn store(self) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), self) };
            lanes
        }
    }

    // Steps of `totals`: the lanes of `a`, and then those of `b`, onto half of them.

    #[inline(always)]
    unsafe fn halves(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b)) }
    }

    #[inline(always)]
    unsafe fn quarters(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b)) }
    }

    #[inline(always)]
    unsafe fn pairs(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b)) }
    }

    #[inline(always)]
    unsafe fn ones(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b)) }
    }

    #[inline(always)]
    unsafe fn wide_u8(bytes: __m128i) -> [__m256; 2] {
        let widen = |bytes: __m128i| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)) };
        unsafe { [widen(bytes), widen(_mm_srli_si128::<8>(bytes))] }
    }

    impl Lanes for [__m256; 2] {
        const SUMS: usize = 6;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { [_mm256_setzero_ps(); 2] }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { [_mm256_set1_ps(value); 2] }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            let widen = |from: *const u16| unsafe {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))
            };
            unsafe { [widen(from), widen(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn load_u4(from: *const u8) -> (Self, Self) {
            unsafe {
                let (bytes, four) = (_mm_loadu_si128(from.cast()), _mm_set1_epi8(15));
                let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), four);
                (wide_u8(_mm_and_si128(bytes, four)), wide_u8(high))
            }
        }

        #[inline(always)]
        unsafe fn load_u8(from: *const u8) -> Self {
            unsafe { wide_u8(_mm_loadu_si128(from.cast())) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self {
            let widen = |from: *const u16| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) };
            unsafe { [widen(from), widen(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(self[0], by[0], sum[0]), _mm256_fmadd_ps(self[1], by[1], sum[1])] }
        }

        #[inline(always)]
        unsafe fn store(self) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), self[0]);
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8), self[1]);
            }
            lanes
        }
    }
}

/// For CPUs whose vectors the compiler finds by itself.
impl Lanes for [f32; LANES] {
    const SUMS: usize = 6;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(Stored::widen)
    }

    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
        std::array::from_fn(|lane| self[lane].mul_add(by[lane], sum[lane]))
    }

    #[inline(always)]
    unsafe fn store(self) -> [f32; LANES] {
        self
    }
}

/// A type that weights are stored in.
pub trait Stored: Copy {
    const ZERO: Self;

    unsafe fn load<V: Lanes>(from: *const Self) -> V;
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Stored for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        unsafe { V::load(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

/// bf16 is the upper half of an f32.
impl Stored for u16 {
    const ZERO: Self = 0;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        // To the nearest, ties to even; without a branch, so that a loop over it becomes vectors.
        let bits = value.to_bits();
        let rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        if value.is_nan() { quiet } else { rounded }
    }
}

/// The scalar product of `length` numbers, in the order of [`super::product`].
#[inline(always)]
pub unsafe fn dot<V: Lanes, T: Stored>(stored: *const T, with: *const f32, length: usize) -> f32 {
    let whole = length / LANES * LANES;
    unsafe {
        let mut sum = V::zero();
        let mut at = 0;
        while at < whole {
            sum = T::load::<V>(stored.add(at)).multiply_add(V::load(with.add(at)), sum);
            at += LANES;
        }
        if whole < length {
            let (mut rest, mut rest_with) = ([T::ZERO; LANES], [0f32; LANES]);
            std::ptr::copy_nonoverlapping(stored.add(whole), rest.as_mut_ptr(), length - whole);
            std::ptr::copy_nonoverlapping(with.add(whole), rest_with.as_mut_ptr(), length - whole);
            sum = T::load::<V>(rest.as_ptr()).multiply_add(V::load(rest_with.as_ptr()), sum);
        }
        sum.total()
    }
}

/// Sum of the lanes, halves onto halves.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The exponential, to about two units in the last place; written so that a loop over it becomes vectors (the range reduction and
/// polynomial of Cephes' `expf`).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // In a number of this size the last bit counts ones: adding it rounds, and leaves the whole number in the lowest bits. A
    // conversion by `as` would be checked number by number.
    const WHOLE: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + WHOLE;
    let n = shifted - WHOLE;
    // ln 2 in two parts, the first short enough for the product to be exact.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_2e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5e-1] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    p * f32::from_bits(shifted.to_bits().wrapping_sub(WHOLE.to_bits()).wrapping_add(127) << 23)
}

#[cfg(test)]
mod tests {
    use super::LANES;

    #[test]
    fn the_exponential_is_right_to_a_few_units() {
        for step in -8700..=800 {
            let x = step as f32 / 100.0;
            let (ours, right) = (super::exp(x), f64::from(x).exp());
            assert!((f64::from(ours) - right).abs() <= 4e-7 * right, "exp({x}) = {ours}, not {right}");
        }
        assert!(super::exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn bf16_is_rounded_to_the_nearest() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let (ours, right) = (<u16 as super::Stored>::narrow(value), half::bf16::from_f32(value).to_bits());
            assert_eq!(ours, right, "{value}");
        }
    }

    /// On every kind of vector that this CPU has.
    #[test]
    fn sixteen_totals_are_those_of_each() {
        fn check<V: super::Lanes>() {
            let number = |at: usize| (at as f32 * 0.37).sin() * 1e3f32.powi(at as i32 % 5);
            let lines: [[f32; LANES]; LANES] =
                std::array::from_fn(|line| std::array::from_fn(|lane| number(LANES * line + lane)));
            // SAFETY: the caller asks for kinds that the CPU has.
            let totals = unsafe { V::totals(lines.map(|line| V::load(line.as_ptr()))) };
            assert_eq!(totals.map(f32::to_bits), lines.map(|line| super::fold(line).to_bits()));
        }
        check::<[f32; LANES]>();
        #[cfg(target_arch = "x86_64")]
        {
            if std::is_x86_feature_detected!("avx2") {
                check::<[std::arch::x86_64::__m256; 2]>();
            }
            if std::is_x86_feature_detected!("avx512f") {
                check::<std::arch::x86_64::__m512>();
            }
        }
    }
}
