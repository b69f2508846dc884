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
    /// Seconds that each operation took on the rank where it took longest, ascending. Of operations
    /// on devices, by events: from the end of the operation before to its own.
    pub(crate) times_s: Vec<f64>,
    /// Elements that came out wrong; `None` if nobody looked.
    pub(crate) wrong: Option<u64>,
    /// Processor time of all ranks, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Voluntary context switches of all ranks.
    pub(crate) voluntary_switches: u64,
    /// Of operations on devices: seconds by the hosts' clock for each, on the slowest rank.
    pub(crate) wall_s: Option<f64>,
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
    operation.settle()?;
    let cold = timed(world, operation, 1)?;
    let warmups = effort.warmups(cold.mean_s());
    let warm = if warmups == 0 { cold } else { timed(world, operation, warmups)? };
    let Timed { times_s, wall_s, used } =
        timed(world, operation, effort.iterations(warm.mean_s()))?;
    let after = effort.check.then(|| world.checked(operation)).transpose()?;
    Ok(Measurement {
        times_s: sorted(times_s),
        wrong: before.zip(after).map(|(before, after)| before + after),
        cpu_seconds: used.cpu_seconds,
        voluntary_switches: used.voluntary_switches as u64,
        wall_s,
    })
}

/// Operations one after the other, the same on all ranks.
struct Timed {
    /// Each run's time on its slowest rank.
    times_s: Vec<f64>,
    wall_s: Option<f64>,
    /// By all ranks.
    used: Usage,
}

impl Timed {
    /// What one more operation will take.
    fn mean_s(&self) -> f64 {
        let mean_s = || self.times_s.iter().sum::<f64>() / self.times_s.len() as f64;
        self.wall_s.unwrap_or_else(mean_s)
    }
}

/// Runs an operation back to back.
fn timed<T: Value>(
    world: &World,
    operation: &mut Operation<'_, T>,
    repetitions: usize,
) -> Result<Timed> {
    let mut times_s = vec![0.0; repetitions];
    let before = Usage::now()?;
    // All start together, so that the first operation waits for nobody's looking up its usage.
    world.align()?;
    let mut wall_s = None;
    match &world.device {
        Some(device) => {
            let times = device.timed(repetitions, || operation.run(&world.comm))?;
            (times_s, wall_s) = (times.by_events_s, Some(times.wall_s));
        }
        None => {
            for time_s in &mut times_s {
                let start = Instant::now();
                operation.run(&world.comm)?;
                *time_s = start.elapsed().as_secs_f64();
            }
        }
    }
    let used = Usage::since(before)?;
    world.max(&mut times_s)?;
    if let Some(wall_s) = &mut wall_s {
        world.max(std::slice::from_mut(wall_s))?;
    }
    let mut sums = [used.cpu_seconds, used.voluntary_switches];
    world.sum(&mut sums)?;
    let [cpu_seconds, voluntary_switches] = sums;
    Ok(Timed { times_s, wall_s, used: Usage { cpu_seconds, voluntary_switches } })
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
        let measured = Measurement {
            times_s,
            wrong: None,
            cpu_seconds: 0.0,
            voluntary_switches: 0,
            wall_s: None,
        };
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
