//! Compiled programs, kept for the calls that come again.

use std::collections::HashMap;
use std::sync::Arc;

use unisum_algorithms::{Shape, Topology, all};
use unisum_link::{Call, Rank, ReduceOp};

use crate::engine::Engine;
use crate::engine::program::{GroupShape, Program, Source, Tuning};

/// What a program depends on within one communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    algorithm: usize,
    count: u64,
    element_bytes: usize,
    average: bool,
}

/// A bounded cache: training repeats the same few shapes.
#[derive(Debug)]
pub(crate) struct Programs {
    rank: Rank,
    tuning: Tuning,
    last: Option<(Key, Arc<Program>)>,
    known: HashMap<Key, Arc<Program>>,
}

const CAPACITY: usize = 128;

impl Programs {
    pub(crate) fn new(rank: Rank, tuning: Tuning) -> Self {
        Self { rank, tuning, last: None, known: HashMap::new() }
    }

    /// The program of a call, built if it is new.
    pub(crate) fn program(
        &mut self,
        call: &Call,
        algorithm: usize,
        topology: &Topology,
        engine: &mut Engine,
    ) -> Arc<Program> {
        let key = Key {
            algorithm,
            count: call.count,
            element_bytes: call.dtype.bytes(),
            average: call.op == ReduceOp::Average,
        };
        if let Some((last, program)) = &self.last
            && *last == key
        {
            return program.clone();
        }
        if self.known.len() >= CAPACITY {
            self.known.clear();
        }
        let (rank, tuning) = (self.rank, self.tuning);
        let program = self
            .known
            .entry(key)
            .or_insert_with(|| Arc::new(build(&key, rank, tuning, topology, engine)))
            .clone();
        self.last = Some((key, program.clone()));
        program
    }
}

fn build(
    key: &Key,
    rank: Rank,
    tuning: Tuning,
    topology: &Topology,
    engine: &mut Engine,
) -> Program {
    // A call without elements still meets the other ranks', to find out whether they agree.
    let count = usize::try_from(key.count).expect("counts come from a slice").max(1);
    let shape = Shape { topology: topology.clone(), count };
    let group = engine.group();
    let members = group.as_ref().map_or_else(Vec::new, |group| group.members().to_vec());
    Program::build(&Source {
        algorithm: all()[key.algorithm],
        shape: &shape,
        rank,
        element_bytes: key.element_bytes,
        average: key.average,
        tuning,
        group: group.map(|group| GroupShape { members: &members, slot_bytes: group.slot_bytes() }),
    })
}
