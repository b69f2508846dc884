//! A step under way: which gradients are ready, which buckets are reduced, how it ended.
//!
//! Threads of the program mark gradients ready, the layer's thread waits for buckets in ascending
//! order. A gradient belongs to whoever viewed it until it is ready, then to the layer's thread,
//! and once the step has ended to the program again.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

use unisum_kernels::Panic;
use unisum_link::{Rank, fork};

use super::elastic::StepChange;
use super::plan::Plan;
use crate::{Error, ErrorKind};

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Reduces gradients.
    Reduce,
    /// Only accumulates them on this rank.
    Accumulate,
    /// Takes part in the others' reductions with nothing of its own.
    Shadow,
}

/// What was put into the buckets since the last reduction: one step, or several that accumulate.
#[derive(Debug)]
pub(super) struct Cycle {
    /// By parameter: whether its gradient holds something of this cycle.
    filled: Box<[AtomicBool]>,
    /// How many steps have accumulated.
    accumulated: AtomicU32,
    /// What went wrong first in a step that accumulates: the reduction can't be used.
    fault: Mutex<Option<String>>,
}

/// How a step ended that all ranks agree has not failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) nonfinite: bool,
    /// Whether all ranks know of a process that asks to be let into the job.
    pub(super) newcomers: bool,
    pub(super) participants: usize,
    /// By parameter: whether any rank put something in.
    pub(super) used: Vec<bool>,
    /// How the view of an elastic job changed meanwhile.
    pub(super) change: Option<StepChange>,
}

/// When something happened to a bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) ready: Option<Instant>,
    pub(super) started: Option<Instant>,
    pub(super) finished: Option<Instant>,
}

pub(super) struct InFlightStep {
    pub(super) plan: Arc<Plan>,
    pub(super) purpose: Purpose,
    pub(super) begun: Instant,
    cycle: Arc<Cycle>,
    /// By parameter: twice how often it was marked ready, plus 1 while it is viewed, or [`READY`].
    marks: Box<[AtomicU32]>,
    /// By bucket: gradients that are not ready.
    pending: Box<[AtomicUsize]>,
    /// Ready gradients in their order.
    order: Box<[AtomicUsize]>,
    ready: AtomicUsize,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// The process whose layer's thread ends it.
    fork_generation: u32,
}

#[derive(Default)]
struct Progress {
    times: Vec<Times>,
    /// What went wrong on this rank first.
    fault: Option<String>,
    /// Whether the program has put in all it will, and told all its faults.
    is_closed: bool,
    end: Option<Result<Outcome, Error>>,
    ended: Option<Instant>,
    wakers: Vec<Waker>,
}

const READY: u32 = u32::MAX;

impl Cycle {
    pub(super) fn new(parameters: usize) -> Arc<Self> {
        let filled = (0..parameters).map(|_| AtomicBool::new(false)).collect();
        Arc::new(Self { filled, accumulated: AtomicU32::new(0), fault: Mutex::default() })
    }

    /// A step accumulates.
    pub(super) fn accumulates(&self) {
        // Relaxed: the order of the step that reduces carries it to the layer's thread.
        self.accumulated.fetch_add(1, Ordering::Relaxed);
    }

    fn fault(&self) -> MutexGuard<'_, Option<String>> {
        // Each critical section is one assignment.
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InFlightStep {
    pub(super) fn new(plan: Arc<Plan>, cycle: Arc<Cycle>, purpose: Purpose) -> Self {
        let buckets = plan.layout.plans();
        let parameters = plan.parameters.len();
        let times = vec![Times::default(); buckets.len()];
        Self {
            purpose,
            begun: Instant::now(),
            cycle,
            marks: (0..parameters).map(|_| AtomicU32::new(0)).collect(),
            pending: buckets.iter().map(|it| AtomicUsize::new(it.parameters.len())).collect(),
            order: (0..parameters).map(|_| AtomicUsize::new(0)).collect(),
            ready: AtomicUsize::new(0),
            progress: Mutex::new(Progress { times, ..Progress::default() }),
            changed: Condvar::new(),
            fork_generation: fork::generation(),
            plan,
        }
    }

    /// Takes a gradient for the caller alone, until [`release`](InFlightStep::release) or
    /// [`mark`](InFlightStep::mark).
    ///
    /// # Errors
    /// If it is ready, or somebody has it.
    pub(super) fn take(&self, parameter: usize) -> Result<(), String> {
        // Acquire: pairs with the Release in `release`: what the last view wrote is seen.
        let taken =
            self.marks[parameter].fetch_update(Ordering::Acquire, Ordering::Relaxed, |marks| {
                (marks & 1 == 0).then(|| marks + 1)
            });
        taken.map(drop).map_err(|marks| self.refuse(parameter, marks))
    }

    fn refuse(&self, parameter: usize, marks: u32) -> String {
        let what = self.plan.describe(parameter);
        match marks {
            READY => format!("{what} was marked ready before"),
            _ => format!("{what} is viewed already"),
        }
    }

    /// Gives a gradient that was taken back, as it is.
    pub(super) fn release(&self, parameter: usize) {
        // Release: pairs with the Acquire in `take`.
        self.marks[parameter].fetch_sub(1, Ordering::Release);
    }

    /// Whether the gradient holds something of this cycle; from here on it does.
    pub(super) fn fill(&self, parameter: usize) -> bool {
        // Relaxed: only who has taken the gradient asks, and `take` orders those.
        self.cycle.filled[parameter].swap(true, Ordering::Relaxed)
    }

    fn is_filled(&self, parameter: usize) -> bool {
        // Relaxed: as in `fill`.
        self.cycle.filled[parameter].load(Ordering::Relaxed)
    }

    /// Marks a gradient that was taken ready, and gives it back.
    pub(super) fn mark(&self, parameter: usize) {
        let uses = self.plan.parameters[parameter].uses() as u32;
        // Relaxed: nobody else changes the marks of a gradient that is taken.
        let marks = self.marks[parameter].load(Ordering::Relaxed) / 2 + 1;
        if marks < uses {
            // Release: pairs with the Acquire in `take`.
            self.marks[parameter].store(2 * marks, Ordering::Release);
            return;
        }
        self.marks[parameter].store(READY, Ordering::Release);
        self.is_ready(parameter);
    }

    fn is_ready(&self, parameter: usize) {
        if self.purpose == Purpose::Accumulate {
            return;
        }
        // Relaxed: the order is read after the step.
        self.order[self.ready.fetch_add(1, Ordering::Relaxed)].store(parameter, Ordering::Relaxed);
        let bucket = self.plan.bucket_of(parameter);
        // AcqRel: whoever marks the last gradient has seen what all others wrote, and passes it on
        // through the lock.
        if self.pending[bucket].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.lock().times[bucket].ready = Some(Instant::now());
            self.changed.notify_all();
        }
    }

    /// The parameters that hold nothing of this cycle, once the program has put in all it will.
    pub(super) fn empty(&self) -> Vec<usize> {
        // Relaxed: the step's owner asks, after all who put anything in.
        let is_ready = |parameter: usize| self.marks[parameter].load(Ordering::Relaxed) == READY;
        let is_empty = |parameter: &usize| !is_ready(*parameter) && !self.is_filled(*parameter);
        (0..self.marks.len()).filter(is_empty).collect()
    }

    /// The program on rank `rank` has put in all it will: what is not ready is, with what it holds
    /// or zeros. From here on the step may end at any time: a fault has to be told before.
    pub(super) fn close(&self, rank: Rank) {
        if self.purpose != Purpose::Accumulate {
            self.close_those(0..self.marks.len());
        }
        self.lock().is_closed = true;
        self.changed.notify_all();
        if self.purpose == Purpose::Accumulate {
            let failed = |fault: String| {
                Err(Error::new(ErrorKind::StepFailed, fault).on(rank).caused_by(vec![rank]))
            };
            let fault = self.lock().fault.clone();
            let end = fault.map_or_else(|| Ok(Outcome::default()), failed);
            // On the program's own thread. A second panic while it unwinds would end the process.
            if let Err(panic) = self.end(end)
                && !std::thread::panicking()
            {
                panic.resume();
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// Blocks until the program can tell no more faults.
    pub(super) fn await_closed(&self) {
        drop(self.wait_while(|progress| !progress.is_closed));
    }

    /// Makes parameters ready that nobody views.
    pub(super) fn close_those(&self, parameters: impl IntoIterator<Item = usize>) {
        for parameter in parameters {
            if self.marks[parameter].swap(READY, Ordering::Acquire) == READY {
                continue;
            }
            if !self.is_filled(parameter) {
                // SAFETY: it was not ready, so the layer's thread does not touch it, and nobody
                // has a view: views borrow the step, which is over.
                unsafe { self.plan.zero(parameter) };
            }
            self.is_ready(parameter);
        }
    }

    /// The parameters in the order in which they became ready.
    pub(super) fn observed_order(&self) -> Vec<usize> {
        // Relaxed: the step is over.
        self.order.iter().map(|parameter| parameter.load(Ordering::Relaxed)).collect()
    }

    /// By parameter: whether this rank put something in.
    pub(super) fn used(&self) -> Vec<bool> {
        (0..self.marks.len()).map(|parameter| self.is_filled(parameter)).collect()
    }

    /// The step can't succeed, or if it accumulates, the reduction of what it accumulates: all
    /// ranks are told when that ends. The first fault counts.
    pub(super) fn fail(&self, fault: String) {
        if self.purpose == Purpose::Accumulate {
            let text = format!("while gradients were accumulated, {fault}");
            self.cycle.fault().get_or_insert(text);
        }
        self.lock().fault.get_or_insert(fault);
    }

    /// What went wrong on this rank, in this step or in one whose gradients it reduces.
    pub(super) fn fault(&self) -> Option<String> {
        let earlier = self.cycle.fault().clone();
        earlier.or_else(|| self.lock().fault.clone())
    }

    /// How many steps have accumulated what this one reduces.
    pub(super) fn accumulated(&self) -> u32 {
        self.cycle.accumulated.load(Ordering::Relaxed)
    }

    /// Blocks until all gradients of a bucket are ready.
    pub(super) fn await_ready(&self, bucket: usize) {
        drop(self.wait_while(|progress| progress.times[bucket].ready.is_none()));
    }

    pub(super) fn started(&self, bucket: usize) {
        self.lock().times[bucket].started = Some(Instant::now());
    }

    /// All buckets are reduced again.
    pub(super) fn starts_again(&self) {
        for times in &mut self.lock().times {
            (times.started, times.finished) = (None, None);
        }
    }

    /// # Errors
    /// If a waker panicked; everybody else was woken.
    pub(super) fn finished(&self, bucket: usize) -> Result<(), Panic> {
        let mut progress = self.lock();
        progress.times[bucket].finished = Some(Instant::now());
        self.wake(progress)
    }

    /// # Errors
    /// As [`InFlightStep::finished`].
    pub(super) fn end(&self, end: Result<Outcome, Error>) -> Result<(), Panic> {
        let mut progress = self.lock();
        progress.end = Some(end);
        progress.ended = Some(Instant::now());
        self.wake(progress)
    }

    fn wake(&self, mut progress: MutexGuard<'_, Progress>) -> Result<(), Panic> {
        let wakers = std::mem::take(&mut progress.wakers);
        drop(progress);
        self.changed.notify_all();
        // Wakers are the program's code: one that panics must not keep another from being woken.
        let wake = |waker: Waker| Panic::catch(|| waker.wake());
        wakers.into_iter().map(wake).fold(Ok(()), Result::and)
    }

    /// How the step ended, if it has; else `waker` is woken at the next news.
    pub(super) fn poll_end(&self, waker: &Waker) -> Option<Result<Outcome, Error>> {
        self.ask(waker, |progress| progress.end.clone())
    }

    /// In a forked child nobody ends it: there is no such thread.
    fn refuse_fork(&self) -> Result<(), Error> {
        match fork::current() == self.fork_generation {
            true => Ok(()),
            false => Err(Error::forked()),
        }
    }

    /// Blocks until the step has ended.
    pub(super) fn await_end(&self) -> Result<Outcome, Error> {
        self.refuse_fork()?;
        let progress = self.wait_while(|progress| progress.end.is_none());
        progress.end.clone().unwrap_or_else(|| unreachable!("waited for"))
    }

    /// Whether a bucket is reduced, or why it never will be; else `waker` is woken at the next
    /// news.
    pub(super) fn poll_reduced(&self, bucket: usize, waker: &Waker) -> Option<Result<(), Error>> {
        self.ask(waker, |progress| progress.reduced(bucket))
    }

    /// What is known; if nothing, `waker` is woken at the next news.
    fn ask<R>(&self, waker: &Waker, known: impl Fn(&Progress) -> Option<R>) -> Option<R> {
        // A waker's methods are the program's code, which is not called under the lock.
        let waker = waker.clone();
        let mut progress = self.lock();
        let known = known(&progress);
        if known.is_none() && !progress.wakers.iter().any(|it| it.will_wake(&waker)) {
            progress.wakers.push(waker);
            return None;
        }
        drop(progress);
        known
    }

    /// Blocks until a bucket is reduced.
    pub(super) fn await_reduced(&self, bucket: usize) -> Result<(), Error> {
        self.refuse_fork()?;
        let progress = self.wait_while(|progress| progress.reduced(bucket).is_none());
        progress.reduced(bucket).unwrap_or_else(|| unreachable!("waited for"))
    }

    pub(super) fn times(&self) -> Vec<Times> {
        self.lock().times.clone()
    }

    pub(super) fn ended(&self) -> Option<Instant> {
        self.lock().ended
    }

    fn wait_while(&self, goes_on: impl Fn(&Progress) -> bool) -> MutexGuard<'_, Progress> {
        let waited = self.changed.wait_while(self.lock(), |progress| goes_on(progress));
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // Each critical section leaves the progress whole.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    fn reduced(&self, bucket: usize) -> Option<Result<(), Error>> {
        match (&self.times[bucket].finished, &self.end) {
            (Some(_), _) | (None, Some(Ok(_))) => Some(Ok(())),
            (None, Some(Err(error))) => Some(Err(error.clone())),
            (None, None) => None,
        }
    }
}
