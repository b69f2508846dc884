//! The time of a plan in the α-β-γ model.

mod direct;
mod simulate;

use crate::slice::slices_of;
use crate::{Algorithm, Fault, PairCounts, Pattern, Rank, Scope, Shape, Space, Step, Topology};
use simulate::Simulation;

/// What a message costs between two ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCost {
    /// Time from the end of sending to the arrival, in seconds; messages overlap in it.
    pub alpha_s: f64,
    /// Time per byte, in seconds; the messages that a rank sends follow each other, and so do those
    /// that it receives.
    pub beta_s_per_byte: f64,
    /// The same for a rank that receives at most [`LinkCost::CACHED_BYTES`] at once: a processor
    /// moves data faster while it stays in cache.
    pub beta_cached_s_per_byte: f64,
}

impl LinkCost {
    /// The amount a rank may receive at once so that it stays in cache: a slice from each source,
    /// or all of a marked step, which is not sliced.
    pub const CACHED_BYTES: usize = 256 << 10;

    /// A link whose bytes cost the same in every transfer.
    pub const fn new(alpha_s: f64, beta_s_per_byte: f64) -> Self {
        Self { alpha_s, beta_s_per_byte, beta_cached_s_per_byte: beta_s_per_byte }
    }

    /// Seconds for each byte of `at_once` bytes that are received at once.
    const fn s_per_byte(&self, at_once: f64) -> f64 {
        if at_once <= Self::CACHED_BYTES as f64 {
            self.beta_cached_s_per_byte
        } else {
            self.beta_s_per_byte
        }
    }
}

/// The machine for which plans are costed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Between ranks of one node.
    pub inside: LinkCost,
    /// Between nodes.
    pub across: LinkCost,
    /// Network links of a node, shared by its ranks; 0 where every rank has its own.
    pub links_per_node: usize,
    /// To reduce one byte of one source, in seconds.
    pub gamma_s_per_byte: f64,
    /// Processor time of one message at each of its ends, in seconds; an end handles one at a time.
    pub message_s: f64,
    /// Processor time of waiting for messages, in seconds, counted once for messages that are
    /// reduced together, and only where ranks share cores: another rank runs meanwhile, and the
    /// core switches there and back.
    pub wait_s: f64,
    /// The size of an element.
    pub bytes_per_element: usize,
    /// Above 1, ranks of a node share cores: their processor times then add up.
    pub ranks_per_core: f64,
    /// The longest slice, in elements, that transfers are cut into.
    pub slice_elements: usize,
    /// How many sub-steps a rank has open at once.
    pub window: usize,
    /// Whether the ranks of a node share memory, so that marked steps run as group steps.
    pub group_steps: bool,
}

impl Default for CostModel {
    /// Round figures for shared memory within a node and 100 Gbit/s between nodes, f32 elements.
    fn default() -> Self {
        Self {
            inside: LinkCost::new(0.5e-6, 1.0 / 10e9),
            across: LinkCost::new(10e-6, 1.0 / 12.5e9),
            links_per_node: 1,
            gamma_s_per_byte: 1.0 / 20e9,
            message_s: 0.5e-6,
            wait_s: 2e-6,
            bytes_per_element: 4,
            ranks_per_core: 1.0,
            slice_elements: 64 * 1024,
            window: 8,
            group_steps: true,
        }
    }
}

impl CostModel {
    fn bytes(&self, elements: usize) -> f64 {
        elements as f64 * self.bytes_per_element as f64
    }

    /// Whether all ranks of a scope share memory.
    fn shares_memory(&self, scope: Scope, topology: &Topology) -> bool {
        self.group_steps && (scope == Scope::Node || topology.node_count() == 1)
    }

    /// Whether a rank's step can run as one group step: it is marked, and its members share the
    /// memory of a node.
    fn is_group_step(&self, step: &Step, rank: Rank, topology: &Topology) -> bool {
        let node = topology.node_of(rank);
        let together = |to: Rank| topology.node_of(to) == node;
        self.group_steps
            && match step.pattern {
                Pattern::Pairs | Pattern::Wall => false,
                Pattern::Direct(scope) => self.shares_memory(scope, topology),
                Pattern::OneShot | Pattern::ReduceScatter | Pattern::AllGather => {
                    step.outgoing.iter().all(|out| together(out.to))
                }
            }
    }
}

/// The time in seconds that `algorithm` takes for `shape`, from a common start to the last rank's
/// end.
///
/// Follows the plans of all ranks, sliced as the engine slices them, through the machine of
/// `model`: a rank sends one message at a time, receives one at a time and reduces one at a time,
/// all three at once, and within a node each end of a message is busy for half of its transfer;
/// sub-steps wait for the elements they need and for the window. A marked step
/// within one node is one group step, with a message's latency and processor time once instead of
/// once for each member. Where ranks share cores, the time lies between the longer of this and the
/// processor time of the busiest node over its cores, and their sum (Brent): the middle is taken.
///
/// An all-to-all of any lengths is costed as one of the mean length of its rank's blocks, which
/// other ranks see otherwise: a choice that all have to agree on can't rest on it.
///
/// Plans of very many slices are followed for two smaller counts and extended in a straight line,
/// since each further slice adds the same time. Cost: about 0.5 µs
/// for each message followed, which are a few million at most.
///
/// # Errors
/// [`Fault`] if the plans are plainly no plans: unequal rounds, or ranks beyond the world. For
/// the full answer see [`prove`](crate::prove).
///
/// Source: the LogGP model, Alexandrov et al., "LogGP: incorporating long messages into the LogP
/// model", SPAA 1995; Brent, "The parallel evaluation of general arithmetic expressions", JACM
/// 21(2), 1974.
pub fn cost(algorithm: &dyn Algorithm, shape: &Shape, model: &CostModel) -> Result<f64, Fault> {
    if matches!(shape.space, Space::Pairs(PairCounts::Own { .. })) {
        return cost(algorithm, &shape.scaled(1, 1), model);
    }
    let slices = most_slices(algorithm, shape, model);
    let limit = slice_limit(algorithm, shape);
    if slices <= limit {
        return follow(algorithm, shape, model);
    }
    let part = |slices_kept: usize| {
        let kept = shape.scaled(slices_kept, slices);
        Ok((kept.elements() as f64, follow(algorithm, &kept, model)?))
    };
    let ((few, few_s), (more, more_s)) = (part(limit / 2)?, part(limit)?);
    Ok(more_s + (more_s - few_s) / (more - few) * (shape.elements() as f64 - more))
}

/// The rank whose plan stands for all: the root, which has most to do, or any.
fn sample(shape: &Shape) -> Option<Rank> {
    shape.collective.root().or_else(|| shape.topology.by_node().first().copied())
}

/// The largest number of slices of a transfer.
fn most_slices(algorithm: &dyn Algorithm, shape: &Shape, model: &CostModel) -> usize {
    let Some(rank) = sample(shape) else { return 0 };
    let steps = algorithm
        .steps(shape, rank)
        .filter(|step| !model.is_group_step(step, rank, &shape.topology));
    steps.map(|step| slices_of(&step, model.slice_elements)).max().unwrap_or(0)
}

/// How many slices can be followed in reasonable time.
fn slice_limit(algorithm: &dyn Algorithm, shape: &Shape) -> usize {
    let messages = |rank| -> usize {
        let steps = algorithm.steps(shape, rank);
        steps.map(|step| step.incoming.len().max(1)).sum()
    };
    let messages = sample(shape).map_or(0, messages);
    (MESSAGES_FOLLOWED / (messages * shape.world()).max(1)).clamp(4, 64)
}

/// Simulates every slice of every transfer.
fn follow(algorithm: &dyn Algorithm, shape: &Shape, model: &CostModel) -> Result<f64, Fault> {
    let world = shape.world();
    let mut plans: Vec<_> = (0..world).map(|rank| algorithm.steps(shape, rank)).collect();
    let mut simulation = Simulation::new(&shape.topology, *model);
    for round in 0.. {
        let steps: Vec<Step> = plans.iter_mut().filter_map(Iterator::next).collect();
        if steps.len() < world {
            return match steps.len() {
                0 => Ok(simulation.finish()),
                _ => Err(uneven_rounds(algorithm, shape)),
            };
        }
        check(&steps, round)?;
        simulation.round(steps);
    }
    unreachable!("rounds are counted without end")
}

/// Which rank it is that yields another number of rounds than rank 0.
fn uneven_rounds(algorithm: &dyn Algorithm, shape: &Shape) -> Fault {
    let rounds = |rank| algorithm.steps(shape, rank).count();
    let expected = rounds(0);
    let rank = (0..shape.world()).find(|&rank| rounds(rank) != expected).unwrap_or(0);
    Fault::Rounds { rank, rounds: rounds(rank), expected }
}

fn check(steps: &[Step], round: usize) -> Result<(), Fault> {
    for (rank, step) in steps.iter().enumerate() {
        let sources = step.incoming.iter().flat_map(|i| &i.from);
        let mut others = step.outgoing.iter().map(|o| &o.to).chain(sources);
        if let Some(&other) = others.find(|&&other| other >= steps.len()) {
            return Err(Fault::Partner { rank, round, other });
        }
    }
    Ok(())
}

/// Beyond this many messages a plan of many slices is not followed to its end.
const MESSAGES_FOLLOWED: usize = 4_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PlanKind, Topology, algorithms};

    #[test]
    fn extending_a_cost_in_a_straight_line_changes_little() {
        let model = CostModel { slice_elements: 4096, ..CostModel::default() };
        for sizes in [&[1; 6][..], &[3, 3], &[4, 2, 3]] {
            let (topology, root) = (Topology::nodes(sizes), 1);
            let whole = |kind| Shape::whole(topology.clone(), kind, 3_000_000);
            let even = |kind| Shape::even(topology.clone(), kind, 500_000);
            let shapes = [
                whole(PlanKind::AllReduce),
                whole(PlanKind::Reduce { root }),
                whole(PlanKind::Broadcast { root }),
                even(PlanKind::AllGather),
                even(PlanKind::ReduceScatter),
                even(PlanKind::AllToAll),
                even(PlanKind::Gather { root }),
                even(PlanKind::Scatter { root }),
            ];
            for shape in &shapes {
                for algorithm in algorithms(shape.collective) {
                    let followed = follow(*algorithm, shape, &model).unwrap();
                    let extended = cost(*algorithm, shape, &model).unwrap();
                    assert!(
                        (extended / followed - 1.0).abs() < 0.05,
                        "{algorithm:?}: {extended:e}, {followed:e}"
                    );
                }
            }
        }
    }
}
