//! What must hold of a messenger, whatever the rank at the other end says.

use std::collections::BTreeSet;

use unisum_kernels::Dtype;
use unisum_link::fuzzing::Target;

use super::header::{Envelope, HEADER_BYTES, Header, Kind};
use super::peer::{CREDIT_BYTES, EAGER_BYTES, Next, Operation, Output, Peer};

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "messenger_header", check: check_header, seeds: header_seeds },
    Target { name: "messenger_peer", check: check_peer, seeds: peer_seeds },
];

/// A header that is accepted is the one that encodes to these bytes.
fn check_header(bytes: &[u8]) {
    if let Some(header) = Header::decode(bytes) {
        assert_eq!(header.encode(), bytes);
    }
}

fn header_seeds() -> Vec<Vec<u8>> {
    let header = Header { kind: Kind::Announce, envelope: envelope(3, 9), id: 1, consumed: 256 };
    assert_eq!(header.encode().len(), HEADER_BYTES);
    vec![header.encode()]
}

/// Whatever this rank does and the other one says, in any order: each operation ends once at most,
/// bytes are expected only for a receive that is open or a buffer within the credit, and buffers
/// never hold more than the credit. Each step has three bytes: what, which tag or number, and a
/// length.
fn check_peer(bytes: &[u8]) {
    let (mut peer, mut open) = (Peer::default(), Open::default());
    let mut next = Next::Header;
    for (operation, step) in bytes.chunks_exact(3).enumerate() {
        let envelope = envelope(u64::from(step[1] % 4), step[2]);
        // Of this rank's own memory there is not so much.
        let own = Envelope { bytes: envelope.bytes.min(1 << 47), ..envelope };
        let done = match step[0] % 8 {
            0 => {
                open.sends.insert(operation);
                peer.send(operation, own);
                Ok(())
            }
            1 => {
                open.receives.insert(operation);
                peer.receive(operation, own)
            }
            _ if next != Next::Header => {
                let buffer = match std::mem::replace(&mut next, Next::Header) {
                    Next::Buffer(bytes) => vec![0; bytes],
                    _ => Vec::new(),
                };
                peer.payload(buffer);
                Ok(())
            }
            what => peer.header(said(what, step, envelope)).map(|after| next = after),
        };
        match next {
            Next::Memory(operation) => assert!(open.receives.contains(&operation)),
            Next::Buffer(bytes) => assert!((1..=EAGER_BYTES).contains(&(bytes as u64))),
            Next::Header => {}
        }
        peer.outputs.drain(..).for_each(|output| open.end(output));
        if done.is_err() {
            return;
        }
    }
}

/// What the other rank may say: numbers that were told, or nearly.
fn said(what: u8, step: &[u8], envelope: Envelope) -> Header {
    let kinds = [Kind::Eager, Kind::Announce, Kind::Ask, Kind::Answer];
    let id = u64::from(step[1] >> 2 & 7);
    let consumed = match step[1] >> 5 {
        0..=5 => 0,
        6 => u64::from(step[2]) << 4,
        _ => u64::MAX - u64::from(step[2]),
    };
    Header { kind: kinds[usize::from(what) % 4], envelope, id, consumed }
}

/// Lengths on both sides of what goes unasked, and some that no memory holds.
fn envelope(tag: u64, length: u8) -> Envelope {
    let bytes = match length {
        0..=99 => u64::from(length),
        100..=199 => u64::from(length) << 6,
        200..=249 => CREDIT_BYTES + u64::from(length),
        _ => u64::MAX - u64::from(length),
    };
    Envelope { tag, dtype: Dtype::U8, bytes }
}

/// The operations that have not ended.
#[derive(Default)]
struct Open {
    sends: BTreeSet<Operation>,
    receives: BTreeSet<Operation>,
}

impl Open {
    fn end(&mut self, output: Output) {
        let has_ended = match output {
            Output::Header(_, None) => true,
            Output::Header(_, Some(operation)) | Output::Payload(operation) => {
                self.sends.remove(&operation)
            }
            Output::Deliver(_, operation) | Output::Done(operation) => {
                self.receives.remove(&operation)
            }
        };
        assert!(has_ended, "an operation ended twice");
    }
}

fn peer_seeds() -> Vec<Vec<u8>> {
    let eager = [[1, 0, 9], [4, 0, 9], [5, 0, 0], [0, 1, 9]];
    let early = [[4, 0, 9], [5, 0, 0], [1, 0, 9]];
    let asked = [[0, 0, 210], [6, 0, 210]];
    let announced = [[5, 0, 210], [1, 0, 210], [7, 0, 210], [2, 0, 0]];
    let tags = [[1, 0, 0], [4, 1, 0], [1, 1, 0], [4, 0, 0]];
    [&eager[..], &early, &asked, &announced, &tags].map(|steps| steps.concat()).to_vec()
}
