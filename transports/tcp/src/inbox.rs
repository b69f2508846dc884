//! Where connections arrive: those that peers opened, and those that this rank dials.
//!
//! Dialling and its handshake block, so a thread does them; the thread ends when nothing is left
//! to dial. The link finds finished connections here and never blocks on one.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{self, Hello, Secret};
use unisum_link::{LinkError, LinkErrorKind, Rank, Wake};

use crate::congestion;

/// The entrance for connections that proved the job token. Shared with the thread that accepts.
#[derive(Debug)]
pub struct Inbox {
    waker: Arc<dyn Wake>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    arrived: Vec<Arrived>,
    to_dial: VecDeque<Dial>,
    dialler_runs: bool,
    /// A second handle of the connection being dialled, so that closing interrupts its handshake.
    dialling: Option<ParentOnly<TcpStream>>,
}

/// A finished or failed connection.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) peer: Rank,
    pub(crate) socket: u8,
    pub(crate) result: Result<ParentOnly<TcpStream>, LinkError>,
}

/// A connection to open.
#[derive(Debug)]
pub(crate) struct Dial {
    pub(crate) address: SocketAddr,
    pub(crate) is_on_this_host: bool,
    pub(crate) hello: Hello,
    pub(crate) secret: Secret,
    pub(crate) timeout: Duration,
}

impl Inbox {
    pub(crate) fn new(waker: Arc<dyn Wake>) -> Self {
        Self { waker, state: Mutex::default() }
    }

    /// Takes over a connection that `peer` opened as its `socket`-th to this rank, and whose
    /// handshake is done.
    pub fn deliver(&self, peer: Rank, socket: u8, stream: ParentOnly<TcpStream>) {
        self.put(Arrived { peer, socket, result: Ok(stream) });
    }

    fn put(&self, arrived: Arrived) {
        let mut state = self.lock();
        if !state.closed {
            state.arrived.push(arrived);
            drop(state);
            self.waker.wake();
        }
    }

    pub(crate) fn take(&self) -> Vec<Arrived> {
        std::mem::take(&mut self.lock().arrived)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().arrived.is_empty()
    }

    /// Opens a connection in the background; it arrives here like any other.
    pub(crate) fn dial(self: &Arc<Self>, dial: Dial) -> Result<(), LinkError> {
        let peer = dial.hello.to as Rank;
        let mut state = self.lock();
        state.to_dial.push_back(dial);
        if !state.dialler_runs {
            let inbox = Arc::clone(self);
            thread::Builder::new()
                .name("unisum-dial".into())
                .spawn(move || inbox.run_dialler())
                .map_err(|error| LinkError::os(peer, "starting a thread to dial", error))?;
            state.dialler_runs = true;
        }
        Ok(())
    }

    fn run_dialler(&self) {
        while let Some(dial) = self.next_dial() {
            let (peer, socket) = (dial.hello.to as Rank, dial.hello.socket);
            let result = self.open(&dial);
            self.lock().dialling = None;
            self.put(Arrived { peer, socket, result });
        }
    }

    fn next_dial(&self) -> Option<Dial> {
        let mut state = self.lock();
        let next = if state.closed { None } else { state.to_dial.pop_front() };
        state.dialler_runs = next.is_some();
        next
    }

    fn open(&self, dial: &Dial) -> Result<ParentOnly<TcpStream>, LinkError> {
        let start = Instant::now();
        let failed = |what: &str, error: &dyn std::fmt::Display| LinkError {
            peer: dial.hello.to as Rank,
            kind: LinkErrorKind::Unreachable(format!(
                "{what} {} failed after {:.1} s: {error}",
                dial.address,
                start.elapsed().as_secs_f64()
            )),
        };
        let mut stream =
            connect(dial).map(ParentOnly::new).map_err(|error| failed("connecting to", &error))?;
        self.prepare(&stream, dial.timeout)
            .map_err(|error| failed("preparing the socket to", &error))?;
        handshake::dial(&mut *stream, &dial.hello, &dial.secret)
            .map_err(|error| failed("the handshake with", &error))?;
        Ok(stream)
    }

    fn prepare(&self, stream: &TcpStream, timeout: Duration) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let handle = ParentOnly::new(stream.try_clone()?);
        let mut state = self.lock();
        if state.closed {
            handle.shutdown(Shutdown::Both)?;
        } else {
            state.dialling = Some(handle);
        }
        Ok(())
    }

    /// Refuses everything from here on and interrupts a handshake under way.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.arrived.clear();
        state.to_dial.clear();
        if let Some(stream) = state.dialling.take() {
            // It may have ended by itself: then there is nothing to interrupt.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn connect(dial: &Dial) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(dial.address), Type::STREAM, None)?;
    if dial.is_on_this_host {
        congestion::inside(&SockRef::from(&socket));
    }
    socket.connect_timeout(&dial.address.into(), dial.timeout)?;
    Ok(socket.into())
}
