//! The registered memory of all ranks of a host, for several links.
//!
//! Groups of a job's ranks have links of their own, in memory of their own, but what is registered
//! is registered for all of them: it lies in the heaps of the link that was there first.

use std::sync::Arc;

use unisum_link::{LinkError, Rank};

use crate::ShmError;
use crate::heap::Heap;
use crate::mapping::Mapping;

/// The heaps of the ranks that a link joins. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Heaps {
    /// This rank's own.
    pub(crate) own: Heap,
    mapping: Arc<Mapping>,
    /// By rank, ascending.
    seats: Arc<[(Rank, u64)]>,
}

/// Where a link finds the heap of one of its ranks.
#[derive(Clone, Debug)]
pub(crate) struct PeerHeap {
    mapping: Arc<Mapping>,
    seat: u64,
}

impl Heaps {
    pub(crate) fn new(own: Heap, mapping: Arc<Mapping>, mut seats: Vec<(Rank, u64)>) -> Self {
        seats.sort_unstable();
        Self { own, mapping, seats: seats.into() }
    }

    /// The same heaps for a link that calls its ranks by other numbers: its rank r is rank
    /// `ranks[r]` here. For those of its ranks that are in `members`.
    ///
    /// # Errors
    /// If a member has no heap here.
    pub fn renamed(&self, members: &[Rank], ranks: &[Rank]) -> Result<Self, ShmError> {
        let seat = |&member: &Rank| {
            let found = self.seats.binary_search_by_key(&ranks[member], |(rank, _)| *rank);
            found.map(|at| (member, self.seats[at].1)).map_err(|_| ShmError::Late(vec![member]))
        };
        let seats = members.iter().map(seat).collect::<Result<_, _>>()?;
        Ok(Self::new(self.own.clone(), Arc::clone(&self.mapping), seats))
    }

    /// This rank's own heap.
    pub fn own(&self) -> Heap {
        self.own.clone()
    }

    pub(crate) fn of(&self, rank: Rank) -> PeerHeap {
        let at = self.seats.binary_search_by_key(&rank, |(rank, _)| *rank);
        let (_, seat) = self.seats[at.expect("every rank of a link has a heap")];
        PeerHeap { mapping: Arc::clone(&self.mapping), seat }
    }
}

impl PeerHeap {
    /// The address of `bytes` bytes at `offset` of the heap of `rank`.
    pub(crate) fn mapped(&self, rank: Rank, offset: u64, bytes: u64) -> Result<*mut u8, LinkError> {
        let layout = self.mapping.layout();
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= layout.heap_bytes());
        if !inside {
            return Err(LinkError::protocol(rank, "a message outside of the sender's heap"));
        }
        Ok(self.mapping.pointer(layout.heap(self.seat) + offset, bytes))
    }
}
