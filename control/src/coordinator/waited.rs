//! Exchanges that wait: who is missing, what is known of them, and when that is said.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use unisum_link::Rank;

use super::{ANSWER_TIMEOUT, Coordinator, MemberState};
use crate::dial::is_taken;
use crate::error::TWICE;
use crate::message::Message;
use crate::round::Round;
use crate::verdict::{Verdict, VerdictKind, name};

/// After so long it is said who is waited for, and again after twice as long each.
const NOTICE: Duration = Duration::from_secs(10);
/// Of so many ranks at most it is remembered what is known of them.
const NOTES_MAX: usize = 64;
/// Of so many that have not said who they are.
const UNKNOWN_MAX: usize = 8;

/// How long an exchange has been waiting, and what is known of those that it waits for.
#[derive(Debug, Default)]
pub(super) struct Waited {
    /// Of the exchange's first blob.
    since: Option<Instant>,
    /// When to say next who is missing.
    notice_at: Option<Instant>,
    /// Why absent ranks may be absent, and how often that was.
    notes: BTreeMap<Rank, (String, u32)>,
    /// Who of the job was refused as a rank that is none, or there, and how often.
    others: BTreeMap<String, u32>,
    /// Who was refused without saying who it is, and how often: strangers may be among them.
    unknown: BTreeMap<String, u32>,
    /// The question whether those who joined are still there.
    roll_call: Option<RollCall>,
}

#[derive(Debug)]
struct RollCall {
    query: u32,
    until: Instant,
    /// How long the exchange had waited by then.
    seconds: f64,
}

impl Waited {
    /// A blob of an exchange has come.
    pub(super) fn began(&mut self, round: &mut Round, timeout: Duration, now: Instant) {
        if round.until.is_none() {
            round.until = Some(now + timeout);
            (self.since, self.notice_at) = (Some(now), Some(now + NOTICE));
            // It was about the exchange before, which has come to its end meanwhile.
            self.roll_call = None;
        }
    }

    /// Something happened to a rank that is not there yet.
    pub(super) fn note(&mut self, rank: Rank, what: String) {
        if self.notes.len() == NOTES_MAX && !self.notes.contains_key(&rank) {
            return;
        }
        let (known, times) = self.notes.entry(rank).or_insert_with(|| (what.clone(), 0));
        if *known != what {
            (*known, *times) = (what, 0);
        }
        *times += 1;
    }

    /// One of the job was refused as a rank that nobody misses.
    fn note_other(&mut self, what: String) {
        if self.others.len() < NOTES_MAX || self.others.contains_key(&what) {
            *self.others.entry(what).or_default() += 1;
        }
    }

    /// When something is due because an exchange waits.
    pub(super) fn deadline(&self, round: &Round) -> Option<Instant> {
        let until = match &self.roll_call {
            Some(roll_call) => Some(roll_call.until),
            None => round.until,
        };
        let notice_at = self.notice_at.filter(|_| round.until.is_some());
        until.into_iter().chain(notice_at).min()
    }
}

impl Coordinator {
    /// A dialer that said it was this rank was refused. Only one that has proven the token is told
    /// of where nobody is missing by that number.
    pub(crate) fn refused(&mut self, claim: Rank, from: SocketAddr, why: &str, is_proven: bool) {
        let from = from.ip();
        if self.is_vacant(claim) {
            self.waited.note(claim, format!("{from} said it was this rank and was refused: {why}"));
        } else if is_proven {
            // Two ranks 0 wait for the same others, of which each may have a part.
            if claim == self.own && is_taken(claim, why) && !self.all_came() {
                let text = format!("{why} (from {from}){TWICE}");
                return self.conclude(Verdict::new(VerdictKind::Failed, vec![claim], text));
            }
            let text = format!("{from} said it was rank {claim} and was refused: {why}");
            self.waited.note_other(text);
        }
    }

    /// A dialer was refused before it said who it is, for it has another TLS or a certificate that
    /// is not accepted. It may be a rank that is missed, or a stranger.
    pub(crate) fn refused_unknown(&mut self, from: SocketAddr, why: &str) {
        let Self { waited: Waited { unknown, .. }, .. } = self;
        let text = format!("somebody at {} was refused: {why}", from.ip().to_canonical());
        if unknown.len() < UNKNOWN_MAX || unknown.contains_key(&text) {
            *unknown.entry(text).or_default() += 1;
        }
    }

    /// Does what is due because an exchange waits.
    pub(super) fn look_who_is_missing(&mut self, now: Instant) {
        let Some(until) = self.round.until else { return };
        if self.waited.notice_at.is_some_and(|at| at <= now)
            && let Some(since) = self.waited.since
        {
            let (waited, missing) = (now - since, self.missing());
            self.waited.notice_at = Some(now + waited);
            let (world, known) = (self.states.len(), self.known_of(&missing));
            let seconds = waited.as_secs();
            unisum_link::warning!("waiting for {} of {world} ({seconds} s){known}", name(&missing));
        }
        match &self.waited.roll_call {
            Some(roll_call) if roll_call.until <= now => self.call_the_roll_to_an_end(),
            None if until <= now => self.nobody_came(self.connect_timeout.as_secs_f64(), now),
            _ => {}
        }
    }

    /// A rank has waited for as long as it may. Its time is everybody's: it ends the job by ending.
    pub(super) fn given_up(&mut self, round: u32, millis: u32, now: Instant) {
        let is_open = self.round.until.is_some() && self.round.number == round;
        if is_open && self.waited.roll_call.is_none() {
            self.nobody_came(f64::from(millis) / 1e3, now);
        }
    }

    fn missing(&self) -> Vec<Rank> {
        (0..self.states.len()).filter(|&rank| !self.round.has(rank)).collect()
    }

    /// What is known of these ranks, a line for each of which something is.
    fn known_of(&self, ranks: &[Rank]) -> String {
        let mut text = String::new();
        let often = |times: &u32| match times {
            1 => String::new(),
            _ => format!(" ({times} times)"),
        };
        for rank in ranks {
            if let Some((what, times)) = self.waited.notes.get(rank) {
                let often = often(times);
                write!(text, "\n  rank {rank}: {what}{often}").expect("strings take all");
            }
        }
        let is_absent = |rank: &Rank| self.states[*rank] == MemberState::Absent;
        if let Some(doubt) = self.doubt.as_ref().filter(|_| ranks.iter().any(is_absent)) {
            write!(text, "\n  {doubt}").expect("strings take all");
        }
        let unknown = ranks.iter().any(is_absent).then_some(&self.waited.unknown);
        for (what, times) in self.waited.others.iter().chain(unknown.into_iter().flatten()) {
            write!(text, "\n  {what}{}", often(times)).expect("strings take all");
        }
        text
    }

    /// The time is up. Ranks that have not joined are missing; those that have may be on their way,
    /// unless they do not answer.
    fn nobody_came(&mut self, seconds: f64, now: Instant) {
        let is_joined = |rank: &Rank| self.states[*rank] == MemberState::Joined;
        let (late, absent): (Vec<Rank>, Vec<Rank>) =
            self.missing().into_iter().partition(is_joined);
        if !absent.is_empty() {
            let known = self.known_of(&absent);
            let text = format!("{} did not join within {seconds} s{known}", name(&absent));
            return self.conclude(Verdict::new(VerdictKind::Absent, absent, text));
        }
        if self.query.open.is_some() {
            return self.conclude(did_not_go_on(late, seconds));
        }
        self.query.number = self.query.number.wrapping_add(1);
        self.query.answers = vec![None; self.states.len()];
        let query = self.query.number;
        self.waited.roll_call = Some(RollCall { query, until: now + ANSWER_TIMEOUT, seconds });
        self.tell_all(vec![Message::StatusRequest { query, communicator: 0, is_overdue: false }]);
    }

    fn call_the_roll_to_an_end(&mut self) {
        let Some(RollCall { query, seconds, .. }) = self.waited.roll_call.take() else { return };
        let late = self.missing();
        // Another question may have taken its place.
        let is_silent =
            |rank: &Rank| query == self.query.number && self.query.answers[*rank].is_none();
        let silent: Vec<Rank> = late.iter().copied().filter(is_silent).collect();
        if silent.is_empty() {
            return self.conclude(did_not_go_on(late, seconds));
        }
        let text = format!(
            "{} joined and did not go on setting up the communicator within {seconds} s, and does \
             not answer: the process is stopped, or its host or network is lost",
            name(&silent)
        );
        self.conclude(Verdict::new(VerdictKind::Unresponsive, silent, text));
    }
}

fn did_not_go_on(late: Vec<Rank>, seconds: f64) -> Verdict {
    let text = format!(
        "{} joined, but did not go on setting up the communicator within {seconds} s",
        name(&late)
    );
    Verdict::new(VerdictKind::NotEntered, late, text)
}
