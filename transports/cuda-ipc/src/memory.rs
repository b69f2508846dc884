//! Memory of a device, pinned memory of the host, and what is known of memory of others.

use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys;

use crate::device::Device;
use crate::error::{CudaError, cuda};

/// What this process has allocated through this crate and not freed: allocations on devices, and
/// of pinned memory.
pub fn allocations() -> (usize, usize) {
    // Relaxed: numbers for people and tests.
    (ALLOCATED.load(Ordering::Relaxed), PINNED.load(Ordering::Relaxed))
}

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PINNED: AtomicUsize = AtomicUsize::new(0);

/// Memory of a device that other processes can open (`cuMemAlloc`). Freed when dropped.
pub struct Allocation {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Allocation {
    /// Allocates `bytes` bytes (at least one), all zero.
    ///
    /// # Errors
    /// If the device has no more.
    pub fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let on = Some(device.ordinal());
        let _entered = device.enter()?;
        let mut address = 0;
        // SAFETY: the driver writes one address.
        cuda!(on, cuMemAlloc_v2(&raw mut address, bytes))?;
        // Relaxed: see `allocations`.
        ALLOCATED.fetch_add(1, Ordering::Relaxed);
        let allocation = Self { device: device.clone(), address, bytes };
        // SAFETY: so many bytes are there.
        cuda!(on, cuMemsetD8_v2(address, 0, bytes))?;
        Ok(allocation)
    }

    /// Where it is, in the device's address space of this process.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that it is on.
    pub const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Copies to it, from `offset` on. Blocks until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the bytes don't fit.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), CudaError> {
        self.assert_within(offset, from.len());
        let _entered = self.device.enter()?;
        let (to, bytes) = (self.address + offset as u64, from.len());
        // SAFETY: both sides have so many bytes, and the call returns when they are copied.
        cuda!(Some(self.device.ordinal()), cuMemcpyHtoD_v2(to, from.as_ptr().cast(), bytes))
    }

    /// Copies from it, from `offset` on. Blocks until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If there are fewer bytes.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), CudaError> {
        self.assert_within(offset, to.len());
        let _entered = self.device.enter()?;
        let (from, bytes) = (self.address + offset as u64, to.len());
        // SAFETY: both sides have so many bytes, and the call returns when they are copied.
        cuda!(Some(self.device.ordinal()), cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from, bytes))
    }

    fn assert_within(&self, offset: usize, bytes: usize) {
        let fits = offset <= self.bytes && bytes <= self.bytes - offset;
        assert!(fits, "{bytes} bytes from {offset} on of {}", self.bytes);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Relaxed: see `allocations`.
        ALLOCATED.fetch_sub(1, Ordering::Relaxed);
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: allocated once, and nobody has its address any more.
        let freed = cuda!(Some(self.device.ordinal()), cuMemFree_v2(self.address));
        if let Err(error) = freed {
            tracing::debug!("{error}");
        }
    }
}

impl fmt::Debug for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, address) = (self.bytes, self.address);
        write!(f, "{bytes} bytes at {address:#x} on device {}", self.device.ordinal())
    }
}

/// Page-locked memory of the host that a device reads and writes. Freed when dropped.
pub struct Pinned {
    device: Arc<Device>,
    host: NonNull<u8>,
    address: u64,
    bytes: usize,
}

// SAFETY: it is plain memory, which any thread may use.
unsafe impl Send for Pinned {}
// SAFETY: it hands out its address only; who reads and writes there says why that is sound.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates `bytes` bytes (at least one), all zero.
    ///
    /// # Errors
    /// If the system has no more.
    pub fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let (bytes, on) = (bytes.max(1), Some(device.ordinal()));
        let _entered = device.enter()?;
        let mut host: *mut c_void = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the driver writes one pointer.
        cuda!(on, cuMemHostAlloc(&raw mut host, bytes, flags))?;
        let host = NonNull::new(host.cast::<u8>()).expect("what was allocated is somewhere");
        // Relaxed: see `allocations`.
        PINNED.fetch_add(1, Ordering::Relaxed);
        let mut pinned = Self { device: device.clone(), host, address: 0, bytes };
        // SAFETY: so many bytes were allocated, and nobody else has them.
        unsafe { host.write_bytes(0, bytes) };
        let address = &raw mut pinned.address;
        // SAFETY: the driver writes one address; the memory was allocated as mapped.
        cuda!(on, cuMemHostGetDevicePointer_v2(address, host.as_ptr().cast(), 0))?;
        Ok(pinned)
    }

    /// Where the host finds it.
    pub const fn host(&self) -> NonNull<u8> {
        self.host
    }

    /// Where the device finds it.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Relaxed: see `allocations`.
        PINNED.fetch_sub(1, Ordering::Relaxed);
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: allocated once, and nobody has its address any more.
        let freed = cuda!(Some(self.device.ordinal()), cuMemFreeHost(self.host.as_ptr().cast()));
        if let Err(error) = freed {
            tracing::debug!("{error}");
        }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pinned bytes at {:p}", self.bytes, self.host)
    }
}

/// The allocation that an address lies in, whoever made it, or several that the program has mapped
/// side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Where the allocation begins.
    pub base: u64,
    /// How long it is.
    pub bytes: usize,
    /// The driver's number of it, or of the first: no other allocation of the process ever has the
    /// same, but what is mapped at the same address later may.
    pub id: u64,
}

/// Why an address can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// The driver does not know it.
    #[error("{address:#x} is no address of CUDA memory")]
    Unknown {
        /// The address.
        address: u64,
    },
    /// It is on the host or on another device.
    #[error("{address:#x} is {place}, not on device {device}")]
    Elsewhere {
        /// The address.
        address: u64,
        /// Where it is.
        place: String,
        /// Where it should be.
        device: usize,
    },
    /// The allocation ends before.
    #[error("the {bytes} bytes at {address:#x} go beyond the end of their allocation")]
    TooShort {
        /// The address.
        address: u64,
        /// How many bytes were given.
        bytes: usize,
    },
    /// A call of the driver failed for another reason.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl Device {
    /// The allocation of this device that these bytes lie in, or all of them if they are mapped
    /// side by side.
    ///
    /// # Errors
    /// [`PlaceError`].
    pub fn origin(self: &Arc<Self>, address: u64, bytes: usize) -> Result<Origin, PlaceError> {
        use sys::CUpointer_attribute_enum as Attribute;
        let (on, _entered) = (Some(self.ordinal()), self.enter()?);
        let mut space = 0_u32;
        let to = (&raw mut space).cast();
        // SAFETY: the driver writes one 32-bit number, whatever the address is.
        let found = cuda!(
            on,
            cuPointerGetAttribute(to, Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        );
        if let Err(error) = found {
            let unknown = sys::CUresult::CUDA_ERROR_INVALID_VALUE as u32;
            return Err(match error.code() == unknown {
                true => PlaceError::Unknown { address },
                false => error.into(),
            });
        }
        if space != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 {
            let (place, device) = ("memory of the host".into(), self.ordinal());
            return Err(PlaceError::Elsewhere { address, place, device });
        }
        self.check_is_here(address)?;
        let (mut base, mut length) = (0, 0);
        // SAFETY: the driver writes one address and one length.
        cuda!(on, cuMemGetAddressRange_v2(&raw mut base, &raw mut length, address))?;
        let too_short = PlaceError::TooShort { address, bytes };
        let Some(end) = address.checked_add(bytes as u64) else { return Err(too_short) };
        if end > base + length as u64 {
            length = self.side_by_side((base, length), end)?.ok_or(too_short)?;
        }
        let mut id = 0_u64;
        let to = (&raw mut id).cast();
        // SAFETY: the driver writes one 64-bit number.
        cuda!(on, cuPointerGetAttribute(to, Attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID, base))?;
        Ok(Origin { base, bytes: length, id })
    }

    /// Refuses memory of other devices. The context is current.
    pub(crate) fn check_is_here(&self, address: u64) -> Result<(), PlaceError> {
        use sys::CUpointer_attribute_enum as Attribute;
        let mut ordinal = 0_i32;
        let to = (&raw mut ordinal).cast();
        // SAFETY: the driver writes one 32-bit number.
        cuda!(
            Some(self.ordinal()),
            cuPointerGetAttribute(to, Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
        )?;
        if usize::try_from(ordinal) == Ok(self.ordinal()) {
            return Ok(());
        }
        let (place, device) = (format!("on device {ordinal}"), self.ordinal());
        Err(PlaceError::Elsewhere { address, place, device })
    }
}
