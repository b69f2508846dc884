//! Memory pools: each device has one, whose settings change nothing.

use std::ffi::c_void;

use super::{In, Out, entry_points, memory};
use crate::driver::codes::{Code, Done};
use crate::driver::device::Device;
use crate::driver::{driver, stream};

/// The upper bits of a pool's handle.
const POOL: u64 = 0xB0 << 48;

/// The handle of a device's pool.
pub(super) fn default_pool(device: &Device) -> u64 {
    POOL | (device.ordinal as u64 + 1) << 4
}

fn check(pool: u64) -> Done {
    let is_known = driver()?.devices.iter().any(|device| default_pool(device) == pool);
    if is_known { Ok(()) } else { Err(Code::INVALID_VALUE) }
}

fn pool_of(ordinal: i32) -> Done<u64> {
    let driver = driver()?;
    let device = driver.device(ordinal)?;
    if driver.settings.has_pools { Ok(default_pool(device)) } else { Err(Code::NOT_SUPPORTED) }
}

entry_points! {
    fn cuDeviceGetDefaultMemPool(pool: Out<u64>, device: i32) {
        pool.put(pool_of(device)?)
    }

    fn cuDeviceGetMemPool(pool: Out<u64>, device: i32) {
        pool.put(pool_of(device)?)
    }

    fn cuDeviceSetMemPool(device: i32, pool: u64) {
        if pool_of(device)? == pool { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    fn cuMemPoolGetAttribute(pool: u64, _attribute: i32, value: Out<c_void>) {
        check(pool)?;
        value.cast().put(0_u64)
    }

    fn cuMemPoolSetAttribute(pool: u64, _attribute: i32, _value: In<u8>) {
        check(pool)
    }

    fn cuMemPoolTrimTo(pool: u64, _bytes: usize) {
        check(pool)
    }

    fn cuMemAllocFromPoolAsync(address: Out<u64>, bytes: usize, pool: u64, stream: u64) {
        check(pool)?;
        memory::allocate_in_order(address, bytes, &stream::find(stream)?)
    }
}
