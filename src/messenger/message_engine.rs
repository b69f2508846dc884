//! All messages of a rank: the peers' protocol over the links.

use std::ops::{Index, IndexMut};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use slab::Slab;
use unisum_kernels::Dtype;
use unisum_link::{
    Call, CollectiveKind, Landing, LinkError, LinkErrorKind, Patience, Rank, Region, Regions,
    Ticket,
};

use super::header::{Envelope, HEADER_BYTES, Header};
use super::memory;
use super::peer::{Fault, Next, Operation, Output, Peer};
use unisum_control::Status;
use unisum_engine::Links;

/// Why the engine stops.
#[derive(Debug)]
pub(super) enum Failure {
    Link(LinkError),
    /// The two ends of a message from this rank differ.
    Mismatch(Rank, Envelope, Envelope),
    /// What the oldest operation of a call waits for did not come in time.
    Deadline(CallNumber),
    /// Somebody else knows: the job has a verdict.
    Verdict,
    /// The thread was asked to give up.
    Interrupted,
}

/// A call as the engine numbers it.
pub(super) type CallNumber = usize;

/// A call under way: some operations that one thread waits for.
#[derive(Debug)]
struct Outstanding {
    operations: usize,
    deadline: Instant,
    /// Whether its thread sleeps while another drives the links.
    asleep: bool,
}

/// A send or a receive under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    pub(super) call: CallNumber,
    pub(super) peer: Rank,
    pub(super) receives: bool,
    pub(super) envelope: Envelope,
    pub(super) memory: Region,
}

/// A call that waits for a message of any rank, and is told whose there is.
#[derive(Debug)]
struct Probe {
    call: CallNumber,
    tag: u64,
    found: Arc<OnceLock<Rank>>,
}

/// What a ticket stands for.
#[derive(Debug)]
enum InFlight {
    /// A header's bytes, and the operation that ends with it.
    HeaderOut(#[expect(dead_code, reason = "the link reads it")] Vec<u8>, Option<Operation>),
    PayloadOut(Operation),
    HeaderIn(Rank),
    PayloadIn(Rank),
}

/// A peer, and what is received from it at the moment.
#[derive(Debug)]
struct PeerState {
    peer: Peer,
    /// Operations under way.
    pending: usize,
    /// Headers that went to it, and those that came, with what follows them.
    said: u64,
    heard: u64,
    is_untold: bool,
    /// Whether it has left while nothing but a message of any rank was waited for.
    has_left: bool,
    /// The receive that is posted.
    incoming: Option<Ticket>,
    header: Vec<u8>,
    buffer: Vec<u8>,
}

impl PeerState {
    fn new() -> Self {
        Self {
            peer: Peer::default(),
            pending: 0,
            said: 0,
            heard: 0,
            is_untold: false,
            has_left: false,
            incoming: None,
            header: vec![0; HEADER_BYTES],
            buffer: Vec::new(),
        }
    }
}

/// All peers by rank, each made when it is first used.
#[derive(Debug)]
struct PeerStates {
    used: Vec<Option<Box<PeerState>>>,
    /// Stands for those that were not used.
    unused: PeerState,
}

impl PeerStates {
    fn new(world: usize) -> Self {
        Self { used: (0..world).map(|_| None).collect(), unused: PeerState::new() }
    }

    const fn len(&self) -> usize {
        self.used.len()
    }
}

impl Index<Rank> for PeerStates {
    type Output = PeerState;

    fn index(&self, rank: Rank) -> &PeerState {
        self.used[rank].as_deref().unwrap_or(&self.unused)
    }
}

impl IndexMut<Rank> for PeerStates {
    fn index_mut(&mut self, rank: Rank) -> &mut PeerState {
        self.used[rank].get_or_insert_with(|| Box::new(PeerState::new()))
    }
}

/// All messages of this rank. Whoever holds it drives the links.
#[derive(Debug)]
pub(super) struct MessageEngine {
    rank: Rank,
    links: Links,
    patience: Patience,
    peers: PeerStates,
    operations: Slab<Posted>,
    probes: Vec<Probe>,
    calls: Slab<Outstanding>,
    messages: Slab<InFlight>,
    /// Tickets under way on each link.
    in_flight: Vec<usize>,
    /// Peers with operations under way from which no receive was posted yet.
    unheard: Vec<Rank>,
    /// Peers of which something was heard that was not told.
    untold: Vec<Rank>,
    /// Where it is said what this rank does; nowhere in a world of one.
    status: Option<Arc<Status>>,
    done: Vec<Ticket>,
    /// Calls that are done and whose threads sleep.
    pub(super) finished_asleep: usize,
}

impl MessageEngine {
    /// `patience` is for waits in memory.
    pub(super) fn new(
        (rank, world): (Rank, usize),
        (communicator, status): (u32, Option<Arc<Status>>),
        mut links: Links,
        patience: Patience,
    ) -> Self {
        // Links want to know in which call they move bytes: all messages are in one.
        let collective = CollectiveKind::Message;
        let call = Call { communicator, collective, ..Call::all_reduce(0, Dtype::U8, 0) };
        let nothing = Regions::in_place(memory::of_bytes(&mut []));
        links.all.iter_mut().for_each(|link| link.begin(&call, &nothing));
        Self {
            rank,
            in_flight: vec![0; links.all.len()],
            links,
            patience,
            peers: PeerStates::new(world),
            operations: Slab::new(),
            probes: Vec::new(),
            calls: Slab::new(),
            messages: Slab::new(),
            unheard: Vec::new(),
            untold: Vec::new(),
            status,
            done: Vec::new(),
            finished_asleep: 0,
        }
    }

    /// Begins a call of so many operations.
    pub(super) fn open(&mut self, operations: usize, deadline: Instant) -> CallNumber {
        self.calls.insert(Outstanding { operations, deadline, asleep: false })
    }

    /// Starts an operation of a call.
    pub(super) fn post(&mut self, posted: Posted) -> Result<(), Failure> {
        let Posted { peer, receives, envelope, .. } = posted;
        let operation = self.operations.insert(posted);
        let state = &mut self.peers[peer];
        state.pending += 1;
        if receives {
            let received = state.peer.receive(operation, envelope);
            received.map_err(|fault| Failure::of(peer, fault))?;
        } else {
            state.peer.send(operation, envelope);
        }
        self.work_off(peer)
    }

    /// Starts to wait for a message with a tag that can be received, of any rank.
    pub(super) fn probe(&mut self, call: CallNumber, tag: u64, found: Arc<OnceLock<Rank>>) {
        self.probes.push(Probe { call, tag, found });
        for peer in 0..self.peers.len() {
            self.find(peer);
            self.hear(peer);
        }
    }

    /// Ends the probes that wait for what a peer has sent. When none is left, peers of which
    /// nothing else is wanted are no longer listened to.
    fn find(&mut self, peer: Rank) {
        let is_found = |probe: &Probe| self.peers[peer].peer.has_early(probe.tag);
        let found: Vec<Probe> = self.probes.extract_if(.., |probe| is_found(probe)).collect();
        for probe in &found {
            let _first = probe.found.set(peer);
            self.operation_ended(probe.call);
        }
        if !found.is_empty() && self.probes.is_empty() {
            (0..self.peers.len()).for_each(|peer| self.hear(peer));
        }
    }

    /// Whether headers of a peer are wanted.
    fn wants(&self, peer: Rank) -> bool {
        let PeerState { pending, has_left, .. } = self.peers[peer];
        pending > 0 || (!self.probes.is_empty() && !has_left)
    }

    /// Whether all operations of a call have ended.
    pub(super) fn is_done(&self, call: CallNumber) -> bool {
        self.calls[call].operations == 0
    }

    /// Forgets a call that is done.
    pub(super) fn close(&mut self, call: CallNumber) {
        self.calls.remove(call);
    }

    /// Says that the thread of a call goes to sleep.
    pub(super) fn falls_asleep(&mut self, call: CallNumber) {
        self.calls[call].asleep = true;
    }

    /// The thread of a call is awake again.
    pub(super) fn wakes_up(&mut self, call: CallNumber) {
        self.calls[call].asleep = false;
        self.finished_asleep -= usize::from(self.is_done(call));
    }

    /// Whether the links can bring anything.
    pub(super) fn has_transfers(&self) -> bool {
        !self.unheard.is_empty() || self.in_flight.iter().any(|&tickets| tickets > 0)
    }

    /// The call whose time is up first, of those that are not done.
    pub(super) fn next_deadline(&self) -> Option<(Instant, CallNumber)> {
        let waiting = self.calls.iter().filter(|(_, call)| call.operations > 0);
        waiting.map(|(number, call)| (call.deadline, number)).min()
    }

    /// The oldest operation of a call.
    pub(super) fn oldest(&self, call: CallNumber) -> Option<&Posted> {
        self.operations.iter().map(|(_, posted)| posted).find(|posted| posted.call == call)
    }

    /// Whether no call is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    /// The ranks that operations wait for.
    pub(super) fn awaited(&self) -> impl Iterator<Item = Rank> {
        let pending = |rank: &Rank| self.peers[*rank].pending > 0;
        (0..self.peers.len()).filter(pending)
    }

    /// Those of them whose leaving the link does not tell.
    pub(super) fn awaited_unheard(&self) -> impl Iterator<Item = Rank> {
        let links = &self.links;
        self.awaited().filter(|&rank| !links.all[links.route[rank]].hears_leaving(rank))
    }

    /// Whether the link does not tell the leaving of a rank that operations wait for.
    pub(super) fn is_unheard(&self, rank: Rank) -> bool {
        self.awaited_unheard().any(|unheard| unheard == rank)
    }

    /// A rank that operations wait for, and that has left, as far as others tell. Everything that
    /// it sent has come then, unless this rank is still connecting to it: then the connection, or
    /// its failure, tells.
    pub(super) fn gone(&self, has_left: impl Fn(Rank) -> bool) -> Option<Rank> {
        let Links { all, route, .. } = &self.links;
        self.awaited_unheard().find(|&rank| !all[route[rank]].is_connecting(rank) && has_left(rank))
    }

    /// Moves what can be moved now; whether anything was.
    pub(super) fn advance(&mut self) -> Result<bool, Failure> {
        let mut moved = false;
        for link in 0..self.links.all.len() {
            if self.in_flight[link] == 0 {
                continue;
            }
            let mut done = std::mem::take(&mut self.done);
            let result = self.links.all[link].progress(&mut done);
            moved |= !done.is_empty();
            self.in_flight[link] -= done.len();
            let ended = done.drain(..).try_for_each(|ticket| self.ticket_done(ticket));
            self.done = done;
            ended?;
            match result {
                // It has had all that it waited for, and is gone before this rank looked up.
                Err(error) if self.may_leave(&error) => {
                    self.leave(error.peer);
                    moved = true;
                }
                result => result.map_err(Failure::Link)?,
            }
        }
        // Only now: a short send has often ended by itself, and then nothing needs to be heard.
        while let Some(peer) = self.unheard.pop() {
            moved |= self.listen(peer)?;
        }
        Ok(moved)
    }

    /// Whether a link only says that a rank is gone which nobody waits for any more.
    fn may_leave(&self, error: &LinkError) -> bool {
        let state = &self.peers[error.peer];
        let is_idle =
            state.pending == 0 && state.incoming.is_none_or(|ticket| self.is_header(ticket));
        is_idle && error.kind == LinkErrorKind::Closed
    }

    fn is_header(&self, Ticket(number): Ticket) -> bool {
        matches!(self.messages.get(number as usize), Some(InFlight::HeaderIn(_)))
    }

    /// Forgets that a peer is listened to, which is gone.
    fn leave(&mut self, peer: Rank) {
        self.peers[peer].has_left = true;
        if let Some(ticket @ Ticket(number)) = self.peers[peer].incoming.take() {
            // The link has given it up if it does not know it any more.
            self.links.to(peer).retract(peer, ticket);
            self.messages.remove(number as usize);
            self.in_flight[self.links.route[peer]] -= 1;
        }
    }

    /// How long waiting pays before it parks.
    pub(super) fn patience(&self) -> Patience {
        let busy = self.in_flight.iter().zip(&self.links.all).filter(|(tickets, _)| **tickets > 0);
        busy.fold(self.patience, |patience, (_, link)| patience.min(link.patience()))
    }

    /// Sleeps until something may have moved, until woken, or until `until`.
    pub(super) fn park(&mut self, until: Instant) -> Result<(), Failure> {
        self.links.park(&self.in_flight, until, 1, self.rank).map_err(Failure::Link)
    }

    /// Ends everything: afterwards no link touches any memory.
    pub(super) fn abort(&mut self) {
        self.links.abort();
        self.in_flight.fill(0);
        self.unheard.clear();
        self.probes.clear();
        self.messages.clear();
    }

    fn ticket_done(&mut self, Ticket(number): Ticket) -> Result<(), Failure> {
        match self.messages.remove(number as usize) {
            InFlight::HeaderOut(_, ends) => {
                if let Some(operation) = ends {
                    self.ended(operation);
                }
                Ok(())
            }
            InFlight::PayloadOut(operation) => {
                self.ended(operation);
                Ok(())
            }
            InFlight::HeaderIn(peer) => {
                let state = &mut self.peers[peer];
                state.incoming = None;
                let header = Header::decode(&state.header)
                    .ok_or_else(|| Failure::Link(LinkError::protocol(peer, "no header came")))?;
                let next = state.peer.header(header);
                match next.map_err(|fault| Failure::of(peer, fault))? {
                    Next::Header => self.heard(peer),
                    Next::Memory(operation) => {
                        let memory = self.operations[operation].memory;
                        self.receive(peer, memory, InFlight::PayloadIn(peer))?;
                    }
                    Next::Buffer(bytes) => {
                        state.buffer = vec![0; bytes];
                        let memory = memory::of_bytes(&mut state.buffer);
                        self.receive(peer, memory, InFlight::PayloadIn(peer))?;
                    }
                }
                self.work_off(peer)
            }
            InFlight::PayloadIn(peer) => {
                let state = &mut self.peers[peer];
                state.incoming = None;
                state.peer.payload(std::mem::take(&mut state.buffer));
                self.heard(peer);
                self.work_off(peer)
            }
        }
    }

    /// A header has come, with what follows it.
    fn heard(&mut self, peer: Rank) {
        let state = &mut self.peers[peer];
        state.heard += 1;
        if !std::mem::replace(&mut state.is_untold, true) {
            self.untold.push(peer);
        }
    }

    /// Says what was heard until now. After what this rank waits for was said: who sees this sees
    /// that.
    pub(super) fn tell_heard(&mut self) {
        for peer in self.untold.drain(..) {
            let state = &mut self.peers[peer];
            state.is_untold = false;
            let heard = state.heard;
            self.status.iter().for_each(|status| status.heard(peer, heard));
        }
    }

    /// Whether one call waits, for messages of ranks that it names.
    pub(super) fn is_of_one(&self) -> bool {
        self.calls.len() == 1 && self.probes.is_empty()
    }

    /// Does what a peer's protocol asks for.
    fn work_off(&mut self, peer: Rank) -> Result<(), Failure> {
        let mut next = Next::Header;
        while let Some(output) = self.peers[peer].peer.outputs.pop_front() {
            match output {
                Output::Done(operation) => self.ended(operation),
                Output::Deliver(buffer, operation) => {
                    memory::copy(&buffer, self.operations[operation].memory);
                    self.ended(operation);
                }
                output if peer == self.rank => self.turn_round(output, &mut next)?,
                Output::Header(header, ends) => {
                    let mut bytes = header.encode();
                    let memory = memory::of_bytes(&mut bytes);
                    let said = &mut self.peers[peer].said;
                    *said += 1;
                    if let Some(status) = &self.status {
                        status.said(peer, *said);
                    }
                    self.send(peer, memory, InFlight::HeaderOut(bytes, ends))?;
                }
                Output::Payload(operation) => {
                    let memory = self.operations[operation].memory;
                    self.send(peer, memory, InFlight::PayloadOut(operation))?;
                }
            }
        }
        self.find(peer);
        self.hear(peer);
        Ok(())
    }

    /// Gives what this rank sends to itself back to it. `next` is what its last header announced.
    fn turn_round(&mut self, output: Output, next: &mut Next) -> Result<(), Failure> {
        let peer = &mut self.peers[self.rank].peer;
        match output {
            Output::Header(header, ends) => {
                *next = peer.header(header).map_err(|fault| Failure::of(self.rank, fault))?;
                if let Some(operation) = ends {
                    self.ended(operation);
                }
            }
            Output::Payload(operation) => {
                let mut bytes = memory::to_vec(self.operations[operation].memory);
                if let Next::Memory(receive) = *next {
                    memory::copy(&bytes, self.operations[receive].memory);
                    bytes.clear();
                }
                peer.payload(bytes);
                self.ended(operation);
            }
            Output::Deliver(..) | Output::Done(_) => {}
        }
        Ok(())
    }

    /// Sees to it that headers of a peer are received while operations with it are under way, and
    /// only then: a peer that nobody waits for may leave.
    fn hear(&mut self, peer: Rank) {
        let is_wanted = self.wants(peer);
        match self.peers[peer].incoming {
            _ if peer == self.rank => {}
            None if is_wanted && self.unheard.last() != Some(&peer) => self.unheard.push(peer),
            Some(ticket @ Ticket(number))
                if !is_wanted
                    && self.is_header(ticket)
                    && self.links.to(peer).retract(peer, ticket) =>
            {
                self.messages.remove(number as usize);
                self.in_flight[self.links.route[peer]] -= 1;
                self.peers[peer].incoming = None;
            }
            _ => {}
        }
    }

    /// Posts the receive of a peer's next header, if one is wanted.
    fn listen(&mut self, peer: Rank) -> Result<bool, Failure> {
        if !self.wants(peer) || self.peers[peer].incoming.is_some() {
            return Ok(false);
        }
        let state = &mut self.peers[peer];
        let memory = memory::of_bytes(&mut state.header);
        self.receive(peer, memory, InFlight::HeaderIn(peer))?;
        Ok(true)
    }

    fn send(&mut self, to: Rank, memory: Region, message: InFlight) -> Result<(), Failure> {
        let ticket = Ticket(self.messages.insert(message) as u64);
        self.in_flight[self.links.route[to]] += 1;
        self.links.to(to).send(to, memory, ticket).map_err(Failure::Link)
    }

    fn receive(&mut self, from: Rank, memory: Region, message: InFlight) -> Result<(), Failure> {
        let ticket = Ticket(self.messages.insert(message) as u64);
        self.in_flight[self.links.route[from]] += 1;
        self.peers[from].incoming = Some(ticket);
        let link = self.links.to(from);
        link.receive(from, memory, Landing::Place, ticket).map_err(Failure::Link)
    }

    fn ended(&mut self, operation: Operation) {
        let Posted { call, peer, .. } = self.operations.remove(operation);
        self.peers[peer].pending -= 1;
        self.operation_ended(call);
        self.hear(peer);
    }

    fn operation_ended(&mut self, call: CallNumber) {
        let call = &mut self.calls[call];
        call.operations -= 1;
        self.finished_asleep += usize::from(call.operations == 0 && call.asleep);
    }
}

impl Failure {
    fn of(peer: Rank, fault: Fault) -> Self {
        match fault {
            Fault::Mismatch { ours, theirs } => Self::Mismatch(peer, ours, theirs),
            Fault::Protocol(what) => Self::Link(LinkError::protocol(peer, what)),
        }
    }
}

#[cfg(test)]
#[cfg(feature = "tcp")]
mod tests;
