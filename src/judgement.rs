//! From what this rank saw to what all ranks report: the job's verdict, where there is one.

use std::time::{Duration, Instant};

use unisum_link::{LinkError, LinkErrorKind, Rank};

use crate::control::{Finding, Report, Verdict, VerdictKind};
use crate::membership::Membership;
use crate::{Error, ErrorKind};

/// How long a rank waits for the coordinator's verdict before it judges by itself.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

impl Membership {
    /// Tells all ranks of a link's failure; the error for the caller. Blocks for the verdict, 3 s
    /// at most.
    pub(crate) fn judge(&self, error: LinkError) -> Error {
        let error = self.in_job(error);
        let finding = match &error.kind {
            LinkErrorKind::Panicked(what) => return self.panicked(what),
            LinkErrorKind::Mismatch { .. } => Finding::Mismatch,
            _ => Finding::LinkFailed,
        };
        let (against, text) = (error.peer, error.to_string());
        self.report(Report { against, finding, text })
    }

    /// Tells all ranks that code of the program panicked on this one, which is named before `what`:
    /// whose code it was and what it said; the error for the caller. Blocks as
    /// [`Membership::judge`].
    pub(crate) fn panicked(&self, what: &str) -> Error {
        let against = self.job_rank();
        let text = format!("on rank {against} {what}");
        self.report(Report { against, finding: Finding::Panicked, text })
    }

    /// Tells all ranks that what was asked for here does not fit, or not what rank `against` (of
    /// the job) asked for; the error for the caller. Blocks as [`Membership::judge`].
    pub(crate) fn contradict(&self, against: Rank, text: String) -> Error {
        self.report(Report { against, finding: Finding::Mismatch, text })
    }

    fn report(&self, report: Report) -> Error {
        let (against, text) = (report.against, report.text.clone());
        let kind = match report.finding {
            Finding::LinkFailed => ErrorKind::RankLost,
            Finding::Mismatch => ErrorKind::Mismatch,
            Finding::Panicked => ErrorKind::Panicked,
        };
        self.accuse(report);
        match self.await_verdict(Instant::now() + GRACE) {
            Some(verdict) => from_verdict(&verdict),
            None => Error::new(kind, text).caused_by(vec![against]),
        }
    }
}

/// The verdict as the caller's error.
pub(crate) fn from_verdict(verdict: &Verdict) -> Error {
    let kind = match verdict.kind {
        VerdictKind::Mismatch | VerdictKind::OtherCall => ErrorKind::Mismatch,
        VerdictKind::Unresponsive | VerdictKind::NotEntered => ErrorKind::Timeout,
        VerdictKind::Panicked => ErrorKind::Panicked,
        _ => ErrorKind::RankLost,
    };
    Error::new(kind, verdict.text.clone()).caused_by(verdict.culprits.clone())
}
