//! What ranks keep for their shards, and how it follows the elements when the view changes.
//!
//! Copies on other ranks: Zheng, Shi and Kalé, "FTC-Charm++: an in-memory checkpoint-based fault
//! tolerant runtime for Charm++ and MPI", Cluster 2004.

use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;

use unisum_kernels::{Dtype, Element};
use unisum_link::Rank;

use self::moving::{Fingerprints, Travel, all_are_whole, all_have_room};
use self::vector::Vector;
use super::resharding::{self, Card, Extent, Had, ShardMove};
use super::shard::ShardPiece;
use super::{Buckets, Layout, Place};
use crate::{Buffers, Collective, Communicator, Error, ErrorKind};

mod moving;
mod vector;

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
    copies: Copies<T>,
    /// The same of a [`Buckets::copy_shards`] that failed here. Another rank may have seen it
    /// succeed, and keep no other copies.
    copied: Option<Copies<T>>,
    /// The last number of copies that this rank has seen drawn.
    drawn: u64,
    /// Shards that a [`Buckets::reshard`] had laid out when it failed here, of which another rank
    /// may have seen that all had theirs, and keep nothing else.
    laid: Vec<Holding<T>>,
}

/// What a [`Buckets::copy_shards`] has made on this rank. Its number, the same on all ranks, tells
/// it from others of the same version.
#[derive(Clone)]
struct Copies<T> {
    number: u64,
    held: Vec<Holding<T>>,
}

impl<T> Copies<T> {
    const NONE: Self = Self { number: 0, held: Vec::new() };
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

/// What a [`Buckets::reshard`] has brought.
struct Brought {
    resharded: Resharded,
    /// Whether this rank received what was sent to it.
    is_whole: bool,
    /// By rank, the number of the copies that it knows all ranks to have.
    copied: Vec<u64>,
}

/// Shards of one version.
#[derive(Clone)]
struct Holding<T> {
    version: u64,
    /// By bucket.
    pieces: Vec<Vec<ShardPiece>>,
    /// By bucket and vector.
    shards: Vec<Vec<Vector<T>>>,
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
            (0..vectors).map(|_| Vector::zeroed(len)).collect()
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

    /// Whether it has nothing that one of the others has not.
    fn is_in<'a>(&self, others: impl Iterator<Item = &'a Self>) -> bool
    where
        T: 'a,
    {
        let left = others.filter(|it| it.version == self.version).fold(
            self.had().extents,
            |left, other| {
                let mut taken = other.had().extents;
                taken.sort_by_key(|it| it.elements.start);
                left.into_iter().flat_map(|it| it.without(&taken)).collect()
            },
        );
        left.is_empty()
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
            copies: Copies::NONE,
            copied: None,
            drawn: 0,
            laid: Vec::new(),
        }
    }

    /// The number that [`ShardState::set_version`] was given, or [`Resharded::version`].
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// Says that the state is complete, after so many steps: what was missing is restored. Ranks
    /// that have different versions have different models, so this is called after each step. If
    /// all ranks go back to an earlier version by themselves, later copies are dropped. What a
    /// failed [`Buckets::reshard`] had laid out of another version is dropped, too.
    pub fn set_version(&mut self, version: u64) {
        self.version = version;
        self.own.version = version;
        self.own.missing.clear();
        for copies in [&mut self.copies].into_iter().chain(&mut self.copied) {
            copies.held.retain(|it| it.version <= version);
        }
        self.laid.retain(|it| it.version == version);
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

    /// Where a vector lies that [`ShardState::vector_mut`] lends. Later layouts leave it behind: it
    /// then is memory of the program alone.
    ///
    /// # Panics
    /// As [`ShardState::vector`].
    pub fn place(&self, bucket: usize, vector: usize) -> Place {
        let vector = &self.own.shards[bucket][vector];
        vector.place(0..vector.len())
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

    /// All that a [`Card`] tells of, its own shards first.
    fn holdings(&self) -> impl Iterator<Item = &Holding<T>> {
        let copies = [&self.copies].into_iter().chain(&self.copied).flat_map(|it| &it.held);
        [&self.own].into_iter().chain(copies).chain(&self.laid)
    }

    /// Keeps new shards until all ranks are known to have theirs, and of those that earlier calls
    /// had laid out what is nowhere else here.
    fn lay(&mut self, new: Holding<T>) {
        self.laid.push(new);
        for at in (0..self.laid.len() - 1).rev() {
            let others = [&self.own].into_iter().chain(&self.laid[at + 1..]);
            if self.laid[at].is_in(others) {
                self.laid.remove(at);
            }
        }
    }

    /// All ranks have what was laid out last: it is what this rank has, and all else that failed
    /// calls have left is over.
    fn settle(&mut self, brought: &Brought, place: (Layout, Rank, usize), counts: Vec<usize>) {
        self.own = self.laid.pop().expect("this call has laid them out");
        self.laid = Vec::new();
        self.agree_on_copies(&brought.copied);
        let version = brought.resharded.version;
        (self.version, self.place, self.counts) = (version, Some(place), counts);
        // Later ones are of a past that has not happened now.
        self.copies.held.retain(|it| it.version <= version);
    }

    /// What is left of copies that this rank did not see all agree on is what all have, if another
    /// rank did, and else over: nobody has seen it, and nobody will. `known` are the numbers of the
    /// copies that the ranks know all to have.
    fn agree_on_copies(&mut self, known: &[u64]) {
        if let Some(copies) = self.copied.take()
            && known.contains(&copies.number)
        {
            self.copies = copies;
        }
    }

    /// What the others are told, if the buckets' parameters have so many elements.
    fn card(&self, counts: &[usize]) -> Card {
        Card {
            vectors: self.vectors as u64,
            dtype: T::DTYPE as u8,
            fits: self.place.is_none() || self.counts == counts,
            copied: self.copies.number,
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
    /// new shards beside the old ones, and for what travels of one bucket. What a call that failed
    /// had laid out is kept until one succeeds, that of each layout once.
    ///
    /// # Errors
    /// On all ranks: [`ErrorKind::Mismatch`] if numbers of vectors or types of elements differ, or
    /// state of other parameters was given; [`ErrorKind::Memory`] if one has no memory,
    /// before anything travels; [`ErrorKind::Protocol`] if one received something else than was
    /// sent. As [`Communicator::run`](crate::Communicator::run).
    ///
    /// # Panics
    /// If buckets are not sharded.
    pub fn reshard<T: Element + Default>(
        &mut self,
        state: &mut ShardState<T>,
    ) -> Result<Resharded, Error> {
        let brought = self.bring(state)?;
        // If this fails here and not on others, these have nothing but what is laid out.
        all_are_whole(&self.core.communicator(), brought.is_whole)?;
        state.settle(&brought, self.placement(), self.counts());
        Ok(brought.resharded)
    }

    fn counts(&self) -> Vec<usize> {
        self.plan.parameters.iter().map(|it| it.count()).collect()
    }

    /// Brings the new shards, and lays them out beside the old ones if this rank received what was
    /// sent to it.
    fn bring<T: Element + Default>(&self, state: &mut ShardState<T>) -> Result<Brought, Error> {
        let (place, counts) = (self.placement(), self.counts());
        let communicator = self.core.communicator();
        let cards = exchange_cards(&communicator, &state.card(&counts), &counts)?;
        let version = resharding::choose(&counts, &cards);
        let moves: Vec<_> = (0..place.0.plans().len())
            .map(|bucket| {
                let of_rank = |rank| {
                    let pieces = place.0.pieces_of(bucket, (rank, place.2));
                    pieces.into_iter().map(move |piece| (rank, piece.extent()))
                };
                let owners: Vec<_> = (0..place.2).flat_map(of_rank).collect();
                resharding::moves(&counts, &cards, version, &owners)
            })
            .collect();
        let new = Holding::new(&place, state.vectors, version);
        let travel = Travel::new((place.1, place.2), state.vectors, &moves);
        let all = new.and_then(|new| Ok((new, travel?)));
        let (mut new, mut travel) = all_have_room(&communicator, all)?;
        let mut prints = Fingerprints::new(place.2);
        for moves in &moves {
            travel.exchange(&communicator, state, &mut new, moves, &mut prints)?;
        }
        let moves = moves.into_iter().flatten().map(|it| it.told).collect();
        let resharded = Resharded { version, moves };
        let lost = resharded.lost().filter(|it| it.to == place.1);
        new.missing = lost
            .map(|it| Extent { parameter: it.parameter, elements: it.elements.clone() })
            .collect();
        let is_whole = prints.fit(&communicator)?;
        if is_whole {
            state.lay(new);
        }
        Ok(Brought { resharded, is_whole, copied: cards.iter().map(|it| it.copied).collect() })
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
        let place = self.placement();
        let (rank, world) = (place.1, place.2);
        let communicator = self.core.communicator();
        let is_whole = state.place.as_ref() == Some(&place) && state.own.missing.is_empty();
        check_and_draw(&communicator, state, is_whole)?;
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
                communicator.run(&collective, Buffers::OutOfPlace(&sent[..], received))?;
            }
        }
        state.copied = Some(Copies { number: state.drawn, held: vec![own, copy] });
        communicator.barrier()?;
        // All have theirs.
        state.copies = state.copied.take().expect("it is this one's");
        Ok(())
    }

    /// The layout of the shards, this rank and the world.
    fn placement(&self) -> (Layout, Rank, usize) {
        self.settle_all();
        let communicator = self.core.communicator();
        let (rank, world) = (communicator.rank(), communicator.world());
        assert_eq!(self.limits.pieces, world, "these buckets are not sharded");
        (self.plan.layout.clone(), rank, world)
    }
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

/// All ranks have state of these buckets and the same version. Then what is left of a call that
/// failed is over, or what all have, and this one has a number.
fn check_and_draw<T: Element + Default>(
    communicator: &Communicator,
    state: &mut ShardState<T>,
    is_whole: bool,
) -> Result<(), Error> {
    let own = [state.version, u64::from(is_whole), state.drawn, state.copies.number];
    let mut told = vec![0; own.len() * communicator.world()];
    communicator.all_gather(&own, &mut told)?;
    let (told, _) = told.as_chunks::<4>();
    let rank = communicator.rank();
    if let Some(other) = told.iter().position(|[_, is_whole, ..]| *is_whole == 0) {
        let text = format!("the state of rank {other} is not that of its shards");
        return Err(Error::new(ErrorKind::Configuration, text).on(rank).caused_by(vec![other]));
    }
    if let Some(other) = told.iter().position(|it| it[0] != told[0][0]) {
        let [first, second] = [told[0][0], told[other][0]];
        let text = format!("rank 0 has version {first} of its shards, and rank {other} {second}");
        return Err(Error::new(ErrorKind::Mismatch, text).on(rank).caused_by(vec![0, other]));
    }
    let known: Vec<u64> = told.iter().map(|it| it[3]).collect();
    state.agree_on_copies(&known);
    state.drawn = told.iter().map(|it| it[2]).max().unwrap_or(0).saturating_add(1);
    Ok(())
}

#[cfg(test)]
mod tests;
