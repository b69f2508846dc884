//! What a participant does while it proposes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Output, Participant, Timer};
use crate::{Ballot, Member, Message, Promise, View};

/// Up to which round a proposer whose overtaker is lost proposes again without waiting its turn.
const ROUNDS_AT_ONCE: u32 = 4;

/// A proposal under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Proposal {
    pub(super) ballot: Ballot,
    pub(super) stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// It asks for promises.
    Preparing(BTreeMap<Member, Promise>),
    /// It asks to accept the next view.
    Accepting { next: View, by: BTreeSet<Member> },
    /// A higher ballot is ahead.
    Beaten,
}

impl Proposal {
    pub(super) const fn timer(&self) -> Timer {
        match self.stage {
            Stage::Preparing(_) | Stage::Accepting { .. } => Timer::Silence,
            Stage::Beaten => Timer::Retry,
        }
    }

    /// Whether a member has answered the question that is being asked.
    pub(super) fn has_answered(&self, member: Member) -> bool {
        match &self.stage {
            Stage::Preparing(promises) => promises.contains_key(&member),
            Stage::Accepting { by, .. } => by.contains(&member),
            Stage::Beaten => true,
        }
    }

    pub(super) fn promised(&mut self, by: Member, promise: Promise) {
        if let Stage::Preparing(promises) = &mut self.stage {
            promises.insert(by, promise);
        }
    }

    pub(super) fn accepted(&mut self, member: Member) {
        if let Stage::Accepting { by, .. } = &mut self.stage {
            by.insert(member);
        }
    }

    /// Another proposer has this ballot.
    pub(super) fn meets(&mut self, ballot: Ballot) {
        if self.ballot < ballot {
            self.stage = Stage::Beaten;
        }
    }
}

impl Participant {
    /// Asks all for promises, with a ballot above all that this process knows.
    pub(super) fn propose(&mut self, output: &mut Output) -> bool {
        let Some(rank) = self.view.rank(self.own) else { return false };
        let ballot = Ballot { round: self.promised.round + 1, rank: rank as u32 };
        self.promised = ballot;
        let own = Promise { accepted: self.accepted.clone(), out: self.out().collect() };
        let stage = Stage::Preparing([(self.own, own)].into());
        self.proposal = Some(Proposal { ballot, stage });
        let view = self.view.clone();
        self.tell_members(&Message::Prepare { view, ballot }, output);
        true
    }

    /// Takes the proposal a step further, if enough have answered.
    pub(super) fn pursue(&mut self, output: &mut Output) -> bool {
        let Some(Proposal { ballot, stage }) = &self.proposal else { return false };
        let ballot = *ballot;
        match stage {
            Stage::Preparing(promises) => {
                if !self.view.is_quorum(|it| promises.contains_key(&it)) {
                    return false;
                }
                // Whoever is there says what it has lost, so that one change does for all.
                let is_missing = |&it: &Member| !self.is_out(it) && !promises.contains_key(&it);
                if self.view.members.iter().any(is_missing) {
                    return false;
                }
                let next = self.next(promises);
                self.accepted = Some((ballot, next.clone()));
                let by = [self.own].into();
                let stage = Stage::Accepting { next: next.clone(), by };
                self.proposal = Some(Proposal { ballot, stage });
                self.tell_members(&Message::Accept { ballot, next }, output);
                true
            }
            Stage::Accepting { next, by } if self.view.is_quorum(|it| by.contains(&it)) => {
                let next = next.clone();
                self.decide(next, output);
                true
            }
            // Nobody else will finish what the other began.
            Stage::Beaten if self.is_overtaker_lost() => {
                self.proposal = None;
                true
            }
            Stage::Accepting { .. } | Stage::Beaten => false,
        }
    }

    /// Whether the process whose ballot is ahead is known to be lost. Two that have lost each other
    /// but not the rest would overtake each other without end: after some rounds they wait again.
    fn is_overtaker_lost(&self) -> bool {
        let Ballot { round, rank } = self.promised;
        let overtaker = self.view.members.get(rank as usize);
        round <= ROUNDS_AT_ONCE && overtaker.is_some_and(|it| self.lost.contains(it))
    }

    /// The view to propose after these promises.
    fn next(&self, promises: &BTreeMap<Member, Promise>) -> View {
        // It may have been decided: whoever decided it may be gone, and so may who heard of it.
        let accepted = promises.values().filter_map(|it| it.accepted.as_ref());
        if let Some((_, view)) = accepted.max_by_key(|(ballot, _)| *ballot) {
            return view.clone();
        }
        let mut out: BTreeSet<Member> = self.out().collect();
        // Of two that accuse each other, the first is believed.
        for &member in &self.view.members {
            if let Some(promise) = promises.get(&member).filter(|_| !out.contains(&member)) {
                out.extend(&promise.out);
            }
        }
        if self.view.members.iter().all(|it| out.contains(it)) {
            // There is no job without members: those that are there stay.
            out.retain(|it| self.lost.contains(it));
        }
        let newcomers = self.newcomers.iter().copied().filter(|_| self.admits);
        self.view.next(|it| out.contains(&it), newcomers)
    }

    fn decide(&mut self, next: View, output: &mut Output) {
        let newcomers = next.members.iter().filter(|&&it| !self.view.has(it));
        let all = self.view.members.iter().chain(newcomers);
        for &to in all.filter(|&&it| it != self.own && !self.lost.contains(&it)) {
            output.sends.push((to, Message::Decided(next.clone())));
        }
        self.install(next, output);
    }

    fn tell_members(&self, message: &Message, output: &mut Output) {
        let others = self.view.members.iter().filter(|&&it| it != self.own);
        for &to in others.filter(|it| !self.lost.contains(it)) {
            output.sends.push((to, message.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::participant::Wait;

    /// What the first of five members sends when it has lost the second, proposes, and is refused
    /// for this ballot; and what it then waits for.
    fn refused(ballot: Ballot) -> (Vec<(Member, Message)>, Option<Timer>) {
        let view = View::first((0..5).map(Member).collect());
        let mut first = Participant::new(Member(0), view);
        assert!(!first.lose(Member(1)).sends.is_empty());
        let refused = Message::Refused { epoch: 1, ballot };
        let sends = first.hear(Member(2), refused).sends;
        (sends, first.waits().map(|Wait { timer, .. }| timer))
    }

    #[test]
    fn who_is_overtaken_by_the_lost_proposes_again_at_once() {
        for round in 1..=ROUNDS_AT_ONCE {
            let (sends, waits) = refused(Ballot { round, rank: 1 });
            let to: Vec<_> = sends.iter().map(|(to, _)| *to).collect();
            assert_eq!(to, [Member(2), Member(3), Member(4)], "{round}");
            for (_, message) in sends {
                let Message::Prepare { ballot, .. } = message else { panic!("{message:?}") };
                assert_eq!(ballot, Ballot { round: round + 1, rank: 0 });
            }
            assert_eq!(waits, Some(Timer::Silence), "{round}");
        }
    }

    #[test]
    fn two_that_lost_each_other_take_turns_in_the_end() {
        let (sends, waits) = refused(Ballot { round: ROUNDS_AT_ONCE + 1, rank: 1 });
        assert_eq!((sends, waits), (Vec::new(), Some(Timer::Retry)));
    }

    #[test]
    fn who_is_overtaken_by_the_living_waits_its_turn() {
        // A rank that the view does not have is nobody's.
        for rank in [2, 4, 5, u32::MAX] {
            let (sends, waits) = refused(Ballot { round: 2, rank });
            assert_eq!((sends, waits), (Vec::new(), Some(Timer::Retry)), "{rank}");
        }
    }
}
