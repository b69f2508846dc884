//! From what this rank saw to what all ranks report: the job's verdict, where there is one.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use unisum_link::handshake::Refusal;
use unisum_link::{Call, LinkError, LinkErrorKind, Rank};

use crate::execution::membership::Membership;
use crate::{Error, ErrorKind};
use unisum_control::{
    Finding, LINK_VERDICT_TIMEOUT, Report, Verdict, VerdictKind, describe, describe_for_one,
};

/// How much longer than the control thread a rank waits for a verdict before it judges by itself.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

/// Why later calls fail. The first failure counts.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    error: OnceLock<Error>,
    /// Whether no call has returned the error itself yet.
    untold: AtomicBool,
}

impl Ended {
    /// A call fails with this error.
    pub(crate) fn by(&self, error: &Error) {
        // It counts unless there is an earlier one.
        let _ = self.error.set(error.clone());
    }

    /// Something failed that has no caller to be told: the next call is.
    pub(crate) fn between_calls(&self, error: &Error) {
        if self.error.get().is_none() {
            // Relaxed: setting the error publishes it.
            self.untold.store(true, Ordering::Relaxed);
            self.by(error);
        }
    }

    pub(crate) fn get(&self) -> Option<&Error> {
        self.error.get()
    }

    /// The error of a call that comes after: `repeated` makes it of an error that was told.
    pub(crate) fn refusal(&self, repeated: impl FnOnce(&Error) -> Error) -> Option<Error> {
        let error = self.error.get()?;
        // Relaxed: as above; one of several calls gets it.
        let is_news = self.untold.swap(false, Ordering::Relaxed);
        Some(if is_news { error.clone() } else { repeated(error) })
    }
}

/// What a rank says of itself, for all ranks to read.
fn for_all(text: &str, own: Rank) -> String {
    text.replace("this rank", &format!("rank {own}"))
}

impl Membership {
    /// Tells all ranks of a link's failure; the error for the caller. Blocks for the verdict, which
    /// comes at once unless the coordinator is silent.
    pub(crate) fn judge(&self, error: LinkError) -> Error {
        let error = self.in_job(error);
        let cause = error.cause().cloned();
        let finding = match &error.kind {
            LinkErrorKind::Panicked(what) => return self.panicked(what),
            LinkErrorKind::Lacking { context, error: why } => {
                let (own, peer) = (self.job_rank(), error.peer);
                let error = match own == peer {
                    true => self.lacks(&format!("{context}: {why}")),
                    false => self.lacks(&format!("can't reach rank {peer}: {context}: {why}")),
                };
                return error.because(cause);
            }
            LinkErrorKind::NotAccepted(why) => {
                let (own, peer) = (self.job_rank(), error.peer);
                let why = for_all(why, own);
                let text = format!("rank {own} can't reach rank {peer}: {why}");
                return self.report(own, Finding::LinkFailed, text);
            }
            LinkErrorKind::Mismatch { .. } => Finding::Mismatch,
            LinkErrorKind::Protocol(_) | LinkErrorKind::Altered { .. } => Finding::Protocol,
            LinkErrorKind::Unacknowledged(_) | LinkErrorKind::Unanswered(_) => Finding::Cut,
            LinkErrorKind::Os { error, .. } if is_unanswered(error.error()) => Finding::Cut,
            // The peer has said so itself when it turned this rank away.
            _ if error.to_string().contains(&Refusal::Exhausted.to_string()) => Finding::Lacking,
            _ => Finding::LinkFailed,
        };
        let against = error.peer;
        let mut calls = None;
        let text = match &error.kind {
            LinkErrorKind::Mismatch { ours, theirs } => {
                calls = Some([(self.job_rank(), *ours), (against, *theirs)]);
                // Collectives that try algorithms out have numbers that their call has not.
                let doing = self.status().snapshot();
                let tried = doing.call.map_or(0, |call| ours.number.saturating_sub(call.number));
                let is_by_pair = |call: Call| call.count == Call::COUNT_BY_PAIR;
                let describe =
                    if doing.call.is_some_and(is_by_pair) { describe_for_one } else { describe };
                let told = |call| describe(call, doing.uncounted + tried);
                let (ours, theirs) = (told(ours), told(theirs));
                format!("rank {} called {ours}, rank {against} called {theirs}", self.job_rank())
            }
            _ => for_all(&error.to_string(), self.job_rank()),
        };
        let communicator = self.communicator();
        self.tell(Report { communicator, against, finding, text, calls }).because(cause)
    }

    /// Tells all ranks that this one has run out of something in a call, and of what; the error for
    /// the caller. Blocks as [`Membership::judge`].
    pub(crate) fn lacks(&self, what: &str) -> Error {
        let own = self.job_rank();
        self.report(own, Finding::Lacking, format!("rank {own} {what}"))
    }

    /// Tells all ranks that code of the program panicked on this one, which is named before `what`:
    /// whose code it was and what it said; the error for the caller. Blocks as
    /// [`Membership::judge`].
    pub(crate) fn panicked(&self, what: &str) -> Error {
        let against = self.job_rank();
        let text = format!("on rank {against} {what}");
        self.report(against, Finding::Panicked, text)
    }

    /// Tells all ranks that the program of this one ends the job; the error for the caller. Blocks
    /// as [`Membership::judge`].
    pub(crate) fn abandoned(&self, why: &str) -> Error {
        let against = self.job_rank();
        let text = format!("rank {against} aborted the job: {why}");
        self.report(against, Finding::Aborted, text)
    }

    /// Tells all ranks that what was asked for here does not fit, or not what rank `against` (of
    /// the job) asked for; the error for the caller. Blocks as [`Membership::judge`].
    pub(crate) fn contradict(&self, against: Rank, text: String) -> Error {
        self.report(against, Finding::Mismatch, text)
    }

    /// Tells all ranks that a device of this one failed; the error for the caller. Blocks as
    /// [`Membership::judge`].
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only CUDA has devices"))]
    pub(crate) fn device_failed(&self, text: String) -> Error {
        self.report(self.job_rank(), Finding::Device, text)
    }

    /// Tells all ranks that the device of rank `against` of this communicator has not done its part
    /// in time; the error for the caller. Blocks as [`Membership::judge`].
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only CUDA has devices"))]
    pub(crate) fn device_behind(&self, against: Rank, text: String) -> Error {
        if let Some(verdict) = self.verdict() {
            return self.told(&verdict);
        }
        self.report(self.job_ranks(&[against])[0], Finding::DeviceBehind, text)
    }

    /// Tells all ranks that rank `against` of this communicator, which may be this one, did not do
    /// its part in something else than a call; the error for the caller. Blocks as
    /// [`Membership::judge`].
    pub(crate) fn blame(&self, against: Rank, text: String) -> Error {
        if let Some(verdict) = self.verdict() {
            return self.told(&verdict);
        }
        self.report(self.job_ranks(&[against])[0], Finding::LinkFailed, text)
    }

    /// Tells all ranks what goes wrong on this one alone while the job starts, as they wait for it;
    /// the error for the caller. Does nothing if all know, or if other ranks are the cause.
    pub(crate) fn own_failure(&self, error: Error) -> Error {
        let is_own = error.failed_ranks().iter().all(|&rank| rank == self.job_rank());
        if !is_own || self.verdict().is_some() {
            return error;
        }
        let rank = self.job_rank();
        let error = error.on(rank);
        let text = error.to_string();
        self.accuse(Report::new(self.communicator(), rank, Finding::LinkFailed, text));
        self.await_verdict(Instant::now() + GRACE);
        error.caused_by(vec![rank])
    }

    /// The verdict as the caller's error. In an elastic job that has lost ranks this blocks until
    /// the others have agreed on who is left.
    pub(crate) fn told(&self, verdict: &Verdict) -> Error {
        self.explain(from_verdict(verdict), Some(verdict))
    }

    fn explain(&self, error: Error, verdict: Option<&Verdict>) -> Error {
        match self.bond() {
            Some(bond) => bond.explain(error, verdict),
            None => error,
        }
    }

    fn report(&self, against: Rank, finding: Finding, text: String) -> Error {
        self.tell(Report::new(self.communicator(), against, finding, text))
    }

    fn tell(&self, report: Report) -> Error {
        let kind = match report.finding {
            Finding::LinkFailed | Finding::Cut | Finding::CannotJoin => ErrorKind::RankLost,
            Finding::Mismatch => ErrorKind::Mismatch,
            Finding::Panicked => ErrorKind::Panicked,
            Finding::Lacking => ErrorKind::Resources,
            Finding::Protocol => ErrorKind::Protocol,
            Finding::Aborted => ErrorKind::Aborted,
            Finding::Device => ErrorKind::Device,
            Finding::DeviceBehind => ErrorKind::Timeout,
        };
        self.accuse(report.clone());
        match self.await_verdict(Instant::now() + LINK_VERDICT_TIMEOUT + GRACE) {
            Some(verdict) => self.told(&verdict),
            None => {
                let Report { against, text, calls, .. } = report;
                let error = Error::new(kind, text).caused_by(vec![against]).differing(calls);
                self.explain(error, None)
            }
        }
    }
}

/// Whether the kernel has ended a connection because the other host gave no answer: to its probes,
/// if nothing was under way. A router's answer counts as none.
fn is_unanswered(error: &io::Error) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    matches!(error.kind(), TimedOut | HostUnreachable | NetworkUnreachable)
}

/// The verdict as an error.
fn from_verdict(verdict: &Verdict) -> Error {
    let kind = match verdict.kind {
        VerdictKind::Mismatch | VerdictKind::OtherCall | VerdictKind::Crossed => {
            ErrorKind::Mismatch
        }
        VerdictKind::Unresponsive | VerdictKind::NotEntered | VerdictKind::Behind => {
            ErrorKind::Timeout
        }
        VerdictKind::Panicked => ErrorKind::Panicked,
        VerdictKind::Lacking => ErrorKind::Resources,
        VerdictKind::Protocol => ErrorKind::Protocol,
        VerdictKind::Aborted => ErrorKind::Aborted,
        VerdictKind::DeviceFailed => ErrorKind::Device,
        _ => ErrorKind::RankLost,
    };
    let Verdict { failed_ranks, text, calls, .. } = verdict.clone();
    Error::new(kind, text).caused_by(failed_ranks).differing(calls.map(|calls| *calls))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lives_and_is_late_is_not_lost() {
        let kind = |kind| {
            let failed_ranks = vec![2];
            from_verdict(&Verdict { kind, failed_ranks, text: String::new(), calls: None }).kind()
        };
        for late in [VerdictKind::Behind, VerdictKind::NotEntered, VerdictKind::Unresponsive] {
            assert_eq!(kind(late), ErrorKind::Timeout, "{late:?}");
        }
        for lost in
            [VerdictKind::Died, VerdictKind::Left, VerdictKind::LinkFailed, VerdictKind::Cut]
        {
            assert_eq!(kind(lost), ErrorKind::RankLost, "{lost:?}");
        }
    }

    #[test]
    fn a_connection_that_the_kernel_gave_up_is_cut_and_one_that_was_ended_is_not() {
        let is_cut = |code: Errno| is_unanswered(&code.into());
        use rustix::io::Errno;
        assert!([Errno::TIMEDOUT, Errno::HOSTUNREACH, Errno::NETUNREACH].into_iter().all(is_cut));
        assert!(![Errno::CONNRESET, Errno::PIPE, Errno::NOMEM].into_iter().any(is_cut));
    }

    #[test]
    fn bytes_that_make_no_sense_are_of_a_kind_of_their_own() {
        let (kind, text) = (VerdictKind::Protocol, "rank 1 sent nonsense".into());
        let verdict = Verdict { kind, failed_ranks: vec![1], text, calls: None };
        let error = from_verdict(&verdict);
        assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Protocol, &[1][..]));
    }
}
