//! `allreduce-bench`: measures unisum's collectives between processes, and checks every result.
//!
//! With `-n N` it starts N ranks on this machine; without, it joins the world of the launcher it
//! runs under (mpirun, srun, torchrun, …). Every rank runs `join`; rank 0 prints.
//!
//! All of it is a library, so that it compiles while the crate `unisum` still becomes machine code:
//! a program has to wait for that.

#![forbid(unsafe_code)]

mod args;
mod check;
mod collective;
mod device;
mod late;
mod launch;
mod measure;
mod models;
mod operation;
mod replay;
mod report;
mod series;
mod startup;
mod sweep;
mod usage;
mod value;
mod world;

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory as _, Parser as _};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::prelude::*;

use args::Args;
use world::World;

/// Everything that can go wrong ends in one line on standard error and exit status 1.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What the program does.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = args.validate() {
        Args::command().error(clap::error::ErrorKind::ValueValidation, error).exit();
    }
    if let Err(error) = log_to_stderr(args.verbose) {
        Args::command().error(clap::error::ErrorKind::ValueValidation, error).exit();
    }
    let launches = args.joined.is_none() && !args.worlds().is_empty();
    let outcome = if launches { launch(&args) } else { join(&args) };
    outcome.unwrap_or_else(|error| {
        // In one piece, as many ranks may fail at once; a closed standard error hears nothing.
        let _ = io::stderr().write_all(format!("allreduce-bench: {error}\n").as_bytes());
        ExitCode::FAILURE
    })
}

/// Starts ranks here, unless they would find no device.
fn launch(args: &Args) -> Result<ExitCode> {
    if args.is_on_device() {
        unisum::cuda_devices().map_err(|error| format!("-t cuda: {error}"))?;
    }
    launch::worlds(&args.worlds())
}

/// What one rank does.
fn join(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let world = World::connect(args)?;
    let connect_ms = start.elapsed().as_secs_f64() * 1e3;
    if world.is_first() && !world.is_alone() {
        let description = world.comm.describe();
        match args.verbose {
            0 => eprintln!("{}", description.summary()),
            _ => eprint!("{description}"),
        }
    }
    if let Some(device) = world.device.as_ref().filter(|_| world.is_first()) {
        eprintln!("{}", device.comm.describe().trim_end());
    }
    if world.is_alone() && args.joined.is_none() && world.is_first() {
        eprintln!("note: no launcher found, so this is a world of 1; -n 16 starts 16 ranks here");
    }
    if !args.startup.is_empty() {
        startup::run(args, &world, connect_ms)
    } else if let Some(model) = args.replay.model {
        replay::run(args, &world, model)
    } else if args.late_ms.is_some() {
        late::run(args, &world)
    } else {
        sweep::run(args, &world)
    }
}

/// Logs go to standard error: standard output belongs to the report.
fn log_to_stderr(verbose: u8) -> std::result::Result<(), String> {
    let default = [Level::WARN, Level::INFO, Level::DEBUG][usize::from(verbose.min(2))];
    let asked = std::env::var("UNISUM_LOG").ok().filter(|text| !text.is_empty());
    let filter = asked.as_deref().map(log_filter).transpose()?;
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(default));
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    tracing_subscriber::registry().with(lines).with(filter).init();
    Ok(())
}

/// The filter in `UNISUM_LOG`. A word that is no level would be a target that nothing has, and
/// silence all others.
fn log_filter(text: &str) -> std::result::Result<Targets, String> {
    let is_known = |item: &str| {
        let item = item.trim();
        let is_ours = item.starts_with("unisum") || item.starts_with("allreduce_bench");
        is_ours || item.contains('=') || !item.is_empty() && item.parse::<LevelFilter>().is_ok()
    };
    let filter = text.parse().ok().filter(|_| text.split(',').all(is_known));
    filter.ok_or_else(|| {
        format!(
            "UNISUM_LOG=`{text}`: expected off, error, warn, info, debug or trace, or a filter \
             such as unisum_control=trace,warn"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_the_log_are_levels_or_have_targets_and_all_else_is_refused() {
        for text in ["off", "WARN", "debug", "unisum_control=trace,warn", "unisum", "h2=off"] {
            assert!(log_filter(text).is_ok(), "{text}");
        }
        for text in ["nonsense", "nonsense,", "warn,", "unisum=loud", "foo=bar", "1e3"] {
            let error = log_filter(text).map(|_| text).unwrap_err();
            assert!(error.contains("expected off, error"), "{text}: {error}");
        }
    }
}
