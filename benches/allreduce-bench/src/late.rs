//! What waiting costs: one rank comes late to an operation, and the others' processor time tells
//! whether they slept or spun meanwhile.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use serde_json::json;
use unisum::ReduceOp;

use crate::Result;
use crate::args::Args;
use crate::collective::{Case, Kind, Place};
use crate::operation::{Operands, Operation};
use crate::report::Records;
use crate::usage::Usage;
use crate::value::Value;
use crate::world::{World, with_dtype};

/// Reports, for each size, type and operation, what the waiting ranks burnt.
///
/// # Errors
/// If there is no such rank, an operation fails, or the report cannot be written.
pub(crate) fn run(args: &Args, world: &World) -> Result<ExitCode> {
    let ranks = world.comm.world();
    let late = args.late_rank.unwrap_or(ranks - 1);
    if late >= ranks {
        return Err(
            format!("--late-rank {late}: the last of {ranks} ranks is {}", ranks - 1).into()
        );
    }
    let mut records = Records::new(args.format, true);
    for &dtype in &args.dtype.0 {
        for op in args.operations(dtype) {
            for bytes in args.sizes() {
                let count = bytes as usize / dtype.bytes();
                with_dtype!(dtype, T => one::<T>(args, world, late, (count, op), &mut records))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn one<T: Value>(
    args: &Args,
    world: &World,
    late: usize,
    (count, op): (usize, ReduceOp),
    records: &mut Records,
) -> Result<()> {
    let (kind, ranks) = (Kind::ALL_REDUCE, world.comm.world());
    let case = Case { kind, root: 0, place: Place::In, ranks, count };
    let mut operands = Operands::<T>::allocate(&world.comm, args.memory, &[case])?;
    let mut operation = operands.operation(case, world.comm.rank(), Some(op), None)?;
    operation.settle()?;
    let late_by = Duration::from_millis(args.late_ms.unwrap_or(0));
    let sleep = if world.comm.rank() == late { late_by } else { Duration::ZERO };
    // Once without waiting: what the operation itself takes (the first also connects the ranks).
    used_s(world, &mut operation, Duration::ZERO)?;
    let in_time = used_s(world, &mut operation, Duration::ZERO)?;
    let waited = used_s(world, &mut operation, sleep)?;
    let mine_s = if sleep.is_zero() { (waited - in_time).max(0.0) } else { 0.0 };
    let (mut most, mut total) = ([mine_s], [mine_s]);
    world.max(&mut most)?;
    world.sum(&mut total)?;
    if !world.is_first() {
        return Ok(());
    }
    let waiting = (ranks - 1).max(1) as f64;
    Ok(records.write(&[
        ("collective", json!(kind.to_string())),
        ("transport", json!(world.comm.transport())),
        ("algorithm", json!(world.comm.choice::<T>(&operation.call, count))),
        ("ranks", json!(ranks)),
        ("bytes", json!(count * size_of::<T>())),
        ("dtype", json!(T::DTYPE.to_string())),
        ("op", json!(op.to_string())),
        ("late_rank", json!(late)),
        ("late_ms", json!(args.late_ms)),
        ("waiting_cpu_ms_mean", json!(total[0] / waiting * 1e3)),
        ("waiting_cpu_ms_max", json!(most[0] * 1e3)),
    ])?)
}

/// One operation, entered this late by this rank: its processor time in seconds.
fn used_s<T: Value>(
    world: &World,
    operation: &mut Operation<'_, T>,
    sleep: Duration,
) -> Result<f64> {
    world.align()?;
    let before = Usage::now()?;
    thread::sleep(sleep);
    operation.run(&world.comm)?;
    Ok(Usage::since(before)?.cpu_seconds)
}
