//! Makes ranks that know only their own lengths compare them before any data moves.
//!
//! Every message states how many elements its sender has for its receiver, and how many it expects
//! back, so the receiver of a message detects a difference in either. Each of two ranks therefore
//! has to receive a message from the other, and both ends have to agree on it whatever each of them
//! thinks of its length. Where nothing is to be sent, or something so long that a transport may
//! have to request it first, a *token* goes ahead: an element that nobody reads.

use unisum_algorithms::{PairCounts, Rank, Shape, Space};

use super::placement::{Memory, Overlay, Place};
use super::segment::{Segment, Transfer, Work};

/// Blocks of up to this many bytes are sent eagerly by every transport, in one message.
const SHORT_BYTES: usize = 4 << 10;

/// What a rank has for another and expects from it, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) peer: Rank,
    pub(crate) sends: usize,
    pub(crate) receives: usize,
}

/// The pairs of a rank in a collective whose ranks know only their own lengths; empty in others.
pub(super) fn pairs(shape: &Shape) -> Vec<Pair> {
    let Space::Pairs(PairCounts::Own { rank, sends, receives }) = &shape.space else {
        return Vec::new();
    };
    let counts = sends.iter().zip(receives.iter()).enumerate();
    let pair = |(peer, (&sends, &receives))| Pair { peer, sends, receives };
    counts.map(pair).filter(|pair| pair.peer != *rank).collect()
}

/// Puts the tokens of `pairs` into an empty segment, as its first step. They lie in scratch memory
/// from a given element on; returns how many more elements it needs.
pub(super) fn add(
    segment: &mut Segment,
    pairs: &[Pair],
    from: usize,
    element_bytes: usize,
) -> usize {
    let is_token = |count: usize| count == 0 || count * element_bytes > SHORT_BYTES;
    let sends = pairs.iter().filter(|pair| is_token(pair.sends));
    let receives = pairs.iter().filter(|pair| is_token(pair.receives));
    let works: Vec<Work> = sends
        .map(|pair| Work::Send { to: pair.peer })
        .chain(receives.map(|pair| Work::Store { from: pair.peer }))
        .collect();
    let tokens = works.len();
    for (at, work) in works.into_iter().enumerate() {
        let place = Some(Place::new(Memory::Scratch, from + at).in_bytes(element_bytes));
        let (reads, writes) = match work {
            Work::Send { .. } => (place, None),
            _ => (None, place),
        };
        let (step, waits_for, followers) = (0, 0, Vec::new());
        let bytes = element_bytes;
        let token = Transfer { work, bytes, reads, writes, step, waits_for, followers };
        segment.add(token, Overlay::APART);
    }
    if tokens > 0 {
        segment.step_starts.push(tokens);
    }
    tokens
}
