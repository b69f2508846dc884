//! The state that all peers of a link share: the running call, the memory its transfers use, and
//! the transfers that are done.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum_link::{
    Call, Cause, CollectiveKind, Landing, LinkCounters, LinkError, Rank, Region, Regions, Ticket,
};

use crate::domain::Access;
use crate::error::VerbsError;
use crate::link::counted;
use crate::memory::{Keys, Pages, Pinned, Registry};
use crate::slots::Slots;

/// The running collective.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Current {
    pub(crate) call: Call,
    pub(crate) encoded: [u8; Call::ENCODED],
    pub(crate) regions: Regions,
}

/// A posted receive.
#[derive(Debug)]
pub(crate) struct Receive {
    pub(crate) ticket: Ticket,
    pub(crate) into: *mut u8,
    pub(crate) bytes: usize,
    pub(crate) landing: Landing,
}

/// A posted send.
#[derive(Debug)]
pub(crate) struct Send {
    pub(crate) ticket: Ticket,
    pub(crate) from: *const u8,
    pub(crate) bytes: usize,
}

// SAFETY: addresses in the region of the running collective, whose promise covers them.
unsafe impl std::marker::Send for Receive {}
// SAFETY: as above.
unsafe impl std::marker::Send for Send {}

/// A large send under way.
#[derive(Debug)]
pub(crate) struct UnderWay {
    pub(crate) ticket: Ticket,
    pub(crate) parts_left: usize,
    pub(crate) memory: TransferMemory,
}

/// The memory that devices use for a large transfer.
#[derive(Debug)]
pub(crate) enum TransferMemory {
    /// The transfer's own memory, which is registered for longer.
    Place(Keys),
    /// The transfer's own memory, registered for it alone.
    Lent(Pinned),
    /// Memory of the link.
    Slot(Pages),
}

impl TransferMemory {
    pub(crate) const fn keys(&self) -> Keys {
        match self {
            Self::Place(keys) => *keys,
            Self::Lent(pinned) => pinned.keys,
            Self::Slot(slot) => slot.keys(),
        }
    }

    /// The slot, if it is one.
    pub(crate) const fn slot(&self) -> Option<&Pages> {
        match self {
            Self::Slot(slot) => Some(slot),
            Self::Place(_) | Self::Lent(_) => None,
        }
    }
}

/// An arrival for the engine to fold.
#[derive(Debug)]
enum Arrived {
    Small(Vec<u8>),
    Large(Pages),
}

/// A piece of borrowed memory that is registered for the running collective.
#[derive(Debug)]
struct Borrowed {
    start: usize,
    bytes: usize,
    pinned: Pinned,
}

/// The state of a link that its peers share.
#[derive(Debug)]
pub(crate) struct LinkState {
    pub(crate) rank: Rank,
    pub(crate) current: Option<Current>,
    /// Whether the collective is marked.
    pub(crate) marked: bool,
    pub(crate) done: Vec<Ticket>,
    /// Posted transfers that are not done.
    pub(crate) open: usize,
    pub(crate) registry: Arc<Registry>,
    slots: Slots,
    /// Recycled memory for small arrivals.
    bounce_buffers: Vec<Vec<u8>>,
    arrived: HashMap<Ticket, Arrived>,
    borrowed: Vec<Borrowed>,
    pub(crate) counters: Arc<LinkCounters>,
    /// The start of each region that the system refused to register in the running collective, and
    /// for which access.
    refused: Vec<(usize, Access)>,
    /// Whether it ever refused one.
    has_warned: bool,
    sends: Vec<Option<UnderWay>>,
    free_sends: Vec<usize>,
}

impl LinkState {
    pub(crate) fn new(rank: Rank, registry: Arc<Registry>) -> Self {
        Self {
            rank,
            current: None,
            marked: false,
            done: Vec::new(),
            open: 0,
            registry,
            slots: Slots::default(),
            bounce_buffers: Vec::new(),
            arrived: HashMap::new(),
            borrowed: Vec::new(),
            counters: Arc::new(LinkCounters::new("verbs", &counted::NAMES)),
            refused: Vec::new(),
            has_warned: false,
            sends: Vec::new(),
            free_sends: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self, call: &Call, regions: &Regions) {
        self.borrowed.clear();
        self.refused.clear();
        self.slots.begin();
        self.marked = false;
        self.current = Some(Current { call: *call, encoded: call.encode(), regions: *regions });
    }

    pub(crate) fn current(&self) -> &Current {
        self.current.as_ref().expect("the engine begins a collective before it posts transfers")
    }

    /// Reports a transfer as done.
    pub(crate) fn finish(&mut self, ticket: Ticket) {
        self.open -= 1;
        self.done.push(ticket);
    }

    /// The memory for a large transfer from or to `start`: a slot if it cannot be the transfer's
    /// own memory. It is given back, or dropped, before the transfer is reported as done.
    ///
    /// # Errors
    /// If memory cannot be allocated or registered.
    pub(crate) fn memory_for(
        &mut self,
        start: *const u8,
        bytes: usize,
        access: Access,
    ) -> Result<TransferMemory, LinkError> {
        if let Some(keys) = self.keys(start, bytes, access) {
            return Ok(TransferMemory::Place(keys));
        }
        // Messages are not collectives: their memory is lent for each of them separately.
        let is_message = self.current().call.collective == CollectiveKind::Message;
        if is_message && bytes >= self.registry.register_from() {
            let start = NonNull::new(start.cast_mut()).expect("messages are not at address 0");
            // SAFETY: the memory is lent until the transfer is done, and the registration is
            // dropped before that; its keys leave this rank for this transfer only.
            let pinned = unsafe { Pinned::new(self.registry.domains(), start, bytes, access) };
            // Memory that cannot be registered is copied.
            if let Ok(pinned) = pinned {
                self.counters.add(counted::REGISTRATIONS, 1);
                return Ok(TransferMemory::Lent(pinned));
            }
        }
        self.take_slot(bytes).map(TransferMemory::Slot)
    }

    /// Takes back the memory of a transfer that no longer uses it.
    pub(crate) fn give_back(&mut self, memory: TransferMemory) {
        if let TransferMemory::Slot(slot) = memory {
            self.slots.give(slot);
        }
    }

    /// The keys of a piece of the region, if it can be read, or be written by peers, in place.
    /// `None` means that it has to go through a slot.
    fn keys(&mut self, start: *const u8, bytes: usize, access: Access) -> Option<Keys> {
        let start = start as usize;
        let held = |borrowed: &&Borrowed| {
            let is_inside =
                borrowed.start <= start && start + bytes <= borrowed.start + borrowed.bytes;
            is_inside && borrowed.pinned.access >= access
        };
        if let Some(borrowed) = self.borrowed.iter().find(held) {
            return Some(borrowed.pinned.keys);
        }
        if let Some(keys) = self.registry.find(start, bytes) {
            return Some(keys);
        }
        let Regions { input, output } = self.current().regions;
        let holds = |region: &Region| {
            let base = region.base() as usize;
            base <= start && start + bytes <= base + region.bytes()
        };
        // What lies in neither is the engine's scratch memory. Whatever goes to the output is
        // written sooner or later, and it is registered once; an input is usually only read.
        let candidates = [(output, Access::Write), (input, access)];
        let (region, access) = candidates.into_iter().find(|(region, _)| holds(region))?;
        let is_refused = self.refused.contains(&(region.base() as usize, access));
        if region.bytes() < self.registry.register_from() || is_refused {
            return None;
        }
        self.borrow(&region, access)
    }

    /// Registers a region for the running collective. `None` if the system refuses, as it does for
    /// too much memory.
    fn borrow(&mut self, region: &Region, access: Access) -> Option<Keys> {
        let base = NonNull::new(region.base()).expect("regions are not at address 0");
        let domains = self.registry.domains();
        // SAFETY: the region's promise holds until the collective ends, and the registration is
        // dropped before the next begins; keys leave this rank for its transfers only.
        let register = || unsafe { Pinned::new(domains, base, region.bytes(), access) };
        // Unused slots count against the same limit, and some are needed.
        let pinned = register().or_else(|error| match self.slots.give_back() {
            0 => Err(error),
            _ => register(),
        });
        match pinned.and_then(|pinned| self.slots.reserve(domains).map(|()| pinned)) {
            Ok(pinned) => {
                let (keys, start) = (pinned.keys, base.as_ptr() as usize);
                self.borrowed.push(Borrowed { start, bytes: region.bytes(), pinned });
                self.counters.add(counted::REGISTRATIONS, 1);
                Some(keys)
            }
            Err(error) => {
                self.refused.push((base.as_ptr() as usize, access));
                if !std::mem::replace(&mut self.has_warned, true) {
                    unisum_link::warning!(
                        "borrowed memory is copied, as it can't be used: {error}"
                    );
                }
                None
            }
        }
    }

    /// A registered slot.
    ///
    /// # Errors
    /// If there is no memory for another.
    pub(crate) fn take_slot(&mut self, bytes: usize) -> Result<Pages, LinkError> {
        let slot = self.slots.take(self.registry.domains(), bytes);
        slot.map_err(|error| self.own_error(error))
    }

    /// Memory for a small arrival that reduces.
    pub(crate) fn take_bounce_buffer(&mut self, bytes: usize) -> Vec<u8> {
        let mut bounce = self.bounce_buffers.pop().unwrap_or_default();
        if bounce.len() < bytes {
            bounce.resize(bytes, 0);
        }
        bounce
    }

    pub(crate) fn small_arrived(&mut self, ticket: Ticket, bounce: Vec<u8>) {
        self.arrived.insert(ticket, Arrived::Small(bounce));
        self.finish(ticket);
    }

    pub(crate) fn large_arrived(&mut self, ticket: Ticket, slot: Pages) {
        self.arrived.insert(ticket, Arrived::Large(slot));
        self.finish(ticket);
    }

    pub(crate) fn arrival(&self, ticket: Ticket) -> *const u8 {
        match &self.arrived[&ticket] {
            Arrived::Small(bounce) => bounce.as_ptr(),
            Arrived::Large(slot) => slot.start(),
        }
    }

    pub(crate) fn release(&mut self, ticket: Ticket) {
        match self.arrived.remove(&ticket) {
            Some(Arrived::Small(bounce)) => self.bounce_buffers.push(bounce),
            Some(Arrived::Large(slot)) => self.slots.give(slot),
            None => {}
        }
    }

    /// Records a large send under way, and returns its number.
    pub(crate) fn depart(&mut self, send: UnderWay) -> usize {
        let number = self.free_sends.pop().unwrap_or(self.sends.len());
        if number == self.sends.len() {
            self.sends.push(None);
        }
        self.sends[number] = Some(send);
        number
    }

    /// Records that a part of it has been read for the last time.
    pub(crate) fn part_sent(&mut self, number: usize) {
        let Some(send) = self.sends.get_mut(number).and_then(Option::as_mut) else { return };
        send.parts_left -= 1;
        if send.parts_left > 0 {
            return;
        }
        if let Some(UnderWay { ticket, memory, .. }) = self.sends[number].take() {
            self.free_sends.push(number);
            self.give_back(memory);
            self.finish(ticket);
        }
    }

    /// Whether a large send is under way.
    pub(crate) fn is_sending(&self) -> bool {
        self.free_sends.len() < self.sends.len()
    }

    /// Drops all transfers. No connection that could still touch their memory may be left.
    pub(crate) fn clear(&mut self) {
        self.current = None;
        self.open = 0;
        self.done.clear();
        self.arrived.clear();
        self.borrowed.clear();
        self.sends.clear();
        self.free_sends.clear();
    }

    pub(crate) fn own_error(&self, error: VerbsError) -> LinkError {
        match error {
            VerbsError::Os(what, error) => LinkError::system(self.rank, what, error),
            error => LinkError::os(self.rank, "RDMA", Cause::other(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use unisum_kernels::Dtype;

    use super::*;

    const BYTES: usize = 4096;

    /// A state without devices, on which registering always succeeds.
    fn state() -> LinkState {
        let registry = Registry::new(Vec::new());
        registry.set_register_from(1);
        LinkState::new(0, registry)
    }

    fn region(memory: &mut [u8]) -> Region {
        // SAFETY: nobody touches the memory through it.
        unsafe { Region::new(NonNull::from(&mut *memory).cast(), memory.len(), None) }
    }

    fn borrowed(state: &LinkState) -> Vec<(usize, Access)> {
        state.borrowed.iter().map(|it| (it.start, it.pinned.access)).collect()
    }

    fn obtain(state: &mut LinkState, region: &Region, access: Access) {
        let held =
            state.memory_for(region.base(), region.bytes(), access).expect("memory can be had");
        assert!(matches!(held, TransferMemory::Place(_)), "{held:?}");
    }

    #[test]
    fn peers_may_write_outputs_and_only_read_inputs() {
        let (mut input, mut output) = (vec![0; BYTES], vec![0; BYTES]);
        let (input, output) = (region(&mut input), region(&mut output));
        let mut state = state();
        state.begin(&Call::all_reduce(0, Dtype::U8, 1), &Regions { input, output });
        obtain(&mut state, &input.part(&(0..100)), Access::Read);
        // What is passed on from the output is received there as well.
        obtain(&mut state, &output.part(&(0..100)), Access::Read);
        obtain(&mut state, &output, Access::Write);
        obtain(&mut state, &input, Access::Read);
        let expected =
            [(input.base() as usize, Access::Read), (output.base() as usize, Access::Write)];
        assert_eq!(borrowed(&state), expected);
    }

    #[test]
    fn an_output_inside_of_the_input_is_written_all_the_same() {
        let mut memory = vec![0; BYTES];
        let input = region(&mut memory);
        let output = input.part(&(1024..2048));
        let mut state = state();
        state.begin(&Call::all_reduce(0, Dtype::U8, 1), &Regions { input, output });
        obtain(&mut state, &input.part(&(0..100)), Access::Read);
        obtain(&mut state, &output, Access::Write);
        let expected =
            [(input.base() as usize, Access::Read), (output.base() as usize, Access::Write)];
        assert_eq!(borrowed(&state), expected);
        // And in the input itself, where a collective in place works on all of it.
        obtain(&mut state, &input.part(&(0..100)), Access::Write);
        assert_eq!(borrowed(&state)[2], (input.base() as usize, Access::Write));
    }
}
