//! The link: connections to all peers over this rank's devices.

pub(crate) mod renewal;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_link::{
    Call, Cause, Group, Landing, Limit, Link, LinkCounters, LinkError, LinkErrorKind, Patience,
    PeerCounts, Rank, Region, Regions, Ticket, Wake,
};

use crate::completions::{Completions, Notice};
use crate::connection::Connection;
use crate::domain::Domain;
use crate::ffi;
use crate::link_state::{LinkState, Receive, Send};
use crate::memory::{Pages, Registry};
use crate::peer::Peer;
use crate::sleep::{News, Sleeper};
use crate::wire::{Kind, Word};
use renewal::Renewer;

/// A device and this rank's objects on it.
#[derive(Debug)]
pub(crate) struct Rail {
    pub(crate) completions: Arc<Completions>,
    /// Which peer's which connection each queue pair is, ascending by its number.
    pub(crate) pairs: Vec<(u32, usize, usize)>,
    /// What the queue was last asked to report, until it has.
    asked: Option<Notice>,
}

/// Counters of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes posted: data, announcements, small messages, credits.
    pub writes: u64,
    /// Completions of own writes.
    pub reports: u64,
    /// Writes of peers with an immediate word.
    pub announcements: u64,
    /// How often it slept.
    pub sleeps: u64,
    /// How often it registered borrowed memory.
    pub registrations: u64,
}

/// The counters of a link, by index: the fields of [`Counts`].
pub(crate) mod counted {
    pub(crate) const WRITES: usize = 0;
    pub(crate) const REPORTS: usize = 1;
    pub(crate) const ANNOUNCEMENTS: usize = 2;
    pub(crate) const SLEEPS: usize = 3;
    pub(crate) const REGISTRATIONS: usize = 4;
    pub(crate) const NAMES: [&str; 5] =
        ["writes", "reports", "announcements", "sleeps", "registrations"];
}

/// This rank's end of its connections over RDMA. See [`unisum_link::Link`].
#[derive(Debug)]
pub struct VerbsLink {
    // Connections first: what they touch must outlive them.
    peers: Vec<Peer>,
    state: LinkState,
    rails: Vec<Rail>,
    /// The index of each rank among the peers.
    places: Vec<Option<usize>>,
    /// Peers that need attention.
    listed: Vec<usize>,
    sleeper: Sleeper,
    /// Why no progress is possible, for the next call of `progress`.
    failure: Option<LinkError>,
    /// Peers that left or broke.
    gone: Vec<usize>,
    /// Whether all connections are proven. Until then, every completion is waited for.
    is_proven: bool,
    /// By what queue pairs that fail are made anew.
    renewer: Option<Renewer>,
    description: String,
    _areas: Pages,
}

/// How many completions are handled together.
const BATCH: usize = 16;
/// How often a rank checks after yielding before it sleeps. Sleeping on a completion queue and
/// waking takes several system calls and an interrupt, 10 to 20 us: checking for as long costs at
/// most twice the optimum (Karlin et al., Competitive randomized algorithms for nonuniform
/// problems, 1994).
const YIELDS: u32 = 64;
/// How long a link that is dropped waits for the devices to read its last messages.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Rail {
    pub(crate) const fn new(completions: Arc<Completions>) -> Self {
        Self { completions, pairs: Vec::new(), asked: None }
    }

    fn device(&self) -> &Domain {
        self.completions.domain()
    }
}

impl VerbsLink {
    pub(crate) fn new(
        world: usize,
        peers: Vec<Peer>,
        state: LinkState,
        rails: Vec<Rail>,
        areas: Pages,
        description: String,
    ) -> io::Result<Self> {
        let sleeper = Sleeper::new()?;
        for rail in &rails {
            sleeper.add(*rail.completions.wakes, *rail.device().events)?;
        }
        let mut places = vec![None; world];
        peers.iter().enumerate().for_each(|(index, peer)| places[peer.rank] = Some(index));
        let (listed, gone, failure, is_proven) = (Vec::new(), Vec::new(), None, false);
        let description = format!("{description}; {}", state.registry.profile());
        let _areas = areas;
        Ok(Self {
            peers,
            state,
            rails,
            places,
            listed,
            sleeper,
            failure,
            gone,
            is_proven,
            renewer: None,
            description,
            _areas,
        })
    }

    /// The registry in which a communicator registers its allocations.
    pub fn registry(&self) -> Arc<Registry> {
        self.state.registry.clone()
    }

    /// The counters so far.
    pub fn counts(&self) -> Counts {
        let [writes, reports, announcements, sleeps, registrations] =
            std::array::from_fn(|index| self.state.counters.get(index));
        Counts { writes, reports, announcements, sleeps, registrations }
    }

    /// Sends an empty word over every connection, and waits until each has received one.
    ///
    /// # Errors
    /// The first connection that fails, or one that was silent until the limit.
    pub fn prove<'a>(&mut self, limit: impl Into<Limit<'a>>) -> Result<(), LinkError> {
        let limit = limit.into();
        let expected: u64 = self.peers.iter().map(|peer| peer.connections.len() as u64).sum();
        for peer in &mut self.peers {
            peer.push_probes();
            self.state.counters.add(counted::WRITES, peer.flush()? as u64);
        }
        loop {
            self.look()?;
            self.advance_listed()?;
            self.look_who_is_missed()?;
            let is_busy = self.peers.iter().any(Peer::is_busy);
            if !is_busy && self.counts().announcements >= expected {
                self.is_proven = true;
                return Ok(());
            }
            if limit.check().is_err() {
                let is_proven =
                    |connection: &Connection| connection.has_heard() && !connection.is_busy();
                let silent = self.peers.iter().find(|peer| !peer.connections.iter().all(is_proven));
                let peer = silent.map_or(self.state.rank, |peer| peer.rank);
                let kind = LinkErrorKind::Unreachable("no packets came through in time".into());
                return Err(LinkError { peer, kind });
            }
            self.park(Instant::now() + limit.nap(), 1)?;
        }
    }

    fn place(&self, peer: Rank) -> usize {
        self.places[peer].expect("the engine uses the link of each peer")
    }

    fn list(&mut self, peer: usize) {
        if !std::mem::replace(&mut self.peers[peer].is_listed, true) {
            self.listed.push(peer);
        }
    }

    /// Handles all completions. Returns whether there were any.
    fn look(&mut self) -> Result<bool, LinkError> {
        let mut found_any = false;
        for rail in 0..self.rails.len() {
            loop {
                let mut found = [ffi::Completion::default(); BATCH];
                let count = self.rails[rail].completions.poll(&mut found).map_err(|code| {
                    let what = format!("polling the completions of {}", self.device_name(rail));
                    LinkError::os(self.state.rank, what, io::Error::from_raw_os_error(code.abs()))
                })?;
                found[..count].iter().try_for_each(|completion| self.take(rail, completion))?;
                found_any |= count > 0;
                if count < BATCH {
                    break;
                }
            }
        }
        Ok(found_any)
    }

    /// Returns the error of a peer that is gone and still needed, if there is one. A connection
    /// that breaks flushes what it holds: of several failures, the one reported is not such a
    /// consequence.
    fn look_who_is_missed(&self) -> Result<(), LinkError> {
        let missed = |&index: &usize| Some((self.peers[index].is_missed()?, index));
        // A cause is more than a consequence.
        let missed = self.gone.iter().filter_map(missed).max_by_key(|(is_cause, _)| *is_cause);
        let error = missed.and_then(|(_, index)| self.peers[index].why_gone());
        error.map_or(Ok(()), Err)
    }

    fn device_name(&self, rail: usize) -> &str {
        &self.rails[rail].device().port.device
    }

    fn take(&mut self, rail: usize, completion: &ffi::Completion) -> Result<(), LinkError> {
        let pairs = &self.rails[rail].pairs;
        let Ok(at) = pairs.binary_search_by_key(&completion.qp_num, |(number, ..)| *number) else {
            if self.renewer.is_some() {
                // Of one that is no more.
                return Ok(());
            }
            let what = format!("a completion of queue pair {}, which is none", completion.qp_num);
            return Err(LinkError::protocol(self.state.rank, what));
        };
        let (_, peer, connection) = pairs[at];
        let Some(at) = self.peers.get_mut(peer).map(|peer| &mut peer.connections[connection])
        else {
            return Ok(());
        };
        let Some(is_receive) = at.pair.is_receive(completion.wr_id) else { return Ok(()) };
        if completion.status != ffi::WC_SUCCESS && is_receive {
            at.received();
        }
        if completion.status != ffi::WC_SUCCESS {
            let status = self.rails[rail].completions.describe(completion.status);
            let place = peer;
            let peer = &self.peers[place];
            let error = LinkError::os(
                peer.rank,
                peer.connections[connection].pair.to_string(),
                Cause::other(status),
            );
            let is_consequence = completion.status == ffi::WC_FLUSHED;
            if renewal::may_pass(completion.status) && self.begins_anew(place, &error) {
                return Ok(());
            }
            self.peers[place].broke(error, is_consequence);
            self.note_gone(place);
            return Ok(());
        }
        self.list(peer);
        if completion.opcode == ffi::WC_RECV_RDMA_WITH_IMM {
            self.state.counters.add(counted::ANNOUNCEMENTS, 1);
            let word = Word::decode(u32::from_be(completion.imm_data));
            self.peers[peer].hear(
                connection,
                word,
                completion.byte_len as usize,
                &mut self.state,
            )?;
            if word.kind == Kind::Goodbye {
                self.note_gone(peer);
            }
            Ok(())
        } else {
            self.state.counters.add(counted::REPORTS, 1);
            self.peers[peer].reported(connection, &mut self.state)
        }
    }

    fn note_gone(&mut self, peer: usize) {
        if !self.gone.contains(&peer) {
            self.gone.push(peer);
        }
    }

    /// Advances the listed peers.
    fn advance_listed(&mut self) -> Result<(), LinkError> {
        while let Some(index) = self.listed.pop() {
            let peer = &mut self.peers[index];
            peer.is_listed = false;
            let writes = peer.advance(&mut self.state)? as u64;
            let unposted = peer.unposted.take();
            self.state.counters.add(counted::WRITES, writes);
            if let Some(error) = unposted
                && !self.begins_anew(index, &error)
            {
                return Err(error);
            }
        }
        Ok(())
    }

    fn move_on(&mut self) -> Result<(), LinkError> {
        // What was posted goes out before the rest is looked at.
        self.advance_listed()?;
        let found = self.look()?;
        if self.renew()? || found {
            self.advance_listed()?;
        }
        self.look_who_is_missed()
    }

    /// What must wake this rank: peers' messages, and completions only if they are waited for.
    fn notice(&self) -> Notice {
        let waits = !self.is_proven
            || self.state.is_sending()
            || self.peers.iter().any(Peer::waits_for_reports);
        if waits { Notice::All } else { Notice::Messages }
    }

    fn ask(&mut self) -> Result<(), LinkError> {
        let notice = self.notice();
        for rail in &mut self.rails {
            if rail.asked >= Some(notice) {
                continue;
            }
            rail.completions.ask(notice).map_err(|code| {
                let what = format!("asking {} for completions", rail.device().port.device);
                LinkError::os(self.state.rank, what, io::Error::from_raw_os_error(code.abs()))
            })?;
            rail.asked = Some(notice);
        }
        Ok(())
    }

    /// Handles what a sleep has brought.
    fn wake_up(&mut self, news: News) {
        if news.completions {
            for rail in &mut self.rails {
                if rail.completions.take_events() {
                    rail.asked = None;
                }
            }
        }
        if news.events {
            self.rails.iter().for_each(|rail| rail.device().take_events());
        }
    }

    /// A failure of the whole link or of a device, if there is one.
    fn failure(&self) -> Option<LinkError> {
        let of_device = |rail: &Rail| {
            let what = rail.device().failure()?;
            Some(LinkError::os(
                self.state.rank,
                what.to_owned(),
                Cause::other("a broken connection"),
            ))
        };
        self.failure.clone().or_else(|| self.rails.iter().find_map(of_device))
    }

    /// Waits until the devices have read the last messages, which were reported as done once
    /// copied; then says goodbye. Does not wait for peers that have said goodbye themselves.
    fn say_last_words(&mut self) {
        let until = Instant::now() + self.last_words();
        self.settle(until);
        if self.state.open == 0 {
            self.peers.iter_mut().for_each(Peer::push_goodbye);
            (0..self.peers.len()).for_each(|peer| self.list(peer));
            self.settle(until);
        }
    }

    /// Waits until all writes are done, unless transfers are open.
    fn settle(&mut self, until: Instant) {
        let is_busy = |peers: &[Peer]| peers.iter().any(Peer::is_busy);
        let mut asks_at = Instant::now() + LAST_WORDS;
        while self.state.open == 0 && is_busy(&self.peers) && Instant::now() < until {
            let is_over =
                self.advance_listed().is_err() || self.look().is_err() || self.renew().is_err();
            if is_over {
                return;
            }
            if Instant::now() >= asks_at {
                self.ask_busy();
                asks_at = Instant::now() + LAST_WORDS;
            }
            if self.is_renewing() {
                self.nap();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Link for VerbsLink {
    fn begin(&mut self, call: &Call, regions: &Regions) {
        self.state.begin(call, regions);
        for peer in 0..self.peers.len() {
            self.peers[peer].counts = None;
            if self.peers[peer].is_ahead() {
                self.list(peer);
            }
        }
    }

    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts) {
        let peer = self.place(peer);
        self.peers[peer].counts = Some(counts);
    }

    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError> {
        let from = memory.base().cast_const();
        let peer = self.place(to);
        self.peers[peer].send(Send { ticket, from, bytes: memory.bytes() })?;
        self.state.open += 1;
        self.list(peer);
        Ok(())
    }

    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError> {
        let into = memory.base();
        let peer = self.place(from);
        self.state.open += 1;
        self.peers[peer].receive(Receive { ticket, into, bytes: memory.bytes(), landing });
        self.list(peer);
        Ok(())
    }

    fn retract(&mut self, from: Rank, ticket: Ticket) -> bool {
        let peer = self.place(from);
        let retracted = self.peers[peer].retract(ticket);
        self.state.open -= usize::from(retracted);
        retracted
    }

    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError> {
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let result = self.move_on();
        done.append(&mut self.state.done);
        match &result {
            // It ends only what it concerns, and that may be taken back.
            Err(LinkError { kind: LinkErrorKind::Closed, .. }) | Ok(()) => {}
            Err(error) => self.failure = Some(error.clone()),
        }
        result
    }

    fn arrived(&self, ticket: Ticket) -> *const u8 {
        self.state.arrival(ticket)
    }

    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError> {
        self.state.release(ticket);
        Ok(())
    }

    fn mark(&mut self) {
        self.state.marked = true;
    }

    fn is_marked(&self) -> bool {
        self.state.marked
    }

    fn patience(&self) -> Patience {
        // Devices made by software do their work on the processors that ranks pause on.
        let is_software = self.rails.iter().any(|rail| rail.device().port.is_software);
        let pauses = if is_software { 0 } else { Patience::MEMORY.pauses };
        Patience { pauses, yields: YIELDS, spell: Patience::SPELL }
    }

    fn park(&mut self, until: Instant, _wanted: usize) -> Result<(), LinkError> {
        if !self.arm() {
            return Ok(());
        }
        self.state.counters.add(counted::SLEEPS, 1);
        let news = self.sleeper.sleep(until.saturating_duration_since(Instant::now()));
        let news =
            news.map_err(|error| LinkError::os(self.state.rank, "waiting for completions", error))?;
        self.wake_up(news);
        Ok(())
    }

    fn arm(&mut self) -> bool {
        if !self.listed.is_empty() || !self.state.done.is_empty() || self.failure().is_some() {
            return false;
        }
        // What came before the queues were asked tells nobody: look once more.
        let looked = self.ask().and_then(|()| self.look());
        match looked {
            Ok(found) => !found,
            Err(error) => {
                self.failure = Some(error);
                false
            }
        }
    }

    fn disarm(&mut self) {
        if let Ok(news) = self.sleeper.sleep(Duration::ZERO) {
            self.wake_up(news);
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.sleeper.descriptor()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.sleeper.doorbell()
    }

    fn abort(&mut self) {
        if self.failure().is_none() {
            self.say_last_words();
        }
        self.close_inbox();
        // Without their queue pairs the devices touch no memory for this link any more.
        self.peers.iter_mut().for_each(|peer| peer.connections.clear());
        self.peers.clear();
        self.gone.clear();
        self.listed.clear();
        self.state.clear();
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        None
    }

    /// The devices in use and how borrowed memory is handled.
    fn description(&self) -> String {
        format!("RDMA: {}", self.description)
    }

    fn counters(&self) -> Option<Arc<LinkCounters>> {
        Some(self.state.counters.clone())
    }
}

impl Drop for VerbsLink {
    fn drop(&mut self) {
        tracing::debug!("RDMA: {:?}", self.counts());
        if self.rails.iter().all(|rail| rail.device().is_ours()) {
            self.abort();
        }
    }
}
