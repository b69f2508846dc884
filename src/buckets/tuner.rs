//! How large buckets should be: replays recorded steps with other layouts.
//!
//! The times at which gradients become ready come from recorded steps; the cost of a bucket comes
//! from the link profile of the communicator's cost model, scaled to what the recorded buckets
//! took.

use std::time::Duration;

use super::layout::{Layout, Limits};
use super::parameter::Parameter;
use super::report::StepReport;
use super::{Buckets, Builder};
use crate::{Buffers, Collective, Error};

/// Sizes for buckets, and the exposed communication to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Advice {
    /// See [`Builder::bucket_bytes`].
    pub bucket_bytes: usize,
    /// See [`Builder::end_bucket_bytes`].
    pub end_bucket_bytes: usize,
    /// Expected exposed communication of a step with these sizes.
    pub exposed: Duration,
    /// What the same model expects of the sizes with which the steps were recorded.
    pub exposed_now: Duration,
}

/// What recorded steps tell, in seconds.
struct Recorded {
    /// When each parameter's gradient is ready.
    ready: Vec<f64>,
    /// When all have been computed.
    computed: f64,
    /// What buckets take, in units of what the cost model says.
    slowness: f64,
}

/// The sizes that are tried.
const SIZES: [usize; 10] = [
    64 << 10,
    256 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
    8 << 20,
    16 << 20,
    25 << 20,
    50 << 20,
    100 << 20,
];

impl Buckets {
    /// Finds sizes for buckets from steps that were recorded with the present layout (several,
    /// excluding the first); rank 0's reports decide. The order of the gradients is that of the
    /// layout, which follows from the first step. Pass the result to a new builder
    /// ([`Builder::advised`]).
    ///
    /// Collective: every rank calls it, between steps.
    ///
    /// # Errors
    /// As [`Communicator::run`](crate::Communicator::run).
    pub fn advise(&self, reports: &[StepReport]) -> Result<Advice, Error> {
        self.settle_all();
        let communicator = &self.core.communicator();
        let model = |bytes| communicator.all_reduce_seconds(bytes);
        let (parameters, layout) = (&self.plan.parameters, &self.plan.layout);
        let advice = advise(parameters, layout, reports, self.limits, &model);
        let nanos = |time: Duration| time.as_nanos() as u64;
        let sizes = [advice.bucket_bytes as u64, advice.end_bucket_bytes as u64];
        let mut told = [sizes[0], sizes[1], nanos(advice.exposed), nanos(advice.exposed_now)];
        communicator.run(&Collective::broadcast(0), Buffers::InPlace(&mut told))?;
        Ok(Advice {
            bucket_bytes: told[0] as usize,
            end_bucket_bytes: told[1] as usize,
            exposed: Duration::from_nanos(told[2]),
            exposed_now: Duration::from_nanos(told[3]),
        })
    }
}

impl Builder<'_> {
    /// Uses the sizes of an [`Advice`].
    #[must_use]
    pub const fn advised(self, advice: Advice) -> Self {
        self.bucket_bytes(advice.bucket_bytes).end_bucket_bytes(advice.end_bucket_bytes)
    }
}

fn advise(
    parameters: &[Parameter],
    layout: &Layout,
    reports: &[StepReport],
    limits: Limits,
    model: &dyn Fn(usize) -> f64,
) -> Advice {
    let recorded = Recorded::of(parameters, layout, reports, model);
    let order: Vec<usize> = layout.buckets().flatten().copied().collect();
    let exposed = |limits: Limits| {
        let layout = Layout::new(layout.version(), parameters, &order, limits);
        recorded.exposed(parameters, &layout, model)
    };
    let exposed_now = exposed(limits);
    let mut best = (exposed_now, limits);
    // Larger ones first: of what is equally good, that with the fewest buckets.
    for &bytes in SIZES.iter().rev() {
        for &end_bytes in SIZES.iter().rev().filter(|&&end_bytes| end_bytes <= bytes) {
            let tried = Limits { bytes, end_bytes, ..limits };
            let seconds = exposed(tried);
            if seconds < 0.99 * best.0 {
                best = (seconds, tried);
            }
        }
    }
    Advice {
        bucket_bytes: best.1.bytes,
        end_bucket_bytes: best.1.end_bytes,
        exposed: Duration::from_secs_f64(best.0),
        exposed_now: Duration::from_secs_f64(exposed_now),
    }
}

impl Recorded {
    fn of(
        parameters: &[Parameter],
        layout: &Layout,
        reports: &[StepReport],
        model: &dyn Fn(usize) -> f64,
    ) -> Self {
        let plans = layout.plans();
        let fits = |report: &&StepReport| report.buckets.len() == plans.len();
        let reports: Vec<&StepReport> = reports.iter().filter(fits).collect();
        let bucket = |of: &dyn Fn(&StepReport, usize) -> Duration| -> Vec<Vec<f64>> {
            let seconds = |bucket| reports.iter().map(|it| of(it, bucket).as_secs_f64()).collect();
            (0..plans.len()).map(seconds).collect()
        };
        // The fastest: what a bucket takes beyond that was spent on waiting for other ranks.
        let took = bucket(&|report, bucket| {
            let report = &report.buckets[bucket];
            report.finished.saturating_sub(report.started)
        });
        let fastest = took.iter().map(|took| took.iter().copied().fold(f64::INFINITY, f64::min));
        let measured: f64 = fastest.filter(|seconds| seconds.is_finite()).sum();
        let modelled: f64 = plans.iter().map(|plan| model(plan.len * plan.dtype.bytes())).sum();
        let slowness = if modelled > 0.0 && measured > 0.0 { measured / modelled } else { 1.0 };
        // Between two buckets' times gradients become ready in proportion to their sizes.
        let times = bucket(&|report, bucket| report.buckets[bucket].ready);
        let (mut ready, mut before) = (vec![0.0; parameters.len()], 0.0);
        for (plan, times) in plans.iter().zip(times) {
            let end = median(times).max(before);
            let total: usize = plan.parameters.iter().map(|&it| parameters[it].bytes()).sum();
            let mut done = 0;
            for &parameter in &plan.parameters {
                done += parameters[parameter].bytes();
                let share = done as f64 / total.max(1) as f64;
                ready[parameter] = before + (end - before) * share;
            }
            before = end;
        }
        let computed = reports.iter().map(|report| report.computed.as_secs_f64()).collect();
        Self { ready, computed: median(computed), slowness }
    }

    /// What of the communication comes after the computation: buckets go one after the other, each
    /// when it is ready.
    fn exposed(
        &self,
        parameters: &[Parameter],
        layout: &Layout,
        model: &dyn Fn(usize) -> f64,
    ) -> f64 {
        let mut free = 0.0_f64;
        for plan in layout.plans() {
            let ready = plan.parameters.iter().map(|&parameter| self.ready[parameter]);
            let ready = ready.fold(0.0, f64::max);
            let bytes: usize = plan.parameters.iter().map(|&it| parameters[it].bytes()).sum();
            free = free.max(ready) + self.slowness * model(bytes);
        }
        (free - self.computed).max(0.0)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use unisum_kernels::Dtype;

    use super::super::report::BucketReport;
    use super::*;

    const LIMITS: Limits = Limits { bytes: 25 << 20, end_bytes: 1 << 20, pieces: 1 };

    /// Sixty parameters of 2 MiB, computed at 1 MiB a millisecond.
    fn recorded(model: &dyn Fn(usize) -> f64) -> (Vec<Parameter>, Layout, Vec<StepReport>) {
        let new = |index: usize| Parameter::new(index.to_string(), &[1 << 19], Dtype::F32);
        let parameters: Vec<_> = (0..60).map(new).collect();
        let order: Vec<usize> = (0..60).rev().collect();
        let layout = Layout::new(1, &parameters, &order, LIMITS);
        let (mut ready, mut free, mut buckets) = (0.0_f64, 0.0_f64, Vec::new());
        let time = Duration::from_secs_f64;
        for plan in layout.plans() {
            let bytes = plan.len * 4;
            ready += bytes as f64 / (1 << 20) as f64 * 1e-3;
            let started = free.max(ready);
            // The links are half as fast as the model says.
            free = started + 2.0 * model(bytes);
            let (ready, started, finished) = (time(ready), time(started), time(free));
            buckets.push(BucketReport { bytes, ready, started, finished });
        }
        let report = StepReport {
            computed: time(ready),
            reduced: time(free),
            ended: time(free),
            buckets,
            ..StepReport::default()
        };
        (parameters, layout, vec![report; 3])
    }

    #[test]
    fn what_is_expected_of_the_present_sizes_is_what_was_recorded() {
        let model = |bytes: usize| 1e-4 + bytes as f64 * 3e-10;
        let (parameters, layout, reports) = recorded(&model);
        let advice = advise(&parameters, &layout, &reports, LIMITS, &model);
        let exposed = reports[0].exposed();
        let difference = advice.exposed_now.as_secs_f64() / exposed.as_secs_f64() - 1.0;
        assert!(difference.abs() < 0.02, "{advice:?}, recorded {exposed:?}");
        assert!(advice.exposed <= advice.exposed_now);
    }

    #[test]
    fn where_launches_are_dear_buckets_are_large_and_where_they_are_cheap_small() {
        let dear = |bytes: usize| 0.02 + bytes as f64 * 1e-10;
        let (parameters, layout, reports) = recorded(&dear);
        let few = advise(&parameters, &layout, &reports, LIMITS, &dear);
        let cheap = |bytes: usize| 1e-6 + bytes as f64 * 4.5e-10;
        let (parameters, layout, reports) = recorded(&cheap);
        let many = advise(&parameters, &layout, &reports, LIMITS, &cheap);
        assert!(few.bucket_bytes > many.bucket_bytes, "{few:?} {many:?}");
        assert!(few.exposed < few.exposed_now && many.exposed < many.exposed_now);
    }

    #[test]
    fn without_reports_sizes_stay() {
        let (parameters, layout, _) = recorded(&|_| 1e-3);
        let advice = advise(&parameters, &layout, &[], LIMITS, &|_| 0.0);
        assert_eq!((advice.bucket_bytes, advice.end_bucket_bytes), (25 << 20, 1 << 20));
    }
}
