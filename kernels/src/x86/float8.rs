//! 8-bit floats by way of 16-bit ones, whose conversions the processor has.
//!
//! A line of bytes becomes two vectors of `f16`, of elements 0–7 and 16–23, and 8–15 and 24–31, as
//! the unpacking and packing instructions have it, which keep to halves of vectors.

use std::arch::x86_64::{
    __m256i, _mm256_and_si256, _mm256_andnot_si256, _mm256_cmpeq_epi8, _mm256_cmpeq_epi16,
    _mm256_min_epu8, _mm256_movemask_epi8, _mm256_or_si256, _mm256_packs_epi16,
    _mm256_packus_epi16, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_setzero_si256,
    _mm256_slli_epi16, _mm256_srai_epi16, _mm256_srli_epi16, _mm256_unpackhi_epi8,
    _mm256_unpacklo_epi8,
};
use std::mem::transmute;

use super::super::isa::LINE;

/// The same values as `f16`: it has as many bits of exponent.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn e5m2_to_f16(bits: [u8; LINE]) -> [__m256i; 2] {
    let line = load(bits);
    let zero = _mm256_setzero_si256();
    [_mm256_unpacklo_epi8(zero, line), _mm256_unpackhi_epi8(zero, line)]
}

/// The bytes of values that `f8e5m2` has exactly.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn f16_to_e5m2(half: [__m256i; 2]) -> [u8; LINE] {
    let [a, b] = half.map(|half| _mm256_srli_epi16::<8>(half));
    store(_mm256_packus_epi16(a, b))
}

/// The values by 2⁻⁸, which is the distance between the exponent biases, as `f16`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn e4m3_to_f16(bits: [u8; LINE]) -> [__m256i; 2] {
    let half = e5m2_to_f16(bits).map(|upper| {
        // The exponent has a bit more in between, which the shift fills with the sign.
        let sign_twice = _mm256_srai_epi16::<1>(upper);
        _mm256_andnot_si256(_mm256_set1_epi16(0x4000), sign_twice)
    });
    let sign = _mm256_set1_epi8(i8::MIN);
    let nan = _mm256_cmpeq_epi8(_mm256_or_si256(load(bits), sign), _mm256_set1_epi8(-1));
    if _mm256_movemask_epi8(nan) == 0 {
        return half;
    }
    half.map(|half| {
        let magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x7fff));
        let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
        _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7c00)))
    })
}

/// The bytes of values that have as few bits as `f8e4m3`, by 2⁻⁸. NaN, and what is too large,
/// becomes the canonical NaN.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn f16_to_e4m3([a, b]: [__m256i; 2]) -> [u8; LINE] {
    let nan = _mm256_set1_epi8(0x7f);
    let [c, d] = [a, b].map(|half| _mm256_srli_epi16::<8>(_mm256_slli_epi16::<1>(half)));
    let magnitude = _mm256_min_epu8(_mm256_packus_epi16(c, d), nan);
    // Packing with signed saturation keeps the sign.
    let sign = _mm256_and_si256(_mm256_packs_epi16(a, b), _mm256_set1_epi8(i8::MIN));
    let unsigned = _mm256_cmpeq_epi8(magnitude, nan);
    store(_mm256_or_si256(magnitude, _mm256_andnot_si256(unsigned, sign)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(bits: [u8; LINE]) -> __m256i {
    // SAFETY: both types are 32 bytes of plain data.
    unsafe { transmute::<[u8; LINE], __m256i>(bits) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(line: __m256i) -> [u8; LINE] {
    // SAFETY: both types are 32 bytes of plain data.
    unsafe { transmute::<__m256i, [u8; LINE]>(line) }
}

/// How the numbers of `f8e5m2` or `f8e4m3` are rounded to: an addition of 1.5 times a power of two
/// whose last place is that of the result, and its subtraction.
#[derive(Clone, Copy)]
pub(super) struct Rounding {
    /// The least and the greatest exponent that matters, in place.
    pub(super) exponents: [i32; 2],
    /// What makes the power out of a number's exponent.
    pub(super) power: i32,
}

impl Rounding {
    const fn new(bias: i32, mantissa_bits: i32) -> Self {
        let power = ((23 - mantissa_bits) << 23) + (1 << 22);
        Self { exponents: [(128 - bias) << 23, (127 + 17) << 23], power }
    }

    pub(super) const E5M2: Self = Self::new(15, 2);
    pub(super) const E4M3: Self = Self::new(7, 3);
    /// The exponent of an `f32`.
    pub(super) const MASK: i32 = 0x7f80_0000;
}
