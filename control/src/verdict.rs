//! Why a communicator ended, and what a rank reports about another.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use unisum_link::{Call, Rank};

use super::message::cut;
use super::status::Snapshot;

/// Most ranks that a sentence names.
const RANKS_SHOWN: usize = 16;

/// Why the communicator ended: the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What went wrong.
    pub kind: VerdictKind,
    /// The ranks that caused it, ascending.
    pub failed_ranks: Vec<Rank>,
    /// The reason in words: a line that names the failed ranks, then a line per rank if useful.
    pub text: String,
    /// Of calls that differ, two that do.
    pub calls: Option<Box<Calls>>,
}

/// What two ranks called that should have called the same.
pub type Calls = [(Rank, Call); 2];

/// The kinds of [`Verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[non_exhaustive]
pub enum VerdictKind {
    /// The process ended without leaving.
    Died = 1,
    /// The process does not answer: stopped, or its host or network is lost.
    Unresponsive = 2,
    /// The rank never joined the job.
    Absent = 3,
    /// The rank has not entered the collective that the others wait in.
    NotEntered = 4,
    /// The rank is in another collective than the others.
    OtherCall = 5,
    /// Two ranks found, from their first bytes, that their calls differ.
    Mismatch = 6,
    /// The link to the rank failed, though its process lives.
    LinkFailed = 7,
    /// The rank left the communicator while others still waited for it.
    Left = 8,
    /// Every rank is in the collective and this one got least far.
    Behind = 9,
    /// The rank broke the protocol, of the control connection or of a link: a bug, or mixed
    /// versions; or what it sent was altered on its way.
    Protocol = 10,
    /// Code of the program panicked on the rank, where the library called it.
    Panicked = 11,
    /// The rank could not go on joining, and said why.
    Failed = 12,
    /// The rank's host, or the network there, has not answered for too long.
    Unreachable = 13,
    /// The rank's program has ended the job.
    Aborted = 14,
    /// The ranks wait for each other in calls of different communicators.
    Crossed = 15,
    /// The rank has run out of something that the system gives.
    Lacking = 16,
    /// The job goes on in another view, with a communicator of its own.
    Superseded = 17,
    /// Two ranks do not reach each other, though both reach the others.
    Cut = 18,
    /// A device of the rank failed.
    DeviceFailed = 19,
}

impl VerdictKind {
    /// The kind with this wire code.
    pub(super) fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Died,
            2 => Self::Unresponsive,
            3 => Self::Absent,
            4 => Self::NotEntered,
            5 => Self::OtherCall,
            6 => Self::Mismatch,
            7 => Self::LinkFailed,
            8 => Self::Left,
            9 => Self::Behind,
            10 => Self::Protocol,
            11 => Self::Panicked,
            12 => Self::Failed,
            13 => Self::Unreachable,
            14 => Self::Aborted,
            15 => Self::Crossed,
            16 => Self::Lacking,
            17 => Self::Superseded,
            18 => Self::Cut,
            19 => Self::DeviceFailed,
            _ => return None,
        })
    }
}

impl Verdict {
    /// Where the text is too long for others, it is as long here as there.
    pub(super) fn new(kind: VerdictKind, failed_ranks: Vec<Rank>, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(cut(&text).len());
        Self { kind, failed_ranks, text, calls: None }
    }

    pub(super) fn with_calls(self, calls: Option<Calls>) -> Self {
        Self { calls: calls.map(Box::new), ..self }
    }

    pub(super) fn died(rank: Rank, how: &str) -> Self {
        let text = format!("rank {rank} died: {how}");
        Self::new(VerdictKind::Died, vec![rank], text)
    }

    /// `last` is what the rank did there last, if that is known.
    pub(super) fn left(rank: Rank, last: Option<&Snapshot>) -> Self {
        let mut text =
            format!("rank {rank} left the communicator while others still waited for it");
        if let Some(last) = last {
            text += &format!("\n  rank {rank}: left; at that time {last}");
        }
        Self::new(VerdictKind::Left, vec![rank], text)
    }

    pub(super) fn protocol(rank: Rank, what: impl fmt::Display) -> Self {
        let text = format!("rank {rank} broke the control protocol: {what}");
        Self::new(VerdictKind::Protocol, vec![rank], text)
    }

    /// The hosts of these ranks, which are in order, have not answered for `limit`.
    pub(super) fn unreachable(lost: &[(Rank, IpAddr)], limit: Duration) -> Self {
        let each = lost.iter().take(RANKS_SHOWN);
        let mut text =
            each.map(|(rank, at)| format!("rank {rank} at {at}")).collect::<Vec<_>>().join(", ");
        if lost.len() > RANKS_SHOWN {
            text += &format!(", … ({} in all)", lost.len());
        }
        let seconds = limit.as_secs_f64();
        text += &format!(
            " unreachable for more than {seconds} s: a host, or the network between, is lost"
        );
        Self::new(VerdictKind::Unreachable, lost.iter().map(|(rank, _)| *rank).collect(), text)
    }

    /// The communicator's epoch is over.
    pub(super) fn superseded(why: &str) -> Self {
        Self::new(VerdictKind::Superseded, Vec::new(), why)
    }

    /// What a member concludes on its own when the coordinator is silent.
    pub(super) fn coordinator_silent(coordinator: Rank, why: &str) -> Self {
        let text = format!(
            "rank {coordinator}, the coordinator, does not answer: its process is stopped, or its \
             host or network is lost ({why})"
        );
        Self::new(VerdictKind::Unresponsive, vec![coordinator], text)
    }

    /// The same where the coordinator's host, or something on the way there, has ended the pulse.
    pub(super) fn coordinator_lost(coordinator: Rank) -> Self {
        let text = format!(
            "rank {coordinator}, the coordinator, does not answer, and the pulse beside its \
             control connection ended: its process has ended, or its host, or the network between, \
             is lost"
        );
        Self::new(VerdictKind::Unreachable, vec![coordinator], text)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a rank found out about another one, or about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The communicator in which it found that out.
    pub communicator: u32,
    /// The rank at the other end of the link, or the one that reports.
    pub against: Rank,
    /// What it is that was found.
    pub finding: Finding,
    /// The link's words; of a mismatch they describe both ranks' calls.
    pub text: String,
    /// Of a mismatch, the two ranks' calls, if it is one of calls.
    pub calls: Option<Calls>,
}

/// What [`Report`]s are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Finding {
    /// The link failed: it may turn out that the rank died or left.
    LinkFailed = 0,
    /// The two ranks' calls differ.
    Mismatch = 1,
    /// Code of the program panicked on the rank that reports.
    Panicked = 2,
    /// The rank that reports can't go on joining, for its own reasons or another's.
    CannotJoin = 3,
    /// The program of the rank that reports ends the job.
    Aborted = 4,
    /// The rank has run out of something that the system gives.
    Lacking = 5,
    /// What came from the rank makes no sense here.
    Protocol = 6,
    /// The link's other end acknowledges nothing: its host may turn out lost, or the rank dead.
    Cut = 7,
    /// A device of the rank that reports failed.
    Device = 8,
    /// The rank's device has not done its part of a collective in time.
    DeviceBehind = 9,
}

impl Finding {
    /// Whether a link failed, for which the rank at its other end may have a reason.
    pub(super) const fn is_of_link(self) -> bool {
        matches!(self, Self::LinkFailed | Self::Cut)
    }

    /// The finding with this wire code.
    pub(super) const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::LinkFailed,
            1 => Self::Mismatch,
            2 => Self::Panicked,
            3 => Self::CannotJoin,
            4 => Self::Aborted,
            5 => Self::Lacking,
            6 => Self::Protocol,
            7 => Self::Cut,
            8 => Self::Device,
            9 => Self::DeviceBehind,
            _ => return None,
        })
    }
}

impl Report {
    /// The two ranks that it is about.
    fn pair(&self, by: Rank) -> Vec<Rank> {
        let mut pair = vec![by.min(self.against), by.max(self.against)];
        pair.dedup();
        pair
    }

    /// A report of anything but two calls that differ.
    pub fn new(
        communicator: u32,
        against: Rank,
        finding: Finding,
        text: impl Into<String>,
    ) -> Self {
        Self { communicator, against, finding, text: text.into(), calls: None }
    }

    /// What follows from the report when the accused neither died nor left.
    pub(super) fn verdict(&self, by: Rank) -> Verdict {
        match self.finding {
            // Either of the two may be the one whose program is wrong.
            Finding::Mismatch => {
                Verdict::new(VerdictKind::Mismatch, self.pair(by), self.text.clone())
                    .with_calls(self.calls)
            }
            // Nobody else sees on which side it is that something was lost.
            Finding::Cut => {
                let pair = self.pair(by);
                let text = format!(
                    "{} do not reach each other: rank {by} reports: {}; the network between the \
                     two has failed",
                    name(&pair),
                    self.text
                );
                Verdict::new(VerdictKind::Cut, pair, text)
            }
            Finding::LinkFailed | Finding::Lacking | Finding::Protocol => {
                let text = match by == self.against {
                    true => self.text.clone(),
                    false => format!("rank {by} reports: {}", self.text),
                };
                let kind = match self.finding {
                    Finding::Lacking => VerdictKind::Lacking,
                    Finding::Protocol => VerdictKind::Protocol,
                    _ => VerdictKind::LinkFailed,
                };
                Verdict::new(kind, vec![self.against], text)
            }
            Finding::Panicked => {
                Verdict::new(VerdictKind::Panicked, vec![self.against], self.text.clone())
            }
            Finding::Aborted => {
                Verdict::new(VerdictKind::Aborted, vec![self.against], self.text.clone())
            }
            Finding::Device => {
                Verdict::new(VerdictKind::DeviceFailed, vec![self.against], self.text.clone())
            }
            Finding::DeviceBehind => {
                Verdict::new(VerdictKind::Behind, vec![self.against], self.text.clone())
            }
            Finding::CannotJoin => {
                let text = format!("rank {by} can't join: {}", self.text);
                Verdict::new(VerdictKind::Failed, vec![self.against], text)
            }
        }
    }
}

/// Names ranks in a sentence: `rank 3`, `ranks 1, 2 and 5`, `ranks 1, 2, … (90 in all)`.
pub(super) fn name(ranks: &[Rank]) -> String {
    let list =
        |ranks: &[Rank]| ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match ranks {
        [] => "no rank".into(),
        [rank] => format!("rank {rank}"),
        [head @ .., last] if ranks.len() <= RANKS_SHOWN => {
            format!("ranks {} and {last}", list(head))
        }
        _ => format!("ranks {}, … ({} in all)", list(&ranks[..RANKS_SHOWN]), ranks.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_named_readably() {
        assert_eq!(name(&[3]), "rank 3");
        assert_eq!(name(&[1, 2, 5]), "ranks 1, 2 and 5");
        let many: Vec<Rank> = (0..90).collect();
        assert!(name(&many).ends_with("15, … (90 in all)"));
    }

    #[test]
    fn an_unreachable_rank_is_named_with_its_address() {
        let at = |rank: Rank| (rank, IpAddr::from([10, 9, 0, rank as u8]));
        let verdict = Verdict::unreachable(&[at(3), at(4)], Duration::from_secs(10));
        assert_eq!(verdict.failed_ranks, [3, 4]);
        let begin = "rank 3 at 10.9.0.3, rank 4 at 10.9.0.4 unreachable for more than 10 s";
        assert!(verdict.text.starts_with(begin), "{verdict}");
        let many: Vec<_> = (0..200).map(at).collect();
        let text = Verdict::unreachable(&many, Duration::from_millis(1500)).text;
        assert!(text.contains("rank 15 at 10.9.0.15, … (200 in all) unreachable for"), "{text}");
    }
}
