//! What gradient buckets cost a parameter: the time from the first of 200 small gradients to the
//! launch of their reduction, without the reduction.
//!
//! `taskset -c 0 cargo run --release --example bucket_overhead`

use std::error::Error;
use std::time::{Duration, Instant};

use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, Dtype};

const PARAMETERS: usize = 200;
const ROUNDS: usize = 2000;

fn main() -> Result<(), Box<dyn Error>> {
    let communicator = Communicator::builder().rank(0).world(1).connect()?;
    let parameter = |index: usize| Parameter::new(format!("{index}.bias"), &[64], Dtype::F32);
    let parameters: Vec<_> = (0..PARAMETERS).map(parameter).collect();
    let mut buckets = Buckets::builder(&communicator).build(&parameters)?;
    let (mut marked, mut launched) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let step = buckets.begin()?;
        let start = Instant::now();
        for parameter in (0..PARAMETERS).rev() {
            step.view_to_overwrite::<f32>(parameter)?.ready();
        }
        marked.push(start.elapsed());
        let report = step.wait()?;
        let begun = report.begun.ok_or("a step that never began")?;
        let last = report.buckets.iter().map(|bucket| bucket.started).max();
        launched.push((begun + last.unwrap_or_default()).saturating_duration_since(start));
    }
    for (what, times) in [("view and mark", marked), ("until the launch", launched)] {
        let [median, most] = quantiles(times).map(|time| time / PARAMETERS as u32);
        println!("{what}: {median:?} a parameter, at the 99th percentile {most:?}");
    }
    Ok(())
}

fn quantiles(mut times: Vec<Duration>) -> [Duration; 2] {
    times.sort();
    [times[times.len() / 2], times[times.len() * 99 / 100]]
}
