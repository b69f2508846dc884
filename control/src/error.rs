//! What can go wrong on the control plane.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use unisum_link::Rank;
use unisum_link::handshake::Refusal;

use super::message::BLOB_BYTES_MAX;
use super::verdict::{Verdict, VerdictKind};
use crate::interface::InterfaceError;

/// Why a rank could not join, or an exchange failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The coordinator could not be reached in time.
    #[error(
        "rank 0 could not be reached at {target} within {seconds:.1} s: {reasons}{hint}",
        seconds = waited.as_secs_f64()
    )]
    Unreachable {
        /// Where: an address, or the rendezvous file.
        target: String,
        /// How long it was tried.
        waited: Duration,
        /// How the attempts ended.
        reasons: Reasons,
        /// What may help.
        hint: String,
    },
    /// Another process of the job is the rank that this one would be.
    #[error("{why}{TWICE}")]
    Taken {
        /// What it said, and where it is.
        why: String,
    },
    /// This process could not listen.
    #[error("listening on {target}: {source}{hint}")]
    Listen {
        /// The address, with the ports that were tried.
        target: String,
        /// The system's words.
        source: io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// The rendezvous host's name could not be resolved on rank 0.
    #[error(transparent)]
    Resolve(io::Error),
    /// This host has no address that fits.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// Rank 0 could not write the rendezvous file.
    #[error("writing the rendezvous file {}: {source}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Rank 0 could not say in the program's store where it listens.
    #[error("writing `{key}` in the store: {why}")]
    Store {
        /// Under which key.
        key: String,
        /// The store's words.
        why: String,
    },
    /// This process could not join a job that runs.
    #[error("joining the job, for {seconds:.1} s: {why}", seconds = waited.as_secs_f64())]
    NotJoined {
        /// How long it was tried.
        waited: Duration,
        /// Why it was in vain.
        why: String,
    },
    /// The system refused something else.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// A world larger than the protocol allows.
    #[error("a world of {0} ranks; the largest has {max}", max = super::WORLD_MAX)]
    World(usize),
    /// The blob is too large, or the blobs for all ranks together are.
    #[error("{0} bytes in an exchange; the largest blob has {BLOB_BYTES_MAX}")]
    Blob(usize),
    /// The communicator is over.
    #[error("{0}")]
    Ended(Verdict),
    /// This rank has left the communicator.
    #[error("this rank has left the communicator")]
    HasLeft,
}

/// What to look at where two processes are one rank.
pub(super) const TWICE: &str = ": is UNISUM_RANK the same for both, or was the job started twice? \
    (set UNISUM_JOB to tell two jobs of one shell apart)";

impl ControlError {
    /// The ranks that are to blame, if they are others than this one.
    pub fn failed_ranks(&self) -> Vec<Rank> {
        match self {
            Self::Unreachable { .. } => vec![0],
            Self::Ended(verdict) => verdict.failed_ranks.clone(),
            _ => Vec::new(),
        }
    }

    /// Whether ranks are to blame that did not come in time, or do not answer.
    pub fn is_absence(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Ended(verdict) => {
                matches!(verdict.kind, VerdictKind::Absent | VerdictKind::Unresponsive)
            }
            _ => false,
        }
    }

    /// The error with where this rank's secret is from, or which job it is of, if it was refused
    /// for that.
    pub(super) fn with_origin(mut self, origin: &str, job: &str) -> Self {
        let Self::Unreachable { reasons, hint, .. } = &mut self else { return self };
        let told = reasons.to_string();
        if told.contains(&Refusal::Token.to_string()) {
            *hint = format!("; this rank's token is from {origin}: all ranks need the same");
        } else if told.contains(&Refusal::Job.to_string()) {
            *hint = format!(
                "; this rank's job is `{job:.120}`: UNISUM_JOB, or what the launcher sets in its \
                 place, must be the same on all ranks"
            );
        } else if reasons.last.contains("Connection refused") {
            *hint = "; nobody listens there: rank 0 has not started, has failed (see its own \
                     output), or is on another host"
                .to_owned();
        }
        self
    }

    pub(super) const fn system(what: &'static str, source: io::Error) -> Self {
        Self::System { what, source }
    }
}

/// How often attempts ended for which reason: the last one's may say little of the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    /// In the order in which they were first met, the last ones together.
    counted: Vec<(String, u32)>,
    /// The last attempt's.
    last: String,
}

/// The most reasons that are told apart.
const REASONS_MAX: usize = 6;

impl Reasons {
    pub(super) fn add(&mut self, reason: String) {
        self.last.clone_from(&reason);
        let is_full = self.counted.len() == REASONS_MAX;
        let known = self.counted.iter().position(|(known, _)| *known == reason);
        match known.or_else(|| is_full.then_some(REASONS_MAX - 1)) {
            Some(at) => self.counted[at] = (reason, self.counted[at].1 + 1),
            None => self.counted.push((reason, 1)),
        }
    }

    #[cfg(test)]
    pub(super) fn attempts(&self) -> u32 {
        self.counted.iter().map(|(_, times)| times).sum()
    }
}

impl fmt::Display for Reasons {
    /// The most frequent first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counted: Vec<_> = self.counted.iter().collect();
        counted.sort_by_key(|(_, times)| std::cmp::Reverse(*times));
        for (at, (reason, times)) in counted.into_iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            let often = if *times == 1 { "once".to_owned() } else { format!("{times} times") };
            write!(f, "{separator}{often} {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steady_reason_is_told_before_the_last_one() {
        let mut reasons = Reasons::default();
        (0..40).for_each(|_| reasons.add("wrong token".into()));
        (0..3).for_each(|_| reasons.add("connection refused".into()));
        reasons.add("no answer".into());
        let told = "40 times wrong token; 3 times connection refused; once no answer";
        assert_eq!(reasons.to_string(), told);
        (0..100).for_each(|port| reasons.add(format!("port {port}")));
        assert_eq!((reasons.counted.len(), reasons.attempts()), (REASONS_MAX, 144));
        assert!(reasons.to_string().contains("port 99"), "{reasons}");
    }

    /// An early attempt may have come before rank 0 listened.
    #[test]
    fn the_last_attempt_says_whether_anybody_listens() {
        let closed = || "127.0.0.1:1 (Connection refused (os error 111))".to_owned();
        let said = |last: String| {
            let mut reasons = Reasons::default();
            reasons.add(closed());
            reasons.add(last);
            let (target, waited) = ("tcp://x".into(), Duration::from_secs(1));
            let hint = String::new();
            let error = ControlError::Unreachable { target, waited, reasons, hint };
            error.with_origin("a file", "job").to_string()
        };
        assert!(said(closed()).contains("nobody listens there"));
        let refused = said("127.0.0.1:1 (refused: world of 3, but this job's is 2)".into());
        assert!(!refused.contains("nobody listens there"), "{refused}");
    }

    #[test]
    fn errors_name_the_ranks_they_are_about() {
        let waited = Duration::from_secs(1);
        let target = "tcp://a:1".to_owned();
        let (reasons, hint) = (Reasons::default(), String::new());
        let unreachable = ControlError::Unreachable { target, waited, reasons, hint };
        assert_eq!(unreachable.failed_ranks(), [0]);
        assert_eq!(ControlError::Ended(Verdict::died(3, "killed")).failed_ranks(), [3]);
        assert!(ControlError::HasLeft.failed_ranks().is_empty());
    }

    #[test]
    fn who_is_late_and_answers_is_not_absent() {
        let is_absence = |kind| ControlError::Ended(Verdict::new(kind, vec![3], "")).is_absence();
        assert!(is_absence(VerdictKind::Absent) && is_absence(VerdictKind::Unresponsive));
        for kind in [VerdictKind::NotEntered, VerdictKind::Failed, VerdictKind::Died] {
            assert!(!is_absence(kind), "{kind:?}");
        }
    }
}
