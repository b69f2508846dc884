//! Registered memory: this rank's part of the shared memory, allocated in blocks.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::Advice;
use unisum_link::Region;

use crate::ShmError;
use crate::free_list::FreeList;
use crate::layout::HEAP_ALIGN;
use crate::mapping::Mapping;

/// This rank's heap. Clones are handles to the same heap.
#[derive(Clone, Debug)]
pub struct Heap(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mapping: Arc<Mapping>,
    /// Where the heap starts in the mapping.
    start: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: FreeList,
    /// After an abort: the pages (in the heap) that peers may still write, now private ones, one
    /// range for each link that aborted.
    aborted: Option<Vec<Range<u64>>>,
}

/// A page-aligned piece of a [`Heap`], initially zero, that every rank of the host can access.
/// Dropping it returns the memory to the system. It stays valid after the link is gone.
///
/// The peers of the rank can read and write it at any time; in an honest job they do so only
/// during collectives on it.
#[derive(Debug)]
pub struct Block {
    heap: Heap,
    range: Range<u64>,
    bytes: usize,
}

impl Heap {
    pub(crate) fn new(mapping: Arc<Mapping>, local_index: u64) -> Self {
        let (start, bytes) = (mapping.layout().heap(local_index), mapping.layout().heap_bytes());
        let state = Mutex::new(State { free: FreeList::new(bytes), aborted: None });
        Self(Arc::new(Inner { mapping, start, state }))
    }

    /// Allocates a block of at least `bytes` bytes.
    ///
    /// The pages are allocated and mapped immediately, at about a millisecond per MiB. The first
    /// access would cost as much otherwise, and this is the only way to get an error if memory is
    /// short.
    ///
    /// # Errors
    /// If the heap or the system does not have that much memory left, or after an abort.
    pub fn allocate(&self, bytes: usize) -> Result<Block, ShmError> {
        let heap_bytes = self.0.mapping.layout().heap_bytes();
        let full = ShmError::Full { bytes, heap_bytes };
        let Some(pages) = (bytes.max(1) as u64).checked_next_multiple_of(PAGE) else {
            return Err(full);
        };
        let huge = pages >= 2 * HEAP_ALIGN;
        let range = {
            let mut state = self.lock();
            if state.aborted.is_some() {
                return Err(ShmError::Aborted);
            }
            state.free.take(pages, if huge { HEAP_ALIGN } else { PAGE }).ok_or(full)?
        };
        // From here on, dropping the block cleans up.
        let block = Block { heap: self.clone(), range, bytes };
        let range = self.mapped(&(block.range.start..block.range.start + bytes.max(1) as u64));
        if huge {
            // Only a hint: many systems have no huge pages for shared memory.
            let _ = self.0.mapping.advise(self.mapped(&block.range), Advice::LinuxHugepage);
        }
        self.0.mapping.reserve(range).map_err(ShmError::os("allocating registered memory"))?;
        // Saves this process a fault per page. Not all of the last page may have been reserved,
        // and kernels before 5.14 don't know the advice: then the first touch maps the page.
        let whole = block.range.start..block.range.start + bytes as u64 / PAGE * PAGE;
        if !whole.is_empty() {
            let _ = self.0.mapping.advise(self.mapped(&whole), Advice::LinuxPopulateWrite);
        }
        Ok(block)
    }

    /// The addresses of the heap in this process.
    pub(crate) fn range(&self) -> Range<usize> {
        let bytes = self.0.mapping.layout().heap_bytes();
        let start = self.0.mapping.pointer(self.0.start, bytes) as usize;
        start..start + bytes as usize
    }

    /// The offset of `bytes` bytes at `address` in this heap, if they lie in it, as [`Region::new`]
    /// takes it.
    #[inline]
    pub fn offset_of(&self, address: *const u8, bytes: usize) -> Option<u64> {
        let offset = self.0.mapping.offset_of(address, bytes)?.checked_sub(self.0.start)?;
        (offset + bytes as u64 <= self.0.mapping.layout().heap_bytes()).then_some(offset)
    }

    /// Ends sharing for good: the pages of `region`, which peers may still write, become private
    /// ones, and its content is lost. Idempotent.
    pub(crate) fn abort(&self, region: Option<Region>) {
        let mut state = self.lock();
        let lost = region.and_then(|region| {
            let from = region.heap_offset()?;
            Some(from..from + region.bytes() as u64).filter(|lost| !lost.is_empty())
        });
        let pages = lost.map_or(0..0, |lost| {
            let pages = lost.start / PAGE * PAGE..lost.end.next_multiple_of(PAGE);
            let detached = self.0.mapping.detach(self.mapped(&pages), self.mapped(&lost));
            if let Err(error) = detached {
                unisum_link::fault!(
                    %error, "an aborted buffer could not be detached from its peers"
                );
            }
            pages
        });
        state.aborted.get_or_insert_default().push(pages);
    }

    /// A range of the heap in the mapping.
    fn mapped(&self, range: &Range<u64>) -> Range<u64> {
        self.0.start + range.start..self.0.start + range.end
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// Where the block starts.
    #[inline]
    pub fn address(&self) -> NonNull<u8> {
        let at = self.heap.mapped(&self.range);
        let address = self.heap.0.mapping.pointer(at.start, self.bytes as u64);
        NonNull::new(address).expect("nothing is mapped at address 0")
    }

    /// Its place in the heap.
    pub fn offset(&self) -> u64 {
        self.range.start
    }

    /// The requested size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Heap(inner) = &self.heap;
        if !inner.mapping.is_mapped_here() {
            return;
        }
        let mut state = self.heap.lock();
        let range = self.heap.mapped(&self.range);
        let shared = state
            .aborted
            .as_ref()
            .is_none_or(|all| all.iter().all(|pages| is_apart(pages, &self.range)));
        let freed = if shared {
            inner.mapping.punch(range)
        } else {
            // A peer may still be reading what it believes to be part of its collective: the
            // shared pages stay as they are until the last process unmaps them.
            inner.mapping.advise(range, Advice::LinuxDontNeed)
        };
        if let Err(error) = freed {
            unisum_link::warning!(%error, "registered memory could not be returned to the system");
        }
        state.free.give(self.range.clone());
    }
}

fn is_apart(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start
}

/// What blocks are rounded to: the largest page any Linux kernel uses.
const PAGE: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::layout::Layout;
    use crate::mapping::create;

    fn heap(bytes: u64) -> Heap {
        let layout = Layout::new(2, bytes).unwrap();
        let mapping = Mapping::new(create(layout).unwrap(), layout).unwrap();
        Heap::new(Arc::new(mapping), 1)
    }

    /// Bytes of memory that the shared memory really takes.
    fn resident(heap: &Heap) -> u64 {
        let memory = rustix::fs::fstat(heap.0.mapping.memory()).unwrap();
        memory.st_blocks as u64 * 512
    }

    fn region(block: &Block) -> Region {
        // SAFETY: the block is that long, and these tests use it from one thread.
        unsafe { Region::new(block.address(), block.bytes(), Some(block.offset())) }
    }

    fn write(block: &Block, value: u8) {
        // SAFETY: the block is that long.
        unsafe { block.address().as_ptr().write_bytes(value, block.bytes()) };
    }

    fn first(address: *const u8) -> u8 {
        // SAFETY: the caller has a block there.
        unsafe { address.read_volatile() }
    }

    #[test]
    fn blocks_are_zeroed_allocated_at_once_and_returned_to_the_system() {
        let heap = heap(64 << 20);
        let before = resident(&heap);
        for _ in 0..3 {
            let block = heap.allocate(5 << 20).unwrap();
            assert!(resident(&heap) >= before + (5 << 20));
            assert_eq!(first(block.address().as_ptr()), 0, "a used block came back unclean");
            write(&block, 7);
            assert_eq!(heap.offset_of(block.address().as_ptr(), 5 << 20), Some(block.offset()));
            drop(block);
            assert_eq!(resident(&heap), before);
        }
    }

    #[test]
    fn a_full_heap_is_an_error() {
        let heap = heap(4 << 20);
        let most = heap.allocate(3 << 20).unwrap();
        assert!(matches!(heap.allocate(2 << 20), Err(ShmError::Full { .. })));
        assert!(matches!(heap.allocate(usize::MAX), Err(ShmError::Full { .. })));
        drop(most);
        assert!(heap.allocate(4 << 20).is_ok());
    }

    #[test]
    fn foreign_addresses_have_no_offset() {
        let heap = heap(4 << 20);
        let block = heap.allocate(4 << 20).unwrap();
        let start = block.address().as_ptr().cast_const();
        assert_eq!(heap.offset_of(start.wrapping_sub(1), 1), None);
        assert_eq!(heap.offset_of(start.wrapping_add(1), 4 << 20), None);
        assert_eq!(heap.offset_of(&0u8, 1), None);
    }

    #[test]
    fn late_stores_of_peers_do_not_show_in_an_aborted_block() {
        let heap = heap(64 << 20);
        let (used, other) = (heap.allocate(100_000).unwrap(), heap.allocate(100_000).unwrap());
        // A peer's view: the same memory mapped once more.
        let memory = heap.0.mapping.memory().as_fd().try_clone_to_owned().unwrap();
        let peer = Mapping::new(memory, *heap.0.mapping.layout()).unwrap();
        let view = |block: &Block| peer.pointer(heap.0.start + block.offset(), 1);
        write(&used, 1);
        write(&other, 2);
        // SAFETY: half of the block, used from one thread.
        let half = unsafe { Region::new(used.address(), 50_000, Some(used.offset())) };
        heap.abort(Some(half));
        heap.abort(Some(region(&other)));
        // SAFETY: inside the peer's mapping.
        unsafe { view(&used).write_volatile(9) };
        assert_ne!(first(used.address().as_ptr()), 9);
        // What shares a page with the lost buffer is still there.
        assert_eq!(first(used.address().as_ptr().wrapping_add(50_000)), 1);
        write(&used, 3);
        assert_eq!(first(view(&used)), 9, "nor do ours in theirs");
        assert_eq!(first(view(&other)), 2, "memory that was not in use stays shared");
        assert!(matches!(heap.allocate(1), Err(ShmError::Aborted)));
        drop(used);
        assert_eq!(first(view(&other)), 2);
    }

    #[test]
    fn blocks_outlive_their_heap() {
        let block = heap(4 << 20).allocate(1000).unwrap();
        write(&block, 4);
        assert_eq!(first(block.address().as_ptr()), 4);
    }
}
