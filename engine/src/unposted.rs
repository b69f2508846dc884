//! Transfers that are open and cannot be posted yet.

use unisum_link::Rank;

/// Queues of transfers by rank and direction. Few are ever in use, of a large world least of all:
/// they are lists through one array, so that a rank costs 16 bytes.
#[derive(Debug, Default)]
pub(crate) struct Unposted {
    queues: Vec<[Queue; 2]>,
    /// What was queued in this segment, in the order in which it was.
    entries: Vec<Entry>,
}

/// The indices of a queue's ends among the entries. `last` counts only if there is a first.
#[derive(Clone, Copy, Debug)]
struct Queue {
    first: u32,
    last: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    transfer: u32,
    /// The index of the entry behind it.
    next: u32,
}

/// No entry.
const NONE: u32 = u32::MAX;

const EMPTY: [Queue; 2] = [Queue { first: NONE, last: NONE }; 2];

impl Unposted {
    /// Forgets everything, for a segment in a world of this size.
    pub(crate) fn clear(&mut self, world: usize) {
        if !self.entries.is_empty() {
            self.entries.clear();
            self.queues.fill(EMPTY);
        }
        self.queues.resize(world, EMPTY);
    }

    /// The transfer that was queued first of those that are.
    pub(crate) fn first(&self, peer: Rank, direction: usize) -> Option<usize> {
        let first = self.queues[peer][direction].first;
        self.entries.get(first as usize).map(|entry| entry.transfer as usize)
    }

    pub(crate) fn push(&mut self, peer: Rank, direction: usize, transfer: usize) {
        let queue = &mut self.queues[peer][direction];
        let index = self.entries.len() as u32;
        match queue.first {
            NONE => queue.first = index,
            _ => self.entries[queue.last as usize].next = index,
        }
        queue.last = index;
        self.entries.push(Entry { transfer: transfer as u32, next: NONE });
    }

    /// Removes the first, which there is.
    pub(crate) fn pop(&mut self, peer: Rank, direction: usize) {
        let queue = &mut self.queues[peer][direction];
        queue.first = self.entries[queue.first as usize].next;
    }

    pub(crate) fn contains(&self, peer: Rank, direction: usize, transfer: usize) -> bool {
        let mut index = self.queues[peer][direction].first;
        while let Some(entry) = self.entries.get(index as usize) {
            if entry.transfer as usize == transfer {
                return true;
            }
            index = entry.next;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_and_direction_has_a_queue_of_its_own() {
        const PEERS: [Rank; 3] = [1023, 0, 7];
        let mut unposted = Unposted::default();
        for _ in 0..2 {
            unposted.clear(1024);
            for peer in PEERS {
                assert_eq!([0, 1].map(|direction| unposted.first(peer, direction)), [None; 2]);
            }
            // Every sixth comes to the same queue.
            (0..30).for_each(|it| unposted.push(PEERS[it % 3], it % 2, it));
            for first in 0..6 {
                let (peer, direction) = (PEERS[first % 3], first % 2);
                for transfer in (first..24).step_by(6) {
                    let is_there = |it| unposted.contains(peer, direction, it);
                    let expected = |it: usize| it % 6 == first && it >= transfer;
                    assert!((0..30).all(|it| is_there(it) == expected(it)), "{first} {transfer}");
                    assert_eq!(unposted.first(peer, direction), Some(transfer));
                    unposted.pop(peer, direction);
                }
                assert_eq!(unposted.first(peer, direction), Some(24 + first));
            }
            // One that has run empty is filled again. What is left is forgotten, as after an error.
            unposted.pop(7, 0);
            assert_eq!(unposted.first(7, 0), None);
            unposted.push(7, 0, 99);
            unposted.push(7, 0, 100);
            unposted.pop(7, 0);
            assert_eq!(unposted.first(7, 0), Some(100));
            assert_eq!(unposted.first(500, 1), None);
        }
    }

    #[test]
    fn a_rank_costs_16_bytes() {
        assert_eq!(size_of_val(&EMPTY), 16);
    }
}
