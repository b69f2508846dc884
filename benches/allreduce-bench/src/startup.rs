//! How long a world takes to start.

use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;
use unisum::ReduceOp;

use crate::Result;
use crate::args::Args;
use crate::report::Records;
use crate::usage::monotonic_ns;
use crate::world::World;

/// Does the world's first all-reduce, and reports how long after the launch of the slowest rank's
/// process it was done.
///
/// # Errors
/// If the operation fails or the report cannot be written.
pub(crate) fn run(args: &Args, world: &World, connect_ms: f64) -> Result<ExitCode> {
    let start = Instant::now();
    world.comm.all_reduce(&mut [1.0f32], ReduceOp::Sum)?;
    let first_ms = start.elapsed().as_secs_f64() * 1e3;
    let done_ns = monotonic_ns();
    let launched_ns = args.joined.unwrap_or(done_ns);
    let mut slowest = [connect_ms, first_ms, done_ns.saturating_sub(launched_ns) as f64 * 1e-6];
    world.max(&mut slowest)?;
    if !world.is_first() {
        return Ok(ExitCode::SUCCESS);
    }
    let [connect_ms, first_ms, launch_ms] = slowest;
    let ranks = world.comm.world();
    let begins = args.worlds().first() == Some(&ranks);
    Records::new(args.format, begins).write(&[
        ("transport", json!(world.comm.transport())),
        ("ranks", json!(ranks)),
        ("connect_ms", json!(connect_ms)),
        ("first_all_reduce_ms", json!(first_ms)),
        ("launch_to_first_all_reduce_ms", json!(launch_ms)),
    ])?;
    Ok(ExitCode::SUCCESS)
}
