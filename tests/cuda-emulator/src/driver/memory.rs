//! Device memory: allocations, and who may access them.
//!
//! A device address consists of a tag, the number of a slot and an offset, so that an address is
//! looked up without a search and an overrun never reaches another allocation. Slots are not used
//! again: an address of freed memory stays invalid.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use super::DEVICES_MAX;
use super::codes::{Code, Done};
use super::mapping::{FilePlace, Mapping, SharedFile};
use super::registry::lock;
use super::vmm::Reserved;
use crate::machine::tag;

const OFFSET_BITS: u32 = 36;
const SLOTS_MAX: usize = 1 << 20;

/// Before the data of a file, a page that tells openers about the owner.
const HEADER_BYTES: usize = 4096;

/// New memory holds this byte, up to so many bytes: nothing is initialized on a real device either.
pub(crate) const POISON: (u8, usize) = (0xA5, 64 << 20);

/// Where memory comes from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// `cuMemAlloc`: can be exported.
    Allocated(SharedFile),
    /// `cuMemAllocAsync`: can't be exported, and no peer may access it.
    Pool,
    /// Variables of a module.
    Module,
    /// A range in which the program maps memory.
    Reserved(Reserved),
    /// Memory of another process, opened so many times.
    Opened { from: FilePlace, opener: usize, count: AtomicU32 },
}

/// An allocation.
#[derive(Debug)]
pub(crate) struct Region {
    mapping: Mapping,
    /// Where the data begins in the mapping.
    skipped: usize,
    pub bytes: usize,
    /// The address of its first byte.
    pub address: u64,
    /// The ordinal of the device that it is on, or of the one that opened it if this process does
    /// not see that device.
    pub device: usize,
    pub id: u64,
    pub origin: Origin,
    /// The physical device that it is on.
    pub physical: u32,
    /// Whether a stream will free it.
    is_dying: AtomicBool,
    is_removed: AtomicBool,
}

/// Which memory of which devices a device may access, one bit for each ordinal.
#[derive(Debug, Default)]
pub(crate) struct PeerMask(AtomicU64);

impl PeerMask {
    /// Returns whether it was enabled before.
    pub(crate) fn enable(&self, device: usize) -> bool {
        // Relaxed: kernels that need it are enqueued later, through a lock.
        self.0.fetch_or(1 << device, Ordering::Relaxed) >> device & 1 == 1
    }

    /// Returns whether it was enabled before.
    pub(crate) fn disable(&self, device: usize) -> bool {
        // Relaxed: as above.
        self.0.fetch_and(!(1 << device), Ordering::Relaxed) >> device & 1 == 1
    }

    pub(crate) fn contains(&self, device: usize) -> bool {
        // Relaxed: as above.
        self.0.load(Ordering::Relaxed) >> device & 1 == 1
    }
}

static SLOTS: [AtomicPtr<Region>; SLOTS_MAX] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; SLOTS_MAX];

/// Operations that run and may access regions.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Removed memory that running operations may still access.
static GRAVEYARD: Mutex<Vec<Retired>> = Mutex::new(Vec::new());

enum Retired {
    Region(RemovedRegion),
    Host { _mapping: Mapping },
}

struct RemovedRegion(*mut Region);

// SAFETY: the region is in no slot any more; the graveyard alone has the pointer.
unsafe impl Send for RemovedRegion {}

/// Allocations of this process, by slot.
static LIVE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

fn next_slot() -> Done<usize> {
    static NEXT: OnceLock<AtomicUsize> = OnceLock::new();
    // Processes begin at different slots, so that addresses of one mean nothing in another.
    let first = || AtomicUsize::new(std::process::id() as usize % 4093 * (SLOTS_MAX / 8192) + 1);
    // Relaxed: only the uniqueness of the number matters.
    let slot = NEXT.get_or_init(first).fetch_add(1, Ordering::Relaxed);
    if slot < SLOTS_MAX { Ok(slot) } else { Err(Code::OUT_OF_MEMORY) }
}

/// While it lives, regions that an operation has looked up stay mapped.
#[derive(Debug)]
pub(crate) struct Running(());

impl Running {
    pub(crate) fn begin() -> Self {
        // SeqCst: ordered against the removal of a region from its slot.
        RUNNING.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SeqCst: as above. Operations that begin from here on do not find removed regions.
        if RUNNING.fetch_sub(1, Ordering::SeqCst) == 1 {
            bury(Vec::new());
        }
    }
}

/// Unmaps what is retired, unless an operation runs.
fn bury(retired: Vec<Retired>) {
    let mut graveyard = lock(&GRAVEYARD);
    graveyard.extend(retired);
    // SeqCst: pairs with `Running::begin`; what begins later finds empty slots.
    if RUNNING.load(Ordering::SeqCst) > 0 {
        return;
    }
    for region in graveyard.drain(..) {
        // Pinned memory is unmapped when it is dropped.
        if let Retired::Region(region) = region {
            // SAFETY: the pointer came from `Box::into_raw`, is in no slot, and no operation that
            // could have read it from there is running.
            drop(unsafe { Box::from_raw(region.0) });
        }
    }
}

/// Unmaps pinned host memory that no device can find any more, once no operation runs.
pub(crate) fn retire(mapping: Mapping) {
    bury(vec![Retired::Host { _mapping: mapping }]);
}

impl Region {
    /// The bytes from `offset` on.
    pub(crate) fn pointer(&self, offset: usize) -> *mut u8 {
        self.mapping.pointer().wrapping_add(self.skipped + offset)
    }

    /// Set when the owner frees the memory; openers look at it.
    fn freed(&self) -> Option<&AtomicU32> {
        match self.origin {
            Origin::Allocated(_) | Origin::Opened { .. } => {
                // SAFETY: the mapping begins with a page for this, aligned and never unmapped
                // before `self` is dropped.
                Some(unsafe { AtomicU32::from_ptr(self.mapping.pointer().cast()) })
            }
            _ => None,
        }
    }

    /// Whether kernels on `device`, which may access the memory of `peers`, may access this.
    fn is_accessible(&self, device: usize, peers: &PeerMask) -> bool {
        match self.origin {
            Origin::Pool => self.device == device,
            Origin::Opened { opener, .. } => opener == device || self.device == device,
            _ => self.device == device || peers.contains(self.device),
        }
    }

    /// Puts a file in place of so many bytes, or new memory.
    pub(crate) fn replace(&self, offset: usize, bytes: usize, file: Option<&File>) -> Done {
        self.mapping.replace(offset, bytes, file)
    }

    /// Where the allocation begins that an address lies in, its length and its device: the region,
    /// unless the program maps memory there.
    pub(crate) fn extent(&self, address: u64) -> (u64, usize, usize) {
        let whole = (self.address, self.bytes, self.device);
        let Origin::Reserved(reserved) = &self.origin else { return whole };
        let piece = reserved.at(offset_of(address), |start, piece| {
            (self.address + start as u64, piece.physical.bytes, piece.physical.ordinal)
        });
        piece.unwrap_or(whole)
    }

    /// As [`Region::extent`], of all that is mapped side by side around an address.
    pub(crate) fn merged_extent(&self, address: u64) -> (u64, usize, usize) {
        let Origin::Reserved(reserved) = &self.origin else { return self.extent(address) };
        let piece = |address: u64| {
            let offset = offset_of(address);
            reserved.at(offset, |start, piece| (self.address + start as u64, piece.physical.bytes))
        };
        let (mut start, bytes, device) = self.extent(address);
        let (first, mut end) = (self.address, start + bytes as u64);
        while let Some((before, _)) = piece(start.wrapping_sub(1)).filter(|_| start > first) {
            start = before;
        }
        let beyond = first + self.bytes as u64;
        while let Some((next, bytes)) = Some(end).filter(|&end| end < beyond).and_then(piece) {
            end = next + bytes as u64;
        }
        (start, (end - start) as usize, device)
    }

    /// Says that a stream will free it. Returns whether one will already.
    pub(crate) fn begin_dying(&self) -> bool {
        // AcqRel: one caller alone enqueues that.
        self.is_dying.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_dying(&self) -> bool {
        // Acquire: pairs with the above.
        self.is_dying.load(Ordering::Acquire)
    }

    pub(crate) fn is_exportable(&self) -> bool {
        matches!(self.origin, Origin::Allocated(_))
    }

    pub(crate) fn is_opened(&self) -> bool {
        matches!(self.origin, Origin::Opened { .. })
    }
}

/// Memory to be added.
pub(crate) struct Request {
    pub origin: Origin,
    pub mapping: Mapping,
    pub skipped: usize,
    pub bytes: usize,
    pub device: usize,
    pub physical: u32,
}

/// Puts memory into a slot. Returns its address.
pub(crate) fn add(request: Request) -> Done<u64> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let slot = next_slot()?;
    let address = tag::DEVICE | (slot as u64) << OFFSET_BITS;
    let Request { origin, mapping, skipped, bytes, device, physical } = request;
    assert!(device < DEVICES_MAX as usize, "a device that exists");
    let region = Region {
        mapping,
        skipped,
        bytes,
        address,
        device,
        // Relaxed: only the uniqueness of the number matters.
        id: NEXT.fetch_add(1, Ordering::Relaxed),
        origin,
        physical,
        is_dying: AtomicBool::new(false),
        is_removed: AtomicBool::new(false),
    };
    // SeqCst: ordered with the removal; lookups pair with it.
    SLOTS[slot].store(Box::into_raw(Box::new(region)), Ordering::SeqCst);
    lock(&LIVE).push(slot);
    Ok(address)
}

/// Whether a region may have so many bytes.
pub(crate) fn fits(bytes: usize) -> bool {
    (bytes as u64) < 1 << OFFSET_BITS
}

/// Allocates memory of a device.
pub(crate) fn allocate(bytes: usize, device: usize, physical: u32, pool: bool) -> Done<u64> {
    if !fits(bytes) {
        return Err(Code::OUT_OF_MEMORY);
    }
    let (origin, mapping, skipped) = if pool {
        (Origin::Pool, Mapping::private(bytes)?, 0)
    } else {
        let file = SharedFile::create(HEADER_BYTES + bytes)?;
        let mapping = file.map(HEADER_BYTES + bytes)?;
        (Origin::Allocated(file), mapping, HEADER_BYTES)
    };
    poison(&mapping, skipped);
    add(Request { origin, mapping, skipped, bytes, device, physical })
}

fn poison(mapping: &Mapping, from: usize) {
    let bytes = (mapping.bytes() - from).min(POISON.1);
    let pointer = mapping.pointer().wrapping_add(from);
    // SAFETY: the range lies in the mapping, which nobody else knows yet.
    unsafe { pointer.write_bytes(POISON.0, bytes) };
}

/// Memory that holds the variables of a module.
pub(crate) fn allocate_variables(image: &[u8], device: usize, physical: u32) -> Done<u64> {
    let mapping = Mapping::private(image.len())?;
    // SAFETY: the mapping has room for the image, and nobody else knows it yet.
    unsafe { mapping.pointer().copy_from_nonoverlapping(image.as_ptr(), image.len()) };
    let bytes = image.len();
    add(Request { origin: Origin::Module, mapping, skipped: 0, bytes, device, physical })
}

/// Opens memory that another process exports. Opening it again on the same device gives the same
/// address.
pub(crate) fn open(
    from: FilePlace,
    bytes: usize,
    opener: usize,
    device: usize,
    physical: u32,
) -> Done<u64> {
    // Held throughout, so that two threads do not open the same memory twice.
    static OPENING: Mutex<()> = Mutex::new(());
    let _opening = lock(&OPENING);
    for region in all() {
        let Some(address) = with(region, |region| match &region.origin {
            Origin::Opened { from: known, opener: by, count }
                if *known == from && *by == opener =>
            {
                // Relaxed: changed under the lock only.
                count.fetch_add(1, Ordering::Relaxed);
                Some(region.address)
            }
            _ => None,
        }) else {
            continue;
        };
        return Ok(address);
    }
    let mapping = from.open(HEADER_BYTES + bytes)?;
    let origin = Origin::Opened { from, opener, count: AtomicU32::new(1) };
    let skipped = HEADER_BYTES;
    let address = add(Request { origin, mapping, skipped, bytes, device, physical })?;
    let is_freed = with(address, |region| {
        // Acquire: pairs with the owner's release in `remove`.
        region.freed().map(|freed| freed.load(Ordering::Acquire) != 0)
    });
    if is_freed == Some(true) {
        remove(address, Region::is_opened)?;
        return Err(Code::INVALID_HANDLE);
    }
    Ok(address)
}

/// Closes opened memory once; unmaps it when it was closed as often as it was opened.
pub(crate) fn close(address: u64) -> Done {
    let left = with(address, |region| match &region.origin {
        Origin::Opened { count, .. } if region.address == address => {
            // AcqRel: who gets to 0 unmaps what the others have used.
            Some(count.fetch_sub(1, Ordering::AcqRel) - 1)
        }
        _ => None,
    });
    match left {
        None => Err(Code::INVALID_VALUE),
        Some(0) => remove(address, Region::is_opened),
        Some(_) => Ok(()),
    }
}

/// Removes the region that begins at `address`, if `matches` says that it is of the right kind.
pub(crate) fn remove(address: u64, matches: impl Fn(&Region) -> bool) -> Done {
    let is_right = with_any(address, |region| {
        let is_right = region.address == address && matches(region);
        // AcqRel: one caller alone removes a region.
        (is_right && !region.is_removed.swap(true, Ordering::AcqRel)).then(|| {
            if let (Origin::Allocated(_), Some(freed)) = (&region.origin, region.freed()) {
                // Release: pairs with the openers' acquire.
                freed.store(1, Ordering::Release);
            }
        })
    });
    if is_right.is_none() {
        return Err(Code::INVALID_VALUE);
    }
    let slot = slot_of(address);
    lock(&LIVE).retain(|live| *live != slot);
    // SeqCst: ordered against `Running::begin`.
    let region = SLOTS[slot].swap(std::ptr::null_mut(), Ordering::SeqCst);
    bury(vec![Retired::Region(RemovedRegion(region))]);
    Ok(())
}

fn slot_of(address: u64) -> usize {
    (address >> OFFSET_BITS) as usize & (SLOTS_MAX - 1)
}

fn offset_of(address: u64) -> usize {
    (address & ((1 << OFFSET_BITS) - 1)) as usize
}

/// The addresses of all regions.
pub(crate) fn all() -> Vec<u64> {
    let address = |slot: &usize| tag::DEVICE | (*slot as u64) << OFFSET_BITS;
    lock(&LIVE).iter().map(address).collect()
}

/// Looks up the region that an address lies in, if there is memory.
pub(crate) fn with<T>(address: u64, function: impl FnOnce(&Region) -> Option<T>) -> Option<T> {
    with_any(address, |region| match &region.origin {
        Origin::Reserved(reserved) if reserved.at(offset_of(address), |_, _| ()).is_none() => None,
        _ => function(region),
    })
}

/// Looks up the region that an address lies in, be it a reserved range without memory there.
pub(crate) fn with_any<T>(address: u64, function: impl FnOnce(&Region) -> Option<T>) -> Option<T> {
    let _running = Running::begin();
    if address & tag::MASK != tag::DEVICE {
        return None;
    }
    // SeqCst: ordered against the removal.
    let region = SLOTS[slot_of(address)].load(Ordering::SeqCst);
    // SAFETY: a region that is in its slot while `Running` lives is not dropped before it ends.
    let region = unsafe { region.as_ref() }?;
    if offset_of(address) >= region.bytes {
        return None;
    }
    function(region)
}

/// Whether a range lies within one region.
pub(crate) fn contains(address: u64, bytes: usize) -> bool {
    let is_within = with(address, |region| {
        let offset = offset_of(address);
        let is_there = match &region.origin {
            Origin::Reserved(reserved) => reserved.check(offset, bytes, None).is_ok(),
            _ => true,
        };
        Some(is_there && bytes <= region.bytes - offset)
    });
    is_within == Some(true)
}

/// Where device memory lies that a kernel on a device accesses, or why it must not. Copies, which
/// go through the host if need be, say `None`. The caller has a [`Running`].
pub(crate) fn place(
    address: u64,
    bytes: usize,
    accessor: Option<(usize, &PeerMask)>,
) -> Result<*mut u8, String> {
    // SeqCst: ordered against the removal.
    let region = SLOTS[slot_of(address)].load(Ordering::Acquire);
    // SAFETY: a region that is in its slot while a `Running` lives is not dropped before it ends.
    let Some(region) = (unsafe { region.as_ref() }) else {
        return Err(format!("{address:#x} is in no allocation"));
    };
    let offset = offset_of(address);
    if offset + bytes > region.bytes {
        let size = region.bytes;
        return Err(format!("{bytes} bytes at offset {offset} of an allocation of {size} bytes"));
    }
    if let Origin::Reserved(reserved) = &region.origin {
        let checked = reserved.check(offset, bytes, accessor.map(|(device, _)| device));
        let is_multicast = reserved.at(offset, |_, piece| piece.physical.multicast.is_some());
        return match checked {
            Ok(()) if is_multicast == Some(true) => {
                Err(format!("{address:#x} is a multicast address, which is not for this"))
            }
            Ok(()) => Ok(region.pointer(offset)),
            Err(why) => Err(format!("{address:#x} {why}")),
        };
    }
    if let Some((device, peers)) = accessor
        && !region.is_accessible(device, peers)
    {
        let owner = region.device;
        return Err(format!(
            "{address:#x} is on device {owner}, without peer access from {device}"
        ));
    }
    // Acquire: pairs with the owner's release in `remove`.
    if region.freed().is_some_and(|freed| freed.load(Ordering::Acquire) != 0) {
        return Err(format!("{address:#x} was freed by its owner"));
    }
    Ok(region.pointer(offset))
}

/// Where all memories lie that a multicast address stands for, or why a kernel on a device must not
/// access it. The caller has a [`Running`].
pub(crate) fn places(address: u64, bytes: usize, device: usize) -> Result<Vec<*mut u8>, String> {
    // SeqCst: ordered against the removal.
    let region = SLOTS[slot_of(address)].load(Ordering::SeqCst);
    // SAFETY: a region that is in its slot while a `Running` lives is not dropped before it ends.
    let region = unsafe { region.as_ref() }.filter(|_| address & tag::MASK == tag::DEVICE);
    let Some(Origin::Reserved(reserved)) = region.map(|region| &region.origin) else {
        return Err(format!("{address:#x} is no multicast address"));
    };
    let offset = offset_of(address);
    let found = reserved.check(offset, bytes, Some(device)).map_err(str::to_owned).and_then(|()| {
        let places = |start, piece: &super::vmm::Piece| {
            piece.physical.multicast.as_ref().map(|multicast| multicast.places(offset - start))
        };
        let none = || Err("is no multicast address".into());
        reserved.at(offset, places).flatten().unwrap_or_else(none)
    });
    found.map_err(|why| format!("{address:#x} {why}"))
}
