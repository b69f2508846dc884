//! One end whose peer says what it likes, in what pieces it likes: frames of the stream that it
//! should send, with any acknowledgement, and anything else; and first words that claim any
//! position on one connection after the other. The end must not panic nor hold more than a window;
//! it takes the bytes that came, each once and in order, until it says that they make no sense;
//! and what it sends begins, on each connection, where the peer claims to be.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};

use unisum_link::LinkError;
use unisum_link::frame::HEADER_BYTES;
use unisum_link::secure::{RECORD_OVERHEAD, Session};

use super::{End, READ_BYTES, Script, connection, meet, read, sessions, write};
use crate::resume::{FIRST_BYTES, First, HEAD_BYTES, HOLDS, Head, LEAVES, SEALED_BYTES};

const COMMANDS_MAX: usize = 200;
/// Of delivering what was said at the end.
const ROUNDS_MAX: usize = 1000;

const DRIVE: u8 = 0;
const KEEP: u8 = 2;
const SEND: u8 = 4;
const RECEIVE: u8 = 5;
const FRAME: u8 = 6;
const ANY: u8 = 8;
const CUT: u8 = 9;
const CONNECT: u8 = 10;
const DELIVER: u8 = 12;
const HEAR: u8 = 14;
const LEAVE: u8 = 15;
/// In a script's first byte: the end dials.
const DIALER: u8 = 0x80;

struct Scene {
    end: End,
    is_dialer: bool,
    is_sealed: bool,
    wire: Option<Wire>,
    /// The one before, of which the end may not have noticed the end.
    old: Option<Wire>,
    /// The stream, as it came in frames.
    came: Vec<u8>,
    /// Up to where the peer has heard the end's stream.
    heard: u64,
    stood: u32,
    /// Whether the end has said that something is wrong.
    has_failed: bool,
}

/// The peer's end of a connection.
struct Wire {
    /// Until it is cut.
    stream: Option<TcpStream>,
    session: Option<Box<Session>>,
    /// What the peer says, not encrypted, as far as it makes sense.
    said: Vec<u8>,
    said_frames: Frames,
    is_garbled: bool,
    /// What of it is to come.
    unsent: VecDeque<u8>,
    /// Up to where it has said the stream.
    position: usize,
    /// What the end says, encrypted and not.
    incoming: Vec<u8>,
    heard: Vec<u8>,
    heard_frames: Frames,
    stands: bool,
}

impl Wire {
    fn new(stream: TcpStream, session: Option<Box<Session>>, position: usize) -> Self {
        Self {
            stream: Some(stream),
            session,
            said: Vec::new(),
            said_frames: Frames::default(),
            is_garbled: false,
            unsent: VecDeque::new(),
            position,
            incoming: Vec::new(),
            heard: Vec::new(),
            heard_frames: Frames::default(),
            stands: false,
        }
    }

    /// Says this, where the connection is encrypted in a record.
    fn say(&mut self, head: &[u8], body: &[u8]) {
        match &mut self.session {
            Some(session) => {
                let mut record = vec![0; head.len() + body.len() + RECORD_OVERHEAD];
                session.sealer.seal(head, body, &mut record);
                self.unsent.extend(record);
            }
            None => self.unsent.extend(head.iter().chain(body)),
        }
        if !self.is_garbled {
            self.said.extend_from_slice(head);
            self.said.extend_from_slice(body);
        }
    }

    /// Reads what the end says.
    fn hear(&mut self) {
        let Some(stream) = &self.stream else { return };
        read(stream, &mut self.incoming, READ_BYTES);
        match &mut self.session {
            Some(session) => {
                let opened = session.open(&self.incoming, &mut self.heard);
                self.incoming.drain(..opened.expect("an end seals rightly"));
            }
            None => self.heard.append(&mut self.incoming),
        }
    }
}

/// Takes frames apart, as simply as that can be done.
struct Frames {
    at: usize,
    /// Bytes of the stream that are left of a frame.
    left: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self { at: FIRST_BYTES, left: 0 }
    }
}

impl Frames {
    /// The next head, or bytes of the stream, of what is there.
    fn next<'a>(&mut self, bytes: &'a [u8]) -> Option<(Option<Head>, &'a [u8])> {
        let rest = bytes.get(self.at..)?;
        if self.left == 0 {
            let head = Head::decode(rest.first_chunk()?);
            self.at += HEAD_BYTES;
            self.left = head.bytes;
            return Some((Some(head), &[]));
        }
        let body = &rest[..self.left.min(rest.len())];
        self.at += body.len();
        self.left -= body.len();
        (!body.is_empty()).then_some((None, body))
    }
}

/// Plays the script in clear text.
pub(super) fn check(bytes: &[u8]) {
    play(bytes, false);
}

/// Plays it on encrypted connections.
#[cfg(feature = "tls")]
pub(super) fn check_sealed(bytes: &[u8]) {
    play(bytes, true);
}

fn play(bytes: &[u8], is_sealed: bool) {
    let mut script = Script(bytes);
    let plan = script.byte();
    let is_dialer = plan & 0x80 != 0;
    let end = End::new(usize::from(is_dialer), plan & 0x7f);
    let (came, heard, stood) = (Vec::new(), 0, 0);
    let (wire, old, has_failed) = (None, None, false);
    let mut scene = Scene { end, is_dialer, is_sealed, wire, old, came, heard, stood, has_failed };
    for _ in 0..COMMANDS_MAX {
        let Some(command) = script.next() else { break };
        match command % 16 {
            0 | 1 => scene.drive(),
            2 | 3 => scene.keep(),
            4 => scene.post(script.byte(), End::post_send),
            5 => scene.post(script.byte(), End::post_receive),
            6 | 7 => scene.say_frame(&mut script),
            8 => scene.say_anything(&mut script),
            9 => scene.cut(),
            10 | 11 => scene.connect(&mut script),
            12 | 13 => scene.deliver(script.bytes()),
            14 => scene.hear(),
            _ => scene.leave(script.byte()),
        }
        scene.look();
    }
    scene.finish();
}

/// What an honest peer says on two connections, lies about positions, and heads of no frame.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    // A number of the next connection, and a position that fits.
    let met = [CONNECT, 0, 0, DELIVER, 2, 60, KEEP, HEAR];
    let posted = [SEND, 3, RECEIVE, 3, DRIVE, HEAR];
    let frame = |kind: u8, more: u8| [FRAME, 0, 0, kind, more, DELIVER, 7, 255, DRIVE, HEAR];
    let mut seeds = Vec::new();
    for plan in [0, 1, 2, DIALER, DIALER | 2] {
        let again = [&[CUT, DRIVE, KEEP][..], &met, &frame(2, 90), &frame(7, 60)].concat();
        let seed = [&[plan][..], &met, &posted, &frame(2, 48), &frame(3, 0), &again, &again];
        seeds.push(seed.concat());
    }
    // Each position on the second connection, and each acknowledgement.
    for claim in if cfg!(fuzzing) { 1..8 } else { 3..6 } {
        let again = [CUT, DRIVE, KEEP, CONNECT, 0, claim, DELIVER, 2, 60, KEEP, HEAR];
        let said = [FRAME, 0, claim, 2, 90, DELIVER, 7, 255, DRIVE];
        seeds.push([&[2][..], &met, &posted, &frame(2, 77), &again, &said].concat());
        seeds.push([&[0][..], &met, &posted, &said].concat());
    }
    // A frame of the largest size that a head can name, and first words that are none.
    let head = [&[ANY, 12, 255, 255, 255, 63][..], &[0; 8], &[DELIVER, 7, 255, DRIVE]].concat();
    seeds.push([&[1][..], &met, &posted, &head, &frame(2, 200)].concat());
    seeds.push([&[1][..], &[CONNECT, 7, 0, ANY, 16], &[7; 16], &[DELIVER, 2, 60, KEEP]].concat());
    // The peer leaves and is answered; then the end leaves.
    let leaving = [FRAME, 1, 5, 0, 0, DELIVER, 2, 60, KEEP, HEAR, LEAVE, 1, KEEP, HEAR, LEAVE, 2];
    seeds.push([&[0][..], &met, &posted, &frame(2, 48), &leaving, &[KEEP, DRIVE]].concat());
    seeds
}

/// Some of them: each connection takes a handshake.
#[cfg(feature = "tls")]
pub(super) fn sealed_seeds() -> Vec<Vec<u8>> {
    let all = seeds();
    [0, 3, 5, 8].map(|seed| all[seed].clone()).into_iter().chain(all.last().cloned()).collect()
}

impl Scene {
    fn drive(&mut self) {
        let driven = self.end.drive();
        self.may_fail(driven);
    }

    fn keep(&mut self) {
        let kept = self.end.keep();
        self.may_fail(kept);
    }

    fn post(&mut self, more: u8, post: fn(&mut End)) {
        if !self.has_failed {
            (0..=more % 4).for_each(|_| post(&mut self.end));
        }
    }

    /// Ends the connections; what the end has said is not lost for this look at it.
    fn cut(&mut self) {
        self.old = None;
        if let Some(wire) = &mut self.wire {
            wire.hear();
            wire.stream = None;
        }
    }

    /// Whatever is wrong, it is the peer's.
    fn may_fail(&mut self, result: Result<(), LinkError>) {
        if let Err(error) = result {
            assert_eq!(error.peer, self.end.socket.peer, "{error}");
            self.has_failed = true;
            self.end.socket.clear();
        }
    }

    /// Says the next bytes of the stream, and any acknowledgement.
    fn say_frame(&mut self, script: &mut Script<'_>) {
        let (flags, choice, bytes) = (script.byte(), script.byte(), script.bytes());
        let acknowledged = self.position(choice);
        let Some(wire) = &mut self.wire else { return };
        let stream = self.end.receives.stream;
        let most = if self.is_sealed { SEALED_BYTES } else { stream.bytes.len() };
        let rest = &stream.bytes[wire.position..];
        let body = &rest[..bytes.min(rest.len()).min(most)];
        wire.position += body.len();
        let flags = u32::from(flags % 4).reverse_bits() & (LEAVES | HOLDS);
        wire.say(&Head { flags, bytes: body.len(), acknowledged }.encode(), body);
    }

    /// Says any bytes; on an encrypted connection in a record, or not.
    fn say_anything(&mut self, script: &mut Script<'_>) {
        let count = script.byte();
        let bytes = script.take(usize::from(count % 64));
        let Some(wire) = &mut self.wire else { return };
        let is_sealed = wire.session.is_some();
        let is_frame = bytes
            .split_first_chunk()
            .is_some_and(|(head, body)| Head::decode(head).bytes == body.len());
        // What follows a record that is none is not to be understood, but nothing is nothing.
        let is_record = count & 64 == 0 || bytes.is_empty();
        wire.is_garbled |= is_sealed && !(is_record && (is_frame || wire.said.is_empty()));
        if is_sealed && !is_record {
            wire.unsent.extend(bytes);
        } else {
            wire.say(bytes, &[]);
        }
    }

    /// A position in what the end sends: true, or not.
    fn position(&self, choice: u8) -> u64 {
        let flow = self.end.handle.lock();
        match choice % 8 {
            0 => self.heard,
            1 => flow.acknowledged,
            2 => flow.sent,
            3 => flow.promised,
            4 => flow.promised + 1,
            5 => flow.acknowledged.midpoint(flow.promised),
            6 => flow.acknowledged.wrapping_sub(1),
            _ => u64::from(choice >> 3) << 30,
        }
    }

    /// Connects anew: a dialer only where it knows that it has no connection.
    fn connect(&mut self, script: &mut Script<'_>) {
        let (choice, claim) = (script.byte(), script.byte());
        let received = self.position(claim);
        let mut flow = self.end.handle.lock();
        let is_missing = flow.stream().is_none() && flow.meeting.is_none();
        if flow.is_failed() || self.is_dialer && !is_missing {
            return;
        }
        flow.attempt += u32::from(self.is_dialer && flow.attempt < u32::MAX);
        let next = flow.attempt.saturating_add(u32::from(!self.is_dialer));
        let [own, theirs] = sessions(self.is_sealed, self.is_dialer);
        let [stream, wire] = connection();
        let number = self.is_dialer.then_some(flow.attempt);
        meet(&mut flow, stream, own, number);
        let position = (flow.received as usize).min(self.end.receives.stream.bytes.len());
        drop(flow);
        self.old = self.wire.replace(Wire::new(wire, theirs, position));
        let attempt = match choice % 8 {
            0..4 => next,
            4 => next.wrapping_sub(1),
            5 => u32::MAX,
            6 => next.wrapping_add(u32::from(choice)),
            // Something else will be said.
            _ => return,
        };
        self.wire.as_mut().expect("it was made").say(&First { attempt, received }.encode(), &[]);
    }

    /// Lets so many bytes come that were said.
    fn deliver(&mut self, bytes: usize) {
        let Some(wire) = &mut self.wire else { return };
        let (held, _) = wire.unsent.as_slices();
        let most = bytes.min(held.len());
        // Where it was cut, nothing comes any more.
        let written = wire.stream.as_ref().map_or(most, |to| write(to, &held[..most]));
        wire.unsent.drain(..written);
    }

    /// Leaves, or ends one direction.
    fn leave(&mut self, how: u8) {
        let stream = self.wire.as_ref().and_then(|wire| wire.stream.as_ref());
        match (how % 4, stream) {
            // It may have ended already.
            (0, Some(stream)) => drop(stream.shutdown(Shutdown::Write)),
            (1 | 2, _) => {
                let mut flow = self.end.handle.lock();
                flow.leave();
                if how % 4 == 2 {
                    flow.end_sending();
                }
            }
            _ => {}
        }
    }

    /// What holds after each command.
    fn look(&mut self) {
        self.end.check_bounds();
        let finished = self.end.finished();
        let stood = self.end.handle.lock().stood();
        if stood != self.stood {
            self.stood = stood;
            self.stands();
        }
        self.take_apart();
        if self.has_failed {
            return;
        }
        self.end.check_stash(&self.came);
        for message in finished {
            let places = &self.end.receives.stream.places;
            let payload = &self.came[places[message] + HEADER_BYTES..places[message + 1]];
            assert!(self.end.receives.memory[message] == payload, "message {message}");
        }
    }

    /// A connection stands: it goes on from where both said that they are.
    fn stands(&mut self) {
        let wire = self.wire.as_mut().expect("there was a connection");
        wire.hear();
        let first = |said: &[u8]| said.first_chunk().and_then(First::decode);
        let (theirs, own) = (first(&wire.said), first(&wire.heard));
        let (Some(theirs), Some(own)) = (theirs, own) else { panic!("it stands unsaid") };
        assert_eq!(theirs.attempt, own.attempt);
        // Of what came behind something wrong nothing is known.
        let has_come = own.received <= self.came.len() as u64;
        assert!(has_come || self.has_failed, "it says that it has more than came");
        self.came.truncate(own.received as usize);
        self.heard = theirs.received;
        wire.stands = true;
    }

    /// Takes what was said so far apart.
    fn take_apart(&mut self) {
        if let Some(wire) = self.wire.as_mut().filter(|wire| wire.stands) {
            while let Some((_, body)) = wire.said_frames.next(&wire.said) {
                self.came.extend_from_slice(body);
            }
        }
    }

    /// Reads what the end has sent, and looks whether it is what it should send.
    fn hear(&mut self) {
        let Some(wire) = &mut self.wire else { return };
        wire.hear();
        if !wire.stands {
            return;
        }
        let (flow, sends) = (self.end.handle.lock(), &self.end.sends);
        while let Some((head, body)) = wire.heard_frames.next(&wire.heard) {
            if let Some(head) = head {
                let is_held = head.flags & HOLDS != 0;
                let most = if is_held || self.has_failed { flow.received } else { flow.taken };
                assert!(head.acknowledged <= most, "{head:?}");
                assert!(head.flags & LEAVES == 0 || flow.leaves && head.bytes == 0, "{head:?}");
            }
            let sent = &sends.stream.bytes[self.heard as usize..][..body.len()];
            assert!(body == sent, "what is sent from byte {} on", self.heard);
            self.heard += body.len() as u64;
        }
        assert!(self.heard <= sends.bytes());
    }

    /// Has all come that was said.
    fn finish(&mut self) {
        // What follows all that came, its end perhaps, is read the next time.
        let mut rounds_left = 3;
        for round in 0.. {
            assert!(round < ROUNDS_MAX, "it does not read what came");
            self.deliver(usize::MAX);
            if self.wire.as_ref().is_none_or(|wire| wire.unsent.is_empty()) {
                rounds_left -= 1;
            }
            self.keep();
            self.look();
            self.hear();
            let flow = self.end.handle.lock();
            let is_over = flow.stream().is_none() && flow.meeting.is_none();
            if rounds_left == 0 || is_over || self.has_failed {
                break;
            }
        }
        if self.has_failed {
            return;
        }
        let flow = self.end.handle.lock();
        // Nobody hears what is said behind an end.
        let is_heard = flow.meeting.is_none() && !flow.peer_ended;
        let stands = flow.stream().is_some() && is_heard;
        let newest = self.wire.as_ref().filter(|wire| stands && wire.stands && !wire.is_garbled);
        if newest.is_some() {
            assert_eq!(flow.received, self.came.len() as u64, "some of what came was left");
        }
    }
}
