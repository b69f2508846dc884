//! The collectives that are measured: all that tells one from another.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use unisum::{Collective, ReduceOp};

/// A collective by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    base: Base,
    /// Whether its blocks have lengths of their own.
    uneven: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    AllReduce,
    Reduce,
    Broadcast,
    AllGather,
    ReduceScatter,
    AllToAll,
    Gather,
    Scatter,
    Barrier,
}

/// Whether the result takes the place of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    In,
    Out,
}

impl Place {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }

    /// As in "out of place".
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out of",
        }
    }
}

/// One call as all ranks make it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    pub(crate) root: usize,
    pub(crate) place: Place,
    pub(crate) ranks: usize,
    /// Elements of the size that is reported: of all blocks where there are blocks.
    pub(crate) count: usize,
}

/// Elements of a result that come one after the other from the same place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) from: Source,
    /// Which elements of what was put in there.
    pub(crate) elements: Range<usize>,
}

/// Whose input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Rank(usize),
    /// The reduction of all.
    All,
}

/// Where in the buffers a rank's input and output lie; in place they are one buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) input: Range<usize>,
    pub(crate) output: Range<usize>,
}

/// By how much the blocks of uneven collectives differ, in turn: from two ranks on one is empty.
const WEIGHTS: [usize; 4] = [2, 0, 1, 3];

impl Kind {
    /// All, those with uneven blocks after all others.
    pub(crate) const ALL: [Self; 14] = [
        Self::even(Base::AllReduce),
        Self::even(Base::Reduce),
        Self::even(Base::Broadcast),
        Self::even(Base::AllGather),
        Self::even(Base::ReduceScatter),
        Self::even(Base::AllToAll),
        Self::even(Base::Gather),
        Self::even(Base::Scatter),
        Self::even(Base::Barrier),
        Self::uneven(Base::AllGather),
        Self::uneven(Base::ReduceScatter),
        Self::uneven(Base::AllToAll),
        Self::uneven(Base::Gather),
        Self::uneven(Base::Scatter),
    ];

    pub(crate) const ALL_REDUCE: Self = Self::even(Base::AllReduce);

    const fn even(base: Base) -> Self {
        Self { base, uneven: false }
    }

    const fn uneven(base: Base) -> Self {
        Self { base, uneven: true }
    }

    pub(crate) const fn has_root(self) -> bool {
        matches!(self.base, Base::Reduce | Base::Broadcast | Base::Gather | Base::Scatter)
    }

    pub(crate) const fn reduces(self) -> bool {
        matches!(self.base, Base::AllReduce | Base::Reduce | Base::ReduceScatter)
    }

    /// Whether there are elements at all.
    pub(crate) const fn moves_elements(self) -> bool {
        !matches!(self.base, Base::Barrier)
    }

    /// Where the result goes in the communicator's call of that name.
    pub(crate) const fn usual_place(self) -> Place {
        match self.base {
            Base::AllReduce | Base::Reduce | Base::Broadcast | Base::Barrier => Place::In,
            _ => Place::Out,
        }
    }

    /// The counts that it can have are multiples of this.
    pub(crate) const fn count_unit(self, ranks: usize) -> usize {
        match self.base {
            Base::AllReduce | Base::Reduce | Base::Broadcast | Base::Barrier => 1,
            _ if self.uneven => 1,
            _ => ranks,
        }
    }

    /// The share of the size that some rank must send or receive at least, so that bandwidths are
    /// comparable across numbers of ranks. Source: nccl-tests, doc/PERFORMANCE.md.
    pub(crate) fn bus_factor(self, ranks: usize) -> f64 {
        let others = (ranks - 1) as f64 / ranks as f64;
        match self.base {
            Base::AllReduce => 2.0 * others,
            Base::Reduce | Base::Broadcast | Base::Barrier => 1.0,
            _ => others,
        }
    }

    /// The names of the algorithms that it has.
    pub(crate) fn algorithms(self) -> Vec<&'static str> {
        self.call(0, ReduceOp::Sum).algorithms()
    }

    /// The call but for the lengths of uneven blocks.
    fn call(self, root: usize, op: ReduceOp) -> Collective {
        match self.base {
            Base::AllReduce => Collective::all_reduce(op),
            Base::Reduce => Collective::reduce(op, root),
            Base::Broadcast => Collective::broadcast(root),
            Base::AllGather => Collective::all_gather(),
            Base::ReduceScatter => Collective::reduce_scatter(op),
            Base::AllToAll => Collective::all_to_all(),
            Base::Gather => Collective::gather(root),
            Base::Scatter => Collective::scatter(root),
            Base::Barrier => Collective::barrier(),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.base {
            Base::AllReduce => "all_reduce",
            Base::Reduce => "reduce",
            Base::Broadcast => "broadcast",
            Base::AllGather => "all_gather",
            Base::ReduceScatter => "reduce_scatter",
            Base::AllToAll => "all_to_all",
            Base::Gather => "gather",
            Base::Scatter => "scatter",
            Base::Barrier => "barrier",
        })?;
        f.write_str(if self.uneven { "_v" } else { "" })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == text).ok_or_else(|| {
            let names = Self::ALL.map(|kind| kind.to_string()).join(", ");
            format!("expected one of {names} or all")
        })
    }
}

impl Case {
    /// The root, if there is one.
    pub(crate) fn root(&self) -> Option<usize> {
        self.kind.has_root().then_some(self.root)
    }

    /// What `rank` gives to [`unisum::Communicator::run`]. Without `op` for a collective that
    /// reduces nothing.
    pub(crate) fn call(&self, rank: usize, op: Option<ReduceOp>) -> Collective {
        let call = self.kind.call(self.root, op.unwrap_or(ReduceOp::Sum));
        let lengths = |blocks: &dyn Fn(usize) -> Range<usize>| -> Vec<usize> {
            (0..self.ranks).map(|other| blocks(other).len()).collect()
        };
        match self.kind.base {
            _ if !self.kind.uneven => call,
            Base::AllToAll => Collective::all_to_all_v(
                &lengths(&|to| self.sent(rank, to)),
                &lengths(&|from| self.sent(from, rank)),
            ),
            _ => call.with_counts(&lengths(&|of| self.block(of))),
        }
    }

    /// Where the input and the output of `rank` lie. In place, the block of a rank that has or
    /// gets all blocks is among them.
    pub(crate) fn layout(&self, rank: usize) -> Layout {
        let input = self.input_count(rank);
        let output = self.result(rank).iter().map(|piece| piece.elements.len()).sum();
        let own = self.block(rank).start;
        let at = |len: usize, other: usize| {
            let start = if self.place == Place::In && len < other { own } else { 0 };
            start..start + len
        };
        match (input, output) {
            (0, _) | (_, 0) => Layout { input: 0..input, output: 0..output },
            _ => Layout { input: at(input, output), output: at(output, input) },
        }
    }

    fn input_count(&self, rank: usize) -> usize {
        match self.kind.base {
            Base::Broadcast | Base::Scatter if rank != self.root => 0,
            Base::AllGather | Base::Gather => self.block(rank).len(),
            _ => self.count,
        }
    }

    /// What `rank` has to get, in order.
    pub(crate) fn result(&self, rank: usize) -> Vec<Piece> {
        let piece = |from, elements| Piece { from, elements };
        let root = Source::Rank(self.root);
        match self.kind.base {
            Base::Reduce | Base::Gather if rank != self.root => Vec::new(),
            Base::AllReduce | Base::Reduce => vec![piece(Source::All, 0..self.count)],
            Base::Broadcast => vec![piece(root, 0..self.count)],
            Base::ReduceScatter => vec![piece(Source::All, self.block(rank))],
            Base::Scatter => vec![piece(root, self.block(rank))],
            Base::AllGather | Base::Gather => (0..self.ranks)
                .map(|from| piece(Source::Rank(from), 0..self.block(from).len()))
                .collect(),
            Base::AllToAll => (0..self.ranks)
                .map(|from| piece(Source::Rank(from), self.sent(from, rank)))
                .collect(),
            Base::Barrier => Vec::new(),
        }
    }

    /// The block of `rank` among all.
    fn block(&self, rank: usize) -> Range<usize> {
        self.bound(rank)..self.bound(rank + 1)
    }

    /// Where the block of `rank` begins.
    fn bound(&self, rank: usize) -> usize {
        let cycle: usize = WEIGHTS.iter().sum();
        let weight = |ranks: usize| match self.kind.uneven {
            false => ranks,
            true => {
                let rest: usize = WEIGHTS[..ranks % WEIGHTS.len()].iter().sum();
                ranks / WEIGHTS.len() * cycle + rest
            }
        };
        let share = self.count as u128 * weight(rank) as u128 / weight(self.ranks) as u128;
        share as usize // not above `count`
    }

    /// What `from` sends to `to`, of all that it sends: the block that is as far from the first as
    /// `to` is from `from`. So all ranks send and receive alike, but no two the same to each other.
    fn sent(&self, from: usize, to: usize) -> Range<usize> {
        if !self.kind.uneven {
            return self.block(to);
        }
        let block = |to: usize| self.block((to + self.ranks - from) % self.ranks).len();
        let start = (0..to).map(block).sum();
        start..start + block(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str, ranks: usize, count: usize) -> Case {
        let kind: Kind = name.parse().unwrap();
        Case { kind, root: ranks - 1, place: Place::In, ranks, count }
    }

    fn lengths(case: &Case, rank: usize) -> (usize, usize) {
        let Layout { input, output } = case.layout(rank);
        (input.len(), output.len())
    }

    #[test]
    fn sizes_and_factors_are_those_of_nccl_tests() {
        let expected = [
            ("all_reduce", 1.5, (80, 80), (80, 80)),
            ("reduce", 1.0, (80, 0), (80, 80)),
            ("broadcast", 1.0, (0, 80), (80, 80)),
            ("all_gather", 0.75, (20, 80), (20, 80)),
            ("reduce_scatter", 0.75, (80, 20), (80, 20)),
            ("all_to_all", 0.75, (80, 80), (80, 80)),
            ("gather", 0.75, (20, 0), (20, 80)),
            ("scatter", 0.75, (0, 20), (80, 20)),
        ];
        for (name, factor, other, root) in expected {
            let case = case(name, 4, 80);
            assert_eq!(case.kind.bus_factor(4).to_bits(), f64::to_bits(factor), "{name}");
            assert_eq!((lengths(&case, 0), lengths(&case, 3)), (other, root), "{name}");
        }
    }

    #[test]
    fn own_blocks_in_place_are_among_all() {
        let gather = case("all_gather", 4, 80).layout(2);
        assert_eq!(gather, Layout { input: 40..60, output: 0..80 });
        let scatter = case("reduce_scatter", 4, 80).layout(2);
        assert_eq!(scatter, Layout { input: 0..80, output: 40..60 });
        assert_eq!(case("gather", 4, 80).layout(2), Layout { input: 0..20, output: 0..0 });
    }

    #[test]
    fn uneven_blocks_are_all_elements_and_some_are_empty() {
        for ranks in [1, 2, 3, 5, 8] {
            for count in [1, 7, 1000] {
                let case = case("all_gather_v", ranks, count);
                let blocks: Vec<_> = (0..ranks).map(|rank| case.block(rank)).collect();
                assert!(blocks.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert_eq!((blocks[0].start, blocks[ranks - 1].end), (0, count));
                assert_eq!(ranks > 1, blocks.iter().any(Range::is_empty));
            }
        }
    }

    #[test]
    fn ranks_send_and_receive_alike_in_uneven_blocks() {
        let case = case("all_to_all_v", 5, 1000);
        assert!((0..5).all(|rank| lengths(&case, rank) == (1000, 1000)));
        assert_ne!(case.sent(1, 3).len(), case.sent(3, 1).len());
        assert_eq!(case.sent(3, 4).end, 1000);
    }
}
