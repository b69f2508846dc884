//! A rank's half of the control plane (no I/O): it answers the coordinator, concludes on its own
//! only if there is no coordinator to ask, and knows what another coordinator has to know.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use unisum_link::{CollectiveKind, Rank};

use super::message::{Message, StalledCall};
use super::shared::{Command, Shared};
use super::stall_diagnosis;
use super::status::{Lasts, describe};
use super::verdict::{Report, Verdict, VerdictKind};

/// How long the coordinator may take to a verdict on a call that is overdue: its own second for the
/// ranks' answers, and one for a busy machine.
pub(super) const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take to one on a link that failed. Longer: who ends a link is known by its
/// neighbours only, and if they came to verdicts of their own, because the coordinator's process
/// is stopped for a moment, each rank would name another.
pub const LINK_VERDICT_TIMEOUT: Duration = Duration::from_secs(10);

/// Communicators of which it is remembered what this rank did last in them.
const PARTED_MAX: usize = 1024;

pub(super) struct Member {
    shared: Arc<Shared>,
    /// The exchange under way, or the next.
    round: u32,
    blobs: Vec<Bytes>,
    /// When the coordinator must have come to a verdict that this rank asked for.
    verdict_by: Option<Instant>,
    /// What it was asked first.
    asked: Option<Asked>,
    /// Whether the coordinator knows this rank's verdict.
    has_told_verdict: bool,
    /// The rank that coordinates.
    coordinator: Rank,
    /// Whether it can be reached: not while another one is sought.
    is_connected: bool,
    /// Whether the connection to it was cut and may yet go on.
    is_cut: bool,
    /// Whether the pulse beside that connection ended, and not because its host is lost for
    /// certain.
    has_no_pulse: bool,
    /// Whether there is no coordinator, and never will be.
    is_alone: bool,
    /// By rank, whether it is gone, and what it did last if it left in order: what it has said of
    /// that it can't say again to another coordinator.
    gone: Vec<Option<Option<Lasts>>>,
    /// What this rank did last in communicators that it is no longer in.
    left_group: Lasts,
    /// The newest call that it has waited in for a while.
    stalled: Option<StalledCall>,
}

/// What needs a verdict.
#[derive(Clone, Debug)]
enum Asked {
    Accused(Report),
    Overdue(StalledCall),
}

impl Member {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            gone: vec![None; shared.world()],
            shared,
            round: 0,
            blobs: Vec::new(),
            verdict_by: None,
            asked: None,
            has_told_verdict: false,
            coordinator: 0,
            is_connected: true,
            is_cut: false,
            has_no_pulse: false,
            is_alone: false,
            left_group: BTreeMap::new(),
            stalled: None,
        }
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
            Message::StatusRequest { query, communicator, is_overdue } => {
                if is_overdue {
                    self.shared.is_judged();
                }
                let doing = self.shared.doing(communicator);
                return Ok(Some(Message::Status { query, doing }));
            }
            Message::Recount { communicator } => {
                let calls = self.shared.told(communicator);
                return Ok(Some(Message::Recounted { communicator, calls }));
            }
            Message::Verdict(verdict) => {
                self.has_told_verdict = true;
                self.conclude(verdict);
            }
            Message::Left { rank, last, left_group } if rank < self.shared.world() => {
                self.shared.set_left(rank);
                let lasts = left_group.into_iter().chain([(0, last)]);
                self.gone[rank] = Some(Some(lasts.collect()));
            }
            Message::HasParted { communicator, rank } if rank < self.shared.world() => {
                self.shared.set_left_group(communicator, rank);
            }
            other => return Err(format!("it sent {other:?}")),
        }
        Ok(None)
    }

    /// Does what this rank's threads ask; returns the messages to send.
    pub(super) fn command(&mut self, command: Command, now: Instant) -> Vec<Message> {
        let message = match command {
            Command::Exchange(share) => {
                if let Some(lasts) = &self.gone[self.coordinator] {
                    let last = lasts.as_ref().and_then(|lasts| lasts.get(&0));
                    self.conclude(Verdict::left(self.coordinator, last));
                }
                let round = self.round;
                let blob = |(to, blob): (Option<Rank>, Vec<u8>)| Message::Blob {
                    round,
                    to,
                    blob: blob.into(),
                };
                return share.blobs().map(blob).collect();
            }
            Command::Missing(waited) => {
                let millis = u32::try_from(waited.as_millis()).unwrap_or(u32::MAX);
                Some(Message::Missing { round: self.round, millis })
            }
            Command::Accuse(report) => self.ask(Asked::Accused(report), now),
            Command::Overdue(stalled) => self.ask(Asked::Overdue(stalled), now),
            // Who waits in a message asks again and again.
            Command::Stalled(stalled) if stalled.call.collective == CollectiveKind::Message => {
                Some(Message::Stalled(stalled))
            }
            Command::Stalled(stalled) => {
                self.stalled = Some(stalled.clone());
                Some(Message::Stalled(stalled))
            }
            Command::Part(communicator, last) => {
                self.left_group.insert(communicator, last);
                if self.left_group.len() > PARTED_MAX {
                    self.left_group.pop_first();
                }
                Some(Message::LeftGroup { communicator, last })
            }
            Command::Leave => {
                let bye = Message::Bye(self.shared.snapshot(0));
                return self.news().into_iter().chain([bye]).collect();
            }
            Command::Keep(line) => Some(Message::Keep(line)),
        };
        message.into_iter().collect()
    }

    /// What to tell the coordinator that it did not ask for: a verdict of this rank's own.
    pub(super) fn news(&mut self) -> Option<Message> {
        let verdict = self.shared.verdict().filter(|_| !self.has_told_verdict)?;
        let told = Message::Concluded(verdict.clone());
        self.has_told_verdict = true;
        Some(told)
    }

    /// The connection to the coordinator was cut: what it has to say may yet come.
    pub(super) const fn cut(&mut self) {
        self.is_cut = true;
    }

    /// The pulse beside the connection to the coordinator was ended by its host, or on the way
    /// there: what that is about, the coordinator says, or its silence.
    pub(super) const fn pulse_ended(&mut self) {
        self.has_no_pulse = true;
    }

    /// The connection goes on; the coordinator has as much time again for what it was asked.
    pub(super) fn goes_on(&mut self, now: Instant) {
        self.is_cut = false;
        if let Some(asked) = self.asked.clone() {
            self.verdict_by = None;
            self.expect_verdict(&asked, now);
        }
    }

    /// The connection to the coordinator ended. Whether another one is to be sought.
    pub(super) fn lost(&mut self, how: &str) -> bool {
        (self.is_connected, self.is_cut) = (false, false);
        if self.gone[self.coordinator].is_none() {
            self.conclude(Verdict::died(self.coordinator, how));
        }
        self.shared.verdict().is_none()
    }

    /// The rank that is to coordinate when the one that did is gone.
    pub(super) fn heir(&self) -> Option<Rank> {
        self.gone.iter().position(Option::is_none)
    }

    /// A rank can't be reached that is to coordinate.
    pub(super) fn is_unreachable(&mut self, rank: Rank) {
        self.gone[rank] = Some(None);
    }

    /// By rank, whether it is gone, and what it did last if it left in order.
    pub(super) fn gone(&self) -> Vec<Option<Option<Lasts>>> {
        self.gone.clone()
    }

    /// Another rank coordinates from now on; what it needs to know of this one.
    pub(super) fn coordinated_by(&mut self, coordinator: Rank, now: Instant) -> Vec<Message> {
        (self.coordinator, self.is_connected, self.verdict_by) = (coordinator, true, None);
        self.has_no_pulse = false;
        let left_group = self.left_group.iter();
        let left_group =
            left_group.map(|(&communicator, &last)| Message::LeftGroup { communicator, last });
        let mut said: Vec<_> = left_group.collect();
        said.extend(self.stalled.clone().map(Message::Stalled));
        said.extend(self.asked.clone().and_then(|asked| self.ask(asked, now)));
        said.extend(self.news());
        said
    }

    /// There is nobody who could coordinate.
    pub(super) fn is_alone(&mut self) {
        self.is_alone = true;
        if let Some(asked) = self.asked.take() {
            self.judge_alone(asked);
        }
    }

    /// The coordinator's host has not answered for `limit`.
    pub(super) fn unreachable(&mut self, lost: &[(Rank, IpAddr)], limit: Duration) {
        if self.gone[self.coordinator].is_none() {
            self.conclude(Verdict::unreachable(lost, limit));
        }
    }

    pub(super) fn violated(&mut self, what: impl std::fmt::Display) {
        self.conclude(Verdict::protocol(self.coordinator, what));
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.deadline().is_some_and(|by| by <= now) {
            let silent = Verdict::coordinator_silent;
            let verdict = match self.heir().filter(|_| !self.is_connected) {
                Some(heir) => silent(heir, "others left, and it is to take their place"),
                // The kernel of a process that is only stopped would not have ended it.
                None if self.has_no_pulse => Verdict::coordinator_lost(self.coordinator),
                None => silent(self.coordinator, "no verdict when one was asked for"),
            };
            self.conclude(verdict);
        }
    }

    /// When [`Member::tick`] has something to do.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        if self.is_cut { None } else { self.verdict_by }
    }

    /// Asks the coordinator for a verdict, or comes to one where there is none.
    fn ask(&mut self, asked: Asked, now: Instant) -> Option<Message> {
        if self.is_alone {
            self.judge_alone(asked);
            return None;
        }
        self.expect_verdict(&asked, now);
        Some(match asked {
            Asked::Accused(report) => Message::Accuse(self.with_cause(report)),
            Asked::Overdue(stalled) => Message::Overdue(stalled),
        })
    }

    /// Without a coordinator nobody can be asked what it is doing.
    fn judge_alone(&mut self, asked: Asked) {
        let verdict = match asked {
            Asked::Accused(report) => {
                let report = self.with_cause(report);
                let against = report.against;
                let is_link = report.finding.is_of_link();
                let gone = self.gone.get(against).and_then(Option::as_ref).filter(|_| is_link);
                match gone {
                    Some(lasts) => {
                        let last = lasts.as_ref().and_then(|it| it.get(&report.communicator));
                        Verdict::left(against, last)
                    }
                    None => report.verdict(self.shared.rank),
                }
            }
            Asked::Overdue(StalledCall { call, uncounted, .. }) => {
                let call = describe(&call, uncounted);
                let (rank, coordinator) = (self.shared.rank, self.coordinator);
                let text = format!(
                    "{call} is overdue on rank {rank}: rank {coordinator}, the coordinator, has \
                     left, so that no rank can be asked what it is doing"
                );
                Verdict::new(VerdictKind::Left, vec![coordinator], text)
            }
        };
        self.conclude(verdict);
    }

    /// The report on a failed link, or on the rank because of which the link may have failed: one
    /// that left the job in order, and that the call waits for which this rank is in. The rank at
    /// the other end may have heard so, and ended, before this one reached the next coordinator.
    fn with_cause(&self, report: Report) -> Report {
        if !report.finding.is_of_link() || report.against == self.shared.rank {
            return report;
        }
        let communicator = report.communicator;
        let Some((doing, ranks)) = self.shared.place(communicator) else { return report };
        let is_cause = |rank: &Rank| match &self.gone[*rank] {
            Some(Some(lasts)) => lasts
                .get(&communicator)
                .is_some_and(|last| stall_diagnosis::is_missed(last, &doing)),
            _ => false,
        };
        let cause = ranks.iter().copied().find(is_cause);
        Report { against: cause.unwrap_or(report.against), ..report }
    }

    fn expect_verdict(&mut self, asked: &Asked, now: Instant) {
        if self.shared.verdict().is_some() {
            return;
        }
        let by = match asked {
            Asked::Overdue(_) => now + VERDICT_TIMEOUT,
            Asked::Accused(_) => now + LINK_VERDICT_TIMEOUT,
        };
        self.verdict_by = Some(self.verdict_by.map_or(by, |before| before.min(by)));
        self.asked.get_or_insert_with(|| asked.clone());
    }

    pub(super) fn conclude(&mut self, verdict: Verdict) {
        (self.verdict_by, self.asked) = (None, None);
        self.shared.conclude(verdict);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use unisum_link::Call;

    use super::*;
    use crate::coordinator::Coordinator;
    use crate::status::Snapshot;
    use crate::tests::call;
    use crate::verdict::Finding;

    fn member() -> Member {
        Member::new(Arc::new(Shared::new(1, 3)))
    }

    #[track_caller]
    fn expect(member: &Member, kind: VerdictKind, failed_rank: usize) {
        let verdict = member.shared.verdict().expect("a verdict");
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (kind, &[failed_rank][..]));
        assert_eq!(member.deadline(), None);
    }

    fn report() -> Report {
        let text = "link to rank 2: closed";
        Report::new(0, 2, Finding::LinkFailed, text)
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
    fn who_is_asked_why_a_call_is_overdue_waits_for_the_verdict_before_it_goes_on() {
        let mut member = member();
        let question =
            |is_overdue| Message::StatusRequest { query: 1, communicator: 0, is_overdue };
        let comes = |member: &Member, limit| {
            let shared = member.shared.clone();
            thread::spawn(move || shared.await_verdict_that_comes(limit).cloned())
        };
        // Far beyond what the test takes.
        let never = Duration::from_secs(600);
        assert!(member.heard(question(false)).unwrap().is_some());
        assert_eq!(comes(&member, never).join().unwrap(), None, "nobody gives up");
        assert!(member.heard(question(true)).unwrap().is_some());
        let waits = comes(&member, never);
        let verdict = Verdict::new(VerdictKind::NotEntered, vec![1], "too late");
        member.heard(Message::Verdict(verdict.clone())).unwrap();
        assert_eq!(waits.join().unwrap(), Some(verdict));
    }

    #[test]
    fn a_verdict_that_does_not_come_is_awaited_once() {
        let mut member = member();
        let question = Message::StatusRequest { query: 1, communicator: 0, is_overdue: true };
        member.heard(question).unwrap();
        let start = Instant::now();
        let limit = Duration::from_millis(20);
        assert_eq!(member.shared.await_verdict_that_comes(limit), None);
        assert!(start.elapsed() >= limit);
        assert_eq!(member.shared.await_verdict_that_comes(Duration::from_secs(600)), None);
    }

    #[test]
    fn a_coordinator_that_was_cut_off_is_not_silent() {
        let (mut member, now) = (member(), Instant::now());
        member.command(Command::Overdue(call(1).into()), now);
        member.cut();
        member.tick(now + VERDICT_TIMEOUT * 9);
        assert!(member.deadline().is_none() && member.shared.verdict().is_none());
        member.goes_on(now + VERDICT_TIMEOUT * 9);
        assert_eq!(member.deadline(), Some(now + VERDICT_TIMEOUT * 10));
        member.tick(now + VERDICT_TIMEOUT * 10);
        expect(&member, VerdictKind::Unresponsive, 0);
    }

    #[test]
    fn a_coordinator_that_is_silent_after_its_pulse_ended_is_lost() {
        let (mut member, now) = (member(), Instant::now());
        member.command(Command::Overdue(call(1).into()), now);
        member.pulse_ended();
        member.tick(now + VERDICT_TIMEOUT / 2);
        assert!(member.shared.verdict().is_none());
        member.tick(now + VERDICT_TIMEOUT);
        expect(&member, VerdictKind::Unreachable, 0);
    }

    fn left(rank: Rank) -> Message {
        Message::Left { rank, last: Snapshot::default(), left_group: Vec::new() }
    }

    fn leave(member: &mut Member, rank: Rank) {
        assert_eq!(member.heard(left(rank)), Ok(None));
    }

    #[test]
    fn an_heir_that_is_silent_is_unresponsive() {
        let (mut member, now) = (Member::new(Arc::new(Shared::new(2, 3))), Instant::now());
        leave(&mut member, 0);
        assert!(member.lost("its connection ended"), "another one is sought");
        member.command(Command::Overdue(call(1).into()), now);
        member.tick(now + VERDICT_TIMEOUT);
        expect(&member, VerdictKind::Unresponsive, 1);
    }

    #[test]
    fn without_any_coordinator_a_rank_concludes_on_its_own() {
        let alone = || {
            let mut member = member();
            leave(&mut member, 0);
            assert!(member.lost("its connection ended"), "another one is sought");
            member.is_alone();
            assert!(member.shared.verdict().is_none());
            member
        };
        let now = Instant::now();
        let mut member = alone();
        assert_eq!(member.command(Command::Overdue(call(1).into()), now), []);
        expect(&member, VerdictKind::Left, 0);
        let mut member = alone();
        assert_eq!(member.command(Command::Accuse(report()), now), []);
        expect(&member, VerdictKind::LinkFailed, 2);
        let mut member = alone();
        leave(&mut member, 2);
        assert_eq!(member.command(Command::Accuse(report()), now), []);
        expect(&member, VerdictKind::Left, 2);
        // Its last message had another length: that is what went wrong, and not that it left.
        let mut member = alone();
        let text = "rank 1 receives 8 bytes, rank 0 sent 4";
        let finding = Finding::Mismatch;
        let differs = Report::new(0, 0, finding, text);
        member.command(Command::Accuse(differs), now);
        let verdict = member.shared.verdict().unwrap();
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::Mismatch, &[0, 1][..]));
    }

    /// Rank 1 heard of it first, reported it, and ended: this rank sees the link to it end.
    #[test]
    fn who_ended_because_another_rank_left_is_not_blamed_for_a_link() {
        let last = |number| Snapshot { call: Some(call(number)), ..Snapshot::default() };
        for (group_last, names) in [(Some(last(3)), 0), (Some(last(4)), 1), (None, 1)] {
            let mut member = Member::new(Arc::new(Shared::new(2, 4)));
            let status = member.shared.enroll(7, [0, 1, 2].into(), 2);
            status.begin(&Call { communicator: 7, ..call(4) });
            let (now, link) = (Instant::now(), "link to rank 1: closed");
            let report = Report::new(7, 1, Finding::LinkFailed, link);
            // Before it has heard that rank 0 left.
            let said = member.command(Command::Accuse(report.clone()), now);
            assert_eq!(said, [Message::Accuse(report.clone())]);
            leave(&mut member, 3);
            let left_group = group_last.map(|last| (7, last)).into_iter().collect();
            member.heard(Message::Left { rank: 0, last: last(9), left_group }).unwrap();
            assert!(member.lost("its connection ended"));
            member.is_unreachable(1);
            assert_eq!(member.heir(), Some(2), "itself");
            let mut heir = Coordinator::heir([7; 16], 2, member.gone(), now);
            for message in member.coordinated_by(2, now) {
                heir.heard(2, message, now);
            }
            heir.tick(now + Duration::from_secs(1));
            while let Some(output) = heir.poll() {
                output.messages.into_iter().for_each(|it| drop(member.heard(it).unwrap()));
            }
            let verdict = member.shared.verdict().expect("a verdict");
            assert_eq!(verdict.failed_ranks, [names], "{group_last:?}: {verdict}");
            let is_left = verdict.kind == VerdictKind::Left;
            assert_eq!(is_left, names == 0, "{verdict}");
        }
    }

    #[test]
    fn the_lowest_rank_that_is_left_is_the_heir() {
        let mut member = member();
        leave(&mut member, 0);
        assert_eq!(member.heir(), Some(1));
        let mut member = Member::new(Arc::new(Shared::new(2, 4)));
        leave(&mut member, 0);
        leave(&mut member, 3);
        assert_eq!(member.heir(), Some(1));
        member.is_unreachable(1);
        assert_eq!(member.heir(), Some(2), "itself");
        assert_eq!(member.gone()[1], Some(None));
    }

    #[test]
    fn what_was_asked_while_the_coordinator_left_is_asked_of_the_heir() {
        let now = Instant::now();
        for asks_later in [false, true] {
            let mut member = member();
            let part = Command::Part(3, Snapshot::default());
            member.command(part, now);
            let report = report();
            if !asks_later {
                member.command(Command::Accuse(report.clone()), now);
            }
            leave(&mut member, 0);
            assert!(member.lost("its connection ended"));
            if asks_later {
                member.command(Command::Accuse(report.clone()), now);
            }
            let later = now + LINK_VERDICT_TIMEOUT / 2;
            let said = member.coordinated_by(2, later);
            let left_group = Message::LeftGroup { communicator: 3, last: Snapshot::default() };
            assert_eq!(said, [left_group, Message::Accuse(report)]);
            member.tick(now + LINK_VERDICT_TIMEOUT);
            assert!(member.shared.verdict().is_none(), "the heir has as much time");
            member.tick(later + LINK_VERDICT_TIMEOUT);
            expect(&member, VerdictKind::Unresponsive, 2);
        }
    }

    #[test]
    fn a_verdict_of_its_own_is_told_once_and_before_the_goodbye() {
        let now = Instant::now();
        let asking = || {
            let mut member = member();
            member.command(Command::Overdue(call(1).into()), now);
            member.tick(now + VERDICT_TIMEOUT);
            member
        };
        let mut telling = asking();
        let told = telling.news();
        assert!(
            matches!(&told, Some(Message::Concluded(it)) if it.failed_ranks == [0]),
            "{told:?}"
        );
        assert_eq!(telling.news(), None);
        let said = asking().command(Command::Leave, now);
        assert!(matches!(said[..], [Message::Concluded(_), Message::Bye(_)]), "{said:?}");
        let mut told = member();
        told.heard(Message::Verdict(Verdict::died(2, "killed"))).unwrap();
        assert_eq!(told.news(), None);
    }

    #[test]
    fn a_coordinator_that_is_stopped_for_a_moment_is_not_to_blame_for_a_failed_link() {
        let (mut asking, now) = (member(), Instant::now());
        asking.command(Command::Accuse(report()), now);
        asking.tick(now + LINK_VERDICT_TIMEOUT - Duration::from_secs(1));
        asking.heard(Message::Verdict(Verdict::died(2, "killed"))).unwrap();
        expect(&asking, VerdictKind::Died, 2);
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
        assert!(member().heard(left(3)).is_err());
    }
}
