//! Operations on bits.

use super::{binary, for_bits, ternary, unary};
use crate::machine::{Flow, Handler, Instruction, Thread, Word};

pub(super) fn select(opcode: &[&str]) -> Option<Handler> {
    match *opcode {
        ["and", "pred"] => Some(and::<u8>),
        ["or", "pred"] => Some(or::<u8>),
        ["xor", "pred"] => Some(xor::<u8>),
        ["not", "pred"] => Some(not_predicate),
        ["and", name] => for_bits!(name, and),
        ["or", name] => for_bits!(name, or),
        ["xor", name] => for_bits!(name, xor),
        ["not", name] => for_bits!(name, not),
        ["cnot", name] => for_bits!(name, is_zero),
        ["shl", name] => for_bits!(name, shift_left),
        ["popc", "b32"] => Some(count_ones::<u32>),
        ["popc", "b64"] => Some(count_ones::<u64>),
        ["clz", "b32"] => Some(leading_zeros::<u32, 32>),
        ["clz", "b64"] => Some(leading_zeros::<u64, 64>),
        ["brev", "b32"] => Some(reverse::<u32, 32>),
        ["brev", "b64"] => Some(reverse::<u64, 64>),
        ["bfind", ..] => select_find(opcode),
        ["bfe", "u32"] => Some(extract::<32, false>),
        ["bfe", "s32"] => Some(extract::<32, true>),
        ["bfe", "u64"] => Some(extract::<64, false>),
        ["bfe", "s64"] => Some(extract::<64, true>),
        ["bfi", "b32"] => Some(insert::<32>),
        ["bfi", "b64"] => Some(insert::<64>),
        ["prmt", "b32"] => Some(permute),
        ["shf", "l", "wrap", "b32"] => Some(funnel_left::<31>),
        ["shf", "r", "wrap", "b32"] => Some(funnel_right::<31>),
        ["shf", "l", "clamp", "b32"] => Some(funnel_left::<32>),
        ["shf", "r", "clamp", "b32"] => Some(funnel_right::<32>),
        ["lop3", "b32"] => Some(logic),
        _ => None,
    }
}

fn select_find(opcode: &[&str]) -> Option<Handler> {
    Some(match *opcode {
        ["bfind", "u32"] => find_first::<32, false, false>,
        ["bfind", "s32"] => find_first::<32, true, false>,
        ["bfind", "u64"] => find_first::<64, false, false>,
        ["bfind", "s64"] => find_first::<64, true, false>,
        ["bfind", "shiftamt", "u32"] => find_first::<32, false, true>,
        ["bfind", "shiftamt", "s32"] => find_first::<32, true, true>,
        ["bfind", "shiftamt", "u64"] => find_first::<64, false, true>,
        ["bfind", "shiftamt", "s64"] => find_first::<64, true, true>,
        _ => return None,
    })
}

fn and<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: T, b: T| {
        T::from_register(a.into_register() & b.into_register())
    })
}

fn or<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: T, b: T| {
        T::from_register(a.into_register() | b.into_register())
    })
}

fn xor<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: T, b: T| {
        T::from_register(a.into_register() ^ b.into_register())
    })
}

fn not<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: T| T::from_register(!a.into_register()))
}

pub(crate) fn not_predicate(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: bool| !a)
}

fn is_zero<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: T| T::from_register(u64::from(a.into_register() == 0)))
}

fn shift_left<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: T, by: u32| {
        let shifted = a.into_register().checked_shl(by).unwrap_or(0);
        T::from_register(shifted)
    })
}

fn count_ones<T: Word>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: T| a.into_register().count_ones())
}

fn leading_zeros<T: Word, const BITS: u32>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    unary(thread, instruction, |a: T| a.into_register().leading_zeros() - (64 - BITS))
}

fn reverse<T: Word, const BITS: u32>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, |a: T| a.into_register().reverse_bits() >> (64 - BITS))
}

/// The position of the highest bit that is not the sign, or its distance from the top; all bits
/// set if there is none.
fn find_first<const BITS: u32, const SIGNED: bool, const SHIFT: bool>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    unary(thread, instruction, |a: u64| {
        let mask = u64::MAX >> (64 - BITS);
        let is_negative = SIGNED && a >> (BITS - 1) & 1 == 1;
        let bits = (if is_negative { !a } else { a }) & mask;
        match bits.checked_ilog2() {
            None => u32::MAX,
            Some(position) if SHIFT => BITS - 1 - position,
            Some(position) => position,
        }
    })
}

/// A field of bits.
fn extract<const BITS: u32, const SIGNED: bool>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    ternary(thread, instruction, |a: u64, position: u8, length: u8| {
        let (position, length) = (u32::from(position), u32::from(length));
        let a = a & (u64::MAX >> (64 - BITS));
        let sign_at = (position + length).saturating_sub(1).min(BITS - 1);
        let is_negative = SIGNED && length > 0 && a >> sign_at & 1 == 1;
        let field = a.checked_shr(position).unwrap_or(0);
        let mask = low_bits(length);
        let filled = if is_negative { u64::MAX } else { 0 };
        let present = low_bits(BITS.saturating_sub(position)) & mask;
        // Bits beyond the number and beyond the field are the sign.
        (field & present) | (filled & !present)
    })
}

fn low_bits(count: u32) -> u64 {
    u64::MAX.checked_shr(64_u32.saturating_sub(count)).unwrap_or(0)
}

/// Bits of one number in a field of another.
fn insert<const BITS: u32>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let length: u8 = match u32::try_from(instruction.extra) {
        Ok(slot) => thread.read(slot),
        Err(_) => 0,
    };
    ternary(thread, instruction, |a: u64, b: u64, position: u8| {
        let position = u32::from(position);
        let mask = low_bits(u32::from(length)).checked_shl(position).unwrap_or(0);
        let field = a.checked_shl(position).unwrap_or(0);
        ((field & mask) | (b & !mask)) & (u64::MAX >> (64 - BITS))
    })
}

/// Any four bytes of eight, or their signs.
fn permute(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: u32, b: u32, selector: u32| {
        let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
        let mut result = [0; 4];
        for (index, byte) in result.iter_mut().enumerate() {
            let choice = selector >> (4 * index) & 15;
            let chosen = bytes[(choice & 7) as usize];
            *byte = match choice & 8 {
                0 => chosen,
                _ if chosen & 0x80 != 0 => 0xFF,
                _ => 0,
            };
        }
        u32::from_le_bytes(result)
    })
}

/// The upper half of two words shifted left. The shift is taken modulo 32, or is 32 at most.
fn funnel_left<const LIMIT: u32>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |low: u32, high: u32, by: u32| {
        let by = if LIMIT == 31 { by & 31 } else { by.min(32) };
        ((u64::from(high) << 32 | u64::from(low)) << by >> 32) as u32
    })
}

/// The lower half of two words shifted right.
fn funnel_right<const LIMIT: u32>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |low: u32, high: u32, by: u32| {
        let by = if LIMIT == 31 { by & 31 } else { by.min(32) };
        ((u64::from(high) << 32 | u64::from(low)) >> by) as u32
    })
}

/// Any function of three bits, given as a table of eight.
fn logic(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let table: u8 = match u32::try_from(instruction.extra) {
        Ok(slot) => thread.read(slot),
        Err(_) => 0,
    };
    ternary(thread, instruction, |a: u32, b: u32, c: u32| {
        let mut result = 0;
        for row in 0..8 {
            if table >> row & 1 == 1 {
                let a = if row & 4 == 0 { !a } else { a };
                let b = if row & 2 == 0 { !b } else { b };
                let c = if row & 1 == 0 { !c } else { c };
                result |= a & b & c;
            }
        }
        result
    })
}
