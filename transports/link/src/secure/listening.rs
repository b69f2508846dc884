//! The listener's half of a handshake, in clear text or encrypted.

use super::preamble::{Beginning, Head};
use super::{Credentials, Preamble, Session};
use crate::handshake::{self, Heard, Hello, Refusal};

/// One handshake at a listener (sans-IO). What it holds is bounded.
#[derive(Debug)]
pub struct Listening {
    nonce: [u8; 32],
    /// Whether the dialer is on this host.
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "nothing is encrypted"))]
    is_inside: bool,
    how: How,
    session: Option<Box<Session>>,
    was_encrypted: bool,
    claimed: Option<Hello>,
}

#[derive(Debug)]
enum How {
    /// Less has come than says what it is.
    Unknown(Head),
    Clear(Box<handshake::Listening>),
    #[cfg(feature = "tls")]
    Encrypted(Box<encrypted::Server>),
    Over,
}

impl Listening {
    /// A handshake with a `nonce` that was never used before (see [`handshake::random`]), with a
    /// dialer that is inside this host or not.
    pub const fn new(nonce: [u8; 32], is_inside: bool) -> Self {
        Self {
            nonce,
            is_inside,
            how: How::Unknown(Head::new()),
            session: None,
            was_encrypted: false,
            claimed: None,
        }
    }

    /// What the dialer claims to be, from its hello to its proof. Encrypted, both come together.
    pub fn claim(&self) -> Option<&Hello> {
        match &self.how {
            How::Clear(listening) => listening.claim(),
            _ => None,
        }
    }

    /// What the dialer claimed to be, in TLS or where that is needed, be it admitted or refused.
    pub const fn claimed(&self) -> Option<Hello> {
        self.claimed
    }

    /// Whether the dialer has begun a TLS handshake as a rank would: that costs it something.
    pub const fn shakes_hands(&self) -> bool {
        #[cfg(feature = "tls")]
        return matches!(self.how, How::Encrypted(_));
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Whether what was said, if anything, was said in TLS.
    pub const fn is_in_tls(&self) -> bool {
        self.was_encrypted
    }

    /// Whether the dialer was admitted or refused.
    pub const fn is_over(&self) -> bool {
        matches!(self.how, How::Over)
    }

    /// The keys of a connection that was admitted; none if it goes on in clear text.
    pub const fn take_session(&mut self) -> Option<Box<Session>> {
        self.session.take()
    }

    /// Takes what the dialer sent, as [`Listening::feed_if`] does, and hears everybody.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        credentials: &Credentials,
        admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
    ) -> Heard {
        self.feed_if(bytes, credentials, |_| true, admit)
    }

    /// Takes what the dialer sent. `hears` is asked once, before a TLS handshake costs anything: is
    /// there time for who knocks so? `admit` is asked once, after the dialer has proven the token:
    /// is there room for this hello? After [`Heard::Admitted`] or [`Heard::Refused`] everything
    /// is refused.
    pub fn feed_if(
        &mut self,
        bytes: &[u8],
        credentials: &Credentials,
        hears: impl FnOnce(Preamble) -> bool,
        admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
    ) -> Heard {
        let (mut bytes, mut joined) = (bytes, Vec::new());
        if let How::Unknown(head) = &mut self.how {
            let how = match head.take(&mut bytes) {
                Beginning::Unknown => return Heard::More,
                Beginning::Preamble(preamble) => begin(preamble, credentials, hears),
                // TLS, of no rank.
                Beginning::Other if head.taken()[0] == HANDSHAKE_RECORD => Err(Refusal::Garbage),
                Beginning::Other => {
                    joined.extend(head.taken().iter().chain(bytes));
                    bytes = &joined;
                    Ok(How::Clear(Box::new(handshake::Listening::new(self.nonce))))
                }
            };
            match how {
                Ok(how) => self.how = how,
                Err(refusal) => {
                    self.how = How::Over;
                    // Nobody who is only crowded out is told so at the listener's cost.
                    let is_told = refusal != Refusal::Crowded;
                    let answer = if is_told { refusal.encode() } else { Vec::new() };
                    return Heard::Refused(refusal, answer);
                }
            }
        }
        let heard = match &mut self.how {
            How::Unknown(_) => return Heard::More,
            How::Over => Heard::Refused(Refusal::Garbage, Vec::new()),
            How::Clear(listening) => {
                let heard = listening.feed(bytes, credentials.secret(), admit);
                // What does not even begin like a hello is told nothing.
                let is_rank = listening.claim().is_some() && credentials.encrypt();
                if is_rank {
                    self.claimed = listening.claim().copied();
                    Heard::Refused(Refusal::Clear, Refusal::Clear.encode())
                } else {
                    heard
                }
            }
            #[cfg(feature = "tls")]
            How::Encrypted(server) => {
                self.was_encrypted = true;
                let wish = (credentials, self.is_inside);
                let (heard, session) = server.feed(bytes, wish, admit);
                self.session = session;
                self.claimed = server.claimed;
                heard
            }
        };
        if matches!(heard, Heard::Admitted(..) | Heard::Refused(..)) {
            self.how = How::Over;
        }
        heard
    }
}

/// An encrypted handshake, for who knocks.
fn begin(
    preamble: Preamble,
    credentials: &Credentials,
    hears: impl FnOnce(Preamble) -> bool,
) -> Result<How, Refusal> {
    #[cfg(feature = "tls")]
    if let Some(tls) = credentials.tls() {
        if !hears(preamble) {
            return Err(Refusal::Crowded);
        }
        let server = encrypted::Server::new(tls, preamble).map_err(|_| Refusal::Garbage)?;
        return Ok(How::Encrypted(Box::new(server)));
    }
    let _ = (preamble, credentials, hears);
    Err(Refusal::Encrypted)
}

/// What each TLS connection begins with (RFC 8446, 5.1).
const HANDSHAKE_RECORD: u8 = 22;

#[cfg(feature = "tls")]
mod encrypted {
    use rustls::Error;
    use rustls::server::ServerConnection;
    use std::io::{Read as _, Write as _};
    use std::sync::Arc;

    use super::super::dialing::{LISTENER_LABEL, PROOF_BYTES, Proof};
    use super::super::faults::why;
    use super::super::{Session, tls};
    use super::*;
    use crate::handshake::{ACCEPTED, answer, mac};

    /// Most bytes that a dialer may say before it is admitted: a chain of certificates is the
    /// longest part.
    const SAID_MAX: usize = 64 << 10;

    /// A TLS server until the dialer is admitted.
    #[derive(Debug)]
    pub(super) struct Server {
        connection: ServerConnection,
        preamble: Preamble,
        said: usize,
        /// Whom this end's certificate names.
        own: Option<Arc<str>>,
        proof: [u8; PROOF_BYTES],
        filled: usize,
        pub(super) claimed: Option<Hello>,
    }

    impl Server {
        pub(super) fn new(tls: &tls::Tls, preamble: Preamble) -> Result<Self, Error> {
            let tls::Configs { server, own, .. } = tls.configs();
            let connection = ServerConnection::new(server)?;
            let (proof, claimed) = ([0; PROOF_BYTES], None);
            Ok(Self { connection, preamble, said: 0, own, proof, filled: 0, claimed })
        }

        pub(super) fn feed(
            &mut self,
            bytes: &[u8],
            wish: (&Credentials, bool),
            admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
        ) -> (Heard, Option<Box<Session>>) {
            match self.step(bytes, wish, admit) {
                Ok(heard) => heard,
                Err(refusal) => {
                    let is_told = !self.connection.is_handshaking() && refusal != Refusal::Garbage;
                    if is_told {
                        // Into a buffer, which takes it.
                        let _ = self.connection.writer().write_all(&refusal.encode());
                    }
                    // An alert that says why comes with it, if rustls has one to say.
                    (Heard::Refused(refusal, self.unsent()), None)
                }
            }
        }

        fn step(
            &mut self,
            mut bytes: &[u8],
            (credentials, is_inside): (&Credentials, bool),
            admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
        ) -> Result<(Heard, Option<Box<Session>>), Refusal> {
            self.said += bytes.len();
            if self.said > SAID_MAX {
                return Err(Refusal::Garbage);
            }
            while !bytes.is_empty() {
                self.connection.read_tls(&mut bytes).map_err(|_| Refusal::Garbage)?;
                let heard = self.connection.process_new_packets();
                heard.map_err(|error| refusal(error, self.own.as_deref()))?;
                self.read_proof()?;
            }
            if self.filled < PROOF_BYTES {
                let send = self.unsent();
                let heard = if send.is_empty() { Heard::More } else { Heard::Send(send) };
                return Ok((heard, None));
            }
            let encoded = self.proof.first_chunk().expect("a proof begins with a hello");
            Hello::check_head(encoded)?;
            self.claimed = Some(Hello::decode(encoded)?);
            let refusal = |error| refusal(error, None);
            let binding = tls::binding(&self.connection).map_err(refusal)?;
            let Proof { hello, wants_records } =
                Proof::verify(&self.proof, credentials.secret(), &binding)?;
            if self.preamble != Preamble::of(credentials.secret(), &hello.session) {
                return Err(Refusal::Garbage);
            }
            admit(&hello)?;
            let wants_records = wants_records || credentials.want_inside(hello.purpose, is_inside);
            let answered = [u8::from(wants_records)];
            let encoded = &self.proof[..handshake::HELLO_BYTES];
            let proof = mac(credentials.secret(), LISTENER_LABEL, &[encoded, &answered, &binding]);
            let answer = [&answer(ACCEPTED, &proof)[..], &answered].concat();
            let session = match wants_records {
                true => Some(Box::new(tls::session(&self.connection, false).map_err(refusal)?)),
                false => None,
            };
            self.connection.writer().write_all(&answer).map_err(|_| Refusal::Garbage)?;
            Ok((Heard::Admitted(hello, self.unsent()), session))
        }

        /// Takes what came in TLS: the proof, and nothing after it.
        fn read_proof(&mut self) -> Result<(), Refusal> {
            let mut more = [0; PROOF_BYTES + 1];
            while let Ok(read) = self.connection.reader().read(&mut more) {
                let space = &mut self.proof[self.filled..];
                if read == 0 || read > space.len() {
                    return Err(Refusal::Garbage);
                }
                space[..read].copy_from_slice(&more[..read]);
                self.filled += read;
            }
            Ok(())
        }

        fn unsent(&mut self) -> Vec<u8> {
            let mut send = Vec::new();
            while self.connection.wants_write() {
                if self.connection.write_tls(&mut send).is_err() {
                    break;
                }
            }
            send
        }
    }

    fn refusal(error: Error, own: Option<&str>) -> Refusal {
        match error {
            Error::InvalidCertificate(_)
            | Error::NoCertificatesPresented
            | Error::PeerIncompatible(_)
            | Error::AlertReceived(_) => Refusal::Certificate(why(&error, own)),
            _ => Refusal::Garbage,
        }
    }
}
