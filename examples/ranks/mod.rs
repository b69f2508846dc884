//! Starting the ranks of a training on this machine.

use std::error::Error;
use std::process::{Command, ExitCode};

use unisum::local::LocalRanks;

/// Starts this program once per rank, with the same arguments: those are ranks, and join.
pub(crate) fn launch(ranks: usize) -> Result<(), Box<dyn Error>> {
    Ok(start(ranks)?.wait()?)
}

/// The same for a job that goes on without ranks that are killed.
#[allow(dead_code, reason = "not all examples can")]
pub(crate) fn launch_elastic(ranks: usize) -> Result<(), Box<dyn Error>> {
    Ok(start(ranks)?.wait_for_survivors()?)
}

fn start(ranks: usize) -> std::io::Result<LocalRanks> {
    let program = std::env::current_exe()?;
    unisum::local::spawn(ranks, |_rank| {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1));
        command
    })
}

/// Says how the ranks found each other, on rank 0.
pub(crate) fn tell_launch(communicator: &unisum::Communicator) {
    if communicator.rank() == 0 {
        eprintln!("{}", communicator.describe().summary());
    }
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
