//! Which collective, where its ranks live, and the elements it works on.

use std::ops::Range;
use std::sync::Arc;

use crate::{Rank, Topology};

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlanKind {
    /// Every rank has all elements, and ends with their reduction.
    AllReduce,
    /// Every rank has all elements; `root` ends with their reduction.
    Reduce {
        /// The rank that ends with the result.
        root: Rank,
    },
    /// `root` has all elements, and every rank ends with them.
    Broadcast {
        /// The rank whose elements they are.
        root: Rank,
    },
    /// Every rank has its block, and ends with all blocks.
    AllGather,
    /// Every rank has all blocks, and ends with the reduction of its own.
    ReduceScatter,
    /// Every rank has a block for each rank, and ends with the block each rank has for it.
    AllToAll,
    /// Every rank has its block; `root` ends with all of them.
    Gather {
        /// The rank that ends with the blocks.
        root: Rank,
    },
    /// `root` has all blocks, and every rank ends with its own.
    Scatter {
        /// The rank whose blocks they are.
        root: Rank,
    },
}

impl PlanKind {
    /// The rank at which all elements begin or end, where there is one.
    pub const fn root(self) -> Option<Rank> {
        match self {
            Self::Reduce { root }
            | Self::Broadcast { root }
            | Self::Gather { root }
            | Self::Scatter { root } => Some(root),
            Self::AllReduce | Self::AllGather | Self::ReduceScatter | Self::AllToAll => None,
        }
    }
}

/// What a plan depends on besides the algorithm and the rank; also the key of a plan cache.
///
/// A rank *contributes* some elements of the space: it begins with a value for them. It *wants*
/// some: it must end with the reduction of all contributions to them. For other elements, it has no
/// value until one arrives, and may hold any.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Where the ranks live.
    pub topology: Topology,
    /// What they do.
    pub collective: PlanKind,
    /// The elements, numbered alike on all ranks.
    pub space: Space,
}

/// The elements of a collective. All ranks number them in the same way; the executor decides where
/// a rank keeps them in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// All-reduce, reduce, broadcast: the elements from 0 to this count.
    Whole(usize),
    /// All-gather, reduce-scatter, gather, scatter: the block of rank r reaches from entry r to
    /// entry r+1. World + 1 entries, the first is 0; blocks may be empty.
    Blocks(Arc<[usize]>),
    /// All-to-all: the block from rank s to rank d begins at (s · world + d) · [`PAIR_STRIDE`],
    /// whatever the lengths of the others.
    Pairs(PairCounts),
}

/// How long the blocks of an all-to-all are, in elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PairCounts {
    /// All equal.
    Uniform(usize),
    /// Any: a rank knows only its own row and column, so that each rank has a shape of its own.
    Own {
        /// The rank whose lengths they are.
        rank: Rank,
        /// To each rank.
        sends: Arc<[usize]>,
        /// From each rank.
        receives: Arc<[usize]>,
    },
}

/// From one block of an all-to-all to the next, in elements: more than a block has.
///
/// In bytes of the widest element 10,000 ranks fit into a `usize`.
pub const PAIR_STRIDE: usize = 1 << 34;

const _: () = assert!(usize::BITS >= 64, "the blocks of an all-to-all are numbered in 64 bits");

impl Shape {
    /// An all-reduce of `count` elements.
    pub fn all_reduce(topology: Topology, count: usize) -> Self {
        Self::whole(topology, PlanKind::AllReduce, count)
    }

    /// An all-reduce of `count` elements among `world` ranks on one node.
    pub fn flat(world: usize, count: usize) -> Self {
        Self::all_reduce(Topology::flat(world), count)
    }

    /// An all-reduce, reduce or broadcast of `count` elements.
    ///
    /// # Panics
    /// If it is another collective, or its root is not below the world.
    pub fn whole(topology: Topology, collective: PlanKind, count: usize) -> Self {
        use PlanKind::{AllReduce, Broadcast, Reduce};
        assert!(matches!(collective, AllReduce | Reduce { .. } | Broadcast { .. }));
        Self::new(topology, collective, Space::Whole(count))
    }

    /// A collective of blocks of `each` elements: one for each rank, or, in an all-to-all, for
    /// each pair of ranks.
    ///
    /// # Panics
    /// If the collective has no blocks, its root is not below the world, or `each` is above
    /// [`PAIR_STRIDE`] in an all-to-all.
    pub fn even(topology: Topology, collective: PlanKind, each: usize) -> Self {
        if collective == PlanKind::AllToAll {
            assert!(each <= PAIR_STRIDE, "a block of {each} elements");
            return Self::new(topology, collective, Space::Pairs(PairCounts::Uniform(each)));
        }
        let lengths = vec![each; topology.world()];
        Self::blocks(topology, collective, &lengths)
    }

    /// An all-gather, reduce-scatter, gather or scatter of blocks of these lengths, one for each
    /// rank.
    ///
    /// # Panics
    /// If it is another collective, its root is not below the world, or there is not one length
    /// for each rank.
    pub fn blocks(topology: Topology, collective: PlanKind, lengths: &[usize]) -> Self {
        use PlanKind::{AllGather, Gather, ReduceScatter, Scatter};
        assert!(matches!(collective, AllGather | ReduceScatter | Gather { .. } | Scatter { .. }));
        assert_eq!(lengths.len(), topology.world(), "one block for each rank");
        let mut end = 0;
        let ends = lengths.iter().map(|length| {
            end += length;
            end
        });
        let starts = std::iter::once(0).chain(ends).collect();
        Self::new(topology, collective, Space::Blocks(starts))
    }

    /// An all-to-all as `rank` sees it: how many elements it sends to each rank, and receives from
    /// each.
    ///
    /// # Panics
    /// If there is not one length for each rank, `rank` is not below the world, or a length is
    /// above [`PAIR_STRIDE`].
    pub fn pairs(topology: Topology, rank: Rank, sends: &[usize], receives: &[usize]) -> Self {
        let world = topology.world();
        assert!(rank < world && sends.len() == world && receives.len() == world);
        assert_eq!(sends[rank], receives[rank], "what a rank sends to itself it receives");
        assert!(sends.iter().chain(receives).all(|&length| length <= PAIR_STRIDE));
        let counts = PairCounts::Own { rank, sends: sends.into(), receives: receives.into() };
        Self::new(topology, PlanKind::AllToAll, Space::Pairs(counts))
    }

    fn new(topology: Topology, collective: PlanKind, space: Space) -> Self {
        assert!(collective.root().is_none_or(|root| root < topology.world()), "{collective:?}");
        Self { topology, collective, space }
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.topology.world()
    }

    /// The elements that `rank` begins with: ascending, disjoint, none empty.
    ///
    /// # Panics
    /// In an all-to-all whose lengths are those of another rank.
    pub fn contributes(&self, rank: Rank) -> Vec<Range<usize>> {
        use PlanKind::{
            AllGather, AllReduce, AllToAll, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
        };
        match self.collective {
            AllReduce | Reduce { .. } | ReduceScatter => present([self.all()]),
            Broadcast { root } | Scatter { root } if root == rank => present([self.all()]),
            Broadcast { .. } | Scatter { .. } => Vec::new(),
            AllGather | Gather { .. } => present([self.block(rank)]),
            AllToAll => present((0..self.world()).map(|to| self.pair(rank, to))),
        }
    }

    /// The elements that `rank` has to end with: ascending, disjoint, none empty.
    ///
    /// # Panics
    /// In an all-to-all whose lengths are those of another rank.
    pub fn wants(&self, rank: Rank) -> Vec<Range<usize>> {
        use PlanKind::{
            AllGather, AllReduce, AllToAll, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
        };
        match self.collective {
            AllReduce | Broadcast { .. } | AllGather => present([self.all()]),
            Reduce { root } | Gather { root } if root == rank => present([self.all()]),
            Reduce { .. } | Gather { .. } => Vec::new(),
            ReduceScatter | Scatter { .. } => present([self.block(rank)]),
            AllToAll => present((0..self.world()).map(|from| self.pair(from, rank))),
        }
    }

    /// The block of `rank`.
    ///
    /// # Panics
    /// If the collective has none, or `rank` is not below the world.
    pub fn block(&self, rank: Rank) -> Range<usize> {
        match &self.space {
            Space::Blocks(starts) => starts[rank]..starts[rank + 1],
            _ => panic!("{:?} has no blocks", self.collective),
        }
    }

    /// The block of an all-to-all that `from` has for `to`.
    ///
    /// # Panics
    /// If it is another collective, or the lengths are those of a third rank.
    pub fn pair(&self, from: Rank, to: Rank) -> Range<usize> {
        let known = self.known_pair(from, to);
        known.unwrap_or_else(|| panic!("{:?}: from {from} to {to}?", self.collective))
    }

    fn known_pair(&self, from: Rank, to: Rank) -> Option<Range<usize>> {
        let Space::Pairs(counts) = &self.space else { return None };
        let count = match counts {
            PairCounts::Uniform(count) => *count,
            PairCounts::Own { rank, sends, .. } if *rank == from => sends[to],
            PairCounts::Own { rank, receives, .. } if *rank == to => receives[from],
            PairCounts::Own { .. } => return None,
        };
        let start = (from * self.world() + to) * PAIR_STRIDE;
        Some(start..start + count)
    }

    /// The elements from 0 to the last, where they have no gaps.
    ///
    /// # Panics
    /// In an all-to-all.
    pub fn all(&self) -> Range<usize> {
        match &self.space {
            Space::Whole(count) => 0..*count,
            Space::Blocks(starts) => 0..starts.last().copied().unwrap_or(0),
            Space::Pairs(_) => panic!("the space of an all-to-all has gaps"),
        }
    }

    /// The size of the collective for a choice among algorithms, in elements: the count, the sum of
    /// all blocks, or what one rank sends in an all-to-all, itself included.
    ///
    /// Source: "size" in nccl-tests, doc/PERFORMANCE.md.
    pub fn elements(&self) -> usize {
        match &self.space {
            Space::Pairs(PairCounts::Uniform(count)) => self.world() * count,
            Space::Pairs(PairCounts::Own { sends, .. }) => sends.iter().sum(),
            Space::Whole(_) | Space::Blocks(_) => self.all().end,
        }
    }

    /// Whether the elements are part of the space, in an all-to-all of one block.
    pub(crate) fn contains(&self, elements: &Range<usize>) -> bool {
        let whole = match &self.space {
            Space::Whole(_) | Space::Blocks(_) => Some(self.all()),
            Space::Pairs(_) => {
                let (world, pair) = (self.world(), elements.start / PAIR_STRIDE);
                (pair < world * world)
                    .then(|| self.known_pair(pair / world, pair % world))
                    .flatten()
            }
        };
        whole.is_some_and(|whole| {
            whole.start <= elements.start
                && elements.start <= elements.end
                && elements.end <= whole.end
        })
    }

    /// The same with `part` of `whole` of its elements. An all-to-all of any lengths becomes one of
    /// the mean length of its rank's blocks.
    pub(crate) fn scaled(&self, part: usize, whole: usize) -> Self {
        let scale = |count: usize| (count as f64 * part as f64 / whole as f64).ceil() as usize;
        let space = match &self.space {
            Space::Whole(count) => Space::Whole(scale(*count)),
            Space::Blocks(starts) => Space::Blocks(starts.iter().copied().map(scale).collect()),
            Space::Pairs(_) => {
                let each = self.elements().div_ceil(self.world().max(1));
                Space::Pairs(PairCounts::Uniform(scale(each)))
            }
        };
        Self { topology: self.topology.clone(), collective: self.collective, space }
    }
}

fn present(ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    ranges.into_iter().filter(|range| !range.is_empty()).collect()
}
