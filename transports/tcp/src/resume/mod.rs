//! Connections that are dialled anew when they break, and go on at the byte where they broke.
//!
//! With a time for reconnecting, what a socket sends is one stream of bytes, numbered from 0, which
//! outlives its connections. What was sent is kept until the other end has told that it is through;
//! on a new connection each end first says how many bytes it has received, and the other one
//! continues there. On the wire:
//!
//! ```text
//! first     "usmR"  attempt u32  received u64           (16)
//! then      frames: flags and length u32, acknowledged u64 (12), and so many bytes of the stream
//! ```
//! All integers are little endian. Where the connection is encrypted, each of these is a record.
//! `attempt` numbers the connections of a socket: one that is not newer than the last is left. The
//! handshake before it proves the job's token with fresh nonces, as on any connection, so that
//! nobody else can continue a socket, and what was recorded continues none. Keys are new each time.
//!
//! A frame acknowledges what posted receives have taken. No more than [`WINDOW`] bytes are sent
//! beyond that, so that whoever needs an acknowledgement may read what comes before it, even where
//! nothing is posted yet, and hold it in bounded memory. Without that, two ranks could wait for
//! acknowledgements that are behind messages which nobody has asked for.
//!
//! A send is done when the kernel has it, as on other sockets, for what was sent and not
//! acknowledged is kept here. What has to happen while the program is not in a call is the
//! [`Keeper`]'s, a thread of the link: it notices connections that break, or are silent, dials,
//! answers, and sends again. Before the link ends in order it waits until the others have received
//! what was sent to them.

mod flow;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod incoming;
mod keeper;
mod meeting;

use unisum_link::secure::{RECORD_BYTES_MAX, RECORD_OVERHEAD};

pub(crate) use flow::Flow;
pub(crate) use incoming::Arriving;
pub(crate) use keeper::{Handle, Keeper};

/// Most bytes that are sent beyond what is acknowledged.
const WINDOW: usize = 4 << 20;
/// An acknowledgement has a frame of its own when so many bytes have been taken since the last one.
const ACKNOWLEDGED_AFTER: u64 = 256 << 10;
/// Most bytes of the stream in a frame, in clear text and in a record.
const FRAME_BYTES: usize = 256 << 10;
const SEALED_BYTES: usize = RECORD_BYTES_MAX - HEAD_BYTES;
/// Bytes of a frame's head.
const HEAD_BYTES: usize = 12;
/// Bytes of what both ends say first.
const FIRST_BYTES: usize = 16;
const FIRST_SEALED_BYTES: usize = FIRST_BYTES + RECORD_OVERHEAD;
const MAGIC: [u8; 4] = *b"usmR";

/// The sender will send nothing more, and asks how much has come.
const LEAVES: u32 = 1 << 31;
/// The acknowledgement counts what was received, be it taken or not: the answer to [`LEAVES`].
const HOLDS: u32 = 1 << 30;

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    flags: u32,
    bytes: usize,
    acknowledged: u64,
}

impl Head {
    fn encode(self) -> [u8; HEAD_BYTES] {
        let mut encoded = [0; HEAD_BYTES];
        let first = self.flags | u32::try_from(self.bytes).expect("frames are small");
        encoded[..4].copy_from_slice(&first.to_le_bytes());
        encoded[4..].copy_from_slice(&self.acknowledged.to_le_bytes());
        encoded
    }

    fn decode(encoded: &[u8; HEAD_BYTES]) -> Self {
        let (first, last) = encoded.split_first_chunk().expect("a head is longer");
        let first = u32::from_le_bytes(*first);
        let acknowledged = u64::from_le_bytes(last.try_into().expect("the rest is 8 bytes"));
        let flags = first & (LEAVES | HOLDS);
        Self { flags, bytes: (first & !flags) as usize, acknowledged }
    }
}

/// What both ends of a new connection say first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct First {
    attempt: u32,
    received: u64,
}

impl First {
    fn encode(self) -> [u8; FIRST_BYTES] {
        let mut encoded = [0; FIRST_BYTES];
        encoded[..4].copy_from_slice(&MAGIC);
        encoded[4..8].copy_from_slice(&self.attempt.to_le_bytes());
        encoded[8..].copy_from_slice(&self.received.to_le_bytes());
        encoded
    }

    fn decode(encoded: &[u8; FIRST_BYTES]) -> Option<Self> {
        let (magic, rest) = encoded.split_first_chunk::<4>()?;
        let (attempt, received) = rest.split_first_chunk::<4>()?;
        let received = u64::from_le_bytes(received.try_into().ok()?);
        (*magic == MAGIC).then_some(Self { attempt: u32::from_le_bytes(*attempt), received })
    }
}
