//! Questions what all ranks are doing, when a call takes long.

use std::time::{Duration, Instant};

use unisum_link::{CollectiveKind, Rank};

use super::{ANSWER_TIMEOUT, Coordinator, Presence};
use crate::callers::Hold;
use crate::crossing;
use crate::doing::Doing;
use crate::inquest::{self, Account};
use crate::message::{Concern, Message};

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
    pub(super) next: Option<(Rank, Concern)>,
}

/// The call that made a query necessary.
#[derive(Clone, Debug)]
pub(super) struct Overdue {
    pub(super) concern: Concern,
    by: Rank,
    pub(super) until: Instant,
    /// Whether the call may go on if all ranks are in it: it is late and not overdue.
    pub(super) patient: bool,
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
    pub(super) fn ask(&mut self, by: Rank, concern: Concern, patient: bool, now: Instant) {
        let communicator = concern.call.communicator;
        if patient && concern.call.collective == CollectiveKind::Message {
            self.look_who_sends(by, &concern);
        } else if patient {
            let lowest = concern.ranks.iter().min().copied().unwrap_or(0);
            self.waiting.insert((communicator, lowest), (by, concern.clone()));
            self.look_who_is_gone(communicator);
        }
        if let Some(open) = &mut self.query.open {
            let same = open.concern.call.communicator == concern.call.communicator;
            if same && open.patient && !patient {
                (open.by, open.concern, open.patient) = (by, concern, false);
                return;
            }
            // Who is merely late asks once, and again for all when this is decided; who is overdue
            // asks for another communicator instead.
            if patient {
                self.query.next = Some((by, concern));
                return;
            }
            if same || !open.patient {
                return;
            }
        }
        if self.verdict.is_some() {
            return;
        }
        let number = self.query.number.wrapping_add(1);
        let open = Some(Overdue { concern, by, until: now + ANSWER_TIMEOUT, patient });
        let answers = vec![None; self.presence.len()];
        let next = self.query.next.take();
        self.query = Query { number, asked: Some(now), answers, open, next };
        self.tell_all(vec![Message::StatusRequest { query: number, communicator }]);
    }

    pub(super) fn answered(&mut self, from: Rank, query: u32, doing: Doing, now: Instant) {
        if query == self.query.number {
            let took = self.query.asked.map_or(Duration::ZERO, |asked| now - asked);
            self.query.answers[from] = Some((doing, took >= LATE_ANSWER));
            self.decide_if_all_answered(now);
        }
    }

    pub(super) fn decide_if_all_answered(&mut self, now: Instant) {
        let mut ranks = self.presence.iter().zip(&self.query.answers);
        let is_away = |presence: &Presence| matches!(presence, Presence::Left | Presence::Gone);
        if ranks.all(|(presence, answer)| answer.is_some() || is_away(presence)) {
            self.decide(now);
        }
    }

    pub(super) fn decide(&mut self, now: Instant) {
        let Some(Overdue { concern, by, patient, .. }) = self.query.open.take() else {
            return;
        };
        let parted = self.parted.get(&concern.call.communicator);
        let last = |rank| parted.and_then(|parted| parted.get(&rank)).copied();
        let answered = |rank: Rank| {
            self.query.answers[rank].as_ref().map(|(doing, is_late)| (doing.here, *is_late))
        };
        let account = |rank| match (self.presence[rank], last(rank), answered(rank)) {
            (_, Some(last), _) => Account::Left(last),
            // What it did in a group may be forgotten, or known to an earlier coordinator only.
            (Presence::Left | Presence::Gone, None, _) => Account::Gone,
            (_, None, Some((snapshot, false))) => Account::Here(snapshot),
            // While it was stopped the others waited; what it does now is of another moment.
            (_, None, Some((snapshot, true))) => Account::Late(snapshot),
            (_, None, None) => Account::Silent,
        };
        let mut accounts: Vec<_> = (0..self.presence.len()).map(account).collect();
        let ranks = &concern.ranks;
        if !ranks.is_empty() {
            let apart = accounts.iter_mut().enumerate().filter(|(rank, _)| !ranks.contains(rank));
            apart.for_each(|(_, account)| *account = Account::Apart);
        }
        let answers = self.query.answers.iter_mut().map(|answer| answer.take().map(|it| it.0));
        let doings: Vec<Option<Doing>> = answers.collect();
        if patient {
            self.look_whether_all_go_on((by, &concern), &accounts, &doings, now);
            if let Some((by, concern)) = self.query.next.take() {
                self.ask(by, concern, true, now);
            }
            return;
        }
        // If everybody has left, nobody waits for anybody.
        let is_away =
            |it: &Account| matches!(it, Account::Left(_) | Account::Gone | Account::Apart);
        if !accounts.iter().all(is_away) {
            let decide = match concern.call.collective {
                CollectiveKind::Message => inquest::decide_message,
                _ => inquest::decide,
            };
            let verdict = decide(&concern, by, &accounts);
            self.conclude(crossing::explain(verdict, concern.call.communicator, &doings));
        }
    }

    /// Somebody has waited for a while: ends the job if somebody waits for what never comes.
    fn look_whether_all_go_on(
        &mut self,
        (by, concern): (Rank, &Concern),
        accounts: &[Account],
        doings: &[Option<Doing>],
        now: Instant,
    ) {
        if let Some(crossing) = crossing::find(doings, Hold::Process) {
            return self.conclude(crossing.verdict());
        }
        if let Some(crossing) = crossing::find(doings, Hold::Callers) {
            let text = crossing.text();
            if self.warned != text {
                tracing::warn!("{text}\nunless another thread of one of them calls");
                self.warned = text;
            }
        }
        if concern.call.collective == CollectiveKind::Message {
            return;
        }
        // Who has all it waited for may be in a later call than the one that differs.
        let verdict = inquest::contradiction(by, accounts);
        let here = |rank: &Rank| matches!(accounts[*rank], Account::Here(_) | Account::Late(_));
        let ranks: Vec<Rank> = (0..accounts.len()).filter(here).collect();
        self.ask_what(concern.call.communicator, &ranks, verdict, now);
    }
}
