//! Ranks whose control connections were cut while their processes may live.

use std::time::Instant;

use unisum_link::Rank;

use super::{Coordinator, FLAP_GRACE, MemberState};

impl Coordinator {
    /// Whether a rank has joined, and neither left nor died.
    pub(in super::super) fn has_joined(&self, rank: Rank) -> bool {
        self.states.get(rank) == Some(&MemberState::Joined)
    }

    /// Whether there is a verdict.
    pub(in super::super) const fn is_over(&self) -> bool {
        self.verdict.is_some()
    }

    /// A rank's connection was cut. That its links fail may yet have the same reason, or be
    /// explained by its death.
    pub(in super::super) fn cut(&mut self, rank: Rank, now: Instant) {
        self.cut.insert(rank);
        let against = self.accusations.iter_mut().filter(|it| it.report.against == rank);
        against.for_each(|accusation| accusation.until = accusation.until.max(now + FLAP_GRACE));
    }

    /// The connection goes on: the process lives.
    pub(in super::super) fn goes_on(&mut self, rank: Rank) {
        self.cut.remove(&rank);
    }
}
