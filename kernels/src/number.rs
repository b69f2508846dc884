//! What the kernels know of each element type.

use std::num::NonZeroU32;

use super::isa::Level;
use super::reciprocal::Reciprocal;
use crate::Bool;

/// An element type.
pub(super) trait Number: Copy + Default {
    /// Whether the type is computed with as [`Level::Wide`].
    const IS_NARROW: bool = false;
    /// Whether it takes AVX-512 to multiply and compare vectors of the type.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "asked for AVX-512 only"))]
    const NEEDS_AVX512: bool = false;
}

/// How lines of elements are computed with.
pub(super) trait Arithmetic: Number {
    /// What sums and products of a line are computed in.
    type Wide<L: Level, const W: usize>: Copy;
    /// What divides many elements.
    type Divisor: Copy;

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
}

/// What floats have beyond the arithmetic of integers.
pub(super) trait Float: Arithmetic {
    /// What multiplies many elements.
    type Factor: Copy;
    /// The bits without the sign, which ascend with the values; NaN follows infinity.
    type Magnitude: Copy + Default + Ord;
    /// The least magnitude of what is not finite.
    const INFINITE: Self::Magnitude;

    fn factor(factor: f64) -> Self::Factor;
    fn scaled<L: Level, const W: usize>(
        level: L,
        wide: Self::Wide<L, W>,
        factor: Self::Factor,
    ) -> Self::Wide<L, W>;
    fn magnitude(self) -> Self::Magnitude;
}

/// How two elements are compared.
pub(super) trait Ordered: Number {
    /// What [`extreme`](Self::extreme) compares.
    type Key: Copy;

    fn key<const MAX: bool>(self) -> Self::Key;
    /// The key of the greater element if `MAX`, else of the lesser; of a NaN if there is one.
    fn extreme<const MAX: bool>(left: Self::Key, right: Self::Key) -> Self::Key;
    /// Makes every NaN the same one.
    fn from_key<const MAX: bool>(key: Self::Key) -> Self;
}

/// How elements are combined bit by bit.
pub(super) trait Bits: Number {
    /// What the bits are: the element itself, or 0 or 1 where it is a truth value.
    fn bits(self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
}

/// The arithmetic of types that are computed with as they are, from that of one element.
macro_rules! plain_lines {
    ($divisor:ty, $plus:expr, $times:expr, $make_divisor:expr, $over:expr, $narrow:expr) => {
        type Wide<L: Level, const W: usize> = [Self; W];
        type Divisor = $divisor;

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
            std::array::from_fn(|lane| $plus(left[lane], right[lane]))
        }
        #[inline(always)]
        fn times<L: Level, const W: usize>(_: L, left: [Self; W], right: [Self; W]) -> [Self; W] {
            std::array::from_fn(|lane| $times(left[lane], right[lane]))
        }
        #[inline(always)]
        fn divisor(divisor: NonZeroU32) -> $divisor {
            $make_divisor(divisor)
        }
        #[inline(always)]
        fn over<L: Level, const W: usize>(_: L, wide: [Self; W], by: $divisor) -> [Self; W] {
            wide.map(|x| $over(x, by))
        }
    };
}
pub(super) use plain_lines;

/// Each with the type its magnitude is divided in, and how it gets there and back.
macro_rules! integers {
    ($($int:ty, $magnitude:ty, |$x:ident, $quotient:ident| $over:expr;)*) => {$(
        impl Number for $int {
            const NEEDS_AVX512: bool = size_of::<Self>() == 8;
        }

        impl Arithmetic for $int {
            plain_lines!(
                Reciprocal<$magnitude>, Self::wrapping_add, Self::wrapping_mul,
                Reciprocal::<$magnitude>::new,
                |$x: Self, by: Reciprocal<$magnitude>| {
                    let $quotient = |magnitude| by.quotient(magnitude);
                    $over
                },
                |x| x
            );
        }

        impl Ordered for $int {
            type Key = Self;

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

impl Bits for u8 {
    #[inline(always)]
    fn bits(self) -> Self {
        self
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        self & other
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        self | other
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self ^ other
    }
}

impl Number for Bool {}

impl Bits for Bool {
    #[inline(always)]
    fn bits(self) -> Self {
        Self::new(self.get())
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self::from_byte(self.to_byte() & other.to_byte())
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self::from_byte(self.to_byte() | other.to_byte())
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self::from_byte(self.to_byte() ^ other.to_byte())
    }
}
