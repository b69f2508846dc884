//! The record layer of an encrypted connection (sans-IO).
//!
//! ```text
//! offset  0  bytes       u32     length n of the plaintext, little endian
//!         4  ciphertext  [n]     AES-256-GCM
//!       4+n  tag         [16]    over length and ciphertext
//! ```
//! Each direction of each connection has a secret of its own, which the TLS handshake exported
//! (RFC 8446, 7.5), so the number of a record is a nonce that no key ever sees twice; and a record
//! that was altered, left out, repeated, moved or cut short does not have the tag that is expected
//! next. TLS's own records would be copied twice more, and hold 16 KiB at most.
//!
//! A key seals no more than 64 GiB or 2³² records, far below what AES-GCM allows (RFC 8446, 5.5).
//! Then both ends take the next secret, which HKDF makes of the last one, and forget that.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk};
use zeroize::Zeroizing;

use super::{Altered, LENGTH_BYTES, RECORD_BYTES_MAX, RECORD_OVERHEAD, SECRET_BYTES};

/// Bytes of a tag.
const TAG_BYTES: usize = RECORD_OVERHEAD - LENGTH_BYTES;
/// Most records and bytes under one key.
const LIMITS: Limits = Limits { records: 1 << 32, bytes: 64 << 30 };

#[derive(Clone, Copy, Debug)]
struct Limits {
    records: u64,
    bytes: u64,
}

/// The keys of one direction, one after the other.
struct Keys {
    key: LessSafeKey,
    /// Of which the next key is made.
    secret: Zeroizing<[u8; SECRET_BYTES]>,
    /// Records and bytes under this key.
    records: u64,
    bytes: u64,
    limits: Limits,
}

impl Keys {
    fn new(secret: Zeroizing<[u8; SECRET_BYTES]>) -> Self {
        Self { key: key(&secret), secret, records: 0, bytes: 0, limits: LIMITS }
    }

    /// The key of the next record, of so many bytes, and its nonce.
    fn next(&mut self, bytes: usize) -> (&LessSafeKey, Nonce) {
        if self.records >= self.limits.records || self.bytes >= self.limits.bytes {
            let next = expand(&self.secret, b"unisum next secret");
            *self = Self { limits: self.limits, ..Self::new(next) };
        }
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.records.to_le_bytes());
        self.records += 1;
        self.bytes += bytes as u64;
        (&self.key, Nonce::assume_unique_for_key(nonce))
    }
}

fn key(secret: &[u8; SECRET_BYTES]) -> LessSafeKey {
    let key = expand(secret, b"unisum record key");
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).expect("it has the length of a key"))
}

/// HKDF-Expand (RFC 5869, 2.3) of a secret that is random already.
fn expand(secret: &[u8; SECRET_BYTES], label: &[u8]) -> Zeroizing<[u8; SECRET_BYTES]> {
    let mut expanded = Zeroizing::new([0; SECRET_BYTES]);
    let prk = Prk::new_less_safe(HKDF_SHA256, secret);
    prk.expand(&[label], OfSecret)
        .and_then(|okm| okm.fill(&mut *expanded))
        .expect("32 bytes can be had");
    expanded
}

struct OfSecret;

impl KeyType for OfSecret {
    fn len(&self) -> usize {
        SECRET_BYTES
    }
}

/// Seals what a rank sends on one connection.
pub struct Sealer(Keys);

/// Opens what the other one sends.
pub struct Opener {
    keys: Keys,
    /// Bytes of plaintext that were opened.
    opened: u64,
    is_broken: bool,
}

impl Sealer {
    pub(super) fn new(secret: Zeroizing<[u8; SECRET_BYTES]>) -> Self {
        Self(Keys::new(secret))
    }

    /// Writes the record of `head` and `body`, [`RECORD_BYTES_MAX`] together at most, to `record`,
    /// which has [`RECORD_OVERHEAD`] bytes more. `body` is read once and not copied before, unless
    /// there is a head.
    ///
    /// # Panics
    /// If `record` has another length.
    pub fn seal(&mut self, head: &[u8], body: &[u8], record: &mut [u8]) {
        let bytes = head.len() + body.len();
        assert!(bytes <= RECORD_BYTES_MAX, "a record of {bytes} bytes");
        assert_eq!(record.len(), bytes + RECORD_OVERHEAD, "the place of a record");
        let length = (bytes as u32).to_le_bytes();
        let (to_length, rest) = record.split_at_mut(LENGTH_BYTES);
        let (text, tag) = rest.split_at_mut(bytes);
        to_length.copy_from_slice(&length);
        let (key, nonce) = self.0.next(bytes);
        let sealed = if head.is_empty() {
            key.seal_out_of_place_scatter(nonce, Aad::from(length), body, text, &[], tag)
        } else {
            text[..head.len()].copy_from_slice(head);
            text[head.len()..].copy_from_slice(body);
            key.seal_in_place_scatter(nonce, Aad::from(length), text, &[], tag)
        };
        sealed.expect("the lengths are right");
    }
}

impl Opener {
    pub(super) fn new(secret: Zeroizing<[u8; SECRET_BYTES]>) -> Self {
        Self { keys: Keys::new(secret), opened: 0, is_broken: false }
    }

    /// Bytes of plaintext that were opened so far.
    pub const fn opened(&self) -> u64 {
        self.opened
    }

    /// Length of the plaintext of the record that `buffer` begins with; `None` if it has not so
    /// many bytes yet as to tell. It proves true or false only when the record is opened.
    ///
    /// # Errors
    /// If no record is so long.
    pub fn length(&mut self, buffer: &[u8]) -> Result<Option<usize>, Altered> {
        let Some(length) = buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let bytes = u32::from_le_bytes(*length) as usize;
        self.is_broken |= bytes > RECORD_BYTES_MAX;
        if self.is_broken {
            return Err(Altered { at: self.opened });
        }
        Ok(Some(bytes))
    }

    /// Writes the plaintext of `record`, a whole one, to `text`, which has [`RECORD_OVERHEAD`]
    /// bytes less.
    ///
    /// # Errors
    /// If this is not the next record as it was sealed; then `text` has unspecified content, and
    /// nothing is ever opened any more.
    ///
    /// # Panics
    /// If `text` has another length.
    pub fn open(&mut self, record: &[u8], text: &mut [u8]) -> Result<(), Altered> {
        assert_eq!(record.len(), text.len() + RECORD_OVERHEAD, "the place of a plaintext");
        let altered = Altered { at: self.opened };
        let (length, rest) = record.split_at(LENGTH_BYTES);
        let (sealed, tag) = rest.split_at(rest.len() - TAG_BYTES);
        let (key, nonce) = self.keys.next(text.len());
        let opened = key.open_separate_gather(nonce, Aad::from(length), sealed, tag, text);
        if self.is_broken || opened.is_err() {
            self.is_broken = true;
            return Err(altered);
        }
        self.opened += text.len() as u64;
        Ok(())
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer(..)")
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Opener");
        debug.field("opened", &self.opened).field("is_broken", &self.is_broken);
        debug.finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
