//! Strangers at the ranks' ports: whatever they send, and however many they are, nobody is harmed.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::collections::VecDeque;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use support::{World, open_files_and_threads, reach, setting, tell};
use unisum::{Communicator, Message, Messenger, ReduceOp};
use unisum_link::handshake::{self, Build, Hello, Purpose, job_hash};

#[test]
fn rank_process() {
    support::run_if_rank(&[("work", work), ("join", join)]);
}

const LIMIT: Duration = Duration::from_secs(100);

/// What a stranger does once it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
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

const KINDS: [Kind; 9] = [
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
struct Flood {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<()>>,
    since: Instant,
}

impl Flood {
    /// As many threads as `kinds`; each visits all of `ports` in turn.
    fn new(ports: &[u16], kinds: &[Kind]) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let start = |&kind: &Kind| {
            let (ports, stop, made) = (ports.to_vec(), stop.clone(), made.clone());
            thread::spawn(move || flood(&ports, kind, &stop, &made))
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

fn flood(ports: &[u16], kind: Kind, stop: &AtomicBool, made: &AtomicUsize) {
    let mut held = VecDeque::new();
    for (_, port) in (0..MADE).zip(ports.iter().cycle()) {
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

/// What rank 1 of the job "flooded" would say to rank 0, which listens for it.
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
    let _ = handshake::greet(&mut wire, &hello);
    wire.0
}

/// Ports that were free a moment ago, one after the other.
fn free_ports(count: u16) -> Vec<u16> {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let range = first..first.saturating_add(count);
        let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if range.len() == usize::from(count) && range.clone().all(free) {
            return range.collect();
        }
    }
}

fn world(ranks: u16, scenario: &'static str) -> (World, Vec<u16>) {
    // A few more than ranks: others on this host may take one meanwhile.
    let ports = free_ports(ranks + 4);
    let (first, last) = (ports[1], ports[ports.len() - 1]);
    let world = World::new(ranks.into(), scenario)
        .set("UNISUM_RENDEZVOUS", format!("tcp://127.0.0.1:{}", ports[0]))
        .set("UNISUM_PORT_RANGE", format!("{first}-{last}"))
        .set("UNISUM_JOB", "flooded")
        .set("UNISUM_TRANSPORT", "tcp");
    (world, ports)
}

/// Joins, makes groups and messengers, and works, with strangers at all ports all the time.
fn work() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let sum = |communicator: &Communicator| {
        let mut data = vec![1_f32; 5000];
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert!(data.iter().all(|&it| it == communicator.world() as f32));
    };
    sum(&communicator);
    reach("joined");
    for round in 0..setting("ROUNDS").parse().unwrap() {
        sum(&communicator.duplicate().unwrap());
        let half = communicator.split(Some((rank % 2) as u32), 0).unwrap().unwrap();
        sum(&half);
        let messenger = Messenger::new(&communicator).unwrap();
        let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
        let (mut data, sent) = ([0_u32; 8], [round; 8]);
        let send = Message::Send { data: &sent, to: next, tag: 7 };
        messenger
            .exchange(&mut [send, Message::Receive { data: &mut data, from: last, tag: 7 }])
            .unwrap();
        assert_eq!(data, sent);
    }
    let until = Instant::now() + Duration::from_millis(500);
    let most = (0..).map(|_| {
        sum(&communicator);
        let mut over = [u8::from(Instant::now() >= until)];
        communicator.broadcast(&mut over, 0).unwrap();
        (open_files_and_threads().0, over[0] == 1)
    });
    let mut files = 0;
    for (open, is_over) in most {
        files = files.max(open);
        if is_over {
            break;
        }
    }
    tell(files);
    tell(resident_kib());
}

/// Memory of this process that is nobody else's.
fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn withstand(ranks: u16, rounds: usize, kinds: &[Kind]) {
    // One at a time: two floods would be another test.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (world, ports) = world(ranks, "work");
    let world = world.set("ROUNDS", rounds);
    let start = Instant::now();
    let flood = Flood::new(&ports, kinds);
    let told = world.succeed(LIMIT);
    println!("{ranks} ranks, {kinds:?}: {:?}, files and KiB {told:?}", start.elapsed());
    drop(flood);
    for lines in told {
        let (files, kib): (usize, usize) = (lines[0].parse().unwrap(), lines[1].parse().unwrap());
        // Guests, the sockets of two communicators, and what any process has.
        assert!(files < 128 + usize::from(ranks) * 3 + 40, "{files} descriptors");
        assert!(kib < 100 << 10, "{kib} KiB");
    }
}

#[test]
fn floods_of_one_kind_harm_nobody_at_the_start_in_groups_or_at_work() {
    // All of them take minutes: some, drawn anew each time, unless all are asked for.
    let all = std::env::var("UNISUM_TEST_ALL").is_ok();
    let seed = std::process::id() as usize;
    println!("seed {seed}");
    for (at, kind) in KINDS.into_iter().enumerate() {
        if all || (at + seed).is_multiple_of(4) {
            withstand(4, 4, &[kind; 3]);
        }
    }
}

#[test]
fn a_flood_of_all_kinds_harms_nobody() {
    withstand(8, 2, &[Kind::Silent, Kind::Claims, Kind::HalfHello, Kind::Reset]);
}

fn join() {
    Communicator::from_environment().unwrap().barrier().unwrap();
}

/// More strangers than descriptors, each of whom holds on to its connection.
#[test]
fn strangers_do_not_use_up_the_descriptors_of_a_rank() {
    let (world, ports) = world(3, "join");
    let mut running = world.clone().through(|_| limited()).start_ranks(&[0]);
    let flood = Flood::new(&ports[..1], &[Kind::Silent, Kind::HalfHello]);
    let until = Instant::now() + LIMIT;
    while flood.made.load(Ordering::Relaxed) < 500 {
        assert!(Instant::now() < until, "no flood");
        thread::sleep(Duration::from_millis(1));
    }
    for rank in 1..3 {
        running.add(&world, rank);
    }
    for ended in running.wait(LIMIT) {
        assert_eq!(ended.status, 0, "{ended:#?}");
    }
}

/// Runs a command with 64 descriptors.
fn limited() -> Vec<String> {
    ["sh", "-c", "ulimit -n 64; exec \"$0\" \"$@\""].map(str::to_owned).to_vec()
}
