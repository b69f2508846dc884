//! Proof by execution that plans implement their collective.

mod fault;
mod marks;
mod run;
mod values;

use std::ops::Range;

use crate::{Algorithm, OnArrival, Rank, Shape, Step, slice};

pub use fault::Fault;
use run::Run;

/// Proves that `algorithm` does what `shape` says, whole and sliced, in windows of 1, 2 and 8 open
/// steps.
///
/// Executes the plans of all ranks on symbolic values, so the answer is exact and holds for every
/// commutative operation, associative or not. Each rank ends with every contribution to the
/// elements it wants, each counted exactly once. All ranks that want an element fold it in the same
/// order and therefore get the same bits. No rank sends or reduces an element of which it has no
/// value. Nothing deadlocks with rendezvous sends, both ends agree on every transfer, and the marks
/// are truthful. Cost: a few hundred nanoseconds for each transfer and piece of a range,
/// independent of the element count.
///
/// # Errors
/// The first [`Fault`] found.
///
/// # Panics
/// If the algorithm does not support the shape, or the shape is that of a single rank: see
/// [`prove_each`].
pub fn prove(algorithm: &dyn Algorithm, shape: &Shape) -> Result<(), Fault> {
    prove_all(algorithm, &Shapes::Shared(shape), false)
}

/// Like [`prove`], for an all-to-all whose ranks know only their own lengths: takes the shape of
/// each rank, in rank order.
///
/// # Errors
/// The first [`Fault`] found.
///
/// # Panics
/// If the algorithm does not support the shapes, or there is not one for each rank.
pub fn prove_each(algorithm: &dyn Algorithm, shapes: &[Shape]) -> Result<(), Fault> {
    assert!(shapes.iter().all(|shape| shape.world() == shapes.len()), "a shape for each rank");
    prove_all(algorithm, &Shapes::Each(shapes), false)
}

/// Like [`prove`], and proves that every element is folded in rank order, as operations that do not
/// commute require.
///
/// # Errors
/// The first [`Fault`] found.
///
/// # Panics
/// As [`prove`].
pub fn prove_rank_order(algorithm: &dyn Algorithm, shape: &Shape) -> Result<(), Fault> {
    prove_all(algorithm, &Shapes::Shared(shape), true)
}

/// Proves that the plans of all ranks, in rank order, do what `shape` says with `window` open
/// steps.
///
/// As [`prove`], but for plans as they are. They may be sliced: then both ends of a transfer need
/// not be at the same index of their plans. Marked steps must be.
///
/// # Errors
/// The first [`Fault`] found.
///
/// # Panics
/// If the shape is that of one rank.
pub fn prove_plans(shape: &Shape, plans: &[Vec<Step>], window: usize) -> Result<(), Fault> {
    let shapes = Shapes::Shared(shape);
    check(plans, &shapes)?;
    Run::new(plans, &shapes.ends(), window).execute()
}

/// The shapes of all ranks.
enum Shapes<'a> {
    Shared(&'a Shape),
    Each(&'a [Shape]),
}

impl Shapes<'_> {
    fn of(&self, rank: Rank) -> &Shape {
        match self {
            Self::Shared(shape) => shape,
            Self::Each(shapes) => &shapes[rank],
        }
    }

    fn world(&self) -> usize {
        match self {
            Self::Shared(shape) => shape.world(),
            Self::Each(shapes) => shapes.len(),
        }
    }

    fn ends(&self) -> Ends {
        let ranks = || 0..self.world();
        Ends {
            contributes: ranks().map(|rank| self.of(rank).contributes(rank)).collect(),
            wants: ranks().map(|rank| self.of(rank).wants(rank)).collect(),
        }
    }
}

/// For each rank the elements it contributes and those it wants.
struct Ends {
    contributes: Vec<Vec<Range<usize>>>,
    wants: Vec<Vec<Range<usize>>>,
}

fn prove_all(
    algorithm: &dyn Algorithm,
    shapes: &Shapes<'_>,
    in_rank_order: bool,
) -> Result<(), Fault> {
    let ranks = 0..shapes.world();
    let plans: Vec<Vec<Step>> =
        ranks.map(|rank| algorithm.steps(shapes.of(rank), rank).collect()).collect();
    let expected = plans.first().map_or(0, Vec::len);
    if let Some(rank) = plans.iter().position(|plan| plan.len() != expected) {
        return Err(Fault::Rounds { rank, rounds: plans[rank].len(), expected });
    }
    check(&plans, shapes)?;
    let ends = shapes.ends();
    for window in [1, 8] {
        let run = Run::new(&plans, &ends, window).in_rank_order(in_rank_order);
        run.rounds_are_global().execute()?;
    }
    let lengths = plans.iter().flatten().flat_map(|s| s.outgoing.iter().map(|o| o.elements.len()));
    let longest = lengths.max().unwrap_or(0);
    let sliced: Vec<Vec<Step>> =
        plans.into_iter().map(|plan| slice(plan.into_iter(), longest.div_ceil(SLICES))).collect();
    [1, 2, 8].into_iter().try_for_each(|window| {
        Run::new(&sliced, &ends, window).in_rank_order(in_rank_order).execute()
    })
}

/// What can be said without executing.
fn check(plans: &[Vec<Step>], shapes: &Shapes<'_>) -> Result<(), Fault> {
    for (rank, plan) in plans.iter().enumerate() {
        for (round, step) in plan.iter().enumerate() {
            check_ranges(step, rank, round, shapes.of(rank))?;
            check_ranks(step, rank, round, plans.len())?;
            check_overlaps(step, rank, round)?;
        }
    }
    marks::check(plans, &shapes.of(0).topology)
}

fn check_ranges(step: &Step, rank: Rank, round: usize, shape: &Shape) -> Result<(), Fault> {
    match ranges(step).find(|elements| !shape.contains(elements)) {
        Some(elements) => Err(Fault::Bounds { rank, round, elements: elements.clone() }),
        None => Ok(()),
    }
}

fn check_ranks(step: &Step, rank: Rank, round: usize, world: usize) -> Result<(), Fault> {
    let mut ranks = step
        .outgoing
        .iter()
        .map(|o| o.to)
        .chain(step.incoming.iter().flat_map(|i| i.from.iter().copied()));
    if let Some(other) = ranks.find(|&other| other == rank || other >= world) {
        return Err(Fault::Partner { rank, round, other });
    }
    for arrival in &step.incoming {
        let sources = arrival.from.len();
        if arrival.on_arrival == OnArrival::Store && sources != 1 {
            return Err(Fault::StoreSources { rank, round, sources });
        }
        if sources == 0 || !arrival.from.is_sorted_by(|a, b| a < b) {
            return Err(Fault::ReduceSources { rank, round, from: arrival.from.clone() });
        }
    }
    Ok(())
}

fn check_overlaps(step: &Step, rank: Rank, round: usize) -> Result<(), Fault> {
    let mut arriving: Vec<_> =
        step.incoming.iter().map(|i| &i.elements).filter(|e| !e.is_empty()).collect();
    arriving.sort_by_key(|elements| elements.start);
    if let Some(pair) = arriving.windows(2).find(|pair| overlap(pair[0], pair[1])) {
        return Err(Fault::ArrivalsOverlap { rank, round, elements: pair[1].clone() });
    }
    let stores = step.incoming.iter().filter(|i| i.on_arrival == OnArrival::Store);
    for store in stores {
        // Most steps send one range many times or many ranges once; either way this is short.
        if step.outgoing.iter().any(|o| overlap(&o.elements, &store.elements)) {
            return Err(Fault::StoreIntoSent { rank, round, elements: store.elements.clone() });
        }
    }
    Ok(())
}

pub(crate) fn ranges(step: &Step) -> impl Iterator<Item = &Range<usize>> {
    step.outgoing.iter().map(|o| &o.elements).chain(step.incoming.iter().map(|i| &i.elements))
}

pub(crate) fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// How many slices the longest transfer is proven with: more than one, and not a power of two.
const SLICES: usize = 3;
