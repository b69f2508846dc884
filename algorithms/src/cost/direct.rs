//! Follows direct rounds, in which ranks exchange everything at once.

use super::simulate::{Clock, Port, Simulation, UNEVEN};
use crate::{Incoming, OnArrival, Rank, Step};

impl Simulation<'_> {
    /// A direct round in shared memory: the ranks of each node meet, take what comes to them, and
    /// leave together.
    pub(super) fn shared_round(&mut self, steps: &[Step]) {
        for node in 0..self.topology.node_count() {
            let members = self.topology.members_of(node);
            if members.len() < 2 {
                continue;
            }
            let takes: Vec<f64> = members.iter().map(|&rank| self.take_s(&steps[rank])).collect();
            let start = members.iter().map(|&rank| self.ranks[rank].end()).fold(0.0, f64::max);
            let busy = takes.iter().copied().fold(0.0, f64::max);
            let once = self.model.inside.alpha_s + self.model.message_s;
            for (&rank, take) in members.iter().zip(takes) {
                let work = self.model.message_s + take + self.model.wait_s;
                self.ranks[rank].restart(start + once + busy, work);
            }
        }
    }

    /// How long a rank takes what comes to it straight from the senders' memory, in seconds.
    fn take_s(&self, step: &Step) -> f64 {
        let bytes = |i: &Incoming| self.model.bytes(i.elements.len() * i.from.len());
        let at_once = step.incoming.iter().map(bytes).sum();
        let copy = self.model.inside.s_per_byte(at_once);
        let take = |incoming: &Incoming| match incoming.on_arrival {
            OnArrival::Store => bytes(incoming) * copy,
            // One pass reads and folds.
            OnArrival::Reduce => bytes(incoming) * self.model.gamma_s_per_byte.max(copy),
        };
        step.incoming.iter().map(take).sum()
    }

    /// A direct round of pairwise transfers, all posted at once: each takes as long as the busiest
    /// of the ports and links it goes through.
    pub(super) fn direct_round(&mut self, steps: &[Step]) {
        let messages: Vec<Message> = steps.iter().enumerate().flat_map(messages_to).collect();
        let mut ports = vec![Port::default(); steps.len()];
        let mut links = ports.clone();
        for &Message { from, to, elements } in &messages {
            let (transfer, _) = self.transfer_s(from, to, elements);
            ports[from].send_free += self.model.message_s + transfer;
            ports[to].receive_free += self.model.message_s + transfer;
            if !self.is_inside(from, to) {
                links[self.link_of[from]].send_free += transfer;
                links[self.link_of[to]].receive_free += transfer;
            }
        }
        let starts: Vec<f64> = self.ranks.iter().map(Clock::end).collect();
        let mut ends = starts.clone();
        let mut streams = vec![0; steps.len()];
        for &Message { from, to, elements } in &messages {
            let (transfer, alpha) = self.transfer_s(from, to, elements);
            let mut busy = ports[from].send_free.max(ports[to].receive_free);
            if !self.is_inside(from, to) {
                let (out, into) = (self.link_of[from], self.link_of[to]);
                busy = busy.max(links[out].send_free).max(links[into].receive_free);
                streams[to] += 1;
                busy += if streams[to] > 1 { UNEVEN * transfer } else { 0.0 };
            }
            let sent = starts[from].max(starts[to]) + busy;
            (ends[from], ends[to]) = (ends[from].max(sent), ends[to].max(sent + alpha));
            let bytes = self.model.bytes(elements);
            let work = self.processor_s(from, to, bytes, bytes);
            self.ranks[from].work += work;
            self.ranks[to].work += work + self.model.wait_s;
        }
        for (rank, step) in steps.iter().enumerate().filter(|(_, step)| !step.is_empty()) {
            let reduce = self.reduce_s(step);
            self.ranks[rank].restart(ends[rank] + reduce, reduce);
        }
    }

    /// How long a message of a direct round takes, and how long from there to its arrival, in
    /// seconds.
    fn transfer_s(&self, from: Rank, to: Rank, elements: usize) -> (f64, f64) {
        let (link, bytes) = (self.link(from, to), self.model.bytes(elements));
        (bytes * link.s_per_byte(bytes), link.alpha_s)
    }
}

/// One message of a direct round.
#[derive(Clone, Copy)]
struct Message {
    from: Rank,
    to: Rank,
    elements: usize,
}

/// The messages that come to rank `to` in its step.
fn messages_to((to, step): (Rank, &Step)) -> Vec<Message> {
    let mut messages = Vec::new();
    for incoming in step.incoming.iter().filter(|i| !i.elements.is_empty()) {
        let elements = incoming.elements.len();
        messages.extend(incoming.from.iter().map(|&from| Message { from, to, elements }));
    }
    messages
}
