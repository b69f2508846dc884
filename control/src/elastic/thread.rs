//! The thread of an elastic job: an event loop that owns the port and the connections to all other
//! members, and drives this process's part in the agreement.

mod cuts;
mod mesh;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use socket2::{SockRef, TcpKeepalive};
use unisum_link::handshake::{Build, Hello, Purpose, Refusal};
use unisum_link::secure::{Credentials, Preamble, Proven};
use unisum_views::{
    Member, Message as AgreementMessage, Output, Participant, Standing, Timer, View, Wait,
};

use super::super::acceptor::{Acceptor, Host};
use super::super::connection::{Connection, Received, is_altered};
use super::super::listen::Listeners;
use super::super::message::Message;
use super::shared::{Command, Membership, Shared};
use super::words::Word;
use cuts::Cuts;
pub(super) use mesh::Mesh;

const LISTENER: usize = 0;
pub(super) const WAKER: Token = Token(1);
const FIRST_GUEST: usize = 2;
/// Tokens of connections that this process has opened.
const FIRST_DIALLED: usize = 1 << 40;
/// How often the kernel asks whether the other host is there.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a process that finds itself without a quorum waits for others that know better.
const STRANDED_FOR: Duration = Duration::from_millis(500);
/// How long the thread stays after its goodbyes for the others to close first.
const LINGER: Duration = Duration::from_secs(1);

/// What a connection must name to be a member's.
pub(super) struct Identity {
    pub(super) own: Member,
    pub(super) session: [u8; 16],
    /// By which the members and newcomers of this job are known.
    pub(super) preamble: Preamble,
    pub(super) job: [u8; 16],
    pub(super) build: Build,
    pub(super) credentials: Credentials,
    pub(super) silence: Duration,
    /// How long a connection that was cut may take to go on; zero: none does.
    pub(super) reconnect_timeout: Duration,
}

pub(super) struct ViewsThread {
    poll: Poll,
    identity: Identity,
    shared: Arc<Shared>,
    acceptor: Acceptor,
    participant: Participant,
    connections: BTreeMap<usize, (Member, Connection)>,
    /// Members that have left in order: they are lost when that matters to anybody.
    departed: BTreeSet<Member>,
    mesh: Mesh,
    cuts: Cuts,
    /// How often it was said that every member of the view is needed.
    needs_all: usize,
    next_token: usize,
    /// What the participant waits for, and until when.
    timer: Option<(Wait, Instant)>,
    stranded_since: Option<Instant>,
    linger_until: Option<Instant>,
}

impl ViewsThread {
    pub(super) fn new(
        poll: Poll,
        identity: Identity,
        (listeners, world): (Listeners, usize),
        participant: Participant,
        (shared, mesh): (Arc<Shared>, Mesh),
    ) -> io::Result<Self> {
        let acceptor = Acceptor::new(listeners, LISTENER, FIRST_GUEST, world, poll.registry())?;
        let cuts = Cuts::new(identity.reconnect_timeout);
        Ok(Self {
            poll,
            identity,
            shared,
            acceptor,
            participant,
            connections: BTreeMap::new(),
            departed: BTreeSet::new(),
            mesh,
            cuts,
            needs_all: 0,
            next_token: FIRST_DIALLED,
            timer: None,
            stranded_since: None,
            linger_until: None,
        })
    }

    /// Runs until this process has left.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        loop {
            self.flush();
            let now = Instant::now();
            if self.is_over(now) {
                self.shared.said_goodbye();
                return Ok(());
            }
            self.keep_time(now);
            match self.poll.poll(&mut events, self.timeout(now)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            let now = Instant::now();
            for event in &events {
                self.handle(event.token().0, now);
            }
            let Self { acceptor, identity, connections, poll, .. } = self;
            let has_left = self.linger_until.is_some();
            let host = Reception { identity, connections, has_left };
            acceptor.accept(&host, poll.registry(), now);
            self.acceptor.sweep(self.poll.registry(), now);
            for command in self.shared.take_commands() {
                self.obey(command);
            }
            self.look_after_cuts(now);
            self.expire(now);
            self.follow_view(now);
            self.tell_process(now);
            self.check_abandoned();
        }
    }

    fn handle(&mut self, token: usize, now: Instant) {
        match token {
            LISTENER => self.acceptor.readable(),
            token if self.acceptor.has_pending(token) => self.visit(token, now),
            token if self.cuts.is_returning(token) => self.hear_returning(token),
            token => self.serve(token),
        }
    }

    fn visit(&mut self, token: usize, now: Instant) {
        let Self { acceptor, identity, connections, poll, .. } = self;
        let has_left = self.linger_until.is_some();
        let host = Reception { identity, connections, has_left };
        let admitted = acceptor.visit(token, &host, poll.registry(), now);
        let Some(admitted) = admitted else { return };
        if admitted.hello.purpose == Purpose::Resume {
            return self.returns(admitted, now);
        }
        let member = Member(u64::from(admitted.hello.from));
        match identity.connection((admitted.connection, admitted.address)) {
            Ok(connection) => {
                self.connections.insert(admitted.token, (member, connection));
                self.meet(admitted.token, member);
            }
            // It sees its connection end.
            Err(error) => unisum_link::warning!(?member, %error, "a member's connection failed"),
        }
    }

    /// Takes a connection over that this process has opened.
    fn connected(&mut self, member: Member, met: (Proven, SocketAddr)) {
        let token = self.next_token;
        self.next_token += 1;
        let made = self.identity.connection(met).and_then(|connection| {
            let socket = connection.stream().as_raw_fd();
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut SourceFd(&socket), Token(token), interest)?;
            Ok(connection)
        });
        match made {
            Ok(connection) => {
                self.connections.insert(token, (member, connection));
                self.meet(token, member);
            }
            Err(error) => {
                unisum_link::warning!(?member, %error, "a member's connection failed");
                self.lose(member);
            }
        }
    }

    /// Reads and handles all that a connection brings.
    fn serve(&mut self, token: usize) {
        while let Some((member, connection)) = self.connections.get_mut(&token) {
            let member = *member;
            let received = connection.receive();
            while let Some((_, connection)) = self.connections.get_mut(&token) {
                let word = match connection.next() {
                    Ok(None) => {
                        connection.acknowledge();
                        break;
                    }
                    Ok(Some(Message::View(bytes))) => Word::decode(bytes),
                    Ok(Some(_)) | Err(_) => None,
                };
                let Some(word) = word else {
                    unisum_link::warning!(?member, "a member said what no member says");
                    return self.end(token);
                };
                self.hear(member, word);
            }
            match received {
                Ok(Received::More) => {}
                Ok(Received::Drained) => return,
                Ok(Received::Ended) => return self.ended(token),
                Err(error) => {
                    if is_altered(&error) {
                        unisum_link::warning!(?member, %error, "a member's connection is cut");
                    }
                    return self.ended(token);
                }
            }
        }
    }

    fn hear(&mut self, member: Member, word: Word) {
        match word {
            Word::Agreement(message) => {
                if let AgreementMessage::Decided(view) = &message {
                    self.see(view);
                }
                let output = self.participant.hear(member, message);
                self.carry(output);
            }
            // A newcomer that has given up: nobody is to wait for it.
            Word::Bye if !self.participant.view().has(member) => {
                self.departs(member);
                self.lose(member);
            }
            Word::Bye => {
                self.departs(member);
                self.count_departed();
            }
            Word::Tell { epoch, value } => self.shared.set_told(epoch, value.into()),
            Word::Directory(entries) => self.learn(member, entries),
            Word::Terms(terms) => self.compare(&terms),
        }
    }

    /// A member, or a process that asks to be let in, leaves in order.
    fn departs(&mut self, member: Member) {
        self.departed.insert(member);
        self.cuts.leaves(member);
    }

    /// A connection has ended: for good, unless it may go on in another one.
    fn ended(&mut self, token: usize) {
        if !self.cut(token) {
            self.end(token);
        }
    }

    /// A connection has ended for good.
    fn end(&mut self, token: usize) {
        let Some((member, connection)) = self.connections.remove(&token) else { return };
        let socket = connection.stream().as_raw_fd();
        // Dropping it deregisters it too, unless a forked child holds it as well.
        let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
        drop(connection);
        self.parted(member);
    }

    /// There is no connection with another process any more.
    fn parted(&mut self, member: Member) {
        self.part_from(member);
        if self.linger_until.is_none() && !self.departed.contains(&member) {
            self.lose(member);
        }
    }

    fn lose(&mut self, member: Member) {
        let output = self.participant.lose(member);
        self.carry(output);
    }

    /// Who has left in order is missed only by those that need another view.
    fn count_departed(&mut self) {
        if !self.participant.is_changing() && self.needs_all == 0 {
            return;
        }
        for member in std::mem::take(&mut self.departed) {
            let output = self.participant.lose(member);
            self.send_all(output);
        }
    }

    /// Sends what the participant has to say.
    fn carry(&mut self, output: Output) {
        self.send_all(output);
        self.count_departed();
    }

    fn send_all(&mut self, output: Output) {
        for (to, message) in output.sends {
            self.send(to, &Word::Agreement(message));
        }
    }

    fn send(&mut self, to: Member, word: &Word) {
        let encoded = encode(word);
        match self.connections.values_mut().find(|(member, _)| *member == to) {
            Some((_, connection)) => connection.queue(encoded),
            // To a member whose connection has ended nothing can be said: it is lost, or about to
            // be.
            None => self.keep_for(to, encoded),
        }
    }

    fn obey(&mut self, command: Command) {
        if self.linger_until.is_some() {
            return;
        }
        match command {
            Command::Connected(member, proven, at) => self.connected(member, (proven, at)),
            Command::Unreached(member, why) => self.unreached(member, &why),
            Command::Change { epoch, out, admits } => {
                let output = self.participant.change(epoch, &out, admits);
                self.carry(output);
            }
            Command::Tell { epoch, value } => {
                self.shared.set_told(epoch, value.clone());
                let word = Word::Tell { epoch, value: value.into() };
                let connected = self.connections.values().map(|(member, _)| *member);
                let members = self.participant.view().members.iter().copied();
                let all: BTreeSet<Member> = connected.chain(members).collect();
                all.into_iter().for_each(|it| self.send(it, &word));
            }
            Command::NeedAll(need) => {
                self.needs_all =
                    if need { self.needs_all + 1 } else { self.needs_all.saturating_sub(1) };
                self.count_departed();
            }
            Command::Leave => self.leave(),
        }
    }

    /// Nothing is said after the goodbye.
    fn leave(&mut self) {
        self.linger_until = Some(Instant::now() + LINGER);
        self.forget_given_up();
        if !self.cuts.are_survived() {
            self.acceptor.close(self.poll.registry());
        }
        for (_, connection) in self.connections.values_mut() {
            connection.queue(encode(&Word::Bye));
        }
        self.finish_told();
    }

    /// Ends what is sent where all was said; where connections go on, once the other end has it:
    /// until then, what it says is acknowledged, and it may come back for the rest.
    fn finish_told(&mut self) {
        for (member, connection) in self.connections.values_mut() {
            if !self.cuts.are_survived() || self.cuts.is_told(*member, connection) {
                connection.finish();
            }
        }
    }

    /// Writes what is queued.
    fn flush(&mut self) {
        if self.linger_until.is_some() {
            self.finish_told();
        }
        loop {
            let flush = |(token, (_, connection)): (&usize, &mut (Member, Connection))| {
                connection.flush().err().map(|_| *token)
            };
            let Some(token) = self.connections.iter_mut().find_map(flush) else { break };
            // What the other end said before is read first.
            self.serve(token);
            self.ended(token);
        }
        if self.linger_until.is_none() {
            return;
        }
        if self.are_told() {
            self.shared.said_goodbye();
        }
    }

    /// Whether all others have what was said to them.
    fn are_told(&self) -> bool {
        self.connections.values().all(|(member, it)| self.cuts.is_told(*member, it))
    }

    /// Starts the clock of what the participant waits for, or starts it anew.
    fn keep_time(&mut self, now: Instant) {
        let waits = self.participant.waits();
        let runs = self.timer.map(|(wait, _)| wait);
        if waits == runs {
            return;
        }
        self.timer = waits.map(|wait| {
            let Wait { timer, ballot, .. } = wait;
            let silence = self.identity.silence_of(timer);
            let lasts = timer.lasts(silence, self.participant.rank(), ballot);
            (wait, now + lasts)
        });
    }

    fn expire(&mut self, now: Instant) {
        let Some((wait, _)) = self.timer.take_if(|(_, at)| *at <= now) else { return };
        let output = self.participant.expire(wait.timer);
        self.carry(output);
    }

    /// Says how things stand to the process's other threads.
    fn tell_process(&mut self, now: Instant) {
        let (view, standing) = (self.participant.view().clone(), self.participant.standing());
        let stranded = (standing == Standing::Stranded).then_some(now);
        self.stranded_since = stranded.map(|now| self.stranded_since.unwrap_or(now));
        let is_final = self.stranded_since.is_some_and(|since| now - since >= STRANDED_FOR);
        let end = match standing {
            Standing::Excluded => Some(format!(
                "the other ranks went on without this one, in epoch {}: they lost their \
                 connections to it, or it did not answer in time, or it was asked out",
                view.epoch
            )),
            Standing::Stranded if is_final => Some(self.describe_stranded(&view)),
            _ => None,
        };
        let is_changing = self.participant.is_changing() || standing == Standing::Stranded;
        let newcomers = self.participant.newcomers();
        self.shared.update(Membership { view, standing, is_changing, newcomers, end });
    }

    fn describe_stranded(&self, view: &View) -> String {
        let out: BTreeSet<Member> = self.participant.out().collect();
        let lost: Vec<usize> = view
            .members
            .iter()
            .filter_map(|it| view.rank(*it).filter(|_| out.contains(it)))
            .collect();
        let (left, world) = (world_left(view, &lost), view.members.len());
        let rule = if 2 * left == world {
            ": of two halves the one with rank 0 goes on"
        } else {
            ": the others may have gone on without this one"
        };
        format!(
            "ranks {lost:?} of {world} in epoch {} are lost, and the {left} that are left are no \
             quorum{rule}",
            view.epoch
        )
    }

    /// After the goodbyes: when to end if no connection is away. Who goes before its goodbye was
    /// taken would look dead if it was destroyed on its way.
    fn stays_until(&self) -> Option<Instant> {
        let more = if self.are_told() { Duration::ZERO } else { self.identity.reconnect_timeout };
        self.linger_until.map(|until| until + more)
    }

    fn is_over(&self, now: Instant) -> bool {
        let has_time = |until: Instant| until > now || self.cuts.are_open();
        self.stays_until().is_some_and(|until| self.connections.is_empty() || !has_time(until))
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        let stranded = self.stranded_since.filter(|_| !self.shared.membership().is_over());
        let due = [
            self.acceptor.deadline(now),
            self.timer.map(|(_, at)| at),
            stranded.map(|since| since + STRANDED_FOR),
            self.stays_until().filter(|_| !self.cuts.are_open()),
            self.mesh.deadline(),
            self.cuts.deadline(now),
            self.look_for_silence_at(now),
        ];
        due.into_iter().flatten().min().map(|at| at.saturating_duration_since(now))
    }
}

fn world_left(view: &View, lost: &[usize]) -> usize {
    view.members.len() - lost.len()
}

/// What the acceptor of a member knows of those who come.
struct Reception<'a> {
    identity: &'a Identity,
    connections: &'a BTreeMap<usize, (Member, Connection)>,
    /// Whether this process has said goodbye: nobody is met any more.
    has_left: bool,
}

impl Host for Reception<'_> {
    fn credentials(&self) -> &Credentials {
        &self.identity.credentials
    }

    fn knows(&self, preamble: Preamble) -> bool {
        preamble == self.identity.preamble
    }

    /// A newcomer was told the session before it comes here.
    fn awaits_unknown(&self) -> bool {
        false
    }

    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        if self.has_left && hello.purpose == Purpose::View {
            // As if nobody listened: another member may be asked.
            return Err(Refusal::Session);
        }
        let is_connected = |member| self.connections.values().any(|(it, _)| *it == member);
        self.identity.admit(hello, is_connected)
    }
}

impl Identity {
    /// Whether a connection that has proven the token may come in.
    fn admit(&self, hello: &Hello, is_connected: impl Fn(Member) -> bool) -> Result<(), Refusal> {
        let Hello { from, to, .. } = *hello;
        if hello.job != self.job {
            return Err(Refusal::Job);
        }
        if hello.build != self.build {
            return Err(Refusal::Build { from, to, theirs: hello.build, ours: self.build });
        }
        if hello.session != self.session {
            return Err(Refusal::Session);
        }
        if u64::from(to) != self.own.0 || from == to {
            return Err(Refusal::Rank { from, to });
        }
        let member = Member(u64::from(from));
        // The one with the larger number dials; but a newcomer any member that the record names.
        let goes_on = !self.reconnect_timeout.is_zero() && member > self.own;
        match (hello.purpose, is_connected(member)) {
            (Purpose::View, false) => Ok(()),
            (Purpose::Resume, true) if goes_on => Ok(()),
            (Purpose::View, true) => Err(Refusal::RankTaken {
                rank: from,
                first: "another process".into(),
                second: hello.process(),
            }),
            _ => Err(Refusal::Rank { from, to }),
        }
    }

    /// The kernel ends it when the other host has not answered for `silence`.
    fn connection(&self, (proven, at): (Proven, SocketAddr)) -> io::Result<Connection> {
        let Self { silence, reconnect_timeout, .. } = *self;
        let mut connection = Connection::new(proven, silence)?.with_peer(at);
        if !reconnect_timeout.is_zero() {
            connection = connection.resumable(silence)?;
        }
        let socket = SockRef::from(connection.stream());
        let keepalive = TcpKeepalive::new().with_time(PERIOD).with_interval(PERIOD);
        socket.set_tcp_keepalive(&keepalive)?;
        // From the last answer on, which may have come a period before an outage began.
        socket.set_tcp_user_timeout(Some(silence.saturating_add(PERIOD)))?;
        Ok(connection)
    }

    /// How long silence may last before it convicts, where an answer is awaited or a proposer is:
    /// a connection that is silent for that long may yet be cut then, and go on.
    fn silence_of(&self, timer: Timer) -> Duration {
        match timer {
            Timer::Silence | Timer::Patience if !self.reconnect_timeout.is_zero() => {
                self.silence + 2 * PERIOD + self.reconnect_timeout
            }
            _ => self.silence,
        }
    }
}

fn encode(word: &Word) -> Bytes {
    let mut encoded = BytesMut::new();
    Message::View(word.encode()).encode(&mut encoded);
    encoded.freeze()
}
