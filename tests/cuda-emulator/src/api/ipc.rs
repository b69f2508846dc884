//! Memory and events of other processes.

use super::{Out, entry_points};
use crate::driver::codes::Code;
use crate::driver::device::current;
use crate::driver::event::{self, Event};
use crate::driver::ipc::{Exported, IpcHandle, Kind};
use crate::driver::memory::Origin;
use crate::driver::{driver, memory};

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, which must be given.
const LAZY_ENABLE_PEER_ACCESS: u32 = 1;

entry_points! {
    fn cuIpcGetMemHandle(handle: Out<IpcHandle>, address: u64) {
        current()?;
        // Whichever byte the address is of, the handle is of the whole allocation.
        let exported = memory::with(address, |region| match &region.origin {
            Origin::Allocated(file) => Some(Exported {
                kind: Kind::Memory,
                place: file.place(),
                physical: region.physical,
                bytes: region.bytes as u64,
            }),
            _ => None,
        });
        handle.put(exported.ok_or(Code::INVALID_VALUE)?.encode())
    }

    fn cuIpcOpenMemHandle_v2(address: Out<u64>, handle: IpcHandle, flags: u32) {
        let device = current()?;
        if flags != LAZY_ENABLE_PEER_ACCESS {
            return Err(Code::INVALID_VALUE);
        }
        let exported = Exported::decode(&handle, Kind::Memory)?;
        if exported.place.process == std::process::id() {
            return Err(Code::INVALID_CONTEXT);
        }
        let driver = driver()?;
        let physical = exported.physical;
        if physical != device.physical && !driver.settings.are_peers(physical, device.physical) {
            return Err(Code::PEER_ACCESS_UNSUPPORTED);
        }
        let bytes = usize::try_from(exported.bytes).map_err(|_| Code::INVALID_HANDLE)?;
        let owner = driver.devices.iter().find(|device| device.physical == physical);
        let owner = owner.map_or(device.ordinal, |device| device.ordinal);
        address.put(memory::open(exported.place, bytes, device.ordinal, owner, physical)?)
    }

    fn cuIpcCloseMemHandle(address: u64) {
        let device = current();
        memory::close(address)?;
        device.map(|_| ())
    }

    fn cuIpcGetEventHandle(handle: Out<IpcHandle>, event: u64) {
        let event = event::find(event)?;
        let (physical, place) = (event.device.physical, event.export()?);
        handle.put(Exported { kind: Kind::Event, place, physical, bytes: 0 }.encode())
    }

    fn cuIpcOpenEventHandle(event: Out<u64>, handle: IpcHandle) {
        let device = current()?;
        let exported = Exported::decode(&handle, Kind::Event)?;
        if exported.place.process == std::process::id() {
            return Err(Code::INVALID_CONTEXT);
        }
        let opened = Event::open(exported.place, device)?;
        event.put(driver()?.events.add(opened))
    }
}
