//! Arrays in registered memory, shown to NumPy and PyTorch where they lie.

use std::ffi::c_void;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use pyo3::{ffi, intern};
use unisum::buckets::Place;
use unisum::{Buffer, Dtype};

use crate::dlpack::{CPU, DataType, Device, Managed, View};
use crate::elements::{dlpack_of, name_of};

/// A zeroed array in memory that all ranks of the host reach without a copy.
#[pyclass(frozen, name = "Array", module = "unisum")]
#[derive(Debug)]
pub(crate) struct Array {
    memory: Memory,
    shape: Vec<usize>,
    dtype: Dtype,
}

#[derive(Debug)]
enum Memory {
    Own(Buffer<u8>),
    /// Of buckets, weights or shards.
    Lent(Place),
}

/// What an exported view needs as long as it lives.
struct Exported {
    managed: Managed,
    shape: Vec<i64>,
    _owner: Py<PyAny>,
}

impl Array {
    pub(crate) const fn new(memory: Buffer<u8>, shape: Vec<usize>, dtype: Dtype) -> Self {
        Self { memory: Memory::Own(memory), shape, dtype }
    }

    /// What lies at a place, in this shape.
    pub(crate) const fn of_place(place: Place, shape: Vec<usize>, dtype: Dtype) -> Self {
        Self { memory: Memory::Lent(place), shape, dtype }
    }

    fn address(&self) -> usize {
        match &self.memory {
            Memory::Own(memory) => memory.as_ptr() as usize,
            Memory::Lent(place) => place.start().as_ptr() as usize,
        }
    }

    fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

#[pymethods]
impl Array {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// The element type's name.
    #[getter]
    fn dtype(&self) -> &'static str {
        name_of(self.dtype)
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.count() * self.dtype.bytes()
    }

    fn __len__(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    fn __repr__(&self) -> String {
        format!("unisum.Array(shape={:?}, dtype={})", self.shape, name_of(self.dtype))
    }

    /// As a NumPy array over the same memory. Types that NumPy lacks need the package `ml_dtypes`;
    /// without it they are shown as unsigned integers.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let array =
            py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "asarray"), (slf,))?;
        let dtype = slf.get().dtype;
        if !matches!(dtype, Dtype::Bf16 | Dtype::F8E4M3 | Dtype::F8E5M2) {
            return Ok(array);
        }
        match py.import("ml_dtypes") {
            Ok(module) => {
                array.call_method1(intern!(py, "view"), (module.getattr(name_of(dtype))?,))
            }
            Err(_) => Ok(array),
        }
    }

    /// As a PyTorch tensor over the same memory.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let torch = slf.py().import(intern!(slf.py(), "torch"))?;
        torch.call_method1(intern!(slf.py(), "from_dlpack"), (slf,))
    }

    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", PyTuple::new(py, &self.shape)?)?;
        interface.set_item("typestr", typestr(self.dtype))?;
        interface.set_item("data", (self.address(), false))?;
        Ok(interface)
    }

    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(
        slf: &Bound<'py, Self>,
        _options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let array = slf.get();
        let (address, device) = (array.address() as *mut c_void, Device { kind: CPU, number: 0 });
        let owner = slf.clone().into_any().unbind();
        export(slf.py(), address, (&array.shape, array.dtype), device, owner)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (CPU, 0)
    }
}

impl Array {
    /// What its memory is, for calls that it is given to.
    pub(crate) fn parts(&self) -> (usize, usize, Dtype) {
        (self.address(), self.count(), self.dtype)
    }
}

/// How NumPy writes a type.
pub(crate) fn typestr(dtype: Dtype) -> String {
    let letter = match dtype {
        Dtype::F16 | Dtype::F32 | Dtype::F64 => 'f',
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => 'i',
        Dtype::Bool => 'b',
        _ => 'u',
    };
    let order = if cfg!(target_endian = "little") { '<' } else { '>' };
    let order = if dtype.bytes() == 1 { '|' } else { order };
    format!("{order}{letter}{}", dtype.bytes())
}

/// A capsule of DLPack's for memory that is there as long as the owner.
pub(crate) fn export<'py>(
    py: Python<'py>,
    address: *mut c_void,
    (shape, dtype): (&[usize], Dtype),
    device: Device,
    owner: Py<PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let (code, bits) = dlpack_of(dtype);
    let shape: Vec<i64> = shape.iter().map(|&axis| axis as i64).collect();
    let view = View {
        data: address,
        device,
        dimensions: shape.len() as i32, // axes are few
        data_type: DataType { code, bits, lanes: 1 },
        shape: shape.as_ptr(),
        strides: std::ptr::null(),
        byte_offset: 0,
    };
    let managed = Managed { view, context: std::ptr::null_mut(), deleter: Some(delete) };
    let exported = Exported { managed, shape, _owner: owner };
    let exported = Box::into_raw(Box::new(exported));
    // SAFETY: it was just made, and nobody else has it.
    let own = unsafe { &mut *exported };
    own.managed.view.shape = own.shape.as_ptr();
    own.managed.context = exported.cast();
    let managed = &raw mut own.managed;
    // SAFETY: the name lives for ever, and the destructor takes such capsules.
    let capsule =
        unsafe { ffi::PyCapsule_New(managed.cast(), c"dltensor".as_ptr(), Some(destroy)) };
    // SAFETY: a new reference, or null with an error.
    unsafe { Bound::from_owned_ptr_or_err(py, capsule) }
}

/// The deleter of exported views.
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: who has the view calls this once; the context is what `__dlpack__` put there.
    let exported: *mut Exported = unsafe { (*managed).context.cast() };
    // SAFETY: it came from a box, and nobody uses it any more.
    let exported = unsafe { Box::from_raw(exported) };
    // The owner's count may be changed only with the interpreter.
    let _ = Python::try_attach(|_| drop(exported));
}

/// The destructor of capsules: those that nobody took still own their view.
unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter gives the capsule that goes.
    if unsafe { ffi::PyCapsule_IsValid(capsule, c"dltensor".as_ptr()) } == 0 {
        return;
    }
    // SAFETY: it is valid under this name.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, c"dltensor".as_ptr()) };
    // SAFETY: nobody took the view.
    unsafe { delete(managed.cast()) };
}
