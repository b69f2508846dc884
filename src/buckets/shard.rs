//! Sharded buckets: each rank averages and updates its share of every bucket (ZeRO-2, FSDP).
//!
//! Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
//! models", SC 2020, arXiv:1910.02054.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use unisum_kernels::{Element, Panic};
use unisum_link::fork;

use super::hook::{Bucket, Hook};
use super::plan::Plan;
use super::worker::{Core, Order};
use super::{Buckets, Layout, Place};
use crate::{Collective, Error, ErrorKind};

/// Averages for each rank its shard of a bucket, in place.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReduceScatter;

impl Hook for ReduceScatter {
    fn name(&self) -> String {
        "reduce-scatter".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        bucket.run(&Collective::reduce_scatter(bucket.average()))
    }
}

/// The elements of a parameter in a rank's shard of a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPiece {
    /// The parameter, by its index in the list.
    pub parameter: usize,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// Where the first of them is in the shard.
    pub at: usize,
}

impl Layout {
    /// The elements of a bucket that rank `rank` of `world` has.
    pub(super) fn shard(&self, bucket: usize, (rank, world): (usize, usize)) -> Range<usize> {
        let each = self.plans()[bucket].len / world;
        rank * each..(rank + 1) * each
    }

    pub(super) fn shard_pieces(&self, bucket: usize, shard: &Range<usize>) -> Vec<ShardPiece> {
        let piece = |&parameter: &usize| {
            let whole = &self.home(parameter).elements;
            let both = whole.start.max(shard.start)..whole.end.min(shard.end);
            (both.start < both.end).then(|| ShardPiece {
                parameter,
                elements: both.start - whole.start..both.end - whole.start,
                at: both.start - shard.start,
            })
        };
        self.plans()[bucket].parameters.iter().filter_map(piece).collect()
    }
}

impl Buckets {
    /// The elements of a bucket that this rank averages if buckets are
    /// [sharded](super::Builder::sharded): the same number on each rank, those of rank 0 first.
    ///
    /// # Panics
    /// If there is no such bucket, or buckets are not sharded.
    pub fn shard(&self, bucket: usize) -> Range<usize> {
        let world = self.core.communicator().world();
        assert_eq!(self.limits.pieces, world, "these buckets are not sharded");
        self.plan.layout.shard(bucket, (self.core.communicator().rank(), world))
    }

    /// The elements of parameters that this rank's shard of a bucket consists of, besides padding.
    ///
    /// # Panics
    /// As [`Buckets::shard`].
    pub fn shard_pieces(&self, bucket: usize) -> Vec<ShardPiece> {
        self.plan.layout.shard_pieces(bucket, &self.shard(bucket))
    }

    /// This rank's shard of a bucket's gradients: after a step, the averages.
    ///
    /// # Panics
    /// As [`Buckets::shard`], and if the elements have another type.
    pub fn shard_gradient<T: Element>(&self, bucket: usize) -> &[T] {
        self.settle();
        // SAFETY: the last step has ended, and a new one needs `&mut self`.
        let elements = unsafe { self.plan.bucket::<T>(bucket) };
        &elements[self.shard(bucket)]
    }

    /// Where [`Buckets::shard_gradient`] lies. Not blocking.
    ///
    /// # Panics
    /// As [`Buckets::shard`].
    pub fn shard_place(&self, bucket: usize) -> Place {
        Place::of_bucket(self.plan.clone(), bucket).part(self.shard(bucket))
    }

    /// Allocates memory for the parameters themselves, in the layout and types of the gradients,
    /// zeroed: each rank updates its shards, and [`Buckets::gather`] completes them. Not
    /// collective.
    ///
    /// # Errors
    /// If there is no memory.
    ///
    /// # Panics
    /// If buckets are not sharded.
    pub fn weights(&self) -> Result<Weights, Error> {
        let world = self.core.communicator().world();
        assert_eq!(self.limits.pieces, world, "these buckets are not sharded");
        let (parameters, layout) = (self.plan.parameters.clone(), self.plan.layout.clone());
        let plan = Plan::new(parameters, layout, &self.core.communicator())?;
        let place = (self.core.communicator().rank(), world);
        Ok(Weights { plan: plan.into(), place, last: None })
    }

    /// Starts to gather all shards of the weights on all ranks, in the order in which the forward
    /// pass needs them: the last bucket first. Does not block.
    ///
    /// Collective: every rank calls it between the same steps.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the weights belong to other buckets, or were made when this
    /// rank had another number: its shards were others. [`Gathering`] reports other errors.
    pub fn gather<'w>(&mut self, weights: &'w mut Weights) -> Result<Gathering<'w>, Error> {
        let (rank, world) = (self.core.communicator().rank(), self.core.communicator().world());
        if self.is_forked() {
            return Err(Error::forked().on(rank));
        }
        weights.settle();
        let refused = |text: String| Err(Error::new(ErrorKind::Configuration, text).on(rank));
        if weights.plan.layout != self.plan.layout {
            return refused("these weights are of other buckets".into());
        }
        if weights.place != (rank, world) {
            let (before, ranks) = weights.place;
            return refused(format!("these weights are of rank {before} of {ranks} ranks"));
        }
        let gather = Arc::new(Gather::new(weights.plan.clone()));
        self.order(Order::Gather(gather.clone()));
        (weights.last, self.gather) = (Some(gather.clone()), Some(gather.clone()));
        Ok(Gathering { gather, weights: PhantomData })
    }
}

/// A model's parameters in the memory of sharded buckets ([`Buckets::weights`]).
pub struct Weights {
    plan: Arc<Plan>,
    /// This rank and the world.
    place: (usize, usize),
    last: Option<Arc<Gather>>,
}

impl Weights {
    fn settle(&self) {
        if let Some(last) = &self.last {
            last.settle();
        }
    }

    /// Returns a parameter. Blocks until a started gathering has ended.
    ///
    /// # Panics
    /// If there is no such parameter, or it has another type.
    pub fn get<T: Element>(&self, parameter: usize) -> &[T] {
        self.settle();
        // SAFETY: no gathering is under way, and a new one needs `&mut self`.
        unsafe { self.plan.elements(parameter) }
    }

    /// Returns a parameter to be initialized, in the same way on all ranks.
    ///
    /// # Panics
    /// As [`Weights::get`].
    pub fn get_mut<T: Element>(&mut self, parameter: usize) -> &mut [T] {
        self.settle();
        // SAFETY: no gathering is under way, and `&mut self` keeps everybody else away.
        unsafe { self.plan.elements_mut(parameter) }
    }

    /// Where a parameter lies. Blocks until a started gathering has ended.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn place(&self, parameter: usize) -> Place {
        self.settle();
        Place::of_parameter(self.plan.clone(), parameter)
    }

    /// Where this rank's shard of a bucket lies, as [`Weights::place`].
    ///
    /// # Panics
    /// If there is no such bucket.
    pub fn shard_place(&self, bucket: usize) -> Place {
        self.settle();
        let shard = self.plan.layout.shard(bucket, self.place);
        Place::of_bucket(self.plan.clone(), bucket).part(shard)
    }

    /// Returns this rank's shard of a bucket, for the optimizer to update.
    ///
    /// # Panics
    /// If there is no such bucket, or its elements have another type.
    pub fn shard_mut<T: Element>(&mut self, bucket: usize) -> &mut [T] {
        self.settle();
        let shard = self.plan.layout.shard(bucket, self.place);
        // SAFETY: as in `get_mut`.
        unsafe { &mut self.plan.bucket_mut(bucket)[shard] }
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").field("place", &self.place).finish_non_exhaustive()
    }
}

/// Weights that are being gathered.
#[must_use = "whether they come is told by it"]
pub struct Gathering<'w> {
    gather: Arc<Gather>,
    weights: PhantomData<&'w mut Weights>,
}

impl Gathering<'_> {
    /// Returns a parameter as soon as it is complete; others may still be on their way.
    ///
    /// # Errors
    /// The reason why it never will be.
    ///
    /// # Panics
    /// As [`Weights::get`].
    pub fn get<T: Element>(&self, parameter: usize) -> Result<&[T], Error> {
        let bucket = self.gather.plan.bucket_of(parameter);
        self.gather.wait(|come| come.buckets[bucket])?;
        // SAFETY: the bucket has come, and nobody writes it before the next gathering.
        Ok(unsafe { self.gather.plan.elements(parameter) })
    }

    /// Blocks until all weights have arrived.
    ///
    /// # Errors
    /// As [`Communicator::run`](crate::Communicator::run).
    pub fn wait(self) -> Result<(), Error> {
        self.gather.wait(|come| come.buckets.iter().all(|&come| come))
    }
}

impl fmt::Debug for Gathering<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gathering").finish_non_exhaustive()
    }
}

/// A gathering under way.
pub(super) struct Gather {
    plan: Arc<Plan>,
    come: Mutex<Come>,
    changed: Condvar,
    fork_generation: u32,
}

struct Come {
    /// Which buckets are complete.
    buckets: Vec<bool>,
    failed: Option<Error>,
}

impl Gather {
    fn new(plan: Arc<Plan>) -> Self {
        let come = Come { buckets: vec![false; plan.layout.plans().len()], failed: None };
        let (come, fork_generation) = (Mutex::new(come), fork::generation());
        Self { plan, come, changed: Condvar::new(), fork_generation }
    }

    /// Gathers, on the layer's thread.
    pub(super) fn run(&self, core: &Core) {
        let communicator = core.communicator();
        let gather = |bucket| {
            // SAFETY: who started the gathering waits before anybody touches a bucket that has not
            // come.
            let mut lent =
                unsafe { core.lend(&communicator, &self.plan, bucket, communicator.world()) };
            lent.run(&Collective::all_gather())
        };
        self.run_with(gather, |panic| {
            core.panicked(&format!("gathering weights panicked: {}", panic.text()))
        });
    }

    /// Gathers each bucket, and wakes who waits for it, whatever the end.
    fn run_with(
        &self,
        gather: impl Fn(usize) -> Result<(), Error>,
        panicked: impl Fn(&Panic) -> Error,
    ) {
        for bucket in (0..self.plan.layout.plans().len()).rev() {
            let gathered = Panic::catch(|| gather(bucket));
            let gathered = gathered.unwrap_or_else(|panic| Err(panicked(&panic)));
            let mut come = self.lock();
            match gathered {
                Ok(()) => come.buckets[bucket] = true,
                Err(error) => come.failed = Some(error),
            }
            let failed = come.failed.is_some();
            drop(come);
            self.changed.notify_all();
            if failed {
                return;
            }
        }
    }

    /// Waits until it has ended.
    pub(super) fn settle(&self) {
        // Who waited for it was told.
        let _ = self.wait(|come| come.buckets.iter().all(|&come| come));
    }

    fn wait(&self, is_enough: impl Fn(&Come) -> bool) -> Result<(), Error> {
        if fork::current() != self.fork_generation {
            // Nobody ends it in a child, whose lock may have been taken when it was made.
            return Err(Error::forked());
        }
        let goes_on = |come: &mut Come| come.failed.is_none() && !is_enough(come);
        let waited = self.changed.wait_while(self.lock(), goes_on);
        let come = waited.unwrap_or_else(PoisonError::into_inner);
        if is_enough(&come) {
            return Ok(());
        }
        come.failed.clone().map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, Come> {
        // Each critical section leaves it whole.
        self.come.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use unisum_kernels::Dtype;

    use super::*;
    use crate::Communicator;
    use crate::buckets::Parameter;
    use crate::buckets::layout::Limits;

    #[test]
    fn shards_cover_each_parameter_once() {
        let counts = [1, 100, 33, 0, 5000, 7];
        let new = |&count: &usize| Parameter::new(count.to_string(), &[count], Dtype::F32);
        let list: Vec<_> = counts.iter().map(new).collect();
        for world in 1..8 {
            let limits = Limits { bytes: 600, end_bytes: 100, pieces: world };
            let layout = Layout::new(0, &list, &[5, 4, 3, 2, 1, 0], limits);
            let mut seen: Vec<Vec<usize>> = counts.iter().map(|&count| vec![0; count]).collect();
            for bucket in 0..layout.plans().len() {
                for rank in 0..world {
                    let shard = layout.shard(bucket, (rank, world));
                    for piece in layout.shard_pieces(bucket, &shard) {
                        assert!(piece.at + piece.elements.len() <= shard.len());
                        piece.elements.for_each(|at| seen[piece.parameter][at] += 1);
                    }
                }
            }
            assert!(seen.iter().flatten().all(|&times| times == 1), "{world} ranks: {seen:?}");
        }
    }

    #[test]
    fn a_panic_while_weights_are_gathered_reaches_who_waits_for_them() {
        let communicator =
            Communicator::builder().rank(0).world(1).connect().expect("a world of one");
        let list: Vec<_> =
            [500, 700].map(|count| Parameter::new("weights", &[count], Dtype::F32)).into();
        let limits = Limits { bytes: 2000, end_bytes: 2000, pieces: 1 };
        let layout = Layout::new(0, &list, &[1, 0], limits);
        let buckets = layout.plans().len();
        assert_eq!(buckets, 2);
        let plan = Plan::new(list.into(), layout, &communicator).expect("a little memory");
        let gather = Gather::new(Arc::new(plan));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gather.wait(|come| come.buckets[0]));
            gather.run_with(
                |bucket| if bucket == 0 { panic!("in the first bucket") } else { Ok(()) },
                |panic| Error::new(ErrorKind::Panicked, panic.text()),
            );
            let error = waits.join().expect("it waits only").expect_err("it never comes");
            assert_eq!(error.kind(), ErrorKind::Panicked);
            assert!(error.to_string().contains("in the first bucket"), "{error}");
        });
        // What came before has come.
        assert!(gather.wait(|come| come.buckets[1]).is_ok());
    }
}
