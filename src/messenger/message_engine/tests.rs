use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Heard, Secret, random};
use unisum_link::secure::{Credentials, Listening};
use unisum_tcp::{Route, TcpConfig, TcpLink};

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

fn credentials() -> Credentials {
    Credentials::clear(Secret::new(b"a token of the tests"))
}

fn link(rank: Rank, addresses: [SocketAddr; 2]) -> TcpLink {
    let config = TcpConfig {
        rank,
        routes: addresses.map(|it| Arc::new(Route::from(it))).to_vec(),
        session: [1; 16],
        job: [2; 16],
        credentials: credentials(),
        sockets_per_peer: 1,
        connect_timeout: LIMIT,
        heartbeat_timeout: LIMIT,
        reconnect_timeout: Duration::ZERO,
    };
    TcpLink::new(config).unwrap()
}

fn engine(rank: Rank, link: TcpLink) -> MessageEngine {
    let links = Links { all: vec![Box::new(link)], route: vec![0; 2], group: None };
    MessageEngine::new((rank, 2), (0, None), links, Patience::MEMORY)
}

/// Begins a call of one operation with the other rank.
fn post(engine: &mut MessageEngine, receives: bool, data: &mut [f32]) -> CallNumber {
    let call = engine.open(1, Instant::now() + LIMIT);
    // SAFETY: the data outlives the engine, or is left alone until it is aborted.
    let memory = unsafe { memory::to_receive(data) };
    let envelope = Envelope { tag: 7, dtype: Dtype::F32, bytes: size_of_val(data) as u64 };
    let peer = 1 - engine.rank;
    engine.post(Posted { call, peer, receives, envelope, memory }).unwrap();
    call
}

/// Hears a dialer up to its proof; the answer that lets it in is not sent yet.
fn hear(stream: &mut TcpStream) -> Vec<u8> {
    let mut listening = Listening::new(random().unwrap(), true);
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        match listening.feed(&byte, &credentials(), |_| Ok(())) {
            Heard::More => {}
            Heard::Send(send) => stream.write_all(&send).unwrap(),
            Heard::Admitted(_, answer) => return answer,
            Heard::Refused(refusal, _) => panic!("{refusal}"),
        }
    }
}

/// The sender takes the connection, sends and leaves, all before the receiver, which dials, hears
/// that it is connected. The message is heard all the same.
#[test]
fn what_was_sent_before_leaving_is_heard_though_the_connection_is_not_known_yet() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = [listener.local_addr().unwrap(), SocketAddr::from(([127, 0, 0, 1], 9))];
    let mut receiver = engine(1, link(1, addresses));
    let (mut longer, mut sent) = ([0.0; 11], [1.0; 10]);
    post(&mut receiver, true, &mut longer);
    // Dials.
    assert!(receiver.advance().unwrap());
    assert!(receiver.is_unheard(0));

    let (mut stream, _) = listener.accept().unwrap();
    let answer = hear(&mut stream);
    let has_left = |rank| rank == 0;
    // The sender has the connection, could send, and leave.
    assert!(!receiver.advance().unwrap());
    assert_eq!(receiver.gone(has_left), None, "it is not known what it sent");
    stream.write_all(&answer).unwrap();

    let link = link(0, addresses);
    link.inbox().deliver(1, 0, ParentOnly::new(stream).into());
    let mut sender = engine(0, link);
    let call = post(&mut sender, false, &mut sent);
    let until = Instant::now() + LIMIT;
    while !sender.is_done(call) {
        assert!(Instant::now() < until, "the message does not go");
        sender.advance().unwrap();
    }
    drop(sender);
    loop {
        assert!(Instant::now() < until, "nothing came");
        assert_eq!(receiver.gone(has_left), None, "what it sent is not read yet");
        match receiver.advance() {
            Ok(_) => {}
            Err(Failure::Mismatch(0, ours, theirs)) => {
                assert_eq!((ours.bytes, theirs.bytes), (44, 40));
                break;
            }
            Err(failure) => panic!("{failure:?}"),
        }
    }
    receiver.abort();
}

/// Where nobody answers any more, and no connection is under way, leaving counts.
#[test]
fn a_rank_that_left_and_never_connected_is_gone() {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 9));
    let mut receiver = engine(0, link(0, [nowhere; 2]));
    post(&mut receiver, true, &mut [0.0; 3]);
    receiver.advance().unwrap();
    assert_eq!(receiver.gone(|_| false), None);
    assert_eq!(receiver.gone(|rank| rank == 1), Some(1));
    receiver.abort();
}
