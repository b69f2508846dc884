//! From what this rank saw to what all ranks report: the job's verdict, where there is one.

use std::time::{Duration, Instant};

use unisum_link::{LinkError, LinkErrorKind, Rank};

use crate::membership::Membership;
use crate::{Error, ErrorKind};
use unisum_control::{Finding, LINK_VERDICT_TIMEOUT, Report, Verdict, VerdictKind, describe};

/// How much longer than the control thread a rank waits for a verdict before it judges by itself.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

impl Membership {
    /// Tells all ranks of a link's failure; the error for the caller. Blocks for the verdict, which
    /// comes at once unless the coordinator is silent.
    pub(crate) fn judge(&self, error: LinkError) -> Error {
        let error = self.in_job(error);
        let finding = match &error.kind {
            LinkErrorKind::Panicked(what) => return self.panicked(what),
            LinkErrorKind::Lacking { context, error: why } => {
                let (own, peer) = (self.job_rank(), error.peer);
                let text = format!("rank {own} can't reach rank {peer}: {context}: {why}");
                return self.report(own, Finding::LinkFailed, text);
            }
            LinkErrorKind::Mismatch { .. } => Finding::Mismatch,
            _ => Finding::LinkFailed,
        };
        let against = error.peer;
        let text = match &error.kind {
            LinkErrorKind::Mismatch { ours, theirs } => {
                // Collectives that try algorithms out have numbers that their call has not.
                let doing = self.status().snapshot();
                let tried = doing.call.map_or(0, |call| ours.number.saturating_sub(call.number));
                let told = |call| describe(call, doing.uncounted + tried);
                let (ours, theirs) = (told(ours), told(theirs));
                format!("rank {} called {ours}, rank {against} called {theirs}", self.job_rank())
            }
            _ => error.to_string(),
        };
        self.report(against, finding, text)
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

    /// Tells all ranks that rank `against` of this communicator, which may be this one, did not do
    /// its part in something else than a call; the error for the caller. Blocks as
    /// [`Membership::judge`].
    #[cfg_attr(not(feature = "shm"), expect(dead_code, reason = "only sharing memory is no call"))]
    pub(crate) fn blame(&self, against: Rank, text: String) -> Error {
        if let Some(verdict) = self.verdict() {
            return from_verdict(&verdict);
        }
        self.report(self.job_ranks(&[against])[0], Finding::LinkFailed, text)
    }

    /// Tells all ranks what goes wrong on this one alone while the job starts, as they wait for it;
    /// the error for the caller. Does nothing if all know, or if other ranks are the cause.
    pub(crate) fn own_failure(&self, error: Error) -> Error {
        let is_own = error.culprits().iter().all(|&rank| rank == self.job_rank());
        if !is_own || self.verdict().is_some() {
            return error;
        }
        let rank = self.job_rank();
        let error = error.on(rank);
        self.accuse(Report {
            communicator: self.communicator(),
            against: rank,
            finding: Finding::LinkFailed,
            text: error.to_string(),
        });
        self.await_verdict(Instant::now() + GRACE);
        error.caused_by(vec![rank])
    }

    fn report(&self, against: Rank, finding: Finding, text: String) -> Error {
        let kind = match finding {
            Finding::LinkFailed | Finding::CannotJoin => ErrorKind::RankLost,
            Finding::Mismatch => ErrorKind::Mismatch,
            Finding::Panicked => ErrorKind::Panicked,
            Finding::Aborted => ErrorKind::Aborted,
        };
        let communicator = self.communicator();
        self.accuse(Report { communicator, against, finding, text: text.clone() });
        match self.await_verdict(Instant::now() + LINK_VERDICT_TIMEOUT + GRACE) {
            Some(verdict) => from_verdict(&verdict),
            None => Error::new(kind, text).caused_by(vec![against]),
        }
    }
}

/// The verdict as the caller's error.
pub(crate) fn from_verdict(verdict: &Verdict) -> Error {
    let kind = match verdict.kind {
        VerdictKind::Mismatch | VerdictKind::OtherCall => ErrorKind::Mismatch,
        VerdictKind::Unresponsive | VerdictKind::NotEntered | VerdictKind::Behind => {
            ErrorKind::Timeout
        }
        VerdictKind::Panicked => ErrorKind::Panicked,
        VerdictKind::Aborted => ErrorKind::Aborted,
        _ => ErrorKind::RankLost,
    };
    Error::new(kind, verdict.text.clone()).caused_by(verdict.culprits.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lives_and_is_late_is_not_lost() {
        let kind = |kind| {
            let culprits = vec![2];
            from_verdict(&Verdict { kind, culprits, text: String::new() }).kind()
        };
        for late in [VerdictKind::Behind, VerdictKind::NotEntered, VerdictKind::Unresponsive] {
            assert_eq!(kind(late), ErrorKind::Timeout, "{late:?}");
        }
        for lost in [VerdictKind::Died, VerdictKind::Left, VerdictKind::LinkFailed] {
            assert_eq!(kind(lost), ErrorKind::RankLost, "{lost:?}");
        }
    }
}
