//! Events, within a process and between processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::codes::{Code, Done};
use super::device::Device;
use super::mapping::{FilePlace, Mapping, SharedFile};

/// So many records of an event are told apart.
const RECENT: usize = 32;

/// What all processes that know an event share.
#[repr(C)]
#[derive(Debug, Default)]
struct State {
    /// How often it was recorded.
    recorded: AtomicU64,
    /// By the record's number modulo their number, the last record whose operation has run: an
    /// event that is recorded again, in another stream, may be there before it was in the first.
    completed: [AtomicU64; RECENT],
    /// When that was, in nanoseconds.
    time: AtomicU64,
}

#[derive(Debug)]
enum Storage {
    Private(Box<State>),
    Exported(SharedFile, Mapping),
    Opened(Mapping),
}

/// An event.
#[derive(Debug)]
pub(crate) struct Event {
    pub flags: u32,
    pub device: &'static Device,
    storage: Storage,
}

pub(crate) mod flags {
    pub(crate) const DISABLE_TIMING: u32 = 2;
    pub(crate) const INTERPROCESS: u32 = 4;
    pub(crate) const ALL: u32 = 7;
}

/// Bytes of the file of an exported event.
const BYTES: usize = 4096;

impl Event {
    pub(crate) fn create(flags: u32, device: &'static Device) -> Done<Self> {
        let is_timed = flags & flags::DISABLE_TIMING == 0;
        if flags & !flags::ALL != 0 || flags & flags::INTERPROCESS != 0 && is_timed {
            return Err(Code::INVALID_VALUE);
        }
        let storage = if flags & flags::INTERPROCESS == 0 {
            Storage::Private(Box::default())
        } else {
            let file = SharedFile::create(BYTES)?;
            let mapping = file.map(BYTES)?;
            Storage::Exported(file, mapping)
        };
        Ok(Self { flags, device, storage })
    }

    pub(crate) fn open(place: FilePlace, device: &'static Device) -> Done<Self> {
        let storage = Storage::Opened(place.open(BYTES)?);
        Ok(Self { flags: flags::DISABLE_TIMING | flags::INTERPROCESS, device, storage })
    }

    /// Where other processes find it.
    pub(crate) fn export(&self) -> Done<FilePlace> {
        match &self.storage {
            Storage::Exported(file, _) => Ok(file.place()),
            _ => Err(Code::INVALID_HANDLE),
        }
    }

    fn state(&self) -> &State {
        match &self.storage {
            Storage::Private(state) => state,
            Storage::Exported(_, mapping) | Storage::Opened(mapping) => {
                // SAFETY: the mapping is a page that all processes use as a `State` of atomics, for
                // which zeros are valid; it lives as long as `self`.
                unsafe { &*mapping.pointer().cast::<State>() }
            }
        }
    }

    /// Numbers a record, whose operation has to be enqueued.
    pub(crate) fn record(&self) -> u64 {
        // AcqRel: whoever waits for the record sees its number.
        self.state().recorded.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The record that a wait that is enqueued now waits for.
    pub(crate) fn last_record(&self) -> u64 {
        // Acquire: pairs with `record`.
        self.state().recorded.load(Ordering::Acquire)
    }

    pub(crate) fn complete(&self, record: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let state = self.state();
        // Relaxed: made visible by the release below.
        state.time.store(u64::try_from(now).unwrap_or(0), Ordering::Relaxed);
        // AcqRel: pairs with the acquire of whoever waits; what ran before is seen.
        state.completed[place(record)].fetch_max(record, Ordering::AcqRel);
    }

    pub(crate) fn is_complete(&self, record: u64) -> bool {
        // Acquire: pairs with `complete`.
        self.state().completed[place(record)].load(Ordering::Acquire) >= record
    }

    /// When it was last completed, in nanoseconds.
    pub(crate) fn time(&self) -> Done<u64> {
        if self.flags & flags::DISABLE_TIMING != 0 || self.last_record() == 0 {
            return Err(Code::INVALID_HANDLE);
        }
        if !self.is_complete(self.last_record()) {
            return Err(Code::NOT_READY);
        }
        // Relaxed: ordered by the acquire of `is_complete`.
        Ok(self.state().time.load(Ordering::Relaxed))
    }
}

const fn place(record: u64) -> usize {
    record as usize % RECENT
}

/// The event of a handle.
pub(crate) fn find(handle: u64) -> Done<Arc<Event>> {
    super::driver()?.events.find(handle)
}
