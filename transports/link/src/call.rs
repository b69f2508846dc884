//! The description of one collective call, as it travels with its messages.

use std::fmt;

use crate::{Dtype, ReduceOp};

/// The collective operations unisum knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Collective {
    /// Every rank gets the reduction of all ranks' buffers.
    AllReduce = 1,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllReduce => f.write_str("all_reduce"),
        }
    }
}

/// What a rank called: each message of a collective carries it, so that two ranks whose calls
/// differ find out from the first bytes they exchange, at no extra round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// The how-manieth collective of the communicator this is, counted from 0.
    pub number: u64,
    /// Which collective.
    pub collective: Collective,
    /// Element type.
    pub dtype: Dtype,
    /// Reduction.
    pub op: ReduceOp,
    /// Elements, the same on every rank.
    pub count: u64,
    /// The number of the algorithm that executes it: ranks that differ in it would otherwise
    /// exchange bytes of different meaning.
    pub algorithm: u32,
}

impl Call {
    /// Bytes of an encoded call.
    pub const ENCODED: usize = 24;

    /// The wire form: little endian, fixed size.
    pub fn encode(&self) -> [u8; Self::ENCODED] {
        let mut bytes = [0; Self::ENCODED];
        bytes[0..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.count.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.algorithm.to_le_bytes());
        bytes[20] = self.collective as u8;
        bytes[21] = self.dtype as u8;
        bytes[22] = self.op as u8;
        bytes
    }

    /// Reads the wire form; `None` if a code is unknown or the spare byte is not 0.
    pub fn decode(bytes: &[u8; Self::ENCODED]) -> Option<Self> {
        let [n @ .., collective, dtype, op, 0] = bytes else {
            return None;
        };
        let word = |at: usize| n[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        if *collective != Collective::AllReduce as u8 {
            return None;
        }
        Some(Self {
            number: word(0)?,
            count: word(8)?,
            algorithm: u32::from_le_bytes(n[16..20].try_into().ok()?),
            collective: Collective::AllReduce,
            dtype: Dtype::try_from(*dtype).ok()?,
            op: ReduceOp::try_from(*op).ok()?,
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} #{} ({} x {}, {}, algorithm {})",
            self.collective, self.number, self.dtype, self.count, self.op, self.algorithm
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call {
            number: 7,
            collective: Collective::AllReduce,
            dtype: Dtype::Bf16,
            op: ReduceOp::Max,
            count: 1 << 40,
            algorithm: 0xdead_beef,
        }
    }

    #[test]
    fn calls_survive_the_wire() {
        assert_eq!(Call::decode(&call().encode()), Some(call()));
    }

    #[test]
    fn unknown_codes_are_refused() {
        for at in 20..24 {
            let mut bytes = call().encode();
            bytes[at] = 0xee;
            assert_eq!(Call::decode(&bytes), None, "byte {at}");
        }
    }
}
