//! The handle of an asynchronous collective.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::execution::callbacks::Callbacks;
use crate::execution::runner::STALL;
use crate::{Error, ErrorKind};
use unisum_control::callers::{self, Held};

/// A collective under way, which owns its buffers until it ends.
///
/// It is a [`Future`], and [`Work::wait`] blocks. Dropping it does not cancel the collective,
/// because the other ranks take part in it; the buffers are freed when it ends.
///
/// The result is returned once, to the first call that polls or waits. Polling or waiting again is
/// an immediate error of kind [`ErrorKind::Configuration`].
#[must_use = "the buffer comes back through the work's result"]
pub struct Work<B> {
    shared: Arc<Completion<B>>,
}

/// The other end: where the result is put. If it is dropped before, the work ends with an error.
pub(crate) struct Promise<B>(Option<Arc<Completion<B>>>);

struct Completion<B> {
    state: Mutex<State<B>>,
    ended: Condvar,
}

struct State<B> {
    result: Option<Result<B, Error>>,
    has_ended: bool,
    /// The thread that waits for it, once it has for a while.
    held: Option<Held>,
    waker: Option<Waker>,
    /// What is to be called at the end, and by which thread.
    callbacks: Vec<(Callbacks, Box<dyn FnOnce() + Send>)>,
}

impl<B> Promise<B> {
    /// Both ends.
    pub(crate) fn pair() -> (Self, Work<B>) {
        let state = Mutex::new(State {
            result: None,
            has_ended: false,
            held: None,
            waker: None,
            callbacks: Vec::new(),
        });
        let shared = Arc::new(Completion { state, ended: Condvar::new() });
        (Self(Some(shared.clone())), Work { shared })
    }

    /// Puts the result there. If the waker panics, that comes last.
    pub(crate) fn end(mut self, result: Result<B, Error>) {
        if let Some(shared) = self.0.take() {
            shared.end(result);
        }
    }
}

impl<B> Drop for Promise<B> {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.end(Err(Error::new(ErrorKind::Aborted, "a panic ended the collective")));
        }
    }
}

impl<B> Completion<B> {
    fn end(&self, result: Result<B, Error>) {
        let mut state = self.lock();
        state.held = None;
        state.result = Some(result);
        state.has_ended = true;
        let waker = state.waker.take();
        let callbacks = std::mem::take(&mut state.callbacks);
        drop(state);
        self.ended.notify_all();
        callbacks.into_iter().for_each(|(thread, callback)| thread.run(callback));
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        // No code of the program runs under the lock: the state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> State<B> {
    /// The result, if the collective has ended; an error if it was given before.
    fn take(&mut self) -> Option<Result<B, Error>> {
        let taken = || {
            let text = "this work gave its result before: it was polled or waited for again";
            Err(Error::new(ErrorKind::Configuration, text))
        };
        self.has_ended.then(|| self.result.take().unwrap_or_else(taken))
    }
}

impl<B> Work<B> {
    /// Blocks until the collective has ended, and returns the buffers.
    ///
    /// # Errors
    /// As the blocking collective; the buffers are then gone. [`ErrorKind::Configuration`] if the
    /// result was already returned to a poll of the future.
    pub fn wait(self) -> Result<B, Error> {
        callers::calls();
        let mut state = self.shared.lock();
        loop {
            if let Some(result) = state.take() {
                return result;
            }
            let waited;
            let wait = self.shared.ended.wait_timeout(state, STALL);
            (state, waited) = wait.unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() && !state.has_ended && state.held.is_none() {
                state.held = Some(Held::begin());
            }
        }
    }

    /// Blocks until the collective has ended or the time is up, and returns the result, or `None`
    /// if the collective is still under way. A time-out does not affect the collective: wait again,
    /// poll, or drop it.
    ///
    /// # Errors
    /// As [`Work::wait`].
    pub fn wait_timeout(&mut self, timeout: Duration) -> Option<Result<B, Error>> {
        let until = Instant::now().checked_add(timeout);
        let mut state = self.shared.lock();
        loop {
            if let Some(result) = state.take() {
                return Some(result);
            }
            let left =
                until.map_or(Duration::MAX, |it| it.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            let waited = self.shared.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Calls `callback` when the collective has ended, successfully or not; at once if it already
    /// has. The result stays with the work.
    ///
    /// A dedicated thread calls all callbacks of the process, one after another; it is never a
    /// thread that makes progress, nor the one that calls this. A callback may wait for
    /// collectives, but other callbacks wait behind it. A panic is caught and logged as a warning.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if no thread can be started; the callback is then dropped.
    pub fn on_end(&self, callback: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = Callbacks::of_process()?;
        let mut state = self.shared.lock();
        if state.has_ended {
            drop(state);
            thread.run(Box::new(callback));
        } else {
            state.callbacks.push((thread, Box::new(callback)));
        }
        Ok(())
    }

    /// Whether the collective has ended, so that neither waiting nor polling would block.
    pub fn is_ended(&self) -> bool {
        self.shared.lock().has_ended
    }
}

impl<B> Future for Work<B> {
    type Output = Result<B, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // A waker's methods, its destructor among them, are the program's code, which is not
        // called under the lock.
        let waker = context.waker().clone();
        let mut state = self.shared.lock();
        if let Some(result) = state.take() {
            drop(state);
            return Poll::Ready(result);
        }
        let earlier = state.waker.replace(waker);
        drop(state);
        drop(earlier);
        Poll::Pending
    }
}

impl<B> fmt::Debug for Work<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("is_ended", &self.is_ended()).finish()
    }
}
