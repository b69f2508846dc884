//! Starting worlds on this machine: the process that was called with `-n`.

use std::env;
use std::process::{Command, ExitCode, Stdio};

use crate::Result;
use crate::usage::monotonic_ns;

/// Starts worlds of these sizes one after the other, with this process's arguments, and waits for
/// them. Rank 0 of each prints its report.
///
/// # Errors
/// If ranks cannot be started, or one was killed; ranks that fail otherwise speak for themselves.
pub(crate) fn worlds(sizes: &[usize]) -> Result<ExitCode> {
    let program = env::current_exe()?;
    for &ranks in sizes {
        let mut world = unisum::local::spawn(ranks, |_rank| {
            let mut command = Command::new(&program);
            command.args(env::args_os().skip(1));
            command.arg("--joined").arg(monotonic_ns().to_string()).stdin(Stdio::null());
            command
        })?;
        match world.wait() {
            Ok(()) => {}
            Err(failure) if failure.signal().is_some() => return Err(failure.into()),
            Err(_) => return Ok(ExitCode::FAILURE),
        }
    }
    Ok(ExitCode::SUCCESS)
}
