//! Proof by execution that plans are an all-reduce.

mod fault;
mod marks;
mod run;
mod values;

use std::ops::Range;

use crate::{Algorithm, OnArrival, Rank, Shape, Step, slice};

pub use fault::Fault;
use run::Run;

/// Proves that `algorithm` all-reduces `shape`, whole and sliced, in windows of 1, 2 and 8 open
/// steps.
///
/// Executes the plans of all ranks on symbolic values, so the answer is exact and holds for every
/// commutative operation, associative or not: each input is counted exactly once on every rank, all
/// ranks fold in the same order and therefore get the same bits, nothing deadlocks with rendezvous
/// sends, both ends agree on every transfer, and the marks are truthful.
/// Cost: a few hundred nanoseconds for each transfer and piece of a range; independent of the
/// element count.
///
/// # Errors
/// The first [`Fault`] found.
pub fn prove(algorithm: &dyn Algorithm, shape: &Shape) -> Result<(), Fault> {
    let ranks = 0..shape.world();
    let plans: Vec<Vec<Step>> = ranks.map(|rank| algorithm.steps(shape, rank).collect()).collect();
    let expected = plans.first().map_or(0, Vec::len);
    if let Some(rank) = plans.iter().position(|plan| plan.len() != expected) {
        return Err(Fault::Rounds { rank, rounds: plans[rank].len(), expected });
    }
    check(&plans, shape.count)?;
    for window in [1, 8] {
        Run::new(&plans, shape.count, window).rounds_are_global().execute()?;
    }
    let lengths = plans.iter().flatten().flat_map(|s| s.outgoing.iter().map(|o| o.elements.len()));
    let longest = lengths.max().unwrap_or(0);
    let sliced: Vec<Vec<Step>> =
        plans.into_iter().map(|plan| slice(plan.into_iter(), longest.div_ceil(SLICES))).collect();
    [1, 2, 8].into_iter().try_for_each(|window| Run::new(&sliced, shape.count, window).execute())
}

/// Proves that the plans of all ranks, in rank order, all-reduce `count` elements with `window`
/// open steps.
///
/// As [`prove`], but for plans as they are. They may be sliced: then both ends of a transfer need
/// not be at the same index of their plans. Marked steps must be.
///
/// # Errors
/// The first [`Fault`] found.
pub fn prove_plans(plans: &[Vec<Step>], count: usize, window: usize) -> Result<(), Fault> {
    check(plans, count)?;
    Run::new(plans, count, window).execute()
}

/// What can be said without executing.
fn check(plans: &[Vec<Step>], count: usize) -> Result<(), Fault> {
    for (rank, plan) in plans.iter().enumerate() {
        for (round, step) in plan.iter().enumerate() {
            check_ranges(step, rank, round, count)?;
            check_ranks(step, rank, round, plans.len())?;
            check_overlaps(step, rank, round)?;
        }
    }
    marks::check(plans)
}

fn check_ranges(step: &Step, rank: Rank, round: usize, count: usize) -> Result<(), Fault> {
    let beyond = |elements: &&Range<usize>| elements.end > count || elements.start > elements.end;
    match ranges(step).find(beyond) {
        Some(elements) => Err(Fault::Bounds { rank, round, elements: elements.clone(), count }),
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

fn ranges(step: &Step) -> impl Iterator<Item = &Range<usize>> {
    step.outgoing.iter().map(|o| &o.elements).chain(step.incoming.iter().map(|i| &i.elements))
}

pub(crate) fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// How many slices the longest transfer is proven with: more than one, and not a power of two.
const SLICES: usize = 3;
