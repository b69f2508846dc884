//! What must hold of what ranks tell each other of their devices, whatever they tell.

use unisum_cuda_ipc::Handle;
use unisum_kernels::Dtype;
use unisum_link::Call;
use unisum_link::fuzzing::Target;

use super::card::{
    CARD_BYTES, Card, Exported, JoinCard, RETIRED_MAX, Refusal, RefusalKind, Spot, Via,
};
use super::post::Address;

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "device_card", check: check_card, seeds: card_seeds },
    Target { name: "device_join", check: check_join, seeds: join_seeds },
];

/// A card that is accepted fits into a card's bytes, and says there what it said, but for the ends
/// of long texts.
fn check_card(bytes: &[u8]) {
    // All cards have as many bytes: whoever gathers them says so.
    let mut whole = [0; CARD_BYTES];
    let length = bytes.len().min(CARD_BYTES);
    whole[..length].copy_from_slice(&bytes[..length]);
    let Some(card) = Card::decode(&whole) else { return };
    assert!(card.retired.len() <= RETIRED_MAX);
    let said = Card::decode(&card.encode()).expect("it was accepted");
    assert!(card.terms.starts_with(&said.terms));
    let mut again = Card { terms: card.terms.clone(), ..said };
    if let (Err(said), Err(told)) = (&mut again.memories, &card.memories) {
        assert!(told.text.starts_with(&said.text));
        said.text.clone_from(&told.text);
    }
    assert_eq!(again, card);
}

fn spot(id: u64) -> Spot {
    let handle = Handle([id as u8; 64]);
    let via = [Via::Ipc(handle), Via::Fabric(handle, 2 << 20), Via::Post(id)];
    Spot { of: Exported { id, base: id << 40, via: via[id as usize % 3] }, offset: 512 }
}

fn card_seeds() -> Vec<Vec<u8>> {
    let card = Card {
        call: Call::all_reduce(7, Dtype::Bf16, 1 << 20),
        terms: ", factor 0.5".into(),
        in_place: true,
        closed: 6,
        retired: vec![1, 2],
        scratch_bytes: 1 << 33,
        memories: Ok([Some(spot(1)), None, Some(spot(3))]),
    };
    let memories = Err(Refusal::new(RefusalKind::Device, "the device is lost"));
    vec![card.encode().to_vec(), Card { memories, ..card }.encode().to_vec()]
}

/// What a rank offers, if that is accepted, is told on by the same bytes.
fn check_join(bytes: &[u8]) {
    if let Some(card) = JoinCard::decode(bytes) {
        let said = card.encode();
        // The page begins where its allocation does.
        assert!(said == bytes || card.page.is_some() && said.len() == bytes.len());
        assert_eq!(JoinCard::decode(&said), Some(card));
    }
}

fn join_seeds() -> Vec<Vec<u8>> {
    let (process, ordinal, uuid, multiprocessors) = (1, 2, [3; 16], 132);
    let card = |page, door| JoinCard { process, ordinal, uuid, multiprocessors, page, door };
    let door = Address { name: [7; 16], token: [8; 16] };
    vec![card(Some(spot(5).of), Some(door)).encode(), card(None, None).encode()]
}
