//! Memory that programs map themselves.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use cudarc::driver::sys::{self, CUpointer_attribute, CUresult};

use crate::KERNELS;
use crate::support::{Gpu, leave, role, run};

const PART: usize = 2 << 20;
pub(crate) const INVALID: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;
pub(crate) const FILES: u32 = 1;
const FABRIC: u32 = 8;

fn location(device: i32) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

pub(crate) fn done<T>(result: CUresult, value: T) -> Result<T, CUresult> {
    if result == CUresult::CUDA_SUCCESS { Ok(value) } else { Err(result) }
}

pub(crate) fn create(device: i32, bytes: usize, kinds: u32) -> Result<u64, CUresult> {
    let flags = sys::CUmemAllocationProp_st__bindgen_ty_1 {
        compressionType: 0,
        gpuDirectRDMACapable: 0,
        usage: 0,
        reserved: [0; 4],
    };
    let properties = sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType_enum(kinds),
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: flags,
    };
    let mut handle = 0;
    // SAFETY: the driver writes one handle and reads the properties; here and below, it checks
    // addresses and handles.
    let created = unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0) };
    done(created, handle)
}

pub(crate) fn release(handle: u64) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMemRelease(handle) }
}

pub(crate) fn reserve(bytes: usize) -> Result<u64, CUresult> {
    let mut base = 0;
    // SAFETY: the driver writes one address.
    done(unsafe { sys::cuMemAddressReserve(&raw mut base, bytes, 0, 0, 0) }, base)
}

fn map(at: u64, handle: u64) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMemMap(at, PART, 0, handle, 0) }
}

pub(crate) fn unmap(at: u64, bytes: usize) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMemUnmap(at, bytes) }
}

pub(crate) fn free_range(at: u64, bytes: usize) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMemAddressFree(at, bytes) }
}

pub(crate) fn permit(at: u64, bytes: usize, device: i32) -> CUresult {
    let access = sys::CUmemAccessDesc {
        location: location(device),
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: the driver reads one description.
    unsafe { sys::cuMemSetAccess(at, bytes, &raw const access, 1) }
}

fn retain(at: u64) -> Result<u64, CUresult> {
    let mut handle = 0;
    let at = std::ptr::without_provenance_mut::<c_void>(at as usize);
    // SAFETY: the driver writes one handle.
    done(unsafe { sys::cuMemRetainAllocationHandle(&raw mut handle, at) }, handle)
}

pub(crate) fn export(handle: u64) -> Result<OwnedFd, CUresult> {
    let mut file = -1_i32;
    let kind = sys::CUmemAllocationHandleType_enum(FILES);
    let to = (&raw mut file).cast();
    // SAFETY: the driver writes one descriptor.
    let exported = unsafe { sys::cuMemExportToShareableHandle(to, handle, kind, 0) };
    // SAFETY: the driver has made it for this process.
    done(exported, ()).map(|()| unsafe { OwnedFd::from_raw_fd(file) })
}

pub(crate) fn import(number: i32) -> Result<u64, CUresult> {
    let (mut handle, kind) = (0, sys::CUmemAllocationHandleType_enum(FILES));
    let from = std::ptr::without_provenance_mut(number as usize);
    // SAFETY: the driver writes one handle.
    let imported = unsafe { sys::cuMemImportFromShareableHandle(&raw mut handle, from, kind) };
    done(imported, handle)
}

pub(crate) const OK: CUresult = CUresult::CUDA_SUCCESS;

#[test]
fn what_is_mapped_lives_until_nobody_needs_it() {
    let name = "mapped::what_is_mapped_lives_until_nobody_needs_it";
    if role().is_none() {
        run(name, &[("LEAKS", "fail"), ("MEMORY", "4194304")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    assert_eq!(create(0, PART + 4096, FILES), Err(INVALID), "no multiple of the granularity");
    let not_here = CUresult::CUDA_ERROR_NOT_SUPPORTED;
    assert_eq!(create(0, PART, FABRIC), Err(not_here), "there is no fabric");
    let (one, two) = (create(0, PART, FILES).unwrap(), create(0, PART, 0).unwrap());
    let full = CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    assert_eq!(create(0, PART, FILES), Err(full), "the device has two");
    let base = reserve(3 * PART).unwrap();
    assert_eq!(retain(base), Err(INVALID), "nothing is mapped there");
    assert_eq!((map(base, one), map(base + PART as u64, two)), (OK, OK));
    assert_eq!(map(base, two), INVALID, "something is there");
    assert_eq!(permit(base, 3 * PART, 0), INVALID, "not all of it is mapped");
    assert_eq!(permit(base, 2 * PART, 0), OK);
    // The number of a handle is the same as long as anybody has it.
    assert_eq!((retain(base + 77), release(one)), (Ok(one), OK));
    assert_eq!((release(one), release(one)), (OK, INVALID));
    assert_eq!((retain(base), release(one)), (Ok(one), OK), "while it is mapped");
    assert_eq!(release(two), OK);
    // Over the edge, and from place to place.
    let edge = base + PART as u64 - 8;
    gpu.fill(edge, 7, 16);
    assert_eq!(gpu.download::<u32>(edge, 4), [0x0707_0707; 4]);
    let (mut start, mut length) = (0, 0);
    // SAFETY: the driver writes one address and one length.
    let found = unsafe {
        sys::cuMemGetAddressRange_v2(&raw mut start, &raw mut length, base + PART as u64 + 5)
    };
    assert_eq!((found, start, length), (OK, base + PART as u64, PART), "of what is mapped at once");
    assert_eq!(gpu.export(base), Err(INVALID), "no handle of the other kind");
    assert_eq!(gpu.free(base), INVALID, "not by this");
    assert_eq!(unmap(base, PART / 2), INVALID, "a part of it");
    assert_eq!((free_range(base, 3 * PART), unmap(base, PART)), (INVALID, OK));
    assert_eq!(gpu.try_download::<u32>(base, 1), Err(INVALID), "it is gone");
    let again = create(0, PART, FILES).unwrap();
    assert_ne!(again, one);
    assert_eq!((map(base, again), permit(base, PART, 0), release(again)), (OK, OK, OK));
    assert_ne!(gpu.download::<u32>(edge, 2), [0x0707_0707; 2], "other memory");
    assert_eq!((unmap(base, 2 * PART), free_range(base, PART)), (OK, INVALID));
    assert_eq!((free_range(base, 3 * PART), free_range(base, 3 * PART)), (OK, INVALID));
    gpu.close();
    leave();
}

#[test]
fn what_is_left_of_mapped_memory_is_counted() {
    let name = "mapped::what_is_left_of_mapped_memory_is_counted";
    if role().is_none() {
        let ended = run(name, &[("LEAKS", "fail")]);
        assert_eq!(ended.code, Some(86), "{}", ended.text);
        ended.assert_says(&["1 reserved ranges", "2 mappings", "1 allocation handles"]);
        ended.assert_says(&["1 descriptors of allocations"]);
        return;
    }
    let _gpu = Gpu::open(0);
    let (one, two) = (create(0, PART, FILES).unwrap(), create(0, PART, FILES).unwrap());
    let base = reserve(2 * PART).unwrap();
    assert_eq!((map(base, one), map(base + PART as u64, two), release(two)), (OK, OK, OK));
    let _file = std::mem::ManuallyDrop::new(export(one).unwrap());
    leave();
}

#[test]
fn descriptors_are_of_memory_that_was_made_for_them() {
    let name = "mapped::descriptors_are_of_memory_that_was_made_for_them";
    if role().is_none() {
        run(name, &[("LEAKS", "fail")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let (with, without) = (create(0, PART, FILES).unwrap(), create(0, PART, 0).unwrap());
    assert_eq!(export(without).unwrap_err(), INVALID);
    let file = export(with).unwrap();
    let imported = import(file.as_raw_fd()).unwrap();
    assert_ne!(imported, with, "a handle of its own");
    let other = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(
        (import(other.as_raw_fd()), import(-1), import(9999)),
        (Err(INVALID), Err(INVALID), Err(INVALID))
    );
    drop(file);
    // Both are one memory.
    let base = reserve(2 * PART).unwrap();
    assert_eq!((map(base, with), map(base + PART as u64, imported)), (OK, OK));
    assert_eq!(permit(base, 2 * PART, 0), OK);
    gpu.fill(base, 3, 8);
    assert_eq!(gpu.download::<u32>(base + PART as u64, 2), [0x0303_0303; 2]);
    assert_eq!((unmap(base, 2 * PART), free_range(base, 2 * PART)), (OK, OK));
    assert_eq!([with, without, imported].map(release), [OK; 3]);
    gpu.close();
    leave();
}

#[test]
fn a_device_that_was_given_no_access_has_none() {
    let name = "mapped::a_device_that_was_given_no_access_has_none";
    if role().is_none() {
        let ended = run(name, &[("NO_PEER", "0:2"), ("DEVICES", "3")]);
        ended.assert_success();
        ended.assert_says(&["error 700", "may not be accessed by this device"]);
        return;
    }
    let (_owner, other, gpu) = (Gpu::open(0), Gpu::open(2), Gpu::open(1));
    let (handle, base) = (create(0, PART, FILES).unwrap(), reserve(PART).unwrap());
    assert_eq!(map(base, handle), OK);
    let mut ordinal = 7_i32;
    let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: the driver writes one number.
    let found = unsafe { sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, base) };
    assert_eq!((found, ordinal), (OK, 0));
    assert_eq!(permit(base, PART, 2), CUresult::CUDA_ERROR_INVALID_DEVICE, "they are no peers");
    let (copy, to) = (gpu.kernel(KERNELS, "copy"), gpu.allocate(4));
    assert_eq!(permit(base, PART, 1), OK);
    gpu.launch(copy, 1, 1, &mut [to.into(), base.into(), 1_u32.into()]);
    gpu.synchronize();
    assert_eq!(permit(base, PART, 0), OK, "the owner has none by itself");
    other.bind();
    let (copy, to) = (other.kernel(KERNELS, "copy"), other.allocate(4));
    other.launch(copy, 1, 1, &mut [to.into(), base.into(), 1_u32.into()]);
    assert_eq!(other.try_synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    leave();
}
