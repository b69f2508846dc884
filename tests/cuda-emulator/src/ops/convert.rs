//! Conversions between types.

use half::{bf16, f16};

use super::floats::Float;
use super::halves::{Half, join};
use super::integers::Integer;
use super::{binary, unary};
use crate::machine::{Flow, Handler, Instruction, Thread};

pub(super) fn select(opcode: &[&str]) -> Option<Handler> {
    match *opcode {
        ["cvt", to, from] => select_exact(to, from),
        ["cvt", "sat", "f32", "f32"] => Some(saturate),
        ["cvt", "sat", to, from] => select_saturating(to, from),
        ["cvt", rounding @ ("rni" | "rzi" | "rmi" | "rpi"), to, from] => {
            select_rounded(rounding, to, from)
        }
        ["cvt", "rn", to @ ("f16x2" | "bf16x2"), "f32"] => {
            Some(if to == "f16x2" { pack::<f16> } else { pack::<bf16> })
        }
        ["cvt", "rn", to @ ("f16" | "bf16"), from] => match to {
            "f16" => select_half::<f16>(from),
            _ => select_half::<bf16>(from),
        },
        ["cvt", "rn", "f32", "f64"] => Some(narrow),
        ["cvt", "rn", to @ ("f32" | "f64"), from] => select_from_integer(to, from),
        ["cvt", "rz", "f32", "f64"] => Some(narrow_toward_zero),
        ["cvt", "rz", "f32", "s64"] => Some(truncate_to_f32::<i64>),
        ["cvt", "rz", "f32", "u64"] => Some(truncate_to_f32::<u64>),
        ["cvt", "rz", "f32", "s32"] => Some(truncate_to_f32::<i32>),
        ["cvt", "rz", "f32", "u32"] => Some(truncate_to_f32::<u32>),
        _ => None,
    }
}

/// The handler `$function::<S, …>` for the integer type that `$name` names.
macro_rules! for_source {
    ($name:expr, $function:ident $(, $more:ty)*) => {
        Some(match $name {
            "u8" | "b8" => $function::<u8 $(, $more)*> as Handler,
            "u16" | "b16" => $function::<u16 $(, $more)*>,
            "u32" | "b32" => $function::<u32 $(, $more)*>,
            "u64" | "b64" => $function::<u64 $(, $more)*>,
            "s8" => $function::<i8 $(, $more)*>,
            "s16" => $function::<i16 $(, $more)*>,
            "s32" => $function::<i32 $(, $more)*>,
            "s64" => $function::<i64 $(, $more)*>,
            _ => return None,
        })
    };
}

/// `$select::<D>(…)` for the integer type that `$name` names.
macro_rules! for_destination {
    ($name:expr, $select:ident, $($argument:expr),*) => {
        match $name {
            "u8" => $select::<u8>($($argument),*),
            "u16" => $select::<u16>($($argument),*),
            "u32" => $select::<u32>($($argument),*),
            "u64" => $select::<u64>($($argument),*),
            "s8" => $select::<i8>($($argument),*),
            "s16" => $select::<i16>($($argument),*),
            "s32" => $select::<i32>($($argument),*),
            "s64" => $select::<i64>($($argument),*),
            _ => None,
        }
    };
}

/// Conversions that need no rounding.
fn select_exact(to: &str, from: &str) -> Option<Handler> {
    Some(match (to, from) {
        ("f32", "f16") => widen::<f16>,
        ("f32", "bf16") => widen::<bf16>,
        ("f64", "f16") => widen_to_f64::<f16>,
        ("f64", "bf16") => widen_to_f64::<bf16>,
        ("f64", "f32") => f32_to_f64,
        _ => return for_destination!(to, select_resize, from),
    })
}

fn select_resize<D: Integer>(from: &str) -> Option<Handler> {
    for_source!(from, resize, D)
}

fn select_saturating(to: &str, from: &str) -> Option<Handler> {
    for_destination!(to, select_clamp, from)
}

fn select_clamp<D: Integer>(from: &str) -> Option<Handler> {
    for_source!(from, clamp, D)
}

fn select_rounded(rounding: &str, to: &str, from: &str) -> Option<Handler> {
    match (to, from) {
        ("f32", "f32") => Some(match rounding {
            "rni" => round_f32::<0>,
            "rzi" => round_f32::<1>,
            "rmi" => round_f32::<2>,
            _ => round_f32::<3>,
        }),
        ("f64", "f64") => Some(match rounding {
            "rni" => round_f64::<0>,
            "rzi" => round_f64::<1>,
            "rmi" => round_f64::<2>,
            _ => round_f64::<3>,
        }),
        _ => for_destination!(to, select_to_integer, rounding, from),
    }
}

fn select_to_integer<D: Integer>(rounding: &str, from: &str) -> Option<Handler> {
    Some(match (rounding, from) {
        ("rni", "f32") => from_f32::<D, 0>,
        ("rzi", "f32") => from_f32::<D, 1>,
        ("rmi", "f32") => from_f32::<D, 2>,
        ("rpi", "f32") => from_f32::<D, 3>,
        ("rni", "f64") => from_f64::<D, 0>,
        ("rzi", "f64") => from_f64::<D, 1>,
        ("rmi", "f64") => from_f64::<D, 2>,
        ("rpi", "f64") => from_f64::<D, 3>,
        ("rni", "f16") => from_half::<f16, D, 0>,
        ("rzi", "f16") => from_half::<f16, D, 1>,
        ("rni", "bf16") => from_half::<bf16, D, 0>,
        ("rzi", "bf16") => from_half::<bf16, D, 1>,
        _ => return None,
    })
}

fn select_from_integer(to: &str, from: &str) -> Option<Handler> {
    match to {
        "f32" => for_source!(from, to_f32),
        _ => for_source!(from, to_f64),
    }
}

fn select_half<H: Half>(from: &str) -> Option<Handler> {
    Some(match from {
        "f32" => f32_to_half::<H>,
        "f64" => f64_to_half::<H>,
        "u8" => integer_to_half::<u8, H>,
        "u16" => integer_to_half::<u16, H>,
        "u32" => integer_to_half::<u32, H>,
        "s8" => integer_to_half::<i8, H>,
        "s16" => integer_to_half::<i16, H>,
        "s32" => integer_to_half::<i32, H>,
        _ => return None,
    })
}

fn resize<S: Integer, D: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    // Signed sources fill the register with their sign, and the destination cuts it off.
    unary(thread, instruction, |a: S| D::from_register(a.into_register()))
}

fn clamp<S: Integer, D: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: S| D::saturated(a.wide()))
}

/// Between 0 and 1; NaN becomes 0.
fn saturate(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| if a.is_nan() { 0.0 } else { a.clamp(0.0, 1.0) })
}

fn rounded<const HOW: u8>(value: f64) -> f64 {
    match HOW {
        0 => value.round_ties_even(),
        1 => value.trunc(),
        2 => value.floor(),
        _ => value.ceil(),
    }
}

fn round_f32<const HOW: u8>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| match HOW {
        0 => a.round_ties_even(),
        1 => a.trunc(),
        2 => a.floor(),
        _ => a.ceil(),
    })
}

fn round_f64<const HOW: u8>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, rounded::<HOW>)
}

/// The nearest value of the type; NaN becomes 0. Whole numbers below 2^127 are exact in `i128`.
fn to_integer<D: Integer>(whole: f64) -> D {
    D::saturated(whole as i128)
}

fn from_f32<D: Integer, const HOW: u8>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| to_integer::<D>(rounded::<HOW>(f64::from(a))))
}

fn from_f64<D: Integer, const HOW: u8>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f64| to_integer::<D>(rounded::<HOW>(a)))
}

fn from_half<H: Half, D: Integer, const HOW: u8>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    unary(thread, instruction, |a: u16| {
        to_integer::<D>(rounded::<HOW>(f64::from(H::from_bits(a).widen())))
    })
}

fn to_f32<S: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: S| a.wide() as f32)
}

fn to_f64<S: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: S| a.wide() as f64)
}

fn narrow(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f64| (a as f32).canonical())
}

/// The float of the same sign whose magnitude is the next smaller one.
fn toward_zero(value: f32) -> f32 {
    f32::from_bits(value.to_bits() - 1)
}

fn narrow_toward_zero(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f64| {
        let nearest = a as f32;
        let is_beyond = a.is_finite() && f64::from(nearest).abs() > a.abs();
        (if is_beyond { toward_zero(nearest) } else { nearest }).canonical()
    })
}

fn truncate_to_f32<S: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: S| {
        let nearest = a.wide() as f32;
        let is_beyond = (nearest as i128).unsigned_abs() > a.wide().unsigned_abs();
        if is_beyond { toward_zero(nearest) } else { nearest }
    })
}

fn f32_to_f64(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| f64::from(a))
}

fn widen<H: Half>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: u16| H::from_bits(a).widen())
}

fn widen_to_f64<H: Half>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: u16| f64::from(H::from_bits(a).widen()))
}

fn f32_to_half<H: Half>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f32| H::round(a).bits())
}

fn f64_to_half<H: Half>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: f64| H::round_wide(a).bits())
}

fn integer_to_half<S: Integer, H: Half>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    unary(thread, instruction, |a: S| H::round_wide(a.wide() as f64).bits())
}

/// Two floats in one register; the first operand is in the upper half.
fn pack<H: Half>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: f32, b: f32| join(H::round(b).bits(), H::round(a).bits()))
}
