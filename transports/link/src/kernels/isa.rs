//! The instruction sets the kernels are compiled for, and the choice among them.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::LazyLock;

use super::float16::{f16_to_f32, f32_to_f16};
use super::loops;
use super::number::Number;
use super::operator::Operator;

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
        }
    }

    /// Runs the kernel for elements `T`, operation `O` and tiles of `N` elements.
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

/// A set of processor features. A value of the type is the proof that the processor has them.
pub(super) trait Level: Copy {
    /// Whether the level has instructions that convert eight `f16` at once.
    const CONVERTS_F16: bool = false;

    /// Folds as [`Fold::run`](super::Fold::run) says.
    ///
    /// # Safety
    /// The contract of [`Fold::run`](super::Fold::run) holds for `task` and elements `T`.
    unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>);

    /// Converts exactly. A NaN stays a NaN, not always the same one.
    #[inline(always)]
    fn widen_f16<const W: usize>(self, half: [u16; W]) -> [f32; W] {
        half.map(f16_to_f32)
    }

    /// Rounds to nearest even. The only NaN it may meet is the canonical one.
    #[inline(always)]
    fn narrow_f16<const W: usize>(self, wide: [f32; W]) -> [u16; W] {
        wide.map(f32_to_f16)
    }
}

/// What the target guarantees: SSE2 on x86-64, NEON on AArch64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Baseline;

impl Level for Baseline {
    unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>) {
        // SAFETY: the caller keeps the same contract.
        unsafe { loops::fold::<Self, T, O, N>(self, task) };
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256, _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph,
    };
    use std::mem::transmute;

    use super::{Level, Number, Operator, Task, f16_to_f32, f32_to_f16, loops};

    /// Defines a level whose features are detected, and compiles the loop for them.
    macro_rules! level {
        ($(#[$doc:meta])* $name:ident, $($feature:tt),+) => {
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub(in super::super) struct $name(());

            impl $name {
                pub(super) fn detect() -> Option<Self> {
                    ($(is_x86_feature_detected!($feature))&&+).then_some(Self(()))
                }
            }

            impl Level for $name {
                const CONVERTS_F16: bool = true;

                unsafe fn fold<T: Number, O: Operator, const N: usize>(self, task: &Task<'_>) {
                    $(#[target_feature(enable = $feature)])+
                    unsafe fn entry<T: Number, O: Operator, const N: usize>(
                        level: $name,
                        task: &Task<'_>,
                    ) {
                        // SAFETY: the caller keeps the same contract.
                        unsafe { loops::fold::<$name, T, O, N>(level, task) };
                    }
                    // SAFETY: `self` proves the features; the caller keeps the rest.
                    unsafe { entry::<T, O, N>(self, task) };
                }

                #[inline(always)]
                fn widen_f16<const W: usize>(self, half: [u16; W]) -> [f32; W] {
                    let [eight] = half.as_chunks().0 else { return half.map(f16_to_f32) };
                    let mut wide = [0.0; W];
                    // SAFETY: `self` proves F16C.
                    wide.copy_from_slice(&unsafe { widen_8(*eight) });
                    wide
                }

                #[inline(always)]
                fn narrow_f16<const W: usize>(self, wide: [f32; W]) -> [u16; W] {
                    let [eight] = wide.as_chunks().0 else { return wide.map(f32_to_f16) };
                    let mut half = [0; W];
                    // SAFETY: `self` proves F16C.
                    half.copy_from_slice(&unsafe { narrow_8(*eight) });
                    half
                }
            }
        };
    }

    level!(
        /// 256-bit vectors, and conversions of `f16`.
        Avx2, "avx2", "f16c"
    );

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    fn widen_8(half: [u16; 8]) -> [f32; 8] {
        // SAFETY: both types are 16 bytes of plain data.
        let half = unsafe { transmute::<[u16; 8], __m128i>(half) };
        let wide = _mm256_cvtph_ps(half);
        // SAFETY: both types are 32 bytes of plain data.
        unsafe { transmute::<__m256, [f32; 8]>(wide) }
    }

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    fn narrow_8(wide: [f32; 8]) -> [u16; 8] {
        // SAFETY: both types are 32 bytes of plain data.
        let wide = unsafe { transmute::<[f32; 8], __m256>(wide) };
        let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide);
        // SAFETY: both types are 16 bytes of plain data.
        unsafe { transmute::<__m128i, [u16; 8]>(half) }
    }
}
