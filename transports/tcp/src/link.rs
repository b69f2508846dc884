//! The TCP link: sockets to all peers, one poll.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_link::{
    Call, Group, Landing, Link, LinkError, LinkErrorKind, Patience, PeerCounts, Rank, Region,
    Regions, Ticket, Wake,
};

use crate::TcpConfig;
use crate::options;
use crate::resume::Keeper;
use crate::silence::Silences;
use crate::sleep::{Bell, FEW, Ready, Sleeper, Watched};
use crate::slots::Slots;
use crate::socket::{Moving, Socket, Span};
use unisum_link::inbox::{Arrived, Inbox};

/// A posted transfer, split over one or several sockets.
#[derive(Debug)]
struct Transfer {
    ticket: Ticket,
    parts_left: usize,
    /// The slot of an arrival that reduces.
    slot: Option<Vec<u8>>,
}

/// This rank's sockets to all others. See [`unisum_link::Link`].
#[derive(Debug)]
pub struct TcpLink {
    config: TcpConfig,
    sleeper: Sleeper,
    inbox: Arc<Inbox>,
    /// Where connections that break are dialled anew.
    keeper: Option<Keeper>,
    /// `sockets_per_peer`, one after the other, for each rank that was used.
    sockets: Vec<Socket>,
    /// By rank, its first socket.
    first_sockets: Vec<u32>,
    /// Sockets with posted messages.
    busy: Vec<usize>,
    /// Which of the busy sockets is tried next, when nothing is known of any.
    next_try: usize,
    transfers: Vec<Option<Transfer>>,
    free_transfers: Vec<usize>,
    arrived: HashMap<Ticket, Vec<u8>>,
    slots: Slots,
    current: Option<Call>,
    /// By rank, what the call under way has for it and expects of it; empty where the call says it.
    counts: Vec<PeerCounts>,
    moving: Moving,
    silences: Silences,
    /// What was found before a sleep, for `progress` to tell.
    silent: Option<LinkError>,
}

/// In place of the first socket of a rank that was not used yet.
const NO_SOCKET: u32 = u32::MAX;

/// Messages from this size on are split over all sockets of a peer.
const SPLIT_BYTES: usize = 64 << 10;

impl TcpLink {
    /// A link without connections; they are opened when a peer is first used. Connections that
    /// peers open are handed to [`TcpLink::inbox`].
    ///
    /// # Errors
    /// If the system gives no event queue (descriptors exhausted).
    pub fn new(config: TcpConfig) -> io::Result<Self> {
        let sleeper = Sleeper::new()?;
        let keeps = !config.reconnect_timeout.is_zero();
        let keeper_bell = if keeps { Some(Arc::new(Bell::new()?)) } else { None };
        // The keeper takes connections, where there is one.
        let receiver = keeper_bell.clone().unwrap_or_else(|| sleeper.bell());
        let inbox = Arc::new(Inbox::new(receiver));
        let keeper = keeper_bell
            .map(|bell| Keeper::new(config.clone(), inbox.clone(), bell, sleeper.bell()))
            .transpose()?;
        let first_sockets = vec![NO_SOCKET; config.routes.len()];
        Ok(Self {
            inbox,
            keeper,
            sleeper,
            sockets: Vec::new(),
            first_sockets,
            busy: Vec::new(),
            next_try: 0,
            transfers: Vec::new(),
            free_transfers: Vec::new(),
            arrived: HashMap::new(),
            slots: Slots::default(),
            current: None,
            counts: Vec::new(),
            moving: Moving::default(),
            silences: Silences::new(config.heartbeat_timeout),
            silent: None,
            config,
        })
    }

    /// Where accepted connections are to be delivered.
    pub fn inbox(&self) -> Arc<Inbox> {
        self.inbox.clone()
    }

    fn sockets_per_peer(&self) -> usize {
        usize::from(self.config.sockets_per_peer)
    }

    /// The first socket of `peer`. Sees to it that its connections exist or are being opened: the
    /// higher rank dials, so that a pair never opens two.
    #[inline]
    fn open(&mut self, peer: Rank) -> Result<usize, LinkError> {
        match self.first_socket(peer) {
            Some(socket) => Ok(socket),
            None => self.open_first(peer),
        }
    }

    #[inline]
    fn first_socket(&self, peer: Rank) -> Option<usize> {
        Some(self.first_sockets[peer])
            .filter(|&socket| socket != NO_SOCKET)
            .map(|socket| socket as usize)
    }

    /// Makes the sockets of a rank.
    fn add_sockets(&mut self, peer: Rank) -> usize {
        let first = self.sockets.len();
        for number in 0..self.config.sockets_per_peer {
            let flow = self.keeper.as_ref().map(|keeper| keeper.flow(peer, number));
            self.sockets.push(Socket::new(peer, flow));
        }
        self.first_sockets[peer] = u32::try_from(first).expect("16 sockets to each of 2^28 ranks");
        first
    }

    #[cold]
    fn open_first(&mut self, peer: Rank) -> Result<usize, LinkError> {
        let socket = self.add_sockets(peer);
        if peer > self.config.rank {
            return Ok(socket);
        }
        for number in 0..self.config.sockets_per_peer {
            match &self.keeper {
                Some(keeper) => keeper.dial_first(peer, number)?,
                None => self.inbox.dial(self.config.dial(peer, number, 1))?,
            }
        }
        Ok(socket)
    }

    fn admit(&mut self, arrived: Arrived) -> Result<(), LinkError> {
        let Arrived { peer, socket: number, result, .. } = arrived;
        let sockets = self.sockets_per_peer();
        let first = match self.first_socket(peer) {
            Some(socket) => socket,
            None if peer > self.config.rank => self.add_sockets(peer),
            None => return Err(LinkError::protocol(peer, "a connection that nobody asked for")),
        };
        let socket = first + usize::from(number);
        if usize::from(number) >= sockets || self.sockets[socket].is_connected() {
            let what = format!("connection {number} opened twice or one too many ({sockets} set)");
            return Err(LinkError::protocol(peer, what));
        }
        let connection = result?;
        let stream = &connection.stream;
        let is_far = options::prepare(stream, self.config.heartbeat_timeout)
            .map_err(|error| LinkError::system(peer, "preparing the socket", error))?;
        if is_far {
            self.silences.add(socket);
        }
        self.sleeper
            .watch(socket, stream.as_fd())
            .map_err(|error| LinkError::system(peer, "watching the socket", error))?;
        self.sockets[socket].connect(number, connection);
        Ok(())
    }

    /// Looks at a socket whose flow has news: another connection, perhaps.
    fn renew(&mut self, peer: Rank, number: u8) -> Result<(), LinkError> {
        let first = match self.first_socket(peer) {
            Some(socket) => socket,
            None => self.add_sockets(peer),
        };
        let socket = first + usize::from(number);
        let Some(stream) = self.sockets[socket].renew() else { return Ok(()) };
        if options::is_far(&stream).is_ok_and(|is_far| is_far) {
            self.silences.add(socket);
        }
        self.sleeper
            .watch(socket, stream.as_fd())
            .map_err(|error| LinkError::system(peer, "watching the socket", error))
    }

    /// Takes over the event queue's news, after at most `timeout`.
    fn look_at_all(&mut self, timeout: Duration) -> io::Result<()> {
        self.sleeper.on_queue(timeout, |ready| self.sockets[ready.socket].ready(ready))
    }

    /// Has one of the busy sockets tried in its turn, whatever is known of it.
    fn try_one(&mut self) {
        self.next_try += 1;
        if let Some(at) = self.next_try.checked_rem(self.busy.len()) {
            let socket = self.busy[at];
            self.sockets[socket].ready(Ready { socket, reads: true, writes: true });
        }
    }

    /// Sleeps on all busy sockets; where every transfer under way is needed to go
    /// on, on one of them, which has to come anyway.
    fn sleep(&mut self, timeout: Duration, all_needed: bool) -> io::Result<()> {
        let few = if all_needed { self.busy.len().min(1) } else { self.busy.len() };
        if few > FEW {
            return self.look_at_all(timeout);
        }
        let watched: [Option<Watched<'_>>; FEW] = std::array::from_fn(|place| {
            let socket = *self.busy[..few].get(place)?;
            self.sockets[socket].watched(socket)
        });
        for ready in self.sleeper.on_few(&watched, timeout)?.into_iter().flatten() {
            self.sockets[ready.socket].ready(ready);
        }
        Ok(())
    }

    /// Looks, now and then, whether other hosts acknowledge what was sent there.
    fn look_for_silence(&mut self) {
        let sockets = &self.sockets;
        let Some((socket, silent)) = self.silences.look(|socket| sockets[socket].told()) else {
            return;
        };
        let peer = self.sockets[socket].peer;
        let error = match silent {
            Ok(time) => LinkError { peer, kind: LinkErrorKind::Unacknowledged(time) },
            Err(error) => LinkError::system(peer, "asking about the socket", error),
        };
        self.silent = self.sockets[socket].broke(error);
    }

    fn own_error(&self, doing: &str, error: io::Error) -> LinkError {
        LinkError::system(self.config.rank, doing, error)
    }

    fn admit_arrived(&mut self) -> Result<(), LinkError> {
        if let Some(keeper) = &self.keeper {
            let news = keeper.take_news();
            return news.into_iter().try_for_each(|(peer, number)| self.renew(peer, number));
        }
        self.inbox.take().into_iter().try_for_each(|arrived| self.admit(arrived))
    }

    /// Posts a transfer's parts on the peer's sockets, from `first` on; returns those that it used.
    fn post(
        &mut self,
        first: usize,
        span: Span,
        transfer: Transfer,
        mut post: impl FnMut(&mut Socket, usize, Span),
    ) -> Range<usize> {
        let parts = if span.bytes < SPLIT_BYTES { 1 } else { self.sockets_per_peer() };
        let transfer = Transfer { parts_left: parts, ..transfer };
        let index = self.free_transfers.pop().unwrap_or(self.transfers.len());
        if index == self.transfers.len() {
            self.transfers.push(None);
        }
        self.transfers[index] = Some(transfer);
        for part in 0..parts {
            let (from, to) = (span.bytes * part / parts, span.bytes * (part + 1) / parts);
            let part_span = Span { start: span.start.wrapping_add(from), bytes: to - from };
            let socket = &mut self.sockets[first + part];
            if !std::mem::replace(&mut socket.listed, true) {
                self.busy.push(first + part);
            }
            post(socket, index, part_span);
        }
        first..first + parts
    }

    fn current(&self) -> Call {
        self.current.expect("the engine begins a collective before it posts transfers")
    }

    /// The call as a rank hears it.
    fn call_to(&self, peer: Rank) -> Call {
        let call = self.current();
        self.counts.get(peer).map_or(call, |counts| counts.told(call))
    }

    /// The call as a rank has to say it.
    fn call_from(&self, peer: Rank) -> Call {
        let call = self.current();
        self.counts.get(peer).map_or(call, |counts| counts.heard(call))
    }

    /// Counts finished parts and reports the transfers they complete.
    fn settle(&mut self, done: &mut Vec<Ticket>) {
        for index in self.moving.finished.drain(..) {
            let entry = &mut self.transfers[index];
            let Some(transfer) = entry else { continue };
            transfer.parts_left -= 1;
            if transfer.parts_left > 0 {
                continue;
            }
            if let Some(transfer) = entry.take() {
                self.free_transfers.push(index);
                done.push(transfer.ticket);
                if let Some(slot) = transfer.slot {
                    self.arrived.insert(transfer.ticket, slot);
                }
            }
        }
    }

    fn move_sockets(&mut self) -> Result<(), LinkError> {
        let mut result = Ok(());
        for at in (0..self.busy.len()).rev() {
            let index = self.busy[at];
            let peer = self.sockets[index].peer;
            let call = self.call_from(peer);
            let socket = &mut self.sockets[index];
            if result.is_ok() {
                result = socket
                    .flush(peer, &mut self.moving)
                    .and_then(|()| socket.drain(peer, call, &mut self.moving));
            }
            if socket.is_idle() {
                socket.listed = false;
                self.busy.swap_remove(at);
            }
        }
        result
    }
}

impl Link for TcpLink {
    fn begin(&mut self, call: &Call, _regions: &Regions) {
        (self.current, self.moving.marked) = (Some(*call), false);
        self.counts.clear();
    }

    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts) {
        self.counts.resize(self.first_sockets.len(), PeerCounts::default());
        self.counts[peer] = counts;
    }

    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError> {
        let first = self.open(to)?;
        let (call, marked) = (self.call_to(to), self.moving.marked);
        let span = Span { start: memory.base(), bytes: memory.bytes() };
        let transfer = Transfer { ticket, parts_left: 0, slot: None };
        let mut sockets = self.post(first, span, transfer, |socket, index, span| {
            socket.post_send(index, marked, call, span);
        });
        sockets.try_for_each(|socket| self.sockets[socket].flush(to, &mut self.moving))
    }

    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError> {
        let first = self.open(from)?;
        let (start, slot) = match landing {
            Landing::Place => (memory.base(), None),
            Landing::Slot => {
                let bytes = memory.bytes();
                let mut slot = self.slots.take(bytes).map_err(|error| {
                    let what = format!("has no memory for the {bytes} bytes of an arrival");
                    LinkError::lacking(self.config.rank, what, error)
                })?;
                (slot.as_mut_ptr(), Some(slot))
            }
        };
        let span = Span { start, bytes: memory.bytes() };
        let transfer = Transfer { ticket, parts_left: 0, slot };
        self.post(first, span, transfer, Socket::post_receive);
        Ok(())
    }

    fn hears_leaving(&self, peer: Rank) -> bool {
        // The end of a connection comes after all that was sent on it.
        let Some(first) = self.first_socket(peer) else { return false };
        self.sockets[first..][..self.sockets_per_peer()].iter().all(Socket::is_connected)
    }

    fn is_connecting(&self, peer: Rank) -> bool {
        // The higher rank dials. A dial ends with a connection or an error.
        let dials = peer < self.config.rank && self.first_socket(peer).is_some();
        dials && !self.hears_leaving(peer)
    }

    fn retract(&mut self, from: Rank, ticket: Ticket) -> bool {
        // A message that was split has parts that can't all be looked at; who retracts has a small
        // one.
        let Some(first) = self.first_socket(from) else { return false };
        let Some(index) = self.sockets[first].newest_untouched() else { return false };
        let is_it = |transfer: &mut Transfer| transfer.ticket == ticket && transfer.parts_left == 1;
        if self.transfers[index].take_if(is_it).is_none() {
            return false;
        }
        self.sockets[first].retract();
        self.free_transfers.push(index);
        true
    }

    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError> {
        let before = done.len();
        if let Some(error) = self.silent.take() {
            return Err(error);
        }
        self.admit_arrived()?;
        // What was sent at once is news enough: a look at a socket is a system call.
        self.settle(done);
        if done.len() > before {
            return Ok(());
        }
        if self.busy.len() <= FEW {
            self.try_one();
        } else if !self.busy.iter().any(|&socket| self.sockets[socket].can_move()) {
            self.look_at_all(Duration::ZERO)
                .map_err(|error| self.own_error("polling sockets", error))?;
        }
        let result = self.move_sockets();
        self.settle(done);
        result
    }

    fn arrived(&self, ticket: Ticket) -> *const u8 {
        self.arrived[&ticket].as_ptr()
    }

    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError> {
        if let Some(slot) = self.arrived.remove(&ticket) {
            self.slots.give(slot);
        }
        Ok(())
    }

    fn mark(&mut self) {
        self.moving.marked = true;
    }

    fn is_marked(&self) -> bool {
        self.moving.marked
    }

    fn patience(&self) -> Patience {
        Patience::SYSTEM_CALL
    }

    fn park(&mut self, until: Instant, wanted: usize) -> Result<(), LinkError> {
        let left = until.saturating_duration_since(Instant::now()).min(self.silences.pause());
        if self.arm() && !left.is_zero() {
            let under_way = self.transfers.len() - self.free_transfers.len();
            let all_needed = wanted >= under_way
                && self.busy.iter().all(|&socket| self.sockets[socket].waits_for_little());
            self.sleep(left, all_needed)
                .map_err(|error| self.own_error("waiting for sockets", error))?;
        }
        Ok(())
    }

    fn arm(&mut self) -> bool {
        self.look_for_silence();
        let has_news = match &self.keeper {
            Some(keeper) => keeper.has_news(),
            None => !self.inbox.is_empty(),
        };
        let is_told = self.silent.is_none() && !has_news;
        is_told && !self.busy.iter().any(|&socket| self.sockets[socket].can_move())
    }

    fn disarm(&mut self) {
        // The events become flags of the sockets. `progress` polls again and reports a failure.
        let _ = self.look_at_all(Duration::ZERO);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.sleeper.descriptor()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.sleeper.bell()
    }

    fn abort(&mut self) {
        self.inbox.close();
        if let Some(keeper) = &self.keeper {
            keeper.stop();
        }
        self.sockets.iter_mut().for_each(Socket::clear);
        self.current = None;
        self.busy.clear();
        self.moving.finished.clear();
        self.transfers.clear();
        self.free_transfers.clear();
        self.arrived.clear();
    }

    fn linger(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.leave();
        }
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        None
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.linger();
        self.inbox.close();
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use unisum_kernels::Dtype;
    use unisum_link::conformance::Memory;
    use unisum_link::handshake::Secret;
    use unisum_link::secure::Credentials;

    use super::*;
    use crate::Route;

    fn link(rank: Rank, world: usize) -> TcpLink {
        let route = || Arc::new(Route::from(SocketAddr::from(([127, 0, 0, 1], 9))));
        let config = TcpConfig {
            rank,
            routes: (0..world).map(|_| route()).collect(),
            session: [1; 16],
            job: [2; 16],
            credentials: Credentials::clear(Secret::new(b"a token of the tests")),
            sockets_per_peer: 3,
            connect_timeout: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(10),
            reconnect_timeout: Duration::ZERO,
        };
        TcpLink::new(config).unwrap()
    }

    #[test]
    fn only_ranks_that_are_used_have_sockets() {
        let mut link = link(0, 1024);
        let memory = Memory::private(8);
        let region = memory.region();
        link.begin(&Call::all_reduce(0, Dtype::U8, 8), &Regions::in_place(region));
        assert!(link.sockets.is_empty());
        for (ticket, peer) in [(0, 700), (1, 3), (2, 700)] {
            link.receive(peer, region, Landing::Place, Ticket(ticket)).unwrap();
        }
        let peers: Vec<Rank> = link.sockets.iter().map(|socket| socket.peer).collect();
        assert_eq!(peers, [700, 700, 700, 3, 3, 3]);
        assert!(!link.hears_leaving(5) && !link.is_connecting(5));
        assert!(!link.hears_leaving(3) && !link.is_connecting(3), "it is the one that dials");
        assert!(!link.retract(5, Ticket(0)));
        assert!(link.retract(700, Ticket(2)) && !link.retract(700, Ticket(2)));
        link.abort();
    }

    #[test]
    fn a_rank_below_does_not_dial() {
        let mut link = link(1, 3);
        let result = Err(LinkError::closed(0));
        let arrived = Arrived { peer: 0, socket: 0, attempt: 0, result, is_late: false };
        let error = link.admit(arrived).unwrap_err();
        assert!(matches!(error.kind, LinkErrorKind::Protocol(_)) && error.peer == 0, "{error}");
        assert!(link.sockets.is_empty());
    }
}
