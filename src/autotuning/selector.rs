//! Chooses the algorithm of a call: by the measured links and the cost model, by the result of
//! trying candidates in the first call of its size, or as the user fixed it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use unisum_algorithms::{
    Algorithm, CostModel, LinkCost, PairCounts, PlanKind, Shape, Space, Topology, algorithms, cost,
};
use unisum_link::Rank;

use crate::autotuning::saved::{Settled, Tunings, Which};
use crate::collective::key::Key;
use crate::{Error, ErrorKind};

/// The selector of one communicator, the same on all its ranks: it depends on the topology and on
/// figures that a few ranks measured and sent to all others.
#[derive(Debug)]
pub(crate) struct AlgorithmSelector {
    topology: Topology,
    model: CostModel,
    /// The same model with every link between nodes as slow as the slowest.
    worst: CostModel,
    /// The figures of the shared memory that spans the whole world, if one does.
    node: Option<NodeCost>,
    /// An index into the names of all algorithms, or [`AUTO`].
    fixed: AtomicUsize,
    /// By kind and size class, the algorithms with their modelled seconds, the fastest first;
    /// computed on first use.
    ranked: ByKind<OnceLock<Ranking>>,
    /// Likewise, what trying candidates settled; set by the first call.
    settled: ByKind<OnceLock<usize>>,
    /// Whether anything may be tried.
    tries: bool,
    /// Where settled choices are saved for later runs.
    keeps: Option<(Arc<Tunings>, Which)>,
}

/// By kind and size class; not in place, for all of it moves with its owner over stacks that may be
/// small.
type ByKind<T> = Vec<[T; CLASSES]>;

/// Modelled seconds and the numbers of the algorithms.
type Ranking = Vec<(f64, usize)>;

/// An algorithm that may be tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) algorithm: usize,
    /// How many times as long as the first it may take, by the model, including over the slowest
    /// link.
    pub(crate) times: f32,
}

/// What collectives of group steps cost in a node's shared memory, as measured there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NodeCost {
    pub(crate) one_shot: Line,
    pub(crate) two_shot: Line,
    /// Largest deposit.
    pub(crate) slot_bytes: usize,
}

/// A time that grows linearly with the size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) start_s: f64,
    pub(crate) s_per_byte: f64,
}

impl Line {
    /// The line through two measured points, (bytes, seconds), the smaller first.
    pub(crate) fn through((few, few_s): (usize, f64), (more, more_s): (usize, f64)) -> Self {
        let s_per_byte = ((more_s - few_s) / (more - few) as f64).max(1e-15);
        Self { start_s: (few_s - few as f64 * s_per_byte).max(1e-9), s_per_byte }
    }

    /// The same, but starting no earlier.
    pub(crate) fn starting_from(self, start_s: f64) -> Self {
        Self { start_s: self.start_s.max(start_s), ..self }
    }

    fn at(&self, bytes: usize) -> f64 {
        self.start_s + bytes as f64 * self.s_per_byte
    }
}

/// The number for no fixed algorithm.
pub(crate) const AUTO: usize = usize::MAX;
/// Candidates are algorithms that, by the model, take at most this many times as long as the best,
/// and at most this many.
const NEAR: f64 = 3.0;
const CANDIDATES_MAX: usize = 8;
/// The size from which candidates are tried, in bytes. Shorter calls are pure latency, which the
/// model knows; trying them would open connections that nobody needs (16 ranks over TCP: the first
/// call 27 ms later).
const TRIED_FROM: usize = 1024;
/// The size up to which candidates are tried, in bytes: a copy of the buffer is kept meanwhile.
const TRIED_TO: usize = 8 << 20;
/// Candidates are dropped, slowest first, until one round fits this time, by the model.
const ROUND_S_MAX: f64 = 0.1;
/// Size classes are powers of two of bytes.
const CLASSES: usize = 48;
/// Kinds of collectives that have algorithms of their own.
const KINDS: usize = 8;

/// The number of the algorithm called `name` among all names; `_` stands for `-`.
pub(crate) fn index_of(name: &str) -> Result<usize, Error> {
    let names = crate::algorithms();
    let spelt = name.replace('_', "-");
    names.iter().position(|known| *known == spelt).ok_or_else(|| {
        let text = format!("no algorithm is called {name:?}; there are {}", names.join(", "));
        Error::new(ErrorKind::Configuration, text)
    })
}

/// Which algorithm is chosen for a range of sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AlgorithmRange {
    /// It begins above so many bytes.
    pub above: usize,
    /// The largest size that was looked at.
    pub up_to: usize,
    /// The algorithm's name.
    pub algorithm: &'static str,
    /// Seconds that a call of `up_to` bytes takes, by the cost model; `None` where it knows none,
    /// as of an algorithm that was fixed and would not be chosen.
    pub seconds: Option<f64>,
}

impl AlgorithmSelector {
    /// A selector for ranks in `topology`, with links like those of `model`; `slowest` is the
    /// slowest link between nodes.
    pub(crate) fn new(
        topology: Topology,
        model: CostModel,
        slowest: LinkCost,
        node: Option<NodeCost>,
        fixed: Option<usize>,
    ) -> Self {
        let worst = CostModel { across: slowest, ..model };
        let fixed = AtomicUsize::new(fixed.unwrap_or(AUTO));
        let ranked = (0..KINDS).map(|_| [const { OnceLock::new() }; CLASSES]).collect();
        let settled = (0..KINDS).map(|_| [const { OnceLock::new() }; CLASSES]).collect();
        let (tries, keeps) = (true, None);
        Self { topology, model, worst, node, fixed, ranked, settled, tries, keeps }
    }

    /// The same selector, by the model alone: nothing is tried.
    pub(crate) fn by_model_alone(self) -> Self {
        Self { tries: false, ..self }
    }

    /// The same selector for the communicator `which`, starting from what earlier runs settled
    /// there, to which it adds.
    pub(crate) fn keeping(self, tunings: Arc<Tunings>, which: Which) -> Self {
        for &Settled { kind, class, algorithm } in tunings.of(&which) {
            // Of two results the first holds, as it did in the run that found both.
            let _ = self.settled[kind][class].set(algorithm);
        }
        Self { keeps: Some((tunings, which)), ..self }
    }

    /// On the first rank of a new group: the number of earlier groups of the same ranks.
    pub(crate) fn next_ordinal(&self, ranks: &Arc<[Rank]>) -> u32 {
        self.keeps.as_ref().map_or(0, |(tunings, _)| tunings.next_ordinal(ranks))
    }

    /// The selector of a group, `which`: with the same figures, and with `shares_memory` if all of
    /// the group's ranks share memory.
    pub(crate) fn for_group(&self, topology: Topology, shares_memory: bool, which: Which) -> Self {
        let node = self.node.filter(|_| shares_memory);
        let fixed = Some(self.fixed()).filter(|&fixed| fixed != AUTO);
        let choice = Self::new(topology, self.model, self.worst.across, node, fixed);
        let choice = Self { tries: self.tries, ..choice };
        match &self.keeps {
            Some((tunings, _)) => choice.keeping(tunings.clone(), which),
            None => choice,
        }
    }

    /// The same selector, from which nothing is saved for later runs.
    pub(crate) fn not_keeping(self) -> Self {
        Self { keeps: None, ..self }
    }

    pub(crate) const fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Fixes the algorithm, or lets the model choose again. Collectives without an algorithm of
    /// that name are left to the model.
    pub(crate) fn fix(&self, index: Option<usize>) {
        // Relaxed: the caller orders it with its own collectives; nothing else hangs on it.
        self.fixed.store(index.unwrap_or(AUTO), Ordering::Relaxed);
    }

    /// The fixed algorithm, or [`AUTO`].
    pub(crate) fn fixed(&self) -> usize {
        // Relaxed: see `fix`.
        self.fixed.load(Ordering::Relaxed)
    }

    /// The fixed algorithm among those of a collective.
    fn fixed_of(&self, list: &[&dyn Algorithm]) -> Option<usize> {
        let named = crate::algorithms().get(self.fixed()).copied();
        list.iter().position(|algorithm| Some(algorithm.name()) == named)
    }

    /// The number of the algorithm for a call, among those of its collective.
    pub(crate) fn algorithm(&self, shape: &Shape, key: &Key) -> usize {
        let list = algorithms(shape.collective);
        let fits = |index: &usize| {
            list[*index].supports(shape) && (!key.ordered || list[*index].in_rank_order())
        };
        if let Some(fixed) = self.fixed_of(list).filter(fits) {
            return fixed;
        }
        let class = class_of(shape, key);
        // Calls with a user function are never tried: what other calls of the size settle must not
        // change their bits in the middle of a run.
        let settled = self.settled[kind(shape.collective)][class].get().filter(|_| !key.custom);
        let settled = settled.copied();
        let ranked = self.ranked(shape.collective, class).iter().map(|(_, index)| *index);
        let mut all = settled.into_iter().chain(ranked);
        all.find(fits).expect("some algorithm folds any shape in rank order")
    }

    /// The candidates to try before the first call of this kind and size, the modelled best first;
    /// `None` if the choice is settled or fixed, or trying could change nothing. All ranks get the
    /// same answer.
    pub(crate) fn open(&self, shape: &Shape, key: &Key) -> Option<Vec<Candidate>> {
        // Each rank knows only its own lengths: it cannot tell what the others' calls take.
        let is_known = !matches!(shape.space, Space::Pairs(PairCounts::Own { .. }));
        let (collective, class) = (shape.collective, class_of(shape, key));
        let is_open = self.settled[kind(collective)][class].get().is_none();
        let is_tried = (TRIED_FROM..=TRIED_TO).contains(&typical_bytes(class));
        if !self.tries
            || self.fixed() != AUTO
            || !is_known
            || !is_open
            || !is_tried
            || key.is_empty()
        {
            return None;
        }
        let list = algorithms(collective);
        let supports = |(_, index): &&(f64, usize)| list[*index].supports(shape);
        let ranked = self.ranked(collective, class);
        let mut timed: Ranking = ranked.iter().filter(supports).copied().collect();
        // In shared memory, there are at most two, and what starts at the same time as processes is
        // measured badly.
        let near = if self.node.is_some() { f64::MAX } else { NEAR };
        let worth = near * timed.first()?.0;
        timed.retain(|(seconds, _)| *seconds <= worth);
        // On one host, say, a hierarchical plan is one of the others.
        timed.dedup_by_key(|(seconds, _)| *seconds);
        timed.truncate(CANDIDATES_MAX);
        while timed.iter().map(|(seconds, _)| seconds).sum::<f64>() > ROUND_S_MAX {
            timed.pop();
        }
        let (best_s, best) = *timed.first()?;
        let worst = |index| self.worst_seconds(collective, index, typical_bytes(class));
        let worst_s = worst(best);
        let candidate = |(seconds, algorithm): (f64, usize)| {
            let times = (seconds / best_s).max(worst(algorithm) / worst_s) as f32;
            Candidate { algorithm, times }
        };
        (timed.len() > 1).then(|| timed.into_iter().map(candidate).collect())
    }

    /// Settles the algorithm of all later calls of this kind and size; returns what rank 0 must be
    /// told to save. This is the job's rank `rank`.
    pub(crate) fn settle(
        &self,
        shape: &Shape,
        key: &Key,
        algorithm: usize,
        rank: Rank,
    ) -> Option<String> {
        let (kind, class) = (kind(shape.collective), class_of(shape, key));
        // One call at a time tries, and only sizes that are not settled.
        let _ = self.settled[kind][class].set(algorithm);
        let (tunings, which) = self.keeps.as_ref()?;
        tunings.keep(which, Settled { kind, class, algorithm }, rank)
    }

    /// The modelled time of an all-reduce of this many bytes.
    pub(crate) fn all_reduce_seconds(&self, bytes: usize) -> f64 {
        let index = self.for_class(PlanKind::AllReduce, class(bytes));
        self.seconds(PlanKind::AllReduce, index, bytes)
    }

    /// The algorithms of an all-reduce of `f32`, by size in ascending order.
    pub(crate) fn ranges(&self) -> Vec<AlgorithmRange> {
        let (collective, mut above, mut ranges) = (PlanKind::AllReduce, 0, Vec::new());
        let list = algorithms(collective);
        let chosen = |class| {
            let count = typical_bytes(class) / size_of::<f32>();
            let shape = typical_shape(self.topology.clone(), collective, count);
            let fixed = self.fixed_of(list).filter(|&fixed| list[fixed].supports(&shape));
            fixed.unwrap_or_else(|| self.for_class(collective, class))
        };
        for class in 3..=30 {
            let index = chosen(class);
            if class == 30 || chosen(class + 1) != index {
                let up_to = typical_bytes(class);
                let seconds = self.seconds(collective, index, up_to);
                let seconds = Some(seconds).filter(|seconds| seconds.is_finite());
                let algorithm = list[index].name();
                ranges.push(AlgorithmRange { above, up_to, algorithm, seconds });
                above = up_to;
            }
        }
        ranges
    }

    fn for_class(&self, collective: PlanKind, class: usize) -> usize {
        let settled = self.settled[kind(collective)][class].get();
        settled.copied().unwrap_or_else(|| self.ranked(collective, class)[0].1)
    }

    fn ranked(&self, collective: PlanKind, class: usize) -> &[(f64, usize)] {
        self.ranked[kind(collective)][class].get_or_init(|| {
            let timed = |index| (self.seconds(collective, index, typical_bytes(class)), index);
            let mut ranked: Ranking = (0..algorithms(collective).len()).map(timed).collect();
            ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            ranked
        })
    }

    /// The modelled time; infinite for a plan that cannot be costed. Where all ranks share memory,
    /// only group steps count: nothing else moves as few bytes and wakes as few ranks.
    fn seconds(&self, collective: PlanKind, index: usize, bytes: usize) -> f64 {
        self.seconds_by(&self.model, collective, index, bytes)
    }

    /// Likewise, over the slowest of the links.
    fn worst_seconds(&self, collective: PlanKind, index: usize, bytes: usize) -> f64 {
        self.seconds_by(&self.worst, collective, index, bytes)
    }

    fn seconds_by(
        &self,
        model: &CostModel,
        collective: PlanKind,
        index: usize,
        bytes: usize,
    ) -> f64 {
        let algorithm = algorithms(collective)[index];
        if let Some(node) = &self.node {
            return node.seconds(collective, algorithm, bytes).unwrap_or(f64::INFINITY);
        }
        let count = (bytes / model.bytes_per_element).max(1);
        let shape = typical_shape(self.topology.clone(), collective, count);
        match algorithm.supports(&shape) {
            true => cost(algorithm, &shape, model).unwrap_or(f64::INFINITY),
            false => f64::INFINITY,
        }
    }
}

/// A shape of `count` elements in all.
fn typical_shape(topology: Topology, collective: PlanKind, count: usize) -> Shape {
    use PlanKind::{AllReduce, Broadcast, Reduce};
    match collective {
        AllReduce | Broadcast { .. } | Reduce { .. } => Shape::whole(topology, collective, count),
        _ => {
            let each = count.div_ceil(topology.world());
            Shape::even(topology, collective, each)
        }
    }
}

const fn kind(collective: PlanKind) -> usize {
    match collective {
        PlanKind::AllReduce => 0,
        PlanKind::Reduce { .. } => 1,
        PlanKind::Broadcast { .. } => 2,
        PlanKind::AllGather => 3,
        PlanKind::ReduceScatter => 4,
        PlanKind::AllToAll => 5,
        PlanKind::Gather { .. } => 6,
        PlanKind::Scatter { .. } => 7,
    }
}

/// By the numbers of [`kind`], names, and a collective of each.
const NAMED: [(&str, PlanKind); KINDS] = [
    ("all-reduce", PlanKind::AllReduce),
    ("reduce", PlanKind::Reduce { root: 0 }),
    ("broadcast", PlanKind::Broadcast { root: 0 }),
    ("all-gather", PlanKind::AllGather),
    ("reduce-scatter", PlanKind::ReduceScatter),
    ("all-to-all", PlanKind::AllToAll),
    ("gather", PlanKind::Gather { root: 0 }),
    ("scatter", PlanKind::Scatter { root: 0 }),
];

/// The names of what was settled: the kind of collective, the bytes up to which its class goes, and
/// the algorithm.
pub(crate) fn names(Settled { kind, class, algorithm }: Settled) -> [String; 3] {
    let (name, collective) = NAMED[kind];
    let algorithm = algorithms(collective)[algorithm].name();
    [name.to_owned(), typical_bytes(class).to_string(), algorithm.to_owned()]
}

/// The settled choice with these names, if there is one.
pub(crate) fn named([kind, bytes, algorithm]: [&str; 3]) -> Option<Settled> {
    let kind = NAMED.iter().position(|(name, _)| *name == kind)?;
    let bytes: usize = bytes.parse().ok()?;
    let class = class(bytes);
    let is_class = typical_bytes(class) == bytes;
    let list = algorithms(NAMED[kind].1);
    let algorithm = list.iter().position(|known| known.name() == algorithm)?;
    is_class.then_some(Settled { kind, class, algorithm })
}

impl NodeCost {
    /// The time of algorithms that run as group steps if the node is the whole world.
    fn seconds(
        &self,
        collective: PlanKind,
        algorithm: &dyn Algorithm,
        bytes: usize,
    ) -> Option<f64> {
        match (collective, algorithm.name()) {
            (PlanKind::AllReduce, "one-shot") if bytes <= self.slot_bytes => {
                Some(self.one_shot.at(bytes))
            }
            (PlanKind::AllReduce, "two-shot") => Some(self.two_shot.at(bytes)),
            (PlanKind::AllReduce, _) => None,
            // Each byte is copied or folded once, by the rank that wants it.
            (_, "direct") => Some(self.two_shot.at(bytes)),
            _ => None,
        }
    }
}

/// The class of a call's size.
fn class_of(shape: &Shape, key: &Key) -> usize {
    match shape.space {
        // Each rank knows lengths of its own: the choice must not hang on them.
        Space::Pairs(PairCounts::Own { .. }) => typical_class(shape.world()),
        _ => class(shape.elements().saturating_mul(key.element_bytes)),
    }
}

/// The class of a size: sizes up to 2^class, above 2^(class-1).
const fn class(bytes: usize) -> usize {
    let class = usize::BITS - bytes.saturating_sub(1).leading_zeros();
    if class as usize >= CLASSES { CLASSES - 1 } else { class as usize }
}

/// The class of an all-to-all whose blocks may be of any length: as if they were of 4 KiB.
const fn typical_class(world: usize) -> usize {
    class(world.saturating_mul(4 << 10))
}

const fn typical_bytes(class: usize) -> usize {
    1 << class
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(node: Option<NodeCost>) -> AlgorithmSelector {
        let model = CostModel::default();
        AlgorithmSelector::new(Topology::flat(8), model, model.across, node, None)
    }

    #[test]
    fn size_classes_end_at_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 5, 8, 9, 1 << 20].map(class), [0, 0, 1, 2, 2, 3, 3, 4, 20]);
        assert_eq!(class(usize::MAX), CLASSES - 1);
    }

    #[test]
    fn unknown_algorithms_are_refused_with_the_known_ones() {
        assert_eq!(index_of("double_tree").unwrap(), index_of("double-tree").unwrap());
        let error = index_of("rign").unwrap_err();
        assert!(error.to_string().contains("\"rign\"") && error.to_string().contains("ring"));
    }

    #[test]
    fn what_was_tried_out_is_settled_for_its_size_and_open_for_others() {
        let choice = choice(None);
        let (shape, key) = (Shape::flat(8, 1000), Key::all_reduce(1000, 4));
        let candidates = choice.open(&shape, &key).unwrap();
        let Candidate { algorithm, times } = candidates[0];
        assert_eq!((algorithm, times), (choice.algorithm(&shape, &key), 1.0), "the modelled best");
        let Candidate { algorithm: other, times } = candidates[1];
        assert!((1.0..=NEAR as f32).contains(&times), "{times}");
        choice.settle(&shape, &key, other, 0);
        assert_eq!(choice.open(&shape, &key), None);
        let (same, longer) = (Shape::flat(8, 1024), Shape::flat(8, 1025));
        assert_eq!(choice.algorithm(&same, &Key::all_reduce(1024, 4)), other);
        assert!(choice.open(&longer, &Key::all_reduce(1025, 4)).is_some());
        choice.fix(Some(0));
        assert_eq!(choice.open(&longer, &Key::all_reduce(1025, 4)), None);
    }

    #[test]
    fn nothing_is_tried_that_takes_long() {
        let choice = choice(None);
        let count = 64 << 20;
        assert_eq!(choice.open(&Shape::flat(8, count), &Key::all_reduce(count, 4)), None);
    }

    #[test]
    fn shared_memory_takes_one_shot_for_small_and_two_shot_for_large_calls() {
        let one_shot = Line::through((8, 5e-6), (8 << 10, 8e-6));
        let two_shot = Line::through((4 << 10, 10e-6), (256 << 10, 30e-6));
        let node = NodeCost { one_shot, two_shot, slot_bytes: 16 << 10 };
        let choice = choice(Some(node));
        let name = |count| {
            let shape = Shape::flat(8, count);
            let key = Key::all_reduce(count, 4);
            algorithms(PlanKind::AllReduce)[choice.algorithm(&shape, &key)].name()
        };
        assert_eq!(name(2), "one-shot");
        assert_eq!(name(1 << 20), "two-shot");
        choice.fix(Some(index_of("ring").unwrap()));
        assert_eq!(name(2), "ring");
    }
}
