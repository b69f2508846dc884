//! The instruction sets that the kernels are compiled for, and the choice among them.

use std::array::from_fn;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::LazyLock;

use super::float8::{e4m3_to_f32, e5m2_to_f32, f32_to_e4m3, f32_to_e5m2};
use super::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::loops;
use super::number::{Float, Number};
use super::operator::Operator;
use super::watch::Watch;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// The name of the instruction set that [`Fold::run`](super::Fold::run) uses, such as `avx2`.
pub fn isa() -> &'static str {
    Isa::best().name()
}

/// An instruction set of this machine. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(AnyLevel);

impl Isa {
    /// The fastest one. Detected once, then cached.
    pub fn best() -> Self {
        static BEST: LazyLock<Isa> =
            LazyLock::new(|| Isa::available().next_back().expect("the baseline is always there"));
        *BEST
    }

    /// The instruction sets of this machine, the slowest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        let levels = [
            Some(AnyLevel::Baseline(Baseline)),
            #[cfg(target_arch = "x86_64")]
            Avx2::detect().map(AnyLevel::Avx2),
            #[cfg(target_arch = "x86_64")]
            Avx512::detect().map(AnyLevel::Avx512),
        ];
        levels.into_iter().flatten().map(Self)
    }

    /// A short name in lower case.
    pub fn name(self) -> &'static str {
        match self.0 {
            AnyLevel::Baseline(_) if cfg!(target_arch = "x86_64") => "sse2",
            AnyLevel::Baseline(_) if cfg!(target_arch = "aarch64") => "neon",
            AnyLevel::Baseline(_) => "baseline",
            #[cfg(target_arch = "x86_64")]
            AnyLevel::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            AnyLevel::Avx512(_) => "avx512",
        }
    }

    /// Runs `work` with code that is compiled for this instruction set.
    #[inline]
    pub fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            AnyLevel::Baseline(level) => level.run(work),
            #[cfg(target_arch = "x86_64")]
            AnyLevel::Avx2(level) => level.run(work),
            #[cfg(target_arch = "x86_64")]
            AnyLevel::Avx512(level) if W::GAINS_BY_AVX512 => level.run(work),
            #[cfg(target_arch = "x86_64")]
            AnyLevel::Avx512(level) => level.avx2().run(work),
        }
    }

    /// Runs the kernel for elements `T`, operation `O` and blocks of `N` elements.
    ///
    /// # Safety
    /// As [`Level::fold`].
    pub(super) unsafe fn fold<T: Number, O: Operator<T>, V: Watch<T>, const N: usize>(
        self,
        task: &Task<'_>,
    ) -> bool {
        match self.0 {
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Baseline(level) => unsafe { level.fold::<T, O, V, N>(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx2(level) => unsafe { level.fold::<T, O, V, N>(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx512(level) if T::IS_NARROW || T::NEEDS_AVX512 && !O::ADDS => unsafe {
                level.fold::<T, O, V, N>(task)
            },
            // Here 512 bits gain nothing: the first-level cache is the bound with 256.
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx512(level) => unsafe { level.avx2().fold::<T, O, V, N>(task) },
        }
    }

    /// Whether any of the `count` elements at `start` is infinite or NaN.
    ///
    /// # Safety
    /// As [`Level::any_nonfinite`].
    pub(super) unsafe fn any_nonfinite<T: Float>(self, start: *const u8, count: usize) -> bool {
        match self.0 {
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Baseline(level) => unsafe { level.any_nonfinite::<T>(start, count) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx2(level) => unsafe { level.any_nonfinite::<T>(start, count) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx512(level) => unsafe { level.any_nonfinite::<T>(start, count) },
        }
    }
}

/// Plain loops that are compiled for every instruction set and vectorized by the compiler.
///
/// The compiler neither fuses nor reorders operations on floats, so the bits are the same on all.
pub trait Work {
    /// The result.
    type Output;

    /// Whether it was measured to gain from 512-bit vectors.
    const GAINS_BY_AVX512: bool = false;

    /// Runs the loops. Must be `#[inline(always)]` with everything it calls: code that is not
    /// inlined is compiled for the baseline.
    fn run(self) -> Self::Output;
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum AnyLevel {
    Baseline(Baseline),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// Folds, and returns whether it watched and found something. The contract is that of
/// [`Level::fold`].
pub(super) type Kernel = unsafe fn(Isa, &Task<'_>) -> bool;

/// What one call of a kernel works on.
pub(super) struct Task<'a> {
    pub(super) dst: *mut u8,
    /// Never empty.
    pub(super) sources: &'a [*const u8],
    /// How many bytes of every buffer come before the elements.
    pub(super) skip: usize,
    /// In elements.
    pub(super) count: usize,
    /// One where nothing is divided.
    pub(super) divisor: NonZeroU32,
    /// One where nothing is multiplied.
    pub(super) factor: f64,
}

/// How many floats of 16 or 8 bits a level converts at once: a cache line of the longer.
pub(super) const LINE: usize = 32;

/// A set of processor features. A value of the type is the proof that the processor has them.
pub(super) trait Level: Copy {
    /// A line of `f32`, in an order of the level's own.
    type Wide: Copy;

    /// Does `work` with the features switched on.
    fn run<W: Work>(self, work: W) -> W::Output;

    /// Folds as [`Fold::run`](super::Fold::run) says.
    ///
    /// # Safety
    /// The contract of [`Fold::run`](super::Fold::run) holds for `task` and elements `T`.
    unsafe fn fold<T: Number, O: Operator<T>, V: Watch<T>, const N: usize>(
        self,
        task: &Task<'_>,
    ) -> bool;

    /// Whether any of the `count` elements at `start` is infinite or NaN.
    ///
    /// # Safety
    /// The elements hold values that nobody writes during the call.
    unsafe fn any_nonfinite<T: Float>(self, start: *const u8, count: usize) -> bool;

    /// Converts exactly. A NaN stays a NaN, not always the same one.
    fn widen_f16(self, half: [u16; LINE]) -> Self::Wide;
    /// Rounds to nearest even, and makes every NaN the canonical one.
    fn narrow_f16(self, wide: Self::Wide) -> [u16; LINE];
    /// As [`widen_f16`](Self::widen_f16).
    fn widen_bf16(self, half: [u16; LINE]) -> Self::Wide;
    /// As [`narrow_f16`](Self::narrow_f16).
    fn narrow_bf16(self, wide: Self::Wide) -> [u16; LINE];
    /// As [`widen_f16`](Self::widen_f16).
    fn widen_e4m3(self, bits: [u8; LINE]) -> Self::Wide;
    /// As [`narrow_f16`](Self::narrow_f16).
    fn narrow_e4m3(self, wide: Self::Wide) -> [u8; LINE];
    /// As [`widen_f16`](Self::widen_f16).
    fn widen_e5m2(self, bits: [u8; LINE]) -> Self::Wide;
    /// As [`narrow_f16`](Self::narrow_f16).
    fn narrow_e5m2(self, wide: Self::Wide) -> [u8; LINE];

    /// `value` in all places.
    fn splat(self, value: f32) -> Self::Wide;
    fn plus(self, left: Self::Wide, right: Self::Wide) -> Self::Wide;
    fn times(self, left: Self::Wide, right: Self::Wide) -> Self::Wide;
    fn over(self, left: Self::Wide, right: Self::Wide) -> Self::Wide;
}

/// A conversion of a line, element by element, in a loop that is compiled once for all kernels.
macro_rules! baseline {
    ($name:ident: $from:ty => $to:ty, $convert:ident) => {
        #[inline(always)]
        fn $name(self, line: $from) -> $to {
            #[inline(never)]
            fn out_of_line(line: &$from) -> $to {
                let mut converted = [Default::default(); LINE];
                for (to, from) in converted.iter_mut().zip(line) {
                    *to = $convert(*from);
                }
                converted
            }
            out_of_line(&line)
        }
    };
}

/// What the target guarantees: SSE2 on x86-64, NEON on AArch64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Baseline;

impl Level for Baseline {
    type Wide = [f32; LINE];

    #[inline]
    fn run<W: Work>(self, work: W) -> W::Output {
        work.run()
    }

    // Else its accumulators lie on the stack of every caller, whichever instructions it has.
    #[inline(never)]
    unsafe fn fold<T: Number, O: Operator<T>, V: Watch<T>, const N: usize>(
        self,
        task: &Task<'_>,
    ) -> bool {
        // SAFETY: the caller keeps the same contract.
        unsafe { loops::fold::<Self, T, O, V, N>(self, task) }
    }

    unsafe fn any_nonfinite<T: Float>(self, start: *const u8, count: usize) -> bool {
        // SAFETY: the caller keeps the same contract.
        unsafe { loops::any_nonfinite::<T>(start, count) }
    }

    baseline!(widen_f16: [u16; LINE] => [f32; LINE], f16_to_f32);
    baseline!(narrow_f16: [f32; LINE] => [u16; LINE], f32_to_f16);
    baseline!(widen_bf16: [u16; LINE] => [f32; LINE], bf16_to_f32);
    baseline!(narrow_bf16: [f32; LINE] => [u16; LINE], f32_to_bf16);
    baseline!(widen_e4m3: [u8; LINE] => [f32; LINE], e4m3_to_f32);
    baseline!(narrow_e4m3: [f32; LINE] => [u8; LINE], f32_to_e4m3);
    baseline!(widen_e5m2: [u8; LINE] => [f32; LINE], e5m2_to_f32);
    baseline!(narrow_e5m2: [f32; LINE] => [u8; LINE], f32_to_e5m2);

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; LINE] {
        [value; LINE]
    }
    #[inline(always)]
    fn plus(self, left: [f32; LINE], right: [f32; LINE]) -> [f32; LINE] {
        from_fn(|lane| left[lane] + right[lane])
    }
    #[inline(always)]
    fn times(self, left: [f32; LINE], right: [f32; LINE]) -> [f32; LINE] {
        from_fn(|lane| left[lane] * right[lane])
    }
    #[inline(always)]
    fn over(self, left: [f32; LINE], right: [f32; LINE]) -> [f32; LINE] {
        from_fn(|lane| left[lane] / right[lane])
    }
}
