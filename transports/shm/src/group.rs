//! The ranks of a host as a group.
//!
//! Each member has two slots, for arrivals with odd and with even numbers, which only it writes. An
//! arrival is one cache line: the card (which arrival it is, the call, where the region is, or the
//! data itself if small), whose first word is written last. Waiting members check the others' cards
//! one after the other, so that between two cores one line moves each way, with the data. Nobody
//! reads back what it published: a core that reads a line may take it from the one that wrote it
//! (AMD's do).
//!
//! A slot is free again after two arrivals: a member that makes the k+2nd has completed the k+1st,
//! which everyone made after finishing with the k-th. So one arrival is enough for deposits.
//!
//! A member that is about to sleep counts itself and then checks all cards; one that completes an
//! arrival has filled its card and then looks for sleepers (Dekker, with a fence on either side).
//! So the last to fill a card finds all sleepers, or they find the card. It cannot miss them by
//! going to sleep itself: of several that do, the last to count itself sees all cards.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Instant;

use unisum_kernels::copy;
use unisum_link::{Arrival, Group, LinkError, Part, Rank, Region, Regions};

use crate::doorbell::Doorbell;
use crate::ffi::current_core;
use crate::heaps::{Heaps, PeerHeap};
use crate::inbox::Peer;
use crate::layout::{
    GROUP_STAGING_BYTES, GroupCard, INLINE_BYTES, MARKED, SLEEPERS, SLOT_BYTES, Slot, WITHDRAWN,
    WOKEN,
};
use crate::mailbox::CallWords;
use crate::mapping::Mapping;
use crate::spread::Spread;

/// The first word of a card: the number of the arrival above the kinds of its two places.
const KINDS_BITS: u32 = 8;

/// Where a member has its input or its output. The discriminant is the kind on its card; an arrival
/// that publishes nothing has kinds 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In its heap, at this offset.
    Heap(u64),
    /// In private memory, at this address.
    Process(u64),
    /// There is none.
    Nowhere,
    /// In its slot, at this offset of the mapping.
    Deposit(u64),
}

const HEAP: u64 = 1;
const PROCESS: u64 = 2;
const NOWHERE: u64 = 3;
/// Behind the card, and in the card itself.
const DEPOSIT: u64 = 4;
const INLINE_DEPOSIT: u64 = 5;

impl Place {
    /// Where a region lies: kind and location.
    fn of(region: Region) -> (u64, u64) {
        match region.heap_offset() {
            _ if region.bytes() == 0 => (NOWHERE, 0),
            Some(offset) => (HEAP, offset),
            None => (PROCESS, region.base() as u64),
        }
    }

    /// Reads what a member's card says; `None` if it means nothing.
    const fn decode(kind: u64, location: u64, slot: Slot) -> Option<Self> {
        match kind {
            HEAP => Some(Self::Heap(location)),
            PROCESS => Some(Self::Process(location)),
            NOWHERE => Some(Self::Nowhere),
            DEPOSIT => Some(Self::Deposit(slot.deposit())),
            INLINE_DEPOSIT => Some(Self::Deposit(slot.inline_deposit())),
            _ => None,
        }
    }

    const fn is_deposit(self) -> bool {
        matches!(self, Self::Deposit(_))
    }
}

/// Whether that is the kind of an input that was deposited.
const fn is_deposit(kinds: u64) -> bool {
    matches!(kinds & 0xf, DEPOSIT | INLINE_DEPOSIT)
}

/// Where a member's regions are.
#[derive(Clone, Copy, Debug)]
struct Places {
    input: Place,
    output: Place,
}

impl Places {
    const fn of(self, part: Part) -> Place {
        match part {
            Part::Input => self.input,
            Part::Output => self.output,
        }
    }
}

/// What a card says of its member's two places: their kinds in a word, and a location for each.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    kinds: u64,
    locations: [u64; 2],
}

impl GroupCard {
    /// What it says of places.
    fn told(&self) -> Told {
        // Relaxed, twice: ordered by the arrival, which was loaded with Acquire before.
        let kinds = self.arrival.load(Ordering::Relaxed) & ((1 << KINDS_BITS) - 1);
        Told { kinds, locations: self.locations.each_ref().map(|it| it.load(Ordering::Relaxed)) }
    }

    /// What its member called.
    fn call(&self) -> CallWords {
        // Relaxed: as in `told`.
        self.call.each_ref().map(|word| word.load(Ordering::Relaxed))
    }

    /// Whether its member called just that. Word by word, as they are loaded: an array of them
    /// would be compared with loads that are wider than the stores.
    fn is_of(&self, call: &CallWords) -> bool {
        // Relaxed: as in `told`.
        self.call.iter().zip(call).all(|(word, ours)| word.load(Ordering::Relaxed) == *ours)
    }

    /// Whether its member has made an arrival that this rank has made and that is not complete:
    /// until then nobody makes the one after the next, which takes the card's place.
    fn has_made(&self, arrival: Arrival) -> bool {
        // Acquire: pairs with the Release in `publish`.
        self.arrival.load(Ordering::Acquire) >> KINDS_BITS == arrival.0
    }

    /// Whether it says that its member made an arrival which it can't have made by then.
    fn is_beyond(&self, arrival: Arrival) -> bool {
        // Relaxed: nothing is read because of it.
        self.arrival.load(Ordering::Relaxed) >> KINDS_BITS > arrival.0
    }
}

/// Looks at a missing card in a row: a member on another core is often only a moment behind.
const LOOKS: u32 = 16;

/// This rank's membership.
#[derive(Debug)]
pub(crate) struct Team {
    mapping: Arc<Mapping>,
    doorbell: Arc<Doorbell>,
    members: Vec<Rank>,
    /// In the order of `members`, this rank included.
    peers: Vec<Peer>,
    /// Likewise.
    heaps: Vec<PeerHeap>,
    /// Likewise; for arrivals of even and of odd numbers.
    slots: Vec<[Slot; 2]>,
    own: usize,
    call: CallWords,
    regions: Option<Regions>,
    marked: bool,
    /// The last arrival made.
    arrival: Arrival,
    /// How many of the members, the first ones, were seen to have made it.
    seen: usize,
    /// The last arrival that is complete.
    complete: Arrival,
    /// The last enter: where cards and deposits are.
    entered: Arrival,
    /// What it told of this rank's regions.
    told: Told,
    /// Apart, as most collectives don't need it.
    spread: Box<Spread>,
    /// How many collectives were entered, and whether the one under way was.
    enters: u64,
    is_inside: bool,
    /// Where each member's regions are, once the cards are read.
    places: Vec<Places>,
    /// Whether all inputs, and all outputs, are in heaps.
    registered: [bool; 2],
}

impl Team {
    pub(crate) fn new(
        mapping: Arc<Mapping>,
        doorbell: Arc<Doorbell>,
        peers: Vec<Peer>,
        heaps: &Heaps,
        own: usize,
    ) -> Self {
        let mut team = Self {
            members: peers.iter().map(|peer| peer.rank).collect(),
            heaps: peers.iter().map(|peer| heaps.of(peer.rank)).collect(),
            slots: peers
                .iter()
                .map(|peer| [0, 1].map(|arrival| mapping.layout().slot(peer.local_index, arrival)))
                .collect(),
            peers,
            mapping,
            doorbell,
            own,
            call: CallWords::default(),
            regions: None,
            marked: false,
            arrival: Arrival(0),
            seen: 0,
            complete: Arrival(0),
            entered: Arrival(0),
            told: Told::default(),
            spread: Box::default(),
            enters: 0,
            is_inside: false,
            places: Vec::new(),
            registered: [false; 2],
        };
        team.tell_core();
        team
    }

    /// From here on this rank keeps away from cores with more members than others.
    pub(crate) fn spread(&mut self) {
        self.spread.is_on = true;
    }

    /// Starts a collective: what the next enter publishes.
    pub(crate) fn begin(&mut self, call: CallWords, regions: &Regions) {
        (self.call, self.regions) = (call, Some(*regions));
        (self.marked, self.is_inside) = (false, false);
    }

    /// Forgets the regions.
    pub(crate) fn clear(&mut self) {
        self.regions = None;
        self.places.clear();
    }

    /// Looks up the members' process ids, once they are all there.
    pub(crate) fn look_up_processes(&mut self) {
        for peer in &mut self.peers {
            let control = self.mapping.layout().control(peer.local_index);
            // Relaxed: written before the peer's first arrival, and that is complete.
            peer.pid = self.mapping.word(control.pid()).load(Ordering::Relaxed);
        }
    }

    /// The members as peers, this rank included.
    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    fn regions(&self) -> Regions {
        self.regions.expect("the engine begins a collective before it enters it")
    }

    /// The word that holds the number of the last enter of this parity whose collective was
    /// marked. A member that is one collective ahead may use the other word; two ahead none is.
    fn mark_word(&self) -> &AtomicU64 {
        self.mapping.wide(MARKED[(self.enters & 1) as usize])
    }

    pub(crate) fn is_marked(&self) -> bool {
        // Relaxed: stored before an arrival that is complete.
        self.is_inside && self.mark_word().load(Ordering::Relaxed) == self.enters
    }

    /// What the member at `index` publishes with an arrival, and where.
    fn slot(&self, index: usize, arrival: Arrival) -> Slot {
        self.slots[index][(arrival.0 & 1) as usize]
    }

    fn card(&self, index: usize, arrival: Arrival) -> &GroupCard {
        self.mapping.card(self.slot(index, arrival))
    }

    /// Makes the next arrival: publishes what this rank's slot holds by now.
    fn publish(&mut self, kinds: u64) -> Arrival {
        self.arrival = Arrival(self.arrival.0 + 1);
        self.seen = 0;
        let word = self.arrival.0 << KINDS_BITS | kinds;
        // Release: pairs with the Acquire in `has_made`. What this rank did before is visible to
        // who sees it.
        self.card(self.own, self.arrival).arrival.store(word, Ordering::Release);
        self.arrival
    }

    /// Whether the member at `index` has made an arrival that this rank has made.
    fn has_made(&self, index: usize, arrival: Arrival) -> bool {
        index == self.own || self.card(index, arrival).has_made(arrival)
    }

    /// Tells the others where this rank waits.
    fn tell_core(&mut self) {
        let core = current_core().map_or(0, |core| core + 1);
        if core != self.spread.core {
            let control = self.mapping.layout().control(self.peers[self.own].local_index);
            // Relaxed: a hint, and wrong for a moment whenever the scheduler moves a rank.
            self.mapping.word(control.core()).store(core, Ordering::Relaxed);
            self.spread.core = core;
        }
    }

    /// The core on which the member at `index` waited last, counted from 1.
    fn core_of(&self, index: usize) -> u32 {
        let control = self.mapping.layout().control(self.peers[index].local_index);
        // Relaxed: see `tell_core`.
        self.mapping.word(control.core()).load(Ordering::Relaxed)
    }

    /// Wakes who sleeps on a complete arrival.
    fn wake_sleepers(&self, arrival: Arrival) {
        // SeqCst: see the head of this file; this rank's card was filled before.
        fence(Ordering::SeqCst);
        // Relaxed: after the fence.
        if self.mapping.word(SLEEPERS).load(Ordering::Relaxed) == 0 {
            return;
        }
        // Each member comes by here; one of them makes the system call. AcqRel: the wake that
        // follows is for who has not seen all cards, and those this rank saw.
        let before = self.mapping.wide(WOKEN).fetch_max(arrival.0, Ordering::AcqRel);
        if before < arrival.0 {
            self.doorbell.wake_group();
        }
    }

    /// Reads the others' cards of the complete enter, and compares their calls with ours.
    fn read_cards(&mut self) -> Result<(), LinkError> {
        self.places.clear();
        for (index, peer) in self.peers.iter().enumerate() {
            let told = if index == self.own {
                self.told
            } else {
                let card = self.card(index, self.entered);
                if !card.is_of(&self.call) {
                    return Err(peer.mismatch(&self.call, &card.call()));
                }
                card.told()
            };
            let places = self.places_of(index, told)?;
            self.places.push(places);
        }
        let is_mapped = |place| matches!(place, Place::Heap(_) | Place::Nowhere);
        let all = |part| self.places.iter().all(|places: &Places| is_mapped(places.of(part)));
        self.registered = [Part::Input, Part::Output].map(all);
        Ok(())
    }

    /// Where a member's regions are, by what its card told.
    fn places_of(&self, index: usize, told: Told) -> Result<Places, LinkError> {
        let (rank, slot) = (self.members[index], self.slot(index, self.entered));
        let place = |kind: u64, location| {
            let unknown = || LinkError::protocol(rank, "a region at an unknown place");
            Place::decode(kind & 0xf, location, slot).ok_or_else(unknown)
        };
        let Told { kinds, locations: [input, output] } = told;
        let places = Places { input: place(kinds, input)?, output: place(kinds >> 4, output)? };
        if places.input.is_deposit() != is_deposit(self.told.kinds) || places.output.is_deposit() {
            let what = "a deposit where a region is due, or a region for a deposit";
            return Err(LinkError::protocol(rank, what));
        }
        if let Place::Heap(offset) = places.output {
            let bytes = self.regions().output.bytes() as u64;
            self.heaps[index].mapped(rank, offset, bytes)?;
        }
        Ok(places)
    }

    /// Finds the rank that took its memory back; `local_index`, counted from 1, is that of the
    /// first.
    #[cold]
    fn look_who_withdrew(&self, local_index: u32) -> Result<(), LinkError> {
        let (own, first) = (self.peers[self.own].local_index, u64::from(local_index));
        let others = || self.peers.iter().filter(|peer| peer.local_index != own);
        // What follows from a failure comes after it: the first is the one to name.
        let all = others().filter(|peer| peer.local_index + 1 == first).chain(others());
        all.into_iter().try_for_each(|peer| peer.confirm(&self.mapping))
    }

    /// Copies the input to this rank's slot; the kind of place.
    fn deposit(&self, input: Region) -> u64 {
        let bytes = input.bytes();
        assert!(bytes <= SLOT_BYTES, "a deposit of {bytes} bytes in a slot of {SLOT_BYTES}");
        let slot = self.slot(self.own, self.entered);
        let (kind, at) = match bytes <= INLINE_BYTES {
            true => (INLINE_DEPOSIT, slot.inline_deposit()),
            false => (DEPOSIT, slot.deposit()),
        };
        let own = self.mapping.pointer(at, bytes as u64);
        // SAFETY: the input is readable, the slot as long (just checked) and this rank's own; its
        // readers of two arrivals ago are done (see the head of this file).
        unsafe { copy(input.base(), own, bytes) };
        kind
    }

    /// The address of `bytes` of the deposit at an offset.
    fn deposited_at(&self, at: u64, bytes: &Range<usize>) -> *const u8 {
        assert!(bytes.end <= SLOT_BYTES, "{bytes:?} lie outside of a deposit");
        self.mapping.pointer(at + bytes.start as u64, bytes.len() as u64).cast_const()
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
        let Regions { input, output } = self.regions();
        (self.entered, self.is_inside) = (Arrival(self.arrival.0 + 1), true);
        self.enters += 1;
        if self.marked {
            self.mark();
        }
        let card = self.card(self.own, self.entered);
        // Relaxed, here and below: published with the arrival.
        for (place, word) in card.call.iter().zip(self.call) {
            place.store(word, Ordering::Relaxed);
        }
        if deposit {
            self.told = Told { kinds: self.deposit(input) | NOWHERE << 4, locations: [0; 2] };
            return self.publish(self.told.kinds);
        }
        let [input, output] = [input, output].map(Place::of);
        let told = Told { kinds: input.0 | output.0 << 4, locations: [input.1, output.1] };
        for (word, location) in card.locations.iter().zip(told.locations) {
            word.store(location, Ordering::Relaxed);
        }
        self.told = told;
        self.publish(told.kinds)
    }

    fn arrive(&mut self) -> Arrival {
        self.publish(0)
    }

    fn mark(&mut self) {
        self.marked = true;
        if self.is_inside {
            // Relaxed: published by the next arrival.
            self.mark_word().store(self.enters, Ordering::Relaxed);
        }
    }

    fn complete(&mut self, arrival: Arrival) -> Result<bool, LinkError> {
        if self.complete == arrival {
            return Ok(true);
        }
        while self.seen < self.peers.len() {
            if self.seen != self.own {
                let card = self.card(self.seen, arrival);
                if !(0..LOOKS).any(|_| card.has_made(arrival)) {
                    if card.is_beyond(arrival) {
                        let what = "an arrival that it can't have made yet";
                        return Err(LinkError::protocol(self.members[self.seen], what));
                    }
                    return Ok(false);
                }
            }
            self.seen += 1;
        }
        self.complete = arrival;
        self.wake_sleepers(arrival);
        if self.entered == arrival {
            self.read_cards()?;
        }
        Ok(true)
    }

    fn awaits_own_core(&mut self, arrival: Arrival) -> bool {
        self.tell_core();
        let here = [0, self.spread.core];
        (self.seen..self.peers.len())
            .any(|index| !self.has_made(index, arrival) && here.contains(&self.core_of(index)))
    }

    fn yielded(&mut self) {
        if !self.spread.is_due() {
            return;
        }
        self.tell_core();
        let mut cores = std::mem::take(&mut self.spread.cores);
        cores.clear();
        cores.extend((0..self.peers.len()).map(|index| self.core_of(index)));
        self.spread.cores = cores;
        self.spread.look(self.own);
    }

    fn missing(&self, arrival: Arrival) -> Vec<Rank> {
        let late = (0..self.peers.len()).filter(|&index| !self.has_made(index, arrival));
        late.map(|index| self.members[index]).collect()
    }

    fn park(&mut self, arrival: Arrival, until: Instant) -> Result<(), LinkError> {
        if self.doorbell.take_poke() {
            return Ok(());
        }
        let sleepers = self.mapping.word(SLEEPERS);
        // AcqRel: who counts itself later sees the cards that this rank saw.
        sleepers.fetch_add(1, Ordering::AcqRel);
        // SeqCst: see the head of this file; pairs with the fence in `wake_sleepers`.
        fence(Ordering::SeqCst);
        let all_made = || (0..self.peers.len()).all(|index| self.has_made(index, arrival));
        let outcome = self.doorbell.park_grouped(all_made, until);
        // Relaxed: a sleeper too many costs one system call.
        sleepers.fetch_sub(1, Ordering::Relaxed);
        let own = self.members[self.own];
        outcome.map_err(|error| LinkError::os(own, "sleeping on a futex", error))
    }

    fn registered(&self, part: Part) -> bool {
        self.registered[usize::from(part == Part::Output)]
    }

    fn deposits(&self, bytes: &Range<usize>, addresses: &mut Vec<*const u8>) {
        let own = self.regions().input.pointer(bytes).cast_const();
        addresses.extend(self.places.iter().enumerate().map(|(index, it)| match it.input {
            Place::Deposit(_) if index == self.own => own,
            Place::Deposit(at) => self.deposited_at(at, bytes),
            // What others published was compared with that when the cards were read.
            other => panic!("a deposit is asked for, and this rank's input is at {other:?}"),
        }));
    }

    fn source(
        &self,
        member: Rank,
        part: Part,
        bytes: Range<usize>,
    ) -> Result<Option<*const u8>, LinkError> {
        let index = self.index(member);
        let (start, len) = (bytes.start as u64, bytes.len() as u64);
        match self.places[index].of(part) {
            _ if index == self.own => {
                let own = self.regions();
                let region = if part == Part::Input { own.input } else { own.output };
                Ok(Some(region.pointer(&bytes).cast_const()))
            }
            Place::Deposit(at) => Ok(Some(self.deposited_at(at, &bytes))),
            Place::Heap(offset) => {
                // What saturates is outside of any heap.
                let offset = offset.saturating_add(start);
                let at = self.heaps[index].mapped(member, offset, len)?;
                Ok(Some(at.cast_const()))
            }
            Place::Process(_) => Ok(None),
            Place::Nowhere => {
                Err(LinkError::protocol(member, format!("no {part:?} region where one is read")))
            }
        }
    }

    fn confirm(&self) -> Result<(), LinkError> {
        // Acquire: orders what this rank read of others' memory before the load; pairs with the
        // fence in `ShmLink::leave`, which who takes its memory back makes before that is used.
        fence(Ordering::Acquire);
        // Acquire: pairs with the Release in `ShmLink::leave`, for the words of the members.
        match self.mapping.word(WITHDRAWN).load(Ordering::Acquire) {
            0 => Ok(()),
            local_index => self.look_who_withdrew(local_index),
        }
    }

    fn target(&self, member: Rank, bytes: Range<usize>) -> Result<*mut u8, LinkError> {
        let index = self.index(member);
        let Place::Heap(offset) = self.places[index].output else {
            return Err(LinkError::protocol(member, "no registered output where one is written"));
        };
        let output = self.regions().output.bytes();
        assert!(bytes.end <= output, "{bytes:?} lie outside of an output of {output} bytes");
        // It was found to lie in the heap as a whole when the cards were read.
        self.heaps[index].mapped(member, offset + bytes.start as u64, bytes.len() as u64)
    }

    fn staging_bytes(&self) -> usize {
        GROUP_STAGING_BYTES
    }

    fn staging(&self, member: Rank, bytes: Range<usize>) -> *mut u8 {
        assert!(bytes.end <= GROUP_STAGING_BYTES, "{bytes:?} lie outside of a staging buffer");
        let local_index = self.peers[self.index(member)].local_index;
        let at = self.mapping.layout().group_staging(local_index) + bytes.start as u64;
        self.mapping.pointer(at, bytes.len() as u64)
    }
}
