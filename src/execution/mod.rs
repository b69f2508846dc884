//! How a call runs: [`member`] prepares it and packs batches, [`runner`] numbers it, drives the
//! engine and turns failures into errors, [`programs`] caches compiled programs, [`tournament`]
//! times algorithms at the first call of a size. Uses `collective`, `autotuning` and `memory`.

pub(crate) mod background;
pub(crate) mod batch;
pub(crate) mod callbacks;
pub(crate) mod failure;
pub(crate) mod member;
pub(crate) mod membership;
pub(crate) mod prepared;
pub(crate) mod programs;
pub(crate) mod runner;
pub(crate) mod single_rank;
pub(crate) mod stats;
pub(crate) mod ticket_lock;
pub(crate) mod tournament;
pub(crate) mod work;
