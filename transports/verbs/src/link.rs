//! The link: connections to all peers over this rank's devices.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_link::{
    Call, Group, Landing, Link, LinkError, LinkErrorKind, Patience, PeerCounts, Rank, Region,
    Regions, Ticket, Wake,
};

use crate::completions::{Completions, Notice};
use crate::desk::{Desk, Receive, Send};
use crate::domain::Domain;
use crate::ffi;
use crate::lane::Lane;
use crate::memory::{Pages, Registry};
use crate::peer::Peer;
use crate::sleep::{News, Sleeper};
use crate::wire::{Kind, Word};

/// A device with what this rank has on it.
#[derive(Debug)]
pub(crate) struct Rail {
    pub(crate) completions: Arc<Completions>,
    /// Which peer's which connection each queue pair is, ascending by its number.
    pub(crate) pairs: Vec<(u32, usize, usize)>,
    /// What the queue was last asked to tell, until it did.
    asked: Option<Notice>,
}

/// What a link has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes posted: data, announcements, small messages, credits.
    pub writes: u64,
    /// Reports of own writes.
    pub reports: u64,
    /// Announcing writes of peers.
    pub announcements: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Times it registered borrowed memory.
    pub registrations: u64,
}

/// This rank's end of its connections over RDMA. See [`unisum_link::Link`].
#[derive(Debug)]
pub struct VerbsLink {
    // Connections first: what they touch must outlive them.
    peers: Vec<Peer>,
    desk: Desk,
    rails: Vec<Rail>,
    /// By rank: which of the peers it is.
    places: Vec<Option<usize>>,
    /// Peers to look after.
    listed: Vec<usize>,
    sleeper: Sleeper,
    /// Why nothing can go on, for the next progress.
    failure: Option<LinkError>,
    /// Peers that left or broke.
    gone: Vec<usize>,
    /// Whether all connections are proven. Until then every report is waited for.
    is_proven: bool,
    counts: Counts,
    description: String,
    _areas: Pages,
}

/// Completions that are looked at together.
const BATCH: usize = 16;
/// Looks after yielding before a rank sleeps. Going to sleep on a completion queue and waking takes
/// several system calls and an interrupt, 10 to 20 us: looking for as long costs twice the best at
/// most (Karlin et al., Competitive randomized algorithms for nonuniform problems, 1994).
const YIELDS: u32 = 64;
/// How often a proof asks whether there is still a point in it.
const PROOF_NAP: Duration = Duration::from_millis(100);
/// How long a link that is left waits for its last messages to be read by its devices.
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
        desk: Desk,
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
        let counts = Counts::default();
        let description = format!("{description}; {}", desk.registry.profile());
        let _areas = areas;
        Ok(Self {
            peers,
            desk,
            rails,
            places,
            listed,
            sleeper,
            failure,
            gone,
            is_proven,
            counts,
            description,
            _areas,
        })
    }

    /// Where a communicator registers the memory that it allocates.
    pub fn registry(&self) -> Arc<Registry> {
        self.desk.registry.clone()
    }

    /// The devices in use and what is done with borrowed memory, for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What it has done so far.
    pub const fn counts(&self) -> Counts {
        Counts { registrations: self.desk.registrations, ..self.counts }
    }

    /// Sends an empty word over every connection and waits until each has brought one.
    ///
    /// # Errors
    /// The first connection that fails, or one that was silent until `until`, or until
    /// `is_pointless`, which is asked now and then.
    pub fn prove(
        &mut self,
        until: Instant,
        is_pointless: &dyn Fn() -> bool,
    ) -> Result<(), LinkError> {
        let expected: u64 = self.peers.iter().map(|peer| peer.lanes.len() as u64).sum();
        for peer in &mut self.peers {
            peer.push_probes();
            self.counts.writes += peer.flush()? as u64;
        }
        loop {
            self.look()?;
            self.advance_listed()?;
            self.look_who_is_missed()?;
            let is_busy = self.peers.iter().any(Peer::is_busy);
            if !is_busy && self.counts.announcements >= expected {
                self.is_proven = true;
                return Ok(());
            }
            let now = Instant::now();
            if now >= until || is_pointless() {
                let is_proven = |lane: &Lane| lane.has_heard() && !lane.is_busy();
                let silent = self.peers.iter().find(|peer| !peer.lanes.iter().all(is_proven));
                let peer = silent.map_or(self.desk.rank, |peer| peer.rank);
                let kind = LinkErrorKind::Unreachable("no packets came through in time".into());
                return Err(LinkError { peer, kind });
            }
            self.park(until.min(now + PROOF_NAP), 1)?;
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

    /// Takes all completions. `true` if there were any.
    fn look(&mut self) -> Result<bool, LinkError> {
        let mut found_any = false;
        for rail in 0..self.rails.len() {
            loop {
                let mut found = [ffi::Completion::default(); BATCH];
                let count = self.rails[rail].completions.poll(&mut found).map_err(|code| {
                    let what = format!("polling the completions of {}", self.device_name(rail));
                    LinkError::os(self.desk.rank, what, format!("code {code}"))
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

    /// Gives the error of a peer that is gone and is missed, if there is one. A connection that
    /// breaks flushes what it holds: of several failures the one is told that is no such
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
            let what = format!("a completion of queue pair {}, which is none", completion.qp_num);
            return Err(LinkError::protocol(self.desk.rank, what));
        };
        let (_, peer, lane) = pairs[at];
        if completion.status != ffi::WC_SUCCESS {
            let status = self.rails[rail].completions.describe(completion.status);
            let (place, peer) = (peer, &mut self.peers[peer]);
            let error = LinkError::os(peer.rank, peer.lanes[lane].pair.to_string(), status);
            let is_consequence = completion.status == ffi::WC_FLUSHED;
            peer.broke(error, is_consequence);
            self.note_gone(place);
            return Ok(());
        }
        self.list(peer);
        if completion.opcode == ffi::WC_RECV_RDMA_WITH_IMM {
            self.counts.announcements += 1;
            let word = Word::decode(u32::from_be(completion.imm_data));
            self.peers[peer].hear(lane, word, completion.byte_len as usize, &mut self.desk)?;
            if word.kind == Kind::Goodbye {
                self.note_gone(peer);
            }
            Ok(())
        } else {
            self.counts.reports += 1;
            self.peers[peer].reported(lane, &mut self.desk)
        }
    }

    fn note_gone(&mut self, peer: usize) {
        if !self.gone.contains(&peer) {
            self.gone.push(peer);
        }
    }

    /// Looks after the listed peers.
    fn advance_listed(&mut self) -> Result<(), LinkError> {
        while let Some(index) = self.listed.pop() {
            let peer = &mut self.peers[index];
            peer.is_listed = false;
            self.counts.writes += peer.advance(&mut self.desk)? as u64;
        }
        Ok(())
    }

    fn move_on(&mut self) -> Result<(), LinkError> {
        // What was posted goes out before the rest is looked at.
        self.advance_listed()?;
        if self.look()? {
            self.advance_listed()?;
        }
        self.look_who_is_missed()
    }

    /// What has to wake this rank: peers' messages, and reports only if they are waited for.
    fn notice(&self) -> Notice {
        let waits = !self.is_proven
            || self.desk.is_sending()
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
                LinkError::os(self.desk.rank, what, format!("code {code}"))
            })?;
            rail.asked = Some(notice);
        }
        Ok(())
    }

    /// Takes over what a sleep has brought.
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

    /// What ends everything: a failure of this link, or of a device.
    fn failure(&self) -> Option<LinkError> {
        let of_device = |rail: &Rail| {
            let what = rail.device().failure()?;
            Some(LinkError::os(self.desk.rank, what.to_owned(), "a broken connection"))
        };
        self.failure.clone().or_else(|| self.rails.iter().find_map(of_device))
    }

    /// Waits for the devices to have read what was sent last, as it was reported as done when it
    /// was copied; then says goodbye. Peers that have said so themselves are not waited for.
    fn say_last_words(&mut self) {
        let until = Instant::now() + LAST_WORDS;
        self.settle(until);
        if self.desk.open == 0 {
            self.peers.iter_mut().for_each(Peer::push_goodbye);
            (0..self.peers.len()).for_each(|peer| self.list(peer));
            self.settle(until);
        }
    }

    /// Waits until all writes are done, unless transfers are open.
    fn settle(&mut self, until: Instant) {
        let is_busy = |peers: &[Peer]| peers.iter().any(Peer::is_busy);
        while self.desk.open == 0 && is_busy(&self.peers) && Instant::now() < until {
            if self.advance_listed().is_err() || self.look().is_err() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

impl Link for VerbsLink {
    fn begin(&mut self, call: &Call, regions: &Regions) {
        self.desk.begin(call, regions);
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
        self.desk.open += 1;
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
        self.desk.open += 1;
        self.peers[peer].receive(Receive { ticket, into, bytes: memory.bytes(), landing });
        self.list(peer);
        Ok(())
    }

    fn retract(&mut self, from: Rank, ticket: Ticket) -> bool {
        let peer = self.place(from);
        let retracted = self.peers[peer].retract(ticket);
        self.desk.open -= usize::from(retracted);
        retracted
    }

    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError> {
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let result = self.move_on();
        done.append(&mut self.desk.done);
        match &result {
            // It ends only what it concerns, and that may be taken back.
            Err(LinkError { kind: LinkErrorKind::Closed, .. }) | Ok(()) => {}
            Err(error) => self.failure = Some(error.clone()),
        }
        result
    }

    fn arrived(&self, ticket: Ticket) -> *const u8 {
        self.desk.arrival(ticket)
    }

    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError> {
        self.desk.release(ticket);
        Ok(())
    }

    fn mark(&mut self) {
        self.desk.marked = true;
    }

    fn is_marked(&self) -> bool {
        self.desk.marked
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
        self.counts.sleeps += 1;
        let news = self.sleeper.sleep(until.saturating_duration_since(Instant::now()));
        let news =
            news.map_err(|error| LinkError::os(self.desk.rank, "waiting for completions", error))?;
        self.wake_up(news);
        Ok(())
    }

    fn arm(&mut self) -> bool {
        if !self.listed.is_empty() || !self.desk.done.is_empty() || self.failure().is_some() {
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
        self.sleeper.bell()
    }

    fn abort(&mut self) {
        if self.failure().is_none() {
            self.say_last_words();
        }
        // Without their queue pairs the devices touch no memory for this link any more.
        self.peers.iter_mut().for_each(|peer| peer.lanes.clear());
        self.peers.clear();
        self.gone.clear();
        self.listed.clear();
        self.desk.clear();
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        None
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
