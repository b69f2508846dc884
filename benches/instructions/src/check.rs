//! Counts all jobs, compares them with the baseline and prints a table.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use clap::Args;

use crate::Result;
use crate::baseline::{Baseline, compiler};
use crate::callgrind::{Count, count, version};
use crate::jobs::jobs;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Write what is counted as the new baseline.
    #[arg(long)]
    update: bool,
    /// Fail, instead of saying so, if valgrind or the baseline's compiler is not there.
    #[arg(long)]
    required: bool,
    /// Only jobs whose name contains this.
    filter: Option<String>,
}

/// Fewer changes of instructions than this are no change: the standard library's hash maps draw
/// their seeds, and layout shifts a few instructions.
const TOLERANCE: f64 = 0.02;

/// How a job stands to the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Same,
    Worse,
    Better,
    New,
    /// In the baseline, but no job.
    Gone,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let compiler = compiler()?;
    let mut baseline = Baseline::read()?;
    let valgrind = match version() {
        Ok(version) => version,
        Err(why) => return not_checked(options, &why.to_string()),
    };
    if !options.update && compiler != baseline.compiler {
        let why = format!("the baseline is of {:?}, this is {compiler:?}", baseline.compiler);
        return not_checked(options, &why);
    }
    let wanted = |name: &String| options.filter.as_ref().is_none_or(|part| name.contains(part));
    let names: Vec<String> = jobs().into_iter().map(|job| job.name).filter(wanted).collect();
    println!("{compiler}, {valgrind}; one repetition of each job:\n");
    let counted = count_all(&names)?;
    let standings = report(&names, &counted, &baseline);
    if options.update {
        if options.filter.is_none() || compiler != baseline.compiler {
            baseline.counts.clear();
        }
        baseline.compiler = compiler;
        baseline.counts.extend(counted);
        baseline.write()?;
        println!("\nthe baseline is updated");
        return Ok(ExitCode::SUCCESS);
    }
    let gone = baseline.counts.keys().filter(|name| wanted(name) && !names.contains(name));
    let gone = gone.map(|name| (name.as_str(), Standing::Gone));
    Ok(verdict(&standings.into_iter().chain(gone).collect::<Vec<_>>()))
}

fn not_checked(options: &Options, why: &str) -> Result<ExitCode> {
    if options.required {
        return Err(format!("instructions can't be compared: {why}").into());
    }
    println!("instructions are not compared: {why}");
    Ok(ExitCode::SUCCESS)
}

/// Counts on all processors: a job's count does not depend on what else runs.
fn count_all(names: &[String]) -> Result<BTreeMap<String, Count>> {
    let next = AtomicUsize::new(0);
    let counted = Mutex::new(Vec::new());
    let work = || {
        // Relaxed: it only hands out numbers.
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = count(name).map_err(|error| error.to_string());
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.push(result.map(|count| (name.clone(), count)));
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let counted = counted.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(counted.into_iter().collect::<std::result::Result<_, String>>()?)
}

/// Prints the table.
fn report<'a>(
    names: &'a [String],
    counted: &BTreeMap<String, Count>,
    baseline: &Baseline,
) -> Vec<(&'a str, Standing)> {
    println!("{:<54} {:>13} {:>8} {:>12}", "job", "instructions", "change", "allocations");
    let row = |name: &'a String| {
        let (now, before) = (counted[name], baseline.counts.get(name));
        let standing = before.map_or(Standing::New, |before| compare(before, &now));
        let change = before.map_or_else(String::new, |before| {
            format!("{:+.2} %", (now.instructions / before.instructions - 1.0) * 100.0)
        });
        let allocations = match before {
            Some(before) if differ(before.allocations, now.allocations) => {
                format!("{:.1} -> {:.1}", before.allocations, now.allocations)
            }
            _ => format!("{:.1}", now.allocations),
        };
        let note = if standing == Standing::Same { "" } else { &format!("{standing:?}") };
        println!("{name:<54} {:>13.0} {change:>8} {allocations:>12}  {note}", now.instructions);
        (name.as_str(), standing)
    };
    names.iter().map(row).collect()
}

fn compare(before: &Count, now: &Count) -> Standing {
    let change = now.instructions / before.instructions - 1.0;
    let allocates_otherwise = differ(before.allocations, now.allocations);
    if change > TOLERANCE || allocates_otherwise && now.allocations > before.allocations {
        Standing::Worse
    } else if change < -TOLERANCE || allocates_otherwise {
        Standing::Better
    } else {
        Standing::Same
    }
}

/// Allocations of one repetition are counted exactly, but for one that happens now and then.
fn differ(before: f64, now: f64) -> bool {
    (before - now).abs() >= 0.5
}

fn verdict(standings: &[(&str, Standing)]) -> ExitCode {
    let count = |wanted| standings.iter().filter(|(_, standing)| *standing == wanted).count();
    let (worse, better) = (count(Standing::Worse), count(Standing::Better));
    let (new, gone) = (count(Standing::New), count(Standing::Gone));
    println!();
    if worse + better + new + gone == 0 {
        println!("all {} jobs are as in the baseline", standings.len());
        return ExitCode::SUCCESS;
    }
    println!("{worse} worse, {better} better, {new} new, {gone} gone since the baseline.");
    println!("If that is intended: cargo run --release --bin instructions -- check --update");
    ExitCode::FAILURE
}
