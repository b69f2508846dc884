//! A step under way: which gradients are ready, and when in their streams; how it ended.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use unisum_link::fork;

use crate::Error;
use crate::buckets::layout::Layout;
use crate::buckets::parameter::Parameter;
use crate::device::Moment;

#[derive(Debug)]
pub(super) struct Flight {
    state: Mutex<State>,
    changed: Condvar,
    /// The process whose layer's thread ends it.
    fork_generation: u32,
}

#[derive(Debug)]
struct State {
    /// By parameter, how many more times it has to be marked.
    marks: Vec<usize>,
    /// By bucket, how many of its parameters are not ready.
    open: Vec<usize>,
    /// By bucket, the moments in the program's streams from which on gradients are ready.
    moments: Vec<Vec<Moment>>,
    fault: Option<String>,
    /// Whether the program has handed it in.
    is_closed: bool,
    end: Option<Result<(), Error>>,
    /// Whether a stream of the program's waits for its averages.
    is_followed: bool,
}

impl Flight {
    pub(super) fn new(parameters: &[Parameter], layout: &Layout) -> Self {
        let open: Vec<usize> = layout.buckets().map(<[usize]>::len).collect();
        let moments = open.iter().map(|_| Vec::new()).collect();
        let marks = parameters.iter().map(Parameter::uses).collect();
        let (fault, end) = (None, None);
        let state =
            State { marks, open, moments, fault, is_closed: false, end, is_followed: false };
        let fork_generation = fork::generation();
        Self { state: state.into(), changed: Condvar::new(), fork_generation }
    }

    /// The gradient is ready, or is once it was marked as often as it is used, when the stream has
    /// come to `moment`.
    ///
    /// # Errors
    /// In words if it was ready already.
    pub(super) fn mark(
        &self,
        parameter: usize,
        bucket: usize,
        moment: Moment,
    ) -> Result<(), String> {
        let mut state = self.lock();
        if state.is_closed {
            return Err("was marked ready after the step had ended".into());
        }
        if state.marks[parameter] == 0 {
            return Err("was marked ready once more".into());
        }
        state.marks[parameter] -= 1;
        state.moments[bucket].push(moment);
        if state.marks[parameter] == 0 {
            state.open[bucket] -= 1;
            if state.open[bucket] == 0 {
                self.changed.notify_all();
            }
        }
        Ok(())
    }

    /// The step fails, on all ranks; the first fault counts.
    pub(super) fn fail(&self, fault: String) {
        self.lock().fault.get_or_insert(fault);
    }

    /// Parameters that were not marked as often as they are used.
    pub(super) fn missing(&self) -> Vec<usize> {
        let state = self.lock();
        let missing = state.marks.iter().enumerate().filter(|(_, marks)| **marks > 0);
        missing.map(|(parameter, _)| parameter).collect()
    }

    /// Hands it in, unless that was done before; then for a fault, if there is one.
    pub(super) fn close(&self, fault: impl FnOnce() -> Option<String>) {
        let mut state = self.lock();
        if state.is_closed {
            return;
        }
        state.is_closed = true;
        if let Some(fault) = fault() {
            state.fault.get_or_insert(fault);
        }
        self.changed.notify_all();
    }

    /// Waits until a bucket can be reduced: all of its gradients are ready, or none will be any
    /// more. The moments to wait for in its stream.
    pub(super) fn await_bucket(&self, bucket: usize) -> Vec<Moment> {
        let mut state = self.await_until(|state| state.open[bucket] == 0 || state.is_closed);
        std::mem::take(&mut state.moments[bucket])
    }

    /// Waits until the program has handed it in; its fault, if it has one.
    pub(super) fn await_close(&self) -> Option<String> {
        self.await_until(|state| state.is_closed).fault.clone()
    }

    pub(super) fn end(&self, how: Result<(), Error>) {
        self.lock().end = Some(how);
        self.changed.notify_all();
    }

    /// Waits until it has ended on all ranks.
    ///
    /// # Errors
    /// If it has failed; in a forked child, where there is no thread that could end it.
    pub(super) fn await_end(&self) -> Result<(), Error> {
        if fork::current() != self.fork_generation {
            return Err(Error::forked());
        }
        let state = self.await_until(|state| state.end.is_some());
        state.end.clone().expect("awaited just above")
    }

    /// A stream of the program's waits for its averages from now on.
    pub(super) fn followed(&self) {
        self.lock().is_followed = true;
    }

    pub(super) fn is_followed(&self) -> bool {
        self.lock().is_followed
    }

    fn await_until(&self, is_so: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_while(self.lock(), |state| !is_so(state));
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
