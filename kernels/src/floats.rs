//! Floating-point numbers as the kernels see them.

use std::mem::transmute_copy;
use std::num::NonZeroU32;

use half::{bf16, f16};

use super::float16::F32_NAN;
use super::isa::Level;
use super::number::{Arithmetic, Float, Number, Ordered, plain_lines};
use crate::{f8e4m3, f8e5m2};

macro_rules! full_floats {
    ($($float:ty, $bits:ty, $nan:expr;)*) => {$(
        impl Number for $float {}

        impl Arithmetic for $float {
            plain_lines!(
                Self, |a, b| a + b, |a, b| a * b,
                |divisor: NonZeroU32| divisor.get() as Self, |x, divisor| x / divisor,
                // Chosen among integers: a float NaN is free to change its bits.
                |x: Self| Self::from_bits(if x.is_nan() { $nan } else { x.to_bits() })
            );
        }

        impl Float for $float {
            type Factor = Self;
            type Magnitude = $bits;
            const INFINITE: $bits = Self::INFINITY.to_bits();

            #[inline(always)]
            fn factor(factor: f64) -> Self {
                factor as Self
            }
            #[inline(always)]
            fn scaled<L: Level, const W: usize>(_: L, wide: [Self; W], by: Self) -> [Self; W] {
                wide.map(|x| x * by)
            }
            #[inline(always)]
            fn magnitude(self) -> $bits {
                self.abs().to_bits()
            }
        }

        impl Ordered for $float {
            /// For the greatest, the negative element.
            type Key = Self;

            #[inline(always)]
            fn key<const MAX: bool>(self) -> Self {
                if MAX { -self } else { self }
            }
            /// Both sides are the lesser one if none is NaN, or zeros, whose bits join in −0 if
            /// one is. If one is NaN, then one side is, and remains so whatever bits join.
            #[inline(always)]
            fn extreme<const MAX: bool>(left: Self, right: Self) -> Self {
                let sides = [
                    if left < right { left } else { right },
                    if right < left { right } else { left },
                ];
                Self::from_bits(sides[0].to_bits() | sides[1].to_bits())
            }
            #[inline(always)]
            fn from_key<const MAX: bool>(key: Self) -> Self {
                let bits = if MAX { -key } else { key }.to_bits();
                Self::from_bits(if key.is_nan() { $nan } else { bits })
            }
        }
    )*};
}

full_floats! {
    f32, u32, F32_NAN;
    f64, u64, 0x7ff8_0000_0000_0000;
}

/// A line of floats as one of their bits, or the other way round, whose length is that of a line.
/// Element by element it would be taken apart.
#[inline(always)]
fn same<From: SameBits<To>, To: Copy, const W: usize, const V: usize>(line: [From; W]) -> [To; V] {
    assert_eq!(W, V, "narrow floats are converted by the line");
    // SAFETY: as many elements of the same layout, all of whose bits are values.
    unsafe { transmute_copy(&line) }
}

/// One of the two is the bits of the other, transparently.
///
/// # Safety
/// Both have the same layout, and any bits are a value of both.
unsafe trait SameBits<To>: Copy {}

/// Inverts all but the sign bit of a negative number; its own inverse.
macro_rules! turn_negative {
    ($bits:expr) => {{
        let bits = $bits;
        bits ^ ((bits >> (size_of_val(&bits) * 8 - 1)).cast_unsigned() >> 1).cast_signed()
    }};
}
/// Keys of floats of 16 and 8 bits: the bits, with those of negative numbers turned round so that
/// the integers ascend as the values do, −0 below +0. NaN lies outside all numbers on both sides;
/// the keys are shifted, with wrap-around, so that both kinds win. Each type comes with its bits,
/// the same signed, and the bits of its greatest value, of the least that is not finite, and of the
/// NaN of results.
macro_rules! narrow_floats {
    ($(
        $float:ty, $bits:ty, $key:ty, $widen:ident, $narrow:ident, $greatest:expr, $special:expr,
        $nan:expr;
    )*) => {$(
        // SAFETY: the float is a transparent wrapper of its bits, of which all are values.
        unsafe impl SameBits<$bits> for $float {}
        // SAFETY: as the other way round.
        unsafe impl SameBits<$float> for $bits {}

        impl Number for $float {
            const IS_NARROW: bool = true;
        }

        impl Arithmetic for $float {
            type Wide<L: Level, const W: usize> = L::Wide;
            type Divisor = f32;

            #[inline(always)]
            fn widen<L: Level, const W: usize>(level: L, line: [Self; W]) -> L::Wide {
                level.$widen(same(line))
            }
            #[inline(always)]
            fn narrow<L: Level, const W: usize>(level: L, wide: L::Wide) -> [Self; W] {
                same(level.$narrow(wide))
            }
            #[inline(always)]
            fn plus<L: Level, const W: usize>(level: L, left: L::Wide, right: L::Wide) -> L::Wide {
                level.plus(left, right)
            }
            #[inline(always)]
            fn times<L: Level, const W: usize>(level: L, left: L::Wide, right: L::Wide) -> L::Wide {
                level.times(left, right)
            }
            #[inline(always)]
            fn divisor(divisor: NonZeroU32) -> f32 {
                f32::divisor(divisor)
            }
            #[inline(always)]
            fn over<L: Level, const W: usize>(level: L, wide: L::Wide, divisor: f32) -> L::Wide {
                level.over(wide, level.splat(divisor))
            }
        }

        impl Float for $float {
            type Factor = f32;
            type Magnitude = $bits;
            const INFINITE: $bits = $special;

            #[inline(always)]
            fn factor(factor: f64) -> f32 {
                factor as f32
            }
            #[inline(always)]
            fn scaled<L: Level, const W: usize>(level: L, wide: L::Wide, factor: f32) -> L::Wide {
                level.times(wide, level.splat(factor))
            }
            #[inline(always)]
            fn magnitude(self) -> $bits {
                self.to_bits() & <$key>::MAX as $bits
            }
        }

        impl Ordered for $float {
            type Key = $key;

            #[inline(always)]
            fn key<const MAX: bool>(self) -> $key {
                let bits = turn_negative!(self.to_bits() as $key);
                let nans = <$key>::MAX - $greatest;
                if MAX { bits.wrapping_sub(nans) } else { bits.wrapping_add(nans) }
            }
            #[inline(always)]
            fn extreme<const MAX: bool>(left: $key, right: $key) -> $key {
                if MAX { left.max(right) } else { left.min(right) }
            }
            #[inline(always)]
            fn from_key<const MAX: bool>(key: $key) -> Self {
                let nans = <$key>::MAX - $greatest;
                let (is_nan, bits) = if MAX {
                    (key > $greatest - nans, key.wrapping_add(nans))
                } else {
                    (key < <$key>::MIN + 2 * nans, key.wrapping_sub(nans))
                };
                Self::from_bits(if is_nan { $nan } else { turn_negative!(bits) as $bits })
            }
        }
    )*};
}

narrow_floats! {
    f16, u16, i16, widen_f16, narrow_f16, 0x7c00, 0x7c00, 0x7e00;
    bf16, u16, i16, widen_bf16, narrow_bf16, 0x7f80, 0x7f80, 0x7fc0;
    f8e4m3, u8, i8, widen_e4m3, narrow_e4m3, 0x7e, 0x7f, 0x7f;
    f8e5m2, u8, i8, widen_e5m2, narrow_e5m2, 0x7c, 0x7c, 0x7e;
}
