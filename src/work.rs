//! The handle of an asynchronous collective.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::Error;

/// A collective under way, which owns its buffer until it ends.
///
/// It is a [`Future`], and [`Work::wait`] blocks. Dropping it does not cancel the collective (the
/// other ranks take part in it); the buffer is freed when it ends.
#[must_use = "the buffer comes back through the work's result"]
pub struct Work<B> {
    shared: Arc<Completion<B>>,
}

/// The other end: where the result is put.
pub(crate) struct Completion<B> {
    state: Mutex<State<B>>,
    ended: Condvar,
}

struct State<B> {
    result: Option<Result<B, Error>>,
    waker: Option<Waker>,
}

impl<B> Completion<B> {
    /// Both ends.
    pub(crate) fn pair() -> (Arc<Self>, Work<B>) {
        let state = Mutex::new(State { result: None, waker: None });
        let shared = Arc::new(Self { state, ended: Condvar::new() });
        (shared.clone(), Work { shared })
    }

    pub(crate) fn end(&self, result: Result<B, Error>) {
        let mut state = self.lock();
        state.result = Some(result);
        let waker = state.waker.take();
        drop(state);
        self.ended.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        // The state is replaced whole: a panic elsewhere leaves it consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> Work<B> {
    /// Blocks until the collective has ended and gives the buffer back.
    ///
    /// # Errors
    /// As the blocking collective; the buffer is then gone.
    ///
    /// # Panics
    /// If the future already gave its result.
    pub fn wait(self) -> Result<B, Error> {
        let mut state = self.shared.lock();
        loop {
            if let Some(result) = state.result.take() {
                return result;
            }
            state = self.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the collective has ended, so that neither waiting nor polling would block.
    pub fn is_ended(&self) -> bool {
        self.shared.lock().result.is_some()
    }
}

impl<B> Future for Work<B> {
    type Output = Result<B, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.shared.lock();
        if let Some(result) = state.result.take() {
            return Poll::Ready(result);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<B> fmt::Debug for Work<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("is_ended", &self.is_ended()).finish()
    }
}
