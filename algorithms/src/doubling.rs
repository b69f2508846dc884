//! Exchanges over doubling distances.

use std::ops::Range;

use crate::algorithm::{Group, Steps};
use crate::direct::{all_gather, reduce_scatter};
use crate::{Flat, Rank, Step, chunk};

/// Recursive doubling: in round t partners at distance 2^t exchange and reduce everything.
///
/// The choice for small messages where a rank has a core to itself.
/// Cost: log₂(n)·(α + S·β + S·γ); on a world that is not a power of two the ranks beyond it are
/// folded in before and out after, for 2·(α + S·β) more.
///
/// Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
/// MPICH", IJHPCA 19(1), 2005, section 4.5.
pub static RECURSIVE_DOUBLING: Flat =
    Flat { name: "recursive-doubling", phase: recursive_doubling, in_rank_order: false };

/// Halving-doubling: a reduce-scatter by halves and an all-gather by doubles.
///
/// The choice for medium to large messages on a power of two.
/// Cost: 2·log₂(n)·α + 2(n−1)/n·S·β + (n−1)/n·S·γ; on a world that is not a power of two 2·(α +
/// S·β) more. The first and largest exchange is with the nearest rank. Each exchange is marked as a
/// group step of two.
///
/// Source: Rabenseifner, "Optimization of collective reduction operations", ICCS 2004.
pub static HALVING_DOUBLING: Flat =
    Flat { name: "halving-doubling", phase: halving_doubling, in_rank_order: false };

fn recursive_doubling(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    let cube = Cube::new(group);
    let (ends, levels) = (cube.fold_rounds(), cube.levels);
    Box::new((0..levels + 2 * ends).map(move |round| {
        let step = Step::default();
        match (&cube.role, round.checked_sub(ends)) {
            (Role::Extra { core }, None) => step.send(*core, range.clone()),
            (Role::Core { extra: Some(extra), .. }, None) => {
                step.reduce(vec![*extra], range.clone())
            }
            (Role::Core { vertex, .. }, Some(t)) if t < levels => {
                let partner = cube.rank_at(vertex ^ (1 << t));
                step.send(partner, range.clone()).reduce(vec![partner], range.clone())
            }
            (Role::Extra { core }, Some(t)) if t == levels => step.store(*core, range.clone()),
            (Role::Core { extra: Some(extra), .. }, Some(_)) => step.send(*extra, range.clone()),
            _ => step,
        }
    }))
}

fn halving_doubling(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    let cube = Cube::new(group);
    let halvings = cube.levels + cube.fold_rounds();
    let down = (0..halvings).map(|t| (t, true));
    let up = (0..halvings).rev().map(|t| (t, false));
    Box::new(down.chain(up).map(move |(t, scatter)| {
        let Some(Halving { pair, me, slices }) = cube.halving(&range, t) else {
            return Step::default();
        };
        let slice_of = |i: usize| slices[i].clone();
        if scatter { reduce_scatter(&pair, me, slice_of) } else { all_gather(&pair, me, slice_of) }
    }))
}

/// A group as a hypercube: the largest power of two of its members, and the others each tied to one
/// of them.
struct Cube<'a> {
    group: Group<'a>,
    levels: usize,
    /// Members beyond the power of two.
    extras: usize,
    role: Role,
}

enum Role {
    Extra { core: Rank },
    Core { vertex: usize, extra: Option<Rank> },
}

/// Two ranks that divide a range between them; `me` is this rank's index.
struct Halving {
    pair: [Rank; 2],
    me: usize,
    slices: [Range<usize>; 2],
}

impl<'a> Cube<'a> {
    fn new(group: Group<'a>) -> Self {
        let (levels, me) = (group.len().ilog2() as usize, group.me);
        let extras = group.len() - (1 << levels);
        let role = match me {
            _ if me >= 2 * extras => Role::Core { vertex: me - extras, extra: None },
            _ if me.is_multiple_of(2) => Role::Extra { core: group.at(me + 1) },
            _ => Role::Core { vertex: me / 2, extra: Some(group.at(me - 1)) },
        };
        Self { group, levels, extras, role }
    }

    /// Rounds to fold the extra ranks in, and as many to fold them out.
    fn fold_rounds(&self) -> usize {
        usize::from(self.extras > 0)
    }

    fn rank_at(&self, vertex: usize) -> Rank {
        self.group.at(if vertex < self.extras { 2 * vertex + 1 } else { vertex + self.extras })
    }

    /// Division `t`: first, where there are extra ranks, everything goes to their partners; then
    /// each vertex shares what it has with the one at distance 1, 2, 4, …
    fn halving(&self, range: &Range<usize>, t: usize) -> Option<Halving> {
        let Some(t) = t.checked_sub(self.fold_rounds()) else {
            let slices = [range.start..range.start, range.clone()];
            let rank = self.group.at(self.group.me);
            return match self.role {
                Role::Extra { core } => Some(Halving { pair: [rank, core], me: 0, slices }),
                Role::Core { extra, .. } => {
                    extra.map(|extra| Halving { pair: [extra, rank], me: 1, slices })
                }
            };
        };
        let Role::Core { vertex, .. } = self.role else {
            return None;
        };
        let side = |level: usize| vertex >> level & 1;
        let mine = (0..t).fold(range.clone(), |range, level| chunk(&range, 2, side(level)));
        let pair = [vertex & !(1 << t), vertex | 1 << t].map(|vertex| self.rank_at(vertex));
        Some(Halving { pair, me: side(t), slices: [0, 1].map(|i| chunk(&mine, 2, i)) })
    }
}
