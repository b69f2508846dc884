//! The binomial tree of any root, found by halving.

use std::ops::Range;

use crate::algorithm::{Group, Rounds};
use crate::{Pattern, Step};

/// One edge of the tree as one of its ends sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Edge {
    /// The position at the other end.
    other: usize,
    /// Whether this end is the one further from the root.
    is_below: bool,
    /// The positions below the edge: neighbours, the end that is further from the root among them.
    below: Range<usize>,
}

/// The edge of position `me` at each level, where it has one.
///
/// The members are halved again and again; at each level one position of a half is its head, the
/// root for the whole, and has an edge to the head of the half that it is not in. So the positions
/// below every edge are neighbours: a tree over ranks in order gathers blocks that lie side by
/// side, and folds in rank order, whatever the root.
fn edges(n: usize, root: usize, me: usize) -> Vec<Option<Edge>> {
    let (mut half, mut head) = (0..n, root);
    let level = |_| {
        let middle = half.start + half.len().div_ceil(2);
        let (low, high) = (half.start..middle, middle..half.end);
        let (near, far) = if head < middle { (low, high) } else { (high, low) };
        if far.is_empty() {
            return None;
        }
        let ends = [head, far.start];
        let edge = ends.iter().position(|&end| end == me).map(|end| Edge {
            other: ends[1 - end],
            is_below: end == 1,
            below: far.clone(),
        });
        (half, head) = if far.contains(&me) { (far.clone(), far.start) } else { (near, head) };
        edge
    };
    (0..levels(n)).map(level).collect()
}

/// The positions that `member` stands for: itself and those below it.
pub(crate) fn below(n: usize, root: usize, member: usize) -> Range<usize> {
    let above = edges(n, root, member).into_iter().flatten().find(|edge| edge.is_below);
    above.map_or(0..n, |edge| edge.below)
}

/// How often `n` can be halved, rounding up: log₂(n).
fn levels(n: usize) -> usize {
    n.next_power_of_two().trailing_zeros() as usize
}

/// Gives `range` of the member at position `root` to all.
///
/// Cost: log₂(n)·(α + S·β).
pub(crate) fn spread(group: Group<'_>, root: usize, range: Range<usize>) -> Rounds<'_> {
    let edges = edges(group.len(), root, group.me);
    Box::new(edges.into_iter().map(move |edge| match edge {
        Some(edge) if edge.is_below => Step::default().store(group.at(edge.other), range.clone()),
        Some(edge) => Step::default().send(group.at(edge.other), range.clone()),
        None => Step::default(),
    }))
}

/// Gives each member its blocks of the member at position `root`. A member gets those of the
/// members below it, too.
///
/// Cost: log₂(n)·α + (n−1)/n·S·β for S bytes in all. Messages join blocks that lie side by side.
pub(crate) fn deal<'a>(
    group: Group<'a>,
    root: usize,
    blocks_of: impl Fn(usize) -> Vec<Range<usize>> + Send + 'a,
) -> Rounds<'a> {
    let edges = edges(group.len(), root, group.me);
    Box::new(edges.into_iter().map(move |edge| {
        let step = Step::new(Pattern::Wall);
        let Some(Edge { other, is_below, below }) = edge else { return step };
        let other = group.at(other);
        let blocks = joined(below.flat_map(&blocks_of));
        if is_below { step.store_all(other, blocks) } else { step.send_all(other, blocks) }
    }))
}

/// The ranges in this order, without empty ones, those that touch made one.
pub(crate) fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges.filter(|range| !range.is_empty()) {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_see_the_same_edge_and_everybody_but_the_root_is_below_one() {
        for n in 1..40 {
            for root in 0..n {
                let all: Vec<_> = (0..n).map(|me| edges(n, root, me)).collect();
                for (me, mine) in all.iter().enumerate() {
                    for (level, edge) in mine.iter().enumerate() {
                        let Some(edge) = edge else { continue };
                        let theirs = all[edge.other][level].as_ref().unwrap();
                        assert_eq!((theirs.other, &theirs.below), (me, &edge.below));
                        assert!(theirs.is_below != edge.is_below);
                    }
                    let above = mine.iter().flatten().filter(|edge| edge.is_below).count();
                    assert_eq!(above, usize::from(me != root), "{n} ranks, root {root}");
                }
            }
        }
    }
}
