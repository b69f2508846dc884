//! One collective call of a sequence, the same on all ranks, and what it means.

use std::ops::Range;

use unisum::{Collective, Dtype, Rank, ReduceOp};

use super::random::{Random, mix};
use super::values::{How, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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

use Kind::{AllGather, AllReduce, AllToAll, Barrier, Broadcast, Gather};
use Kind::{Reduce, ReduceScatter, Scatter};

const KINDS: [Kind; 9] =
    [AllReduce, Reduce, Broadcast, AllGather, ReduceScatter, AllToAll, Gather, Scatter, Barrier];

/// Block lengths, or the length of everything where there are no blocks.
#[derive(Clone, Debug)]
enum Lengths {
    Even(usize),
    Blocks(Vec<usize>),
    /// `[from][to]`.
    Pairs(Vec<Vec<usize>>),
}

#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) kind: Kind,
    pub(crate) dtype: Dtype,
    pub(crate) how: How,
    pub(crate) is_watched: bool,
    pub(crate) root: Rank,
    world: usize,
    lengths: Lengths,
    /// A rank that puts infinities and NaNs in.
    poisoner: Option<Rank>,
    seed: u64,
}

const DTYPES: [Dtype; 15] = Dtype::ALL;
const OPS: [ReduceOp; 8] = ReduceOp::ALL;

impl Step {
    pub(crate) fn random(random: &mut Random, world: usize, most: usize) -> Self {
        let (kind, dtype) = (random.pick(&KINDS), random.pick(&DTYPES));
        Self::random_of(random, kind, dtype, world, most)
    }

    pub(crate) fn random_of(
        random: &mut Random,
        kind: Kind,
        dtype: Dtype,
        world: usize,
        most: usize,
    ) -> Self {
        let how = random_how(random, dtype);
        // What a function of the program makes of a NaN hangs on the order of the operands.
        let may_poison = dtype.is_float() && how != How::Commuting && random.one_in(4);
        let poisoner = may_poison.then(|| random.below(world));
        let lengths = random_lengths(random, kind, world, most);
        let (is_watched, root) = (random.one_in(2), random.below(world));
        Self { kind, dtype, how, is_watched, root, world, lengths, poisoner, seed: random.next() }
    }

    /// This step alone, or as the first of a batch: others differ in what is put in and, where
    /// blocks are even, in length.
    pub(crate) fn maybe_batch(self, random: &mut Random) -> Vec<Self> {
        let more = if random.one_in(3) { 1 + random.below(6) } else { 0 };
        let mut batch = vec![self];
        for _ in 0..more {
            let mut step = batch[0].clone();
            if let Lengths::Even(each) = &mut step.lengths {
                *each = random.block(*each);
            }
            step.seed = random.next();
            batch.push(step);
        }
        batch
    }

    /// The call, for `rank`.
    pub(crate) fn collective<T: Value>(&self, rank: Rank) -> Collective {
        let plain = self.how.reduction::<T>();
        let how = if self.is_watched { plain.detect_nonfinite() } else { plain };
        let collective = match (self.kind, &self.lengths) {
            (AllReduce | Barrier, _) => Collective::all_reduce(how),
            (Reduce, _) => Collective::reduce(how, self.root),
            (Broadcast, _) => Collective::broadcast(self.root),
            (AllGather, _) => Collective::all_gather(),
            (ReduceScatter, _) => Collective::reduce_scatter(how),
            (AllToAll, Lengths::Pairs(pairs)) => {
                let receives: Vec<usize> = pairs.iter().map(|row| row[rank]).collect();
                Collective::all_to_all_v(&pairs[rank], &receives)
            }
            (AllToAll, _) => Collective::all_to_all(),
            (Gather, _) => Collective::gather(self.root),
            (Scatter, _) => Collective::scatter(self.root),
        };
        match &self.lengths {
            Lengths::Blocks(counts) => collective.with_counts(counts),
            _ => collective,
        }
    }

    pub(crate) const fn reduces(&self) -> bool {
        matches!(self.kind, AllReduce | Reduce | ReduceScatter)
    }

    /// Whether all ranks get the same elements.
    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self.kind, AllReduce | Broadcast | AllGather)
    }

    /// The block of `owner` among all blocks.
    fn block(&self, owner: Rank) -> Range<usize> {
        match &self.lengths {
            Lengths::Even(each) => owner * each..(owner + 1) * each,
            Lengths::Blocks(counts) => {
                let start = counts[..owner].iter().sum();
                start..start + counts[owner]
            }
            Lengths::Pairs(_) => panic!("pairs have no common space"),
        }
    }

    fn total(&self) -> usize {
        match self.kind {
            AllReduce | Reduce | Broadcast | Barrier => self.block(0).len(),
            _ => self.block(self.world - 1).end,
        }
    }

    /// How long the block from one rank to another is.
    fn pair(&self, from: Rank, to: Rank) -> usize {
        match &self.lengths {
            Lengths::Pairs(pairs) => pairs[from][to],
            _ => self.block(0).len(),
        }
    }

    /// How many elements `rank` puts in and gets.
    pub(crate) fn extents(&self, rank: Rank) -> (usize, usize) {
        let all = || self.total();
        let own = || self.block(rank).len();
        let at_root = |count: usize| if rank == self.root { count } else { 0 };
        match self.kind {
            AllReduce => (all(), all()),
            Reduce => (all(), at_root(all())),
            Broadcast => (at_root(all()), all()),
            AllGather => (own(), all()),
            ReduceScatter => (all(), own()),
            Gather => (own(), at_root(all())),
            Scatter => (at_root(all()), own()),
            AllToAll => {
                let sum = |pair: &dyn Fn(Rank) -> usize| (0..self.world).map(pair).sum();
                (sum(&|to| self.pair(rank, to)), sum(&|from| self.pair(from, rank)))
            }
            Barrier => (0, 0),
        }
    }

    /// Where input and output lie in one buffer, and how long that is; `None` if `rank` can't
    /// have both in one.
    pub(crate) fn in_place(&self, rank: Rank) -> Option<(Range<usize>, Range<usize>, usize)> {
        let (puts, gets) = self.extents(rank);
        let (mut input, mut output) = (0..puts, 0..gets);
        match self.kind {
            AllToAll if puts != gets => return None,
            AllGather => input = self.block(rank),
            Gather if rank == self.root => input = self.block(rank),
            ReduceScatter => output = self.block(rank),
            Scatter if rank == self.root => output = self.block(rank),
            _ => {}
        }
        Some((input, output, puts.max(gets)))
    }

    /// Element `at` of what `rank` puts in.
    pub(crate) fn input<T: Value>(&self, rank: Rank, at: usize) -> T {
        let common = mix(self.seed ^ at as u64);
        let random = mix(common.wrapping_add(rank as u64));
        if !self.reduces() {
            return T::from_bits(random);
        }
        if self.poisoner == Some(rank) && common.is_multiple_of(61) {
            return T::nonfinite(random).expect("floats have one");
        }
        let is_live = (common as usize / 61 + rank) % self.world < 7;
        T::input(self.how, random, is_live)
    }

    /// Element `at` of what `rank` gets.
    pub(crate) fn expected<T: Value>(&self, rank: Rank, at: usize) -> T {
        match self.kind {
            AllReduce | Reduce => self.reduced(at),
            ReduceScatter => self.reduced(self.block(rank).start + at),
            Broadcast => self.input(self.root, at),
            Scatter => self.input(self.root, self.block(rank).start + at),
            AllGather | Gather => {
                let (from, at) = self.find(at, |from| self.block(from).len());
                self.input(from, at)
            }
            AllToAll => {
                let (from, at) = self.find(at, |from| self.pair(from, rank));
                let before: usize = (0..rank).map(|to| self.pair(from, to)).sum();
                self.input(from, before + at)
            }
            Barrier => panic!("a barrier gives nothing"),
        }
    }

    /// Which rank's block an element lies in, and where.
    fn find(&self, mut at: usize, len: impl Fn(Rank) -> usize) -> (Rank, usize) {
        for rank in 0..self.world {
            let len = len(rank);
            if at < len {
                return (rank, at);
            }
            at -= len;
        }
        panic!("no block has the element");
    }

    fn reduced<T: Value>(&self, at: usize) -> T {
        let operand = |rank| {
            let input = self.input::<T>(rank, at);
            if let How::Scaled(factor) = self.how { input.scale(factor) } else { input }
        };
        let reduced = (1..self.world)
            .fold(operand(0), |folded, rank| T::fold(self.how, folded, operand(rank)));
        if self.how == How::Plain(ReduceOp::Average) { reduced.divide(self.world) } else { reduced }
    }
}

fn random_how(random: &mut Random, dtype: Dtype) -> How {
    if random.one_in(5) {
        return if random.one_in(2) { How::Commuting } else { How::Ordered };
    }
    if dtype.is_float() && random.one_in(4) {
        return How::Scaled(random.pick(&[0.5, 2.0, -1.0, 0.25]));
    }
    let fits: Vec<ReduceOp> = OPS.into_iter().filter(|op| op.is_defined_for(dtype)).collect();
    How::Plain(random.pick(&fits))
}

fn random_lengths(random: &mut Random, kind: Kind, world: usize, most: usize) -> Lengths {
    // Sizes are spread over the orders of magnitude, 0 among them.
    let total = random.size(most);
    match kind {
        AllReduce | Reduce | Broadcast | Barrier => Lengths::Even(total),
        AllToAll if random.one_in(2) => {
            let mut length = || random.block(total / world / world);
            let row = |_| (0..world).map(|_| length()).collect();
            Lengths::Pairs((0..world).map(row).collect())
        }
        AllToAll => Lengths::Even(total / world / world),
        _ if random.one_in(2) => {
            Lengths::Blocks((0..world).map(|_| random.block(total / world)).collect())
        }
        _ => Lengths::Even(total / world),
    }
}
