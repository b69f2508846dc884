//! Executes a segment over the links: an in-order window of open steps.

use unisum_events::{Event, record};
use unisum_link::{Landing, LinkError, Patience, Rank, Ticket};

use super::folding::{Extras, Folding};
use super::group_exchange::{GroupContext, Sources};
use super::links::Links;
use super::memories::Memories;
use super::placement::Memory;
use super::segment::{Segment, Transfer, Work};
use super::unposted::Unposted;

/// The state of one segment's execution. Reused, so that the steady state allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Scoreboard {
    /// Per transfer: the number of unfinished transfers it waits for.
    waits: Vec<u32>,
    /// Per transfer: the number of messages that have not arrived (reduce), or 1 until done (send,
    /// store).
    missing: Vec<u32>,
    /// Per open step: the number of unfinished transfers.
    left: Vec<u32>,
    opened: usize,
    retired: usize,
    /// Per rank and direction: transfers that are open and not posted, in program order. Both ends
    /// match transfers in this order, so no transfer may overtake another.
    unposted: Unposted,
    /// Tickets under way on each link.
    in_flight: Vec<usize>,
    done: Vec<Ticket>,
    /// Whether checking the links again may make progress right away.
    looks_again: bool,
    sources: Vec<*const u8>,
    bytes_moved: u64,
}

// SAFETY: `sources` is scratch space for one call; the addresses in it are not used afterwards.
unsafe impl Send for Scoreboard {}

/// What a segment is executed with.
pub(crate) struct SegmentContext<'a> {
    pub(crate) rank: Rank,
    pub(crate) segment: &'a Segment,
    pub(crate) links: &'a mut Links,
    pub(crate) sources: &'a mut Sources,
    pub(crate) part_bytes: usize,
    pub(crate) memories: Memories,
    pub(crate) folding: &'a mut Folding,
    /// Whether a mark is passed on to other ranks.
    pub(crate) spreads_marks: bool,
}

impl SegmentContext<'_> {
    /// Marks what is sent from now on if an infinity or a NaN was detected.
    fn pass_mark_on(&mut self) {
        if self.folding.nonfinite && self.spreads_marks {
            self.links.mark();
        }
    }

    fn group_context(&mut self, extras: Extras) -> GroupContext<'_> {
        GroupContext {
            rank: self.rank,
            group: self.links.the_group(),
            memories: self.memories,
            folding: self.folding,
            extras,
            spreads_marks: self.spreads_marks,
            sources: self.sources,
            part_bytes: self.part_bytes,
        }
    }
}

const OUT: usize = 0;
const IN: usize = 1;

/// A ticket encodes the transfer's index and which of its sources the message is.
const fn ticket(transfer: usize, source: usize) -> Ticket {
    Ticket((transfer as u64) << 32 | source as u64)
}

const fn transfer_of(ticket: Ticket) -> usize {
    (ticket.0 >> 32) as usize
}

/// The event of a message that is done.
fn moved(transfer: &Transfer, done: Ticket) -> Event {
    let bytes = transfer.bytes as u64;
    match &transfer.work {
        Work::Send { to } => Event::Sent { peer: *to as u32, bytes },
        Work::Store { from } => Event::Received { peer: *from as u32, bytes },
        Work::Reduce { from } => {
            Event::Received { peer: from[done.0 as u32 as usize] as u32, bytes }
        }
        Work::Fold { .. } | Work::Push { .. } => unreachable!("local work has no ticket"),
    }
}

impl Scoreboard {
    pub(crate) fn start(&mut self, segment: &Segment, links: &Links) {
        self.waits.clear();
        self.waits.extend(segment.transfers.iter().map(|transfer| transfer.waits_for));
        self.missing.clear();
        self.missing.extend(segment.transfers.iter().map(messages));
        self.left.clear();
        self.left
            .extend(segment.step_starts.windows(2).map(|bounds| (bounds[1] - bounds[0]) as u32));
        (self.opened, self.retired) = (0, 0);
        self.unposted.clear(links.route.len());
        self.in_flight.clear();
        self.in_flight.resize(links.all.len(), 0);
    }

    /// The number of steps up to which all are done.
    pub(crate) const fn retired(&self) -> usize {
        self.retired
    }

    /// Payload bytes of the collective's messages that have been sent or have arrived completely.
    pub(crate) const fn bytes_moved(&self) -> u64 {
        self.bytes_moved
    }

    /// Begins a collective of one or more segments.
    pub(crate) const fn begin(&mut self) {
        self.bytes_moved = 0;
    }

    /// Tickets under way on each link: which links to wait for.
    pub(crate) fn in_flight(&self) -> &[usize] {
        &self.in_flight
    }

    /// How many of the tickets under way must complete before anything else can happen: all of
    /// them, if they are the arrivals of one reduction.
    pub(crate) fn wanted(&self, segment: &Segment) -> usize {
        let in_flight: usize = self.in_flight.iter().sum();
        let open = segment.step_starts[self.retired]..segment.step_starts[self.opened];
        let is_all_of = |index: usize| match &segment.transfers[index].work {
            Work::Reduce { from } if self.missing[index] as usize == in_flight => {
                !from.iter().any(|&peer| self.unposted.contains(peer, IN, index))
            }
            _ => false,
        };
        if open.into_iter().any(is_all_of) { in_flight } else { 1 }
    }

    /// The ranks of the oldest unfinished step, with what is missing from them.
    pub(crate) fn waiting_for(&self, segment: &Segment) -> Vec<Rank> {
        let mut ranks = Vec::new();
        for index in segment.step_starts[self.retired]..segment.transfers.len() {
            let transfer = &segment.transfers[index];
            if transfer.step > self.retired || self.missing[index] == 0 {
                continue;
            }
            match &transfer.work {
                Work::Send { to: peer } | Work::Store { from: peer } => ranks.push(*peer),
                Work::Reduce { from } => ranks.extend(from),
                // They wait for other transfers and for nobody.
                Work::Fold { .. } | Work::Push { .. } => {}
            }
        }
        ranks
    }

    /// Moves what can be moved. `true` if anything did.
    pub(crate) fn advance(&mut self, context: &mut SegmentContext<'_>) -> Result<bool, LinkError> {
        let mut moved = self.open_steps(context)?;
        self.looks_again = false;
        for link in 0..context.links.all.len() {
            if self.in_flight[link] == 0 {
                continue;
            }
            // After what was merely sent it is a peer's turn; but a load from memory costs nothing.
            self.looks_again |= context.links.all[link].patience() != Patience::SYSTEM_CALL;
            let mut done = std::mem::take(&mut self.done);
            let result = context.links.all[link].progress(&mut done);
            moved |= !done.is_empty();
            self.in_flight[link] -= done.len();
            if context.spreads_marks && context.links.all[link].is_marked() {
                // What came marked over one link goes on marked over all, before it is passed on.
                context.links.mark();
            }
            for ticket in done.drain(..) {
                let work = &context.segment.transfers[transfer_of(ticket)].work;
                self.looks_again |= !matches!(work, Work::Send { .. });
                self.ticket_done(ticket, context)?;
            }
            self.done = done;
            result?;
        }
        Ok(moved)
    }

    /// Whether it is worth advancing again right after something moved.
    pub(crate) fn may_find_more(&self, segment: &Segment) -> bool {
        self.looks_again || self.can_open(segment)
    }

    fn can_open(&self, segment: &Segment) -> bool {
        self.opened < segment.steps() && self.opened < self.retired + segment.window
    }

    /// Whether every step is done.
    pub(crate) fn is_done(&self, segment: &Segment) -> bool {
        self.retired == segment.steps()
    }

    fn open_steps(&mut self, context: &mut SegmentContext<'_>) -> Result<bool, LinkError> {
        let segment = context.segment;
        let before = self.opened;
        while self.can_open(segment) {
            let step = self.opened;
            self.opened += 1;
            for index in segment.step_starts[step]..segment.step_starts[step + 1] {
                self.open(index, context)?;
            }
        }
        Ok(self.opened > before)
    }

    fn open(&mut self, index: usize, context: &mut SegmentContext<'_>) -> Result<(), LinkError> {
        // What is local may have run already: an earlier transfer of its step cleared its hazards.
        let is_local = context.segment.transfers[index].is_local();
        if is_local && self.waits[index] == 0 && self.missing[index] > 0 {
            return self.run_local(index, context);
        }
        let transfer = &context.segment.transfers[index];
        let waits = waits(transfer, self.waits[index]);
        for_each_end(&transfer.work, |peer, direction| {
            if waits || self.unposted.first(peer, direction).is_some() {
                self.unposted.push(peer, direction, index);
                return self.post_ready(peer, direction, context);
            }
            self.in_flight[context.links.route[peer]] += 1;
            post(transfer, index, peer, context)
        })
    }

    /// Posts the transfers of one peer and direction, in order, as far as their hazards allow.
    fn post_ready(
        &mut self,
        peer: Rank,
        direction: usize,
        context: &mut SegmentContext<'_>,
    ) -> Result<(), LinkError> {
        while let Some(index) = self.unposted.first(peer, direction) {
            let transfer = &context.segment.transfers[index];
            if waits(transfer, self.waits[index]) {
                break;
            }
            self.unposted.pop(peer, direction);
            self.in_flight[context.links.route[peer]] += 1;
            post(transfer, index, peer, context)?;
        }
        Ok(())
    }

    fn ticket_done(
        &mut self,
        done: Ticket,
        context: &mut SegmentContext<'_>,
    ) -> Result<(), LinkError> {
        let index = transfer_of(done);
        let transfer = &context.segment.transfers[index];
        record(|| moved(transfer, done));
        self.bytes_moved += transfer.bytes as u64;
        self.missing[index] -= 1;
        if self.missing[index] > 0 {
            return Ok(());
        }
        match &context.segment.transfers[index].work {
            Work::Reduce { .. } if self.waits[index] > 0 => Ok(()),
            Work::Reduce { from } => {
                self.fold(index, from, context)?;
                self.transfer_done(index, context)
            }
            _ => self.transfer_done(index, context),
        }
    }

    fn transfer_done(
        &mut self,
        index: usize,
        context: &mut SegmentContext<'_>,
    ) -> Result<(), LinkError> {
        let segment = context.segment;
        let transfer = &segment.transfers[index];
        self.left[transfer.step] -= 1;
        while self.retired < segment.steps() && self.left[self.retired] == 0 {
            self.retired += 1;
        }
        for &follower in &transfer.followers {
            self.waits[follower] -= 1;
            // A follower that is not open yet will look at its hazards when it opens.
            if self.waits[follower] == 0 && segment.transfers[follower].step < self.opened {
                self.hazards_clear(follower, context)?;
            }
        }
        Ok(())
    }

    fn hazards_clear(
        &mut self,
        index: usize,
        context: &mut SegmentContext<'_>,
    ) -> Result<(), LinkError> {
        match &context.segment.transfers[index].work {
            Work::Send { to } => self.post_ready(*to, OUT, context),
            Work::Store { from } => self.post_ready(*from, IN, context),
            Work::Reduce { from } if self.missing[index] == 0 => {
                self.fold(index, from, context)?;
                self.transfer_done(index, context)
            }
            Work::Reduce { .. } => Ok(()),
            Work::Fold { .. } | Work::Push { .. } => self.run_local(index, context),
        }
    }

    /// Does what needs no message.
    fn run_local(
        &mut self,
        index: usize,
        context: &mut SegmentContext<'_>,
    ) -> Result<(), LinkError> {
        let transfer = &context.segment.transfers[index];
        let place = transfer.writes.expect("local work has its place");
        let piece = place.start..place.start + transfer.bytes;
        match transfer.work {
            Work::Fold { scales } => {
                context.group_context(Extras { scales, ..Extras::default() }).fold_piece(&piece)?;
            }
            Work::Push { divides } => {
                let watches = divides;
                let extras = Extras { divides, watches, ..Extras::default() };
                context.group_context(extras).push_piece(&piece)?;
            }
            _ => unreachable!("only what is local runs here"),
        }
        context.pass_mark_on();
        self.missing[index] = 0;
        self.transfer_done(index, context)
    }

    /// Folds this rank's value and all arrivals once, in rank order.
    fn fold(
        &mut self,
        index: usize,
        from: &[Rank],
        context: &mut SegmentContext<'_>,
    ) -> Result<(), LinkError> {
        let Transfer { bytes, reads, writes, .. } = context.segment.transfers[index];
        let (Some(reads), Some(writes)) = (reads, writes) else { return Ok(()) };
        let own = context.memories.pointer(reads, bytes).cast_const();
        let into = context.memories.pointer(writes, bytes);
        let own_place = from.iter().filter(|&&peer| peer < context.rank).count();
        self.sources.clear();
        for (source, &peer) in from.iter().enumerate() {
            if source == own_place {
                self.sources.push(own);
            }
            self.sources.push(context.links.to(peer).arrived(ticket(index, source)));
        }
        if own_place == from.len() {
            self.sources.push(own);
        }
        let watches = writes.memory == Memory::Output;
        let extras = Extras { watches, ..Extras::default() };
        // SAFETY: `own` and `into` are valid for `bytes` (checked by `Region::part`) and no other
        // transfer touches them (hazards are clear); each arrival is a landed receive of the same
        // length, readable until released below.
        unsafe { context.folding.run(into, &self.sources, bytes, extras) };
        context.pass_mark_on();
        for (source, &peer) in from.iter().enumerate() {
            context.links.to(peer).release(ticket(index, source))?;
        }
        Ok(())
    }
}

const fn messages(transfer: &Transfer) -> u32 {
    match &transfer.work {
        Work::Reduce { from } => from.len() as u32,
        _ => 1,
    }
}

fn for_each_end(
    work: &Work,
    mut act: impl FnMut(Rank, usize) -> Result<(), LinkError>,
) -> Result<(), LinkError> {
    match work {
        Work::Send { to } => act(*to, OUT),
        Work::Store { from } => act(*from, IN),
        Work::Reduce { from } => from.iter().try_for_each(|&peer| act(peer, IN)),
        Work::Fold { .. } | Work::Push { .. } => Ok(()),
    }
}

/// Whether a transfer that waits for so many others can't be posted yet. An arrival that reduces
/// lands in a slot: it waits with the folding, not here.
const fn waits(transfer: &Transfer, for_others: u32) -> bool {
    for_others > 0 && !matches!(transfer.work, Work::Reduce { .. })
}

fn post(
    transfer: &Transfer,
    index: usize,
    peer: Rank,
    context: &mut SegmentContext<'_>,
) -> Result<(), LinkError> {
    let place = match &transfer.work {
        Work::Send { .. } => transfer.reads,
        _ => transfer.writes,
    };
    let place = place.expect("every transfer has its place");
    let memory = context.memories.region(place, transfer.bytes);
    let link = context.links.to(peer);
    match &transfer.work {
        Work::Send { .. } => link.send(peer, memory, ticket(index, 0)),
        Work::Store { .. } => link.receive(peer, memory, Landing::Place, ticket(index, 0)),
        Work::Reduce { from } => {
            let source = from.iter().position(|&rank| rank == peer);
            let source = source.expect("a reduce is queued only for its sources");
            link.receive(peer, memory, Landing::Slot, ticket(index, source))
        }
        Work::Fold { .. } | Work::Push { .. } => unreachable!("local work has no peer"),
    }
}
