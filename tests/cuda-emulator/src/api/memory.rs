//! Device memory, pinned host memory, and what is known of a pointer.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{In, Out, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::device::{Device, current};
use crate::driver::memory::{Origin, Region};
use crate::driver::stream::{self, Failure, Stream};
use crate::driver::{driver, host, memory};
use crate::machine::tag;

pub(super) fn allocate(device: &Device, bytes: usize, pool: bool) -> Done<u64> {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    device.charge(bytes, driver()?.settings.memory)?;
    memory::allocate(bytes, device.ordinal, device.physical, pool)
        .inspect_err(|_| device.refund(bytes))
}

/// Whether memory was allocated here, exportable or not.
fn is_allocated(region: &Region) -> bool {
    matches!(region.origin, Origin::Allocated(_) | Origin::Pool)
}

fn free(address: u64) -> Done {
    let found = memory::with(address, |region| Some((region.device, region.bytes)));
    let (device, bytes) = found.ok_or(Code::INVALID_VALUE)?;
    memory::remove(address, is_allocated)?;
    driver()?.devices[device].refund(bytes);
    Ok(())
}

pub(super) fn allocate_in_order(address: Out<u64>, bytes: usize, stream: &Arc<Stream>) -> Done {
    if !driver()?.settings.has_pools {
        return Err(Code::NOT_SUPPORTED);
    }
    let allocated = allocate(stream.device, bytes, true)?;
    // The operation itself has nothing to do.
    stream.push(|_| Ok(())).and_then(|()| address.put(allocated)).inspect_err(|_| {
        let freed = free(allocated);
        assert!(freed.is_ok(), "it was just allocated");
    })
}

entry_points! {
    fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) {
        let allocated = allocate(current()?, bytes, false)?;
        address.put(allocated)
    }

    fn cuMemFree_v2(address: u64) {
        let device = current();
        if address == 0 {
            return device.map(|_| ());
        }
        // As the real driver, it waits for what may use the memory.
        if let Ok(device) = device {
            device.synchronize(driver()?)?;
        }
        free(address)?;
        device.map(|_| ())
    }

    fn cuMemAllocAsync(address: Out<u64>, bytes: usize, stream: u64) {
        allocate_in_order(address, bytes, &stream::find(stream)?)
    }

    fn cuMemFreeAsync(address: u64, stream: u64) {
        let stream = stream::find_or_failed(stream)?;
        if address == 0 {
            return Ok(());
        }
        if stream.device.check().is_err() {
            // The operation would not run, but nothing must seem to be left either.
            free(address)?;
            return stream.device.check();
        }
        let is_right = |region: &Region| {
            region.address == address && is_allocated(region) && !region.begin_dying()
        };
        if memory::with(address, |region| is_right(region).then_some(())).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        stream.push(move |_| {
            free(address).map_err(|code| Failure { code, reason: format!("free {address:#x}") })
        })
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let device = current()?;
        let all = driver()?.settings.memory;
        // Relaxed: a number, and nothing depends on its order.
        let used = device.allocated.load(Ordering::Relaxed);
        free.put_if_wanted(usize::try_from(all - used).unwrap_or(usize::MAX));
        total.put_if_wanted(usize::try_from(all).unwrap_or(usize::MAX));
        Ok(())
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, bytes: Out<usize>, address: u64) {
        let is_merged = driver()?.settings.is_merged;
        let extent = |region: &Region| match is_merged {
            true => region.merged_extent(address),
            false => region.extent(address),
        };
        let found = memory::with(address, |region| Some(extent(region)));
        let (start, length, _) = found.ok_or(Code::NOT_FOUND)?;
        base.put_if_wanted(start);
        bytes.put_if_wanted(length);
        Ok(())
    }

    fn cuMemHostAlloc(pointer: Out<usize>, bytes: usize, flags: u32) {
        current()?;
        pointer.put(host::allocate(bytes, flags)?)
    }

    fn cuMemAllocHost_v2(pointer: Out<usize>, bytes: usize) {
        current()?;
        pointer.put(host::allocate(bytes, 0)?)
    }

    fn cuMemFreeHost(pointer: usize) {
        let device = current();
        if let Ok(device) = device {
            device.synchronize(driver()?)?;
        }
        host::remove(pointer, true)?;
        device.map(|_| ())
    }

    fn cuMemHostRegister_v2(pointer: usize, bytes: usize, flags: u32) {
        current()?;
        host::register(pointer, bytes, flags)
    }

    fn cuMemHostUnregister(pointer: usize) {
        host::remove(pointer, false)?;
        current().map(|_| ())
    }

    fn cuMemHostGetDevicePointer_v2(address: Out<u64>, pointer: usize, flags: u32) {
        current()?;
        if flags != 0 || host::find(pointer).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        address.put(pointer as u64)
    }

    fn cuMemHostGetFlags(flags: Out<u32>, pointer: usize) {
        let (_, _, found) = host::find(pointer).ok_or(Code::INVALID_VALUE)?;
        flags.put(found)
    }

    fn cuPointerGetAttribute(value: Out<c_void>, attribute: i32, address: u64) {
        driver()?;
        attribute_of(value, attribute, address)
    }

    fn cuPointerGetAttributes(
        count: u32,
        attributes: In<i32>,
        values: In<Out<c_void>>,
        address: u64,
    ) {
        driver()?;
        for index in 0..count as usize {
            let value = values.at(index)?;
            // Attributes that an address does not have are 0 here, and no error.
            if attribute_of(value, attributes.at(index)?, address).is_err() {
                match attributes.at(index)? {
                    wide if attribute::is_wide(wide) => value.cast().put(0_u64)?,
                    _ => value.cast().put(0_u32)?,
                }
            }
        }
        Ok(())
    }

    fn cuPointerSetAttribute(_value: In<u8>, attribute: i32, address: u64) {
        let is_known = memory::with(address, |_| Some(())).is_some();
        // SYNC_MEMOPS: copies are synchronous enough here.
        if attribute == 6 && is_known { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }
}

/// Attributes of a pointer, by their numbers.
mod attribute {
    pub(super) const CONTEXT: i32 = 1;
    pub(super) const MEMORY_TYPE: i32 = 2;
    pub(super) const DEVICE_POINTER: i32 = 3;
    pub(super) const HOST_POINTER: i32 = 4;
    pub(super) const SYNC_MEMOPS: i32 = 6;
    pub(super) const BUFFER_ID: i32 = 7;
    pub(super) const IS_MANAGED: i32 = 8;
    pub(super) const DEVICE_ORDINAL: i32 = 9;
    pub(super) const IS_LEGACY_IPC_CAPABLE: i32 = 10;
    pub(super) const RANGE_START: i32 = 11;
    pub(super) const RANGE_SIZE: i32 = 12;
    pub(super) const IS_MAPPED: i32 = 13;
    pub(super) const ALLOWED_HANDLE_TYPES: i32 = 14;
    pub(super) const MEMPOOL_HANDLE: i32 = 17;

    /// Whether its value has 8 bytes, and not 4.
    pub(super) fn is_wide(attribute: i32) -> bool {
        !matches!(
            attribute,
            MEMORY_TYPE
                | SYNC_MEMOPS
                | IS_MANAGED
                | DEVICE_ORDINAL
                | IS_LEGACY_IPC_CAPABLE
                | IS_MAPPED
        )
    }
}

fn attribute_of(value: Out<c_void>, attribute: i32, address: u64) -> Done {
    if address & tag::MASK == 0 {
        return attribute_of_host(value, attribute, address);
    }
    memory::with(address, |region| Some(attribute_of_region(value, attribute, address, region)))
        .unwrap_or(Err(Code::INVALID_VALUE))
}

fn attribute_of_region(value: Out<c_void>, attribute: i32, address: u64, region: &Region) -> Done {
    // The number of what is mapped is that of its range: other memory there has the same.
    let (start, bytes, ordinal) = region.extent(address);
    let device = &driver()?.devices[ordinal];
    let is_pool = matches!(region.origin, Origin::Pool);
    match attribute {
        attribute::CONTEXT => value.cast().put(device.context()),
        attribute::MEMORY_TYPE => value.cast().put(2_u32),
        attribute::DEVICE_POINTER => value.cast().put(address),
        attribute::SYNC_MEMOPS | attribute::IS_MANAGED => value.cast().put(0_u32),
        attribute::BUFFER_ID => value.cast().put(region.id),
        attribute::DEVICE_ORDINAL => value.cast().put(i32::try_from(ordinal).unwrap_or(i32::MAX)),
        attribute::IS_LEGACY_IPC_CAPABLE => value.cast().put(u32::from(region.is_exportable())),
        attribute::RANGE_START => value.cast().put(start),
        attribute::RANGE_SIZE => value.cast().put(bytes),
        attribute::IS_MAPPED => value.cast().put(1_u32),
        attribute::ALLOWED_HANDLE_TYPES => value.cast().put(0_u64),
        attribute::MEMPOOL_HANDLE => {
            value.cast().put(if is_pool { super::pool::default_pool(device) } else { 0 })
        }
        _ => Err(Code::INVALID_VALUE),
    }
}

fn attribute_of_host(value: Out<c_void>, attribute: i32, address: u64) -> Done {
    let pointer = usize::try_from(address).map_err(|_| Code::INVALID_VALUE)?;
    let (start, bytes, _) = host::find(pointer).ok_or(Code::INVALID_VALUE)?;
    match attribute {
        attribute::MEMORY_TYPE => value.cast().put(1_u32),
        attribute::DEVICE_POINTER | attribute::HOST_POINTER => value.cast().put(address),
        attribute::IS_MANAGED | attribute::IS_LEGACY_IPC_CAPABLE => value.cast().put(0_u32),
        attribute::RANGE_START => value.cast().put(start),
        attribute::RANGE_SIZE => value.cast().put(bytes),
        attribute::IS_MAPPED => value.cast().put(1_u32),
        _ => Err(Code::INVALID_VALUE),
    }
}
