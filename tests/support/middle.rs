//! Somebody in the middle: hosts whose every connection goes through this process, which sees all
//! bytes and may do to them what it likes.
//!
//! Each host is a network namespace whose one cable ends in a namespace of its own, where all the
//! other hosts' addresses are. There the middle listens in their place, and it connects to the host
//! that is meant from that host's own namespace, with the address of the one that connects. Neither
//! end can tell that it is not connected to the other.

#![allow(unreachable_pub)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use super::support::hosts::{namespace, sh};

/// What is done to a connection's bytes on their way in one direction, from some byte on.
#[derive(Clone, Debug)]
pub enum Change {
    /// This bit of the byte is another one.
    Flip(u8),
    /// The connection is cut.
    Cut,
    /// Nothing comes any more, but the connection stays.
    Withhold,
    /// So many bytes are left out.
    Drop(usize),
    /// The last bytes, so many, come once more.
    Repeat(usize),
    /// Two neighbouring pieces of so many bytes come in the other order.
    Swap(usize),
    /// These come in between.
    Inject(Vec<u8>),
    /// In place of all that follows come these bytes, of another connection or time.
    Replay(Vec<u8>),
    /// All that follows goes back to the one that sent it, and nothing to the other end.
    Reflect,
    /// The connection leads to another host than it should.
    Redirect,
    /// The other end hears that nothing more comes, and nothing does.
    End,
    /// All that follows comes so much later.
    Delay(Duration),
    /// What follows comes a byte at a time, so many of them.
    Trickle(usize),
    /// All that is said also comes on another connection, at the same time.
    Double,
}

impl Change {
    /// Whether the bytes of the connection are what they would be.
    pub const fn is_harmless(&self) -> bool {
        matches!(self, Self::Delay(_) | Self::Trickle(_) | Self::Double)
    }
}

/// In place of a connection's number: the first on which so much is said.
pub const ANY: usize = usize::MAX;

/// Where a change is made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of the connections, in the order in which they are made.
    pub connection: usize,
    /// What the one that connects sends, or the other one.
    pub is_of_dialer: bool,
    pub at: usize,
    pub change: Change,
}

/// What is done to each of the connections that are made once the plan, if there is one, was
/// carried out: from this number on, and so many.
#[derive(Clone, Debug)]
pub struct Later {
    pub from: usize,
    pub times: usize,
    pub is_of_dialer: bool,
    pub at: usize,
    pub change: Change,
}

/// What has come by since [`Middle::begin`].
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// By the number of the connection and whether its dialer said it.
    pub said: BTreeMap<(usize, bool), Vec<u8>>,
    /// Whether the change was made.
    pub is_changed: bool,
}

#[derive(Default)]
struct State {
    /// Connections of an earlier trial do not count.
    trial: u64,
    next: usize,
    plan: Option<Plan>,
    later: Option<Later>,
    seen: Seen,
    open: Vec<TcpStream>,
}

impl State {
    /// What is done to the connection of this number.
    fn plan_of(&mut self, connection: usize) -> Option<Plan> {
        let is_its = |plan: &&Plan| {
            plan.connection == connection || plan.connection == ANY && !self.seen.is_changed
        };
        if let Some(plan) = self.plan.as_ref().filter(is_its) {
            return Some(plan.clone());
        }
        let is_due = self.plan.is_none() || self.seen.is_changed;
        let later = self.later.as_mut().filter(|it| is_due && it.from <= connection)?;
        later.times = later.times.checked_sub(1)?;
        let Later { is_of_dialer, at, ref change, .. } = *later;
        Some(Plan { connection, is_of_dialer, at, change: change.clone() })
    }
}

/// The hosts, and what stands between them. Threads and namespaces end with it.
pub struct Middle {
    hosts: usize,
    state: Arc<Mutex<State>>,
}

/// The namespace at the other end of a host's cable.
fn opposite(host: usize) -> String {
    namespace(200 + host)
}

pub fn address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, host as u8 + 1)
}

impl Middle {
    /// Hosts of which each is reached by the others at these ports; `None` without root.
    pub fn new(hosts: usize, ports: RangeInclusive<u16>) -> Option<Self> {
        let middle = Self { hosts, state: Arc::default() };
        if let Err(why) = middle.set_up() {
            let required = std::env::var("UNISUM_TEST_NAMESPACES").is_ok_and(|v| v == "required");
            assert!(!required, "no network namespaces: {why}");
            println!("skipped: no network namespaces: {why}");
            return None;
        }
        for from in 0..hosts {
            let others = (0..hosts).filter(|&to| to != from);
            for (to, port) in others.flat_map(|to| ports.clone().map(move |port| (to, port))) {
                let at = SocketAddr::from((address(to), port));
                let listener = within(&opposite(from), move || TcpListener::bind(at).unwrap());
                let state = middle.state.clone();
                thread::spawn(move || {
                    enter(&opposite(to));
                    let other = (0..hosts).find(|&it| it != from && it != to);
                    take_calls(&listener, (from, other), at, &state);
                });
            }
        }
        Some(middle)
    }

    fn set_up(&self) -> Result<(), String> {
        for host in 0..self.hosts {
            let (name, other) = (namespace(host), opposite(host));
            for name in [&name, &other] {
                sh(&format!("ip netns add {name} && ip -n {name} link set lo up"))?;
            }
            let peer = format!("peer name port netns {other}");
            sh(&format!("ip -n {name} link add eth0 type veth {peer}"))?;
            sh(&format!("ip -n {name} addr add {}/24 dev eth0", address(host)))?;
            for to in (0..self.hosts).filter(|&to| to != host) {
                sh(&format!("ip -n {other} addr add {}/24 dev port", address(to)))?;
            }
            sh(&format!("ip -n {name} link set eth0 up"))?;
            sh(&format!("ip -n {other} link set port up"))?;
        }
        Ok(())
    }

    /// Forgets what was seen, ends what is open, and does this from now on.
    pub fn begin(&self, plan: Option<Plan>) {
        self.begin_both(plan, None);
    }

    /// The same, with what is done to later connections.
    pub fn begin_both(&self, plan: Option<Plan>, later: Option<Later>) {
        let mut state = lock(&self.state);
        let trial = state.trial + 1;
        state.open.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        *state = State { trial, plan, later, ..State::default() };
    }

    pub fn seen(&self) -> Seen {
        lock(&self.state).seen.clone()
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.begin(None);
        for host in 0..self.hosts {
            // They may not exist if setting up failed half-way.
            let _ = sh(&format!("ip netns del {}", namespace(host)));
            let _ = sh(&format!("ip netns del {}", opposite(host)));
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has this thread make its sockets in a namespace from now on.
fn enter(name: &str) {
    let file = File::open(format!("/run/netns/{name}")).unwrap();
    // SAFETY: it concerns this thread alone.
    let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "{name}: {}", io::Error::last_os_error());
}

fn within<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let name = name.to_owned();
    let run = move || {
        enter(&name);
        work()
    };
    thread::spawn(run).join().unwrap()
}

/// Passes on each connection from host `from`, as the one at `to`. The thread lasts until the test
/// binary ends, for a listener can't be interrupted.
fn take_calls(
    listener: &TcpListener,
    (from, other): (usize, Option<usize>),
    to: SocketAddr,
    state: &Arc<Mutex<State>>,
) {
    for dialer in listener.incoming() {
        let Ok(dialer) = dialer else { continue };
        let Ok(mut listener) = connect(from, to) else {
            // As if nobody listened there.
            let _ = SockRef::from(&dialer).set_linger(Some(Duration::ZERO));
            continue;
        };
        let (trial, number, plan) = {
            let mut state = lock(state);
            state.next += 1;
            let number = state.next - 1;
            let plan = state.plan_of(number);
            (state.trial, number, plan)
        };
        if let (Some(Plan { change: Change::Redirect, .. }), Some(other)) = (&plan, other) {
            let elsewhere = SocketAddr::from((address(other), to.port()));
            if let Ok(another) = within(&opposite(other), move || connect(from, elsewhere)) {
                listener = another;
                lock(state).seen.is_changed = true;
            }
        }
        let is_double = matches!(&plan, Some(Plan { change: Change::Double, .. }));
        let mut twin = if is_double { connect(from, to).ok() } else { None };
        // Whoever does not read there holds nothing up.
        twin.iter().for_each(|twin| twin.set_nonblocking(true).unwrap());
        for is_of_dialer in [true, false] {
            let twin = if is_of_dialer { twin.take() } else { None };
            let (one, two) = (dialer.try_clone().unwrap(), listener.try_clone().unwrap());
            let (from, to) = if is_of_dialer { (one, two) } else { (two, one) };
            let plan = plan.clone().filter(|plan| plan.is_of_dialer == is_of_dialer);
            let (state, key) = (state.clone(), (trial, number, is_of_dialer));
            lock(&state).open.push(from.try_clone().unwrap());
            thread::spawn(move || {
                // It ends as one of the ends does.
                let _ = Way { from: &from, to: &to, twin, state, key }.pass_on(plan);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    }
}

fn connect(from: usize, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let own = SocketAddr::from((IpAddr::from(address(from)), 0));
    socket.bind(&own.into())?;
    socket.connect(&to.into())?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

/// One direction of a connection.
struct Way<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    /// Another connection that leads to the same end.
    twin: Option<TcpStream>,
    state: Arc<Mutex<State>>,
    key: (u64, usize, bool),
}

impl Way<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        let mut state = lock(&self.state);
        if state.trial == self.key.0 {
            let said = state.seen.said.entry((self.key.1, self.key.2)).or_default();
            said.extend_from_slice(&buffer[..read]);
        }
        Ok(read)
    }

    fn changed(&self) {
        lock(&self.state).seen.is_changed = true;
    }

    fn pass_on(&mut self, mut plan: Option<Plan>) -> io::Result<()> {
        let mut through = Vec::new();
        let mut passed = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = self.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            if let Some(twin) = &mut self.twin {
                // It may be refused before all is said.
                let _ = twin.write_all(&buffer[..read]);
            }
            if lock(&self.state).seen.is_changed {
                // Of any connection, another one has come so far.
                plan = plan.filter(|plan| plan.connection != ANY);
            }
            let until_change = plan.as_ref().map(|plan| plan.at.saturating_sub(passed));
            match until_change.filter(|&until| until < read) {
                Some(until) => {
                    self.to.write_all(&buffer[..until])?;
                    through.extend_from_slice(&buffer[..until]);
                    let change = plan.take().expect("it is due").change;
                    let rest = buffer[until..read].to_vec();
                    self.change(change, rest, &through)?;
                }
                None => {
                    self.to.write_all(&buffer[..read])?;
                    if plan.is_some() {
                        through.extend_from_slice(&buffer[..read]);
                    }
                }
            }
            passed += read;
        }
    }

    /// Makes the change in place of `rest`, which has come, after `through`, which was passed on.
    fn change(&mut self, change: Change, mut rest: Vec<u8>, through: &[u8]) -> io::Result<()> {
        self.changed();
        let mut all = through.to_vec();
        all.push(rest[0]);
        match change {
            Change::Flip(bit) => {
                rest[0] ^= 1 << bit;
                self.to.write_all(&rest)
            }
            Change::Cut => {
                self.from.shutdown(Shutdown::Both)?;
                self.to.shutdown(Shutdown::Both)
            }
            Change::Withhold => self.swallow(),
            Change::Drop(bytes) => {
                let rest = self.fill(rest, bytes + 1)?;
                self.to.write_all(&rest[bytes..])
            }
            Change::Repeat(bytes) => {
                self.to.write_all(&rest[..1])?;
                self.to.write_all(&all[all.len().saturating_sub(bytes)..])?;
                self.to.write_all(&rest[1..])
            }
            Change::Swap(bytes) => {
                let rest = self.fill(rest, 2 * bytes)?;
                self.to.write_all(&rest[bytes..2 * bytes])?;
                self.to.write_all(&rest[..bytes])?;
                self.to.write_all(&rest[2 * bytes..])
            }
            Change::Inject(bytes) => {
                self.to.write_all(&bytes)?;
                self.to.write_all(&rest)
            }
            Change::Replay(bytes) => {
                self.to.write_all(&bytes)?;
                self.swallow()
            }
            Change::Reflect => {
                let mut from = self.from;
                from.write_all(&rest)?;
                io::copy(&mut from, &mut &*self.from).map(drop)
            }
            // It was made as the connection was.
            Change::Redirect | Change::Double => self.to.write_all(&rest),
            Change::End => {
                self.to.shutdown(Shutdown::Write)?;
                self.swallow()
            }
            Change::Delay(time) => {
                thread::sleep(time);
                self.to.write_all(&rest)
            }
            Change::Trickle(bytes) => {
                let (slow, all) = rest.split_at(bytes.min(rest.len()));
                slow.chunks(1).try_for_each(|byte| self.to.write_all(byte))?;
                self.to.write_all(all)
            }
        }
    }

    /// Reads until there are so many bytes.
    fn fill(&mut self, mut rest: Vec<u8>, bytes: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; 4096];
        while rest.len() < bytes {
            let read = self.read(&mut buffer)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest.extend_from_slice(&buffer[..read]);
        }
        Ok(rest)
    }

    fn swallow(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }
}
