//! The levels of x86-64: their features, and what they convert with instructions of their own.
//!
//! A NaN, and a subnormal number where an instruction takes it for zero, is so rare that one
//! branch for a line of 32 elements looks for it, and code out of the way deals with it.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, __m512, __m512bh, __m512i, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT,
    _mm256_add_ps, _mm256_adds_epu16, _mm256_and_si256, _mm256_blend_epi16, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cmpeq_epi16, _mm256_cvtph_ps, _mm256_cvtps_ph,
    _mm256_div_ps, _mm256_movemask_ps, _mm256_mul_ps, _mm256_or_ps, _mm256_or_si256,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_srli_epi32,
    _mm256_sub_epi16, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_cvtps_ph, _mm512_div_ps, _mm512_fpclass_ps_mask,
    _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
};
use std::array::from_fn;
use std::mem::transmute;

use super::float16::{F32_NAN, f32_to_bf16};
use super::isa::{LINE, Level, Task};
use super::loops;
use super::number::Number;
use super::operator::Operator;

/// Defines a level whose features are detected, and compiles the loops and conversions for them.
macro_rules! level {
    ($(#[$doc:meta])* $name:ident, $operations:ident, $($feature:tt),+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(super) struct $name(());

        impl $name {
            pub(super) fn detect() -> Option<Self> {
                ($(is_x86_feature_detected!($feature))&&+).then_some(Self(()))
            }
        }

        impl Level for $name {
            const CONVERTS_LINES: bool = true;
            type Wide = $operations::Wide;

            unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>) {
                $(#[target_feature(enable = $feature)])+
                unsafe fn entry<T: Number, O: Operator, const N: usize>(
                    level: $name,
                    task: &Task<'_>,
                ) {
                    // SAFETY: the caller keeps the same contract.
                    unsafe { loops::fold::<$name, T, O, N>(level, task) };
                }
                // SAFETY: `self` proves the features; the caller keeps the rest.
                unsafe { entry::<T, O, N>(self, task) };
            }

            level!($operations: from_line widen_f16);
            level!($operations: to_line narrow_f16);
            level!($operations: from_line widen_bf16);
            level!($operations: to_line narrow_bf16);
            level!($operations: wide splat(value: f32));
            level!($operations: wide plus(left: Self::Wide, right: Self::Wide));
            level!($operations: wide times(left: Self::Wide, right: Self::Wide));
            level!($operations: wide over(left: Self::Wide, right: Self::Wide));
        }
    };
    ($operations:ident: from_line $name:ident) => {
        #[inline(always)]
        fn $name<const W: usize>(self, half: [u16; W]) -> Self::Wide {
            // SAFETY: `self` proves the features.
            unsafe { $operations::$name(from_fn(|lane| half[lane])) }
        }
    };
    ($operations:ident: to_line $name:ident) => {
        #[inline(always)]
        fn $name<const W: usize>(self, wide: Self::Wide) -> [u16; W] {
            // SAFETY: `self` proves the features.
            let half = unsafe { $operations::$name(wide) };
            from_fn(|lane| half[lane])
        }
    };
    ($operations:ident: wide $name:ident($($argument:ident: $from:ty),+)) => {
        #[inline(always)]
        fn $name(self, $($argument: $from),+) -> Self::Wide {
            // SAFETY: `self` proves the features.
            unsafe { $operations::$name($($argument),+) }
        }
    };
}

level!(
    /// 256-bit vectors, and conversions of `f16`.
    Avx2, avx2, "avx2", "f16c"
);

level!(
    /// 512-bit vectors, and conversions of `f16` and `bf16`.
    Avx512, avx512, "avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"
);

impl Avx512 {
    /// The level below: this one's features include its own.
    pub(super) fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

/// Makes every NaN the canonical one.
#[cold]
#[inline(never)]
fn canonical(wide: [f32; LINE]) -> [f32; LINE] {
    wide.map(|x| f32::from_bits(if x.is_nan() { F32_NAN } else { x.to_bits() }))
}

/// What [`Avx2`] computes with.
mod avx2 {
    use super::*;

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
}

/// What [`Avx512`] computes with.
mod avx512 {
    use super::*;

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
    pub(super) fn narrow_f16([a, b]: Wide) -> [u16; LINE] {
        let wide = if _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b) == 0 {
            [a, b]
        } else {
            // SAFETY: both types are 128 bytes of plain data.
            let wide = unsafe { transmute::<Wide, [f32; LINE]>([a, b]) };
            // SAFETY: both types are 128 bytes of plain data.
            unsafe { transmute::<[f32; LINE], Wide>(canonical(wide)) }
        };
        let half = wide.map(|sixteen| _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(sixteen));
        // SAFETY: both types are 64 bytes of plain data.
        unsafe { transmute::<[__m256i; 2], [u16; LINE]>(half) }
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
}
