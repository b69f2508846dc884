//! Memory that several processes can map: anonymous files, found by the process that has them open.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::codes::{Code, Done};
use super::memory::POISON;
use super::multicast::TABLE_BYTES;

/// Mapped memory, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}

// SAFETY: `Mapping` hands out the pointer only; those who use it say what they do with it.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory of this process alone.
    pub(crate) fn private(bytes: usize) -> Done<Self> {
        Self::map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// The memory of a file.
    pub(crate) fn of_file(file: &File, bytes: usize) -> Done<Self> {
        Self::map(bytes, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(bytes: usize, flags: i32, fd: RawFd) -> Done<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_NORESERVE;
        let bytes = bytes.max(1);
        // SAFETY: the kernel chooses a range that is free; no memory in use is touched.
        let pointer = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if pointer == libc::MAP_FAILED {
            return Err(Code::OUT_OF_MEMORY);
        }
        Ok(Self { pointer: pointer.cast(), bytes })
    }

    /// Puts so many bytes of a file in place of its own, from `offset` on, or without one, memory
    /// that is new. Both are multiples of a page.
    pub(crate) fn replace(&self, offset: usize, bytes: usize, file: Option<&File>) -> Done {
        assert!(offset + bytes <= self.bytes, "within the mapping");
        let (flags, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let (at, protection) =
            (self.pointer.wrapping_add(offset), libc::PROT_READ | libc::PROT_WRITE);
        let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range lies within this mapping, whose users go through the pointer: what they
        // find there is bytes, whichever.
        let placed = unsafe { libc::mmap(at.cast(), bytes, protection, flags, fd, 0) };
        if placed == libc::MAP_FAILED { Err(Code::OUT_OF_MEMORY) } else { Ok(()) }
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and nobody uses it any more: whoever owned the
        // mapping has dropped it.
        unsafe { libc::munmap(self.pointer.cast(), self.bytes) };
    }
}

/// Where an exported file is found, as a handle says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FilePlace {
    pub process: u32,
    pub descriptor: i32,
    /// Tells the file apart from a later one with the same descriptor.
    pub nonce: u64,
}

/// A file that other processes can open as long as this one keeps it open.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: File,
    nonce: u64,
}

/// What the name of a mapped allocation's file says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About {
    pub bytes: usize,
    pub physical: u32,
    pub kinds: u32,
    /// Of a multicast object; 0 for memory.
    pub devices: u32,
}

/// In the names of files of memory that programs map themselves.
const MAPPED: &str = ".mapped-";

impl SharedFile {
    pub(crate) fn create(bytes: usize) -> Done<Self> {
        Self::named(bytes, "")
    }

    /// The file of memory that the program maps itself, or of a multicast object.
    pub(crate) fn create_mapped(about: About) -> Done<Self> {
        let About { bytes, physical, kinds, devices } = about;
        let name = format!("{MAPPED}{bytes}-{physical}-{kinds}-{devices}-");
        if devices > 0 {
            return Self::named(bytes + TABLE_BYTES, &name);
        }
        let made = Self::named(bytes, &name)?;
        let garbage = vec![POISON.0; bytes.min(POISON.1)];
        made.file.write_all_at(&garbage, 0).map_err(|_| Code::OUT_OF_MEMORY)?;
        Ok(made)
    }

    /// A file of that kind that another process has made.
    ///
    /// # Errors
    ///
    /// An invalid value, if it is none.
    pub(crate) fn imported(file: File) -> Done<(Self, About)> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = std::fs::read_link(path).map_err(|_| Code::INVALID_VALUE)?;
        let read = |name: &str| {
            let (nonce, about) = name.split_once("cuda-emulator.")?.1.split_once(MAPPED)?;
            let nonce = u64::from_str_radix(nonce, 16).ok()?;
            let mut numbers = about.split('-').map(str::parse::<u64>);
            let mut number = || numbers.next()?.ok();
            let (bytes, physical, kinds) = (number()?, number()?, number()?);
            let bytes = usize::try_from(bytes).ok()?;
            let devices = number()?.try_into().ok()?;
            let (physical, kinds) = (physical.try_into().ok()?, kinds.try_into().ok()?);
            Some((nonce, About { bytes, physical, kinds, devices }))
        };
        let (nonce, about) = read(&name.to_string_lossy()).ok_or(Code::INVALID_VALUE)?;
        Ok((Self { file, nonce }, about))
    }

    /// Whether a descriptor's name is that of such a file.
    pub(crate) fn is_mapped(name: &std::path::Path) -> bool {
        let name = name.to_string_lossy();
        name.contains("cuda-emulator.") && name.contains(MAPPED)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    fn named(bytes: usize, more: &str) -> Done<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: only the uniqueness of the number matters.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let nonce = u64::from(std::process::id()) << 32 | number;
        let name = CString::new(name(nonce) + more).map_err(|_| Code::OPERATING_SYSTEM)?;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Code::OUT_OF_MEMORY);
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes as u64).map_err(|_| Code::OUT_OF_MEMORY)?;
        Ok(Self { file, nonce })
    }

    pub(crate) fn map(&self, bytes: usize) -> Done<Mapping> {
        Mapping::of_file(&self.file, bytes)
    }

    pub(crate) fn place(&self) -> FilePlace {
        FilePlace {
            process: std::process::id(),
            descriptor: self.file.as_raw_fd(),
            nonce: self.nonce,
        }
    }
}

fn name(nonce: u64) -> String {
    format!("cuda-emulator.{nonce:016x}")
}

impl FilePlace {
    /// Opens and maps a file of another process.
    ///
    /// # Errors
    ///
    /// An invalid handle, if the process has ended or has closed the file.
    pub(crate) fn open(&self, bytes: usize) -> Done<Mapping> {
        Mapping::of_file(&self.open_file(bytes)?, bytes)
    }

    /// Opens a file of another process that has so many bytes.
    ///
    /// # Errors
    ///
    /// As [`FilePlace::open`].
    pub(crate) fn open_file(&self, bytes: usize) -> Done<File> {
        let path = format!("/proc/{}/fd/{}", self.process, self.descriptor);
        let target = std::fs::read_link(&path).map_err(|_| Code::INVALID_HANDLE)?;
        if !target.to_string_lossy().contains(&name(self.nonce)) {
            return Err(Code::INVALID_HANDLE);
        }
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|_| Code::INVALID_HANDLE)?;
        let length = file.metadata().map_err(|_| Code::INVALID_HANDLE)?.len();
        if length < bytes as u64 {
            return Err(Code::INVALID_HANDLE);
        }
        Ok(file)
    }
}
