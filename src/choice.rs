//! Which algorithm a call takes: by the measured links and the cost model, or as the user fixed.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use unisum_algorithms::{Algorithm, CostModel, Shape, Topology, all, cost};
use unisum_link::Dtype;

use crate::{Error, ErrorKind};

/// The choice of one communicator, the same on all its ranks: it follows from the topology and
/// from figures that rank 0 measured and told all others.
#[derive(Debug)]
pub(crate) struct Choice {
    topology: Topology,
    model: CostModel,
    /// The figures of the shared memory that spans the whole world, if one does.
    node: Option<NodeCost>,
    /// An index into [`all`], or [`AUTO`].
    fixed: AtomicUsize,
    /// By size class; filled when first asked for.
    chosen: [OnceLock<usize>; CLASSES],
}

/// What collectives of group steps cost in a node's shared memory, as measured there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NodeCost {
    pub(crate) one_shot: Line,
    pub(crate) two_shot: Line,
    /// Largest deposit.
    pub(crate) slot_bytes: usize,
}

/// A time that grows with the size in a straight line.
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

const AUTO: usize = usize::MAX;
/// Size classes are powers of two of bytes.
const CLASSES: usize = 48;

/// The number of the algorithm called `name`.
pub(crate) fn index_of(name: &str) -> Result<usize, Error> {
    all().iter().position(|algorithm| algorithm.name() == name).ok_or_else(|| {
        let names: Vec<_> = all().iter().map(|algorithm| algorithm.name()).collect();
        let text = format!("no algorithm is called {name:?}; there are {}", names.join(", "));
        Error::new(ErrorKind::Configuration, text)
    })
}

impl Choice {
    pub(crate) fn new(
        topology: Topology,
        model: CostModel,
        node: Option<NodeCost>,
        fixed: Option<usize>,
    ) -> Self {
        let fixed = AtomicUsize::new(fixed.unwrap_or(AUTO));
        Self { topology, model, node, fixed, chosen: [const { OnceLock::new() }; CLASSES] }
    }

    pub(crate) const fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Fixes the algorithm, or leaves it to the model again.
    pub(crate) fn fix(&self, index: Option<usize>) {
        // Relaxed: the caller orders it with its own collectives; nothing else hangs on it.
        self.fixed.store(index.unwrap_or(AUTO), Ordering::Relaxed);
    }

    /// The number of the algorithm for a call.
    pub(crate) fn algorithm(&self, count: usize, dtype: Dtype) -> usize {
        // Relaxed: see `fix`.
        match self.fixed.load(Ordering::Relaxed) {
            AUTO => self.for_class(class(count.saturating_mul(dtype.bytes()))),
            fixed => fixed,
        }
    }

    fn for_class(&self, class: usize) -> usize {
        *self.chosen[class].get_or_init(|| {
            let seconds = |index: &usize| self.seconds(*index, typical_bytes(class));
            let by_time = |a: &usize, b: &usize| seconds(a).total_cmp(&seconds(b));
            (0..all().len()).min_by(by_time).unwrap_or(0)
        })
    }

    /// The modelled time; infinite for a plan that can't be costed. Where all ranks share memory
    /// only group steps count: nothing else moves as few bytes and wakes as few ranks.
    fn seconds(&self, index: usize, bytes: usize) -> f64 {
        let algorithm = all()[index];
        if let Some(node) = &self.node {
            return node.seconds(algorithm, bytes).unwrap_or(f64::INFINITY);
        }
        let count = (bytes / self.model.bytes_per_element).max(1);
        let shape = Shape { topology: self.topology.clone(), count };
        cost(algorithm, &shape, &self.model).unwrap_or(f64::INFINITY)
    }
}

impl NodeCost {
    /// The time of the algorithms that run as group steps when the node is the world.
    fn seconds(&self, algorithm: &dyn Algorithm, bytes: usize) -> Option<f64> {
        match algorithm.name() {
            "one-shot" if bytes <= self.slot_bytes => Some(self.one_shot.at(bytes)),
            "two-shot" => Some(self.two_shot.at(bytes)),
            _ => None,
        }
    }
}

/// The class of a size: sizes up to 2^class, above 2^(class-1).
const fn class(bytes: usize) -> usize {
    let class = usize::BITS - bytes.saturating_sub(1).leading_zeros();
    if class as usize >= CLASSES { CLASSES - 1 } else { class as usize }
}

const fn typical_bytes(class: usize) -> usize {
    1 << class
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "algorithms (chosen by modelled time, float32):")?;
        let mut from = 0;
        for class in 3..=30 {
            let index = self.for_class(class);
            if class == 30 || self.for_class(class + 1) != index {
                let name = all()[index].name();
                let to = typical_bytes(class);
                let micros = self.seconds(index, to) * 1e6;
                writeln!(f, "  above {from:>10} up to {to:>10} B: {name} ({micros:.1} us there)")?;
                from = to;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_end_at_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 5, 8, 9, 1 << 20].map(class), [0, 0, 1, 2, 2, 3, 3, 4, 20]);
        assert_eq!(class(usize::MAX), CLASSES - 1);
    }

    #[test]
    fn unknown_algorithms_are_refused_with_the_known_ones() {
        let error = index_of("rign").unwrap_err();
        assert!(error.to_string().contains("\"rign\"") && error.to_string().contains("ring"));
    }

    #[test]
    fn shared_memory_takes_one_shot_for_small_and_two_shot_for_large_calls() {
        let one_shot = Line::through((8, 5e-6), (8 << 10, 8e-6));
        let two_shot = Line::through((4 << 10, 10e-6), (256 << 10, 30e-6));
        let node = NodeCost { one_shot, two_shot, slot_bytes: 16 << 10 };
        let choice = Choice::new(Topology::flat(8), CostModel::default(), Some(node), None);
        let name = |count| all()[choice.algorithm(count, Dtype::F32)].name();
        assert_eq!(name(2), "one-shot");
        assert_eq!(name(1 << 20), "two-shot");
        choice.fix(Some(index_of("ring").unwrap()));
        assert_eq!(name(2), "ring");
    }
}
