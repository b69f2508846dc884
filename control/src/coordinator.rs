//! The coordinator's decisions (sans-IO): what ranks say and what happens to their connections
//! goes in, messages come out, and time is an argument.

mod cuts;
mod left_group;
mod questions;
mod waited;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use unisum_link::Rank;

use self::questions::Query;
use self::waited::Waited;
use super::comparison::Comparison;
use super::message::{Message, StalledCall};
use super::round::Round;
use super::status::{Lasts, Snapshot};
use super::verdict::{Finding, Report, Verdict};

/// How long a rank that is accused of a failed link may take to turn out dead, or gone.
const GRACE: Duration = Duration::from_millis(300);
/// The same for one whose host acknowledges nothing: until its pulse has stopped as well, which is
/// felt a second or two later, and all are known that were lost with it.
const CUT_GRACE: Duration = Duration::from_secs(4);
/// The same for one whose control connection was cut: whether its process is there is found out
/// meanwhile.
const FLAP_GRACE: Duration = Duration::from_secs(3);
/// How long ranks that had not come when the start failed may come to hear why.
const LATECOMER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long ranks may take to say what they are doing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// How long ranks may take to come to one that coordinates in another's place.
const HEIR_TIMEOUT: Duration = Duration::from_secs(3);

/// Communicators of which it is remembered who is no longer in them.
const PARTED_MAX: usize = 1024;

/// Whom an output is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Audience {
    /// Every rank that is connected, rank 0 among them.
    All,
    /// One rank, which may be rank 0.
    One(Rank),
}

impl Audience {
    pub(super) fn includes(self, rank: Rank) -> bool {
        self == Self::All || self == Self::One(rank)
    }
}

/// Messages to send, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) audience: Audience,
    pub(super) messages: Vec<Message>,
}

/// The coordinator's half of the control plane: it gathers the blobs of exchanges and decides,
/// once, why the communicator ends. It is on rank 0, until that has left and its process has ended.
#[derive(Debug)]
pub(super) struct Coordinator {
    own: Rank,
    session: [u8; 16],
    connect_timeout: Duration,
    states: Vec<MemberState>,
    round: Round,
    /// Who died, and how, since the coordinator last did what was due.
    deaths: Vec<(Rank, String)>,
    accusations: Vec<Accusation>,
    /// Whose connections were cut and may yet go on.
    cut: BTreeSet<Rank>,
    query: Query,
    /// What ranks are asked whose calls differ, or may.
    comparison: Option<Comparison>,
    /// What ranks did last in the communicators that they are no longer in.
    left_group: BTreeMap<u32, BTreeMap<Rank, Snapshot>>,
    /// The newest call that somebody has waited in for a while, and who: by communicator and, as
    /// groups without common ranks may have one number, the lowest rank.
    waiting: HashMap<(u32, Rank), (Rank, StalledCall)>,
    /// Until when ranks may come, if this coordinates in another's place or the start has failed.
    awaits_until: Option<Instant>,
    /// Whether the start has failed and those who had not come were awaited, once.
    awaited_latecomers: bool,
    /// How long an exchange has been waiting, and what is known of those that it waits for.
    waited: Waited,
    /// What may keep the others from finding rank 0.
    doubt: Option<String>,
    patience: Duration,
    /// What was warned of that may yet go on.
    warned: String,
    verdict: Option<Verdict>,
    outputs: VecDeque<Output>,
}

/// What is known of a rank's membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemberState {
    /// It has not come yet.
    Absent,
    /// It has proven the token, and may yet give up and dial again.
    Connected,
    /// It has joined.
    Joined,
    /// It left in order.
    Left,
    /// It did not come to this coordinator after another one had left: its process has ended, in
    /// order or not.
    Gone,
    /// Its connection ended, and there is a verdict.
    Dead,
}

/// A failed link that waits for a better explanation.
#[derive(Debug)]
struct Accusation {
    by: Rank,
    report: Report,
    until: Instant,
}

impl Coordinator {
    /// The coordinator of a world in which rank 0 is alone as yet.
    pub(super) fn new(session: [u8; 16], world: usize, connect_timeout: Duration) -> Self {
        let mut states = vec![MemberState::Absent; world];
        states[0] = MemberState::Joined;
        Self {
            own: 0,
            session,
            connect_timeout,
            states,
            round: Round::new(world),
            deaths: Vec::new(),
            accusations: Vec::new(),
            cut: BTreeSet::new(),
            query: Query::new(world),
            comparison: None,
            left_group: BTreeMap::new(),
            waiting: HashMap::new(),
            awaits_until: None,
            awaited_latecomers: false,
            waited: Waited::default(),
            doubt: None,
            patience: LATECOMER_TIMEOUT,
            warned: String::new(),
            verdict: None,
            outputs: VecDeque::new(),
        }
    }

    /// With what may keep the others from finding rank 0, for who waits for them.
    pub(super) fn doubting(self, doubt: Option<String>) -> Self {
        Self { doubt, ..self }
    }

    /// One that awaits ranks for so long after the start has failed.
    pub(super) fn awaiting(self, patience: Option<Duration>) -> Self {
        Self { patience: patience.unwrap_or(self.patience), ..self }
    }

    /// The coordinator on rank `own`, after others have left: of each rank, whether it is gone, and
    /// what it did last in its communicators if it left in order.
    pub(super) fn heir(
        session: [u8; 16],
        own: Rank,
        gone: Vec<Option<Option<Lasts>>>,
        now: Instant,
    ) -> Self {
        // Exchanges, which take a connect timeout, belong to the start.
        let mut heir = Self::new(session, gone.len(), Duration::ZERO);
        heir.own = own;
        heir.awaits_until = Some(now + HEIR_TIMEOUT);
        for (rank, gone) in gone.into_iter().enumerate() {
            heir.states[rank] = match gone {
                None => MemberState::Absent,
                Some(None) => MemberState::Gone,
                Some(Some(lasts)) => {
                    for (communicator, last) in lasts {
                        heir.left_group.entry(communicator).or_default().insert(rank, last);
                    }
                    MemberState::Left
                }
            };
        }
        heir.states[own] = MemberState::Joined;
        heir
    }

    /// Whether ranks need a coordinator, whatever this process's own does.
    pub(super) fn is_needed(&self) -> bool {
        let mut others = self.states.iter().enumerate().filter(|(rank, _)| *rank != self.own);
        let is_there = |states: &MemberState| {
            matches!(states, MemberState::Absent | MemberState::Connected | MemberState::Joined)
        };
        let needs_verdict = self.verdict.is_none() && others.any(|(_, it)| is_there(it));
        needs_verdict || self.awaits_ranks()
    }

    /// Whether ranks may yet come to this coordinator: who were with another one before, or who are
    /// to hear why the start has failed.
    pub(super) fn awaits_ranks(&self) -> bool {
        self.awaits_until.is_some() && !self.all_came()
    }

    /// Whether a connection that claims this rank may be admitted.
    pub(super) fn is_vacant(&self, rank: Rank) -> bool {
        self.states.get(rank) == Some(&MemberState::Absent)
    }

    /// Why nobody can be this rank any more; `None` if a process is.
    pub(super) fn too_late(&self, rank: Rank) -> Option<&'static str> {
        match self.states.get(rank) {
            _ if self.verdict.is_some() => Some("the job has ended"),
            Some(MemberState::Left | MemberState::Gone | MemberState::Dead) => {
                Some("the job has started, and whoever was this rank has left it")
            }
            _ => None,
        }
    }

    /// Whether nobody is awaited any more.
    pub(super) fn all_came(&self) -> bool {
        !self.states.iter().any(|p| matches!(p, MemberState::Absent | MemberState::Connected))
    }

    /// How long ranks are awaited that are to hear why the start has failed.
    pub(super) const fn patience(&self) -> Duration {
        self.patience
    }

    /// A rank's connection is admitted: it was vacant.
    pub(super) fn connected(&mut self, rank: Rank) {
        self.states[rank] = MemberState::Connected;
        let mut messages = vec![Message::Welcome { session: self.session }];
        messages.extend(self.verdict.clone().map(Message::Verdict));
        if let Some(overdue) = &self.query.open {
            messages.push(overdue.question(self.query.number));
        }
        self.outputs.push_back(Output { audience: Audience::One(rank), messages });
    }

    /// A rank's connection ended. Without a goodbye before it, the rank is dead, which counts at
    /// the next [`Coordinator::tick`]: what others said by now comes first. If this process was
    /// stopped for a while, they may have come to a verdict without it.
    pub(super) fn lost(&mut self, rank: Rank, how: &str) {
        self.cut.remove(&rank);
        match self.states[rank] {
            MemberState::Connected => {
                self.states[rank] = MemberState::Absent;
                self.waited.note(rank, format!("connected, but did not join: {how}"));
            }
            MemberState::Joined => {
                self.states[rank] = MemberState::Dead;
                self.deaths.push((rank, how.to_owned()));
            }
            MemberState::Absent | MemberState::Left | MemberState::Gone | MemberState::Dead => {}
        }
    }

    /// The hosts of these ranks have not answered for `limit`.
    pub(super) fn unreachable(&mut self, lost: &[(Rank, IpAddr)], limit: Duration) {
        let is_here = |(rank, _): &&(Rank, IpAddr)| self.states[*rank] == MemberState::Joined;
        let lost: Vec<_> = lost.iter().filter(is_here).copied().collect();
        if !lost.is_empty() {
            self.conclude(Verdict::unreachable(&lost, limit));
        }
    }

    /// A rank sent nonsense.
    pub(super) fn violated(&mut self, rank: Rank, what: impl std::fmt::Display) {
        self.conclude(Verdict::protocol(rank, what));
    }

    /// A rank said something.
    pub(super) fn heard(&mut self, from: Rank, message: Message, now: Instant) {
        match (message, self.states[from]) {
            (Message::Joined, MemberState::Connected) => self.states[from] = MemberState::Joined,
            (_, MemberState::Connected | MemberState::Absent) => {
                self.violated(from, "it spoke before it joined");
            }
            (_, MemberState::Left | MemberState::Gone | MemberState::Dead) => {}
            (Message::Blob { round, to, blob }, _) => {
                self.take_blob(from, round, (to, blob), now);
            }
            (Message::Accuse(report), _) => self.accused(from, report, now),
            (Message::Recounted { communicator, calls }, _) => {
                if let Some(comparison) = &mut self.comparison {
                    comparison.heard(from, communicator, calls);
                }
                self.hear_out();
            }
            (Message::Concluded(verdict), _) => self.conclude(verdict),
            (Message::Overdue(stalled), _) => self.ask(from, stalled, false, now),
            (Message::Stalled(stalled), _) => self.ask(from, stalled, true, now),
            (Message::Status { query, doing }, _) => self.answered(from, query, doing, now),
            (Message::LeftGroup { communicator, last }, _) => {
                self.left_group(from, communicator, last)
            }
            (Message::Missing { round, millis }, _) => self.given_up(round, millis, now),
            // What others send the thread of rank 0 has taken; nobody keeps lines in its place.
            (Message::Keep(_), _) => {}
            (Message::Bye(last), _) => self.left(from, last, now),
            (message, _) => self.violated(from, format_args!("it sent {message:?}")),
        }
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        for (rank, how) in std::mem::take(&mut self.deaths) {
            self.conclude(Verdict::died(rank, &how));
        }
        if self.verdict.is_some() && !self.all_came() && !self.awaited_latecomers {
            // Ranks are started together: who is a moment late hears why, and not only that nobody
            // is here.
            self.awaited_latecomers = true;
            self.awaits_until.get_or_insert(now + self.patience);
        }
        if self.awaits_until.is_some_and(|until| until <= now) {
            self.awaits_until = None;
            let absent = self.states.iter_mut().filter(|it| **it == MemberState::Absent);
            absent.for_each(|states| *states = MemberState::Gone);
        }
        if self.round.until.is_some() {
            self.look_who_is_missing(now);
        }
        if self.query.open.as_ref().is_some_and(|overdue| overdue.until <= now) {
            self.decide(now);
        }
        if let Some(comparison) = self.comparison.take_if(|comparison| comparison.until <= now) {
            self.end(comparison);
        }
        let due = self.accusations.iter().find(|accusation| accusation.until <= now);
        if let Some(due) = due.filter(|_| !self.is_asking()) {
            self.conclude(due.report.verdict(due.by));
        }
    }

    /// When [`Coordinator::tick`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let is_asking = self.is_asking();
        let accusations = self.accusations.iter().filter(|_| !is_asking);
        let accusations = accusations.map(|accusation| accusation.until);
        let query = self.query.open.as_ref().map(|overdue| overdue.until);
        let awaited = self.waited.deadline(&self.round);
        let comparison = self.comparison.as_ref().map(|comparison| comparison.until);
        let asked = query.into_iter().chain(comparison);
        let ranks = self.awaits_until.filter(|_| self.awaits_ranks());
        accusations.chain(asked).chain(awaited).chain(ranks).min()
    }

    /// The next messages to send.
    pub(super) fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn tell_all(&mut self, messages: Vec<Message>) {
        self.outputs.push_back(Output { audience: Audience::All, messages });
    }

    /// Ends the communicator, unless it is over already: the first verdict counts. Nothing is
    /// awaited any more.
    pub(super) fn conclude(&mut self, verdict: Verdict) {
        if self.verdict.is_some() {
            return;
        }
        // Calls that differ come before what follows from them.
        let certain = self.comparison.take().filter(Comparison::is_certain);
        let verdict = certain.and_then(Comparison::verdict).unwrap_or(verdict);
        self.verdict = Some(verdict.clone());
        self.round.until = None;
        self.deaths.clear();
        self.waited = Waited::default();
        self.accusations.clear();
        (self.query.open, self.query.next) = (None, None);
        self.tell_all(vec![Message::Verdict(verdict)]);
    }

    fn take_blob(
        &mut self,
        from: Rank,
        round: u32,
        (to, blob): (Option<Rank>, Bytes),
        now: Instant,
    ) {
        if self.verdict.is_some() {
            return;
        }
        if !self.round.take(from, round, to, blob) {
            let what = "it took part twice, out of order, or with too much";
            return self.violated(from, format_args!("in exchange {round} {what}"));
        }
        self.waited.began(&mut self.round, self.connect_timeout, now);
        if let Some(gone) = self.find(|states| matches!(states, MemberState::Left)) {
            return self.conclude(self.has_left(0, gone));
        }
        if self.round.is_whole() {
            for (to, messages) in self.round.end() {
                let audience = to.map_or(Audience::All, Audience::One);
                self.outputs.push_back(Output { audience, messages });
            }
        }
    }

    fn accused(&mut self, by: Rank, report: Report, now: Instant) {
        let against = report.against;
        match self.states.get(against) {
            None => self.violated(by, format_args!("it accused rank {against}")),
            Some(_) if self.verdict.is_some() => {}
            Some(_) if report.finding == Finding::Mismatch && against != by => {
                let communicator = report.communicator;
                // In a group nobody knows here who else is in it.
                let ranks = match communicator {
                    0 => (0..self.states.len()).collect(),
                    _ => vec![by, against],
                };
                self.ask_what(communicator, &ranks, Some(report.verdict(by)), now);
            }
            // What a rank says of itself needs no other explanation.
            Some(_) if !report.finding.is_of_link() || against == by => {
                self.conclude(report.verdict(by));
            }
            Some(states)
                if *states == MemberState::Left
                    || self.last_of(report.communicator, against).is_some() =>
            {
                self.conclude(self.has_left(report.communicator, against));
            }
            Some(_) => {
                let until = match report.finding {
                    Finding::Cut => self.cut_is_certain_at(now),
                    _ if self.cut.contains(&against) => now + FLAP_GRACE,
                    _ => now + GRACE,
                };
                self.accusations.push(Accusation { by, report, until });
            }
        }
    }

    /// When nothing is expected any more that explains why two ranks do not reach each other. At a
    /// start that is before those who wait for them give up: a connection may take half of the
    /// connect timeout, and measuring three quarters.
    fn cut_is_certain_at(&self, now: Instant) -> Instant {
        let is_start = self.round.until.is_some();
        let most = if is_start { self.connect_timeout / 8 } else { CUT_GRACE };
        now + CUT_GRACE.min(most).max(GRACE)
    }

    /// Asks ranks what they called last in a communicator; `verdict` is concluded if nothing more
    /// comes of it. Does nothing while others are asked that differ for certain.
    fn ask_what(
        &mut self,
        communicator: u32,
        ranks: &[Rank],
        verdict: Option<Verdict>,
        now: Instant,
    ) {
        let open = self.comparison.as_ref();
        let goes_on = open.is_some_and(|open| open.is_certain() || verdict.is_none());
        if self.verdict.is_some() || goes_on {
            return;
        }
        let here = ranks.iter().filter(|&&rank| self.states[rank] == MemberState::Joined);
        let until = now + ANSWER_TIMEOUT;
        let comparison = Comparison::new(communicator, here.copied(), verdict, until);
        for rank in comparison.ranks() {
            let messages = vec![Message::Recount { communicator }];
            self.outputs.push_back(Output { audience: Audience::One(rank), messages });
        }
        self.comparison = Some(comparison);
        self.hear_out();
    }

    /// Ends a comparison if all have answered.
    fn hear_out(&mut self) {
        if let Some(comparison) = self.comparison.take_if(|comparison| comparison.is_whole()) {
            self.end(comparison);
        }
    }

    fn end(&mut self, comparison: Comparison) {
        if let Some(verdict) = comparison.verdict() {
            self.conclude(verdict);
        }
    }

    fn find(&self, is: impl Fn(&MemberState) -> bool) -> Option<Rank> {
        self.states.iter().position(is)
    }
}

#[cfg(test)]
mod tests;
