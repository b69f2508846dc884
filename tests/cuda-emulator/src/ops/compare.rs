//! Comparisons, and choices by a predicate.

use std::cmp::Ordering;

use half::{bf16, f16};

use super::bits::not_predicate;
use super::halves::Half;
use super::ternary;
use crate::machine::{Flow, Handler, Instruction, Scalar, Thread, Word};
use crate::ptx::{Decoder, Operand, Refusal};

/// What is asked of two values. The numbers are bits: less, equal, greater, unordered.
mod relation {
    pub(super) const LESS: u8 = 1;
    pub(super) const EQUAL: u8 = 2;
    pub(super) const GREATER: u8 = 4;
    pub(super) const UNORDERED: u8 = 8;
}

/// The orders that make a comparison true, and whether it treats operands as unsigned.
fn orders(name: &str, is_float: bool) -> Option<(u8, bool)> {
    use relation::{EQUAL, GREATER, LESS, UNORDERED};
    let unsigned = matches!(name, "lo" | "ls" | "hi" | "hs");
    let orders = match name {
        "eq" => EQUAL,
        "ne" => LESS | GREATER,
        "lt" | "lo" => LESS,
        "le" | "ls" => LESS | EQUAL,
        "gt" | "hi" => GREATER,
        "ge" | "hs" => GREATER | EQUAL,
        _ if !is_float => return None,
        "equ" => EQUAL | UNORDERED,
        "neu" => LESS | GREATER | UNORDERED,
        "ltu" => LESS | UNORDERED,
        "leu" => LESS | EQUAL | UNORDERED,
        "gtu" => GREATER | UNORDERED,
        "geu" => GREATER | EQUAL | UNORDERED,
        "num" => LESS | EQUAL | GREATER,
        "nan" => UNORDERED,
        _ => return None,
    };
    (!is_float || !unsigned).then_some((orders, unsigned))
}

/// `setp.lt.and.f32 p|q, a, b, c` and `set.lt.u32.f32 d, a, b`.
pub(super) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let (comparison, joins, name, result) = match *opcode {
        ["setp", comparison, name] => (comparison, None, name, None),
        ["setp", comparison, joins, name] => (comparison, Some(joins), name, None),
        ["set", comparison, result, name] => (comparison, None, name, Some(result)),
        _ => return Ok(None),
    };
    let is_float = matches!(name, "f16" | "bf16" | "f32" | "f64");
    let Some((orders, unsigned)) = orders(comparison, is_float) else { return Ok(None) };
    let Some(handler) = comparing(name, unsigned) else { return Ok(None) };
    let [destination, a, b, more @ ..] = operands else {
        return decoder.refuse("a comparison needs two operands");
    };
    let (a, b) = (decoder.source(a)?, decoder.source(b)?);
    let extra = i64::from(orders);
    if let Some(result) = result {
        let Some(set) = setting(result) else { return Ok(None) };
        let (predicate, d) = (decoder.temporary(), decoder.destination(destination)?);
        decoder.emit(handler, predicate, [a, b, 0], extra);
        decoder.emit(set, d, [predicate, 0, 0], 0);
        return Ok(Some(()));
    }
    let (first, second) = match destination {
        Operand::Both(first, second) => (Operand::Name(first), Some(Operand::Name(second))),
        single => (single.clone(), None),
    };
    let first = decoder.destination(&first)?;
    if joins.is_none() && second.is_none() {
        decoder.emit(handler, first, [a, b, 0], extra);
        return Ok(Some(()));
    }
    let compared = decoder.temporary();
    decoder.emit(handler, compared, [a, b, 0], extra);
    let inverse = decoder.temporary();
    decoder.emit(not_predicate, inverse, [compared, 0, 0], 0);
    let second = second.map(|second| decoder.destination(&second)).transpose()?;
    let joining = match (joins, more) {
        (None, _) => None,
        (Some(joins), [third]) => {
            let Some(joined) = super::bits::select(&[joins, "pred"]) else { return Ok(None) };
            Some((joined, decoder.source(third)?))
        }
        _ => return decoder.refuse("a third operand is missing"),
    };
    for (d, value) in std::iter::once((first, compared)).chain(second.map(|d| (d, inverse))) {
        match joining {
            Some((joined, third)) => decoder.emit(joined, d, [value, third, 0], 0),
            None => decoder.emit(
                super::bits::select(&["or", "pred"]).unwrap_or(not_predicate),
                d,
                [value, value, 0],
                0,
            ),
        }
    }
    Ok(Some(()))
}

fn comparing(name: &str, unsigned: bool) -> Option<Handler> {
    Some(match (name, unsigned) {
        ("b16" | "u16", _) | ("s16", true) => compare::<u16>,
        ("b32" | "u32", _) | ("s32", true) => compare::<u32>,
        ("b64" | "u64", _) | ("s64", true) => compare::<u64>,
        ("s16", false) => compare::<i16>,
        ("s32", false) => compare::<i32>,
        ("s64", false) => compare::<i64>,
        ("f32", _) => compare::<f32>,
        ("f64", _) => compare::<f64>,
        ("f16", _) => compare_halves::<f16>,
        ("bf16", _) => compare_halves::<bf16>,
        _ => return None,
    })
}

fn setting(result: &str) -> Option<Handler> {
    Some(match result {
        "u32" | "s32" => set_bits,
        "f32" => set_float,
        _ => return None,
    })
}

fn holds(orders: i64, order: Option<Ordering>) -> bool {
    let bit = match order {
        Some(Ordering::Less) => relation::LESS,
        Some(Ordering::Equal) => relation::EQUAL,
        Some(Ordering::Greater) => relation::GREATER,
        None => relation::UNORDERED,
    };
    orders & i64::from(bit) != 0
}

fn compare<T: Scalar>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let (a, b): (T, T) = (thread.read(instruction.a), thread.read(instruction.b));
    let value = holds(instruction.extra, a.partial_cmp(&b));
    thread.write(instruction.d, value);
    Flow::Next
}

fn compare_halves<H: Half>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let (a, b) = (thread.read(instruction.a), thread.read(instruction.b));
    let (a, b) = (H::from_bits(a).widen(), H::from_bits(b).widen());
    let value = holds(instruction.extra, a.partial_cmp(&b));
    thread.write(instruction.d, value);
    Flow::Next
}

fn set_bits(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let holds: bool = thread.read(instruction.a);
    thread.write(instruction.d, if holds { u32::MAX } else { 0 });
    Flow::Next
}

fn set_float(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let holds: bool = thread.read(instruction.a);
    thread.write(instruction.d, if holds { 1.0_f32 } else { 0.0 });
    Flow::Next
}

pub(super) fn select(opcode: &[&str]) -> Option<Handler> {
    match *opcode {
        ["selp", name] => Some(match name {
            "b16" | "u16" | "s16" | "f16" => choose::<u16>,
            "b32" | "u32" | "s32" | "f32" => choose::<u32>,
            "b64" | "u64" | "s64" | "f64" => choose::<u64>,
            _ => return None,
        }),
        ["slct", name, "s32"] => Some(match name {
            "b16" | "u16" | "s16" => choose_by_sign::<u16>,
            "b32" | "u32" | "s32" | "f32" => choose_by_sign::<u32>,
            "b64" | "u64" | "s64" | "f64" => choose_by_sign::<u64>,
            _ => return None,
        }),
        ["testp", kind, "f32"] => Some(match kind {
            "finite" => test_f32::<0>,
            "infinite" => test_f32::<1>,
            "notanumber" => test_f32::<2>,
            "number" => test_f32::<3>,
            "normal" => test_f32::<4>,
            "subnormal" => test_f32::<5>,
            _ => return None,
        }),
        ["testp", kind, "f64"] => Some(match kind {
            "finite" => test_f64::<0>,
            "infinite" => test_f64::<1>,
            "notanumber" => test_f64::<2>,
            "number" => test_f64::<3>,
            "normal" => test_f64::<4>,
            "subnormal" => test_f64::<5>,
            _ => return None,
        }),
        _ => None,
    }
}

fn choose<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: T, b: T, first: bool| if first { a } else { b })
}

fn choose_by_sign<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: T, b: T, sign: i32| if sign >= 0 { a } else { b })
}

fn test_f32<const KIND: u8>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    super::unary(thread, instruction, |a: f32| match KIND {
        0 => a.is_finite(),
        1 => a.is_infinite(),
        2 => a.is_nan(),
        3 => !a.is_nan(),
        4 => a.is_normal(),
        _ => a.is_subnormal(),
    })
}

fn test_f64<const KIND: u8>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    super::unary(thread, instruction, |a: f64| match KIND {
        0 => a.is_finite(),
        1 => a.is_infinite(),
        2 => a.is_nan(),
        3 => !a.is_nan(),
        4 => a.is_normal(),
        _ => a.is_subnormal(),
    })
}
