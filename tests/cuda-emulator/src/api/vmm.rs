//! Memory that programs map themselves.

use std::ffi::c_void;

use super::{In, Out, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::ipc::IpcHandle;
use crate::driver::vmm::{self, DESCRIPTOR, FABRIC, GRANULARITY};
use crate::driver::{driver, memory};

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Properties {
    kind: u32,
    handle_kinds: u32,
    location: Location,
    meta: usize,
    flags: [u8; 8],
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Location {
    kind: u32,
    id: i32,
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Access {
    location: Location,
    flags: u32,
}

/// `CU_MEM_ALLOCATION_TYPE_PINNED` and `CU_MEM_LOCATION_TYPE_DEVICE`.
const PINNED: u32 = 1;
const DEVICE: u32 = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_NONE` and `_READWRITE`.
const NO_ACCESS: u32 = 0;
const READ_WRITE: u32 = 3;

fn check(properties: &Properties) -> Done {
    let driver = driver()?;
    let is_right = properties.kind == PINNED && properties.location.kind == DEVICE;
    if !is_right || properties.handle_kinds & !(DESCRIPTOR | FABRIC) != 0 {
        return Err(Code::INVALID_VALUE);
    }
    if properties.handle_kinds & FABRIC != 0 && !driver.settings.has_fabric {
        return Err(Code::NOT_SUPPORTED);
    }
    driver.device(properties.location.id).map(|_| ())
}

entry_points! {
    fn cuMemGetAllocationGranularity(bytes: Out<usize>, properties: In<Properties>, option: u32) {
        check(&properties.get()?)?;
        if option > 1 {
            return Err(Code::INVALID_VALUE);
        }
        bytes.put(GRANULARITY)
    }

    fn cuMemCreate(handle: Out<u64>, bytes: usize, properties: In<Properties>, flags: u64) {
        let properties = properties.get()?;
        check(&properties)?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let device = driver()?.device(properties.location.id)?;
        let kinds = properties.handle_kinds;
        handle.put(vmm::create(bytes, device.ordinal, device.physical, kinds)?)
    }

    fn cuMemRelease(handle: u64) {
        driver()?;
        vmm::release(handle)
    }

    fn cuMemGetAllocationPropertiesFromHandle(properties: Out<Properties>, handle: u64) {
        driver()?;
        let found = vmm::find(handle)?;
        let id = i32::try_from(found.ordinal).unwrap_or(i32::MAX);
        properties.put(Properties {
            kind: PINNED,
            handle_kinds: found.kinds,
            location: Location { kind: DEVICE, id },
            ..Properties::default()
        })
    }

    fn cuMemAddressReserve(
        address: Out<u64>,
        bytes: usize,
        alignment: usize,
        _wished: u64,
        flags: u64,
    ) {
        driver()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        address.put(vmm::reserve(bytes, alignment)?)
    }

    fn cuMemAddressFree(address: u64, bytes: usize) {
        driver()?;
        vmm::free_range(address, bytes)
    }

    fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, flags: u64) {
        driver()?;
        if offset != 0 || flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        vmm::map(address, bytes, handle)
    }

    fn cuMemUnmap(address: u64, bytes: usize) {
        driver()?;
        vmm::unmap(address, bytes)
    }

    fn cuMemSetAccess(address: u64, bytes: usize, descriptions: In<Access>, count: usize) {
        let driver = driver()?;
        for index in 0..count {
            let Access { location, flags } = descriptions.at(index)?;
            if location.kind != DEVICE {
                return Err(Code::NOT_SUPPORTED);
            }
            let ordinal = driver.device(location.id)?.ordinal;
            match flags {
                NO_ACCESS => vmm::set_access(address, bytes, ordinal, false)?,
                READ_WRITE => vmm::set_access(address, bytes, ordinal, true)?,
                _ => return Err(Code::NOT_SUPPORTED),
            }
        }
        Ok(())
    }

    fn cuMemRetainAllocationHandle(handle: Out<u64>, address: u64) {
        driver()?;
        if memory::with(address, |_| Some(())).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        handle.put(vmm::retain(address)?)
    }

    fn cuMemExportToShareableHandle(to: Out<c_void>, handle: u64, kind: u32, flags: u64) {
        driver()?;
        let found = vmm::find(handle)?;
        // What was not asked for when it was made can't be had later.
        if flags != 0 || found.kinds & kind != kind {
            return Err(Code::INVALID_VALUE);
        }
        match kind {
            DESCRIPTOR => to.cast().put(vmm::export_file(&found)?),
            FABRIC => to.cast().put(vmm::export_fabric(&found)),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuMemImportFromShareableHandle(handle: Out<u64>, from: In<IpcHandle>, kind: u32) {
        let driver = driver()?;
        match kind {
            // The pointer is the descriptor.
            DESCRIPTOR => {
                let number = i32::try_from(from.0.addr()).map_err(|_| Code::INVALID_VALUE)?;
                handle.put(vmm::import_file(number)?)
            }
            FABRIC if driver.settings.has_fabric => handle.put(vmm::import_fabric(&from.get()?)?),
            FABRIC => Err(Code::NOT_SUPPORTED),
            _ => Err(Code::INVALID_VALUE),
        }
    }
}
