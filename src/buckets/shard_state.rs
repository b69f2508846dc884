//! What ranks keep for their shards, and how it follows the elements when the view changes.
//!
//! Copies on other ranks: Zheng, Shi and Kalé, "FTC-Charm++: an in-memory checkpoint-based fault
//! tolerant runtime for Charm++ and MPI", Cluster 2004.

use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;

use unisum_kernels::{Dtype, Element};
use unisum_link::Rank;
use unisum_link::handshake::fingerprint;

use super::resharding::{self, Card, Extent, Had, Move, ShardMove};
use super::shard::ShardPiece;
use super::{Buckets, Layout};
use crate::{Buffers, Collective, Communicator, Error, ErrorKind};

/// What a rank keeps for its shards from step to step: several vectors, for example the weights and
/// the optimizer's two moments, each with one element for each element of the shards. Has nothing
/// until [`Buckets::reshard`] lays it out.
#[derive(Clone)]
pub struct ShardState<T> {
    vectors: usize,
    version: u64,
    own: Holding<T>,
    /// The layout, rank and world that the shards are of.
    place: Option<(Layout, Rank, usize)>,
    /// How many elements the parameters have of which these are shards.
    counts: Vec<usize>,
    /// What all ranks have: this rank's own shards as they were, and those of the rank before it.
    copies: Vec<Holding<T>>,
    /// What a call that failed had brought already: other ranks may have seen it succeed, and keep
    /// nothing else.
    coming: Vec<Holding<T>>,
}

/// How state came to where it is now: the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resharded {
    /// The version that all ranks have now: the latest, or an earlier one if more is left of that.
    pub version: u64,
    /// Where each element of each parameter was, and is.
    pub moves: Vec<ShardMove>,
}

impl Resharded {
    /// What nobody has any more.
    pub fn lost(&self) -> impl Iterator<Item = &ShardMove> {
        self.moves.iter().filter(|it| it.from.is_none())
    }
}

/// Shards of one version.
#[derive(Clone)]
struct Holding<T> {
    version: u64,
    /// By bucket.
    pieces: Vec<Vec<ShardPiece>>,
    /// By bucket and vector.
    shards: Vec<Vec<Vec<T>>>,
    /// Elements that are not there.
    missing: Vec<Extent>,
}

impl<T: Element + Default> Holding<T> {
    const NONE: Self =
        Self { version: 0, pieces: Vec::new(), shards: Vec::new(), missing: Vec::new() };

    /// # Errors
    /// If there is no memory.
    fn new(
        (layout, rank, world): &(Layout, Rank, usize),
        vectors: usize,
        version: u64,
    ) -> Result<Self, TryReserveError> {
        let buckets = layout.plans().len();
        let pieces = (0..buckets).map(|it| layout.pieces_of(it, (*rank, *world))).collect();
        let shard = |bucket| {
            let len = layout.shard(bucket, (*rank, *world)).len();
            let vector = |_| {
                let mut vector = Vec::new();
                vector.try_reserve_exact(len)?;
                vector.resize(len, T::default());
                Ok(vector)
            };
            (0..vectors).map(vector).collect()
        };
        let shards = (0..buckets).map(shard).collect::<Result<_, TryReserveError>>()?;
        Ok(Self { version, pieces, shards, missing: Vec::new() })
    }

    /// Where elements are, all of which are in one piece: bucket, and place in the shard.
    fn find(&self, parameter: usize, elements: &Range<usize>) -> Option<(usize, Range<usize>)> {
        let is_in = |piece: &&ShardPiece| {
            piece.parameter == parameter
                && piece.elements.start <= elements.start
                && elements.end <= piece.elements.end
        };
        self.pieces.iter().enumerate().find_map(|(bucket, pieces)| {
            let piece = pieces.iter().find(is_in)?;
            let start = piece.at + elements.start - piece.elements.start;
            Some((bucket, start..start + elements.len()))
        })
    }

    fn had(&self) -> Had {
        let pieces = self.pieces.iter().flatten();
        let extents = pieces.flat_map(|it| it.extent().without(&self.missing)).collect();
        Had { version: self.version, extents }
    }
}

impl ShardPiece {
    fn extent(&self) -> Extent {
        Extent { parameter: self.parameter, elements: self.elements.clone() }
    }
}

impl Extent {
    /// What is left of it without these, which are parts of it or of others, in ascending order.
    fn without(self, missing: &[Self]) -> Vec<Self> {
        let (parameter, Range { mut start, end }) = (self.parameter, self.elements);
        let mut left = Vec::new();
        let ours = |it: &&Self| {
            it.parameter == parameter && it.elements.start < end && it.elements.end > start
        };
        let ours: Vec<&Self> = missing.iter().filter(ours).collect();
        for Self { elements, .. } in ours {
            left.push(Self { parameter, elements: start..elements.start });
            start = elements.end;
        }
        left.push(Self { parameter, elements: start..end });
        left.retain(|it| it.elements.start < it.elements.end);
        left
    }
}

impl Layout {
    fn pieces_of(&self, bucket: usize, place: (Rank, usize)) -> Vec<ShardPiece> {
        self.shard_pieces(bucket, &self.shard(bucket, place))
    }
}

impl<T: Element + Default> ShardState<T> {
    /// State of so many vectors, of which this rank has nothing.
    pub const fn new(vectors: usize) -> Self {
        Self {
            vectors,
            version: 0,
            own: Holding::NONE,
            place: None,
            counts: Vec::new(),
            copies: Vec::new(),
            coming: Vec::new(),
        }
    }

    /// The number that [`ShardState::set_version`] was given, or [`Resharded::version`].
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// Says that the state is complete, after so many steps: what was missing is restored. Ranks
    /// that have different versions have different models, so this is called after each step. If
    /// all ranks go back to an earlier version by themselves, later copies are dropped.
    pub fn set_version(&mut self, version: u64) {
        self.version = version;
        self.own.version = version;
        self.own.missing.clear();
        for held in [&mut self.copies, &mut self.coming] {
            held.retain(|it| it.version <= version);
        }
    }

    /// A vector of this rank's shard of a bucket, as long as [`Buckets::shard`], with padding.
    ///
    /// # Panics
    /// If there is no such vector or bucket.
    pub fn vector(&self, bucket: usize, vector: usize) -> &[T] {
        &self.own.shards[bucket][vector]
    }

    /// As [`ShardState::vector`], to be updated.
    ///
    /// # Panics
    /// As [`ShardState::vector`].
    pub fn vector_mut(&mut self, bucket: usize, vector: usize) -> &mut [T] {
        &mut self.own.shards[bucket][vector]
    }

    /// Some elements of a parameter that are in one of this rank's shards, to be restored or
    /// initialized: `elements` of a [`ShardMove`] whose `to` is this rank.
    ///
    /// # Panics
    /// If they are in no shard of this rank, or there is no such vector.
    pub fn elements_mut(
        &mut self,
        vector: usize,
        parameter: usize,
        elements: Range<usize>,
    ) -> &mut [T] {
        let found = self.own.find(parameter, &elements);
        let Some((bucket, at)) = found else {
            panic!("elements {elements:?} of parameter {parameter} are in no shard of this rank");
        };
        &mut self.own.shards[bucket][vector][at]
    }

    /// Its own shards, then its copies: those that a [`Card`] tells of.
    fn holdings(&self) -> impl Iterator<Item = &Holding<T>> {
        [&self.own].into_iter().chain(&self.copies).chain(&self.coming)
    }

    /// All ranks have what came last: it is what this rank has.
    fn settle(&mut self, version: u64, place: (Layout, Rank, usize), counts: Vec<usize>) {
        if let Some(new) = self.coming.pop() {
            self.own = new;
        }
        (self.version, self.place, self.counts) = (version, Some(place), counts);
        self.copies.append(&mut self.coming);
        // Later ones are of a past that has not happened now.
        self.copies.retain(|it| it.version <= version);
    }

    /// What the others are told, if the buckets' parameters have so many elements.
    fn card(&self, counts: &[usize]) -> Card {
        Card {
            vectors: self.vectors as u64,
            dtype: T::DTYPE as u8,
            fits: self.place.is_none() || self.counts == counts,
            had: self.holdings().map(Holding::had).collect(),
        }
    }
}

impl<T> fmt::Debug for ShardState<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ShardState");
        debug.field("vectors", &self.vectors).field("version", &self.version);
        debug.finish_non_exhaustive()
    }
}

impl Buckets {
    /// Lays out state for the shards of these buckets, and gives each rank what belongs to its
    /// shards now, from whoever has it: at the start, and after each change of an elastic job's
    /// view, when the buckets have been built again. A newcomer, and every rank at the start, gives
    /// a [`ShardState::new`].
    ///
    /// What nobody has is reported ([`Resharded::lost`]), and zero: the program initializes it or
    /// takes it from its checkpoint, and then says so by [`ShardState::set_version`]. If copies of
    /// an earlier version are more complete ([`Buckets::copy_shards`]), all ranks go back to that.
    ///
    /// Collective: every rank calls it, between two steps. If it fails, the state is what it was,
    /// and the next call goes on from what all ranks have, though some may have seen this one
    /// succeed. What travels is checked by fingerprints (SHA-256).
    ///
    /// Cost: each element that changes its rank travels once, a bucket at a time; memory for the
    /// new shards beside the old ones, and for what travels of one bucket.
    ///
    /// # Errors
    /// On all ranks: [`ErrorKind::Mismatch`] if numbers of vectors or types of elements differ, or
    /// state of other parameters was given; [`ErrorKind::Memory`] if one has no memory;
    /// [`ErrorKind::Protocol`] if one received something else than was sent. As
    /// [`Communicator::run`](crate::Communicator::run).
    ///
    /// # Panics
    /// If buckets are not sharded.
    pub fn reshard<T: Element + Default>(
        &mut self,
        state: &mut ShardState<T>,
    ) -> Result<Resharded, Error> {
        let (resharded, is_whole) = self.bring(state)?;
        // If this fails here and not on others, these have nothing but what is coming.
        all_are_whole(&self.core.communicator(), is_whole)?;
        state.settle(resharded.version, self.shard_place(), self.counts());
        Ok(resharded)
    }

    fn counts(&self) -> Vec<usize> {
        self.plan.parameters.iter().map(|it| it.count()).collect()
    }

    /// Brings the new shards, which are coming from then on, if this rank received what was sent to
    /// it; whether it did.
    fn bring<T: Element + Default>(
        &self,
        state: &mut ShardState<T>,
    ) -> Result<(Resharded, bool), Error> {
        let (place, counts) = (self.shard_place(), self.counts());
        let communicator = self.core.communicator();
        let cards = exchange_cards(&communicator, &state.card(&counts), &counts)?;
        let version = resharding::choose(&counts, &cards);
        let new = Holding::new(&place, state.vectors, version);
        let mut new = all_have_room(&communicator, new)?;
        let (mut moved, mut prints) = (Vec::new(), Fingerprints::new(place.2));
        for bucket in 0..place.0.plans().len() {
            let of_rank = |rank| {
                let pieces = place.0.pieces_of(bucket, (rank, place.2));
                pieces.into_iter().map(move |piece| (rank, piece.extent()))
            };
            let owners: Vec<_> = (0..place.2).flat_map(of_rank).collect();
            let moves = resharding::moves(&counts, &cards, version, &owners);
            exchange_moves(&communicator, state, &mut new, &moves, &mut prints)?;
            moved.extend(moves.into_iter().map(|it| it.told));
        }
        let resharded = Resharded { version, moves: moved };
        let lost = resharded.lost().filter(|it| it.to == place.1);
        new.missing = lost
            .map(|it| Extent { parameter: it.parameter, elements: it.elements.clone() })
            .collect();
        let is_whole = prints.fit(&communicator)?;
        if is_whole {
            state.coming.push(new);
        }
        Ok((resharded, is_whole))
    }

    /// Copies each rank's state to the next rank, and keeps it as it is now: if the job then loses
    /// a rank, or several of which no two are neighbours, [`Buckets::reshard`] loses nothing, and
    /// goes back to this version. Without copies, and with two lost neighbours, it tells what is
    /// lost.
    ///
    /// Collective: every rank calls it, between two steps, as often as is worth it: a loss costs
    /// the steps since.
    ///
    /// Cost: each rank sends its state once, and receives as much; memory for two more states, and
    /// for four during the call.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`], on all ranks, if the ranks' versions differ;
    /// [`ErrorKind::Configuration`] if state of other buckets, or with missing elements, was given
    /// on any rank; [`ErrorKind::Memory`] if one has no memory. As
    /// [`Communicator::run`](crate::Communicator::run).
    ///
    /// # Panics
    /// If buckets are not sharded.
    pub fn copy_shards<T: Element + Default>(
        &mut self,
        state: &mut ShardState<T>,
    ) -> Result<(), Error> {
        let place = self.shard_place();
        let (rank, world) = (place.1, place.2);
        let communicator = self.core.communicator();
        let is_whole = state.place.as_ref() == Some(&place) && state.own.missing.is_empty();
        check_versions(&communicator, state.version, is_whole)?;
        let before = (rank + world - 1) % world;
        let of_before = (place.0.clone(), before, world);
        let room = Holding::new(&place, state.vectors, state.version);
        let copy = Holding::new(&of_before, state.vectors, state.version);
        let both = room.and_then(|room| Ok((room, copy?)));
        let (mut own, mut copy) = all_have_room(&communicator, both)?;
        for (to, from) in own.shards.iter_mut().zip(&state.own.shards) {
            to.iter_mut().zip(from).for_each(|(to, from)| to.copy_from_slice(from));
        }
        for (sent, received) in own.shards.iter().zip(&mut copy.shards) {
            for (sent, received) in sent.iter().zip(received) {
                let count = |to: Rank| (0..world).map(move |it| usize::from(it == to));
                let counts = |to| count(to).map(|it| it * sent.len()).collect::<Vec<_>>();
                let next = (rank + 1) % world;
                let collective = Collective::all_to_all_v(&counts(next), &counts(before));
                communicator.run(&collective, Buffers::OutOfPlace(sent, received))?;
            }
        }
        state.coming = vec![own, copy];
        communicator.barrier()?;
        // All have theirs.
        state.copies = std::mem::take(&mut state.coming);
        Ok(())
    }

    /// The layout of the shards, this rank and the world.
    fn shard_place(&self) -> (Layout, Rank, usize) {
        self.settle();
        let communicator = self.core.communicator();
        let (rank, world) = (communicator.rank(), communicator.world());
        assert_eq!(self.limits.pieces, world, "these buckets are not sharded");
        (self.plan.layout.clone(), rank, world)
    }
}

/// What was made on this rank, if all had memory for it.
fn all_have_room<T>(
    communicator: &Communicator,
    made: Result<T, TryReserveError>,
) -> Result<T, Error> {
    let lacking = communicator.who(made.is_err())?;
    made.ok().filter(|_| lacking.is_empty()).ok_or_else(|| {
        let text = format!("ranks {lacking:?} have no memory for the state of their shards");
        Error::new(ErrorKind::Memory, text).on(communicator.rank()).caused_by(lacking)
    })
}

/// Whoever sees this succeed knows that all ranks have all that is new.
fn all_are_whole(communicator: &Communicator, is_whole: bool) -> Result<(), Error> {
    let wrong = communicator.who(!is_whole)?;
    if wrong.is_empty() {
        return Ok(());
    }
    let text = format!("ranks {wrong:?} received other state of shards than was sent to them");
    Err(Error::new(ErrorKind::Protocol, text).on(communicator.rank()).caused_by(wrong))
}

fn exchange_cards(
    communicator: &Communicator,
    own: &Card,
    counts: &[usize],
) -> Result<Vec<Card>, Error> {
    let told = communicator.exchange(own.encode())?;
    let (mut cards, rank) = (Vec::new(), communicator.rank());
    for (other, told) in told.iter().enumerate() {
        let Some(card) = Card::decode(told, counts).filter(|card| card.fits) else {
            let text = format!("the state of rank {other} is that of other parameters");
            return Err(Error::new(ErrorKind::Mismatch, text).on(rank).caused_by(vec![other]));
        };
        cards.push(card);
    }
    let kept = |card: &Card| (card.vectors, card.dtype);
    if let Some(other) = cards.iter().position(|it| kept(it) != kept(&cards[0])) {
        let [first, second] = [&cards[0], &cards[other]].map(|Card { vectors, dtype, .. }| {
            let dtype =
                Dtype::try_from(*dtype).map_or_else(|_| "?".to_owned(), |it| it.to_string());
            format!("{vectors} vectors of {dtype}")
        });
        let text = format!("rank 0 keeps {first}, and rank {other} {second}");
        return Err(Error::new(ErrorKind::Mismatch, text).on(rank).caused_by(vec![0, other]));
    }
    Ok(cards)
}

/// All ranks have state of these buckets and the same version.
fn check_versions(communicator: &Communicator, version: u64, is_whole: bool) -> Result<(), Error> {
    let mut told = vec![0; 2 * communicator.world()];
    communicator.all_gather(&[version, u64::from(is_whole)], &mut told)?;
    let (told, _) = told.as_chunks::<2>();
    let rank = communicator.rank();
    if let Some(other) = told.iter().position(|[_, is_whole]| *is_whole == 0) {
        let text = format!("the state of rank {other} is not that of its shards");
        return Err(Error::new(ErrorKind::Configuration, text).on(rank).caused_by(vec![other]));
    }
    if let Some(other) = told.iter().position(|it| it != &told[0]) {
        let ([first, _], [second, _]) = (told[0], told[other]);
        let text = format!("rank 0 has version {first} of its shards, and rank {other} {second}");
        return Err(Error::new(ErrorKind::Mismatch, text).on(rank).caused_by(vec![0, other]));
    }
    Ok(())
}

/// Takes what stays, and what others have, into the new shards.
fn exchange_moves<T: Element + Default>(
    communicator: &Communicator,
    state: &ShardState<T>,
    new: &mut Holding<T>,
    moves: &[Move],
    prints: &mut Fingerprints,
) -> Result<(), Error> {
    let (rank, world, vectors) = (communicator.rank(), communicator.world(), state.vectors);
    let holdings: Vec<&Holding<T>> = state.holdings().collect();
    let held = |Move { told, holding }: &Move, vector: usize| {
        let (bucket, at) = holdings[*holding]
            .find(told.parameter, &told.elements)
            .expect("this rank told that it has them");
        &holdings[*holding].shards[bucket][vector][at]
    };
    let travels = |it: &&Move| it.told.from.is_some_and(|from| from != it.told.to);
    let (mut sends, mut receives) = (vec![0; world], vec![0; world]);
    let mut sent: Vec<T> = Vec::new();
    // By owner, so that each rank's are together.
    for it in moves.iter().filter(travels) {
        let count = vectors * it.told.elements.len();
        if it.told.from == Some(rank) {
            sends[it.told.to] += count;
            (0..vectors).for_each(|vector| sent.extend_from_slice(held(it, vector)));
        }
        if let Some(from) = it.told.from.filter(|_| it.told.to == rank) {
            receives[from] += count;
        }
    }
    let mut received = vec![T::default(); receives.iter().sum()];
    let collective = Collective::all_to_all_v(&sends, &receives);
    communicator.run(&collective, Buffers::OutOfPlace(&sent, &mut received))?;
    prints.add(bytes_of(&sent), &sends, bytes_of(&received), &receives);
    let mut starts: Vec<usize> =
        (0..world).map(|from| receives[..from].iter().sum::<usize>()).collect();
    for it in moves.iter().filter(|it| it.told.to == rank) {
        let Some(from) = it.told.from else { continue };
        let (bucket, at) = new
            .find(it.told.parameter, &it.told.elements)
            .expect("the layout puts them into this rank's shard");
        for vector in 0..vectors {
            let to = &mut new.shards[bucket][vector][at.clone()];
            if from == rank {
                to.copy_from_slice(held(it, vector));
            } else {
                let end = starts[from] + to.len();
                to.copy_from_slice(&received[starts[from]..end]);
                starts[from] = end;
            }
        }
    }
    Ok(())
}

fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: an element is a number of this size, all of whose bytes are initialized.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// Of all that travels, by the other rank.
struct Fingerprints {
    sent: Vec<[u8; 32]>,
    received: Vec<[u8; 32]>,
}

impl Fingerprints {
    fn new(world: usize) -> Self {
        Self { sent: vec![[0; 32]; world], received: vec![[0; 32]; world] }
    }

    /// More of it: what goes to or comes from each rank lies behind what is of the rank before.
    fn add(&mut self, sent: &[u8], sends: &[usize], received: &[u8], receives: &[usize]) {
        add_all(&mut self.sent, sent, sends);
        add_all(&mut self.received, received, receives);
    }

    /// Whether this rank has received what was sent to it.
    fn fit(&self, communicator: &Communicator) -> Result<bool, Error> {
        let (sent, received) = (self.sent.as_flattened(), self.received.as_flattened());
        let mut expected = vec![0; received.len()];
        communicator.run(&Collective::all_to_all(), Buffers::OutOfPlace(sent, &mut expected))?;
        Ok(expected == received)
    }
}

fn add_all(prints: &mut [[u8; 32]], bytes: &[u8], counts: &[usize]) {
    // Elements, of which there are as many as counts say.
    let element = bytes.len() / counts.iter().sum::<usize>().max(1);
    let mut rest = bytes;
    for (print, count) in prints.iter_mut().zip(counts).filter(|(_, count)| **count > 0) {
        let (own, others) = rest.split_at(count * element);
        *print = fingerprint([*print, fingerprint(own)].as_flattened());
        rest = others;
    }
}

#[cfg(test)]
mod tests;
