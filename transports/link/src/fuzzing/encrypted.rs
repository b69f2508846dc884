//! What must hold of encrypted connections, whatever strangers say and whoever is in the middle.

use std::io::{self, Read, Write};
use std::sync::OnceLock;

use super::{Answers, Target, edit, secret};
use crate::handshake::{Build, HandshakeError, Heard, Hello, Purpose, Refusal};
use crate::secure::{Credentials, Listening, Sealing, Session, dial};
use crate::secure::{check_files, check_peers, check_stranger};

pub(super) const TARGETS: &[Target] = &[
    Target { name: "tls_listening", check: check_listening, seeds: listening_seeds },
    Target { name: "tls_dialing", check: check_dialing, seeds: dialing_seeds },
    Target { name: "tls_handshake", check: check_handshake, seeds: handshake_seeds },
    Target { name: "records", check: check_records, seeds: record_seeds },
    Target { name: "tls_certificate", check: check_certificate, seeds: certificate_seeds },
    Target { name: "tls_files", check: check_pem, seeds: pem_seeds },
    Target { name: "tls_peers", check: check_list, seeds: list_seeds },
];

const HELLO: Hello = Hello {
    purpose: Purpose::Data,
    socket: 0,
    from: 1,
    to: 0,
    world: 2,
    session: [1; 16],
    job: [2; 16],
    build: Build { version: [1, 2, 3], sources: 4 },
};

/// Drawing a key takes longer than anything else here.
fn credentials() -> &'static Credentials {
    static ONCE: OnceLock<Credentials> = OnceLock::new();
    ONCE.get_or_init(|| {
        Credentials::token(secret(), Sealing::Everywhere).expect("this system has random numbers")
    })
}

/// Most bytes that a listener says to one that has proven nothing: a handshake, and a refusal.
const SAID_MAX: usize = 4 << 10;

/// Whatever a stranger says, in whatever pieces (their length comes first), it never gets in, is
/// told a bounded number of bytes, and is told nothing after it was refused.
fn check_listening(bytes: &[u8]) {
    let Some((&piece, said)) = bytes.split_first() else { return };
    let mut listening = Listening::new([5; 32], false);
    let (mut told, mut is_refused) = (0, false);
    for piece in said.chunks(usize::from(piece).max(1)) {
        let stranger = |_: &Hello| panic!("asked for somebody who has proven nothing");
        match listening.feed(piece, credentials(), stranger) {
            Heard::More => assert!(!is_refused),
            Heard::Send(answer) => {
                assert!(!is_refused && !answer.is_empty());
                told += answer.len();
            }
            Heard::Admitted(hello, _) => panic!("a stranger came in: {hello:?}"),
            Heard::Refused(refusal, answer) => {
                assert!(!is_refused || (refusal == Refusal::Garbage && answer.is_empty()));
                is_refused = true;
                told += answer.len();
            }
        }
        assert!(told <= SAID_MAX && listening.take_session().is_none());
    }
    assert_eq!(listening.is_over(), is_refused);
}

fn listening_seeds() -> Vec<Vec<u8>> {
    let said = said_by_a_dialer();
    let hello = HELLO.encode(&[3; 32]);
    let all = said.concat();
    vec![
        [&[200], &said[0][..]].concat(),
        [&[255], &all[..]].concat(),
        [&[98], &hello[..]].concat(),
        b"\x01\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00".to_vec(),
    ]
}

/// Whatever answers, a dialer is not satisfied, and shows nothing that a terminal would obey.
fn check_dialing(bytes: &[u8]) {
    match dial(&mut Answers(bytes), &HELLO, credentials(), true) {
        Ok(_) => panic!("an impostor was believed"),
        Err(HandshakeError::Refused(why) | HandshakeError::Later(why)) => {
            assert!(!why.contains(char::is_control))
        }
        Err(error) => assert!(!error.to_string().contains(char::is_control), "{error}"),
    }
}

fn dialing_seeds() -> Vec<Vec<u8>> {
    let mut wire = Wire::new(&[]);
    // It has random numbers of its own, which no other dialer's handshake has.
    let _ = dial(&mut wire, &HELLO, credentials(), true);
    vec![wire.answered.concat(), Refusal::Session.encode(), Refusal::Crowded.encode()]
}

fn said_by_a_dialer() -> Vec<Vec<u8>> {
    let mut wire = Wire::new(&[]);
    let _ = dial(&mut wire, &HELLO, credentials(), true);
    wire.said
}

/// A dialer and a listener, and somebody between them who edits what they say.
struct Wire<'a> {
    listening: Listening,
    /// Which message is edited, of both together, and how.
    edits: Option<(usize, &'a [u8])>,
    messages: usize,
    said: Vec<Vec<u8>>,
    answered: Vec<Vec<u8>>,
    answers: Vec<u8>,
    is_admitted: bool,
}

impl<'a> Wire<'a> {
    fn new(input: &'a [u8]) -> Self {
        let edits = input.split_first().map(|(&which, edits)| (usize::from(which % 5), edits));
        Self {
            listening: Listening::new([5; 32], false),
            edits,
            messages: 0,
            said: Vec::new(),
            answered: Vec::new(),
            answers: Vec::new(),
            is_admitted: false,
        }
    }

    fn pass(&mut self, message: &[u8]) -> Vec<u8> {
        self.messages += 1;
        match self.edits {
            Some((which, edits)) if which + 1 == self.messages => edit(message.to_vec(), edits),
            _ => message.to_vec(),
        }
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let said = self.pass(bytes);
        self.said.push(said.clone());
        let heard = self.listening.feed(&said, credentials(), |hello| {
            assert_eq!(*hello, HELLO);
            Ok(())
        });
        self.is_admitted |= matches!(heard, Heard::Admitted(..));
        if let Heard::Send(send) | Heard::Admitted(_, send) | Heard::Refused(_, send) = heard
            && !send.is_empty()
        {
            let send = self.pass(&send);
            self.answers.extend_from_slice(&send);
            self.answered.push(send);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Wire<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = bytes.len().min(self.answers.len());
        bytes[..read].copy_from_slice(&self.answers[..read]);
        self.answers.drain(..read);
        Ok(read)
    }
}

/// The first byte says which message of a handshake is edited, the others how: it fails, or both
/// ends have the same keys. Who believes that it stands has keys that nobody in the middle knows.
fn check_handshake(bytes: &[u8]) {
    let mut wire = Wire::new(bytes);
    let dialed = dial(&mut wire, &HELLO, credentials(), true);
    let listener = wire.listening.take_session();
    assert_eq!(wire.is_admitted, listener.is_some());
    if let (Ok(Some(mut dialer)), Some(mut listener)) = (dialed, listener) {
        understand(&mut dialer, &mut listener);
        understand(&mut listener, &mut dialer);
    }
}

fn understand(from: &mut Session, to: &mut Session) {
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    from.seal(b"hello there", &mut wire);
    assert_eq!(to.open(&wire, &mut plain), Ok(wire.len()));
    assert_eq!(plain, b"hello there");
}

fn handshake_seeds() -> Vec<Vec<u8>> {
    // Nothing edited; the third byte of each message.
    let flips = (0..5).map(|which| vec![which, 4, 3, 0, 0]);
    flips.chain([Vec::new(), vec![0, 1, 0, 0, 22], vec![2, 2, 9, 0, 0]]).collect()
}

/// Two ends with the same keys, for which a handshake stands.
fn sessions() -> (Box<Session>, Box<Session>) {
    let mut wire = Wire::new(&[]);
    let dialer = dial(&mut wire, &HELLO, credentials(), true);
    let dialer = dialer.expect("nobody is between").expect("all is encrypted");
    (dialer, wire.listening.take_session().expect("all is encrypted"))
}

/// What was sealed in pieces (the first bytes are their lengths, and how many bytes come at a time)
/// and edited on its way is opened up to the edit, and never again after an error.
fn check_records(bytes: &[u8]) {
    let Some((&[one, two, three, piece], edits)) = bytes.split_first_chunk() else { return };
    let (mut dialer, mut listener) = sessions();
    let (mut wire, mut sealed) = (Vec::new(), Vec::new());
    for (length, fill) in [(one, 1), (two, 2), (three, 3)] {
        let text = vec![fill; usize::from(length)];
        dialer.seal(&text, &mut wire);
        sealed.extend(text);
    }
    let edited = edit(wire.clone(), edits);
    let (mut held, mut opened, mut is_broken) = (Vec::new(), Vec::new(), false);
    for piece in edited.chunks(usize::from(piece).max(1)) {
        held.extend_from_slice(piece);
        match listener.open(&held, &mut opened) {
            Ok(taken) => {
                assert!(!is_broken || taken == 0);
                held.drain(..taken);
            }
            Err(error) => {
                is_broken = true;
                // What came before it was taken: it is in `opened`.
                assert_eq!(error.at, opened.len() as u64);
            }
        }
        assert!(sealed.starts_with(&opened), "something came out that was not sealed");
        if is_broken {
            break;
        }
    }
    assert!(edited != wire || opened == sealed);
}

fn record_seeds() -> Vec<Vec<u8>> {
    vec![vec![10, 20, 30, 7], vec![0, 255, 1, 255, 4, 40, 0, 3], vec![5, 5, 5, 64, 3, 25, 0, 0]]
}

/// A certificate of any content is none of a CA that has not signed it, and the names in it are
/// read without harm.
fn check_certificate(bytes: &[u8]) {
    check_stranger(include_bytes!("authority.der"), bytes);
}

/// A certificate that is whole, by somebody else.
fn certificate_seeds() -> Vec<Vec<u8>> {
    vec![include_bytes!("certificate.der").to_vec()]
}

/// A rank's certificate, its key, and the certificate of its CA, which is itself.
const OWN: [(&str, &[u8]); 3] = [
    ("CERTIFICATE", include_bytes!("own.der")),
    ("PRIVATE KEY", include_bytes!("own-key.der")),
    ("CERTIFICATE", include_bytes!("own.der")),
];

/// Files of any content are used, or refused by a sentence; a key is used with its own certificate
/// only. The first byte says which file has these contents.
fn check_pem(bytes: &[u8]) {
    static ONCE: OnceLock<[String; 4]> = OnceLock::new();
    let stranger = ("CERTIFICATE", &include_bytes!("certificate.der")[..]);
    let [own @ .., stranger] =
        ONCE.get_or_init(|| [OWN[0], OWN[1], OWN[2], stranger].map(|(label, der)| pem(label, der)));
    let Some((&which, text)) = bytes.split_first() else { return };
    let mut files: [&[u8]; 3] = std::array::from_fn(|at| own[at].as_bytes());
    files[usize::from(which % 3)] = text;
    let are_used = check_files(files, "worker");
    assert!(are_used || files.iter().zip(own).any(|(file, own)| *file != own.as_bytes()));
    // Another certificate's key.
    if which % 3 == 1 {
        assert!(!check_files([stranger.as_bytes(), text, files[2]], "worker"));
    }
}

/// As files have it.
fn pem(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for part in line.chunks(3) {
            let bytes: [u8; 4] =
                std::array::from_fn(|at| if at == 0 { 0 } else { *part.get(at - 1).unwrap_or(&0) });
            let bits = u32::from_be_bytes(bytes);
            let digit = |place: usize| char::from(DIGITS[(bits >> (18 - 6 * place) & 63) as usize]);
            text.extend((0..4).map(|place| if place <= part.len() { digit(place) } else { '=' }));
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

fn pem_seeds() -> Vec<Vec<u8>> {
    let [certificate, key, _] = OWN.map(|(label, der)| pem(label, der));
    let both = [&certificate[..], &key].concat();
    let some = pem("CERTIFICATE", &[0x30, 0x03, 2, 1, 0]);
    let files = [(0, &certificate), (1, &key), (2, &certificate), (0, &both), (2, &some)];
    files.map(|(which, text)| [&[which], text.as_bytes()].concat()).to_vec()
}

/// A list of peers accepts the names in it, and no others.
fn check_list(bytes: &[u8]) {
    check_peers(&String::from_utf8_lossy(bytes));
}

fn list_seeds() -> Vec<Vec<u8>> {
    let lists = ["worker,spiffe://example.org/worker", "@/etc/peers", "worker.svc\n\n other \r\n"];
    lists.map(Vec::from).to_vec()
}
