//! Compiled programs, kept for the calls that come again.

use std::collections::HashMap;
use std::sync::Arc;

use unisum_algorithms as plans;
use unisum_algorithms::{Shape, Topology};
use unisum_link::Rank;

use crate::autotuning::selector::AlgorithmSelector;
use crate::collective::Blocks;
use crate::collective::key::Key;
use unisum_control::plan_of;
use unisum_engine::{Engine, GroupShape, Program, Source, Tuning};

/// A compiled program and the algorithm it was made from.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    pub(crate) algorithm: usize,
    pub(crate) program: Arc<Program>,
}

/// A bounded cache: training repeats the same few shapes.
#[derive(Debug)]
pub(crate) struct Programs {
    rank: Rank,
    tuning: Tuning,
    /// Which algorithm was fixed when `known` were made.
    fixed: usize,
    known: HashMap<Key, Compiled>,
}

const CAPACITY: usize = 128;

impl Programs {
    pub(crate) fn new(rank: Rank, tuning: Tuning) -> Self {
        let fixed = crate::autotuning::selector::AUTO;
        Self { rank, tuning, fixed, known: HashMap::new() }
    }

    /// The program of a call, built if it is new, by the algorithm that `choice` takes for it after
    /// `first` was done. That says whether it settled an algorithm: then programs made by another
    /// are forgotten, on all ranks in the same call, whichever each of them has.
    pub(crate) fn program<E>(
        &mut self,
        key: &Key,
        choice: &AlgorithmSelector,
        engine: &mut Engine,
        first: impl FnOnce(&Self, &mut Engine) -> Result<bool, E>,
    ) -> Result<&Compiled, E> {
        let fixed = choice.fixed();
        if self.fixed != fixed || self.known.len() > CAPACITY {
            self.fixed = fixed;
            self.known.clear();
        }
        if !self.known.contains_key(key) {
            if first(self, engine)? {
                self.known.clear();
            }
            let shape = shape(key, self.rank, choice.topology());
            let algorithm = choice.algorithm(&shape, key);
            let program = build(key, self.rank, self.tuning, algorithm, &shape, engine).into();
            self.known.insert(key.clone(), Compiled { algorithm, program });
        }
        Ok(&self.known[key])
    }

    /// The plan's view of a call of this rank.
    pub(crate) fn shape(&self, key: &Key, topology: &Topology) -> Shape {
        shape(key, self.rank, topology)
    }

    /// The program of a call by a given algorithm, which is not kept.
    pub(crate) fn build_by(
        &self,
        algorithm: usize,
        key: &Key,
        topology: &Topology,
        engine: &mut Engine,
    ) -> Arc<Program> {
        let shape = shape(key, self.rank, topology);
        build(key, self.rank, self.tuning, algorithm, &shape, engine).into()
    }
}

/// The plan's view of a call.
pub(crate) fn shape(key: &Key, rank: Rank, topology: &Topology) -> Shape {
    let (topology, collective) = (topology.clone(), collective(key));
    match &key.blocks {
        // A call without elements still meets the other ranks', to find out whether they agree.
        Blocks::Even(each) if collective == plans::PlanKind::AllReduce => {
            Shape::all_reduce(topology, (*each).max(1))
        }
        Blocks::Even(each) => match collective {
            plans::PlanKind::Reduce { .. } | plans::PlanKind::Broadcast { .. } => {
                Shape::whole(topology, collective, *each)
            }
            _ => Shape::even(topology, collective, *each),
        },
        Blocks::Given(counts) => Shape::blocks(topology, collective, counts),
        Blocks::Pairs(sends, receives) => Shape::pairs(topology, rank, sends, receives),
    }
}

/// The plans' name of a call's collective. Calls that move no elements are an all-reduce.
fn collective(key: &Key) -> plans::PlanKind {
    match key.blocks {
        Blocks::Even(0) => plans::PlanKind::AllReduce,
        _ => plan_of(key.kind, key.root),
    }
}

fn build(
    key: &Key,
    rank: Rank,
    tuning: Tuning,
    algorithm: usize,
    shape: &Shape,
    engine: &mut Engine,
) -> Program {
    let group = engine.group();
    let members = group.as_ref().map_or_else(Vec::new, |group| group.members().to_vec());
    Program::build(&Source {
        algorithm: plans::algorithms(shape.collective)[algorithm],
        shape,
        rank,
        element_bytes: key.element_bytes,
        average: key.average,
        scales: key.scales,
        in_place: key.in_place,
        tuning,
        group: group.map(|group| GroupShape { members: &members, slot_bytes: group.slot_bytes() }),
    })
}
