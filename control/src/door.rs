//! Who comes in: accepts connections, hears their proofs, and turns strangers away at little cost.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::SockRef;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{self, Heard, Hello, Refusal};
use unisum_link::secure::{Credentials, Listening, Proven};

use super::guests::{self, Guest, Guests};
use super::listen::Listeners;

/// How long a guest may take to prove the token.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections accepted before others get a turn.
const ACCEPTS_PER_TURN: usize = 64;
/// How long to leave new connections alone when the process can't have more descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// How long descriptors may be missing before those who knock are turned away.
const PATIENCE: Duration = Duration::from_secs(1);
/// Refusals logged per [`LOG_PERIOD`].
const LOG_LINES: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// The listening sockets and the guests that have proven nothing yet.
pub(super) struct Door {
    listeners: Listeners,
    guests: Guests,
    next_token: usize,
    /// Whether somebody may be waiting to be accepted.
    is_knocking: bool,
    paused_until: Option<Instant>,
    /// A descriptor to give up when there is no other: with it those who wait can be turned away
    /// with a word, instead of waiting until their deadlines.
    reserve: Option<File>,
    exhausted_since: Option<Instant>,
    log: RefusalLog,
    /// Who was refused last after saying who it is.
    refused: Option<Refused>,
}

/// A dialer that was refused, and who it said it was.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) claim: Hello,
    pub(super) address: SocketAddr,
    pub(super) reason: String,
}

/// A guest that was admitted; its stream is registered under `token` still.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) token: usize,
    pub(super) hello: Hello,
    pub(super) connection: Proven,
    pub(super) address: SocketAddr,
}

/// What became of a guest after it was heard.
enum Fate {
    Stays,
    Admitted(Hello),
    Refused(String),
    /// It was refused before, and has heard that.
    Gone,
}

impl Door {
    /// Opens the door: the listeners are registered under `token`, guests under tokens from
    /// `first_token` on.
    pub(super) fn new(
        listeners: Listeners,
        token: usize,
        first_token: usize,
        world: usize,
        registry: &Registry,
    ) -> io::Result<Self> {
        for listener in listeners.iter() {
            register(registry, listener, token, Interest::READABLE)?;
        }
        Ok(Self {
            listeners,
            guests: Guests::new(guests::most(world)),
            next_token: first_token,
            is_knocking: false,
            paused_until: None,
            reserve: reserve(),
            exhausted_since: None,
            log: RefusalLog::default(),
            refused: None,
        })
    }

    /// A listener is readable.
    pub(super) const fn knock(&mut self) {
        self.is_knocking = true;
    }

    pub(super) fn has_guest(&self, token: usize) -> bool {
        self.guests.has(token)
    }

    /// Accepts those who wait, a number at a time.
    pub(super) fn accept(&mut self, registry: &Registry, now: Instant) {
        if self.paused_until.is_some_and(|until| until > now) {
            return;
        }
        self.paused_until = None;
        // Who came in one turn is heard in the next, before others take the places.
        for _ in 0..ACCEPTS_PER_TURN.min(self.guests.most().div_ceil(2)) {
            if !self.is_knocking || self.paused_until.is_some() {
                return;
            }
            match self.listeners.accept() {
                Ok((stream, address)) => {
                    self.exhausted_since = None;
                    self.admit_guest(ParentOnly::new(stream), address, registry, now);
                }
                Err(error) if is_about_it(&error) => {}
                Err(error) => return self.accept_failed(&error, registry, now),
            }
        }
    }

    /// Where descriptors or memory are missing, guests that are not expected give theirs up, one a
    /// turn. Otherwise that lasts: trying again at once would be spinning, and leaving those who
    /// knock without an answer would be a hang.
    fn accept_failed(&mut self, error: &io::Error, registry: &Registry, now: Instant) {
        match error.kind() {
            ErrorKind::WouldBlock => self.is_knocking = false,
            // The kernel says that there is no descriptor before it looks whether anybody waits:
            // the last one is for who came last.
            _ if !self.listeners.has_visitor() => self.is_knocking = false,
            _ if self.guests.unexpected() > 0 => self.evict(registry, now),
            _ => {
                let since = *self.exhausted_since.get_or_insert(now);
                if now - since >= PATIENCE && self.turn_away(now) {
                    return;
                }
                self.paused_until = Some(now + PAUSE);
                self.log.line(now, &"new connections", &error.to_string());
            }
        }
    }

    /// Accepts a connection in the reserve's place, only to say why it can't stay. `false` if that
    /// was not possible.
    fn turn_away(&mut self, now: Instant) -> bool {
        if self.reserve.take().is_none() {
            self.reserve = reserve();
            return false;
        }
        let Ok((mut stream, address)) = self.listeners.accept() else {
            self.reserve = reserve();
            return false;
        };
        // Best effort: a dialer that does not get the words sees the connection closed.
        let _ = stream.set_nonblocking(true);
        let _ = stream.write(&Refusal::Exhausted.encode());
        drop(stream);
        self.reserve = reserve();
        self.log.line(now, &address, &Refusal::Exhausted.to_string());
        true
    }

    fn admit_guest(
        &mut self,
        stream: ParentOnly<TcpStream>,
        address: SocketAddr,
        registry: &Registry,
        now: Instant,
    ) {
        let token = self.next_token;
        self.next_token += 1;
        match guest(stream, address, token, registry, now) {
            Ok(guest) => self.guests.insert(token, guest),
            Err(error) => self.log.line(now, &address, &error.to_string()),
        }
        if self.guests.are_too_many() {
            self.evict(registry, now);
        }
    }

    /// Turns a guest away so that another one has its place.
    fn evict(&mut self, registry: &Registry, now: Instant) {
        let Some(mut guest) = self.guests.remove_least() else { return };
        // Best effort: it has no claim to an answer, but a rank that is told so comes again.
        if guest.is_expected {
            let _ = guest.stream.write(&Refusal::Crowded.encode());
        }
        let reason = Refusal::Crowded.to_string();
        self.refuse(&guest, &reason, registry, now);
    }

    /// Hears what a guest has to say. `admit` is asked if it proves the token.
    pub(super) fn visit(
        &mut self,
        token: usize,
        credentials: &Credentials,
        admit: impl Fn(&Hello) -> Result<(), Refusal>,
        registry: &Registry,
        now: Instant,
    ) -> Option<Admitted> {
        let guest = self.guests.get_mut(token)?;
        let claim = guest.listening.claim().copied();
        match hear(guest, credentials, &admit) {
            Fate::Stays => {
                let is_expected = |claim: &Hello| admit(claim).is_ok();
                let is_expected = guest.listening.claim().is_some_and(is_expected);
                if !guest.is_expected && (is_expected || guest.listening.shakes_hands()) {
                    self.guests.expect(token);
                }
                None
            }
            Fate::Admitted(hello) => {
                let Guest { stream, address, mut listening, .. } = self.guests.remove(token)?;
                let connection = Proven::new(stream, listening.take_session());
                Some(Admitted { token, hello, connection, address })
            }
            Fate::Refused(reason) => {
                let (address, in_tls) = (guest.address, guest.listening.claimed());
                if guest.listening.is_in_tls() {
                    self.dismiss(token, &reason, now);
                } else {
                    let guest = self.guests.remove(token)?;
                    self.refuse(&guest, &reason, registry, now);
                }
                self.refused = claim.or(in_tls).map(|claim| Refused { claim, address, reason });
                None
            }
            Fate::Gone => {
                let guest = self.guests.remove(token)?;
                leave(&guest, registry);
                None
            }
        }
    }

    /// Says nothing more to a guest that was told why it is refused, in TLS, and hears it out: it
    /// may not have said all yet, and closing would destroy the words on their way (RFC 2525,
    /// 2.17).
    fn dismiss(&mut self, token: usize, reason: &str, now: Instant) {
        let Some(guest) = self.guests.get_mut(token) else { return };
        let _ = guest.stream.shutdown(std::net::Shutdown::Write);
        guest.is_dismissed = true;
        let address = guest.address;
        self.log.line(now, &address, reason);
    }

    /// Whom the last [`Door::visit`] refused, if it had said who it is.
    pub(super) const fn take_refused(&mut self) -> Option<Refused> {
        self.refused.take()
    }

    /// Turns guests away whose time is up.
    pub(super) fn sweep(&mut self, registry: &Registry, now: Instant) {
        while self.guests.next_end().is_some_and(|until| until <= now)
            && let Some(guest) = self.guests.remove_oldest()
        {
            if guest.is_dismissed {
                leave(&guest, registry);
                continue;
            }
            let reason = format!("no proof of the token within {} s", PROOF_TIMEOUT.as_secs());
            self.refuse(&guest, &reason, registry, now);
        }
    }

    /// When [`Door::sweep`] or [`Door::accept`] has something to do.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let accept = self.is_knocking.then(|| self.paused_until.unwrap_or(now));
        accept.into_iter().chain(self.guests.next_end()).min()
    }

    /// Closes: nobody comes in any more.
    pub(super) fn close(&mut self, registry: &Registry) {
        for listener in self.listeners.iter() {
            // It is deregistered by the end of the epoll instance at the latest.
            let _ = registry.deregister(&mut SourceFd(&listener.as_raw_fd()));
        }
    }

    fn refuse(&mut self, guest: &Guest, reason: &str, registry: &Registry, now: Instant) {
        leave(guest, registry);
        self.log.line(now, &guest.address, reason);
    }
}

/// Ends a guest's connection.
fn leave(guest: &Guest, registry: &Registry) {
    let stream = &guest.stream;
    // Closing it deregisters it, unless a forked child holds it as well.
    let _ = registry.deregister(&mut SourceFd(&stream.as_raw_fd()));
    if guest.is_expected || guest.listening.is_over() {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    } else {
        // It was told nothing that it could miss: the kernel need not remember it either.
        let _ = SockRef::from(&**stream).set_linger(Some(Duration::ZERO));
    }
}

/// Whether an error concerns one connection, that is gone already, and not the next ones.
fn is_about_it(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted)
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

fn guest(
    stream: ParentOnly<TcpStream>,
    address: SocketAddr,
    token: usize,
    registry: &Registry,
    now: Instant,
) -> io::Result<Guest> {
    stream.set_nonblocking(true)?;
    // The answers are small and awaited.
    stream.set_nodelay(true)?;
    let is_inside = stream.local_addr()?.ip().to_canonical() == address.ip().to_canonical();
    let listening = Listening::new(handshake::random()?, is_inside);
    register(registry, &*stream, token, Interest::READABLE | Interest::WRITABLE)?;
    let until = now + PROOF_TIMEOUT;
    let (is_expected, is_dismissed) = (false, false);
    Ok(Guest { stream, address, listening, until, is_expected, is_dismissed })
}

fn register(
    registry: &Registry,
    socket: &impl AsRawFd,
    token: usize,
    interest: Interest,
) -> io::Result<()> {
    registry.register(&mut SourceFd(&socket.as_raw_fd()), Token(token), interest)
}

/// Reads until the guest has said all it may for now.
fn hear(
    guest: &mut Guest,
    credentials: &Credentials,
    admit: &impl Fn(&Hello) -> Result<(), Refusal>,
) -> Fate {
    let mut buffer = [0; 1024];
    loop {
        let read = match guest.stream.read(&mut buffer) {
            Ok(0) if guest.is_dismissed => return Fate::Gone,
            Ok(0) => return Fate::Refused("it closed before it proved the token".into()),
            Ok(_) if guest.is_dismissed => continue,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Fate::Stays,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) if guest.is_dismissed => return Fate::Gone,
            Err(error) => return Fate::Refused(error.to_string()),
        };
        let (fate, send) = match guest.listening.feed(&buffer[..read], credentials, admit) {
            Heard::More => continue,
            Heard::Send(send) => (Fate::Stays, send),
            Heard::Admitted(hello, send) => (Fate::Admitted(hello), send),
            Heard::Refused(refusal, send) => (Fate::Refused(refusal.to_string()), send),
        };
        // A few kilobytes always fit into the buffer of a socket that has sent next to nothing.
        let is_sent = matches!(guest.stream.write(&send), Ok(sent) if sent == send.len());
        match fate {
            Fate::Refused(_) | Fate::Gone => return fate,
            _ if !is_sent => return Fate::Refused("it takes no answer".into()),
            Fate::Admitted(_) => return fate,
            Fate::Stays => {}
        }
    }
}

/// Logs refusals, but not so many that a port scanner fills the disk.
#[derive(Debug, Default)]
struct RefusalLog {
    since: Option<Instant>,
    lines: u32,
}

impl RefusalLog {
    fn line(&mut self, now: Instant, from: &dyn std::fmt::Display, reason: &str) {
        if self.since.is_none_or(|since| now - since >= LOG_PERIOD) {
            let untold = self.lines.saturating_sub(LOG_LINES);
            if untold > 0 {
                tracing::warn!("refused {untold} more connections");
            }
            (self.since, self.lines) = (Some(now), 0);
        }
        self.lines += 1;
        if self.lines <= LOG_LINES {
            tracing::warn!(%from, reason, "refused a connection");
        }
    }
}
