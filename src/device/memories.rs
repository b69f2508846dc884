//! What this rank has exported to its peers, and what it has open of theirs.
//!
//! Memory may be freed only when no peer has it open any more. A rank that wants to free an
//! allocation says so in the card of a call; its peers close the allocation once their streams have
//! passed that call, and say so in the card of a later one.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Weak};

use unisum_cuda_ipc::{Allocation, CudaError, Device, Event, Opened, Origin, PlaceError, Stream};
use unisum_link::Rank;

use super::card::{Exported, RETIRED_MAX, Spot};

/// An allocation of unisum's with an owner: peers close it after the owner is gone, and then it is
/// freed.
#[derive(Debug)]
pub(super) struct Owned {
    allocation: Arc<Allocation>,
    life: Arc<()>,
}

impl Owned {
    pub(super) fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let allocation = Allocation::zeroed(device, bytes)?.into();
        Ok(Self { allocation, life: Arc::default() })
    }

    pub(super) fn memory(&self) -> &Allocation {
        &self.allocation
    }
}

/// The own allocations that peers may have open.
#[derive(Debug, Default)]
pub(super) struct Exports {
    /// By where they begin.
    known: BTreeMap<u64, Export>,
    /// No card has said yet that they go.
    leaving: VecDeque<Export>,
    /// A card has.
    retired: VecDeque<Retired>,
}

#[derive(Debug)]
struct Export {
    origin: Origin,
    /// `None` if others can't open it.
    exported: Option<Exported>,
    /// Keeps it, if it is unisum's.
    keeps: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    allocation: Arc<Allocation>,
    /// Dead when the owner is gone.
    owner: Weak<()>,
}

#[derive(Debug)]
struct Retired {
    call: u64,
    /// When this rank's own stream has passed the call.
    passed: Event,
    /// Freed with this.
    _exports: Vec<Export>,
}

impl Exports {
    /// Takes part in the life of an allocation of unisum's: it is freed when whoever else has it
    /// is done with it, and no peer has it open.
    pub(super) fn adopt(
        &mut self,
        device: &Device,
        Owned { allocation, life }: &Owned,
    ) -> Result<Option<Exported>, PlaceError> {
        if let Some(known) = self.known.get(&allocation.address())
            && known.keeps.as_ref().is_some_and(|kept| Arc::ptr_eq(&kept.allocation, allocation))
        {
            return Ok(known.exported);
        }
        let origin = device.origin(allocation.address(), allocation.bytes())?;
        let kept = Kept { allocation: allocation.clone(), owner: Arc::downgrade(life) };
        self.add(device, origin, Some(kept)).map_err(PlaceError::from)
    }

    /// The place of these bytes of the device's memory, whosever they are; `None` if others can't
    /// open that.
    pub(super) fn spot(
        &mut self,
        device: &Device,
        address: u64,
        bytes: usize,
    ) -> Result<Option<Spot>, PlaceError> {
        let within = |export: &Export| {
            let offset = address - export.origin.base;
            offset <= export.origin.bytes as u64
                && bytes as u64 <= export.origin.bytes as u64 - offset
        };
        let spot = |of: Option<Exported>| of.map(|of| Spot { of, offset: address - of.base });
        let before = self.known.range(..=address).next_back().map(|(_, export)| export);
        // What unisum keeps can't have gone and come again.
        if let Some(known) = before.filter(|it| it.keeps.is_some() && within(it)) {
            return Ok(spot(known.exported));
        }
        let origin = device.origin(address, bytes)?;
        if let Some(known) = before.filter(|it| it.origin == origin) {
            return Ok(spot(known.exported));
        }
        Ok(spot(self.add(device, origin, None)?))
    }

    fn add(
        &mut self,
        device: &Device,
        origin: Origin,
        keeps: Option<Kept>,
    ) -> Result<Option<Exported>, CudaError> {
        let Origin { base, bytes, id } = origin;
        // What was here before has been freed: no two allocations overlap.
        let overlaps = |export: &Export| export.origin.base + export.origin.bytes as u64 > base;
        let gone: Vec<u64> = self
            .known
            .range(..base + bytes as u64)
            .rev()
            .take_while(|(_, export)| overlaps(export))
            .map(|(&base, _)| base)
            .collect();
        self.leaving.extend(gone.iter().filter_map(|base| self.known.remove(base)));
        let handle = device.export(base)?;
        let exported = handle.map(|handle| Exported { id, base, handle });
        self.known.insert(base, Export { origin, exported, keeps });
        Ok(exported)
    }

    /// The numbers of allocations that peers should close in the call that begins.
    pub(super) fn leave(&mut self) -> Vec<u64> {
        let is_left = |export: &Export| {
            export.keeps.as_ref().is_some_and(|kept| kept.owner.strong_count() == 0)
        };
        let left = self.known.iter().filter(|(_, export)| is_left(export));
        let left: Vec<u64> = left.map(|(&base, _)| base).collect();
        self.leaving.extend(left.iter().filter_map(|base| self.known.remove(base)));
        // What was never exported nobody has open.
        self.leaving.retain(|export| export.exported.is_some());
        let leaving = self.leaving.iter().take(RETIRED_MAX);
        leaving.filter_map(|export| export.exported.map(|it| it.id)).collect()
    }

    /// The call whose card said so has been enqueued: the first `count` have left.
    pub(super) fn left(
        &mut self,
        (call, count): (u64, usize),
        device: &Arc<Device>,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        let passed = Event::new(device, false)?;
        passed.record(stream)?;
        let exports = self.leaving.drain(..count).collect();
        self.retired.push_back(Retired { call, passed, _exports: exports });
        Ok(())
    }

    /// Frees what all peers have closed: all that was retired up to this call.
    pub(super) fn closed(&mut self, by_all: u64) -> Result<(), CudaError> {
        while let Some(first) = self.retired.front() {
            if first.call > by_all || !first.passed.is_done()? {
                break;
            }
            self.retired.pop_front();
        }
        Ok(())
    }
}

/// What this rank has open of its peers.
#[derive(Debug, Default)]
pub(super) struct Imports {
    open: HashMap<(Rank, u64), Arc<Opened>>,
    /// To be closed, when the stream has passed the call in which they were retired.
    closing: VecDeque<(u64, Event, Vec<Arc<Opened>>)>,
    closed: u64,
}

impl Imports {
    /// Where an allocation of a peer begins in this process.
    pub(super) fn base(
        &mut self,
        device: &Arc<Device>,
        rank: Rank,
        of: &Exported,
    ) -> Result<u64, CudaError> {
        if let Some(open) = self.open.get(&(rank, of.id)) {
            return Ok(open.base());
        }
        let opened = device.open_handle(of.handle, of.id)?;
        let base = opened.base();
        self.open.insert((rank, of.id), opened);
        Ok(base)
    }

    /// Peers want to free these allocations; the call whose cards say so has been enqueued.
    pub(super) fn retire(
        &mut self,
        call: u64,
        retired: impl Iterator<Item = (Rank, u64)>,
        (device, stream): (&Arc<Device>, &Stream),
    ) -> Result<(), CudaError> {
        let open: Vec<_> = retired.filter_map(|it| self.open.remove(&it)).collect();
        let passed = match (open.is_empty(), self.closing.is_empty()) {
            // Nothing to wait for.
            (true, true) => {
                self.closed = call;
                return Ok(());
            }
            (true, false) => return Ok(()),
            (false, _) => Event::new(device, false)?,
        };
        passed.record(stream)?;
        self.closing.push_back((call, passed, open));
        Ok(())
    }

    /// Closes what can be, and says up to which call's retirements everything is closed.
    pub(super) fn close(&mut self) -> Result<u64, CudaError> {
        while let Some((call, passed, _)) = self.closing.front() {
            if !passed.is_done()? {
                break;
            }
            self.closed = *call;
            self.closing.pop_front();
        }
        Ok(self.closed)
    }
}
