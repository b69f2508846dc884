//! Plans run backwards.

use crate::algorithm::Rounds;
use crate::{Incoming, OnArrival, Outgoing, Rank, Step};

/// The rounds in reverse order, with every transfer the other way round.
///
/// Data that spreads from one rank to others flows, run backwards, from those ranks to the one. If
/// each rank stores each element at most once, and before it sends it on, the mirror with `Reduce`
/// therefore turns a broadcast into a reduce and an all-gather into a reduce-scatter: each rank
/// folds what it received into what it has, once, and sends it on. With `Store`, it turns a scatter
/// into a gather.
///
/// Source: Chan, Heimlich, Purkayastha and van de Geijn, "Collective communication: theory,
/// practice, and experience", Concurrency and Computation 19(13), 2007, section 4 (the duals).
pub(crate) fn mirror(rounds: Rounds<'_>, on_arrival: OnArrival) -> Rounds<'_> {
    Box::new(rounds.rev().map(move |step| mirrored(step, on_arrival)))
}

fn mirrored(step: Step, on_arrival: OnArrival) -> Step {
    let back = |stored: Incoming| Outgoing { to: stored.from[0], elements: stored.elements };
    let mut incoming: Vec<Incoming> = Vec::new();
    for Outgoing { to, elements } in step.outgoing {
        let same = |arrival: &&mut Incoming| arrival.elements == elements;
        match incoming.iter_mut().find(same).filter(|_| on_arrival == OnArrival::Reduce) {
            Some(arrival) => insert(&mut arrival.from, to),
            None => incoming.push(Incoming { from: vec![to], elements, on_arrival }),
        }
    }
    let outgoing = step.incoming.into_iter().map(back).collect();
    Step { pattern: step.pattern, outgoing, incoming }
}

fn insert(ranks: &mut Vec<Rank>, rank: Rank) {
    ranks.insert(ranks.partition_point(|&other| other < rank), rank);
}
