//! What a dialer shows before anything else on an encrypted connection: that it knows a session.
//!
//! ```text
//! dialer    "\xfeknk" preamble (16), and at once the TLS ClientHello
//! ```
//! A TLS handshake costs a listener a hundred times what it costs to look at 16 bytes. Who has
//! joined a job knows its session, and those of its groups: they are told inside an encrypted
//! connection. The preamble is a mac of the session under the job's secret, for the session of an
//! elastic job is in its members record, too, which others than its ranks may read. So a listener
//! that is crowded by strangers knows its neighbours at once, and hears the others as it has time.
//!
//! A preamble lets nobody in, and need not be kept from those on the path: they could crowd the
//! listener, no more. A token can't be guessed from it by who does not know the session. What
//! stands for a session that a dialer has yet to learn ([`Hello::of_process`]) can be guessed
//! itself: its preamble is a digest without the secret, which opens no door. A preamble has to fit
//! the hello that is proven later, so that whoever alters it ends the handshake.

use sha2::{Digest, Sha256};

use crate::handshake::{Hello, Secret, mac};

/// Bytes of a preamble and of what it begins with.
pub(super) const PREAMBLE_BYTES: usize = MAGIC.len() + 16;
const LABEL: &str = "unisum knock";
/// No text, and nothing that another protocol begins with.
pub(super) const MAGIC: &[u8; 4] = b"\xfeknk";

/// By what a listener knows those who have joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Preamble(u128);

impl Preamble {
    /// That of a session, for who has the job's secret.
    pub fn of(secret: &Secret, session: &[u8; 16]) -> Self {
        let digest: [u8; 32] = match Hello::is_process(session) {
            true => Sha256::new().chain_update(LABEL).chain_update(session).finalize().into(),
            false => mac(secret, LABEL, &[session]),
        };
        let (half, _) = digest.split_first_chunk().expect("a digest has 32 bytes");
        Self(u128::from_le_bytes(*half))
    }

    /// As it travels.
    #[cfg(feature = "tls")]
    pub(super) fn encode(self) -> [u8; PREAMBLE_BYTES] {
        let mut encoded = [0; PREAMBLE_BYTES];
        encoded[..MAGIC.len()].copy_from_slice(MAGIC);
        encoded[MAGIC.len()..].copy_from_slice(&self.0.to_le_bytes());
        encoded
    }
}

/// The first bytes of a connection, until it is clear what they are.
#[derive(Debug)]
pub(super) struct Head {
    bytes: [u8; PREAMBLE_BYTES],
    filled: usize,
}

/// What a connection begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Beginning {
    /// That needs more bytes.
    Unknown,
    /// Not with a preamble: how many bytes [`Head::taken`] are.
    Other,
    Preamble(Preamble),
}

impl Head {
    pub(super) const fn new() -> Self {
        Self { bytes: [0; PREAMBLE_BYTES], filled: 0 }
    }

    /// Takes bytes from the front of `bytes`, as long as they may be a preamble.
    pub(super) fn take(&mut self, bytes: &mut &[u8]) -> Beginning {
        while self.filled < PREAMBLE_BYTES {
            if self.filled <= MAGIC.len() && !MAGIC.starts_with(&self.bytes[..self.filled]) {
                return Beginning::Other;
            }
            let Some((&first, rest)) = bytes.split_first() else { return Beginning::Unknown };
            self.bytes[self.filled] = first;
            self.filled += 1;
            *bytes = rest;
        }
        let (_, preamble) = self.bytes.split_last_chunk().expect("its last 16 bytes");
        Beginning::Preamble(Preamble(u128::from_le_bytes(*preamble)))
    }

    /// What was taken.
    pub(super) fn taken(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }
}

#[cfg(test)]
#[cfg(feature = "tls")]
mod tests {
    use super::*;

    #[test]
    fn a_preamble_is_told_apart_however_it_comes() {
        let preamble = Preamble::of(&secret(), &[7; 16]);
        let said = [&preamble.encode()[..], b"more"].concat();
        for piece in [1, 3, 19, 20, 24] {
            let (mut head, mut seen) = (Head::new(), Beginning::Unknown);
            let mut rest = Vec::new();
            for mut bytes in said.chunks(piece) {
                if seen == Beginning::Unknown {
                    seen = head.take(&mut bytes);
                }
                rest.extend_from_slice(bytes);
            }
            assert_eq!((seen, &rest[..]), (Beginning::Preamble(preamble), &b"more"[..]), "{piece}");
        }
        assert_ne!(preamble, Preamble::of(&secret(), &[8; 16]));
    }

    /// All processes of a job have to agree on it.
    #[test]
    fn the_bytes_of_a_preamble_are_these() {
        let digest = mac(&secret(), "unisum knock", &[&[7; 16]]);
        let encoded = Preamble::of(&secret(), &[7; 16]).encode();
        assert_eq!(encoded[..], [b"\xfeknk", &digest[..16]].concat());
    }

    /// Sessions can be read in the members record of an elastic job.
    #[test]
    fn a_stranger_who_has_read_the_session_does_not_know_the_preamble() {
        let encoded = Preamble::of(&secret(), &[7; 16]).encode();
        let digest = Sha256::digest([&b"unisum knock"[..], &[7; 16]].concat());
        assert_ne!(encoded[4..], digest[..16]);
        for token in ["", "another"] {
            let stranger = Preamble::of(&Secret::new(token.as_bytes()), &[7; 16]);
            assert_ne!(encoded, stranger.encode(), "{token}");
        }
    }

    /// A recording would let who guesses the process guess the token.
    #[test]
    fn a_preamble_says_nothing_of_the_token_where_the_session_can_be_guessed() {
        let process = Hello::of_process(4711);
        let other = Secret::new(b"another");
        assert_eq!(Preamble::of(&secret(), &process), Preamble::of(&other, &process));
    }

    fn secret() -> Secret {
        Secret::new(b"a token of the tests")
    }

    #[test]
    fn what_does_not_begin_as_a_preamble_is_kept() {
        for said in [&b"usmHello"[..], b"GET /", b"\x16\x03", b"\xfeknx"] {
            let (mut head, mut bytes) = (Head::new(), said);
            assert_eq!(head.take(&mut bytes), Beginning::Other);
            assert_eq!([head.taken(), bytes].concat(), said);
        }
        let (mut head, mut bytes) = (Head::new(), &MAGIC[..3]);
        assert_eq!(head.take(&mut bytes), Beginning::Unknown);
        assert_eq!((head.taken(), bytes), (&MAGIC[..3], &b""[..]));
    }
}
