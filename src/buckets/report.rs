//! The report of a step: how it ended, and how much of its communication the computation hid.

use std::time::{Duration, Instant};

use super::elastic::StepChange;
use super::flight::{InFlightStep, Outcome, Times};

/// A step that all ranks committed to.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct StepReport {
    /// Whether an averaged gradient is infinite or NaN: the same on all ranks.
    pub nonfinite: bool,
    /// Whether processes ask to be let into an elastic job, and all ranks know of one: the same on
    /// all ranks, so that all can call [`Buckets::admit`](super::Buckets::admit) or
    /// [`Communicator::admit`](crate::Communicator::admit) after this step.
    pub newcomers: bool,
    /// The number of ranks that had gradients; the average is over these.
    pub participants: usize,
    /// Parameters, by their index in the list, to which no rank contributed: their gradients are
    /// zero, and an optimizer may want to leave them unchanged.
    pub unused: Vec<usize>,
    /// By bucket, in launch order; times count from the beginning of the step.
    pub buckets: Vec<BucketReport>,
    /// When the step began.
    pub begun: Option<Instant>,
    /// When the program had contributed everything and began to wait.
    pub computed: Duration,
    /// When the last bucket was reduced.
    pub reduced: Duration,
    /// When all ranks had agreed on the outcome of the step.
    pub ended: Duration,
    /// How the view of an elastic job changed during the step, if it did.
    pub change: Option<StepChange>,
}

/// The report of one bucket in a step.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct BucketReport {
    /// Its size, including padding.
    pub bytes: usize,
    /// When its last gradient was ready.
    pub ready: Duration,
    /// When its reduction began.
    pub started: Duration,
    /// When it had ended.
    pub finished: Duration,
}

impl StepReport {
    /// How long the program waited for communication after its computation: what was not hidden.
    pub const fn exposed(&self) -> Duration {
        self.ended.saturating_sub(self.computed)
    }

    /// The total time in which buckets were being reduced.
    pub fn communicated(&self) -> Duration {
        self.buckets.iter().map(|bucket| bucket.finished.saturating_sub(bucket.started)).sum()
    }

    pub(super) fn of(flight: &InFlightStep, outcome: Outcome, computed: Instant) -> Self {
        let since = |then: Option<Instant>| {
            then.map_or(Duration::ZERO, |then| then.saturating_duration_since(flight.begun))
        };
        let bucket = |(times, plan): (&Times, &super::layout::BucketPlan)| BucketReport {
            bytes: plan.len * plan.dtype.bytes(),
            ready: since(times.ready),
            started: since(times.started),
            finished: since(times.finished),
        };
        let times = flight.times();
        let buckets: Vec<_> = times.iter().zip(flight.plan.layout.plans()).map(bucket).collect();
        let unused = outcome.used.iter().enumerate().filter(|(_, used)| !**used);
        Self {
            nonfinite: outcome.nonfinite,
            newcomers: outcome.newcomers,
            participants: outcome.participants,
            unused: unused.map(|(parameter, _)| parameter).collect(),
            reduced: buckets.iter().map(|bucket| bucket.finished).max().unwrap_or_default(),
            buckets,
            begun: Some(flight.begun),
            computed: since(Some(computed)),
            ended: since(flight.ended()),
            change: outcome.change,
        }
    }
}
