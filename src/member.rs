//! A rank's membership in a world of two or more: what runs its collectives.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use unisum_kernels::{Element, Panic, ReduceOp};
use unisum_link::{Collective as Kind, Rank, Regions};

use crate::Error;
use crate::agreement::{Batch, Terms};
use crate::background::Background;
use crate::batch::{self, Pack};
use crate::collective::{Blocks, Buffers, Collective, Extents};
use crate::programs::Key;
use crate::ready::{Form, Known};
use crate::reduction::Outcome;
use crate::runner::{Request, Runner, State};
use crate::turns::Number;
use crate::wiring::Job;

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
}

/// Memory for calls without elements, whose message carries one element that nobody reads.
#[derive(Debug, Default)]
#[repr(align(16))]
struct Spare([u8; 16]);

impl Core {
    /// Checks a collective and runs it, when its turn comes.
    ///
    /// # Safety
    /// The buffers stay where they are, and nobody else touches them, until this returns.
    pub(crate) unsafe fn execute<T: Element>(
        &self,
        turn: Number,
        collective: &Collective,
        buffers: Buffers<'_, T>,
    ) -> Result<Outcome, Error> {
        let mut state = self.runner.turns.wait(turn);
        let lengths = buffers.lengths();
        if let Some(form) = Form::new(collective, T::DTYPE, lengths)
            && let Some(known) = self.runner.known(&state, form)
        {
            let mut spare = Spare::default();
            let regions = match known.is_empty {
                // SAFETY: this function owns it.
                true => unsafe { self.spare_regions(&mut spare) },
                // SAFETY: the caller promised it.
                false => unsafe { self.regions(buffers, &known.input, &known.output) },
            };
            return self.runner.repeat(&mut state, &regions);
        }
        collective.checked(T::DTYPE, (self.rank, self.world))?;
        match collective.size(T::DTYPE, (self.rank, self.world), lengths) {
            // SAFETY: the caller promised it.
            Ok(extents) => unsafe { self.launch(&mut state, collective, buffers, (extents, None)) },
            Err(text) => Err(self.runner.refuse(&mut state, &text)),
        }
    }

    /// In place of a collective whose buffers panicked, in its turn: tells all ranks, see
    /// [`Runner::panicked`].
    pub(crate) fn panicked(&self, turn: Number, what: &str) -> Error {
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
            // The error is for whatever is called next.
            let _told = self.runner.panicked(&what);
        }
    }

    /// Runs a checked collective on each of several buffers, with none of other calls in between.
    ///
    /// # Safety
    /// As [`Core::execute`].
    pub(crate) unsafe fn execute_batch<T: Element>(
        &self,
        turn: Number,
        collective: &Collective,
        batch: &mut [Buffers<'_, T>],
    ) -> Result<Outcome, Error> {
        let mut state = self.runner.turns.wait(turn);
        let place = (self.rank, self.world);
        let size = |(index, buffers): (usize, &Buffers<'_, T>)| {
            collective
                .size(T::DTYPE, place, buffers.lengths())
                .map_err(|text| format!("tensor {index} of a batch: {text}"))
        };
        let extents: Vec<Extents> = match batch.iter().enumerate().map(size).collect() {
            Ok(extents) => extents,
            Err(text) => return Err(self.runner.refuse(&mut state, &text)),
        };
        let blocks = if collective.has_blocks() { self.world } else { 1 };
        let tensors: Arc<[usize]> = extents.iter().map(|it| it.blocks.count()).collect();
        let launches = batch::launches(&extents, blocks, T::DTYPE);
        if launches.is_empty() {
            // The others may have tensors.
            let batch = Some(Batch { tensors, launch: 0 });
            let terms = terms::<T>(collective, &Blocks::Even(0)).of_batch(batch);
            return self.launch_nothing::<T>(&mut state, collective, terms, None);
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
                let pack = Pack::new(tensors, collective, place);
                let which = (&mut *batch, &launch[..]);
                self.launch_pack(&mut state, collective, (&pack, of_batch), which)?
            };
            outcome.nonfinite |= told.nonfinite;
        }
        Ok(outcome)
    }

    /// # Safety
    /// As [`Core::execute`].
    unsafe fn launch<T: Element>(
        &self,
        state: &mut State,
        collective: &Collective,
        buffers: Buffers<'_, T>,
        (extents, batch): (Extents, Option<Batch>),
    ) -> Result<Outcome, Error> {
        // What is one of a batch is no call by itself.
        let form = Form::new(collective, T::DTYPE, buffers.lengths()).filter(|_| batch.is_none());
        let known = form.map(|form| Known::new(form, &extents));
        let copy;
        let buffers = match buffers {
            // What goes out may not be overwritten by what comes in.
            Buffers::InPlace(data) if collective.kind() == Kind::AllToAll => {
                copy = data.to_vec();
                Buffers::Apart(&copy, data)
            }
            buffers => buffers,
        };
        let in_place = matches!(buffers, Buffers::InPlace(_));
        let terms = terms::<T>(collective, &extents.blocks).of_batch(batch);
        if extents.blocks.is_empty() {
            return self.launch_nothing::<T>(state, collective, terms, known);
        }
        let (input, output) = extents.bytes(T::DTYPE);
        // SAFETY: the caller promised it, and the copy is owned.
        let regions = unsafe { self.regions(buffers, &input, &output) };
        let request = request::<T>(collective, extents.blocks, in_place, regions);
        self.runner.run(state, &Request { terms, known, ..request })
    }

    /// A collective without elements: its message carries one element that nobody reads.
    fn launch_nothing<T: Element>(
        &self,
        state: &mut State,
        collective: &Collective,
        terms: Terms,
        known: Option<Known>,
    ) -> Result<Outcome, Error> {
        let mut spare = Spare::default();
        // SAFETY: this function owns it.
        let regions = unsafe { self.spare_regions(&mut spare) };
        let request = request::<T>(collective, Blocks::Even(0), true, regions);
        let mut request = Request { terms, known, ..request };
        request.fold.custom = None;
        (request.key.custom, request.key.ordered) = (false, false);
        self.runner.run(state, &request)
    }

    /// Runs a collective on the tensors `which` of a batch, copied into one.
    fn launch_pack<T: Element>(
        &self,
        state: &mut State,
        collective: &Collective,
        (pack, of_batch): (&Pack<'_>, Option<Batch>),
        (batch, which): (&mut [Buffers<'_, T>], &[usize]),
    ) -> Result<Outcome, Error> {
        let regions = match pack.regions::<T>(&mut state.scratch, &self.job.arena) {
            Ok(regions) => regions,
            Err(text) => return Err(self.runner.refuse(state, &text)),
        };
        let blocks = pack.blocks();
        let terms = terms::<T>(collective, &blocks).of_batch(of_batch);
        if blocks.is_empty() {
            return self.launch_nothing::<T>(state, collective, terms, None);
        }
        pack.fill(batch, which, regions.input);
        let in_place = collective.kind() != Kind::AllToAll;
        let request = request::<T>(collective, blocks, in_place, pack.used::<T>(regions));
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
    unsafe fn regions<T: Element>(
        &self,
        buffers: Buffers<'_, T>,
        puts: &Range<usize>,
        gets: &Range<usize>,
    ) -> Regions {
        let (input, output) = match buffers {
            Buffers::InPlace(data) => {
                // SAFETY: the caller promised it.
                let both = unsafe { self.job.arena.region(data) };
                if puts == gets {
                    return Regions::in_place(both.part(puts));
                }
                (both, both)
            }
            Buffers::Apart(from, to) => {
                // SAFETY: the caller promised it; an input that lies apart is only read.
                let input = unsafe { self.job.arena.region_to_read(from) };
                // SAFETY: the caller promised it.
                (input, unsafe { self.job.arena.region(to) })
            }
        };
        Regions { input: input.part(puts), output: output.part(gets) }
    }
}

fn request<T: Element>(
    collective: &Collective,
    blocks: Blocks,
    in_place: bool,
    regions: Regions,
) -> Request {
    let fold = collective.fold(T::DTYPE);
    let key = Key {
        kind: collective.kind(),
        root: collective.root(),
        blocks,
        element_bytes: T::DTYPE.bytes(),
        average: fold.op == ReduceOp::Average && collective.kind().reduces(),
        scales: fold.factor.is_some(),
        ordered: fold.custom.is_some() && collective.reduction().is_ordered(),
        custom: fold.custom.is_some(),
        in_place,
    };
    Request { key, fold, regions, terms: Terms::default(), known: None }
}

/// What ranks agree on for a collective of these blocks.
fn terms<T: Element>(collective: &Collective, blocks: &Blocks) -> Terms {
    Terms::new(&collective.fold(T::DTYPE), blocks, collective.purpose())
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("core", &self.core).finish_non_exhaustive()
    }
}
