//! State of shards on its way from rank to rank.

use std::collections::TryReserveError;

use unisum_kernels::Element;
use unisum_link::Rank;
use unisum_link::handshake::fingerprint;

use super::{Holding, ShardState};
use crate::buckets::resharding::Move;
use crate::{Buffers, Collective, Communicator, Error, ErrorKind};

/// Memory for what travels of any one bucket.
pub(super) struct Travel<T> {
    sent: Vec<T>,
    received: Vec<T>,
}

impl<T: Element + Default> Travel<T> {
    /// For these moves, by bucket, of a rank in a world.
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn new(
        (rank, world): (Rank, usize),
        vectors: usize,
        moves: &[Vec<Move>],
    ) -> Result<Self, TryReserveError> {
        let of_bucket = |moves: &Vec<Move>| counts(moves, (rank, world), vectors);
        let (mut most_sent, mut most_received) = (0, 0);
        for (sends, receives) in moves.iter().map(of_bucket) {
            most_sent = most_sent.max(sends.iter().sum());
            most_received = most_received.max(receives.iter().sum());
        }
        Ok(Self { sent: room(most_sent)?, received: room(most_received)? })
    }

    /// Takes what stays, and what others have, into the new shards.
    pub(super) fn exchange(
        &mut self,
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
        let (sends, receives) = counts(moves, (rank, world), vectors);
        let Self { sent, received } = self;
        sent.clear();
        // By owner, so that each rank's are together.
        for it in moves.iter().filter(|it| it.travels() && it.told.from == Some(rank)) {
            (0..vectors).for_each(|vector| sent.extend_from_slice(held(it, vector)));
        }
        received.clear();
        received.resize(receives.iter().sum(), T::default());
        let collective = Collective::all_to_all_v(&sends, &receives);
        communicator.run(&collective, Buffers::OutOfPlace(sent, received))?;
        prints.add(bytes_of(sent), &sends, bytes_of(received), &receives);
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
}

/// How many elements a rank sends to each rank, and receives from each.
fn counts(
    moves: &[Move],
    (rank, world): (Rank, usize),
    vectors: usize,
) -> (Vec<usize>, Vec<usize>) {
    let (mut sends, mut receives) = (vec![0; world], vec![0; world]);
    for it in moves.iter().filter(|it| it.travels()) {
        let count = vectors * it.told.elements.len();
        if it.told.from == Some(rank) {
            sends[it.told.to] += count;
        }
        if let Some(from) = it.told.from.filter(|_| it.told.to == rank) {
            receives[from] += count;
        }
    }
    (sends, receives)
}

/// An empty vector that so many elements fit into.
///
/// # Errors
/// If there is no memory.
pub(super) fn room<T>(count: usize) -> Result<Vec<T>, TryReserveError> {
    let mut vector = Vec::new();
    #[cfg(test)]
    let count = super::tests::asked_for(count);
    vector.try_reserve_exact(count)?;
    Ok(vector)
}

/// What was made on this rank, if all had memory for it.
pub(super) fn all_have_room<T>(
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
pub(super) fn all_are_whole(communicator: &Communicator, is_whole: bool) -> Result<(), Error> {
    let wrong = communicator.who(!is_whole)?;
    if wrong.is_empty() {
        return Ok(());
    }
    let text = format!("ranks {wrong:?} received other state of shards than was sent to them");
    Err(Error::new(ErrorKind::Protocol, text).on(communicator.rank()).caused_by(wrong))
}

pub(super) fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: an element is a number of this size, all of whose bytes are initialized.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// Of all that travels, by the other rank.
pub(super) struct Fingerprints {
    pub(super) sent: Vec<[u8; 32]>,
    pub(super) received: Vec<[u8; 32]>,
}

impl Fingerprints {
    pub(super) fn new(world: usize) -> Self {
        Self { sent: vec![[0; 32]; world], received: vec![[0; 32]; world] }
    }

    /// More of it: what goes to or comes from each rank lies behind what is of the rank before.
    pub(super) fn add(
        &mut self,
        sent: &[u8],
        sends: &[usize],
        received: &[u8],
        receives: &[usize],
    ) {
        add_all(&mut self.sent, sent, sends);
        add_all(&mut self.received, received, receives);
    }

    /// Whether this rank has received what was sent to it.
    pub(super) fn fit(&self, communicator: &Communicator) -> Result<bool, Error> {
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
