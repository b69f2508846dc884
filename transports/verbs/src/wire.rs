//! What ranks tell each other over a connection (sans-IO): immediate words, and announcements of
//! where a large message may be written.
//!
//! Every message is a write with an immediate word into memory that the receiver set aside:
//!
//! ```text
//! bits 31..30  kind    0 small, 1 ready, 2 data, 3 credit
//!      29..24  number  ready: how many announcements; data: the announcement's place;
//!                      credit: 1 with the last word of who leaves
//!      23      mark    data: whether the sender has marked the collective (see `Link::mark`)
//!      22..0   credit  small messages that the sender of this word has taken (modulo 2^23)
//! ```
//! A small message carries its call, the mark in the call's spare byte, and its bytes; it needs a
//! free cell. `ready` says that
//! announcements were written: where the next large messages go, in their order. `data` says that
//! a part of such a message is in its place.

use bytes::{Buf, BufMut};
use unisum_link::Call;

/// What an immediate word says, beside the credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Small,
    Ready {
        count: u8,
    },
    Data {
        place: u8,
    },
    Credit,
    /// The sender waits for nothing any more and leaves: what it sent is there.
    Goodbye,
}

/// An immediate word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    pub(crate) kind: Kind,
    /// Whether the sender has marked the collective; of data only.
    pub(crate) marked: bool,
    /// Modulo [`CREDITS`].
    pub(crate) credit: u32,
}

/// Credits are counted modulo this.
pub(crate) const CREDITS: u32 = 1 << 23;
/// The mark in an immediate word.
const MARK: u32 = 1 << 23;
/// Largest number in a word, and so the most announcements that are open at once.
pub(crate) const NUMBER_MAX: u8 = 63;
/// Most devices that a link uses.
pub(crate) const RAILS_MAX: usize = 4;

impl Word {
    pub(crate) fn encode(self) -> u32 {
        let (kind, number) = match self.kind {
            Kind::Small => (0, 0),
            Kind::Ready { count } => (1, count),
            Kind::Data { place } => (2, place),
            Kind::Credit => (3, 0),
            Kind::Goodbye => (3, 1),
        };
        debug_assert!(number <= NUMBER_MAX, "numbers have six bits");
        let mark = if self.marked { MARK } else { 0 };
        kind << 30 | u32::from(number & NUMBER_MAX) << 24 | mark | (self.credit % CREDITS)
    }

    pub(crate) fn decode(word: u32) -> Self {
        let number = (word >> 24) as u8 & NUMBER_MAX;
        let kind = match word >> 30 {
            0 => Kind::Small,
            1 => Kind::Ready { count: number },
            2 => Kind::Data { place: number },
            _ if number == 1 => Kind::Goodbye,
            _ => Kind::Credit,
        };
        let marked = word & MARK != 0 && matches!(kind, Kind::Data { .. });
        Self { kind, marked, credit: word % CREDITS }
    }
}

/// An announcement: where the sender's next large message may be written.
///
/// ```text
/// offset  0  address  u64      in the receiver's addresses
///         8  bytes    u64      length of the message
///        16  keys     [u32; 4] one for each device of the receiver
///        32  call     what the receiver called (see `Call`)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) keys: [u32; RAILS_MAX],
    pub(crate) call: Call,
}

/// Bytes of an encoded announcement.
pub(crate) const READY_BYTES: usize = (32 + Call::ENCODED).next_multiple_of(8);

impl Ready {
    pub(crate) fn encode(&self) -> [u8; READY_BYTES] {
        let mut encoded = [0; READY_BYTES];
        let mut to = &mut encoded[..];
        to.put_u64_le(self.address);
        to.put_u64_le(self.bytes);
        self.keys.iter().for_each(|key| to.put_u32_le(*key));
        to.put_slice(&self.call.encode());
        encoded
    }

    /// Reads the wire form; `None` if it describes no call that this version knows.
    pub(crate) fn decode(encoded: &[u8; READY_BYTES]) -> Option<Self> {
        let mut from = &encoded[..];
        let (address, bytes) = (from.get_u64_le(), from.get_u64_le());
        let keys = [(); RAILS_MAX].map(|()| from.get_u32_le());
        let mut call = [0; Call::ENCODED];
        from.copy_to_slice(&mut call);
        let is_padded = from.iter().all(|byte| *byte == 0);
        let call = Call::decode(&call).filter(|_| is_padded)?;
        Some(Self { address, bytes, keys, call })
    }
}

/// How a large message is cut: one part for each connection, or more if they would be larger than
/// a device takes. Both ends reckon alike.
pub(crate) fn parts(bytes: usize, connections: usize) -> usize {
    let spread = if bytes < SPLIT_BYTES { 1 } else { connections };
    spread.max(bytes.div_ceil(PART_BYTES_MAX))
}

/// The range of a part: multiples of a cache line, but for the end.
pub(crate) fn part(bytes: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    let share = bytes.div_ceil(parts).next_multiple_of(64);
    (index * share).min(bytes)..((index + 1) * share).min(bytes)
}

/// Messages from this size on go over all connections of a peer.
pub(crate) const SPLIT_BYTES: usize = 64 << 10;
/// Devices take 2 GiB; some a byte less.
const PART_BYTES_MAX: usize = 1 << 30;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use unisum_kernels::{Dtype, ReduceOp};
    use unisum_link::CollectiveKind;

    use super::*;

    proptest! {
        #[test]
        fn words_survive_the_wire(word: u32) {
            let decoded = Word::decode(word);
            prop_assert_eq!(Word::decode(decoded.encode()), decoded);
        }

        #[test]
        fn parts_cover_the_message_once(bytes in 1_usize..1 << 33, connections in 1_usize..9) {
            let parts = parts(bytes, connections);
            let mut end = 0;
            for index in 0..parts {
                let part = part(bytes, parts, index);
                prop_assert_eq!(part.start, end);
                prop_assert!(!part.is_empty() && part.len() <= PART_BYTES_MAX);
                end = part.end;
            }
            prop_assert_eq!(end, bytes);
        }
    }

    #[test]
    fn announcements_survive_the_wire() {
        let (collective, dtype, op) = (CollectiveKind::AllReduce, Dtype::F32, ReduceOp::Sum);
        let (communicator, root, history) = (1, 2, 3);
        let call = Call {
            communicator,
            number: 7,
            collective,
            dtype,
            op,
            watched: true,
            count: 1 << 20,
            root,
            history,
            algorithm: 3,
        };
        let ready = Ready { address: 1 << 47, bytes: 4096, keys: [1, 2, 3, 4], call };
        assert_eq!(Ready::decode(&ready.encode()), Some(ready));
        assert_eq!(Ready::decode(&[0xff; READY_BYTES]), None);
    }
}
