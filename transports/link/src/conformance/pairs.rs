//! Transfers between two ranks: order, sizes, saturation, windows.

use std::ops::Range;

use super::Mesh;
use super::memory::pattern;
use super::port::{Port, call, run};
use crate::{Call, Landing, Rank, Ticket};
use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Folded};

const LANDINGS: [Landing; 2] = [Landing::Place, Landing::Slot];

/// Thousands of messages of mixed sizes cross in both directions at once; each arrives in its
/// place in the order, with its own bytes.
pub fn messages_arrive_in_order(mesh: &Mesh) {
    const SIZES: [usize; 8] = [1, 64, 3, 1000, 4096, 7, 20_000, 9001];
    const STRIDE: usize = 20_000;
    run(mesh, 2, 2 * SIZES.len() * STRIDE, |port| {
        let peer = 1 - port.rank;
        port.begin(call(0, STRIDE));
        for round in 0..400u64 {
            let mut tickets = Vec::new();
            for (index, &bytes) in SIZES.iter().enumerate() {
                let seed = round * 8 + index as u64;
                let (out, into) = (index * STRIDE, (SIZES.len() + index) * STRIDE);
                port.memory.write(out, &pattern(seed * 2 + port.rank as u64, bytes));
                let landing = LANDINGS[(seed / 3 % 2) as usize];
                let ticket = port.receive(peer, into..into + bytes, landing);
                tickets.push((ticket, into..into + bytes, landing, seed * 2 + peer as u64));
                let sent = port.send(peer, out..out + bytes);
                tickets.push((sent, 0..0, Landing::Place, 0));
            }
            finish(port, tickets);
        }
    });
}

/// Waits for tickets and checks what the receives (non-empty ranges) brought.
fn finish(port: &mut Port<'_>, tickets: Vec<(Ticket, Range<usize>, Landing, u64)>) {
    let all: Vec<Ticket> = tickets.iter().map(|(ticket, ..)| *ticket).collect();
    port.wait(&all);
    for (ticket, bytes, landing, seed) in tickets {
        if !bytes.is_empty() {
            let expected = pattern(seed, bytes.len());
            let taken = port.take(ticket, bytes.clone(), landing);
            assert!(taken == expected, "rank {}: {bytes:?} differ ({landing:?})", port.rank);
        }
    }
}

/// One message of `bytes` each way; all of the region is used: the first half is sent.
fn exchange(port: &mut Port<'_>, bytes: usize, landing: Landing, seed: u64) {
    let peer = 1 - port.rank;
    let half = port.memory.bytes() / 2;
    port.memory.write(0, &pattern(seed + port.rank as u64, bytes));
    let received = port.receive(peer, half..half + bytes, landing);
    let sent = port.send(peer, 0..bytes);
    let expected = seed + peer as u64;
    let into = half..half + bytes;
    finish(port, vec![(sent, 0..0, landing, 0), (received, into, landing, expected)]);
}

/// Sizes around every boundary a transport may have, up to many times any buffer.
pub fn every_size_arrives(mesh: &Mesh) {
    let mut sizes = vec![1, 2, 3, 7, 100, (1 << 20) | 1];
    for power in [6, 11, 12, 13, 14, 16, 17, 18] {
        sizes.extend([(1 << power) - 1, 1 << power, (1 << power) + 1]);
    }
    run(mesh, 2, 4 << 20, |port| {
        for (number, &bytes) in sizes.iter().enumerate() {
            port.begin(call(number as u64, bytes));
            for landing in LANDINGS {
                exchange(port, bytes, landing, bytes as u64);
            }
        }
    });
    run(mesh, 2, 128 << 20, |port| {
        port.begin(call(0, 1));
        exchange(port, 64 << 20, Landing::Place, 5);
    });
}

/// Every element type and operation, folded straight from where the message landed.
pub fn every_type_and_operation_folds_from_its_slot(mesh: &Mesh) {
    const COUNT: usize = 77;
    run(mesh, 2, 4 * COUNT * 8, |port| {
        let mut number = 0;
        for dtype in Dtype::ALL {
            for op in ReduceOp::ALL.into_iter().filter(|op| op.is_defined_for(dtype)) {
                let plan = Call { number, dtype, op, ..call(0, COUNT) };
                port.begin(plan);
                fold_exchanged(port, plan, COUNT);
                number += 1;
            }
        }
    });
}

fn fold_exchanged(port: &mut Port<'_>, call: Call, count: usize) {
    let bytes = count * call.dtype.bytes();
    let (peer, seed) = (1 - port.rank, call.number * 2);
    let mine = pattern(seed + port.rank as u64, bytes);
    let theirs = pattern(seed + peer as u64, bytes);
    port.memory.write(0, &mine);
    let received = port.receive(peer, 0..bytes, Landing::Slot);
    let sent = port.send(peer, 0..bytes);
    port.wait(&[received, sent]);
    let fold = Fold::new(call.dtype, call.op);
    let into = port.memory.region().pointer(&(0..bytes));
    // SAFETY: the region and the arrival hold `count` elements each, and the send is done.
    let outcome = unsafe { fold.run(into, &[into, port.link.arrived(received)], count) };
    assert_eq!(outcome, Folded::Done);
    port.link.release(received).expect("the peer is there");

    let (mut expected, other) = (words(&mine), words(&theirs));
    let into = expected.as_mut_ptr().cast::<u8>();
    // SAFETY: both vectors hold `bytes` bytes at least, aligned for every type.
    let outcome = unsafe { fold.run(into, &[into, other.as_ptr().cast()], count) };
    assert_eq!(outcome, Folded::Done);
    let expected = super::memory::copy(expected.as_ptr().cast(), bytes);
    assert_eq!(port.memory.read(0, bytes), expected, "{call}");
}

/// The bytes in memory that is aligned for every element type.
fn words(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    };
    bytes.chunks(8).map(word).collect()
}

/// Both ends send more than any buffer holds before either looks at what it receives.
pub fn saturated_directions_do_not_deadlock(mesh: &Mesh) {
    const BYTES: usize = 8 << 20;
    run(mesh, 2, 8 * BYTES, |port| {
        let peer = 1 - port.rank;
        port.begin(call(0, BYTES));
        let mut tickets = Vec::new();
        for index in 0..4 {
            let (out, into) = (index * BYTES, (4 + index) * BYTES);
            port.memory.write(out, &pattern((2 * index + port.rank) as u64, BYTES));
            tickets.push((port.send(peer, out..out + BYTES), 0..0, Landing::Place, 0));
            let (into, landing) = (into..into + BYTES, LANDINGS[index % 2]);
            let received = port.receive(peer, into.clone(), landing);
            tickets.push((received, into, landing, (2 * index + peer) as u64));
        }
        finish(port, tickets);
    });
}

/// Five ranks exchange with each other, several messages at once, small and large.
pub fn many_peers_at_once(mesh: &Mesh) {
    const WORLD: usize = 5;
    const STRIDE: usize = 100_000;
    run(mesh, WORLD, 2 * WORLD * STRIDE, |port| {
        for (number, bytes) in [3, 5000, STRIDE, 17, 4096, STRIDE / 2].into_iter().enumerate() {
            port.begin(call(number as u64, bytes));
            let peers: Vec<Rank> = (0..WORLD).filter(|&peer| peer != port.rank).collect();
            let mut tickets = Vec::new();
            for &peer in &peers {
                let into = (WORLD + peer) * STRIDE;
                let landing = LANDINGS[(peer + number) % 2];
                let received = port.receive(peer, into..into + bytes, landing);
                let seed = (peer * WORLD + port.rank) as u64;
                tickets.push((received, into..into + bytes, landing, seed));
            }
            for &peer in &peers {
                let out = peer * STRIDE;
                let seed = (port.rank * WORLD + peer) as u64;
                port.memory.write(out, &pattern(seed, bytes));
                tickets.push((port.send(peer, out..out + bytes), 0..0, Landing::Place, 0));
            }
            finish(port, tickets);
        }
    });
}

/// A window of receives is posted before anything is sent, and a window of sends before anything
/// is received; more of both than a link may have slots.
pub fn transfers_may_be_posted_ahead(mesh: &Mesh) {
    const WINDOW: usize = 48;
    for bytes in [100, 30_000] {
        run(mesh, 2, WINDOW * bytes, |port| {
            for (number, receiver_first) in [true, false].into_iter().enumerate() {
                port.begin(call(number as u64, bytes));
                let receives = port.rank == 0;
                if receives != receiver_first {
                    port.meet();
                }
                let tickets = post_window(port, WINDOW, bytes);
                if receives == receiver_first {
                    port.look().expect("nothing fails");
                    port.meet();
                }
                finish(port, tickets);
                port.meet();
            }
        });
    }
}

/// Rank 0 receives `window` messages, rank 1 sends them.
fn post_window(
    port: &mut Port<'_>,
    window: usize,
    bytes: usize,
) -> Vec<(Ticket, Range<usize>, Landing, u64)> {
    let mut tickets = Vec::new();
    for index in 0..window {
        let range = index * bytes..(index + 1) * bytes;
        if port.rank == 0 {
            let ticket = port.receive(1, range.clone(), LANDINGS[index % 2]);
            tickets.push((ticket, range, LANDINGS[index % 2], index as u64));
        } else {
            port.memory.write(range.start, &pattern(index as u64, bytes));
            tickets.push((port.send(0, range), 0..0, Landing::Place, 0));
        }
    }
    tickets
}

/// One rank runs ahead into the next calls; the other's receives still meet their own call.
pub fn calls_follow_each_other(mesh: &Mesh) {
    run(mesh, 2, 4096, |port| {
        for number in 0..500 {
            let bytes = 1 + (number as usize * 37) % 2048;
            port.begin(call(number, bytes));
            if port.rank == 0 {
                port.memory.write(0, &pattern(number, bytes));
                let sent = port.send(1, 0..bytes);
                port.wait(&[sent]);
            } else {
                let received = port.receive(0, 0..bytes, Landing::Place);
                port.wait(&[received]);
                assert_eq!(port.memory.read(0, bytes), pattern(number, bytes), "call {number}");
            }
        }
    });
}

/// What comes after a receive was taken back belongs to the next one; a receive of which something
/// has come stays. A link that can't take receives back says so, and they stay as well.
pub fn retracted_receives_leave_no_trace(mesh: &Mesh) {
    run(mesh, 2, 300, |port| {
        let peer = 1 - port.rank;
        port.begin(call(0, 100));
        for round in 0..100 {
            port.memory.write(0, &pattern(round, 100));
            let dropped = port.receive(peer, 100..200, Landing::Place);
            // The peer sends only after this.
            let kept = if port.link.retract(peer, dropped) {
                assert!(!port.link.retract(peer, dropped), "it was taken back already");
                port.receive(peer, 200..300, Landing::Place)
            } else {
                dropped
            };
            port.meet();
            let sent = port.send(peer, 0..100);
            port.wait(&[kept, sent]);
            assert!(!port.link.retract(peer, kept), "it is done");
            let into = if kept == dropped { 100 } else { 200 };
            assert!(port.memory.read(into, 100) == pattern(round, 100), "round {round}");
            assert!(kept == dropped || !port.is_done(dropped));
            port.meet();
        }
    });
}
