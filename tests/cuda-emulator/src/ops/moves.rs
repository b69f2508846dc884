//! Moves between registers, vectors of them, and addresses of spaces.

use crate::machine::{Flow, Handler, Instruction, Thread, tag};
use crate::ptx::{Decoder, Operand, Refusal, Space};

pub(super) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let [destination, source] = operands else {
        return decoder.refuse("a move has two operands");
    };
    match *opcode {
        ["mov", name] => {
            if let Operand::Vector(_) = destination {
                return unpack(decoder, name, destination, source);
            }
            if let Operand::Vector(_) = source {
                return pack(decoder, name, destination, source);
            }
            one_to_one(decoder, copy, destination, source)
        }
        ["cvta", "to", space, "u64"] => match Space::named(space) {
            Some(_) => one_to_one(decoder, remove_tag, destination, source),
            None => Ok(None),
        },
        ["cvta", space, "u64"] => match Space::named(space) {
            Some(Space::Shared) => {
                one_to_one(decoder, add_tag::<{ tag::SHARED }>, destination, source)
            }
            Some(Space::Local) => {
                one_to_one(decoder, add_tag::<{ tag::LOCAL }>, destination, source)
            }
            Some(Space::Param) => {
                one_to_one(decoder, add_tag::<{ tag::PARAM }>, destination, source)
            }
            Some(_) => one_to_one(decoder, copy, destination, source),
            None => Ok(None),
        },
        ["isspacep", space] => match Space::named(space) {
            Some(Space::Shared) => {
                one_to_one(decoder, has_tag::<{ tag::SHARED }>, destination, source)
            }
            Some(Space::Local) => {
                one_to_one(decoder, has_tag::<{ tag::LOCAL }>, destination, source)
            }
            Some(Space::Param) => {
                one_to_one(decoder, has_tag::<{ tag::PARAM }>, destination, source)
            }
            Some(Space::Global) => one_to_one(decoder, is_global, destination, source),
            _ => Ok(None),
        },
        _ => Ok(None),
    }
}

fn one_to_one<'t>(
    decoder: &mut Decoder<'t, '_>,
    handler: Handler,
    destination: &Operand<'t>,
    source: &Operand<'t>,
) -> Result<Option<()>, Refusal> {
    let a = decoder.source(source)?;
    let d = decoder.destination(destination)?;
    decoder.emit(handler, d, [a, 0, 0], 0);
    Ok(Some(()))
}

/// How many bits each lane of a packed register has.
fn lane_bits(name: &str, lanes: usize) -> Option<u32> {
    let bits: u32 = match name {
        "b16" => 16,
        "b32" => 32,
        "b64" => 64,
        _ => return None,
    };
    matches!(lanes, 2 | 4).then(|| bits / if lanes == 2 { 2 } else { 4 })
}

fn unpack<'t>(
    decoder: &mut Decoder<'t, '_>,
    name: &str,
    destination: &Operand<'t>,
    source: &Operand<'t>,
) -> Result<Option<()>, Refusal> {
    let lanes = decoder.written_lanes(destination)?;
    let Some(bits) = lane_bits(name, lanes.len()) else { return Ok(None) };
    let whole = decoder.source(source)?;
    // The source may be one of the destinations.
    let kept = decoder.temporary();
    decoder.emit(copy, kept, [whole, 0, 0], 0);
    for (index, lane) in (0..).zip(&lanes) {
        decoder.emit(take_lane, *lane, [kept, bits, index * bits], 0);
    }
    Ok(Some(()))
}

fn pack<'t>(
    decoder: &mut Decoder<'t, '_>,
    name: &str,
    destination: &Operand<'t>,
    source: &Operand<'t>,
) -> Result<Option<()>, Refusal> {
    let lanes = decoder.read_lanes(source)?;
    let Some(bits) = lane_bits(name, lanes.len()) else { return Ok(None) };
    let d = decoder.destination(destination)?;
    // The destination may be one of the sources.
    let mut whole = decoder.constant(0);
    for (index, lane) in (0..).zip(&lanes) {
        let next = decoder.temporary();
        decoder.emit(put_lane, next, [*lane, bits, whole], i64::from(index * bits));
        whole = next;
    }
    decoder.emit(copy, d, [whole, 0, 0], 0);
    Ok(Some(()))
}

fn low_bits(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// Cuts out bits; their number and position are in the instruction.
fn take_lane(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let whole: u64 = thread.read(instruction.a);
    thread.write(instruction.d, whole >> instruction.c & low_bits(instruction.b));
    Flow::Next
}

/// Adds bits to what is there; their number and position are in the instruction.
fn put_lane(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let lane: u64 = thread.read(instruction.a);
    let whole: u64 = thread.read(instruction.c);
    let shifted = (lane & low_bits(instruction.b)) << instruction.extra;
    thread.write(instruction.d, whole | shifted);
    Flow::Next
}

fn copy(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let value: u64 = thread.read(instruction.a);
    thread.write(instruction.d, value);
    Flow::Next
}

/// Adds the constant in the instruction.
pub(crate) fn add_offset(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let value: u64 = thread.read(instruction.a);
    thread.write(instruction.d, value.wrapping_add_signed(instruction.extra));
    Flow::Next
}

fn add_tag<const TAG: u64>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let offset: u64 = thread.read(instruction.a);
    thread.write(instruction.d, offset | TAG);
    Flow::Next
}

/// Makes a generic address one of a space. Addresses of global memory stay as they are.
fn remove_tag(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let address: u64 = thread.read(instruction.a);
    let offset = match address & tag::MASK {
        tag::SHARED | tag::LOCAL | tag::PARAM => address & !tag::MASK,
        _ => address,
    };
    thread.write(instruction.d, offset);
    Flow::Next
}

fn has_tag<const TAG: u64>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let address: u64 = thread.read(instruction.a);
    thread.write(instruction.d, address & tag::MASK == TAG);
    Flow::Next
}

fn is_global(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let address: u64 = thread.read(instruction.a);
    let is_global = !matches!(address & tag::MASK, tag::SHARED | tag::LOCAL | tag::PARAM);
    thread.write(instruction.d, is_global);
    Flow::Next
}

/// Nanoseconds since the first call.
pub(crate) fn clock(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    let elapsed = START.get_or_init(std::time::Instant::now).elapsed();
    // Whoever looks at the clock in a loop waits.
    thread.count_poll();
    thread.write(instruction.d, u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX));
    Flow::Next
}
