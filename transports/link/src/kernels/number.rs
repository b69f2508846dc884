//! What the kernels know of each element type.

use std::array::from_fn;
use std::num::NonZeroU32;

use half::{bf16, f16};

use super::float16::F32_NAN;
use super::isa::Level;
use super::reciprocal::Reciprocal;

/// An element type: how lines of it are computed with, and how two elements are compared.
pub(super) trait Number: Copy + Default {
    /// What sums and products of a line are computed in.
    type Wide<L: Level, const W: usize>: Copy;
    /// What divides many elements.
    type Divisor: Copy;
    /// What [`extreme`](Self::extreme) compares.
    type Key: Copy;
    /// Whether the type is computed with as [`Level::Wide`].
    const IS_HALF: bool = false;
    /// Whether it takes AVX-512 to multiply and compare vectors of the type.
    const NEEDS_AVX512: bool = false;
    /// Whether a power of two can be divided by with [`scaled`](Self::scaled).
    const SCALES: bool;

    fn widen<L: Level, const W: usize>(level: L, line: [Self; W]) -> Self::Wide<L, W>;
    /// Rounds, and makes every NaN the same one.
    fn narrow<L: Level, const W: usize>(level: L, wide: Self::Wide<L, W>) -> [Self; W];
    fn plus<L: Level, const W: usize>(
        level: L,
        left: Self::Wide<L, W>,
        right: Self::Wide<L, W>,
    ) -> Self::Wide<L, W>;
    fn times<L: Level, const W: usize>(
        level: L,
        left: Self::Wide<L, W>,
        right: Self::Wide<L, W>,
    ) -> Self::Wide<L, W>;

    fn divisor(divisor: NonZeroU32) -> Self::Divisor;
    /// Rounds to nearest even; integers toward zero.
    fn over<L: Level, const W: usize>(
        level: L,
        wide: Self::Wide<L, W>,
        divisor: Self::Divisor,
    ) -> Self::Wide<L, W>;
    /// The factor that divides by a power of two.
    fn factor(divisor: NonZeroU32) -> Self::Divisor;
    fn scaled<L: Level, const W: usize>(
        level: L,
        wide: Self::Wide<L, W>,
        factor: Self::Divisor,
    ) -> Self::Wide<L, W>;

    fn key<const MAX: bool>(self) -> Self::Key;
    /// The key of the greater element if `MAX`, else of the lesser; of a NaN if there is one.
    fn extreme<const MAX: bool>(left: Self::Key, right: Self::Key) -> Self::Key;
    /// Makes every NaN the same one.
    fn from_key<const MAX: bool>(key: Self::Key) -> Self;
}

/// The arithmetic of types that are computed with as they are, from that of one element.
macro_rules! plain_lines {
    (
        $divisor:ty, $scales:expr, $plus:expr, $times:expr,
        $make_divisor:expr, $over:expr, $make_factor:expr, $scaled:expr, $narrow:expr
    ) => {
        type Wide<L: Level, const W: usize> = [Self; W];
        type Divisor = $divisor;
        const SCALES: bool = $scales;

        #[inline(always)]
        fn widen<L: Level, const W: usize>(_: L, line: [Self; W]) -> [Self; W] {
            line
        }
        #[inline(always)]
        fn narrow<L: Level, const W: usize>(_: L, wide: [Self; W]) -> [Self; W] {
            wide.map($narrow)
        }
        #[inline(always)]
        fn plus<L: Level, const W: usize>(_: L, left: [Self; W], right: [Self; W]) -> [Self; W] {
            from_fn(|lane| $plus(left[lane], right[lane]))
        }
        #[inline(always)]
        fn times<L: Level, const W: usize>(_: L, left: [Self; W], right: [Self; W]) -> [Self; W] {
            from_fn(|lane| $times(left[lane], right[lane]))
        }
        #[inline(always)]
        fn divisor(divisor: NonZeroU32) -> $divisor {
            $make_divisor(divisor)
        }
        #[inline(always)]
        fn over<L: Level, const W: usize>(_: L, wide: [Self; W], by: $divisor) -> [Self; W] {
            wide.map(|x| $over(x, by))
        }
        #[inline(always)]
        fn factor(divisor: NonZeroU32) -> $divisor {
            $make_factor(divisor)
        }
        #[inline(always)]
        fn scaled<L: Level, const W: usize>(_: L, wide: [Self; W], by: $divisor) -> [Self; W] {
            wide.map(|x| $scaled(x, by))
        }
    };
}

/// Each with the type its magnitude is divided in, and how it gets there and back.
macro_rules! integers {
    ($($int:ty, $magnitude:ty, |$x:ident, $quotient:ident| $over:expr;)*) => {$(
        impl Number for $int {
            plain_lines!(
                Reciprocal<$magnitude>, false, Self::wrapping_add, Self::wrapping_mul,
                Reciprocal::<$magnitude>::new,
                |$x: Self, by: Reciprocal<$magnitude>| {
                    let $quotient = |magnitude| by.quotient(magnitude);
                    $over
                },
                Reciprocal::<$magnitude>::new, |x, _| x, |x| x
            );
            type Key = Self;
            const NEEDS_AVX512: bool = size_of::<Self>() == 8;

            #[inline(always)]
            fn key<const MAX: bool>(self) -> Self {
                self
            }
            #[inline(always)]
            fn extreme<const MAX: bool>(left: Self, right: Self) -> Self {
                if MAX { left.max(right) } else { left.min(right) }
            }
            #[inline(always)]
            fn from_key<const MAX: bool>(key: Self) -> Self {
                key
            }
        }
    )*};
}

/// Gives the quotient of the magnitude the sign of the dividend, without a branch.
macro_rules! signed {
    ($x:ident, $quotient:expr) => {{
        let sign = $x >> (size_of_val(&$x) * 8 - 1);
        ($quotient ^ sign).wrapping_sub(sign)
    }};
}

integers! {
    u8, u16, |x, quotient| quotient(x.into()) as u8;
    u16, u16, |x, quotient| quotient(x);
    u32, u32, |x, quotient| quotient(x);
    u64, u64, |x, quotient| quotient(x);
    i8, u16, |x, quotient| signed!(x, quotient(x.unsigned_abs().into()) as i8);
    i16, u16, |x, quotient| signed!(x, quotient(x.unsigned_abs()) as i16);
    i32, u32, |x, quotient| signed!(x, quotient(x.unsigned_abs()) as i32);
    i64, u64, |x, quotient| signed!(x, quotient(x.unsigned_abs()) as i64);
}

macro_rules! full_floats {
    ($($float:ty, $bits:ty, $nan:expr;)*) => {$(
        impl Number for $float {
            plain_lines!(
                Self, true, |a, b| a + b, |a, b| a * b,
                |divisor: NonZeroU32| divisor.get() as Self, |x, divisor| x / divisor,
                |divisor: NonZeroU32| 1.0 / divisor.get() as Self, |x, factor| x * factor,
                // Chosen among integers: a float NaN is free to change its bits.
                |x: Self| Self::from_bits(if x.is_nan() { $nan } else { x.to_bits() })
            );
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

/// Keys of 16-bit floats: the bits, with those of negative numbers turned round so that the
/// integers ascend as the values do, −0 below +0. NaN lies outside the infinities on both sides;
/// the keys are shifted, with wrap-around, so that both kinds win.
macro_rules! half_floats {
    ($($float:ty, $widen:ident, $narrow:ident, $infinity:expr, $nan:expr;)*) => {$(
        impl Number for $float {
            type Wide<L: Level, const W: usize> = L::Wide;
            type Divisor = f32;
            type Key = i16;
            const IS_HALF: bool = true;
            const SCALES: bool = true;

            #[inline(always)]
            fn widen<L: Level, const W: usize>(level: L, line: [Self; W]) -> L::Wide {
                level.$widen(line.map(Self::to_bits))
            }
            #[inline(always)]
            fn narrow<L: Level, const W: usize>(level: L, wide: L::Wide) -> [Self; W] {
                level.$narrow(wide).map(Self::from_bits)
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
            #[inline(always)]
            fn factor(divisor: NonZeroU32) -> f32 {
                f32::factor(divisor)
            }
            #[inline(always)]
            fn scaled<L: Level, const W: usize>(level: L, wide: L::Wide, factor: f32) -> L::Wide {
                level.times(wide, level.splat(factor))
            }
            #[inline(always)]
            fn key<const MAX: bool>(self) -> i16 {
                let bits = turn_negative(self.to_bits() as i16);
                let nans = i16::MAX - $infinity;
                if MAX { bits.wrapping_sub(nans) } else { bits.wrapping_add(nans) }
            }
            #[inline(always)]
            fn extreme<const MAX: bool>(left: i16, right: i16) -> i16 {
                if MAX { left.max(right) } else { left.min(right) }
            }
            #[inline(always)]
            fn from_key<const MAX: bool>(key: i16) -> Self {
                let nans = i16::MAX - $infinity;
                let (is_nan, bits) = if MAX {
                    (key > $infinity - nans, key.wrapping_add(nans))
                } else {
                    (key < i16::MIN + 2 * nans, key.wrapping_sub(nans))
                };
                Self::from_bits(if is_nan { $nan } else { turn_negative(bits) as u16 })
            }
        }
    )*};
}

half_floats! {
    f16, widen_f16, narrow_f16, 0x7c00, 0x7e00;
    bf16, widen_bf16, narrow_bf16, 0x7f80, 0x7fc0;
}

/// Inverts all but the sign bit of a negative number; its own inverse.
#[inline(always)]
fn turn_negative(bits: i16) -> i16 {
    bits ^ ((bits >> 15) as u16 >> 1) as i16
}
