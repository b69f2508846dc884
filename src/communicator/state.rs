//! The program's state, for ranks that have none: newcomers of an elastic job.

use unisum_link::Rank;
use unisum_link::handshake::fingerprint;

use crate::{Communicator, Error, ErrorKind};

/// What is sent at a time: ranks that have the state receive it too, into so much memory.
const PIECE_BYTES: usize = 4 << 20;
/// What a rank tells of its state: whether it has one, how many bytes, and their fingerprint.
const CARD_WORDS: usize = 6;

/// A rank's state, as it tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Card {
    has: bool,
    bytes: u64,
    fingerprint: [u64; 4],
}

impl Card {
    fn of(state: Option<&[u8]>) -> Self {
        let Some(state) = state else {
            return Self { has: false, bytes: 0, fingerprint: [0; 4] };
        };
        let hash = fingerprint(state);
        let (words, _) = hash.as_chunks::<8>();
        let mut fingerprint = [0; 4];
        fingerprint.iter_mut().zip(words).for_each(|(to, word)| *to = u64::from_le_bytes(*word));
        Self { has: true, bytes: state.len() as u64, fingerprint }
    }

    fn encode(self) -> [u64; CARD_WORDS] {
        let [a, b, c, d] = self.fingerprint;
        [u64::from(self.has), self.bytes, a, b, c, d]
    }

    fn decode([has, bytes, a, b, c, d]: [u64; CARD_WORDS]) -> Self {
        Self { has: has != 0, bytes, fingerprint: [a, b, c, d] }
    }
}

impl Communicator {
    /// Gives the program's state, as bytes, to the ranks that have none: parameters, the state of
    /// the optimiser, the position in the data, for example for ranks that have joined an elastic
    /// job ([`Communicator::admit`]). The lowest rank that has it sends it.
    ///
    /// Collective: every rank calls it, with its state or with `None`. Returns the state on ranks
    /// that gave `None`, and `None` on the others, whose state has to be the same byte for byte:
    /// all compare fingerprints (SHA-256), and those that receive check what they got.
    ///
    /// Cost: one pass over the state for the fingerprint on each rank, and one broadcast, in pieces
    /// of 4 MiB; only the former if all ranks have the state.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`], on all ranks, if states differ: [`Error::failed_ranks`] names those
    /// that differ from the lowest rank's. [`ErrorKind::Configuration`] if no rank has a state.
    /// [`ErrorKind::Memory`] if one has no memory for it. As [`Communicator::run`].
    pub fn share_state(&self, state: Option<&[u8]>) -> Result<Option<Vec<u8>>, Error> {
        let own = Card::of(state);
        let cards = self.tell_cards(own)?;
        let Some(sender) = cards.iter().position(|card| card.has) else {
            let text = "no rank has a state for the others";
            return Err(Error::new(ErrorKind::Configuration, text).on(self.rank()));
        };
        let sent = cards[sender];
        let differs = |rank: &Rank| cards[*rank].has && cards[*rank] != sent;
        let differing: Vec<Rank> = (0..cards.len()).filter(differs).collect();
        if !differing.is_empty() {
            let text = format!("the state of ranks {differing:?} is not that of rank {sender}");
            return Err(Error::new(ErrorKind::Mismatch, text).on(self.rank()).caused_by(differing));
        }
        if cards.iter().all(|card| card.has) {
            return Ok(None);
        }
        let received = self.make_room(state, sent.bytes)?;
        let received = self.send_state(state, received, sender)?;
        let is_whole = received.as_ref().is_none_or(|it| Card::of(Some(it)) == sent);
        let wrong = self.who(!is_whole)?;
        if wrong.is_empty() {
            return Ok(received);
        }
        let text = format!("ranks {wrong:?} received another state than rank {sender} sent");
        Err(Error::new(ErrorKind::Protocol, text).on(self.rank()).caused_by(wrong))
    }

    fn tell_cards(&self, own: Card) -> Result<Vec<Card>, Error> {
        let mut told = vec![0; CARD_WORDS * self.world()];
        self.all_gather(&own.encode(), &mut told)?;
        let (cards, _) = told.as_chunks::<CARD_WORDS>();
        Ok(cards.iter().map(|card| Card::decode(*card)).collect())
    }

    /// The ranks for which it is so.
    pub(crate) fn who(&self, is_so: bool) -> Result<Vec<Rank>, Error> {
        let mut told = vec![0_u8; self.world()];
        self.all_gather(&[u8::from(is_so)], &mut told)?;
        Ok((0..told.len()).filter(|&rank| told[rank] != 0).collect())
    }

    /// Memory for the state on ranks that have none; no rank begins if one has no memory.
    fn make_room(&self, state: Option<&[u8]>, bytes: u64) -> Result<Option<Vec<u8>>, Error> {
        let mut room = Vec::new();
        let made = match state {
            Some(_) => Ok(()),
            None => room.try_reserve_exact(usize::try_from(bytes).unwrap_or(usize::MAX)),
        };
        let lacking = self.who(made.is_err())?;
        if !lacking.is_empty() {
            let text = format!("ranks {lacking:?} have no memory for a state of {bytes} bytes");
            return Err(Error::new(ErrorKind::Memory, text).on(self.rank()).caused_by(lacking));
        }
        Ok(state.is_none().then(|| {
            room.resize(bytes as usize, 0);
            room
        }))
    }

    fn send_state(
        &self,
        state: Option<&[u8]>,
        mut received: Option<Vec<u8>>,
        sender: Rank,
    ) -> Result<Option<Vec<u8>>, Error> {
        let bytes = state.map_or_else(|| received.as_ref().map_or(0, Vec::len), <[u8]>::len);
        let mut piece = vec![0_u8; PIECE_BYTES.min(bytes)];
        for start in (0..bytes).step_by(PIECE_BYTES) {
            let end = bytes.min(start + PIECE_BYTES);
            let place = match &mut received {
                Some(received) => &mut received[start..end],
                None => &mut piece[..end - start],
            };
            if self.rank() == sender
                && let Some(state) = state
            {
                place.copy_from_slice(&state[start..end]);
            }
            self.broadcast(place, sender)?;
        }
        Ok(received)
    }
}
