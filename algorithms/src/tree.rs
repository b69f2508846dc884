//! Trees: reduce to a root, broadcast from it.

use std::ops::Range;

use crate::algorithm::{Group, Steps};
use crate::chunk::split;
use crate::{Flat, Rank, Step, chunk};

/// Binary tree, reduced to the root and broadcast from it.
///
/// A choice for medium messages; the slices follow each other up and down the tree.
/// Cost with slices of s bytes: about 2·log₂(n)·(α + s·β) + 3·S·β + 2·S·γ.
///
/// Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
/// MPICH", IJHPCA 19(1), 2005; slicing as in Sanders et al., see [`DOUBLE_TREE`].
pub static TREE: Flat = Flat { name: "tree", phase: tree, in_rank_order: false };

/// Tree of arity 16: the fewest messages, 2(n−1) in all, in a quarter of the levels of the binary
/// one.
///
/// The choice for small messages where ranks share cores, so that the sum of messages counts, and
/// each level is a time for which all give their core away.
/// Cost: about 2·log₁₆(n)·α + 17·S·β + 16·S·γ with slices, and a parent handles 16 messages at
/// once.
pub static K_TREE: Flat = Flat { name: "k-tree", phase: k_tree, in_rank_order: false };

/// Two binary trees at once, half of the elements by each; inner in one is leaf in the other.
///
/// The choice for medium to large messages on many ranks: a tree's latency at nearly a ring's
/// bandwidth.
/// Cost with slices of s bytes: about 2·log₂(n)·(α + s·β) + 2·S·β + S·γ.
/// On an odd number of ranks one of them is inner in both trees.
///
/// Source: Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction
/// and scan", Parallel Computing 35(12), 2009.
pub static DOUBLE_TREE: Flat =
    Flat { name: "double-tree", phase: double_tree, in_rank_order: false };

pub(crate) fn tree(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    up_and_down(vec![(compact(&group, 2), range)], compact_height(group.len(), 2))
}

/// Of a k-tree.
const ARITY: usize = 16;

fn k_tree(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    up_and_down(vec![(compact(&group, ARITY), range)], compact_height(group.len(), ARITY))
}

fn double_tree(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    let (n, me) = (group.len(), group.me);
    let first = in_order(n, me).map(|i| group.at(i));
    // The other tree is the first one mirrored, or, where that would not swap odd and even,
    // shifted.
    let second = if n.is_multiple_of(2) {
        in_order(n, n - 1 - me).map(|i| group.at(n - 1 - i))
    } else {
        in_order(n, (me + n - 1) % n).map(|i| group.at(i + 1))
    };
    let halves = vec![(first, chunk(&range, 2, 0)), (second, chunk(&range, 2, 1))];
    up_and_down(halves, if n < 2 { 0 } else { (n - 1).ilog2() as usize + 1 })
}

/// The place of this rank in each of two binary trees below member 0; inner in one is leaf in the
/// other, but for one rank of an even number.
pub(crate) fn two_trees(group: &Group<'_>) -> [Place; 2] {
    let (n, me) = (group.len(), group.me);
    let first = in_order(n, me).map(|i| group.at(i));
    // The others mirrored, or, where that would not swap odd and even, shifted.
    let second = if n.is_multiple_of(2) {
        let shift = |i: usize, by: usize| if i == 0 { 0 } else { (i - 1 + by) % (n - 1) + 1 };
        in_order(n, shift(me, 1)).map(|i| group.at(shift(i, n - 2)))
    } else {
        in_order(n, (n - me) % n).map(|i| group.at(n - i))
    };
    [first, second]
}

/// One rank's place in a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    parent: Option<Rank>,
    children: Vec<Rank>,
    depth: usize,
}

impl Place {
    fn map(self, rank_at: impl Fn(usize) -> Rank) -> Self {
        Self {
            parent: self.parent.map(&rank_at),
            children: self.children.into_iter().map(rank_at).collect(),
            depth: self.depth,
        }
    }

    /// This rank's part of `round`: up the tree for `height` rounds, then down for as many.
    pub(crate) fn step(
        &self,
        step: Step,
        round: usize,
        height: usize,
        range: &Range<usize>,
    ) -> Step {
        match self.parent {
            Some(parent) if round + self.depth == height => step.send(parent, range.clone()),
            Some(parent) if round + 1 == height + self.depth => step.store(parent, range.clone()),
            _ if self.children.is_empty() => step,
            _ if round + self.depth + 1 == height => {
                step.reduce(self.children.clone(), range.clone())
            }
            _ if round == height + self.depth => {
                self.children.iter().fold(step, |step, &child| step.send(child, range.clone()))
            }
            _ => step,
        }
    }
}

/// Reduces each range up its tree and broadcasts it down again.
fn up_and_down<'a>(trees: Vec<(Place, Range<usize>)>, height: usize) -> Steps<'a> {
    Box::new((0..2 * height).map(move |round| {
        let add =
            |step, (place, range): &(Place, Range<usize>)| place.step(step, round, height, range);
        trees.iter().fold(Step::default(), add)
    }))
}

/// The balanced tree in which each subtree is a run of neighbours, its root the first of them: few
/// edges then leave a node.
fn compact(group: &Group<'_>, arity: usize) -> Place {
    let mut run = 0..group.len();
    let mut place = Place { parent: None, children: Vec::new(), depth: 0 };
    loop {
        let rest = run.start + 1..run.end;
        let subtrees: Vec<_> =
            (0..arity.min(rest.len())).map(|i| split(&rest, arity.min(rest.len()), i)).collect();
        match subtrees.iter().find(|subtree| subtree.contains(&group.me)) {
            Some(subtree) => {
                place.parent = Some(group.at(run.start));
                place.depth += 1;
                run = subtree.clone();
            }
            None => {
                place.children = subtrees.iter().map(|subtree| group.at(subtree.start)).collect();
                return place;
            }
        }
    }
}

/// The depth of the deepest place of [`compact`].
fn compact_height(n: usize, arity: usize) -> usize {
    std::iter::successors(Some(n), |&n| (n > 1).then(|| (n - 1).div_ceil(arity)))
        .skip(1)
        .take_while(|&n| n > 0)
        .count()
}

/// The binary tree of `n` in which every odd index is a leaf and every even one, if any is left, is
/// inner: numbered in order below a root 0 that has one child.
fn in_order(n: usize, me: usize) -> Place {
    let mut place = Place { parent: None, children: Vec::new(), depth: 0 };
    let mut at = me;
    while let Some(parent) = in_order_parent(n, at) {
        place.parent.get_or_insert(parent);
        place.depth += 1;
        at = parent;
    }
    let level = if me == 0 { n.next_power_of_two() } else { 1 << me.trailing_zeros() };
    let below = |step: usize| [me.checked_sub(step), Some(me + step)];
    let candidates =
        std::iter::successors(Some(level / 2), |step| Some(step / 2)).take_while(|&step| step > 0);
    let mut children: Vec<usize> = candidates
        .flat_map(below)
        .flatten()
        .filter(|&child| child < n && in_order_parent(n, child) == Some(me))
        .collect();
    children.sort_unstable();
    place.children = children;
    place
}

fn in_order_parent(n: usize, at: usize) -> Option<usize> {
    if at == 0 {
        return None;
    }
    let bit = 1 << at.trailing_zeros();
    let parent = (at ^ bit) | (bit << 1);
    Some(if parent < n { parent } else { at ^ bit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    #[test]
    fn inner_in_one_of_the_two_trees_is_leaf_in_the_other() {
        for n in 2..100 {
            let inner = |place: Place| usize::from(!place.children.is_empty());
            let both = |me: usize| {
                let second = if n % 2 == 0 { n - 1 - me } else { (me + n - 1) % n };
                inner(in_order(n, me)) + inner(in_order(n, second))
            };
            assert_eq!((0..n).filter(|&me| both(me) > 1).count(), n % 2, "{n} ranks");
            assert!((0..n).all(|me| in_order(n, me).children.len() <= 2), "{n} ranks");
        }
    }

    #[test]
    fn inner_in_one_of_two_trees_below_a_root_is_leaf_in_the_other() {
        for n in 2..100 {
            let members: Vec<Rank> = (0..n).collect();
            let places = |me| two_trees(&Group { members: Cow::Borrowed(&members), me });
            let inner = |me| places(me).iter().filter(|place| !place.children.is_empty()).count();
            let twice = (1..n).filter(|&me| inner(me) > 1).count();
            assert!(twice <= usize::from(n % 2 == 0), "{n} ranks");
            assert!(places(0).iter().all(|place| place.children.len() == 1), "{n} ranks");
        }
    }

    #[test]
    fn the_height_is_the_depth_of_the_deepest_place() {
        for n in 1..100 {
            let members: Vec<Rank> = (0..n).collect();
            for arity in [2, 4] {
                let depth =
                    |me| compact(&Group { members: Cow::Borrowed(&members), me }, arity).depth;
                assert_eq!((0..n).map(depth).max(), Some(compact_height(n, arity)), "{n} ranks");
            }
        }
    }
}
