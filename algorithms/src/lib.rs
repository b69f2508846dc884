//! Collectives as plans: pure data that can be sliced, proven and costed before it runs.
//!
//! An [`Algorithm`] is a pure function of a [`Shape`] (which collective, where the ranks live, how
//! many elements) and a rank. It yields that rank's [`Step`]s: what the rank sends and receives in
//! each round. Nothing here knows of transports, element types or time; an engine executes the
//! plans over any of them.
//!
//! * [`slice()`] cuts the transfers of a plan into pipeline slices and orders them.
//! * [`prove`] executes all ranks' plans on symbolic values and says whether they are the
//!   collective.
//! * [`cost`] gives a plan its time in the α-β-γ model, for choosing among the algorithms.
//!
//! ```
//! use unisum_algorithms::{
//!     PlanKind, CostModel, Shape, Topology, algorithms, by_name, cost, prove, slice,
//! };
//!
//! // Two nodes, with two and three ranks; a million elements.
//! let shape = Shape::all_reduce(Topology::nodes(&[2, 3]), 1_000_000);
//! let ring = by_name(PlanKind::AllReduce, "ring").unwrap();
//! prove(ring, &shape)?;
//!
//! let plan = slice(ring.steps(&shape, 0), 65_536);
//! assert_eq!(plan[0].outgoing[0].to, 1);
//!
//! let model = CostModel::default();
//! let all = algorithms(PlanKind::AllReduce).iter();
//! let costs = all.map(|algorithm| cost(*algorithm, &shape, &model));
//! let seconds: Vec<f64> = costs.collect::<Result<_, _>>()?;
//! assert!(seconds.iter().all(|s| *s > 0.0));
//! # Ok::<(), unisum_algorithms::Fault>(())
//! ```
#![forbid(unsafe_code)]

mod algorithm;
pub mod all_gather;
pub mod all_to_all;
pub mod broadcast;
mod chunk;
mod cost;
mod direct;
mod doubling;
pub mod gather;
mod halves;
mod hierarchical;
mod lanes;
mod mirror;
mod prove;
pub mod reduce;
pub mod reduce_scatter;
mod ring;
pub mod scatter;
mod shape;
mod slice;
mod step;
mod topology;
mod tree;

pub use algorithm::{Algorithm, Flat, Plan, Steps, algorithms, all, by_name};
pub use chunk::chunk;
pub use cost::{CostModel, LinkCost, cost};
pub use direct::{ONE_SHOT, TWO_SHOT};
pub use doubling::{HALVING_DOUBLING, RECURSIVE_DOUBLING};
pub use hierarchical::{HIERARCHICAL, HIERARCHICAL_TREE, Hierarchical};
pub use prove::{Fault, prove, prove_each, prove_plans, prove_rank_order};
pub use ring::RING;
pub use shape::{PAIR_STRIDE, PairCounts, PlanKind, Shape, Space};
pub use slice::slice;
pub use step::{Incoming, OnArrival, Outgoing, Pattern, Scope, Step};
pub use topology::Topology;
pub use tree::{DOUBLE_TREE, K_TREE, TREE};

/// A process's number in the world, from 0.
pub type Rank = usize;
