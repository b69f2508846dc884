//! The link: a mailbox to and from each rank of the host, and the group of all ranks.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Instant;

use unisum_link::{
    Call, Group, Landing, Link, LinkError, PeerCounts, Rank, Region, Regions, Ticket, Wake,
};

use crate::doorbell::{Doorbell, URGENT};
use crate::group::Team;
use crate::heap::Heap;
use crate::heaps::Heaps;
use crate::inbox::{Arrived, Inbox, Peer};
use crate::layout::WITHDRAWN;
use crate::mailbox::CallWords;
use crate::mapping::Mapping;
use crate::outbox::{Outbox, Sender};

/// This rank's end of the memory that the ranks of its host share.
#[derive(Debug)]
pub struct ShmLink {
    mapping: Arc<Mapping>,
    doorbell: Arc<Doorbell>,
    heaps: Heaps,
    team: Team,
    rank: Rank,
    local_index: u64,
    /// The other members, ascending.
    peers: Vec<Rank>,
    /// In the order of `peers`.
    pairs: Vec<Pair>,
    call: CallWords,
    /// The output of the collective under way: peers may write it.
    output: Option<Region>,
    marked: bool,
    arrived: HashMap<Ticket, (usize, Arrived)>,
    /// Done before anybody asked.
    done: Vec<Ticket>,
    /// Why nothing can go on, for the next progress.
    failed: Option<LinkError>,
    /// The count of events at the last look.
    seen: u32,
    /// Whether something was posted since.
    posted: bool,
    /// Whether the kernel lets every member read every other's private memory, as agreed.
    reads_private: bool,
    /// What peers read to find out whether they can.
    _probe: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Pair {
    inbox: Inbox,
    outbox: Outbox,
    /// What the call under way has for the peer and expects of it, where it does not say so itself.
    counts: Option<PeerCounts>,
}

impl ShmLink {
    /// Has its members spread over the cores that they may run on.
    pub(crate) fn spread(&mut self) {
        self.team.spread();
    }

    pub(crate) fn new(
        mapping: Arc<Mapping>,
        doorbell: Arc<Doorbell>,
        team: Team,
        me: Peer,
        heaps: Heaps,
        probe: Arc<AtomicU64>,
        reads_private: bool,
    ) -> Self {
        let others = team.peers().iter().filter(|peer| peer.rank != me.rank);
        let pair = |peer: &Peer| Pair {
            inbox: Inbox::new(&mapping, &me, *peer, heaps.of(peer.rank)),
            outbox: Outbox::new(&mapping, me.local_index, *peer),
            counts: None,
        };
        Self {
            peers: others.clone().map(|peer| peer.rank).collect(),
            pairs: others.map(pair).collect(),
            seen: doorbell.events(),
            mapping,
            doorbell,
            heaps,
            team,
            rank: me.rank,
            local_index: me.local_index,
            call: CallWords::default(),
            output: None,
            marked: false,
            arrived: HashMap::new(),
            done: Vec::new(),
            failed: None,
            posted: true,
            _probe: probe,
            reads_private,
        }
    }

    /// This rank's registered memory.
    pub fn heap(&self) -> Heap {
        self.heaps.own.clone()
    }

    /// The registered memory of all ranks of the link.
    pub fn heaps(&self) -> Heaps {
        self.heaps.clone()
    }

    fn pair(&self, peer: Rank) -> Result<usize, LinkError> {
        let stranger = |_| LinkError::protocol(peer, "this rank shares no memory with it");
        self.peers.binary_search(&peer).map_err(stranger)
    }

    /// Sends what the pair's outbox has room for.
    fn push_out(&mut self, index: usize) -> Result<(), LinkError> {
        let mut sender = Sender {
            mapping: &self.mapping,
            doorbell: &self.doorbell,
            readable: self.reads_private,
            marked: self.marked,
            done: &mut self.done,
        };
        self.pairs[index].outbox.progress(&mut sender)
    }

    /// Copies and releases what peers lent, because they may wait for it while we sleep. An engine
    /// that exchanges a range, for example, can fold an arrival only when its own send is done,
    /// which the peer in turn may hold.
    fn copy_out(&mut self) {
        for (index, slot) in self.arrived.values_mut() {
            let copied = self.pairs[*index].inbox.copy_out(&self.mapping, &self.doorbell, slot);
            if let Err(error) = copied {
                self.failed.get_or_insert(error);
            }
        }
    }

    /// Takes back what this rank lent: announces to the peers that its memory has changed.
    fn leave(&self) {
        let control = self.mapping.layout().control(self.local_index);
        self.mapping.word(control.gone()).store(1, Ordering::Relaxed);
        // Release: who sees the word finds the rank's own set. Otherwise another was first.
        let _ = self.mapping.word(WITHDRAWN).compare_exchange(
            0,
            self.local_index as u32 + 1,
            Ordering::Release,
            Ordering::Relaxed,
        );
        // Orders the stores before whatever the owner of the memory does next; pairs with the
        // fences in `Peer::confirm` and `Team::confirm`.
        fence(Ordering::SeqCst);
    }
}

impl Pair {
    /// A call of this rank as the peer hears it.
    fn told(&self, call: CallWords) -> CallWords {
        self.counts.map_or(call, |counts| counts.told(own(&call)).words())
    }

    /// The same as the peer has to tell it.
    fn heard(&self, call: CallWords) -> CallWords {
        self.counts.map_or(call, |counts| counts.heard(own(&call)).words())
    }
}

fn own(call: &CallWords) -> Call {
    Call::from_words(call).expect("this rank's call was one before it was words")
}

impl Link for ShmLink {
    fn begin(&mut self, call: &Call, regions: &Regions) {
        self.call = call.words();
        self.output = Some(regions.output);
        self.marked = false;
        for pair in &mut self.pairs {
            (pair.inbox.marked, pair.counts) = (false, None);
        }
        self.team.begin(self.call, regions);
    }

    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts) {
        if let Ok(index) = self.pair(peer) {
            self.pairs[index].counts = Some(counts);
        }
    }

    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError> {
        let index = self.pair(to)?;
        let pair = &mut self.pairs[index];
        pair.outbox.push(pair.told(self.call), memory, ticket);
        self.posted = true;
        self.push_out(index)
    }

    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError> {
        let index = self.pair(from)?;
        let pair = &mut self.pairs[index];
        pair.inbox.push(pair.heard(self.call), memory, landing, ticket);
        self.posted = true;
        Ok(())
    }

    fn retract(&mut self, from: Rank, ticket: Ticket) -> bool {
        self.pair(from).is_ok_and(|index| self.pairs[index].inbox.retract(ticket))
    }

    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError> {
        self.seen = self.doorbell.events();
        self.posted = false;
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        for index in 0..self.pairs.len() {
            self.push_out(index)?;
            let (finished, arrived) = (&mut self.done, &mut self.arrived);
            let mut finish = |ticket, slot: Option<Arrived>| {
                finished.push(ticket);
                if let Some(slot) = slot {
                    arrived.insert(ticket, (index, slot));
                }
            };
            self.pairs[index].inbox.progress(&self.mapping, &self.doorbell, &mut finish)?;
        }
        done.append(&mut self.done);
        Ok(())
    }

    fn arrived(&self, ticket: Ticket) -> *const u8 {
        self.arrived[&ticket].1.at
    }

    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError> {
        let (index, slot) = self.arrived.remove(&ticket).expect("only arrivals are released");
        self.pairs[index].inbox.release(&self.mapping, &self.doorbell, slot)
    }

    fn mark(&mut self) {
        self.marked = true;
        self.team.mark();
    }

    fn is_marked(&self) -> bool {
        self.marked || self.team.is_marked() || self.pairs.iter().any(|pair| pair.inbox.marked)
    }

    fn park(&mut self, until: Instant, wanted: usize) -> Result<(), LinkError> {
        // What was posted may concern an event that was already counted.
        if self.posted || self.doorbell.take_poke() {
            return Ok(());
        }
        self.copy_out();
        if self.failed.is_some() {
            return Ok(());
        }
        // Every ticket takes an event at least, and events that oblige us weigh more than any
        // number wanted.
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX).clamp(1, URGENT - 1);
        self.doorbell
            .park(self.seen, wanted, until)
            .map_err(|error| LinkError::os(self.rank, "sleeping on a futex", error))
    }

    fn arm(&mut self) -> bool {
        if self.posted {
            return false;
        }
        self.copy_out();
        self.failed.is_none() && self.doorbell.arm(self.seen)
    }

    fn disarm(&mut self) {
        self.doorbell.disarm();
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.descriptor()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.doorbell) as Arc<dyn Wake>
    }

    fn abort(&mut self) {
        self.leave();
        for pair in &mut self.pairs {
            pair.inbox.clear();
            pair.outbox.clear();
        }
        self.arrived.clear();
        self.done.clear();
        self.team.clear();
        self.heaps.own.abort(self.output.take());
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        Some(&mut self.team)
    }
}

impl Drop for ShmLink {
    fn drop(&mut self) {
        if self.mapping.is_mapped_here() {
            self.leave();
        }
    }
}
