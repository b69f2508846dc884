//! Loads that sum, and stores, at addresses that stand for memory of several devices.

use std::sync::atomic::Ordering;

use half::{bf16, f16};

use super::halves::{Half, high, join, low};
use crate::machine::{Flow, Handler, Instruction, Place, Thread};
use crate::ptx::{Decoder, Operand, Refusal};

/// 32 bits of a result: one float, or two.
trait Sum {
    fn sum(words: impl Iterator<Item = u32>) -> u32;
}

struct Single;
/// Pairs of 16-bit floats, added in `f32` and rounded once.
struct Pair<H>(H);

impl Sum for Single {
    fn sum(words: impl Iterator<Item = u32>) -> u32 {
        words.map(f32::from_bits).fold(-0.0, |sum: f32, next| sum + next).to_bits()
    }
}

impl<H: Half> Sum for Pair<H> {
    fn sum(words: impl Iterator<Item = u32>) -> u32 {
        let wide = |bits: u16| H::from_bits(bits).widen();
        let sums = words.fold((-0.0, -0.0), |(first, second): (f32, f32), word| {
            (first + wide(low(word)), second + wide(high(word)))
        });
        join(H::round(sums.0).bits(), H::round(sums.1).bits())
    }
}

pub(super) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    match *opcode {
        ["multimem", "ld_reduce", "relaxed", "sys", "global", ref what @ ..] => {
            decode_load(decoder, what, operands)
        }
        ["multimem", "st", "relaxed", "sys", "global", "v4", "f32" | "f16x2" | "bf16x2"] => {
            decode_store(decoder, operands)
        }
        _ => Ok(None),
    }
}

fn decode_load<'t>(
    decoder: &mut Decoder<'t, '_>,
    what: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let handler: Handler = match *what {
        ["add", "v4", "f32"] => load::<Single>,
        ["add", "acc::f32", "v4", "f16x2"] => load::<Pair<f16>>,
        ["add", "acc::f32", "v4", "bf16x2"] => load::<Pair<bf16>>,
        _ => return Ok(None),
    };
    let [destination, source] = operands else { return decoder.refuse("a load has two operands") };
    let address = decoder.address(source)?;
    let lanes = decoder.written_lanes(destination)?;
    if lanes.len() != LANES {
        return decoder.refuse("as many registers as lanes are needed");
    }
    let d = decoder.lanes(&lanes);
    decoder.emit(handler, d, [address.base, 0, 0], address.offset);
    Ok(Some(()))
}

fn decode_store<'t>(
    decoder: &mut Decoder<'t, '_>,
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    let [destination, source] = operands else { return decoder.refuse("a store has two operands") };
    let address = decoder.address(destination)?;
    let lanes = decoder.read_lanes(source)?;
    if lanes.len() != LANES {
        return decoder.refuse("as many registers as lanes are needed");
    }
    let d = decoder.lanes(&lanes);
    decoder.emit(store, d, [address.base, 0, 0], address.offset);
    Ok(Some(()))
}

const LANES: usize = 4;

/// All places that an instruction means.
fn places(thread: &mut Thread<'_>, instruction: &Instruction) -> Option<Vec<Place>> {
    let address = thread.read::<u64>(instruction.a).wrapping_add_signed(instruction.extra);
    thread.multicast(address, LANES * size_of::<u32>())
}

fn load<S: Sum>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let Some(places) = places(thread, instruction) else { return Flow::Fault };
    for (index, lane) in thread.lanes(instruction.d).into_iter().enumerate() {
        // Acquire, although the instruction is weaker: as strong loads are here.
        let word = |place: &Place| place.element::<u32>(index).load::<u32>(Ordering::Acquire);
        thread.write(lane, S::sum(places.iter().map(word)));
    }
    Flow::Next
}

fn store(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let Some(places) = places(thread, instruction) else { return Flow::Fault };
    for (index, lane) in thread.lanes(instruction.d).into_iter().enumerate() {
        for place in &places {
            // Release: as all stores are here.
            place.element::<u32>(index).store::<u32>(thread.read(lane), Ordering::Release);
        }
    }
    Flow::Next
}
