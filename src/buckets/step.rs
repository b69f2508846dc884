//! A training step as the program sees it: views of gradients, marking them ready, and waiting.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use unisum_kernels::Element;

use super::flight::InFlightStep;
use super::layout::Layout;
use super::place::Place;
use super::report::StepReport;
use crate::{Error, ErrorKind, Rank};

/// A step under way ([`Buckets::begin`](super::Buckets::begin)): threads write gradients and mark
/// them ready in any order, while buckets are reduced.
///
/// Dropping it without waiting, for example because its thread panics, fails the step on all ranks.
pub struct Step<'b> {
    flight: Arc<InFlightStep>,
    rank: Rank,
    /// Whether a parameter without a gradient is an error.
    needs_all: bool,
    /// The buckets can't be used for anything else.
    buckets: PhantomData<&'b mut ()>,
}

impl<'b> Step<'b> {
    pub(super) fn new(flight: Arc<InFlightStep>, rank: Rank, needs_all: bool) -> Self {
        Self { flight, rank, needs_all, buckets: PhantomData }
    }

    /// The gradient of a parameter, in the memory that is reduced: zero in the first view since the
    /// last reduction, or else what earlier views left. Does not block. Threads may view different
    /// parameters at the same time.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such parameter, its gradient has another type,
    /// it was marked ready, or another view of it exists. The step then fails on all ranks.
    pub fn view<T: Element>(&self, parameter: usize) -> Result<View<'_, T>, Error> {
        let view = self.view_as_is(parameter)?;
        if !self.flight.fill(parameter) {
            // SAFETY: the view has the gradient alone.
            unsafe { self.flight.plan.zero(parameter) };
        }
        Ok(view)
    }

    /// As [`Step::view`], for callers that write all elements without reading them: nothing is
    /// zeroed.
    ///
    /// # Errors
    /// As [`Step::view`].
    pub fn view_to_overwrite<T: Element>(&self, parameter: usize) -> Result<View<'_, T>, Error> {
        let view = self.view_as_is(parameter)?;
        self.flight.fill(parameter);
        Ok(view)
    }

    fn view_as_is<T: Element>(&self, parameter: usize) -> Result<View<'_, T>, Error> {
        let parameters = &self.flight.plan.parameters;
        let Some(known) = parameters.get(parameter) else {
            let text = format!("there is no parameter {parameter} among {}", parameters.len());
            return Err(self.refuse(text));
        };
        if known.dtype() != T::DTYPE {
            return Err(self.refuse(format!("{known} was viewed as {}", T::DTYPE)));
        }
        self.flight.take(parameter).map_err(|text| self.refuse(text))?;
        // SAFETY: it was just taken, and is given back when the view ends.
        let gradient = unsafe { self.flight.plan.elements_mut(parameter) };
        Ok(View { gradient, held: Held { parameter, flight: &self.flight } })
    }

    /// Copies a gradient from elsewhere, or adds it if the parameter already has one, and marks it
    /// ready.
    ///
    /// # Errors
    /// As [`Step::view`], and if the lengths differ.
    pub fn put<T>(&self, parameter: usize, gradient: &[T]) -> Result<(), Error>
    where
        T: Element + std::ops::Add<Output = T>,
    {
        let mut view = self.view_as_is::<T>(parameter)?;
        if view.len() != gradient.len() {
            let (what, given) = (&self.flight.plan.parameters[parameter], gradient.len());
            return Err(self.refuse(format!("{what} was given {given} elements")));
        }
        if self.flight.fill(parameter) {
            view.iter_mut().zip(gradient).for_each(|(sum, &term)| *sum = *sum + term);
        } else {
            view.copy_from_slice(gradient);
        }
        view.ready();
        Ok(())
    }

    /// Adds some rows of a gradient and marks it ready: for an embedding, of which a batch uses few
    /// rows. It is reduced as a whole; its other rows keep their values, or are zeros. `values`
    /// holds the rows one after the other; a row may occur several times.
    ///
    /// # Errors
    /// As [`Step::view`], and if a row or the values do not fit the parameter's shape.
    pub fn put_rows<T>(&self, parameter: usize, rows: &[usize], values: &[T]) -> Result<(), Error>
    where
        T: Element + std::ops::Add<Output = T>,
    {
        let mut view = self.view::<T>(parameter)?;
        let known = &self.flight.plan.parameters[parameter];
        let width: usize = known.shape().iter().skip(1).product();
        let height = known.shape().first().copied().unwrap_or(1);
        if let Some(row) = rows.iter().find(|&&row| row >= height) {
            return Err(self.refuse(format!("{known} was given a row {row}")));
        }
        if rows.len() * width != values.len() {
            let (rows, given) = (rows.len(), values.len());
            return Err(self.refuse(format!("{known} was given {given} elements in {rows} rows")));
        }
        for (at, &row) in rows.iter().enumerate() {
            let sums = view[row * width..(row + 1) * width].iter_mut();
            let terms = &values[at * width..(at + 1) * width];
            sums.zip(terms).for_each(|(sum, &term)| *sum = *sum + term);
        }
        view.ready();
        Ok(())
    }

    /// Marks a gradient ready with the values that earlier views of this step, or of the steps it
    /// accumulates, left. Does not block.
    ///
    /// # Errors
    /// As [`Step::view`].
    pub fn ready(&self, parameter: usize) -> Result<(), Error> {
        if parameter >= self.flight.plan.parameters.len() {
            return Err(self.refuse(format!("there is no parameter {parameter}")));
        }
        self.flight.take(parameter).map_err(|text| self.refuse(text))?;
        if !self.flight.fill(parameter) {
            // SAFETY: it was just taken.
            unsafe { self.flight.plan.zero(parameter) };
        }
        self.flight.mark(parameter);
        Ok(())
    }

    /// The error for the caller; the step fails with it.
    fn refuse(&self, text: String) -> Error {
        self.flight.fail(text.clone());
        Error::new(ErrorKind::Configuration, text).on(self.rank)
    }

    /// Where a parameter's gradient lies in this step.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn place(&self, parameter: usize) -> Place {
        Place::of_parameter(self.flight.plan.clone(), parameter)
    }

    /// Where the gradients lie in this step.
    pub fn layout(&self) -> &Layout {
        &self.flight.plan.layout
    }

    /// The number of buckets in this step.
    pub fn buckets(&self) -> usize {
        self.flight.plan.layout.plans().len()
    }

    /// The reduction of a bucket, which can be waited for before the whole step. Whether all ranks
    /// commit to the step is known only at its end.
    ///
    /// # Panics
    /// If there is no such bucket.
    pub fn bucket(&self, bucket: usize) -> BucketWork {
        assert!(bucket < self.buckets(), "there is no bucket {bucket}");
        BucketWork { flight: self.flight.clone(), bucket }
    }

    /// Ends the program's part: gradients that were not marked ready become ready now. The returned
    /// work must be waited for.
    pub fn finish(self) -> StepWork<'b> {
        let computed = Instant::now();
        self.close("");
        StepWork { flight: self.flight.clone(), computed, buckets: PhantomData }
    }

    /// [`Step::finish`] and waits: blocks until all buckets are reduced and all ranks agree.
    ///
    /// # Errors
    /// [`ErrorKind::StepFailed`], on all ranks, if a rank has no gradient for a parameter (unless
    /// [`Builder::unused_parameters`](super::Builder::unused_parameters) allows it), marked one
    /// ready twice, or dropped its step, however late: the averages must not be used, and the next
    /// step may begin. An accumulating step fails on the rank where the error occurred, and then
    /// the step that reduces fails on all ranks. [`ErrorKind::Panicked`] if the [hook](super::Hook)
    /// panicked on any rank. As [`Communicator::run`](crate::Communicator::run) if the job ended.
    pub fn wait(self) -> Result<StepReport, Error> {
        self.finish().wait()
    }

    /// Drops the step, which fails on all ranks, and says why in the error.
    pub fn abandon(self, why: &str) {
        self.close(if why.is_empty() { "the step was abandoned" } else { why });
    }

    fn close(&self, why: &str) {
        if !why.is_empty() {
            self.flight.fail(why.to_owned());
        }
        // Before it is closed: then the vote may come at any moment.
        if self.needs_all
            && let [first, others @ ..] = &self.flight.empty()[..]
        {
            let others = match others.len() {
                0 => String::new(),
                others => format!(", nor had {others} others"),
            };
            let what = self.flight.plan.describe(*first);
            self.flight.fail(format!("{what} had no gradient when the step ended{others}"));
        }
        self.flight.close(self.rank);
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        // After `finish` nothing is left to close.
        if !self.flight.is_closed() {
            self.close(match std::thread::panicking() {
                true => "the step was dropped by a panic of the thread that had it",
                false => "the step was dropped before it was waited for",
            });
        }
    }
}

impl fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step").field("purpose", &self.flight.purpose).finish_non_exhaustive()
    }
}

/// A gradient that the program may write: a slice in the bucket's memory.
pub struct View<'s, T> {
    gradient: &'s mut [T],
    held: Held<'s>,
}

/// Gives the gradient back.
struct Held<'s> {
    parameter: usize,
    flight: &'s InFlightStep,
}

impl<T> View<'_, T> {
    /// Marks the gradient final. It is reduced once the bucket's others are.
    pub fn ready(self) {
        let Held { parameter, flight } = self.held;
        std::mem::forget(self.held);
        flight.mark(parameter);
    }
}

impl<T> Deref for View<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.gradient
    }
}

impl<T> DerefMut for View<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.gradient
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.flight.release(self.parameter);
    }
}

impl<T: fmt::Debug> fmt::Debug for View<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("parameter", &self.held.parameter).finish_non_exhaustive()
    }
}

/// A step to which the program contributes nothing more. A [`Future`], and [`StepWork::wait`]
/// blocks.
#[must_use = "whether all ranks commit to the step is told by its work"]
pub struct StepWork<'b> {
    flight: Arc<InFlightStep>,
    computed: Instant,
    buckets: PhantomData<&'b mut ()>,
}

impl StepWork<'_> {
    /// See [`Step::wait`].
    ///
    /// # Errors
    /// As [`Step::wait`].
    pub fn wait(self) -> Result<StepReport, Error> {
        let outcome = self.flight.await_end()?;
        Ok(StepReport::of(&self.flight, outcome, self.computed))
    }
}

impl Future for StepWork<'_> {
    type Output = Result<StepReport, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let end = self.flight.poll_end(context.waker());
        end.map_or(Poll::Pending, |end| {
            Poll::Ready(end.map(|outcome| StepReport::of(&self.flight, outcome, self.computed)))
        })
    }
}

impl fmt::Debug for StepWork<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepWork").finish_non_exhaustive()
    }
}

/// The reduction of one bucket. A [`Future`], and [`BucketWork::wait`] blocks.
#[must_use = "it does nothing but wait"]
pub struct BucketWork {
    flight: Arc<InFlightStep>,
    bucket: usize,
}

impl BucketWork {
    /// Blocks until the bucket is reduced.
    ///
    /// # Errors
    /// The reason why it never will be.
    pub fn wait(self) -> Result<(), Error> {
        self.flight.await_reduced(self.bucket)
    }
}

impl Future for BucketWork {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let reduced = self.flight.poll_reduced(self.bucket, context.waker());
        reduced.map_or(Poll::Pending, Poll::Ready)
    }
}

impl fmt::Debug for BucketWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BucketWork").field("bucket", &self.bucket).finish_non_exhaustive()
    }
}
