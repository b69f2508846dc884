//! A link beside a peer that writes what it likes into the shared memory.
//!
//! The input is a row of commands of four bytes each: what the victim does, through its link, and
//! what the peer writes, as it should or anything. Whatever it is, the victim must not panic, not
//! write beside its own buffers, and not wait for ever; and its errors name the peer.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use unisum_kernels::Dtype;
use unisum_link::{Arrival, Call, Landing, Link as _, LinkError, Part, Region, Regions, Ticket};

use crate::doorbell::Doorbell;
use crate::group::Team;
use crate::heap::{Block, Heap};
use crate::heaps::Heaps;
use crate::inbox::Peer;
use crate::layout::{INLINE_BYTES, Layout, MARKED, SLEEPERS, SLOT_BYTES, WITHDRAWN, WOKEN};
use crate::mailbox::{Mailbox, Message, Place};
use crate::mapping::{Mapping, create};
use crate::{ShmError, ShmLink};

const HEAP_BYTES: u64 = 2 << 20;
/// Bytes of each buffer, and before and behind what a transfer may touch of it.
const BUFFER: usize = 24 << 10;
const MARGIN: usize = 64;
const MOST: usize = BUFFER - 2 * MARGIN;
const UNTOUCHED: u8 = 0xa5;
const COMMANDS_MAX: usize = 64;

/// Plays the commands.
pub(super) fn check(bytes: &[u8]) {
    let mut scene = Scene::new().expect("this system has memory to share");
    for command in bytes.chunks_exact(4).take(COMMANDS_MAX) {
        let played = scene.play([command[0], command[1], command[2], command[3]]);
        scene.check_margins();
        if let Err(error) = played {
            assert_eq!(error.peer, 1, "{error}");
            scene.link.abort();
            return;
        }
    }
}

/// Honest exchanges, for a search to start from, and lies that were believed once.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let rows: [&[[u8; 4]]; 8] = [
        // Received in place and in a slot, staged in one piece and in three, and lent.
        &[[0, 9, 0, 0], STAGED, [2; 4], [0, 0, 64, 1], STAGED, STAGED, STAGED, [2; 4]],
        &[[0, 0, 40, 1], LENT, [2; 4], [5; 4], [0, 0, 40, 0], LENT, [2; 4]],
        // Sent, and consumed by the peer.
        &[[1, 0, 40, 1], [1, 9, 0, 0], [2; 4], [4, 0, 0, 4], [2; 4]],
        // Deposits, and registered regions.
        &[[6, 1, 0, 0], [7, 0x35, 0, 0], [6; 4], [6, 0, 1, 0], [7, 0x11, 0, 0], [6; 4]],
        // A whole message after a piece of it.
        &[[0, 0, 64, 0], STAGED, [2; 4], LENT, [2; 4]],
        // More is consumed than was sent.
        &[[1, 0, 40, 1], [4, 0, 0, 20], [2; 4], [1, 9, 0, 0], [2; 4]],
        // A region where deposits are due, and no output where one is written.
        &[[6, 1, 0, 0], [7, 0x31, 0, 0], [6; 4]],
        &[[6, 0, 1, 0], [7, 0x31, 0, 0], [6; 4]],
    ];
    rows.map(<[_]>::concat).to_vec()
}

/// The peer sends what is waited for: a piece of it, or from its heap.
const STAGED: [u8; 4] = [3, 2, 0, 0];
const LENT: [u8; 4] = [3, 0, 1, 0];

struct Scene {
    link: ShmLink,
    mapping: Arc<Mapping>,
    call: Call,
    /// What each receive goes to, and each send comes from.
    buffers: Vec<Buffer>,
    /// Length and landing of the receives that are not done.
    posted: Vec<(Ticket, usize, Landing)>,
    landed: Vec<Ticket>,
    /// What the peer has sent, and what it has arrived at.
    sent: u64,
    arrived: u64,
    entered: Option<(Arrival, bool, usize)>,
    regions: (Block, Block),
}

struct Buffer {
    memory: Box<[u8]>,
    used: usize,
}

impl Scene {
    fn new() -> Result<Self, ShmError> {
        let layout = Layout::new(2, HEAP_BYTES).expect("two small heaps fit");
        let mapping = Arc::new(Mapping::new(create(layout)?, layout)?);
        let doorbell = Arc::new(Doorbell::new(Arc::clone(&mapping), 0)?);
        let peer = |local_index: u64| Peer {
            rank: local_index as usize,
            local_index,
            pid: std::process::id(),
        };
        let own = Heap::new(Arc::clone(&mapping), 0);
        let regions = (own.allocate(BUFFER)?, own.allocate(BUFFER)?);
        let heaps = Heaps::new(own, Arc::clone(&mapping), vec![(0, 0), (1, 1)]);
        let peers = vec![peer(0), peer(1)];
        let team = Team::new(Arc::clone(&mapping), Arc::clone(&doorbell), peers, &heaps, 0);
        let probe = Arc::new(AtomicU64::new(0));
        let link = ShmLink::new(Arc::clone(&mapping), doorbell, team, peer(0), heaps, probe, false);
        let call = Call::all_reduce(0, Dtype::U8, 1);
        let mut scene = Self {
            link,
            mapping,
            call,
            buffers: Vec::new(),
            posted: Vec::new(),
            landed: Vec::new(),
            sent: 0,
            arrived: 0,
            entered: None,
            regions,
        };
        scene.begin(BUFFER);
        Ok(scene)
    }

    fn begin(&mut self, bytes: usize) {
        let region = |block: &Block| {
            // SAFETY: the block is that long and lives as long as the link.
            unsafe { Region::new(block.address(), bytes, Some(block.offset())) }
        };
        let (input, output) = (region(&self.regions.0), region(&self.regions.1));
        self.link.begin(&self.call, &Regions { input, output });
    }

    fn play(&mut self, [what, a, b, c]: [u8; 4]) -> Result<(), LinkError> {
        let bytes = 1 + (usize::from(a) | usize::from(b) << 8) % MOST;
        match what % 8 {
            0 => self.receive(bytes, if c & 1 == 0 { Landing::Place } else { Landing::Slot }),
            1 => self.send(bytes, c & 1 == 1),
            2 => self.progress(),
            3 => {
                self.peer_sends(a, b, c);
                Ok(())
            }
            4 => {
                self.peer_writes(a, b, c);
                Ok(())
            }
            5 => self.read_slots(a & 1 == 1),
            6 => self.go_on_in_group(a & 1 == 1, b),
            _ => {
                self.peer_arrives(a, b, c);
                Ok(())
            }
        }
    }

    /// A new buffer's part of so many bytes.
    fn buffer(&mut self, bytes: usize) -> Region {
        let memory = vec![UNTOUCHED; BUFFER].into_boxed_slice();
        self.buffers.push(Buffer { memory, used: bytes });
        let last = self.buffers.last_mut().expect("it was just pushed");
        let start = NonNull::from(&mut last.memory[MARGIN..MARGIN + bytes]).cast();
        // SAFETY: it is that long, and lives as long as the link.
        unsafe { Region::new(start, bytes, None) }
    }

    fn check_margins(&self) {
        for Buffer { memory, used } in &self.buffers {
            let margins = memory[..MARGIN].iter().chain(&memory[MARGIN + used..]);
            assert!(margins.clone().all(|&byte| byte == UNTOUCHED), "written beside a buffer");
        }
    }

    fn receive(&mut self, bytes: usize, landing: Landing) -> Result<(), LinkError> {
        let (memory, ticket) = (self.buffer(bytes), Ticket(self.buffers.len() as u64));
        self.posted.push((ticket, bytes, landing));
        self.link.receive(1, memory, landing, ticket)
    }

    fn send(&mut self, bytes: usize, is_registered: bool) -> Result<(), LinkError> {
        let memory = match is_registered {
            // SAFETY: the block is longer, and lives as long as the link.
            true => unsafe {
                Region::new(self.regions.0.address(), bytes, Some(self.regions.0.offset()))
            },
            false => self.buffer(bytes),
        };
        // Its own number, which no receive has.
        self.link.send(1, memory, Ticket(u64::MAX))
    }

    fn progress(&mut self) -> Result<(), LinkError> {
        let mut done = Vec::new();
        let outcome = self.link.progress(&mut done);
        for ticket in done {
            if let Some(at) = self.posted.iter().position(|(posted, ..)| *posted == ticket) {
                let (_, _, landing) = self.posted.remove(at);
                self.landed.extend((landing == Landing::Slot).then_some(ticket));
            }
        }
        outcome
    }

    fn read_slots(&mut self, sleeps: bool) -> Result<(), LinkError> {
        if sleeps {
            self.link.park(Instant::now(), 1)?;
        }
        for ticket in std::mem::take(&mut self.landed) {
            // SAFETY: a done receive has a byte at least, readable until it is released.
            std::hint::black_box(unsafe { self.link.arrived(ticket).read_volatile() });
            self.link.release(ticket)?;
        }
        Ok(())
    }

    /// The peer sends what is waited for, or nearly.
    fn peer_sends(&mut self, a: u8, b: u8, c: u8) {
        let place = match a % 4 {
            0 => Some(Place::Heap(u64::from(b) << (c % 64))),
            1 => Some(Place::Process(u64::from(b) << (c % 64))),
            2 => Some(Place::Staged),
            _ => None,
        };
        let bytes = self.posted.first().map_or(1, |(_, bytes, _)| *bytes as u64);
        let message = Message { call: self.call.words(), bytes, marked: c & 1 == 1, place };
        let mailbox = Mailbox::new(self.mapping.layout(), 1, 0);
        mailbox.publish(&self.mapping, self.sent, &message);
        self.sent += 1;
    }

    /// The peer writes anything anywhere.
    fn peer_writes(&self, a: u8, b: u8, c: u8) {
        let layout = self.mapping.layout();
        let (own, theirs) = (layout.control(0), layout.control(1));
        let card = |local_index: u64, parity: u64| layout.slot(local_index, parity).card();
        let words = [
            layout.mailbox(0, 1),
            layout.mailbox(0, 1) + 8,
            layout.mailbox(1, 0) + 64 * (1 + u64::from(b) % 16) + 8 * (u64::from(b) / 16 % 8),
            own.events(),
            own.mode(),
            theirs.events(),
            theirs.mode(),
            theirs.gone(),
            theirs.core(),
            SLEEPERS,
            WOKEN,
            MARKED[0],
            WITHDRAWN,
            card(1, 0) + 8 * (u64::from(b) % 8),
            card(1, 1) + 8 * (u64::from(b) % 8),
        ];
        // Small numbers, and those near the largest.
        let value = if c & 1 == 0 { u64::from(c / 2) } else { u64::MAX - u64::from(c / 2) };
        let value = value.rotate_left(u32::from(b) & 0x38);
        // SeqCst: nothing depends on it.
        self.mapping.wide(words[usize::from(a) % words.len()]).store(value, Ordering::SeqCst);
    }

    /// The victim enters, or looks whether all have and then does what a collective does.
    fn go_on_in_group(&mut self, deposits: bool, size: u8) -> Result<(), LinkError> {
        let Some((arrival, deposits, bytes)) = self.entered else {
            let bytes = match (deposits, size % 2) {
                (true, 0) => INLINE_BYTES,
                (true, _) => SLOT_BYTES,
                (false, _) => BUFFER,
            };
            self.begin(bytes);
            let group = self.link.group().expect("it has one");
            self.entered = Some((group.enter(deposits), deposits, bytes));
            return Ok(());
        };
        let group = self.link.group().expect("it has one");
        group.awaits_own_core(arrival);
        group.park(arrival, Instant::now())?;
        if !group.complete(arrival)? {
            return Ok(());
        }
        self.entered = None;
        let mut addresses = Vec::new();
        if deposits {
            group.deposits(&(0..bytes), &mut addresses);
        } else if let Some(source) = group.source(1, Part::Input, 0..bytes)? {
            addresses.push(source);
        }
        for address in addresses {
            // SAFETY: the group said that so many bytes are readable.
            std::hint::black_box(unsafe { address.wrapping_add(bytes - 1).read_volatile() });
        }
        if !deposits && group.registered(Part::Output) {
            let target = group.target(1, 0..bytes)?;
            // SAFETY: the group said that so many bytes are writable.
            unsafe { target.write_bytes(1, bytes) };
        }
        group.confirm()
    }

    /// The peer makes its next arrival, and tells of places.
    fn peer_arrives(&mut self, a: u8, b: u8, c: u8) {
        self.arrived += 1;
        let card = self.mapping.card(self.mapping.layout().slot(1, self.arrived & 1));
        for (word, value) in card.call.iter().zip(self.call.words()) {
            word.store(value, Ordering::Relaxed);
        }
        for (word, value) in card.locations.iter().zip([b, c]) {
            word.store(u64::from(value) << (value % 64), Ordering::Relaxed);
        }
        // Release: as a peer does.
        card.arrival.store(self.arrived << 8 | u64::from(a), Ordering::Release);
    }
}
