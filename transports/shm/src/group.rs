//! The ranks of a host as a group: one counter and one futex for all of them.
//!
//! An arrival adds to the counter; the last one starts the counter over, moves the generation on
//! and wakes everybody with one system call, if anybody sleeps. Cards and deposits are double
//! buffered by the parity of the enter: whoever enters for the k+2nd time has completed the k+1st
//! enter, which everyone reached after reading what the k-th published. So a collective of
//! deposits needs a single arrival.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use unisum_link::{Arrival, Group, LinkError, Rank, Region};

use crate::bell::{Bell, wake};
use crate::inbox::Peer;
use crate::layout::{ARRIVED, BENCH_BYTES, GENERATION, SLEEPERS, SLOT_BYTES};
use crate::mailbox::{CallWords, Place};
use crate::mapping::Mapping;

/// The generation counts above the word's low byte, which a wake changes (see `bell`).
const GENERATION_STEP: u32 = 1 << 8;

/// This rank's membership.
#[derive(Debug)]
pub(crate) struct Team {
    mapping: Arc<Mapping>,
    bell: Arc<Bell>,
    members: Vec<Rank>,
    /// In the order of `members`, this rank included.
    peers: Vec<Peer>,
    own: usize,
    call: CallWords,
    region: Option<Region>,
    arrivals: u32,
    enters: u32,
    /// The enter whose cards are still to be compared.
    unread: Option<Arrival>,
    /// Where each member's data is, once the cards are read.
    places: Vec<Place>,
}

impl Team {
    pub(crate) fn new(
        mapping: Arc<Mapping>,
        bell: Arc<Bell>,
        peers: Vec<Peer>,
        own: usize,
    ) -> Self {
        Self {
            mapping,
            bell,
            members: peers.iter().map(|peer| peer.rank).collect(),
            peers,
            own,
            call: CallWords::default(),
            region: None,
            arrivals: 0,
            enters: 0,
            unread: None,
            places: Vec::new(),
        }
    }

    /// Starts a collective: what the next enter publishes.
    pub(crate) fn begin(&mut self, call: CallWords, region: Region) {
        self.call = call;
        self.region = Some(region);
    }

    /// Forgets the region.
    pub(crate) fn clear(&mut self) {
        self.region = None;
        self.places.clear();
    }

    /// Looks up the members' process ids, once they are all there.
    pub(crate) fn look_up_processes(&mut self) {
        for peer in &mut self.peers {
            let control = self.mapping.layout().control(peer.seat);
            // Relaxed: written before the peer's first arrival, and that is complete.
            peer.pid = self.mapping.word(control.pid()).load(Ordering::Relaxed);
        }
    }

    /// The members as peers, this rank included.
    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    fn region(&self) -> Region {
        self.region.expect("the engine begins a collective before it enters it")
    }

    /// The parity of the current enter.
    fn parity(&self) -> u32 {
        self.enters & 1
    }

    /// Copies the region to this rank's slot.
    fn deposit(&self, region: Region) -> Place {
        let bytes = region.bytes();
        assert!(bytes <= SLOT_BYTES, "a deposit of {bytes} bytes in a slot of {SLOT_BYTES}");
        let at = self.mapping.layout().deposit(self.peers[self.own].seat, self.parity());
        let slot = self.mapping.pointer(at, bytes as u64);
        // SAFETY: the region is readable, the slot as long (just checked) and this rank's own;
        // its readers of two enters ago are done (see the head of this file).
        unsafe { slot.copy_from_nonoverlapping(region.base(), bytes) };
        Place::Deposit
    }

    /// Reads all members' cards of the complete enter, and compares their calls with ours.
    fn read_cards(&mut self) -> Result<(), LinkError> {
        self.places.clear();
        let bytes = self.region().bytes() as u64;
        for peer in &self.peers {
            let at = self.mapping.layout().card(peer.seat, self.parity());
            // Relaxed: ordered by the generation, which was loaded with Acquire.
            let word = |index: u64| self.mapping.wide(at + 8 * index).load(Ordering::Relaxed);
            let call = [word(0), word(1), word(2)];
            if call != self.call {
                return Err(peer.mismatch(&self.call, &call));
            }
            let place = Place::decode([word(3), word(4)]);
            if let Some(Place::Heap(offset)) = place {
                peer.mapped(&self.mapping, offset, bytes)?;
            }
            let unknown = || LinkError::protocol(peer.rank, "a region at an unknown place");
            self.places.push(place.ok_or_else(unknown)?);
        }
        Ok(())
    }

    fn index(&self, member: Rank) -> usize {
        self.members.binary_search(&member).expect("the plan names members only")
    }
}

impl Group for Team {
    fn members(&self) -> &[Rank] {
        &self.members
    }

    fn slot_bytes(&self) -> usize {
        SLOT_BYTES
    }

    fn enter(&mut self, deposit: bool) -> Arrival {
        self.enters = self.enters.wrapping_add(1);
        let region = self.region();
        let place = match region.heap_offset() {
            _ if deposit => self.deposit(region),
            Some(offset) => Place::Heap(offset),
            None => Place::Process(region.base() as u64),
        };
        let card = self.mapping.layout().card(self.peers[self.own].seat, self.parity());
        let [kind, location] = place.encode();
        let words = [self.call[0], self.call[1], self.call[2], kind, location];
        for (index, word) in (0..).zip(words) {
            // Relaxed: published by the arrival below.
            self.mapping.wide(card + 8 * index).store(word, Ordering::Relaxed);
        }
        let arrival = self.arrive();
        self.unread = Some(arrival);
        arrival
    }

    fn arrive(&mut self) -> Arrival {
        self.arrivals = self.arrivals.wrapping_add(1);
        let mapping = &*self.mapping;
        let control = mapping.layout().control(self.peers[self.own].seat);
        // Relaxed: only names the late ones, and orders nothing.
        mapping.word(control.arrivals()).store(self.arrivals, Ordering::Relaxed);
        // AcqRel: releases what this rank did to the last arrival, which acquires what all did.
        let before = mapping.word(ARRIVED).fetch_add(1, Ordering::AcqRel);
        if before as usize + 1 == self.members.len() {
            // Relaxed: nobody arrives again before seeing the new generation.
            mapping.word(ARRIVED).store(0, Ordering::Relaxed);
            let generation = mapping.word(GENERATION);
            // SeqCst: releases everything to the Acquire in `complete`; and Dekker with `park`,
            // which counts itself among the sleepers and then loads the generation.
            generation.fetch_add(GENERATION_STEP, Ordering::SeqCst);
            if mapping.word(SLEEPERS).load(Ordering::SeqCst) != 0 {
                wake(generation, u32::MAX >> 1);
            }
        }
        Arrival(self.arrivals)
    }

    fn complete(&mut self, arrival: Arrival) -> Result<bool, LinkError> {
        // Acquire: pairs with the addition of the last arrival.
        if !is_complete(self.mapping.word(GENERATION).load(Ordering::Acquire), arrival) {
            return Ok(false);
        }
        if self.unread == Some(arrival) {
            self.unread = None;
            self.read_cards()?;
        }
        Ok(true)
    }

    fn missing(&self, arrival: Arrival) -> Vec<Rank> {
        let late = |peer: &&Peer| {
            let control = self.mapping.layout().control(peer.seat);
            let arrivals = self.mapping.word(control.arrivals()).load(Ordering::Relaxed);
            arrivals.wrapping_sub(arrival.0) >= 1 << 31
        };
        self.peers.iter().filter(late).map(|peer| peer.rank).collect()
    }

    fn park(&mut self, arrival: Arrival, until: Instant) -> Result<(), LinkError> {
        if self.bell.take_poke() {
            return Ok(());
        }
        let sleepers = self.mapping.word(SLEEPERS);
        // SeqCst: Dekker with `arrive`.
        sleepers.fetch_add(1, Ordering::SeqCst);
        let outcome = self.bell.park_grouped(|word| !is_complete(word, arrival), until);
        // Relaxed: a sleeper too many costs one system call.
        sleepers.fetch_sub(1, Ordering::Relaxed);
        let own = self.members[self.own];
        outcome.map_err(|error| LinkError::os(own, "sleeping on a futex", error))
    }

    fn registered(&self) -> bool {
        self.places.iter().all(|place| matches!(place, Place::Heap(_)))
    }

    fn source(&self, member: Rank, bytes: Range<usize>) -> Result<Option<*const u8>, LinkError> {
        let index = self.index(member);
        let (peer, len) = (&self.peers[index], bytes.len());
        let start = bytes.start as u64;
        match self.places[index] {
            Place::Deposit => {
                assert!(bytes.end <= SLOT_BYTES, "{bytes:?} lie outside of a deposit");
                let at = self.mapping.layout().deposit(peer.seat, self.parity()) + start;
                Ok(Some(self.mapping.pointer(at, len as u64).cast_const()))
            }
            _ if index == self.own => Ok(Some(self.region().pointer(&bytes).cast_const())),
            Place::Heap(offset) => {
                let at = peer.mapped(&self.mapping, offset + start, len as u64)?;
                Ok(Some(at.cast_const()))
            }
            Place::Process(_) => Ok(None),
            Place::Staged => Err(LinkError::protocol(member, "a staged region in a group")),
        }
    }

    fn target(&self, member: Rank, bytes: Range<usize>) -> *mut u8 {
        let index = self.index(member);
        let Place::Heap(offset) = self.places[index] else {
            panic!("the region of rank {member} is not registered");
        };
        let region = self.region().bytes();
        assert!(bytes.end <= region, "{bytes:?} lie outside of a region of {region} bytes");
        let at = self.mapping.layout().heap(self.peers[index].seat) + offset + bytes.start as u64;
        self.mapping.pointer(at, bytes.len() as u64)
    }

    fn bench_bytes(&self) -> usize {
        BENCH_BYTES
    }

    fn bench(&self, member: Rank, bytes: Range<usize>) -> *mut u8 {
        assert!(bytes.end <= BENCH_BYTES, "{bytes:?} lie outside of a bench");
        let seat = self.peers[self.index(member)].seat;
        let at = self.mapping.layout().bench(seat) + bytes.start as u64;
        self.mapping.pointer(at, bytes.len() as u64)
    }
}

/// Whether a generation word says that an arrival is complete. Both wrap, the word after 24 bits.
const fn is_complete(word: u32, arrival: Arrival) -> bool {
    (word & !0xff).wrapping_sub(arrival.0.wrapping_mul(GENERATION_STEP)) < 1 << 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_wrap() {
        for arrival in [0, 1, 0xff_fffe, 0xff_ffff, 0x100_0000, u32::MAX] {
            let word = arrival.wrapping_mul(GENERATION_STEP) | 0x7f;
            assert!(is_complete(word, Arrival(arrival)));
            assert!(!is_complete(word, Arrival(arrival.wrapping_add(1))));
        }
    }
}
