//! One exchange as the coordinator gathers it (sans-IO): every rank has a blob for each rank.

use std::time::Instant;

use bytes::Bytes;
use unisum_link::Rank;

use super::message::{Message, blobs_bytes_max};

/// The exchange that goes on, or comes next.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) number: u32,
    /// When it is over; none before the first blob.
    pub(super) until: Option<Instant>,
    /// By rank.
    given: Vec<Given>,
}

/// What a rank has given so far.
#[derive(Debug)]
enum Given {
    /// The blobs for the first ranks, and their bytes.
    Each(Vec<Bytes>, usize),
    /// The same blob for all ranks.
    Same(Bytes),
}

impl Round {
    pub(super) fn new(world: usize) -> Self {
        Self { number: 0, until: None, given: nothing(world) }
    }

    /// Takes a blob of a rank for one rank or for all; `false` if that is not the next that may
    /// come, or one too many.
    pub(super) fn take(&mut self, from: Rank, round: u32, to: Option<Rank>, blob: Bytes) -> bool {
        let world = self.given.len();
        if round != self.number {
            return false;
        }
        match (&mut self.given[from], to) {
            (Given::Each(blobs, bytes), Some(to)) if to == blobs.len() && to < world => {
                *bytes += blob.len();
                blobs.push(blob);
                *bytes <= blobs_bytes_max(world)
            }
            (Given::Each(blobs, _), None) if blobs.is_empty() => {
                self.given[from] = Given::Same(blob);
                true
            }
            _ => false,
        }
    }

    /// Whether a rank has given all that it has to.
    pub(super) fn has(&self, rank: Rank) -> bool {
        match &self.given[rank] {
            Given::Each(blobs, _) => blobs.len() == self.given.len(),
            Given::Same(_) => true,
        }
    }

    /// Whether all ranks have.
    pub(super) fn is_whole(&self) -> bool {
        (0..self.given.len()).all(|rank| self.has(rank))
    }

    /// Ends it: what to tell each rank, or all ranks alike if that is the same. The next begins.
    pub(super) fn end(&mut self) -> Vec<(Option<Rank>, Vec<Message>)> {
        let (round, world) = (self.number, self.given.len());
        let given = std::mem::replace(&mut self.given, nothing(world));
        (self.number, self.until) = (round.wrapping_add(1), None);
        let messages = |to: Rank| {
            let message = |(rank, given): (Rank, &Given)| Message::Gathered {
                round,
                rank,
                blob: given.blob(to),
            };
            given.iter().enumerate().map(message).collect()
        };
        if given.iter().all(|given| matches!(given, Given::Same(_))) {
            return vec![(None, messages(0))];
        }
        (0..world).map(|rank| (Some(rank), messages(rank))).collect()
    }
}

impl Given {
    fn blob(&self, to: Rank) -> Bytes {
        match self {
            Self::Each(blobs, _) => blobs[to].clone(),
            Self::Same(blob) => blob.clone(),
        }
    }
}

fn nothing(world: usize) -> Vec<Given> {
    (0..world).map(|_| Given::Each(Vec::new(), 0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::BLOB_BYTES_MAX;

    fn give(round: &mut Round, from: Rank, to: Option<Rank>, bytes: usize) -> bool {
        round.take(from, round.number, to, Bytes::from(vec![from as u8; bytes]))
    }

    fn lengths((to, messages): &(Option<Rank>, Vec<Message>)) -> (Option<Rank>, Vec<usize>) {
        let length = |message: &Message| match message {
            Message::Gathered { blob, .. } => blob.len(),
            other => panic!("{other:?}"),
        };
        (*to, messages.iter().map(length).collect())
    }

    #[test]
    fn each_rank_gets_what_is_meant_for_it() {
        let mut round = Round::new(3);
        for to in 0..3 {
            assert!(give(&mut round, 2, Some(to), 10 + to) && give(&mut round, 0, Some(to), to));
        }
        assert!(round.has(2) && !round.has(1) && !round.is_whole());
        assert!(give(&mut round, 1, None, 7) && round.is_whole());
        let told: Vec<_> = round.end().iter().map(lengths).collect();
        let expected = [[0, 7, 10], [1, 7, 11], [2, 7, 12]].map(Vec::from);
        assert!(told.into_iter().eq((0..3).map(Some).zip(expected)));
        assert!(!round.has(0) && round.number == 1);
    }

    #[test]
    fn what_is_the_same_for_all_is_told_once() {
        let mut round = Round::new(2);
        assert!(give(&mut round, 0, None, 1) && give(&mut round, 1, None, 2));
        assert_eq!(lengths(&round.end()[0]), (None, vec![1, 2]));
    }

    #[test]
    fn blobs_out_of_order_twice_or_beyond_the_world_are_refused() {
        let mut round = Round::new(2);
        assert!(!give(&mut round, 0, Some(1), 1));
        assert!(give(&mut round, 0, Some(0), 1) && !give(&mut round, 0, Some(0), 1));
        assert!(!give(&mut round, 0, None, 1));
        assert!(give(&mut round, 0, Some(1), 1) && !give(&mut round, 0, Some(2), 1));
        assert!(give(&mut round, 1, None, 1) && !give(&mut round, 1, None, 1));
        assert!(!give(&mut round, 1, Some(0), 1));
        assert!(!Round::new(2).take(0, 1, None, Bytes::new()));
    }

    #[test]
    fn one_rank_can_not_fill_the_memory() {
        let mut round = Round::new(8);
        assert!(give(&mut round, 0, Some(0), BLOB_BYTES_MAX));
        assert!(!give(&mut round, 0, Some(1), 1));
        let mut round = Round::new(1000);
        assert!((0..1000).all(|to| give(&mut round, 0, Some(to), 1024)));
    }
}
