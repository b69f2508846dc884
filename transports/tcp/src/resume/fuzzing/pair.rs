//! Two ends that do as they should, and between them a network that passes on what it likes, and
//! when; cuts what is under way; and lets them meet anew. Whatever it does, each end has what the
//! other one sent, once and in order, as soon as it lets them.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};

use rustix::event::{PollFd, PollFlags, poll};
use unisum_link::LinkError;

use super::{End, Script, connection, meet, read, write};

const COMMANDS_MAX: usize = 200;
/// Of settling: more than what is there takes.
const ROUNDS_MAX: usize = 2000;

/// Commands to rank 0; with `OF_1`, to rank 1.
const DRIVE: u8 = 0;
const KEEP: u8 = 3;
const CARRY: u8 = 5;
const SEND: u8 = 8;
const RECEIVE: u8 = 10;
const CUT: u8 = 12;
const CONNECT: u8 = 13;
const LEAVE: u8 = 15;
const OF_1: u8 = 0x80;

struct Scene {
    ends: [End; 2],
    /// Whether it says no more than that it leaves.
    leaves: [bool; 2],
    wires: Option<[Wire; 2]>,
    /// Connections before, of which an end may not have noticed the end.
    old: Vec<TcpStream>,
}

/// The network's side of one end's connection.
struct Wire {
    stream: TcpStream,
    /// What the end has sent and the other one has not.
    held: VecDeque<u8>,
    has_ended: bool,
}

/// Plays the script.
pub(super) fn check(bytes: &[u8]) {
    let mut script = Script(bytes);
    let plan = script.byte();
    let ends = [0, 1].map(|rank| End::new(rank, plan));
    let mut scene = Scene { ends, leaves: [false; 2], wires: None, old: Vec::new() };
    for _ in 0..COMMANDS_MAX {
        let Some(command) = script.next() else { break };
        let end = usize::from(command >> 7);
        match command % 16 {
            0..3 => scene.drive(end),
            3 | 4 => scene.keep(end),
            5..8 => scene.carry(end, script.bytes()),
            8 | 9 => (0..=script.byte() % 4).for_each(|_| scene.post_send(end)),
            10 | 11 => (0..=script.byte() % 4).for_each(|_| scene.post_receive(end)),
            12 => scene.cut(),
            13 | 14 => scene.connect(),
            _ => scene.leave(end),
        }
        scene.look();
    }
    scene.settle();
}

/// Cuts at places of each kind, both ways, and leavings.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    const MET: &[u8] =
        &[CONNECT, CARRY | OF_1, 2, 16, KEEP, CARRY, 2, 16, KEEP | OF_1, DRIVE, DRIVE | OF_1];
    let all_sent = &[SEND, 3, SEND | OF_1, 3, RECEIVE, 3, RECEIVE | OF_1, 3];
    let moved = |bytes: [u8; 2]| {
        let carry = [CARRY, bytes[0], bytes[1], CARRY | OF_1, bytes[0], bytes[1]];
        [&[DRIVE, DRIVE | OF_1], &carry[..], &[DRIVE, DRIVE | OF_1]].concat()
    };
    let mut seeds = Vec::new();
    // Much at once only where there is time.
    for plan in 0..if cfg!(fuzzing) { 4 } else { 2 } {
        for bytes in [[0, 5], [1, 0], [3, 77], [4, 130], [7, 3]] {
            let moved = moved(bytes);
            let again = [&moved[..], &[CUT, DRIVE, DRIVE | OF_1], MET, &moved, &moved].concat();
            seeds.push([&[plan][..], all_sent, MET, &again, &again].concat());
        }
        // What nobody has asked for yet, and both leave.
        let unasked = [SEND, 3, DRIVE, CARRY, 7, 255, KEEP | OF_1, CARRY | OF_1, 2, 40, DRIVE];
        let leaving = [LEAVE, CARRY, 7, 255, KEEP | OF_1, CUT];
        seeds.push([&[plan][..], MET, &unasked, &leaving, MET, &[LEAVE | OF_1]].concat());
        // A new connection while the old one stands, for one end.
        seeds.push([&[plan][..], all_sent, MET, &[DRIVE, CUT, DRIVE | OF_1], MET].concat());
    }
    seeds
}

impl Scene {
    fn post_send(&mut self, end: usize) {
        if !self.leaves[end] {
            self.ends[end].post_send();
        }
    }

    fn post_receive(&mut self, end: usize) {
        if !self.leaves[end] {
            self.ends[end].post_receive();
        }
    }

    fn drive(&mut self, end: usize) {
        if !self.leaves[end] {
            let driven = self.ends[end].drive();
            self.expect(end, driven);
        }
    }

    fn keep(&mut self, end: usize) {
        let kept = self.ends[end].keep();
        self.expect(end, kept);
    }

    /// An end fails only if the other one has left, and then with nothing lost.
    fn expect(&self, end: usize, result: Result<(), LinkError>) {
        let Err(error) = result else { return };
        assert!(self.leaves[1 - end], "rank {end}: {error}");
        self.check_all_came(end);
    }

    /// Whether an end has all that the other one sent, before that left.
    fn check_all_came(&self, end: usize) {
        let sent = self.ends[1 - end].sends.bytes();
        assert_eq!(self.ends[end].handle.lock().received, sent, "to rank {end}");
    }

    /// What holds after each command.
    fn look(&mut self) {
        for end in &mut self.ends {
            for message in end.finished() {
                let is_right = end.receives.memory[message] == end.receives.stream.payload(message);
                assert!(is_right, "message {message}");
            }
            end.check_bounds();
        }
        // No more is received than was sent, and it is that.
        for (end, other) in [(0, 1), (1, 0)] {
            let sent = self.ends[other].sends.bytes() as usize;
            let stream = self.ends[end].receives.stream;
            self.ends[end].check_stash(&stream.bytes[..sent]);
        }
    }

    /// Passes on so many bytes that an end has sent.
    fn carry(&mut self, from: usize, bytes: usize) {
        let Some(wires) = &mut self.wires else { return };
        let [one, two] = wires;
        let (from, to) = if from == 0 { (one, two) } else { (two, one) };
        let room = bytes.saturating_sub(from.held.len());
        from.has_ended |= read(&from.stream, &mut from.held, room);
        let (first, second) = from.held.as_slices();
        let most = bytes.min(first.len());
        let mut written = write(&to.stream, &first[..most]);
        if written == first.len() {
            written += write(&to.stream, &second[..second.len().min(bytes - written)]);
        }
        from.held.drain(..written);
        if from.has_ended && from.held.is_empty() {
            // It may have been told before.
            let _ = to.stream.shutdown(Shutdown::Write);
        }
    }

    /// What is under way is lost.
    fn cut(&mut self) {
        (self.wires, self.old) = (None, Vec::new());
    }

    /// Rank 1 dials, if it knows that it has no connection.
    fn connect(&mut self) {
        let [listener, dialer] = &mut self.ends;
        let mut flow = dialer.handle.lock();
        if flow.stream().is_some() || flow.meeting.is_some() || flow.is_failed() {
            return;
        }
        // What rank 0 has read of the one before comes, and its end may come later.
        self.old = self.wires.take().into_iter().flatten().map(|wire| wire.stream).collect();
        let [to_listener, to_dialer] = [connection(), connection()];
        let [(own, one), (other, two)] = [to_dialer, to_listener].map(|[own, wire]| (own, wire));
        flow.attempt += 1;
        let attempt = flow.attempt;
        meet(&mut flow, own, None, Some(attempt));
        let mut listening = listener.handle.lock();
        if !listening.is_failed() {
            meet(&mut listening, other, None, None);
        }
        let wire = |stream| Wire { stream, held: VecDeque::new(), has_ended: false };
        self.wires = Some([wire(two), wire(one)]);
    }

    /// An end whose calls are done says that it leaves, and soon that it has said so.
    fn leave(&mut self, end: usize) {
        let leaving = &self.ends[end];
        let is_done = leaving.sends.is_done() && leaving.receives.is_done();
        if is_done {
            let mut flow = leaving.handle.lock();
            flow.leave();
            flow.end_sending();
            drop(flow);
            self.leaves[end] = true;
            self.keep(end);
        }
    }

    /// Whether something has happened that wakes the keeper of an end.
    fn is_woken(&self, end: usize) -> bool {
        let flow = self.ends[end].handle.lock();
        let Some(stream) = flow.stream() else { return flow.meeting.is_some() };
        let mut polled = [PollFd::new(&***stream, PollFlags::RDHUP)];
        let told = poll(&mut polled, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }));
        self.leaves[end] || flow.meeting.is_some() || flow.owes() || told.is_ok_and(|it| it > 0)
    }

    /// Whether an end has all that it asked for and that was sent, and the other one what it sent.
    fn is_through(&self, end: usize) -> bool {
        let (own, other) = (&self.ends[end], &self.ends[1 - end]);
        if self.leaves[end] {
            // Who has heard all, and failed for it, answers no more.
            return own.handle.lock().is_through() || other.handle.lock().is_failed();
        }
        let is_received = own.receives.done >= own.receives.memory.len().min(other.sends.done);
        let has_all = is_received && other.sends.memory.len() <= own.receives.done;
        has_all && (own.sends.is_done() || self.leaves[1 - end])
    }

    /// Lets all through, until nothing is missing.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < ROUNDS_MAX, "they wait for ever: {:?}", self.told());
            for end in 0..2 {
                // What one asks for the other one sends, and the other way round.
                let (asked, sent) =
                    (self.ends[end].receives.memory.len(), self.ends[1 - end].sends.memory.len());
                (asked..sent).for_each(|_| self.post_receive(end));
                (sent..asked).for_each(|_| self.post_send(1 - end));
            }
            self.connect();
            for end in 0..2 {
                self.carry(end, 1 << 20);
                if self.is_woken(end) {
                    self.keep(end);
                }
                self.drive(end);
                if self.leaves[end] {
                    self.ends[end].handle.lock().end_sending();
                }
            }
            self.look();
            if let Some(end) = (0..2).find(|&end| self.leaves[end] && self.is_through(end)) {
                // Where no connection ever was, or the other one leaves, nobody waits for it.
                let stood = self.ends[end].handle.lock().stood();
                if stood > 0 && !self.leaves[1 - end] {
                    self.check_all_came(1 - end);
                }
                return;
            }
            if self.is_through(0) && self.is_through(1) {
                return;
            }
        }
    }

    fn told(&self) -> [String; 2] {
        [0, 1].map(|end| {
            let end = &self.ends[end];
            let (sends, receives) = (&end.sends, &end.receives);
            let mut flow = end.handle.lock();
            flow.kept.clear();
            flow.stash.clear();
            let (sent, received) = (sends.memory.len(), receives.memory.len());
            format!("{}/{sent} {}/{received} {flow:?}", sends.done, receives.done)
        })
    }
}
