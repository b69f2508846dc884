//! The layer's thread: takes a step's buckets in ascending order, and has all ranks agree on how
//! the step ended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use unisum_kernels::Panic;

use super::elastic::{Attempt, Continuity};
use super::flight::{InFlightStep, Outcome, Purpose};
use super::hook::{Bucket, Hook, panicked_in};
use super::plan::Plan;
use super::shard::Gather;
use crate::execution::failure::Ended;
use crate::wiring::Lineage;
use crate::{Collective, Communicator, Error, ErrorKind, ReduceOp};
use unisum_control::callers;

/// What the program's threads and the layer's share.
#[derive(Debug)]
pub(super) struct Core {
    communicator: RwLock<Arc<Communicator>>,
    /// In an elastic job.
    pub(super) continuity: Option<Continuity>,
    /// The job, if it is elastic.
    lineage: Option<Arc<Lineage>>,
    /// Whether the communicator has changed since the hook saw one.
    has_moved: AtomicBool,
    pub(super) settings: Settings,
    hook: Mutex<Box<dyn Hook>>,
    /// Steps that were reduced.
    steps: AtomicU64,
    /// Why there are no more steps though no call has failed: code of the program panicked, or the
    /// job has ended or changed between two calls.
    pub(super) ended: Ended,
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
    /// Whether each rank averages its shards alone.
    pub(super) is_sharded: bool,
}

/// What the layer's thread is to do.
pub(super) enum Order {
    Step(Arc<InFlightStep>),
    Gather(Arc<Gather>),
}

/// How much of a rank's reason all ranks are told.
const FAULT_BYTES_MAX: usize = 4 << 10;
/// The first byte of a vote.
const FAILED: u8 = 1;
const NONFINITE: u8 = 2;
/// The rank knows of no process that asks to be let into the job.
const NO_NEWCOMERS: u8 = 4;
/// Where a vote says which parameters were used, a bit each. Before it are how many steps have
/// accumulated, and the complement of that.
const USED: usize = 9;

impl Core {
    pub(super) fn new(
        communicator: Communicator,
        (continuity, lineage): (Option<Continuity>, Option<Arc<Lineage>>),
        settings: Settings,
        hook: Box<dyn Hook>,
    ) -> Self {
        let communicator = RwLock::new(Arc::new(communicator));
        let (hook, steps, ended) = (Mutex::new(hook), AtomicU64::new(0), Ended::default());
        let has_moved = AtomicBool::new(false);
        Self { communicator, continuity, lineage, has_moved, settings, hook, steps, ended }
    }

    /// That of the layer, which nobody else uses.
    pub(super) fn communicator(&self) -> Arc<Communicator> {
        self.communicator.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes on with another communicator.
    pub(super) fn move_to(&self, communicator: Communicator) {
        let mut place = self.communicator.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, Arc::new(communicator));
        drop(place);
        // It may be the last to have it, and then takes leave.
        drop(before);
        // Relaxed: the layer's thread alone asks.
        self.has_moved.store(true, Ordering::Relaxed);
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
        let error = self.communicator().panicked(what);
        self.ended.by(&error);
        error
    }

    /// The same where no call returns the error: the next one does.
    pub(super) fn panicked_between_calls(&self, what: &str) {
        let error = self.communicator().panicked_between_calls(what);
        self.ended.between_calls(&error);
    }

    /// The error of a step that is not made because there are no more, if so.
    pub(super) fn refusal(&self) -> Option<Error> {
        let ended = || self.ended.refusal(Error::repeated_by_buckets);
        // In an elastic job the step finds out what there is to do.
        let refusal = self.communicator().refusal().filter(|error| !self.outlives(error));
        refusal.or_else(ended)
    }

    /// Whether there are no more steps.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    /// A step was reduced.
    pub(super) fn count_step(&self) {
        // Relaxed: read between steps, whose end orders it.
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// So many steps were reduced by the ranks that were there before this one.
    pub(super) fn set_steps(&self, steps: u64) {
        // Relaxed: between steps, whose beginning orders it.
        self.steps.store(steps, Ordering::Relaxed);
    }

    pub(super) fn steps(&self) -> u64 {
        // Relaxed: read between steps, whose end orders it.
        self.steps.load(Ordering::Relaxed)
    }

    /// Does what it is told, until nobody can tell it any more.
    pub(super) fn work(&self, orders: &Receiver<Order>) {
        callers::calls();
        for order in orders {
            match order {
                Order::Step(flight) => {
                    let end = Panic::catch(|| self.run(&flight)).unwrap_or_else(|panic| {
                        let what = format!("the gradient buckets panicked: {}", panic.text());
                        Err(self.panicked(&what))
                    });
                    if let Err(panic) = flight.end(end) {
                        self.panicked_between_calls(&waker_panicked(&panic));
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
        &self,
        communicator: &'a Communicator,
        plan: &'a Plan,
        bucket: usize,
        participants: usize,
    ) -> Bucket<'a> {
        // SAFETY: the caller promised it.
        unsafe { Bucket::new(plan, bucket, communicator, participants, self.steps()) }
    }

    /// Runs a step, through as many views as it takes.
    fn run(&self, flight: &InFlightStep) -> Result<Outcome, Error> {
        let mut attempt = Attempt::new(self);
        loop {
            let begun = self.repeat_before(flight, &mut attempt);
            match begun.and_then(|()| self.attempt(flight, &mut attempt)) {
                Err(error) if self.outlives(&error) => {
                    let recovered = self.recover(flight, &mut attempt, error);
                    recovered.inspect_err(|error| self.ended.by(error))?;
                }
                end => {
                    if !self.repeat_after(flight, &mut attempt)? {
                        self.log_end(&attempt);
                        return end.map(|outcome| Outcome { change: attempt.change, ..outcome });
                    }
                }
            }
        }
    }

    /// Takes a step as far as the view allows.
    fn attempt(&self, flight: &InFlightStep, attempt: &mut Attempt) -> Result<Outcome, Error> {
        if attempt.ballot.is_none() {
            self.is_tried_here(attempt);
            attempt.participants = self.count_participants(flight)?;
            if attempt.participants == 0 {
                return Ok(Outcome::default());
            }
            let nonfinite = self.reduce_all(flight, attempt)?;
            // The last gradient is not the last thing that can go wrong: a rank votes when its
            // program has given the step away.
            flight.await_closed();
            if let Some(error) = self.communicator().verdict_that_comes() {
                // Came while the program took its time: the others have given the step up.
                if !self.outlives(&error) {
                    // No call has failed, so the communicator does not know.
                    self.ended.by(&error);
                }
                return Err(error);
            }
            let ballot = self.vote(flight, nonfinite);
            match ballot {
                Ok(ballot) => self.decide(attempt, ballot),
                Err(error) if self.outlives(&error) => return Err(error),
                Err(error) => {
                    self.count_step();
                    self.settle(attempt, false)?;
                    return Err(error);
                }
            }
        }
        let outcome = self.read_ballot(flight, attempt);
        if let Err(error) = &outcome
            && self.outlives(error)
        {
            return outcome;
        }
        self.settle(attempt, outcome.as_ref().is_ok_and(|outcome| !outcome.nonfinite))?;
        outcome
    }

    /// Averages the buckets as they become ready; whether anything in them is infinite or NaN.
    fn reduce_all(&self, flight: &InFlightStep, attempt: &mut Attempt) -> Result<bool, Error> {
        // Relaxed: this thread's.
        if self.has_moved.swap(false, Ordering::Relaxed) {
            let told = self.with_hook(|hook| hook.rebuild());
            told.map_err(|panic| self.panicked(&panicked_in("rebuild", &panic)))?;
        }
        let mut nonfinite = false;
        for bucket in 0..flight.plan.layout.plans().len() {
            flight.await_ready(bucket);
            flight.started(bucket);
            self.keep(&flight.plan, bucket, attempt);
            nonfinite |= self.reduce(flight, bucket, attempt.participants)?;
            flight.finished(bucket).map_err(|panic| self.panicked(&waker_panicked(&panic)))?;
        }
        Ok(nonfinite)
    }

    /// Tells the hook how the step ended, and all ranks if it panicked.
    fn settle(&self, attempt: &mut Attempt, applied: bool) -> Result<(), Error> {
        let settle = || {
            let settled = self.with_hook(|hook| hook.settle(applied));
            settled.err().map(|panic| panicked_in("settle", &panic))
        };
        let fault = attempt.settled.get_or_insert_with(settle).clone();
        let communicator = self.communicator();
        let failure = communicator.failure();
        if failure.as_ref().is_some_and(|error| !self.outlives(error)) {
            // Then the step's own error counts.
            return Ok(());
        }
        if !self.settings.acknowledges || attempt.is_passed {
            return fault.map_or(Ok(()), |fault| Err(self.panicked(&fault)));
        }
        let mut panicked = [u8::from(fault.is_some())];
        communicator.all_reduce(&mut panicked, ReduceOp::Max)?;
        if panicked == [0] {
            return Ok(());
        }
        let error = explain(&self.communicator(), ErrorKind::Panicked, fault.unwrap_or_default())?;
        // The job lives.
        self.ended.by(&error);
        Err(error)
    }

    fn count_participants(&self, flight: &InFlightStep) -> Result<usize, Error> {
        if !self.settings.uneven_inputs {
            return Ok(self.communicator().world());
        }
        let mut participants = [u32::from(flight.purpose == Purpose::Reduce)];
        self.communicator().all_reduce(&mut participants, ReduceOp::Sum)?;
        Ok(participants[0] as usize)
    }

    fn reduce(
        &self,
        flight: &InFlightStep,
        bucket: usize,
        participants: usize,
    ) -> Result<bool, Error> {
        let (plan, communicator) = (&flight.plan, self.communicator());
        // SAFETY: all its gradients are ready, so the bucket is this thread's until the step ends.
        unsafe { plan.zero_padding(bucket) };
        // SAFETY: as above.
        let mut lent = unsafe { self.lend(&communicator, plan, bucket, participants) };
        let reduced = self.with_hook(|hook| hook.reduce(&mut lent));
        match reduced {
            Ok(Ok(())) => Ok(lent.is_nonfinite()),
            Ok(Err(error)) if communicator.failure().is_some() || self.outlives(&error) => {
                Err(error.within(&plan.describe_bucket(bucket)))
            }
            Ok(Err(error)) => {
                let text = format!("{}: {error}", plan.describe_bucket(bucket));
                Err(match error.kind() {
                    ErrorKind::Memory => communicator.lacks(&format!("has no memory: {text}")),
                    _ => communicator.abort(&text),
                })
            }
            Err(panic) => {
                let (place, what) = (plan.describe_bucket(bucket), panicked_in("reduce", &panic));
                Err(self.panicked(&format!("{place}: {what}")))
            }
        }
    }

    /// All ranks learn whether one of them failed, whether a gradient is infinite or NaN, and which
    /// parameters anybody used: they all commit to the step, or none.
    fn vote(&self, flight: &InFlightStep, nonfinite: bool) -> Result<Vec<u8>, Error> {
        let is_shadow = flight.purpose == Purpose::Shadow;
        let (used, accumulated) = (flight.used(), flight.accumulated());
        let mut ballot = vec![0_u8; ballot_bytes(used.len())];
        if !self.settings.uneven_inputs {
            // Where ranks have different numbers some bit is set in both.
            ballot[1..5].copy_from_slice(&accumulated.to_le_bytes());
            ballot[5..USED].copy_from_slice(&(!accumulated).to_le_bytes());
        }
        let failed = if flight.fault().is_some() { FAILED } else { 0 };
        let newcomers = self.lineage.as_ref().map_or(0, |lineage| lineage.newcomers());
        ballot[0] = failed
            | if nonfinite { NONFINITE } else { 0 }
            | if newcomers == 0 { NO_NEWCOMERS } else { 0 };
        for (parameter, _) in used.iter().enumerate().filter(|(_, used)| **used && !is_shadow) {
            ballot[USED + parameter / 8] |= 1 << (parameter % 8);
        }
        let collective = Collective::all_reduce(ReduceOp::BitOr);
        self.communicator().run(&collective, crate::Buffers::InPlace(&mut ballot))?;
        Ok(ballot)
    }

    /// How the step ended, as all ranks voted.
    fn read_ballot(&self, flight: &InFlightStep, attempt: &Attempt) -> Result<Outcome, Error> {
        let parameters = flight.plan.parameters.len();
        let ballot = attempt.ballot.as_deref().unwrap_or_default();
        let (rank, is_passed) = (self.communicator().rank(), attempt.is_passed);
        if ballot.len() != ballot_bytes(parameters) {
            let text = format!("a rank told {} bytes of votes", ballot.len());
            return Err(Error::new(ErrorKind::Protocol, text).on(rank));
        }
        if ballot[0] & FAILED != 0 {
            let fault = flight.fault().unwrap_or_default();
            if is_passed {
                let text = format!("the step failed on all ranks: {}", or_unknown(&fault));
                return Err(Error::new(ErrorKind::StepFailed, text).on(rank));
            }
            return Err(explain(&self.communicator(), ErrorKind::StepFailed, fault)?);
        }
        if ballot[1..5].iter().zip(&ballot[5..USED]).any(|(some, others)| some & others != 0) {
            if is_passed {
                let text = "ranks accumulated different numbers of steps before this one";
                return Err(Error::new(ErrorKind::Mismatch, text).on(rank));
            }
            return Err(self.explain_accumulation(flight.accumulated())?);
        }
        let is_used = |parameter: usize| ballot[USED + parameter / 8] & 1 << (parameter % 8) != 0;
        Ok(Outcome {
            nonfinite: ballot[0] & NONFINITE != 0,
            newcomers: self.turns_after(attempt).unwrap_or(ballot[0] & NO_NEWCOMERS == 0),
            participants: attempt.participants,
            used: (0..parameters).map(is_used).collect(),
            change: None,
        })
    }

    /// Who accumulated how many steps, the same on all ranks.
    fn explain_accumulation(&self, accumulated: u32) -> Result<Error, Error> {
        let told = self.communicator().exchange(accumulated.to_le_bytes().to_vec())?;
        let count = |bytes: &Vec<u8>| bytes.first_chunk().map_or(0, |it| u32::from_le_bytes(*it));
        let counts: Vec<u32> = told.iter().map(count).collect();
        let votes = |count: u32| counts.iter().filter(|other| **other == count).count();
        // Of equally many the lowest rank's: `max_by_key` takes the last.
        let usual = counts.iter().copied().rev().max_by_key(|count| votes(*count)).unwrap_or(0);
        let others = counts.iter().enumerate().filter(|(_, count)| **count != usual);
        let (mut failed_ranks, mut texts) = (Vec::new(), Vec::new());
        for (rank, count) in others {
            failed_ranks.push(rank);
            texts.push(format!("{count} on rank {rank}"));
        }
        let text = format!(
            "ranks accumulated different numbers of steps before this one: {}, {usual} on the \
             others",
            texts.join(", ")
        );
        let rank = self.communicator().rank();
        Ok(Error::new(ErrorKind::Mismatch, text).on(rank).caused_by(failed_ranks))
    }
}

/// What failed where, the same on all ranks.
pub(super) fn explain(
    communicator: &Communicator,
    kind: ErrorKind,
    mut fault: String,
) -> Result<Error, Error> {
    // What the program says is as long as it likes.
    let longest = fault.len().min(FAULT_BYTES_MAX);
    let end = (0..=longest).rev().find(|at| fault.is_char_boundary(*at));
    fault.truncate(end.unwrap_or(0));
    let faults = communicator.exchange(fault.into_bytes())?;
    let failed = faults.iter().enumerate().filter(|(_, fault)| !fault.is_empty());
    let (mut failed_ranks, mut texts) = (Vec::new(), Vec::new());
    for (rank, fault) in failed {
        failed_ranks.push(rank);
        texts.push(format!("on rank {rank} {}", String::from_utf8_lossy(fault)));
    }
    let text = format!("the step failed on all ranks: {}", texts.join("; "));
    Ok(Error::new(kind, text).on(communicator.rank()).caused_by(failed_ranks))
}

/// How long the votes on so many parameters are.
const fn ballot_bytes(parameters: usize) -> usize {
    USED + parameters.div_ceil(8)
}

/// This rank's own fault; where it has none, the ranks that have one are in another step already.
const fn or_unknown(fault: &str) -> &str {
    if fault.is_empty() { "the ranks that know why have gone on" } else { fault }
}

fn waker_panicked(panic: &Panic) -> String {
    format!("the waker of a step or a bucket panicked: {}", panic.text())
}
