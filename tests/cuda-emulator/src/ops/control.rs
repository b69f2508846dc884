//! Branches, calls and ends.

use crate::machine::{CallSite, FaultKind, Flow, Handler, Instruction, Thread};
use crate::ptx::{Decoder, Operand, Refusal};

pub(super) fn decode<'t>(
    decoder: &mut Decoder<'t, '_>,
    opcode: &[&str],
    operands: &[Operand<'t>],
) -> Result<Option<()>, Refusal> {
    match *opcode {
        ["bra"] | ["bra", "uni"] => return decode_branch(decoder, branch, 0, operands).map(Some),
        ["brx", "idx"] | ["brx", "idx", "uni"] => {
            let [index, Operand::Name(table)] = operands else { return Ok(None) };
            let index = decoder.source(index)?;
            let table = decoder.branch_table(table)?;
            decoder.emit(branch_indexed, 0, [index, 0, 0], table);
        }
        ["call"] | ["call", "uni"] => return decode_call(decoder, operands).map(Some),
        ["ret"] | ["ret", "uni"] => decoder.emit(leave, 0, [0; 3], 0),
        ["exit"] => decoder.emit(exit, 0, [0; 3], 0),
        ["trap"] => decoder.emit(trap, 0, [0; 3], 0),
        ["brkpt"] => {}
        ["nanosleep", "u32"] => decoder.emit(nanosleep, 0, [0; 3], 0),
        _ => return Ok(None),
    }
    Ok(Some(()))
}

/// A branch to the label that is the only operand.
pub(crate) fn decode_branch<'t>(
    decoder: &mut Decoder<'t, '_>,
    handler: Handler,
    guard: u32,
    operands: &[Operand<'t>],
) -> Result<(), Refusal> {
    let [Operand::Name(label)] = operands else {
        return decoder.refuse("a branch needs a label");
    };
    decoder.branch(handler, guard, label);
    Ok(())
}

/// `call (results), function, (arguments), prototype`
fn decode_call<'t>(decoder: &mut Decoder<'t, '_>, operands: &[Operand<'t>]) -> Result<(), Refusal> {
    let (results, rest) = match operands {
        [Operand::List(results), rest @ ..] => (results.as_slice(), rest),
        all => (&[][..], all),
    };
    let [function, rest @ ..] = rest else { return decoder.refuse("a call needs a function") };
    let arguments = match rest {
        [Operand::List(arguments), ..] => arguments.as_slice(),
        _ => &[],
    };
    let site = CallSite {
        callee: decoder.callee(function),
        arguments: decoder.call_places(arguments)?,
        results: decoder.call_places(results)?,
    };
    let address = match site.callee {
        Some(_) => decoder.constant(0),
        None => decoder.source(function)?,
    };
    decoder.function.calls.push(site);
    let index = decoder.function.calls.len() - 1;
    decoder.emit(call, 0, [address, 0, 0], index as i64);
    Ok(())
}

fn branch(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    thread.branch(instruction.extra)
}

pub(crate) fn branch_if(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    if thread.read(instruction.a) { thread.branch(instruction.extra) } else { Flow::Next }
}

pub(crate) fn branch_unless(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    if thread.read(instruction.a) { Flow::Next } else { thread.branch(instruction.extra) }
}

fn branch_indexed(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let index = thread.read(instruction.a);
    thread.branch_indexed(instruction.extra, index)
}

fn call(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    let address = thread.read(instruction.a);
    thread.call(instruction.extra, address)
}

/// Returns from a function, or ends the thread.
pub(crate) fn leave(thread: &mut Thread<'_>, _instruction: &Instruction) -> Flow {
    thread.leave()
}

fn exit(_thread: &mut Thread<'_>, _instruction: &Instruction) -> Flow {
    Flow::Exit
}

fn trap(thread: &mut Thread<'_>, _instruction: &Instruction) -> Flow {
    thread.fail(FaultKind::Trap, "a trap")
}

/// Lets others run: time is not what a test should depend on.
fn nanosleep(thread: &mut Thread<'_>, _instruction: &Instruction) -> Flow {
    thread.pause();
    Flow::Next
}
