//! Which nodes of different ranks have to be ordered, and the fewest flags that do it.
//!
//! A rank writes only its own memory. So there are two reasons to order nodes of two ranks: a peer
//! reads what this rank wrote (*ready*), and this rank overwrites what a peer has read, or ends
//! (*taken*). Most of these orders follow from others: by way of the order within a rank, and over
//! third ranks. What is left out here is exactly what follows from the rest, so that each remaining
//! flag is needed.
//!
//! Source: Aho, Garey and Ullman, "The transitive reduction of a directed graph", SIAM J. Comput.
//! 1(2), 1972; vector clocks: Fidge 1988, Mattern 1989.

use unisum_algorithms::Rank;

use super::layout::{Layout, Member, meet};
use super::{Flag, Note, Place, Totals};

pub(super) struct Ordering {
    /// Of each rank, for each node; one more than there are nodes, for the end.
    pub(super) notes: Vec<Vec<Notes>>,
    /// All nodes with those first that others wait for.
    pub(super) order: Vec<(Rank, usize)>,
}

/// The flags before and after a node.
#[derive(Clone, Default)]
pub(super) struct Notes {
    pub(super) waits: Vec<Note>,
    pub(super) signals: Vec<Note>,
    /// The node of the peer that each wait waits for.
    pub(super) awaited: Vec<usize>,
}

/// A node of another rank that must have ended.
#[derive(Clone, Copy)]
struct Edge {
    peer: Rank,
    node: usize,
    flag: Flag,
}

impl Ordering {
    pub(super) fn new(layout: &Layout) -> Self {
        let world = layout.members.len();
        let edges = (0..world).map(|rank| edges(layout, rank)).collect();
        let mut reduction = Reduction::new(edges);
        while reduction.advance() {}
        assert!(reduction.is_done(), "a proven plan waits for nothing that comes later");
        let Reduction { edges, order, .. } = reduction;
        let mut ordering = Self { notes: Vec::new(), order };
        ordering.notes = edges.iter().map(|edges| vec![Notes::default(); edges.len()]).collect();
        for (rank, edges) in edges.iter().enumerate() {
            ordering.number(rank, edges);
        }
        ordering
    }

    /// Numbers the flags that come to a rank. Between two ranks, what is waited for first has also
    /// ended first: else it would follow from the other.
    fn number(&mut self, rank: Rank, edges: &[Vec<Edge>]) {
        let mut totals = vec![Totals::default(); self.notes.len()];
        for (node, edges) in edges.iter().enumerate() {
            for edge in edges {
                let flag = edge.flag;
                let count = totals[edge.peer].of_mut(flag);
                *count += 1;
                let (peer, count) = (edge.peer, *count);
                self.notes[rank][node].waits.push(Note { peer, flag, count });
                self.notes[rank][node].awaited.push(edge.node);
                let signals = &mut self.notes[peer][edge.node].signals;
                signals.push(Note { peer: rank, flag, count });
            }
        }
    }
}

/// For each node of a rank and its end: all nodes of other ranks that must come before.
fn edges(layout: &Layout, rank: Rank) -> Vec<Vec<Edge>> {
    let member = &layout.members[rank];
    let mut edges: Vec<Vec<Edge>> = Vec::with_capacity(member.nodes.len() + 1);
    for (index, node) in member.nodes.iter().enumerate() {
        let ready = node.reads.iter().map(|&(from, send)| {
            let send = &layout.members[from].sends[rank][send];
            Edge { peer: from, node: send.after, flag: Flag::Ready }
        });
        let writes: Vec<_> = node.work.iter().map(|work| (work.to, work.bytes)).collect();
        let peers = 0..layout.members.len();
        let taken = peers.filter_map(|peer| {
            let node = last_reader(member, peer, index, &writes)?;
            Some(Edge { peer, node, flag: Flag::Taken })
        });
        edges.push(latest(ready.chain(taken)));
    }
    let readers = member.sends.iter().enumerate();
    let last = readers.filter_map(|(peer, sends)| {
        Some(Edge { peer, node: sends.last()?.reader, flag: Flag::Taken })
    });
    edges.push(last.collect());
    edges
}

/// The last node of `peer` that reads what node `index` of a member overwrites.
fn last_reader(
    member: &Member,
    peer: Rank,
    index: usize,
    writes: &[(Place, usize)],
) -> Option<usize> {
    let earlier = member.sends[peer].iter().rev().filter(|send| send.before <= index);
    let mut met = earlier.filter(|send| {
        writes.iter().any(|&span| meet(member.overlay, (send.place, send.bytes), span))
    });
    met.next().map(|send| send.reader)
}

/// Of the edges from each peer the one from its last node, in the order of the peers.
fn latest(edges: impl Iterator<Item = Edge>) -> Vec<Edge> {
    let mut edges: Vec<Edge> = edges.collect();
    // Of equal ones, the first is kept: ready.
    edges.sort_by_key(|edge| (edge.peer, std::cmp::Reverse(edge.node), edge.flag));
    edges.dedup_by_key(|edge| edge.peer);
    edges
}

/// Drops the edges that follow from others.
struct Reduction {
    edges: Vec<Vec<Vec<Edge>>>,
    order: Vec<(Rank, usize)>,
    /// For each node that was looked at: how many nodes of each rank have ended when it has.
    clocks: Vec<Vec<Vec<usize>>>,
}

impl Reduction {
    fn new(edges: Vec<Vec<Vec<Edge>>>) -> Self {
        let clocks = vec![Vec::new(); edges.len()];
        Self { edges, order: Vec::new(), clocks }
    }

    /// Looks at the nodes of each rank until one waits for a node that was not looked at. Returns
    /// whether there was one.
    fn advance(&mut self) -> bool {
        let before = self.order.len();
        for rank in 0..self.edges.len() {
            while let Some(edges) = self.edges[rank].get(self.clocks[rank].len()) {
                if edges.iter().any(|edge| self.clocks[edge.peer].len() <= edge.node) {
                    break;
                }
                self.look_at(rank);
            }
        }
        self.order.len() > before
    }

    fn is_done(&self) -> bool {
        self.edges.iter().zip(&self.clocks).all(|(edges, clocks)| edges.len() == clocks.len())
    }

    fn look_at(&mut self, rank: Rank) {
        let world = self.edges.len();
        let index = self.clocks[rank].len();
        let own = self.clocks[rank].last().cloned().unwrap_or_else(|| vec![0; world]);
        let all = std::mem::take(&mut self.edges[rank][index]);
        let clock_of = |edge: &Edge| &self.clocks[edge.peer][edge.node];
        let is_needed = |edge: &Edge| {
            let implies =
                |other: &Edge| other.peer != edge.peer && clock_of(other)[edge.peer] > edge.node;
            own[edge.peer] <= edge.node && !all.iter().any(implies)
        };
        let kept: Vec<Edge> = all.iter().copied().filter(is_needed).collect();
        let mut clock = own.clone();
        for edge in &kept {
            let known = clock_of(edge);
            clock.iter_mut().zip(known).for_each(|(mine, known)| *mine = (*mine).max(*known));
        }
        clock[rank] = index + 1;
        self.clocks[rank].push(clock);
        self.edges[rank][index] = kept;
        self.order.push((rank, index));
    }
}
