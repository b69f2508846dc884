//! Memory of several devices under one address, at which the switch between them adds and spreads
//! (NVLink SHARP).
//!
//! One process creates an object, and the others get it by a descriptor. Each adds its device, and
//! when all have, binds memory of its own and maps both.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::device::Device;
use crate::error::{CudaError, cuda};
use crate::functions::{self, MulticastFunctions, MulticastProperties, Properties};
use crate::ipc;
use crate::mapped::{Backing, DESCRIPTOR, Imported, Window};

impl Device {
    /// Why this device can't be one of several that share an address; `None` if it can.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn lacks_multicast(&self) -> Result<Option<String>, CudaError> {
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED as SUPPORTED;
        if let Err(missing) = functions::multicast() {
            return Ok(Some(format!("the driver has no {missing}")));
        }
        let mut has = 0;
        // SAFETY: the driver writes one number.
        cuda!(Some(self.ordinal()), cuDeviceGetAttribute(&raw mut has, SUPPORTED, self.raw()))?;
        // The kernels' instructions.
        let is_new = self.capability().0 >= 9;
        let why = || format!("device {} ({}) has no multicast", self.ordinal(), self.name());
        Ok(if has == 1 && is_new { None } else { Some(why()) })
    }
}

/// An object that stands for memory of several devices, of which this process's is one.
#[derive(Debug)]
pub struct Multicast {
    functions: &'static MulticastFunctions,
    object: Backing,
}

impl Multicast {
    /// An object of at least so many bytes for so many devices, of which `device` is one.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the device [lacks](Device::lacks_multicast) it.
    pub fn new(device: &Arc<Device>, devices: usize, bytes: usize) -> Result<Self, CudaError> {
        let (on, functions) = (Some(device.ordinal()), of_driver());
        let _entered = device.enter()?;
        let mut properties = MulticastProperties::new(devices, bytes, DESCRIPTOR);
        let (mut granularity, mut handle) = (0, 0);
        let least = sys::CUmulticastGranularity_flags::CU_MULTICAST_GRANULARITY_MINIMUM as u32;
        let (to, of) = (&raw mut granularity, &raw const properties);
        // SAFETY: the driver writes one length, and reads the properties.
        cuda!(functions, on, cuMulticastGetGranularity(to, of, least))?;
        properties.bytes = bytes.next_multiple_of(granularity.max(1));
        let (to, of) = (&raw mut handle, &raw const properties);
        // SAFETY: the driver writes one handle, and reads the properties; `drop` of the backing
        // gives the handle back.
        cuda!(functions, on, cuMulticastCreate(to, of))?;
        let object = Backing { device: device.clone(), handle, bytes: properties.bytes };
        Ok(Self { functions, object })
    }

    /// The object of another process, as its descriptor is imported.
    ///
    /// # Panics
    /// If the device [lacks](Device::lacks_multicast) it.
    pub fn imported(Imported(object): Imported) -> Self {
        Self { functions: of_driver(), object }
    }

    /// The descriptor for other processes, and how long the object is; `None` if the driver gives
    /// none.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn file(&self) -> Result<Option<(OwnedFd, usize)>, CudaError> {
        self.object.file()
    }

    /// Adds this process's device.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn add(&self) -> Result<(), CudaError> {
        let device = &self.object.device;
        let _entered = device.enter()?;
        // SAFETY: the handle is kept.
        cuda!(
            self.functions,
            Some(device.ordinal()),
            cuMulticastAddDevice(self.object.handle, device.raw())
        )
    }

    /// Allocates memory, binds it and maps both. All devices have been added, or this blocks in the
    /// driver, where no deadline reaches.
    ///
    /// # Errors
    /// If the driver fails; nothing is left of it then.
    pub fn bind(self) -> Result<Bound, CudaError> {
        let Self { functions, object } = self;
        let (device, bytes) = (object.device.clone(), object.bytes);
        let on = Some(device.ordinal());
        let entered = device.enter()?;
        let properties = Properties::of_device(device.raw(), DESCRIPTOR);
        let mut handle = 0;
        // SAFETY: the driver writes one handle, and reads the properties; `drop` of the backing
        // gives the handle back.
        cuda!(on, cuMemCreate(&raw mut handle, bytes, &raw const properties, 0))?;
        let memory = Backing { device: device.clone(), handle, bytes };
        // SAFETY: both handles are kept, and as long as this; `drop` of the binding undoes it.
        cuda!(functions, on, cuMulticastBindMem(object.handle, 0, memory.handle, 0, bytes, 0))?;
        let binding = Binding { functions, object, memory };
        // What divides the length is aligned to the granularity, which nobody else may know.
        let alignment = 1 << bytes.trailing_zeros();
        let own = device.window(&[&binding.memory], alignment)?;
        let all = device.window(&[&binding.object], alignment)?;
        drop(entered);
        Ok(Bound { own, all, _binding: binding })
    }
}

fn of_driver() -> &'static MulticastFunctions {
    functions::multicast().expect("whoever uses multicast has asked for it")
}

/// Memory of this device that is bound. Unbound when dropped.
#[derive(Debug)]
struct Binding {
    functions: &'static MulticastFunctions,
    object: Backing,
    memory: Backing,
}

impl Drop for Binding {
    fn drop(&mut self) {
        let (device, bytes) = (&self.object.device, self.memory.bytes);
        let Ok(_entered) = device.enter() else { return };
        // SAFETY: bound once, and nobody uses its addresses any more.
        ipc::let_go(cuda!(
            self.functions,
            Some(device.ordinal()),
            cuMulticastUnbind(self.object.handle, device.raw(), 0, bytes)
        ));
    }
}

/// Memory of this device, and the address that stands for it and for that of all other devices of
/// the object. Given back when dropped; by then, no device uses the address any more.
#[derive(Debug)]
pub struct Bound {
    // Unmapped first.
    own: Window,
    all: Window,
    _binding: Binding,
}

impl Bound {
    /// Where this device's memory lies.
    pub const fn own(&self) -> u64 {
        self.own.base()
    }

    /// The address that stands for that of all devices; nobody may use it before all have theirs.
    pub const fn all(&self) -> u64 {
        self.all.base()
    }
}
