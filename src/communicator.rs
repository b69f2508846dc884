//! The communicator: the collectives as a program calls them.

use std::fmt;
use std::sync::Arc;

use unisum_link::{Element, Rank, ReduceOp};

use crate::background::Background;
use crate::buffer::Buffer;
use crate::memory::Arena;
use crate::runner::{Request, Runner};
use crate::work::{Completion, Work};
use crate::{Builder, Error, ErrorKind};

/// This process's membership in a job: one rank of a world of ranks that reduce together.
///
/// All ranks call the same collectives in the same order. Calls may come from several threads;
/// they then run one after another, and it is the program's business that the order is the same
/// on all ranks. Dropping a communicator leaves the job; asynchronous collectives under way end
/// first.
///
/// After an error the communicator is aborted on every rank: make a new one, or end.
#[derive(Debug)]
pub struct Communicator {
    rank: Rank,
    world: usize,
    /// `None` in a world of one, which needs nobody.
    member: Option<Member>,
    description: String,
    transport: String,
}

/// What a rank of a larger world has.
pub(crate) struct Member {
    pub(crate) runner: Arc<Runner>,
    pub(crate) background: Background,
    pub(crate) arena: Arena,
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
        Self { rank, world, member, description, transport }
    }

    /// This process's number in the world, from 0.
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    pub const fn world(&self) -> usize {
        self.world
    }

    /// Reduces `data` element by element over all ranks and leaves the result on every rank.
    ///
    /// Collective: every rank calls it, in the same order, with the same `op`, element type and
    /// `data.len()`. Blocks until done; the calling thread does the work, and sleeps while it has
    /// to wait. The result is bitwise equal on all ranks, and the same in every run with the same
    /// world, sizes and settings. Memory of [`Communicator::allocate`] is used without copies.
    ///
    /// Cost: see the algorithm that [`Communicator::choice`] names, in the table of
    /// [`Communicator::describe`].
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if a rank called something else, [`ErrorKind::RankLost`] if one is
    /// gone, [`ErrorKind::Timeout`] if one did not come in time. `data` is then unspecified and
    /// the communicator aborted.
    pub fn all_reduce<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<(), Error> {
        let Some(member) = &self.member else { return Ok(()) };
        member.runner.check()?;
        let turn = member.runner.turns.draw();
        let mut spare = Spare::default();
        // SAFETY: `run` returns only after the engine is done with the region or has aborted, so
        // the mutable borrow of `data` covers all use.
        let request = unsafe { request(&member.arena, data, op, &mut spare) };
        member.runner.run(turn, request)
    }

    /// Starts to reduce `buffer` (a `Vec<T>`, a [`Buffer<T>`], anything that owns its elements)
    /// over all ranks and returns at once. The work owns the buffer until it is done and gives it
    /// back with the result.
    ///
    /// Collective, like [`Communicator::all_reduce`]; calls start in the order in which they are
    /// made, blocking or not. A thread of the communicator does the work. Results may be waited
    /// for in any order, or dropped.
    ///
    /// # Errors
    /// The work's result carries what [`Communicator::all_reduce`] would return.
    pub fn all_reduce_async<T, B>(&self, mut buffer: B, op: ReduceOp) -> Work<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let completion = Completion::new();
        let work = completion.work();
        let Some(member) = &self.member else {
            completion.end(Ok(buffer));
            return work;
        };
        let (runner, arena) = (member.runner.clone(), member.arena.clone());
        member.background.submit(&member.runner.turns, move |turn| {
            let mut spare = Spare::default();
            // SAFETY: this closure owns `buffer` and keeps it in place until `run` returns, after
            // which the engine no longer uses the region.
            let request = unsafe { request(&arena, buffer.as_mut(), op, &mut spare) };
            let result = runner.run(turn, request);
            completion.end(result.map(|()| buffer));
        });
        work
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
        let arena = self.member.as_ref().map_or_else(Arena::default, |member| member.arena.clone());
        let memory = arena.allocate(bytes).map_err(|error| refuse(&error))?;
        // SAFETY: the memory is zeroed, page-aligned and `bytes` long; zero is a value of every
        // element type.
        Ok(unsafe { Buffer::new(memory, count) })
    }

    /// The algorithm that the next `all_reduce` of `count` elements takes: the same on all ranks.
    pub fn choice<T: Element>(&self, count: usize) -> &'static str {
        self.member.as_ref().map_or("none", |member| {
            let index = member.runner.choice.algorithm(count, T::DTYPE);
            unisum_algorithms::all()[index].name()
        })
    }

    /// Fixes the algorithm of all later calls, or, with `None`, has it chosen for each call by
    /// the measured links and the cost model. All ranks call it alike, between collectives.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if no algorithm has that name.
    pub fn set_algorithm(&self, name: Option<&str>) -> Result<(), Error> {
        let index = name.map(crate::choice::index_of).transpose()?;
        if let Some(member) = &self.member {
            member.runner.choice.fix(index);
        }
        Ok(())
    }

    /// The transports in use, as "tcp", "shm" or "shm+tcp".
    pub fn transport(&self) -> &str {
        &self.transport
    }

    /// Where the ranks are, what the links cost, and which algorithm is chosen from which size
    /// on: for people, several lines.
    pub fn describe(&self) -> String {
        let table = self.member.as_ref().map(|member| member.runner.choice.to_string());
        format!("{}{}", self.description, table.unwrap_or_default())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let Some(member) = self.member.take() else { return };
        if member.runner.is_forked() {
            // Nothing may be dropped here: a thread that exists only in the parent may hold a lock.
            return std::mem::forget(member);
        }
        let runner = member.runner.clone();
        member.background.finish(move || runner.leave());
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("runner", &self.runner).finish_non_exhaustive()
    }
}

/// Memory for calls without elements, whose message carries one element that nobody reads.
#[derive(Debug, Default)]
#[repr(align(16))]
struct Spare([u8; 16]);

/// # Safety
/// `data` and `spare` are the engine's alone until the request has been run.
unsafe fn request<T: Element>(
    arena: &Arena,
    data: &mut [T],
    op: ReduceOp,
    spare: &mut Spare,
) -> Request {
    let count = data.len();
    let region = match count {
        // SAFETY: the caller promised it.
        0 => unsafe { arena.region(&mut spare.0) },
        // SAFETY: the caller promised it.
        _ => unsafe { arena.region(data) },
    };
    Request { dtype: T::DTYPE, op, count, region }
}
