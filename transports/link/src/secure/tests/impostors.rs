//! Whoever takes a listener's or a dialer's place without its token or its key, alone or with the
//! true ones behind it.

use std::os::unix::net::UnixStream;
use std::thread;

use rustls::server::{AlwaysResolvesServerRawPublicKeys, ServerConnection};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, ServerConfig, Stream};

use super::super::dialing::{LISTENER_LABEL, PROOF_BYTES};
use super::super::preamble::PREAMBLE_BYTES;
use super::super::tls::{self, Configs, Tls};
use super::*;
use crate::handshake::{ACCEPTED, HELLO_BYTES, MAC_BYTES, answer, mac};

/// What a dialer has said to who ended its TLS, in the clear and in TLS.
struct Said {
    preamble: [u8; PREAMBLE_BYTES],
    proof: [u8; PROOF_BYTES],
    binding: [u8; 32],
}

impl Said {
    /// The proof of a listener that answers so, and has this token.
    fn listener_proof(&self, token: &str, answered: u8, binding: &[u8; 32]) -> [u8; MAC_BYTES] {
        let parts: [&[u8]; 3] = [&self.proof[..HELLO_BYTES], &[answered], binding];
        mac(&Secret::new(token.as_bytes()), LISTENER_LABEL, &parts)
    }
}

fn without_token() -> Configs {
    Tls::token().unwrap().configs()
}

/// Dials somebody who makes a TLS handshake and says there what `answer` makes of the proof.
fn dial_who_ends_tls(
    config: Arc<ServerConfig>,
    answer: impl FnOnce(&Said) -> Vec<u8>,
) -> Result<Option<Box<Session>>, HandshakeError> {
    let (mut dialer, mut listener) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let dialing = scope.spawn(move || dial(&mut dialer, &HELLO, &token("token"), true));
        let listen = move || {
            let mut said = Said { preamble: [0; _], proof: [0; _], binding: [0; _] };
            listener.read_exact(&mut said.preamble)?;
            let mut connection = ServerConnection::new(config).unwrap();
            let mut in_tls = Stream::new(&mut connection, &mut listener);
            in_tls.read_exact(&mut said.proof)?;
            said.binding = tls::binding(in_tls.conn).unwrap();
            in_tls.write_all(&answer(&said))
        };
        // A dialer that breaks off is no fault of the listener's.
        let _: io::Result<()> = listen();
        dialing.join().unwrap()
    })
}

/// Dials a listener that answers so, and proves what it can.
fn dial_who_answers(
    answered: u8,
    prove: impl Fn(&Said) -> [u8; MAC_BYTES],
) -> Result<Option<Box<Session>>, HandshakeError> {
    dial_who_ends_tls(without_token().server, |said| {
        [&answer(ACCEPTED, &prove(said))[..], &[answered]].concat()
    })
}

#[test]
fn who_does_not_prove_the_token_for_this_connection_and_answer_is_no_listener() {
    type Prove = fn(&Said) -> [u8; MAC_BYTES];
    let proofs: [(&str, Prove); 5] = [
        ("nothing", |_| [0; _]),
        ("the dialer's own proof", |said| *said.proof.last_chunk().unwrap()),
        ("another token's", |said| said.listener_proof("another", 1, &said.binding)),
        ("that of another answer", |said| said.listener_proof("token", 0, &said.binding)),
        ("that of another connection", |said| {
            said.listener_proof("token", 1, &said.binding.map(|byte| byte ^ 1))
        }),
    ];
    for (what, prove) in proofs {
        let dialed = dial_who_answers(1, prove);
        assert!(matches!(dialed, Err(HandshakeError::Impostor)), "{what}: {dialed:?}");
    }
}

/// What it says then is in records, or nothing.
#[test]
fn a_listener_can_not_answer_less_than_was_wished() {
    for answered in 0..3 {
        let prove = |said: &Said| said.listener_proof("token", answered, &said.binding);
        let dialed = dial_who_answers(answered, prove);
        match answered {
            1 => assert!(matches!(dialed, Ok(Some(_))), "{dialed:?}"),
            _ => assert!(matches!(dialed, Err(HandshakeError::NotUnisum)), "{dialed:?}"),
        }
    }
}

/// Says to a listener, in TLS of its own, what the dialer has said, and gives the answer.
fn passed_on(said: &Said, listener: &mut Wire<'_>) -> Vec<u8> {
    let name = "unisum".try_into().unwrap();
    let mut connection = ClientConnection::new(without_token().client, name).unwrap();
    listener.write_all(&said.preamble).unwrap();
    let mut in_tls = Stream::new(&mut connection, listener);
    in_tls.write_all(&said.proof).unwrap();
    let mut answer = Vec::new();
    // Nobody has closed TLS: it is the answer that ends.
    let end = in_tls.read_to_end(&mut answer).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    answer
}

/// Somebody in between makes a handshake with each end, and passes on what they say in TLS: the
/// proofs do not fit.
#[test]
fn nobody_in_between_can_pass_a_proof_on() {
    let mut listener = Wire::new(&token("token"));
    let dialed = dial_who_ends_tls(without_token().server, |said| passed_on(said, &mut listener));
    let error = dialed.unwrap_err();
    assert_eq!(error.to_string(), "refused: wrong token");
    let said = &listener.last;
    assert!(matches!(said, Heard::Refused(Refusal::Token, _)), "{said:?}");
    assert!(listener.listening.take_session().is_none());
}

/// The credentials of somebody who has the right token, and makes handshakes as these say.
fn with_token(client: ClientConfig, server: ServerConfig) -> Credentials {
    let tls = Arc::new(Tls::Token(Configs::new(client, server)));
    Credentials { secret: Secret::new(b"token"), tls: Some((tls, Sealing::Everywhere)) }
}

/// The right token and the key of `own`, behind the certificate of `shown`.
pub(super) fn behind_the_certificate_of(shown: &Credentials, own: &Credentials) -> Credentials {
    let configs = shown.tls().unwrap().configs();
    let certified = |credentials: &Credentials| {
        let client = credentials.tls().unwrap().configs().client;
        client.client_auth_cert_resolver.resolve(&[], &[]).expect("a certificate")
    };
    let certified = CertifiedKey::new(certified(shown).cert.clone(), certified(own).key.clone());
    let certified = Arc::new(SingleCertAndKey::from(certified));
    let mut client = ClientConfig::clone(&configs.client);
    let mut server = ServerConfig::clone(&configs.server);
    client.client_auth_cert_resolver = certified.clone();
    server.cert_resolver = certified;
    with_token(client, server)
}

/// The token alone does not do: the key is one that nobody else has.
#[test]
fn a_listener_signs_with_the_key_that_it_shows() {
    let [shown, own] = [(); 2].map(|()| tls::drawn_key(&tls::provider()).unwrap());
    let dialed = |key| {
        let Configs { client, server, .. } = without_token();
        let (client, mut server) = (ClientConfig::clone(&client), ServerConfig::clone(&server));
        server.cert_resolver = Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(key)));
        Wire::new(&with_token(client, server)).dial(&token("token"))
    };
    let error = dialed(CertifiedKey::new(shown.cert, own.key.clone())).unwrap_err();
    assert!(matches!(error, HandshakeError::Certificate(_)), "{error}");
    assert!(dialed(CertifiedKey::new(own.cert, own.key)).unwrap().is_some());
}

/// It would be heard before others in a crowd.
#[test]
fn who_shows_the_preamble_of_another_session_is_not_admitted() {
    let other = Preamble::of(&Secret::new(b"token"), &[8; 16]).encode();
    let tamper = |n: usize, by_listener: bool, said: &mut Vec<u8>| {
        if (n, by_listener) == (0, false) {
            said[..PREAMBLE_BYTES].copy_from_slice(&other);
        }
    };
    let mut listener = Wire::tampered(&token("token"), &tamper);
    assert!(listener.dial(&token("token")).is_err());
    let said = &listener.last;
    assert!(matches!(said, Heard::Refused(Refusal::Garbage, _)), "{said:?}");
}

/// At the same place in the other direction, before and after others have been opened.
#[test]
fn a_record_that_is_sent_back_is_not_opened() {
    for (before, is_dialer) in [(0, true), (0, false), (1, true), (1, false), (9, true)] {
        let mut wire = Wire::new(&token("token"));
        let mut dialer = wire.dial(&token("token")).unwrap().unwrap();
        let mut listener = wire.listening.take_session().unwrap();
        for _ in 0..before {
            assert!(understand_each_other(&mut dialer, &mut listener));
        }
        let end = if is_dialer { &mut dialer } else { &mut listener };
        let at = end.opener.opened();
        let (mut sent, mut plain) = (Vec::new(), Vec::new());
        end.seal(b"hello there", &mut sent);
        assert_eq!(end.open(&sent, &mut plain), Err(Altered { at }), "{before} {is_dialer}");
        assert!(plain.is_empty());
    }
}
