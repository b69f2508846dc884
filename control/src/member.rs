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
const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);
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
                    self.shared.is_judged(Instant::now() + VERDICT_TIMEOUT);
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
mod tests;
