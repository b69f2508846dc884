//! A relay between a dialer and a listener, on which connections break.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

/// What becomes of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Pass,
    /// Each is reset at a random byte, up to about so many, at random in one of its directions.
    Break {
        bytes: u64,
    },
    /// Each is reset as it comes.
    Down,
    /// What comes is not passed on.
    Hold,
}

#[derive(Debug)]
struct State {
    fate: Fate,
    random: Random,
    /// Both ends of each connection.
    open: Vec<[TcpStream; 2]>,
    breaks: usize,
    /// What dialers said, by connection.
    said: Vec<Vec<u8>>,
}

/// The relay. Its threads end with the connections, and the one that accepts with the process.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    pub(crate) fn new(target: SocketAddr, fate: Fate, seed: u64) -> Self {
        let listener = TcpListener::bind((target.ip(), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (open, said) = (Vec::new(), Vec::new());
        let state = State { fate, random: Random(seed), open, breaks: 0, said };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        thread::spawn(move || {
            while let Ok((dialer, _)) = listener.accept() {
                take(dialer, target, &shared);
            }
        });
        Self { address, state }
    }

    /// From now on; connections that stand are reset if they would be.
    pub(crate) fn set(&self, fate: Fate) {
        let mut state = lock(&self.state);
        state.fate = fate;
        if fate == Fate::Down {
            state.break_all();
        }
    }

    /// Resets all connections.
    pub(crate) fn break_all(&self) {
        lock(&self.state).break_all();
    }

    pub(crate) fn breaks(&self) -> usize {
        lock(&self.state).breaks
    }

    pub(crate) fn said(&self) -> Vec<Vec<u8>> {
        lock(&self.state).said.clone()
    }
}

impl State {
    fn break_all(&mut self) {
        let open = std::mem::take(&mut self.open);
        self.breaks += open.len();
        open.iter().flatten().for_each(reset);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the other end see a reset, whoever else has this socket.
fn reset(stream: &TcpStream) {
    // Connecting to nowhere resets a connection at once (connect(2)); it may have ended by itself.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    let _ = rustix::net::connect_unspec(stream);
}

fn take(dialer: TcpStream, target: SocketAddr, shared: &Arc<Mutex<State>>) {
    let mut state = lock(shared);
    let (listener, place) = match TcpStream::connect(target) {
        Ok(listener) if state.fate != Fate::Down => (listener, state.said.len()),
        _ => return reset(&dialer),
    };
    [&dialer, &listener].into_iter().for_each(|it| it.set_nodelay(true).unwrap());
    state.said.push(Vec::new());
    // As many bytes pass in the direction that is the one.
    let breaks_at = match state.fate {
        Fate::Break { bytes } => Some(state.random.about(bytes)),
        _ => None,
    };
    let breaks_dialer = state.random.below(2) == 0;
    let copy = |stream: &TcpStream| stream.try_clone().unwrap();
    state.open.push([copy(&dialer), copy(&listener)]);
    drop(state);
    for is_dialer in [true, false] {
        let ends = [copy(&dialer), copy(&listener)];
        let relay = Relay {
            ends: if is_dialer {
                ends
            } else {
                let [a, b] = ends;
                [b, a]
            },
            breaks_at: breaks_at.filter(|_| is_dialer == breaks_dialer),
            said: is_dialer.then_some(place),
            shared: shared.clone(),
        };
        thread::spawn(move || relay.run());
    }
}

/// One direction of a connection.
struct Relay {
    ends: [TcpStream; 2],
    breaks_at: Option<u64>,
    said: Option<usize>,
    shared: Arc<Mutex<State>>,
}

impl Relay {
    fn run(self) {
        let (mut from, mut to) = (&self.ends[0], &self.ends[1]);
        let (mut bytes, mut passed) = (vec![0; 64 << 10], 0);
        while let Ok(read @ 1..) = from.read(&mut bytes) {
            let mut left = read;
            if let Some(at) = self.breaks_at {
                left = left.min((at - passed) as usize);
            }
            passed += left as u64;
            let mut state = lock(&self.shared);
            if let Some(place) = self.said
                && state.said[place].len() < 4 << 10
            {
                state.said[place].extend(&bytes[..left]);
            }
            let is_held = state.fate == Fate::Hold;
            if Some(passed) == self.breaks_at {
                state.breaks += 1;
            }
            drop(state);
            if !is_held && to.write_all(&bytes[..left]).is_err() {
                break;
            }
            if Some(passed) == self.breaks_at {
                return self.ends.iter().for_each(reset);
            }
        }
        // The other direction may go on.
        let _ = to.shutdown(Shutdown::Write);
    }
}

/// Xorshift (Marsaglia, 2003).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Up to `most`, small as often as large; at least 1.
    pub(crate) fn about(&mut self, most: u64) -> u64 {
        let bits = u64::from(most.ilog2());
        let top = 1 << self.below(bits + 1);
        1 + self.below(top)
    }
}
