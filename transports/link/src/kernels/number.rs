//! What the kernels know of each element type.

use std::num::NonZeroU32;

use half::{bf16, f16};

use super::float16::{F32_NAN, bf16_to_f32, f32_to_bf16};
use super::isa::Level;

/// An element type, its accumulator for arithmetic, and its key for comparisons.
pub(super) trait Number: Copy {
    /// What sums and products are computed in.
    type Wide: Arithmetic;
    /// An integer that is ordered as the elements are.
    type Key: Copy + Default + Ord;
    /// Whether [`Level::CONVERTS_F16`] concerns this type.
    const IS_F16: bool = false;

    fn widen<L: Level, const W: usize>(level: L, chunk: [Self; W]) -> [Self::Wide; W];
    /// Rounds, and makes every NaN the same one.
    fn narrow<L: Level, const W: usize>(level: L, chunk: [Self::Wide; W]) -> [Self; W];

    /// NaN gets the key that wins: the greatest if `MAX`, else the least.
    fn key<const MAX: bool>(self) -> Self::Key;
    fn from_key<const MAX: bool>(key: Self::Key) -> Self;
}

/// The accumulator of sums and products.
pub(super) trait Arithmetic: Copy + Default {
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn over(self, divisor: NonZeroU32) -> Self;
}

// Each with the type it is divided in. `f64` holds both operands, has a vector division, and is
// exact: a quotient of 32-bit integers that is not whole is at least one part in 2³² away from the
// next whole number, and `f64` rounds by less than one part in 2⁵².
macro_rules! integers {
    ($($int:ty, $quotient:ty;)*) => {$(
        impl Arithmetic for $int {
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn times(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn over(self, divisor: NonZeroU32) -> Self {
                (self as $quotient / divisor.get() as $quotient) as Self
            }
        }

        impl Number for $int {
            type Wide = Self;
            type Key = Self;

            #[inline(always)]
            fn widen<L: Level, const W: usize>(_: L, chunk: [Self; W]) -> [Self; W] {
                chunk
            }
            #[inline(always)]
            fn narrow<L: Level, const W: usize>(_: L, chunk: [Self; W]) -> [Self; W] {
                chunk
            }
            #[inline(always)]
            fn key<const MAX: bool>(self) -> Self {
                self
            }
            #[inline(always)]
            fn from_key<const MAX: bool>(key: Self) -> Self {
                key
            }
        }
    )*};
}

integers! {
    i8, f64; i16, f64; i32, f64; i64, i64;
    u8, f64; u16, f64; u32, f64; u64, u64;
}

macro_rules! arithmetic_of_floats {
    ($($float:ty),*) => {$(
        impl Arithmetic for $float {
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn times(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn over(self, divisor: NonZeroU32) -> Self {
                self / divisor.get() as Self
            }
        }
    )*};
}

arithmetic_of_floats!(f32, f64);

/// Keys of floats: the bits, with those of negative numbers turned round so that the integers
/// ascend as the values do, −0 below +0. NaN lies outside the infinities on both sides.
macro_rules! keys_of_float {
    ($bits:ty, $key:ty, $infinity:expr, $nan:expr) => {
        type Key = $key;

        #[inline(always)]
        fn key<const MAX: bool>(self) -> $key {
            let bits = self.to_bits() as $key;
            let is_nan = bits & <$key>::MAX > $infinity;
            if is_nan { nan_key!($key, MAX) } else { turn_negative!(bits, $bits, $key) }
        }
        #[inline(always)]
        fn from_key<const MAX: bool>(key: $key) -> Self {
            let is_nan = key == nan_key!($key, MAX);
            let bits = if is_nan { $nan } else { turn_negative!(key, $bits, $key) };
            Self::from_bits(bits as $bits)
        }
    };
}

macro_rules! nan_key {
    ($key:ty, $max:expr) => {
        if $max { <$key>::MAX } else { <$key>::MIN }
    };
}

/// Inverts all but the sign bit of a negative number; its own inverse.
macro_rules! turn_negative {
    ($value:expr, $bits:ty, $key:ty) => {
        $value ^ (($value >> (<$key>::BITS - 1)) as $bits >> 1) as $key
    };
}

macro_rules! full_floats {
    ($($float:ty, $bits:ty, $key:ty, $infinity:expr, $nan:expr;)*) => {$(
        impl Number for $float {
            type Wide = Self;

            #[inline(always)]
            fn widen<L: Level, const W: usize>(_: L, chunk: [Self; W]) -> [Self; W] {
                chunk
            }
            #[inline(always)]
            fn narrow<L: Level, const W: usize>(_: L, chunk: [Self; W]) -> [Self; W] {
                // Chosen among integers: a float NaN is free to change its bits.
                chunk.map(|x| Self::from_bits(if x.is_nan() { $nan } else { x.to_bits() }))
            }
            keys_of_float!($bits, $key, $infinity, $nan);
        }
    )*};
}

full_floats! {
    f32, u32, i32, 0x7f80_0000, F32_NAN as _;
    f64, u64, i64, 0x7ff0_0000_0000_0000, 0x7ff8_0000_0000_0000;
}

impl Number for bf16 {
    type Wide = f32;

    #[inline(always)]
    fn widen<L: Level, const W: usize>(_: L, chunk: [Self; W]) -> [f32; W] {
        chunk.map(|x| bf16_to_f32(x.to_bits()))
    }
    #[inline(always)]
    fn narrow<L: Level, const W: usize>(level: L, chunk: [f32; W]) -> [Self; W] {
        f32::narrow(level, chunk).map(|x| Self::from_bits(f32_to_bf16(x)))
    }
    keys_of_float!(u16, i16, 0x7f80, 0x7fc0);
}

impl Number for f16 {
    type Wide = f32;
    const IS_F16: bool = true;

    #[inline(always)]
    fn widen<L: Level, const W: usize>(level: L, chunk: [Self; W]) -> [f32; W] {
        level.widen_f16(chunk.map(Self::to_bits))
    }
    #[inline(always)]
    fn narrow<L: Level, const W: usize>(level: L, chunk: [f32; W]) -> [Self; W] {
        level.narrow_f16(f32::narrow(level, chunk)).map(Self::from_bits)
    }
    keys_of_float!(u16, i16, 0x7c00, 0x7e00);
}
