//! The dialer's half of a handshake, in clear text or encrypted.

use std::io::{Read, Write};

#[cfg(feature = "tls")]
use super::Preamble;
use super::{Credentials, Session};
use crate::handshake::{self, HandshakeError, Hello};

/// Introduces this process to a listener, and gives the keys of the connection unless it goes on in
/// clear text. Blocks as long as the stream does: set its timeouts. Two round trips, encrypted or
/// not. `wants_records` says whether this process wants what follows to be encrypted
/// ([`Credentials::want_records`]); the listener may want it, too.
///
/// # Errors
/// If the stream fails, the listener refuses, or does not prove the token either.
pub fn dial(
    stream: &mut (impl Read + Write),
    hello: &Hello,
    credentials: &Credentials,
    wants_records: bool,
) -> Result<Option<Box<Session>>, HandshakeError> {
    greet(stream, hello, credentials, wants_records)?.prove(stream, credentials)
}

/// The first half of [`dial`]: until [`Challenged::prove`] the listener admits nobody, so that a
/// dialer may break this off and dial again.
///
/// # Errors
/// As [`dial`].
pub fn greet(
    stream: &mut (impl Read + Write),
    hello: &Hello,
    credentials: &Credentials,
    wants_records: bool,
) -> Result<Challenged, HandshakeError> {
    #[cfg(feature = "tls")]
    if let Some(tls) = credentials.tls() {
        let preamble = Preamble::of(credentials.secret(), &hello.session);
        let client = encrypted::Client::greet(tls, stream, preamble)?;
        return Ok(Challenged(How::Encrypted {
            client: Box::new(client),
            hello: *hello,
            wants_records,
        }));
    }
    let _ = (credentials, wants_records);
    Ok(Challenged(How::Clear(handshake::greet(stream, hello)?)))
}

/// A dialer that was asked for its proof.
#[derive(Debug)]
#[must_use = "the listener waits for the proof"]
pub struct Challenged(How);

#[derive(Debug)]
enum How {
    Clear(handshake::Challenged),
    #[cfg(feature = "tls")]
    Encrypted {
        client: Box<encrypted::Client>,
        hello: Hello,
        wants_records: bool,
    },
}

impl Challenged {
    /// The second half of [`dial`].
    ///
    /// # Errors
    /// As [`dial`].
    pub fn prove(
        self,
        stream: &mut (impl Read + Write),
        credentials: &Credentials,
    ) -> Result<Option<Box<Session>>, HandshakeError> {
        match self.0 {
            How::Clear(challenged) => challenged.prove(stream, credentials.secret()).map(|()| None),
            #[cfg(feature = "tls")]
            How::Encrypted { client, hello, wants_records } => {
                client.prove(stream, &hello, wants_records, credentials.secret())
            }
        }
    }
}

#[cfg(feature = "tls")]
pub(super) use encrypted::{LISTENER_LABEL, PROOF_BYTES, Proof};

#[cfg(feature = "tls")]
mod encrypted {
    use std::io;
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{AlertDescription as Alert, ClientConnection, Error};

    use super::super::faults::{is_own, why};
    use super::super::tls;
    use super::*;
    use crate::handshake::{
        ACCEPTED, HEAD_BYTES, HELLO_BYTES, LISTENER, MAC_BYTES, Refusal, Secret, mac, random,
        read_answer, read_refusal, verify,
    };

    /// What a dialer says in TLS: its hello, its wish and its proof.
    pub(crate) const PROOF_BYTES: usize = HELLO_BYTES + 1 + MAC_BYTES;
    pub(crate) const LISTENER_LABEL: &str = "tls listener";
    const DIALER_LABEL: &str = "tls dialer";
    /// Bytes of the head of a TLS record: kind, version and length.
    const RECORD_HEAD_BYTES: usize = 5;
    /// Most bytes of a TLS record behind it (RFC 8446, 5.2).
    const RECORD_BYTES_MAX: usize = (16 << 10) + 256;

    /// What a dialer has said, and proven.
    pub(crate) struct Proof {
        pub(crate) hello: Hello,
        pub(crate) wants_records: bool,
    }

    impl Proof {
        /// # Errors
        /// If it proves nothing.
        pub(crate) fn verify(
            said: &[u8; PROOF_BYTES],
            secret: &Secret,
            binding: &[u8],
        ) -> Result<Self, Refusal> {
            let (encoded, rest) = said.split_first_chunk().expect("a proof is longer");
            Hello::check_head(encoded)?;
            let (wish, proof) = rest.split_at(1);
            if !verify(secret, DIALER_LABEL, &[encoded, wish, binding], proof) {
                return Err(Refusal::Token);
            }
            Ok(Self { hello: Hello::decode(encoded)?, wants_records: wish == [1] })
        }
    }

    /// A TLS client, whose handshake is done but for its last words.
    #[derive(Debug)]
    pub(crate) struct Client {
        tls: ClientConnection,
        /// Whom this end's certificate names.
        own: Option<Arc<str>>,
        /// What the listener says from here on answers the proof.
        has_proven: bool,
    }

    impl Client {
        /// Until the listener has said all that it says in the handshake.
        pub(super) fn greet(
            tls: &tls::Tls,
            stream: &mut (impl Read + Write),
            preamble: Preamble,
        ) -> Result<Self, HandshakeError> {
            // Nobody looks at the name: see `certified`.
            let name = ServerName::try_from("unisum").expect("it is a name");
            let configs = tls.configs();
            let made = ClientConnection::new(configs.client, name);
            let tls = made.map_err(|error| failed(error, None))?;
            let mut client = Self { tls, own: configs.own, has_proven: false };
            client.send(stream, &preamble.encode())?;
            while client.tls.is_handshaking() {
                client.receive(stream)?;
            }
            Ok(client)
        }

        /// Reads one record, and nothing of what may follow it.
        fn receive(&mut self, stream: &mut (impl Read + Write)) -> Result<(), HandshakeError> {
            let mut record = vec![0; RECORD_HEAD_BYTES];
            stream.read_exact(&mut record)?;
            if record[..LISTENER.len()] == LISTENER[..] {
                // In clear text: it has no time, no descriptors, or does not speak TLS.
                let head = record.first_chunk::<HEAD_BYTES>().expect("as long as a record's");
                return Err(read_refusal(head, stream));
            }
            let bytes = usize::from(u16::from_be_bytes([record[3], record[4]]));
            if !(20..=24).contains(&record[0]) || record[1] != 3 || bytes > RECORD_BYTES_MAX {
                return Err(self.no_tls(HandshakeError::NotUnisum));
            }
            record.resize(RECORD_HEAD_BYTES + bytes, 0);
            stream.read_exact(&mut record[RECORD_HEAD_BYTES..])?;
            let mut record = &record[..];
            while !record.is_empty() {
                self.tls.read_tls(&mut record)?;
            }
            match self.tls.process_new_packets() {
                Ok(_) => Ok(()),
                Err(error) => {
                    // The listener is told why, if it still listens for that: once it has the
                    // proof, it takes what comes for the first words of who was admitted.
                    if !self.has_proven {
                        let _ = self.send(stream, &[]);
                    }
                    // An alert is the listener's own word, and no admission.
                    let is_alert = matches!(error, Error::AlertReceived(_));
                    let failed = failed(error, self.own.as_deref());
                    Err(if is_alert { failed } else { self.no_tls(failed) })
                }
            }
        }

        /// What that means which is not as TLS has to be: an answer to the proof is nobody else's.
        fn no_tls(&self, error: HandshakeError) -> HandshakeError {
            if self.has_proven { HandshakeError::Altered } else { error }
        }

        /// Sends what rustls has to say, behind `before`.
        fn send(&mut self, stream: &mut impl Write, before: &[u8]) -> io::Result<()> {
            let mut wire = before.to_vec();
            while self.tls.wants_write() {
                self.tls.write_tls(&mut wire)?;
            }
            // At once: who refuses the first part need not wait for the rest.
            stream.write_all(&wire)
        }

        pub(super) fn prove(
            mut self,
            stream: &mut (impl Read + Write),
            hello: &Hello,
            wants_records: bool,
            secret: &Secret,
        ) -> Result<Option<Box<Session>>, HandshakeError> {
            let failed = |error| failed(error, None);
            let binding = tls::binding(&self.tls).map_err(failed)?;
            let (encoded, wish) = (hello.encode(&random()?), [u8::from(wants_records)]);
            let proof = mac(secret, DIALER_LABEL, &[&encoded, &wish, &binding]);
            self.tls.writer().write_all(&[&encoded[..], &wish, &proof].concat())?;
            self.send(stream, &[])?;
            self.has_proven = true;
            let mut answers = InTls { client: self, stream, failed: None };
            let proof = read_answer(&mut answers, ACCEPTED);
            let proof = proof.map_err(|error| answers.failed.take().unwrap_or(error))?;
            let mut answered = [0];
            answers.read_exact(&mut answered)?;
            let parts: [&[u8]; 3] = [&encoded, &answered, &binding];
            if !verify(secret, LISTENER_LABEL, &parts, &proof) {
                return Err(HandshakeError::Impostor);
            }
            // It knows the token, and answers what was wished or more.
            match (answered[0], wants_records) {
                (0, false) => Ok(None),
                (1, _) => {
                    let session = tls::session(&answers.client.tls, true).map_err(failed)?;
                    Ok(Some(Box::new(session)))
                }
                _ => Err(HandshakeError::NotUnisum),
            }
        }
    }

    /// What the listener says in TLS.
    struct InTls<'a, S> {
        client: Client,
        stream: &'a mut S,
        /// Why it says no more, if not for an error of the stream.
        failed: Option<HandshakeError>,
    }

    impl<S: Read + Write> Read for InTls<'_, S> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            loop {
                match self.client.tls.reader().read(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                match self.client.receive(self.stream) {
                    Ok(()) => {}
                    Err(HandshakeError::Io(error)) => return Err(error),
                    Err(error) => {
                        self.failed = Some(error);
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                }
            }
        }
    }

    fn failed(error: Error, own: Option<&str>) -> HandshakeError {
        match error {
            _ if is_own(&error) => HandshakeError::OwnCertificate(why(&error, own)),
            Error::InvalidCertificate(_) | Error::NoCertificatesPresented => {
                HandshakeError::Certificate(why(&error, own))
            }
            Error::PeerIncompatible(_) | Error::AlertReceived(Alert::HandshakeFailure) => {
                HandshakeError::Unlike(why(&error, own))
            }
            Error::AlertReceived(_) => HandshakeError::Tls(why(&error, own)),
            error => HandshakeError::Tls(format!(
                "what it said was altered on its way, or is no TLS 1.3: {error}"
            )),
        }
    }
}
