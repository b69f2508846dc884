//! Ranks that leave communicators in order, and who still waits for them.

use std::collections::BTreeMap;
use std::time::Instant;

use unisum_link::Rank;

use super::{Accusation, Audience, Coordinator, Output, PARTED_MAX, Presence};
use crate::inquest;
use crate::message::{Concern, Message};
use crate::status::Snapshot;
use crate::verdict::Verdict;

impl Coordinator {
    /// What a rank did last in a communicator that it is no longer in.
    pub(super) fn last_of(&self, communicator: u32, rank: Rank) -> Option<Snapshot> {
        self.parted.get(&communicator)?.get(&rank).copied()
    }

    /// The verdict of a rank that others need in a communicator that it has left.
    pub(super) fn has_left(&self, communicator: u32, rank: Rank) -> Verdict {
        Verdict::left(rank, self.last_of(communicator, rank).as_ref())
    }

    pub(super) fn left(&mut self, rank: Rank, last: Snapshot, now: Instant) {
        self.presence[rank] = Presence::Left;
        let told = self.parted.iter().filter(|(communicator, _)| **communicator != 0);
        let of_rank = |(&communicator, lasts): (&u32, &BTreeMap<Rank, Snapshot>)| {
            lasts.get(&rank).map(|&last| (communicator, last))
        };
        let parted = told.filter_map(of_rank).collect();
        self.tell_all(vec![Message::Left { rank, last, parted }]);
        self.parted(rank, 0, last);
        let accused = self.accusations.iter().find(|accusation| accusation.report.against == rank);
        if let Some(communicator) = accused.map(|accusation| accusation.report.communicator) {
            self.conclude(self.has_left(communicator, rank));
        }
        if self.round.until.is_some() && !self.round.has(rank) {
            self.conclude(self.has_left(0, rank));
        }
        self.decide_if_all_answered(now);
        if let Some(hearing) = &mut self.hearing {
            hearing.gone(rank);
        }
        self.hear_out();
    }

    /// A rank is no longer in a communicator, where it did this last.
    pub(super) fn parted(&mut self, rank: Rank, communicator: u32, last: Snapshot) {
        self.parted.entry(communicator).or_default().insert(rank, last);
        if self.parted.len() > PARTED_MAX {
            // The oldest group; the job's own communicator is number 0 and stays.
            let oldest = self.parted.keys().copied().find(|&number| number != 0);
            oldest.and_then(|oldest| self.parted.remove(&oldest));
        }
        let is_accused = |Accusation { report, .. }: &Accusation| {
            report.against == rank && report.communicator == communicator
        };
        if self.accusations.iter().any(is_accused) {
            self.conclude(self.has_left(communicator, rank));
        }
        self.look_who_is_gone(communicator);
    }

    /// Tells a rank that waits in a message if the other end has parted. What it has sent may still
    /// be on its way: only the waiting rank can find out that nothing comes any more.
    pub(super) fn look_who_sends(&mut self, by: Rank, concern: &Concern) {
        let (communicator, rank) = (concern.call.communicator, concern.call.root as Rank);
        let is_away = matches!(self.presence.get(rank), Some(Presence::Left | Presence::Gone));
        if is_away || self.last_of(communicator, rank).is_some() {
            let messages = vec![Message::HasParted { communicator, rank }];
            self.outputs.push_back(Output { audience: Audience::One(by), messages });
        }
    }

    /// Ends the job if somebody waits for a rank that has parted. What is known to be waited for
    /// may have ended meanwhile: then whoever parts has taken part in it.
    pub(super) fn look_who_is_gone(&mut self, communicator: u32) {
        let Some(parted) = self.parted.get(&communicator) else { return };
        let gone = |(by, concern): &(Rank, Concern)| {
            let is_concerned = |rank: &Rank| match concern.ranks.is_empty() {
                true => communicator == 0,
                false => concern.ranks.contains(rank),
            };
            let last = parted.iter().filter(|(rank, _)| is_concerned(rank));
            // A rank that has parted itself waits for nobody.
            let waits = concern.call.communicator == communicator && !parted.contains_key(by);
            let last = last.map(|(&rank, &last)| (rank, last));
            inquest::gone(concern, *by, last).filter(|_| waits)
        };
        if let Some(verdict) = self.waiting.values().find_map(gone) {
            self.conclude(verdict);
        }
    }
}
