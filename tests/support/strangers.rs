//! Strangers at the ranks' ports, as many as can be.

// Each test binary uses its part of this module.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use unisum_link::handshake::{Build, Hello, Purpose, Secret, job_hash};
use unisum_link::secure::{self, Credentials, Sealing};

/// What a stranger does once it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Holds the connection and says nothing.
    Silent,
    /// Breaks it off at once.
    Reset,
    /// Speaks another protocol.
    Says(&'static [u8]),
    /// Says the first half of a hello.
    HalfHello,
    /// Says a whole hello, as a rank that is awaited would, and then nothing: it has no token.
    Claims,
    /// As that, but a byte at a time.
    Drips,
}

pub const KINDS: [Kind; 9] = [
    Kind::Silent,
    Kind::Reset,
    Kind::Says(b"GET / HTTP/1.1\r\nHost: unisum\r\n\r\n"),
    Kind::Says(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    Kind::Says(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    Kind::Says(&[0xff; 4096]),
    Kind::HalfHello,
    Kind::Claims,
    Kind::Drips,
];

/// Connections that each stranger's thread holds at a time, and makes in all: more could use up
/// the ports of this host.
const HELD: usize = 300;
const MADE: usize = 200_000;

/// Strangers at some ports, until they are dropped.
pub struct Flood {
    stop: Arc<AtomicBool>,
    pub made: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<()>>,
    since: Instant,
}

impl Flood {
    /// As many threads as `kinds`; each visits all of `ports` in turn.
    pub fn new(ports: &[u16], kinds: &[Kind]) -> Self {
        Self::of(ports, kinds, MADE)
    }

    /// As that, until each thread has made so many connections.
    pub fn of(ports: &[u16], kinds: &[Kind], most: usize) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let start = |&kind: &Kind| {
            let (ports, stop, made) = (ports.to_vec(), stop.clone(), made.clone());
            thread::spawn(move || flood(&ports, (kind, most), &stop, &made))
        };
        let threads = kinds.iter().map(start).collect();
        Self { stop, made, threads, since: Instant::now() }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        // Relaxed: it is only to be seen some time.
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
        let made = self.made.load(Ordering::Relaxed);
        println!("{made} strangers in {:?}", self.since.elapsed());
    }
}

fn flood(ports: &[u16], (kind, most): (Kind, usize), stop: &AtomicBool, made: &AtomicUsize) {
    let mut held = VecDeque::new();
    for (_, port) in (0..most).zip(ports.iter().cycle()) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let address = SocketAddr::from(([127, 0, 0, 1], *port));
        let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200))
        else {
            // Nobody listens there yet, or its queue is full.
            continue;
        };
        made.fetch_add(1, Ordering::Relaxed);
        // Neither end has to remember it: ports are not used up.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        // Whether it is turned away before it has said all is not its business.
        let _ = say(&mut stream, kind);
        if kind != Kind::Reset {
            held.push_back(stream);
        }
        if held.len() > HELD {
            held.pop_front();
        }
        if kind == Kind::Drips {
            drip(&mut held, made.load(Ordering::Relaxed));
        }
    }
}

fn say(stream: &mut TcpStream, kind: Kind) -> std::io::Result<()> {
    match kind {
        Kind::Silent | Kind::Reset | Kind::Drips => Ok(()),
        Kind::Says(bytes) => stream.write_all(bytes),
        Kind::HalfHello => stream.write_all(&hello()[..40]),
        Kind::Claims => stream.write_all(&hello()),
    }
}

/// One more byte on each connection.
fn drip(held: &mut VecDeque<TcpStream>, round: usize) {
    let hello = hello();
    for stream in held {
        let _ = stream.set_nonblocking(true);
        let _ = stream.write(&hello[round % 6..=round % 6]);
    }
}

/// What rank 1 of the job "flooded" would say first to rank 0, which listens for it.
fn hello() -> Vec<u8> {
    struct Wire(Vec<u8>);
    impl std::io::Write for Wire {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    impl std::io::Read for Wire {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Ok(0)
        }
    }
    let (purpose, job) = (Purpose::Control, job_hash("flooded"));
    let part = |text: &str| text.parse().unwrap();
    let version = [
        part(env!("CARGO_PKG_VERSION_MAJOR")),
        part(env!("CARGO_PKG_VERSION_MINOR")),
        part(env!("CARGO_PKG_VERSION_PATCH")),
    ];
    let sources = u64::from_str_radix(env!("SOURCES_OF_UNISUM"), 16).unwrap();
    let (session, build) = ([0; 16], Build { version, sources });
    let hello = Hello { purpose, socket: 0, from: 1, to: 0, world: 4, session, job, build };
    let mut wire = Wire(Vec::new());
    let secret = Secret::new(b"not the token of the job");
    let credentials = Credentials::token(secret, Sealing::Everywhere).unwrap();
    let _ = secure::greet(&mut wire, &hello, &credentials, true);
    wire.0
}
