//! Streams and events: what is ordered on a device.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::device::Device;
use crate::error::{CudaError, cuda};

/// A stream of a device: its own, or one that the program lends.
pub struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
    owned: bool,
}

// SAFETY: the driver's streams may be used by any thread.
unsafe impl Send for Stream {}
// SAFETY: as above, by several at once.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream, which does not wait for the legacy default stream.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the driver writes one pointer; `drop` destroys the stream.
        cuda!(Some(device.ordinal()), cuStreamCreate(&raw mut raw, flags))?;
        Ok(Self { device: device.clone(), raw, owned: true })
    }

    /// A stream of the program, a `CUstream` or `cudaStream_t`; null is the legacy default stream.
    ///
    /// # Safety
    /// It is a stream of this device's primary context, and is not destroyed as long as the result
    /// lives.
    pub unsafe fn lent(device: &Arc<Device>, raw: *mut c_void) -> Self {
        Self { device: device.clone(), raw: raw.cast(), owned: false }
    }

    /// The device that it is of.
    pub const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The driver's handle.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    pub(crate) const fn handle(&self) -> sys::CUstream {
        self.raw
    }

    /// Whether what is put in it is recorded for a graph.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn is_capturing(&self) -> Result<bool, CudaError> {
        let _entered = self.device.enter()?;
        let mut status = 0;
        // SAFETY: the stream lives; the driver writes one number.
        cuda!(self.on(), cuStreamIsCapturing(self.raw, &raw mut status))?;
        Ok(status != 0)
    }

    /// Whether everything in it is done.
    ///
    /// # Errors
    /// If something in it failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the stream lives.
        ready(cuda!(self.on(), cuStreamQuery(self.raw)))
    }

    /// Blocks until everything in it is done.
    ///
    /// # Errors
    /// If something in it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the stream lives.
        cuda!(self.on(), cuStreamSynchronize(self.raw))
    }

    /// What is put in it from now on begins after `event`.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: both live.
        cuda!(self.on(), cuStreamWaitEvent(self.raw, event.raw, 0))
    }

    /// Copies on the device, or between two of them.
    ///
    /// # Safety
    /// So many bytes are at both addresses, until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the caller promised it.
        cuda!(self.on(), cuMemcpyAsync(to, from, bytes, self.raw))
    }

    /// Copies to the host.
    ///
    /// # Safety
    /// As [`Stream::copy`]; the host leaves its bytes alone until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    pub unsafe fn copy_to_host(&self, to: *mut u8, from: u64, n: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the caller promised it.
        cuda!(self.on(), cuMemcpyDtoHAsync_v2(to.cast(), from, n, self.raw))
    }

    /// Copies from the host.
    ///
    /// # Safety
    /// As [`Stream::copy_to_host`].
    ///
    /// # Errors
    /// If the driver fails.
    pub unsafe fn copy_to_device(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the caller promised it.
        cuda!(self.on(), cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.raw))
    }

    fn on(&self) -> Option<usize> {
        Some(self.device.ordinal())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: created once, and nobody has it any more. What is in it goes on to its end.
        let destroyed = cuda!(self.on(), cuStreamDestroy_v2(self.raw));
        if let Err(error) = destroyed {
            tracing::debug!("{error}");
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {:p} of device {}", self.raw, self.device.ordinal())
    }
}

/// A moment in a stream.
pub struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: the driver's events may be used by any thread.
unsafe impl Send for Event {}
// SAFETY: as above, by several at once.
unsafe impl Sync for Event {}

impl Event {
    /// An event, which takes times if asked to.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn new(device: &Arc<Device>, takes_times: bool) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = match takes_times {
            true => sys::CUevent_flags_enum::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING,
        };
        // SAFETY: the driver writes one pointer; `drop` destroys the event.
        cuda!(Some(device.ordinal()), cuEventCreate(&raw mut raw, flags as u32))?;
        Ok(Self { device: device.clone(), raw })
    }

    /// It happens when everything that is now in the stream is done.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: both live.
        cuda!(self.on(), cuEventRecord(self.raw, stream.handle()))
    }

    /// Whether it has happened, or was never recorded.
    ///
    /// # Errors
    /// If something before it failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the event lives.
        ready(cuda!(self.on(), cuEventQuery(self.raw)))
    }

    /// Seconds from `earlier` to this; both take times and have happened.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64, CudaError> {
        let _entered = self.device.enter()?;
        let mut milliseconds = 0.0;
        // SAFETY: both live; the driver writes one number.
        cuda!(self.on(), cuEventElapsedTime(&raw mut milliseconds, earlier.raw, self.raw))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn on(&self) -> Option<usize> {
        Some(self.device.ordinal())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: created once, and nobody has it any more.
        let destroyed = cuda!(self.on(), cuEventDestroy_v2(self.raw));
        if let Err(error) = destroyed {
            tracing::debug!("{error}");
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {:p} of device {}", self.raw, self.device.ordinal())
    }
}

/// "Not ready" is no failure.
fn ready(result: Result<(), CudaError>) -> Result<bool, CudaError> {
    match result {
        Err(error) if error.is_not_ready() => Ok(false),
        result => result.map(|()| true),
    }
}
