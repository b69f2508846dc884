//! What must hold of what ranks tell each other when they join, whatever they tell.

use unisum_algorithms::Topology;
use unisum_control::interface::ADDRESSES_MAX;
use unisum_link::fuzzing::Target;

use super::card::Card;
use super::cores::Cores;
use super::group::Told;
use super::report::{self, Report};
use super::standing::Standing;
use super::{costs, lineage, node, store};

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "card", check: check_card, seeds: card_seeds },
    Target { name: "costs", check: check_costs, seeds: costs_seeds },
    Target { name: "cores", check: check_cores, seeds: cores_seeds },
    Target { name: "node_reports", check: check_reports, seeds: report_seeds },
    Target { name: "standings", check: check_standing, seeds: standing_seeds },
    Target { name: "store_value", check: check_store, seeds: store_seeds },
    Target { name: "members_addresses", check: check_addresses, seeds: address_seeds },
    Target { name: "told_of_groups", check: check_told, seeds: told_seeds },
];

/// A card that is accepted encodes to one that says the same, and to the same bytes but for the
/// addresses, which may be written in several ways.
fn check_card(bytes: &[u8]) {
    let Ok(card) = Card::decode(bytes) else { return };
    let encoded = card.encode();
    let without_addresses = |card: &[u8]| {
        let (head, rest) = card.split_at(12);
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
        place: Some((1, 2)),
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

/// Cores that are accepted are told on by the same bytes, and a host has some.
fn check_cores(bytes: &[u8]) {
    let told: Vec<Cores> = bytes.chunks(9).filter_map(Cores::decode).collect();
    let told_on = told.iter().map(Cores::encode);
    assert!(told_on.zip(bytes.chunks(9)).all(|(again, bytes)| again == bytes));
    assert!(Cores::of_host(told.iter()) >= 1);
}

fn cores_seeds() -> Vec<Vec<u8>> {
    let own = Cores::own().encode();
    vec![own.clone(), vec![1, 0, 0, 0, 1, 0, 0, 0, 128, 2, 0, 0, 0, 3], own[..4].to_vec()]
}

/// Whatever ranks report of the memory that they share, one on each line: a report says the same
/// when it is told on, and each rank is on one node, with those that share its memory and no
/// others.
fn check_reports(bytes: &[u8]) {
    let told: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').take(16).collect();
    for bytes in &told {
        match report::decode(bytes) {
            Ok(it) => assert_eq!(&report::encode(Ok(it)), bytes),
            Err(why) => assert_eq!(report::decode(&report::encode(Err(&why))), Err(why)),
        }
    }
    let reports: Vec<Report> = told.iter().map(|bytes| Report::decode(bytes)).collect();
    for report in &reports {
        assert_eq!(&Report::decode(&report.encode()), report);
    }
    let leaders: Vec<_> = reports.iter().map(Report::leader).collect();
    let topology = node::topology(&leaders, &["a"; 16][..leaders.len()]);
    for rank in 0..leaders.len() {
        let members = node::members_of(rank, &leaders);
        let is_with = |other: usize| topology.node_of(other) == topology.node_of(rank);
        let shares = |other: usize| members.contains(&other);
        assert!(shares(rank));
        assert!(leaders[rank].is_none() || (0..leaders.len()).all(|it| is_with(it) == shares(it)));
    }
    let error = report::not_all_share("shm", 0, &leaders, &reports);
    assert!(!error.to_string().is_empty());
}

fn report_seeds() -> Vec<Vec<u8>> {
    let reports = ["+0\n+0\n-no memory\n~no files\n!1,2:gave up\n=alone", "+4294967295\n+1\n\n+x"];
    reports.map(Vec::from).to_vec()
}

/// How far a rank is, if that is accepted, is told on by the same bytes.
fn check_standing(bytes: &[u8]) {
    if let Some(standing) = Standing::decode(bytes) {
        assert_eq!(standing.encode(), bytes);
    }
}

fn standing_seeds() -> Vec<Vec<u8>> {
    vec![vec![0], vec![1, 2, 0, 0, 0, 0, 0, 0, 0], vec![0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 1]]
}

/// What rank 0 may have written into the store: where it listens, or one line.
fn check_store(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Some(addresses) = store::addresses_in(text) else { return };
    assert!((1..=ADDRESSES_MAX).contains(&addresses));
    // No part of it is taken for the whole.
    let parts = text.char_indices().map(|(end, _)| &text[..end]);
    parts.for_each(|part| assert_eq!(store::addresses_in(part), None, "{part:?}"));
}

fn store_seeds() -> Vec<Vec<u8>> {
    let token = "0123456789abcdef0123456789abcdef";
    let at = format!("unisum-store1 at {token} 10.0.0.1:4000 [fe80::1%3]:4000\n");
    let others = ["unisum-store1 at - 127.0.0.1:1\n", "unisum-store1 failed why\n"];
    [&at, others[0], others[1], "unisum-store1 over\n"].map(|it| it.as_bytes().to_vec()).to_vec()
}

/// Addresses of a member that are accepted are some.
fn check_addresses(bytes: &[u8]) {
    if let Some(addresses) = lineage::parse_addresses(bytes) {
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        assert_eq!(lineage::parse_addresses(texts.join(" ").as_bytes()), Some(addresses));
        assert!(!texts.is_empty());
    }
}

fn address_seeds() -> Vec<Vec<u8>> {
    vec![b"10.0.0.1:4000 [2001:db8::1]:4000 [fe80::1%3]:4000".to_vec()]
}

/// Whatever a rank tells of a group is read as something, which is read from its encoding again.
fn check_told(bytes: &[u8]) {
    let told = Told::decode(bytes);
    assert_eq!(Told::decode(&told.encode()), told);
}

fn told_seeds() -> Vec<Vec<u8>> {
    let told = Told {
        session: [7; 16],
        ordinal: 2,
        addresses: b"10.0.0.1:4000 [2001:db8::1]:4000".to_vec(),
        info: vec![1, 2, 3],
    };
    vec![told.encode(), Told::default().encode()]
}
