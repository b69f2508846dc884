//! The instructions: how each family is decoded, and what it does.
//!
//! A family has a `select` function that finds the handler of an opcode, split at its dots, where
//! operands have the usual form: a destination and up to three sources. Families with operands of
//! another form have a `decode` function. Modifiers that a family does not know make it refuse the
//! opcode.

mod atomics;
mod bits;
mod compare;
mod control;
mod convert;
mod floats;
mod halves;
mod integers;
mod meeting;
mod memory;
mod moves;
mod multimem;

use crate::machine::{Flow, Handler, Instruction, Scalar, Thread};
use crate::ptx::{Decoder, Operand, Refusal};

pub(crate) use bits::not_predicate;
pub(crate) use control::{branch_if, branch_unless, decode_branch, leave};
pub(crate) use meeting::{complete_barrier, complete_warp};
pub(crate) use moves::{add_offset, clock};

/// Turns an instruction into code.
///
/// # Errors
///
/// An opcode or a modifier that is unknown, or operands that do not fit.
pub(crate) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<(), Refusal> {
    let decoded = match opcode[0] {
        "ld" | "ldu" => memory::decode_load(decoder, opcode, operands),
        "st" => memory::decode_store(decoder, opcode, operands),
        "prefetch" | "prefetchu" | "membar" | "fence" | "discard" | "applypriority" => {
            memory::decode_fence(decoder, opcode)
        }
        "multimem" => multimem::decode(decoder, opcode, operands),
        "atom" | "red" => atomics::decode(decoder, opcode, operands),
        "mov" | "cvta" | "isspacep" => moves::decode(decoder, opcode, operands),
        "setp" | "set" => compare::decode(decoder, opcode, operands),
        "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "nanosleep" | "brkpt" => {
            control::decode(decoder, opcode, operands)
        }
        "bar" | "barrier" | "shfl" | "vote" | "activemask" | "match" | "redux" => {
            meeting::decode(decoder, opcode, operands)
        }
        _ => match select(opcode) {
            Some(handler) => plain(decoder, handler, operands).map(Some),
            None => Ok(None),
        },
    };
    match decoded? {
        Some(()) => Ok(()),
        None => decoder.refuse(format!("unknown instruction {}", opcode.join("."))),
    }
}

fn select(opcode: &[&str]) -> Option<Handler> {
    integers::select(opcode)
        .or_else(|| floats::select(opcode))
        .or_else(|| bits::select(opcode))
        .or_else(|| halves::select(opcode))
        .or_else(|| convert::select(opcode))
        .or_else(|| compare::select(opcode))
}

/// Emits an instruction with a destination and up to three sources.
fn plain<'t>(
    decoder: &mut Decoder<'t, '_>,
    handler: Handler,
    operands: &[Operand<'t>],
) -> Result<(), Refusal> {
    let [destination, sources @ ..] = operands else { return decoder.refuse("no operands") };
    // lop3 has a fourth source, a table, which is an immediate.
    let (sources, table) = match sources {
        [first @ .., table] if first.len() == 3 => (first, Some(table)),
        all => (all, None),
    };
    if sources.len() > 3 {
        return decoder.refuse("too many operands");
    }
    let mut slots = [0; 3];
    for (slot, source) in slots.iter_mut().zip(sources) {
        *slot = decoder.source(source)?;
    }
    let extra = match table {
        Some(table) => i64::from(decoder.source(table)?),
        None => 0,
    };
    let d = decoder.destination(destination)?;
    decoder.emit(handler, d, slots, extra);
    Ok(())
}

#[inline(always)]
fn unary<T: Scalar, R: Scalar>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
    function: impl Fn(T) -> R,
) -> Flow {
    let value = function(thread.read(instruction.a));
    thread.write(instruction.d, value);
    Flow::Next
}

#[inline(always)]
fn binary<A: Scalar, B: Scalar, R: Scalar>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
    function: impl Fn(A, B) -> R,
) -> Flow {
    let value = function(thread.read(instruction.a), thread.read(instruction.b));
    thread.write(instruction.d, value);
    Flow::Next
}

#[inline(always)]
fn ternary<A: Scalar, B: Scalar, C: Scalar, R: Scalar>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
    function: impl Fn(A, B, C) -> R,
) -> Flow {
    let (a, b) = (thread.read(instruction.a), thread.read(instruction.b));
    let value = function(a, b, thread.read(instruction.c));
    thread.write(instruction.d, value);
    Flow::Next
}

/// The handler `$function` for the integer type that `$name` names.
macro_rules! for_integer {
    ($name:expr, $function:ident) => {
        Some(match $name {
            "u16" => $function::<u16> as $crate::machine::Handler,
            "u32" => $function::<u32>,
            "u64" => $function::<u64>,
            "s16" => $function::<i16>,
            "s32" => $function::<i32>,
            "s64" => $function::<i64>,
            _ => return None,
        })
    };
}

/// The handler `$function` for the untyped bits that `$name` names.
macro_rules! for_bits {
    ($name:expr, $function:ident) => {
        Some(match $name {
            "b16" => $function::<u16> as $crate::machine::Handler,
            "b32" => $function::<u32>,
            "b64" => $function::<u64>,
            _ => return None,
        })
    };
}

/// The handler `$function` for the float type that `$name` names.
macro_rules! for_float {
    ($name:expr, $function:ident) => {
        Some(match $name {
            "f32" => $function::<f32> as $crate::machine::Handler,
            "f64" => $function::<f64>,
            _ => return None,
        })
    };
}

use {for_bits, for_float, for_integer};
