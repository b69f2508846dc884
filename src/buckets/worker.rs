//! The layer's thread: takes a step's buckets in ascending order, and has all ranks agree on how
//! the step ended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use unisum_kernels::Panic;

use super::flight::{Flight, Outcome, Purpose};
use super::hook::{Bucket, Hook, panicked_in};
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
    /// Why there are no more steps: code of the program panicked.
    ended: OnceLock<Error>,
}

/// How steps are run, the same on all ranks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) unused_parameters: bool,
    pub(super) static_graph: bool,
    pub(super) uneven_inputs: bool,
    pub(super) relayout: bool,
    /// Whether all ranks tell each other after each step that their hooks took note of its end.
    pub(super) acknowledges: bool,
}

/// What the layer's thread is to do.
pub(super) enum Order {
    Step(Arc<Flight>),
    Gather(Arc<Gather>),
}

/// The first byte of a vote.
const FAILED: u8 = 1;
const NONFINITE: u8 = 2;
/// Where a vote says which parameters were used, a bit each. Before it are how many steps have
/// accumulated, and the complement of that.
const USED: usize = 9;

impl Core {
    pub(super) fn new(communicator: Communicator, settings: Settings, hook: Box<dyn Hook>) -> Self {
        let (hook, steps, ended) = (Mutex::new(hook), AtomicU64::new(0), OnceLock::new());
        Self { communicator, settings, hook, steps, ended }
    }

    /// Calls a method of the hook.
    ///
    /// # Errors
    /// If it panicked.
    pub(super) fn with_hook<R>(&self, call: impl FnOnce(&mut dyn Hook) -> R) -> Result<R, Panic> {
        // After a panic there are no more steps, and what else is called is the caller's choice.
        let mut hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner);
        Panic::catch(|| call(&mut **hook))
    }

    /// Ends the job on all ranks, and the layer, because code of the program panicked on this one.
    pub(super) fn panicked(&self, what: &str) -> Error {
        let error = self.communicator.panicked(what);
        // The first counts.
        let _ = self.ended.set(error.clone());
        error
    }

    /// Why there are no more steps, if so.
    pub(super) fn failure(&self) -> Option<Error> {
        self.communicator.failure().or_else(|| self.ended.get().map(Error::repeated_by_buckets))
    }

    pub(super) fn steps(&self) -> u64 {
        // Relaxed: read between steps, whose end orders it.
        self.steps.load(Ordering::Relaxed)
    }

    /// Does what it is told, until nobody can tell it any more.
    pub(super) fn work(&self, orders: &Receiver<Order>) {
        for order in orders {
            match order {
                Order::Step(flight) => {
                    let end = Panic::catch(|| self.run(&flight)).unwrap_or_else(|panic| {
                        let what = format!("the gradient buckets panicked: {}", panic.text());
                        Err(self.panicked(&what))
                    });
                    if let Err(panic) = flight.end(end) {
                        let _told = self.waker_panicked(&panic);
                    }
                }
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
            flight.finished(bucket).map_err(|panic| self.waker_panicked(&panic))?;
        }
        // The last gradient is not the last thing that can go wrong: a rank votes when its program
        // has given the step away.
        flight.await_closed();
        if let Some(error) = self.communicator.verdict() {
            // Came while the program took its time: the others have given the step up.
            return Err(error);
        }
        self.steps.fetch_add(1, Ordering::Relaxed);
        let outcome = self.vote(flight, nonfinite, participants);
        self.settle(outcome.as_ref().is_ok_and(|outcome| !outcome.nonfinite))?;
        outcome
    }

    /// Tells the hook how the step ended, and all ranks if it panicked.
    fn settle(&self, applied: bool) -> Result<(), Error> {
        let settled = self.with_hook(|hook| hook.settle(applied));
        let fault = settled.err().map(|panic| panicked_in("settle", &panic));
        if self.communicator.failure().is_some() {
            // Then the step's own error counts.
            return Ok(());
        }
        if !self.settings.acknowledges {
            return fault.map_or(Ok(()), |fault| Err(self.panicked(&fault)));
        }
        let mut panicked = [u8::from(fault.is_some())];
        self.communicator.all_reduce(&mut panicked, ReduceOp::Max)?;
        if panicked == [0] {
            return Ok(());
        }
        let error = self.explain(ErrorKind::Panicked, fault.unwrap_or_default())?;
        // The job lives. The first counts.
        let _ = self.ended.set(error.clone());
        Err(error)
    }

    /// The error of a step, or of the next one, on all ranks.
    fn waker_panicked(&self, panic: &Panic) -> Error {
        let what = format!("the waker of a step or a bucket panicked: {}", panic.text());
        self.panicked(&what)
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
        unsafe { plan.zero_padding(bucket) };
        // SAFETY: as above.
        let mut lent = unsafe { self.lend(plan, bucket, participants) };
        let reduced = self.with_hook(|hook| hook.reduce(&mut lent));
        match reduced {
            Ok(Ok(())) => Ok(lent.is_nonfinite()),
            Ok(Err(error)) if self.communicator.failure().is_some() => {
                let text = format!("{}: {error}", plan.describe_bucket(bucket));
                Err(Error::new(error.kind(), text).caused_by(error.culprits().to_vec()))
            }
            Ok(Err(error)) => {
                let text = format!("{}: {error}", plan.describe_bucket(bucket));
                Err(self.communicator.abort(&text))
            }
            Err(panic) => {
                let (place, what) = (plan.describe_bucket(bucket), panicked_in("reduce", &panic));
                Err(self.panicked(&format!("{place}: {what}")))
            }
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
        let (used, accumulated) = (flight.used(), flight.accumulated());
        let mut ballot = vec![0_u8; USED + used.len().div_ceil(8)];
        if !self.settings.uneven_inputs {
            // Where ranks have different numbers some bit is set in both.
            ballot[1..5].copy_from_slice(&accumulated.to_le_bytes());
            ballot[5..USED].copy_from_slice(&(!accumulated).to_le_bytes());
        }
        ballot[0] =
            if fault.is_some() { FAILED } else { 0 } | if nonfinite { NONFINITE } else { 0 };
        for (parameter, _) in used.iter().enumerate().filter(|(_, used)| **used && !is_shadow) {
            ballot[USED + parameter / 8] |= 1 << (parameter % 8);
        }
        let collective = Collective::all_reduce(ReduceOp::BitOr);
        self.communicator.run(&collective, crate::Buffers::InPlace(&mut ballot))?;
        if ballot[0] & FAILED != 0 {
            return Err(self.explain(ErrorKind::StepFailed, fault.unwrap_or_default())?);
        }
        if ballot[1..5].iter().zip(&ballot[5..USED]).any(|(some, others)| some & others != 0) {
            return Err(self.explain_accumulation(accumulated)?);
        }
        let is_used = |parameter: usize| ballot[USED + parameter / 8] & 1 << (parameter % 8) != 0;
        Ok(Outcome {
            nonfinite: ballot[0] & NONFINITE != 0,
            participants,
            used: (0..used.len()).map(is_used).collect(),
        })
    }

    /// Who accumulated how many steps, the same on all ranks.
    fn explain_accumulation(&self, accumulated: u32) -> Result<Error, Error> {
        let told = self.communicator.exchange(accumulated.to_le_bytes().to_vec())?;
        let count = |bytes: &Vec<u8>| bytes.first_chunk().map_or(0, |it| u32::from_le_bytes(*it));
        let counts: Vec<u32> = told.iter().map(count).collect();
        let votes = |count: u32| counts.iter().filter(|other| **other == count).count();
        // Of equally many the lowest rank's: `max_by_key` takes the last.
        let usual = counts.iter().copied().rev().max_by_key(|count| votes(*count)).unwrap_or(0);
        let others = counts.iter().enumerate().filter(|(_, count)| **count != usual);
        let (mut culprits, mut texts) = (Vec::new(), Vec::new());
        for (rank, count) in others {
            culprits.push(rank);
            texts.push(format!("{count} on rank {rank}"));
        }
        let text = format!(
            "ranks accumulated different numbers of steps before this one: {}, {usual} on the \
             others",
            texts.join(", ")
        );
        let rank = self.communicator.rank();
        Ok(Error::new(ErrorKind::Mismatch, text).on(rank).caused_by(culprits))
    }

    /// What failed where, the same on all ranks.
    fn explain(&self, kind: ErrorKind, fault: String) -> Result<Error, Error> {
        let faults = self.communicator.exchange(fault.into_bytes())?;
        let failed = faults.iter().enumerate().filter(|(_, fault)| !fault.is_empty());
        let (mut culprits, mut texts) = (Vec::new(), Vec::new());
        for (rank, fault) in failed {
            culprits.push(rank);
            texts.push(format!("on rank {rank} {}", String::from_utf8_lossy(fault)));
        }
        let text = format!("the step failed on all ranks: {}", texts.join("; "));
        let rank = self.communicator.rank();
        Ok(Error::new(kind, text).on(rank).caused_by(culprits))
    }
}
