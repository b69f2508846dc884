//! The emulated driver, as the tests' ranks get it, and memory that only the driver gives.

use std::ffi::c_void;
use std::path::PathBuf;

use cudarc::driver::sys;
use unisum::DeviceStream;

use super::support::World;

/// Whether the driver of this machine is wanted, not the emulated one (`tests/gpu/run`).
pub fn is_installed() -> bool {
    std::env::var("UNISUM_TEST_DRIVER").is_ok_and(|word| word == "installed")
}

/// How many devices a world that wants so many can have; ranks share those that there are.
pub fn available(devices: usize) -> usize {
    match is_installed() {
        true => devices.min(unisum::cuda_devices().unwrap()),
        false => devices,
    }
}

/// A world that finds the emulated driver, with so many devices.
pub fn with(world: World, devices: usize) -> World {
    if is_installed() {
        return world;
    }
    world
        .set("LD_LIBRARY_PATH", cuda_emulator::library_dir().display())
        .set("CUDA_EMULATOR_DEVICES", devices)
        .set("CUDA_EMULATOR_LEAKS", "fail")
}

/// Whether all cases are wanted, not drawn ones.
pub fn is_whole() -> bool {
    std::env::var_os("UNISUM_TEST_WHOLE").is_some()
        || std::env::var("UNISUM_TEST_DRAWS").is_ok_and(|text| text == "all")
}

/// Where no driver is.
pub fn empty_directory() -> String {
    env!("CARGO_TARGET_TMPDIR").into()
}

/// Whether this machine has a driver of its own.
pub fn has_real_one() -> bool {
    let places = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/cuda/compat"];
    places.iter().any(|place| PathBuf::from(place).join("libcuda.so.1").exists())
}

/// What this process has allocated on devices through unisum.
pub fn allocations() -> usize {
    unisum_cuda_ipc::allocations().0
}

/// Whether everything in the stream has ended, however.
pub fn is_done(stream: &DeviceStream) -> bool {
    // SAFETY: the stream lives.
    let state = unsafe { sys::cuStreamQuery(stream.raw().cast()) };
    state != sys::CUresult::CUDA_ERROR_NOT_READY
}

/// How much a program maps at once in these tests.
pub const PART: usize = 2 << 20;

/// A range of addresses in which allocations are mapped side by side.
pub struct Mapping<'a> {
    pool: &'a Pool,
    pub base: u64,
    pub bytes: usize,
    /// The part that is one allocation with the next.
    joined: Option<usize>,
}

/// A device's primary context, for memory of its pool, which other processes can't open.
pub struct Pool {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

/// Memory of a pool.
pub struct Pooled<'a> {
    pool: &'a Pool,
    pub address: u64,
}

fn check(result: sys::CUresult) {
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
}

impl Pool {
    pub fn new(ordinal: usize) -> Self {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the driver writes one number.
        check(unsafe { sys::cuDeviceGet(&raw mut device, ordinal as i32) });
        // SAFETY: the driver writes one pointer.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) });
        Self { device, context }
    }

    pub fn allocate(&self, bytes: usize) -> Pooled<'_> {
        let mut address = 0;
        self.enter();
        // SAFETY: the driver writes one address.
        check(unsafe {
            sys::cuMemAllocAsync(&raw mut address, bytes.max(1), std::ptr::null_mut())
        });
        // SAFETY: the stream is the default one.
        check(unsafe { sys::cuStreamSynchronize(std::ptr::null_mut()) });
        Pooled { pool: self, address }
    }

    fn enter(&self) {
        // SAFETY: the context is retained.
        check(unsafe { sys::cuCtxSetCurrent(self.context) });
    }

    /// Where the memory begins that the driver tells of for an address, and how long it is.
    pub fn range(&self, address: u64) -> (u64, usize) {
        let (mut base, mut length) = (0, 0);
        self.enter();
        // SAFETY: the driver writes one address and one length.
        check(unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut length, address) });
        (base, length)
    }

    fn write(&self, to: u64, bytes: &[u8], stream: &DeviceStream) {
        self.enter();
        let (from, raw) = (bytes.as_ptr().cast::<c_void>(), stream.raw().cast());
        // SAFETY: so many bytes are there, and stay until it is done.
        check(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes.len(), raw) });
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(raw) });
    }

    fn read(&self, from: u64, bytes: &mut [u8], stream: &DeviceStream) {
        self.enter();
        let (to, raw) = (bytes.as_mut_ptr().cast::<c_void>(), stream.raw().cast());
        // SAFETY: so many bytes are there, and stay until it is done.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes.len(), raw) });
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(raw) });
    }
}

impl Pooled<'_> {
    /// Copies into it, in the stream, and waits.
    pub fn write(&self, bytes: &[u8], stream: &DeviceStream) {
        self.pool.write(self.address, bytes, stream);
    }

    /// Copies so many of its bytes, from `start` on, to another place of the device, in the stream.
    /// Nobody waits.
    pub fn copy(&self, start: u64, to: u64, bytes: usize, stream: &DeviceStream) {
        if bytes == 0 {
            return;
        }
        self.pool.enter();
        let from = self.address + start;
        // SAFETY: both places have so many bytes, until the stream has ended: its users see to it.
        check(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream.raw().cast()) });
    }

    /// Copies out of it, in the stream, and waits.
    pub fn read(&self, bytes: &mut [u8], stream: &DeviceStream) {
        self.pool.read(self.address, bytes, stream);
    }
}

impl<'a> Mapping<'a> {
    /// So many parts, which can be exported by these kinds of handles.
    pub fn new(pool: &'a Pool, parts: usize, kinds: u32) -> Self {
        let (mut base, bytes) = (0, parts * PART);
        pool.enter();
        // SAFETY: the driver writes one address.
        check(unsafe { sys::cuMemAddressReserve(&raw mut base, bytes, 0, 0, 0) });
        let mapping = Self { pool, base, bytes, joined: None };
        (0..parts).for_each(|part| mapping.map((part, 1), pool, kinds));
        mapping.permit(0, parts);
        mapping
    }

    /// One allocation of a device, as long as so many parts.
    fn map(&self, (part, parts): (usize, usize), of: &Pool, kinds: u32) {
        let location = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: of.device,
        };
        let flags = sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        };
        let properties = sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType_enum(kinds),
            location,
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: flags,
        };
        let (mut handle, at, bytes) = (0, self.base + (part * PART) as u64, parts * PART);
        // SAFETY: the driver writes one handle and reads the properties.
        check(unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0) });
        // SAFETY: the place is reserved, and nothing is mapped there.
        check(unsafe { sys::cuMemMap(at, bytes, 0, handle, 0) });
        // SAFETY: what is mapped stays, as in PyTorch's segments.
        check(unsafe { sys::cuMemRelease(handle) });
    }

    fn permit(&self, part: usize, parts: usize) {
        let access = sys::CUmemAccessDesc {
            location: sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: self.pool.device,
            },
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let at = self.base + (part * PART) as u64;
        // SAFETY: all of it is mapped, and the driver reads one description.
        check(unsafe { sys::cuMemSetAccess(at, parts * PART, &raw const access, 1) });
    }

    /// Other memory in place of a part.
    pub fn renew(&mut self, part: usize, kinds: u32) {
        self.replace((part, 1), self.pool, kinds);
    }

    /// Memory of another device in place of a part.
    pub fn renew_on(&mut self, other: &Pool, part: usize, kinds: u32) {
        self.replace((part, 1), other, kinds);
    }

    /// One allocation in place of a part and the next.
    pub fn join(&mut self, part: usize, kinds: u32) {
        self.replace((part, 2), self.pool, kinds);
        self.joined = Some(part);
    }

    fn replace(&self, (part, parts): (usize, usize), of: &Pool, kinds: u32) {
        self.pool.enter();
        // SAFETY: what used it has ended.
        check(unsafe { sys::cuMemUnmap(self.base + (part * PART) as u64, parts * PART) });
        self.map((part, parts), of, kinds);
        self.permit(part, parts);
    }

    /// Copies to the bytes from `start` on, in the stream, and waits.
    pub fn write(&self, start: usize, bytes: &[u8], stream: &DeviceStream) {
        self.pool.write(self.base + start as u64, bytes, stream);
    }

    /// Copies the bytes from `start` on, in the stream, and waits.
    pub fn read(&self, start: usize, bytes: &mut [u8], stream: &DeviceStream) {
        self.pool.read(self.base + start as u64, bytes, stream);
    }
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        self.pool.enter();
        let is_begun = |part: &usize| self.joined.is_none_or(|joined| *part != joined + 1);
        for part in (0..self.bytes / PART).filter(is_begun) {
            let bytes = if self.joined == Some(part) { 2 * PART } else { PART };
            // SAFETY: mapped, and what used it has ended.
            check(unsafe { sys::cuMemUnmap(self.base + (part * PART) as u64, bytes) });
        }
        // SAFETY: reserved once, and nothing is mapped there any more.
        check(unsafe { sys::cuMemAddressFree(self.base, self.bytes) });
    }
}

impl Drop for Pooled<'_> {
    fn drop(&mut self) {
        self.pool.enter();
        // SAFETY: allocated once, and what used it has ended.
        check(unsafe { sys::cuMemFreeAsync(self.address, std::ptr::null_mut()) });
        // SAFETY: the stream is the default one.
        check(unsafe { sys::cuStreamSynchronize(std::ptr::null_mut()) });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: retained once.
        check(unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) });
    }
}
