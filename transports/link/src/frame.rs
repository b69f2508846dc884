//! The header before each message of a byte-stream transport (sans-IO).
//!
//! ```text
//! offset  0  magic    u32   "usm1"
//!         4  flags    u32   1 if the sender has marked the collective (see `Link::mark`), else 0
//!         8  bytes    u64   length of the payload that follows
//!        16  call     [32]  what the sender called (see `Call`)
//! ```
//! All integers are little endian.

use bytes::{Buf, BufMut};

use crate::Call;

/// Bytes of an encoded header.
pub const HEADER_BYTES: usize = 16 + Call::ENCODED;

const MAGIC: u32 = u32::from_le_bytes(*b"usm1");

/// What precedes a message's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whether the sender has marked the collective.
    pub marked: bool,
    /// Length of the payload.
    pub bytes: u64,
    /// The collective it belongs to.
    pub call: Call,
}

/// Why bytes are not a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The first bytes are not unisum's.
    #[error("a message began with {0:#010x}, not with unisum's magic number")]
    Magic(u32),
    /// An unknown flag is set: a newer version of the protocol.
    #[error("a message header has unknown flags {0:#x}: do all ranks run the same version?")]
    Flags(u32),
    /// A code in the call is unknown.
    #[error("a message describes a call this version does not know")]
    Call,
}

impl Header {
    /// The wire form.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut encoded = [0; HEADER_BYTES];
        let mut to = &mut encoded[..];
        to.put_u32_le(MAGIC);
        to.put_u32_le(u32::from(self.marked));
        to.put_u64_le(self.bytes);
        to.put_slice(&self.call.encode());
        encoded
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// If the bytes are not a header of this version.
    pub fn decode(encoded: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let mut from = &encoded[..];
        let magic = from.get_u32_le();
        if magic != MAGIC {
            return Err(HeaderError::Magic(magic));
        }
        let flags = from.get_u32_le();
        if flags > 1 {
            return Err(HeaderError::Flags(flags));
        }
        let bytes = from.get_u64_le();
        let mut call = [0; Call::ENCODED];
        from.copy_to_slice(&mut call);
        let call = Call::decode(&call).ok_or(HeaderError::Call)?;
        Ok(Self { marked: flags == 1, bytes, call })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::CollectiveKind;
    use unisum_kernels::{Dtype, ReduceOp};

    proptest! {
        #[test]
        fn headers_survive_the_wire(
            marked: bool, bytes: u64, number: u32, count: u64, algorithm: u8,
        ) {
            let (collective, dtype, op) = (CollectiveKind::AllReduce, Dtype::F32, ReduceOp::Sum);
            let (communicator, root, history) = (2, 3, 4);
            let call = Call {
                communicator, number: number.into(), collective, dtype, op, watched: marked, count,
                root, history, algorithm,
            };
            let header = Header { marked, bytes, call };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn an_http_request_is_not_a_header() {
        let mut bytes = [b' '; HEADER_BYTES];
        bytes[..16].copy_from_slice(b"GET / HTTP/1.1\r\n");
        let magic = u32::from_le_bytes(*b"GET ");
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Magic(magic)));
    }
}
