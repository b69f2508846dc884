//! Initialization, devices and errors.

use std::ffi::{CString, c_char};

use super::{Out, Text, entry_points};
use crate::driver::codes::{Code, describe};
use crate::driver::{VERSION, driver, initialize, kernels};

/// The 16 bytes that identify a device on all hosts.
type Uuid = [u8; 16];

fn uuid(physical: u32) -> Uuid {
    let mut uuid = *b"cuda-emulator\0\0\0";
    uuid[14..].copy_from_slice(&physical.to_be_bytes()[2..]);
    uuid
}

fn bus(physical: u32) -> String {
    format!("0000:{:02x}:00.0", physical + 1)
}

entry_points! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        initialize()
    }

    fn cuDriverGetVersion(version: Out<i32>) {
        version.put(VERSION)
    }

    fn cuDeviceGetCount(count: Out<i32>) {
        count.put(i32::try_from(driver()?.devices.len()).unwrap_or(i32::MAX))
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) {
        driver()?.device(ordinal)?;
        device.put(ordinal)
    }

    fn cuDeviceGetName(name: Out<c_char>, length: i32, device: i32) {
        let device = driver()?.device(device)?;
        put_text(name, length, &format!("Emulated device {}", device.physical))
    }

    fn cuDeviceGetUuid(found: Out<Uuid>, device: i32) {
        found.put(uuid(driver()?.device(device)?.physical))
    }

    fn cuDeviceGetUuid_v2(found: Out<Uuid>, device: i32) {
        found.put(uuid(driver()?.device(device)?.physical))
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) {
        let driver = driver()?;
        driver.device(device)?;
        bytes.put(usize::try_from(driver.settings.memory).unwrap_or(usize::MAX))
    }

    fn cuDeviceGetPCIBusId(name: Out<c_char>, length: i32, device: i32) {
        put_text(name, length, &bus(driver()?.device(device)?.physical))
    }

    fn cuDeviceGetByPCIBusId(device: Out<i32>, name: Text) {
        let name = name.get()?;
        let found = driver()?.devices.iter().position(|device| bus(device.physical) == name);
        let found = found.and_then(|ordinal| i32::try_from(ordinal).ok());
        device.put(found.ok_or(Code::INVALID_DEVICE)?)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) {
        let driver = driver()?;
        let physical = driver.device(device)?.physical;
        let compute = driver.settings.compute.cast_signed();
        value.put(match attribute {
            75 => compute / 10,
            76 => compute % 10,
            115 => i32::from(driver.settings.has_pools),
            128 => i32::from(driver.settings.has_fabric),
            132 => i32::from(driver.settings.has_multicast),
            33 => physical.cast_signed() + 1,
            _ => fixed_attribute(attribute),
        })
    }

    fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) {
        let driver = driver()?;
        let (device, peer) = (driver.device(device)?.physical, driver.device(peer)?.physical);
        can.put(i32::from(driver.settings.are_peers(device, peer)))
    }

    fn cuDeviceGetP2PAttribute(value: Out<i32>, attribute: i32, device: i32, peer: i32) {
        let driver = driver()?;
        let (device, peer) = (driver.device(device)?.physical, driver.device(peer)?.physical);
        if device == peer {
            return Err(Code::INVALID_DEVICE);
        }
        let are_peers = i32::from(driver.settings.are_peers(device, peer));
        match attribute {
            // Performance rank.
            1 => value.put(0),
            // Access, native atomics, arrays.
            2 | 3 => value.put(are_peers),
            4 => value.put(0),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuGetErrorName(code: i32, name: Out<*const c_char>) {
        match describe(code) {
            Some((text, _)) => name.put(text.as_ptr()),
            None => {
                name.put(std::ptr::null())?;
                Err(Code::INVALID_VALUE)
            }
        }
    }

    fn cuGetErrorString(code: i32, text: Out<*const c_char>) {
        match describe(code) {
            Some((_, meaning)) => text.put(meaning.as_ptr()),
            None => {
                text.put(std::ptr::null())?;
                Err(Code::INVALID_VALUE)
            }
        }
    }

    fn cuProfilerStart() {
        driver().map(|_| ())
    }

    fn cuProfilerStop() {
        driver().map(|_| ())
    }
}

/// Attributes that are the same for all devices. What the emulator can't do is 0.
fn fixed_attribute(attribute: i32) -> i32 {
    let shared = kernels::SHARED_MAX.cast_signed();
    let optin = kernels::SHARED_OPTIN_MAX.cast_signed();
    match attribute {
        // Threads of a block, and the extents of blocks and grids.
        1..=3 => kernels::THREADS_MAX.cast_signed(),
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65535,
        8 => shared,
        // Constant memory, warp size.
        9 => 65536,
        10 => 32,
        // Registers of a block, clock rate, alignment of textures, multiprocessors.
        12 | 82 => 65536,
        13 => 1_000_000,
        14 => 512,
        16 => 4,
        // Mapped host memory, several kernels at once, asynchronous engines, unified addresses,
        // stream priorities.
        19 | 31 | 41 | 78 => 1,
        40 => 2,
        // The width of the memory bus, the size of the cache, threads of a multiprocessor.
        37 => 512,
        38 => 1 << 20,
        39 => 2048,
        81 => optin + 1024,
        97 => optin,
        // Blocks of a multiprocessor.
        106 => 16,
        // Waiting for values in memory, with 64 bits, with NOR (twice, by version), cooperative
        // launches, registering of host memory.
        // Memory that programs map, and descriptors of it.
        92..=95 | 99 | 102 | 103 | 122 | 123 => 1,
        _ => 0,
    }
}

fn put_text(name: Out<c_char>, length: i32, text: &str) -> crate::driver::codes::Done {
    let length = usize::try_from(length).map_err(|_| Code::INVALID_VALUE)?;
    let cut = &text[..text.len().min(length.checked_sub(1).ok_or(Code::INVALID_VALUE)?)];
    let text = CString::new(cut).map_err(|_| Code::INVALID_VALUE)?;
    name.cast().put_all(text.as_bytes_with_nul());
    Ok(())
}
