//! Meshes of links among the threads of one process.

use std::any::Any;
use std::thread;
use std::time::{Duration, Instant};

use unisum_link::conformance::{End, Memory};
use unisum_link::handshake::Secret;
use unisum_shm::{Candidate, Heap, Offer, ShmLink};

/// Connects `world` ranks; `adjust` may change what they are capable of.
pub(crate) fn links(world: usize, adjust: fn(Candidate) -> Candidate) -> Vec<ShmLink> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let secret = Secret::new(b"shm tests");
    let offers: Vec<Offer> = (0..world).map(|_| Offer::new(&secret).unwrap()).collect();
    let cards: Vec<Vec<u8>> = offers.iter().map(Offer::card).collect();
    let members: Vec<usize> = (0..world).collect();
    let connect = |rank: usize, offer: Offer| {
        let candidate = offer.join(rank, &cards, [7; 16], Some(1 << 30), deadline).unwrap();
        assert_eq!(candidate.leader(), 0);
        adjust(candidate).connect(&members, deadline).unwrap()
    };
    thread::scope(|scope| {
        let (offers, connect) = (offers.into_iter().enumerate(), &connect);
        let ranks: Vec<_> =
            offers.map(|(rank, offer)| scope.spawn(move || connect(rank, offer))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The links as ends for the conformance suite.
pub(crate) fn ends(world: usize, adjust: fn(Candidate) -> Candidate) -> Vec<End> {
    let end = |link: ShmLink| End {
        heap: Box::new(link.heap()),
        registered: Some(registered),
        link: Box::new(link),
    };
    links(world, adjust).into_iter().map(end).collect()
}

fn registered(heap: &dyn Any, bytes: usize) -> Memory {
    let block = heap.downcast_ref::<Heap>().unwrap().allocate(bytes).unwrap();
    let (address, offset) = (block.address(), block.offset());
    // SAFETY: the block is that long, and goes along as the owner.
    unsafe { Memory::registered(address, bytes, offset, Box::new(block)) }
}
