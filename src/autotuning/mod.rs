//! Chooses the algorithm of a call: [`selector`] decides, [`saved`] keeps in a file what runs have
//! settled. `execution::tournament` times the candidates.

pub(crate) mod saved;
pub(crate) mod selector;
