//! Multicast objects: one address that stands for memory of several devices, of any processes.
//!
//! The object is a file, as an allocation is. A page behind its bytes says which devices were added
//! and what they have bound. Each device binds once, and all of the object: the driver allows more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::DEVICES_MAX;
use super::codes::{Code, Done};
use super::mapping::{FilePlace, Mapping, SharedFile};
use super::registry::lock;
use super::vmm::{self, Physical};

/// Objects and bindings are multiples of this: more than an allocation is.
pub(crate) const GRANULARITY: usize = 4 << 20;
/// Behind the bytes of an object.
pub(crate) const TABLE_BYTES: usize = 4096;

/// The words of the table; behind them, three for each device.
const ADDED: usize = 0;
const BOUND: usize = 1;
const EVER_BOUND: usize = 2;
const SLOTS: usize = 3;
const SLOT_WORDS: usize = 3;
const _: () = assert!(8 * (SLOTS + SLOT_WORDS * DEVICES_MAX as usize) <= TABLE_BYTES);

/// What makes an allocation a multicast object.
#[derive(Debug)]
pub(crate) struct Multicast {
    /// The whole file.
    mapping: Mapping,
    /// Where the table begins.
    table: usize,
    /// How many devices it is for.
    pub(crate) devices: u32,
    /// What they have bound, as it lies in this process; known at the first access.
    all: OnceLock<Result<Vec<Mapping>, String>>,
}

/// What this process has bound, and keeps.
struct Binding {
    object: Arc<Physical>,
    device: u32,
    _memory: Arc<Physical>,
}

static BINDINGS: Mutex<Vec<Binding>> = Mutex::new(Vec::new());

/// How many bindings of this process are left.
pub(crate) fn bindings() -> usize {
    lock(&BINDINGS).len()
}

impl Multicast {
    pub(crate) fn new(file: &SharedFile, bytes: usize, devices: u32) -> Done<Self> {
        let mapping = file.map(bytes + TABLE_BYTES)?;
        Ok(Self { mapping, table: bytes, devices, all: OnceLock::new() })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        let pointer = self.mapping.pointer().wrapping_add(self.table + 8 * index);
        // SAFETY: the table lies in the mapping, behind a multiple of a page, and all processes
        // access it by such words alone.
        unsafe { AtomicU64::from_ptr(pointer.cast()) }
    }

    fn is_full(&self, word: usize) -> bool {
        // Acquire: who sees a device's bit in `BOUND` sees what it has bound.
        self.word(word).load(Ordering::Acquire).count_ones() == self.devices
    }

    /// Whether a device was added.
    pub(crate) fn has(&self, physical: u32) -> bool {
        // Relaxed: a number alone; whoever added the device has told of it in another way.
        self.word(ADDED).load(Ordering::Relaxed) >> physical & 1 == 1
    }

    fn add(&self, physical: u32) -> Done {
        let with = |added: u64| {
            let is_new = added >> physical & 1 == 0 && added.count_ones() < self.devices;
            is_new.then_some(added | 1 << physical)
        };
        // Relaxed: as in `has`.
        let added = self.word(ADDED).fetch_update(Ordering::Relaxed, Ordering::Relaxed, with);
        added.map_or(Err(Code::INVALID_VALUE), |_| Ok(()))
    }

    fn bind(&self, physical: u32, place: FilePlace, bytes: usize) -> Done {
        // Relaxed: one caller alone finds the bit unset, and only it writes the slot.
        let ever = self.word(EVER_BOUND).fetch_or(1 << physical, Ordering::Relaxed);
        if ever >> physical & 1 == 1 {
            return Err(Code::NOT_SUPPORTED);
        }
        let FilePlace { process, descriptor, nonce } = place;
        let file = u64::from(process) << 32 | u64::from(descriptor.cast_unsigned());
        for (at, word) in [file, nonce, bytes as u64].into_iter().enumerate() {
            // Relaxed: the bit below makes them known.
            self.word(slot(physical) + at).store(word, Ordering::Relaxed);
        }
        // Release: pairs with `is_full`.
        self.word(BOUND).fetch_or(1 << physical, Ordering::Release);
        Ok(())
    }

    /// Maps what all devices have bound.
    fn open(&self) -> Result<Vec<Mapping>, String> {
        let of = |physical: u32| {
            // Relaxed: `is_full` has acquired what was written before the device's bit was set.
            let word = |at: usize| self.word(slot(physical) + at).load(Ordering::Relaxed);
            let (file, nonce, bytes) = (word(0), word(1), word(2) as usize);
            let (process, descriptor) = ((file >> 32) as u32, (file as u32).cast_signed());
            let file = FilePlace { process, descriptor, nonce }.open_file(bytes);
            let mapped = file.and_then(|file| Mapping::of_file(&file, bytes));
            mapped.map_err(|_| format!("the memory that device {physical} has bound is gone"))
        };
        (0..DEVICES_MAX).filter(|&physical| self.has(physical)).map(of).collect()
    }

    /// Where the memories of all devices lie, in an order that differs from access to access.
    ///
    /// # Errors
    ///
    /// That not all have bound any.
    pub(crate) fn places(&self, offset: usize) -> Result<Vec<*mut u8>, String> {
        static ACCESSES: AtomicU64 = AtomicU64::new(0);
        if !self.is_full(BOUND) {
            return Err("is a multicast address for which not all devices have memory".into());
        }
        let all = self.all.get_or_init(|| self.open()).as_ref().map_err(Clone::clone)?;
        let place = |mapping: &Mapping| mapping.pointer().wrapping_add(offset);
        let mut places: Vec<*mut u8> = all.iter().map(place).collect();
        // Relaxed: any number will do.
        let draw = ACCESSES.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let first = (draw >> 33) as usize % places.len().max(1);
        places.rotate_left(first);
        if draw >> 32 & 1 == 1 {
            places.reverse();
        }
        Ok(places)
    }
}

const fn slot(physical: u32) -> usize {
    SLOTS + SLOT_WORDS * physical as usize
}

/// Calls `function` with a multicast object.
fn with<T>(handle: u64, function: impl FnOnce(&Arc<Physical>, &Multicast) -> Done<T>) -> Done<T> {
    let object = vmm::find(handle)?;
    let multicast = object.multicast.as_ref().ok_or(Code::INVALID_VALUE)?;
    function(&object, multicast)
}

/// Adds a physical device.
pub(crate) fn add_device(handle: u64, physical: u32) -> Done {
    with(handle, |_, multicast| multicast.add(physical))
}

/// Binds an allocation: all of it to all of the object.
pub(crate) fn bind(
    handle: u64,
    (offset, memory, memory_offset): (usize, u64, usize),
    bytes: usize,
) -> Done {
    let memory = vmm::find(memory)?;
    with(handle, |object, multicast| {
        let is_whole = [offset, memory_offset, bytes].iter().all(|it| it % GRANULARITY == 0);
        let fits = |of: &Physical, from: usize| from <= of.bytes && bytes <= of.bytes - from;
        let is_memory = memory.multicast.is_none() && multicast.has(memory.physical);
        if !is_whole || bytes == 0 || !is_memory {
            return Err(Code::INVALID_VALUE);
        }
        if !fits(object, offset) || !fits(&memory, memory_offset) {
            return Err(Code::INVALID_VALUE);
        }
        // The driver blocks until they are there: whoever calls it too early hangs.
        if !multicast.is_full(ADDED) {
            return Err(Code::ILLEGAL_STATE);
        }
        if (offset, memory_offset, bytes) != (0, 0, object.bytes) {
            return Err(Code::NOT_SUPPORTED);
        }
        multicast.bind(memory.physical, memory.place(), bytes)?;
        let (object, device) = (object.clone(), memory.physical);
        lock(&BINDINGS).push(Binding { object, device, _memory: memory });
        Ok(())
    })
}

pub(crate) fn unbind(handle: u64, physical: u32, (offset, bytes): (usize, usize)) -> Done {
    with(handle, |object, multicast| {
        let mut bindings = lock(&BINDINGS);
        let is_it = |it: &Binding| Arc::ptr_eq(&it.object, object) && it.device == physical;
        let found =
            bindings.iter().position(is_it).filter(|_| (offset, bytes) == (0, object.bytes));
        let binding = bindings.swap_remove(found.ok_or(Code::INVALID_VALUE)?);
        drop(bindings);
        // Release: as in `bind`.
        multicast.word(BOUND).fetch_and(!(1 << physical), Ordering::Release);
        drop(binding);
        Ok(())
    })
}
