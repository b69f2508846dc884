//! Arithmetic of `f32` and `f64`, rounded to nearest even, with subnormal numbers.
//!
//! Results that are NaN have the bits of NVIDIA's hardware, which no kernel should rely on.
//! Approximations (`ex2.approx` and its like) are as exact as the CPU's functions.

use super::{binary, for_float, ternary, unary};
use crate::machine::{Flow, Handler, Instruction, Scalar, Thread};

/// A float of a register.
pub(super) trait Float: Scalar {
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn fma(self, factor: Self, other: Self) -> Self;
    fn sqrt(self) -> Self;
    fn reciprocal(self) -> Self;
    fn abs(self) -> Self;
    fn neg(self) -> Self;
    fn is_nan(self) -> bool;
    fn is_negative(self) -> bool;
    fn copysign(self, sign: Self) -> Self;
    /// The same value, or the one NaN of the hardware.
    fn canonical(self) -> Self;
}

macro_rules! floats {
    ($($type:ty, $nan:expr);*) => {$(
        impl Float for $type {
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                (self + other).canonical()
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                (self - other).canonical()
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                (self * other).canonical()
            }

            #[inline(always)]
            fn div(self, other: Self) -> Self {
                (self / other).canonical()
            }

            #[inline(always)]
            fn fma(self, factor: Self, other: Self) -> Self {
                self.mul_add(factor, other).canonical()
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt().canonical()
            }

            #[inline(always)]
            fn reciprocal(self) -> Self {
                (1.0 / self).canonical()
            }

            #[inline(always)]
            fn abs(self) -> Self {
                self.abs()
            }

            #[inline(always)]
            fn neg(self) -> Self {
                -self
            }

            #[inline(always)]
            fn is_nan(self) -> bool {
                self.is_nan()
            }

            #[inline(always)]
            fn is_negative(self) -> bool {
                self.is_sign_negative()
            }

            #[inline(always)]
            fn copysign(self, sign: Self) -> Self {
                self.copysign(sign)
            }

            #[inline(always)]
            fn canonical(self) -> Self {
                // On bits: compilers need not keep those of a NaN that floats are chosen from.
                let bits = self.to_bits();
                let is_nan = bits << 1 > Self::INFINITY.to_bits() << 1;
                Self::from_bits(if is_nan { $nan } else { bits })
            }
        }
    )*};
}

floats!(f32, 0x7FFF_FFFF; f64, 0xFFF8_0000_0000_0000);

pub(super) fn select(opcode: &[&str]) -> Option<Handler> {
    match *opcode {
        ["add", name] | ["add", "rn", name] => for_float!(name, add),
        ["sub", name] | ["sub", "rn", name] => for_float!(name, sub),
        ["mul", name] | ["mul", "rn", name] => for_float!(name, mul),
        ["div", "rn", name] => for_float!(name, div),
        ["div", "approx" | "full", "f32"] => Some(div::<f32>),
        ["fma", "rn", name] => for_float!(name, fma),
        ["mad", name] | ["mad", "rn", name] => for_float!(name, fma),
        ["sqrt", "rn", name] => for_float!(name, sqrt),
        ["sqrt", "approx", "f32"] => Some(sqrt::<f32>),
        ["rcp", "rn", name] => for_float!(name, reciprocal),
        ["rcp", "approx", "f32"] => Some(reciprocal::<f32>),
        ["abs", name] => for_float!(name, abs),
        ["neg", name] => for_float!(name, neg),
        ["min", name] => for_float!(name, min),
        ["max", name] => for_float!(name, max),
        ["min", "NaN", "f32"] => Some(min_or_nan),
        ["max", "NaN", "f32"] => Some(max_or_nan),
        ["copysign", name] => for_float!(name, copysign),
        _ => select_approximate(opcode),
    }
}

/// Approximations. Those that flush subnormal numbers are what `expf` and its like consist of.
fn select_approximate(opcode: &[&str]) -> Option<Handler> {
    Some(match *opcode {
        ["ex2", "approx", "f32"] => exp2::<false>,
        ["ex2", "approx", "ftz", "f32"] => exp2::<true>,
        ["lg2", "approx", "f32"] => log2::<false>,
        ["lg2", "approx", "ftz", "f32"] => log2::<true>,
        ["sin", "approx", "f32"] => sin,
        ["cos", "approx", "f32"] => cos,
        ["rsqrt", "approx", "f32"] => rsqrt::<f32>,
        ["rsqrt", "approx", "f64"] => rsqrt::<f64>,
        ["rcp", "approx", "ftz", "f32"] => reciprocal_flushed,
        ["sqrt", "approx", "ftz", "f32"] => sqrt_flushed,
        _ => return None,
    })
}

fn add<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::add)
}

fn sub<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::sub)
}

fn mul<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::mul)
}

fn div<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::div)
}

fn fma<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, T::fma)
}

fn sqrt<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, T::sqrt)
}

fn reciprocal<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, T::reciprocal)
}

fn rsqrt<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: T| a.sqrt().reciprocal())
}

fn abs<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, T::abs)
}

fn neg<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, T::neg)
}

fn copysign<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    // The first source has the sign, the second the magnitude.
    binary(thread, instruction, |sign: T, magnitude: T| magnitude.copysign(sign))
}

/// The lesser number: −0 < +0, and NaN loses against a number.
pub(super) fn lesser<T: Float>(a: T, b: T) -> T {
    if a.is_nan() {
        return b.canonical();
    }
    let a_is_less = a < b || a == b && a.is_negative();
    if b.is_nan() || a_is_less { a } else { b }
}

/// The greater number: −0 < +0, and NaN loses against a number.
pub(super) fn greater<T: Float>(a: T, b: T) -> T {
    if a.is_nan() {
        return b.canonical();
    }
    let a_is_greater = a > b || a == b && b.is_negative();
    if b.is_nan() || a_is_greater { a } else { b }
}

fn min<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, lesser::<T>)
}

fn max<T: Float>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, greater::<T>)
}

fn min_or_nan(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: f32, b: f32| {
        if a.is_nan() || b.is_nan() { f32::NAN.canonical() } else { lesser(a, b) }
    })
}

fn max_or_nan(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: f32, b: f32| {
        if a.is_nan() || b.is_nan() { f32::NAN.canonical() } else { greater(a, b) }
    })
}

/// Zero of the same sign instead of a subnormal number.
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0.0_f32.copysign(value) } else { value }
}

fn exp2<const FLUSHES: bool>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| {
        let result = a.exp2().canonical();
        if FLUSHES { flushed(result) } else { result }
    })
}

fn log2<const FLUSHES: bool>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| {
        let a = if FLUSHES { flushed(a) } else { a };
        a.log2().canonical()
    })
}

fn sin(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| a.sin().canonical())
}

fn cos(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| a.cos().canonical())
}

fn reciprocal_flushed(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| flushed(flushed(a).reciprocal()))
}

fn sqrt_flushed(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| Float::sqrt(flushed(a)))
}
