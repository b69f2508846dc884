//! The operations, each generic over the element type.

use std::array::from_fn;
use std::num::NonZeroU32;

use super::isa::Level;
use super::number::Number;

/// How lines of elements become accumulators, meet the next ones, and leave again.
pub(super) trait Operator {
    type Wide<L: Level, T: Number, const W: usize>: Copy;
    /// Whether elements are widened.
    const WIDENS: bool = true;
    /// Whether elements are combined by addition.
    const ADDS: bool = false;
    /// What the last step needs to know.
    type Last<T: Number>: Copy;

    fn last<T: Number>(divisor: NonZeroU32) -> Self::Last<T>;

    fn lift<L: Level, T: Number, const W: usize>(level: L, line: [T; W]) -> Self::Wide<L, T, W>;
    fn combine<L: Level, T: Number, const W: usize>(
        level: L,
        left: Self::Wide<L, T, W>,
        right: Self::Wide<L, T, W>,
    ) -> Self::Wide<L, T, W>;
    fn lower<L: Level, T: Number, const W: usize>(
        level: L,
        wide: Self::Wide<L, T, W>,
        last: Self::Last<T>,
    ) -> [T; W];
}

/// An operation on widened elements: whether it adds, how two are combined, what the last step
/// needs to know, how it learns that, and what it does.
macro_rules! arithmetic {
    (
        $(#[$doc:meta])* $name:ident, $adds:expr, $combine:ident,
        $last:ty, |$divisor:pat_param| $prepare:expr,
        |$level:pat_param, $wide:ident, $known:pat_param| $apply:expr
    ) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl Operator for $name {
            type Wide<L: Level, T: Number, const W: usize> = T::Wide<L, W>;
            type Last<T: Number> = $last;
            const ADDS: bool = $adds;

            #[inline(always)]
            fn last<T: Number>($divisor: NonZeroU32) -> $last {
                $prepare
            }
            #[inline(always)]
            fn lift<L: Level, T: Number, const W: usize>(
                level: L,
                line: [T; W],
            ) -> T::Wide<L, W> {
                T::widen(level, line)
            }
            #[inline(always)]
            fn combine<L: Level, T: Number, const W: usize>(
                level: L,
                left: T::Wide<L, W>,
                right: T::Wide<L, W>,
            ) -> T::Wide<L, W> {
                T::$combine::<L, W>(level, left, right)
            }
            #[inline(always)]
            fn lower<L: Level, T: Number, const W: usize>(
                level: L,
                $wide: T::Wide<L, W>,
                $known: $last,
            ) -> [T; W] {
                let $level = level;
                T::narrow(level, $apply)
            }
        }
    };
}

arithmetic!(
    /// Addition.
    Sum, true, plus, (), |_| (), |_, wide, ()| wide
);
arithmetic!(
    /// Addition, then a division.
    Average, true, plus, T::Divisor,
    |divisor| T::divisor(divisor), |level, wide, divisor| T::over::<L, W>(level, wide, divisor)
);
arithmetic!(
    /// Addition, then a division by a power of two, which is a multiplication.
    Scaled, true, plus, T::Divisor,
    |divisor| T::factor(divisor), |level, wide, factor| T::scaled::<L, W>(level, wide, factor)
);
arithmetic!(
    /// Multiplication.
    Product, false, times, (), |_| (), |_, wide, ()| wide
);

/// The greatest element if `MAX`, else the least.
pub(super) struct Extreme<const MAX: bool>;

impl<const MAX: bool> Operator for Extreme<MAX> {
    type Wide<L: Level, T: Number, const W: usize> = [T::Key; W];
    const WIDENS: bool = false;
    type Last<T: Number> = ();

    #[inline(always)]
    fn last<T: Number>(_: NonZeroU32) {}
    #[inline(always)]
    fn lift<L: Level, T: Number, const W: usize>(_: L, line: [T; W]) -> [T::Key; W] {
        line.map(T::key::<MAX>)
    }
    #[inline(always)]
    fn combine<L: Level, T: Number, const W: usize>(
        _: L,
        left: [T::Key; W],
        right: [T::Key; W],
    ) -> [T::Key; W] {
        from_fn(|lane| T::extreme::<MAX>(left[lane], right[lane]))
    }
    #[inline(always)]
    fn lower<L: Level, T: Number, const W: usize>(_: L, wide: [T::Key; W], (): ()) -> [T; W] {
        wide.map(T::from_key::<MAX>)
    }
}
