//! What this rank has exported to its peers, and what it has open of theirs.
//!
//! Memory may be freed only when no peer has it open any more. A rank that wants to free an
//! allocation says so in the card of a call; its peers close the allocation once their streams have
//! passed that call, and say so in the card of a later one.
//!
//! What a program has mapped itself it may unmap at any time: the driver keeps its backing as long
//! as somebody has it. A range that several allocations back is exported as one; where two of these
//! overlap, what both span is.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use unisum_cuda_ipc::{
    Allocation, CudaError, Device, Event, Mapped, Opened, Origin, PlaceError, Stream, Ways, Window,
};
use unisum_link::{Rank, warning};

use super::card::{Exported, RETIRED_MAX, Spot, Via};
use super::post::{FILES_MAX, OpenError, Post};

/// The numbers of exports of mapped memory begin here; those of allocations are the driver's.
const MAPPED: u64 = 1 << 63;

/// Whether a number is that of an export of mapped memory.
pub(super) const fn is_mapped(id: u64) -> bool {
    id >= MAPPED
}

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
    /// From where on is to be looked for what the program has unmapped.
    next: u64,
    /// Whether it was said that memory is copied.
    has_warned: bool,
}

#[derive(Debug)]
struct Export {
    origin: Origin,
    /// `None` if others can't open it.
    exported: Option<Exported>,
    /// What backs it, if the program has mapped it and others can open it.
    mapped: Option<Mapped>,
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
        device: &Arc<Device>,
        Owned { allocation, life }: &Owned,
    ) -> Result<Option<Exported>, PlaceError> {
        if let Some(known) = self.known.get(&allocation.address())
            && known.keeps.as_ref().is_some_and(|kept| Arc::ptr_eq(&kept.allocation, allocation))
        {
            return Ok(known.exported);
        }
        let origin = device.origin(allocation.address(), allocation.bytes())?;
        let keeps = Some(Kept { allocation: allocation.clone(), owner: Arc::downgrade(life) });
        let handle = device.export(origin.base)?;
        let via = handle.map(Via::Ipc);
        let exported = via.map(|via| Exported { id: origin.id, base: origin.base, via });
        self.insert(Export { origin, exported, mapped: None, keeps });
        Ok(exported)
    }

    /// The place of these bytes of the device's memory, whosever they are; `None` if others can't
    /// open that. Descriptors go to them by `post`.
    pub(super) fn spot(
        &mut self,
        (device, own): (&Arc<Device>, Rank),
        post: &mut Post,
        (address, bytes): (u64, usize),
    ) -> Result<Option<Spot>, PlaceError> {
        let within = |export: &Export| {
            let offset = address - export.origin.base;
            offset <= export.origin.bytes as u64
                && bytes as u64 <= export.origin.bytes as u64 - offset
        };
        let spot = |of: Option<Exported>| of.map(|of| Spot { of, offset: address - of.base });
        let before = self.known.range(..=address).next_back().map(|(_, export)| export);
        if let Some(known) = before.filter(|it| within(it)) {
            // What unisum keeps can't have gone and come again.
            let is_known = match &known.mapped {
                Some(mapped) => mapped.is_still_there(&(address..address + bytes as u64))?,
                None => known.keeps.is_some(),
            };
            if is_known {
                return Ok(spot(known.exported));
            }
        }
        let origin = device.origin(address, bytes)?;
        if let Some(known) = before.filter(|it| it.origin == origin && it.mapped.is_none()) {
            return Ok(spot(known.exported));
        }
        Ok(spot(self.export((device, own), post, origin)?))
    }

    fn export(
        &mut self,
        (device, own): (&Arc<Device>, Rank),
        post: &mut Post,
        origin: Origin,
    ) -> Result<Option<Exported>, CudaError> {
        let Origin { base, bytes, id } = origin;
        let exported = device.export(base)?.map(|it| Exported { id, base, via: Via::Ipc(it) });
        let mapped = match exported {
            Some(_) => None,
            None => device.mapped(base, bytes)?,
        };
        let Some(mapped) = mapped else {
            self.insert(Export { origin, exported, mapped: None, keeps: None });
            return Ok(exported);
        };
        let mapped = self.widened(device, mapped)?;
        let origin = Origin { base: mapped.base(), bytes: mapped.bytes(), id };
        let exported = match self.send(own, post, origin, &mapped)? {
            Ok(exported) => Some(exported),
            Err(why) => {
                self.warn(own, origin, &why);
                None
            }
        };
        let mapped = Some(mapped).filter(|_| exported.is_some());
        self.insert(Export { origin, exported, mapped, keeps: None });
        Ok(exported)
    }

    /// Mapped memory, and what was exported and overlaps with it, if that is still mapped and not
    /// more than can be sent.
    fn widened(&self, device: &Arc<Device>, mapped: Mapped) -> Result<Mapped, CudaError> {
        let end = |base: u64, bytes: usize| base + bytes as u64;
        let range = mapped.base()..end(mapped.base(), mapped.bytes());
        let overlapping = self.overlapping(&range).filter_map(|(_, export)| export.mapped.as_ref());
        let wide = overlapping.fold(range.clone(), |wide, known| {
            wide.start.min(known.base())..wide.end.max(end(known.base(), known.bytes()))
        });
        if wide == range {
            return Ok(mapped);
        }
        let wider = device.mapped(wide.start, (wide.end - wide.start) as usize)?;
        Ok(wider.filter(|wider| wider.parts() <= FILES_MAX).unwrap_or(mapped))
    }

    /// Gives others mapped memory, or says why they can't have it.
    fn send(
        &mut self,
        own: Rank,
        post: &mut Post,
        origin: Origin,
        mapped: &Mapped,
    ) -> Result<Result<Exported, String>, CudaError> {
        static NEXT: AtomicU64 = AtomicU64::new(MAPPED);
        // Relaxed: only the uniqueness of the number matters.
        let (id, base) = (NEXT.fetch_add(1, Ordering::Relaxed), origin.base);
        if mapped.parts() > FILES_MAX {
            let parts = mapped.parts();
            return Ok(Err(format!("{parts} allocations back it, of {FILES_MAX} at most")));
        }
        let files = match mapped.ways()? {
            Ways::None(why) => return Ok(Err(why.into())),
            Ways::Fabric(handle) => {
                let via = Via::Fabric(handle, origin.bytes as u64);
                return Ok(Ok(Exported { id, base, via }));
            }
            Ways::Files(files) => files,
        };
        let sent = post.send(own, id, &files).map(|it| Exported { id, base, via: Via::Post(it) });
        if sent.is_err() {
            // Those who have got it let go of it as of what was exported.
            let exported = Some(Exported { id, base, via: Via::Post(0) });
            self.leaving.push_back(Export { origin, exported, mapped: None, keeps: None });
        }
        Ok(sent)
    }

    fn warn(&mut self, own: Rank, Origin { base, bytes, .. }: Origin, why: &str) {
        if !std::mem::replace(&mut self.has_warned, true) {
            warning!(
                "rank {own}: collectives copy the {bytes} bytes at {base:#x}, which other ranks \
                 can't open: {why}"
            );
        }
    }

    /// What was exported of these addresses.
    fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = (&u64, &Export)> {
        let start = range.start;
        let overlaps = move |it: &Export| it.origin.base + it.origin.bytes as u64 > start;
        let before = self.known.range(..range.end).rev();
        before.take_while(move |(_, export)| overlaps(export))
    }

    fn insert(&mut self, export: Export) {
        let Origin { base, bytes, .. } = export.origin;
        // What was here before has been freed, or lies within: no two allocations overlap.
        let range = base..base + bytes as u64;
        let gone: Vec<u64> = self.overlapping(&range).map(|(&base, _)| base).collect();
        self.leaving.extend(gone.iter().filter_map(|base| self.known.remove(base)));
        self.known.insert(base, export);
    }

    /// Looks at one part of the mapped memory, in turns: where the program has unmapped it, peers
    /// close it, and the driver frees it.
    pub(super) fn look(&mut self) -> Result<(), CudaError> {
        let all = || {
            let mapped = self.known.values().filter_map(|export| export.mapped.as_ref());
            mapped.flat_map(|mapped| mapped.ranges().map(move |range| (mapped, range)))
        };
        let next = all().find(|(_, range)| range.start >= self.next).or_else(|| all().next());
        let Some((mapped, range)) = next else { return Ok(()) };
        let (base, is_there) = (mapped.base(), mapped.is_still_there(&range)?);
        self.next = range.end;
        if !is_there {
            self.leaving.extend(self.known.remove(&base));
        }
        Ok(())
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
    open: HashMap<(Rank, u64), Open>,
    /// To be closed, when the stream has passed the call in which they were retired.
    closing: VecDeque<(u64, Event, Vec<Open>)>,
    closed: u64,
}

/// Memory of a peer. Closed when dropped.
#[derive(Debug)]
enum Open {
    Handle(Arc<Opened>),
    Window(Window),
}

impl Open {
    fn base(&self) -> u64 {
        match self {
            Self::Handle(opened) => opened.base(),
            Self::Window(window) => window.base(),
        }
    }
}

impl Imports {
    /// Where an allocation of a peer begins in this process. Descriptors of mapped memory have come
    /// by `post`.
    pub(super) fn base(
        &mut self,
        device: &Arc<Device>,
        rank: Rank,
        of: &Exported,
        post: Option<&mut Post>,
    ) -> Result<u64, OpenError> {
        if let Some(open) = self.open.get(&(rank, of.id)) {
            return Ok(open.base());
        }
        let opened = match of.via {
            Via::Ipc(handle) => Open::Handle(device.open_handle(handle, of.id)?),
            Via::Fabric(handle, bytes) => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                let part = device.import_fabric(handle, bytes)?;
                Open::Window(device.open_mapped(&[part])?)
            }
            Via::Post(_) => {
                let parts = post.and_then(|post| post.take(rank, of.id)).ok_or_else(|| {
                    let why = "it told of others".into();
                    OpenError::Lost { device: device.ordinal(), rank, why }
                })?;
                Open::Window(device.open_mapped(&parts)?)
            }
        };
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
