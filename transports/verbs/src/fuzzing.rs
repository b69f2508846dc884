//! What must hold of everything that peers tell, whatever they tell.

use unisum_kernels::{Dtype, ReduceOp};
use unisum_link::fuzzing::Target;
use unisum_link::{Call, CollectiveKind};

use crate::card::{Card, RailCard};
use crate::filter::DeviceFilter;
use crate::wire::{READY_BYTES, Ready, Word};

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target { name: "verbs-card", check: check_card, seeds: card_seeds },
    Target { name: "verbs-ready", check: check_ready, seeds: ready_seeds },
    Target { name: "verbs-word", check: check_word, seeds: word_seeds },
    Target { name: "verbs-devices", check: check_filter, seeds: filter_seeds },
];

/// A card that is accepted encodes to the same bytes.
fn check_card(bytes: &[u8]) {
    if let Ok(card) = Card::decode(bytes) {
        assert_eq!(card.encode(), bytes);
        assert!(!card.pairs.is_empty() && card.pairs.len().is_multiple_of(card.rails.len()));
    }
}

fn card_seeds() -> Vec<Vec<u8>> {
    let rail = RailCard { gid: [7; 16], lid: 3, mtu: 5, is_ethernet: true };
    let pairs = vec![17, 18, 19, 20];
    let card = Card { psn: 9, area: 1 << 40, area_key: 5, rails: vec![rail; 2], pairs };
    vec![card.encode()]
}

/// An announcement that is accepted encodes to the same bytes.
fn check_ready(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<READY_BYTES>() else { return };
    if let Some(ready) = Ready::decode(bytes) {
        assert_eq!(&ready.encode(), bytes);
    }
}

fn ready_seeds() -> Vec<Vec<u8>> {
    let (collective, dtype, op) = (CollectiveKind::AllReduce, Dtype::F32, ReduceOp::Sum);
    let (communicator, root, history) = (0, 0, 0);
    let call = Call {
        communicator,
        number: 7,
        collective,
        dtype,
        op,
        watched: true,
        count: 1 << 20,
        root,
        history,
        algorithm: 3,
    };
    vec![Ready { address: 1 << 40, bytes: 4096, keys: [1; 4], call }.encode().to_vec()]
}

/// Every word means something, and means it again when it is said again.
fn check_word(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    let word = Word::decode(u32::from_le_bytes(*bytes));
    assert_eq!(Word::decode(word.encode()), word);
}

fn word_seeds() -> Vec<Vec<u8>> {
    [0_u32, 1 << 30, 2 << 30, u32::MAX].map(|word| word.to_le_bytes().to_vec()).to_vec()
}

/// A filter that is accepted is printed as one that means the same.
fn check_filter(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(filter) = text.parse::<DeviceFilter>() {
        assert_eq!(filter.to_string().parse(), Ok(filter));
    }
}

fn filter_seeds() -> Vec<Vec<u8>> {
    ["mlx5", "=mlx5_0:1,mlx5_1", "^=rxe0"].map(Vec::from).to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_breaks_a_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            super::TARGETS.iter().for_each(|target| target.attack(&bytes));
        }
    }
}
