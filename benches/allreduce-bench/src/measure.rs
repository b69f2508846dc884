//! Measuring one size.

use std::time::{Duration, Instant};

use crate::Result;
use crate::args::{Args, MAX_ITERATIONS};
use crate::operation::Operation;
use crate::usage::Usage;
use crate::value::Value;
use crate::world::World;

/// How much to measure.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    warmup: Option<usize>,
    iterations: Option<usize>,
    time: Duration,
    check: bool,
}

impl Effort {
    /// What the arguments ask for, when `shares` algorithms share the time of a size.
    pub(crate) fn new(args: &Args, shares: usize) -> Self {
        Self {
            warmup: args.warmup,
            iterations: args.iterations,
            time: args.seconds_per_size / shares as u32,
            check: args.check,
        }
    }

    fn warmups(&self, one_s: f64) -> usize {
        self.warmup.unwrap_or_else(|| fitting(Duration::from_millis(100), one_s, 1, 50))
    }

    fn iterations(&self, one_s: f64) -> usize {
        self.iterations.unwrap_or_else(|| fitting(self.time, one_s, 3, MAX_ITERATIONS))
    }
}

/// What was measured: the same on every rank.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    /// Seconds that each operation took on the rank where it took longest, ascending.
    pub(crate) times_s: Vec<f64>,
    /// Elements that came out wrong; `None` if nobody looked.
    pub(crate) wrong: Option<u64>,
    /// Processor time of all ranks, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Voluntary context switches of all ranks.
    pub(crate) voluntary_switches: u64,
}

impl Measurement {
    /// The time that a share of the operations did not exceed (nearest rank), in seconds.
    pub(crate) fn quantile_s(&self, share: f64) -> f64 {
        let rank = (share * self.times_s.len() as f64).ceil() as usize;
        self.times_s[rank.clamp(1, self.times_s.len()) - 1]
    }
}

/// Measures an operation, which is checked before and after.
///
/// Collective. The ranks agree on the slowest rank's estimate, and with it on the counts.
///
/// # Errors
/// If an operation fails.
pub(crate) fn measure<T: Value>(
    world: &World,
    operation: &mut Operation<'_, T>,
    effort: &Effort,
) -> Result<Measurement> {
    let before = effort.check.then(|| world.checked(operation)).transpose()?;
    operation.settle();
    let (cold_s, _) = timed(world, operation, 1)?;
    let warmups = effort.warmups(cold_s[0]);
    let warm_s = if warmups == 0 { cold_s } else { timed(world, operation, warmups)?.0 };
    let estimate_s = warm_s.iter().sum::<f64>() / warm_s.len() as f64;
    let (times_s, used) = timed(world, operation, effort.iterations(estimate_s))?;
    let after = effort.check.then(|| world.checked(operation)).transpose()?;
    Ok(Measurement {
        times_s: sorted(times_s),
        wrong: before.zip(after).map(|(before, after)| before + after),
        cpu_seconds: used.cpu_seconds,
        voluntary_switches: used.voluntary_switches as u64,
    })
}

/// Runs an operation back to back: each run's time on its slowest rank in seconds, and what all
/// ranks used together.
fn timed<T: Value>(
    world: &World,
    operation: &mut Operation<'_, T>,
    repetitions: usize,
) -> Result<(Vec<f64>, Usage)> {
    let mut times_s = vec![0.0; repetitions];
    let before = Usage::now()?;
    // All start together, so that the first operation waits for nobody's looking up its usage.
    world.align()?;
    for time_s in &mut times_s {
        let start = Instant::now();
        operation.run(&world.comm)?;
        *time_s = start.elapsed().as_secs_f64();
    }
    let used = Usage::since(before)?;
    world.max(&mut times_s)?;
    let mut sums = [used.cpu_seconds, used.voluntary_switches];
    world.sum(&mut sums)?;
    let [cpu_seconds, voluntary_switches] = sums;
    Ok((times_s, Usage { cpu_seconds, voluntary_switches }))
}

fn fitting(time: Duration, one_s: f64, least: usize, most: usize) -> usize {
    ((time.as_secs_f64() / one_s.max(1e-9)) as usize).clamp(least, most)
}

fn sorted(mut times: Vec<f64>) -> Vec<f64> {
    times.sort_by(f64::total_cmp);
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let times_s = (1..=100).map(f64::from).collect();
        let measured =
            Measurement { times_s, wrong: None, cpu_seconds: 0.0, voluntary_switches: 0 };
        let quantiles = [0.0, 0.5, 0.99, 1.0].map(|share| measured.quantile_s(share));
        assert_eq!(quantiles, [1.0, 50.0, 99.0, 100.0]);
    }

    #[test]
    fn operations_fit_the_time_within_bounds() {
        let second = Duration::from_secs(1);
        assert_eq!(fitting(second, 0.1, 3, 100), 10);
        assert_eq!(fitting(second, 10.0, 3, 100), 3);
        assert_eq!(fitting(second, 0.0, 3, 100), 100);
    }
}
