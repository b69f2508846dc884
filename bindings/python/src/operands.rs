//! What a collective works on: tensors, one or several that make one buffer.

use std::marker::PhantomData;
use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;
use unisum::{Buffers, Dtype, Owned};

use crate::elements::Element;
use crate::staging::{Lease, Staging};
use crate::tensor::{Layout, Tensor};

/// Input and output of a call.
#[derive(Debug)]
pub(crate) enum Operands {
    InPlace(Side),
    OutOfPlace(Side, Side),
}

/// One buffer.
#[derive(Debug)]
pub(crate) enum Side {
    Nothing,
    /// Used where it lies.
    Whole(Tensor),
    /// Several in a row, copied into one and from it.
    Pieces(Vec<Tensor>, Option<Lease>, Arc<Staging>),
}

impl Side {
    /// What Python gave: nothing, a tensor, or a list of tensors.
    fn of(
        given: Option<&Bound<'_, PyAny>>,
        layout: Layout,
        is_output: bool,
        staging: Option<&Arc<Staging>>,
    ) -> PyResult<Self> {
        let Some(given) = given else { return Ok(Self::Nothing) };
        let tensor = |object: &Bound<'_, PyAny>| {
            let tensor = Tensor::of(object, layout)?;
            if is_output { tensor.writable() } else { Ok(tensor) }
        };
        let Ok(list) = given.cast::<PyList>() else { return tensor(given).map(Self::Whole) };
        let mut pieces = list.iter().map(|it| tensor(&it)).collect::<PyResult<Vec<_>>>()?;
        match (pieces.len(), staging) {
            (0, _) => Ok(Self::Nothing),
            (1, _) => Ok(Self::Whole(pieces.remove(0))),
            _ if Tensor::are_in_a_row(&pieces) => Ok(Self::Whole(Tensor::joined(pieces, list))),
            (_, Some(staging)) => Ok(Self::Pieces(pieces, None, staging.clone())),
            (_, None) => Err(PyTypeError::new_err("a message is one tensor, not a list")),
        }
    }

    fn tensors(&self) -> &[Tensor] {
        match self {
            Self::Nothing => &[],
            Self::Whole(tensor) => std::slice::from_ref(tensor),
            Self::Pieces(tensors, ..) => tensors,
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.tensors().iter().any(|own| other.tensors().iter().any(|it| it.overlaps(own)))
    }

    /// The same, but for a copy that is worked on.
    fn staged(self, staging: Option<&Arc<Staging>>) -> PyResult<Self> {
        match (self, staging) {
            (Self::Whole(tensor), Some(staging)) => {
                Ok(Self::Pieces(vec![tensor], None, staging.clone()))
            }
            (Self::Whole(_), None) => Err(PyValueError::new_err("input and output share memory")),
            (other, _) => Ok(other),
        }
    }

    fn count(&self) -> usize {
        self.tensors().iter().map(|tensor| tensor.count).sum()
    }

    /// Makes room for pieces in one buffer, and copies them there if they are `read`.
    fn gather(&mut self, read: bool) {
        let Self::Pieces(tensors, lease, staging) = self else { return };
        let bytes: usize = tensors.iter().map(Tensor::bytes).sum();
        let mut to = lease.insert(staging.lease(bytes)).start_mut();
        for tensor in tensors.iter().filter(|_| read) {
            // SAFETY: the tensors are alive and hold so many bytes, which fit in the room that was
            // just made, an allocation of its own.
            unsafe { to.copy_from_nonoverlapping(tensor.start as *const u8, tensor.bytes()) };
            to = to.wrapping_add(tensor.bytes());
        }
    }

    /// Copies results back to pieces.
    fn scatter(&mut self) {
        let Self::Pieces(tensors, lease, _) = self else { return };
        let Some(lease) = lease.take() else { return };
        let mut from = lease.start();
        for tensor in tensors.iter() {
            // SAFETY: as in `gather`, the other way; they were checked to be writable.
            unsafe { from.copy_to_nonoverlapping(tensor.start as *mut u8, tensor.bytes()) };
            from = from.wrapping_add(tensor.bytes());
        }
    }

    fn start(&self) -> usize {
        match self {
            Self::Nothing => 16,
            Self::Whole(tensor) => tensor.start,
            Self::Pieces(_, None, _) => 16,
            Self::Pieces(_, Some(lease), _) => lease.start() as usize,
        }
    }

    fn as_slice<T>(&self) -> &[T] {
        // SAFETY: the address is aligned for the type and followed by so many elements, of which
        // any bytes are values; the program leaves them alone while a collective runs, as the
        // documentation of every call says.
        unsafe { std::slice::from_raw_parts(self.start() as *const T, self.count()) }
    }

    fn as_mut_slice<T>(&mut self) -> &mut [T] {
        let start = match self {
            Self::Pieces(_, Some(lease), _) => lease.start_mut() as usize,
            Self::Nothing | Self::Whole(_) | Self::Pieces(..) => self.start(),
        };
        // SAFETY: as in `as_slice`; results only go to what is writable, and input and output do
        // not overlap.
        unsafe { std::slice::from_raw_parts_mut(start as *mut T, self.count()) }
    }
}

impl Operands {
    /// From what Python gave; without an output the input is in place. `places` says what is alike
    /// if input and output overlap: which block of the longer the shorter may be.
    pub(crate) fn new(
        input: Option<&Bound<'_, PyAny>>,
        output: Option<&Bound<'_, PyAny>>,
        layout: Layout,
        own_block: Option<usize>,
        staging: Option<&Arc<Staging>>,
    ) -> PyResult<Self> {
        let Some(output) = output else {
            return Side::of(input, layout, true, staging).map(Self::InPlace);
        };
        let input = Side::of(input, layout, false, staging)?;
        let output = Side::of(Some(output), layout, true, staging)?;
        if !input.overlaps(&output) {
            return Ok(Self::OutOfPlace(input, output));
        }
        let (Side::Whole(from), Side::Whole(to)) = (&input, &output) else {
            return Ok(Self::OutOfPlace(input.staged(staging)?, output));
        };
        let ends = |outer: &Tensor, inner: &Tensor| {
            own_block.is_some_and(|block| outer.start + block * inner.bytes() == inner.start)
        };
        match own_block {
            // The same memory, of all elements.
            None if (from.start, from.count) == (to.start, to.count) => Ok(Self::InPlace(output)),
            Some(_) if from.bytes() > to.bytes() && ends(from, to) => {
                // The other blocks of the input stay as they are.
                Ok(Self::InPlace(input))
            }
            Some(_) if to.bytes() > from.bytes() && ends(to, from) => Ok(Self::InPlace(output)),
            _ => Ok(Self::OutOfPlace(input.staged(staging)?, output)),
        }
    }

    /// What is only sent.
    pub(crate) fn only_read(input: &Bound<'_, PyAny>, layout: Layout) -> PyResult<Self> {
        Ok(Self::OutOfPlace(Side::of(Some(input), layout, false, None)?, Side::Nothing))
    }

    /// The element type, which all tensors share; of none, bytes.
    pub(crate) fn element(&self) -> PyResult<Element> {
        let sides: [&[Tensor]; 2] = match self {
            Self::InPlace(both) => [both.tensors(), &[]],
            Self::OutOfPlace(input, output) => [input.tensors(), output.tensors()],
        };
        let mut elements = sides.into_iter().flatten().map(|tensor| tensor.element);
        let Some(first) = elements.next() else { return Element::of_dlpack(1, 8, 1) };
        match elements.find(|&element| element != first) {
            None => Ok(first),
            Some(other) => {
                let text = format!(
                    "Tensors must have the same type: one is of {}, one of {}",
                    first.dtype, other.dtype
                );
                Err(PyTypeError::new_err(text))
            }
        }
    }

    /// The elements for a call.
    pub(crate) fn lend<T>(&mut self) -> Buffers<'_, T> {
        match self {
            Self::InPlace(both) => {
                both.gather(true);
                Buffers::InPlace(both.as_mut_slice())
            }
            Self::OutOfPlace(input, output) => {
                input.gather(true);
                output.gather(false);
                Buffers::OutOfPlace(input.as_slice(), output.as_mut_slice())
            }
        }
    }

    /// Puts results where they belong, after the call.
    pub(crate) fn settle(&mut self) {
        match self {
            Self::InPlace(side) | Self::OutOfPlace(_, side) => side.scatter(),
        }
    }
}

/// Operands of elements `T`, as asynchronous calls own them.
pub(crate) struct Lent<T>(pub(crate) Operands, PhantomData<fn() -> T>);

impl<T> Lent<T> {
    pub(crate) const fn new(operands: Operands) -> Self {
        Self(operands, PhantomData)
    }
}

impl<T: unisum::Element> Owned<T> for Lent<T> {
    fn lend(&mut self) -> Buffers<'_, T> {
        self.0.lend()
    }
}

/// Counts of elements as Python gives them, in units of the type that is sent.
pub(crate) fn counts(given: Vec<usize>, element: Element) -> PyResult<Vec<usize>> {
    let scaled = |count: usize| count.checked_mul(element.times);
    let scaled: Option<Vec<usize>> = given.into_iter().map(scaled).collect();
    scaled.ok_or_else(|| PyValueError::new_err("a count is beyond all memory"))
}

/// Whether a type is one of floats, which alone can be scaled.
pub(crate) const fn is_float(dtype: Dtype) -> bool {
    dtype.is_float()
}
