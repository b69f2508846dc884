//! The description of one call, as it travels with its messages.

use std::fmt;

use crate::{Dtype, ReduceOp};

/// The collective operations unisum knows, and the messages between two ranks.
///
/// The discriminant is the wire code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Collective {
    /// Every rank gets the reduction of all ranks' inputs.
    AllReduce = 1,
    /// The root gets the reduction of all ranks' inputs.
    Reduce = 2,
    /// Every rank gets the root's input.
    Broadcast = 3,
    /// Every rank gets all ranks' blocks.
    AllGather = 4,
    /// Every rank gets its own block of the reduction of all ranks' inputs.
    ReduceScatter = 5,
    /// Every rank gets from each rank the block that this has for it.
    AllToAll = 6,
    /// The root gets all ranks' blocks.
    Gather = 7,
    /// Every rank gets its block of the root's input.
    Scatter = 8,
    /// Nobody goes on before everybody has come.
    Barrier = 9,
    /// No collective: what two ranks send each other apart from all others.
    Message = 10,
}

impl Collective {
    /// Every collective, in the order of the wire codes; messages are none.
    pub const ALL: [Self; 9] = [
        Self::AllReduce,
        Self::Reduce,
        Self::Broadcast,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllToAll,
        Self::Gather,
        Self::Scatter,
        Self::Barrier,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().chain([Self::Message]).find(|known| *known as u8 == code)
    }

    /// Whether one rank has a part of its own.
    pub const fn has_root(self) -> bool {
        matches!(self, Self::Reduce | Self::Broadcast | Self::Gather | Self::Scatter)
    }

    /// Whether elements are reduced.
    pub const fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::Reduce | Self::ReduceScatter)
    }

    /// The name in calls and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::Reduce => "reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::Barrier => "barrier",
            Self::Message => "message",
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a rank called: each message of a collective carries it, so that two ranks whose calls
/// differ find out from the first bytes they exchange, at no extra round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// The communicator: 0 is the whole job's. No other of a rank ever had its number.
    pub communicator: u32,
    /// The how-manieth collective of the communicator this is, counted from 0, with those that only
    /// try out algorithms, up to [`NUMBER_MAX`](Self::NUMBER_MAX): at a million calls a second
    /// that takes nine years.
    pub number: u64,
    /// Which collective.
    pub collective: Collective,
    /// Element type.
    pub dtype: Dtype,
    /// Reduction; of no meaning where nothing is reduced.
    pub op: ReduceOp,
    /// Whether infinities and NaNs among the results are told.
    pub watched: bool,
    /// Elements, the same on every rank: of one block, or of all where the blocks differ. In an
    /// all-to-all whose ranks know lengths of their own only, what the sender of a message has for
    /// its receiver (see [`Link::pair_counts`](crate::Link::pair_counts)).
    pub count: u64,
    /// The root, or 0.
    pub root: u16,
    /// A fingerprint of all that was ever asked of the communicator, this call included with what
    /// no other field tells (the blocks' counts, a factor): ranks that once called different things
    /// find out from the next bytes they exchange, whatever these are about.
    pub history: u64,
    /// The number of the algorithm that executes it: ranks that differ in it would otherwise
    /// exchange bytes of different meaning.
    pub algorithm: u8,
}

/// Bits of a number on the wire.
const NUMBER_BITS: u32 = 48;
/// Bits of the codes of collectives, element types and operations.
const COLLECTIVE_BITS: u32 = 5;
const DTYPE_BITS: u32 = 6;
const OP_BITS: u32 = 4;

impl Call {
    /// Bytes of an encoded call.
    pub const ENCODED: usize = 32;
    /// In place of an algorithm: what ranks tell each other between the runs of several.
    pub const BETWEEN_TRIALS: u8 = u8::MAX;
    /// In place of a count, where each two ranks have their own.
    pub const COUNT_BY_PAIR: u64 = u64::MAX;
    /// The largest number.
    pub const NUMBER_MAX: u64 = (1 << NUMBER_BITS) - 1;
    /// Which of its words the count is.
    pub const COUNT_WORD: usize = 1;

    /// Algorithm 0's sum of `count` elements on all ranks of the job, with nothing before it.
    pub const fn all_reduce(number: u64, dtype: Dtype, count: u64) -> Self {
        let (collective, op) = (Collective::AllReduce, ReduceOp::Sum);
        Self {
            communicator: 0,
            number,
            collective,
            dtype,
            op,
            watched: false,
            count,
            root: 0,
            history: 0,
            algorithm: 0,
        }
    }

    /// The call as words, for who tells it word by word. The last byte is spare, and 0.
    pub const fn words(&self) -> [u64; Self::ENCODED / 8] {
        let number = self.number & Self::NUMBER_MAX;
        let how = self.op as u64 | (self.watched as u64) << OP_BITS;
        let what = self.collective as u64 | (self.dtype as u64) << COLLECTIVE_BITS;
        let codes = what | how << (COLLECTIVE_BITS + DTYPE_BITS);
        let who = self.communicator as u64 | (self.algorithm as u64) << 32;
        let place = number | (self.root as u64) << NUMBER_BITS;
        [self.history, self.count, place, who | codes << 40]
    }

    /// The call that these words mean; `None` if a code is unknown or the spare byte is not 0.
    pub fn from_words(words: &[u64; Self::ENCODED / 8]) -> Option<Self> {
        let [history, count, place, who] = *words;
        let codes = u32::try_from(who >> 40).ok().filter(|codes| *codes < 1 << 16)?;
        let code = |from: u32, bits: u32| (codes >> from & ((1 << bits) - 1)) as u8;
        let how_from = COLLECTIVE_BITS + DTYPE_BITS;
        Some(Self {
            communicator: who as u32,
            number: place & Self::NUMBER_MAX,
            collective: Collective::from_code(code(0, COLLECTIVE_BITS))?,
            dtype: Dtype::try_from(code(COLLECTIVE_BITS, DTYPE_BITS)).ok()?,
            op: ReduceOp::try_from(code(how_from, OP_BITS)).ok()?,
            watched: code(how_from + OP_BITS, 1) == 1,
            count,
            root: (place >> NUMBER_BITS) as u16,
            history,
            algorithm: (who >> 32) as u8,
        })
    }

    /// The wire form: little endian, fixed size.
    pub fn encode(&self) -> [u8; Self::ENCODED] {
        let mut bytes = [0; Self::ENCODED];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads the wire form; `None` if a code is unknown or the spare byte is not 0.
    pub fn decode(bytes: &[u8; Self::ENCODED]) -> Option<Self> {
        let mut words = [0; Self::ENCODED / 8];
        for (chunk, word) in bytes.chunks_exact(8).zip(&mut words) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        Self::from_words(&words)
    }

    /// For people, with the algorithm's name.
    pub fn by<'a>(&'a self, algorithm: &'a dyn fmt::Display) -> impl fmt::Display + 'a {
        Told { call: self, algorithm }
    }
}

struct Told<'a> {
    call: &'a Call,
    algorithm: &'a dyn fmt::Display,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let algorithm = format_args!("algorithm {}", self.algorithm);
        Told { call: self, algorithm: &algorithm }.fmt(f)
    }
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { call, algorithm } = self;
        let Call { communicator, number, collective, dtype, op, watched, count, root, .. } = call;
        write!(f, "{collective} #{number} ")?;
        if *communicator != 0 {
            write!(f, "of group {communicator} ")?;
        }
        match *count {
            Call::COUNT_BY_PAIR => write!(f, "({dtype} by pair")?,
            count => write!(f, "({dtype} x {count}")?,
        }
        if collective.reduces() {
            write!(f, ", {op}{}", if *watched { " watched" } else { "" })?;
        }
        if collective.has_root() {
            write!(f, ", root {root}")?;
        }
        write!(f, ", {algorithm})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call {
            number: 7,
            collective: Collective::Reduce,
            dtype: Dtype::Bf16,
            op: ReduceOp::Max,
            count: 1 << 40,
            root: 3,
            history: 0xfeed,
            algorithm: 0xde,
            communicator: 5,
            watched: false,
        }
    }

    #[test]
    fn calls_survive_the_wire() {
        let largest = Call {
            number: Call::NUMBER_MAX,
            count: u64::MAX,
            root: u16::MAX,
            history: u64::MAX,
            algorithm: u8::MAX,
            communicator: u32::MAX,
            watched: true,
            ..call()
        };
        for call in [call(), largest] {
            assert_eq!(Call::decode(&call.encode()), Some(call));
            assert_eq!(Call::from_words(&call.words()), Some(call));
            assert_eq!(call.encode()[31], 0, "the spare byte");
        }
        let codes = 2 | (Dtype::Bf16 as u16) << 5 | (ReduceOp::Max as u16) << 11;
        let [low, high] = codes.to_le_bytes();
        let wire = [
            [0xed, 0xfe, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [7, 0, 0, 0, 0, 0, 3, 0],
            [5, 0, 0, 0, 0xde, low, high, 0],
        ];
        assert_eq!(call().encode(), wire.concat()[..]);
    }

    #[test]
    fn every_code_fits_its_bits() {
        for dtype in Dtype::ALL {
            for (collective, op) in Collective::ALL.into_iter().zip(ReduceOp::ALL) {
                let call = Call { collective, dtype, op, ..call() };
                assert_eq!(Call::decode(&call.encode()), Some(call));
            }
        }
    }

    #[test]
    fn unknown_codes_are_refused() {
        for at in 29..32 {
            let mut bytes = call().encode();
            bytes[at] = 0xff;
            assert_eq!(Call::decode(&bytes), None, "byte {at}");
        }
    }
}
