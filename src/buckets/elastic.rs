//! Steps of an elastic job: those that are left when the view changes end the step that it
//! interrupted, all in the same way.
//!
//! The vote at the end of a step is the first half of a two-phase commit: it passes only once every
//! rank has the averages of all buckets. As ranks enter the next view, each tells which step it is
//! in and which vote it saw last ([`Standing`]). If any of them saw this step's vote, the step ends
//! as that says, on all ranks; otherwise it is made again. For that, each bucket is copied before
//! it is reduced: one more memory of the gradients' size.
//!
//! Steps of sharded buckets are not made again: ranks have other shards in the next view. They end
//! in the same way on all ranks all the same, and the program builds its buckets anew.
//!
//! Source of the rule: Gray, "Notes on data base operating systems", 1978.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unisum_link::Rank;

use super::builder;
use super::flight::InFlightStep;
use super::hook::panicked_in;
use super::plan::Plan;
use super::worker::Core;
use crate::communicator::elastic::Entered;
use crate::communicator::groups::Making;
use crate::wiring::{Decided, Epoch, Position, Standing, StepVerdict, identities};
use crate::{Communicator, Error, ErrorKind, View};

/// How the view of an elastic job changed during a step, which all ranks that are left have ended
/// in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepChange {
    /// The view in which the step ended. [`Buckets::take_communicator`] gives its communicator.
    ///
    /// [`Buckets::take_communicator`]: super::Buckets::take_communicator
    pub view: View,
    /// The ranks that were lost, as they were numbered when the step began.
    pub lost: Vec<Rank>,
    /// Whether the buckets were reduced again, by the ranks of the view; otherwise, they hold the
    /// averages over the ranks that there were before.
    pub redone: bool,
    /// From when this rank noticed the first loss until it was in the view, with its own part of
    /// the agreement and of joining.
    pub took: Duration,
}

/// What outlives a view.
#[derive(Debug)]
pub(super) struct Continuity {
    /// The number of the layer in its job.
    layer: AtomicU64,
    /// The parameters and settings, in words, for newcomers to be compared with.
    signature: String,
    epoch: Mutex<Epoch>,
    /// The communicator of the view, until the program takes it.
    communicator: Mutex<Option<Communicator>>,
    /// By bucket, this rank's gradients as they were before they were reduced. The layer's thread
    /// has them.
    kept: Mutex<Vec<Vec<u8>>>,
    /// Whether shards die with their ranks: steps end in the same way on all that are left, but
    /// are not made again.
    is_sharded: bool,
}

/// How far a step is, through all views.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    /// The index of the step.
    pub(super) step: u64,
    pub(super) participants: usize,
    /// So many buckets, from the first on, were kept.
    kept: usize,
    /// The votes of all ranks.
    pub(super) ballot: Option<Vec<u8>>,
    /// Whether others have gone on already: there is nobody left to talk to about this step.
    pub(super) is_passed: bool,
    /// Whether the hook was told how the step ended; why it panicked then.
    pub(super) settled: Option<Option<String>>,
    pub(super) change: Option<StepChange>,
    /// The view in which the step began.
    began_in: Option<View>,
    /// The processes of the view in which it was tried last.
    pub(super) voters: Vec<u64>,
}

impl Continuity {
    /// For gradients of a communicator whose view is `epoch`. `None` if the job has such a layer.
    pub(super) fn new(epoch: &Epoch, is_sharded: bool) -> Option<Self> {
        let layer = epoch.lineage.claim()?;
        let (layer, signature) = (AtomicU64::new(layer), String::new());
        let (communicator, kept) = (Mutex::default(), Mutex::default());
        let epoch = Mutex::new(epoch.clone());
        Some(Self { layer, signature, epoch, communicator, kept, is_sharded })
    }

    /// For the parameters and settings that `signature` describes.
    pub(super) fn with_signature(mut self, signature: String) -> Self {
        self.signature = signature;
        self
    }

    fn layer(&self) -> u64 {
        // Relaxed: changed between steps, whose beginning orders it.
        self.layer.load(Ordering::Relaxed)
    }

    /// Makes room for a copy of all buckets.
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn reserve(&self, plan: &Plan) -> Result<(), Error> {
        if self.is_sharded {
            return Ok(());
        }
        let room = |bytes: usize| {
            let mut room = Vec::new();
            room.try_reserve_exact(bytes).map_err(|error| {
                let text = format!("a copy of {bytes} bytes of gradients: {error}");
                Error::new(ErrorKind::Memory, text)
            })?;
            // Writing it makes the system give the memory.
            room.resize(bytes, 0);
            Ok(room)
        };
        *lock(&self.kept) = plan.bucket_sizes().map(room).collect::<Result<_, Error>>()?;
        Ok(())
    }

    /// Whether the layer goes on in the next view: not once the program has left it.
    pub(super) fn goes_on(&self) -> bool {
        self.epoch().lineage.has(self.layer())
    }

    pub(super) fn epoch(&self) -> Epoch {
        lock(&self.epoch).clone()
    }

    pub(super) fn view(&self) -> View {
        let Epoch { view, .. } = self.epoch();
        View { epoch: view.epoch, processes: identities(&view) }
    }

    pub(super) fn take_communicator(&self) -> Option<Communicator> {
        lock(&self.communicator).take()
    }

    /// This rank saw a step decided.
    fn decide(&self, step: u64, ballot: &[u8]) {
        let decided = Decided { step, ballot: ballot.to_vec() };
        self.epoch().lineage.decide(self.layer(), decided);
    }
}

impl Core {
    /// Goes on in the next view, with the processes that enter it.
    ///
    /// # Errors
    /// As [`Buckets::admit`](super::Buckets::admit).
    pub(super) fn admit(&self) -> Result<Communicator, Error> {
        let rank = self.communicator().rank();
        let Some(continuity) = self.continuity.as_ref().filter(|it| !it.is_sharded) else {
            let text = "newcomers enter buckets of an elastic job only, and no sharded ones";
            return Err(Error::new(ErrorKind::Configuration, text).on(rank));
        };
        if continuity.epoch().await_repeated_newcomers().map_err(|error| error.on(rank))? {
            self.communicator().barrier()?;
        }
        continuity.epoch().admit();
        loop {
            let epoch = continuity.epoch();
            // All meet in the program.
            epoch.lineage.release(None);
            let entered = epoch.enter_next(Position::Program).and_then(Entered::in_program);
            let communicator = entered.map_err(|error| error.on(rank))?;
            if let Some(epoch) = communicator.epoch() {
                *lock(&continuity.epoch) = epoch.clone();
            }
            match self.welcome(continuity, &communicator) {
                Ok(()) => {
                    *lock(&continuity.communicator) = None;
                    return Ok(communicator);
                }
                Err(error) if error.kind() == ErrorKind::ViewChanged => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes part as newcomers build their layers, and goes on on a communicator with them.
    fn welcome(&self, continuity: &Continuity, communicator: &Communicator) -> Result<(), Error> {
        let own = communicator.duplicate_for(&Making::Buckets)?;
        let common = self.with_hook(|hook| hook.save_common());
        let common = common.map_err(|panic| self.panicked(&panicked_in("save_common", &panic)))?;
        let known = (self.steps(), &common[..]);
        self.set_steps(builder::welcome(&own, &continuity.signature, known)?);
        self.move_to(own);
        if let Some(layer) = continuity.epoch().lineage.claim() {
            // Relaxed: changed between steps, whose beginning orders it.
            continuity.layer.store(layer, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for Continuity {
    fn drop(&mut self) {
        self.epoch().lineage.release(Some(self.layer()));
    }
}

impl Attempt {
    pub(super) fn new(core: &Core) -> Self {
        let began_in = core.continuity.as_ref().map(Continuity::view);
        Self { step: core.steps(), began_in, ..Self::default() }
    }
}

impl Core {
    /// Whether a step that failed this way goes on in the next view.
    pub(super) fn outlives(&self, error: &Error) -> bool {
        error.kind() == ErrorKind::ViewChanged
            && !self.has_ended()
            && self.continuity.as_ref().is_some_and(Continuity::goes_on)
    }

    /// Keeps a bucket that is about to be reduced, in an elastic job.
    pub(super) fn keep(&self, plan: &Plan, bucket: usize, attempt: &mut Attempt) {
        let keeps = |it: &&Continuity| !it.is_sharded && bucket >= attempt.kept;
        let Some(continuity) = self.continuity.as_ref().filter(keeps) else { return };
        // SAFETY: its gradients are ready, so the bucket is this thread's, which only reads it.
        let gradients = unsafe { plan.bytes(bucket) };
        lock(&continuity.kept)[bucket].copy_from_slice(gradients);
        attempt.kept = bucket + 1;
    }

    /// The votes of all ranks are known.
    pub(super) fn decide(&self, attempt: &mut Attempt, ballot: Vec<u8>) {
        if let Some(continuity) = &self.continuity {
            continuity.decide(attempt.step, &ballot);
        }
        attempt.ballot = Some(ballot);
        self.count_step();
    }

    /// Enters the next view with the others that are left, and takes the step there: to its end, if
    /// one of them saw that all had voted, else to its beginning.
    ///
    /// # Errors
    /// `cause`, if others are not in a step: the program has to go on from there. As
    /// [`Communicator::rebuild`].
    pub(super) fn recover(
        &self,
        flight: &InFlightStep,
        attempt: &mut Attempt,
        cause: Error,
    ) -> Result<(), Error> {
        let Some(continuity) = &self.continuity else { return Err(cause) };
        let rank = self.communicator().rank();
        let noticed = cause.noticed().unwrap_or_else(Instant::now);
        loop {
            let entered = continuity.epoch().enter_next(Position::Step(attempt.step));
            let Entered { communicator, epoch, standings } =
                entered.map_err(|error| error.on(rank))?;
            *lock(&continuity.epoch) = epoch.clone();
            let verdict = Standing::judge(&standings, attempt.step);
            let is_redone = verdict == StepVerdict::Redone;
            if let StepVerdict::Commits { ballot, is_passed } = verdict {
                attempt.is_passed |= is_passed;
                if attempt.ballot.is_none() {
                    self.decide(attempt, ballot);
                }
            }
            if continuity.is_sharded || !Standing::are_together(&standings) {
                // All meet again in the program. Shards of the next view are others than this
                // step's: it is not made again, but ends in the same way on all ranks.
                epoch.lineage.release(Some(continuity.layer()));
                epoch.change(&[]);
                return if is_redone { Err(cause) } else { Ok(()) };
            }
            match communicator.duplicate_for(&Making::Buckets) {
                Ok(own) => self.move_to(own),
                Err(error) if self.outlives(&error) => continue,
                Err(error) => return Err(error),
            }
            *lock(&continuity.communicator) = Some(communicator);
            if is_redone {
                self.undo(flight, attempt);
            }
            attempt.changed(continuity.view(), is_redone, noticed.elapsed());
            return Ok(());
        }
    }

    /// All buckets hold this rank's gradients again.
    fn undo(&self, flight: &InFlightStep, attempt: &Attempt) {
        let Some(continuity) = &self.continuity else { return };
        for (bucket, kept) in lock(&continuity.kept)[..attempt.kept].iter().enumerate() {
            // SAFETY: it was reduced, or was to be: it is this thread's until the step ends.
            unsafe { flight.plan.bytes_mut(bucket) }.copy_from_slice(kept);
        }
        flight.starts_again();
    }
}

impl Attempt {
    fn changed(&mut self, view: View, redone: bool, took: Duration) {
        let before = self.began_in.iter().flat_map(|view| view.processes.iter().enumerate());
        let lost = before.filter(|(_, process)| !view.processes.contains(process));
        let lost = lost.map(|(rank, _)| rank).collect();
        let earlier = self.change.take();
        let redone = redone || earlier.as_ref().is_some_and(|it| it.redone);
        let took = took + earlier.map_or(Duration::ZERO, |it| it.took);
        self.change = Some(StepChange { view, lost, redone, took });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves what it guards whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
