//! The buckets as memory: what a layout makes of a list of parameters.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum_kernels::{Dtype, Element};

use super::layout::Layout;
use super::parameter::Parameter;
use crate::{Buffer, Communicator, Error};

/// Parameters, their layout, and the buckets' memory.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) parameters: Arc<[Parameter]>,
    pub(super) layout: Layout,
    spaces: Vec<Space>,
}

/// The memory of a bucket: registered, zeroed when it is made.
#[derive(Debug)]
struct Space {
    base: NonNull<u8>,
    bytes: usize,
    /// Owns what `base` points to, and is not looked at.
    _buffer: Buffer<u8>,
}

// SAFETY: a space owns its memory; who may touch which part when is up to its users, each of which
// says why it may.
unsafe impl Send for Space {}
// SAFETY: as for `Send`.
unsafe impl Sync for Space {}

impl Plan {
    /// # Errors
    /// If there is not enough memory.
    pub(super) fn new(
        parameters: Arc<[Parameter]>,
        layout: Layout,
        communicator: &Communicator,
    ) -> Result<Self, Error> {
        let space = |bytes: usize| {
            let mut buffer = communicator.allocate::<u8>(bytes)?;
            Ok(Space { base: NonNull::from(&mut buffer[..]).cast(), bytes, _buffer: buffer })
        };
        let sizes = layout.plans().iter().map(|bucket| bucket.len * bucket.dtype.bytes());
        let spaces = sizes.map(space).collect::<Result<_, Error>>()?;
        Ok(Self { parameters, layout, spaces })
    }

    /// By bucket, how many bytes it has.
    pub(super) fn bucket_sizes(&self) -> impl Iterator<Item = usize> {
        self.spaces.iter().map(|space| space.bytes)
    }

    pub(super) fn bucket_of(&self, parameter: usize) -> usize {
        self.layout.home(parameter).bucket
    }

    /// A parameter of a bucket, in words.
    pub(super) fn describe(&self, parameter: usize) -> String {
        format!("{} of bucket {}", self.parameters[parameter], self.bucket_of(parameter))
    }

    /// A bucket in words: its number, type, size, and what it holds.
    pub(super) fn describe_bucket(&self, bucket: usize) -> String {
        let plan = &self.layout.plans()[bucket];
        let name = |index: &usize| self.parameters[*index].name();
        let (first, last) = (&plan.parameters[0], &plan.parameters[plan.parameters.len() - 1]);
        format!(
            "bucket {bucket} ({} elements of {}, from `{}` to `{}`)",
            plan.len,
            plan.dtype,
            name(first),
            name(last)
        )
    }

    /// Where a parameter's gradient lies, as bytes.
    pub(super) fn gradient(&self, parameter: usize) -> (NonNull<u8>, usize) {
        let space = &self.spaces[self.bucket_of(parameter)];
        let Range { start, end } = self.gradient_bytes(parameter);
        assert!(end <= space.bytes, "gradients lie inside their buckets");
        // SAFETY: inside the bucket's memory, as just checked.
        (unsafe { space.base.add(start) }, end - start)
    }

    /// The gradient of a parameter whose type is `T`.
    ///
    /// # Safety
    /// Nobody writes it while the slice lives.
    pub(super) unsafe fn elements<T: Element>(&self, parameter: usize) -> &[T] {
        let (start, bytes) = self.gradient(parameter);
        assert_eq!(self.parameters[parameter].dtype(), T::DTYPE, "a gradient of another type");
        // SAFETY: initialised and aligned memory inside the bucket; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(start.cast().as_ptr(), bytes / size_of::<T>()) }
    }

    /// The gradient of a parameter whose type is `T`.
    ///
    /// # Safety
    /// Nobody else touches it while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the caller is the only one who has it")]
    pub(super) unsafe fn elements_mut<T: Element>(&self, parameter: usize) -> &mut [T] {
        let (start, bytes) = self.gradient(parameter);
        assert_eq!(self.parameters[parameter].dtype(), T::DTYPE, "a gradient of another type");
        // SAFETY: initialised and aligned memory inside the bucket; the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), bytes / size_of::<T>()) }
    }

    /// Zeroes the gradient of a parameter.
    ///
    /// # Safety
    /// Nobody else touches it meanwhile.
    pub(super) unsafe fn zero(&self, parameter: usize) {
        let (start, bytes) = self.gradient(parameter);
        // SAFETY: inside the bucket's memory, which the caller has alone.
        unsafe { std::ptr::write_bytes(start.as_ptr(), 0, bytes) };
    }

    /// Zeroes what lies between a bucket's gradients and behind the last, where a hook may have
    /// left anything.
    ///
    /// # Safety
    /// Nobody else touches the bucket meanwhile.
    pub(super) unsafe fn zero_padding(&self, bucket: usize) {
        let (plan, space) = (&self.layout.plans()[bucket], &self.spaces[bucket]);
        let size = plan.dtype.bytes();
        let (mut end, behind) = (0, plan.len * size..plan.len * size);
        // A bucket's gradients lie in the order of its parameters.
        let starts = plan.parameters.iter().map(|&parameter| self.gradient_bytes(parameter));
        for Range { start, end: next } in starts.chain(std::iter::once(behind)) {
            assert!(end <= start && start <= space.bytes, "gradients lie one after the other");
            // SAFETY: inside the bucket's memory, as just checked.
            let pad = unsafe { space.base.add(end) };
            // SAFETY: as above; the caller has the bucket alone.
            unsafe { pad.write_bytes(0, start - end) };
            end = next;
        }
    }

    /// The bytes of its bucket that a parameter's gradient has.
    fn gradient_bytes(&self, parameter: usize) -> Range<usize> {
        let size = self.parameters[parameter].dtype().bytes();
        let Range { start, end } = self.layout.home(parameter).elements;
        start * size..end * size
    }

    /// All elements of a bucket whose type is `T`, with those that pad.
    ///
    /// # Safety
    /// Nobody writes the bucket while the slice lives.
    pub(super) unsafe fn bucket<T: Element>(&self, bucket: usize) -> &[T] {
        // SAFETY: it is only read here, and the caller keeps writers away.
        unsafe { self.bucket_mut(bucket) }
    }

    /// All elements of a bucket whose type is `T`, with those that pad.
    ///
    /// # Safety
    /// Nobody else touches the bucket while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the caller is the only one who has it")]
    pub(super) unsafe fn bucket_mut<T: Element>(&self, bucket: usize) -> &mut [T] {
        let space = &self.spaces[bucket];
        assert_eq!(self.dtype(bucket), T::DTYPE, "a bucket of another type");
        let count = space.bytes / size_of::<T>();
        // SAFETY: initialised and aligned memory, all of the bucket, which the caller has alone.
        unsafe { std::slice::from_raw_parts_mut(space.base.cast().as_ptr(), count) }
    }

    /// All of a bucket.
    ///
    /// # Safety
    /// Nobody writes the bucket while the slice lives.
    pub(super) unsafe fn bytes(&self, bucket: usize) -> &[u8] {
        // SAFETY: it is only read here, and the caller keeps writers away.
        unsafe { self.bytes_mut(bucket) }
    }

    /// All of a bucket.
    ///
    /// # Safety
    /// Nobody else touches the bucket while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the caller is the only one who has it")]
    pub(super) unsafe fn bytes_mut(&self, bucket: usize) -> &mut [u8] {
        let space = &self.spaces[bucket];
        // SAFETY: initialised memory, all of the bucket, which the caller has alone.
        unsafe { std::slice::from_raw_parts_mut(space.base.as_ptr(), space.bytes) }
    }

    /// Where a bucket's elements begin.
    pub(super) fn start(&self, bucket: usize) -> NonNull<u8> {
        self.spaces[bucket].base
    }

    pub(super) fn dtype(&self, bucket: usize) -> Dtype {
        self.layout.plans()[bucket].dtype
    }
}
