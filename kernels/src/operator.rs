//! The operations, each generic over the element type.

use std::array::from_fn;

use super::isa::{Level, Task};
use super::number::{Arithmetic, Bits, Float, Number, Ordered};

/// How lines of elements become accumulators, meet the next ones, and leave again.
pub(super) trait Operator<T: Number> {
    type Wide<L: Level, const W: usize>: Copy;
    /// Whether elements are widened.
    const WIDENS: bool = true;
    /// Whether elements are combined by addition.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "asked for AVX-512 only"))]
    const ADDS: bool = false;
    /// What the first or the last step needs to know.
    type Known: Copy;

    fn known(task: &Task<'_>) -> Self::Known;

    fn lift<L: Level, const W: usize>(
        level: L,
        line: [T; W],
        known: Self::Known,
    ) -> Self::Wide<L, W>;
    fn combine<L: Level, const W: usize>(
        level: L,
        left: Self::Wide<L, W>,
        right: Self::Wide<L, W>,
    ) -> Self::Wide<L, W>;
    fn lower<L: Level, const W: usize>(
        level: L,
        wide: Self::Wide<L, W>,
        known: Self::Known,
    ) -> [T; W];
}

/// An operation on widened elements: what the elements must have, whether it adds, how two are
/// combined, what the first or last step needs to know, how it learns that, and what they do.
macro_rules! arithmetic {
    (
        $(#[$doc:meta])* $name:ident, $bound:ident, $adds:expr, $combine:ident,
        $known:ty, |$task:pat_param| $learn:expr,
        |$first_level:pat_param, $first:ident, $first_known:pat_param| $lift:expr,
        |$last_level:pat_param, $last:ident, $last_known:pat_param| $lower:expr
    ) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl<T: $bound> Operator<T> for $name {
            type Wide<L: Level, const W: usize> = T::Wide<L, W>;
            type Known = $known;
            const ADDS: bool = $adds;

            #[inline(always)]
            fn known($task: &Task<'_>) -> $known {
                $learn
            }
            #[inline(always)]
            fn lift<L: Level, const W: usize>(
                level: L,
                line: [T; W],
                $first_known: $known,
            ) -> T::Wide<L, W> {
                let ($first_level, $first) = (level, T::widen(level, line));
                $lift
            }
            #[inline(always)]
            fn combine<L: Level, const W: usize>(
                level: L,
                left: T::Wide<L, W>,
                right: T::Wide<L, W>,
            ) -> T::Wide<L, W> {
                T::$combine::<L, W>(level, left, right)
            }
            #[inline(always)]
            fn lower<L: Level, const W: usize>(
                level: L,
                $last: T::Wide<L, W>,
                $last_known: $known,
            ) -> [T; W] {
                let $last_level = level;
                T::narrow(level, $lower)
            }
        }
    };
}

arithmetic!(
    /// Addition.
    Sum, Arithmetic, true, plus,
    (), |_| (), |_, wide, ()| wide, |_, wide, ()| wide
);
arithmetic!(
    /// A multiplication by a factor, then addition.
    Weighted, Float, true, plus,
    T::Factor, |task| T::factor(task.factor),
    |level, wide, factor| T::scaled::<L, W>(level, wide, factor), |_, wide, _| wide
);
arithmetic!(
    /// Addition, then a division.
    Average, Arithmetic, true, plus,
    T::Divisor, |task| T::divisor(task.divisor),
    |_, wide, _| wide, |level, wide, divisor| T::over::<L, W>(level, wide, divisor)
);
arithmetic!(
    /// Addition, then a division by a power of two, which is a multiplication.
    Scaled, Float, true, plus,
    T::Factor, |task| T::factor(1.0 / f64::from(task.divisor.get())),
    |_, wide, _| wide, |level, wide, factor| T::scaled::<L, W>(level, wide, factor)
);
arithmetic!(
    /// Multiplication.
    Product, Arithmetic, false, times,
    (), |_| (), |_, wide, ()| wide, |_, wide, ()| wide
);

/// The greatest element if `MAX`, else the least.
pub(super) struct Extreme<const MAX: bool>;

impl<T: Ordered, const MAX: bool> Operator<T> for Extreme<MAX> {
    type Wide<L: Level, const W: usize> = [T::Key; W];
    const WIDENS: bool = false;
    type Known = ();

    #[inline(always)]
    fn known(_: &Task<'_>) {}
    #[inline(always)]
    fn lift<L: Level, const W: usize>(_: L, line: [T; W], (): ()) -> [T::Key; W] {
        line.map(T::key::<MAX>)
    }
    #[inline(always)]
    fn combine<L: Level, const W: usize>(
        _: L,
        left: [T::Key; W],
        right: [T::Key; W],
    ) -> [T::Key; W] {
        from_fn(|lane| T::extreme::<MAX>(left[lane], right[lane]))
    }
    #[inline(always)]
    fn lower<L: Level, const W: usize>(_: L, wide: [T::Key; W], (): ()) -> [T; W] {
        wide.map(T::from_key::<MAX>)
    }
}

/// An operation on the bits of elements.
macro_rules! bitwise {
    ($(#[$doc:meta])* $name:ident, $combine:ident) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl<T: Bits> Operator<T> for $name {
            type Wide<L: Level, const W: usize> = [T; W];
            const WIDENS: bool = false;
            type Known = ();

            #[inline(always)]
            fn known(_: &Task<'_>) {}
            #[inline(always)]
            fn lift<L: Level, const W: usize>(_: L, line: [T; W], (): ()) -> [T; W] {
                line.map(T::bits)
            }
            #[inline(always)]
            fn combine<L: Level, const W: usize>(_: L, left: [T; W], right: [T; W]) -> [T; W] {
                from_fn(|lane| left[lane].$combine(right[lane]))
            }
            #[inline(always)]
            fn lower<L: Level, const W: usize>(_: L, wide: [T; W], (): ()) -> [T; W] {
                wide
            }
        }
    };
}

bitwise!(
    /// The bits that both have.
    And, and
);
bitwise!(
    /// The bits that any has.
    Or, or
);
bitwise!(
    /// The bits that one of two has.
    Xor, xor
);
