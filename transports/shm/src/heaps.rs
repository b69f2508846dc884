//! The registered memory of all ranks of a host, for several links.
//!
//! Groups of a job's ranks have links of their own, in memory of their own. Registered memory is
//! the same for all of them: it lies in the heaps of the first link.

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
    local_ranks: Arc<[(Rank, u64)]>,
}

/// Where a link finds the heap of one of its ranks.
#[derive(Clone, Debug)]
pub(crate) struct PeerHeap {
    mapping: Arc<Mapping>,
    local_index: u64,
}

impl Heaps {
    pub(crate) fn new(own: Heap, mapping: Arc<Mapping>, mut local_ranks: Vec<(Rank, u64)>) -> Self {
        local_ranks.sort_unstable();
        Self { own, mapping, local_ranks: local_ranks.into() }
    }

    /// The same heaps for a link that numbers its ranks differently: its rank r is rank `ranks[r]`
    /// here. Covers those of its ranks that are in `members`.
    ///
    /// # Errors
    /// If a member has no heap here.
    pub fn renamed(&self, members: &[Rank], ranks: &[Rank]) -> Result<Self, ShmError> {
        let local_index = |&member: &Rank| {
            let found = self.local_ranks.binary_search_by_key(&ranks[member], |(rank, _)| *rank);
            found
                .map(|at| (member, self.local_ranks[at].1))
                .map_err(|_| ShmError::Late(vec![member]))
        };
        let local_ranks = members.iter().map(local_index).collect::<Result<_, _>>()?;
        Ok(Self::new(self.own.clone(), Arc::clone(&self.mapping), local_ranks))
    }

    /// This rank's own heap.
    pub fn own(&self) -> Heap {
        self.own.clone()
    }

    pub(crate) fn of(&self, rank: Rank) -> PeerHeap {
        let at = self.local_ranks.binary_search_by_key(&rank, |(rank, _)| *rank);
        let (_, local_index) = self.local_ranks[at.expect("every rank of a link has a heap")];
        PeerHeap { mapping: Arc::clone(&self.mapping), local_index }
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
        Ok(self.mapping.pointer(layout.heap(self.local_index) + offset, bytes))
    }
}
