//! The control thread: an event loop that owns the listening port and the control connections.

mod altered;
mod reception;
mod resuming;
mod succession;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use unisum_link::Rank;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Build, Purpose, Refusal};
use unisum_link::secure::{Credentials, Preamble, Proven};

use self::reception::Reception;
pub(super) use self::resuming::Resuming;
use self::succession::Dialing;
use super::acceptor::{Acceptor, Admitted, Refused};
use super::connection::{Connection, Received};
use super::coordinator::{Coordinator, Output};
use super::file::Published;
use super::listen::Listeners;
use super::member::Member;
use super::message::Message;
use super::pulse::{self, Pulses};
use super::shared::{Command, Shared};

const LISTENER: usize = 0;
/// The token of the waker that the handle uses.
pub(super) const WAKER: Token = Token(1);
/// The token of a rank's connection to the coordinator.
const COORDINATOR: usize = 2;
/// The token of its pulse there.
const PULSE: usize = 3;
const FIRST_GUEST: usize = 4;
/// How long the thread stays after its goodbye for the others to close first: closing earlier
/// could destroy the goodbye on its way (RFC 2525, 2.17).
const LINGER: Duration = Duration::from_secs(1);
/// How long leaving waits, on the coordinator, for the others to leave as well: at the end of a job
/// that spares them looking for another one.
const FAREWELL: Duration = Duration::from_millis(200);
/// How a process that is killed looks from outside.
const NO_GOODBYE: &str = "its control connection ended without a goodbye";

/// What a connection must name to belong to this communicator.
pub(super) struct Identity {
    pub(super) rank: Rank,
    pub(super) world: usize,
    pub(super) session: [u8; 16],
    /// By which those are known who have joined.
    pub(super) preamble: Preamble,
    pub(super) job: [u8; 16],
    pub(super) build: Build,
    pub(super) credentials: Credentials,
    pub(super) secret_origin: String,
}

pub(super) struct ControlThread {
    poll: Poll,
    /// Kept: a waker that is dropped takes back what the thread has not heard yet.
    _waker: Arc<Waker>,
    identity: Identity,
    shared: Arc<Shared>,
    /// None once this rank has left.
    acceptor: Option<Acceptor>,
    connections: BTreeMap<usize, (Rank, Connection)>,
    /// Which processes have joined, in words.
    processes: BTreeMap<Rank, String>,
    pulses: Pulses,
    resuming: Resuming,
    /// On the rank that coordinates: rank 0, until it has left and its process has ended.
    coordinator: Option<Coordinator>,
    /// While another rank is to coordinate.
    dialing: Option<Dialing>,
    member: Member,
    published: Option<Published>,
    /// Since when this rank has left and only coordinates.
    only_coordinates_since: Option<Instant>,
    has_said_goodbye: bool,
    /// After the goodbye: when the thread ends at the latest.
    linger_until: Option<Instant>,
}

impl ControlThread {
    pub(super) fn new(
        (poll, waker): (Poll, Arc<Waker>),
        identity: Identity,
        shared: Arc<Shared>,
        listeners: Listeners,
        (pulses, resuming): (Pulses, Resuming),
    ) -> io::Result<Self> {
        let acceptor =
            Acceptor::new(listeners, LISTENER, FIRST_GUEST, identity.world, poll.registry())?;
        Ok(Self {
            poll,
            _waker: waker,
            identity,
            member: Member::new(Arc::clone(&shared)),
            shared,
            acceptor: Some(acceptor),
            connections: BTreeMap::new(),
            processes: BTreeMap::new(),
            pulses,
            resuming,
            coordinator: None,
            dialing: None,
            only_coordinates_since: None,
            has_said_goodbye: false,
            published: None,
            linger_until: None,
        })
    }

    /// Makes this the coordinator's thread.
    pub(super) fn coordinate(&mut self, coordinator: Coordinator, published: Option<Published>) {
        self.coordinator = Some(coordinator);
        self.published = published;
    }

    /// Takes this rank's connection to the coordinator over, and the pulse beside it.
    pub(super) fn join(
        &mut self,
        coordinator: Rank,
        connection: Proven,
        pulse: Option<ParentOnly<TcpStream>>,
    ) -> io::Result<()> {
        if let Some(stream) = pulse {
            pulse::register(self.poll.registry(), &stream, PULSE)?;
            self.pulses.add(PULSE, coordinator, stream)?;
        }
        let connection = self.connection(connection)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        let socket = connection.stream().as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&socket), Token(COORDINATOR), interest)?;
        self.connections.insert(COORDINATOR, (coordinator, connection));
        self.send(COORDINATOR, encode(&[Message::Joined]));
        Ok(())
    }

    /// A connection that goes on in another one after it was cut, if there are such.
    fn connection(&self, proven: Proven) -> io::Result<Connection> {
        let limit = self.pulses.limit();
        let connection = Connection::new(proven, limit)?;
        if self.resuming.is_on() { connection.resumable(limit) } else { Ok(connection) }
    }

    /// Runs until this rank has left.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        loop {
            self.flush();
            self.settle();
            if self.is_over(Instant::now()) {
                return Ok(());
            }
            match self.poll.poll(&mut events, self.timeout(Instant::now())) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            let now = Instant::now();
            for event in &events {
                self.handle(event.token().0, now);
            }
            self.attend(now);
            for command in self.shared.take_commands() {
                self.obey(command, now);
            }
            self.look_after_cuts(now);
            self.look_for_heir(now);
            self.tick(now);
        }
    }

    fn handle(&mut self, token: usize, now: Instant) {
        match (&mut self.acceptor, token) {
            (Some(acceptor), LISTENER) => acceptor.readable(),
            (Some(acceptor), token) if acceptor.has_pending(token) => self.visit(token, now),
            (_, token) if self.pulses.has(token) => self.pulses.feel(token, now),
            (_, token) if self.resuming.is_returning(token) => self.hear_returning(token, now),
            // Among the rest: the waker, whose commands are looked at in any case, and what
            // arrived together with the end of its connection.
            (_, token) => self.serve(token, now),
        }
    }

    /// Looks after the acceptor.
    fn attend(&mut self, now: Instant) {
        let Some((acceptor, registry, host)) = self.reception() else { return };
        acceptor.accept(&host, registry, now);
        let (refused, is_proven) = (acceptor.take_refused(), host.is_proven.get());
        acceptor.sweep(registry, now);
        self.note_refused(refused, is_proven);
    }

    /// The acceptor, and what it has to know.
    fn reception(&mut self) -> Option<(&mut Acceptor, &Registry, Reception<'_>)> {
        let host = Reception {
            identity: &self.identity,
            shared: &self.shared,
            coordinator: self.coordinator.as_ref(),
            connections: &self.connections,
            processes: &self.processes,
            goes_on: self.resuming.is_on(),
            has_left: self.linger_until.is_some(),
            is_proven: Cell::new(false),
        };
        Some((self.acceptor.as_mut()?, self.poll.registry(), host))
    }

    fn visit(&mut self, token: usize, now: Instant) {
        let Some((acceptor, registry, host)) = self.reception() else { return };
        let admitted = acceptor.visit(token, &host, registry, now);
        let (refused, is_proven) = (acceptor.take_refused(), host.is_proven.get());
        self.note_refused(refused, is_proven);
        let Some(admitted) = admitted else { return };
        match admitted.hello.purpose {
            Purpose::Data => self.hand_over(admitted),
            Purpose::Control => self.welcome(admitted, now),
            Purpose::Pulse => self.take_pulse(admitted),
            Purpose::Resume => self.returns(admitted, now),
            // Nobody is admitted with it here.
            Purpose::View => {}
        }
    }

    /// Remembers whom rank 0 refused, for those who wait for it.
    fn note_refused(&mut self, refused: Vec<Refused>, is_proven: bool) {
        let Self { identity, coordinator: Some(coordinator), .. } = self else { return };
        for Refused { claim, address, mut reason } in refused {
            let Some(claim) = claim else {
                coordinator.refused_unknown(address, &reason);
                continue;
            };
            if reason == Refusal::Token.to_string() {
                reason += &format!(" (rank 0's is from {})", identity.secret_origin);
            } else if reason == Refusal::Job.to_string() {
                reason += ": is UNISUM_JOB the same on all ranks?";
            }
            if claim.purpose == Purpose::Control {
                let claim = claim.from as Rank;
                coordinator.refused(claim, address, &reason, is_proven);
            }
        }
    }

    /// Feels a rank's host from now on.
    fn take_pulse(&mut self, admitted: Admitted) {
        let Admitted { token, hello, connection, address } = admitted;
        if let Err(error) = self.pulses.add(token, hello.from as Rank, connection.stream) {
            unisum_link::warning!(%address, rank = hello.from, %error, "a rank's pulse failed");
        }
    }

    /// Gives a data connection to the transport.
    fn hand_over(&mut self, admitted: Admitted) {
        let Admitted { hello, connection, address, .. } = admitted;
        // The transport registers it with its own queue.
        let socket = connection.stream.as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
        if !self.shared.arrived(&hello.session, hello.from as Rank, hello.socket, connection) {
            let rank = hello.from;
            unisum_link::warning!(
                %address, rank, "a connection that nobody takes, or one too many"
            );
        }
    }

    /// Makes an admitted pending connection a member.
    fn welcome(&mut self, admitted: Admitted, now: Instant) {
        let Admitted { token, hello, connection, address } = admitted;
        let rank = hello.from as Rank;
        match self.connection(connection) {
            Ok(connection) => {
                self.connections.insert(token, (rank, connection));
                let at = address.ip().to_canonical();
                self.processes.insert(rank, format!("{} at {at}", hello.process()));
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.connected(rank);
                }
                // Its first message may have come while it was a pending connection.
                self.serve(token, now);
            }
            // It sees its connection end, and dials again.
            Err(error) => {
                unisum_link::warning!(%address, rank, %error, "a rank's connection failed")
            }
        }
    }

    /// Reads and handles all that a control connection brings.
    fn serve(&mut self, token: usize, now: Instant) {
        while let Some((rank, connection)) = self.connections.get_mut(&token) {
            let rank = *rank;
            let received = connection.receive();
            loop {
                // Handling a message does not end a connection.
                let Some((_, connection)) = self.connections.get_mut(&token) else {
                    return;
                };
                match connection.next() {
                    Ok(None) => break connection.acknowledge(),
                    Ok(Some(message)) => self.hear(rank, message, now),
                    Err(error) => {
                        connection.discard();
                        self.violated(rank, &error.to_string());
                        break;
                    }
                }
            }
            match received {
                Ok(Received::More) => {}
                Ok(Received::Drained) => return,
                Ok(Received::Ended) => return self.lost(token, NO_GOODBYE),
                Err(error) => return self.broke(token, &error),
            }
        }
    }

    fn hear(&mut self, from: Rank, message: Message, now: Instant) {
        if self.linger_until.is_some() {
            return;
        }
        match &mut self.coordinator {
            Some(coordinator) => {
                let message = match message {
                    Message::Keep(line) => return self.shared.kept.put(line),
                    message => message,
                };
                coordinator.heard(from, message, now);
                self.deliver(now);
            }
            None => match self.member.heard(message) {
                Ok(None) => {}
                Ok(Some(answer)) => self.send(COORDINATOR, encode(&[answer])),
                Err(what) => self.member.violated(what),
            },
        }
    }

    fn violated(&mut self, rank: Rank, what: &str) {
        match &mut self.coordinator {
            Some(coordinator) => coordinator.violated(rank, what),
            None => self.member.violated(what),
        }
    }

    fn broke(&mut self, token: usize, error: &io::Error) {
        let how = format!("its control connection broke: {error}");
        if !self.cut(token, &how, Instant::now()) {
            self.tell_if_altered(token, error);
            self.end(token, &how);
        }
    }

    fn lost(&mut self, token: usize, how: &str) {
        if !self.cut(token, how, Instant::now()) {
            self.end(token, how);
        }
    }

    /// A connection has ended for good.
    fn end(&mut self, token: usize, how: &str) {
        let Some((rank, connection)) = self.connections.remove(&token) else {
            return;
        };
        // Dropping it deregisters it too, unless a forked child holds it as well.
        let socket = connection.stream().as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
        drop(connection);
        if self.linger_until.is_some() {
            return;
        }
        match &mut self.coordinator {
            Some(coordinator) => coordinator.lost(rank, how),
            None if self.member.lost(how) => self.succeed(Instant::now()),
            None => {}
        }
    }

    fn obey(&mut self, command: Command, now: Instant) {
        if self.linger_until.is_some() || self.only_coordinates_since.is_some() {
            return;
        }
        let is_goodbye = matches!(command, Command::Leave);
        let messages = self.member.command(command, now);
        match &mut self.coordinator {
            Some(coordinator) => {
                let own = self.identity.rank;
                messages.into_iter().for_each(|message| coordinator.heard(own, message, now));
            }
            None if messages.is_empty() => {}
            None => self.send(COORDINATOR, encode(&messages)),
        }
        self.deliver(now);
        if is_goodbye && self.coordinator.is_some() {
            self.only_coordinates_since = Some(now);
        } else if is_goodbye {
            self.leave(now);
        }
    }

    /// Nothing is said after the goodbye.
    fn leave(&mut self, now: Instant) {
        // What was not taken yet is said again if the connection is cut.
        self.linger_until = Some(now + LINGER + self.resuming.timeout());
        self.close_acceptor();
        for (_, connection) in self.connections.values_mut() {
            connection.finish();
        }
    }

    /// Nobody is let in any more, unless connections go on in others: then some may come, or be
    /// asked whether this process is there, until the thread ends.
    fn close_acceptor(&mut self) {
        self.published = None;
        if self.resuming.is_on() {
            return;
        }
        if let Some(mut acceptor) = self.acceptor.take() {
            acceptor.close(self.poll.registry());
        }
    }

    /// Leaves for good when nobody needs a coordinator any more.
    fn only_coordinate(&mut self, now: Instant) {
        let Some(coordinator) = &self.coordinator else { return };
        if coordinator.is_needed() {
            if coordinator.all_came() {
                self.close_acceptor();
            }
        } else if self.linger_until.is_none() {
            self.leave(now);
        }
    }

    /// Ends the job if another host is lost.
    fn look_who_is_lost(&mut self, now: Instant) {
        let mut lost = self.pulses.lost(now);
        lost.retain(|(rank, _)| {
            let how = "its pulse stopped: its host, or the network between, does not answer";
            !self.token_of(*rank).is_some_and(|token| self.cut(token, how, now))
        });
        if lost.is_empty() || self.linger_until.is_some() {
            return;
        }
        let limit = self.pulses.limit();
        match &mut self.coordinator {
            Some(coordinator) => coordinator.unreachable(&lost, limit),
            None => self.member.unreachable(&lost, limit),
        }
    }

    fn tick(&mut self, now: Instant) {
        self.look_who_is_lost(now);
        self.member.tick(now);
        if self.linger_until.is_none()
            && let Some(message) = self.member.news()
        {
            match &mut self.coordinator {
                Some(coordinator) => coordinator.heard(self.identity.rank, message, now),
                None => self.send(COORDINATOR, encode(&[message])),
            }
        }
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.tick(now);
            if coordinator.all_came() {
                self.published = None;
            }
        }
        self.deliver(now);
        if self.only_coordinates_since.is_some() {
            self.only_coordinate(now);
        }
    }

    /// Carries the coordinator's messages to the ranks; this process's own rank answers at once.
    fn deliver(&mut self, now: Instant) {
        let own = self.identity.rank;
        while let Some(coordinator) = &mut self.coordinator
            && let Some(Output { audience, messages }) = coordinator.poll()
        {
            let encoded = encode(&messages);
            for (rank, connection) in self.connections.values_mut() {
                if audience.includes(*rank) {
                    connection.queue(encoded.clone());
                }
            }
            if !audience.includes(own) {
                continue;
            }
            for message in messages {
                match self.member.heard(message) {
                    Ok(Some(answer)) => coordinator.heard(own, answer, now),
                    Ok(None) => {}
                    Err(what) => self.member.violated(what),
                }
            }
        }
    }

    fn send(&mut self, token: usize, encoded: Bytes) {
        if let Some((_, connection)) = self.connections.get_mut(&token) {
            connection.queue(encoded);
        }
    }

    /// Writes what is queued. A broken connection may make the coordinator say more.
    fn flush(&mut self) {
        loop {
            let flush = |(token, (_, connection)): (&usize, &mut (Rank, Connection))| {
                connection.flush().err().map(|error| (*token, error))
            };
            let Some((token, error)) = self.connections.iter_mut().find_map(flush) else {
                return;
            };
            self.broke(token, &error);
            self.tick(Instant::now());
        }
    }

    /// Tells who waits for the goodbye that the kernel has it.
    fn settle(&mut self) {
        let mut connections = self.connections.values();
        let is_farewell = self.farewell().is_some_and(|until| until <= Instant::now());
        let is_over = self.linger_until.is_some() || is_farewell;
        if is_over && connections.all(|(_, each)| each.is_flushed()) {
            self.shared.said_goodbye();
            self.has_said_goodbye = true;
            let linger = Instant::now() + LINGER;
            self.linger_until = self.linger_until.map(|until| until.min(linger));
        }
    }

    /// Until when a coordinator that leaves waits for the others.
    fn farewell(&self) -> Option<Instant> {
        let since = self.only_coordinates_since.filter(|_| !self.has_said_goodbye)?;
        // Those who were with another coordinator a moment ago have nobody else to ask.
        let awaits = self.coordinator.as_ref().is_some_and(Coordinator::awaits_ranks);
        let patience = self.coordinator.as_ref().map_or(LINGER, |it| it.patience().max(LINGER));
        Some(since + if awaits { patience } else { FAREWELL })
    }

    fn is_over(&self, now: Instant) -> bool {
        // Who did not hear that its goodbye was taken, because its connection was cut, asks again.
        let is_asked = self.resuming.is_on() && self.coordinator.is_some();
        let is_idle = self.connections.is_empty() && !is_asked;
        self.linger_until.is_some_and(|until| is_idle || until <= now)
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        let acceptor = self.acceptor.as_ref().and_then(|acceptor| acceptor.deadline(now));
        let coordinator = self.coordinator.as_ref().and_then(Coordinator::deadline);
        let farewell = self.farewell().filter(|until| *until > now);
        let due = [acceptor, coordinator, self.member.deadline(), self.linger_until, farewell];
        let (cuts, silence) = (self.resuming.deadline(now), self.look_for_silence_at(now));
        let due = due.into_iter().chain([self.pulses.deadline(), self.look_at(now), cuts, silence]);
        let due = due.flatten().min()?;
        Some(due.saturating_duration_since(now))
    }
}

fn encode(messages: &[Message]) -> Bytes {
    let mut encoded = BytesMut::new();
    messages.iter().for_each(|message| message.encode(&mut encoded));
    encoded.freeze()
}
