//! The levels of x86-64: their features, and what they convert with instructions of their own.
//!
//! A NaN, and a subnormal number where an instruction takes it for zero, is so rare that one
//! branch for a line of 32 elements looks for it, and code out of the way deals with it.

mod avx2;
mod avx512;
mod float8;

use super::float16::F32_NAN;
use super::isa::{LINE, Level, Task, Work};
use super::loops;
use super::number::{Float, Number};
use super::operator::Operator;
use super::watch::Watch;

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
            type Wide = $operations::Wide;

            #[inline]
            fn run<W: Work>(self, work: W) -> W::Output {
                $(#[target_feature(enable = $feature)])+
                fn entry<W: Work>(work: W) -> W::Output {
                    work.run()
                }
                // SAFETY: `self` proves the features.
                unsafe { entry(work) }
            }

            unsafe fn fold<T: Number, O: Operator<T>, V: Watch<T>, const N: usize>(
        self,
        task: &Task<'_>,
    ) -> bool {
                $(#[target_feature(enable = $feature)])+
                unsafe fn entry<T: Number, O: Operator<T>, V: Watch<T>, const N: usize>(
                    level: $name,
                    task: &Task<'_>,
                ) -> bool {
                    // SAFETY: the caller keeps the same contract.
                    unsafe { loops::fold::<$name, T, O, V, N>(level, task) }
                }
                // SAFETY: `self` proves the features; the caller keeps the rest.
                unsafe { entry::<T, O, V, N>(self, task) }
            }

            unsafe fn any_nonfinite<T: Float>(self, start: *const u8, count: usize) -> bool {
                $(#[target_feature(enable = $feature)])+
                unsafe fn entry<T: Float>(start: *const u8, count: usize) -> bool {
                    // SAFETY: the caller keeps the same contract.
                    unsafe { loops::any_nonfinite::<T>(start, count) }
                }
                // SAFETY: `self` proves the features; the caller keeps the rest.
                unsafe { entry::<T>(start, count) }
            }

            level!($operations: widen_f16(bits: [u16; LINE]) -> Self::Wide);
            level!($operations: narrow_f16(wide: Self::Wide) -> [u16; LINE]);
            level!($operations: widen_bf16(bits: [u16; LINE]) -> Self::Wide);
            level!($operations: narrow_bf16(wide: Self::Wide) -> [u16; LINE]);
            level!($operations: widen_e4m3(bits: [u8; LINE]) -> Self::Wide);
            level!($operations: narrow_e4m3(wide: Self::Wide) -> [u8; LINE]);
            level!($operations: widen_e5m2(bits: [u8; LINE]) -> Self::Wide);
            level!($operations: narrow_e5m2(wide: Self::Wide) -> [u8; LINE]);
            level!($operations: splat(value: f32) -> Self::Wide);
            level!($operations: plus(left: Self::Wide, right: Self::Wide) -> Self::Wide);
            level!($operations: times(left: Self::Wide, right: Self::Wide) -> Self::Wide);
            level!($operations: over(left: Self::Wide, right: Self::Wide) -> Self::Wide);
        }
    };
    ($operations:ident: $name:ident($($argument:ident: $from:ty),+) -> $to:ty) => {
        #[inline(always)]
        fn $name(self, $($argument: $from),+) -> $to {
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
