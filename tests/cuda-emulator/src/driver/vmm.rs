//! Memory that programs map themselves: allocations, reserved ranges of addresses, and which of the
//! former are mapped where.
//!
//! A reserved range is a region as any other, whose host memory is replaced piece by piece by that
//! of the allocations' files. An operation that has looked up what is unmapped meanwhile finds
//! other memory there; later ones are refused.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use super::codes::{Code, Done};
use super::ipc::{Exported, IpcHandle, Kind};
use super::mapping::{About, FilePlace, Mapping, SharedFile};
use super::memory::{self, Origin, Region, Request};
use super::multicast::{self, Multicast};
use super::registry::lock;

/// Allocations and reserved ranges are multiples of this.
pub(crate) const GRANULARITY: usize = 2 << 20;

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR` and `CU_MEM_HANDLE_TYPE_FABRIC`.
pub(crate) const DESCRIPTOR: u32 = 1;
pub(crate) const FABRIC: u32 = 8;

/// What `cuMemCreate` has made, here or in another process.
#[derive(Debug)]
pub(crate) struct Physical {
    file: SharedFile,
    pub(crate) bytes: usize,
    /// The physical device.
    pub(crate) physical: u32,
    /// The ordinal of that device, or of one that stands for it.
    pub(crate) ordinal: usize,
    /// By what it can be exported: a mask.
    pub(crate) kinds: u32,
    is_own: bool,
    /// If it is no memory, but stands for that of several devices.
    pub(crate) multicast: Option<Multicast>,
}

impl Physical {
    /// Where other processes find its file.
    pub(crate) fn place(&self) -> FilePlace {
        self.file.place()
    }
}

static LIVE: AtomicUsize = AtomicUsize::new(0);

impl Drop for Physical {
    fn drop(&mut self) {
        // Relaxed: a number, and nothing depends on its order.
        LIVE.fetch_sub(1, Ordering::Relaxed);
        if self.is_own {
            super::uninitialized().devices[self.ordinal].refund(self.bytes);
        }
    }
}

/// A handle, and who needs it.
#[derive(Debug)]
struct Held {
    physical: Arc<Physical>,
    /// How often the program has it.
    times: usize,
    /// How often it is mapped.
    mapped: usize,
}

static HANDLES: Mutex<BTreeMap<u64, Held>> = Mutex::new(BTreeMap::new());

fn new_handle(physical: Physical) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Relaxed: only the uniqueness of the number matters.
    let handle = 0x4D << 48 | NEXT.fetch_add(1, Ordering::Relaxed) << 4;
    // Relaxed: as in `drop`.
    LIVE.fetch_add(1, Ordering::Relaxed);
    let held = Held { physical: physical.into(), times: 1, mapped: 0 };
    lock(&HANDLES).insert(handle, held);
    handle
}

/// Changes who needs a handle, and forgets it if nobody does.
fn change<T>(handle: u64, how: impl FnOnce(&mut Held) -> Done<T>) -> Done<T> {
    let mut handles = lock(&HANDLES);
    let held = handles.get_mut(&handle).ok_or(Code::INVALID_VALUE)?;
    let result = how(held);
    let gone = if held.times + held.mapped == 0 { handles.remove(&handle) } else { None };
    drop(handles);
    drop(gone);
    result
}

pub(crate) fn create(bytes: usize, ordinal: usize, physical: u32, kinds: u32) -> Done<u64> {
    if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
        return Err(Code::INVALID_VALUE);
    }
    let driver = super::uninitialized();
    driver.devices[ordinal].charge(bytes, driver.settings.memory)?;
    let file = SharedFile::create_mapped(About { bytes, physical, kinds, devices: 0 })
        .inspect_err(|_| driver.devices[ordinal].refund(bytes))?;
    let (is_own, multicast) = (true, None);
    Ok(new_handle(Physical { file, bytes, physical, ordinal, kinds, is_own, multicast }))
}

/// A multicast object for so many devices.
pub(crate) fn create_multicast(bytes: usize, devices: u32, kinds: u32) -> Done<u64> {
    if bytes == 0 || !bytes.is_multiple_of(multicast::GRANULARITY) {
        return Err(Code::INVALID_VALUE);
    }
    let about = About { bytes, physical: 0, kinds, devices };
    adopt(SharedFile::create_mapped(about)?, about)
}

pub(crate) fn release(handle: u64) -> Done {
    change(handle, |held| {
        held.times = held.times.checked_sub(1).ok_or(Code::INVALID_VALUE)?;
        Ok(())
    })
}

/// What the program's handle is of.
pub(crate) fn find(handle: u64) -> Done<Arc<Physical>> {
    change(handle, |held| match held.times {
        0 => Err(Code::INVALID_VALUE),
        _ => Ok(held.physical.clone()),
    })
}

/// A descriptor for another process, which the caller closes.
pub(crate) fn export_file(physical: &Physical) -> Done<i32> {
    let copy = physical.file.file().try_clone().map_err(|_| Code::OPERATING_SYSTEM)?;
    Ok(OwnedFd::from(copy).into_raw_fd())
}

pub(crate) fn export_fabric(physical: &Physical) -> IpcHandle {
    let (kind, place) = (Kind::Fabric, physical.file.place());
    Exported { kind, place, physical: physical.physical, bytes: physical.bytes as u64 }.encode()
}

/// The device that stands for a physical one: this process may not see it.
fn ordinal_of(physical: u32) -> usize {
    let devices = &super::uninitialized().devices;
    devices.iter().position(|device| device.physical == physical).unwrap_or(0)
}

fn import(file: File) -> Done<u64> {
    let (file, about) = SharedFile::imported(file)?;
    adopt(file, about)
}

/// A handle of what is charged to no device here.
fn adopt(file: SharedFile, about: About) -> Done<u64> {
    let About { bytes, physical, kinds, devices } = about;
    let multicast = match devices {
        0 => None,
        _ => Some(Multicast::new(&file, bytes, devices)?),
    };
    let (ordinal, is_own) = (ordinal_of(physical), false);
    Ok(new_handle(Physical { file, bytes, physical, ordinal, kinds, is_own, multicast }))
}

pub(crate) fn import_file(descriptor: i32) -> Done<u64> {
    if descriptor < 0 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the caller passes a descriptor that stays open during the call; one that is not open
    // can't be duplicated.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let copy = borrowed.try_clone_to_owned().map_err(|_| Code::INVALID_VALUE)?;
    import(copy.into())
}

pub(crate) fn import_fabric(handle: &IpcHandle) -> Done<u64> {
    let exported = Exported::decode(handle, Kind::Fabric)?;
    let place: FilePlace = exported.place;
    import(place.open_file(usize::try_from(exported.bytes).unwrap_or(usize::MAX))?)
}

/// What is mapped in a reserved range, by where it begins.
#[derive(Debug, Default)]
pub(crate) struct Reserved(RwLock<BTreeMap<usize, Piece>>);

#[derive(Debug)]
pub(crate) struct Piece {
    handle: u64,
    pub(crate) physical: Arc<Physical>,
    /// The devices that may access it, one bit for each ordinal.
    devices: u64,
}

impl Reserved {
    fn pieces(&self) -> RwLockReadGuard<'_, BTreeMap<usize, Piece>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self) -> usize {
        self.pieces().len()
    }

    /// The piece that lies at an offset.
    pub(crate) fn at<T>(&self, offset: usize, of: impl FnOnce(usize, &Piece) -> T) -> Option<T> {
        let pieces = self.pieces();
        let (start, piece) = pieces.range(..=offset).next_back()?;
        (offset < start + piece.physical.bytes).then(|| of(*start, piece))
    }

    /// Why a range can't be accessed, by a device or by none.
    pub(crate) fn check(
        &self,
        offset: usize,
        bytes: usize,
        device: Option<usize>,
    ) -> Result<(), &'static str> {
        let mut at = offset;
        loop {
            let found = self.at(at, |start, piece| {
                let may = device.is_none_or(|device| piece.devices >> device & 1 == 1);
                (start + piece.physical.bytes, may)
            });
            match found {
                None => return Err("is not mapped"),
                Some((_, false)) => return Err("may not be accessed by this device"),
                Some((end, true)) if end >= offset + bytes => return Ok(()),
                Some((end, true)) => at = end,
            }
        }
    }
}

pub(crate) fn reserve(bytes: usize, alignment: usize) -> Done<u64> {
    let is_even = bytes > 0 && bytes.is_multiple_of(GRANULARITY);
    if !is_even || !(alignment == 0 || alignment.is_power_of_two()) {
        return Err(Code::INVALID_VALUE);
    }
    if !memory::fits(bytes) {
        return Err(Code::OUT_OF_MEMORY);
    }
    let (origin, mapping) = (Origin::Reserved(Reserved::default()), Mapping::private(bytes)?);
    memory::add(Request { origin, mapping, skipped: 0, bytes, device: 0, physical: 0 })
}

/// Calls `function` with the reserved range that begins before an address, and the offset there.
fn with_reserved<T>(
    address: u64,
    bytes: usize,
    function: impl FnOnce(&Region, &Reserved, usize) -> Done<T>,
) -> Done<T> {
    memory::with_any(address, |region| {
        let Origin::Reserved(reserved) = &region.origin else { return None };
        let offset = (address - region.address) as usize;
        let fits = bytes <= region.bytes - offset;
        Some(if fits { function(region, reserved, offset) } else { Err(Code::INVALID_VALUE) })
    })
    .unwrap_or(Err(Code::INVALID_VALUE))
}

pub(crate) fn free_range(address: u64, bytes: usize) -> Done {
    with_reserved(address, bytes, |region, reserved, offset| {
        let is_whole = offset == 0 && bytes == region.bytes && reserved.count() == 0;
        if is_whole { Ok(()) } else { Err(Code::INVALID_VALUE) }
    })?;
    memory::remove(address, |region| matches!(region.origin, Origin::Reserved(_)))
}

pub(crate) fn map(address: u64, bytes: usize, handle: u64) -> Done {
    let physical = find(handle)?;
    with_reserved(address, bytes, |region, reserved, offset| {
        let mut pieces = reserved.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = pieces.range(..offset + bytes).next_back();
        let overlaps = before.is_some_and(|(start, piece)| start + piece.physical.bytes > offset);
        if overlaps || bytes != physical.bytes || !offset.is_multiple_of(GRANULARITY) {
            return Err(Code::INVALID_VALUE);
        }
        region.replace(offset, bytes, Some(physical.file.file()))?;
        change(handle, |held| {
            held.mapped += 1;
            Ok(())
        })?;
        pieces.insert(offset, Piece { handle, physical: physical.clone(), devices: 0 });
        Ok(())
    })
}

pub(crate) fn unmap(address: u64, bytes: usize) -> Done {
    let gone = with_reserved(address, bytes, |region, reserved, offset| {
        // Whole pieces, and nothing between them.
        reserved.check(offset, bytes, None).map_err(|_| Code::INVALID_VALUE)?;
        let mut pieces = reserved.0.write().unwrap_or_else(PoisonError::into_inner);
        let inner = pieces.range(offset..offset + bytes);
        let inside: HashMap<usize, usize> =
            inner.map(|(&start, piece)| (start, piece.physical.bytes)).collect();
        if inside.values().sum::<usize>() != bytes {
            return Err(Code::INVALID_VALUE);
        }
        region.replace(offset, bytes, None)?;
        Ok(inside.keys().filter_map(|start| pieces.remove(start)).collect::<Vec<_>>())
    })?;
    for piece in gone {
        drop(piece.physical);
        change(piece.handle, |held| {
            held.mapped -= 1;
            Ok(())
        })?;
    }
    Ok(())
}

/// Lets a device access what is mapped in a range, or not.
pub(crate) fn set_access(address: u64, bytes: usize, ordinal: usize, may: bool) -> Done {
    let settings = &super::uninitialized().settings;
    let accessor = super::uninitialized().devices[ordinal].physical;
    with_reserved(address, bytes, |_, reserved, offset| {
        reserved.check(offset, bytes, None).map_err(|_| Code::INVALID_VALUE)?;
        let mut pieces = reserved.0.write().unwrap_or_else(PoisonError::into_inner);
        for (_, piece) in pieces.range_mut(offset..offset + bytes) {
            let at = piece.physical.physical;
            let reaches = match &piece.physical.multicast {
                Some(multicast) => multicast.has(accessor),
                None => at == accessor || settings.are_peers(at, accessor),
            };
            if may && !reaches {
                return Err(Code::INVALID_DEVICE);
            }
            match may {
                true => piece.devices |= 1 << ordinal,
                false => piece.devices &= !(1 << ordinal),
            }
        }
        Ok(())
    })
}

/// One more handle of what is mapped at an address: the one by which it was mapped.
pub(crate) fn retain(address: u64) -> Done<u64> {
    let handle = with_reserved(address, 1, |_, reserved, offset| {
        reserved.at(offset, |_, piece| piece.handle).ok_or(Code::INVALID_VALUE)
    })?;
    change(handle, |held| {
        held.times += 1;
        Ok(handle)
    })
}

/// Handles that the program has, and descriptors that it has got and not closed.
pub(crate) fn left() -> (usize, usize) {
    let handles = lock(&HANDLES).values().filter(|held| held.times > 0).count();
    let links = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let is_one = |entry: &std::fs::DirEntry| {
        let target = std::fs::read_link(entry.path());
        target.is_ok_and(|target| SharedFile::is_mapped(&target))
    };
    let open = links.filter(is_one).count();
    // Relaxed: as in `drop`.
    (handles, open.saturating_sub(LIVE.load(Ordering::Relaxed)))
}
