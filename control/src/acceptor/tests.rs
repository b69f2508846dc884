use std::cell::Cell;
use std::thread;

use mio::{Events, Poll};
use unisum_link::handshake::{Build, Purpose, Secret};
use unisum_link::secure::{self, Sealing};

use super::super::listen;
use super::*;

const LIMIT: Duration = Duration::from_secs(30);
const LISTENER: usize = 0;
const HELLO: Hello = Hello {
    purpose: Purpose::Data,
    socket: 0,
    from: 1,
    to: 0,
    world: 2,
    session: [7; 16],
    job: [8; 16],
    build: Build { version: [0; 3], sources: 0 },
};

/// A rank that knows one session.
struct Rank {
    credentials: Credentials,
    awaits: Cell<bool>,
}

impl Host for Rank {
    fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    fn knows(&self, preamble: Preamble) -> bool {
        preamble == Preamble::of(self.credentials.secret(), &HELLO.session)
    }

    fn awaits_unknown(&self) -> bool {
        self.awaits.get()
    }

    fn admit(&self, _: &Hello) -> Result<(), Refusal> {
        Ok(())
    }
}

/// An acceptor, and the loop around it.
struct House {
    poll: Poll,
    events: Events,
    acceptor: Acceptor,
    rank: Rank,
    address: SocketAddr,
    /// How often the listeners woke the loop.
    preambles: usize,
}

fn credentials() -> Credentials {
    Credentials::token(Secret::new(b"a token of the tests"), Sealing::Everywhere).unwrap()
}

impl House {
    fn new() -> Self {
        let poll = Poll::new().unwrap();
        let towards = Some("127.0.0.1:1".parse().unwrap());
        let listening = listen::at_free_port(None, towards, None).unwrap();
        let address = listening.addresses[0];
        let acceptor = Acceptor::new(listening.listeners, LISTENER, 1, 2, poll.registry()).unwrap();
        let rank = Rank { credentials: credentials(), awaits: Cell::new(false) };
        Self { poll, events: Events::with_capacity(64), acceptor, rank, address, preambles: 0 }
    }

    /// Waits for so long, unless something happens, and does what there is to do.
    fn turn(&mut self, at_most: Duration) -> Option<Admitted> {
        let due =
            self.acceptor.deadline(Instant::now()).unwrap_or_else(|| Instant::now() + at_most);
        let time = due.saturating_duration_since(Instant::now()).min(at_most);
        self.poll.poll(&mut self.events, Some(time)).unwrap();
        let (now, registry) = (Instant::now(), self.poll.registry());
        let mut admitted = None;
        for event in &self.events {
            match event.token().0 {
                LISTENER => {
                    self.preambles += 1;
                    self.acceptor.readable();
                }
                token if self.acceptor.has_pending(token) => {
                    let visited = self.acceptor.visit(token, &self.rank, registry, now);
                    admitted = admitted.or(visited);
                }
                _ => {}
            }
        }
        self.acceptor.accept(&self.rank, registry, now);
        self.acceptor.sweep(registry, now);
        admitted
    }

    fn come(&self, says: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // It may be turned away before it has said all.
        let _ = stream.write_all(says);
        stream
    }

    /// Turns until `is_over`.
    fn turn_until(&mut self, is_over: impl Fn(&Self) -> bool) {
        let until = Instant::now() + LIMIT;
        while !is_over(self) {
            assert!(Instant::now() < until, "that does not come");
            self.turn(Duration::from_millis(1));
        }
    }

    /// Whether a stranger that came is turned away.
    fn turns_away(&mut self, mut stranger: TcpStream) -> bool {
        stranger.set_nonblocking(true).unwrap();
        let until = Instant::now() + LIMIT;
        loop {
            self.turn(Duration::from_millis(1));
            match stranger.read(&mut [0]) {
                Ok(0) => return true,
                Ok(_) => return false,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return true,
            }
            assert!(Instant::now() < until, "it hears nothing");
        }
    }
}

/// What somebody without the token says first who claims to be of that session.
fn first_words(session: [u8; 16]) -> Vec<u8> {
    struct Wire(Vec<u8>);
    impl Write for Wire {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Read for Wire {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
    }
    let mut wire = Wire(Vec::new());
    let _ = secure::greet(&mut wire, &Hello { session, ..HELLO }, &credentials(), true);
    wire.0
}

#[test]
fn who_does_not_speak_as_a_rank_is_never_kept() {
    let mut house = House::new();
    for says in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01", &[0xff; 4096]] {
        let before = house.acceptor.next_token;
        let stranger = house.come(says);
        assert!(house.turns_away(stranger), "{says:?}");
        assert_eq!(house.acceptor.next_token, before, "it was registered: {says:?}");
    }
}

#[test]
fn after_a_stranger_the_listeners_sleep_and_nobody_is_forgotten() {
    let mut house = House::new();
    let first = house.come(b"GET /");
    house.turn_until(|house| house.acceptor.is_napping);
    let (napping_until, preambles) = (house.acceptor.paused_until.unwrap(), house.preambles);
    assert!(napping_until <= Instant::now() + NAP);
    // Those who come now wake nobody, but are heard as soon as it is over.
    house.acceptor.paused_until = Some(Instant::now() + LIMIT);
    let others: Vec<_> = (0..5).map(|_| house.come(b"GET /")).collect();
    for _ in 0..20 {
        house.turn(Duration::from_millis(1));
    }
    assert_eq!(house.preambles, preambles);
    house.acceptor.paused_until = Some(Instant::now());
    for stranger in others.into_iter().chain([first]) {
        assert!(house.turns_away(stranger));
    }
    house.turn_until(|house| !house.acceptor.is_napping);
    let preambles = house.preambles;
    let last = house.come(b"GET /");
    assert!(house.turns_away(last) && house.preambles > preambles, "it is watched again");
}

#[test]
fn strangers_get_few_handshakes_and_neighbours_all() {
    let mut house = House::new();
    let words = first_words([1; 16]);
    let (mut heard, mut turned_away) = (0_u32, 0);
    let since = Instant::now();
    for _ in 0..100 {
        let stranger = house.come(&words);
        match house.turns_away(stranger) {
            true => turned_away += 1,
            false => heard += 1,
        }
    }
    let most = UNKNOWN_AT_ONCE as f64 + 1.0;
    let most = most + since.elapsed().as_secs_f64() * UNKNOWN_PER_SECOND;
    assert!(
        f64::from(heard) <= most && heard >= UNKNOWN_AT_ONCE as u32,
        "{heard} were heard, {most} at most"
    );
    assert!(turned_away > 0);
    house.acceptor.unknown.left = 0.0;
    house.acceptor.unknown.per_second = 0.0;
    let stranger = house.come(&words);
    assert!(house.turns_away(stranger));
    // Who awaits somebody hears everybody.
    house.rank.awaits.set(true);
    let stranger = house.come(&words);
    assert!(!house.turns_away(stranger));
    house.rank.awaits.set(false);
    // In the middle of strangers.
    let crowd: Vec<_> = (0..100).map(|_| house.come(&words)).collect();
    let address = house.address;
    let neighbour = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        secure::dial(&mut stream, &HELLO, &credentials(), true).map(|session| session.is_some())
    });
    let until = Instant::now() + LIMIT;
    let admitted = loop {
        assert!(Instant::now() < until, "the neighbour does not come in");
        if let Some(admitted) = house.turn(Duration::from_millis(1)) {
            break admitted;
        }
    };
    assert_eq!(admitted.hello, HELLO);
    assert!(neighbour.join().unwrap().unwrap());
    drop(crowd);
}

#[test]
fn an_allowance_fills_up_with_time() {
    let (mut allowance, now) = (Allowance::new(3, 2.0), Instant::now());
    let taken =
        |allowance: &mut Allowance, at: Instant| (0..9).filter(|_| allowance.take(at)).count();
    assert_eq!(taken(&mut allowance, now), 3);
    assert_eq!(taken(&mut allowance, now + Duration::from_millis(400)), 0);
    assert_eq!(taken(&mut allowance, now + Duration::from_millis(1100)), 2);
    assert_eq!(taken(&mut allowance, now + LIMIT), 3);
}
