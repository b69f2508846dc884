//! Interrupting blocking calls, for a host language's Ctrl-C.

use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    static CHECK: Cell<Option<fn() -> bool>> = const { Cell::new(None) };
    /// When the check was last called.
    static LOOKED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Calls `check` about every 100 ms while a collective or a message makes *this* thread wait. If it
/// returns true, the call ends with an error on all ranks, since the others need this one. `None`
/// removes the check.
///
/// For bindings of languages that handle signals outside of signal handlers, such as Python. The
/// check may block, which prolongs the wait, and must not call this library or unwind. Calls that
/// never sleep pay nothing for it.
pub fn set_check(check: Option<fn() -> bool>) {
    CHECK.set(check);
}

/// Whether this thread must give up; calls the check at most once in [`INTERVAL`].
pub(crate) fn is_asked(now: Instant) -> bool {
    let Some(check) = CHECK.get() else { return false };
    if LOOKED.get().is_some_and(|looked| now.saturating_duration_since(looked) < INTERVAL) {
        return false;
    }
    LOOKED.set(Some(now));
    check()
}

/// The longest sleep of a thread that has a check.
pub(crate) fn nap(otherwise: Duration) -> Duration {
    if CHECK.get().is_some() { otherwise.min(INTERVAL) } else { otherwise }
}

const INTERVAL: Duration = Duration::from_millis(100);
