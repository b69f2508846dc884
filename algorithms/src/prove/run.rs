//! Executes plans on symbolic values, as an engine would on elements.

use std::collections::VecDeque;
use std::ops::Range;

use super::values::{HOLE, Unfit, Value, Values};
use super::{Ends, Fault, overlap, ranges};
use crate::{OnArrival, Rank, Step};

/// All ranks at once, with rendezvous sends and an in-order window of open steps.
///
/// A step opens when it is within the window and conflicts with no unfinished earlier step. A
/// transfer happens when both ends are open and first in the queue between the two ranks. Arrivals
/// wait in a slot until the step has sent and received everything.
pub(super) struct Run<'a> {
    plans: &'a [Vec<Step>],
    ends: &'a Ends,
    window: usize,
    rounds_are_global: bool,
    /// Where ranges begin and end: cell i is the elements from `bounds[i]` to `bounds[i + 1]`.
    bounds: Vec<usize>,
    values: Values,
    ranks: Vec<Progress>,
    /// For each pair of ranks, from · world + to: what the one has posted and the other expects.
    sends: Vec<VecDeque<Post>>,
    receives: Vec<VecDeque<Post>>,
    /// Ranks that may be able to open a step.
    runnable: Vec<Rank>,
}

/// How far one rank is.
struct Progress {
    cells: Vec<Value>,
    /// The unfinished step of lowest index, and all after it that are open.
    oldest: usize,
    open: VecDeque<OpenStep>,
}

#[derive(Default)]
struct OpenStep {
    /// Transfers that have not happened.
    pending: usize,
    finished: bool,
    slots: Vec<Slot>,
}

struct Slot {
    arrival: usize,
    from: Rank,
    cells: Vec<Value>,
}

/// One end of a transfer; `arrival` is the index in `incoming` at the receiving end.
struct Post {
    step: usize,
    elements: Range<usize>,
    arrival: usize,
}

impl<'a> Run<'a> {
    pub(super) fn new(plans: &'a [Vec<Step>], ends: &'a Ends, window: usize) -> Self {
        let world = plans.len();
        let moved = plans.iter().flatten().flat_map(ranges);
        let all = ends.contributes.iter().chain(&ends.wants).flatten().chain(moved);
        let mut bounds: Vec<usize> = all.flat_map(|range| [range.start, range.end]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        let progress = |rank: Rank| {
            let mut cells = vec![HOLE; bounds.len().saturating_sub(1)];
            for range in &ends.contributes[rank] {
                cells[cells_of(&bounds, range)].fill(rank as Value);
            }
            Progress { cells, oldest: 0, open: VecDeque::new() }
        };
        let queues = || std::iter::repeat_with(VecDeque::new).take(world * world).collect();
        Self {
            plans,
            ends,
            window: window.max(1),
            rounds_are_global: false,
            values: Values::new(world, false),
            ranks: (0..world).map(progress).collect(),
            sends: queues(),
            receives: queues(),
            runnable: (0..world).collect(),
            bounds,
        }
    }

    /// Says whether every fold has to keep its inputs in rank order.
    pub(super) fn in_rank_order(mut self, demanded: bool) -> Self {
        self.values = Values::new(self.ranks.len(), demanded);
        self
    }

    /// Demands that both ends of a transfer are at the same index of their plans.
    pub(super) fn rounds_are_global(mut self) -> Self {
        self.rounds_are_global = true;
        self
    }

    pub(super) fn execute(mut self) -> Result<(), Fault> {
        while let Some(rank) = self.runnable.pop() {
            self.open_steps(rank)?;
        }
        let unfinished = |rank: &Rank| self.ranks[*rank].oldest < self.plans[*rank].len();
        if let Some(rank) = (0..self.ranks.len()).find(unfinished) {
            let round = self.ranks[rank].oldest;
            return Err(Fault::Deadlock { rank, round, window: self.window });
        }
        self.check_results()
    }

    fn open_steps(&mut self, rank: Rank) -> Result<(), Fault> {
        loop {
            let progress = &mut self.ranks[rank];
            let next = progress.oldest + progress.open.len();
            let Some(step) = self.plans[rank].get(next) else {
                return Ok(());
            };
            let unfinished =
                (progress.oldest..).zip(&progress.open).filter(|(_, open)| !open.finished);
            let conflict = |(earlier, _)| conflicts(step, &self.plans[rank][earlier]);
            if progress.open.len() == self.window || unfinished.into_iter().any(conflict) {
                return Ok(());
            }
            progress.open.push_back(OpenStep::default());
            self.post(rank, next, step)?;
        }
    }

    /// Posts all transfers of a step, receives first, and makes those that can happen happen.
    fn post(&mut self, rank: Rank, index: usize, step: &Step) -> Result<(), Fault> {
        let world = self.plans.len();
        let mut queues = Vec::with_capacity(step.outgoing.len() + step.incoming.len());
        for (arrival, incoming) in
            step.incoming.iter().enumerate().filter(|(_, i)| !i.elements.is_empty())
        {
            for from in &incoming.from {
                let post = Post { step: index, elements: incoming.elements.clone(), arrival };
                self.receives[from * world + rank].push_back(post);
                queues.push((*from, rank));
            }
        }
        for outgoing in step.outgoing.iter().filter(|o| !o.elements.is_empty()) {
            let post = Post { step: index, elements: outgoing.elements.clone(), arrival: 0 };
            self.sends[rank * world + outgoing.to].push_back(post);
            queues.push((rank, outgoing.to));
        }
        self.open_step(rank, index).pending = queues.len();
        if queues.is_empty() {
            self.finish(rank, index)?;
        }
        queues.into_iter().try_for_each(|(from, to)| self.transfer(from, to))
    }

    /// Makes the transfers between two ranks that both have posted happen.
    fn transfer(&mut self, from: Rank, to: Rank) -> Result<(), Fault> {
        let queue = from * self.plans.len() + to;
        while !self.sends[queue].is_empty()
            && let Some(receive) = self.receives[queue].pop_front()
            && let Some(send) = self.sends[queue].pop_front()
        {
            let (sent_in, expected_in) = (send.step, receive.step);
            if send.elements != receive.elements {
                let (sent, expected) = (send.elements, receive.elements);
                return Err(Fault::Elements { from, sent_in, sent, to, expected_in, expected });
            }
            if self.rounds_are_global && sent_in != expected_in {
                return Err(Fault::RoundsDiffer { from, sent_in, to, expected_in });
            }
            let range = self.cells(&send.elements);
            let cells = self.ranks[from].cells[range.clone()].to_vec();
            if let Some(hole) = cells.iter().position(|&value| value == HOLE) {
                let element = self.bounds[range.start + hole];
                return Err(Fault::NoValue { rank: from, round: sent_in, element });
            }
            let slot = Slot { arrival: receive.arrival, from, cells };
            self.open_step(to, expected_in).slots.push(slot);
            self.settle(from, sent_in)?;
            self.settle(to, expected_in)?;
        }
        Ok(())
    }

    /// Notes that one transfer of a step has happened.
    fn settle(&mut self, rank: Rank, index: usize) -> Result<(), Fault> {
        let open = self.open_step(rank, index);
        open.pending -= 1;
        if open.pending == 0 { self.finish(rank, index) } else { Ok(()) }
    }

    /// Applies a step's arrivals and moves the window on.
    fn finish(&mut self, rank: Rank, index: usize) -> Result<(), Fault> {
        let mut slots = std::mem::take(&mut self.open_step(rank, index).slots);
        slots.sort_by_key(|slot| (slot.arrival, slot.from));
        for slots in slots.chunk_by(|a, b| a.arrival == b.arrival) {
            self.apply(rank, index, slots)?;
        }
        self.open_step(rank, index).finished = true;
        let progress = &mut self.ranks[rank];
        while progress.open.front().is_some_and(|open| open.finished) {
            progress.open.pop_front();
            progress.oldest += 1;
        }
        self.runnable.push(rank);
        Ok(())
    }

    /// Stores or folds what came for one arrival, its slots in rank order.
    fn apply(&mut self, rank: Rank, index: usize, slots: &[Slot]) -> Result<(), Fault> {
        let incoming = &self.plans[rank][index].incoming[slots[0].arrival];
        let cells = self.cells(&incoming.elements);
        if incoming.on_arrival == OnArrival::Store {
            self.ranks[rank].cells[cells].copy_from_slice(&slots[0].cells);
            return Ok(());
        }
        let mine = slots.partition_point(|slot| slot.from < rank);
        let mut operands = Vec::with_capacity(slots.len() + 1);
        for (i, cell) in cells.enumerate() {
            operands.clear();
            operands.extend(slots.iter().map(|slot| slot.cells[i]));
            operands.insert(mine, self.ranks[rank].cells[cell]);
            let (round, element) = (index, self.bounds[cell]);
            let fault = |unfit| match unfit {
                Unfit::Twice(input) => Fault::CountedTwice { rank, round, input, element },
                Unfit::Hole => Fault::NoValue { rank, round, element },
                Unfit::Order => Fault::RankOrder { rank, round, element },
            };
            self.ranks[rank].cells[cell] = self.values.fold(&mut operands).map_err(fault)?;
        }
        Ok(())
    }

    /// Whether every rank has what it wants, and the same as the others that want it.
    fn check_results(&self) -> Result<(), Fault> {
        // For each cell its inputs, a bit per rank.
        let words = self.ranks.len().div_ceil(64);
        let mut inputs = vec![0u64; self.bounds.len() * words];
        for (rank, contributed) in self.ends.contributes.iter().enumerate() {
            for cell in contributed.iter().flat_map(|range| self.cells(range)) {
                inputs[cell * words + rank / 64] |= 1 << (rank % 64);
            }
        }
        let mut first: Vec<Option<Rank>> = vec![None; self.bounds.len()];
        for (rank, wanted) in self.ends.wants.iter().enumerate() {
            for cell in wanted.iter().flat_map(|range| self.cells(range)) {
                let (value, element) = (self.ranks[rank].cells[cell], self.bounds[cell]);
                if let Some(input) = self.values.missing(value, &inputs[cell * words..][..words]) {
                    return Err(Fault::Missing { rank, input, element });
                }
                let than = *first[cell].get_or_insert(rank);
                if value != self.ranks[than].cells[cell] {
                    return Err(Fault::Order { rank, than, element });
                }
            }
        }
        Ok(())
    }

    fn open_step(&mut self, rank: Rank, index: usize) -> &mut OpenStep {
        let progress = &mut self.ranks[rank];
        &mut progress.open[index - progress.oldest]
    }

    fn cells(&self, elements: &Range<usize>) -> Range<usize> {
        cells_of(&self.bounds, elements)
    }
}

fn cells_of(bounds: &[usize], elements: &Range<usize>) -> Range<usize> {
    let at = |element: usize| bounds.partition_point(|&bound| bound < element);
    at(elements.start)..at(elements.end)
}

/// Whether `later` must wait for `earlier`: it reads what that writes, or writes what that reads or
/// writes.
fn conflicts(later: &Step, earlier: &Step) -> bool {
    let reads = |step: &'_ Step, range: &Range<usize>| {
        step.outgoing.iter().any(|o| overlap(&o.elements, range))
    };
    let writes =
        |range: &Range<usize>| earlier.incoming.iter().any(|i| overlap(&i.elements, range));
    later.outgoing.iter().any(|o| writes(&o.elements))
        || later.incoming.iter().any(|i| writes(&i.elements) || reads(earlier, &i.elements))
}
