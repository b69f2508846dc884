//! Asynchronous calls, and who is told that they have ended.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use unisum::{Error, Outcome};

use crate::errors::exception;
use crate::operands::Operands;

/// What a call gives: the operands, to be settled, and what it found.
pub(crate) type Ended = Result<(Vec<Operands>, Outcome), Error>;
pub(crate) type Pending = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// An asynchronous call.
#[pyclass(frozen, name = "Work", module = "unisum._unisum")]
#[derive(Debug)]
pub(crate) struct Work {
    shared: Arc<Shared>,
}

/// What the call's thread and those that wait share.
pub(crate) struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

struct State {
    pending: Option<Pending>,
    result: Option<Result<Outcome, Error>>,
    /// What to put in the queue of completions.
    watchers: Vec<Py<PyAny>>,
    /// The rank that a message came from, where any could send it.
    source: Option<usize>,
}

impl Work {
    pub(crate) fn new(pending: Pending) -> Self {
        let shared = Shared::new(Some(pending));
        shared.advance();
        Self { shared }
    }

    /// A work that ends when [`Shared::end`] is called.
    pub(crate) fn open() -> (Self, Arc<Shared>) {
        let shared = Shared::new(None);
        (Self { shared: shared.clone() }, shared)
    }
}

impl Shared {
    fn new(pending: Option<Pending>) -> Arc<Self> {
        let state = State { pending, result: None, watchers: Vec::new(), source: None };
        Self { state: Mutex::new(state), ended: Condvar::new() }.into()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the program runs under the lock: the state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether the call has ended.
    fn advance(self: &Arc<Self>) {
        let mut state = self.lock();
        let Some(pending) = state.pending.as_mut() else { return };
        let waker = Waker::from(self.clone());
        let Poll::Ready(ended) = pending.as_mut().poll(&mut Context::from_waker(&waker)) else {
            return;
        };
        let pending = state.pending.take();
        drop(state);
        drop(pending);
        self.end(ended);
    }

    /// Says which rank a message comes from.
    pub(crate) fn comes_from(&self, rank: usize) {
        self.lock().source = Some(rank);
    }

    /// Puts results in their places and tells who waits.
    pub(crate) fn end(&self, ended: Ended) {
        let result = ended.map(|(mut operands, outcome)| {
            operands.iter_mut().for_each(Operands::settle);
            outcome
        });
        let mut state = self.lock();
        state.result = Some(result);
        let watchers = std::mem::take(&mut state.watchers);
        drop(state);
        self.ended.notify_all();
        if !watchers.is_empty() {
            COMPLETED.lock().unwrap_or_else(PoisonError::into_inner).extend(watchers);
            HAS_COMPLETED.notify_one();
        }
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.advance();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// How long a wait leaves signals unheard.
const SIGNALS: Duration = Duration::from_millis(100);

#[pymethods]
impl Work {
    /// Waits until the call has ended, or `timeout` seconds: whether it has. Raises what it failed
    /// with.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let has_ended = py.detach(|| {
                let nap = until.map_or(SIGNALS, |until| {
                    SIGNALS.min(until.saturating_duration_since(Instant::now()))
                });
                let state = self.shared.lock();
                let waits = |state: &mut State| state.result.is_none();
                let waited = self.shared.ended.wait_timeout_while(state, nap, waits);
                let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                state.result.is_some()
            });
            if has_ended {
                return self.failure(py).map_or(Ok(true), Err);
            }
            py.check_signals()?;
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(false);
            }
        }
    }

    /// Whether the call has ended, well or not.
    fn done(&self) -> bool {
        self.shared.lock().result.is_some()
    }

    /// Whether the result has an infinity or a NaN, if that was asked for.
    #[getter]
    fn nonfinite(&self) -> bool {
        matches!(self.shared.lock().result, Some(Ok(outcome)) if outcome.nonfinite)
    }

    /// The rank that a message has come from, of a receive from any rank.
    #[getter]
    fn source(&self) -> Option<usize> {
        self.shared.lock().source
    }

    /// The exception that the call failed with, if it has.
    fn exception(&self, py: Python<'_>) -> Option<PyErr> {
        self.failure(py)
    }

    /// Has `watcher` put in the queue of completions when the call ends. False if it has ended.
    fn watch(&self, watcher: Py<PyAny>) -> bool {
        let mut state = self.shared.lock();
        let waits = state.result.is_none();
        if waits {
            state.watchers.push(watcher);
        }
        waits
    }
}

impl Work {
    fn failure(&self, py: Python<'_>) -> Option<PyErr> {
        let error = match &self.shared.lock().result {
            Some(Err(error)) => error.clone(),
            _ => return None,
        };
        Some(exception(py, &error))
    }
}

/// Watchers of calls that have ended. A queue, so that the threads that make progress never wait
/// for the interpreter.
static COMPLETED: Mutex<VecDeque<Py<PyAny>>> = Mutex::new(VecDeque::new());
static HAS_COMPLETED: Condvar = Condvar::new();

/// The next watcher whose call has ended; blocks until there is one, at most `timeout` seconds.
#[pyfunction]
pub(crate) fn next_completed(py: Python<'_>, timeout: f64) -> Option<Py<PyAny>> {
    let timeout = Duration::try_from_secs_f64(timeout).unwrap_or(SIGNALS);
    py.detach(|| {
        let queue = COMPLETED.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = HAS_COMPLETED.wait_timeout_while(queue, timeout, |queue| queue.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.pop_front()
    })
}
