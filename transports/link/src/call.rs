//! The description of one call, as it travels with its messages.

use std::fmt;

use unisum_kernels::{Dtype, ReduceOp};

/// The collective operations, and messages between two ranks.
///
/// The discriminant is the wire code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum CollectiveKind {
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
    /// Every rank gets the block that each rank has for it.
    AllToAll = 6,
    /// The root gets all ranks' blocks.
    Gather = 7,
    /// Every rank gets its block of the root's input.
    Scatter = 8,
    /// No rank continues before every rank has arrived.
    Barrier = 9,
    /// Not a collective: a message from one rank to another.
    Message = 10,
}

impl CollectiveKind {
    /// Every collective, in the order of the wire codes; messages are not included.
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

    /// Whether one rank, the root, has a role of its own.
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

impl fmt::Display for CollectiveKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a rank called. Each message of a collective carries it, so that two ranks whose calls
/// differ detect it in the first bytes they exchange, without an extra round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// The communicator: 0 is that of the whole job. A rank never uses a number twice.
    pub communicator: u32,
    /// The index of the collective in its communicator, counted from 0 and including those that
    /// only try algorithms, up to [`NUMBER_MAX`](Self::NUMBER_MAX), which lasts nine years at a
    /// million calls a second.
    pub number: u64,
    /// Which collective.
    pub collective: CollectiveKind,
    /// Element type.
    pub dtype: Dtype,
    /// The reduction; meaningless if nothing is reduced.
    pub op: ReduceOp,
    /// Whether infinities and NaNs in the results are reported.
    pub watched: bool,
    /// The number of elements, the same on every rank: of one block, or of all blocks where they
    /// differ. Where ranks know only their own lengths, each pair of ranks exchanges theirs: see
    /// [`PeerCounts`].
    pub count: u64,
    /// The root, or 0.
    pub root: u16,
    /// A fingerprint of everything ever asked of the communicator, including what no other field of
    /// this call contains (the blocks' counts, a factor): ranks that once called different things
    /// detect it in the next bytes they exchange, whatever these are about.
    pub history: u64,
    /// The number of the algorithm that executes the call: ranks that differ in it would exchange
    /// bytes of different meaning.
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
    /// Instead of an algorithm: what ranks exchange between the runs of several algorithms.
    pub const BETWEEN_TRIALS: u8 = u8::MAX;
    /// Instead of an algorithm: the switch between devices adds.
    pub const IN_SWITCH: u8 = u8::MAX - 1;
    /// Instead of a count, where each pair of ranks has its own.
    pub const COUNT_BY_PAIR: u64 = u64::MAX;
    /// The largest number.
    pub const NUMBER_MAX: u64 = (1 << NUMBER_BITS) - 1;

    /// A sum of `count` elements over all ranks of the job by algorithm 0, without a history.
    pub const fn all_reduce(number: u64, dtype: Dtype, count: u64) -> Self {
        let (collective, op) = (CollectiveKind::AllReduce, ReduceOp::Sum);
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

    /// The call as words, for transports that send it word by word. The last byte is unused, and 0.
    pub const fn words(&self) -> [u64; Self::ENCODED / 8] {
        let number = self.number & Self::NUMBER_MAX;
        let how = self.op as u64 | (self.watched as u64) << OP_BITS;
        let what = self.collective as u64 | (self.dtype as u64) << COLLECTIVE_BITS;
        let codes = what | how << (COLLECTIVE_BITS + DTYPE_BITS);
        let who = self.communicator as u64 | (self.algorithm as u64) << 32;
        let place = number | (self.root as u64) << NUMBER_BITS;
        [self.history, self.count, place, who | codes << 40]
    }

    /// Decodes the words; `None` if a code is unknown or the unused byte is not 0.
    pub fn from_words(words: &[u64; Self::ENCODED / 8]) -> Option<Self> {
        let [history, count, place, who] = *words;
        let codes = u32::try_from(who >> 40).ok().filter(|codes| *codes < 1 << 16)?;
        let code = |from: u32, bits: u32| (codes >> from & ((1 << bits) - 1)) as u8;
        let how_from = COLLECTIVE_BITS + DTYPE_BITS;
        Some(Self {
            communicator: who as u32,
            number: place & Self::NUMBER_MAX,
            collective: CollectiveKind::from_code(code(0, COLLECTIVE_BITS))?,
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

    /// Reads the wire form; `None` if a code is unknown or the unused byte is not 0.
    pub fn decode(bytes: &[u8; Self::ENCODED]) -> Option<Self> {
        let mut words = [0; Self::ENCODED / 8];
        for (chunk, word) in bytes.chunks_exact(8).zip(&mut words) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        Self::from_words(&words)
    }

    /// Formats the call for people, with the algorithm's name.
    pub fn by<'a>(&'a self, algorithm: &'a dyn fmt::Display) -> impl fmt::Display + 'a {
        Told { call: self, algorithm }
    }
}

/// How many elements a rank has for a peer and expects from it, in a collective whose ranks know
/// only their own lengths.
///
/// Everything sent between the two carries both counts, so that each of them detects a difference
/// in either one with the first message it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerCounts {
    /// What this rank has for the peer.
    pub sends: u64,
    /// What it expects from the peer.
    pub receives: u64,
}

/// More elements than fit any memory.
const COUNT_LIMIT: u64 = 1 << 48;

impl PeerCounts {
    /// `call` as this rank sends it to the peer: the count is what this rank has for the peer, and
    /// the history includes what it expects from the peer.
    pub const fn told(self, call: Call) -> Call {
        Call { count: self.sends, history: call.history ^ self.receives, ..call }
    }

    /// `call` as the peer has to send it.
    pub const fn heard(self, call: Call) -> Call {
        Self { sends: self.receives, receives: self.sends }.told(call)
    }

    /// The two calls of a mismatch as errors describe them, where both ranks called `call`: each
    /// with its count in the direction in which the two differ. Calls without such counts, and
    /// those with another history, stay as they are.
    pub(crate) const fn in_words(call: &Call, ours: Call, theirs: Call) -> (Call, Call) {
        let expects = [ours.history ^ call.history, theirs.history ^ call.history];
        if expects[0] >= COUNT_LIMIT || expects[1] >= COUNT_LIMIT {
            return (ours, theirs);
        }
        let are_alike = ours.count == theirs.count;
        let ours = Call { history: call.history, ..ours };
        let theirs = Call { history: call.history, ..theirs };
        match are_alike && expects[0] != expects[1] {
            true => (Call { count: expects[0], ..ours }, Call { count: expects[1], ..theirs }),
            false => (ours, theirs),
        }
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
            collective: CollectiveKind::Reduce,
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

    /// Neither of two ranks that differ in what one has for the other hears what it has to, and
    /// both are told the two counts, whichever of them finds out.
    #[test]
    fn counts_of_a_pair_are_compared_by_both() {
        let base = call();
        let pair = |sends, receives| PeerCounts { sends, receives };
        let counts = |(ours, theirs): (Call, Call)| {
            assert_eq!((ours.history, theirs.history), (base.history, base.history));
            (ours.count, theirs.count)
        };
        assert_eq!(pair(5, 9).told(base), pair(9, 5).heard(base));
        for (one, other, expected) in [
            (pair(5, 9), pair(9, 7), (5, 7)),
            (pair(5, 9), pair(8, 5), (9, 8)),
            (pair(0, 9), pair(9, 1 << 40), (0, 1 << 40)),
        ] {
            for (ours, theirs, expected) in
                [(one, other, expected), (other, one, (expected.1, expected.0))]
            {
                let (due, came) = (ours.heard(base), theirs.told(base));
                assert_ne!(due, came);
                assert_eq!(counts(PeerCounts::in_words(&base, due, came)), expected);
                // Who asks for what it is due to be sent compares what it has to tell.
                let (due, came) = (ours.told(base), theirs.heard(base));
                assert_ne!(due, came);
                assert_eq!(counts(PeerCounts::in_words(&base, due, came)), expected);
            }
        }
        let earlier = pair(9, 5).told(Call { history: u64::MAX / 3, ..base });
        let due = pair(5, 9).heard(base);
        assert_eq!(PeerCounts::in_words(&base, due, earlier), (due, earlier));
    }

    #[test]
    fn every_code_fits_its_bits() {
        for dtype in Dtype::ALL {
            for (collective, op) in CollectiveKind::ALL.into_iter().zip(ReduceOp::ALL) {
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
