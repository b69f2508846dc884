//! Errors, as users see them.

use std::fmt;
use std::time::Instant;

use unisum_control::Calls;
use unisum_kernels::{Dtype, ReduceOp};
use unisum_link::{Call, Cause, Rank};

/// Why a call failed, who caused it, and how far the operation got.
///
/// After a failed collective, the communicator is aborted: every later call returns an error of
/// kind [`ErrorKind::Aborted`], on every rank. The contents of the failed collective's buffers are
/// unspecified. The buffers are the program's again: no rank writes to them any more, and what the
/// program writes to them reaches no other rank's result.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    rank: Option<Rank>,
    failed_ranks: Vec<Rank>,
    operation: Option<Operation>,
    details: Option<Box<Details>>,
    detail: String,
}

/// What only few errors have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Details {
    change: Option<ViewChange>,
    calls: Option<[MismatchedCall; 2]>,
    cause: Option<Cause>,
    is_absence: bool,
}

/// What a rank called that another one should have called as well, see
/// [`Error::mismatched_calls`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MismatchedCall {
    /// The rank, by its number in the job.
    pub rank: Rank,
    /// The collective's name, as on the command line of the benchmark: `all_reduce`, for example.
    pub collective: &'static str,
    /// The element type.
    pub dtype: Dtype,
    /// The reduction, if elements are reduced.
    pub op: Option<ReduceOp>,
    /// The number of elements: of one block, or of all blocks where they differ. `None` where each
    /// two ranks have their own.
    pub count: Option<u64>,
    /// The root, by its number in the communicator, if there is one.
    pub root: Option<Rank>,
}

impl MismatchedCall {
    fn new((rank, call): (Rank, Call)) -> Self {
        let Call { collective, dtype, op, count, root, .. } = call;
        Self {
            rank,
            collective: collective.name(),
            dtype,
            op: collective.reduces().then_some(op),
            count: (count != Call::COUNT_BY_PAIR).then_some(count),
            root: collective.has_root().then_some(root as Rank),
        }
    }
}

/// How an elastic job goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ViewChange {
    pub(crate) epoch: u64,
    pub(crate) lost: Vec<Rank>,
    pub(crate) joined: Vec<Rank>,
    /// When this rank noticed that the view changes.
    pub(crate) noticed: Instant,
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
    /// What came from a rank makes no sense: a bug of unisum, or bytes that were altered on their
    /// way. Ranks that run different versions are refused as they join, with
    /// [`ErrorKind::Rendezvous`].
    Protocol,
    /// The deadline passed: a rank is stopped, too late, too slow, or never called.
    Timeout,
    /// Ranks called different collectives, or the same with different arguments.
    Mismatch,
    /// A training step cannot be used on any rank: a gradient was missing or marked ready twice, on
    /// a rank that the text names. The next step may begin.
    StepFailed,
    /// User code panicked in a call of the library: a reduction, a method of a bucket hook, a
    /// buffer's `as_mut`. The text states the rank, the code, and the panic message.
    Panicked,
    /// Memory could not be allocated.
    Memory,
    /// A rank ran out of file descriptors, threads or memory: during a call, or at the start, for
    /// the transport that was asked for. The text states the rank and the resource, on all ranks.
    Resources,
    /// An earlier error, which the text repeats, aborted the communicator; or the program aborted
    /// the job ([`Communicator::abort`](crate::Communicator::abort)).
    Aborted,
    /// An elastic job has lost ranks, or others have joined it, and goes on in another view: the
    /// error says in which epoch, and [`Communicator::rebuild`](crate::Communicator::rebuild) gives
    /// its communicator. Later calls on the old one return the same error. A group of some of the
    /// ranks gets it only if one of its own is lost.
    ViewChanged,
    /// The process was forked after the communicator was made: only the parent may use it.
    Forked,
    /// A device of a rank failed, or could not do what a call needed. The text states the rank, the
    /// device, the driver's call and its code, on all ranks.
    Device,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { kind, rank: None, failed_ranks: Vec::new(), operation: None, details: None, detail }
    }

    /// The error for using a communicator in a forked child.
    pub(crate) fn forked() -> Self {
        let text = "this process was forked after the communicator was made: only the parent \
                    may use it; make a communicator of its own in the child";
        Self::new(ErrorKind::Forked, text)
    }

    pub(crate) fn on(self, rank: Rank) -> Self {
        Self { rank: Some(rank), ..self }
    }

    pub(crate) fn caused_by(self, failed_ranks: Vec<Rank>) -> Self {
        Self { failed_ranks, ..self }
    }

    pub(crate) fn during(self, operation: Operation) -> Self {
        Self { operation: Some(operation), ..self }
    }

    /// The same failure, of a part of something larger.
    pub(crate) fn within(self, place: &str) -> Self {
        let detail = format!("{place}: {self}");
        let Self { kind, failed_ranks, details, .. } = self;
        Self { details, ..Self::new(kind, detail).caused_by(failed_ranks) }
    }

    /// With what two ranks called that should have called the same.
    pub(crate) fn differing(self, calls: Option<Calls>) -> Self {
        if calls.is_none() {
            return self;
        }
        self.with(|details| details.calls = calls.map(|calls| calls.map(MismatchedCall::new)))
    }

    /// With what the system said on this rank.
    pub(crate) fn because(self, cause: Option<Cause>) -> Self {
        if cause.is_none() {
            return self;
        }
        self.with(|details| details.cause = cause)
    }

    /// The same failure; the ranks that caused it did not come in time, or do not answer.
    pub(crate) fn of_absent(self) -> Self {
        self.with(|details| details.is_absence = true)
    }

    /// Whether the ranks that caused it did not come in time as ranks met, or do not answer.
    pub(crate) fn is_absence(&self) -> bool {
        self.details.as_ref().is_some_and(|details| details.is_absence)
    }

    /// The same failure, with what may help.
    pub(crate) fn with_hint(mut self, hint: &str) -> Self {
        self.detail = format!("{}\n  {hint}", self.detail);
        self
    }

    pub(crate) fn changing(self, change: ViewChange) -> Self {
        self.with(|details| details.change = Some(change))
    }

    fn with(mut self, change: impl FnOnce(&mut Details)) -> Self {
        change(self.details.get_or_insert_default());
        self
    }

    /// The same failure, as reported by a later call.
    pub(crate) fn repeated(&self) -> Self {
        self.ending("the communicator was aborted")
    }

    /// The same failure, as reported by a later step of gradient buckets.
    pub(crate) fn repeated_by_buckets(&self) -> Self {
        self.ending("the gradient buckets were ended")
    }

    fn ending(&self, what: &str) -> Self {
        if self.kind == ErrorKind::ViewChanged {
            return Self { operation: None, ..self.clone() };
        }
        let cause = Self { rank: None, ..self.clone() };
        let detail = format!("{what} by an earlier error: {cause}");
        let Self { rank, failed_ranks, details, .. } = self.clone();
        let error = Self::new(ErrorKind::Aborted, detail).caused_by(failed_ranks);
        Self { rank, details, ..error }
    }

    /// The kind of the error.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The ranks that caused it, if known: the same on every rank that reports it.
    pub fn failed_ranks(&self) -> &[Rank] {
        &self.failed_ranks
    }

    /// The rank that reports it, if known.
    pub const fn rank(&self) -> Option<Rank> {
        self.rank
    }

    fn change(&self) -> Option<&ViewChange> {
        self.details.as_ref()?.change.as_ref()
    }

    /// When this rank noticed that the view changes, if that is what the error says.
    pub(crate) fn noticed(&self) -> Option<Instant> {
        self.change().map(|change| change.noticed)
    }

    /// The epoch that an elastic job is in now, of an error of kind [`ErrorKind::ViewChanged`].
    pub fn epoch(&self) -> Option<u64> {
        self.change().map(|change| change.epoch)
    }

    /// The ranks that are not in that epoch any more, as they were numbered before; in an error of
    /// a group of some of the ranks, those of the group, as it numbers them.
    pub fn lost(&self) -> &[Rank] {
        self.change().map_or(&[], |change| &change.lost)
    }

    /// The ranks that are new in that epoch, as they are numbered there.
    pub fn joined(&self) -> &[Rank] {
        self.change().map_or(&[], |change| &change.joined)
    }

    /// Two of the calls that differ, of an error of kind [`ErrorKind::Mismatch`] that is about
    /// calls: first that of a rank that failed, where it is known which.
    pub fn mismatched_calls(&self) -> Option<&[MismatchedCall; 2]> {
        self.details.as_ref()?.calls.as_ref()
    }

    /// The collective that failed, as text, if one did.
    pub fn operation(&self) -> Option<&str> {
        self.operation.as_ref().map(|operation| operation.call.as_str())
    }

    /// How many of how many steps the failed collective had completed on this rank.
    pub fn step(&self) -> Option<(usize, usize)> {
        self.operation.as_ref().map(|operation| (operation.step, operation.steps))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rank) = self.rank {
            let name = format!("rank {rank}");
            // What was found on this very rank, or is wrong with it, begins with it.
            let told = self.detail.strip_prefix(&name);
            let is_told = told.is_some_and(|rest| rest.starts_with([':', ' ']));
            if self.operation.is_some() || !is_told {
                write!(f, "{name}: ")?;
            }
        }
        if let Some(operation) = &self.operation {
            let Operation { call, step, steps } = operation;
            write!(f, "{call} failed at step {step} of {steps}: ")?;
        }
        f.write_str(&self.detail)
    }
}

/// As [`Display`](fmt::Display), because `main() -> Result<(), Error>` prints it for people.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {
    /// What the operating system said, on a rank where that is the cause: an
    /// [`io::Error`](std::io::Error), which has the `errno`.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.details.as_ref()?.cause.as_ref().map(|cause| cause.error() as _)
    }
}

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
        let lacks = Error::new(ErrorKind::Resources, "rank 1 has no memory: …").on(1);
        assert_eq!(lacks.to_string(), "rank 1 has no memory: …");
        let again = Error::new(ErrorKind::RankLost, "rank 0 died").on(1).repeated().to_string();
        assert_eq!(again.matches("rank 1: ").count(), 1, "{again}");
    }
}
