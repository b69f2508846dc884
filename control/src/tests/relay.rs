//! Something between the ranks that relays their connections, and cuts them.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::SockRef;

/// How a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Both ends are told that it was reset.
    Reset,
    /// Both ends are told that the other one has closed it.
    Close,
    /// The dialer is told that it was reset; the listener notices when it asks.
    ResetDialer,
    /// The same for the listener.
    ResetListener,
}

struct State {
    target: SocketAddr,
    /// How often all connections were cut, and how the last time.
    cuts: AtomicU64,
    how: Mutex<How>,
    /// Nothing comes through, and new connections are taken and nothing more.
    is_down: AtomicBool,
    /// Nothing comes through the connections there are.
    is_held: AtomicBool,
    is_over: AtomicBool,
    relayed: AtomicU64,
    /// Those of them that are open.
    carried: AtomicU64,
}

impl State {
    /// Whether connections are cut that came after so many cuts.
    fn is_cut(&self, cuts: u64) -> bool {
        self.is_over.load(Ordering::SeqCst) || self.cuts.load(Ordering::SeqCst) != cuts
    }
}

/// Relays connections to its address to another one, until dropped.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    accepting: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens on a free port of this address.
    pub(crate) fn new(at: IpAddr, target: SocketAddr) -> Self {
        let listener = TcpListener::bind((at, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            target,
            cuts: AtomicU64::new(0),
            how: Mutex::new(How::Reset),
            is_down: AtomicBool::new(false),
            is_held: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            relayed: AtomicU64::new(0),
            carried: AtomicU64::new(0),
        });
        let shared = Arc::clone(&state);
        let accepting = Some(thread::spawn(move || accept(&listener, &shared)));
        Self { address, state, accepting }
    }

    /// Cuts all connections that there are.
    pub(crate) fn cut(&self, how: How) {
        *self.state.how.lock().unwrap() = how;
        self.state.cuts.fetch_add(1, Ordering::SeqCst);
    }

    /// Cuts all connections, and lets none through any more.
    pub(crate) fn go_down(&self) {
        self.state.is_down.store(true, Ordering::SeqCst);
        self.cut(How::Reset);
    }

    /// Lets nothing through, or goes on.
    pub(crate) fn hold(&self, hold: bool) {
        self.state.is_held.store(hold, Ordering::SeqCst);
    }

    /// Connections to the other side that were made so far.
    pub(crate) fn relayed(&self) -> u64 {
        self.state.relayed.load(Ordering::SeqCst)
    }

    /// Whether any connection goes through it at the moment.
    pub(crate) fn carries(&self) -> bool {
        self.state.carried.load(Ordering::SeqCst) > 0
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        // Whoever accepts is woken, and looks; the others look now and then.
        let _ = TcpStream::connect(self.address);
        self.accepting.take().unwrap().join().unwrap();
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    let mut threads = Vec::new();
    loop {
        let (dialer, _) = listener.accept().unwrap();
        if state.is_over.load(Ordering::SeqCst) {
            threads.into_iter().for_each(|it: JoinHandle<()>| it.join().unwrap());
            return;
        }
        let state = Arc::clone(state);
        threads.push(thread::spawn(move || relay(dialer, &state)));
    }
}

fn relay(dialer: TcpStream, state: &State) {
    let cuts = state.cuts.load(Ordering::SeqCst);
    if state.is_down.load(Ordering::SeqCst) {
        while !state.is_cut(cuts) {
            thread::sleep(Duration::from_millis(5));
        }
        return;
    }
    // Who is not there is not there for the dialer either.
    let Ok(listener) = TcpStream::connect(state.target) else { return };
    state.relayed.fetch_add(1, Ordering::SeqCst);
    state.carried.fetch_add(1, Ordering::SeqCst);
    carry([dialer, listener], state, cuts);
    state.carried.fetch_sub(1, Ordering::SeqCst);
}

/// Relays what the two ends of a connection say, until it ends or has been cut more often than
/// `cuts` times.
fn carry(mut ends: [TcpStream; 2], state: &State, cuts: u64) {
    for end in &ends {
        end.set_nonblocking(true).unwrap();
        end.set_nodelay(true).unwrap();
    }
    // What has come from each end and did not go to the other yet.
    let mut under_way = [Vec::new(), Vec::new()];
    let mut are_open = [true, true];
    while !state.is_cut(cuts) {
        if state.is_held.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        let mut has_moved = false;
        for (from, under_way) in under_way.iter_mut().enumerate() {
            let Some(moved) = step(&mut ends, under_way, &mut are_open, from) else {
                return;
            };
            has_moved |= moved;
        }
        if are_open == [false, false] {
            return;
        }
        if !has_moved {
            thread::sleep(Duration::from_micros(500));
        }
    }
    // A part of what is under way still gets through.
    let how = *state.how.lock().unwrap();
    for from in 0..2 {
        let part = under_way[from].len() * (cuts as usize % 4) / 3;
        let _ = ends[1 - from].write(&under_way[from][..part]);
    }
    let [dialer, listener] = &ends;
    let reset = |end: &TcpStream| SockRef::from(end).set_linger(Some(Duration::ZERO)).unwrap();
    match how {
        How::Close => {}
        How::Reset => [dialer, listener].into_iter().for_each(reset),
        How::ResetDialer | How::ResetListener => {
            let [first, second] = ends;
            let (told, other) =
                if how == How::ResetDialer { (first, second) } else { (second, first) };
            reset(&told);
            drop(told);
            // The other one asks once a second.
            thread::sleep(Duration::from_millis(300));
            reset(&other);
        }
    }
}

/// Moves what can be moved in one direction, in small pieces; `None` if an end was reset.
fn step(
    ends: &mut [TcpStream; 2],
    under_way: &mut Vec<u8>,
    are_open: &mut [bool; 2],
    from: usize,
) -> Option<bool> {
    let mut has_moved = false;
    if are_open[from] && under_way.len() < 4096 {
        let mut buffer = [0; 1500];
        match ends[from].read(&mut buffer) {
            Ok(0) => are_open[from] = false,
            Ok(read) => under_way.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
        has_moved = true;
        if !are_open[from] && under_way.is_empty() {
            let _ = ends[1 - from].shutdown(std::net::Shutdown::Write);
        }
        has_moved &= !under_way.is_empty();
    }
    if !under_way.is_empty() {
        match ends[1 - from].write(under_way) {
            Ok(written) => drop(under_way.drain(..written)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
        if !are_open[from] && under_way.is_empty() {
            let _ = ends[1 - from].shutdown(std::net::Shutdown::Write);
        }
    }
    Some(has_moved)
}
