//! What happens to a bucket once all its gradients are ready.

use std::fmt;
use std::ops::Range;

use half::{bf16, f16};
use unisum_kernels::{Dtype, Element, Panic, ReduceOp};

use super::parameter::Parameter;
use super::plan::Plan;
use crate::{Buffers, Collective, Communicator, Error, ErrorKind, Reduction};

/// How buckets are reduced. A hook runs on the layer's own thread, for one bucket after the other,
/// in the same order on all ranks, and makes the same collective calls on all ranks.
///
/// If one of its methods panics on any rank, all ranks get an error of kind
/// [`ErrorKind::Panicked`](crate::ErrorKind::Panicked) that says where: from the step it was called
/// for, from [`Builder::build`](super::Builder::build), or, on other ranks, from whatever call
/// comes next. The layer has then ended; after a panic in [`Hook::settle`], the job has not. In
/// [`rescale`](Hook::rescale) and [`save`](Hook::save), where no result could carry the error, the
/// panic continues to the caller. Afterwards, only [`Hook::save`] may be used, and the hook decides
/// what it returns.
///
/// ```
/// use unisum::buckets::{AllReduce, Bucket, Hook};
///
/// /// Clips each bucket's elements after they were averaged.
/// #[derive(Debug)]
/// struct Clip<H>(H, f32);
///
/// impl<H: Hook> Hook for Clip<H> {
///     fn name(&self) -> String {
///         format!("clip {} after {}", self.1, self.0.name())
///     }
///
///     fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), unisum::Error> {
///         self.0.reduce(bucket)?;
///         let most = self.1;
///         bucket.elements::<f32>().iter_mut().for_each(|it| *it = it.clamp(-most, most));
///         Ok(())
///     }
/// }
/// ```
pub trait Hook: Send + fmt::Debug {
    /// What the hook does, with its settings: must be the same on all ranks.
    fn name(&self) -> String;

    /// Replaces the bucket's contents by the average over the participants, the same bits on all
    /// ranks.
    ///
    /// # Errors
    /// Ends the job on all ranks with [`ErrorKind::Aborted`](crate::ErrorKind::Aborted): a rank
    /// that skipped a collective cannot continue.
    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error>;

    /// Called when the step has ended, in the same way on all ranks. It is `applied` if all
    /// committed to it and no gradient was infinite or NaN; otherwise, the hook continues as if the
    /// step had not happened.
    fn settle(&mut self, applied: bool) {
        let _ = applied;
    }

    /// Announces that the bucket's communicator is another one from here on, of other ranks: an
    /// elastic job has lost some, or others have joined. What was reduced of a step that has not
    /// ended is void: its buckets come again, with this rank's gradients.
    fn rebuild(&mut self) {}

    /// Announces that, from the next step on, gradients have a loss scale that is `factor` times
    /// the last one: the state that the hook keeps of them must be multiplied.
    fn rescale(&mut self, factor: f32) {
        let _ = factor;
    }

    /// The part of [`Hook::save`] that is the same on all ranks, for processes that enter an
    /// elastic job: their [`Hook::restore`] gets it, unless it is empty.
    fn save_common(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The state kept from step to step, for a checkpoint.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Restores the state from [`Hook::save`].
    ///
    /// # Errors
    /// The reason why it cannot.
    fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        match saved {
            [] => Ok(()),
            _ => Err(format!("`{}` keeps no state, but some was saved", self.name())),
        }
    }
}

impl<H: Hook + ?Sized> Hook for Box<H> {
    fn save_common(&self) -> Vec<u8> {
        (**self).save_common()
    }

    fn name(&self) -> String {
        (**self).name()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        (**self).reduce(bucket)
    }

    fn settle(&mut self, applied: bool) {
        (**self).settle(applied);
    }

    fn rebuild(&mut self) {
        (**self).rebuild();
    }

    fn rescale(&mut self, factor: f32) {
        (**self).rescale(factor);
    }

    fn save(&self) -> Vec<u8> {
        (**self).save()
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        (**self).restore(saved)
    }
}

/// That a method of the hook panicked, in words.
pub(super) fn panicked_in(method: &str, panic: &Panic) -> String {
    format!("the bucket hook panicked in `{method}`: {}", panic.text())
}

/// A bucket that a [`Hook`] has for itself.
pub struct Bucket<'a> {
    plan: &'a Plan,
    index: usize,
    communicator: &'a Communicator,
    participants: usize,
    step: u64,
    nonfinite: bool,
}

impl<'a> Bucket<'a> {
    /// # Safety
    /// Nobody else touches the bucket's memory while this lives.
    pub(super) unsafe fn new(
        plan: &'a Plan,
        index: usize,
        communicator: &'a Communicator,
        participants: usize,
        step: u64,
    ) -> Self {
        Self { plan, index, communicator, participants, step, nonfinite: false }
    }

    /// The index of the bucket.
    pub const fn index(&self) -> usize {
        self.index
    }

    /// The number of the step, from 0.
    pub const fn step(&self) -> u64 {
        self.step
    }

    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.plan.dtype(self.index)
    }

    /// The communicator of the layer, which nobody else uses meanwhile.
    pub const fn communicator(&self) -> &'a Communicator {
        self.communicator
    }

    /// How many ranks have gradients in this step; those of the others are zeros.
    pub const fn participants(&self) -> usize {
        self.participants
    }

    /// The version of the layout it belongs to ([`Layout::version`](super::Layout::version)).
    pub const fn layout_version(&self) -> u32 {
        self.plan.layout.version()
    }

    /// The number of elements, including padding.
    pub fn len(&self) -> usize {
        self.plan.layout.plans()[self.index].len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The factor by which sums become averages over the participants.
    pub fn factor(&self) -> f32 {
        1.0 / self.participants as f32
    }

    /// The reduction that averages over the participants and reports infinities and NaNs.
    pub fn average(&self) -> Reduction {
        if self.participants == self.communicator.world() {
            return Reduction::new(ReduceOp::Average).detect_nonfinite();
        }
        Reduction::sum_scaled_by(1.0 / self.participants as f64).detect_nonfinite()
    }

    /// Its parameters and their elements. Elements between them are zero.
    pub fn parameters(&self) -> impl Iterator<Item = (&'a Parameter, Range<usize>)> + use<'a> {
        let plan = self.plan;
        let members = &plan.layout.plans()[self.index].parameters;
        members.iter().map(move |&parameter| {
            (&plan.parameters[parameter], plan.layout.home(parameter).elements.clone())
        })
    }

    /// Its elements.
    ///
    /// # Panics
    /// If they are of another type.
    pub fn elements<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: `new`'s caller has the bucket alone, and lends it out once at a time here.
        unsafe { self.plan.bucket_mut(self.index) }
    }

    /// Runs a collective in place on all elements, and records whether it reports infinities or
    /// NaNs.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn run(&mut self, collective: &Collective) -> Result<(), Error> {
        match self.dtype() {
            Dtype::F16 => self.run_as::<f16>(collective),
            Dtype::Bf16 => self.run_as::<bf16>(collective),
            Dtype::F64 => self.run_as::<f64>(collective),
            _ => self.run_as::<f32>(collective),
        }
    }

    fn run_as<T: Element>(&mut self, collective: &Collective) -> Result<(), Error> {
        let communicator = self.communicator;
        let outcome = communicator.run(collective, Buffers::InPlace(self.elements::<T>()))?;
        self.nonfinite |= outcome.nonfinite;
        Ok(())
    }

    /// Makes the step report that a gradient is infinite or NaN, on all ranks.
    pub const fn found_nonfinite(&mut self) {
        self.nonfinite = true;
    }

    pub(super) const fn is_nonfinite(&self) -> bool {
        self.nonfinite
    }

    /// That this rank has no memory for what a hook keeps for the bucket.
    pub(super) fn lacks_memory(&self, why: &dyn fmt::Display) -> Error {
        let text = format!("what belongs to {} elements: {why}", self.len());
        Error::new(ErrorKind::Memory, text).on(self.communicator.rank())
    }
}

impl fmt::Debug for Bucket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.plan.describe_bucket(self.index))
    }
}

/// Averages buckets in place, in their own type.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllReduce;

impl Hook for AllReduce {
    fn name(&self) -> String {
        "all-reduce".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        bucket.run(&Collective::all_reduce(bucket.average()))
    }
}
