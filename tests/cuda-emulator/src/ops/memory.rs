//! Loads, stores and fences.

use std::sync::atomic::{Ordering, fence};

use crate::machine::{Flow, Handler, Instruction, Place, Scalar, Thread, Word};
use crate::ptx::{Decoder, Operand, Refusal, Space};

/// A space at compile time.
pub(super) trait Memory {
    fn place(thread: &mut Thread<'_>, address: u64, bytes: usize, writes: bool) -> Option<Place>;
}

pub(super) struct Generic;
pub(super) struct Global;
pub(super) struct Shared;
pub(super) struct Local;
pub(super) struct Param;

impl Memory for Generic {
    #[inline(always)]
    fn place(thread: &mut Thread<'_>, address: u64, bytes: usize, writes: bool) -> Option<Place> {
        thread.generic(address, bytes, writes)
    }
}

impl Memory for Global {
    #[inline(always)]
    fn place(thread: &mut Thread<'_>, address: u64, bytes: usize, writes: bool) -> Option<Place> {
        thread.global(address, bytes, writes)
    }
}

impl Memory for Shared {
    #[inline(always)]
    fn place(thread: &mut Thread<'_>, address: u64, bytes: usize, _writes: bool) -> Option<Place> {
        thread.shared(address, bytes)
    }
}

impl Memory for Local {
    #[inline(always)]
    fn place(thread: &mut Thread<'_>, address: u64, bytes: usize, _writes: bool) -> Option<Place> {
        thread.local(address, bytes)
    }
}

impl Memory for Param {
    #[inline(always)]
    fn place(thread: &mut Thread<'_>, address: u64, bytes: usize, writes: bool) -> Option<Place> {
        thread.param(address, bytes, writes)
    }
}

/// What the modifiers of a memory instruction say.
pub(super) struct Access {
    pub space: Space,
    pub strength: u8,
    pub lanes: usize,
}

/// What a load may count on: nobody else writes there meanwhile;
const WEAK: u8 = 0;
/// others may, so that looking again may show something new;
const STRONG: u8 = 1;
/// and what they did before is seen, too.
const ACQUIRES: u8 = 2;

/// Reads the modifiers of a memory instruction up to its type, or `None` if one is unknown.
pub(super) fn access(modifiers: &[&str]) -> Option<Access> {
    let mut access = Access { space: Space::Generic, strength: WEAK, lanes: 1 };
    for modifier in modifiers {
        match *modifier {
            "acquire" => access.strength = ACQUIRES,
            "volatile" | "relaxed" | "release" | "acq_rel" | "mmio" => access.strength = STRONG,
            "cta" | "gpu" | "sys" | "cluster" => {}
            "v2" => access.lanes = 2,
            "v4" => access.lanes = 4,
            // How caches are used.
            "nc" | "ca" | "cg" | "cs" | "cv" | "lu" | "wb" | "wt" | "weak" => {}
            hint if hint.starts_with("L1::") || hint.starts_with("L2::") => {}
            space => access.space = Space::named(space)?,
        }
    }
    Some(access)
}

/// The space of an access: what the variable says if the opcode leaves it open, and local memory
/// for the arguments of a call.
pub(super) fn effective(named: Space, variable: Option<Space>) -> Space {
    match (named, variable) {
        (Space::Generic | Space::Param, Some(space)) => space,
        (space, _) => space,
    }
}

/// A handler `$function::<Memory, …>` for each space.
macro_rules! for_space {
    ($space:expr, $function:ident, $($more:tt),*) => {
        match $space {
            Space::Generic => $function::<Generic, $($more),*> as Handler,
            Space::Global | Space::Const => $function::<Global, $($more),*>,
            Space::Shared => $function::<Shared, $($more),*>,
            Space::Local => $function::<Local, $($more),*>,
            Space::Param => $function::<Param, $($more),*>,
        }
    };
}

pub(super) use for_space;

pub(super) fn decode_load<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let [_, modifiers @ .., name] = opcode else { return Ok(None) };
    let Some(access) = access(modifiers) else { return Ok(None) };
    let [destination, source] = operands else { return decoder.refuse("a load has two operands") };
    let address = decoder.address(source)?;
    let space = effective(access.space, address.space);
    let Some(handler) = loading(space, name, access.lanes, access.strength) else {
        return Ok(None);
    };
    let lanes = decoder.written_lanes(destination)?;
    if lanes.len() != access.lanes {
        return decoder.refuse("as many registers as lanes are needed");
    }
    let d = if lanes.len() == 1 { lanes[0] } else { decoder.lanes(&lanes) };
    decoder.emit(handler, d, [address.base, 0, 0], address.offset);
    Ok(Some(()))
}

pub(super) fn decode_store<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let [_, modifiers @ .., name] = opcode else { return Ok(None) };
    let Some(access) = access(modifiers) else { return Ok(None) };
    let [destination, source] = operands else { return decoder.refuse("a store has two operands") };
    let address = decoder.address(destination)?;
    let space = effective(access.space, address.space);
    let Some(handler) = storing(space, name, access.lanes) else { return Ok(None) };
    let lanes = decoder.read_lanes(source)?;
    if lanes.len() != access.lanes {
        return decoder.refuse("as many registers as lanes are needed");
    }
    let d = if lanes.len() == 1 { lanes[0] } else { decoder.lanes(&lanes) };
    decoder.emit(handler, d, [address.base, 0, 0], address.offset);
    Ok(Some(()))
}

fn loading(space: Space, name: &str, lanes: usize, strength: u8) -> Option<Handler> {
    /// For each number of lanes; then for each strength.
    macro_rules! load_as {
        ($word:ty, $as:ty) => {
            match (lanes, strength) {
                (1, WEAK) => for_space!(space, load, $word, $as, 1, WEAK),
                (1, STRONG) => for_space!(space, load, $word, $as, 1, STRONG),
                (1, _) => for_space!(space, load, $word, $as, 1, ACQUIRES),
                (2, WEAK) => for_space!(space, load, $word, $as, 2, WEAK),
                (2, _) => for_space!(space, load, $word, $as, 2, STRONG),
                (_, WEAK) => for_space!(space, load, $word, $as, 4, WEAK),
                (_, _) => for_space!(space, load, $word, $as, 4, STRONG),
            }
        };
    }
    Some(match name {
        "b8" | "u8" => load_as!(u8, u8),
        "s8" => load_as!(u8, i8),
        "b16" | "u16" | "f16" | "bf16" => load_as!(u16, u16),
        "s16" => load_as!(u16, i16),
        "b32" | "u32" | "f32" | "f16x2" | "bf16x2" => load_as!(u32, u32),
        "s32" => load_as!(u32, i32),
        "b64" | "u64" | "s64" | "f64" => load_as!(u64, u64),
        _ => return None,
    })
}

fn storing(space: Space, name: &str, lanes: usize) -> Option<Handler> {
    macro_rules! store_as {
        ($word:ty) => {
            match lanes {
                1 => for_space!(space, store, $word, 1),
                2 => for_space!(space, store, $word, 2),
                _ => for_space!(space, store, $word, 4),
            }
        };
    }
    Some(match name {
        "b8" | "u8" | "s8" => store_as!(u8),
        "b16" | "u16" | "s16" | "f16" | "bf16" => store_as!(u16),
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => store_as!(u32),
        "b64" | "u64" | "s64" | "f64" => store_as!(u64),
        _ => return None,
    })
}

fn load<M: Memory, W: Word, A: Scalar, const LANES: usize, const STRENGTH: u8>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    let address = thread.read::<u64>(instruction.a).wrapping_add_signed(instruction.extra);
    let Some(place) = M::place(thread, address, LANES * size_of::<W>(), false) else {
        return Flow::Fault;
    };
    // Acquire pairs with the release of `store`: whatever the writer did before is seen.
    let ordering = if STRENGTH == WEAK { Ordering::Relaxed } else { Ordering::Acquire };
    if STRENGTH != WEAK {
        thread.count_poll();
    }
    if LANES == 1 {
        let mut value = place.load::<W>(ordering).into_register();
        if STRENGTH == ACQUIRES && thread.passes_waits() {
            // As if others had counted on by a quarter of the range.
            let range = u64::MAX >> (64 - 8 * size_of::<W>());
            value = value.wrapping_add(range / 4) & range;
        }
        thread.write(instruction.d, A::from_register(value));
        return Flow::Next;
    }
    let lanes = thread.lanes(instruction.d);
    for (index, lane) in lanes.iter().enumerate().take(LANES) {
        let value = place.element::<W>(index).load::<W>(ordering).into_register();
        thread.write(*lane, A::from_register(value));
    }
    Flow::Next
}

fn store<M: Memory, W: Word, const LANES: usize>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    let address = thread.read::<u64>(instruction.a).wrapping_add_signed(instruction.extra);
    let Some(place) = M::place(thread, address, LANES * size_of::<W>(), true) else {
        return Flow::Fault;
    };
    // Release, also where the instruction is weaker: pairs with the acquire of strong loads.
    if LANES == 1 {
        place.store::<W>(thread.read(instruction.d), Ordering::Release);
        return Flow::Next;
    }
    let lanes = thread.lanes(instruction.d);
    for (index, lane) in lanes.iter().enumerate().take(LANES) {
        place.element::<W>(index).store::<W>(thread.read(*lane), Ordering::Release);
    }
    Flow::Next
}

/// `membar.sys`, `fence.acq_rel.gpu`, and hints to caches, which do nothing.
pub(super) fn decode_fence(
    decoder: &mut Decoder<'_, '_>,
    opcode: &[&str],
) -> Result<Option<()>, Refusal> {
    let is_known = match *opcode {
        ["membar", "cta" | "gl" | "sys"] => true,
        ["fence", "sc" | "acq_rel" | "acquire" | "release", "cta" | "gpu" | "sys" | "cluster"] => {
            true
        }
        ["fence", "proxy", "alias"] => true,
        ["prefetch" | "prefetchu" | "discard" | "applypriority", ..] => return Ok(Some(())),
        _ => false,
    };
    if !is_known {
        return Ok(None);
    }
    decoder.emit(full_fence, 0, [0; 3], 0);
    Ok(Some(()))
}

fn full_fence(_thread: &mut Thread<'_>, _instruction: &Instruction) -> Flow {
    // The strongest: it covers whatever the instruction asks for.
    fence(Ordering::SeqCst);
    Flow::Next
}
