//! Questions what all ranks are doing, when a call takes long.

use std::time::{Duration, Instant};

use unisum_link::{CollectiveKind, Rank};

use super::{ANSWER_TIMEOUT, Coordinator, MemberState};
use crate::callers::Hold;
use crate::crossing;
use crate::doing::Doing;
use crate::message::{Message, StalledCall};
use crate::stall_diagnosis::{self, RankReport};

/// Who takes so long over an answer, which a thread that does nothing else gives, was stopped.
pub(super) const LATE_ANSWER: Duration = Duration::from_millis(250);

/// The newest question what all ranks are doing.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) number: u32,
    asked: Option<Instant>,
    /// By rank, and whether it took long over it.
    pub(super) answers: Vec<Option<(Doing, bool)>>,
    pub(super) open: Option<Overdue>,
    /// Who has asked meanwhile, and what about: what was answered before may not tell.
    pub(super) next: Option<(Rank, StalledCall)>,
}

/// The call that made a query necessary.
#[derive(Clone, Debug)]
pub(super) struct Overdue {
    pub(super) stalled: StalledCall,
    by: Rank,
    pub(super) until: Instant,
    /// Whether the call may go on if all ranks are in it: it is late and not overdue.
    pub(super) patient: bool,
}

impl Overdue {
    pub(super) const fn question(&self, query: u32) -> Message {
        let communicator = self.stalled.call.communicator;
        Message::StatusRequest { query, communicator, is_overdue: !self.patient }
    }
}

impl Query {
    pub(super) fn new(world: usize) -> Self {
        Self { number: 0, asked: None, answers: vec![None; world], open: None, next: None }
    }
}

impl Coordinator {
    /// Whether ranks are being asked why a call is overdue: then links fail because some have given
    /// up already.
    pub(super) fn is_asking(&self) -> bool {
        self.query.open.as_ref().is_some_and(|overdue| !overdue.patient)
    }

    /// Starts to find out why a call takes so long, unless that is under way.
    pub(super) fn ask(&mut self, by: Rank, stalled: StalledCall, patient: bool, now: Instant) {
        let communicator = stalled.call.communicator;
        if patient && stalled.call.collective == CollectiveKind::Message {
            self.look_who_sends(by, &stalled);
        } else if patient {
            let lowest = stalled.ranks.iter().min().copied().unwrap_or(0);
            self.waiting.insert((communicator, lowest), (by, stalled.clone()));
            self.look_who_is_gone(communicator);
        }
        if let Some(open) = &self.query.open {
            // Who is merely late asks once, and again for all when this is decided; who is overdue
            // asks for another communicator instead.
            if patient {
                self.query.next = Some((by, stalled));
                return;
            }
            // What was asked out of patience is asked again, as a question that a verdict follows.
            if !open.patient {
                return;
            }
        }
        if self.verdict.is_some() {
            return;
        }
        let number = self.query.number.wrapping_add(1);
        let open = Overdue { stalled, by, until: now + ANSWER_TIMEOUT, patient };
        let question = open.question(number);
        let answers = vec![None; self.states.len()];
        let next = self.query.next.take();
        self.query = Query { number, asked: Some(now), answers, open: Some(open), next };
        self.tell_all(vec![question]);
    }

    pub(super) fn answered(&mut self, from: Rank, query: u32, doing: Doing, now: Instant) {
        if query == self.query.number {
            let took = self.query.asked.map_or(Duration::ZERO, |asked| now - asked);
            self.query.answers[from] = Some((doing, took >= LATE_ANSWER));
            self.decide_if_all_answered(now);
        }
    }

    pub(super) fn decide_if_all_answered(&mut self, now: Instant) {
        let mut ranks = self.states.iter().zip(&self.query.answers);
        let is_away =
            |states: &MemberState| matches!(states, MemberState::Left | MemberState::Gone);
        if ranks.all(|(states, answer)| answer.is_some() || is_away(states)) {
            self.decide(now);
        }
    }

    pub(super) fn decide(&mut self, now: Instant) {
        let Some(Overdue { stalled, by, patient, .. }) = self.query.open.take() else {
            return;
        };
        let left_group = self.left_group.get(&stalled.call.communicator);
        let last = |rank| left_group.and_then(|left_group| left_group.get(&rank)).copied();
        let answered = |rank: Rank| {
            self.query.answers[rank].as_ref().map(|(doing, is_late)| (doing.here, *is_late))
        };
        let report = |rank| match (self.states[rank], last(rank), answered(rank)) {
            (_, Some(last), _) => RankReport::Left(last),
            // What it did in a group may be forgotten, or known to an earlier coordinator only.
            (MemberState::Left | MemberState::Gone, None, _) => RankReport::Gone,
            (_, None, Some((snapshot, false))) => RankReport::Here(snapshot),
            // While it was stopped the others waited; what it does now is of another moment.
            (_, None, Some((snapshot, true))) => RankReport::Late(snapshot),
            (_, None, None) => RankReport::Silent,
        };
        let mut reports: Vec<_> = (0..self.states.len()).map(report).collect();
        let ranks = &stalled.ranks;
        if !ranks.is_empty() {
            let apart = reports.iter_mut().enumerate().filter(|(rank, _)| !ranks.contains(rank));
            apart.for_each(|(_, report)| *report = RankReport::Apart);
        }
        let answers = self.query.answers.iter_mut().map(|answer| answer.take().map(|it| it.0));
        let doings: Vec<Option<Doing>> = answers.collect();
        if patient {
            self.look_whether_all_go_on((by, &stalled), &reports, &doings, now);
            return self.ask_next(now);
        }
        // If everybody has left, nobody waits for anybody.
        let is_away = |it: &RankReport| {
            matches!(it, RankReport::Left(_) | RankReport::Gone | RankReport::Apart)
        };
        if reports.iter().all(is_away) {
            return self.ask_next(now);
        }
        let decide = match stalled.call.collective {
            CollectiveKind::Message => stall_diagnosis::decide_message,
            _ => stall_diagnosis::decide,
        };
        let verdict = decide(&stalled, by, &reports);
        self.conclude(crossing::explain(verdict, stalled.call.communicator, &doings));
    }

    /// Who asked meanwhile asks no more.
    fn ask_next(&mut self, now: Instant) {
        if let Some((by, stalled)) = self.query.next.take() {
            self.ask(by, stalled, true, now);
        }
    }

    /// Somebody has waited for a while: ends the job if somebody waits for what never comes.
    fn look_whether_all_go_on(
        &mut self,
        (by, stalled): (Rank, &StalledCall),
        reports: &[RankReport],
        doings: &[Option<Doing>],
        now: Instant,
    ) {
        if let Some(crossing) = crossing::find(doings, Hold::Process) {
            return self.conclude(crossing.verdict());
        }
        if let Some(crossing) = crossing::find(doings, Hold::Callers) {
            let text = crossing.text();
            if self.warned != text {
                unisum_link::warning!("{text}\nunless another thread of one of them calls");
                self.warned = text;
            }
        }
        if stalled.call.collective == CollectiveKind::Message {
            return;
        }
        // Who has all it waited for may be in a later call than the one that differs.
        let verdict = stall_diagnosis::contradiction(by, reports);
        let here =
            |rank: &Rank| matches!(reports[*rank], RankReport::Here(_) | RankReport::Late(_));
        let ranks: Vec<Rank> = (0..reports.len()).filter(here).collect();
        self.ask_what(stalled.call.communicator, &ranks, verdict, now);
    }
}
