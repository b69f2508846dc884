//! The mutual proof of the job token that opens every connection.
//!
//! ```text
//! dialer    Hello      "usmH" version purpose socket from to world session job build nonce (98)
//! listener  Challenge  "usmL" 1 nonce                                                  (37)
//! dialer    Proof      mac("dialer", hello, nonce)                                     (32)
//! listener  Accepted   "usmL" 2 mac("listener", hello, nonce)                          (37)
//!  or, in place of either listener message:
//! listener  Refused    "usmL" 3 length text                                            (≤ 206)
//! listener  Later      "usmL" 4 length text                                            (≤ 206)
//! ```
//! All integers are little endian. Every message has a fixed or a bounded size, and the dialer
//! speaks only when asked, so that nothing follows a message before its answer. Both nonces are
//! fresh, so a recorded proof is worth nothing later; both macs cover the whole hello, so it
//! can't be altered on its way. What the listener knows of the job is told only after the proof.
//!
//! The token is proven, not the bytes that follow: those are neither encrypted nor signed. A token
//! that can be guessed can be guessed offline from a recorded handshake: use a random one.
//! [`crate::secure`] is the handshake of encrypted connections, with the same hello and proofs.

mod error;

use std::fmt;
use std::io::{self, Read, Write};

use bytes::{Buf, BufMut};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use crate::warning::legible;

pub use self::error::{HandshakeError, STEADY};

/// Bytes of an encoded hello.
pub(crate) const HELLO_BYTES: usize = 84 + BUILD_BYTES;
/// Bytes of a build in it.
const BUILD_BYTES: usize = 14;
/// Bytes of an answer's head: magic and kind.
pub(crate) const HEAD_BYTES: usize = 5;
/// Most bytes of a refusal's text.
const REASON_BYTES_MAX: usize = 200;
const NONCE_BYTES: usize = 32;
pub(crate) const MAC_BYTES: usize = 32;
/// Of the bytes of the handshake itself; what comes after it is told apart by [`Build`].
const VERSION: u16 = 3;
const DIALER: &[u8; 4] = b"usmH";
pub(crate) const LISTENER: &[u8; 4] = b"usmL";
const CHALLENGE: u8 = 1;
pub(crate) const ACCEPTED: u8 = 2;
const REFUSED: u8 = 3;
const LATER: u8 = 4;

/// The key that all processes of a job share, derived from the job token.
#[derive(Clone)]
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// The secret of a token.
    pub fn new(token: &[u8]) -> Self {
        let mut digest = Sha256::digest(token);
        let secret = Self(Zeroizing::new(digest.into()));
        digest.zeroize();
        secret
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Proves knowledge of the secret: HMAC-SHA-256 over the label and the parts, each with its length
/// before it, so that no two lists of parts give the same bytes.
///
/// Source: RFC 2104.
pub fn mac(secret: &Secret, label: &str, parts: &[&[u8]]) -> [u8; 32] {
    keyed(secret, label, parts).finalize().into_bytes().into()
}

/// Whether `proof` is the [`mac`] of the same label and parts, in constant time.
pub fn verify(secret: &Secret, label: &str, parts: &[&[u8]], proof: &[u8]) -> bool {
    keyed(secret, label, parts).verify_slice(proof).is_ok()
}

fn keyed(secret: &Secret, label: &str, parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(&*secret.0).expect("HMAC takes keys of any length");
    for part in [label.as_bytes()].iter().chain(parts) {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac
}

/// The 16 bytes by which a connection names its job.
pub fn job_hash(job: &str) -> [u8; 16] {
    let mut hash = [0; 16];
    hash.copy_from_slice(&Sha256::digest(job)[..16]);
    hash
}

/// A fingerprint of bytes (SHA-256), by which processes find out whether they have the same.
pub fn fingerprint(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Fresh random bytes for a nonce or a session.
///
/// # Errors
/// If the system has no random numbers.
pub fn random<const BYTES: usize>() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// A rank's one control connection to the coordinator.
    Control = 1,
    /// Payload between two ranks.
    Data = 2,
    /// Nothing: the kernels find out by it whether they reach each other.
    Pulse = 3,
    /// What two members of an elastic job agree on.
    View = 4,
    /// What goes on for a control connection of this rank that was cut.
    Resume = 5,
}

impl Purpose {
    pub(crate) fn from_wire(byte: u8) -> Option<Self> {
        [Self::Control, Self::Data, Self::Pulse, Self::View, Self::Resume]
            .into_iter()
            .find(|it| *it as u8 == byte)
    }
}

/// How a dialer introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub purpose: Purpose,
    /// Which of several sockets between the two ranks this is.
    pub socket: u8,
    /// The dialer's rank.
    pub from: u32,
    /// The rank it means to reach.
    pub to: u32,
    /// How many ranks the dialer expects in the job.
    pub world: u32,
    /// The session that the coordinator chose; on a control connection, which learns it,
    /// [`Hello::of_process`].
    pub session: [u8; 16],
    /// [`job_hash`] of the job's name.
    pub job: [u8; 16],
    /// What the dialer runs; none on a data connection, whose session says that it is the same.
    pub build: Build,
}

/// Which unisum a process runs. Plans, cards and messages are made for one build: another may
/// differ in any of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Build {
    /// Major, minor and patch.
    pub version: [u16; 3],
    /// Fingerprint of the sources.
    pub sources: u64,
}

impl fmt::Display for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version: [major, minor, patch], sources } = self;
        write!(f, "{major}.{minor}.{patch} (sources {sources:016x})")
    }
}

impl Hello {
    /// What stands for the session before that is known: the dialer's process.
    pub fn of_process(id: u32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&id.to_le_bytes());
        bytes
    }

    /// Whether this is [`Hello::of_process`], and no session.
    pub(crate) fn is_process(session: &[u8; 16]) -> bool {
        session[4..] == [0; 12]
    }

    /// The dialer's process, in words, if it is said in place of a session.
    pub fn process(&self) -> String {
        match self.session {
            [a, b, c, d, rest @ ..] if rest == [0; 12] && [a, b, c, d] != [0; 4] => {
                format!("process {}", u32::from_le_bytes([a, b, c, d]))
            }
            _ => "another process".into(),
        }
    }

    pub(crate) fn encode(&self, nonce: &[u8; NONCE_BYTES]) -> [u8; HELLO_BYTES] {
        let mut encoded = [0; HELLO_BYTES];
        let mut to = &mut encoded[..];
        to.put_slice(DIALER);
        to.put_u16_le(VERSION);
        to.put_u8(self.purpose as u8);
        to.put_u8(self.socket);
        to.put_u32_le(self.from);
        to.put_u32_le(self.to);
        to.put_u32_le(self.world);
        to.put_slice(&self.session);
        to.put_slice(&self.job);
        self.build.version.iter().for_each(|part| to.put_u16_le(*part));
        to.put_u64_le(self.build.sources);
        to.put_slice(nonce);
        encoded
    }

    /// Looks at magic and version as soon as they are there: hellos of other versions may have
    /// other sizes.
    pub(crate) fn check_head(said: &[u8]) -> Result<(), Refusal> {
        let seen = said.len().min(DIALER.len());
        if said[..seen] != DIALER[..seen] {
            return Err(Refusal::Garbage);
        }
        match said[seen..] {
            [low, high, ..] if [low, high] != VERSION.to_le_bytes() => {
                Err(Refusal::Version { theirs: u16::from_le_bytes([low, high]) })
            }
            _ => Ok(()),
        }
    }

    /// Reads what follows magic and version, which are checked already.
    pub(crate) fn decode(encoded: &[u8; HELLO_BYTES]) -> Result<Self, Refusal> {
        let mut from = &encoded[6..];
        let purpose = Purpose::from_wire(from.get_u8()).ok_or(Refusal::Garbage)?;
        let socket = from.get_u8();
        let (rank, to, world) = (from.get_u32_le(), from.get_u32_le(), from.get_u32_le());
        let (mut session, mut job) = ([0; 16], [0; 16]);
        from.copy_to_slice(&mut session);
        from.copy_to_slice(&mut job);
        let version = [(); 3].map(|()| from.get_u16_le());
        let build = Build { version, sources: from.get_u64_le() };
        Ok(Self { purpose, socket, from: rank, to, world, session, job, build })
    }
}

/// Why a listener turns a dialer away. The dialer is told the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The bytes are not unisum's: a stranger. It is told nothing at all.
    #[error("the bytes are not unisum's")]
    Garbage,
    /// The proof is wrong.
    #[error("wrong token")]
    Token,
    /// The dialer speaks another version of the handshake.
    #[error(
        "protocol version {theirs}, but this job speaks {VERSION}: do all ranks run the same \
         unisum?"
    )]
    Version {
        /// The dialer's version.
        theirs: u16,
    },
    /// The dialer belongs to another job.
    #[error("another job")]
    Job,
    /// The dialer runs another build of unisum, which may differ in its plans or messages.
    #[error("rank {from} runs unisum {theirs}, rank {to} runs {ours}: all need the same build")]
    Build {
        /// The dialer's rank.
        from: u32,
        /// The listener's.
        to: u32,
        /// What the dialer runs.
        theirs: Build,
        /// What the listener runs.
        ours: Build,
    },
    /// The dialer's world has another size.
    #[error("world of {theirs}, but this job's is {ours}")]
    World {
        /// The dialer's.
        theirs: u32,
        /// The listener's.
        ours: u32,
    },
    /// The ranks make no sense in this world, or this is not the rank that the dialer means.
    #[error("no connection from rank {from} to rank {to} can end here")]
    Rank {
        /// The dialer's rank.
        from: u32,
        /// The rank it wanted.
        to: u32,
    },
    /// Another process with this rank is connected.
    #[error("rank {rank} is taken: {first} has joined with it, and {second} would")]
    RankTaken {
        /// The rank of both.
        rank: u32,
        /// The one that has joined, and where it is.
        first: String,
        /// The dialer.
        second: String,
    },
    /// The job that the dialer would join has begun without it.
    #[error("rank {rank} comes too late: {why}")]
    Late {
        /// The dialer's.
        rank: u32,
        /// What has become of the job.
        why: &'static str,
    },
    /// The dialer belongs to another session of the job: an earlier start of it.
    #[error("another session of the job")]
    Session,
    /// More connections than the listener hears at a time have proven nothing yet. The dialer may
    /// come again.
    #[error("too many connections that have not proven the token")]
    Crowded,
    /// The listener's process, or its system, has no file descriptor left.
    #[error("no file descriptor left there: raise the limit on open files (ulimit -n)")]
    Exhausted,
    /// The dialer speaks in clear text, which this job does not.
    #[error("this job's connections are encrypted: UNISUM_TLS must be the same on all ranks")]
    Clear,
    /// The dialer wants an encrypted connection, and this job has none.
    #[error("this job's connections are in clear text: UNISUM_TLS must be the same on all ranks")]
    Encrypted,
    /// One of the two does not accept the other's certificate, and why.
    #[error("{0}")]
    Certificate(String),
}

impl Refusal {
    /// The bytes to send before closing: none for a stranger.
    pub fn encode(&self) -> Vec<u8> {
        if *self == Self::Garbage {
            return Vec::new();
        }
        let text = self.to_string();
        let text = &text.as_bytes()[..text.len().min(REASON_BYTES_MAX)];
        let mut message = Vec::with_capacity(HEAD_BYTES + 1 + text.len());
        message.put_slice(LISTENER);
        message.put_u8(if *self == Self::Crowded { LATER } else { REFUSED });
        message.put_u8(text.len() as u8);
        message.put_slice(text);
        message
    }
}

/// What a listener does after it fed bytes to a [`Listening`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Read more.
    More,
    /// Send these bytes, then read more.
    Send(Vec<u8>),
    /// Send these bytes; the connection is the hello's from then on.
    Admitted(Hello, Vec<u8>),
    /// Send these bytes and close.
    Refused(Refusal, Vec<u8>),
}

/// The listener's half of one handshake (sans-IO). It holds one hello at most.
#[derive(Debug)]
pub struct Listening {
    buffer: [u8; HELLO_BYTES],
    filled: usize,
    nonce: [u8; NONCE_BYTES],
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Hello,
    Proof { hello: Hello, encoded: [u8; HELLO_BYTES] },
    Over,
}

impl Listening {
    /// A handshake with a `nonce` that was never used before (see [`random`]).
    pub fn new(nonce: [u8; 32]) -> Self {
        Self { buffer: [0; HELLO_BYTES], filled: 0, nonce, stage: Stage::Hello }
    }

    /// What the dialer claims to be, from its hello to its proof.
    pub fn claim(&self) -> Option<&Hello> {
        match &self.stage {
            Stage::Proof { hello, .. } => Some(hello),
            Stage::Hello | Stage::Over => None,
        }
    }

    /// Whether the dialer was admitted or refused.
    pub const fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    /// Takes what the dialer sent. `admit` is asked once, after the dialer has proven the token:
    /// is there room for this hello? After [`Heard::Admitted`] or [`Heard::Refused`] everything
    /// is refused.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        secret: &Secret,
        admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
    ) -> Heard {
        self.step(bytes, secret, admit).unwrap_or_else(|refusal| {
            self.stage = Stage::Over;
            let answer = refusal.encode();
            Heard::Refused(refusal, answer)
        })
    }

    fn step(
        &mut self,
        bytes: &[u8],
        secret: &Secret,
        admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
    ) -> Result<Heard, Refusal> {
        let whole = match self.stage {
            Stage::Hello => HELLO_BYTES,
            Stage::Proof { .. } => MAC_BYTES,
            Stage::Over => return Err(Refusal::Garbage),
        };
        let taken = bytes.len().min(whole - self.filled);
        self.buffer[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        if matches!(self.stage, Stage::Hello) {
            Hello::check_head(&self.buffer[..self.filled])?;
        }
        if taken < bytes.len() {
            return Err(Refusal::Garbage);
        }
        if self.filled < whole {
            return Ok(Heard::More);
        }
        self.filled = 0;
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Hello => self.challenge(),
            Stage::Proof { hello, encoded } => self.judge(hello, &encoded, secret, admit),
            Stage::Over => Err(Refusal::Garbage),
        }
    }

    fn challenge(&mut self) -> Result<Heard, Refusal> {
        let hello = Hello::decode(&self.buffer)?;
        self.stage = Stage::Proof { hello, encoded: self.buffer };
        Ok(Heard::Send(answer(CHALLENGE, &self.nonce)))
    }

    fn judge(
        &self,
        hello: Hello,
        encoded: &[u8; HELLO_BYTES],
        secret: &Secret,
        admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
    ) -> Result<Heard, Refusal> {
        let parts: [&[u8]; 2] = [encoded, &self.nonce];
        if !verify(secret, "dialer", &parts, &self.buffer[..MAC_BYTES]) {
            return Err(Refusal::Token);
        }
        admit(&hello)?;
        Ok(Heard::Admitted(hello, answer(ACCEPTED, &mac(secret, "listener", &parts))))
    }
}

pub(crate) fn answer(kind: u8, body: &[u8; 32]) -> Vec<u8> {
    [&LISTENER[..], &[kind], body].concat()
}

/// Introduces this process to a listener. Blocks as long as the stream does: set its timeouts.
/// One round trip and a half.
///
/// # Errors
/// If the stream fails, the listener refuses, or does not prove the token either.
pub fn dial(
    stream: &mut (impl Read + Write),
    hello: &Hello,
    secret: &Secret,
) -> Result<(), HandshakeError> {
    greet(stream, hello)?.prove(stream, secret)
}

/// The first half of [`dial`]: until [`Challenged::prove`] the listener admits nobody, so that a
/// dialer may break this off and dial again.
///
/// # Errors
/// As [`dial`].
pub fn greet(
    stream: &mut (impl Read + Write),
    hello: &Hello,
) -> Result<Challenged, HandshakeError> {
    let hello = hello.encode(&random()?);
    stream.write_all(&hello)?;
    let nonce = read_answer(stream, CHALLENGE)?;
    Ok(Challenged { hello, nonce })
}

/// A dialer that was asked for its proof.
#[derive(Debug)]
#[must_use = "the listener waits for the proof"]
pub struct Challenged {
    hello: [u8; HELLO_BYTES],
    nonce: [u8; NONCE_BYTES],
}

impl Challenged {
    /// The second half of [`dial`].
    ///
    /// # Errors
    /// As [`dial`].
    pub fn prove(
        self,
        stream: &mut (impl Read + Write),
        secret: &Secret,
    ) -> Result<(), HandshakeError> {
        let parts: [&[u8]; 2] = [&self.hello, &self.nonce];
        stream.write_all(&mac(secret, "dialer", &parts))?;
        let proof = read_answer(stream, ACCEPTED)?;
        let is_known = verify(secret, "listener", &parts, &proof);
        if is_known { Ok(()) } else { Err(HandshakeError::Impostor) }
    }
}

pub(crate) fn read_answer(stream: &mut impl Read, wanted: u8) -> Result<[u8; 32], HandshakeError> {
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head)?;
    if head[..4] != LISTENER[..] || head[4] != wanted {
        return Err(read_refusal(&head, stream));
    }
    let mut body = [0; 32];
    stream.read_exact(&mut body)?;
    Ok(body)
}

/// What an answer says that is not the one which was wanted.
pub(crate) fn read_refusal(head: &[u8; HEAD_BYTES], stream: &mut impl Read) -> HandshakeError {
    let reason = match head[4] {
        _ if head[..4] != LISTENER[..] => return HandshakeError::NotUnisum,
        REFUSED => read_reason(stream).map(HandshakeError::Refused),
        LATER => read_reason(stream).map(HandshakeError::Later),
        _ => return HandshakeError::NotUnisum,
    };
    reason.unwrap_or_else(HandshakeError::Io)
}

/// A refusal's text. It comes from somebody who has proven nothing: control characters, which a
/// terminal would obey, are escaped.
fn read_reason(stream: &mut impl Read) -> io::Result<String> {
    let mut length = [0];
    stream.read_exact(&mut length)?;
    let mut text = [0; u8::MAX as usize];
    let text = &mut text[..usize::from(length[0])];
    stream.read_exact(text)?;
    Ok(legible(&String::from_utf8_lossy(text)).into_owned())
}

#[cfg(test)]
mod tests;
