//! One call: what this rank has for it, what the ranks agree on, and its way into the stream.

use std::num::NonZeroU32;
use std::sync::Arc;

use unisum_cuda_ipc::{CudaError, Stream};
use unisum_engine::device::{DeviceProgram, Flag, Operand, Operation};
use unisum_kernels::{Fold, ReduceOp};
use unisum_link::{Call, CollectiveKind, LinkError, Rank};

use super::areas::{Area, Areas, device_refusal};
use super::buffer::RawDeviceBuffers;
use super::card::{CARD_BYTES, Card, Refusal, RefusalKind, Spot, Via};
use super::flags::OneLaunch;
use super::memories::{Owned, is_mapped};
use super::multimem::PIECE_BYTES;
use super::post::OpenError;
use super::program::{Choice, Form, Way};
use super::queue::{self, Addresses, Queue};
use super::staged::Staging;
use super::{DeviceCommunicator, State};
use crate::collective::agreement::Terms;
use crate::collective::key::Key;
use crate::collective::{Blocks, Buffers, Collective, Extents};
use crate::communicator::groups::Making;
use crate::{Communicator, Error, ErrorKind};

/// So many bytes of an all-reduce in one launch make another block worth while.
const BYTES_PER_BLOCK: usize = 4096;

/// A call in the making.
pub(super) struct Calling<'a> {
    pub(super) communicator: &'a DeviceCommunicator,
    pub(super) collective: &'a Collective,
    pub(super) buffers: RawDeviceBuffers,
    pub(super) stream: &'a Stream,
    pub(super) state: &'a mut State,
}

/// What a rank has for a call, before it knows of the others.
struct Prepared {
    extents: Extents,
    fold: Fold,
    /// Unless only all ranks together know it.
    form: Option<(Form, Choice)>,
    areas: Areas,
    scratch: Area,
}

impl DeviceCommunicator {
    pub(super) fn call(
        &self,
        collective: &Collective,
        buffers: RawDeviceBuffers,
        owners: &[&Owned],
        stream: &Stream,
    ) -> Result<(), Error> {
        self.check()?;
        let place = (self.rank(), self.world());
        collective.checked(buffers.dtype, place)?;
        let state = &mut *self.lock();
        let mut calling = Calling { communicator: self, collective, buffers, stream, state };
        calling.make(owners).map_err(|error| match self.host().failure() {
            // The cards could not be exchanged.
            Some(_) if self.failed.get().is_none() => {
                let place = format!("{} of device memory", collective.kind());
                self.remember(error.within(&place).on(self.rank()))
            }
            _ => error,
        })
    }
}

impl Calling<'_> {
    fn make(&mut self, owners: &[&Owned]) -> Result<(), Error> {
        self.state.number += 1;
        let number = self.state.number;
        let mut prepared = self.prepare(owners);
        let cards = self.exchange(number, &prepared)?;
        let cards = agreed(self.communicator.host(), cards)?;
        let Ok(prepared) = &mut prepared else {
            unreachable!("all ranks have read this rank's refusal")
        };
        let by_all = cards.iter().map(|card| card.closed).min().unwrap_or(0);
        let freed = self.state.exports.closed(by_all);
        freed.map_err(|error| self.communicator.fail(&error))?;
        if !prepared.extents.blocks.is_empty() {
            let is_staged = self.state.direct.is_none() || prepared.fold.custom.is_some();
            match is_staged {
                true if self.is_hierarchical(&prepared.fold, &prepared.extents.blocks) => {
                    self.climb(owners, &prepared.fold, &prepared.extents.blocks)?
                }
                true => self.stage(&prepared.extents)?,
                false => self.enqueue(number, prepared, &cards)?,
            }
        } else if self.collective.kind() == CollectiveKind::Barrier {
            self.meet()?;
        }
        let ended = self.state.ended.record(self.stream);
        self.state.has_called = true;
        ended
            .and_then(|()| self.part(number, &cards))
            .map_err(|error| self.communicator.fail(&error))
    }

    /// Through the hosts.
    fn stage(&mut self, extents: &Extents) -> Result<(), Error> {
        if self.state.staging.is_none() {
            let communicator = self.communicator.host().duplicate_for(&Making::Device)?;
            self.state.staging = Some(Staging::new(communicator));
        }
        self.follow().map_err(|error| self.communicator.fail(&error))?;
        let staging = self.state.staging.as_mut().expect("made just above");
        // SAFETY: whoever made the buffers promised it.
        let run = unsafe { staging.run(self.collective, &self.buffers, extents, self.stream) };
        run.map(|outcome| self.state.found |= outcome.nonfinite).map_err(|failure| match failure {
            super::staged::Failure::Device(error) => self.communicator.fail(&error),
            super::staged::Failure::Host(error) => self.communicator.remember(error),
        })
    }

    /// A barrier: no stream goes on before all ranks' streams have come here.
    fn meet(&mut self) -> Result<(), Error> {
        if self.state.direct.is_none() {
            self.stream.synchronize().map_err(|error| self.communicator.fail(&error))?;
            let barrier = Collective::barrier();
            let nothing: &mut [u8] = &mut [];
            return self.communicator.host().run(&barrier, Buffers::InPlace(nothing)).map(drop);
        }
        let met = self.follow().and_then(|()| {
            let kernels = self.communicator.device.kernels()?;
            let all: Vec<Rank> = (0..self.communicator.world()).collect();
            let direct = self.state.direct.as_mut().expect("asked just above");
            direct.flags.meet((kernels, self.stream), Flag::Ready, &all, &all)
        });
        met.map_err(|error| self.communicator.fail(&error))
    }

    /// What is put into the stream from now on comes after the call before.
    pub(super) fn follow(&self) -> Result<(), CudaError> {
        // Also in the same stream: another one that has come after it may have its handle.
        match self.state.has_called {
            true => self.stream.wait(&self.state.ended),
            false => Ok(()),
        }
    }

    /// Takes leave of the memories that ranks want to free.
    fn part(&mut self, number: u64, cards: &[Card]) -> Result<(), CudaError> {
        let (device, own) = (&self.communicator.device, self.communicator.rank());
        let left = cards[own].retired.len();
        self.state.exports.left((number, left), device, self.stream)?;
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        let others = cards.iter().enumerate().filter(|(rank, _)| *rank != own);
        let retired =
            others.flat_map(|(rank, card)| card.retired.iter().map(move |&id| (rank, id)));
        for (rank, id) in retired.clone().filter(|(_, id)| is_mapped(*id)) {
            direct.post.forget(device, rank, id);
        }
        direct.imports.retire(number, retired, (device, self.stream))
    }

    /// What this rank has for the call, or why it can't take part.
    fn prepare(&mut self, owners: &[&Owned]) -> Result<Prepared, Refusal> {
        let refuse = |text: &str| Err(Refusal::new(RefusalKind::Configuration, text));
        let fold = self.collective.fold(self.buffers.dtype);
        if !Arc::ptr_eq(self.stream.device(), &self.communicator.device) {
            return refuse("the stream is of another device than the communicator");
        }
        let is_capturing = match self.stream.is_capturing() {
            Err(error) if error.is_of_capture() => return refuse(&error.to_string()),
            known => known.map_err(device_refusal)?,
        };
        if is_capturing {
            return refuse(
                "the stream is being captured into a graph: collectives can't be captured, since \
                 ranks exchange addresses in each call",
            );
        }
        let bytes = self.buffers.dtype.bytes() as u64;
        let mut places = self.buffers.input.into_iter().chain([self.buffers.output]);
        if let Some((address, _)) = places.find(|(at, count)| at % bytes != 0 && *count > 0) {
            let text = format!("{address:#x} is not aligned to the {bytes} bytes of an element");
            return refuse(&text);
        }
        let (rank, world) = (self.communicator.rank(), self.communicator.world());
        let lengths = self.buffers.lengths();
        let extents = self.collective.size(self.buffers.dtype, (rank, world), lengths);
        let extents = extents.map_err(|text| Refusal::new(RefusalKind::Mismatch, text))?;
        let divides = fold.op == ReduceOp::Average;
        let divide_by = NonZeroU32::new(world as u32).filter(|_| divides);
        let fold = Fold { divide_by, ..fold };
        let is_known = !matches!(extents.blocks, Blocks::Pairs(..) | Blocks::Even(0));
        let form = match self.state.direct.is_some() && fold.custom.is_none() && is_known {
            true => {
                let form = self.communicator.form(self.key(&extents.blocks, &fold), &fold, None);
                let choice = self.choose(&form, &fold)?;
                Some((form, choice))
            }
            false => None,
        };
        let areas = match &form {
            // Peers read staging memory only.
            Some((_, choice)) if choice.way != Way::Queue => {
                self.areas_at_hand(owners, &extents)?
            }
            _ => self.areas(owners, &extents)?,
        };
        self.reserve(&fold, &extents)?;
        let mut scratch = Area::default();
        if let Some((form, choice)) = form.as_ref().filter(|(_, choice)| choice.way == Way::Queue) {
            let alike = vec![areas.in_place; world];
            let program = self.state.programs.program(form, rank, &alike, *choice);
            scratch = self.scratch(program.scratch[rank])?;
        }
        Ok(Prepared { extents, fold, form, areas, scratch })
    }

    fn choose(&mut self, form: &Form, fold: &Fold) -> Result<Choice, Refusal> {
        let choice = self.communicator.choose(self.state, form, (fold.op, fold.dtype));
        choice.map_err(|text| Refusal::new(RefusalKind::Configuration, text))
    }

    fn key(&self, blocks: &Blocks, fold: &Fold) -> Key {
        let collective = self.collective;
        Key {
            kind: collective.kind(),
            root: collective.root(),
            blocks: blocks.clone(),
            element_bytes: fold.dtype.bytes(),
            average: fold.op == ReduceOp::Average && collective.kind().reduces(),
            scales: fold.factor.is_some(),
            ordered: false,
            custom: false,
            in_place: false,
        }
    }

    /// Tells all ranks what this one has, and learns what the others have.
    fn exchange(
        &mut self,
        number: u64,
        prepared: &Result<Prepared, Refusal>,
    ) -> Result<Vec<Card>, Error> {
        self.state.exports.look().map_err(|it| self.communicator.fail(&it))?;
        let closed = match &mut self.state.direct {
            Some(direct) => direct.imports.close().map_err(|it| self.communicator.fail(&it))?,
            None => number,
        };
        let terms = |blocks: &Blocks| {
            let fold = self.collective.fold(self.buffers.dtype);
            Terms::new(&fold, blocks, self.collective.purpose())
        };
        let unknown = Blocks::Even(0);
        let blocks = prepared.as_ref().map_or(&unknown, |it| &it.extents.blocks);
        let chosen = prepared.as_ref().ok().and_then(|it| it.form.as_ref());
        let algorithm = chosen.map_or(0, |(_, choice)| choice.number());
        let terms = terms(blocks);
        let call = self.describe(number, blocks, algorithm);
        let card = Card {
            call: Call { history: terms.fingerprint(&call), ..call },
            terms: terms.to_string(),
            in_place: prepared.as_ref().is_ok_and(|it| it.areas.in_place),
            closed,
            retired: self.state.exports.leave(),
            scratch_bytes: prepared.as_ref().map_or(0, |it| it.scratch.bytes as u64),
            memories: prepared
                .as_ref()
                .map_err(Clone::clone)
                .map(|it| [it.areas.input.spot, it.areas.output.spot, it.scratch.spot]),
        };
        let all = &mut self.state.cards[..];
        let host = self.communicator.host();
        host.run(&Collective::all_gather(), Buffers::OutOfPlace(&card.encode(), all))?;
        let read = |(rank, bytes)| {
            Card::decode(bytes).ok_or_else(|| {
                let text = "its card of a collective on device memory makes no sense";
                let error = LinkError::protocol(rank, text);
                let member = host.member.as_ref().expect("this rank's own card makes sense");
                member.core.runner.membership.judge(error).on(host.rank())
            })
        };
        self.state.cards.chunks(CARD_BYTES).enumerate().map(read).collect()
    }

    fn describe(&self, number: u64, blocks: &Blocks, algorithm: u8) -> Call {
        let host = self.communicator.host().member.as_ref();
        let communicator = host.map_or(0, |it| it.core.runner.membership.communicator());
        Call {
            communicator,
            number: number - 1, // the first is number 0
            collective: self.collective.kind(),
            dtype: self.buffers.dtype,
            op: self.collective.fold(self.buffers.dtype).op,
            watched: self.collective.fold(self.buffers.dtype).watch,
            count: blocks.told(),
            root: self.collective.root() as u16, // worlds have 2^16 ranks at most
            history: 0,
            algorithm,
        }
    }

    /// Puts the collective into the stream.
    fn enqueue(
        &mut self,
        number: u64,
        prepared: &mut Prepared,
        cards: &[Card],
    ) -> Result<(), Error> {
        let rank = self.communicator.rank();
        let (form, choice) = match prepared.form.take() {
            Some(known) => known,
            None => self.of_pairs(prepared)?,
        };
        if choice.way != Way::Queue {
            let launched = self.launch(prepared, choice.way);
            return launched.map_err(|error| self.communicator.fail(&error));
        }
        let in_place: Vec<bool> = cards.iter().map(|card| card.in_place).collect();
        let program = self.state.programs.program(&form, rank, &in_place, choice);
        let fits = |(card, &needs): (&Card, &usize)| card.scratch_bytes >= needs as u64;
        let mut later = None;
        if !cards.iter().zip(&program.scratch).all(fits) {
            // All ranks know it: they tell each other again.
            let scratch = self.scratch(program.scratch[rank]);
            let has_it = scratch.map(|scratch| prepared.scratch = scratch);
            prepared.form = Some((form, choice));
            let areas = std::mem::take(&mut prepared.areas);
            let (extents, form) = (prepared.extents.clone(), prepared.form.clone());
            let (fold, scratch) = (prepared.fold, prepared.scratch);
            let again = has_it.map(|()| Prepared { extents, fold, form, areas, scratch });
            let cards = agreed(self.communicator.host(), self.exchange(number, &again)?)?;
            let Ok(Prepared { areas, .. }) = again else { unreachable!("it was agreed on") };
            prepared.areas = areas;
            later = Some(cards);
        }
        let cards = later.as_deref().unwrap_or(cards);
        let put = self.put(prepared, &program, cards);
        put.map_err(|error| self.communicator.fail(&error))
    }

    /// An all-to-all whose ranks know only their own counts: they tell each other.
    fn of_pairs(&mut self, prepared: &Prepared) -> Result<(Form, Choice), Error> {
        let Blocks::Pairs(sends, receives) = &prepared.extents.blocks else {
            unreachable!("all other forms are known to each rank")
        };
        let world = self.communicator.world();
        let own: Vec<u64> = sends.iter().chain(&receives[..]).map(|&count| count as u64).collect();
        let mut all = vec![0_u64; world * own.len()];
        let host = self.communicator.host();
        host.run(&Collective::all_gather(), Buffers::OutOfPlace(&own, &mut all))?;
        let rows: Vec<&[u64]> = all.chunks(2 * world).collect();
        for (from, to) in (0..world * world).map(|pair| (pair / world, pair % world)) {
            let (sent, expected) = (rows[from][to], rows[to][world + from]);
            if sent != expected {
                let text = format!(
                    "all_to_all: rank {from} sends {sent} elements to rank {to}, which expects \
                     {expected}"
                );
                let error = Error::new(ErrorKind::Mismatch, text).on(host.rank());
                return Err(error.caused_by(vec![from.min(to), from.max(to)]));
            }
        }
        let counts: Vec<Vec<usize>> =
            rows.iter().map(|row| row[..world].iter().map(|&it| it as usize).collect()).collect();
        let key = self.key(&prepared.extents.blocks, &prepared.fold);
        let form = self.communicator.form(key, &prepared.fold, Some(&counts));
        let choice = self.choose(&form, &prepared.fold).map_err(|refusal| {
            Error::new(refusal.kind.error_kind(), refusal.text).on(host.rank())
        })?;
        Ok((form, choice))
    }

    fn put(
        &mut self,
        prepared: &Prepared,
        program: &DeviceProgram,
        cards: &[Card],
    ) -> Result<(), OpenError> {
        let addresses = self.addresses(prepared, program, cards)?;
        self.follow()?;
        let (stream, how) = (self.stream, prepared.fold);
        let kernels = self.communicator.device.kernels()?;
        if let Some(before) = prepared.areas.before {
            // SAFETY: whoever made the buffers promised it; the bounce buffer is as long.
            unsafe { queue::copy(kernels, stream, &[before]) }?;
        }
        let direct = self.state.direct.as_mut().expect("calls are enqueued only then");
        let flags = &mut direct.flags;
        if how.watch {
            flags.forget(kernels, stream)?;
        }
        let queue = Queue { kernels, stream, addresses, how, found: flags.found() };
        // SAFETY: whoever made the buffers promised it, on all ranks; scratch and bounce buffers
        // are as long as the program says, and stay until their ranks have heard from all.
        unsafe { queue.put(program, flags) }?;
        flags.advance(program);
        if how.watch {
            flags.learn(kernels, stream, &program.watched_by)?;
            // Whose folds told this rank something may forget it then.
            let (told_by, told) = (&program.watched_by, &program.watches_for);
            flags.meet((kernels, stream), Flag::Taken, told_by, told)?;
        }
        if let Some(after) = prepared.areas.after {
            // SAFETY: as above.
            unsafe { queue::copy(kernels, stream, &[after]) }?;
        }
        Ok(())
    }

    /// An all-reduce in one launch, or in one for each piece.
    fn launch(&mut self, prepared: &Prepared, way: Way) -> Result<(), CudaError> {
        self.follow()?;
        let (stream, device) = (self.stream, &self.communicator.device);
        let direct = self.state.direct.as_mut().expect("only then there is one launch");
        let (areas, blocks_max) = (&prepared.areas, direct.blocks_max);
        let launch = |start: usize, bytes: usize| OneLaunch {
            to: areas.output.address + start as u64,
            from: areas.input.address + start as u64,
            count: bytes / self.buffers.dtype.bytes(),
            blocks: u32::try_from(bytes.div_ceil(BYTES_PER_BLOCK))
                .unwrap_or(u32::MAX)
                .clamp(1, blocks_max),
        };
        let all = areas.input.bytes;
        if way == Way::OneLaunch {
            let kernels = device.kernels()?;
            // SAFETY: whoever made the buffers promised it; a choice of one launch fits.
            return unsafe {
                direct.flags.launch((kernels, stream), &prepared.fold, launch(0, all))
            };
        }
        let multimem = direct.multimem.as_mut().expect("only then it is chosen");
        for start in (0..all).step_by(PIECE_BYTES) {
            let piece = launch(start, PIECE_BYTES.min(all - start));
            let how = &prepared.fold;
            // SAFETY: as above; the bound memory holds a piece.
            unsafe { direct.flags.multimem((device, stream), how, piece, multimem) }?;
        }
        Ok(())
    }

    /// Where the memories that the program uses are. Opens what is not open yet.
    fn addresses(
        &mut self,
        prepared: &Prepared,
        program: &DeviceProgram,
        cards: &[Card],
    ) -> Result<Addresses, OpenError> {
        let (own, device) = (self.communicator.rank(), &self.communicator.device);
        let mut addresses = Addresses { rank: own, of: vec![[0; 3]; cards.len()] };
        let areas = [prepared.areas.input, prepared.areas.output, prepared.scratch];
        addresses.of[own] = areas.map(|area| area.address);
        let direct = self.state.direct.as_mut().expect("calls are enqueued only then");
        // Also what this rank has no use for: it must not pile up.
        for (rank, card) in cards.iter().enumerate().filter(|(rank, _)| *rank != own) {
            for spot in card.memories.iter().flatten().flatten() {
                if let Via::Post(number) = spot.of.via {
                    direct.post.receive(device, rank, number)?;
                }
            }
        }
        for Operand { rank, place } in operands(program).filter(|operand| operand.rank != own) {
            let memory = Addresses::memory(place.memory);
            let address = &mut addresses.of[rank][memory];
            let spots = cards[rank].memories.as_ref();
            let spot = spots.ok().and_then(|spots| spots[memory]);
            if let Some(Spot { of, offset }) = spot.filter(|_| *address == 0) {
                let base = match (direct.is_here[rank], of.via) {
                    (true, Via::Ipc(_)) => of.base,
                    _ => direct.imports.base(device, rank, &of, Some(&mut direct.post))?,
                };
                *address = base + offset;
            }
        }
        Ok(addresses)
    }
}

/// The cards, if all ranks can take part in the same call.
///
/// # Errors
/// The same on all ranks.
fn agreed(host: &Communicator, cards: Vec<Card>) -> Result<Vec<Card>, Error> {
    let job_rank = |rank: Rank| {
        host.member.as_ref().map_or(rank, |it| it.core.runner.membership.ranks()[rank])
    };
    let (this, described) = (job_rank(host.rank()), |card: &Card| {
        let call = Call { history: 0, ..card.call };
        format!("{}{}", unisum_control::describe(&call, 0), card.terms)
    });
    for (rank, card) in cards.iter().enumerate() {
        if let Err(Refusal { kind, text }) = &card.memories {
            let rank = job_rank(rank);
            let error = Error::new(kind.error_kind(), format!("rank {rank}: {text}"));
            return Err(error.on(this).caused_by(vec![rank]));
        }
    }
    for (rank, card) in cards.iter().enumerate().skip(1) {
        if card.call != cards[0].call {
            let (first, rank) = (job_rank(0), job_rank(rank));
            let (ours, theirs) = (described(&cards[0]), described(card));
            let text = format!("rank {first} called {ours}, rank {rank} called {theirs}");
            let error = Error::new(ErrorKind::Mismatch, text).on(this);
            let calls = Some([(first, cards[0].call), (rank, card.call)]);
            return Err(error.caused_by(vec![first, rank]).differing(calls));
        }
    }
    Ok(cards)
}

/// All operands of a program.
fn operands(program: &DeviceProgram) -> impl Iterator<Item = Operand> {
    program.operations.iter().flat_map(|operation| {
        let (copies, sources) = match operation {
            Operation::Copy(copies) => (&copies[..], &[][..]),
            Operation::Fold(fold) => (&[][..], &fold.sources[..]),
            Operation::Signal(_) | Operation::Wait(_) => (&[][..], &[][..]),
        };
        copies.iter().map(|copy| copy.from).chain(sources.iter().copied())
    })
}
