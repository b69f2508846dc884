//! The layer's thread: takes a step's buckets in ascending order, and has all ranks agree on how
//! the step ended.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::flight::{Flight, Outcome, Purpose};
use super::hook::{Bucket, Hook};
use super::plan::Plan;
use super::shard::Gather;
use crate::{Collective, Communicator, Error, ErrorKind, ReduceOp};

/// What the program's threads and the layer's share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) communicator: Communicator,
    pub(super) settings: Settings,
    hook: Mutex<Box<dyn Hook>>,
    /// Steps that were reduced.
    steps: AtomicU64,
}

/// How steps are run, the same on all ranks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) unused_parameters: bool,
    pub(super) static_graph: bool,
    pub(super) uneven_inputs: bool,
    pub(super) relayout: bool,
}

/// What the layer's thread is to do.
pub(super) enum Order {
    Step(Arc<Flight>),
    Gather(Arc<Gather>),
}

/// The first byte of a vote.
const FAILED: u8 = 1;
const NONFINITE: u8 = 2;

impl Core {
    pub(super) fn new(communicator: Communicator, settings: Settings, hook: Box<dyn Hook>) -> Self {
        Self { communicator, settings, hook: Mutex::new(hook), steps: AtomicU64::new(0) }
    }

    pub(super) fn hook(&self) -> MutexGuard<'_, Box<dyn Hook>> {
        // After a panic of the hook the communicator is aborted, and it is not called again.
        self.hook.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn steps(&self) -> u64 {
        // Relaxed: read between steps, whose end orders it.
        self.steps.load(Ordering::Relaxed)
    }

    /// Does what it is told, until nobody can tell it any more.
    pub(super) fn work(&self, orders: &Receiver<Order>) {
        for order in orders {
            match order {
                Order::Step(flight) => flight.end(self.run(&flight)),
                Order::Gather(gather) => gather.run(self),
            }
        }
    }

    /// A bucket of `plan` for this thread.
    ///
    /// # Safety
    /// Nobody else touches the bucket while it is lent.
    pub(super) unsafe fn lend<'a>(
        &'a self,
        plan: &'a Plan,
        bucket: usize,
        participants: usize,
    ) -> Bucket<'a> {
        // SAFETY: the caller promised it.
        unsafe { Bucket::new(plan, bucket, &self.communicator, participants, self.steps()) }
    }

    fn run(&self, flight: &Flight) -> Result<Outcome, Error> {
        let participants = self.count_participants(flight)?;
        if participants == 0 {
            return Ok(Outcome::default());
        }
        let mut nonfinite = false;
        for bucket in 0..flight.plan.layout.plans().len() {
            flight.await_ready(bucket);
            flight.started(bucket);
            nonfinite |= self.reduce(flight, bucket, participants)?;
            flight.finished(bucket);
        }
        self.steps.fetch_add(1, Ordering::Relaxed);
        let outcome = self.vote(flight, nonfinite, participants);
        self.hook().settle(outcome.as_ref().is_ok_and(|outcome| !outcome.nonfinite));
        outcome
    }

    fn count_participants(&self, flight: &Flight) -> Result<usize, Error> {
        if !self.settings.uneven_inputs {
            return Ok(self.communicator.world());
        }
        let mut participants = [u32::from(flight.purpose == Purpose::Reduce)];
        self.communicator.all_reduce(&mut participants, ReduceOp::Sum)?;
        Ok(participants[0] as usize)
    }

    fn reduce(&self, flight: &Flight, bucket: usize, participants: usize) -> Result<bool, Error> {
        let plan = &flight.plan;
        // SAFETY: all its gradients are ready, so the bucket is this thread's until the step ends.
        let mut lent = unsafe { self.lend(plan, bucket, participants) };
        let reduced = catch_unwind(AssertUnwindSafe(|| self.hook().reduce(&mut lent)));
        let refuse = |text: String| {
            self.communicator.give_up(&format!("{}: {text}", plan.describe_bucket(bucket)))
        };
        match reduced {
            Ok(Ok(())) => Ok(lent.is_nonfinite()),
            Ok(Err(error)) if self.communicator.failure().is_some() => {
                let text = format!("{}: {error}", plan.describe_bucket(bucket));
                Err(Error::new(error.kind(), text).caused_by(error.culprits().to_vec()))
            }
            Ok(Err(error)) => Err(refuse(error.to_string())),
            Err(panic) => Err(refuse(format!("the hook panicked: {}", message(&*panic)))),
        }
    }

    /// All ranks learn whether one of them failed, whether a gradient is infinite or NaN, and which
    /// parameters anybody used: they all commit to the step, or none.
    fn vote(
        &self,
        flight: &Flight,
        nonfinite: bool,
        participants: usize,
    ) -> Result<Outcome, Error> {
        let fault = flight.fault();
        let is_shadow = flight.purpose == Purpose::Shadow;
        let used = flight.used();
        let mut ballot = vec![0_u8; 1 + used.len().div_ceil(8)];
        ballot[0] =
            if fault.is_some() { FAILED } else { 0 } | if nonfinite { NONFINITE } else { 0 };
        for (parameter, _) in used.iter().enumerate().filter(|(_, used)| **used && !is_shadow) {
            ballot[1 + parameter / 8] |= 1 << (parameter % 8);
        }
        let collective = Collective::all_reduce(ReduceOp::BitOr);
        self.communicator.run(&collective, crate::Buffers::InPlace(&mut ballot))?;
        if ballot[0] & FAILED != 0 {
            return Err(self.explain(fault.unwrap_or_default())?);
        }
        let is_used = |parameter: usize| ballot[1 + parameter / 8] & 1 << (parameter % 8) != 0;
        Ok(Outcome {
            nonfinite: ballot[0] & NONFINITE != 0,
            participants,
            used: (0..used.len()).map(is_used).collect(),
        })
    }

    /// What failed where, the same on all ranks.
    fn explain(&self, fault: String) -> Result<Error, Error> {
        let faults = self.communicator.exchange(fault.into_bytes())?;
        let failed = faults.iter().enumerate().filter(|(_, fault)| !fault.is_empty());
        let (mut culprits, mut texts) = (Vec::new(), Vec::new());
        for (rank, fault) in failed {
            culprits.push(rank);
            texts.push(format!("on rank {rank} {}", String::from_utf8_lossy(fault)));
        }
        let text = format!("the step failed on all ranks: {}", texts.join("; "));
        let rank = self.communicator.rank();
        Ok(Error::new(ErrorKind::StepFailed, text).on(rank).caused_by(culprits))
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}
