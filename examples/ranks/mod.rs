//! Starting the ranks of a training on this machine.

use std::error::Error;
use std::process::{Command, ExitCode};

/// Starts this program once per rank, with the same arguments and `--join`.
pub(crate) fn launch(ranks: usize) -> Result<(), Box<dyn Error>> {
    let program = std::env::current_exe()?;
    let mut ranks = unisum::local::spawn(ranks, |_rank| {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).arg("--join");
        command
    })?;
    Ok(ranks.wait()?)
}

/// Says what went wrong in program `name`, if anything did.
pub(crate) fn report(name: &str, outcome: Result<(), Box<dyn Error>>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
