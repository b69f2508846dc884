//! What [`Avx512`](super::Avx512) computes with.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_cvtps_ph, _mm512_div_ps, _mm512_fpclass_ps_mask,
    _mm512_max_epi32, _mm512_min_epi32, _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_epi16,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_sub_ps,
};
use std::mem::transmute;

use super::super::float16::f32_to_bf16;
use super::super::isa::LINE;
use super::canonical;
use super::float8::{self, Rounding};

pub(super) type Wide = [__m512; 2];

/// Quiet and signalling NaN, and subnormal numbers, for `_mm512_fpclass_ps_mask`.
const SPECIAL: i32 = 0x01 | 0x80 | 0x20;

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn splat(value: f32) -> Wide {
    [_mm512_set1_ps(value); 2]
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn plus([a, b]: Wide, [c, d]: Wide) -> Wide {
    [_mm512_add_ps(a, c), _mm512_add_ps(b, d)]
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn times([a, b]: Wide, [c, d]: Wide) -> Wide {
    [_mm512_mul_ps(a, c), _mm512_mul_ps(b, d)]
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn over([a, b]: Wide, [c, d]: Wide) -> Wide {
    [_mm512_div_ps(a, c), _mm512_div_ps(b, d)]
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn widen_f16(half: [u16; LINE]) -> Wide {
    // SAFETY: both types are 64 bytes of plain data.
    let half = unsafe { transmute::<[u16; LINE], [__m256i; 2]>(half) };
    half.map(|sixteen| _mm512_cvtph_ps(sixteen))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn narrow_f16(wide: Wide) -> [u16; LINE] {
    let half = narrow_vectors(without_nan(wide));
    // SAFETY: both types are 64 bytes of plain data.
    unsafe { transmute::<[__m256i; 2], [u16; LINE]>(half) }
}

#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn widen_e5m2(bits: [u8; LINE]) -> Wide {
    float8::e5m2_to_f16(bits).map(|sixteen| _mm512_cvtph_ps(sixteen))
}

#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn narrow_e5m2(wide: Wide) -> [u8; LINE] {
    float8::f16_to_e5m2(narrow_vectors(round(without_nan(wide), Rounding::E5M2)))
}

#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn widen_e4m3(bits: [u8; LINE]) -> Wide {
    let scaled = float8::e4m3_to_f16(bits).map(|sixteen| _mm512_cvtph_ps(sixteen));
    times(scaled, splat(256.0))
}

#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn narrow_e4m3(wide: Wide) -> [u8; LINE] {
    let scaled = times(round(wide, Rounding::E4M3), splat(1.0 / 256.0));
    float8::f16_to_e4m3(narrow_vectors(scaled))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn narrow_vectors(wide: Wide) -> [__m256i; 2] {
    wide.map(|sixteen| _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(sixteen))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn round(wide: Wide, rounding: Rounding) -> Wide {
    let [least, greatest] = rounding.exponents.map(|exponent| _mm512_set1_epi32(exponent));
    wide.map(|x| {
        let exponent = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(Rounding::MASK));
        let exponent = _mm512_min_epi32(_mm512_max_epi32(exponent, least), greatest);
        let power = _mm512_add_epi32(exponent, _mm512_set1_epi32(rounding.power));
        let power = _mm512_castsi512_ps(power);
        let rounded = _mm512_castps_si512(_mm512_sub_ps(_mm512_add_ps(x, power), power));
        // A zero lost its sign.
        let sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MIN));
        _mm512_castsi512_ps(_mm512_or_si512(rounded, sign))
    })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn without_nan([a, b]: Wide) -> Wide {
    if _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b) == 0 {
        return [a, b];
    }
    // SAFETY: both types are 128 bytes of plain data.
    let wide = unsafe { transmute::<Wide, [f32; LINE]>([a, b]) };
    // SAFETY: both types are 128 bytes of plain data.
    unsafe { transmute::<[f32; LINE], Wide>(canonical(wide)) }
}

/// A vector of the first elements of all pairs, and one of the second.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn widen_bf16(half: [u16; LINE]) -> Wide {
    // SAFETY: both types are 64 bytes of plain data.
    let pairs = unsafe { transmute::<[u16; LINE], __m512i>(half) };
    let second = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    [
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
        _mm512_castsi512_ps(_mm512_and_si512(pairs, second)),
    ]
}

/// The instruction rounds to nearest even, but keeps NaN and takes subnormals for zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(super) fn narrow_bf16([first, second]: Wide) -> [u16; LINE] {
    let special =
        _mm512_fpclass_ps_mask::<SPECIAL>(first) | _mm512_fpclass_ps_mask::<SPECIAL>(second);
    let half = if special == 0 {
        let half = _mm512_cvtne2ps_pbh(second, first);
        // SAFETY: both types are 64 bytes of plain data.
        let half = unsafe { transmute::<__m512bh, __m512i>(half) };
        // SAFETY: both types are 64 bytes of plain data.
        let order = unsafe { transmute::<[u16; LINE], __m512i>(INTERLEAVED) };
        _mm512_permutexvar_epi16(order, half)
    } else {
        // SAFETY: both types are 128 bytes of plain data.
        let wide = unsafe { transmute::<Wide, [f32; LINE]>([first, second]) };
        // SAFETY: both types are 64 bytes of plain data.
        unsafe { transmute::<[u16; LINE], __m512i>(narrow_special_bf16(wide)) }
    };
    // SAFETY: both types are 64 bytes of plain data.
    unsafe { transmute::<__m512i, [u16; LINE]>(half) }
}

/// Where the elements of a line are among its first and then its second elements of pairs.
const INTERLEAVED: [u16; LINE] = {
    let mut order = [0; LINE];
    let mut i = 0;
    while i < LINE {
        order[i] = (i / 2 + i % 2 * (LINE / 2)) as u16;
        i += 1;
    }
    order
};

#[cold]
#[inline(never)]
fn narrow_special_bf16(wide: [f32; LINE]) -> [u16; LINE] {
    let narrow = wide.map(f32_to_bf16);
    INTERLEAVED.map(|i| narrow[usize::from(i)])
}
