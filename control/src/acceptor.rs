//! Who comes in: accepts connections, hears their proofs, and turns strangers away at little cost.
//!
//! What is said first is read as soon as a connection is accepted, and who has not said what a
//! rank would is turned away there: nothing is registered or kept for it. Those who know a
//! session of this job ([`Preamble`]) are heard at once. To others, who may not have joined yet,
//! there are only so many TLS handshakes, unless somebody is missing in the job. After strangers
//! were turned away, the listeners are left alone for a moment, so that many of them wake the
//! thread once.

mod limits;

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
use unisum_link::secure::{Credentials, Listening, Preamble, Proven};

use super::listen::Listeners;
use super::pending::{self, PendingConnection, PendingConnections};
use limits::{Allowance, RefusalLog};

/// How long a pending connection may take to prove the token.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections accepted before others get a turn.
const ACCEPTS_PER_TURN: usize = 256;
/// How long the listeners are left alone after strangers were turned away: neighbours that come
/// meanwhile wait as long, and the kernel's queue holds the others.
const NAP: Duration = Duration::from_millis(10);
/// TLS handshakes of those who do not know the session: so many at once, and in a second. They are
/// for processes of other jobs, say, to hear what is wrong.
const UNKNOWN_AT_ONCE: usize = 8;
const UNKNOWN_PER_SECOND: f64 = 2.0;
/// How long to leave new connections alone when the process can't have more descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// How long descriptors may be missing before those who connect are turned away.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whose acceptor it is: what it knows of those who come.
pub(super) trait Host {
    fn credentials(&self) -> &Credentials;
    /// Whether a preamble is that of a session in which connections are made.
    fn knows(&self, preamble: Preamble) -> bool;
    /// Whether somebody is missing who can't know the session yet.
    fn awaits_unknown(&self) -> bool;
    /// Whether who has proven the token may come in.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal>;
}

/// The listening sockets and the pending connections that have proven nothing yet.
pub(super) struct Acceptor {
    listeners: Listeners,
    pending: PendingConnections,
    next_token: usize,
    /// Whether somebody may be waiting to be accepted.
    is_readable: bool,
    paused_until: Option<Instant>,
    /// The listeners' token.
    token: usize,
    /// The listeners are left alone: they are not registered.
    is_napping: bool,
    /// Who was turned away in this turn.
    turned_away: usize,
    unknown: Allowance,
    /// A descriptor to give up when there is no other: with it those who wait can be turned away
    /// with a word, instead of waiting until their deadlines.
    reserve: Option<File>,
    exhausted_since: Option<Instant>,
    log: RefusalLog,
    /// Who was refused lately after saying who it is, or for another TLS.
    refused: Vec<Refused>,
}

/// Most of those that are refused in one turn that are told of.
const REMEMBERED_MAX: usize = 8;

/// A dialer that was refused, and who it said it was; none said it that speaks another TLS.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) claim: Option<Hello>,
    pub(super) address: SocketAddr,
    pub(super) reason: String,
}

/// A pending connection that was admitted; its stream is registered under `token` still.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) token: usize,
    pub(super) hello: Hello,
    pub(super) connection: Proven,
    pub(super) address: SocketAddr,
}

/// What became of a pending connection after it was heard.
enum Fate {
    Stays,
    Admitted(Hello),
    Refused(String),
    /// It was refused before, and has heard that.
    Gone,
}

impl Acceptor {
    /// Opens the acceptor: the listeners are registered under `token`, pending connections under
    /// tokens from `first_token` on.
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
            pending: PendingConnections::new(pending::most(world)),
            next_token: first_token,
            is_readable: false,
            paused_until: None,
            token,
            is_napping: false,
            turned_away: 0,
            unknown: Allowance::new(UNKNOWN_AT_ONCE, UNKNOWN_PER_SECOND),
            reserve: reserve(),
            exhausted_since: None,
            log: RefusalLog::default(),
            refused: Vec::new(),
        })
    }

    /// A listener is readable.
    pub(super) const fn readable(&mut self) {
        self.is_readable = true;
    }

    pub(super) fn has_pending(&self, token: usize) -> bool {
        self.pending.has(token)
    }

    /// Accepts those who wait, a number at a time.
    pub(super) fn accept(&mut self, host: &impl Host, registry: &Registry, now: Instant) {
        if self.paused_until.is_some_and(|until| until > now) || !self.wake(registry, now) {
            return;
        }
        self.turned_away = 0;
        // Who came in one turn is heard in the next, before others take the places.
        let mut places = self.pending.most().div_ceil(2);
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.is_readable || self.paused_until.is_some() || places == 0 {
                break;
            }
            match self.listeners.accept() {
                Ok((stream, address)) => {
                    self.exhausted_since = None;
                    let stays = self.receive(ParentOnly::new(stream), address, host, registry, now);
                    places -= usize::from(stays);
                }
                Err(error) if is_about_it(&error) => {}
                Err(error) => {
                    self.accept_failed(&error, registry, now);
                    break;
                }
            }
        }
        if self.turned_away > 0 && !self.is_readable {
            self.nap(registry, now);
        }
    }

    /// Leaves the listeners alone: those who come meanwhile wake nobody.
    fn nap(&mut self, registry: &Registry, now: Instant) {
        self.deregister(registry);
        (self.is_napping, self.is_readable) = (true, true);
        self.paused_until = Some(now + NAP);
    }

    /// Ends a pause; `false` if the listeners can't be watched again yet.
    fn wake(&mut self, registry: &Registry, now: Instant) -> bool {
        self.paused_until = None;
        if !self.is_napping {
            return true;
        }
        let watch = |listener| register(registry, listener, self.token, Interest::READABLE);
        if let Err(error) = self.listeners.iter().try_for_each(watch) {
            self.deregister(registry);
            self.paused_until = Some(now + PAUSE);
            self.log.line(now, &"new connections", &error.to_string());
            return false;
        }
        self.is_napping = false;
        true
    }

    /// Where descriptors or memory are missing, pending connections that are not expected give
    /// theirs up, one a turn. Otherwise that lasts: trying again at once would be spinning, and
    /// leaving those who connect without an answer would be a hang.
    fn accept_failed(&mut self, error: &io::Error, registry: &Registry, now: Instant) {
        match error.kind() {
            ErrorKind::WouldBlock => self.is_readable = false,
            // The kernel says that there is no descriptor before it looks whether anybody waits:
            // the last one is for who came last.
            _ if !self.listeners.has_visitor() => self.is_readable = false,
            _ if self.pending.unexpected() > 0 => self.evict(registry, now),
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
        let _ = stream.write(&Refusal::Exhausted.encode());
        drop(stream);
        self.reserve = reserve();
        self.log.line(now, &address, &Refusal::Exhausted.to_string());
        true
    }

    /// Hears what a new connection has said so far, and keeps it as pending if it speaks as a rank.
    /// Whether it does.
    fn receive(
        &mut self,
        stream: ParentOnly<TcpStream>,
        address: SocketAddr,
        host: &impl Host,
        registry: &Registry,
        now: Instant,
    ) -> bool {
        let heard = pending(stream, address, now).map(|mut pending| {
            let fate = hear_once(&mut pending, host, &mut self.unknown, now);
            (pending, fate)
        });
        let (pending, fate) = match heard {
            Ok(heard) => heard,
            Err(error) => {
                self.log.line(now, &address, &error.to_string());
                return false;
            }
        };
        let reason = match fate {
            None | Some(Fate::Stays) => return self.keep(pending, host, registry, now),
            // Nobody proves anything before it is asked to.
            Some(Fate::Admitted(_)) => Refusal::Garbage.to_string(),
            Some(Fate::Gone) => return false,
            Some(Fate::Refused(reason)) => reason,
        };
        self.turned_away += 1;
        let refused = refused(&pending, None, &reason);
        self.refused.extend(refused.filter(|_| self.refused.len() < REMEMBERED_MAX));
        leave(&pending, None);
        self.log.line(now, &address, &reason);
        false
    }

    /// Has a pending connection stay, if need be in another one's place.
    fn keep(
        &mut self,
        pending: PendingConnection,
        host: &impl Host,
        registry: &Registry,
        now: Instant,
    ) -> bool {
        let token = self.next_token;
        self.next_token += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        // If more has come meanwhile, that is an event.
        if let Err(error) = register(registry, &*pending.stream, token, interest) {
            self.log.line(now, &pending.address, &error.to_string());
            return false;
        }
        self.pending.insert(token, pending);
        self.esteem(token, host);
        if self.pending.are_too_many() {
            self.evict(registry, now);
        }
        true
    }

    /// Expects a pending connection whose claim would be admitted with a proof, or that shakes
    /// hands.
    fn esteem(&mut self, token: usize, host: &impl Host) {
        let Some(pending) = self.pending.get_mut(token).filter(|pending| !pending.is_expected)
        else {
            return;
        };
        let is_expected = pending.listening.claim().is_some_and(|claim| host.admit(claim).is_ok());
        if is_expected || pending.listening.shakes_hands() {
            self.pending.expect(token);
        }
    }

    /// Turns a pending connection away so that another one has its place.
    fn evict(&mut self, registry: &Registry, now: Instant) {
        let Some(mut pending) = self.pending.remove_least() else { return };
        self.turned_away += 1;
        // Best effort: it has no claim to an answer, but a rank that is told so comes again.
        if pending.is_expected {
            let _ = pending.stream.write(&Refusal::Crowded.encode());
        }
        let reason = Refusal::Crowded.to_string();
        self.refuse(&pending, &reason, registry, now);
    }

    /// Hears what a pending connection has to say.
    pub(super) fn visit(
        &mut self,
        token: usize,
        host: &impl Host,
        registry: &Registry,
        now: Instant,
    ) -> Option<Admitted> {
        let pending = self.pending.get_mut(token)?;
        let claim = pending.listening.claim().copied();
        match hear(pending, host, &mut self.unknown, now) {
            Fate::Stays => {
                self.esteem(token, host);
                None
            }
            Fate::Admitted(hello) => {
                let PendingConnection { stream, address, mut listening, .. } =
                    self.pending.remove(token)?;
                let connection = Proven::new(stream, listening.take_session());
                Some(Admitted { token, hello, connection, address })
            }
            Fate::Refused(reason) => {
                let refused = refused(pending, claim, &reason);
                self.refused.extend(refused.filter(|_| self.refused.len() < REMEMBERED_MAX));
                if pending.listening.is_in_tls() {
                    self.dismiss(token, &reason, now);
                } else {
                    let pending = self.pending.remove(token)?;
                    self.refuse(&pending, &reason, registry, now);
                }
                None
            }
            Fate::Gone => {
                let pending = self.pending.remove(token)?;
                leave(&pending, Some(registry));
                None
            }
        }
    }

    /// Says nothing more to a pending connection that was told why it is refused, in TLS, and hears
    /// it out: it may not have said all yet, and closing would destroy the words on their way
    /// (RFC 2525, 2.17).
    fn dismiss(&mut self, token: usize, reason: &str, now: Instant) {
        let Some(pending) = self.pending.get_mut(token) else { return };
        let _ = pending.stream.shutdown(std::net::Shutdown::Write);
        pending.is_dismissed = true;
        let address = pending.address;
        self.log.line(now, &address, reason);
    }

    /// Whom [`Acceptor::visit`] and [`Acceptor::accept`] refused that may be ranks.
    pub(super) fn take_refused(&mut self) -> Vec<Refused> {
        std::mem::take(&mut self.refused)
    }

    /// Turns pending connections away whose time is up.
    pub(super) fn sweep(&mut self, registry: &Registry, now: Instant) {
        while self.pending.next_end().is_some_and(|until| until <= now)
            && let Some(pending) = self.pending.remove_oldest()
        {
            if pending.is_dismissed {
                leave(&pending, Some(registry));
                continue;
            }
            let reason = format!("no proof of the token within {} s", PROOF_TIMEOUT.as_secs());
            self.refuse(&pending, &reason, registry, now);
        }
    }

    /// When [`Acceptor::sweep`] or [`Acceptor::accept`] has something to do.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let accept = self.is_readable.then(|| self.paused_until.unwrap_or(now));
        accept.into_iter().chain(self.pending.next_end()).min()
    }

    /// Closes: nobody comes in any more.
    pub(super) fn close(&mut self, registry: &Registry) {
        self.deregister(registry);
    }

    fn deregister(&self, registry: &Registry) {
        for listener in self.listeners.iter() {
            // It is deregistered by the end of the epoll instance at the latest.
            let _ = registry.deregister(&mut SourceFd(&listener.as_raw_fd()));
        }
    }

    fn refuse(
        &mut self,
        pending: &PendingConnection,
        reason: &str,
        registry: &Registry,
        now: Instant,
    ) {
        leave(pending, Some(registry));
        self.log.line(now, &pending.address, reason);
    }
}

/// Ends a pending connection, which is registered if a registry is given.
fn leave(pending: &PendingConnection, registry: Option<&Registry>) {
    let stream = &pending.stream;
    if let Some(registry) = registry {
        // Closing it deregisters it, unless a forked child holds it as well.
        let _ = registry.deregister(&mut SourceFd(&stream.as_raw_fd()));
    }
    if pending.is_expected || pending.is_told {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    } else {
        // It was told nothing that it could miss: the kernel need not remember it either.
        let _ = SockRef::from(&**stream).set_linger(Some(Duration::ZERO));
    }
}

/// What is told of a connection that is refused, if that may be a rank's.
fn refused(pending: &PendingConnection, claim: Option<Hello>, reason: &str) -> Option<Refused> {
    let claim = claim.or_else(|| pending.listening.claimed());
    let is_told = claim.is_some() || pending.is_unlike;
    is_told.then(|| Refused { claim, address: pending.address, reason: reason.to_owned() })
}

/// Whether an error concerns one connection, that is gone already, and not the next ones.
fn is_about_it(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted)
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

fn pending(
    stream: ParentOnly<TcpStream>,
    address: SocketAddr,
    now: Instant,
) -> io::Result<PendingConnection> {
    let is_inside = stream.local_addr()?.ip().to_canonical() == address.ip().to_canonical();
    let listening = Listening::new(handshake::random()?, is_inside);
    let until = now + PROOF_TIMEOUT;
    Ok(PendingConnection {
        stream,
        address,
        listening,
        until,
        is_expected: false,
        is_told: false,
        is_unlike: false,
        is_dismissed: false,
    })
}

fn register(
    registry: &Registry,
    socket: &impl AsRawFd,
    token: usize,
    interest: Interest,
) -> io::Result<()> {
    registry.register(&mut SourceFd(&socket.as_raw_fd()), Token(token), interest)
}

/// Reads until the pending connection has said all it may for now.
fn hear(
    pending: &mut PendingConnection,
    host: &impl Host,
    unknown: &mut Allowance,
    now: Instant,
) -> Fate {
    loop {
        if let Some(fate) = hear_once(pending, host, unknown, now) {
            return fate;
        }
    }
}

/// Reads once; `None` if there may be more.
fn hear_once(
    pending: &mut PendingConnection,
    host: &impl Host,
    unknown: &mut Allowance,
    now: Instant,
) -> Option<Fate> {
    let mut buffer = [0; 1024];
    let read = match pending.stream.read(&mut buffer) {
        Ok(0) if pending.is_dismissed => return Some(Fate::Gone),
        Ok(0) => return Some(Fate::Refused("it closed before it proved the token".into())),
        Ok(_) if pending.is_dismissed => return None,
        Ok(read) => read,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(Fate::Stays),
        Err(error) if error.kind() == ErrorKind::Interrupted => return None,
        Err(_) if pending.is_dismissed => return Some(Fate::Gone),
        Err(error) => return Some(Fate::Refused(error.to_string())),
    };
    let hears = |preamble| host.knows(preamble) || host.awaits_unknown() || unknown.take(now);
    let admit = |hello: &Hello| host.admit(hello);
    let listening = &mut pending.listening;
    let (fate, send) = match listening.feed_if(&buffer[..read], host.credentials(), hears, admit) {
        Heard::More => return None,
        Heard::Send(send) => (None, send),
        Heard::Admitted(hello, send) => (Some(Fate::Admitted(hello)), send),
        Heard::Refused(refusal, send) => {
            use Refusal::{Certificate, Clear, Encrypted};
            pending.is_unlike = matches!(refusal, Certificate(_) | Clear | Encrypted);
            (Some(Fate::Refused(refusal.to_string())), send)
        }
    };
    pending.is_told |= fate.is_some() && !send.is_empty();
    // A few kilobytes always fit into the buffer of a socket that has sent next to nothing.
    let is_sent =
        send.is_empty() || matches!(pending.stream.write(&send), Ok(sent) if sent == send.len());
    match fate {
        Some(Fate::Refused(_)) => fate,
        _ if !is_sent => Some(Fate::Refused("it takes no answer".into())),
        _ => fate,
    }
}

#[cfg(test)]
#[cfg(feature = "tls")]
mod tests;
