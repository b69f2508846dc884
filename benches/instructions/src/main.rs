//! `instructions`: counts the instructions of one plan, one proof, one fold, one all-reduce, and
//! holds them to a baseline. Counts don't depend on what else the machine does, so a change of
//! 2 % is a change of the code.
//!
//! `instructions check` runs each job under valgrind's callgrind and compares with
//! `baseline.json`; `--update` writes that file. Counted is what a job executes in this program:
//! not in the C library, whose `memcpy` and `malloc` are chosen by the processor and differ from
//! version to version. Allocations are counted beside it, exactly.

mod allocator;
mod baseline;
mod callgrind;
mod check;
mod jobs;
mod worlds;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Everything that can go wrong ends in one line on standard error and exit status 2.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Counts instructions of unisum's inner parts under valgrind, against a baseline.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Count every job and compare with the baseline; exit status 1 if one became worse or better.
    Check(check::Options),
    /// Print the names of the jobs.
    List,
    /// Run one job: what `check` does under valgrind.
    Run {
        /// A name that `list` prints.
        job: String,
    },
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Check(options) => check::run(&options),
        Command::List => {
            jobs::jobs().iter().for_each(|job| println!("{}", job.name));
            Ok(ExitCode::SUCCESS)
        }
        Command::Run { job } => jobs::run(&job).map(|outcome| {
            println!("{outcome}");
            ExitCode::SUCCESS
        }),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("instructions: {error}");
        ExitCode::from(2)
    })
}
