//! Where a collective's memory comes from, and whether the links reach it without copies.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::ptr::NonNull;

use unisum_link::Region;

/// Memory that a buffer owns.
pub(crate) struct Memory {
    // First, so that RDMA devices let the memory go before it is freed.
    #[cfg(feature = "verbs")]
    _adopted: Option<unisum_verbs::Adopted>,
    kind: Kind,
}

enum Kind {
    /// Of this process alone.
    Private { start: NonNull<u8>, layout: Layout },
    /// Part of the heap that the node's ranks map.
    #[cfg(feature = "shm")]
    Shared(unisum_shm::Block),
}

/// Allocates memory and recognises it again by its address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arena {
    #[cfg(feature = "shm")]
    heap: Option<unisum_shm::Heap>,
    #[cfg(feature = "verbs")]
    registry: Option<std::sync::Arc<unisum_verbs::Registry>>,
}

impl Arena {
    /// An arena in the node's shared memory.
    #[cfg(feature = "shm")]
    pub(crate) const fn shared(heap: unisum_shm::Heap) -> Self {
        Self {
            heap: Some(heap),
            #[cfg(feature = "verbs")]
            registry: None,
        }
    }

    /// From here on, what is allocated is registered with RDMA devices.
    #[cfg(feature = "verbs")]
    pub(crate) fn register_with(&mut self, registry: std::sync::Arc<unisum_verbs::Registry>) {
        self.registry = Some(registry);
    }

    /// Where RDMA devices know it, if there are any.
    #[cfg(feature = "verbs")]
    pub(crate) const fn registry(&self) -> Option<&std::sync::Arc<unisum_verbs::Registry>> {
        self.registry.as_ref()
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
        #[cfg(not(feature = "verbs"))]
        let _ = bytes;
        Memory {
            #[cfg(feature = "verbs")]
            // SAFETY: the registration is dropped before the memory.
            _adopted: unsafe { self.adopt(kind.start(), bytes.max(1)) },
            kind,
        }
    }

    /// Registers memory, if there are devices to register it with.
    ///
    /// # Safety
    /// The memory stays mapped, with the same pages, until the returned value is dropped.
    #[cfg(feature = "verbs")]
    pub(crate) unsafe fn adopt(
        &self,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Option<unisum_verbs::Adopted> {
        let registry = self.registry.as_ref().filter(|_| bytes > 0)?;
        // SAFETY: the caller promised it.
        let adopted = unsafe { registry.adopt(start, bytes) };
        adopted
            .inspect_err(|error| crate::warning::warning!("a buffer is not registered: {error}"))
            .ok()
    }

    fn allocate_kind(&self, bytes: usize) -> Result<Kind, String> {
        #[cfg(feature = "shm")]
        if let Some(heap) = &self.heap {
            return heap.allocate(bytes).map(Kind::Shared).map_err(|error| error.to_string());
        }
        Kind::private(bytes)
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
        #[cfg(feature = "shm")]
        let offset = self.heap.as_ref().and_then(|heap| heap.offset_of(base.as_ptr(), bytes));
        #[cfg(not(feature = "shm"))]
        let offset = None;
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
            #[cfg(feature = "shm")]
            Self::Shared(block) => block.address(),
        }
    }
}

impl Drop for Kind {
    fn drop(&mut self) {
        match self {
            // SAFETY: allocated in `Arena::allocate` with this layout, and nobody refers to it
            // any more.
            Self::Private { start, layout } => unsafe { dealloc(start.as_ptr(), *layout) },
            #[cfg(feature = "shm")]
            Self::Shared(_) => {}
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Memory").field(&self.start()).finish()
    }
}
