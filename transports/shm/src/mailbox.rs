//! The ring of message descriptors from one rank to another.
//!
//! An entry's sequence number is stored last (`Release`) and read first (`Acquire`): a reader that
//! sees it sees the entry, and what was staged for it. The count of consumed entries travels back
//! the same way, so a writer that sees it may use the entry, the staging buffer, or the message's
//! memory again. Each word has one writer.

use std::sync::atomic::Ordering;

use unisum_link::Call;

use crate::layout::{Layout, RING, STAGE_BYTES, entry};
use crate::mapping::Mapping;

/// A call as words, as entries and cards hold it.
pub(crate) type CallWords = [u64; Call::ENCODED / 8];

/// Where a message's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the sender's heap, at this offset: mapped by the reader.
    Heap(u64),
    /// In the sender's private memory, at this address: the reader copies them from there.
    Process(u64),
    /// In the staging buffer of the entry; longer messages are a row of such entries.
    Staged,
}

impl Place {
    /// Two words for the mapping.
    pub(crate) const fn encode(self) -> [u64; 2] {
        match self {
            Self::Heap(offset) => [1, offset],
            Self::Process(address) => [2, address],
            Self::Staged => [3, 0],
        }
    }

    /// Reads the words; `None` if they mean nothing.
    pub(crate) const fn decode(words: [u64; 2]) -> Option<Self> {
        match words {
            [1, offset] => Some(Self::Heap(offset)),
            [2, address] => Some(Self::Process(address)),
            [3, 0] => Some(Self::Staged),
            _ => None,
        }
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    /// What the sender called.
    pub(crate) call: CallWords,
    /// Length of the whole message.
    pub(crate) bytes: u64,
    /// Whether the sender has marked the collective.
    pub(crate) marked: bool,
    /// Where it is; `None` for words that mean nothing.
    pub(crate) place: Option<Place>,
}

/// Set in a message's length if the collective is marked.
const MARK: u64 = 1 << 63;

/// The mailbox of an ordered pair: offsets only, both ends use it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mailbox {
    start: u64,
    staging: u64,
}

impl Mailbox {
    pub(crate) fn new(layout: &Layout, from: u64, to: u64) -> Self {
        Self { start: layout.mailbox(from, to), staging: layout.staging(from, to).0 }
    }

    /// Writer: fills entry `number` (counted from 0) and publishes it. The caller made sure that
    /// the entry is free.
    pub(crate) fn publish(&self, mapping: &Mapping, number: u64, message: &Message) {
        let at = entry(self.start, number);
        let Message { call, bytes, marked, place } = message;
        let [kind, location] = place.map_or([0; 2], Place::encode);
        let bytes = bytes | if *marked { MARK } else { 0 };
        let words = [bytes, kind, location, call[0], call[1], call[2], call[3]];
        for (index, word) in (1..).zip(words) {
            mapping.wide(at + 8 * index).store(word, Ordering::Relaxed);
        }
        // Release: pairs with the Acquire in `read`.
        mapping.wide(at).store(number + 1, Ordering::Release);
    }

    /// Reader: entry `number`, if it is published.
    pub(crate) fn read(&self, mapping: &Mapping, number: u64) -> Option<Message> {
        let at = entry(self.start, number);
        // Acquire: pairs with the Release in `publish`.
        if mapping.wide(at).load(Ordering::Acquire) != number + 1 {
            return None;
        }
        // Once each: what is checked is what is used, whatever the writer does meanwhile.
        let word = |index: u64| mapping.wide(at + 8 * index).load(Ordering::Relaxed);
        let bytes = word(1);
        Some(Message {
            bytes: bytes & !MARK,
            marked: bytes & MARK != 0,
            place: Place::decode([word(2), word(3)]),
            call: [word(4), word(5), word(6), word(7)],
        })
    }

    /// The staging buffer of entry `number`.
    pub(crate) fn stage(&self, mapping: &Mapping, number: u64) -> *mut u8 {
        let bytes = STAGE_BYTES as u64;
        mapping.pointer(self.staging + number % RING * bytes, bytes)
    }

    /// Reader: says that entries before `number` are consumed; whether the writer waits for room.
    pub(crate) fn consume(&self, mapping: &Mapping, number: u64) -> bool {
        // SeqCst: Dekker with `stall`, whose writer stores `stalled` and then loads the count.
        // Also a Release that pairs with the Acquire in `consumed`: our reads are over.
        mapping.wide(self.start).store(number, Ordering::SeqCst);
        mapping.word(self.start + 8).load(Ordering::SeqCst) != 0
    }

    /// Writer: how many entries are consumed.
    pub(crate) fn consumed(&self, mapping: &Mapping) -> u64 {
        // Acquire: pairs with the store in `consume`.
        mapping.wide(self.start).load(Ordering::Acquire)
    }

    /// Writer: says whether it waits for room; how many entries are consumed.
    pub(crate) fn stall(&self, mapping: &Mapping, stalled: bool) -> u64 {
        // SeqCst, both: Dekker with `consume`.
        mapping.word(self.start + 8).store(u32::from(stalled), Ordering::SeqCst);
        mapping.wide(self.start).load(Ordering::SeqCst)
    }
}
