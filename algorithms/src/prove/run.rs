//! Executes plans on symbolic values, as an engine would on elements.

use std::collections::VecDeque;
use std::ops::Range;

use super::values::{Value, Values};
use super::{Fault, overlap, ranges};
use crate::{OnArrival, Rank, Step};

/// All ranks at once, with rendezvous sends and an in-order window of open steps.
///
/// A step opens when it is within the window and conflicts with no unfinished earlier step. A
/// transfer happens when both ends are open and first in the queue between the two ranks. Arrivals
/// wait in a slot until the step has sent and received everything.
pub(super) struct Run<'a> {
    plans: &'a [Vec<Step>],
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
    pub(super) fn new(plans: &'a [Vec<Step>], count: usize, window: usize) -> Self {
        let world = plans.len();
        let ends = plans.iter().flatten().flat_map(ranges).flat_map(|e| [e.start, e.end]);
        let mut bounds: Vec<usize> = ends.chain([0, count]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        let progress = |rank: Rank| Progress {
            cells: vec![rank as Value; bounds.len() - 1],
            oldest: 0,
            open: VecDeque::new(),
        };
        let queues = || std::iter::repeat_with(VecDeque::new).take(world * world).collect();
        Self {
            plans,
            window: window.max(1),
            rounds_are_global: false,
            values: Values::new(world),
            ranks: (0..world).map(progress).collect(),
            sends: queues(),
            receives: queues(),
            runnable: (0..world).collect(),
            bounds,
        }
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
            let cells = self.ranks[from].cells[self.cells(&send.elements)].to_vec();
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
            let twice = |input| Fault::CountedTwice {
                rank,
                round: index,
                input,
                element: self.bounds[cell],
            };
            self.ranks[rank].cells[cell] = self.values.fold(&mut operands).map_err(twice)?;
        }
        Ok(())
    }

    fn check_results(&self) -> Result<(), Fault> {
        for (rank, progress) in self.ranks.iter().enumerate() {
            for (cell, &value) in progress.cells.iter().enumerate() {
                let element = self.bounds[cell];
                if let Some(input) = self.values.missing(value) {
                    return Err(Fault::Missing { rank, input, element });
                }
                if value != self.ranks[0].cells[cell] {
                    return Err(Fault::Order { rank, element });
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
        let at = |element: usize| self.bounds.partition_point(|&bound| bound < element);
        at(elements.start)..at(elements.end)
    }
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
