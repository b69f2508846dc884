//! Ring.

use std::ops::Range;

use crate::algorithm::{Group, Steps};
use crate::{Flat, Step, chunk};

/// Ring: a reduce-scatter and an all-gather, each rank speaking only to its neighbours.
///
/// The choice for large messages: every link carries the same, least possible number of bytes.
/// Cost: 2(n−1)·α + 2(n−1)/n·S·β + (n−1)/n·S·γ for S bytes on n ranks.
///
/// Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
/// workstations", JPDC 69(2), 2009.
pub static RING: Flat = Flat { name: "ring", phase: ring, in_rank_order: false };

/// In round t chunk `me`−1−t goes on and chunk `me`−2−t arrives, until chunk `me` is complete; then
/// the complete chunks go once more around.
pub(crate) fn ring(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    let (n, me) = (group.len(), group.me);
    let (next, previous) = (group.at(me + 1), group.at(me + n - 1));
    let part = move |i: usize| chunk(&range, n, i % n);
    let gathered = part.clone();
    let reduce_scatter = (0..n - 1).map(move |t| {
        let (sent, reduced) = (part(me + n - 1 - t), part(me + 2 * n - 2 - t));
        Step::default().send(next, sent).reduce(vec![previous], reduced)
    });
    let all_gather = (0..n - 1).map(move |t| {
        let (sent, stored) = (gathered(me + n - t), gathered(me + n - 1 - t));
        Step::default().send(next, sent).store(previous, stored)
    });
    Box::new(reduce_scatter.chain(all_gather))
}
