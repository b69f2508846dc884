//! The suite that every transport passes, over loopback TCP.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::conformance::{End, Mesh};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Heard, Hello, Listening, Secret, random};
use unisum_link::{Call, Landing, LinkError, Region, Regions, Ticket};
use unisum_tcp::{Inbox, TcpConfig, TcpLink};

unisum_link::conformance_tests!(Mesh {
    connect: |world| ends(world, 1, "127.0.0.1:0"),
    // A peer that dies before its connection is there can't be seen: that is the control
    // connection's job.
    sees_peer_death: false,
});

/// The transfers between two ranks again, split over three sockets, over IPv6.
mod split_over_sockets {
    use super::*;

    const MESH: Mesh = Mesh { connect: |world| ends(world, 3, "[::1]:0"), sees_peer_death: false };

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
    let mut ends = ends(2, 1, "127.0.0.1:0").into_iter().map(|end| end.link);
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

fn ends(world: usize, sockets_per_peer: u8, address: &str) -> Vec<End> {
    let secret = Secret::new(b"the conformance suite's token");
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
            secret: secret.clone(),
            sockets_per_peer,
            connect_timeout: Duration::from_secs(10),
            heartbeat_timeout: Duration::from_secs(10),
        };
        let link = TcpLink::new(config).unwrap();
        accept(
            listener,
            link.inbox(),
            secret.clone(),
            (world - 1 - rank) * sockets_per_peer as usize,
        );
        End::new(Box::new(link))
    };
    listeners.into_iter().enumerate().map(connect).collect()
}

/// What the control thread does in a job: accepts, checks the token, delivers. The thread is left
/// behind if a case opens fewer connections than it could.
fn accept(listener: TcpListener, inbox: Arc<Inbox>, secret: Secret, expected: usize) {
    thread::spawn(move || {
        for _ in 0..expected {
            let (mut stream, _) = listener.accept().unwrap();
            let Hello { from, socket, .. } = admit(&mut stream, &secret);
            inbox.deliver(from as usize, socket, ParentOnly::new(stream));
        }
    });
}

fn admit(stream: &mut TcpStream, secret: &Secret) -> Hello {
    let mut listening = Listening::new(random().unwrap());
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        match listening.feed(&byte, secret, |_| Ok(())) {
            Heard::More => {}
            Heard::Send(bytes) => stream.write_all(&bytes).unwrap(),
            Heard::Admitted(hello, bytes) => {
                stream.write_all(&bytes).unwrap();
                return hello;
            }
            Heard::Refused(refusal, _) => panic!("{refusal:?}"),
        }
    }
}
