//! Memory on a device, and streams, as programs have them.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use unisum_cuda_ipc::{CudaError, Device, Event, Stream};
use unisum_kernels::{Dtype, Element};

use super::memories::Owned;
use crate::collective::Lengths;
use crate::{Error, ErrorKind};

/// Elements in the memory of a device, which the devices of other ranks can read without a copy
/// ([`DeviceCommunicator::allocate`](super::DeviceCommunicator::allocate)).
///
/// Collectives use it in the order of their stream, after the call has returned. Dropping it is
/// allowed at any time: the memory is freed once no rank uses it any more.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    pub(super) owned: Owned,
    count: usize,
    elements: PhantomData<T>,
}

impl<T: Element> DeviceBuffer<T> {
    pub(super) const fn new(owned: Owned, count: usize) -> Self {
        Self { owned, count, elements: PhantomData }
    }

    /// The number of elements.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether it has no elements.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Where it begins, in the address space of this process's devices.
    pub fn address(&self) -> u64 {
        self.owned.memory().address()
    }

    /// Copies `elements` into it, from `start` on, after what is in the stream. Blocks until that
    /// is done.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if something in the stream, or the copy, fails;
    /// [`ErrorKind::Configuration`] if the stream is being captured.
    ///
    /// # Panics
    /// If the elements don't fit.
    pub fn write(
        &mut self,
        start: usize,
        elements: &[T],
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        put(self.place(start, elements.len()), elements, stream)
    }

    /// Copies its elements from `start` on into `elements`, after what is in the stream. Blocks
    /// until that is done.
    ///
    /// # Errors
    /// As [`DeviceBuffer::write`].
    ///
    /// # Panics
    /// If there are fewer elements.
    pub fn read(
        &self,
        start: usize,
        elements: &mut [T],
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        get(self.place(start, elements.len()), elements, stream)
    }

    fn place(&self, start: usize, count: usize) -> u64 {
        let fits = start <= self.count && count <= self.count - start;
        assert!(fits, "{count} elements from {start} on of {}", self.count);
        self.address() + (start * size_of::<T>()) as u64
    }
}

impl DeviceBuffer<u8> {
    /// Copies elements of any type to the bytes from `start` on, as [`DeviceBuffer::write`].
    ///
    /// # Errors
    /// As [`DeviceBuffer::write`].
    pub(crate) fn write_elements<U: Element>(
        &self,
        start: usize,
        elements: &[U],
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        put(self.place(start, size_of_val(elements)), elements, stream)
    }

    /// Copies the bytes from `start` on to elements of any type, as [`DeviceBuffer::read`].
    ///
    /// # Errors
    /// As [`DeviceBuffer::write`].
    pub(crate) fn read_elements<U: Element>(
        &self,
        start: usize,
        elements: &mut [U],
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        get(self.place(start, size_of_val(elements)), elements, stream)
    }
}

/// Why streams that are being captured are refused where the host waits for them.
pub(super) const NO_WAITS: &str = "it can't be waited for";

/// Whether the stream is being captured, or another one is which it would wait for: nothing has
/// failed then. `what` says what can't be.
///
/// # Errors
/// That the driver fails, as it also does in whatever call comes after a device has broken.
pub(super) fn capture(stream: &DeviceStream, what: &str) -> Result<Option<Error>, CudaError> {
    let text = match stream.0.is_capturing() {
        Ok(false) => return Ok(None),
        Ok(true) => format!("the stream is being captured into a graph: {what}"),
        Err(error) if error.is_of_capture() => error.to_string(),
        Err(error) => return Err(error),
    };
    Ok(Some(Error::new(ErrorKind::Configuration, text)))
}

/// Before the host waits for a stream, which would end its capture.
///
/// # Errors
/// [`ErrorKind::Configuration`] if it is being captured; [`ErrorKind::Device`] if the driver fails.
fn refuse_waits(stream: &DeviceStream) -> Result<(), Error> {
    capture(stream, NO_WAITS).map_err(device_error)?.map_or(Ok(()), Err)
}

/// Copies elements to a place on the device that has room for them.
fn put<T: Element>(at: u64, elements: &[T], stream: &DeviceStream) -> Result<(), Error> {
    let bytes = size_of_val(elements);
    refuse_waits(stream)?;
    if bytes == 0 {
        // The driver takes no address at the end of an allocation.
        return stream.0.synchronize().map_err(device_error);
    }
    // SAFETY: the place has so many bytes, and the host's stay until it is done, just below.
    let copied = unsafe { stream.0.copy_to_device(at, elements.as_ptr().cast(), bytes) };
    copied.and_then(|()| stream.0.synchronize()).map_err(device_error)
}

/// Copies elements from a place on the device that has as many.
fn get<T: Element>(at: u64, elements: &mut [T], stream: &DeviceStream) -> Result<(), Error> {
    let bytes = size_of_val(elements);
    refuse_waits(stream)?;
    // Whatever the device's memory holds has to be a value of the type: all but truth values
    // take any bits.
    if T::DTYPE == Dtype::Bool {
        let mut copy = vec![0_u8; bytes];
        fetch(at, copy.as_mut_ptr(), bytes, stream)?;
        let to = elements.as_mut_ptr().cast::<u8>();
        for (index, byte) in copy.iter().enumerate() {
            let to = to.wrapping_add(index);
            // SAFETY: the elements are one byte each, and there are as many.
            unsafe { to.write(u8::from(*byte != 0)) };
        }
        return Ok(());
    }
    fetch(at, elements.as_mut_ptr().cast(), bytes, stream)
}

fn fetch(at: u64, to: *mut u8, bytes: usize, stream: &DeviceStream) -> Result<(), Error> {
    if bytes == 0 {
        return stream.0.synchronize().map_err(device_error);
    }
    // SAFETY: the place has so many bytes, and the host's are lent until it is done, below.
    let copied = unsafe { stream.0.copy_to_host(to, at, bytes) };
    copied.and_then(|()| stream.0.synchronize()).map_err(device_error)
}

/// A stream of a device, in which collectives are ordered.
#[derive(Debug)]
pub struct DeviceStream(pub(super) Stream);

impl DeviceStream {
    pub(super) const fn new(stream: Stream) -> Self {
        Self(stream)
    }

    /// A stream of the program, a `CUstream` or `cudaStream_t`. Null is the legacy default stream.
    /// It is not destroyed with the result.
    ///
    /// # Safety
    /// It is a stream of the primary context of the communicator's device, and lives as long as the
    /// result, and as long as collectives in it have not ended.
    pub unsafe fn from_raw(communicator: &super::DeviceCommunicator, stream: *mut c_void) -> Self {
        let device: &Arc<Device> = communicator.device();
        // SAFETY: the caller promised it.
        Self(unsafe { Stream::lent(device, stream) })
    }

    /// The driver's handle, a `CUstream`.
    pub fn raw(&self) -> *mut c_void {
        self.0.raw()
    }
}

impl DeviceStream {
    /// What is put in this stream from now on begins after what is in `other` now. The host waits
    /// for neither.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the driver fails.
    pub fn follow(&self, other: &Self) -> Result<(), Error> {
        let followed = || {
            let event = Event::new(other.0.device(), false)?;
            event.record(&other.0)?;
            self.0.wait(&event)
        };
        followed().map_err(device_error)
    }
}

/// A moment in a stream, with the time of it: [`DeviceCommunicator::event`].
///
/// [`DeviceCommunicator::event`]: super::DeviceCommunicator::event
#[derive(Debug)]
pub struct DeviceEvent(pub(super) Event);

impl DeviceEvent {
    /// It happens when everything that is now in the stream has ended.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the driver fails.
    pub fn record(&self, stream: &DeviceStream) -> Result<(), Error> {
        self.0.record(&stream.0).map_err(device_error)
    }

    /// Whether it has happened, or was never recorded.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if something before it failed.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.0.is_done().map_err(device_error)
    }

    /// Seconds from `earlier` to this, by the device's clock. Both have happened.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the driver fails, or one has not happened.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64, Error> {
        self.0.seconds_since(&earlier.0).map_err(device_error)
    }
}

/// The device memory of a call without a static element type, as [`RawBuffers`](crate::RawBuffers)
/// for memory of the host.
#[derive(Clone, Copy, Debug)]
pub struct RawDeviceBuffers {
    pub(super) dtype: Dtype,
    /// Address and elements; `None` in place.
    pub(super) input: Option<(u64, usize)>,
    pub(super) output: (u64, usize),
}

impl RawDeviceBuffers {
    /// One buffer of `count` elements for input and output, as
    /// [`Buffers::InPlace`](crate::Buffers::InPlace).
    ///
    /// # Safety
    /// `count` aligned elements lie there on the communicator's device until the collective has
    /// ended in its stream, and nothing outside of the stream reads or writes them meanwhile.
    pub const unsafe fn in_place(dtype: Dtype, address: u64, count: usize) -> Self {
        Self { dtype, input: None, output: (address, count) }
    }

    /// Input and output apart, address and number of elements of each, as
    /// [`Buffers::OutOfPlace`](crate::Buffers::OutOfPlace).
    ///
    /// # Safety
    /// As [`RawDeviceBuffers::in_place`] for both, but that others may read the input. They do not
    /// overlap.
    pub const unsafe fn out_of_place(
        dtype: Dtype,
        input: (u64, usize),
        output: (u64, usize),
    ) -> Self {
        Self { dtype, input: Some(input), output }
    }

    /// The element type.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(super) const fn is_in_place(&self) -> bool {
        self.input.is_none()
    }

    pub(super) const fn lengths(&self) -> Lengths {
        match self.input {
            None => Lengths::InPlace(self.output.1),
            Some((_, input)) => Lengths::OutOfPlace { input, output: self.output.1 },
        }
    }
}

/// A failure of the driver as an error, outside of collectives.
pub(super) fn device_error(error: CudaError) -> Error {
    Error::new(ErrorKind::Device, error.to_string())
}
