//! Errors of the driver's calls: which device, which call, which code.

use std::ffi::CStr;
use std::fmt;

use cudarc::driver::sys;

use crate::functions::Code;

/// A call of the driver that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaError {
    device: Option<usize>,
    call: &'static str,
    code: u32,
}

impl CudaError {
    /// # Errors
    /// If `result` is not success.
    pub(crate) fn check(
        device: Option<usize>,
        call: &'static str,
        result: Code,
    ) -> Result<(), Self> {
        match result {
            0 => Ok(()),
            code => Err(Self { device, call, code: code.cast_unsigned() }),
        }
    }

    /// The device that it concerns, if one is known.
    pub const fn device(&self) -> Option<usize> {
        self.device
    }

    /// The driver's function.
    pub fn call(&self) -> &'static str {
        // The number of a revision says nothing to a reader.
        self.call.trim_end_matches("_v2")
    }

    /// The driver's code, a `CUresult`.
    pub const fn code(&self) -> u32 {
        self.code
    }

    /// Whether the device has no more memory.
    pub const fn is_out_of_memory(&self) -> bool {
        self.code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32
    }

    /// Whether it is about a stream that is being captured, or one that waits for such a stream.
    pub const fn is_of_capture(&self) -> bool {
        // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED to CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD.
        self.code >= 900 && self.code <= 908
    }

    /// Whether the work is not done yet, which is no failure.
    pub(crate) const fn is_not_ready(&self) -> bool {
        self.code == sys::CUresult::CUDA_ERROR_NOT_READY as u32
    }

    /// The driver's name of the code, such as `CUDA_ERROR_ILLEGAL_ADDRESS`.
    pub fn name(&self) -> String {
        let mut name = std::ptr::null();
        // SAFETY: the driver takes any number, and writes one pointer if it knows it.
        let known = cuda!(None, cuGetErrorName(self.code.cast_signed(), &raw mut name));
        if known.is_err() || name.is_null() {
            return "an unknown error".to_owned();
        }
        // SAFETY: the driver gives a string that ends in zero and stays as long as the library.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(device) = self.device {
            write!(f, "device {device}: ")?;
        }
        write!(f, "{}: {} ({})", self.call(), self.name(), self.code)
    }
}

impl std::error::Error for CudaError {}

/// Calls a function of the driver: `cuda!(device, cuFunction(arguments))`, or one that a driver may
/// lack: `cuda!(functions, device, cuFunction(arguments))`. Why the arguments are
/// what the function needs is said at each use.
macro_rules! cuda {
    ($functions:expr, $device:expr, $call:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: said at each use.
        let result = unsafe { ($functions.$call)($($argument),*) };
        $crate::error::CudaError::check($device, stringify!($call), result)
    }};
    ($device:expr, $call:ident($($argument:expr),* $(,)?)) => {
        $crate::error::cuda!($crate::functions::functions(), $device, $call($($argument),*))
    };
}
pub(crate) use cuda;
