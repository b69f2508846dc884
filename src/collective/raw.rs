//! Buffers of a call without a static element type: what everything below the typed calls works on.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use unisum_kernels::{Custom, Dtype, Element};

use super::reduction::Reduction;
use super::{Buffers, Lengths};

/// The buffers that a collective borrows, as [`Buffers`], with the element type as a value. For
/// bindings, whose programs name element types at run time.
#[derive(Debug)]
pub struct RawBuffers<'a> {
    dtype: Dtype,
    /// `None` in place.
    input: Option<Span>,
    output: Span,
    borrow: PhantomData<&'a mut [u8]>,
}

/// An address and a number of elements.
#[derive(Clone, Copy)]
struct Span(NonNull<u8>, usize);

impl RawBuffers<'_> {
    /// One buffer of `count` elements for input and output, as [`Buffers::InPlace`].
    ///
    /// # Safety
    /// For as long as the result lives, the memory holds `count` values of `dtype`, aligned to
    /// them, and nothing else reads or writes it.
    pub const unsafe fn in_place(dtype: Dtype, data: NonNull<u8>, count: usize) -> Self {
        Self { dtype, input: None, output: Span(data, count), borrow: PhantomData }
    }

    /// Input and output apart, each with its number of elements, as [`Buffers::OutOfPlace`].
    ///
    /// # Safety
    /// As [`RawBuffers::in_place`] for both, but that others may read the input. They do not
    /// overlap.
    pub const unsafe fn out_of_place(
        dtype: Dtype,
        (input, input_count): (NonNull<u8>, usize),
        (output, output_count): (NonNull<u8>, usize),
    ) -> Self {
        let input = Some(Span(input, input_count));
        Self { dtype, input, output: Span(output, output_count), borrow: PhantomData }
    }

    /// The element type.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same buffers, for a while.
    pub(crate) const fn reborrow(&mut self) -> RawBuffers<'_> {
        let Self { dtype, input, output, .. } = *self;
        RawBuffers { dtype, input, output, borrow: PhantomData }
    }

    pub(crate) const fn is_in_place(&self) -> bool {
        self.input.is_none()
    }

    pub(crate) const fn lengths(&self) -> Lengths {
        match self.input {
            None => Lengths::InPlace(self.output.1),
            Some(Span(_, input)) => Lengths::OutOfPlace { input, output: self.output.1 },
        }
    }

    /// Address and bytes of what is put in, which is only read out of place.
    pub(crate) fn input(&self) -> (NonNull<u8>, usize) {
        self.input.unwrap_or(self.output).bytes(self.dtype)
    }

    /// Address and bytes of what is got.
    pub(crate) fn output(&self) -> (NonNull<u8>, usize) {
        self.output.bytes(self.dtype)
    }

    /// Where the elements `range` of what is put in begin.
    ///
    /// # Panics
    /// If they are not among them.
    pub(crate) fn input_at(&self, range: &Range<usize>) -> NonNull<u8> {
        self.input.unwrap_or(self.output).at(range, self.dtype)
    }

    /// Where the elements `range` of what is got begin.
    ///
    /// # Panics
    /// If they are not among them.
    pub(crate) fn output_at(&self, range: &Range<usize>) -> NonNull<u8> {
        self.output.at(range, self.dtype)
    }
}

impl Span {
    fn of<T>(data: &mut [T]) -> Self {
        Self(NonNull::from(&mut *data).cast(), data.len())
    }

    fn bytes(self, dtype: Dtype) -> (NonNull<u8>, usize) {
        (self.0, self.1 * dtype.bytes())
    }

    fn at(self, range: &Range<usize>, dtype: Dtype) -> NonNull<u8> {
        assert!(range.start <= range.end && range.end <= self.1, "{range:?} of {}", self.1);
        // SAFETY: the elements are within the memory that whoever made this vouched for.
        unsafe { self.0.add(range.start * dtype.bytes()) }
    }
}

impl Reduction {
    /// A reduction of elements of type `dtype` by a function of another language, as with a
    /// [`CustomOp`](crate::CustomOp), which says what it must be. It gets `context` unchanged, and
    /// may panic. If it does not commute, elements are reduced in rank order.
    ///
    /// # Safety
    /// From any thread, and from several at once, `function` may be called with two aligned
    /// pointers to as many elements as it is told, of which it writes only the first, and with
    /// `context`, until the last collective that was given this has ended.
    pub const unsafe fn by_function(
        dtype: Dtype,
        function: unsafe fn(acc: *mut u8, other: *const u8, count: usize, context: *const ()),
        context: *const (),
        commutative: bool,
    ) -> Self {
        // SAFETY: the caller vouches for the function.
        Self::custom(dtype, unsafe { Custom::new(function, context, commutative) })
    }
}

impl<'a, T: Element> From<Buffers<'a, T>> for RawBuffers<'a> {
    fn from(buffers: Buffers<'a, T>) -> Self {
        let (input, output) = match buffers {
            Buffers::InPlace(data) => (None, Span::of(data)),
            Buffers::OutOfPlace(input, output) => {
                (Some(Span(NonNull::from(input).cast(), input.len())), Span::of(output))
            }
        };
        Self { dtype: T::DTYPE, input, output, borrow: PhantomData }
    }
}

// SAFETY: it stands for the slices that it was made from, whose elements are plain data.
unsafe impl Send for RawBuffers<'_> {}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements at {:p}", self.1, self.0)
    }
}
