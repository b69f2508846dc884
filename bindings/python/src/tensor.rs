//! Tensors of other libraries as memory, in place: NumPy's arrays, and whatever speaks DLPack.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyList, PyType};
use pyo3::{ffi, intern};

use crate::array::Array;
use crate::dlpack::{CPU, CUDA, CUDA_HOST, CUDA_MANAGED, ExchangeApi, Managed, View};
use crate::elements::{Element, Meaning, dlpack_of};

/// How a tensor's elements have to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In the order of their indices, without gaps.
    Contiguous,
    /// Without gaps, in any order of the axes: the same on all ranks, for what works element by
    /// element.
    Dense,
}

/// Whose memory a tensor has to lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Host,
    /// That of CUDA devices; what the program computes it with is in this stream.
    Cuda {
        stream: usize,
    },
}

const NOT_ON_DEVICE: &str = "the tensor is not on a CUDA device";

/// The number by which DLPack and the array interfaces call the legacy default stream.
const LEGACY_STREAM: usize = 1;

/// A tensor's memory, kept alive.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) start: usize,
    /// In elements of `element.dtype`.
    pub(crate) count: usize,
    pub(crate) element: Element,
    is_writable: bool,
    /// What owns the memory, kept as long as this.
    _owner: Py<PyAny>,
}

impl Tensor {
    /// The memory of `object`, without a copy.
    ///
    /// # Errors
    /// `TypeError` if it is no tensor, `ValueError` if it lies elsewhere than in the memory of the
    /// CPU, or with gaps.
    pub(crate) fn of(object: &Bound<'_, PyAny>, layout: Layout) -> PyResult<Self> {
        if let Some(api) = exchange_api(object)? {
            return by_exchange(object, api, layout, Space::Host);
        }
        if let Ok(array) = object.cast::<Array>() {
            let (start, count, dtype) = array.get().parts();
            let (code, bits) = dlpack_of(dtype);
            let element = Element::of_dlpack(code, bits, 1)?;
            return tensor(start, count, element, true, object.clone().unbind());
        }
        let py = object.py();
        if let Ok(interface) = object.getattr(intern!(py, "__array_interface__")) {
            return by_interface(object, &interface.cast_into()?, layout);
        }
        if object.hasattr(intern!(py, "__dlpack__"))? {
            return by_capsule(object, layout, Space::Host);
        }
        by_buffer(object, layout)
    }

    /// The memory of `object` on a CUDA device, without a copy, and the stream that computes what
    /// is there, if the object names one. Collectives will be in `stream`.
    ///
    /// # Errors
    /// `TypeError` if it is no tensor, `ValueError` if it lies elsewhere, or with gaps.
    pub(crate) fn on_device(
        object: &Bound<'_, PyAny>,
        layout: Layout,
        stream: usize,
    ) -> PyResult<(Self, Option<usize>)> {
        let (py, space) = (object.py(), Space::Cuda { stream });
        if let Some(api) = exchange_api(object)? {
            return Ok((by_exchange(object, api, layout, space)?, None));
        }
        if let Some(interface) = object.getattr_opt(intern!(py, "__cuda_array_interface__"))? {
            let interface = interface.cast_into::<PyDict>()?;
            let of_producer: Option<usize> = match interface.get_item(intern!(py, "stream"))? {
                Some(stream) => stream.extract()?,
                None => None,
            };
            if interface.get_item(intern!(py, "mask"))?.is_some_and(|mask| !mask.is_none()) {
                return Err(PyValueError::new_err("arrays with a mask are not supported"));
            }
            return Ok((by_interface(object, &interface, layout)?, of_producer));
        }
        if object.hasattr(intern!(py, "__dlpack__"))? {
            // What is elsewhere may not know what a stream is.
            let device = object.call_method0(intern!(py, "__dlpack_device__"))?;
            let (kind, _): (i32, i32) = device.extract()?;
            if !matches!(kind, CUDA | CUDA_MANAGED) {
                return Err(PyValueError::new_err(NOT_ON_DEVICE));
            }
            return Ok((by_capsule(object, layout, space)?, None));
        }
        let name = object.get_type().name()?;
        let text = format!(
            "`{name}` is no array on a CUDA device: it has neither `__cuda_array_interface__` nor \
             DLPack"
        );
        Err(PyTypeError::new_err(text))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.count * self.element.dtype.bytes()
    }

    /// Its elements, which the program leaves alone meanwhile.
    ///
    /// # Panics
    /// If they are of another type.
    pub(crate) fn as_slice<T: unisum::Element>(&self) -> &[T] {
        assert_eq!(self.element.dtype, T::DTYPE, "a tensor of another type");
        // SAFETY: the address is aligned and followed by so many elements, as long as the owner
        // lives, and any bytes are values of the types that tensors have.
        unsafe { std::slice::from_raw_parts(self.start as *const T, self.count) }
    }

    /// Its elements, to be written: only this call has them.
    ///
    /// # Panics
    /// If they are of another type, or may only be read.
    pub(crate) fn as_mut_slice<T: unisum::Element>(&mut self) -> &mut [T] {
        assert!(self.is_writable && self.element.dtype == T::DTYPE, "a tensor of another kind");
        // SAFETY: as in `as_slice`; the program leaves the memory to the call.
        unsafe { std::slice::from_raw_parts_mut(self.start as *mut T, self.count) }
    }

    /// Whether each begins where the one before it ends: they are one piece of memory.
    pub(crate) fn are_in_a_row(tensors: &[Self]) -> bool {
        tensors.windows(2).all(|pair| {
            pair[0].start + pair[0].bytes() == pair[1].start && pair[0].element == pair[1].element
        })
    }

    /// Tensors in a row, as one; `owners` are theirs.
    pub(crate) fn joined(tensors: Vec<Self>, owners: &Bound<'_, PyList>) -> Self {
        let first = &tensors[0];
        let count = tensors.iter().map(|tensor| tensor.count).sum();
        Self {
            start: first.start,
            count,
            element: first.element,
            is_writable: tensors.iter().all(|tensor| tensor.is_writable),
            // The list may change.
            _owner: owners.to_tuple().into_any().unbind(),
        }
    }

    /// Whether the memory of both is the same in part.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.bytes() > 0
            && other.bytes() > 0
            && self.start < other.start + other.bytes()
            && other.start < self.start + self.bytes()
    }

    /// Refuses memory that may only be read.
    pub(crate) fn writable(self) -> PyResult<Self> {
        match self.is_writable {
            true => Ok(self),
            false => Err(PyValueError::new_err("the array is read-only: it can't hold a result")),
        }
    }
}

/// What a type offers, looked up once for each type. Types in the list are kept alive, so that
/// their addresses stay theirs.
static KNOWN: Mutex<Vec<Known>> = Mutex::new(Vec::new());
/// A type's address, what it offers, and the type.
type Known = (usize, Option<usize>, Py<PyType>);
/// Programs that make types for ever must not fill memory.
const KNOWN_MAX: usize = 64;

/// The exchange functions of an object's type, if it has some of a version that is known.
fn exchange_api(object: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    let kind = object.get_type();
    let address = kind.as_ptr() as usize;
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, api, _)) = known.iter().find(|(known, ..)| *known == address) {
        return Ok(*api);
    }
    // Looking up runs code of the program, which may come here again.
    drop(known);
    let api = match kind.getattr_opt(intern!(object.py(), "__dlpack_c_exchange_api__"))? {
        Some(capsule) => read_api(&capsule)?,
        None => None,
    };
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() < KNOWN_MAX {
        known.push((address, api, kind.unbind()));
    }
    Ok(api)
}

fn read_api(capsule: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    let Ok(capsule) = capsule.cast::<PyCapsule>() else { return Ok(None) };
    let pointer = capsule_pointer(capsule.as_any(), c"dlpack_exchange_api")?;
    // SAFETY: the DLPack standard says that the capsule of this name holds the structure, which
    // lives as long as the process.
    let api = unsafe { &*pointer.cast_const().cast::<ExchangeApi>() };
    let is_known = api.version.major == 1 && api.view_of_object.is_some();
    Ok(is_known.then_some(std::ptr::from_ref(api) as usize))
}

fn capsule_pointer(capsule: &Bound<'_, PyAny>, name: &CStr) -> PyResult<*mut std::ffi::c_void> {
    // SAFETY: any object may be asked; it answers null and an error if it is no such capsule.
    let pointer = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr()) };
    if pointer.is_null() { Err(PyErr::fetch(capsule.py())) } else { Ok(pointer) }
}

fn by_exchange(
    object: &Bound<'_, PyAny>,
    api: usize,
    layout: Layout,
    space: Space,
) -> PyResult<Tensor> {
    let api = api as *const ExchangeApi;
    // SAFETY: `read_api` looked at it: it lives as long as the process.
    let function = unsafe { (*api).view_of_object };
    let function =
        function.ok_or_else(|| PyTypeError::new_err("the type's DLPack API is empty"))?;
    let mut view = MaybeUninit::<View>::zeroed();
    // SAFETY: the object is of the type that offers the function, and the interpreter is attached.
    let failed = unsafe { function(object.as_ptr().cast(), view.as_mut_ptr()) } != 0;
    if failed {
        let unknown = || PyBufferError::new_err("the tensor refuses DLPack");
        return Err(PyErr::take(object.py()).unwrap_or_else(unknown));
    }
    // SAFETY: the function has filled it, and zeroes are a value of it, too.
    let view = unsafe { view.assume_init() };
    of_view(&view, object.clone().unbind(), layout, space)
}

fn by_capsule(object: &Bound<'_, PyAny>, layout: Layout, space: Space) -> PyResult<Tensor> {
    let py = object.py();
    // Frameworks refuse to export what a gradient is recorded for.
    let object = match object.getattr_opt(intern!(py, "detach"))? {
        Some(detach) => detach.call0()?,
        None => object.clone(),
    };
    let options = PyDict::new(py);
    if let Space::Cuda { stream } = space {
        // Whoever made it has our stream wait for it.
        let stream = if stream == 0 { LEGACY_STREAM } else { stream };
        options.set_item(intern!(py, "stream"), stream)?;
    }
    let capsule = object.call_method(intern!(py, "__dlpack__"), (), Some(&options))?;
    let managed: *const Managed = capsule_pointer(&capsule, c"dltensor")?.cast_const().cast();
    // SAFETY: the DLPack standard says that the capsule of this name holds the structure, which
    // the capsule keeps alive.
    let view = unsafe { &(*managed).view };
    of_view(view, capsule.unbind(), layout, space)
}

fn of_view(view: &View, owner: Py<PyAny>, layout: Layout, space: Space) -> PyResult<Tensor> {
    let refused = match (space, view.device.kind) {
        (Space::Host, CPU | CUDA_HOST) | (Space::Cuda { .. }, CUDA | CUDA_MANAGED) => None,
        (Space::Host, CUDA | CUDA_MANAGED) => Some(
            "the tensor is on a CUDA device: `Communicator.on_device` gives what has collectives \
             for it",
        ),
        (Space::Host, _) => Some("the tensor is not in the CPU's memory: unisum can't reach it"),
        (Space::Cuda { .. }, _) => Some(NOT_ON_DEVICE),
    };
    if let Some(text) = refused {
        return Err(PyValueError::new_err(text));
    }
    let dimensions = usize::try_from(view.dimensions).unwrap_or(0);
    let axes = |of: *const i64| match of.is_null() || dimensions == 0 {
        true => None,
        // SAFETY: the standard says that shape and strides have so many entries.
        false => Some(unsafe { std::slice::from_raw_parts(of, dimensions) }),
    };
    let (shape, strides) = (axes(view.shape).unwrap_or_default(), axes(view.strides));
    let kind = view.data_type;
    let element = Element::of_dlpack(kind.code, kind.bits, kind.lanes)?;
    let count = elements(shape, strides, layout)?;
    tensor(view.data as usize + view.byte_offset as usize, count, element, true, owner)
}

type Axes = Vec<i64>;

/// NumPy's `__array_interface__`.
fn by_interface(
    object: &Bound<'_, PyAny>,
    interface: &Bound<'_, PyDict>,
    layout: Layout,
) -> PyResult<Tensor> {
    let py = object.py();
    let missing = || PyTypeError::new_err("the array interface is not complete");
    let (start, is_read_only): (usize, bool) =
        interface.get_item(intern!(py, "data"))?.ok_or_else(missing)?.extract()?;
    let kind: String =
        interface.get_item(intern!(py, "typestr"))?.ok_or_else(missing)?.extract()?;
    let shape: Axes = interface.get_item(intern!(py, "shape"))?.ok_or_else(missing)?.extract()?;
    let strides: Option<Axes> = match interface.get_item(intern!(py, "strides"))? {
        Some(strides) => strides.extract()?,
        None => None,
    };
    let (order, letter) = (kind.chars().next(), kind.chars().nth(1).unwrap_or('V'));
    let bytes: usize = kind.get(2..).and_then(|digits| digits.parse().ok()).unwrap_or(0);
    let is_foreign = order == Some(if cfg!(target_endian = "little") { '>' } else { '<' });
    if is_foreign && bytes > 1 {
        return Err(PyTypeError::new_err("the array's bytes are in the other order"));
    }
    if bytes == 0 || letter == 'O' {
        return Err(PyTypeError::new_err("arrays of objects have no elements to send"));
    }
    let name = match letter {
        'V' => object.getattr(intern!(py, "dtype"))?.getattr(intern!(py, "name"))?.extract()?,
        _ => String::new(),
    };
    let element = Element::of_numpy(letter, bytes, &name);
    let strides: Option<Axes> =
        strides.map(|strides| strides.iter().map(|stride| stride / bytes as i64).collect());
    let count = elements(&shape, strides.as_deref(), layout)?;
    tensor(start, count, element, !is_read_only, object.clone().unbind())
}

/// What has a buffer and no more: bytes, memory views.
fn by_buffer(object: &Bound<'_, PyAny>, layout: Layout) -> PyResult<Tensor> {
    let py = object.py();
    let name = object.get_type().name()?;
    let refuse = || {
        let text = format!("`{name}` is no array: it has neither a buffer nor DLPack");
        PyTypeError::new_err(text)
    };
    let builtins = py.import(intern!(py, "builtins"))?;
    let view = builtins.call_method1(intern!(py, "memoryview"), (object,)).map_err(|_| refuse())?;
    let array = py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "asarray"), (view,))?;
    let interface = array.getattr(intern!(py, "__array_interface__"))?;
    by_interface(&array, &interface.cast_into()?, layout)
}

fn tensor(
    start: usize,
    count: usize,
    element: Element,
    is_writable: bool,
    owner: Py<PyAny>,
) -> PyResult<Tensor> {
    let align = element.dtype.bytes();
    if count > 0 && (start == 0 || !start.is_multiple_of(align)) {
        let text = format!("the array's memory is not aligned to {align} bytes");
        return Err(PyValueError::new_err(text));
    }
    // An empty slice needs an address that is aligned and not null.
    let start = if count == 0 { 16 } else { start };
    Ok(Tensor { start, count: count * element.times, element, is_writable, _owner: owner })
}

/// How many elements there are.
///
/// # Errors
/// `ValueError` if they lie otherwise than they may.
fn elements(shape: &[i64], strides: Option<&[i64]>, layout: Layout) -> PyResult<usize> {
    let count = shape.iter().try_fold(1_usize, |count, &axis| {
        usize::try_from(axis).ok().and_then(|axis| count.checked_mul(axis))
    });
    let count = count.ok_or_else(|| PyValueError::new_err("the tensor's shape is impossible"))?;
    let Some(strides) = strides else { return Ok(count) };
    let mut axes: Vec<(i64, i64)> =
        strides.iter().copied().zip(shape.iter().copied()).filter(|axis| axis.1 != 1).collect();
    match layout {
        Layout::Contiguous => axes.reverse(),
        Layout::Dense => axes.sort_unstable(),
    }
    let mut expected = 1;
    let has_gap = axes.into_iter().any(|(stride, length)| {
        let differs = stride != expected;
        expected *= length;
        differs
    });
    if count == 0 || !has_gap {
        return Ok(count);
    }
    let why = match strides.iter().zip(shape).any(|(&stride, &length)| stride == 0 && length > 1) {
        true => "elements of this one are in the same place (as expand makes them)",
        false => "this one has gaps",
    };
    Err(PyValueError::new_err(format!("Tensors must be contiguous: {why}")))
}

/// Whether these can be reduced by an operation of that number.
pub(crate) fn check_reducible(element: Element, op: u8) -> PyResult<()> {
    // Sum and average of complex numbers are those of their parts.
    match (element.meaning, op) {
        (Meaning::Number, _) | (Meaning::Complex, 1 | 5) => Ok(()),
        (Meaning::Complex, _) => {
            Err(PyTypeError::new_err("complex numbers can only be summed and averaged"))
        }
        (Meaning::Opaque, _) => {
            Err(PyTypeError::new_err("elements of this type can be moved, not reduced"))
        }
    }
}
