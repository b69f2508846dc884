//! From what this rank saw to what all ranks report: the job's verdict, where there is one.

use std::time::{Duration, Instant};

use unisum_link::{LinkError, LinkErrorKind, Rank};

use crate::control::{Report, Verdict, VerdictKind};
use crate::membership::Membership;
use crate::{Error, ErrorKind};

/// How long a rank waits for the coordinator's verdict before it judges by itself.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

impl Membership {
    /// Tells all ranks of a link's failure; the error for the caller. Blocks for the verdict, 3 s
    /// at most.
    pub(crate) fn judge(&self, error: LinkError) -> Error {
        let error = self.in_job(error);
        let mismatch = matches!(error.kind, LinkErrorKind::Mismatch { .. });
        let kind = if mismatch { ErrorKind::Mismatch } else { ErrorKind::RankLost };
        let (against, text) = (error.peer, error.to_string());
        self.report(Report { against, mismatch, text }, kind)
    }

    /// Tells all ranks that what was asked for here does not fit, or not what rank `against` (of
    /// the job) asked for; the error for the caller. Blocks as [`Membership::judge`].
    pub(crate) fn contradict(&self, against: Rank, text: String) -> Error {
        self.report(Report { against, mismatch: true, text }, ErrorKind::Mismatch)
    }

    fn report(&self, report: Report, kind: ErrorKind) -> Error {
        let (against, text) = (report.against, report.text.clone());
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
        _ => ErrorKind::RankLost,
    };
    Error::new(kind, verdict.text.clone()).caused_by(verdict.culprits.clone())
}
