//! The communicator: the collectives that a program calls.

pub(crate) mod builder;
mod calls;
pub(crate) mod elastic;
pub(crate) mod groups;
pub(crate) mod mesh;
mod state;

use std::fmt;
use std::sync::OnceLock;

use unisum_kernels::Element;
use unisum_link::Rank;

use crate::collective::reduction::Reduction;
use crate::collective::{Buffers, Collective};
use crate::execution::member::Member;
use crate::execution::programs;
use crate::execution::stats::Stats;
use crate::memory::Arena;
use crate::memory::buffer::Buffer;
use crate::wiring::{Description, Epoch};
use crate::{Builder, Error, ErrorKind};

/// This process's membership in a job: one rank of a world of ranks that reduce together.
///
/// All ranks call the same collectives in the same order. Calls may come from several threads; they
/// then run one after another, and the program must ensure that the order is the same on all ranks.
/// Dropping a communicator leaves the job; it blocks until asynchronous collectives under way have
/// ended.
///
/// After an error, the communicator is aborted on every rank: create a new one, or end. In an
/// elastic job ([`Builder::elastic`]), the ranks that are left after a loss can
/// [`rebuild`](Communicator::rebuild) it.
#[derive(Debug)]
pub struct Communicator {
    rank: Rank,
    world: usize,
    /// `None` in a world of one, which needs no peers.
    pub(crate) member: Option<Member>,
    description: Box<Description>,
    /// Why a world of one was aborted, if it was.
    aborted: OnceLock<Error>,
    /// Of an elastic job's own communicator.
    epoch: Option<Epoch>,
}

impl Communicator {
    /// Joins the job that this process was started in: the world of the innermost launcher
    /// (torchrun, `mpirun`, `srun`, …) or of the `UNISUM_*` variables; see docs/configuration.md.
    ///
    /// Collective: every rank of the job calls it. Blocks until all ranks have joined.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if variables are missing, malformed or contradictory,
    /// [`ErrorKind::Rendezvous`] if the job cannot be joined in time.
    #[doc(alias = "init")]
    pub fn from_environment() -> Result<Self, Error> {
        Self::builder().connect()
    }

    /// A builder that starts from the environment; its arguments take precedence.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn new(
        rank: Rank,
        world: usize,
        member: Option<Member>,
        description: Description,
    ) -> Self {
        let aborted = OnceLock::new();
        let description = Box::new(description);
        Self { rank, world, member, description, aborted, epoch: None }
    }

    /// This process's rank in the world, from 0.
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// The number of ranks.
    #[doc(alias = "size")]
    #[doc(alias = "world_size")]
    pub const fn world(&self) -> usize {
        self.world
    }

    /// This rank's index among the communicator's ranks on its host, from 0, in the order of their
    /// ranks here: it can select one of the host's devices.
    pub fn local_rank(&self) -> Rank {
        self.on_this_host().filter(|&rank| rank < self.rank).count()
    }

    /// The number of the communicator's ranks on this rank's host. Containers with their own host
    /// name or network count as separate hosts.
    pub fn local_size(&self) -> usize {
        self.on_this_host().count().max(1)
    }

    /// The ranks on this rank's host; empty in a world of one.
    fn on_this_host(&self) -> impl Iterator<Item = Rank> {
        let hosts = self.member.as_ref().map(|member| {
            let ranks = member.core.runner.membership.ranks();
            member.core.job.hosts(ranks)
        });
        let hosts = hosts.unwrap_or_default();
        let own = self.rank;
        (0..hosts.len()).filter(move |&rank| hosts[rank] == hosts[own])
    }

    /// Whether a rank is on this rank's host.
    #[cfg(feature = "cuda")]
    pub(crate) fn shares_host(&self, rank: Rank) -> bool {
        rank == self.rank || self.on_this_host().any(|it| it == rank)
    }

    /// Fixes the algorithm of small all-gathers for good, so that none is tried out for them;
    /// returns which algorithm was fixed before.
    #[cfg(feature = "cuda")]
    pub(crate) fn fix_for_cards(&self, bytes: usize) -> Result<Option<usize>, Error> {
        let Some(member) = &self.member else { return Ok(None) };
        let choice = &member.core.runner.choice;
        let fixed = Some(choice.fixed()).filter(|&it| it != crate::autotuning::selector::AUTO);
        choice.fix(None);
        let name = self.choice::<u8>(&Collective::all_gather(), bytes * self.world);
        self.set_algorithm(Some(name))?;
        Ok(fixed)
    }

    /// Reduces `data` element by element over all ranks and leaves the result on every rank.
    ///
    /// [`Communicator::run`] with [`Collective::all_reduce`]; see there.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "allreduce")]
    pub fn all_reduce<T: Element>(
        &self,
        data: &mut [T],
        how: impl Into<Reduction>,
    ) -> Result<(), Error> {
        self.run(&Collective::all_reduce(how), Buffers::InPlace(data)).map(drop)
    }

    /// Reduces `data` over all ranks and leaves the result at `root`; on other ranks, `data` stays
    /// unchanged.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn reduce<T: Element>(
        &self,
        data: &mut [T],
        how: impl Into<Reduction>,
        root: Rank,
    ) -> Result<(), Error> {
        self.run(&Collective::reduce(how, root), Buffers::InPlace(data)).map(drop)
    }

    /// Copies the `data` of `root` to all ranks.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "bcast")]
    pub fn broadcast<T: Element>(&self, data: &mut [T], root: Rank) -> Result<(), Error> {
        self.run(&Collective::broadcast(root), Buffers::InPlace(data)).map(drop)
    }

    /// Gathers the `input` of all ranks, in rank order, into the `output` of all ranks, which is
    /// world times as long as `input`.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "allgather")]
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        self.run(&Collective::all_gather(), Buffers::OutOfPlace(input, output)).map(drop)
    }

    /// Reduces the `input` of all ranks and leaves this rank's block in `output`; `input` is world
    /// times as long.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "reducescatter")]
    pub fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        how: impl Into<Reduction>,
    ) -> Result<(), Error> {
        self.run(&Collective::reduce_scatter(how), Buffers::OutOfPlace(input, output)).map(drop)
    }

    /// Sends block r of `input` to rank r, and receives its block for this rank in block r of
    /// `output`.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "alltoall")]
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        self.run(&Collective::all_to_all(), Buffers::OutOfPlace(input, output)).map(drop)
    }

    /// Gathers the `input` of all ranks, in rank order, into the `output` of `root`; on other
    /// ranks, `output` may be empty.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn gather<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        root: Rank,
    ) -> Result<(), Error> {
        self.run(&Collective::gather(root), Buffers::OutOfPlace(input, output)).map(drop)
    }

    /// Sends block r of the `input` of `root` to the `output` of rank r; on other ranks, `input`
    /// may be empty.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        root: Rank,
    ) -> Result<(), Error> {
        self.run(&Collective::scatter(root), Buffers::OutOfPlace(input, output)).map(drop)
    }

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn barrier(&self) -> Result<(), Error> {
        self.run::<u8>(&Collective::barrier(), Buffers::InPlace(&mut [])).map(drop)
    }

    /// Ends the job on all ranks for a reason of the program. Calls that are under way or waiting,
    /// here and elsewhere, in this communicator and all others of the job, end within moments with
    /// an error of kind [`ErrorKind::Aborted`] that names this rank and states `why`. Later calls
    /// repeat it. In an elastic job, this ends only the communicator that it is called on and
    /// groups of all its ranks.
    ///
    /// Not collective: any thread of any rank may call it while others are in calls. Blocks until
    /// this rank knows that the job has ended, which is at once unless the network is stuck.
    /// Returns the error that all ranks get: an earlier one if there was one.
    pub fn abort(&self, why: &str) -> Error {
        let Some(member) = &self.member else {
            let text = format!("rank {} aborted the job: {why}", self.rank);
            let error = || Error::new(ErrorKind::Aborted, text).on(self.rank);
            return self.aborted.get_or_init(|| error().caused_by(vec![self.rank])).clone();
        };
        member.core.runner.abort(why)
    }

    /// Ends the job on all ranks, as [`Communicator::abort`] does, because this one lacks something
    /// that the system gives.
    pub(crate) fn lacks(&self, what: &str) -> Error {
        match &self.member {
            Some(member) => member.core.runner.lacks(what),
            None => self.abort(what),
        }
    }

    /// The time of an all-reduce of this many bytes according to the cost model.
    pub(crate) fn all_reduce_seconds(&self, bytes: usize) -> f64 {
        self.member.as_ref().map_or(0.0, |it| it.core.runner.choice.all_reduce_seconds(bytes))
    }

    /// Why every later call will fail, if a call has failed.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.member.as_ref().and_then(|member| member.core.runner.failure())
    }

    /// The error of a call that is not made because an earlier one failed, if one has.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.member.as_ref().and_then(|member| member.core.runner.check().err())
    }

    /// Ends the job on all ranks because user code panicked on this one; returns the error for the
    /// caller ([`Runner::panicked`](crate::execution::runner::Runner::panicked)).
    pub(crate) fn panicked(&self, what: &str) -> Error {
        self.member
            .as_ref()
            .map_or_else(|| self.panicked_alone(what), |member| member.core.runner.panicked(what))
    }

    /// The same where no call returns the error: the next one does.
    pub(crate) fn panicked_between_calls(&self, what: &str) -> Error {
        self.member.as_ref().map_or_else(
            || self.panicked_alone(what),
            |member| member.core.runner.panicked_between_calls(what),
        )
    }

    fn panicked_alone(&self, what: &str) -> Error {
        let text = format!("on rank {} {what}", self.rank);
        Error::new(ErrorKind::Panicked, text).on(self.rank).caused_by(vec![self.rank])
    }

    /// Why the job has ended, or is about to, even if no call here has failed yet. Waits for about
    /// 2 s at most where that is being found out.
    pub(crate) fn verdict_that_comes(&self) -> Option<Error> {
        let runner = &self.member.as_ref()?.core.runner;
        runner.membership.verdict_that_comes().map(|it| runner.membership.told(&it).on(self.rank))
    }

    /// Why the job has ended, if it has, even if no call here has failed yet.
    #[cfg(feature = "cuda")]
    pub(crate) fn verdict(&self) -> Option<Error> {
        let runner = &self.member.as_ref()?.core.runner;
        runner.membership.verdict().map(|it| runner.membership.told(&it).on(self.rank))
    }

    /// Allocates `count` zeroed elements in memory that the links access without copies, because
    /// peers on this host map it. Not collective.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if the system has no more.
    pub fn allocate<T: Element>(&self, count: usize) -> Result<Buffer<T>, Error> {
        let refuse = |why: &dyn fmt::Display| {
            let text = format!("allocating {count} elements of {}: {why}", T::DTYPE);
            Error::new(ErrorKind::Memory, text).on(self.rank)
        };
        let bytes = count
            .checked_mul(size_of::<T>())
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| refuse(&"more bytes than an address space has"))?;
        let arena = self
            .member
            .as_ref()
            .map_or_else(Arena::default, |member| member.core.job.arena.clone());
        let memory = arena.allocate(bytes).map_err(|error| refuse(&error))?;
        // SAFETY: the memory is zeroed, page-aligned and `bytes` long; zero is a value of every
        // element type.
        Ok(unsafe { Buffer::new(memory, count) })
    }

    /// Runs `with` on `data`, which stays registered with the RDMA devices meanwhile: collectives
    /// on it, or on parts of it, neither copy nor register it. Not collective.
    ///
    /// For memory that comes from elsewhere and is used often, such as a framework's pool. Memory
    /// of [`Communicator::allocate`] is always registered, and ranks of the same host access it as
    /// well. Without RDMA, this only runs `with`. If the system refuses to register the memory, a
    /// warning says so, and the memory is used like any other.
    ///
    /// Cost: a system call for each device at the beginning and the end, and some time for each
    /// page.
    pub fn with_registered<T: Element, R>(
        &self,
        data: &mut [T],
        with: impl FnOnce(&mut [T]) -> R,
    ) -> R {
        let _registered = self.member.as_ref().map(|member| {
            let start = std::ptr::NonNull::from(&mut *data).cast();
            // SAFETY: `data` is borrowed for longer than this call, which ends the registration,
            // also when `with` panics.
            unsafe { member.core.job.arena.register(start, size_of_val(data)) }
        });
        with(data)
    }

    /// The algorithm that this collective uses on buffers of `count` elements (the longer of input
    /// and output): the same on all ranks. Before the first call of a size (up to the next power of
    /// two of bytes), it is the choice of the cost model. That call tries the candidates on its own
    /// buffers for at most 0.75 s and settles on the fastest; if the call takes so long that no
    /// other run fits, it settles on the choice of the model.
    pub fn choice<T: Element>(&self, collective: &Collective, count: usize) -> &'static str {
        self.member.as_ref().map_or("none", |member| {
            let choice = &member.core.runner.choice;
            let key = collective.typical_key(self.world, T::DTYPE, count);
            let shape = programs::shape(&key, self.rank, choice.topology());
            let list = unisum_algorithms::algorithms(shape.collective);
            list[choice.algorithm(&shape, &key)].name()
        })
    }

    /// Fixes the algorithm of all later calls, or, with `None`, has it chosen for each call (see
    /// [`Communicator::choice`]). All ranks make the same call, between collectives.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if no algorithm has that name.
    pub fn set_algorithm(&self, name: Option<&str>) -> Result<(), Error> {
        let index = name.map(crate::autotuning::selector::index_of).transpose()?;
        if let Some(member) = &self.member {
            member.core.runner.choice.fix(index);
        }
        Ok(())
    }

    /// Which launcher started the ranks, or what the communicator was made from.
    pub(crate) fn origin(&self) -> &str {
        &self.description.origin
    }

    /// The transports in use, such as "tcp", "shm" or "shm+tcp".
    pub fn transport(&self) -> &str {
        &self.description.transport
    }

    /// What this rank has done so far in this communicator's collectives, and what it is doing.
    /// Not collective. May be called from any thread at any time, also while a call is stuck: it
    /// takes no lock and never waits. In a world of one everything is zero.
    pub fn stats(&self) -> Stats {
        self.member
            .as_ref()
            .map_or_else(Stats::default, |member| member.core.runner.stats(self.world))
    }

    /// Describes which launcher started the ranks and how they found each other, where they are,
    /// what the links cost, and which algorithm is chosen from which size on, as data. Printed, it
    /// is several lines for people. Not collective; never waits.
    pub fn describe(&self) -> Description {
        let member = self.member.as_ref();
        let algorithms = member.map(|member| member.core.runner.choice.ranges());
        let algorithms = algorithms.unwrap_or_default();
        Description { algorithms, ..(*self.description).clone() }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let Some(member) = self.member.take() else { return };
        if member.core.runner.is_forked() {
            // Nothing may be dropped here: a thread that exists only in the parent may hold a lock.
            return std::mem::forget(member);
        }
        let core = member.core.clone();
        drop(member.core);
        // The last to hold the core leaves.
        member.background.finish(move || drop(core));
    }
}
