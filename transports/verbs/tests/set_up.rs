//! Peers whose cards are not true: an error in time, whatever it is that is wrong.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use std::thread;
use std::time::{Duration, Instant};

use unisum_link::{LinkError, LinkErrorKind};
use unisum_verbs::{Offer, VerbsError, VerbsLink};

/// Where a card has the number of its first packet, its first device's address, and the number of
/// the first queue pair, for one device.
const PSN_AT: usize = 4;
const GID_AT: usize = 22;
const PAIR_AT: usize = GID_AT + 20;

fn offer(rank: usize) -> Offer {
    Offer::new(rank, 2, &[1 - rank], common::config()).unwrap()
}

/// The link of rank 0 of two, to whom the other's card came as `spoil` left it.
fn connect(other: &Offer, spoil: impl Fn(&mut Vec<u8>)) -> Result<VerbsLink, VerbsError> {
    let mut cards = vec![Vec::new(), card(other, 0)];
    spoil(&mut cards[1]);
    offer(0).connect(&cards)
}

/// What an offer has for a rank.
fn card(offer: &Offer, rank: usize) -> Vec<u8> {
    offer.cards().swap_remove(rank)
}

/// What rank 0 finds when both prove their connections.
fn prove(spoil: impl Fn(&mut Vec<u8>)) -> Result<(), LinkError> {
    let (own, other) = (offer(0), offer(1));
    let mut cards = vec![card(&own, 1), card(&other, 0)];
    let mut theirs = other.connect(&cards).unwrap();
    spoil(&mut cards[1]);
    let mut ours = own.connect(&cards).unwrap();
    let until = Instant::now() + Duration::from_secs(6);
    thread::scope(|scope| {
        scope.spawn(|| theirs.prove(until));
        ours.prove(until)
    })
}

#[test]
fn cards_that_are_cut_short_are_refused() {
    if !common::has_device() {
        return;
    }
    let other = offer(1);
    for bytes in 0..card(&other, 0).len() {
        let error = connect(&other, |card| card.truncate(bytes)).unwrap_err();
        assert!(matches!(error, VerbsError::Card(1, _)), "{bytes} bytes: {error}");
    }
}

/// An address is looked up, which takes a while: left alone here.
#[test]
fn cards_with_any_byte_wrong_are_refused_or_lead_nowhere() {
    if !common::has_device() {
        return;
    }
    let is_address = |at: &usize| (GID_AT..GID_AT + 16).contains(at);
    let other = offer(1);
    for at in (0..card(&other, 0).len()).filter(|at| !is_address(at)) {
        let connected = connect(&other, |card| card[at] ^= 0xff);
        let is_sane = match &connected {
            Err(VerbsError::Card(rank, _)) => *rank == 1,
            Err(VerbsError::Path(1, _)) | Ok(_) => true,
            Err(_) => false,
        };
        assert!(is_sane, "byte {at}: {connected:?}");
    }
}

#[test]
fn an_address_that_nobody_has_is_named_with_its_rank() {
    if !common::has_device() {
        return;
    }
    let error = connect(&offer(1), |card| card[GID_AT + 15] = 77).unwrap_err();
    let text = error.to_string();
    let names_it = ["rank 1", "192.0.2.77", "rxe0"].iter().all(|word| text.contains(word));
    assert!(names_it, "{text}");
}

#[test]
fn wrong_numbers_of_packets_or_queue_pairs_are_found_out_when_the_way_is_proven() {
    if !common::has_device() {
        return;
    }
    prove(|_| ()).unwrap();
    for at in [PSN_AT, PAIR_AT + 2] {
        let start = Instant::now();
        let error = prove(|card| card[at] ^= 0x40).unwrap_err();
        assert!(matches!(error.kind, LinkErrorKind::Unreachable(_)), "byte {at}: {error:?}");
        assert_eq!(error.peer, 1, "byte {at}");
        assert!(start.elapsed() < Duration::from_secs(60), "byte {at}: {:?}", start.elapsed());
    }
}
