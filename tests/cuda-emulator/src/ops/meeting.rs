//! Instructions at which threads of a block or lanes of a warp wait for each other.

use crate::machine::{FaultKind, Flow, Instruction, Rendezvous, Thread, WARP};
use crate::ptx::{Decoder, Operand, Refusal};

/// What a meeting yields for each thread that took part.
type Operands = [Option<u64>; WARP as usize];

pub(super) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    match *opcode {
        ["bar" | "barrier", "sync"]
        | ["bar" | "barrier", "cta", "sync"]
        | ["barrier", "sync", "aligned"] => barrier(decoder, operands),
        ["bar" | "barrier", "red", ref rest @ ..] => reducing_barrier(decoder, rest, operands),
        ["bar", "warp", "sync"] => {
            let [mask] = operands else { return Ok(None) };
            let mask = decoder.source(mask)?;
            let zero = decoder.constant(0);
            let nowhere = decoder.temporary();
            decoder.emit(meet_warp, nowhere, [zero, zero, mask], SYNC);
            Ok(Some(()))
        }
        ["shfl", "sync", mode, "b32"] => shuffle(decoder, mode, operands),
        ["vote", "sync", mode, "pred" | "b32"] => vote(decoder, mode, operands),
        ["activemask", "b32"] => {
            let [destination] = operands else { return Ok(None) };
            let d = decoder.destination(destination)?;
            decoder.emit(own_lane, d, [0; 3], 0);
            Ok(Some(()))
        }
        _ => Ok(None),
    }
}

/// `bar.sync id, threads`
fn barrier<'t>(
    decoder: &mut Decoder<'t, '_>,
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let [id, count @ ..] = operands else { return Ok(None) };
    let id = decoder.source(id)?;
    let count = match count {
        [count] => decoder.source(count)?,
        _ => decoder.constant(0),
    };
    let (zero, nowhere) = (decoder.constant(0), decoder.temporary());
    decoder.emit(meet_block, nowhere, [id, count, zero], REDUCE_POPC);
    Ok(Some(()))
}

/// `bar.red.or.pred p, id, q`: all threads learn what their predicates are together.
fn reducing_barrier<'t>(
    decoder: &mut Decoder<'t, '_>,
    rest: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let how = match *rest {
        ["or", "pred"] => REDUCE_OR,
        ["and", "pred"] => REDUCE_AND,
        ["popc", "u32"] => REDUCE_POPC,
        _ => return Ok(None),
    };
    let (destination, id, count, value) = match operands {
        [destination, id, value] => (destination, id, None, value),
        [destination, id, count, value] => (destination, id, Some(count), value),
        _ => return Ok(None),
    };
    let id = decoder.source(id)?;
    let count = match count {
        Some(count) => decoder.source(count)?,
        None => decoder.constant(0),
    };
    let value = decoder.source(value)?;
    let d = decoder.destination(destination)?;
    decoder.emit(meet_block, d, [id, count, value], how);
    Ok(Some(()))
}

const REDUCE_OR: i64 = 0;
const REDUCE_AND: i64 = 1;
const REDUCE_POPC: i64 = 2;

fn meet_block(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let id = thread.read::<u32>(instruction.a).into();
    let threads = thread.read::<u32>(instruction.b).into();
    let value = thread.read::<bool>(instruction.c).into();
    thread.rendezvous = Some(Rendezvous::Barrier { id, threads, value });
    Flow::Rendezvous
}

/// Completes the barrier at which a thread is: `count` of `all` predicates were true.
pub(crate) fn complete_barrier(thread: &mut Thread<'_>, count: u64, all: u64) {
    let instruction = thread.instruction();
    let result = match instruction.extra {
        REDUCE_OR => u64::from(count > 0),
        REDUCE_AND => u64::from(count == all),
        _ => count,
    };
    thread.write(instruction.d, result);
    thread.counter += 1;
}

// What lanes do together.
const SYNC: i64 = 0;
const BUTTERFLY: i64 = 1;
const UP: i64 = 2;
const DOWN: i64 = 3;
const INDEX: i64 = 4;
const ANY: i64 = 5;
const ALL: i64 = 6;
const BALLOT: i64 = 7;
const UNIFORM: i64 = 8;

/// `shfl.sync.bfly.b32 d|p, a, b, c, mask`
fn shuffle<'t>(
    decoder: &mut Decoder<'t, '_>,
    mode: &str,
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let mode = match mode {
        "bfly" => BUTTERFLY,
        "up" => UP,
        "down" => DOWN,
        "idx" => INDEX,
        _ => return Ok(None),
    };
    let [destination, value, distance, clamp, mask] = operands else { return Ok(None) };
    let (destination, valid) = match destination {
        Operand::Both(destination, valid) => {
            (decoder.register(destination)?, decoder.register(valid)?)
        }
        single => (decoder.destination(single)?, decoder.temporary()),
    };
    let (value, distance) = (decoder.source(value)?, decoder.source(distance)?);
    let (clamp, mask) = (decoder.source(clamp)?, decoder.source(mask)?);
    // Destination, predicate, distance, clamp; what is sent and who takes part.
    let lanes = decoder.lanes(&[destination, valid, distance, clamp]);
    decoder.emit(meet_warp, lanes, [value, 0, mask], mode);
    Ok(Some(()))
}

fn vote<'t>(
    decoder: &mut Decoder<'t, '_>,
    mode: &str,
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let mode = match mode {
        "any" => ANY,
        "all" => ALL,
        "ballot" => BALLOT,
        "uni" => UNIFORM,
        _ => return Ok(None),
    };
    let [destination, value, mask] = operands else { return Ok(None) };
    let (value, mask) = (decoder.source(value)?, decoder.source(mask)?);
    let d = decoder.destination(destination)?;
    decoder.emit(meet_warp, d, [value, 0, mask], mode);
    Ok(Some(()))
}

fn meet_warp(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let mask: u32 = thread.read(instruction.c);
    if mask >> thread.lane() & 1 == 0 {
        return thread.fail(FaultKind::IllegalInstruction, "a lane that its mask leaves out");
    }
    let value = u64::from(thread.read::<u32>(instruction.a));
    thread.rendezvous = Some(Rendezvous::Warp { mask, value });
    Flow::Rendezvous
}

/// Completes the instruction of a warp at which a thread is.
pub(crate) fn complete_warp(thread: &mut Thread<'_>, mask: u32, operands: &Operands) {
    let instruction = *thread.instruction();
    thread.counter += 1;
    let present = (0..WARP).filter(|lane| operands[*lane as usize].is_some()).fold(0, set_bit);
    let is_true = |lane: &u32| operands[*lane as usize].is_some_and(|value| value & 1 == 1);
    let holding = (0..WARP).filter(is_true).fold(0, set_bit);
    match instruction.extra {
        SYNC => {}
        ANY => thread.write(instruction.d, holding != 0),
        ALL => thread.write(instruction.d, holding == present),
        UNIFORM => thread.write(instruction.d, holding == 0 || holding == present),
        BALLOT => thread.write(instruction.d, holding & mask),
        mode => complete_shuffle(thread, &instruction, mode, operands),
    }
}

fn set_bit(bits: u32, lane: u32) -> u32 {
    bits | 1 << lane
}

fn complete_shuffle(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
    mode: i64,
    operands: &Operands,
) {
    let [d, valid, distance, clamp] = thread.lanes(instruction.d);
    let distance = thread.read::<u32>(distance) & 31;
    let clamp: u32 = thread.read(clamp);
    let segment = clamp >> 8 & 31;
    let lane = thread.lane();
    let last = lane & segment | clamp & 31 & !segment;
    let (source, is_valid) = match mode {
        UP => (lane.wrapping_sub(distance), lane >= last + distance),
        DOWN => (lane + distance, lane + distance <= last),
        BUTTERFLY => (lane ^ distance, lane ^ distance <= last),
        _ => {
            let source = lane & segment | distance & !segment;
            (source, source <= last)
        }
    };
    let source = if is_valid { source } else { lane };
    // What a lane that is not there sends is undefined.
    let value = operands.get(source as usize).copied().flatten().unwrap_or(UNDEFINED);
    thread.write(d, value);
    thread.write(valid, is_valid);
}

const UNDEFINED: u64 = 0xBADB_ADBA;

/// The lanes that execute together. Each lane on its own is a schedule that PTX allows.
fn own_lane(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let mask = 1_u32 << thread.lane();
    thread.write(instruction.d, mask);
    Flow::Next
}
