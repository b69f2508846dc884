//! Atomic read-modify-write operations.

use super::memory::{Generic, Global, Local, Memory, Param, Shared, access, effective, for_space};
use crate::machine::{Flow, Handler, Instruction, Scalar, Thread, Word};
use crate::ptx::{Decoder, Operand, Refusal, Space};

/// `atom.global.add.u32 d, [a], b` and `red.global.add.u32 [a], b`.
pub(super) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let [kind, modifiers @ .., name] = opcode else { return Ok(None) };
    let is_operation = |modifier: &&str| {
        matches!(
            *modifier,
            "add" | "min" | "max" | "exch" | "cas" | "and" | "or" | "xor" | "inc" | "dec"
        )
    };
    let operation = modifiers.iter().copied().find(is_operation);
    let others: Vec<&str> = modifiers.iter().copied().filter(|m| !is_operation(m)).collect();
    let (Some(operation), Some(access)) = (operation, access(&others)) else { return Ok(None) };
    let (destination, rest) = match (*kind, operands) {
        ("atom", [destination, rest @ ..]) => (Some(destination), rest),
        _ => (None, operands),
    };
    let [place, sources @ ..] = rest else { return decoder.refuse("an address is missing") };
    let wanted = if operation == "cas" { 2 } else { 1 };
    if sources.len() != wanted {
        return decoder.refuse(format!("{operation} needs {wanted} values"));
    }
    let address = decoder.address(place)?;
    let space = effective(access.space, address.space);
    let Some(handler) = select(space, operation, name) else { return Ok(None) };
    let mut slots = [address.base, 0, 0];
    for (slot, source) in slots[1..].iter_mut().zip(sources) {
        *slot = decoder.source(source)?;
    }
    let d = match destination {
        Some(destination) => decoder.destination(destination)?,
        None => decoder.temporary(),
    };
    decoder.emit(handler, d, slots, address.offset);
    Ok(Some(()))
}

/// What becomes of a place that holds `old`.
trait Update<T> {
    fn update(old: T, b: T, c: T) -> T;
}

macro_rules! updates {
    ($($name:ident, [$($type:ty)*], |$old:ident, $b:ident, $c:ident| $value:expr;)*) => {$(
        struct $name;
        $(impl Update<$type> for $name {
            #[inline(always)]
            fn update($old: $type, $b: $type, $c: $type) -> $type {
                $value
            }
        })*
    )*};
}

updates! {
    Add, [u32 u64], |old, b, _c| old.wrapping_add(b);
    AddFloat, [f32 f64], |old, b, _c| super::floats::Float::add(old, b);
    Min, [u32 u64 i32 i64], |old, b, _c| old.min(b);
    Max, [u32 u64 i32 i64], |old, b, _c| old.max(b);
    And, [u32 u64], |old, b, _c| old & b;
    Or, [u32 u64], |old, b, _c| old | b;
    Xor, [u32 u64], |old, b, _c| old ^ b;
    Exchange, [u32 u64], |_old, b, _c| b;
    Compare, [u16 u32 u64], |old, b, c| if old == b { c } else { old };
    Increment, [u32], |old, b, _c| if old >= b { 0 } else { old + 1 };
    Decrement, [u32], |old, b, _c| if old == 0 || old > b { b } else { old - 1 };
}

fn select(space: Space, operation: &str, name: &str) -> Option<Handler> {
    Some(match (operation, name) {
        ("add", "u32" | "s32") => for_space!(space, update, u32, u32, Add),
        ("add", "u64" | "s64") => for_space!(space, update, u64, u64, Add),
        ("add", "f32") => for_space!(space, update, u32, f32, AddFloat),
        ("add", "f64") => for_space!(space, update, u64, f64, AddFloat),
        ("min", "u32") => for_space!(space, update, u32, u32, Min),
        ("min", "s32") => for_space!(space, update, u32, i32, Min),
        ("min", "u64") => for_space!(space, update, u64, u64, Min),
        ("min", "s64") => for_space!(space, update, u64, i64, Min),
        ("max", "u32") => for_space!(space, update, u32, u32, Max),
        ("max", "s32") => for_space!(space, update, u32, i32, Max),
        ("max", "u64") => for_space!(space, update, u64, u64, Max),
        ("max", "s64") => for_space!(space, update, u64, i64, Max),
        ("and", "b32") => for_space!(space, update, u32, u32, And),
        ("and", "b64") => for_space!(space, update, u64, u64, And),
        ("or", "b32") => for_space!(space, update, u32, u32, Or),
        ("or", "b64") => for_space!(space, update, u64, u64, Or),
        ("xor", "b32") => for_space!(space, update, u32, u32, Xor),
        ("xor", "b64") => for_space!(space, update, u64, u64, Xor),
        ("exch", "b32") => for_space!(space, update, u32, u32, Exchange),
        ("exch", "b64") => for_space!(space, update, u64, u64, Exchange),
        ("cas", "b16") => for_space!(space, update, u16, u16, Compare),
        ("cas", "b32") => for_space!(space, update, u32, u32, Compare),
        ("cas", "b64") => for_space!(space, update, u64, u64, Compare),
        ("inc", "u32") => for_space!(space, update, u32, u32, Increment),
        ("dec", "u32") => for_space!(space, update, u32, u32, Decrement),
        _ => return None,
    })
}

fn update<M: Memory, W: Word, T: Scalar, U: Update<T>>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    let address = thread.read::<u64>(instruction.a).wrapping_add_signed(instruction.extra);
    let Some(place) = M::place(thread, address, size_of::<W>(), true) else {
        return Flow::Fault;
    };
    thread.count_poll();
    let (b, c): (T, T) = (thread.read(instruction.b), thread.read(instruction.c));
    // Relaxed: the exchange below decides, and is sequentially consistent.
    let mut old: W = place.load(std::sync::atomic::Ordering::Relaxed);
    loop {
        let new = U::update(T::from_register(old.into_register()), b, c);
        let before = W::compare_exchange(place, old, W::from_register(new.into_register()));
        if before == old {
            break;
        }
        old = before;
    }
    thread.write(instruction.d, old);
    Flow::Next
}
