//! The suite that every transport passes, over loopback TCP.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use std::net::{SocketAddr, TcpListener};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::conformance::{End, Mesh};
use unisum_link::handshake::Secret;
use unisum_link::secure::Credentials;
#[cfg(feature = "tls")]
use unisum_link::secure::Sealing;
use unisum_link::{Call, Landing, LinkError, Region, Regions, Ticket};
use unisum_tcp::{TcpConfig, TcpLink};

unisum_link::conformance_tests!(Mesh {
    connect: |world| ends(world, 1, "127.0.0.1:0", &clear()),
    // A peer that dies before its connection is there can't be seen: that is the control
    // connection's job.
    sees_peer_death: false,
});

/// The transfers between two ranks again, split over three sockets, over IPv6.
mod split_over_sockets {
    use super::*;

    const MESH: Mesh =
        Mesh { connect: |world| ends(world, 3, "[::1]:0", &clear()), sees_peer_death: false };

    unisum_link::conformance_tests!(@cases MESH;
        messages_arrive_in_order
        every_size_arrives
        saturated_directions_do_not_deadlock
        many_peers_at_once
        transfers_may_be_posted_ahead
        mismatched_calls_name_both
        abort_leaves_the_region_alone
        a_dropped_peer_hangs_nobody
    );
}

/// All of it again, encrypted.
#[cfg(feature = "tls")]
mod encrypted {
    use super::*;

    unisum_link::conformance_tests!(Mesh {
        connect: |world| ends(world, 1, "127.0.0.1:0", &encrypted()),
        sees_peer_death: false,
    });

    mod split_over_sockets {
        use super::*;

        const MESH: Mesh = Mesh {
            connect: |world| ends(world, 3, "[::1]:0", &encrypted()),
            sees_peer_death: false,
        };

        unisum_link::conformance_tests!(@cases MESH;
            messages_arrive_in_order
            every_size_arrives
            saturated_directions_do_not_deadlock
            many_peers_at_once
            transfers_may_be_posted_ahead
            mismatched_calls_name_both
            abort_leaves_the_region_alone
            a_dropped_peer_hangs_nobody
        );
    }

    #[test]
    fn a_connected_peer_that_goes_is_noticed_at_once() {
        notices_a_peer_that_goes(&encrypted());
    }
}

/// All of it on connections that would be dialled anew.
mod reconnecting {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    unisum_link::conformance_tests!(Mesh {
        connect: |world| ends_that_reconnect(world, 1, "127.0.0.1:0", &clear(), LIMIT),
        sees_peer_death: false,
    });

    mod split_over_sockets {
        use super::*;

        unisum_link::conformance_tests!(Mesh {
            connect: |world| ends_that_reconnect(world, 3, "[::1]:0", &clear(), LIMIT),
            sees_peer_death: false,
        });
    }

    #[cfg(feature = "tls")]
    mod encrypted {
        use super::*;

        unisum_link::conformance_tests!(Mesh {
            connect: |world| ends_that_reconnect(world, 2, "127.0.0.1:0", &encrypted(), LIMIT),
            sees_peer_death: false,
        });
    }
}

fn clear() -> Credentials {
    Credentials::clear(Secret::new(b"the conformance suite's token"))
}

#[cfg(feature = "tls")]
fn encrypted() -> Credentials {
    let secret = Secret::new(b"the conformance suite's token");
    Credentials::token(secret, Sealing::Everywhere).unwrap()
}

#[test]
fn a_connected_peer_that_goes_is_noticed_at_once() {
    notices_a_peer_that_goes(&clear());
}

fn notices_a_peer_that_goes(credentials: &Credentials) {
    let mut ends = ends(2, 1, "127.0.0.1:0", credentials).into_iter().map(|end| end.link);
    let (mut here, mut there) = (ends.next().unwrap(), ends.next().unwrap());
    let mut memory = [[1_u8; 64]; 2];
    let [ours, theirs] = memory.each_mut().map(|memory| {
        // SAFETY: the array outlives both links' use of it, and nothing else touches it.
        unsafe { Region::new(NonNull::from(memory).cast(), 64, None) }
    });
    here.begin(&call(), &Regions::in_place(ours));
    there.begin(&call(), &Regions::in_place(theirs));
    here.receive(1, ours, Landing::Place, Ticket(1)).unwrap();
    there.send(0, theirs, Ticket(2)).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let (mut received, mut sent) = (Vec::new(), Vec::new());
    while received.is_empty() || sent.is_empty() {
        here.progress(&mut received).unwrap();
        there.progress(&mut sent).unwrap();
        assert!(Instant::now() < until);
    }
    here.receive(1, ours, Landing::Place, Ticket(3)).unwrap();
    drop(there);
    let error = loop {
        if let Err(error) = here.progress(&mut received) {
            break error;
        }
        here.park(until, 1).unwrap();
        assert!(Instant::now() < until, "nobody noticed");
    };
    assert_eq!(error, LinkError::closed(1));
}

fn call() -> Call {
    Call::all_reduce(0, Dtype::U8, 64)
}

fn ends(world: usize, sockets_per_peer: u8, address: &str, credentials: &Credentials) -> Vec<End> {
    ends_that_reconnect(world, sockets_per_peer, address, credentials, Duration::ZERO)
}

fn ends_that_reconnect(
    world: usize,
    sockets_per_peer: u8,
    address: &str,
    credentials: &Credentials,
    reconnect_timeout: Duration,
) -> Vec<End> {
    let listeners: Vec<TcpListener> =
        (0..world).map(|_| TcpListener::bind(address).unwrap()).collect();
    let addresses: Vec<SocketAddr> =
        listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let connect = |(rank, listener): (usize, TcpListener)| {
        let config = TcpConfig {
            rank,
            routes: addresses.iter().map(|&address| Arc::new(address.into())).collect(),
            session: [7; 16],
            job: [8; 16],
            credentials: credentials.clone(),
            sockets_per_peer,
            connect_timeout: Duration::from_secs(10),
            heartbeat_timeout: Duration::from_secs(10),
            reconnect_timeout,
        };
        let link = TcpLink::new(config).unwrap();
        common::accept(
            listener,
            link.inbox(),
            credentials.clone(),
            (world - 1 - rank) * sockets_per_peer as usize,
        );
        End::new(Box::new(link))
    };
    listeners.into_iter().enumerate().map(connect).collect()
}
