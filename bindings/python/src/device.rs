//! Collectives on the memory of CUDA devices.

use std::ffi::c_void;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;
use unisum::{DeviceCommunicator, DeviceStream, RawDeviceBuffers};

use crate::communicator::Request;
use crate::elements::Element;
use crate::errors::{block, exception};
use crate::tensor::{Layout, Tensor, check_reducible};

/// A rank's device; `unisum.DeviceCommunicator` is built on it.
#[pyclass(frozen, name = "Device", module = "unisum._unisum")]
pub(crate) struct Device {
    inner: RwLock<Option<Arc<DeviceCommunicator>>>,
    rank: usize,
    world: usize,
}

/// How many CUDA devices this process sees; raises if there is no driver or no device.
#[pyfunction]
pub(crate) fn cuda_devices(py: Python<'_>) -> PyResult<usize> {
    unisum::cuda_devices().map_err(|error| exception(py, &error))
}

impl Device {
    pub(crate) fn new(inner: DeviceCommunicator) -> Self {
        let (rank, world) = (inner.rank(), inner.world());
        Self { inner: RwLock::new(Some(Arc::new(inner))), rank, world }
    }

    fn get(&self) -> PyResult<Arc<DeviceCommunicator>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.clone().ok_or_else(|| PyRuntimeError::new_err("the device communicator was closed"))
    }

    fn take(&self) -> Option<Arc<DeviceCommunicator>> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The stream that Python has the handle of.
pub(crate) fn lent(device: &DeviceCommunicator, handle: usize) -> DeviceStream {
    let handle = std::ptr::with_exposed_provenance_mut::<c_void>(handle);
    // SAFETY: the program promised a stream of the device that lives, as the documentation of every
    // call says; a number has no other way to show it.
    unsafe { DeviceStream::from_raw(device, handle) }
}

/// A tensor, or several that are one piece of memory; and streams that compute it.
fn tensor(
    given: &Bound<'_, PyAny>,
    layout: Layout,
    stream: usize,
    producers: &mut Vec<usize>,
) -> PyResult<Option<Tensor>> {
    let mut one = |object: &Bound<'_, PyAny>| {
        let (tensor, producer) = Tensor::on_device(object, layout, stream)?;
        producers.extend(producer);
        Ok::<_, PyErr>(tensor)
    };
    let Ok(list) = given.cast::<PyList>() else { return one(given).map(Some) };
    let mut pieces = list.iter().map(|it| one(&it)).collect::<PyResult<Vec<_>>>()?;
    match pieces.len() {
        0 | 1 => Ok(pieces.pop()),
        _ if Tensor::are_in_a_row(&pieces) => Ok(Some(Tensor::joined(pieces, list))),
        _ => {
            let text = "tensors of a list on a device must lie one behind the other, in one piece";
            Err(PyTypeError::new_err(text))
        }
    }
}

/// Where input and output of a call lie.
struct Places {
    input: Option<Tensor>,
    output: Option<Tensor>,
    in_place: bool,
}

impl Places {
    /// From what Python gave. Without an output the input is in place, and so it is if it lies in
    /// the output where it belongs, or the output in it.
    fn new(
        request: &Request<'_>,
        rank: usize,
        stream: usize,
        producers: &mut Vec<usize>,
    ) -> PyResult<Self> {
        let (layout, own_block) = request.layout(rank);
        let mut of = |given| tensor(given, layout, stream, producers);
        let [input, output] = request.given();
        let Some(output) = output else {
            let both = input.map(&mut of).transpose()?.flatten();
            let both = both.map(Tensor::writable).transpose()?;
            return Ok(Self { input: None, output: both, in_place: true });
        };
        let input = input.map(&mut of).transpose()?.flatten();
        let output = of(output)?.map(Tensor::writable).transpose()?;
        let (Some(from), Some(to)) = (&input, &output) else {
            return Ok(Self { input, output, in_place: false });
        };
        if !from.overlaps(to) {
            return Ok(Self { input, output, in_place: false });
        }
        let ends = |outer: &Tensor, inner: &Tensor| {
            let begin = |block| outer.start + block * inner.bytes();
            outer.bytes() > inner.bytes()
                && own_block.is_some_and(|block| begin(block) == inner.start)
        };
        let is_same = own_block.is_none() && (from.start, from.count) == (to.start, to.count);
        if is_same || ends(to, from) {
            return Ok(Self { input: None, output, in_place: true });
        }
        if ends(from, to) {
            return Ok(Self { input: None, output: input, in_place: true });
        }
        Err(PyValueError::new_err("input and output overlap on the device"))
    }

    fn element(&self) -> PyResult<Element> {
        let mut elements = self.input.iter().chain(&self.output).map(|tensor| tensor.element);
        let Some(first) = elements.next() else { return Element::of_dlpack(1, 8, 1) };
        match elements.find(|&element| element != first) {
            None => Ok(first),
            Some(other) => {
                let (one, other) = (first.dtype, other.dtype);
                let text = format!("Tensors must have the same type: {one}, {other}");
                Err(PyTypeError::new_err(text))
            }
        }
    }

    fn buffers(&self, element: Element) -> RawDeviceBuffers {
        let place = |tensor: &Option<Tensor>| {
            tensor.as_ref().map_or((0, 0), |tensor| (tensor.start as u64, tensor.count))
        };
        let (dtype, output) = (element.dtype, place(&self.output));
        if self.in_place {
            // SAFETY: the tensors are on a device; the program leaves them alone until the
            // collective has ended in its stream, as the documentation of every call says.
            return unsafe { RawDeviceBuffers::in_place(dtype, output.0, output.1) };
        }
        // SAFETY: as above; the two do not overlap.
        unsafe { RawDeviceBuffers::out_of_place(dtype, place(&self.input), output) }
    }
}

pub(crate) fn limit(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    let seconds = |seconds| {
        Duration::try_from_secs_f64(seconds)
            .map_err(|error| PyValueError::new_err(format!("a timeout of {seconds} s: {error}")))
    };
    timeout.map(seconds).transpose()
}

#[pymethods]
impl Device {
    #[getter]
    fn rank(&self) -> usize {
        self.rank
    }

    #[getter]
    fn world(&self) -> usize {
        self.world
    }

    #[getter]
    fn ordinal(&self) -> PyResult<usize> {
        Ok(self.get()?.ordinal())
    }

    fn describe(&self) -> PyResult<String> {
        Ok(self.get()?.describe())
    }

    #[pyo3(signature = (name))]
    fn set_algorithm(&self, py: Python<'_>, name: Option<String>) -> PyResult<()> {
        let set = self.get()?.set_algorithm(name.as_deref());
        set.map_err(|error| exception(py, &error))
    }

    /// Puts a collective into the stream with this handle.
    fn _run(&self, py: Python<'_>, request: Request<'_>, stream: usize) -> PyResult<()> {
        let inner = self.get()?;
        let mut producers = Vec::new();
        let places = Places::new(&request, self.rank, stream, &mut producers)?;
        let element = places.element()?;
        if request.reduces() {
            check_reducible(element, request.op())?;
        }
        let (collective, buffers) = (request.collective(element)?, places.buffers(element));
        block(py, || {
            let lent_stream = lent(&inner, stream);
            for producer in producers.into_iter().filter(|&it| it != stream) {
                lent_stream.follow(&lent(&inner, producer))?;
            }
            inner.run_raw(&collective, buffers, &lent_stream)
        })
    }

    /// Waits until everything in the stream has ended.
    fn _synchronize(&self, py: Python<'_>, stream: usize, timeout: Option<f64>) -> PyResult<()> {
        let (inner, limit) = (self.get()?, limit(timeout)?);
        block(py, || inner.synchronize(&lent(&inner, stream), limit))
    }

    /// Waits, and says whether something infinite or NaN was found since it was last asked.
    fn _take_nonfinite(
        &self,
        py: Python<'_>,
        stream: usize,
        timeout: Option<f64>,
    ) -> PyResult<bool> {
        let (inner, limit) = (self.get()?, limit(timeout)?);
        block(py, || inner.take_nonfinite(&lent(&inner, stream), limit))
    }

    /// Waits for the device and the other ranks. Does nothing the second time.
    fn close(&self, py: Python<'_>) {
        let inner = self.take();
        py.detach(|| drop(inner));
    }

    #[getter]
    fn closed(&self) -> bool {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut inner = self.take();
        // Waits for others: other threads of the program go on meanwhile.
        Python::try_attach(|py| {
            let taken = inner.take();
            py.detach(|| drop(taken));
        });
    }
}
