//! Runs collectives: numbers them, drives the engine, and turns failures into errors that name
//! the rank, the operation and how far it got.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use unisum_link::{
    Backoff, Call, Collective, Dtype, LinkError, LinkErrorKind, Pause, Rank, ReduceOp, Region, fork,
};

use crate::choice::Choice;
use crate::control::{Control, Report, Verdict, VerdictKind};
use crate::engine::program::Tuning;
use crate::engine::{Advance, Engine};
use crate::error::Operation;
use crate::programs::Programs;
use crate::turns::Turns;
use crate::{Error, ErrorKind};

/// What a caller asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) dtype: Dtype,
    pub(crate) op: ReduceOp,
    pub(crate) count: usize,
    pub(crate) region: Region,
}

/// One communicator's collectives, executed one at a time in the order of their turns.
#[derive(Debug)]
pub(crate) struct Runner {
    rank: Rank,
    timeout: Duration,
    control: Control,
    pub(crate) choice: Choice,
    pub(crate) turns: Turns,
    state: Mutex<State>,
    failed: OnceLock<Error>,
    fork_generation: u32,
}

#[derive(Debug)]
struct State {
    engine: Engine,
    next_number: u64,
    programs: Programs,
}

/// Why the engine stopped before the end.
#[derive(Debug)]
enum Failure {
    Link(LinkError),
    Verdict(Verdict),
    Deadline,
}

/// What is known of a collective's waiting.
#[derive(Debug, Default)]
struct Wait {
    since: Option<Instant>,
    asked: bool,
}

/// How long a rank waits before it asks whether all ranks are in the same call.
const STALL: Duration = Duration::from_secs(3);
/// How long a rank waits for the coordinator's verdict before it judges by itself.
const GRACE: Duration = Duration::from_secs(3);
/// Longest sleep between two looks at the deadline.
const NAP: Duration = Duration::from_secs(1);

impl Runner {
    pub(crate) fn new(
        rank: Rank,
        timeout: Duration,
        control: Control,
        engine: Engine,
        choice: Choice,
        tuning: Tuning,
    ) -> Self {
        let programs = Programs::new(rank, tuning);
        Self {
            rank,
            timeout,
            control,
            choice,
            turns: Turns::default(),
            state: Mutex::new(State { engine, next_number: 0, programs }),
            failed: OnceLock::new(),
            fork_generation: fork::generation(),
        }
    }

    /// Refuses calls that can't succeed: in a forked child, or after an error.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_forked() {
            let text = "this process was forked after the communicator was made: only the parent \
                        may use it; make a communicator of its own in the child";
            return Err(Error::new(ErrorKind::Forked, text).on(self.rank));
        }
        self.failed.get().map_or(Ok(()), |error| Err(error.repeated()))
    }

    /// Whether this process is a child of the one that made the communicator.
    pub(crate) fn is_forked(&self) -> bool {
        fork::current() != self.fork_generation
    }

    /// Runs a collective when its turn comes, on the calling thread.
    pub(crate) fn run(&self, turn: u64, request: Request) -> Result<(), Error> {
        let _turn = self.turns.wait(turn);
        self.check()?;
        // A panic inside the engine is a bug after which the state is not to be trusted.
        let mut state = self.state.lock().map_err(|_| self.poisoned())?;
        let call = self.begin(&mut state, request);
        let result = self.drive(&mut state.engine, &call);
        self.control.status().end();
        result.map_err(|failure| self.fail(&mut state.engine, call, failure))
    }

    fn begin(&self, state: &mut State, request: Request) -> Call {
        let Request { dtype, op, count, region } = request;
        let algorithm = self.choice.algorithm(count, dtype);
        let call = Call {
            number: state.next_number,
            collective: Collective::AllReduce,
            dtype,
            op,
            count: count as u64,
            algorithm: algorithm as u32,
        };
        state.next_number += 1;
        let topology = self.choice.topology();
        let program = state.programs.program(&call, algorithm, topology, &mut state.engine);
        self.control.status().begin(&call);
        state.engine.start(call, region, program);
        call
    }

    fn drive(&self, engine: &mut Engine, call: &Call) -> Result<(), Failure> {
        let mut backoff = Backoff::new();
        let mut wait = Wait::default();
        loop {
            match engine.advance().map_err(Failure::Link)? {
                Advance::Done => return Ok(()),
                Advance::Moved => backoff.reset(),
                Advance::Waiting => {
                    if let Some(verdict) = self.control.verdict() {
                        return Err(Failure::Verdict(verdict));
                    }
                    if backoff.pause(engine.patience()) == Pause::Park {
                        self.park(engine, call, &mut wait)?;
                        backoff.reset();
                    }
                }
            }
        }
    }

    /// Sleeps for a while. The deadline counts from the first time a collective has to. Who has
    /// waited for some seconds asks, once, whether all ranks are in the same call: calls that
    /// differ may take different ways and then never meet.
    fn park(&self, engine: &mut Engine, call: &Call, wait: &mut Wait) -> Result<(), Failure> {
        let now = Instant::now();
        let since = *wait.since.get_or_insert(now);
        let deadline = since + self.timeout;
        if now >= deadline {
            return Err(Failure::Deadline);
        }
        if now - since >= STALL && !std::mem::replace(&mut wait.asked, true) {
            self.control.stalled(call);
        }
        let (step, steps) = engine.position();
        self.control.status().step(step, steps, engine.bytes_moved());
        engine.park(deadline.min(now + NAP)).map_err(Failure::Link)
    }

    /// Finds out why, tells everybody, and leaves the engine aborted.
    fn fail(&self, engine: &mut Engine, call: Call, failure: Failure) -> Error {
        let (step, steps) = engine.position();
        let waiting_for = engine.waiting_for();
        engine.abort();
        let error = match failure {
            Failure::Verdict(verdict) => from_verdict(&verdict),
            Failure::Link(error) => self.judge_link(error),
            Failure::Deadline => self.judge_deadline(&call, waiting_for),
        };
        let operation = Operation { call: call.to_string(), step, steps };
        let error = error.on(self.rank).during(operation);
        // The engine runs one collective at a time: nobody else sets it.
        let _ = self.failed.set(error.clone());
        error
    }

    fn judge_link(&self, error: LinkError) -> Error {
        let is_mismatch = matches!(error.kind, LinkErrorKind::Mismatch { .. });
        let text = error.to_string();
        self.control.accuse(Report {
            against: error.peer,
            mismatch: is_mismatch,
            text: text.clone(),
        });
        match self.control.await_verdict(Instant::now() + GRACE) {
            Some(verdict) => from_verdict(&verdict),
            None => {
                let kind = if is_mismatch { ErrorKind::Mismatch } else { ErrorKind::RankLost };
                Error::new(kind, text).caused_by(vec![error.peer])
            }
        }
    }

    fn judge_deadline(&self, call: &Call, waiting_for: Vec<Rank>) -> Error {
        self.control.overdue(call);
        if let Some(verdict) = self.control.await_verdict(Instant::now() + 2 * GRACE) {
            return from_verdict(&verdict);
        }
        let seconds = self.timeout.as_secs_f64();
        let text = format!("no progress within {seconds} s; waiting for ranks {waiting_for:?}");
        Error::new(ErrorKind::Timeout, text).caused_by(waiting_for)
    }

    fn poisoned(&self) -> Error {
        Error::new(ErrorKind::Aborted, "a panic in an earlier collective left it undefined")
            .on(self.rank)
    }

    /// Leaves the job in order. Not for forked children.
    pub(crate) fn leave(&self) {
        self.control.leave();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.engine.abort();
    }
}

fn from_verdict(verdict: &Verdict) -> Error {
    let kind = match verdict.kind {
        VerdictKind::Mismatch | VerdictKind::OtherCall => ErrorKind::Mismatch,
        VerdictKind::Unresponsive | VerdictKind::NotEntered => ErrorKind::Timeout,
        _ => ErrorKind::RankLost,
    };
    Error::new(kind, verdict.text.clone()).caused_by(verdict.culprits.clone())
}
