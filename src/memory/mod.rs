//! Where a collective's memory comes from, and whether the links reach it without copies.

pub(crate) mod buffer;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum_link::{Allocation, Connected, Heap, Region, Registrar, Registration};

/// So many zeros, in a vector that is as long as a program's data: without memory for it the
/// process goes on.
///
/// # Errors
/// If there is none.
pub(crate) fn zeroed(count: usize) -> Result<Vec<f32>, TryReserveError> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(count)?;
    zeros.resize(count, 0.0);
    Ok(zeros)
}

/// Memory that a buffer owns.
pub(crate) struct Memory {
    // First, so that devices let the memory go before it is freed.
    _registration: Option<Registration>,
    kind: Kind,
}

enum Kind {
    /// Of this process alone.
    Private { start: NonNull<u8>, layout: Layout },
    /// Part of the heap that the node's ranks map.
    Shared(Allocation),
}

/// Allocates memory and recognises it again by its address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arena {
    heap: Option<Arc<dyn Heap>>,
    /// Where the heap lies; empty without one.
    addresses: Range<usize>,
    registrar: Option<Arc<dyn Registrar>>,
}

impl Arena {
    /// From here on, memory is allocated and registered as the link that was made wants it.
    pub(crate) fn learn(&mut self, connected: &Connected) {
        if let Some(heap) = &connected.heap {
            (self.heap, self.addresses) = (Some(heap.clone()), heap.addresses());
        }
        if let Some(registrar) = &connected.registrar {
            self.registrar = Some(registrar.clone());
        }
    }

    /// `bytes` zeroed bytes, aligned to pages.
    ///
    /// # Errors
    /// The system's reason.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Memory, String> {
        self.allocate_kind(bytes.max(1)).map(|kind| self.memory(kind, bytes))
    }

    /// The same where the node's ranks have no memory left to share: then in memory of this process
    /// alone, which peers reach by copies.
    ///
    /// # Errors
    /// The system's reason.
    pub(crate) fn allocate_anywhere(&self, bytes: usize) -> Result<Memory, String> {
        let kind = self.allocate_kind(bytes.max(1)).or_else(|_| Kind::private(bytes.max(1)));
        kind.map(|kind| self.memory(kind, bytes))
    }

    fn memory(&self, kind: Kind, bytes: usize) -> Memory {
        // SAFETY: the registration is dropped before the memory.
        let _registration = unsafe { self.register(kind.start(), bytes.max(1)) };
        Memory { _registration, kind }
    }

    /// Registers memory, if there are devices to register it with.
    ///
    /// # Safety
    /// The memory stays mapped, with the same pages, until the returned value is dropped.
    pub(crate) unsafe fn register(&self, start: NonNull<u8>, bytes: usize) -> Option<Registration> {
        let registrar = self.registrar.as_ref().filter(|_| bytes > 0)?;
        // SAFETY: the caller promised it.
        let registered = unsafe { registrar.clone().register(start, bytes) };
        registered
            .inspect_err(|error| unisum_link::warning!("a buffer is not registered: {error}"))
            .ok()
    }

    fn allocate_kind(&self, bytes: usize) -> Result<Kind, String> {
        match &self.heap {
            Some(heap) => heap.allocate(bytes).map(Kind::Shared),
            None => Kind::private(bytes),
        }
    }

    /// The region of a slice.
    ///
    /// # Safety
    /// As [`Region::new`]: `data` is the engine's alone until the collective has ended.
    pub(crate) unsafe fn region<T>(&self, data: &mut [T]) -> Region {
        let bytes = size_of_val(data);
        // SAFETY: the caller promised it.
        unsafe { self.region_at(NonNull::from(data).cast(), bytes) }
    }

    /// The region of a slice that nobody writes.
    ///
    /// # Safety
    /// As [`Region::new`], but that the memory may be read by others, and is not written.
    pub(crate) unsafe fn region_to_read<T>(&self, data: &[T]) -> Region {
        let bytes = size_of_val(data);
        // SAFETY: the caller promised it.
        unsafe { self.region_at(NonNull::from(data).cast(), bytes) }
    }

    /// The region of `bytes` bytes at `base`.
    ///
    /// # Safety
    /// As [`Region::new`].
    pub(crate) unsafe fn region_at(&self, base: NonNull<u8>, bytes: usize) -> Region {
        let Range { start, end } = self.addresses;
        let (from, room) = (base.as_ptr() as usize, end - start);
        let offset = from.wrapping_sub(start);
        // Without a heap there is no room, and nothing lies at address 0.
        let is_there = offset <= room && bytes <= room - offset;
        let offset = is_there.then_some(offset as u64);
        // SAFETY: the caller promised it.
        unsafe { Region::new(base, bytes, offset) }
    }
}

// SAFETY: the memory is owned: no other owner exists, in any thread.
unsafe impl Send for Memory {}
// SAFETY: shared access gives out only the address.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.kind.start()
    }
}

impl Kind {
    fn private(bytes: usize) -> Result<Self, String> {
        // Whole pages: nothing else shares what devices may be given.
        let bytes = bytes.checked_next_multiple_of(4096).ok_or("out of memory")?;
        let layout = Layout::from_size_align(bytes, 4096).map_err(|error| error.to_string())?;
        // SAFETY: the layout's size is at least 1: no caller asks for 0 bytes.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).ok_or("out of memory")?;
        Ok(Self::Private { start, layout })
    }

    fn start(&self) -> NonNull<u8> {
        match self {
            Self::Private { start, .. } => *start,
            Self::Shared(allocation) => allocation.start,
        }
    }
}

impl Drop for Kind {
    fn drop(&mut self) {
        match self {
            // SAFETY: allocated in `Arena::allocate` with this layout, and nobody refers to it
            // any more.
            Self::Private { start, layout } => unsafe { dealloc(start.as_ptr(), *layout) },
            Self::Shared(_) => {}
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Memory").field(&self.start()).finish()
    }
}
