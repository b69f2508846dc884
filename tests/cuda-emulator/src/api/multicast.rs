//! Multicast objects.

use super::{In, Out, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::multicast::{self, GRANULARITY};
use crate::driver::vmm::{self, DESCRIPTOR};
use crate::driver::{Driver, driver};

/// `CUmulticastObjectProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Properties {
    devices: u32,
    bytes: usize,
    handle_kinds: u64,
    flags: u64,
}

fn supporting() -> Done<&'static Driver> {
    let driver = driver()?;
    if driver.settings.has_multicast { Ok(driver) } else { Err(Code::NOT_SUPPORTED) }
}

fn check(properties: &Properties) -> Done {
    let driver = supporting()?;
    let count = driver.settings.device_count;
    let is_right =
        (1..=count).contains(&properties.devices) && properties.bytes > 0 && properties.flags == 0;
    let kinds_are = properties.handle_kinds & !u64::from(DESCRIPTOR) == 0;
    if is_right && kinds_are { Ok(()) } else { Err(Code::INVALID_VALUE) }
}

entry_points! {
    fn cuMulticastGetGranularity(bytes: Out<usize>, properties: In<Properties>, option: u32) {
        check(&properties.get()?)?;
        if option > 1 {
            return Err(Code::INVALID_VALUE);
        }
        bytes.put(GRANULARITY)
    }

    fn cuMulticastCreate(handle: Out<u64>, properties: In<Properties>) {
        let properties = properties.get()?;
        check(&properties)?;
        let Properties { devices, bytes, handle_kinds, .. } = properties;
        handle.put(vmm::create_multicast(bytes, devices, handle_kinds as u32)?)
    }

    fn cuMulticastAddDevice(handle: u64, device: i32) {
        let physical = supporting()?.device(device)?.physical;
        multicast::add_device(handle, physical)
    }

    fn cuMulticastBindMem(
        handle: u64,
        offset: usize,
        memory: u64,
        memory_offset: usize,
        bytes: usize,
        flags: u64,
    ) {
        supporting()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        multicast::bind(handle, (offset, memory, memory_offset), bytes)
    }

    fn cuMulticastUnbind(handle: u64, device: i32, offset: usize, bytes: usize) {
        let physical = supporting()?.device(device)?.physical;
        multicast::unbind(handle, physical, (offset, bytes))
    }
}
