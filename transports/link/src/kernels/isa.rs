//! The instruction sets the kernels are compiled for, and the choice among them.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::LazyLock;

use super::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::loops;
use super::number::Number;
use super::operator::Operator;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// The name of the instruction set that [`Fold::run`](super::Fold::run) uses, such as `avx2`.
pub fn isa() -> &'static str {
    Isa::best().name()
}

/// An instruction set this machine has. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(AnyLevel);

impl Isa {
    /// The fastest one. Found once, then remembered.
    pub fn best() -> Self {
        static BEST: LazyLock<Isa> =
            LazyLock::new(|| Isa::available().next_back().expect("the baseline is always there"));
        *BEST
    }

    /// Those this machine has, the slowest first.
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

    /// Runs the kernel for elements `T`, operation `O` and blocks of `N` elements.
    ///
    /// # Safety
    /// As [`Level::fold`].
    pub(super) unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>) {
        match self.0 {
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Baseline(level) => unsafe { level.fold::<T, O, N>(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx2(level) => unsafe { level.fold::<T, O, N>(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx512(level) if T::IS_HALF || T::NEEDS_AVX512 && !O::ADDS => unsafe {
                level.fold::<T, O, N>(task)
            },
            // Here 512 bits gain nothing: the first-level cache is the bound with 256.
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller keeps the same contract.
            AnyLevel::Avx512(level) => unsafe { level.avx2().fold::<T, O, N>(task) },
        }
    }
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

/// What one call of a kernel works on.
pub(super) struct Task<'a> {
    pub(super) dst: *mut u8,
    /// Never empty.
    pub(super) sources: &'a [*const u8],
    /// In elements.
    pub(super) count: usize,
    /// One where nothing is divided.
    pub(super) divisor: NonZeroU32,
}

/// How many 16-bit floats a level may convert at once: a cache line of them.
pub(super) const LINE: usize = 32;

/// A set of processor features. A value of the type is the proof that the processor has them.
pub(super) trait Level: Copy {
    /// Whether 16-bit floats are converted and computed with by [`LINE`], else one by one.
    const CONVERTS_LINES: bool;
    /// As many `f32`, in an order of the level's own.
    type Wide: Copy;

    /// Folds as [`Fold::run`](super::Fold::run) says.
    ///
    /// # Safety
    /// The contract of [`Fold::run`](super::Fold::run) holds for `task` and elements `T`.
    unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>);

    /// Converts exactly. A NaN stays a NaN, not always the same one.
    fn widen_f16<const W: usize>(self, half: [u16; W]) -> Self::Wide;
    /// Rounds to nearest even, and makes every NaN the canonical one.
    fn narrow_f16<const W: usize>(self, wide: Self::Wide) -> [u16; W];
    /// As [`widen_f16`](Self::widen_f16).
    fn widen_bf16<const W: usize>(self, half: [u16; W]) -> Self::Wide;
    /// As [`narrow_f16`](Self::narrow_f16).
    fn narrow_bf16<const W: usize>(self, wide: Self::Wide) -> [u16; W];

    /// `value` in all places.
    fn splat(self, value: f32) -> Self::Wide;
    fn plus(self, left: Self::Wide, right: Self::Wide) -> Self::Wide;
    fn times(self, left: Self::Wide, right: Self::Wide) -> Self::Wide;
    fn over(self, left: Self::Wide, right: Self::Wide) -> Self::Wide;
}

/// What the target guarantees: SSE2 on x86-64, NEON on AArch64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Baseline;

impl Level for Baseline {
    const CONVERTS_LINES: bool = false;
    type Wide = f32;

    unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>) {
        // SAFETY: the caller keeps the same contract.
        unsafe { loops::fold::<Self, T, O, N>(self, task) };
    }

    #[inline(always)]
    fn widen_f16<const W: usize>(self, half: [u16; W]) -> f32 {
        f16_to_f32(half[0])
    }
    #[inline(always)]
    fn narrow_f16<const W: usize>(self, wide: f32) -> [u16; W] {
        [f32_to_f16(wide); W]
    }
    #[inline(always)]
    fn widen_bf16<const W: usize>(self, half: [u16; W]) -> f32 {
        bf16_to_f32(half[0])
    }
    #[inline(always)]
    fn narrow_bf16<const W: usize>(self, wide: f32) -> [u16; W] {
        [f32_to_bf16(wide); W]
    }
    #[inline(always)]
    fn splat(self, value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn plus(self, left: f32, right: f32) -> f32 {
        left + right
    }
    #[inline(always)]
    fn times(self, left: f32, right: f32) -> f32 {
        left * right
    }
    #[inline(always)]
    fn over(self, left: f32, right: f32) -> f32 {
        left / right
    }
}
