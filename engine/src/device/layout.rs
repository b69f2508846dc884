//! What each rank does, and where: nodes of copies and folds, without the flags between ranks.

use std::ops::Range;

use unisum_algorithms::{OnArrival, Rank, Step, slice};

use super::{DeviceSource, Memory, Operand, Place};
use crate::placement::{Located, Move, Overlay, Placement};

/// All ranks' nodes.
pub(super) struct Layout {
    pub(super) members: Vec<Member>,
}

/// One rank's part.
pub(super) struct Member {
    pub(super) overlay: Overlay,
    /// What it does, in order. Node 0 is the beginning of the collective and does nothing.
    pub(super) nodes: Vec<Node>,
    /// What each peer reads from this rank, in order.
    pub(super) sends: Vec<Vec<Send>>,
    /// Bytes of scratch memory.
    pub(super) scratch: usize,
}

/// Work between two points where a rank may wait and signal. The parts do not touch each other.
#[derive(Default)]
pub(super) struct Node {
    pub(super) work: Vec<Work>,
    /// The sends that it reads: of which rank, and which of those to this one.
    pub(super) reads: Vec<(Rank, usize)>,
}

/// What a peer reads.
pub(super) struct Send {
    pub(super) place: Place,
    pub(super) bytes: usize,
    pub(super) elements: Range<usize>,
    /// The node of the sender after which it can be read: the last that writes any of it.
    pub(super) after: usize,
    /// The first node of the sender that may overwrite it.
    pub(super) before: usize,
    /// The node of the receiver that reads it.
    pub(super) reader: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fold,
    Copy,
    /// A copy of an input, multiplied by the factor.
    Scale,
    /// A copy from where an arrival was kept while peers read its place.
    Land,
}

/// One copy or fold.
pub(super) struct Work {
    pub(super) kind: Kind,
    /// In rank order; for arrivals, they are known once all ranks have been laid out.
    pub(super) sources: Vec<Operand>,
    pub(super) to: Place,
    pub(super) bytes: usize,
    /// What arrives, and from which ranks; empty if nothing does.
    pub(super) elements: Range<usize>,
    pub(super) from: Vec<Rank>,
    /// Whether it is kept until it lands.
    pub(super) is_kept: bool,
    /// Of a fold, in order.
    pub(super) parts: Vec<Part>,
}

/// Bytes of a fold's result.
pub(super) struct Part {
    pub(super) bytes: Range<usize>,
    /// Whether they hold the contributions of all ranks.
    pub(super) is_final: bool,
}

impl Work {
    pub(super) fn reads_inputs(&self) -> bool {
        self.sources.iter().all(|source| source.place.memory == Memory::Input)
    }
}

impl Layout {
    /// With `renames_all`, inputs are multiplied by the factor before the first step.
    pub(super) fn new(source: &DeviceSource<'_>, renames_all: bool) -> Self {
        let world = source.world();
        let mut layout =
            Self { members: (0..world).map(|rank| member(source, rank, renames_all)).collect() };
        (0..world).for_each(|rank| layout.find_operands(rank));
        layout
    }

    /// Whether every input is only read by folds that read nothing else.
    pub(super) fn folds_inputs_only(&self) -> bool {
        let work = self.members.iter().flat_map(|it| &it.nodes).flat_map(|node| &node.work);
        let is_input = |source: &Operand| source.place.memory == Memory::Input;
        work.into_iter().all(|work| match work.kind {
            Kind::Fold => work.reads_inputs() || !work.sources.iter().any(is_input),
            _ => !work.sources.iter().any(is_input),
        })
    }

    /// Fills in where the arrivals of `rank` come from. The transfers between two ranks come in the
    /// same order at both ends.
    fn find_operands(&mut self, rank: Rank) {
        let mut taken = vec![0; self.members.len()];
        let mut nodes = std::mem::take(&mut self.members[rank].nodes);
        for (index, node) in nodes.iter_mut().enumerate() {
            for work in &mut node.work {
                for &from in &work.from {
                    let at = taken[from];
                    let send = self.members[from].sends[rank].get_mut(at);
                    let send = send.expect("both ends of a plan have the same transfers");
                    assert_eq!(send.elements, work.elements, "the same elements at both ends");
                    send.reader = index;
                    let place = work.sources.partition_point(|source| source.rank < from);
                    work.sources.insert(place, Operand { rank: from, place: send.place });
                    node.reads.push((from, at));
                    taken[from] += 1;
                }
            }
        }
        self.members[rank].nodes = nodes;
    }
}

/// The steps of a rank: those that a group takes together whole, runs of others sliced.
fn steps(source: &DeviceSource<'_>, rank: Rank) -> Vec<Step> {
    let max = (source.slice_bytes / source.element_bytes).max(1);
    let (mut steps, mut run) = (Vec::new(), Vec::new());
    for step in source.algorithm.steps(source.shape(rank), rank) {
        if step.is_marked() {
            steps.extend(slice(std::mem::take(&mut run).into_iter(), max));
            steps.push(step);
        } else {
            run.push(step);
        }
    }
    steps.extend(slice(run.into_iter(), max));
    steps
}

fn member(source: &DeviceSource<'_>, rank: Rank, renames_all: bool) -> Member {
    let (shape, size) = (source.shape(rank), source.element_bytes);
    let overlay = match source.in_place[rank] {
        true => Overlay::in_place(shape, rank, size),
        false => Overlay::APART,
    };
    let steps = steps(source, rank);
    let placement = Placement::new(shape, rank, steps.iter(), renames_all);
    let mut builder = Builder {
        rank,
        size,
        kept_from: placement.scratch * size,
        member: Member {
            overlay,
            nodes: vec![Node::default()],
            sends: (0..source.world()).map(|_| Vec::new()).collect(),
            scratch: placement.scratch * size,
        },
    };
    builder.moves(&placement.first, renames_all);
    let mut located = &placement.located[..];
    for step in &steps {
        let (of_step, rest) = located.split_at(step.outgoing.len() + step.incoming.len());
        located = rest;
        builder.step(step, of_step);
    }
    builder.last_moves(&placement.last);
    builder.member
}

struct Builder {
    rank: Rank,
    size: usize,
    /// Where in scratch memory arrivals are kept while peers read their places.
    kept_from: usize,
    member: Member,
}

impl Builder {
    fn step(&mut self, step: &Step, located: &[Located]) {
        let (outgoing, incoming) = located.split_at(step.outgoing.len());
        let before = self.member.nodes.len();
        let mut sent = Vec::new();
        for (out, located) in step.outgoing.iter().zip(outgoing) {
            let Some(place) = located.reads else { continue };
            let (place, elements) = (place.in_bytes(self.size), out.elements.clone());
            let bytes = elements.len() * self.size;
            sent.push((place, bytes));
            let after = self.written(before, (place, bytes));
            let send = Send { place, bytes, elements, after, before, reader: 0 };
            self.member.sends[out.to].push(send);
        }
        let (mut arrivals, mut landings) = (Node::default(), Node::default());
        let mut kept_to = self.kept_from;
        for (arrival, located) in step.incoming.iter().zip(incoming) {
            let Some(to) = located.writes.map(|place| place.in_bytes(self.size)) else { continue };
            let bytes = arrival.elements.len() * self.size;
            let own = located.reads.map(|place| self.own(place.in_bytes(self.size)));
            let folds = arrival.on_arrival == OnArrival::Reduce;
            let mut work = Work {
                kind: if folds { Kind::Fold } else { Kind::Copy },
                sources: own.into_iter().collect(),
                to,
                bytes,
                elements: arrival.elements.clone(),
                from: arrival.from.clone(),
                is_kept: self.meets_any(to, bytes, &sent),
                parts: Vec::new(),
            };
            if work.is_kept {
                // Alike modulo 16, so that both can be accessed 16 bytes at a time.
                kept_to += (to.start + 16 - kept_to % 16) % 16;
                work.to = Place::new(Memory::Scratch, kept_to);
                kept_to += bytes;
                let from = self.own(work.to);
                let elements = work.elements.clone();
                landings.work.push(Work { elements, ..local(Kind::Land, from, to, bytes) });
            }
            arrivals.work.push(work);
        }
        self.member.scratch = self.member.scratch.max(kept_to);
        let nodes = [arrivals, landings].into_iter().filter(|node| !node.work.is_empty());
        self.member.nodes.extend(nodes);
    }

    /// The last node before another one that writes any of a span; node 0 if it is an input.
    fn written(&self, before: usize, span: (Place, usize)) -> usize {
        let Member { overlay, nodes, .. } = &self.member;
        let writes = |node: &usize| {
            nodes[*node].work.iter().any(|it| meet(*overlay, (it.to, it.bytes), span))
        };
        (0..before).rev().find(writes).unwrap_or(0)
    }

    const fn own(&self, place: Place) -> Operand {
        Operand { rank: self.rank, place }
    }

    fn meets_any(&self, place: Place, bytes: usize, spans: &[(Place, usize)]) -> bool {
        spans.iter().any(|&span| meet(self.member.overlay, (place, bytes), span))
    }

    /// Adds copies within the rank.
    fn moves(&mut self, moves: &[Move], scales: bool) {
        let work: Vec<Work> = moves.iter().filter_map(|it| self.local_copy(it, scales)).collect();
        if !work.is_empty() {
            self.member.nodes.push(Node { work, reads: Vec::new() });
        }
    }

    /// Adds the copies that bring the rank's result to its output. Inputs that nothing else touches
    /// join earlier copies, so that they cost no launch of their own.
    fn last_moves(&mut self, moves: &[Move]) {
        let has_copies = |node: &Node| node.work.iter().any(|work| work.kind == Kind::Copy);
        let copies = self.member.nodes.iter().position(has_copies);
        let (mut joining, mut others) = (Vec::new(), Vec::new());
        for it in moves {
            let Some(work) = self.local_copy(it, false) else { continue };
            let is_input = it.from.memory == Memory::Input;
            let joins = copies.is_some() && is_input && !self.is_touched((work.to, work.bytes));
            if joins { joining.push(work) } else { others.push(work) }
        }
        if let Some(node) = copies {
            self.member.nodes[node].work.extend(joining);
        }
        if !others.is_empty() {
            self.member.nodes.push(Node { work: others, reads: Vec::new() });
        }
    }

    /// The work of a copy within the rank; in place, most of them are not needed.
    fn local_copy(&self, it: &Move, scales: bool) -> Option<Work> {
        let overlay = self.member.overlay;
        let (from, to) = (it.from.in_bytes(self.size), it.to.in_bytes(self.size));
        let kind = if scales { Kind::Scale } else { Kind::Copy };
        let is_needed = scales || overlay.of(from) != overlay.of(to);
        is_needed.then(|| local(kind, self.own(from), to, it.count * self.size))
    }

    /// Whether this rank or a peer reads or writes a span.
    fn is_touched(&self, span: (Place, usize)) -> bool {
        let Member { overlay, nodes, sends, .. } = &self.member;
        let meets = |place: Place, bytes: usize| meet(*overlay, (place, bytes), span);
        let mut work = nodes.iter().flat_map(|node| &node.work);
        work.any(|it| {
            let sources = it.sources.iter().map(|source| source.place);
            sources.chain([it.to]).any(|place| meets(place, it.bytes))
        }) || sends.iter().flatten().any(|send| meets(send.place, send.bytes))
    }
}

fn local(kind: Kind, from: Operand, to: Place, bytes: usize) -> Work {
    let (sources, parts) = (vec![from], Vec::new());
    Work { kind, sources, to, bytes, elements: 0..0, from: Vec::new(), is_kept: false, parts }
}

/// Whether two spans of a rank's memories overlap.
pub(super) fn meet(overlay: Overlay, a: (Place, usize), b: (Place, usize)) -> bool {
    let ((a_memory, a_start), (b_memory, b_start)) = (overlay.of(a.0), overlay.of(b.0));
    a_memory == b_memory && a_start < b_start + b.1 as isize && b_start < a_start + a.1 as isize
}
