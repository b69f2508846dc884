//! The fuzz targets of this crate (see `unisum_link::fuzzing`): cards, layouts, what lies in the
//! memory, what a peer may write there while a link is used, and both ends of joining.

mod peer;

use unisum_kernels::{Dtype, ReduceOp};
use unisum_link::Call;
use unisum_link::fuzzing::Target;

use crate::card::{Card, candidates};
use crate::join::fuzzing::{check_leader, check_member, leader_seeds, member_seeds};
use crate::layout::{Layout, SLOT_BYTES};
use crate::mailbox::Place;

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target { name: "shm_card", check: check_card, seeds: card_seeds },
    Target { name: "shm_candidates", check: check_candidates, seeds: candidates_seeds },
    Target { name: "shm_layout", check: check_layout, seeds: layout_seeds },
    Target { name: "shm_entry", check: check_entry, seeds: entry_seeds },
    Target { name: "shm_peer", check: peer::check, seeds: peer::seeds },
    Target { name: "shm_leader", check: check_leader, seeds: leader_seeds },
    Target { name: "shm_member", check: check_member, seeds: member_seeds },
];

/// A card that is accepted is the one that encodes to these bytes.
fn check_card(bytes: &[u8]) {
    if let Some(card) = Card::decode(bytes) {
        assert_eq!(card.encode(), bytes);
    }
}

fn card_seeds() -> Vec<Vec<u8>> {
    vec![Card::here([7; 32]).expect("this system tells enough for a card").encode()]
}

/// Every rank finds the same candidates, itself among them, whatever the others' cards are. The
/// first byte is the length of each card.
fn check_candidates(bytes: &[u8]) {
    let Some((&length, rest)) = bytes.split_first() else { return };
    let cards: Vec<Vec<u8>> =
        rest.chunks(usize::from(length).max(1)).map(<[u8]>::to_vec).take(8).collect();
    for me in 0..cards.len() {
        let Ok(found) = candidates(me, &cards) else { continue };
        assert!(found.is_sorted_by(|(a, _), (b, _)| a < b));
        assert!(found.iter().any(|(rank, _)| *rank == me));
        for (other, card) in &found {
            assert_eq!(card.encode(), cards[*other]);
            assert_eq!(candidates(*other, &cards).ok().as_ref(), Some(&found));
        }
    }
}

fn candidates_seeds() -> Vec<Vec<u8>> {
    let card = card_seeds().concat();
    let length = u8::try_from(card.len()).expect("cards are short");
    vec![[&[length], &card[..], &card, &card].concat()]
}

/// The sizes that a leader sends (ranks, bytes of a heap) are refused or give a layout in which
/// nothing overflows and the heaps end where the memory does.
fn check_layout(bytes: &[u8]) {
    let Some((local_ranks, rest)) = bytes.split_first_chunk() else { return };
    let Some(heap_bytes) = rest.first_chunk() else { return };
    let (local_ranks, heap_bytes) =
        (u32::from_le_bytes(*local_ranks), u64::from_le_bytes(*heap_bytes));
    let Some(layout) = Layout::new(local_ranks as usize, heap_bytes) else { return };
    assert!(layout.heap_bytes() <= heap_bytes && layout.dense_bytes() <= layout.bytes());
    let last = u64::from(local_ranks) - 1;
    assert!(layout.slot(last, 1).deposit() + SLOT_BYTES as u64 <= layout.mailbox(0, 0));
    assert!(layout.mailbox(last, last) < layout.dense_bytes());
    let (staging, staging_bytes) = layout.staging(last, last);
    assert!(staging + staging_bytes <= layout.heap(0));
    assert_eq!(layout.heap(last) + layout.heap_bytes(), layout.bytes());
    assert!(layout.bytes() < 1 << 56);
}

fn layout_seeds() -> Vec<Vec<u8>> {
    let sizes = [(1_u32, 0_u64), (16, 4 << 20), (1 << 14, 1 << 30), (2, u64::MAX)];
    sizes
        .map(|(local_ranks, heap)| [&local_ranks.to_le_bytes()[..], &heap.to_le_bytes()].concat())
        .to_vec()
}

/// The words of an entry or a card in the memory mean nothing, or exactly what encodes to them.
fn check_entry(bytes: &[u8]) {
    let mut words = bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("chunks of 8 bytes")));
    let mut next = || words.next();
    let (Some(a), Some(b), Some(c), Some(d)) = (next(), next(), next(), next()) else { return };
    if let Some(call) = Call::from_words(&[a, b, c, d]) {
        assert_eq!(call.words(), [a, b, c, d]);
    }
    let (Some(kind), Some(location)) = (next(), next()) else { return };
    if let Some(place) = Place::decode([kind, location]) {
        assert_eq!(place.encode(), [kind, location]);
    }
}

fn entry_seeds() -> Vec<Vec<u8>> {
    let call =
        Call { op: ReduceOp::Max, algorithm: 1, ..Call::all_reduce(3, Dtype::F64, 9) }.encode();
    let entry = |place: Place| {
        let place = place.encode().map(u64::to_le_bytes).concat();
        [&call[..], &place].concat()
    };
    [Place::Heap(4096), Place::Process(1 << 40), Place::Staged].map(entry).to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_breaks_a_parser(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            super::TARGETS.iter().for_each(|target| target.attack(&bytes));
        }
    }
}
