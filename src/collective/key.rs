//! What tells calls apart that need programs of their own.

use unisum_link::{CollectiveKind as Kind, Rank};

use crate::collective::Blocks;

/// What a program depends on within one communicator.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) kind: Kind,
    pub(crate) root: Rank,
    pub(crate) blocks: Blocks,
    pub(crate) element_bytes: usize,
    pub(crate) average: bool,
    pub(crate) scales: bool,
    /// Whether operands have to be folded in rank order.
    pub(crate) ordered: bool,
    /// Whether a function of the user folds. Such calls are never tried, so that they must not pass
    /// for calls that were: ranks differ in which of those they know, as in `in_place`.
    pub(crate) custom: bool,
    /// Whether input and output are one memory.
    pub(crate) in_place: bool,
}

impl Key {
    /// Whether it moves no elements.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks == Blocks::Even(0)
    }

    /// A plain all-reduce in place.
    pub(crate) const fn all_reduce(count: usize, element_bytes: usize) -> Self {
        Self {
            kind: Kind::AllReduce,
            root: 0,
            blocks: Blocks::Even(count),
            element_bytes,
            average: false,
            scales: false,
            ordered: false,
            custom: false,
            in_place: true,
        }
    }
}
