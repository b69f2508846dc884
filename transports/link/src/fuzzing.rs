//! Fuzz targets: what must hold of every parser of bytes or text from outside, whatever it is
//! given. Each crate has a table of them, for this crate [`targets`]; `fuzz/` runs them all with a
//! fuzzer, and each crate's tests run its own on random input.

#[cfg(all(feature = "tls", any(test, fuzzing)))]
mod encrypted;

use std::io::{self, Read, Write};

use crate::Call;
use crate::frame::{HEADER_BYTES, Header};
use crate::handshake::{Build, HandshakeError, Heard, Hello, Listening, Purpose, Refusal, Secret};
use crate::handshake::{dial, mac};
use unisum_kernels::{Dtype, ReduceOp};

/// One parser under test.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, a word that no other target has.
    pub name: &'static str,
    /// Gives the parser any input, and panics if what must hold does not.
    pub check: fn(&[u8]),
    /// Inputs that the parser accepts, or nearly: where a search starts.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// Checks `bytes` as they are, and every seed with the changes that they describe.
    ///
    /// # Panics
    /// If what must hold does not.
    pub fn attack(&self, bytes: &[u8]) {
        (self.check)(bytes);
        for seed in (self.seeds)() {
            (self.check)(&seed);
            (self.check)(&edit(seed, bytes));
        }
    }
}

/// Applies edits of four bytes each: what to do, where (two bytes), and with which byte.
fn edit(mut seed: Vec<u8>, edits: &[u8]) -> Vec<u8> {
    for edit in edits.chunks_exact(4).take(EDITS_MAX) {
        let at = usize::from(u16::from_le_bytes([edit[1], edit[2]])) % (seed.len() + 1);
        match edit[0] % 8 {
            0 => seed.truncate(at),
            1 => seed.insert(at, edit[3]),
            2 => drop(seed.drain(at..(at + 1).min(seed.len()))),
            3 => seed.extend_from_within(at..),
            kind => {
                let Some(byte) = seed.get_mut(at) else { continue };
                *byte = if kind == 4 { *byte ^ 1 << (edit[3] % 8) } else { edit[3] };
            }
        }
    }
    seed
}

/// The targets of this crate.
pub fn targets() -> Vec<Target> {
    #[cfg(all(feature = "tls", any(test, fuzzing)))]
    return [TARGETS, encrypted::TARGETS].concat();
    #[cfg(not(all(feature = "tls", any(test, fuzzing))))]
    TARGETS.to_vec()
}

const TARGETS: &[Target] = &[
    Target { name: "header", check: check_header, seeds: header_seeds },
    Target { name: "listening", check: check_listening, seeds: listening_seeds },
    Target { name: "proof", check: check_proof, seeds: proof_seeds },
    Target { name: "dialing", check: check_dialing, seeds: dialing_seeds },
    Target { name: "names", check: check_names, seeds: name_seeds },
];

/// A header that is accepted is the one that encodes to these bytes.
fn check_header(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else { return };
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(&header.encode(), bytes);
    }
}

fn header_seeds() -> Vec<Vec<u8>> {
    let call = Call { algorithm: 3, ..Call::all_reduce(7, Dtype::F32, 1 << 20) };
    vec![Header { marked: false, bytes: 4096, call }.encode().to_vec()]
}

/// Whatever a stranger says, in whatever pieces (their length comes first), it is heard alike, is
/// told one challenge at most, and never gets in.
fn check_listening(bytes: &[u8]) {
    let Some((&piece, said)) = bytes.split_first() else { return };
    let whole = listen(said.chunks(said.len().max(1)));
    let pieces = listen(said.chunks(usize::from(piece).max(1)));
    // All at once, a hello with something behind it is refused before its challenge.
    if said.len() <= HELLO_BYTES {
        assert_eq!(whole, pieces);
    }
    assert!(whole.challenges <= 1 && pieces.challenges <= 1);
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    challenges: usize,
    refusal: Option<Refusal>,
}

fn listen<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Told {
    let (mut listening, mut told) = (Listening::new(NONCE), Told::default());
    let stranger = |_: &Hello| panic!("asked for somebody who has proven nothing");
    for piece in pieces {
        match listening.feed(piece, &secret(), stranger) {
            Heard::More => assert_eq!(told.refusal, None),
            Heard::Send(challenge) => {
                assert_eq!(challenge.len(), ANSWER_BYTES);
                told.challenges += 1;
            }
            Heard::Admitted(hello, _) => panic!("a stranger came in: {hello:?}"),
            Heard::Refused(refusal, answer) => {
                assert_eq!(answer.is_empty(), refusal == Refusal::Garbage);
                assert!(told.refusal.is_none() || refusal == Refusal::Garbage);
                told.refusal.get_or_insert(refusal);
            }
        }
    }
    told
}

/// A hello of any content gets in with its exact proof, and with no other.
fn check_proof(bytes: &[u8]) {
    let Some((body, rest)) = bytes.split_first_chunk::<HELLO_BODY_BYTES>() else { return };
    let Some(tamper) = rest.first_chunk::<32>() else { return };
    let mut listening = Listening::new(NONCE);
    let hello = [DIALER_HEAD, body].concat();
    let heard = listening.feed(&hello, &secret(), |_| Ok(()));
    let is_known = Purpose::from_wire(body[0]).is_some();
    assert_eq!(matches!(heard, Heard::Send(_)), is_known, "{heard:?}");
    if !is_known {
        return;
    }
    let mut proof = mac(&secret(), "dialer", &[&hello, &NONCE]);
    proof.iter_mut().zip(tamper).for_each(|(byte, change)| *byte ^= change);
    let honest = *tamper == [0; 32];
    match listening.feed(&proof, &secret(), |_| Ok(())) {
        Heard::Admitted(..) => assert!(honest),
        heard => assert!(!honest, "{heard:?}"),
    }
    let after = listening.feed(&proof, &secret(), |_| Ok(()));
    assert_eq!(after, Heard::Refused(Refusal::Garbage, Vec::new()));
}

fn proof_seeds() -> Vec<Vec<u8>> {
    let body = [1; HELLO_BODY_BYTES];
    [[0; 32], [4; 32]].map(|tamper| [&body[..], &tamper].concat()).to_vec()
}

fn listening_seeds() -> Vec<Vec<u8>> {
    let hello = [DIALER_HEAD, &[1; HELLO_BODY_BYTES]].concat();
    let proof = [&hello[..], &[0; 32]].concat();
    vec![[&[7], &hello[..]].concat(), [&[98], &proof[..]].concat()]
}

/// Whatever answers, a dialer is never satisfied without the proof, reads no more than the
/// protocol has, and shows nothing that a terminal would obey.
fn check_dialing(bytes: &[u8]) {
    let hello = Hello {
        purpose: Purpose::Data,
        socket: 0,
        from: 1,
        to: 0,
        world: 2,
        session: [1; 16],
        job: [2; 16],
        build: Build::default(),
    };
    let mut stream = Answers(bytes);
    match dial(&mut stream, &hello, &secret()) {
        Ok(()) => panic!("an impostor was believed"),
        Err(HandshakeError::Refused(why) | HandshakeError::Later(why)) => {
            assert!(!why.contains(char::is_control))
        }
        Err(_) => {}
    }
    assert!(bytes.len() - stream.0.len() <= ANSWER_BYTES + 6 + usize::from(u8::MAX));
}

fn dialing_seeds() -> Vec<Vec<u8>> {
    let challenge = [LISTENER, &[1], &[9; 32]].concat();
    let accepted = [&challenge[..], LISTENER, &[2], &[9; 32]].concat();
    let refused = [&challenge[..], &Refusal::Session.encode()].concat();
    vec![accepted, refused, Refusal::Version { theirs: 2 }.encode()]
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

/// A name that is known is printed as one that means the same.
fn check_names(bytes: &[u8]) {
    let name = String::from_utf8_lossy(bytes);
    if let Ok(dtype) = name.parse::<Dtype>() {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
    }
    if let Ok(op) = name.parse::<ReduceOp>() {
        assert_eq!(op.to_string().parse(), Ok(op));
    }
}

fn name_seeds() -> Vec<Vec<u8>> {
    ["f32", "bfloat16", "sum", "Average"].map(Vec::from).to_vec()
}

fn secret() -> Secret {
    Secret::new(b"the token of the fuzz targets")
}

/// More edits leave nothing of a seed.
const EDITS_MAX: usize = 16;
const NONCE: [u8; 32] = [5; 32];
/// What a hello begins with: magic and version.
const DIALER_HEAD: &[u8] = b"usmH\x03\x00";
const HELLO_BODY_BYTES: usize = HELLO_BYTES - DIALER_HEAD.len();
const HELLO_BYTES: usize = 98;
const LISTENER: &[u8] = b"usmL";
/// A challenge or an acceptance.
const ANSWER_BYTES: usize = 37;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_breaks_a_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            super::targets().iter().for_each(|target| target.attack(&bytes));
        }
    }
}
