//! Which folds complete a result, and to which ranks it goes.

use std::ops::Range;

use unisum_algorithms::Rank;

use super::DeviceSource;
use super::layout::{Kind, Layout, Node, Part, Send, Work};

/// What a rank has of a cell: elements that all transfers touch together.
#[derive(Clone, Copy, Default)]
struct Value {
    /// How many ranks' contributions are in it.
    contributions: usize,
    /// The rank that folded the last of them in.
    completed_by: Option<Rank>,
}

/// Divides each fold into final parts and others. Returns for each rank the ranks that completed
/// its result.
///
/// `order` has the nodes in an order in which they could be executed.
pub(super) fn find(
    source: &DeviceSource<'_>,
    layout: &mut Layout,
    order: &[(Rank, usize)],
) -> Vec<Vec<Rank>> {
    let world = source.world();
    let mut work = layout.members.iter().flat_map(|it| &it.nodes).flat_map(|node| &node.work);
    if !work.any(|work| work.kind == Kind::Fold) {
        return vec![Vec::new(); world];
    }
    let mut results = Results::new(source, layout);
    for &(rank, index) in order {
        let member = &mut layout.members[rank];
        if let Some(node) = member.nodes.get_mut(index) {
            results.follow(rank, node);
            results.send(rank, index, &member.sends);
        }
    }
    (0..world).map(|rank| results.completed_by(source, rank)).collect()
}

struct Results {
    element_bytes: usize,
    /// Cell i is the elements from `cuts[i]` to `cuts[i + 1]`.
    cuts: Vec<usize>,
    /// For each rank.
    values: Vec<Vec<Value>>,
    /// For each pair of ranks, from · world + to, and each send: what was sent.
    sent: Vec<Vec<Vec<Value>>>,
    /// Arrivals that have not landed: their first cells and values.
    kept: Vec<Vec<(usize, Vec<Value>)>>,
}

impl Results {
    fn new(source: &DeviceSource<'_>, layout: &Layout) -> Self {
        let world = source.world();
        let ends = |rank| {
            let shape = source.shape(rank);
            shape.contributes(rank).into_iter().chain(shape.wants(rank))
        };
        let works = layout.members.iter().flat_map(|it| &it.nodes).flat_map(|node| &node.work);
        let ranges = works.map(|work| work.elements.clone()).chain((0..world).flat_map(ends));
        let mut cuts: Vec<usize> = ranges.flat_map(|range| [range.start, range.end]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let none = vec![Value::default(); cuts.len().saturating_sub(1)];
        let mut results = Self {
            element_bytes: source.element_bytes,
            cuts,
            values: vec![none; world],
            sent: vec![Vec::new(); world * world],
            kept: vec![Vec::new(); world],
        };
        for (rank, member) in layout.members.iter().enumerate() {
            for (to, sends) in member.sends.iter().enumerate() {
                results.sent[rank * world + to] = vec![Vec::new(); sends.len()];
            }
        }
        let own = Value { contributions: 1, completed_by: None };
        for rank in 0..world {
            for range in source.shape(rank).contributes(rank) {
                let cells = results.cells(&range);
                results.values[rank][cells].fill(own);
            }
        }
        results
    }

    fn cells(&self, elements: &Range<usize>) -> Range<usize> {
        let at = |element: usize| self.cuts.partition_point(|&cut| cut < element);
        at(elements.start)..at(elements.end)
    }

    /// Notes what can be read from a rank after one of its nodes.
    fn send(&mut self, rank: Rank, node: usize, sends: &[Vec<Send>]) {
        for (to, sends) in sends.iter().enumerate() {
            for (at, send) in sends.iter().enumerate().filter(|(_, send)| send.after == node) {
                let cells = self.cells(&send.elements);
                let sent = &mut self.sent[rank * self.values.len() + to][at];
                sent.extend_from_slice(&self.values[rank][cells]);
            }
        }
    }

    fn follow(&mut self, rank: Rank, node: &mut Node) {
        let mut reads = node.reads.iter();
        for work in &mut node.work {
            let cells = self.cells(&work.elements);
            if work.kind == Kind::Land {
                let kept = &mut self.kept[rank];
                let at = kept.iter().position(|(first, _)| *first == cells.start);
                let (_, values) = kept.swap_remove(at.expect("it was kept"));
                self.values[rank][cells].copy_from_slice(&values);
                continue;
            }
            let world = self.values.len();
            let arrived: Vec<Vec<Value>> = reads
                .by_ref()
                .take(work.from.len())
                .map(|&(from, send)| std::mem::take(&mut self.sent[from * world + rank][send]))
                .collect();
            let values = match work.kind {
                Kind::Fold => self.fold(rank, work, &arrived),
                Kind::Copy if !arrived.is_empty() => arrived.into_iter().flatten().collect(),
                _ => continue,
            };
            if work.is_kept {
                self.kept[rank].push((cells.start, values));
            } else {
                self.values[rank][cells].copy_from_slice(&values);
            }
        }
    }

    fn fold(&self, rank: Rank, work: &mut Work, arrived: &[Vec<Value>]) -> Vec<Value> {
        let cells = self.cells(&work.elements);
        let mut values = Vec::with_capacity(cells.len());
        for (at, cell) in cells.enumerate() {
            let others = arrived.iter().map(|values| values[at].contributions);
            let contributions = self.values[rank][cell].contributions + others.sum::<usize>();
            let is_final = contributions == self.values.len();
            values.push(Value { contributions, completed_by: is_final.then_some(rank) });
            let bytes = |element: usize| (element - work.elements.start) * self.element_bytes;
            let bytes = bytes(self.cuts[cell])..bytes(self.cuts[cell + 1]);
            match work.parts.last_mut() {
                Some(last) if last.is_final == is_final => last.bytes.end = bytes.end,
                _ => work.parts.push(Part { bytes, is_final }),
            }
        }
        values
    }

    fn completed_by(&self, source: &DeviceSource<'_>, rank: Rank) -> Vec<Rank> {
        let wants = source.shape(rank).wants(rank);
        let cells = wants.iter().flat_map(|range| self.cells(range));
        let mut ranks: Vec<Rank> =
            cells.filter_map(|cell| self.values[rank][cell].completed_by).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}
