//! What a rank is doing in all its communicators: its answer when it is asked.

use bytes::{BufMut, Bytes, BytesMut};
use unisum_link::{Call, CollectiveKind, Rank};

use super::callers::Hold;
use super::message::{parse_snapshot, put_rank, put_snapshot, rank, take, word};
use super::status::Snapshot;

/// Of most communicators it is said what a rank does there.
pub(super) const PARTS_MAX: usize = 64;
/// Of most ranks it is said what a messenger has sent them and had from them.
pub(super) const TRAFFIC_MAX: usize = 32;

/// What a rank is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Doing {
    /// In the communicator that the question was about.
    pub(super) here: Snapshot,
    /// Whether it may begin other calls meanwhile.
    pub(super) hold: Hold,
    /// In each of its communicators.
    pub(super) parts: Vec<Part>,
}

/// What a rank does in one of its communicators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) communicator: u32,
    /// The lowest of its ranks: groups without common ranks may have one number.
    pub(super) lowest: Rank,
    pub(super) doing: Snapshot,
    pub(super) needs: Needs,
    /// In a messenger, the messages from and to other ranks.
    pub(super) traffic: Vec<Traffic>,
}

/// What passed between two ranks in a messenger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    pub(super) peer: Rank,
    /// How much this rank has sent.
    pub(super) said: u64,
    /// How much it had had when it said what it waits for.
    pub(super) heard: u64,
}

/// Without whom the call that a rank is in can't end on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Needs {
    /// That does not follow from what is known.
    #[default]
    Unknown,
    /// All ranks of the communicator.
    All,
    /// This one, by its number in the job.
    One(Rank),
}

impl Needs {
    /// What rank `own` needs in a call of ranks that have these numbers in the job.
    pub(super) fn of(call: &Call, own: Rank, ranks: &[Rank]) -> Self {
        let root = || ranks.get(call.root as Rank).copied();
        match call.collective {
            CollectiveKind::Message => Self::One(call.root as Rank),
            // Its messages take all-reduces' ways.
            _ if call.count == 0 => Self::All,
            CollectiveKind::Broadcast | CollectiveKind::Scatter => match root() {
                Some(root) if root != own => Self::One(root),
                _ => Self::Unknown,
            },
            CollectiveKind::Reduce | CollectiveKind::Gather if root() != Some(own) => Self::Unknown,
            _ => Self::All,
        }
    }
}

impl Part {
    /// Whether the rank is in a call there.
    pub(super) const fn is_inside(&self) -> bool {
        self.doing.inside && self.doing.call.is_some()
    }

    pub(super) fn is_of(&self, other: &Self) -> bool {
        (self.communicator, self.lowest) == (other.communicator, other.lowest)
    }

    /// What passed to and from a rank, if that is known.
    pub(super) fn with(&self, peer: Rank) -> Option<Traffic> {
        let known = self.traffic.iter().find(|it| it.peer == peer).copied();
        let none = Traffic { peer, ..Traffic::default() };
        known.or_else(|| (self.traffic.len() < TRAFFIC_MAX).then_some(none))
    }
}

impl From<Snapshot> for Doing {
    fn from(here: Snapshot) -> Self {
        Self { here, ..Self::default() }
    }
}

pub(super) fn put(to: &mut BytesMut, doing: &Doing) {
    let Doing { here, hold, parts } = doing;
    put_snapshot(to, here);
    to.put_u8(*hold as u8);
    for part in parts.iter().take(PARTS_MAX) {
        let Part { communicator, lowest, doing, needs, traffic } = part;
        to.put_u32_le(*communicator);
        put_rank(to, *lowest);
        put_snapshot(to, doing);
        let (code, one) = match needs {
            Needs::Unknown => (0, 0),
            Needs::All => (1, 0),
            Needs::One(rank) => (2, *rank),
        };
        to.put_u8(code);
        put_rank(to, one);
        let traffic = &traffic[..traffic.len().min(TRAFFIC_MAX)];
        put_rank(to, traffic.len());
        for Traffic { peer, said, heard } in traffic {
            put_rank(to, *peer);
            to.put_u64_le(*said);
            to.put_u64_le(*heard);
        }
    }
}

/// Reads all that remains; `None` if it is malformed.
pub(super) fn parse(body: &mut Bytes) -> Option<Doing> {
    let here = parse_snapshot(body)?;
    let [hold] = take(body)?;
    let hold = Hold::from_code(hold)?;
    let mut parts = Vec::new();
    while !body.is_empty() {
        if parts.len() == PARTS_MAX {
            return None;
        }
        parts.push(parse_part(body)?);
    }
    Some(Doing { here, hold, parts })
}

fn parse_part(body: &mut Bytes) -> Option<Part> {
    let (communicator, lowest, doing) = (word(body)?, rank(body)?, parse_snapshot(body)?);
    let ([code], one) = (take(body)?, rank(body)?);
    let needs = match (code, one) {
        (0, 0) => Needs::Unknown,
        (1, 0) => Needs::All,
        (2, one) => Needs::One(one),
        _ => return None,
    };
    let count = rank(body)?;
    let mut traffic = Vec::new();
    for _ in 0..(count <= TRAFFIC_MAX).then_some(count)? {
        let peer = rank(body)?;
        let [said, heard] = [take(body)?, take(body)?].map(u64::from_le_bytes);
        traffic.push(Traffic { peer, said, heard });
    }
    Some(Part { communicator, lowest, doing, needs, traffic })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::tests::{ranks, snapshots};

    pub(crate) fn doings() -> impl Strategy<Value = Doing> {
        let hold = (0..=2_u8).prop_map(|code| Hold::from_code(code).unwrap());
        let needs =
            prop_oneof![Just(Needs::Unknown), Just(Needs::All), ranks().prop_map(Needs::One),];
        let traffic = (ranks(), any::<u64>(), any::<u64>())
            .prop_map(|(peer, said, heard)| Traffic { peer, said, heard });
        let traffic = prop::collection::vec(traffic, 0..3);
        let part = (any::<u32>(), ranks(), snapshots(), needs, traffic);
        let part = part.prop_map(|(communicator, lowest, doing, needs, traffic)| Part {
            communicator,
            lowest,
            doing,
            needs,
            traffic,
        });
        let parts = prop::collection::vec(part, 0..4);
        (snapshots(), hold, parts).prop_map(|(here, hold, parts)| Doing { here, hold, parts })
    }
}
