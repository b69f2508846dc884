//! How links end: mismatches, aborts, peers that vanish.

use std::time::{Duration, Instant};

use super::Mesh;
use super::memory::pattern;
use super::port::{Kind, PATIENCE, Port, call, run, run_on};
use crate::{Call, Landing, LinkErrorKind};

/// Ranks whose calls differ get an error that names both calls.
pub fn mismatched_calls_name_both(mesh: &Mesh) {
    for bytes in [8, 100_000] {
        run(mesh, 2, 1 << 20, |port| {
            let calls = [call(3, bytes), Call { algorithm: 9, ..call(3, bytes) }];
            let (ours, theirs) = (calls[port.rank], calls[1 - port.rank]);
            port.begin(ours);
            let sent = port.send(1 - port.rank, 0..bytes);
            let received = port.receive(1 - port.rank, bytes..2 * bytes, Landing::Place);
            let error = port.try_wait(&[sent, received]).expect_err("the calls differ");
            assert_eq!(error.peer, 1 - port.rank);
            assert_eq!(error.kind, LinkErrorKind::Mismatch { ours, theirs });
            // Nobody leaves before both have seen it: an abort may cut the connection.
            port.meet();
            port.link.abort();
        });
    }
}

/// After an abort the region belongs to its owner again: nothing that a peer does shows in it.
pub fn abort_leaves_the_region_alone(mesh: &Mesh) {
    const BYTES: usize = 8 << 20;
    run(mesh, 2, 2 * BYTES, |port| {
        let peer = 1 - port.rank;
        port.begin(call(0, BYTES));
        port.memory.write(0, &pattern(port.rank as u64, 2 * BYTES));
        let received = port.receive(peer, BYTES..2 * BYTES, Landing::Place);
        if port.rank == 1 {
            port.meet();
            // Whatever the link makes of it: the peer has aborted.
            let sent = port.try_send(0, 0..BYTES);
            let until = Instant::now() + Duration::from_millis(200);
            while sent.is_ok() && Instant::now() < until && port.look().is_ok() {
                if port.link.park(until, 1).is_err() {
                    break;
                }
            }
            port.link.abort();
        } else {
            port.look().expect("nothing fails");
            port.link.abort();
            port.link.abort();
            let own = pattern(7, 2 * BYTES);
            port.memory.write(0, &own);
            port.meet();
            port.meet();
            assert!(!port.is_done(received));
            assert!(port.memory.read(0, 2 * BYTES) == own, "an aborted region changed");
            return;
        }
        port.meet();
    });
}

/// The other end is dropped while transfers are posted: an error, or silence where the link can't
/// see it, but never a hang.
pub fn a_dropped_peer_hangs_nobody(mesh: &Mesh) {
    let sees = mesh.sees_peer_death;
    run_on(mesh, 3, 1 << 20, Kind::Private, &|port: &mut Port<'_>| {
        port.begin(call(0, 100));
        if port.rank == 2 {
            port.receive(0, 0..100_000, Landing::Place);
            port.leaves_early = true;
            return;
        }
        port.receive(2, 0..100_000, Landing::Place);
        let start = Instant::now();
        let within = if sees { PATIENCE } else { Duration::from_millis(200) };
        let mut error = port.try_send(2, 0..100_000).err();
        while error.is_none() && start.elapsed() < within {
            error = port.look().err();
            port.link
                .park((Instant::now() + within).min(start + within), 1)
                .expect("parking works");
        }
        assert!(start.elapsed() < within + Duration::from_secs(2), "a park overslept");
        assert!(!sees || error.is_some(), "nobody noticed that rank 2 is gone");
        assert!(error.is_none_or(|error| error.peer == 2));
        port.link.abort();
    });
}
