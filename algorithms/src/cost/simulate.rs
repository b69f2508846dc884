//! Follows the plans of all ranks through time.

use std::collections::VecDeque;
use std::ops::Range;

use super::{CostModel, LinkCost};
use crate::chunk::nth_slice;
use crate::prove::overlap;
use crate::slice::slices_of;
use crate::{Incoming, OnArrival, Pattern, Rank, Step, Topology};

/// The state of all ranks at the sub-step that is being followed.
pub(super) struct Simulation<'a> {
    pub(super) topology: &'a Topology,
    pub(super) model: CostModel,
    pub(super) ranks: Vec<Clock>,
    /// Which of `links` each rank sends to other nodes over; it may share it with others of its
    /// node.
    pub(super) link_of: Vec<usize>,
    links: Vec<Port>,
    /// Rounds of which some slices have not been followed, in order.
    open: VecDeque<Round>,
}

struct Round {
    steps: Vec<Step>,
    next_slice: usize,
    slices: usize,
}

/// When each direction is free again, in seconds since the start.
#[derive(Clone, Copy, Default)]
pub(super) struct Port {
    pub(super) send_free: f64,
    pub(super) receive_free: f64,
}

/// One rank's times, in seconds since the start.
#[derive(Clone, Default)]
pub(super) struct Clock {
    port: Port,
    reduce_free: f64,
    /// Of the sub-step that is being followed.
    ready: f64,
    done: f64,
    /// When the sub-steps were done that have left the window.
    retired: f64,
    window: VecDeque<Done>,
    /// What group steps do while transfers to other nodes travel.
    beside: f64,
    /// Processor time so far.
    pub(super) work: f64,
}

/// A sub-step that is still in the window.
#[derive(Clone, Default)]
struct Done {
    at: f64,
    reads: Vec<Range<usize>>,
    writes: Vec<Range<usize>>,
}

impl<'a> Simulation<'a> {
    pub(super) fn new(topology: &'a Topology, model: CostModel) -> Self {
        let ranks = vec![Clock::default(); topology.world()];
        let links = vec![Port::default(); topology.world()];
        Self {
            topology,
            model,
            ranks,
            link_of: links_of_ranks(topology, model.links_per_node),
            links,
            open: VecDeque::new(),
        }
    }

    /// Follows one round of all ranks, sliced, in wavefront order with the rounds before and after
    /// it.
    pub(super) fn round(&mut self, steps: Vec<Step>) {
        // Where only some ranks have the mark, the others do nothing.
        let marked = steps.iter().find(|step| step.pattern != Pattern::Pairs);
        let pattern = marked.map_or(Pattern::Pairs, |step| step.pattern);
        if pattern != Pattern::Pairs {
            self.drain();
        }
        match pattern {
            Pattern::Pairs | Pattern::Wall => {}
            Pattern::Direct(scope) if self.model.shares_memory(scope, self.topology) => {
                return self.shared_round(&steps);
            }
            Pattern::Direct(_) => return self.direct_round(&steps),
            Pattern::OneShot | Pattern::ReduceScatter | Pattern::AllGather => {
                return self.group_round(&steps);
            }
        }
        let slices = steps.iter().map(|step| slices_of(step, self.model.slice_elements)).max();
        self.open.push_back(Round { steps, next_slice: 0, slices: slices.unwrap_or(0) });
        if pattern == Pattern::Wall { self.drain() } else { self.wave() }
    }

    /// The end of the last rank, after all rounds.
    pub(super) fn finish(mut self) -> f64 {
        self.drain();
        let last = self.ranks.iter().map(|it| it.end().max(it.beside)).fold(0.0, f64::max);
        if self.model.ranks_per_core <= 1.0 {
            return last;
        }
        let busiest = (0..self.topology.node_count()).map(|node| {
            let members = self.topology.members_of(node);
            let cores = (members.len() as f64 / self.model.ranks_per_core).max(1.0);
            members.iter().map(|&rank| self.ranks[rank].work).sum::<f64>() / cores
        });
        // No schedule beats the longer of the two, and a greedy one takes no more than their sum.
        let busiest = busiest.fold(0.0, f64::max);
        last.max(busiest) + last.min(busiest) / 2.0
    }

    fn drain(&mut self) {
        while !self.open.is_empty() {
            self.wave();
        }
    }

    /// Follows the next slice of each open round.
    fn wave(&mut self) {
        let mut open = std::mem::take(&mut self.open);
        for round in &mut open {
            if round.next_slice < round.slices {
                self.sub_step(&round.steps, round.next_slice);
            }
            round.next_slice += 1;
        }
        open.retain(|round| round.next_slice < round.slices);
        self.open = open;
    }

    fn sub_step(&mut self, steps: &[Step], k: usize) {
        let max = self.model.slice_elements;
        for (clock, step) in self.ranks.iter_mut().zip(steps) {
            clock.begin(step, self.model.window.max(1), |elements| nth_slice(elements, max, k));
        }
        for (rank, step) in steps.iter().enumerate() {
            for incoming in &step.incoming {
                let elements = nth_slice(&incoming.elements, max, k).len();
                if elements > 0 {
                    self.arrive(rank, incoming, elements);
                }
            }
        }
        for (clock, step) in self.ranks.iter_mut().zip(steps) {
            clock.end_sub_step(step);
        }
    }

    /// A slice of one message from each source, then, for a reduce, one pass over them all.
    fn arrive(&mut self, to: Rank, incoming: &Incoming, elements: usize) {
        let bytes = self.model.bytes(elements);
        // Slices are handed on while they are in cache.
        let at_once = self.model.bytes(elements * incoming.from.len());
        let mut arrived = 0.0f64;
        for &from in &incoming.from {
            let (there, alpha) = self.send(from, to, bytes, at_once);
            arrived = arrived.max(there + alpha);
        }
        let sources = incoming.from.len() as f64;
        let reduce = if incoming.on_arrival == OnArrival::Reduce {
            bytes * sources * self.model.gamma_s_per_byte
        } else {
            0.0
        };
        let receiver = &mut self.ranks[to];
        receiver.work += self.model.wait_s;
        if reduce > 0.0 {
            arrived = arrived.max(receiver.reduce_free) + reduce;
            receiver.reduce_free = arrived;
            receiver.work += reduce;
        }
        receiver.done = receiver.done.max(arrived);
    }

    /// One message, of `at_once` bytes that the receiver gets at once: when it is there but for the
    /// link's latency, and that, in seconds.
    fn send(&mut self, from: Rank, to: Rank, bytes: f64, at_once: f64) -> (f64, f64) {
        let link = self.link(from, to);
        let transfer = bytes * link.s_per_byte(at_once);
        let (sent, arrived) = match self.is_inside(from, to) {
            true => self.send_inside(from, to, transfer),
            false => self.send_across(from, to, transfer),
        };
        let work = self.processor_s(from, to, bytes, at_once);
        let sender = &mut self.ranks[from];
        (sender.port.send_free, sender.done) = (sent, sender.done.max(sent));
        sender.work += work;
        self.ranks[to].port.receive_free = arrived;
        self.ranks[to].work += work;
        (arrived, link.alpha_s)
    }

    /// When the sender is done with a message within a node, and when it is there: each end copies
    /// for half of the time, whatever the other does.
    fn send_inside(&self, from: Rank, to: Rank, transfer: f64) -> (f64, f64) {
        let (sender, receiver) = (&self.ranks[from], &self.ranks[to]);
        let half = transfer / 2.0;
        let sent = sender.port.send_free.max(sender.ready) + self.model.message_s + half;
        (sent, sent.max(receiver.port.receive_free).max(receiver.ready) + half)
    }

    /// The same between nodes: the message keeps both ends and their links for all of the time.
    fn send_across(&mut self, from: Rank, to: Rank, transfer: f64) -> (f64, f64) {
        let (sender, receiver) = (&self.ranks[from], &self.ranks[to]);
        let (out, into) = (self.link_of[from], self.link_of[to]);
        let ports = sender.port.send_free.max(receiver.port.receive_free);
        let links = self.links[out].send_free.max(self.links[into].receive_free);
        let start = ports.max(links).max(sender.ready).max(receiver.ready);
        self.links[out].send_free = start + transfer;
        self.links[into].receive_free = start + transfer;
        let sent = start + self.model.message_s + transfer;
        (sent, sent)
    }

    /// A round of group steps: each group starts together, and its members send and receive at full
    /// rate.
    fn group_round(&mut self, steps: &[Step]) {
        let ends: Vec<f64> = self.ranks.iter().map(Clock::end).collect();
        for (rank, step) in steps.iter().enumerate().filter(|(_, step)| !step.outgoing.is_empty()) {
            let start = step.outgoing.iter().map(|o| ends[o.to]).fold(ends[rank], f64::max);
            let (transfer, work) = self.group_transfer(rank, step);
            let reduce = self.reduce_s(step);
            // A group step folds straight from the members' buffers: one pass does both.
            let together = self.model.is_group_step(step, rank, self.topology);
            let busy = if together { transfer.max(reduce) } else { transfer + reduce };
            // Between nodes a piece is folded before it goes and stored when it has come, while
            // others travel: only one of them takes time of its own.
            let pieces =
                if together && self.topology.node_count() > 1 { self.pieces(step) } else { 1 };
            let alone = busy / pieces as f64;
            self.ranks[rank].beside += busy - alone;
            self.ranks[rank].restart(start + alone, work + reduce);
        }
    }

    /// How many slices a rank's own part of a group step has.
    fn pieces(&self, step: &Step) -> usize {
        let own = match step.pattern {
            Pattern::ReduceScatter => step.incoming.first().map(|it| &it.elements),
            Pattern::AllGather => step.outgoing.first().map(|it| &it.elements),
            _ => None,
        };
        own.map_or(1, |own| own.len().div_ceil(self.model.slice_elements.max(1)).max(1))
    }

    /// How long a rank folds what it gets in a step, in seconds.
    pub(super) fn reduce_s(&self, step: &Step) -> f64 {
        let reduced = step.incoming.iter().filter(|i| i.on_arrival == OnArrival::Reduce);
        let bytes = reduced.map(|i| self.model.bytes(i.elements.len() * i.from.len()));
        bytes.sum::<f64>() * self.model.gamma_s_per_byte
    }

    /// The time until all of a group step's bytes have come and gone, and its processor time, in
    /// seconds.
    fn group_transfer<'s>(&self, rank: Rank, step: &'s Step) -> (f64, f64) {
        let together = self.model.is_group_step(step, rank, self.topology);
        let message = if together { 0.0 } else { self.model.message_s };
        let sharing = self.sharing(rank);
        let elements = |i: &Incoming| i.elements.len() * i.from.len();
        let at_once = self.model.bytes(step.incoming.iter().map(elements).sum());
        let (mut sent, mut received, mut alpha, mut work) = (0.0, 0.0, 0.0f64, 0.0);
        let (mut waits, mut streams, mut longest) = (0.0f64, 0, 0.0f64);
        let out = step.outgoing.iter().map(|o| (o.to, o.elements.len(), true));
        let arriving = |i: &'s Incoming| i.from.iter().map(|&from| (from, i.elements.len(), false));
        for (other, elements, is_sent) in out.chain(step.incoming.iter().flat_map(arriving)) {
            if elements == 0 {
                continue;
            }
            let (link, bytes) = (self.link(rank, other), self.model.bytes(elements));
            let shared = if self.is_inside(rank, other) { 1.0 } else { sharing };
            let port = if is_sent { &mut sent } else { &mut received };
            let transfer = bytes * link.s_per_byte(at_once);
            *port += message + transfer * shared;
            if !is_sent && !self.is_inside(rank, other) {
                (streams, longest) = (streams + sharing as usize, longest.max(transfer));
            }
            alpha = alpha.max(link.alpha_s);
            // What comes from many comes at many times.
            waits += if is_sent || together { 0.0 } else { 1.0 };
            // A group step moves each byte once, by one of its ends.
            let ends = if together { 0.5 } else { 1.0 };
            work += ends * (self.processor_s(rank, other, bytes, at_once) - self.model.message_s)
                + message;
        }
        if streams > 1 {
            received += UNEVEN * longest;
        }
        let once = self.model.message_s - message;
        (alpha + once + f64::max(sent, received), work + once + waits.max(1.0) * self.model.wait_s)
    }

    /// How many ranks of its node send over the link of `rank`, itself included.
    fn sharing(&self, rank: Rank) -> f64 {
        let members = self.topology.members_of(self.topology.node_of(rank) as usize).len();
        let links =
            if self.model.links_per_node == 0 { members } else { self.model.links_per_node };
        members.div_ceil(links) as f64
    }

    pub(super) fn is_inside(&self, a: Rank, b: Rank) -> bool {
        self.topology.node_of(a) == self.topology.node_of(b)
    }

    pub(super) fn link(&self, a: Rank, b: Rank) -> LinkCost {
        let inside = self.topology.node_of(a) == self.topology.node_of(b);
        if inside { self.model.inside } else { self.model.across }
    }

    /// What a message keeps the processor of each end busy for: within a node it is the processor
    /// that copies.
    pub(super) fn processor_s(&self, from: Rank, to: Rank, bytes: f64, at_once: f64) -> f64 {
        let s_per_byte =
            if self.is_inside(from, to) { self.model.inside.s_per_byte(at_once) } else { 0.0 };
        self.model.message_s + bytes * s_per_byte
    }
}

impl Clock {
    /// When everything so far is done.
    pub(super) fn end(&self) -> f64 {
        self.window.iter().map(|done| done.at).fold(self.retired, f64::max)
    }

    /// Finds when this rank's sub-step can open: by the window and by the elements it needs.
    fn begin(&mut self, step: &Step, window: usize, cut: impl Fn(&Range<usize>) -> Range<usize>) {
        if step.outgoing.is_empty() && step.incoming.is_empty() {
            return;
        }
        let mut next = if self.window.len() < window { Done::default() } else { self.retire() };
        next.reads.clear();
        next.reads.extend(step.outgoing.iter().map(|o| cut(&o.elements)));
        next.reads.dedup(); // a parent sends one range to all its children
        next.writes.clear();
        next.writes.extend(step.incoming.iter().map(|i| cut(&i.elements)));
        self.ready = self.retired;
        // The newest first: what it delays, the older ones seldom delay further.
        for earlier in self.window.iter().rev() {
            if earlier.at > self.ready && next.waits_for(earlier) {
                self.ready = earlier.at;
            }
        }
        self.done = self.ready;
        self.window.push_back(next);
    }

    fn end_sub_step(&mut self, step: &Step) {
        if step.outgoing.is_empty() && step.incoming.is_empty() {
            return;
        }
        if let Some(last) = self.window.back_mut() {
            last.at = self.done;
        }
    }

    /// Takes the oldest sub-step out of the window, for its memory.
    fn retire(&mut self) -> Done {
        let oldest = self.window.pop_front().unwrap_or_default();
        self.retired = self.retired.max(oldest.at);
        oldest
    }

    /// Goes on from `at` with nothing open.
    pub(super) fn restart(&mut self, at: f64, work: f64) {
        self.window.clear();
        (self.retired, self.ready, self.done) = (at, at, at);
        self.work += work;
    }
}

impl Done {
    fn waits_for(&self, earlier: &Self) -> bool {
        let meet = |a: &[Range<usize>], b: &[Range<usize>]| {
            a.iter().any(|a| b.iter().any(|b| overlap(a, b)))
        };
        meet(&self.reads, &earlier.writes)
            || meet(&self.writes, &earlier.writes)
            || meet(&self.writes, &earlier.reads)
    }
}

/// The link of each rank, named by the first rank that uses it: a node's ranks take its links in
/// turn.
fn links_of_ranks(topology: &Topology, links_per_node: usize) -> Vec<usize> {
    let mut link_of: Vec<usize> = (0..topology.world()).collect();
    for members in (0..topology.node_count()).map(|node| topology.members_of(node)) {
        let links = if links_per_node == 0 { members.len() } else { links_per_node };
        members.iter().enumerate().for_each(|(i, &rank)| link_of[rank] = members[i % links]);
    }
    link_of
}

/// By how many messages the last of several streams into a node's link is late, since they do not
/// share it evenly (measured at 1 Gbit/s: 3 peers 18.3 ms where a ring takes 13.2; halving among 4
/// ranks of a node 982 where the hierarchical plan takes 910).
pub(super) const UNEVEN: f64 = 1.0;
