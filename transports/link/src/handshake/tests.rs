use proptest::prelude::*;

use super::*;

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

/// Plays the listener to a [`dial`]: each write is fed, each answer is there to be read.
/// `tamper` may alter what travels to the listener.
struct Wire<'a> {
    listening: Listening,
    secret: Secret,
    admit: Result<(), Refusal>,
    tamper: &'a dyn Fn(usize, &mut Vec<u8>),
    writes: usize,
    recorded: Vec<Vec<u8>>,
    answers: Vec<u8>,
    last: Heard,
}

impl<'a> Wire<'a> {
    fn new(token: &str, nonce: [u8; 32], tamper: &'a dyn Fn(usize, &mut Vec<u8>)) -> Self {
        Self {
            listening: Listening::new(nonce),
            secret: Secret::new(token.as_bytes()),
            admit: Ok(()),
            tamper,
            writes: 0,
            recorded: Vec::new(),
            answers: Vec::new(),
            last: Heard::More,
        }
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut bytes = bytes.to_vec();
        self.recorded.push(bytes.clone());
        (self.tamper)(self.writes, &mut bytes);
        self.writes += 1;
        let admit = self.admit.clone();
        self.last = self.listening.feed(&bytes, &self.secret, |_| admit);
        match &self.last {
            Heard::More => {}
            Heard::Send(send) | Heard::Admitted(_, send) | Heard::Refused(_, send) => {
                self.answers.extend(send);
            }
        }
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

fn secret() -> Secret {
    Secret::new(b"token")
}

#[test]
fn the_right_token_is_admitted() {
    let mut wire = Wire::new("token", [1; 32], &|_, _| {});
    dial(&mut wire, &HELLO, &secret()).unwrap();
    assert!(matches!(wire.last, Heard::Admitted(HELLO, _)));
}

#[test]
fn a_byte_at_a_time_is_enough() {
    let encoded = HELLO.encode(&[5; 32]);
    let mut listening = Listening::new([1; 32]);
    for byte in &encoded[..HELLO_BYTES - 1] {
        assert_eq!(listening.feed(&[*byte], &secret(), |_| Ok(())), Heard::More);
    }
    let heard = listening.feed(&encoded[HELLO_BYTES - 1..], &secret(), |_| Ok(()));
    assert!(matches!(heard, Heard::Send(_)));
}

#[test]
fn a_refusal_reaches_the_dialer_with_its_reason() {
    let mut wire = Wire::new("token", [1; 32], &|_, _| {});
    wire.admit = Err(taken());
    let error = dial(&mut wire, &HELLO, &secret()).unwrap_err();
    assert_eq!(error.to_string(), format!("refused: {}", taken()));
}

#[test]
fn only_who_was_turned_away_for_now_or_lost_the_connection_comes_again() {
    let crowded = Refusal::Crowded.encode();
    let error = dial(&mut Answers(&crowded), &HELLO, &secret()).unwrap_err();
    assert_eq!(error.to_string(), format!("turned away for now: {}", Refusal::Crowded));
    assert!(!error.is_answer());
    assert!(!dial(&mut Answers(&[]), &HELLO, &secret()).unwrap_err().is_answer());
    for refusal in [Refusal::Token, Refusal::Session, taken(), Refusal::Exhausted] {
        let answers = refusal.encode();
        assert!(
            dial(&mut Answers(&answers), &HELLO, &secret()).unwrap_err().is_answer(),
            "{refusal}"
        );
    }
}

#[test]
fn a_claim_lasts_from_the_hello_to_the_proof() {
    let mut listening = Listening::new([1; 32]);
    let encoded = HELLO.encode(&[5; 32]);
    listening.feed(&encoded[..HELLO_BYTES - 1], &secret(), |_| Ok(()));
    assert_eq!(listening.claim(), None);
    listening.feed(&encoded[HELLO_BYTES - 1..], &secret(), |_| Ok(()));
    assert_eq!(listening.claim(), Some(&HELLO));
    listening.feed(&[0; MAC_BYTES], &secret(), |_| Ok(()));
    assert_eq!(listening.claim(), None);
}

#[test]
fn policy_is_not_asked_before_the_proof() {
    let mut listening = Listening::new([1; 32]);
    let none = |_: &Hello| -> Result<(), Refusal> { panic!("asked for a stranger") };
    listening.feed(&HELLO.encode(&[0; 32]), &secret(), none);
    let heard = listening.feed(&[0; MAC_BYTES], &secret(), none);
    assert_eq!(heard, Heard::Refused(Refusal::Token, Refusal::Token.encode()));
}

#[test]
fn another_version_is_named_and_a_stranger_gets_no_answer() {
    let mut encoded = HELLO.encode(&[0; 32]);
    encoded[4] = 9;
    let heard = Listening::new([1; 32]).feed(&encoded[..6], &secret(), |_| Ok(()));
    assert!(matches!(heard, Heard::Refused(Refusal::Version { theirs: 9 }, _)));
    let heard = Listening::new([1; 32]).feed(b"GET / HTTP/1.1\r\n", &secret(), |_| Ok(()));
    assert_eq!(heard, Heard::Refused(Refusal::Garbage, Vec::new()));
}

/// Who changes these bytes moves `VERSION`, too: a listener looks at it before all else.
#[test]
fn the_bytes_of_this_version_are_these() {
    let build = [1, 0, 2, 0, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let numbers = [1, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0];
    let parts: [&[u8]; 8] =
        [b"usmH", &[3, 0], &[2, 3], &numbers, &[7; 16], &[9; 16], &build, &[5; 32]];
    assert_eq!(HELLO.encode(&[5; 32])[..], parts.concat());
    assert_eq!((DIALER, CHALLENGE, ACCEPTED, REFUSED, LATER), (b"usmH", 1, 2, 3, 4));
    assert_eq!(answer(CHALLENGE, &[6; 32]), [&b"usmL\x01"[..], &[6; 32]].concat());
    assert_eq!(Refusal::Job.encode(), b"usmL\x03\x0banother job");
    let proof = mac(&Secret::new(b"token"), "dialer", &[b"hello", b"nonce"]);
    assert_eq!(job_hash("job")[..4], [94, 140, 153, 2]);
    assert_eq!(proof[..4], [67, 4, 22, 9]);
}

#[test]
fn a_recorded_proof_is_worth_nothing_later() {
    let mut wire = Wire::new("token", [1; 32], &|_, _| {});
    dial(&mut wire, &HELLO, &secret()).unwrap();
    let mut later = Listening::new([2; 32]);
    later.feed(&wire.recorded[0], &secret(), |_| Ok(()));
    let heard = later.feed(&wire.recorded[1], &secret(), |_| Ok(()));
    assert!(matches!(heard, Heard::Refused(Refusal::Token, _)));
}

#[test]
fn a_listener_without_the_token_is_found_out() {
    let mut answers = answer(CHALLENGE, &[1; 32]);
    answers.extend(answer(ACCEPTED, &[0; 32]));
    let mut stream = Answers(&answers);
    let error = dial(&mut stream, &HELLO, &secret()).unwrap_err();
    assert!(matches!(error, HandshakeError::Impostor));
}

#[test]
fn parts_do_not_run_into_each_other() {
    assert_ne!(mac(&secret(), "a", &[b"bc", b"d"]), mac(&secret(), "a", &[b"b", b"cd"]));
    assert_ne!(mac(&secret(), "ab", &[b"c"]), mac(&secret(), "a", &[b"bc"]));
    assert!(!verify(&secret(), "a", &[], &[]));
}

#[test]
fn every_refusal_fits_its_message() {
    let largest = Build { version: [u16::MAX; 3], sources: u64::MAX };
    let all = [
        Refusal::Token,
        Refusal::Version { theirs: u16::MAX },
        Refusal::World { theirs: u32::MAX, ours: u32::MAX },
        Refusal::Rank { from: u32::MAX, to: u32::MAX },
        Refusal::RankTaken {
            rank: u32::MAX,
            first: "process 4294967295 at ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255".into(),
            second: "process 4294967295".into(),
        },
        Refusal::Late {
            rank: u32::MAX,
            why: "the job has started, and whoever was this rank has left it",
        },
        Refusal::Build { from: u32::MAX, to: u32::MAX, theirs: largest, ours: largest },
    ];
    for refusal in all {
        assert!(refusal.to_string().len() <= REASON_BYTES_MAX, "{refusal}");
    }
}

#[test]
fn the_secret_is_not_printed() {
    assert_eq!(format!("{:?}", secret()), "Secret(..)");
}

/// A peer whose answers are already written.
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
    #[test]
    fn another_token_is_always_refused(token in "[a-z]{0,40}") {
        prop_assume!(token != "token");
        let mut wire = Wire::new(&token, [1; 32], &|_, _| {});
        prop_assert!(dial(&mut wire, &HELLO, &secret()).is_err());
        prop_assert!(matches!(wire.last, Heard::Refused(Refusal::Token, _)));
    }

    #[test]
    fn a_flipped_bit_is_always_refused(bit in 0..(HELLO_BYTES + MAC_BYTES) * 8) {
        let byte = bit / 8;
        let in_hello = byte < HELLO_BYTES;
        let (message, at) = if in_hello { (0, byte) } else { (1, byte - HELLO_BYTES) };
        let tamper = |n: usize, bytes: &mut Vec<u8>| {
            if n == message {
                bytes[at] ^= 1 << (bit % 8);
            }
        };
        let mut wire = Wire::new("token", [1; 32], &tamper);
        prop_assert!(dial(&mut wire, &HELLO, &secret()).is_err());
        prop_assert!(matches!(wire.last, Heard::Refused(..)));
    }

    #[test]
    fn hellos_survive_the_wire(
        from: u32, to: u32, world: u32, socket: u8, session: [u8; 16], job: [u8; 16],
        version: [u16; 3], sources: u64
    ) {
        let build = Build { version, sources };
        let purpose = Purpose::Control;
        let hello = Hello { purpose, socket, from, to, world, session, job, build };
        prop_assert_eq!(Hello::decode(&hello.encode(&[0; 32])), Ok(hello));
    }
}

fn taken() -> Refusal {
    let [first, second] = ["process 7 at 10.0.0.1", "process 8"].map(str::to_owned);
    Refusal::RankTaken { rank: 1, first, second }
}
