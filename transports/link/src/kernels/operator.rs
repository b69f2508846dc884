//! The operations, each generic over the element type.

use std::num::NonZeroU32;

use super::isa::Level;
use super::number::{Arithmetic, Number};

/// How elements become accumulators, meet the next ones, and leave again.
pub(super) trait Operator {
    type Wide<T: Number>: Copy + Default;
    /// Whether elements are widened, so that [`Level::CONVERTS_F16`] matters.
    const WIDENS: bool = true;

    fn lift<L: Level, T: Number, const W: usize>(level: L, chunk: [T; W]) -> [Self::Wide<T>; W];
    fn combine<T: Number>(left: Self::Wide<T>, right: Self::Wide<T>) -> Self::Wide<T>;
    fn lower<L: Level, T: Number, const W: usize>(
        level: L,
        chunk: [Self::Wide<T>; W],
        divisor: NonZeroU32,
    ) -> [T; W];
}

/// Addition; with `DIVIDE`, followed by a division.
pub(super) struct Sum<const DIVIDE: bool>;
/// Multiplication.
pub(super) struct Product;
/// The greatest element if `MAX`, else the least.
pub(super) struct Extreme<const MAX: bool>;

impl<const DIVIDE: bool> Operator for Sum<DIVIDE> {
    type Wide<T: Number> = T::Wide;

    #[inline(always)]
    fn lift<L: Level, T: Number, const W: usize>(level: L, chunk: [T; W]) -> [T::Wide; W] {
        T::widen(level, chunk)
    }
    #[inline(always)]
    fn combine<T: Number>(left: T::Wide, right: T::Wide) -> T::Wide {
        left.plus(right)
    }
    #[inline(always)]
    fn lower<L: Level, T: Number, const W: usize>(
        level: L,
        chunk: [T::Wide; W],
        divisor: NonZeroU32,
    ) -> [T; W] {
        T::narrow(level, if DIVIDE { chunk.map(|sum| sum.over(divisor)) } else { chunk })
    }
}

impl Operator for Product {
    type Wide<T: Number> = T::Wide;

    #[inline(always)]
    fn lift<L: Level, T: Number, const W: usize>(level: L, chunk: [T; W]) -> [T::Wide; W] {
        T::widen(level, chunk)
    }
    #[inline(always)]
    fn combine<T: Number>(left: T::Wide, right: T::Wide) -> T::Wide {
        left.times(right)
    }
    #[inline(always)]
    fn lower<L: Level, T: Number, const W: usize>(
        level: L,
        chunk: [T::Wide; W],
        _: NonZeroU32,
    ) -> [T; W] {
        T::narrow(level, chunk)
    }
}

impl<const MAX: bool> Operator for Extreme<MAX> {
    type Wide<T: Number> = T::Key;
    const WIDENS: bool = false;

    #[inline(always)]
    fn lift<L: Level, T: Number, const W: usize>(_: L, chunk: [T; W]) -> [T::Key; W] {
        chunk.map(T::key::<MAX>)
    }
    #[inline(always)]
    fn combine<T: Number>(left: T::Key, right: T::Key) -> T::Key {
        if MAX { left.max(right) } else { left.min(right) }
    }
    #[inline(always)]
    fn lower<L: Level, T: Number, const W: usize>(
        _: L,
        chunk: [T::Key; W],
        _: NonZeroU32,
    ) -> [T; W] {
        chunk.map(T::from_key::<MAX>)
    }
}
