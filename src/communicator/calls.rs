//! Any collective, blocking or not, on one tensor or many: what the calls by name come down to.

use unisum_kernels::{Dtype, Element, Panic};

use crate::collective::raw::RawBuffers;
use crate::collective::reduction::{Outcome, Reduction};
use crate::collective::{Buffers, Collective, InPlace, Owned, OwnedRaw};
use crate::execution::single_rank;
use crate::execution::work::{Promise, Work};
use crate::{Communicator, Error, ErrorKind};
use unisum_control::callers;

impl Communicator {
    /// Runs a collective on borrowed buffers, in place or out of place.
    ///
    /// Collective: every rank calls it, in the same order, with the same collective and element
    /// type, and with buffers of the lengths it needs ([`Collective`], [`Buffers`]). Blocks until
    /// this rank's part is done; the calling thread does the work, and sleeps while it has to wait.
    /// Where several ranks get the same elements, they get the same bits, and the same bits in
    /// every run with the same world, sizes, settings and algorithm. Memory of
    /// [`Communicator::allocate`] is used without copies, and inputs stay unchanged. An in-place
    /// all-to-all copies its input first.
    ///
    /// Cost: see the algorithm that [`Communicator::choice`] names.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the arguments are wrong in the same way on every rank,
    /// reported once earlier calls have ended: nothing was sent, and the communicator stays usable.
    /// [`ErrorKind::Mismatch`] if a rank made a different call, or passed buffers that do not fit;
    /// [`ErrorKind::RankLost`] if one is gone, [`ErrorKind::Timeout`] if one did not arrive in
    /// time. The output is then unspecified and the communicator aborted on all ranks.
    /// [`ErrorKind::ViewChanged`] if an elastic job loses a rank: the input of a reduction in place
    /// is then as it was before the call.
    pub fn run<T: Element>(
        &self,
        collective: &Collective,
        buffers: Buffers<'_, T>,
    ) -> Result<Outcome, Error> {
        self.run_raw(collective, buffers.into())
    }

    /// [`Communicator::run`] for an element type that is known at run time.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn run_raw(
        &self,
        collective: &Collective,
        buffers: RawBuffers<'_>,
    ) -> Result<Outcome, Error> {
        let Some(member) = &self.member else {
            self.check(collective, buffers.dtype())?;
            return self.alone(collective, &buffers);
        };
        callers::calls();
        member.core.runner.check()?;
        let turn = member.core.runner.turns.draw();
        // SAFETY: `execute` returns only after the engine is done with the regions or has aborted,
        // so the borrow of the buffers covers all use.
        unsafe { member.core.execute_undoing(turn, collective, buffers) }
    }

    /// Runs one collective on each of several tensors, as one call of [`Communicator::run`] for
    /// each would, but in few launches: small tensors are packed together, large ones stay in
    /// place. Calls of other threads run before or after the whole batch.
    ///
    /// Collective: every rank passes the same number of tensors in the same order. Counts by rank
    /// apply to each tensor. The outcome is that of all tensors together.
    ///
    /// Cost: one launch for each tensor of more than 64 KiB (with all blocks), one for every 512
    /// KiB of the others, and copying those.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    pub fn run_batch<T: Element>(
        &self,
        collective: &Collective,
        tensors: &mut [Buffers<'_, T>],
    ) -> Result<Outcome, Error> {
        let mut tensors: Vec<_> = tensors.iter_mut().map(|it| it.reborrow().into()).collect();
        self.run_batch_raw(collective, T::DTYPE, &mut tensors)
    }

    /// [`Communicator::run_batch`] for an element type that is known at run time.
    ///
    /// # Errors
    /// As [`Communicator::run_batch`], and [`ErrorKind::Configuration`] if a tensor is not of type
    /// `dtype`.
    pub fn run_batch_raw(
        &self,
        collective: &Collective,
        dtype: Dtype,
        tensors: &mut [RawBuffers<'_>],
    ) -> Result<Outcome, Error> {
        self.check(collective, dtype)?;
        self.check_types(dtype, tensors.iter().map(RawBuffers::dtype))?;
        let Some(member) = &self.member else { return self.batch_alone(collective, tensors) };
        callers::calls();
        member.core.runner.check()?;
        let turn = member.core.runner.turns.draw();
        // SAFETY: as in `run_raw`.
        unsafe { member.core.execute_batch(turn, collective, dtype, tensors) }
    }

    fn check_types(&self, dtype: Dtype, types: impl Iterator<Item = Dtype>) -> Result<(), Error> {
        let Some((index, other)) = types.enumerate().find(|&(_, other)| other != dtype) else {
            return Ok(());
        };
        let text = format!("tensor {index} of a batch of {dtype} has elements of {other}");
        Err(Error::new(ErrorKind::Configuration, text).on(self.rank))
    }

    /// Starts a batch ([`Communicator::run_batch`]) on tensors that it owns until it has ended, and
    /// returns at once, like [`Communicator::start`].
    ///
    /// # Errors
    /// The work's result carries what [`Communicator::run_batch`] would return.
    pub fn start_batch<T: Element, B: Owned<T>>(
        &self,
        collective: Collective,
        tensors: Vec<B>,
    ) -> Work<(Vec<B>, Outcome)> {
        self.submit_batch(collective, T::DTYPE, tensors, lend::<T, B>)
    }

    /// [`Communicator::start_batch`] for an element type that is known at run time.
    ///
    /// # Errors
    /// As [`Communicator::start_batch`].
    pub fn start_batch_raw<B: OwnedRaw>(
        &self,
        collective: Collective,
        dtype: Dtype,
        tensors: Vec<B>,
    ) -> Work<(Vec<B>, Outcome)> {
        if let Err(error) = self.check_types(dtype, tensors.iter().map(OwnedRaw::dtype)) {
            let (promise, work) = Promise::pair();
            promise.end(Err(error));
            return work;
        }
        self.submit_batch(collective, dtype, tensors, B::lend)
    }

    fn submit_batch<B: Send + 'static>(
        &self,
        collective: Collective,
        dtype: Dtype,
        mut tensors: Vec<B>,
        lend: fn(&mut B) -> RawBuffers<'_>,
    ) -> Work<(Vec<B>, Outcome)> {
        let (promise, work) = Promise::pair();
        if let Err(error) = self.check(&collective, dtype) {
            promise.end(Err(error));
            return work;
        }
        let Some(member) = &self.member else {
            let lent = Panic::catch(|| tensors.iter_mut().map(lend).collect::<Vec<_>>());
            let result = match lent {
                Ok(mut lent) => self.batch_alone(&collective, &mut lent),
                Err(panic) => Err(self.panicked(&not_lent(&panic))),
            };
            give_back(promise, result, tensors, |tensors, outcome| (tensors, outcome));
            return work;
        };
        callers::calls();
        let core = member.core.clone();
        member.background.submit(&member.core.runner.turns, move |turn| {
            let lent = Panic::catch(|| tensors.iter_mut().map(lend).collect::<Vec<_>>());
            let result = match lent {
                // SAFETY: as in `submit`.
                Ok(mut lent) => unsafe { core.execute_batch(turn, &collective, dtype, &mut lent) },
                Err(panic) => Err(core.panicked(turn, &not_lent(&panic))),
            };
            let back = |tensors, outcome| (tensors, outcome);
            let given = Panic::catch(|| give_back(promise, result, tensors, back));
            core.tell(given);
        });
        work
    }

    fn batch_alone(
        &self,
        collective: &Collective,
        tensors: &mut [RawBuffers<'_>],
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for buffers in tensors {
            outcome.nonfinite |= self.alone(collective, buffers)?.nonfinite;
        }
        Ok(outcome)
    }

    /// Starts a collective on buffers that it owns until it has ended ([`InPlace`],
    /// [`OutOfPlace`](crate::OutOfPlace)), and returns at once. The work returns them with the
    /// result.
    ///
    /// Collective, like [`Communicator::run`]. Calls start in the order in which they are made,
    /// blocking or not. A thread of the communicator does the work. Results may be waited for in
    /// any order, or dropped.
    ///
    /// # Errors
    /// The work's result carries what [`Communicator::run`] would return, and
    /// [`ErrorKind::Panicked`] if on any rank the buffers panicked when asked for their elements.
    /// If the work's waker panics, or the destructor of buffers that nobody waits for, the job also
    /// ends with an error of that kind.
    pub fn start<T: Element, B: Owned<T>>(
        &self,
        collective: Collective,
        buffers: B,
    ) -> Work<(B, Outcome)> {
        let back = |buffers, outcome| (buffers, outcome);
        self.submit((collective, T::DTYPE), buffers, lend::<T, B>, back)
    }

    /// [`Communicator::start`] for an element type that is known at run time.
    ///
    /// # Errors
    /// As [`Communicator::start`].
    pub fn start_raw<B: OwnedRaw>(&self, collective: Collective, buffers: B) -> Work<(B, Outcome)> {
        let back = |buffers, outcome| (buffers, outcome);
        self.submit((collective, buffers.dtype()), buffers, B::lend, back)
    }

    fn submit<B: Send + 'static, R: Send + 'static>(
        &self,
        (collective, dtype): (Collective, Dtype),
        mut buffers: B,
        lend: fn(&mut B) -> RawBuffers<'_>,
        back: fn(B, Outcome) -> R,
    ) -> Work<R> {
        let (promise, work) = Promise::pair();
        if let Err(error) = self.check(&collective, dtype) {
            promise.end(Err(error));
            return work;
        }
        let Some(member) = &self.member else {
            let result = match Panic::catch(|| lend(&mut buffers)) {
                Ok(lent) => self.alone(&collective, &lent),
                Err(panic) => Err(self.panicked(&not_lent(&panic))),
            };
            give_back(promise, result, buffers, back);
            return work;
        };
        callers::calls();
        let core = member.core.clone();
        member.background.submit(&member.core.runner.turns, move |turn| {
            let result = match Panic::catch(|| lend(&mut buffers)) {
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

    /// Starts to reduce `buffer` (a `Vec<T>`, a [`Buffer`](crate::Buffer), anything that owns its
    /// elements) over all ranks, and returns at once. The work owns the buffer until it is done and
    /// returns it with the result.
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
        let back = |InPlace(buffer), _| buffer;
        self.submit((collective, T::DTYPE), InPlace(buffer), lend::<T, InPlace<B>>, back)
    }

    /// Refuses calls that cannot be run with any buffers.
    fn check(&self, collective: &Collective, dtype: Dtype) -> Result<(), Error> {
        collective.checked(dtype, (self.rank, self.world))
    }

    /// Runs a checked collective in a world of one.
    fn alone(&self, collective: &Collective, buffers: &RawBuffers<'_>) -> Result<Outcome, Error> {
        if let Some(error) = self.aborted.get() {
            return Err(error.repeated());
        }
        let refuse = |text| Error::new(ErrorKind::Configuration, text).on(self.rank);
        collective.size(buffers.dtype(), (0, 1), buffers.lengths()).map_err(refuse)?;
        Ok(single_rank::run(collective, buffers))
    }
}

/// Completes a work. User code may run: the work's waker, and destructors of buffers.
fn give_back<B, R>(
    promise: Promise<R>,
    result: Result<Outcome, Error>,
    buffers: B,
    back: impl FnOnce(B, Outcome) -> R,
) {
    match result {
        Ok(outcome) => promise.end(Ok(back(buffers, outcome))),
        // First the result, which the waiting thread gets even if a destructor panics.
        Err(error) => promise.end(Err(error)),
    }
}

/// The buffers that a typed owner lends.
fn lend<T: Element, B: Owned<T>>(buffers: &mut B) -> RawBuffers<'_> {
    buffers.lend().into()
}

/// The text for buffers that panicked when they were asked for their elements.
fn not_lent(panic: &Panic) -> String {
    format!("a buffer panicked when it was asked for its elements: {}", panic.text())
}
