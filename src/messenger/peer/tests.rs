use proptest::prelude::*;
use unisum_kernels::Dtype;

use super::*;

/// The two ends of a wire that keeps the order; each operation's memory is its message's number,
/// as often as the message is long.
#[derive(Default)]
struct Pair {
    ends: [Peer; 2],
    wires: [VecDeque<Item>; 2],
    /// What comes next at each end.
    next: [Option<Next>; 2],
    /// By operation: the message's number that a receive got, or of a send that it went.
    ended: HashMap<Operation, u64>,
}

enum Item {
    Header(Header),
    Payload(Vec<u8>),
}

fn envelope(tag: u64, bytes: usize) -> Envelope {
    Envelope { tag, dtype: Dtype::U8, bytes: bytes as u64 }
}

fn contents(message: u64, bytes: usize) -> Vec<u8> {
    vec![message as u8; bytes]
}

impl Pair {
    /// Puts on the wire what an end wants out. Operations are `2 * message`, plus 1 of a receive.
    fn work_off(&mut self, end: usize, lengths: &[usize]) {
        while let Some(output) = self.ends[end].outputs.pop_front() {
            match output {
                Output::Header(header, ends) => {
                    self.wires[end].push_back(Item::Header(header));
                    ends.map(|operation| self.ended.insert(operation, operation as u64 / 2));
                }
                Output::Payload(operation) => {
                    let message = contents(operation as u64 / 2, lengths[operation / 2]);
                    self.wires[end].push_back(Item::Payload(message));
                    self.ended.insert(operation, operation as u64 / 2);
                }
                Output::Deliver(buffer, operation) => self.got(operation, &buffer, lengths),
                Output::Done(operation) => {
                    self.ended.entry(operation).or_insert(operation as u64 / 2);
                }
            }
        }
    }

    fn got(&mut self, operation: Operation, message: &[u8], lengths: &[usize]) {
        let number = operation as u64 / 2;
        assert_eq!(message, contents(number, lengths[operation / 2]), "message {number}");
        self.ended.insert(operation, number);
    }

    /// Moves one item to `end`, if there is one.
    fn deliver(&mut self, end: usize, lengths: &[usize]) -> bool {
        match self.wires[1 - end].pop_front() {
            None => return false,
            Some(Item::Header(header)) => {
                let header = Header::decode(&header.encode()).unwrap();
                self.next[end] = Some(self.ends[end].header(header).unwrap());
            }
            Some(Item::Payload(message)) => {
                let mut buffer = Vec::new();
                match self.next[end].take().unwrap() {
                    Next::Memory(operation) => self.got(operation, &message, lengths),
                    Next::Buffer(bytes) => {
                        assert_eq!(bytes, message.len());
                        buffer = message;
                    }
                    Next::Header => panic!("bytes where a header was due"),
                }
                self.ends[end].payload(buffer);
            }
        }
        self.work_off(end, lengths);
        true
    }

    fn buffered(&self, end: usize) -> usize {
        let bytes = |early: &Early| match early {
            Early::Whole(_, buffer) => buffer.len(),
            Early::Announced(..) => 0,
        };
        self.ends[end].early.values().flatten().map(bytes).sum()
    }
}

const LENGTHS: [usize; 6] = [0, 1, 700, 8 << 10, (8 << 10) + 1, 50_000];

proptest! {
    /// Messages in both directions; receives posted in an order that only keeps that of each tag,
    /// while the wire moves at its own pace.
    #[test]
    fn every_message_finds_its_receive_whatever_the_order(
        messages in proptest::collection::vec((0..2_usize, 0..4_u64, 0..LENGTHS.len()), 0..120),
        seed: u64,
    ) {
        let lengths: Vec<usize> = messages.iter().map(|&(_, _, length)| LENGTHS[length]).collect();
        let mut state = seed;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let mut pair = Pair::default();
        let mut sends: VecDeque<usize> = (0..messages.len()).collect();
        let mut receives: Vec<usize> = (0..messages.len()).collect();
        while !(sends.is_empty() && receives.is_empty()) || pair.wires.iter().any(|w| !w.is_empty())
        {
            match random(4) {
                0 if !sends.is_empty() => {
                    let message = sends.pop_front().unwrap();
                    let (end, tag, _) = messages[message];
                    pair.ends[end].send(2 * message, envelope(tag, lengths[message]));
                    pair.work_off(end, &lengths);
                }
                1 if !receives.is_empty() => {
                    let drawn = messages[receives[random(receives.len())]];
                    let alike = |&message: &usize| {
                        (messages[message].0, messages[message].1) == (drawn.0, drawn.1)
                    };
                    let at = receives.iter().position(alike).unwrap();
                    let message = receives.remove(at);
                    let (end, tag, _) = messages[message];
                    let ours = envelope(tag, lengths[message]);
                    pair.ends[1 - end].receive(2 * message + 1, ours).unwrap();
                    pair.work_off(1 - end, &lengths);
                }
                which => {
                    pair.deliver(which % 2, &lengths);
                }
            }
            for end in 0..2 {
                prop_assert!(pair.buffered(end) as u64 <= CREDIT_BYTES);
            }
        }
        prop_assert_eq!(pair.ended.len(), 2 * messages.len());
    }

    /// Whatever a peer says, it is refused or makes sense: nothing panics.
    #[test]
    fn any_headers_are_taken_or_refused(
        headers in proptest::collection::vec((1..5_u8, 0..3_u64, any::<u64>(), 0..4_u64), 0..40),
    ) {
        let mut peer = Peer::default();
        peer.send(0, envelope(1, 100_000));
        peer.receive(1, envelope(2, 5)).unwrap();
        for (kind, tag, bytes, id) in headers {
            let kind = [Kind::Eager, Kind::Announce, Kind::Ask, Kind::Answer][kind as usize - 1];
            let envelope = Envelope { tag, dtype: Dtype::U8, bytes: bytes >> (id * 21) };
            match peer.header(Header { kind, envelope, id, consumed: 0 }) {
                Ok(Next::Header) => {}
                Ok(Next::Memory(_)) => peer.payload(Vec::new()),
                Ok(Next::Buffer(bytes)) => peer.payload(vec![0; bytes]),
                Err(_) => return Ok(()),
            }
        }
    }
}

#[test]
fn a_flood_is_buffered_up_to_the_credit_and_announced_beyond() {
    let mut pair = Pair::default();
    let lengths = [8 << 10; 100];
    for message in 0..100 {
        pair.ends[0].send(2 * message, envelope(0, 8 << 10));
    }
    pair.work_off(0, &lengths);
    while pair.deliver(1, &lengths) {}
    let unasked = pair.ended.len();
    assert_eq!(unasked as u64, CREDIT_BYTES / ((8 << 10) + OVERHEAD_BYTES));
    assert_eq!(pair.buffered(1), unasked * (8 << 10));
    for message in 0..100 {
        pair.ends[1].receive(2 * message + 1, envelope(0, 8 << 10)).unwrap();
        pair.work_off(1, &lengths);
    }
    while pair.deliver(0, &lengths) | pair.deliver(1, &lengths) {}
    assert_eq!((pair.ended.len(), pair.buffered(1)), (200, 0));
    // What was freed came back with the questions.
    pair.ends[0].send(0, envelope(0, 8 << 10));
    assert!(
        matches!(&pair.ends[0].outputs[0], Output::Header(header, _) if header.kind == Kind::Eager)
    );
}

#[test]
fn ends_that_differ_are_told_apart_early_and_late() {
    let (ours, theirs) = (envelope(7, 8), Envelope { dtype: Dtype::F32, ..envelope(7, 8) });
    let fault = Err(Fault::Mismatch { ours, theirs });
    for kind in [Kind::Eager, Kind::Announce] {
        let header = Header { kind, envelope: theirs, id: 0, consumed: 0 };
        let mut waiting = Peer::default();
        waiting.receive(0, ours).unwrap();
        assert_eq!(waiting.header(header).map(|_| ()), fault);
        let mut late = Peer::default();
        if let Next::Buffer(bytes) = late.header(header).unwrap() {
            late.payload(vec![0; bytes]);
        }
        assert_eq!(late.receive(0, ours), fault);
    }
}
