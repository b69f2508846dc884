//! The driver: a library that may be absent, of some version, with some devices.

use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::error::{CudaError, cuda};
use crate::functions;

/// Why there are no CUDA devices for this process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Absent {
    /// The library could not be opened.
    #[error("there is no CUDA driver: libcuda.so.1 can't be opened")]
    NoLibrary,
    /// The library lacks functions.
    #[error("the CUDA driver is too old: its libcuda.so.1 has no {missing}")]
    TooOld {
        /// The first function that it lacks.
        missing: &'static str,
    },
    /// There is a driver, but no device that it shows to this process.
    #[error("there is a CUDA driver, but no device (CUDA_VISIBLE_DEVICES may hide them)")]
    NoDevice,
    /// The driver does not start.
    #[error("the CUDA driver does not start: {0}")]
    Failed(#[from] CudaError),
}

/// The driver of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    version: u32,
    devices: usize,
}

impl Driver {
    /// Finds and starts the driver, once for the process.
    ///
    /// # Errors
    /// [`Absent`] says why there is none; later calls repeat it.
    pub fn find() -> Result<&'static Self, Absent> {
        static FOUND: OnceLock<Result<Driver, Absent>> = OnceLock::new();
        FOUND.get_or_init(Self::start).as_ref().map_err(Clone::clone)
    }

    fn start() -> Result<Self, Absent> {
        // SAFETY: opens the driver's library, whose initialisers are made for that.
        if !unsafe { sys::is_culib_present() } {
            return Err(Absent::NoLibrary);
        }
        functions::load().map_err(|missing| Absent::TooOld { missing })?;
        let no_device = sys::CUresult::CUDA_ERROR_NO_DEVICE as u32;
        // SAFETY: takes no memory.
        match cuda!(None, cuInit(0)) {
            Err(error) if error.code() == no_device => return Err(Absent::NoDevice),
            result => result?,
        }
        let (mut version, mut devices) = (0, 0);
        // SAFETY: the driver writes one number.
        cuda!(None, cuDriverGetVersion(&raw mut version))?;
        // SAFETY: as above.
        cuda!(None, cuDeviceGetCount(&raw mut devices))?;
        match usize::try_from(devices) {
            Ok(0) | Err(_) => Err(Absent::NoDevice),
            Ok(devices) => Ok(Self { version: u32::try_from(version).unwrap_or(0), devices }),
        }
    }

    /// The version of CUDA that it supports: major and minor.
    pub const fn version(&self) -> (u32, u32) {
        (self.version / 1000, self.version % 1000 / 10)
    }

    /// The number of devices that this process sees.
    pub const fn devices(&self) -> usize {
        self.devices
    }
}

/// One line about the driver of this machine, for people: its version and devices, or why there is
/// none.
pub fn describe() -> String {
    match Driver::find() {
        Ok(driver) => {
            let (major, minor) = driver.version();
            let devices = driver.devices();
            let plural = if devices == 1 { "" } else { "s" };
            format!("CUDA {major}.{minor}, {devices} device{plural}")
        }
        Err(absent) => absent.to_string(),
    }
}
