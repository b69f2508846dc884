//! What can go wrong, as the user sees it.

use std::fmt;

use unisum_link::Rank;

/// Why a call failed, who caused it, and how far the operation got.
///
/// After a failed collective the communicator is aborted: every later call returns an error of
/// kind [`ErrorKind::Aborted`], on every rank. The contents of the buffers of the failed
/// collective are unspecified, and they are the program's again: no rank writes to them any
/// more, and what the program writes there is in no other rank's result.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    rank: Option<Rank>,
    culprits: Vec<Rank>,
    operation: Option<Operation>,
    detail: String,
}

/// The collective that failed and how far it got on this rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Operation {
    pub(crate) call: String,
    pub(crate) step: usize,
    pub(crate) steps: usize,
}

/// The kinds of [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument, an environment variable or a launcher's setting is wrong.
    Configuration,
    /// The job could not be joined: an address, the token, a rank that never came.
    Rendezvous,
    /// A rank's process ended, or its host or network went away.
    RankLost,
    /// The deadline passed: a rank is stopped, too late, too slow, or never called.
    Timeout,
    /// Ranks called different collectives, or the same with different arguments.
    Mismatch,
    /// A training step can't be used, on no rank: a gradient was missing, or marked twice, on a
    /// rank that the text names. The next step can be begun.
    StepFailed,
    /// Code of the program panicked where the library called it: a reduction, a method of a bucket
    /// hook, a buffer's `as_mut`. The text says on which rank, which code, and what the panic said.
    Panicked,
    /// Memory could not be had.
    Memory,
    /// An earlier error aborted the communicator, and the text repeats it; or the program aborted
    /// the job ([`Communicator::abort`](crate::Communicator::abort)).
    Aborted,
    /// The process was forked after the communicator was made: only the parent may use it.
    Forked,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { kind, rank: None, culprits: Vec::new(), operation: None, detail }
    }

    /// The error of whoever uses a communicator in a forked child.
    pub(crate) fn forked() -> Self {
        let text = "this process was forked after the communicator was made: only the parent \
                    may use it; make a communicator of its own in the child";
        Self::new(ErrorKind::Forked, text)
    }

    pub(crate) fn on(self, rank: Rank) -> Self {
        Self { rank: Some(rank), ..self }
    }

    pub(crate) fn caused_by(self, culprits: Vec<Rank>) -> Self {
        Self { culprits, ..self }
    }

    pub(crate) fn during(self, operation: Operation) -> Self {
        Self { operation: Some(operation), ..self }
    }

    /// The same failure, as seen by a call that came after it.
    pub(crate) fn repeated(&self) -> Self {
        self.ending("the communicator was aborted")
    }

    /// The same failure, as seen by a step of gradient buckets that came after it.
    pub(crate) fn repeated_by_buckets(&self) -> Self {
        self.ending("the gradient buckets were ended")
    }

    fn ending(&self, what: &str) -> Self {
        let cause = Self { rank: None, ..self.clone() };
        let detail = format!("{what} by an earlier error: {cause}");
        let culprits = self.culprits.clone();
        Self { rank: self.rank, ..Self::new(ErrorKind::Aborted, detail).caused_by(culprits) }
    }

    /// What kind of error it is.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The ranks that caused it, where that is known: the same on every rank that reports it.
    pub fn culprits(&self) -> &[Rank] {
        &self.culprits
    }

    /// The rank that reports it, where that is known.
    pub const fn rank(&self) -> Option<Rank> {
        self.rank
    }

    /// The collective that failed, as words, if one did.
    pub fn operation(&self) -> Option<&str> {
        self.operation.as_ref().map(|operation| operation.call.as_str())
    }

    /// How many steps of how many the failed collective had done on this rank.
    pub fn step(&self) -> Option<(usize, usize)> {
        self.operation.as_ref().map(|operation| (operation.step, operation.steps))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rank) = self.rank {
            let prefix = format!("rank {rank}: ");
            // What was found on this very rank begins with it.
            if self.operation.is_some() || !self.detail.starts_with(&prefix) {
                f.write_str(&prefix)?;
            }
        }
        if let Some(operation) = &self.operation {
            let Operation { call, step, steps } = operation;
            write!(f, "{call} failed at step {step} of {steps}: ")?;
        }
        f.write_str(&self.detail)
    }
}

/// As [`Display`](fmt::Display): what `main() -> Result<(), Error>` prints is for people.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_is_named_once_before_what_was_found_there() {
        let operation = Operation { call: "barrier 3".into(), step: 1, steps: 4 };
        let failed = Error::new(ErrorKind::RankLost, "rank 0 died").on(1).during(operation);
        assert_eq!(failed.to_string(), "rank 1: barrier 3 failed at step 1 of 4: rank 0 died");
        let fields = (failed.rank(), failed.operation(), failed.step());
        assert_eq!(fields, (Some(1), Some("barrier 3"), Some((1, 4))));
        let found = |rank: Rank| {
            let text = format!("rank {rank}: the buffer has 3 elements");
            Error::new(ErrorKind::Mismatch, text).on(1)
        };
        assert_eq!(found(1).to_string(), "rank 1: the buffer has 3 elements");
        assert_eq!(found(0).to_string(), "rank 1: rank 0: the buffer has 3 elements");
        assert_eq!(found(11).to_string(), "rank 1: rank 11: the buffer has 3 elements");
        let again = Error::new(ErrorKind::RankLost, "rank 0 died").on(1).repeated().to_string();
        assert_eq!(again.matches("rank 1: ").count(), 1, "{again}");
    }
}
