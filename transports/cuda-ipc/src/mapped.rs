//! Memory that a program has mapped itself (`cuMemCreate`, `cuMemMap`), as expandable segments of
//! PyTorch and NCCL's memory are: what backs it, and how another process maps the same.
//!
//! One address range may be backed by several allocations, side by side. Others get each of them by
//! a file descriptor, or one by a fabric handle, where it was made for that.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use cudarc::driver::sys;

use crate::device::Device;
use crate::error::{CudaError, cuda};
use crate::functions::{Access, Properties};
use crate::ipc::{self, Handle};
use crate::memory::PlaceError;

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub(crate) const DESCRIPTOR: u32 = 1;
/// `CU_MEM_HANDLE_TYPE_FABRIC`, since CUDA 12.3.
const FABRIC: u32 = 8;

/// An allocation that the driver keeps as long as this lives.
pub(crate) struct Backing {
    pub(crate) device: Arc<Device>,
    pub(crate) handle: u64,
    pub(crate) bytes: usize,
}

impl Drop for Backing {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: retained, imported or created once.
        ipc::let_go(cuda!(Some(self.device.ordinal()), cuMemRelease(self.handle)));
    }
}

/// A range of addresses of this process, and the allocations that backed it when it was looked at.
/// Keeps them.
pub struct Mapped {
    base: u64,
    parts: Vec<Backing>,
}

/// How others get at mapped memory.
#[derive(Debug)]
pub enum Ways {
    /// By a descriptor of each part, with its length.
    Files(Vec<(OwnedFd, usize)>),
    /// The only part, by a handle that is valid in all processes of the fabric.
    Fabric(Handle),
    /// They don't.
    None(&'static str),
}

/// Whether a code says that something is not of a kind, or not allowed here.
fn is_refusal(error: &CudaError) -> bool {
    use sys::CUresult as Code;
    let refusals = [
        Code::CUDA_ERROR_INVALID_VALUE,
        Code::CUDA_ERROR_NOT_FOUND,
        Code::CUDA_ERROR_NOT_SUPPORTED,
        Code::CUDA_ERROR_NOT_PERMITTED,
    ];
    refusals.into_iter().any(|code| code as u32 == error.code())
}

fn unless_refused<T>(result: Result<T, CudaError>) -> Result<Option<T>, CudaError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_refusal(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Device {
    /// What backs an address, if the program has mapped it.
    fn backing(self: &Arc<Self>, address: u64, bytes: usize) -> Result<Option<Backing>, CudaError> {
        let at = std::ptr::without_provenance_mut::<c_void>(address as usize);
        let mut handle = 0;
        // SAFETY: the driver writes one handle, whatever the address is; `drop` gives it back.
        let retained =
            cuda!(Some(self.ordinal()), cuMemRetainAllocationHandle(&raw mut handle, at));
        let device = self.clone();
        Ok(unless_refused(retained)?.map(|()| Backing { device, handle, bytes }))
    }

    /// The range that is mapped at once around an address: where it begins, and its length.
    fn range(&self, address: u64) -> Result<Option<(u64, usize)>, CudaError> {
        let (mut base, mut length) = (0, 0);
        let (to, bytes) = (&raw mut base, &raw mut length);
        // SAFETY: the driver writes one address and one length.
        let found = cuda!(Some(self.ordinal()), cuMemGetAddressRange_v2(to, bytes, address));
        Ok(unless_refused(found)?.map(|()| (base, length)))
    }

    /// The allocations that back a range, which begins where one does, if the program has mapped
    /// them side by side.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn mapped(self: &Arc<Self>, base: u64, bytes: usize) -> Result<Option<Mapped>, CudaError> {
        let _entered = self.enter()?;
        let (mut parts, mut at, end) = (Vec::new(), base, base + bytes as u64);
        while at < end {
            let Some((start, length)) = self.range(at)? else { return Ok(None) };
            if start != at {
                return Ok(None);
            }
            let Some(part) = self.backing(at, length)? else { return Ok(None) };
            parts.push(part);
            at += length as u64;
        }
        Ok(Some(Mapped { base, parts }))
    }

    /// How long the memory is that is mapped side by side from `base` on, to `end` or beyond; the
    /// first `bytes` of it are known. `None` if it ends before, or is not mapped at all.
    pub(crate) fn side_by_side(
        self: &Arc<Self>,
        (base, bytes): (u64, usize),
        end: u64,
    ) -> Result<Option<usize>, PlaceError> {
        let (mut at, mut length) = (base, bytes);
        loop {
            if self.backing(at, length)?.is_none() {
                return Ok(None);
            }
            at += length as u64;
            if at >= end {
                return Ok(Some((at - base) as usize));
            }
            let Some((next, more)) = self.range(at)? else { return Ok(None) };
            if next != at {
                return Ok(None);
            }
            self.check_is_here(next)?;
            length = more;
        }
    }

    /// An allocation of another process, by its descriptor.
    ///
    /// # Errors
    /// If the driver refuses it.
    pub fn import_file(
        self: &Arc<Self>,
        file: BorrowedFd<'_>,
        bytes: usize,
    ) -> Result<Imported, CudaError> {
        let number = std::ptr::without_provenance_mut(file.as_raw_fd() as usize);
        self.import(number, DESCRIPTOR, bytes)
    }

    /// An allocation of another process, by its fabric handle.
    ///
    /// # Errors
    /// If the driver refuses it.
    pub fn import_fabric(
        self: &Arc<Self>,
        Handle(mut handle): Handle,
        bytes: usize,
    ) -> Result<Imported, CudaError> {
        self.import(handle.as_mut_ptr().cast(), FABRIC, bytes)
    }

    fn import(
        self: &Arc<Self>,
        from: *mut c_void,
        kind: u32,
        bytes: usize,
    ) -> Result<Imported, CudaError> {
        let _entered = self.enter()?;
        let mut handle = 0;
        let to = &raw mut handle;
        // SAFETY: the driver writes one handle, and reads what the kind says: a descriptor, which
        // is the pointer itself, or 64 bytes, which are there. `drop` gives the handle back.
        cuda!(Some(self.ordinal()), cuMemImportFromShareableHandle(to, from, kind))?;
        Ok(Imported(Backing { device: self.clone(), handle, bytes }))
    }

    /// Maps allocations of another process side by side, for this device.
    ///
    /// # Errors
    /// If the driver refuses; nothing is left of it then.
    pub fn open_mapped(self: &Arc<Self>, parts: &[Imported]) -> Result<Window, CudaError> {
        self.window(&parts.iter().map(|Imported(part)| part).collect::<Vec<_>>(), 0)
    }

    /// Maps allocations side by side, for this device, from a multiple of `alignment` on, or where
    /// the driver likes if it is 0.
    pub(crate) fn window(
        self: &Arc<Self>,
        parts: &[&Backing],
        alignment: usize,
    ) -> Result<Window, CudaError> {
        let (on, _entered) = (Some(self.ordinal()), self.enter()?);
        let reserved = parts.iter().map(|part| part.bytes).sum();
        let mut base = 0;
        // SAFETY: the driver writes one address; `drop` gives the range back.
        cuda!(on, cuMemAddressReserve(&raw mut base, reserved, alignment, 0, 0))?;
        ipc::count(true);
        let mut window = Window { device: self.clone(), base, reserved, parts: Vec::new() };
        let mut at = base;
        for part in parts {
            // SAFETY: the range was reserved just above, for this.
            cuda!(on, cuMemMap(at, part.bytes, 0, part.handle, 0))?;
            at += part.bytes as u64;
            window.parts.push(part.bytes);
        }
        let access = Access::of(self.raw());
        // SAFETY: all of the range is mapped, and the driver reads one description.
        cuda!(on, cuMemSetAccess(base, reserved, &raw const access, 1))?;
        Ok(window)
    }
}

impl Mapped {
    /// Where it begins.
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// How many allocations back it.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Where each part lies.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.parts.iter().scan(self.base, |at, part| {
            let start = *at;
            *at += part.bytes as u64;
            Some(start..*at)
        })
    }

    /// Whether the parts that these addresses lie in are still backed by the same allocations. As
    /// these are kept, no others can have their handles.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn is_still_there(&self, addresses: &Range<u64>) -> Result<bool, CudaError> {
        for (part, range) in self.parts.iter().zip(self.ranges()) {
            if range.end <= addresses.start || addresses.end <= range.start {
                continue;
            }
            let _entered = part.device.enter()?;
            let now = part.device.backing(range.start, part.bytes)?;
            if now.is_none_or(|now| now.handle != part.handle) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How others get at it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn ways(&self) -> Result<Ways, CudaError> {
        const NEITHER: &str = "it was created without CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR";
        let mut kinds = DESCRIPTOR | FABRIC;
        for part in &self.parts {
            let mut properties = Properties::default();
            let to = &raw mut properties;
            // SAFETY: the handle is kept, and the driver writes one such structure.
            cuda!(
                Some(part.device.ordinal()),
                cuMemGetAllocationPropertiesFromHandle(to, part.handle)
            )?;
            kinds &= properties.handle_kinds;
        }
        if kinds & DESCRIPTOR != 0 {
            let files = self.parts.iter().map(Backing::file).collect::<Result<Vec<_>, _>>()?;
            let files: Option<Vec<_>> = files.into_iter().collect();
            return Ok(files.map_or(Ways::None("the driver gives no descriptors"), Ways::Files));
        }
        match &self.parts[..] {
            _ if kinds & FABRIC == 0 => Ok(Ways::None(NEITHER)),
            [part] => {
                let mut handle = [0_u8; Handle::BYTES];
                let exported = part.export(handle.as_mut_ptr().cast(), FABRIC)?;
                Ok(exported.map_or(Ways::None("the driver gives no fabric handles"), |()| {
                    Ways::Fabric(Handle(handle))
                }))
            }
            _ => Ok(Ways::None("it is made of several allocations with fabric handles only")),
        }
    }
}

impl Backing {
    pub(crate) fn file(&self) -> Result<Option<(OwnedFd, usize)>, CudaError> {
        let mut file: RawFd = -1;
        let exported = self.export((&raw mut file).cast(), DESCRIPTOR)?;
        // SAFETY: the driver has made it, for the caller.
        Ok(exported.map(|()| (unsafe { OwnedFd::from_raw_fd(file) }, self.bytes)))
    }

    fn export(&self, to: *mut c_void, kind: u32) -> Result<Option<()>, CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the handle is kept; the driver writes what the kind says, a descriptor or 64
        // bytes, for which there is room.
        let exported = cuda!(
            Some(self.device.ordinal()),
            cuMemExportToShareableHandle(to, self.handle, kind, 0)
        );
        unless_refused(exported)
    }
}

/// An allocation of another process, not mapped yet.
#[derive(Debug)]
pub struct Imported(pub(crate) Backing);

/// Memory that is mapped here: of another process, or what several devices share. Unmapped when
/// dropped.
pub struct Window {
    device: Arc<Device>,
    base: u64,
    reserved: usize,
    /// The lengths of those that are mapped.
    parts: Vec<usize>,
}

impl Window {
    /// Where it begins in this process.
    pub const fn base(&self) -> u64 {
        self.base
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        ipc::count(false);
        let Ok(_entered) = self.device.enter() else { return };
        let (on, mut at) = (Some(self.device.ordinal()), self.base);
        for &bytes in &self.parts {
            // SAFETY: mapped once, and nobody has its address any more.
            ipc::let_go(cuda!(on, cuMemUnmap(at, bytes)));
            at += bytes as u64;
        }
        // SAFETY: reserved once, and nothing is mapped there any more.
        ipc::let_go(cuda!(on, cuMemAddressFree(self.base, self.reserved)));
    }
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of allocation {:#x}", self.bytes, self.handle)
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:#x}", self.parts, self.base)
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes mapped at {:#x}", self.reserved, self.base)
    }
}
