//! Gradient buckets in the memory of CUDA devices; `unisum.DeviceBuckets` is built on this.

use std::ffi::c_void;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pyo3::exceptions::{PyAttributeError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use unisum::Dtype;
use unisum::buckets::{DevicePlace, DeviceStep, Parameter};

use crate::array::{export, typestr};
use crate::buckets::{
    busy, closed, no_step, parameter_of, parameters_of, step_open, with_gradient,
};
use crate::communicator::Communicator;
use crate::device::{lent, limit};
use crate::dlpack::{CUDA, Device};
use crate::elements::name_of;
use crate::errors::{block, exception};
use crate::tensor::{Layout, Tensor};

/// The gradients of a model in buckets on a device.
#[pyclass(frozen, name = "DeviceBuckets", module = "unisum._unisum")]
pub(crate) struct DeviceBuckets {
    state: RwLock<State>,
    parameters: Vec<Parameter>,
}

struct State {
    /// The step under way, which borrows the buckets. Before them: it is dropped first.
    step: Option<DeviceStep<'static>>,
    /// None once they are closed.
    buckets: Option<Box<unisum::buckets::DeviceBuckets>>,
}

impl State {
    fn step(&self) -> PyResult<&DeviceStep<'static>> {
        self.step.as_ref().ok_or_else(no_step)
    }

    fn buckets(&self) -> PyResult<&unisum::buckets::DeviceBuckets> {
        self.buckets.as_deref().ok_or_else(closed)
    }

    /// The buckets between two steps.
    fn idle(&mut self) -> PyResult<&mut unisum::buckets::DeviceBuckets> {
        match self.step {
            Some(_) => Err(step_open()),
            None => self.buckets.as_deref_mut().ok_or_else(closed),
        }
    }
}

impl DeviceBuckets {
    // As of buckets on the host, nobody waits for these locks.

    fn alone(&self) -> PyResult<RwLockWriteGuard<'_, State>> {
        self.state.try_write().map_err(|_| busy())
    }

    fn shared(&self) -> PyResult<RwLockReadGuard<'_, State>> {
        self.state.try_read().map_err(|_| busy())
    }

    /// The memory of the host that a gradient is copied from, or to.
    fn on_host(&self, parameter: usize, given: &Bound<'_, PyAny>) -> PyResult<(Dtype, Tensor)> {
        let known = parameter_of(&self.parameters, parameter)?;
        let tensor = Tensor::of(given, Layout::Contiguous)?;
        if tensor.element.dtype != known.dtype() {
            let text = format!("{known} was given elements of {}", tensor.element.dtype);
            return Err(PyTypeError::new_err(text));
        }
        Ok((known.dtype(), tensor))
    }
}

#[pymethods]
impl DeviceBuckets {
    #[getter]
    fn ordinal(&self) -> PyResult<usize> {
        Ok(self.shared()?.buckets()?.device().ordinal())
    }

    fn describe(&self) -> PyResult<String> {
        Ok(self.shared()?.buckets()?.device().describe())
    }

    /// Begins a step.
    fn _begin(&self, py: Python<'_>) -> PyResult<()> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        let step = block(py, || buckets.begin())?;
        // SAFETY: the step is dropped before the buckets, which stay where they are in their box,
        // and which nobody has for itself while there is a step: `idle` sees to it.
        let step = unsafe { std::mem::transmute::<DeviceStep<'_>, DeviceStep<'static>>(step) };
        state.step = Some(step);
        Ok(())
    }

    /// A parameter's gradient where it lies.
    fn _gradient(&self, parameter: usize) -> PyResult<DeviceArray> {
        let shape = parameter_of(&self.parameters, parameter)?.shape().to_vec();
        let place = self.shared()?.buckets()?.place(parameter);
        Ok(DeviceArray { place, shape })
    }

    /// Marks a gradient ready, once the stream has come so far.
    fn _ready(&self, py: Python<'_>, parameter: usize, stream: usize) -> PyResult<()> {
        let state = self.shared()?;
        let step = state.step()?;
        let marked = py.detach(|| step.ready(parameter, &lent(step.device(), stream)));
        marked.map_err(|error| exception(py, &error))
    }

    /// Copies a gradient from the host, and marks it ready.
    fn _put(
        &self,
        py: Python<'_>,
        parameter: usize,
        gradient: &Bound<'_, PyAny>,
        stream: usize,
    ) -> PyResult<()> {
        let (dtype, tensor) = self.on_host(parameter, gradient)?;
        let state = self.shared()?;
        let step = state.step()?;
        with_gradient!(dtype, T => {
            let elements = tensor.as_slice::<T>();
            py.detach(|| step.put::<T>(parameter, elements, &lent(step.device(), stream)))
        })
        .map_err(|error| exception(py, &error))
    }

    /// Ends the step: the stream waits for its averages.
    fn _wait(&self, py: Python<'_>, stream: usize) -> PyResult<()> {
        // Kept: the buckets may not be closed meanwhile.
        let mut state = self.alone()?;
        state.step()?;
        let step = state.step.take().unwrap_or_else(|| unreachable!("it was looked at"));
        block(py, move || {
            let stream = lent(step.device(), stream);
            step.wait(&stream)
        })
    }

    /// Fails the step under way on all ranks, if there is one.
    fn _drop_step(&self, py: Python<'_>, why: &str) -> PyResult<()> {
        let step = self.alone()?.step.take();
        if let Some(step) = step {
            py.detach(|| step.abandon(why));
        }
        Ok(())
    }

    /// Copies a gradient to the host, after what is in the stream.
    fn _read(
        &self,
        py: Python<'_>,
        parameter: usize,
        to: &Bound<'_, PyAny>,
        stream: usize,
    ) -> PyResult<()> {
        let (dtype, tensor) = self.on_host(parameter, to)?;
        let mut tensor = tensor.writable()?;
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        with_gradient!(dtype, T => {
            let elements = tensor.as_mut_slice::<T>();
            py.detach(|| buckets.read::<T>(parameter, elements, &lent(buckets.device(), stream)))
        })
        .map_err(|error| exception(py, &error))
    }

    /// Waits until everything in the stream has ended.
    fn _synchronize(&self, py: Python<'_>, stream: usize, timeout: Option<f64>) -> PyResult<()> {
        let (state, limit) = (self.shared()?, limit(timeout)?);
        let device = state.buckets()?.device();
        block(py, || device.synchronize(&lent(device, stream), limit))
    }

    /// Waits, and says whether an average since it was last asked is infinite or NaN.
    fn _take_nonfinite(
        &self,
        py: Python<'_>,
        stream: usize,
        timeout: Option<f64>,
    ) -> PyResult<bool> {
        let (mut state, limit) = (self.alone()?, limit(timeout)?);
        let buckets = state.idle()?;
        let stream = lent(buckets.device(), stream);
        block(py, || buckets.take_nonfinite(&stream, limit))
    }

    /// The parameters of each bucket.
    fn _layout(&self) -> PyResult<Vec<Vec<usize>>> {
        let state = self.shared()?;
        Ok(state.buckets()?.layout().buckets().map(<[usize]>::to_vec).collect())
    }

    /// Ends them. A step under way fails on all ranks.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut state = self.alone()?;
        let ended = (state.step.take(), state.buckets.take());
        drop(state);
        py.detach(|| drop(ended));
        Ok(())
    }
}

impl Drop for DeviceBuckets {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut ended = Some((state.step.take(), state.buckets.take()));
        // As of buckets on the host.
        Python::try_attach(|py| {
            let ended = ended.take();
            py.detach(|| drop(ended));
        });
    }
}

/// Makes buckets for a model's parameters on a device: name, shape, type, uses of each.
#[pyfunction]
pub(crate) fn make_device_buckets(
    py: Python<'_>,
    communicator: &Communicator,
    ordinal: usize,
    parameters: Vec<(String, Vec<usize>, String, usize)>,
    bucket_bytes: Option<usize>,
    end_bucket_bytes: Option<usize>,
    detect_nonfinite: bool,
) -> PyResult<DeviceBuckets> {
    let inner = communicator.get()?;
    let parameters = parameters_of(parameters)?;
    let mut builder = unisum::buckets::DeviceBuckets::builder(&inner);
    builder = builder.detect_nonfinite(detect_nonfinite);
    if let Some(bytes) = bucket_bytes {
        builder = builder.bucket_bytes(bytes);
    }
    if let Some(bytes) = end_bucket_bytes {
        builder = builder.end_bucket_bytes(bytes);
    }
    let made = block(py, || builder.build(ordinal, &parameters))?;
    let state = RwLock::new(State { step: None, buckets: Some(Box::new(made)) });
    Ok(DeviceBuckets { state, parameters })
}

/// A gradient in the memory of a device, shown to CuPy, PyTorch and Numba where it lies.
#[pyclass(frozen, name = "DeviceArray", module = "unisum")]
#[derive(Debug)]
pub(crate) struct DeviceArray {
    place: DevicePlace,
    shape: Vec<usize>,
}

#[pymethods]
impl DeviceArray {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// The element type's name.
    #[getter]
    fn dtype(&self) -> &'static str {
        name_of(self.place.dtype())
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.place.count() * self.place.dtype().bytes()
    }

    /// The number of the device in this process.
    #[getter]
    fn ordinal(&self) -> usize {
        self.place.ordinal()
    }

    fn __len__(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    fn __repr__(&self) -> String {
        let (dtype, ordinal) = (self.dtype(), self.place.ordinal());
        format!("unisum.DeviceArray(shape={:?}, dtype={dtype}, device={ordinal})", self.shape)
    }

    /// As a PyTorch tensor over the same memory.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let torch = slf.py().import(intern!(slf.py(), "torch"))?;
        torch.call_method1(intern!(slf.py(), "from_dlpack"), (slf,))
    }

    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.place.dtype() == Dtype::Bf16 {
            // Others would take its elements for integers.
            let text = "__cuda_array_interface__ has no bfloat16: use DLPack";
            return Err(PyAttributeError::new_err(text));
        }
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", PyTuple::new(py, &self.shape)?)?;
        interface.set_item("typestr", typestr(self.place.dtype()))?;
        interface.set_item("data", (self.place.address(), false))?;
        // The program orders its streams with a step's.
        interface.set_item("stream", py.None())?;
        Ok(interface)
    }

    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(
        slf: &Bound<'py, Self>,
        _options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let Self { place, shape } = slf.get();
        let address = std::ptr::without_provenance_mut::<c_void>(place.address() as usize);
        let owner = slf.clone().into_any().unbind();
        let number = place.ordinal() as i32; // devices are few
        export(slf.py(), address, (shape, place.dtype()), Device { kind: CUDA, number }, owner)
    }

    fn __dlpack_device__(&self) -> (i32, usize) {
        (CUDA, self.place.ordinal())
    }
}
