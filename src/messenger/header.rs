//! What precedes, announces and answers a message (sans-IO).
//!
//! ```text
//! offset  0  kind      u8
//!         1  dtype     u8   wire code of the element type
//!         2  spare     [6]  0
//!         8  tag       u64
//!        16  bytes     u64  length of the message
//!        24  id        u64  the sender's number of an announced message
//!        32  consumed  u64  how much buffer space, of all it ever took, the sender of this header
//!                           has free again
//! ```
//! All integers are little endian.

use bytes::{Buf, BufMut};
use unisum_kernels::Dtype;

/// Bytes of an encoded header.
pub(super) const HEADER_BYTES: usize = 40;

/// What a header is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The message follows, whether or not somebody waits for it.
    Eager = 1,
    /// There is a message, which waits to be asked for.
    Announce = 2,
    /// The announced message `id` is asked for.
    Ask = 3,
    /// The message `id`, which was asked for, follows.
    Answer = 4,
}

/// What both ends of a message have to agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Envelope {
    pub(super) tag: u64,
    pub(super) dtype: Dtype,
    pub(super) bytes: u64,
}

/// A header, as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) envelope: Envelope,
    pub(super) id: u64,
    pub(super) consumed: u64,
}

impl Header {
    /// The wire form.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut to = Vec::with_capacity(HEADER_BYTES);
        to.put_u8(self.kind as u8);
        to.put_u8(self.envelope.dtype as u8);
        to.put_bytes(0, 6);
        for word in [self.envelope.tag, self.envelope.bytes, self.id, self.consumed] {
            to.put_u64_le(word);
        }
        to
    }

    /// Reads the wire form; `None` if these are not [`HEADER_BYTES`] bytes, a code is unknown or a
    /// spare byte is not 0.
    pub(super) fn decode(mut from: &[u8]) -> Option<Self> {
        if from.len() != HEADER_BYTES {
            return None;
        }
        let kinds = [Kind::Eager, Kind::Announce, Kind::Ask, Kind::Answer];
        let kind = from.get_u8();
        let kind = kinds.into_iter().find(|&known| known as u8 == kind)?;
        let dtype = Dtype::try_from(from.get_u8()).ok()?;
        if from.get_uint_le(6) != 0 {
            return None;
        }
        let [tag, bytes, id, consumed] = std::array::from_fn(|_| from.get_u64_le());
        Some(Self { kind, envelope: Envelope { tag, dtype, bytes }, id, consumed })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_survive_the_wire(tag: u64, bytes: u64, id: u64, consumed: u64) {
            let envelope = Envelope { tag, dtype: Dtype::Bf16, bytes };
            let header = Header { kind: Kind::Ask, envelope, id, consumed };
            prop_assert_eq!(Header::decode(&header.encode()), Some(header));
        }

        #[test]
        fn what_is_no_header_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..48)) {
            if let Some(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
