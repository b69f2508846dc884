//! Gradient buckets: the layer that a training framework calls during the backward pass.
//!
//! Gradients become ready one by one, last layer first. The layer stores them back to back in
//! *buckets* of registered memory and averages each bucket over all ranks as soon as all its
//! gradients are ready, while the backward pass continues: few, large and early reductions. The
//! method is that of PyTorch's DDP (Li et al., "PyTorch Distributed", VLDB 2020).
//!
//! ```
//! use unisum::buckets::{Buckets, Parameter};
//! use unisum::{Communicator, Dtype};
//!
//! fn train(communicator: &Communicator) -> Result<(), unisum::Error> {
//!     let weight = Parameter::new("weight", &[128, 64], Dtype::F32);
//!     let bias = Parameter::new("bias", &[64], Dtype::F32);
//!     let mut buckets = Buckets::builder(communicator).build(&[weight, bias])?;
//!     for _ in 0..3 {
//!         let step = buckets.begin()?;
//!         // The backward pass, on any threads: each gradient is written where it is reduced.
//!         for parameter in [1, 0] {
//!             let mut gradient = step.view::<f32>(parameter)?;
//!             gradient.iter_mut().for_each(|element| *element += 1.0);
//!             gradient.ready();
//!         }
//!         let report = step.wait()?;
//!         assert!(!report.nonfinite);
//!         // The optimiser reads the averages.
//!         assert_eq!(buckets.gradient::<f32>(1)[0], 1.0);
//!     }
//!     Ok(())
//! }
//! # train(&Communicator::builder().rank(0).world(1).connect().unwrap()).unwrap();
//! ```
//!
//! # Rules
//! - All ranks have the same parameters in the same order. This is checked, and the first
//!   difference is named. Buckets are launched in the same order on all ranks, whatever the order
//!   of readiness.
//! - After the first step, buckets are laid out once more, in the order in which rank 0's gradients
//!   became ready.
//! - A step ends in the same way on all ranks: all commit to it, or all get the same error. A rank
//!   votes when its program has handed in the step by [`Step::wait`] or [`Step::finish`]; an error
//!   of one rank before that, including a panic or a dropped step, fails the step. A lost rank ends
//!   the job.
//! - Nothing is copied: views lie in the memory that is reduced.

mod builder;
mod codec;
mod compressed;
#[cfg(feature = "cuda")]
mod device;
mod elastic;
mod flight;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hook;
mod layout;
mod low_rank;
mod parameter;
mod per_bucket;
mod place;
mod plan;
mod power;
mod repeating;
mod report;
mod resharding;
mod scaler;
mod shard;
mod shard_state;
mod step;
mod trace;
mod tuner;
mod worker;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use unisum_kernels::{Element, Panic};
use unisum_link::fork;

pub use builder::Builder;
pub use compressed::Compressed;
#[cfg(feature = "cuda")]
pub use device::{DeviceBuckets, DeviceBuilder, DevicePlace, DeviceStep};
pub use elastic::StepChange;
pub use hook::{AllReduce, Bucket, Hook};
pub use layout::Layout;
pub use low_rank::LowRank;
pub use parameter::Parameter;
pub use place::Place;
pub use report::{BucketReport, StepReport};
pub use resharding::ShardMove;
pub use scaler::LossScaler;
pub use shard::{Gathering, ShardPiece, Weights};
pub use shard_state::{Resharded, ShardState};
pub use step::{BucketWork, Step, StepWork, View};
pub use trace::Trace;
pub use tuner::Advice;
pub use unisum_kernels::Encoding;

use crate::{Buffers, Collective, Communicator, Error, ErrorKind};
use flight::{Cycle, InFlightStep, Purpose};
use layout::Limits;
use plan::Plan;
use worker::{Core, Order};

/// The gradients of a model in buckets, on one rank. See the [module](self).
pub struct Buckets {
    core: Arc<Core>,
    plan: Arc<Plan>,
    limits: Limits,
    /// The last step.
    last: Option<Arc<InFlightStep>>,
    /// The last gathering of weights.
    gather: Option<Arc<shard::Gather>>,
    /// What has accumulated since the last reduction.
    cycle: Option<Arc<Cycle>>,
    /// Parameters that this rank never uses, once that is known.
    never_used: Option<Vec<usize>>,
    /// Dropped before the thread is joined.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
    fork_generation: u32,
}

impl Buckets {
    /// A builder, with default settings, of a layer for the ranks of a communicator.
    pub fn builder(communicator: &Communicator) -> Builder<'_> {
        Builder::new(communicator)
    }

    fn new(
        core: Arc<Core>,
        plan: Arc<Plan>,
        limits: Limits,
        (orders, thread): (Sender<Order>, JoinHandle<()>),
    ) -> Self {
        let (orders, thread) = (Some(orders), Some(thread));
        let (last, gather, cycle, never_used) = (None, None, None, None);
        let fork_generation = fork::generation();
        Self {
            core,
            plan,
            limits,
            last,
            gather,
            cycle,
            never_used,
            orders,
            thread,
            fork_generation,
        }
    }

    /// The parameters, in the given order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.plan.parameters
    }

    /// Where the gradients lie.
    pub fn layout(&self) -> &Layout {
        &self.plan.layout
    }

    /// Begins a step whose gradients, together with those accumulated before, are averaged over all
    /// ranks. Blocks only to lay buckets out once more, in the second step.
    ///
    /// Collective: every rank begins its steps, reducing or accumulating, in the same order; a rank
    /// that has no more data calls [`Buckets::join`].
    ///
    /// # Errors
    /// If the job ended, or there is no memory for the new layout.
    pub fn begin(&mut self) -> Result<Step<'_>, Error> {
        self.launch(Purpose::Reduce)
    }

    /// Begins a step whose gradients stay on this rank and are added to those of the next steps,
    /// until [`Buckets::begin`] begins one: gradient accumulation, called `no_sync` elsewhere. Its
    /// [`Step::wait`] does not block.
    ///
    /// Every rank accumulates the same number of steps; otherwise the step that reduces them fails
    /// on all ranks with [`ErrorKind::Mismatch`]. With [`Builder::uneven_inputs`], the numbers may
    /// differ.
    ///
    /// # Errors
    /// As [`Buckets::begin`].
    pub fn begin_accumulating(&mut self) -> Result<Step<'_>, Error> {
        self.launch(Purpose::Accumulate)
    }

    /// Takes part, without data of its own, in the steps of the ranks that still have data, until
    /// all ranks have called this. After each step, whose averages all ranks get, `update` is
    /// called: the optimizer's step, so that the models stay the same.
    ///
    /// Collective: every rank calls it when it has no more data. Blocks until all ranks have.
    ///
    /// # Errors
    /// As [`Step::wait`], and what `update` returns. [`ErrorKind::Configuration`] without
    /// [`Builder::uneven_inputs`].
    ///
    /// # Panics
    /// If `update` panics: the job ends on all ranks with [`ErrorKind::Panicked`].
    pub fn join(
        &mut self,
        mut update: impl FnMut(&mut Self, &StepReport) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !self.core.settings.uneven_inputs {
            let text = "joining takes buckets that were built with `uneven_inputs`";
            let error = Error::new(ErrorKind::Configuration, text);
            return Err(error.on(self.core.communicator().rank()));
        }
        loop {
            let report = self.launch(Purpose::Shadow)?.wait()?;
            if report.participants == 0 {
                return Ok(());
            }
            let updated = Panic::catch(|| update(self, &report)).unwrap_or_else(|panic| {
                let what = format!("the update of `join` panicked: {}", panic.text());
                self.core.panicked_between_calls(&what);
                panic.resume()
            });
            updated?;
        }
    }

    /// The communicator of the job's view, if steps have changed the view
    /// ([`StepReport::change`]) since the program took one the last time: in place of the earlier
    /// one, which has ended. Not collective, not blocking. `None` in a job that is not elastic.
    pub fn take_communicator(&mut self) -> Option<Communicator> {
        self.core.continuity.as_ref()?.take_communicator()
    }

    /// Lets the processes into the job that ask for it ([`StepReport::newcomers`]), and goes on
    /// with them: the communicator of the view, in place of the program's earlier one. As
    /// [`Communicator::admit`], but these buckets, their gradients and their hook's state stay.
    ///
    /// Collective: every rank calls it, between two steps, and none while gradients accumulate.
    /// Newcomers build their own buckets meanwhile, with the same parameters and settings, before
    /// they call anything else on their communicator.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] in a job that is not elastic, in sharded mode, or while
    /// gradients accumulate; [`ErrorKind::Mismatch`], on all ranks, if a newcomer has other
    /// parameters or settings; as [`Communicator::admit`].
    pub fn admit(&mut self) -> Result<Communicator, Error> {
        let rank = self.core.communicator().rank();
        if self.is_forked() {
            return Err(Error::forked().on(rank));
        }
        self.settle();
        if self.cycle.is_some() {
            let text = "newcomers enter after a step that reduces, not while gradients accumulate";
            return Err(Error::new(ErrorKind::Configuration, text).on(rank));
        }
        self.core.admit()
    }

    /// The view of the last step, in an elastic job.
    pub fn view(&self) -> Option<crate::View> {
        self.settle();
        self.core.continuity.as_ref().map(elastic::Continuity::view)
    }

    /// Whether this process is a child of the one that made the layer: it has no thread.
    fn is_forked(&self) -> bool {
        fork::current() != self.fork_generation
    }

    fn launch(&mut self, purpose: Purpose) -> Result<Step<'_>, Error> {
        if self.is_forked() {
            return Err(Error::forked().on(self.core.communicator().rank()));
        }
        self.settle();
        if let Some(error) = self.core.refusal() {
            return Err(error);
        }
        if self.cycle.is_none() {
            self.relayout()?;
        }
        let parameters = self.plan.parameters.len();
        let cycle = self.cycle.take().unwrap_or_else(|| Cycle::new(parameters));
        let flight = Arc::new(InFlightStep::new(self.plan.clone(), cycle.clone(), purpose));
        if purpose == Purpose::Accumulate {
            cycle.accumulates();
            self.cycle = Some(cycle);
        } else {
            flight.close_those(self.never_used.iter().flatten().copied());
            self.order(Order::Step(flight.clone()));
        }
        self.last = Some(flight.clone());
        let settings = &self.core.settings;
        let needs_all =
            purpose == Purpose::Reduce && !settings.unused_parameters && !settings.static_graph;
        Ok(Step::new(flight, self.core.communicator().rank(), needs_all))
    }

    fn order(&self, order: Order) {
        let orders = self.orders.as_ref().expect("there until the drop");
        orders.send(order).expect("the thread takes orders until the drop");
    }

    /// Waits until the last step, which may have been dropped, has ended.
    fn settle(&self) {
        self.close_forgotten();
        if let Some(last) = &self.last {
            // Who waited for it was told.
            let _ = last.await_end();
        }
    }

    /// The same, and the last gathering of weights: what the caller's thread does on the
    /// communicator then comes after them on all ranks.
    fn settle_all(&self) {
        self.settle();
        if let Some(gather) = &self.gather {
            gather.settle();
        }
    }

    /// Fails the last step if it was neither waited for nor dropped: `mem::forget` does that.
    fn close_forgotten(&self) {
        // A step borrows the layer for itself alone: whoever comes here has none any more.
        if let Some(last) = self.last.as_ref().filter(|last| !last.is_closed()) {
            last.fail("the step was forgotten before it was waited for".into());
            last.close(self.core.communicator().rank());
        }
    }

    /// Calls a method of the hook between steps, on the program's thread. A panic goes on once all
    /// ranks were told.
    fn call_hook<R>(&self, method: &str, call: impl FnOnce(&mut dyn Hook) -> R) -> R {
        self.settle();
        self.core.with_hook(call).unwrap_or_else(|panic| {
            self.core.panicked_between_calls(&hook::panicked_in(method, &panic));
            panic.resume()
        })
    }

    /// After the first step: what never will be used, and the order in which rank 0's gradients
    /// became ready.
    fn relayout(&mut self) -> Result<(), Error> {
        let Some(last) = self.last.as_ref().filter(|_| self.core.steps() == 1) else {
            return Ok(());
        };
        if self.core.settings.static_graph {
            let used = last.used().into_iter().enumerate();
            let unused = used.filter_map(|(parameter, used)| (!used).then_some(parameter));
            self.never_used = Some(unused.collect());
        }
        if !self.core.settings.relayout || self.plan.layout.version() != 0 {
            return Ok(());
        }
        let observed = last.observed_order();
        let mut order: Vec<u32> = observed.iter().map(|&parameter| parameter as u32).collect();
        let communicator = &self.core.communicator();
        communicator.run(&Collective::broadcast(0), Buffers::InPlace(&mut order))?;
        let order: Vec<usize> = order.iter().map(|&parameter| parameter as usize).collect();
        let layout = Layout::new(1, &self.plan.parameters, &order, self.limits);
        self.last = None;
        let plan = Plan::new(self.plan.parameters.clone(), layout, communicator);
        // A rank without memory for it must not leave the others waiting.
        let why = plan.as_ref().map_or_else(ToString::to_string, |_| String::new());
        builder::refuse_any(communicator, &communicator.exchange(why.into_bytes())?)?;
        self.plan = plan?.into();
        Ok(())
    }

    /// A parameter's gradient: after a step, the average over the ranks that took part; after an
    /// accumulating step, this rank's own. Blocks if a step was dropped and has not ended.
    ///
    /// # Panics
    /// If there is no such parameter, or its gradient has another type.
    pub fn gradient<T: Element>(&self, parameter: usize) -> &[T] {
        self.settle();
        // SAFETY: the last step has ended, and a new one needs `&mut self`.
        unsafe { self.plan.elements(parameter) }
    }

    /// As [`Buckets::gradient`], for changes in place, such as clipping or unscaling.
    ///
    /// # Panics
    /// As [`Buckets::gradient`].
    pub fn gradient_mut<T: Element>(&mut self, parameter: usize) -> &mut [T] {
        self.settle();
        // SAFETY: the last step has ended, and `&mut self` keeps everybody else away.
        unsafe { self.plan.elements_mut(parameter) }
    }

    /// Where a parameter's gradient lies now. Not blocking.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn place(&self, parameter: usize) -> Place {
        Place::of_parameter(self.plan.clone(), parameter)
    }

    /// Announces that, from the next step on, gradients have a loss scale that is `factor` times
    /// the last one ([`LossScaler`]): the state the hook keeps of them is multiplied. All ranks
    /// make the same call.
    ///
    /// # Panics
    /// If the hook panics: the job ends on all ranks with [`ErrorKind::Panicked`].
    pub fn rescale_hook(&mut self, factor: f32) {
        self.call_hook("rescale", |hook| hook.rescale(factor));
    }

    /// The state that the hook keeps from step to step, for a checkpoint: this rank's own.
    ///
    /// # Panics
    /// As [`Buckets::rescale_hook`].
    pub fn save_hook(&self) -> Vec<u8> {
        self.call_hook("save", |hook| hook.save())
    }

    /// Restores the hook's state from [`Buckets::save_hook`].
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the hook rejects it, [`ErrorKind::Panicked`] if it panics:
    /// the job has then ended on all ranks.
    pub fn restore_hook(&mut self, saved: &[u8]) -> Result<(), Error> {
        self.settle();
        let restored = self.core.with_hook(|hook| hook.restore(saved));
        let restored =
            restored.map_err(|panic| self.core.panicked(&hook::panicked_in("restore", &panic)))?;
        restored.map_err(|text| {
            Error::new(ErrorKind::Configuration, text).on(self.core.communicator().rank())
        })
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        if self.is_forked() {
            // The thread is the parent's, and may have held any lock when the child was made.
            std::mem::forget((self.orders.take(), self.thread.take(), self.core.clone()));
            return;
        }
        self.close_forgotten();
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            // A step that was dropped ends first: the others take part in it.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Buckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Buckets");
        debug.field("parameters", &self.plan.parameters.len());
        debug.field("buckets", &self.plan.layout.buckets().len()).finish_non_exhaustive()
    }
}
