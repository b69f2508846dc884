//! Links between threads of this process, over the machine's first RDMA device.

// Each test binary uses its part of this module.
#![allow(dead_code, unreachable_pub)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use unisum_link::conformance::{End, Memory};
use unisum_verbs::{Adopted, Offer, Registry, VerbsConfig, VerbsLink};

/// Whether there is an RDMA device. Where `UNISUM_TEST_RDMA` says `required`, there has to be.
pub fn has_device() -> bool {
    let active = unisum_verbs::ports().iter().any(|port| port.is_active());
    let required = std::env::var("UNISUM_TEST_RDMA").is_ok_and(|word| word == "required");
    assert!(active || !required, "no RDMA device is active: {:?}", unisum_verbs::ports());
    active
}

pub fn config() -> VerbsConfig {
    VerbsConfig { software: true, timeout: 14, ..VerbsConfig::default() }
}

/// Connected links, by rank; none where there is no device.
pub fn links(world: usize, config: &VerbsConfig) -> Vec<VerbsLink> {
    if !has_device() {
        return Vec::new();
    }
    let others = |rank| (0..world).filter(|&peer| peer != rank).collect::<Vec<_>>();
    let offers: Vec<Offer> = (0..world)
        .map(|rank| Offer::new(rank, world, &others(rank), config.clone()).unwrap())
        .collect();
    let links = connect(offers);
    let until = Instant::now() + Duration::from_secs(30);
    let prove = |mut link: VerbsLink| {
        thread::spawn(move || {
            link.prove(until).unwrap();
            link
        })
    };
    let proofs: Vec<_> = links.into_iter().map(prove).collect();
    proofs.into_iter().map(|proof| proof.join().unwrap()).collect()
}

/// Gives every offer the others' cards for it.
pub fn connect(offers: Vec<Offer>) -> Vec<VerbsLink> {
    let cards: Vec<Vec<Vec<u8>>> = offers.iter().map(Offer::cards).collect();
    let for_rank = |rank: usize| cards.iter().map(|cards| cards[rank].clone()).collect();
    let offers = offers.into_iter().enumerate();
    offers
        .map(|(rank, offer)| {
            let cards: Vec<Vec<u8>> = for_rank(rank);
            offer.connect(&cards).unwrap()
        })
        .collect()
}

/// [`links`] for the conformance suite.
pub fn ends(world: usize, config: &VerbsConfig) -> Vec<End> {
    let end = |link: VerbsLink| End {
        heap: Box::new(link.registry()),
        registered: Some(registered),
        link: Box::new(link),
    };
    links(world, config).into_iter().map(end).collect()
}

/// Registered pages of a test.
struct Block {
    _adopted: Adopted,
    pages: Pages,
}

struct Pages {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned.
unsafe impl Send for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `registered` with this layout; its registration is gone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

fn registered(heap: &dyn Any, bytes: usize) -> Memory {
    let registry: &Arc<Registry> = heap.downcast_ref().unwrap();
    let layout = Layout::from_size_align(bytes, 4096).unwrap();
    // SAFETY: the suite's sizes are not 0.
    let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
    // SAFETY: the pages are freed behind the registration.
    let adopted = unsafe { registry.adopt(start, bytes) }.unwrap();
    let block = Block { _adopted: adopted, pages: Pages { start, layout } };
    // SAFETY: the block owns the memory.
    unsafe { Memory::registered(block.pages.start, bytes, 0, Box::new(block)) }
}
