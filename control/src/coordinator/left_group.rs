//! Ranks that leave communicators in order, and who still waits for them.

use std::collections::BTreeMap;
use std::time::Instant;

use unisum_link::Rank;

use super::{Accusation, Audience, Coordinator, MemberState, Output, PARTED_MAX};
use crate::message::{Message, StalledCall};
use crate::stall_diagnosis;
use crate::status::Snapshot;
use crate::verdict::Verdict;

impl Coordinator {
    /// What a rank did last in a communicator that it is no longer in.
    pub(super) fn last_of(&self, communicator: u32, rank: Rank) -> Option<Snapshot> {
        self.left_group.get(&communicator)?.get(&rank).copied()
    }

    /// The verdict of a rank that others need in a communicator that it has left.
    pub(super) fn has_left(&self, communicator: u32, rank: Rank) -> Verdict {
        Verdict::left(rank, self.last_of(communicator, rank).as_ref())
    }

    pub(super) fn left(&mut self, rank: Rank, last: Snapshot, now: Instant) {
        self.states[rank] = MemberState::Left;
        let told = self.left_group.iter().filter(|(communicator, _)| **communicator != 0);
        let of_rank = |(&communicator, lasts): (&u32, &BTreeMap<Rank, Snapshot>)| {
            lasts.get(&rank).map(|&last| (communicator, last))
        };
        let left_group = told.filter_map(of_rank).collect();
        self.tell_all(vec![Message::Left { rank, last, left_group }]);
        self.left_group(rank, 0, last);
        let accused = self.accusations.iter().find(|accusation| accusation.report.against == rank);
        if let Some(communicator) = accused.map(|accusation| accusation.report.communicator) {
            self.conclude(self.has_left(communicator, rank));
        }
        if self.round.until.is_some() && !self.round.has(rank) {
            self.conclude(self.has_left(0, rank));
        }
        self.decide_if_all_answered(now);
        if let Some(comparison) = &mut self.comparison {
            comparison.gone(rank);
        }
        self.hear_out();
    }

    /// A rank is no longer in a communicator, where it did this last.
    pub(super) fn left_group(&mut self, rank: Rank, communicator: u32, last: Snapshot) {
        self.left_group.entry(communicator).or_default().insert(rank, last);
        if self.left_group.len() > PARTED_MAX {
            // The oldest group; the job's own communicator is number 0 and stays.
            let oldest = self.left_group.keys().copied().find(|&number| number != 0);
            oldest.and_then(|oldest| self.left_group.remove(&oldest));
        }
        let is_accused = |Accusation { report, .. }: &Accusation| {
            report.against == rank && report.communicator == communicator
        };
        if self.accusations.iter().any(is_accused) {
            self.conclude(self.has_left(communicator, rank));
        }
        self.look_who_is_gone(communicator);
    }

    /// Tells a rank that waits in a message if the other end has left. What it has sent may still
    /// be on its way: only the waiting rank can find out that nothing comes any more.
    pub(super) fn look_who_sends(&mut self, by: Rank, stalled: &StalledCall) {
        let (communicator, rank) = (stalled.call.communicator, stalled.call.root as Rank);
        let is_away = matches!(self.states.get(rank), Some(MemberState::Left | MemberState::Gone));
        if is_away || self.last_of(communicator, rank).is_some() {
            let messages = vec![Message::HasParted { communicator, rank }];
            self.outputs.push_back(Output { audience: Audience::One(by), messages });
        }
    }

    /// Ends the job if somebody waits for a rank that has left. What is known to be waited for
    /// may have ended meanwhile: then whoever parts has taken part in it.
    pub(super) fn look_who_is_gone(&mut self, communicator: u32) {
        let Some(left_group) = self.left_group.get(&communicator) else { return };
        let gone = |(by, stalled): &(Rank, StalledCall)| {
            let takes_part = |rank: &Rank| match stalled.ranks.is_empty() {
                true => communicator == 0,
                false => stalled.ranks.contains(rank),
            };
            let last = left_group.iter().filter(|(rank, _)| takes_part(rank));
            // A rank that has left itself waits for nobody.
            let waits = stalled.call.communicator == communicator && !left_group.contains_key(by);
            let last = last.map(|(&rank, &last)| (rank, last));
            stall_diagnosis::gone(stalled, *by, last).filter(|_| waits)
        };
        if let Some(verdict) = self.waiting.values().find_map(gone) {
            self.conclude(verdict);
        }
    }
}
