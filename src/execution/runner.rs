//! Runs collectives: numbers them, drives the engine, and turns failures into errors that name
//! the rank, the operation and how far it got.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_kernels::Fold;
use unisum_kernels::ReduceOp;
use unisum_link::{Backoff, Call, LinkError, Pause, Rank, Regions, fork};

use crate::autotuning::selector::AlgorithmSelector;
use crate::collective::Blocks;
use crate::collective::agreement::{Terms, after};
use crate::collective::key::Key;
use crate::collective::reduction::Outcome;
use crate::error::Operation;
use crate::execution::background;
use crate::execution::batch::Scratch;
use crate::execution::failure::{Ended, GRACE};
use crate::execution::membership::Membership;
use crate::execution::prepared::{CachedCall, CallSignature, PreparedCall};
use crate::execution::programs::Programs;
use crate::execution::ticket_lock::TicketLock;
use crate::interrupt;
use crate::{Error, ErrorKind};
use unisum_control::callers::Held;
use unisum_control::{Needed, Verdict};
use unisum_engine::{Advance, Counters, Engine, Tuning};

/// What a caller asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) key: Key,
    pub(crate) fold: Fold,
    pub(crate) regions: Regions,
    /// What else has to be the same on all ranks.
    pub(crate) terms: Terms,
    /// How the call is known when it comes again, if it is.
    pub(crate) known: Option<CachedCall>,
}

/// One communicator's collectives, executed one at a time in the order of their turns.
#[derive(Debug)]
pub(crate) struct Runner {
    timeout: Duration,
    pub(crate) membership: Membership,
    pub(crate) choice: AlgorithmSelector,
    pub(crate) turns: TicketLock<State>,
    pub(crate) counters: Arc<Counters>,
    failed: Ended,
    fork_generation: u32,
}

/// What the collective whose turn it is has to itself.
#[derive(Debug)]
pub(crate) struct State {
    engine: Engine,
    next_number: u64,
    /// The fingerprint of all calls so far.
    history: u64,
    programs: Programs,
    /// The call that was made last.
    last: Option<PreparedCall>,
    pub(crate) scratch: Scratch,
    /// Whether a collective began that did not return.
    inside: bool,
}

/// Why the engine stopped before the end.
#[derive(Debug)]
pub(crate) enum Failure {
    Link(LinkError),
    Verdict(Verdict),
    Deadline,
    /// The thread was asked to give up.
    Interrupted,
}

/// What is known of a call's waiting, in the trial before it as well.
#[derive(Debug, Default)]
pub(crate) struct Wait {
    /// When the call first had to: its deadline counts from there.
    first: Option<Instant>,
    /// When the collective that is under way had to.
    since: Option<Instant>,
    asked: bool,
    /// Since it was asked.
    held: Option<Held>,
}

impl Wait {
    /// Another collective begins, for the same call.
    fn again(&mut self) {
        *self = Self { first: self.first, ..Self::default() };
    }
}

/// How long a rank waits before it asks whether all ranks are in the same call.
pub(crate) const STALL: Duration = Duration::from_secs(3);
/// Longest sleep between two looks at the deadline.
pub(crate) const NAP: Duration = Duration::from_secs(1);

impl State {
    fn new(engine: Engine, programs: Programs) -> Self {
        Self {
            engine,
            next_number: 0,
            history: 0,
            programs,
            last: None,
            scratch: Scratch::default(),
            inside: false,
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        if self.is_forked() {
            return;
        }
        let engine = &mut self.turns.get_mut().engine;
        if self.membership.is_over() {
            // All know, and nobody's call needs anything any more. Those that are lost would be
            // waited for in vain.
            engine.abort();
        } else {
            // Before the membership ends, with which connections stop to reach this rank.
            engine.linger();
        }
    }
}

impl Runner {
    pub(crate) fn new(
        rank: Rank,
        timeout: Duration,
        membership: Membership,
        engine: Engine,
        choice: AlgorithmSelector,
        tuning: Tuning,
    ) -> Self {
        let programs = Programs::new(rank, tuning);
        Self {
            timeout,
            membership,
            choice,
            counters: engine.counters().clone(),
            turns: TicketLock::new(State::new(engine, programs)),
            failed: Ended::default(),
            fork_generation: fork::generation(),
        }
    }

    /// Refuses calls that can't succeed: in a forked child, or after an error.
    #[inline]
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.is_forked() || self.failed.get().is_some() {
            true => Err(self.refusal()),
            false => Ok(()),
        }
    }

    #[cold]
    fn refusal(&self) -> Error {
        let failed = (!self.is_forked()).then(|| self.failed.refusal(Error::repeated)).flatten();
        failed.unwrap_or_else(|| Error::forked().on(self.rank()))
    }

    /// Why calls are refused, if they are; a call itself asks by [`Runner::check`].
    pub(crate) fn failure(&self) -> Option<Error> {
        match self.is_forked() {
            true => Some(Error::forked().on(self.rank())),
            false => self.failed.get().map(Error::repeated),
        }
    }

    /// The job's number of this rank.
    fn rank(&self) -> Rank {
        self.membership.job_rank()
    }

    /// Whether this process is a child of the one that made the communicator.
    pub(crate) fn is_forked(&self) -> bool {
        fork::current() != self.fork_generation
    }

    /// Runs a collective, in its turn, on the calling thread.
    pub(crate) fn run(&self, state: &mut State, request: &Request) -> Result<Outcome, Error> {
        self.enter(state)?;
        let call = self.next_call(state, request);
        state.history = call.history;
        let is_even = matches!(request.key.blocks, Blocks::Even(_));
        if !is_even {
            self.membership.status().set_needs(Needed::Unknown);
        }
        if !request.terms.is_plain() {
            self.membership.status().note(call.history, Arc::new(request.terms.clone()));
        }
        let mut wait = Wait::default();
        let result = match self.ready(state, request, call, &mut wait) {
            Ok((ready, made)) => {
                // Of the collectives that tried algorithms one may have been the call.
                let tried = state.next_number - call.number - u64::from(made.is_some());
                self.membership.status().discount(tried);
                let State { engine, next_number, last, .. } = state;
                let ready = last.insert(ready);
                match made {
                    Some(outcome) => {
                        self.membership.status().end();
                        Ok(outcome)
                    }
                    None => self.make(ready, next_number, engine, &request.regions, &mut wait),
                }
            }
            Err(failure) => self.end(&mut state.engine, call, Err(failure)),
        };
        if !is_even {
            self.membership.status().set_needs(Needed::ByCall);
        }
        state.inside = false;
        result
    }

    /// What is known of a call of this form, if it was made last.
    pub(crate) fn known<'a>(
        &self,
        state: &'a State,
        form: CallSignature,
    ) -> Option<&'a CachedCall> {
        state.last.as_ref()?.again(form, self.choice.fixed())
    }

    /// Makes the call again that was made last, as [`run`](Self::run) would.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn repeat(&self, state: &mut State, regions: &Regions) -> Result<Outcome, Error> {
        self.enter(state)?;
        let State { engine, next_number, history, last, .. } = state;
        let ready = last.as_mut().expect("it was looked at in the same turn");
        *history = after(*history, ready.fingerprint);
        ready.call.history = *history;
        let result = self.make(ready, next_number, engine, regions, &mut Wait::default());
        state.inside = false;
        result
    }

    /// A collective begins, if it may.
    fn enter(&self, state: &mut State) -> Result<(), Error> {
        self.check()?;
        if std::mem::replace(&mut state.inside, true) {
            // A panic inside the engine is a bug after which the state is not to be trusted.
            let text = "a panic in an earlier collective left it undefined";
            return Err(Error::new(ErrorKind::Aborted, text).on(self.rank()));
        }
        Ok(())
    }

    /// Tells all ranks that this one was called with buffers that do not fit, in the call's turn;
    /// the error for the caller.
    pub(crate) fn refuse(&self, state: &mut State, text: &str) -> Error {
        let rank = self.rank();
        let text = format!("rank {rank}: {text}");
        self.end_in_turn(state, |membership| membership.contradict(rank, text))
    }

    /// Tells all ranks that this one has no memory for `what`, in the call's turn; the error for
    /// the caller.
    pub(crate) fn lacks_memory(&self, state: &mut State, what: &str) -> Error {
        self.end_in_turn(state, |membership| membership.lacks(&format!("has no memory for {what}")))
    }

    fn end_in_turn(&self, state: &mut State, tell: impl FnOnce(&Membership) -> Error) -> Error {
        if let Err(error) = self.check() {
            return error;
        }
        state.engine.abort();
        let error = tell(&self.membership).on(self.rank());
        self.failed.by(&error);
        error
    }

    /// Tells all ranks that code of the program panicked on this one: whose it was and what it said
    /// is in `what`. The error for the caller; an earlier one, if there is one, which may be why.
    /// Needs no turn: a call under way is ended by the verdict. Blocks for that, 3 s at most.
    pub(crate) fn panicked(&self, what: &str) -> Error {
        self.end_job(|membership| membership.panicked(what), Ended::by)
    }

    /// The same where no call returns the error: the next one does.
    pub(crate) fn panicked_between_calls(&self, what: &str) -> Error {
        self.end_job(|membership| membership.panicked(what), Ended::between_calls)
    }

    /// Ends the job on all ranks for the program's reasons, as [`Runner::panicked`] does.
    pub(crate) fn abort(&self, why: &str) -> Error {
        self.end_job(|membership| membership.abandoned(why), Ended::by)
    }

    /// The same because this rank lacks something that the system gives.
    pub(crate) fn lacks(&self, what: &str) -> Error {
        self.end_job(|membership| membership.lacks(what), Ended::by)
    }

    fn end_job(&self, tell: impl FnOnce(&Membership) -> Error, ended: fn(&Ended, &Error)) -> Error {
        if self.is_forked() {
            return Error::forked().on(self.rank());
        }
        if let Some(failed) = self.failed.get() {
            return failed.clone();
        }
        let error = tell(&self.membership).on(self.rank());
        // If a call under way was faster, it had its verdict from this report.
        ended(&self.failed, &error);
        error
    }

    /// What the next call says of itself, but for its algorithm.
    fn next_call(&self, state: &State, request: &Request) -> Call {
        let Request { key, fold, terms, .. } = request;
        let call = Call {
            communicator: self.membership.communicator(),
            number: state.next_number,
            collective: key.kind,
            dtype: fold.dtype,
            op: fold.op,
            watched: fold.watch,
            count: key.blocks.told(),
            root: key.root as u16, // worlds have 2^16 ranks at most
            history: 0,
            algorithm: 0,
        };
        Call { history: after(state.history, terms.fingerprint(&call)), ..call }
    }

    /// Gets all ready that a call needs: an algorithm, and its program. With the outcome if trying
    /// algorithms made the call.
    fn ready(
        &self,
        state: &mut State,
        request: &Request,
        call: Call,
        wait: &mut Wait,
    ) -> Result<(PreparedCall, Option<Outcome>), Failure> {
        let State { engine, programs, next_number, .. } = state;
        let mut made = None;
        // Read first: if another is fixed meanwhile, the call is not taken for one by that.
        let fixed = self.choice.fixed();
        let compiled =
            programs.program(&request.key, &self.choice, engine, |programs, engine| {
                let tried = self.try_out(engine, programs, request, call, (next_number, wait))?;
                made = tried.and_then(|tried| tried.made);
                Ok::<_, Failure>(tried.is_some())
            })?;
        // Here, so that making the call again can't fail for that.
        engine.reserve(&compiled.program).map_err(Failure::Link)?;
        let ready = PreparedCall {
            known: request.known.clone(),
            fixed,
            fingerprint: request.terms.fingerprint(&call),
            call: Call { algorithm: compiled.algorithm as u8, ..call },
            fold: self.fold(request),
            program: compiled.program.clone(),
        };
        Ok((ready, made))
    }

    fn make(
        &self,
        ready: &PreparedCall,
        next_number: &mut u64,
        engine: &mut Engine,
        regions: &Regions,
        wait: &mut Wait,
    ) -> Result<Outcome, Error> {
        let call = Call { number: *next_number, ..ready.call };
        *next_number += 1;
        self.membership.status().begin(&call);
        engine.start(&call, ready.fold, regions, &ready.program);
        let result = self.drive(engine, &call, wait);
        self.end(engine, call, result)
    }

    fn end(
        &self,
        engine: &mut Engine,
        call: Call,
        result: Result<(), Failure>,
    ) -> Result<Outcome, Error> {
        let result = match result {
            Ok(()) => Ok(Outcome { nonfinite: engine.found_nonfinite() }),
            // This rank is in the call until all know why it fails.
            Err(failure) => Err(self.fail(engine, call, failure)),
        };
        self.membership.status().end();
        result
    }

    /// How the operands of a request are folded.
    pub(crate) fn fold(&self, Request { fold, .. }: &Request) -> Fold {
        let world = self.choice.topology().world() as u32; // ranks are numbered in 32 bits
        let divides = fold.op == ReduceOp::Average;
        let divide_by = NonZeroU32::new(world).filter(|_| divides);
        Fold { divide_by, ..*fold }
    }

    /// Runs what the engine began, for `call`, whose waiting so far is `wait`.
    pub(crate) fn drive(
        &self,
        engine: &mut Engine,
        call: &Call,
        wait: &mut Wait,
    ) -> Result<(), Failure> {
        self.drive_to_end(engine, call, wait)?;
        // Before the call counts as ended. After a failure this thread is held until all know why.
        wait.held = None;
        Ok(())
    }

    fn drive_to_end(
        &self,
        engine: &mut Engine,
        call: &Call,
        wait: &mut Wait,
    ) -> Result<(), Failure> {
        // Nothing may be missing here of a call that has failed on all others by now.
        if self.membership.is_over()
            && let Some(verdict) = self.membership.verdict()
        {
            return Err(Failure::Verdict(verdict));
        }
        let mut backoff = Backoff::new();
        wait.again();
        loop {
            let advance = engine.advance().map_err(Failure::Link)?;
            if advance == Advance::Done {
                return Ok(());
            }
            let patience = engine.patience();
            if advance == Advance::Moved {
                backoff.reset();
                // It comes back when nothing moves any more. A peer on another core may be there
                // by now; one that shares this core has to get it.
                if patience.pauses > 0 {
                    continue;
                }
            }
            if let Some(verdict) = self.membership.verdict() {
                return Err(Failure::Verdict(verdict));
            }
            match background::pause(&mut backoff, patience) {
                Pause::Again => {}
                Pause::Yielded => engine.yielded(),
                Pause::Park => {
                    self.park(engine, call, wait)?;
                    backoff.reset();
                }
            }
        }
    }

    /// What is left until the deadline of a call that has waited like this.
    pub(crate) fn left(&self, wait: &Wait) -> Duration {
        let waited = wait.first.map_or(Duration::ZERO, |first| first.elapsed());
        self.timeout.saturating_sub(waited)
    }

    /// Sleeps for a while. The deadline counts from the first time a call has to. Who has
    /// waited for some seconds asks, once, whether all ranks are in the same call: calls that
    /// differ may take different ways and then never meet.
    fn park(&self, engine: &mut Engine, call: &Call, wait: &mut Wait) -> Result<(), Failure> {
        let now = Instant::now();
        let since = *wait.since.get_or_insert(now);
        let deadline = *wait.first.get_or_insert(now) + self.timeout;
        if now >= deadline {
            return Err(Failure::Deadline);
        }
        if interrupt::is_asked(now) {
            return Err(Failure::Interrupted);
        }
        if now - since >= STALL && !std::mem::replace(&mut wait.asked, true) {
            wait.held = Some(Held::begin());
            self.membership.stalled(call);
        }
        self.tell_progress(engine);
        engine.park(deadline.min(now + interrupt::nap(NAP))).map_err(Failure::Link)
    }

    /// Says how far the collective is.
    fn tell_progress(&self, engine: &Engine) {
        let (step, steps) = engine.position();
        self.membership.status().step(step, steps, engine.bytes_moved());
    }

    /// Finds out why, tells everybody, and leaves the engine aborted. Only after all know: who sees
    /// a link end before that takes this rank for the cause.
    fn fail(&self, engine: &mut Engine, call: Call, failure: Failure) -> Error {
        self.tell_progress(engine);
        let (step, steps) = engine.position();
        let waiting_for = self.membership.job_ranks(&engine.waiting_for());
        let error = match failure {
            Failure::Verdict(verdict) => self.membership.told(&verdict),
            Failure::Link(error) => self.membership.judge(error.in_words(&call)),
            Failure::Deadline => self.judge_deadline(&call, waiting_for),
            Failure::Interrupted => self.membership.abandoned("a signal ended the call"),
        };
        engine.abort();
        let operation = Operation { call: self.membership.describe(&call), step, steps };
        let error = error.on(self.rank()).during(operation);
        self.failed.by(&error);
        error
    }

    fn judge_deadline(&self, call: &Call, waiting_for: Vec<Rank>) -> Error {
        self.membership.overdue(call);
        if let Some(verdict) = self.membership.await_verdict(Instant::now() + 2 * GRACE) {
            return self.membership.told(&verdict);
        }
        let seconds = self.timeout.as_secs_f64();
        let text = format!("no progress within {seconds} s; waiting for ranks {waiting_for:?}");
        Error::new(ErrorKind::Timeout, text).caused_by(waiting_for)
    }
}
