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
    /// The communicator: 0 is the whole job's.
    pub communicator: u16,
    /// The how-manieth collective of the communicator this is, counted from 0, with those that only
    /// try out algorithms.
    pub number: u64,
    /// Which collective.
    pub collective: Collective,
    /// Element type.
    pub dtype: Dtype,
    /// Reduction; of no meaning where nothing is reduced.
    pub op: ReduceOp,
    /// Elements, the same on every rank: of one block, or of all where the blocks differ.
    pub count: u64,
    /// The root, or 0.
    pub root: u32,
    /// A fingerprint of what else has to be the same on all ranks (the blocks' counts, a factor),
    /// 0 where there is nothing.
    pub detail: u32,
    /// The number of the algorithm that executes it: ranks that differ in it would otherwise
    /// exchange bytes of different meaning.
    pub algorithm: u16,
}

impl Call {
    /// Bytes of an encoded call.
    pub const ENCODED: usize = 32;

    /// Algorithm 0's sum of `count` elements on all ranks of the job, with nothing else to agree
    /// on.
    pub const fn all_reduce(number: u64, dtype: Dtype, count: u64) -> Self {
        let (collective, op) = (Collective::AllReduce, ReduceOp::Sum);
        let (communicator, root, detail, algorithm) = (0, 0, 0, 0);
        Self { communicator, number, collective, dtype, op, count, root, detail, algorithm }
    }

    /// The call as words, for who tells it word by word.
    pub const fn words(&self) -> [u64; Self::ENCODED / 8] {
        let codes = self.collective as u64 | (self.dtype as u64) << 8 | (self.op as u64) << 16;
        let who = self.algorithm as u64 | (self.communicator as u64) << 16;
        [self.number, self.count, who | (self.root as u64) << 32, self.detail as u64 | codes << 32]
    }

    /// The call that these words mean; `None` if a code is unknown or the spare byte is not 0.
    pub fn from_words(words: &[u64; Self::ENCODED / 8]) -> Option<Self> {
        let mut bytes = [0; Self::ENCODED];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        Self::decode(&bytes)
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
        let [n @ .., collective, dtype, op, 0] = bytes else {
            return None;
        };
        let wide = |at: usize| n[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let half = |at: usize| n[at..at + 2].try_into().map(u16::from_le_bytes).ok();
        let word = |at: usize| n[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        Some(Self {
            number: wide(0)?,
            count: wide(8)?,
            algorithm: half(16)?,
            communicator: half(18)?,
            root: word(20)?,
            detail: word(24)?,
            collective: Collective::from_code(*collective)?,
            dtype: Dtype::try_from(*dtype).ok()?,
            op: ReduceOp::try_from(*op).ok()?,
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { communicator, number, collective, dtype, op, count, root, detail, algorithm } =
            self;
        write!(f, "{collective} #{number} ")?;
        if *communicator != 0 {
            write!(f, "of group {communicator} ")?;
        }
        write!(f, "({dtype} x {count}")?;
        if collective.reduces() {
            write!(f, ", {op}")?;
        }
        if collective.has_root() {
            write!(f, ", root {root}")?;
        }
        if *detail != 0 {
            write!(f, ", blocks or factor {detail:08x}")?;
        }
        write!(f, ", algorithm {algorithm})")
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
            detail: 0xfeed,
            algorithm: 0xdead,
            communicator: 5,
        }
    }

    #[test]
    fn calls_survive_the_wire() {
        assert_eq!(Call::decode(&call().encode()), Some(call()));
        assert_eq!(Call::from_words(&call().words()), Some(call()));
        let wire = [
            [7, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [0xad, 0xde, 5, 0, 3, 0, 0, 0],
            [0xed, 0xfe, 0, 0, 2, Dtype::Bf16 as u8, ReduceOp::Max as u8, 0],
        ];
        assert_eq!(call().encode(), wire.concat()[..]);
    }

    #[test]
    fn unknown_codes_are_refused() {
        for at in 28..32 {
            let mut bytes = call().encode();
            bytes[at] = 0xee;
            assert_eq!(Call::decode(&bytes), None, "byte {at}");
        }
    }
}
