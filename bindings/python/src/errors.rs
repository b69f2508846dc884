//! Errors as Python's exceptions, and signals while a call waits.

use std::cell::RefCell;

use pyo3::prelude::*;
use unisum::{Error, ErrorKind, interrupt};

thread_local! {
    /// What a signal handler raised while this thread waited.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// The exception for an error: `unisum._errors.make` knows the classes.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let kind = match error.kind() {
        ErrorKind::Configuration => "configuration",
        ErrorKind::Rendezvous => "rendezvous",
        ErrorKind::RankLost => "rank_lost",
        ErrorKind::ViewChanged => "view_changed",
        ErrorKind::Protocol => "protocol",
        ErrorKind::Timeout => "timeout",
        ErrorKind::Mismatch => "mismatch",
        ErrorKind::StepFailed => "step_failed",
        ErrorKind::Panicked => "panicked",
        ErrorKind::Memory => "memory",
        ErrorKind::Resources => "resources",
        ErrorKind::Aborted => "aborted",
        ErrorKind::Forked => "forked",
        ErrorKind::Device => "device",
        _ => "other",
    };
    let arguments = (
        kind,
        error.to_string(),
        error.failed_ranks().to_vec(),
        error.operation().map(str::to_owned),
        error.step(),
        error.epoch().map(|epoch| (epoch, error.lost().to_vec(), error.joined().to_vec())),
    );
    let made = py.import("unisum._errors").and_then(|it| it.call_method1("make", arguments));
    made.map_or_else(|failed| failed, PyErr::from_value)
}

/// Runs a call that blocks, without the interpreter, and gives it up if a signal handler raises.
pub(crate) fn block<R: Send>(
    py: Python<'_>,
    call: impl FnOnce() -> Result<R, Error> + Send,
) -> PyResult<R> {
    let result = py.detach(|| {
        // The same for every call of this thread.
        interrupt::set_check(Some(signals_raise));
        call()
    });
    result.map_err(|error| {
        let raised = RAISED.with_borrow_mut(Option::take);
        raised.unwrap_or_else(|| exception(py, &error))
    })
}

/// Runs the handlers of signals that have come; whether one raised.
fn signals_raise() -> bool {
    let raised = Python::try_attach(|py| py.check_signals().err()).flatten();
    let has_raised = raised.is_some();
    RAISED.with_borrow_mut(|kept| *kept = raised);
    has_raised
}
