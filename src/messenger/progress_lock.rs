//! How threads share the engine: one of those that wait drives the links, the others sleep.
//!
//! The driver holds the lock, also while it is parked in a link. Three things make it let go:
//!
//! - Its own call is done, or nothing is under way on the links. It then gives up the role and
//!   wakes all sleepers, of which one takes it.
//! - A thread wants to post. It counts itself in `asked`, and if the lock is taken it wakes the
//!   links, and then blocks on the lock. The driver looks at `asked` after each advance, that is
//!   after the last time a link may have swallowed a wake, and before each park; a wake that comes
//!   after that look ends the park. So no wish is overlooked. The driver then waits at the
//!   `turnstile` until everybody whom it saw asking has been in, and for no later ones: nobody
//!   starves.
//! - It has finished calls whose threads sleep: it lets these out in the same way.
//!
//! A failure stops the engine. All calls under way return it, later ones that it happened.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::time::Instant;

use unisum_link::{Backoff, LinkError, LinkErrorKind, Pause, Rank, Wake};

use super::header::Envelope;
use super::message_engine::{CallNumber, Failure, MessageEngine, Posted};
use crate::execution::failure::GRACE;
use crate::execution::membership::Membership;
use crate::execution::runner::{NAP, STALL};
use crate::interrupt;
use crate::{Error, ErrorKind};
use unisum_control::Waiting;
use unisum_control::callers::{self, Held};

/// The engine behind its lock.
pub(super) struct ProgressLock {
    // The links before the membership: they say goodbye before the job is left.
    state: Mutex<State>,
    /// Nothing in a world of one.
    membership: Option<Membership>,
    wakers: Vec<Arc<dyn Wake>>,
    /// How many threads have ever asked to come in.
    asked: AtomicU64,
    /// For threads that wait for their call or for the driver's role.
    changed: Condvar,
    /// For the driver, while it lets others in and out.
    turnstile: Condvar,
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) engine: MessageEngine,
    /// How many threads have ever come in.
    entered: u64,
    is_driven: bool,
    at_turnstile: bool,
    sleepers: usize,
    /// Whether this rank has said that it waits for a message.
    has_told: bool,
    /// When to ask again whether those are there whom it waits for.
    ask_at: Instant,
    /// The message that it has asked about last.
    asked: Option<Waiting>,
    /// The thread of the only call, once it has waited for a while.
    held: Option<Held>,
    failed: Option<Error>,
}

type Guard<'a> = MutexGuard<'a, State>;

impl ProgressLock {
    pub(super) fn new(
        membership: Option<Membership>,
        wakers: Vec<Arc<dyn Wake>>,
        engine: MessageEngine,
    ) -> Self {
        let state = State {
            engine,
            entered: 0,
            is_driven: false,
            at_turnstile: false,
            sleepers: 0,
            has_told: false,
            ask_at: Instant::now(),
            asked: None,
            held: None,
            failed: None,
        };
        Self {
            state: Mutex::new(state),
            membership,
            wakers,
            asked: AtomicU64::new(0),
            changed: Condvar::new(),
            turnstile: Condvar::new(),
        }
    }

    /// Runs a call of so many operations, which `post` starts, until all have ended. After an
    /// error no link touches any memory of it.
    pub(super) fn call(
        &self,
        operations: usize,
        deadline: Instant,
        post: impl FnOnce(&mut MessageEngine, CallNumber) -> Result<(), Failure>,
    ) -> Result<(), Error> {
        callers::calls();
        let mut state = self.enter()?;
        if let Some(error) = &state.failed {
            return Err(error.repeated());
        }
        // What needs nobody else would succeed after the job has ended.
        if self.membership.as_ref().is_some_and(Membership::is_over) {
            self.fail(&mut state, Failure::Verdict);
            self.wake_sleepers(&state);
            return state.failed.clone().map_or(Ok(()), Err);
        }
        let call = state.engine.open(operations, deadline);
        let posted = post(&mut state.engine, call);
        // What needs nobody else is done after one look.
        if let Err(failure) = posted.and_then(|()| state.engine.advance()) {
            self.fail(&mut state, failure);
        }
        self.announce(&state);
        self.wait(state, call)
    }

    fn enter(&self) -> Result<Guard<'_>, Error> {
        // SeqCst: pairs with the load in `let_in`; see the head of this file.
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(_)) => return Err(self.undefined()),
            Err(TryLockError::WouldBlock) => {
                self.wakers.iter().for_each(|waker| waker.wake());
                self.state.lock().map_err(|_| self.undefined())?
            }
        };
        state.entered += 1;
        if state.at_turnstile {
            self.turnstile.notify_one();
        }
        Ok(state)
    }

    fn wait(&self, mut state: Guard<'_>, call: CallNumber) -> Result<(), Error> {
        loop {
            if state.engine.is_done(call) {
                state.engine.close(call);
                // Before the wait counts as ended.
                (state.held, state.asked) = (None, None);
                if state.has_told && state.engine.is_idle() {
                    state.has_told = false;
                    self.membership.iter().for_each(|membership| membership.status().end());
                }
                return Ok(());
            }
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.is_driven || !state.engine.has_transfers() {
                state = self.sleep(state, call)?;
                continue;
            }
            state.is_driven = true;
            let failure;
            (state, failure) = self.drive(state, call)?;
            state.is_driven = false;
            if let Some(failure) = failure {
                self.fail(&mut state, failure);
            }
            self.wake_sleepers(&state);
        }
    }

    /// Sleeps until something about the call, or about the driver, may have changed. Without a
    /// driver this rank waits for a thread of its own, and looks after the time itself.
    fn sleep<'a>(&self, mut state: Guard<'a>, call: CallNumber) -> Result<Guard<'a>, Error> {
        state.sleepers += 1;
        state.engine.falls_asleep(call);
        (state, _) =
            self.changed.wait_timeout(state, interrupt::nap(NAP)).map_err(|_| self.undefined())?;
        state.sleepers -= 1;
        state.engine.wakes_up(call);
        if state.at_turnstile {
            self.turnstile.notify_one();
        }
        let looks_itself = !state.is_driven && !state.engine.is_done(call);
        if looks_itself && let Err(failure) = self.check(&mut state) {
            self.fail(&mut state, failure);
        }
        Ok(state)
    }

    /// Drives the links until the call is done, nothing is under way, or something failed.
    fn drive<'a>(
        &self,
        mut state: Guard<'a>,
        call: CallNumber,
    ) -> Result<(Guard<'a>, Option<Failure>), Error> {
        let mut backoff = Backoff::new();
        loop {
            match state.engine.advance() {
                Ok(true) => backoff.reset(),
                Ok(false) => {}
                Err(failure) => return Ok((state, Some(failure))),
            }
            state = self.let_in(state)?;
            let is_over = state.failed.is_some() || state.engine.is_done(call);
            if is_over || !state.engine.has_transfers() {
                return Ok((state, None));
            }
            if backoff.pause(state.engine.patience()) == Pause::Park {
                if let Err(failure) = self.park(&mut state) {
                    return Ok((state, Some(failure)));
                }
                backoff.reset();
            }
        }
    }

    /// Lets in who has asked by now, and out whose call is done.
    fn let_in<'a>(&self, mut state: Guard<'a>) -> Result<Guard<'a>, Error> {
        // SeqCst: pairs with the addition in `enter`.
        let asked = self.asked.load(Ordering::SeqCst);
        while state.entered < asked || state.engine.finished_asleep > 0 {
            self.announce(&state);
            state.at_turnstile = true;
            (state, _) = self.turnstile.wait_timeout(state, NAP).map_err(|_| self.undefined())?;
            state.at_turnstile = false;
        }
        Ok(state)
    }

    fn park(&self, state: &mut State) -> Result<(), Failure> {
        self.check(state)?;
        self.ask(state);
        // Asked before the last look at the links: what a rank sent before it left has come then.
        let gone = self
            .membership
            .as_ref()
            .and_then(|membership| state.engine.gone(|rank| membership.has_left(rank)));
        if let Some(rank) = gone {
            let moved = state.engine.advance()?;
            return match state.engine.is_unheard(rank) && !moved {
                true => Err(Failure::Link(LinkError::closed(rank))),
                false => Ok(()),
            };
        }
        // SeqCst: as in `let_in`.
        if self.asked.load(Ordering::SeqCst) > state.entered {
            return Ok(());
        }
        let until = Instant::now() + interrupt::nap(NAP);
        let deadline = state.engine.next_deadline().map_or(until, |(deadline, _)| deadline);
        state.engine.park(until.min(deadline))
    }

    /// Asks now and then whether those whom it waits for are still in the communicator, where the
    /// links don't tell.
    fn ask(&self, state: &mut State) {
        let now = Instant::now();
        let Some(membership) = &self.membership else { return };
        if state.ask_at > now {
            return;
        }
        state.ask_at = now + STALL;
        state.engine.awaited_unheard().for_each(|peer| membership.ask_after(peer));
        let next = state.engine.next_deadline();
        let Some(posted) = next.and_then(|(_, call)| state.engine.oldest(call)) else { return };
        let waiting = self.waiting(posted);
        if state.asked.replace(waiting) != Some(waiting) {
            if state.engine.is_of_one() {
                state.held = Some(Held::begin());
            }
            membership.stalled_message(&waiting);
        }
    }

    /// Says what this rank waits for, and looks whether that still makes sense.
    fn check(&self, state: &mut State) -> Result<(), Failure> {
        self.tell(state);
        if self.membership.as_ref().is_some_and(|membership| membership.verdict().is_some()) {
            return Err(Failure::Verdict);
        }
        let now = Instant::now();
        if interrupt::is_asked(now) {
            return Err(Failure::Interrupted);
        }
        match state.engine.next_deadline() {
            Some((deadline, call)) if deadline <= now => Err(Failure::Deadline(call)),
            _ => Ok(()),
        }
    }

    /// Says which message this rank waits for: of the call whose time is up first.
    fn tell(&self, state: &mut State) {
        let Some(membership) = &self.membership else { return };
        let (engine, next) = (&state.engine, state.engine.next_deadline());
        if let Some(posted) = next.and_then(|(_, call)| engine.oldest(call)) {
            membership.status().wait_for_message(&self.waiting(posted));
            state.engine.tell_heard();
            if !std::mem::replace(&mut state.has_told, true) {
                // A wait begins.
                state.ask_at = Instant::now() + STALL;
            }
        }
    }

    fn waiting(&self, posted: &Posted) -> Waiting {
        let Posted { peer, receives, envelope, .. } = *posted;
        let communicator = self.membership.as_ref().map_or(0, Membership::communicator);
        let Envelope { tag, dtype, bytes } = envelope;
        Waiting { communicator, peer: self.in_job(peer), receives, dtype, bytes, tag }
    }

    /// Wakes those whose calls are done.
    fn announce(&self, state: &State) {
        if state.engine.finished_asleep > 0 || state.failed.is_some() {
            self.wake_sleepers(state);
        }
    }

    fn wake_sleepers(&self, state: &State) {
        if state.sleepers > 0 {
            self.changed.notify_all();
        }
    }

    /// Stops the engine, and finds out why.
    fn fail(&self, state: &mut State, failure: Failure) {
        if state.failed.is_some() {
            return;
        }
        // The links only end when all know why: see `Runner::fail`.
        let error = match (failure, &self.membership) {
            (Failure::Link(error), Some(membership)) => {
                // Nobody answers where a rank was that has left.
                let is_unanswered = matches!(
                    error.kind,
                    LinkErrorKind::Unreachable(_)
                        | LinkErrorKind::Unanswered(_)
                        | LinkErrorKind::NotAccepted(_)
                );
                membership.judge(match is_unanswered && membership.has_left(error.peer) {
                    true => LinkError::closed(error.peer),
                    false => error,
                })
            }
            (Failure::Link(error), None) => Error::new(ErrorKind::Aborted, error.to_string()),
            (Failure::Mismatch(peer, ours, theirs), membership) => {
                let (us, them) = (self.job_rank(), self.in_job(peer));
                let text = format!(
                    "rank {us} receives {} bytes of {} with tag {} from rank {them}, which sent \
                     {} bytes of {}",
                    ours.bytes, ours.dtype, ours.tag, theirs.bytes, theirs.dtype
                );
                match membership {
                    Some(membership) => membership.contradict(them, text),
                    None => Error::new(ErrorKind::Mismatch, text).caused_by(vec![them]),
                }
            }
            (Failure::Interrupted, Some(membership)) => {
                membership.abandoned("a signal ended the wait for a message")
            }
            (Failure::Interrupted, None) => {
                Error::new(ErrorKind::Aborted, "a signal ended the wait for a message")
            }
            (Failure::Deadline(call), _) => self.overdue(state.engine.oldest(call)),
            (Failure::Verdict, membership) => {
                let told = |it: &Membership| it.verdict().map(|verdict| it.told(&verdict));
                let error = membership.as_ref().and_then(told);
                error.unwrap_or_else(|| unreachable!("only a verdict fails like this"))
            }
        };
        state.engine.abort();
        state.held = None;
        self.membership.iter().for_each(|membership| membership.status().end());
        state.failed = Some(error.on(self.job_rank()));
    }

    /// Finds out why a message does not end.
    fn overdue(&self, posted: Option<&Posted>) -> Error {
        let Some(posted) = posted else {
            return Error::new(ErrorKind::Timeout, "a call without messages is overdue");
        };
        let waiting = self.waiting(posted);
        let told = self.membership.as_ref().and_then(|membership| {
            membership.overdue_message(&waiting);
            let verdict = membership.await_verdict(Instant::now() + 2 * GRACE)?;
            Some(membership.told(&verdict))
        });
        if let Some(error) = told {
            return error;
        }
        let Waiting { peer, receives, dtype, bytes, tag, .. } = waiting;
        let (what, way) = if receives { ("receive", "from") } else { ("send", "to") };
        let text = format!(
            "the {what} of {bytes} bytes of {dtype} {way} rank {peer} with tag {tag} is overdue"
        );
        Error::new(ErrorKind::Timeout, text).caused_by(vec![peer])
    }

    /// The job's number of this rank.
    pub(super) fn job_rank(&self) -> Rank {
        self.membership.as_ref().map_or(0, Membership::job_rank)
    }

    /// Before it is dropped: once the job is over nobody needs anything any more, and those that
    /// are lost would be waited for in vain.
    pub(super) fn leave(&mut self) {
        if self.membership.as_ref().is_some_and(Membership::is_over) {
            // Whoever panicked there has lost it.
            if let Ok(state) = self.state.get_mut() {
                state.engine.abort();
            }
        }
    }

    fn in_job(&self, rank: Rank) -> Rank {
        self.membership.as_ref().map_or(0, |membership| membership.ranks()[rank])
    }

    /// The error after a panic in the engine, a bug after which its state is not to be trusted.
    /// Nobody drives the links then, so that memory lent to them is not written any more.
    fn undefined(&self) -> Error {
        let text = "a panic in an earlier call left the messenger undefined";
        Error::new(ErrorKind::Aborted, text).on(self.job_rank())
    }
}

impl fmt::Debug for ProgressLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProgressLock").field("membership", &self.membership).finish_non_exhaustive()
    }
}
