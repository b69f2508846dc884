//! The shared memory as this process maps it.
//!
//! Other processes write it at any time, so nobody gets a reference to plain data in it: words are
//! atomics, everything else is raw pointers.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap,
};
use rustix::process::{Pid, getpid};
use unisum_link::fork::ParentOnly;

use crate::ShmError;
use crate::layout::{GroupCard, Layout, Slot};

/// The mapping; unmapped when dropped by the process that made it.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    /// Of all of it.
    bytes: u64,
    layout: Layout,
    memory: ParentOnly<OwnedFd>,
    owner: Pid,
}

// SAFETY: the mapping is plain address space; all access goes through atomics and raw pointers,
// whose users answer for what they do.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Creates the memory of a host: sparse, sealed against a change of size (so that no access can
/// fault), with its dense part allocated.
pub(crate) fn create(layout: Layout) -> Result<OwnedFd, ShmError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("unisum", flags).map_err(ShmError::os("creating shared memory"))?;
    ftruncate(&memory, layout.bytes()).map_err(ShmError::os("sizing shared memory"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&memory, seals).map_err(ShmError::os("sealing shared memory"))?;
    fallocate(&memory, FallocateFlags::KEEP_SIZE, 0, layout.dense_bytes())
        .map_err(ShmError::os("allocating shared memory"))?;
    Ok(memory)
}

impl Mapping {
    /// Maps `memory`, which must have the layout's size and be sealed.
    pub(crate) fn new(memory: OwnedFd, layout: Layout) -> Result<Self, ShmError> {
        let sealed = fcntl_get_seals(&memory).map_err(ShmError::os("reading seals"))?;
        let size = fstat(&memory).map_err(ShmError::os("reading the size"))?.st_size;
        if !sealed.contains(SealFlags::SHRINK) || u64::try_from(size) != Ok(layout.bytes()) {
            let wrong = io::Error::other("it is not sealed, or not of the size agreed on");
            return Err(ShmError::Os { context: "checking the shared memory", source: wrong });
        }
        let bytes = usize::try_from(layout.bytes()).map_err(|_| {
            ShmError::os("mapping shared memory")(io::Error::from(io::ErrorKind::OutOfMemory))
        })?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice harms nobody.
        let base = unsafe {
            mmap(std::ptr::null_mut(), bytes, access, flags | MapFlags::NORESERVE, &memory, 0)
        }
        .map_err(ShmError::os("mapping shared memory"))?;
        let base = NonNull::new(base.cast()).expect("the kernel maps nothing at address 0");
        let (bytes, memory, owner) = (layout.bytes(), ParentOnly::new(memory), getpid());
        let mapping = Self { base, bytes, layout, memory, owner };
        // A child of fork must not keep the memory alive, and a core dump not fill the disk.
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            mapping.advise(0..bytes, advice).map_err(ShmError::os("advising"))?;
        }
        Ok(mapping)
    }

    /// Where everything lies.
    pub(crate) const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory itself, to hand to others.
    pub(crate) fn memory(&self) -> impl AsFd {
        &*self.memory
    }

    /// Whether this process made the mapping, and is not a forked child without it.
    pub(crate) fn is_mapped_here(&self) -> bool {
        getpid() == self.owner
    }

    /// The 4-byte word at `offset`.
    pub(crate) fn word(&self, offset: u64) -> &AtomicU32 {
        let word = self.pointer(offset, 4).cast();
        // SAFETY: inside the mapping (checked), aligned (all offsets of the layout are), valid
        // while `self` is, and accessed as an atomic by all processes.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// The 8-byte word at `offset`.
    pub(crate) fn wide(&self, offset: u64) -> &AtomicU64 {
        let word = self.pointer(offset, 8).cast();
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// The card at the start of a slot.
    #[inline]
    pub(crate) fn card(&self, slot: Slot) -> &GroupCard {
        let card = self.pointer(slot.card(), size_of::<GroupCard>() as u64).cast();
        // SAFETY: inside the mapping (checked), aligned to lines as all slots are, valid while
        // `self` is, and all that is accessed through the reference is atomics.
        unsafe { &*card }
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// # Panics
    /// If they are not inside the mapping: what peers write is checked before, so that would be
    /// our bug.
    #[inline]
    pub(crate) fn pointer(&self, offset: u64, bytes: u64) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{offset} + {bytes}");
        // SAFETY: just checked to be inside; the whole mapping fits the address space.
        unsafe { self.base.as_ptr().add(offset as usize) }
    }

    /// Where `address` lies in the mapping, if `bytes` bytes from there do.
    #[inline]
    pub(crate) fn offset_of(&self, address: *const u8, bytes: usize) -> Option<u64> {
        let offset = (address as usize).checked_sub(self.base.as_ptr() as usize)? as u64;
        (offset.checked_add(bytes as u64)? <= self.bytes).then_some(offset)
    }

    /// Allocates the pages of a range now, so that memory that isn't there is an error here and
    /// not a SIGBUS at the first touch.
    pub(crate) fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        let bytes = range.end - range.start;
        loop {
            match fallocate(&*self.memory, FallocateFlags::KEEP_SIZE, range.start, bytes) {
                Err(Errno::INTR) => {}
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Gives the pages of a range back to the system, on behalf of all processes.
    pub(crate) fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&*self.memory, flags, range.start, range.end - range.start)?)
    }

    /// Advises the kernel on whole pages.
    pub(crate) fn advise(&self, range: Range<u64>, advice: Advice) -> io::Result<()> {
        let bytes = range.end - range.start;
        let at = self.pointer(range.start, bytes).cast();
        // SAFETY: the range is inside the mapping; none of the advice given changes its content
        // while somebody uses it.
        Ok(unsafe { madvise(at, bytes as usize, advice) }?)
    }

    /// Replaces whole pages by private ones at the same address: what other processes do to the
    /// range from now on doesn't show here, and the other way round. What the pages hold beside
    /// `lost` is kept; the bytes of `lost` become unspecified, so that a large buffer costs no
    /// copy.
    pub(crate) fn detach(&self, range: Range<u64>, lost: Range<u64>) -> io::Result<()> {
        let bytes = (range.end - range.start) as usize;
        let shared = self.pointer(range.start, bytes as u64);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice harms nobody.
        let copy =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }?;
        for kept in [range.start..lost.start, lost.end..range.end] {
            let target = copy.cast::<u8>().wrapping_add((kept.start - range.start) as usize);
            let length = kept.end - kept.start;
            let source = self.pointer(kept.start, length);
            // SAFETY: both are mapped and `length` bytes long (`lost` lies in `range`), and a new
            // mapping overlaps nothing. No peer writes beside the buffer that is lost.
            unsafe { std::ptr::copy_nonoverlapping(source, target, length as usize) };
        }
        // SAFETY: `copy` is ours and moves as a whole; the target is part of our mapping, stays
        // mapped throughout, and the caller is the only one in this process who uses it.
        let moved =
            unsafe { mremap_fixed(copy, bytes, bytes, MremapFlags::MAYMOVE, shared.cast()) };
        if let Err(error) = moved {
            // SAFETY: the copy did not move, and nobody else knows of it.
            unsafe { munmap(copy, bytes) }?;
            return Err(error.into());
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a forked child something else may have been mapped where the memory was.
        if self.is_mapped_here() {
            let bytes = self.layout.bytes() as usize;
            // SAFETY: the mapping is ours and every borrower holds the `Arc` around `self`.
            let unmapped = unsafe { munmap(self.base.as_ptr().cast(), bytes) };
            debug_assert!(unmapped.is_ok(), "unmapping what was mapped: {unmapped:?}");
        }
    }
}
