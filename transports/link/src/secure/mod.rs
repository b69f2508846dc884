//! Connections that are encrypted, and proofs that are bound to them.
//!
//! The two ends make a TLS 1.3 handshake (rustls). In it both prove that they know the job's token,
//! by a mac over the channel binding of RFC 9266, which is another one on each connection: whoever
//! stands in between and makes a handshake with each end has two different bindings, and can't pass
//! a proof on. What follows travels in records under keys that the handshake exported (`records`).
//! Recorded bytes let nobody guess a token, for the proofs are encrypted.
//!
//! ```text
//! dialer    preamble (see `preamble`), TLS ClientHello
//! listener  TLS ServerHello .. Finished
//! dialer    TLS Finished, and in TLS: hello, wish (1), mac("tls dialer", hello, wish, binding)
//! listener  in TLS: "usmL" 2 mac("tls listener", hello, answer, binding) answer (1)
//!  or, in place of it: a refusal as in clear text (see `handshake`), in TLS if that stands
//! both      records, if the answer is 1; else clear text
//! ```
//! Without certificates of the user ([`Credentials::token`]) the listener signs with a key that its
//! process drew, and that nobody looks at: the token's proof is what counts. With them
//! ([`Credentials::certified`]) both ends verify each other's, too.

#[cfg(not(feature = "tls"))]
mod absent;
#[cfg(feature = "tls")]
mod certified;
mod dialing;
#[cfg(feature = "tls")]
mod faults;
#[cfg(feature = "tls")]
mod files;
mod listening;
mod preamble;
#[cfg(feature = "tls")]
mod records;
#[cfg(feature = "tls")]
mod tls;

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
#[cfg(feature = "tls")]
use std::sync::Arc;

use crate::fork::ParentOnly;
use crate::handshake::{Purpose, Secret};

#[cfg(not(feature = "tls"))]
pub use self::absent::{Opener, Sealer};
#[cfg(feature = "tls")]
pub use self::certified::{Files, Peers};
#[cfg(all(feature = "tls", any(test, fuzzing)))]
pub(crate) use self::certified::{check_files, check_peers, check_stranger};
pub use self::dialing::{Challenged, dial, greet};
#[cfg(feature = "tls")]
pub use self::files::CertificateError;
pub use self::listening::Listening;
pub use self::preamble::Preamble;
#[cfg(feature = "tls")]
pub use self::records::{Opener, Sealer};

/// Most bytes of plaintext in a record.
pub const RECORD_BYTES_MAX: usize = 64 << 10;
/// Bytes that a record has more than its plaintext: length and tag.
pub const RECORD_OVERHEAD: usize = LENGTH_BYTES + 16;
/// Bytes of a record's length.
const LENGTH_BYTES: usize = 4;
#[cfg(feature = "tls")]
const SECRET_BYTES: usize = 32;

/// The keys of an encrypted connection, one for each direction.
#[derive(Debug)]
pub struct Session {
    /// For what this end sends.
    pub sealer: Sealer,
    /// For what it receives.
    pub opener: Opener,
}

impl Session {
    /// Seals `bytes`, in as many records as they take, behind what `wire` holds.
    pub fn seal(&mut self, bytes: &[u8], wire: &mut Vec<u8>) {
        for piece in bytes.chunks(RECORD_BYTES_MAX) {
            let from = wire.len();
            wire.resize(from + piece.len() + RECORD_OVERHEAD, 0);
            self.sealer.seal(&[], piece, &mut wire[from..]);
        }
    }

    /// Opens the records that `wire` begins with and holds whole, behind what `plain` holds.
    /// Gives the number of bytes of `wire` that they took.
    ///
    /// # Errors
    /// If one is not as it was sealed; what came before it is in `plain`.
    pub fn open(&mut self, wire: &[u8], plain: &mut impl Extend<u8>) -> Result<usize, Altered> {
        let mut taken = 0;
        let mut text = Vec::new();
        while let Some(bytes) = self.opener.length(&wire[taken..])? {
            let Some(record) = wire.get(taken..taken + bytes + RECORD_OVERHEAD) else { break };
            text.resize(bytes, 0);
            self.opener.open(record, &mut text)?;
            plain.extend(text.iter().copied());
            taken += record.len();
        }
        Ok(taken)
    }
}

/// A record that is not the one which the other end sealed: it was altered on its way, or others
/// were left out, repeated or inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "what came after byte {at} was altered on its way, or is not from that rank: its \
     authentication tag is wrong"
)]
pub struct Altered {
    /// Bytes of plaintext that had come before it on the connection.
    pub at: u64,
}

/// A connection whose handshake is done.
#[derive(Debug)]
pub struct Proven {
    /// The connection.
    pub stream: ParentOnly<TcpStream>,
    /// Its keys; none if it goes on in clear text.
    pub session: Option<Box<Session>>,
    /// What [`Proven::read_exact`] has opened and not given.
    pub early: Vec<u8>,
}

impl Proven {
    /// A connection with its keys.
    pub const fn new(stream: ParentOnly<TcpStream>, session: Option<Box<Session>>) -> Self {
        Self { stream, session, early: Vec::new() }
    }

    /// Reads exactly so many bytes, on a stream that blocks. What their record has more is `early`.
    ///
    /// # Errors
    /// If the stream fails, or what came was altered.
    pub fn read_exact(&mut self, text: &mut [u8]) -> io::Result<()> {
        let Some(session) = &mut self.session else { return self.stream.read_exact(text) };
        while self.early.len() < text.len() {
            let mut record = vec![0; LENGTH_BYTES];
            self.stream.read_exact(&mut record)?;
            let bytes = session.opener.length(&record).map_err(io::Error::other)?;
            record.resize(bytes.unwrap_or(0) + RECORD_OVERHEAD, 0);
            self.stream.read_exact(&mut record[LENGTH_BYTES..])?;
            session.open(&record, &mut self.early).map_err(io::Error::other)?;
        }
        text.copy_from_slice(&self.early[..text.len()]);
        self.early.drain(..text.len());
        Ok(())
    }

    /// Writes all of these bytes, on a stream that blocks.
    ///
    /// # Errors
    /// If the stream fails.
    pub fn write_all(&mut self, text: &[u8]) -> io::Result<()> {
        let Some(session) = &mut self.session else { return self.stream.write_all(text) };
        let mut wire = Vec::new();
        session.seal(text, &mut wire);
        self.stream.write_all(&wire)
    }
}

impl From<ParentOnly<TcpStream>> for Proven {
    /// In clear text.
    fn from(stream: ParentOnly<TcpStream>) -> Self {
        Self::new(stream, None)
    }
}

/// Which data connections are encrypted. Control connections always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// All.
    Everywhere,
    /// Those to other hosts: what stays inside one can be read by nobody but its root.
    BetweenHosts,
}

/// By what a process proves on each connection that it belongs to the job, and whether it encrypts
/// them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Credentials {
    secret: Secret,
    #[cfg(feature = "tls")]
    tls: Option<(Arc<tls::Tls>, Sealing)>,
}

impl Credentials {
    /// Connections stay in clear text; the token is proven as [`crate::handshake`] says.
    pub const fn clear(secret: Secret) -> Self {
        Self {
            secret,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// Connections are encrypted; the token alone says who may come.
    ///
    /// # Errors
    /// If the system has no random numbers.
    #[cfg(feature = "tls")]
    pub fn token(secret: Secret, sealing: Sealing) -> io::Result<Self> {
        let tls = tls::Tls::token().map_err(io::Error::other)?;
        Ok(Self { secret, tls: Some((Arc::new(tls), sealing)) })
    }

    /// Connections are encrypted, and beside the token both ends need certificates. The files are
    /// read again when they have changed: connections that are made then use the new ones.
    ///
    /// # Errors
    /// What is wrong with a file.
    #[cfg(feature = "tls")]
    pub fn certified(
        secret: Secret,
        sealing: Sealing,
        files: Files,
    ) -> Result<Self, CertificateError> {
        let tls = tls::Tls::certified(files)?;
        Ok(Self { secret, tls: Some((Arc::new(tls), sealing)) })
    }

    /// The job's secret.
    pub const fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Whether connections are encrypted at all.
    pub const fn encrypt(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Whether this process wants records on a connection of this purpose between these addresses.
    pub fn want_records(&self, purpose: Purpose, own: IpAddr, peer: IpAddr) -> bool {
        #[cfg(feature = "tls")]
        return self.want_inside(purpose, own == peer);
        #[cfg(not(feature = "tls"))]
        {
            let _ = (purpose, own, peer);
            false
        }
    }

    /// The same, where it is known whether the other end is inside this host.
    #[cfg(feature = "tls")]
    fn want_inside(&self, purpose: Purpose, is_inside: bool) -> bool {
        let Some((_, sealing)) = &self.tls else { return false };
        match purpose {
            Purpose::Control | Purpose::Resume | Purpose::View => true,
            Purpose::Data => *sealing == Sealing::Everywhere || !is_inside,
            // It carries nothing.
            Purpose::Pulse => false,
        }
    }

    #[cfg(feature = "tls")]
    fn tls(&self) -> Option<&tls::Tls> {
        self.tls.as_ref().map(|(tls, _)| &**tls)
    }
}

#[cfg(test)]
#[cfg(feature = "tls")]
mod tests;
