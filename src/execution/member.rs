//! A rank's membership in a world of two or more: what runs its collectives.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum_kernels::{Dtype, Panic, ReduceOp};
use unisum_link::{CollectiveKind as Kind, Rank, Regions};

use crate::collective::agreement::{Batch, Terms};
use crate::collective::key::Key;
use crate::collective::raw::RawBuffers;
use crate::collective::reduction::Outcome;
use crate::collective::{Blocks, Collective, Extents};
use crate::execution::background::Background;
use crate::execution::batch::{self, Pack};
use crate::execution::prepared::{CachedCall, CallSignature};
use crate::execution::runner::{Request, Runner, State};
use crate::execution::ticket_lock::Ticket;
use crate::wiring::Job;
use crate::{Error, ErrorKind};

/// What a rank of a larger world has.
pub(crate) struct Member {
    pub(crate) core: Arc<Core>,
    pub(crate) background: Background,
}

/// What a collective needs, on whichever thread it runs.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) runner: Runner,
    pub(crate) job: Arc<Job>,
    pub(crate) rank: Rank,
    pub(crate) world: usize,
    /// Whether the input of a reduction in place is as it was if the view changes meanwhile.
    pub(crate) restores: bool,
}

/// Memory for calls without elements, whose message carries one element that nobody reads.
#[derive(Debug, Default)]
#[repr(align(16))]
struct Spare([u8; 16]);

impl Core {
    /// [`Core::execute`], after which a reduction in place can be made again if an elastic job went
    /// into another view meanwhile: its input is as it was. That takes a copy of it beforehand.
    ///
    /// # Safety
    /// As [`Core::execute`].
    pub(crate) unsafe fn execute_undoing(
        &self,
        turn: Ticket,
        collective: &Collective,
        mut buffers: RawBuffers<'_>,
    ) -> Result<Outcome, Error> {
        if !self.restores || !buffers.is_in_place() || !collective.kind().reduces() {
            // SAFETY: the caller promised it.
            return unsafe { self.execute(turn, collective, buffers) };
        }
        let (data, bytes) = buffers.input();
        let mut undo = Vec::new();
        if undo.try_reserve_exact(bytes).is_err() {
            let mut state = self.runner.turns.wait(turn);
            let what = format!("a copy of {bytes} bytes, which an elastic job keeps");
            return Err(self.runner.lacks_memory(&mut state, &what));
        }
        undo.resize(bytes, 0_u8);
        // SAFETY: the caller lends `bytes` bytes at `data`, and `undo` is as long and its own.
        unsafe { data.as_ptr().copy_to_nonoverlapping(undo.as_mut_ptr(), bytes) };
        // SAFETY: the caller promised it.
        let result = unsafe { self.execute(turn, collective, buffers.reborrow()) };
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ViewChanged) {
            // SAFETY: as above; the engine has aborted, so that nobody else touches the buffer.
            unsafe { data.as_ptr().copy_from_nonoverlapping(undo.as_ptr(), bytes) };
        }
        result
    }

    /// Checks a collective and runs it, when its turn comes.
    ///
    /// # Safety
    /// The buffers stay where they are, and nobody else touches them, until this returns.
    pub(crate) unsafe fn execute(
        &self,
        turn: Ticket,
        collective: &Collective,
        buffers: RawBuffers<'_>,
    ) -> Result<Outcome, Error> {
        let mut state = self.runner.turns.wait(turn);
        let (dtype, lengths) = (buffers.dtype(), buffers.lengths());
        if let Some(form) = CallSignature::new(collective, dtype, lengths)
            && let Some(known) = self.runner.known(&state, form)
        {
            let mut spare = Spare::default();
            let regions = match known.is_empty {
                // SAFETY: this function owns it.
                true => unsafe { self.spare_regions(&mut spare) },
                // SAFETY: the caller promised it.
                false => unsafe { self.regions(&buffers, &known.input, &known.output) },
            };
            return self.runner.repeat(&mut state, &regions);
        }
        collective.checked(dtype, (self.rank, self.world))?;
        match collective.size(dtype, (self.rank, self.world), lengths) {
            // SAFETY: the caller promised it.
            Ok(extents) => unsafe { self.launch(&mut state, collective, buffers, (extents, None)) },
            Err(text) => Err(self.runner.refuse(&mut state, &text)),
        }
    }

    /// In place of a collective whose buffers panicked, in its turn: tells all ranks, see
    /// [`Runner::panicked`].
    pub(crate) fn panicked(&self, turn: Ticket, what: &str) -> Error {
        // What was called before ends first, as it does on the other ranks.
        let _turn = self.runner.turns.wait(turn);
        self.runner.panicked(what)
    }

    /// Tells all ranks if code of the program panicked after a collective had ended.
    pub(crate) fn tell(&self, given_back: Result<(), Panic>) {
        if let Err(panic) = given_back {
            let what = format!(
                "the waker of a work or the destructor of its buffers panicked: {}",
                panic.text()
            );
            let _for_the_next_call = self.runner.panicked_between_calls(&what);
        }
    }

    /// Runs a checked collective on each of several buffers of one type, with none of other calls
    /// in between.
    ///
    /// # Safety
    /// As [`Core::execute`].
    pub(crate) unsafe fn execute_batch(
        &self,
        turn: Ticket,
        collective: &Collective,
        dtype: Dtype,
        batch: &mut [RawBuffers<'_>],
    ) -> Result<Outcome, Error> {
        let mut state = self.runner.turns.wait(turn);
        let place = (self.rank, self.world);
        let size = |(index, buffers): (usize, &RawBuffers<'_>)| {
            collective
                .size(dtype, place, buffers.lengths())
                .map_err(|text| format!("tensor {index} of a batch: {text}"))
        };
        let extents: Vec<Extents> = match batch.iter().enumerate().map(size).collect() {
            Ok(extents) => extents,
            Err(text) => return Err(self.runner.refuse(&mut state, &text)),
        };
        let blocks = if collective.has_blocks() { self.world } else { 1 };
        let tensors: Arc<[usize]> = extents.iter().map(|it| it.blocks.count()).collect();
        let launches = batch::launches(&extents, blocks, dtype);
        if launches.is_empty() {
            // The others may have tensors.
            let batch = Some(Batch { tensors, launch: 0 });
            let terms = terms(collective, dtype, &Blocks::Even(0)).of_batch(batch);
            return self.launch_nothing(&mut state, collective, dtype, (terms, None));
        }
        let mut outcome = Outcome::default();
        for (number, launch) in launches.into_iter().enumerate() {
            let of_batch = Some(Batch { tensors: tensors.clone(), launch: number });
            let told = if let [index] = launch[..] {
                let (buffers, extents) = (batch[index].reborrow(), extents[index].clone());
                // SAFETY: the caller promised it.
                unsafe { self.launch(&mut state, collective, buffers, (extents, of_batch)) }?
            } else {
                let tensors = launch.iter().map(|&index| &extents[index]).collect();
                let pack = Pack::new(tensors, collective, place, dtype);
                let which = (&mut *batch, &launch[..]);
                self.launch_pack(&mut state, collective, (&pack, of_batch), which)?
            };
            outcome.nonfinite |= told.nonfinite;
        }
        Ok(outcome)
    }

    /// # Safety
    /// As [`Core::execute`].
    unsafe fn launch(
        &self,
        state: &mut State,
        collective: &Collective,
        buffers: RawBuffers<'_>,
        (extents, batch): (Extents, Option<Batch>),
    ) -> Result<Outcome, Error> {
        // What is one of a batch is no call by itself.
        let dtype = buffers.dtype();
        let form =
            CallSignature::new(collective, dtype, buffers.lengths()).filter(|_| batch.is_none());
        let known = form.map(|form| CachedCall::new(form, &extents));
        let terms = terms(collective, dtype, &extents.blocks).of_batch(batch);
        if extents.blocks.is_empty() {
            return self.launch_nothing(state, collective, dtype, (terms, known));
        }
        let (input, output) = extents.bytes(dtype);
        // SAFETY: the caller promised it.
        let mut regions = unsafe { self.regions(&buffers, &input, &output) };
        // What goes out may not be overwritten by what comes in. The copy lives until the call has
        // ended.
        let copies = buffers.is_in_place() && collective.kind() == Kind::AllToAll;
        let mut copy = Vec::<u128>::new();
        if copies {
            let bytes = input.len();
            if copy.try_reserve_exact(bytes.div_ceil(size_of::<u128>())).is_err() {
                let what = format!("a copy of {bytes} bytes, which go out as others come in");
                return Err(self.runner.lacks_memory(state, &what));
            }
            let to = NonNull::from(copy.spare_capacity_mut()).cast::<u8>();
            // SAFETY: the buffer holds so many bytes, and so does the copy, which is apart.
            unsafe { buffers.input().0.copy_to_nonoverlapping(to, bytes) };
            // SAFETY: the copy is this function's, and nothing else refers to it.
            regions.input = unsafe { self.job.arena.region_at(to, bytes) };
        }
        let in_place = buffers.is_in_place() && !copies;
        let request = request(collective, dtype, (extents.blocks, in_place), regions);
        self.runner.run(state, &Request { terms, known, ..request })
    }

    /// A collective without elements: its message carries one element that nobody reads.
    fn launch_nothing(
        &self,
        state: &mut State,
        collective: &Collective,
        dtype: Dtype,
        (terms, known): (Terms, Option<CachedCall>),
    ) -> Result<Outcome, Error> {
        let mut spare = Spare::default();
        // SAFETY: this function owns it.
        let regions = unsafe { self.spare_regions(&mut spare) };
        let request = request(collective, dtype, (Blocks::Even(0), true), regions);
        let mut request = Request { terms, known, ..request };
        request.fold.custom = None;
        (request.key.custom, request.key.ordered) = (false, false);
        self.runner.run(state, &request)
    }

    /// Runs a collective on the tensors `which` of a batch, copied into one.
    fn launch_pack(
        &self,
        state: &mut State,
        collective: &Collective,
        (pack, of_batch): (&Pack<'_>, Option<Batch>),
        (batch, which): (&mut [RawBuffers<'_>], &[usize]),
    ) -> Result<Outcome, Error> {
        let regions = match pack.regions(&mut state.scratch, &self.job.arena) {
            Ok(regions) => regions,
            Err(why) => return Err(self.runner.lacks_memory(state, &format!("a batch: {why}"))),
        };
        let blocks = pack.blocks();
        let terms = terms(collective, pack.dtype(), &blocks).of_batch(of_batch);
        if blocks.is_empty() {
            return self.launch_nothing(state, collective, pack.dtype(), (terms, None));
        }
        pack.fill(batch, which, regions.input);
        let in_place = collective.kind() != Kind::AllToAll;
        let used = pack.used(regions);
        let request = request(collective, pack.dtype(), (blocks, in_place), used);
        let outcome = self.runner.run(state, &Request { terms, ..request })?;
        pack.empty(regions.output, batch, which);
        Ok(outcome)
    }

    /// The regions of a call without elements.
    ///
    /// # Safety
    /// `spare` stays where it is until the call has ended.
    unsafe fn spare_regions(&self, spare: &mut Spare) -> Regions {
        // SAFETY: the caller promised it.
        Regions::in_place(unsafe { self.job.arena.region(&mut spare.0) })
    }

    /// The regions of these bytes of the first buffer and of the last.
    ///
    /// # Safety
    /// As [`Core::execute`].
    unsafe fn regions(
        &self,
        buffers: &RawBuffers<'_>,
        puts: &Range<usize>,
        gets: &Range<usize>,
    ) -> Regions {
        let (to, bytes) = buffers.output();
        // SAFETY: the caller promised it.
        let output = unsafe { self.job.arena.region_at(to, bytes) };
        if buffers.is_in_place() && puts == gets {
            return Regions::in_place(output.part(puts));
        }
        let (from, bytes) = buffers.input();
        // SAFETY: the caller promised it; an input that lies apart is only read.
        let input = unsafe { self.job.arena.region_at(from, bytes) };
        Regions { input: input.part(puts), output: output.part(gets) }
    }
}

fn request(
    collective: &Collective,
    dtype: Dtype,
    (blocks, in_place): (Blocks, bool),
    regions: Regions,
) -> Request {
    let fold = collective.fold(dtype);
    let key = Key {
        kind: collective.kind(),
        root: collective.root(),
        blocks,
        element_bytes: dtype.bytes(),
        average: fold.op == ReduceOp::Average && collective.kind().reduces(),
        scales: fold.factor.is_some(),
        ordered: fold.custom.is_some() && collective.reduction().is_ordered(),
        custom: fold.custom.is_some(),
        in_place,
    };
    Request { key, fold, regions, terms: Terms::default(), known: None }
}

/// What ranks agree on for a collective of these blocks.
fn terms(collective: &Collective, dtype: Dtype, blocks: &Blocks) -> Terms {
    Terms::new(&collective.fold(dtype), blocks, collective.purpose())
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("core", &self.core).finish_non_exhaustive()
    }
}
