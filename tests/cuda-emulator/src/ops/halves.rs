//! Arithmetic of `f16` and `bf16`, alone and in pairs.
//!
//! Each operation is computed in a wider format and rounded once more. That gives the right result:
//! `f32` has more than twice the precision of both types, and `f64` has enough for a fused product.

use half::{bf16, f16};

use super::floats::{greater, lesser};
use super::{binary, ternary, unary};
use crate::machine::{Flow, Handler, Instruction, Scalar, Thread};

/// A 16-bit float.
pub(super) trait Half: Copy {
    fn from_bits(bits: u16) -> Self;
    /// The bits, of which NaN has only one pattern: that of NVIDIA's hardware.
    fn bits(self) -> u16;
    fn widen(self) -> f32;
    fn round(value: f32) -> Self;
    fn round_wide(value: f64) -> Self;
}

macro_rules! halves {
    ($($type:ident)*) => {$(
        impl Half for $type {
            fn from_bits(bits: u16) -> Self {
                Self::from_bits(bits)
            }

            fn bits(self) -> u16 {
                if self.is_nan() { 0x7FFF } else { self.to_bits() }
            }

            fn widen(self) -> f32 {
                self.to_f32()
            }

            fn round(value: f32) -> Self {
                Self::from_f32(value)
            }

            fn round_wide(value: f64) -> Self {
                Self::from_f64(value)
            }
        }
    )*};
}

halves!(f16 bf16);

/// The bits of one float.
type Bits = u16;

/// The floats of a register: one or two.
pub(super) trait Packed: Scalar {
    fn map(self, function: impl Fn(Bits) -> Bits) -> Self;
    fn map2(self, b: Self, function: impl Fn(Bits, Bits) -> Bits) -> Self;
    fn map3(self, b: Self, c: Self, function: impl Fn(Bits, Bits, Bits) -> Bits) -> Self;
}

impl Packed for u16 {
    fn map(self, function: impl Fn(Self) -> Self) -> Self {
        function(self)
    }

    fn map2(self, b: Self, function: impl Fn(Self, Self) -> Self) -> Self {
        function(self, b)
    }

    fn map3(self, b: Self, c: Self, function: impl Fn(Self, Self, Self) -> Self) -> Self {
        function(self, b, c)
    }
}

impl Packed for u32 {
    fn map(self, function: impl Fn(Bits) -> Bits) -> Self {
        join(function(low(self)), function(high(self)))
    }

    fn map2(self, b: Self, function: impl Fn(Bits, Bits) -> Bits) -> Self {
        join(function(low(self), low(b)), function(high(self), high(b)))
    }

    fn map3(self, b: Self, c: Self, function: impl Fn(Bits, Bits, Bits) -> Bits) -> Self {
        join(function(low(self), low(b), low(c)), function(high(self), high(b), high(c)))
    }
}

pub(super) fn low(pair: u32) -> u16 {
    u16::from_register(u64::from(pair))
}

pub(super) fn high(pair: u32) -> u16 {
    u16::from_register(u64::from(pair >> 16))
}

pub(super) fn join(low: u16, high: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

/// The handler for the 16-bit type, or pair of them, that `$name` names.
macro_rules! for_half {
    ($name:expr, $function:ident) => {
        Some(match $name {
            "f16" => $function::<f16, u16> as Handler,
            "f16x2" => $function::<f16, u32>,
            "bf16" => $function::<bf16, u16>,
            "bf16x2" => $function::<bf16, u32>,
            _ => return None,
        })
    };
}

pub(super) fn select(opcode: &[&str]) -> Option<Handler> {
    match *opcode {
        ["add", name] | ["add", "rn", name] => for_half!(name, add),
        ["sub", name] | ["sub", "rn", name] => for_half!(name, sub),
        ["mul", name] | ["mul", "rn", name] => for_half!(name, mul),
        ["fma", "rn", name] => for_half!(name, fma),
        ["min", name] => for_half!(name, min),
        ["max", name] => for_half!(name, max),
        ["min", "NaN", name] => for_half!(name, min_or_nan),
        ["max", "NaN", name] => for_half!(name, max_or_nan),
        ["neg", name] => for_half!(name, neg),
        ["abs", name] => for_half!(name, abs),
        _ => None,
    }
}

fn in_f32<H: Half>(a: u16, b: u16, function: impl Fn(f32, f32) -> f32) -> u16 {
    H::round(function(H::from_bits(a).widen(), H::from_bits(b).widen())).bits()
}

fn add<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: P, b: P| a.map2(b, |a, b| in_f32::<H>(a, b, |a, b| a + b)))
}

fn sub<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: P, b: P| a.map2(b, |a, b| in_f32::<H>(a, b, |a, b| a - b)))
}

fn mul<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: P, b: P| a.map2(b, |a, b| in_f32::<H>(a, b, |a, b| a * b)))
}

fn fma<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let wide = |bits: u16| f64::from(H::from_bits(bits).widen());
    // The product of two 16-bit floats is exact in f64.
    let fused = |a, b, c| H::round_wide(wide(a) * wide(b) + wide(c)).bits();
    ternary(thread, instruction, |a: P, b: P, c: P| a.map3(b, c, fused))
}

fn min<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: P, b: P| a.map2(b, |a, b| in_f32::<H>(a, b, lesser)))
}

fn max<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: P, b: P| a.map2(b, |a, b| in_f32::<H>(a, b, greater)))
}

fn nan_or(a: f32, b: f32, function: impl Fn(f32, f32) -> f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { function(a, b) }
}

fn min_or_nan<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let function = |a, b| in_f32::<H>(a, b, |a, b| nan_or(a, b, lesser));
    binary(thread, instruction, |a: P, b: P| a.map2(b, function))
}

fn max_or_nan<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let function = |a, b| in_f32::<H>(a, b, |a, b| nan_or(a, b, greater));
    binary(thread, instruction, |a: P, b: P| a.map2(b, function))
}

fn neg<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: P| a.map(|bits| bits ^ 0x8000))
}

fn abs<H: Half, P: Packed>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: P| a.map(|bits| bits & 0x7FFF))
}
