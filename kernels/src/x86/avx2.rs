//! What [`Avx2`](super::Avx2) computes with.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm256_add_epi32,
    _mm256_add_ps, _mm256_adds_epu16, _mm256_and_ps, _mm256_and_si256, _mm256_blend_epi16,
    _mm256_castps_si256, _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps,
    _mm256_cmpeq_epi16, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_div_ps, _mm256_extracti128_si256,
    _mm256_max_epi32, _mm256_min_epi32, _mm256_movemask_ps, _mm256_mul_ps, _mm256_or_ps,
    _mm256_or_si256, _mm256_set_m128i, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_slli_epi32, _mm256_srli_epi32, _mm256_sub_epi16, _mm256_sub_ps,
};
use std::mem::transmute;

use super::super::isa::LINE;
use super::canonical;
use super::float8::{self, Rounding};

pub(super) type Wide = [__m256; 4];

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn splat(value: f32) -> Wide {
    [_mm256_set1_ps(value); 4]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn plus([a, b, c, d]: Wide, [e, f, g, h]: Wide) -> Wide {
    [_mm256_add_ps(a, e), _mm256_add_ps(b, f), _mm256_add_ps(c, g), _mm256_add_ps(d, h)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn times([a, b, c, d]: Wide, [e, f, g, h]: Wide) -> Wide {
    [_mm256_mul_ps(a, e), _mm256_mul_ps(b, f), _mm256_mul_ps(c, g), _mm256_mul_ps(d, h)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn over([a, b, c, d]: Wide, [e, f, g, h]: Wide) -> Wide {
    [_mm256_div_ps(a, e), _mm256_div_ps(b, f), _mm256_div_ps(c, g), _mm256_div_ps(d, h)]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_f16(half: [u16; LINE]) -> Wide {
    // SAFETY: both types are 64 bytes of plain data.
    let half = unsafe { transmute::<[u16; LINE], [__m128i; 4]>(half) };
    half.map(|eight| _mm256_cvtph_ps(eight))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn narrow_f16(wide: Wide) -> [u16; LINE] {
    let wide = without_nan(wide);
    let half = wide.map(|eight| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(eight));
    // SAFETY: both types are 64 bytes of plain data.
    unsafe { transmute::<[__m128i; 4], [u16; LINE]>(half) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_e5m2(bits: [u8; LINE]) -> Wide {
    widen_vectors(float8::e5m2_to_f16(bits))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn narrow_e5m2(wide: Wide) -> [u8; LINE] {
    float8::f16_to_e5m2(narrow_vectors(round(without_nan(wide), Rounding::E5M2)))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_e4m3(bits: [u8; LINE]) -> Wide {
    times(widen_vectors(float8::e4m3_to_f16(bits)), splat(256.0))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn narrow_e4m3(wide: Wide) -> [u8; LINE] {
    let scaled = times(round(wide, Rounding::E4M3), splat(1.0 / 256.0));
    float8::f16_to_e4m3(narrow_vectors(scaled))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_vectors(half: [__m256i; 2]) -> Wide {
    let [a, b] = half.map(|half| {
        let halves = [_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half)];
        halves.map(|eight| _mm256_cvtph_ps(eight))
    });
    [a[0], a[1], b[0], b[1]]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn narrow_vectors(wide: Wide) -> [__m256i; 2] {
    let [a, b, c, d] = wide.map(|eight| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(eight));
    [_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn round(wide: Wide, rounding: Rounding) -> Wide {
    let [least, greatest] = rounding.exponents.map(|exponent| _mm256_set1_epi32(exponent));
    wide.map(|x| {
        let exponent = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(Rounding::MASK));
        let exponent = _mm256_min_epi32(_mm256_max_epi32(exponent, least), greatest);
        let power = _mm256_add_epi32(exponent, _mm256_set1_epi32(rounding.power));
        let power = _mm256_castsi256_ps(power);
        let rounded = _mm256_sub_ps(_mm256_add_ps(x, power), power);
        // A zero lost its sign.
        _mm256_or_ps(rounded, _mm256_and_ps(x, _mm256_set1_ps(-0.0)))
    })
}

/// Each vector of pairs becomes one of their first and one of their second elements.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen_bf16(half: [u16; LINE]) -> Wide {
    // SAFETY: both types are 64 bytes of plain data.
    let [a, b] = unsafe { transmute::<[u16; LINE], [__m256i; 2]>(half) };
    let second = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    [
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
        _mm256_castsi256_ps(_mm256_and_si256(a, second)),
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
        _mm256_castsi256_ps(_mm256_and_si256(b, second)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn narrow_bf16(wide: Wide) -> [u16; LINE] {
    let [a, b, c, d] = without_nan(wide).map(|eight| _mm256_castps_si256(eight));
    let half = [round_pairs(a, b), round_pairs(c, d)];
    // SAFETY: both types are 64 bytes of plain data.
    unsafe { transmute::<[__m256i; 2], [u16; LINE]>(half) }
}

/// Rounds to nearest even and interleaves.
#[inline]
#[target_feature(enable = "avx2")]
fn round_pairs(first: __m256i, second: __m256i) -> __m256i {
    let kept = _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(first), second);
    let cut = _mm256_blend_epi16::<0xaa>(first, _mm256_slli_epi32::<16>(second));
    // The sum reaches the greatest u16, and stays there, where `cut` is more than half the
    // last place of `kept`, or half and `kept` is odd.
    let odd = _mm256_and_si256(kept, _mm256_set1_epi16(1));
    let sum = _mm256_adds_epu16(cut, _mm256_or_si256(odd, _mm256_set1_epi16(0x7ffe)));
    _mm256_sub_epi16(kept, _mm256_cmpeq_epi16(sum, _mm256_set1_epi16(-1)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn without_nan([a, b, c, d]: Wide) -> Wide {
    let any =
        _mm256_or_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, b), _mm256_cmp_ps::<_CMP_UNORD_Q>(c, d));
    if _mm256_movemask_ps(any) == 0 {
        return [a, b, c, d];
    }
    // SAFETY: both types are 128 bytes of plain data.
    let wide = unsafe { transmute::<Wide, [f32; LINE]>([a, b, c, d]) };
    // SAFETY: both types are 128 bytes of plain data.
    unsafe { transmute::<[f32; LINE], Wide>(canonical(wide)) }
}
