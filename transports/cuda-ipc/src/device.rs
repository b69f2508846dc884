//! A device, its primary context, and what this process holds there.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use cudarc::driver::sys;

use crate::driver::{Absent, Driver};
use crate::error::{CudaError, cuda};
use crate::ipc::Opened;
use crate::kernels::Kernels;

/// Why a device can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver or no device.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// No device has this number.
    #[error("there is no device {ordinal}: this process sees {devices}")]
    NoSuch {
        /// The number that was given.
        ordinal: usize,
        /// How many devices there are.
        devices: usize,
    },
    /// The device is older than the kernels.
    #[error("device {ordinal} ({name}) has compute capability {major}.{minor}; 7.0 is needed")]
    TooOld {
        /// The device.
        ordinal: usize,
        /// What the driver calls it.
        name: String,
        /// Its compute capability.
        major: u32,
        /// The second number of it.
        minor: u32,
    },
    /// A call of the driver failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// A device of this process with its primary context, which frameworks use too.
pub struct Device {
    ordinal: usize,
    raw: sys::CUdevice,
    context: sys::CUcontext,
    uuid: [u8; 16],
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    kernels: OnceLock<Kernels>,
    multimem_kernels: OnceLock<Kernels>,
    /// Memory of other processes that is open here, by handle.
    pub(crate) opened: Mutex<HashMap<crate::ipc::Key, Weak<Opened>>>,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Device {}
// SAFETY: as above, by several at once.
unsafe impl Sync for Device {}

/// The device's context is current on this thread as long as this lives.
#[derive(Debug)]
pub(crate) struct Entered(());

impl Device {
    /// The device of this number, with its primary context. All callers share one.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        static OPEN: OnceLock<Mutex<HashMap<usize, Weak<Device>>>> = OnceLock::new();
        let devices = Driver::find()?.devices();
        if ordinal >= devices {
            return Err(DeviceError::NoSuch { ordinal, devices });
        }
        let mut open = lock(OPEN.get_or_init(Mutex::default));
        if let Some(device) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(device);
        }
        let device = Arc::new(Self::retain(ordinal)?);
        open.insert(ordinal, Arc::downgrade(&device));
        Ok(device)
    }

    fn retain(ordinal: usize) -> Result<Self, DeviceError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let (number, mut raw) = (i32::try_from(ordinal).unwrap_or(i32::MAX), 0);
        let on = Some(ordinal);
        // SAFETY: the driver writes one number.
        cuda!(on, cuDeviceGet(&raw mut raw, number))?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the driver writes one number.
            let got = cuda!(on, cuDeviceGetAttribute(&raw mut value, attribute, raw));
            got.map(|()| u32::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut letters = [0_u8; 256];
        // SAFETY: the driver writes at most so many letters, the last of them zero.
        cuda!(on, cuDeviceGetName(letters.as_mut_ptr().cast(), letters.len() as i32, raw))?;
        let name = CStr::from_bytes_until_nul(&letters).unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        if major < 7 {
            return Err(DeviceError::TooOld { ordinal, name, major, minor });
        }
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the driver writes 16 bytes.
        cuda!(on, cuDeviceGetUuid_v2(&raw mut uuid, raw))?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver writes one pointer; `drop` gives the context back.
        cuda!(on, cuDevicePrimaryCtxRetain(&raw mut context, raw))?;
        Ok(Self {
            ordinal,
            raw,
            context,
            uuid: uuid.bytes.map(|byte| byte as u8),
            name,
            capability: (major, minor),
            multiprocessors: multiprocessors.max(1),
            kernels: OnceLock::new(),
            multimem_kernels: OnceLock::new(),
            opened: Mutex::default(),
        })
    }

    /// Its number in this process.
    pub const fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub(crate) const fn raw(&self) -> sys::CUdevice {
        self.raw
    }

    /// What tells it from every other device, on all hosts and in all processes.
    pub const fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability: major and minor.
    pub const fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// How many multiprocessors it has.
    pub const fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Its kernels, loaded on first use.
    ///
    /// # Errors
    /// If the driver refuses them.
    pub fn kernels(&self) -> Result<&Kernels, CudaError> {
        self.loaded(&self.kernels, Kernels::load)
    }

    /// Its kernels for which the switch adds ([`Kernels::multimem`]), loaded on first use.
    ///
    /// # Errors
    /// If the driver refuses them.
    pub fn multimem_kernels(&self) -> Result<&Kernels, CudaError> {
        self.loaded(&self.multimem_kernels, Kernels::load_multimem)
    }

    fn loaded<'a>(
        &self,
        place: &'a OnceLock<Kernels>,
        load: impl FnOnce(&Self) -> Result<Kernels, CudaError>,
    ) -> Result<&'a Kernels, CudaError> {
        if let Some(kernels) = place.get() {
            return Ok(kernels);
        }
        let mut loaded = Some(load(self)?);
        let kernels = place.get_or_init(|| loaded.take().expect("it is asked for once"));
        if let Some(mut second) = loaded {
            // Another thread was faster.
            second.unload(self);
        }
        Ok(kernels)
    }

    /// Whether this process's devices with these UUIDs can all be read and written from this one
    /// (the device itself can). A device that this process does not see is looked for in vain.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn reaches(&self, uuid: [u8; 16]) -> Result<Reach, CudaError> {
        if uuid == self.uuid {
            return Ok(Reach::Same);
        }
        let devices = Driver::find().map_or(0, Driver::devices);
        for ordinal in 0..i32::try_from(devices).unwrap_or(0) {
            let (mut raw, mut other) = (0, sys::CUuuid { bytes: [0; 16] });
            let on = Some(self.ordinal);
            // SAFETY: the driver writes one number.
            cuda!(on, cuDeviceGet(&raw mut raw, ordinal))?;
            // SAFETY: the driver writes 16 bytes.
            cuda!(on, cuDeviceGetUuid_v2(&raw mut other, raw))?;
            if other.bytes.map(|byte| byte as u8) == uuid {
                let mut can = 0;
                // SAFETY: the driver writes one number.
                cuda!(on, cuDeviceCanAccessPeer(&raw mut can, self.raw, raw))?;
                return Ok(if can == 1 { Reach::Peer } else { Reach::NoAccess });
            }
        }
        Ok(Reach::Unseen)
    }

    /// Lets this device use memory that this process has on `other`.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn enable_peer(&self, other: &Self) -> Result<(), CudaError> {
        if self.ordinal == other.ordinal {
            return Ok(());
        }
        let already = sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as u32;
        let _entered = self.enter()?;
        // SAFETY: the other device's context lives as long as `other`.
        match cuda!(Some(self.ordinal), cuCtxEnablePeerAccess(other.context, 0)) {
            Err(error) if error.code() == already => Ok(()),
            result => result,
        }
    }

    /// Makes its context current on this thread for a while.
    pub(crate) fn enter(&self) -> Result<Entered, CudaError> {
        // SAFETY: the context lives as long as `self`, and `Entered` takes it off again.
        cuda!(Some(self.ordinal), cuCtxPushCurrent_v2(self.context))?;
        Ok(Entered(()))
    }
}

/// How a device gets at the memory of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It is the same device.
    Same,
    /// By peer access.
    Peer,
    /// The hardware or the system has no peer access between the two.
    NoAccess,
    /// This process does not see the other device.
    Unseen,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver writes one pointer. It is the one that was pushed: the calls in
        // between leave the stack of contexts alone.
        let _popped = cuda!(None, cuCtxPopCurrent_v2(&raw mut context));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        for mut kernels in [self.kernels.take(), self.multimem_kernels.take()].into_iter().flatten()
        {
            kernels.unload(self);
        }
        // SAFETY: retained once in `retain`. Nothing of the device is left: everything holds it.
        let _released = cuda!(Some(self.ordinal), cuDevicePrimaryCtxRelease_v2(self.raw));
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {} ({})", self.ordinal, self.name)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
