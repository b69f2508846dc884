//! A rank's half of the control plane (no I/O): it answers the coordinator, and concludes on its
//! own only if there is no coordinator to ask.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use unisum_link::{Call, Rank};

use super::inquest;
use super::message::{Concern, Message};
use super::shared::{Command, Shared};
use super::status::Snapshot;
use super::verdict::{Report, Verdict, VerdictKind};

/// How long the coordinator may take to a verdict: its own second for the ranks' answers, and one
/// for a busy machine.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct Member {
    shared: Arc<Shared>,
    /// The exchange under way, or the next.
    round: u32,
    blobs: Vec<Bytes>,
    /// When the coordinator must have come to a verdict that this rank asked for.
    verdict_by: Option<Instant>,
    /// What the coordinator did last, once it has left.
    coordinator_last: Option<Snapshot>,
    /// The newest call of the job's own communicator that this rank has waited in for a while.
    waiting: Option<Call>,
}

impl Member {
    pub(super) const fn new(shared: Arc<Shared>) -> Self {
        let (verdict_by, coordinator_last, waiting) = (None, None, None);
        Self { shared, round: 0, blobs: Vec::new(), verdict_by, coordinator_last, waiting }
    }

    /// Does what the coordinator says; returns the answer to send.
    ///
    /// # Errors
    /// A text if it says what no coordinator says.
    pub(super) fn heard(&mut self, message: Message) -> Result<Option<Message>, String> {
        match message {
            Message::Gathered { round, rank, blob } => {
                if round != self.round || rank != self.blobs.len() {
                    return Err(format!("a blob of rank {rank}, exchange {round}, out of order"));
                }
                self.blobs.push(blob);
                if self.blobs.len() == self.shared.world() {
                    self.round = self.round.wrapping_add(1);
                    self.shared.gathered(std::mem::take(&mut self.blobs));
                }
            }
            Message::StatusRequest { query, communicator } => {
                let snapshot = self.shared.snapshot(communicator);
                return Ok(Some(Message::Status { query, snapshot }));
            }
            Message::Verdict(verdict) => self.conclude(verdict),
            Message::Left { rank, last } if rank < self.shared.world() => {
                self.shared.set_left(rank);
                if rank == 0 {
                    self.coordinator_last = Some(last);
                    self.look_whether_coordinator_is_missed();
                }
            }
            other => return Err(format!("it sent {other:?}")),
        }
        Ok(None)
    }

    /// Does what this rank's threads ask; returns the messages to send.
    pub(super) fn command(&mut self, command: Command, now: Instant) -> Vec<Message> {
        let message = match command {
            Command::Exchange(share) => {
                if self.is_coordinator_gone() {
                    self.conclude(Verdict::left(0));
                }
                let round = self.round;
                let blob = |(to, blob): (Option<Rank>, Vec<u8>)| Message::Blob {
                    round,
                    to,
                    blob: blob.into(),
                };
                return share.blobs().map(blob).collect();
            }
            Command::Accuse(report) => self.accuse(report, now),
            Command::Overdue(concern) => self.overdue(concern, now),
            Command::Stalled(concern) => {
                if concern.call.communicator == 0 {
                    self.waiting = Some(concern.call);
                }
                // Without a coordinator nobody can be asked but about itself.
                self.look_whether_coordinator_is_missed();
                (!self.is_coordinator_gone()).then_some(Message::Stalled(concern))
            }
            Command::Part(communicator, last) => {
                let told = Message::Parted { communicator, last };
                (!self.is_coordinator_gone()).then_some(told)
            }
            Command::Leave => Some(Message::Bye(self.shared.snapshot(0))),
        };
        message.into_iter().collect()
    }

    /// Ends the job if the coordinator has left without the call that this rank waits in.
    fn look_whether_coordinator_is_missed(&mut self) {
        let (Some(call), Some(last)) = (&self.waiting, self.coordinator_last) else { return };
        let (by, parted) = (self.shared.rank, std::iter::once((0, last)));
        let is_inside = self.shared.snapshot(0).position() == 2 * call.number + 1;
        if let Some(verdict) = inquest::gone(call, by, parted).filter(|_| is_inside) {
            self.conclude(verdict);
        }
    }

    /// The connection to the coordinator ended.
    pub(super) fn lost(&mut self, how: &str) {
        if !self.is_coordinator_gone() {
            self.conclude(Verdict::died(0, how));
        }
    }

    /// The coordinator's host has not answered for `limit`.
    pub(super) fn unreachable(&mut self, lost: &[(Rank, IpAddr)], limit: Duration) {
        if !self.is_coordinator_gone() {
            self.conclude(Verdict::unreachable(lost, limit));
        }
    }

    pub(super) fn violated(&mut self, what: impl std::fmt::Display) {
        self.conclude(Verdict::protocol(0, what));
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.verdict_by.is_some_and(|by| by <= now) {
            let seconds = VERDICT_TIMEOUT.as_secs();
            self.conclude(Verdict::coordinator_silent(&format!("no verdict within {seconds} s")));
        }
    }

    /// When [`Member::tick`] has something to do.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        self.verdict_by
    }

    fn accuse(&mut self, report: Report, now: Instant) -> Option<Message> {
        if self.is_coordinator_gone() {
            let against = report.against;
            let left = against < self.shared.world() && self.shared.has_left(against);
            let verdict =
                if left { Verdict::left(against) } else { report.verdict(self.shared.rank) };
            self.conclude(verdict);
            return None;
        }
        self.expect_verdict(now);
        Some(Message::Accuse(report))
    }

    fn overdue(&mut self, concern: Concern, now: Instant) -> Option<Message> {
        if self.is_coordinator_gone() {
            let call = concern.call;
            let text = format!(
                "{call} is overdue on rank {}: rank 0, the coordinator, has left, so that no rank \
                 can be asked what it is doing",
                self.shared.rank
            );
            self.conclude(Verdict::new(VerdictKind::Left, vec![0], text));
            return None;
        }
        self.expect_verdict(now);
        Some(Message::Overdue(concern))
    }

    fn expect_verdict(&mut self, now: Instant) {
        if self.shared.verdict().is_none() {
            self.verdict_by.get_or_insert(now + VERDICT_TIMEOUT);
        }
    }

    fn conclude(&mut self, verdict: Verdict) {
        self.verdict_by = None;
        self.shared.conclude(verdict);
    }

    fn is_coordinator_gone(&self) -> bool {
        self.shared.has_left(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Finding;
    use crate::control::tests::call;

    fn member() -> Member {
        Member::new(Arc::new(Shared::new(1, 3)))
    }

    #[track_caller]
    fn expect(member: &Member, kind: VerdictKind, culprit: usize) {
        let verdict = member.shared.verdict().expect("a verdict");
        assert_eq!((verdict.kind, &verdict.culprits[..]), (kind, &[culprit][..]));
        assert_eq!(member.deadline(), None);
    }

    fn report() -> Report {
        Report { against: 2, finding: Finding::LinkFailed, text: "link to rank 2: closed".into() }
    }

    #[test]
    fn a_coordinator_that_vanishes_is_dead() {
        let mut member = member();
        member.lost("its connection ended");
        expect(&member, VerdictKind::Died, 0);
    }

    #[test]
    fn a_coordinator_that_is_silent_is_unresponsive() {
        let (mut member, now) = (member(), Instant::now());
        let asked = member.command(Command::Overdue(call(1).into()), now);
        assert_eq!(asked, [Message::Overdue(call(1).into())]);
        member.tick(now + VERDICT_TIMEOUT / 2);
        assert!(member.shared.verdict().is_none());
        member.tick(now + VERDICT_TIMEOUT);
        expect(&member, VerdictKind::Unresponsive, 0);
    }

    #[test]
    fn without_a_coordinator_a_rank_concludes_on_its_own() {
        let gone = || {
            let mut member = member();
            assert_eq!(
                member.heard(Message::Left { rank: 0, last: Snapshot::default() }),
                Ok(None)
            );
            member.lost("its connection ended");
            assert!(member.shared.verdict().is_none());
            member
        };
        let now = Instant::now();
        let mut member = gone();
        assert_eq!(member.command(Command::Overdue(call(1).into()), now), []);
        expect(&member, VerdictKind::Left, 0);
        let mut member = gone();
        assert_eq!(member.command(Command::Accuse(report()), now), []);
        expect(&member, VerdictKind::LinkFailed, 2);
        let mut member = gone();
        member.shared.set_left(2);
        assert_eq!(member.command(Command::Accuse(report()), now), []);
        expect(&member, VerdictKind::Left, 2);
    }

    #[test]
    fn blobs_out_of_order_are_refused() {
        let gathered = |rank| Message::Gathered { round: 0, rank, blob: Bytes::new() };
        assert!(member().heard(gathered(1)).is_err());
        let mut member = member();
        for rank in 0..3 {
            assert_eq!(member.heard(gathered(rank)), Ok(None));
        }
        assert!(member.heard(gathered(0)).is_err(), "that exchange is over");
    }

    #[test]
    fn what_only_ranks_say_is_refused() {
        assert!(member().heard(Message::Joined).is_err());
        assert!(member().heard(Message::Left { rank: 3, last: Snapshot::default() }).is_err());
    }
}
