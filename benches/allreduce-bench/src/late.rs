//! What waiting costs: one rank comes late to an operation, and the others' processor time tells
//! whether they slept or spun meanwhile.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use serde_json::json;
use unisum::ReduceOp;

use crate::Result;
use crate::args::Args;
use crate::report::Records;
use crate::usage::Usage;
use crate::value::Value;
use crate::world::{Data, World, elements, with_dtype};

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
        for &op in &args.op.0 {
            for bytes in args.sizes() {
                let (count, _) = elements(bytes, dtype);
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
    let mut data = Data::<T>::allocate(&world.comm, args.memory, count)?;
    data.fill(T::fixed_point(op));
    let late_by = Duration::from_millis(args.late_ms.unwrap_or(0));
    let sleep = if world.comm.rank() == late { late_by } else { Duration::ZERO };
    // Once without waiting: what the operation itself takes (the first also connects the ranks).
    operation(world, &mut data, op, Duration::ZERO)?;
    let in_time = operation(world, &mut data, op, Duration::ZERO)?;
    let waited = operation(world, &mut data, op, sleep)?;
    let mine_s = if sleep.is_zero() { (waited - in_time).max(0.0) } else { 0.0 };
    let (mut most, mut total) = ([mine_s], [mine_s]);
    world.max(&mut most)?;
    world.sum(&mut total)?;
    if !world.is_first() {
        return Ok(());
    }
    let waiting = (world.comm.world() - 1).max(1) as f64;
    Ok(records.write(&[
        ("collective", json!("all_reduce")),
        ("transport", json!(world.comm.transport())),
        ("algorithm", json!(world.comm.choice::<T>(count))),
        ("ranks", json!(world.comm.world())),
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
fn operation<T: Value>(
    world: &World,
    data: &mut [T],
    op: ReduceOp,
    sleep: Duration,
) -> Result<f64> {
    world.align()?;
    let before = Usage::now()?;
    thread::sleep(sleep);
    world.comm.all_reduce(data, op)?;
    Ok(Usage::since(before)?.cpu_seconds)
}
