//! What must hold of what ranks tell each other when they join, whatever they tell.

use unisum_algorithms::Topology;
use unisum_link::fuzzing::Target;

use super::card::Card;
use super::cores::Cores;
use super::costs;

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "card", check: check_card, seeds: card_seeds },
    Target { name: "costs", check: check_costs, seeds: costs_seeds },
];

/// A card that is accepted encodes to one that says the same, and to the same bytes but for the
/// addresses, which may be written in several ways.
fn check_card(bytes: &[u8]) {
    let Ok(card) = Card::decode(bytes) else { return };
    let encoded = card.encode();
    let without_addresses = |card: &[u8]| {
        let (head, rest) = card.split_at(4);
        let (length, rest) = rest.split_first_chunk().expect("it was accepted");
        [head, &rest[u32::from_le_bytes(*length) as usize..]].concat()
    };
    assert_eq!(without_addresses(&encoded), without_addresses(bytes));
    // The numbers of interfaces are not told on.
    assert_eq!(Card::decode(&encoded).map(|card| card.encode()), Ok(encoded));
}

fn card_seeds() -> Vec<Vec<u8>> {
    let card = Card {
        addresses: vec![([10, 0, 0, 1], 4000).into(), ([127, 0, 0, 1], 4000).into()],
        host: "boot/net".into(),
        pid: 7,
        cores: Cores::own(),
        settings: "transport=auto".into(),
        node: vec![1, 2, 3],
        standing: vec![4, 5],
    };
    vec![card.encode(), Card::default().encode()]
}

/// Costs that are accepted are numbers to reckon with.
fn check_costs(bytes: &[u8]) {
    // As rank 0 of two hosts would tell them.
    let Ok(costs) = costs::combine(&Topology::nodes(&[1, 1]), &[bytes, &[0; 4]]) else { return };
    for profile in [costs.inside, costs.across] {
        assert!(profile.alpha_s > 0.0 && profile.alpha_s.is_finite());
        assert!(profile.beta_s_per_byte > 0.0 && profile.beta_s_per_byte.is_finite());
    }
    assert!(costs.gamma_s_per_byte.is_finite() && costs.cores.is_finite());
    // Printing divides by them.
    costs.described().iter().for_each(|cost| assert!(!cost.to_string().is_empty()));
}

fn costs_seeds() -> Vec<Vec<u8>> {
    let figures = [1e-6_f64, 1e-10, 2e-10, 5e-11, 16.0].map(f64::to_le_bytes).concat();
    vec![[&1_u32.to_le_bytes()[..], &1_u32.to_le_bytes(), &figures].concat()]
}
