use std::io;

use proptest::prelude::*;

use super::*;
use crate::handshake::{Build, HandshakeError, Heard, Hello, Refusal, random};

mod certificates;
mod impostors;

const HELLO: Hello = Hello {
    purpose: Purpose::Data,
    socket: 3,
    from: 1,
    to: 2,
    world: 4,
    session: [7; 16],
    job: [9; 16],
    build: Build { version: [1, 2, 3], sources: 0x0807_0605_0403_0201 },
};

fn token(token: &str) -> Credentials {
    Credentials::token(Secret::new(token.as_bytes()), Sealing::Everywhere).unwrap()
}

/// Plays the listener to a [`dial`]: each write is fed, each answer is there to be read.
/// `tamper` may alter what travels, with the number of the write and whether the listener says it.
struct Wire<'a> {
    listening: Listening,
    credentials: Credentials,
    admit: Result<(), Refusal>,
    tamper: &'a dyn Fn(usize, bool, &mut Vec<u8>),
    writes: usize,
    recorded: Vec<Vec<u8>>,
    answers: Vec<u8>,
    last: Heard,
}

impl<'a> Wire<'a> {
    fn new(credentials: &Credentials) -> Self {
        Self::tampered(credentials, &|_, _, _| {})
    }

    fn tampered(credentials: &Credentials, tamper: &'a dyn Fn(usize, bool, &mut Vec<u8>)) -> Self {
        Self {
            listening: Listening::new(random().unwrap(), true),
            credentials: credentials.clone(),
            admit: Ok(()),
            tamper,
            writes: 0,
            recorded: Vec::new(),
            answers: Vec::new(),
            last: Heard::More,
        }
    }

    fn dial(&mut self, credentials: &Credentials) -> Result<Option<Box<Session>>, HandshakeError> {
        dial(self, &HELLO, credentials, false)
    }

    fn was_admitted(&self) -> bool {
        matches!(&self.last, Heard::Admitted(HELLO, _))
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut said = bytes.to_vec();
        (self.tamper)(self.writes, false, &mut said);
        self.recorded.push(said.clone());
        let admit = self.admit.clone();
        if matches!(self.last, Heard::Refused(..)) {
            // Its listener has closed.
            return Ok(bytes.len());
        }
        self.last = self.listening.feed(&said, &self.credentials, |_| admit);
        match &self.last {
            Heard::More => {}
            Heard::Send(send) | Heard::Admitted(_, send) | Heard::Refused(_, send) => {
                let mut send = send.clone();
                (self.tamper)(self.writes, true, &mut send);
                self.recorded.push(send.clone());
                self.answers.extend(send);
            }
        }
        self.writes += 1;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Wire<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.answers.len());
        bytes[..n].copy_from_slice(&self.answers[..n]);
        self.answers.drain(..n);
        Ok(n)
    }
}

/// Whether each end opens what the other one seals.
fn understand_each_other(dialer: &mut Session, listener: &mut Session) -> bool {
    let one_way = |from: &mut Session, to: &mut Session| {
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        from.seal(b"hello there", &mut wire);
        to.open(&wire, &mut plain).is_ok() && plain == b"hello there"
    };
    one_way(dialer, listener) && one_way(listener, dialer)
}

#[test]
fn the_right_token_is_admitted_and_both_ends_have_the_keys() {
    let mut wire = Wire::new(&token("token"));
    let mut dialer = wire.dial(&token("token")).unwrap().expect("all is encrypted");
    assert!(wire.was_admitted() && wire.listening.is_over());
    let mut listener = wire.listening.take_session().expect("at both ends");
    assert!(understand_each_other(&mut dialer, &mut listener));
    assert!(!understand_each_other(&mut dialer, &mut Wire::session()));
}

impl Wire<'_> {
    /// A listener's session with somebody else.
    fn session() -> Session {
        let mut wire = Wire::new(&token("token"));
        wire.dial(&token("token")).unwrap();
        *wire.listening.take_session().unwrap()
    }
}

/// Data inside a host may stay in clear text, if both ends want that.
#[test]
fn records_are_used_if_one_end_wants_them() {
    let inside = |sealing| Credentials::token(Secret::new(b"token"), sealing).unwrap();
    for (sealing, wish, are_used) in [
        (Sealing::BetweenHosts, false, false),
        (Sealing::BetweenHosts, true, true),
        (Sealing::Everywhere, false, true),
    ] {
        let mut wire = Wire::new(&inside(sealing));
        let dialer = dial(&mut wire, &HELLO, &inside(sealing), wish).unwrap();
        let listener = wire.listening.take_session();
        assert!(wire.was_admitted());
        assert_eq!((dialer.is_some(), listener.is_some()), (are_used, are_used), "{sealing:?}");
    }
    let credentials = inside(Sealing::BetweenHosts);
    let [own, other] = ["10.0.0.1", "10.0.0.2"].map(|it| it.parse().unwrap());
    assert!(!credentials.want_records(Purpose::Data, own, own));
    assert!(credentials.want_records(Purpose::Data, own, other));
    assert!(credentials.want_records(Purpose::Control, own, own));
    assert!(!Credentials::clear(Secret::new(b"token")).want_records(Purpose::Control, own, other));
}

#[test]
fn another_token_is_refused_at_either_end() {
    let mut wire = Wire::new(&token("token"));
    let error = wire.dial(&token("another")).unwrap_err();
    assert_eq!(error.to_string(), "refused: wrong token");
    assert!(error.is_answer() && matches!(wire.last, Heard::Refused(Refusal::Token, _)));
}

#[test]
fn a_refusal_reaches_the_dialer_with_its_reason() {
    for refusal in [taken(), Refusal::Session, Refusal::Job] {
        let mut wire = Wire::new(&token("token"));
        wire.admit = Err(refusal.clone());
        let error = wire.dial(&token("token")).unwrap_err();
        assert_eq!(error.to_string(), format!("refused: {refusal}"));
    }
}

#[test]
fn clear_text_and_encryption_say_so_to_each_other() {
    let clear = Credentials::clear(Secret::new(b"token"));
    let mut wire = Wire::new(&clear);
    let error = wire.dial(&token("token")).unwrap_err();
    assert!(error.to_string().contains("are in clear text: UNISUM_TLS"), "{error}");
    assert!(error.is_answer());
    let mut wire = Wire::new(&token("token"));
    let error = wire.dial(&clear).unwrap_err();
    assert!(error.to_string().contains("are encrypted: UNISUM_TLS"), "{error}");
    // Strangers get no such answer.
    let mut wire = Wire::new(&token("token"));
    wire.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert_eq!(wire.last, Heard::Refused(Refusal::Garbage, Vec::new()));
    // Turned away before it was heard: in clear text, whatever the dialer speaks.
    let crowded = Refusal::Crowded.encode();
    let mut wire = Wire::new(&token("token"));
    wire.listening.how_over();
    wire.answers = crowded;
    let error = wire.dial(&token("token")).unwrap_err();
    assert!(matches!(error, HandshakeError::Later(_)) && !error.is_answer());
}

impl Listening {
    fn how_over(&mut self) {
        let admitted = |_: &Hello| panic!("a stranger");
        self.feed(b"X", &token("token"), admitted);
    }
}

/// Whoever says what was said before proves nothing.
#[test]
fn a_recorded_handshake_is_worth_nothing_later() {
    let mut wire = Wire::new(&token("token"));
    wire.dial(&token("token")).unwrap();
    let mut later = Wire::new(&token("token"));
    for said in wire.recorded.iter().step_by(2) {
        let _ = later.write(said);
    }
    assert!(matches!(later.last, Heard::Refused(..)), "{:?}", later.last);
}

/// The proof of one connection on another: the binding differs, whatever else is alike.
#[test]
fn a_proof_is_bound_to_its_connection() {
    use super::dialing::{LISTENER_LABEL, Proof};
    use crate::handshake::mac;
    let secret = Secret::new(b"token");
    let encoded = HELLO.encode(&[0; 32]);
    let proof = mac(&secret, "tls dialer", &[&encoded, &[1], &[5; 32]]);
    let said = [&encoded[..], &[1], &proof].concat();
    let said = said.first_chunk().unwrap();
    assert!(Proof::verify(said, &secret, &[5; 32]).is_ok_and(|proof| proof.wants_records));
    assert_eq!(Proof::verify(said, &secret, &[6; 32]).err(), Some(Refusal::Token));
    // Nor does the listener's answer serve as a dialer's proof.
    let reflected = mac(&secret, LISTENER_LABEL, &[&encoded, &[1], &[5; 32]]);
    let said = [&encoded[..], &[1], &reflected].concat();
    let said = said.first_chunk().unwrap();
    assert_eq!(Proof::verify(said, &secret, &[5; 32]).err(), Some(Refusal::Token));
}

/// The listener has admitted the dialer by then, and takes what comes next for its first record.
#[test]
fn an_answer_that_was_altered_is_told_as_that_and_the_listener_hears_no_more() {
    let alter = |n: usize, by_listener: bool, bytes: &mut Vec<u8>| {
        if (n, by_listener) == (1, true) {
            *bytes.last_mut().unwrap() ^= 1;
        }
    };
    let mut wire = Wire::tampered(&token("token"), &alter);
    let error = wire.dial(&token("token")).unwrap_err();
    assert!(matches!(error, HandshakeError::Altered), "{error}");
    assert!(wire.was_admitted() && wire.writes == 2, "{:?}", wire.last);
    // The other way round the listener tells what it has not understood, and admits nobody.
    let alter = |n: usize, by_listener: bool, bytes: &mut Vec<u8>| {
        if (n, by_listener) == (1, false) {
            *bytes.last_mut().unwrap() ^= 1;
        }
    };
    let mut wire = Wire::tampered(&token("token"), &alter);
    let error = wire.dial(&token("token")).unwrap_err();
    let told = "it broke off (BadRecordMac), as if what this rank said was altered on its way";
    assert!(error.to_string().contains(told) && !error.is_answer(), "{error}");
    assert!(!wire.was_admitted());
}

#[test]
fn a_byte_at_a_time_is_enough() {
    struct Slow<'a>(Wire<'a>);
    impl Write for Slow<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(&bytes[..1])
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Read for Slow<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.0.read(&mut bytes[..1])
        }
    }
    let mut wire = Slow(Wire::new(&token("token")));
    let mut dialer = dial(&mut wire, &HELLO, &token("token"), true).unwrap().unwrap();
    let mut listener = wire.0.listening.take_session().unwrap();
    assert!(understand_each_other(&mut dialer, &mut listener));
}

/// Nothing that the ends know shows on the wire: neither what they say nor what they prove.
#[test]
fn the_wire_shows_nothing() {
    let mut wire = Wire::new(&token("token"));
    wire.dial(&token("token")).unwrap();
    let wire = wire.recorded.concat();
    let encoded = HELLO.encode(&[0; 32]);
    for known in encoded[..66].windows(8).chain([&b"token"[..], b"usm", b"unisum"]) {
        assert!(!wire.windows(known.len()).any(|part| part == known), "{known:?}");
    }
}

#[test]
fn who_says_too_much_before_the_proof_is_refused() {
    let mut wire = Wire::new(&token("token"));
    // Handshake records that never end a message: TLS itself would wait for more.
    let record = [&[22, 3, 1, 64, 0, 1, 0, 255, 255][..], &[0; 16380]].concat();
    for _ in 0..20 {
        let _ = wire.write(&record);
    }
    assert!(matches!(wire.last, Heard::Refused(Refusal::Garbage, _)), "{:?}", wire.last);
}

#[test]
fn credentials_are_not_printed() {
    let text = format!("{:?}", Credentials::clear(Secret::new(b"token")));
    assert!(text.contains("Secret(..)"), "{text}");
}

/// A listener whose answers are already written.
struct Answers<'a>(&'a [u8]);

impl Read for Answers<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Answers<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Where a bit is flipped on the way, the handshake fails, or the bit said nothing (TLS has a
    /// few such, for the sake of old middleboxes): then the keys are the same at both ends.
    #[test]
    fn a_flipped_bit_is_refused_or_means_nothing(
        write in 0..2_usize, of_listener: bool, place in 0.0..1.0, bit in 0..8_u8,
    ) {
        let tamper = |n: usize, by_listener: bool, bytes: &mut Vec<u8>| {
            if (n, by_listener) == (write, of_listener) && !bytes.is_empty() {
                let at = (bytes.len() as f64 * place) as usize;
                bytes[at] ^= 1 << bit;
            }
        };
        let mut wire = Wire::tampered(&token("token"), &tamper);
        let dialed = wire.dial(&token("token"));
        // Nor does it look like a refusal, which would be the end.
        if let Err(error) = &dialed {
            prop_assert!(!error.is_refusal(), "{error}");
        }
        if let (Ok(Some(mut dialer)), true) = (dialed, wire.was_admitted()) {
            let mut listener = wire.listening.take_session().unwrap();
            prop_assert!(understand_each_other(&mut dialer, &mut listener));
        }
    }

    #[test]
    fn another_token_is_always_refused(other in "[a-z]{0,40}") {
        prop_assume!(other != "token");
        let mut wire = Wire::new(&token(&other));
        prop_assert!(wire.dial(&token("token")).is_err());
        prop_assert!(!wire.was_admitted());
    }

    #[test]
    fn no_answer_satisfies_a_dialer(answers in prop::collection::vec(any::<u8>(), 0..300)) {
        let tls = [&[22, 3, 3, 0, answers.len() as u8][..], &answers].concat();
        for answers in [answers, tls] {
            prop_assert!(dial(&mut Answers(&answers), &HELLO, &token("token"), true).is_err());
        }
    }
}

fn taken() -> Refusal {
    let [first, second] = ["process 7 at 10.0.0.1", "process 8"].map(str::to_owned);
    Refusal::RankTaken { rank: 1, first, second }
}
