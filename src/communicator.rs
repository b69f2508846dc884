//! The communicator: the collectives as a program calls them.

use std::fmt;
use std::sync::OnceLock;

use unisum_kernels::{Dtype, Element, Panic};
use unisum_link::Rank;

use crate::alone;
use crate::buffer::Buffer;
use crate::collective::{Buffers, Collective, InPlace, Owned};
use crate::judgement::from_verdict;
use crate::member::Member;
use crate::memory::Arena;
use crate::programs;
use crate::reduction::{Outcome, Reduction};
use crate::work::{Promise, Work};
use crate::{Builder, Error, ErrorKind};

/// This process's membership in a job: one rank of a world of ranks that reduce together.
///
/// All ranks call the same collectives in the same order. Calls may come from several threads;
/// they then run one after another, and it is the program's business that the order is the same
/// on all ranks. Dropping a communicator leaves the job; it blocks until asynchronous collectives
/// under way have ended.
///
/// After an error the communicator is aborted on every rank: make a new one, or end.
#[derive(Debug)]
pub struct Communicator {
    rank: Rank,
    world: usize,
    /// `None` in a world of one, which needs nobody.
    pub(crate) member: Option<Member>,
    description: String,
    transport: String,
    /// Why a world of one was aborted, if it was.
    aborted: OnceLock<Error>,
}

impl Communicator {
    /// Joins the job that this process was started in: the world of the innermost launcher
    /// (torchrun, `mpirun`, `srun`, …) or of the `UNISUM_*` variables; see docs/configuration.md.
    ///
    /// Collective: every rank of the job calls it. Blocks until all have come.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if variables are missing, malformed or contradict each other,
    /// [`ErrorKind::Rendezvous`] if the job can't be joined in time.
    #[doc(alias = "init")]
    pub fn from_environment() -> Result<Self, Error> {
        Self::builder().connect()
    }

    /// A builder that starts from the environment and takes arguments that win over it.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) const fn new(
        rank: Rank,
        world: usize,
        member: Option<Member>,
        transport: String,
        description: String,
    ) -> Self {
        let aborted = OnceLock::new();
        Self { rank, world, member, description, transport, aborted }
    }

    /// This process's number in the world, from 0.
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    #[doc(alias = "size")]
    #[doc(alias = "world_size")]
    pub const fn world(&self) -> usize {
        self.world
    }

    /// This rank's place among the communicator's ranks on its host, from 0, as they are numbered
    /// here: which of the host's devices it may take.
    pub fn local_rank(&self) -> Rank {
        self.on_this_host().filter(|&rank| rank < self.rank).count()
    }

    /// How many of the communicator's ranks are on this rank's host. Containers with a host name or
    /// a network of their own are hosts of their own.
    pub fn local_size(&self) -> usize {
        self.on_this_host().count().max(1)
    }

    /// The ranks on this rank's host; none in a world of one.
    fn on_this_host(&self) -> impl Iterator<Item = Rank> {
        let hosts = self.member.as_ref().map(|member| {
            let ranks = member.core.runner.membership.ranks();
            member.core.job.hosts(ranks)
        });
        let hosts = hosts.unwrap_or_default();
        let own = self.rank;
        (0..hosts.len()).filter(move |&rank| hosts[rank] == hosts[own])
    }

    /// Runs a collective on borrowed buffers, in place or apart.
    ///
    /// Collective: every rank calls it, in the same order, with the same collective and element
    /// type, and with buffers of the lengths that it needs ([`Collective`], [`Buffers`]). Blocks
    /// until this rank's part is done; the calling thread does the work, and sleeps while it has
    /// to wait. Where several ranks get the same elements they get the same bits, and the same in
    /// every run with the same world, sizes, settings and algorithm. Memory of
    /// [`Communicator::allocate`] is used without copies, inputs stay as they are. An all-to-all in
    /// place copies its input first.
    ///
    /// Cost: see the algorithm that [`Communicator::choice`] names.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the arguments are wrong on every rank alike, told when the
    /// calls before have ended: nothing was sent, and the communicator stays usable.
    /// [`ErrorKind::Mismatch`] if a rank called something else, or with buffers that do not fit;
    /// [`ErrorKind::RankLost`] if one is gone, [`ErrorKind::Timeout`] if one did not come in time.
    /// The output is then unspecified and the communicator aborted on all ranks.
    pub fn run<T: Element>(
        &self,
        collective: &Collective,
        buffers: Buffers<'_, T>,
    ) -> Result<Outcome, Error> {
        let Some(member) = &self.member else {
            self.check(collective, T::DTYPE)?;
            return self.alone(collective, buffers);
        };
        member.core.runner.check()?;
        let turn = member.core.runner.turns.draw();
        // SAFETY: `execute` returns only after the engine is done with the regions or has aborted,
        // so the borrow of the buffers covers all use.
        unsafe { member.core.execute(turn, collective, buffers) }
    }

    /// Runs one collective on each of several tensors, as so many calls of
    /// [`Communicator::run`] would, but in few launches: small tensors travel together, large ones
    /// from where they lie. Calls of other threads come before or after the whole batch.
    ///
    /// Collective: every rank gives as many tensors, in the same order. Counts by rank hold for
    /// each tensor. The outcome is that of all tensors together.
    ///
    /// Cost: a launch for each tensor of more than 64 KiB (with all blocks), one for every 512 KiB
    /// of the others, and copying these.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn run_batch<T: Element>(
        &self,
        collective: &Collective,
        tensors: &mut [Buffers<'_, T>],
    ) -> Result<Outcome, Error> {
        self.check(collective, T::DTYPE)?;
        let Some(member) = &self.member else { return self.batch_alone(collective, tensors) };
        member.core.runner.check()?;
        let turn = member.core.runner.turns.draw();
        // SAFETY: as in `run`.
        unsafe { member.core.execute_batch(turn, collective, tensors) }
    }

    /// Starts a batch ([`Communicator::run_batch`]) on tensors that it owns until it has ended, and
    /// returns at once, as [`Communicator::start`] does.
    ///
    /// # Errors
    /// The work's result carries what [`Communicator::run_batch`] would return.
    pub fn start_batch<T: Element, B: Owned<T>>(
        &self,
        collective: Collective,
        mut tensors: Vec<B>,
    ) -> Work<(Vec<B>, Outcome)> {
        let (promise, work) = Promise::pair();
        if let Err(error) = self.check(&collective, T::DTYPE) {
            promise.end(Err(error));
            return work;
        }
        let Some(member) = &self.member else {
            let lent = Panic::catch(|| tensors.iter_mut().map(Owned::lend).collect::<Vec<_>>());
            let result = match lent {
                Ok(mut lent) => self.batch_alone(&collective, &mut lent),
                Err(panic) => Err(self.panicked(&not_lent(&panic))),
            };
            give_back(promise, result, tensors, |tensors, outcome| (tensors, outcome));
            return work;
        };
        let core = member.core.clone();
        member.background.submit(&member.core.runner.turns, move |turn| {
            let lent = Panic::catch(|| tensors.iter_mut().map(Owned::lend).collect::<Vec<_>>());
            let result = match lent {
                // SAFETY: as in `submit`.
                Ok(mut lent) => unsafe { core.execute_batch(turn, &collective, &mut lent) },
                Err(panic) => Err(core.panicked(turn, &not_lent(&panic))),
            };
            let back = |tensors, outcome| (tensors, outcome);
            let given = Panic::catch(|| give_back(promise, result, tensors, back));
            core.tell(given);
        });
        work
    }

    fn batch_alone<T: Element>(
        &self,
        collective: &Collective,
        tensors: &mut [Buffers<'_, T>],
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for buffers in tensors {
            outcome.nonfinite |= self.alone(collective, buffers.reborrow())?.nonfinite;
        }
        Ok(outcome)
    }

    /// Starts a collective on buffers that it owns until it has ended ([`InPlace`], `Apart`), and
    /// returns at once. The work gives them back with the result.
    ///
    /// Collective, like [`Communicator::run`]; calls start in the order in which they are made,
    /// blocking or not. A thread of the communicator does the work. Results may be waited for in
    /// any order, or dropped.
    ///
    /// # Errors
    /// The work's result carries what [`Communicator::run`] would return, and
    /// [`ErrorKind::Panicked`] if the buffers did when they were asked for their elements, on any
    /// rank. If the work's waker panics, or a destructor of buffers that nobody waits for, the job
    /// ends with an error of that kind, too.
    pub fn start<T: Element, B: Owned<T>>(
        &self,
        collective: Collective,
        buffers: B,
    ) -> Work<(B, Outcome)> {
        self.submit::<T, B, _>(collective, buffers, |buffers, outcome| (buffers, outcome))
    }

    fn submit<T: Element, B: Owned<T>, R: Send + 'static>(
        &self,
        collective: Collective,
        mut buffers: B,
        back: fn(B, Outcome) -> R,
    ) -> Work<R> {
        let (promise, work) = Promise::pair();
        if let Err(error) = self.check(&collective, T::DTYPE) {
            promise.end(Err(error));
            return work;
        }
        let Some(member) = &self.member else {
            let result = match Panic::catch(|| buffers.lend()) {
                Ok(lent) => self.alone(&collective, lent),
                Err(panic) => Err(self.panicked(&not_lent(&panic))),
            };
            give_back(promise, result, buffers, back);
            return work;
        };
        let core = member.core.clone();
        member.background.submit(&member.core.runner.turns, move |turn| {
            let result = match Panic::catch(|| buffers.lend()) {
                // SAFETY: this closure owns `buffers` and keeps them in place until `execute`
                // returns, after which the engine no longer uses the regions.
                Ok(lent) => unsafe { core.execute(turn, &collective, lent) },
                Err(panic) => Err(core.panicked(turn, &not_lent(&panic))),
            };
            let given = Panic::catch(|| give_back(promise, result, buffers, back));
            core.tell(given);
        });
        work
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

    /// Starts to reduce `buffer` (a `Vec<T>`, a [`Buffer<T>`], anything that owns its elements)
    /// over all ranks and returns at once. The work owns the buffer until it is done and gives it
    /// back with the result.
    ///
    /// [`Communicator::start`] with [`Collective::all_reduce`]; see there.
    ///
    /// # Errors
    /// The work's result carries what [`Communicator::run`] would return.
    pub fn all_reduce_async<T, B>(&self, buffer: B, how: impl Into<Reduction>) -> Work<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let collective = Collective::all_reduce(how);
        self.submit::<T, _, _>(collective, InPlace(buffer), |InPlace(buffer), _| buffer)
    }

    /// Reduces `data` over all ranks and leaves the result at `root`; elsewhere `data` stays as it
    /// is.
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

    /// Gathers the `input` of all ranks, in rank order, in the `output` of all ranks, which is as
    /// long as all of them.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "allgather")]
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        self.run(&Collective::all_gather(), Buffers::Apart(input, output)).map(drop)
    }

    /// Reduces the `input` of all ranks and leaves in `output` the block of this rank: `input` is
    /// world times as long.
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
        self.run(&Collective::reduce_scatter(how), Buffers::Apart(input, output)).map(drop)
    }

    /// Sends block r of `input` to rank r, and receives its block for this rank in block r of
    /// `output`.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    #[doc(alias = "alltoall")]
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        self.run(&Collective::all_to_all(), Buffers::Apart(input, output)).map(drop)
    }

    /// Gathers the `input` of all ranks, in rank order, in the `output` of `root`; elsewhere
    /// `output` may be empty.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn gather<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        root: Rank,
    ) -> Result<(), Error> {
        self.run(&Collective::gather(root), Buffers::Apart(input, output)).map(drop)
    }

    /// Sends block r of the `input` of `root` to the `output` of rank r; elsewhere `input` may be
    /// empty.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        root: Rank,
    ) -> Result<(), Error> {
        self.run(&Collective::scatter(root), Buffers::Apart(input, output)).map(drop)
    }

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn barrier(&self) -> Result<(), Error> {
        self.run::<u8>(&Collective::barrier(), Buffers::InPlace(&mut [])).map(drop)
    }

    /// Ends the job on all ranks, for reasons of the program's: calls that are under way or wait
    /// their turn, here and elsewhere, in this communicator and all others of the job, end within
    /// moments with an error of kind [`ErrorKind::Aborted`] that names this rank and says `why`.
    /// Later calls repeat it.
    ///
    /// Not collective: any thread of any rank may call it, while others are in calls. Blocks until
    /// this rank knows that the job has ended, which is at once unless the network is stuck. Gives
    /// the error that all ranks get: an earlier one if there was one.
    pub fn abort(&self, why: &str) -> Error {
        let Some(member) = &self.member else {
            let text = format!("rank {} aborted the job: {why}", self.rank);
            let error = || Error::new(ErrorKind::Aborted, text).on(self.rank);
            return self.aborted.get_or_init(|| error().caused_by(vec![self.rank])).clone();
        };
        member.core.runner.abort(why)
    }

    /// What the cost model says an all-reduce of so many bytes takes.
    pub(crate) fn all_reduce_seconds(&self, bytes: usize) -> f64 {
        self.member.as_ref().map_or(0.0, |it| it.core.runner.choice.all_reduce_seconds(bytes))
    }

    /// Why every later call will fail, if one did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.member.as_ref().and_then(|member| member.core.runner.check().err())
    }

    /// Ends the job on all ranks because code of the program panicked on this one; the error for
    /// the caller ([`Runner::panicked`](crate::runner::Runner::panicked)).
    pub(crate) fn panicked(&self, what: &str) -> Error {
        let Some(member) = &self.member else {
            let text = format!("on rank {} {what}", self.rank);
            let error = Error::new(ErrorKind::Panicked, text).on(self.rank);
            return error.caused_by(vec![self.rank]);
        };
        member.core.runner.panicked(what)
    }

    /// Why the job has ended, if it has, though no call here has failed yet.
    pub(crate) fn verdict(&self) -> Option<Error> {
        let runner = &self.member.as_ref()?.core.runner;
        runner.membership.verdict().map(|verdict| from_verdict(&verdict).on(self.rank))
    }

    /// Refuses what can't be run, whatever the buffers.
    fn check(&self, collective: &Collective, dtype: Dtype) -> Result<(), Error> {
        collective.checked(dtype, (self.rank, self.world))
    }

    /// Runs a checked collective in a world of one.
    fn alone<T: Element>(
        &self,
        collective: &Collective,
        buffers: Buffers<'_, T>,
    ) -> Result<Outcome, Error> {
        if let Some(error) = self.aborted.get() {
            return Err(error.repeated());
        }
        let refuse = |text| Error::new(ErrorKind::Configuration, text).on(self.rank);
        collective.size(T::DTYPE, (0, 1), buffers.lengths()).map_err(refuse)?;
        Ok(alone::run(collective, buffers))
    }

    /// Allocates `count` zeroed elements in memory that the links reach without copies: peers on
    /// this host map it. Not collective.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if the system gives no more.
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

    /// Runs `with` on `data`, which RDMA devices have registered meanwhile: collectives of it or of
    /// parts of it, neither copy it nor register it for themselves. Not collective.
    ///
    /// For memory that comes from elsewhere and is used often, as a framework's pool. What
    /// [`Communicator::allocate`] gives is registered anyway, and reached by ranks of the same host
    /// too. Without RDMA this only runs `with`; if the system refuses to register the memory, a
    /// warning says so, and it is used like any other.
    ///
    /// Cost: at both ends a system call for each device, and some time for each page.
    pub fn with_registered<T: Element, R>(
        &self,
        data: &mut [T],
        with: impl FnOnce(&mut [T]) -> R,
    ) -> R {
        #[cfg(feature = "verbs")]
        let _registered = self.member.as_ref().map(|member| {
            let start = std::ptr::NonNull::from(&mut *data).cast();
            // SAFETY: `data` is borrowed for longer than this call, which ends the registration,
            // also when `with` panics.
            unsafe { member.core.job.arena.adopt(start, size_of_val(data)) }
        });
        with(data)
    }

    /// The algorithm that such a collective takes on buffers of `count` elements (the longer of
    /// input and output): the same on all ranks. Before the first call of a size (up to the next
    /// power of two of bytes) it is what the cost model takes; that call tries those that come into
    /// question on its own buffers, for 0.75 s at most, and settles it; if it takes so long itself
    /// that no other run fits, it settles what the model takes.
    pub fn choice<T: Element>(&self, collective: &Collective, count: usize) -> &'static str {
        self.member.as_ref().map_or("none", |member| {
            let choice = &member.core.runner.choice;
            let key = collective.typical_key(self.world, T::DTYPE, count);
            let shape = programs::shape(&key, self.rank, choice.topology());
            let list = unisum_algorithms::algorithms(shape.collective);
            list[choice.algorithm(&shape, &key)].name()
        })
    }

    /// Fixes the algorithm of all later calls, or, with `None`, has it chosen for each call, see
    /// [`Communicator::choice`]. All ranks call it alike, between collectives.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if no algorithm has that name.
    pub fn set_algorithm(&self, name: Option<&str>) -> Result<(), Error> {
        let index = name.map(crate::choice::index_of).transpose()?;
        if let Some(member) = &self.member {
            member.core.runner.choice.fix(index);
        }
        Ok(())
    }

    pub(crate) fn description(&self) -> &str {
        self.description.trim_end()
    }

    /// The transports in use, as "tcp", "shm" or "shm+tcp".
    pub fn transport(&self) -> &str {
        &self.transport
    }

    /// Where the ranks are, what the links cost, and which algorithm is chosen from which size
    /// on: for people, several lines.
    pub fn describe(&self) -> String {
        let table = self.member.as_ref().map(|member| member.core.runner.choice.to_string());
        format!("{}{}", self.description, table.unwrap_or_default())
    }
}

/// Ends a work. Code of the program may run: the work's waker, and destructors of buffers.
fn give_back<B, R>(
    promise: Promise<R>,
    result: Result<Outcome, Error>,
    buffers: B,
    back: impl FnOnce(B, Outcome) -> R,
) {
    match result {
        Ok(outcome) => promise.end(Ok(back(buffers, outcome))),
        // First the result, which whoever waits gets also if a destructor panics.
        Err(error) => promise.end(Err(error)),
    }
}

/// That buffers panicked when they were asked for their elements, in words.
fn not_lent(panic: &Panic) -> String {
    format!("a buffer panicked when it was asked for its elements: {}", panic.text())
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
