//! Connections between two processes of an elastic job that were cut while both live: they go on in
//! others, and no view changes.
//!
//! As for other control connections (`thread/resuming`): of the two processes, the one with the
//! larger number dials again, and the other one asks the first one's port whether it is there. A
//! port that refuses has lost its process, which is then lost at once; so is one that has not come
//! back when the time is up. Until then both keep what they have to say, and the agreement waits
//! for the answers. A connection goes on for one of the same two processes in the same session
//! only: a process that comes back is another one, with another number.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Token};
use unisum_link::handshake::{HandshakeError, Refusal};
use unisum_views::Member;

use super::ViewsThread;
use crate::acceptor::Admitted;
use crate::asking::Asking;
use crate::connection::{Connection, Received};
use crate::dial::{Again, Reached};
use crate::resume::{Impossible, Word};

/// How long a connection that comes to go on for another one may take to say so.
const WORD_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look for the end of an attempt whose time is up.
const LOOK: Duration = Duration::from_millis(10);
/// Attempts to dial after one cut, at most: their numbers are not used after the next one.
const ATTEMPTS_BITS: u32 = 20;

/// What was cut, and who comes back.
pub(super) struct Cuts {
    /// How long a connection may take to go on; zero if none ever does.
    timeout: Duration,
    /// By the connection's token.
    open: BTreeMap<usize, Cut>,
    /// Connections that come to go on for a process's, and have not said so yet; until when they
    /// may.
    returning: BTreeMap<usize, (Member, Connection, Instant)>,
    /// The newest attempt of each process that dials this one.
    attempts: BTreeMap<Member, u64>,
    /// How often a connection was cut that this process had dialled.
    own_cuts: u64,
    /// Who has said goodbye: nothing is left to say to them.
    left: BTreeSet<Member>,
}

struct Cut {
    until: Instant,
    search: Search,
}

/// How it is found out whether the other process is there.
enum Search {
    /// On the one that was dialled.
    Asking(Asking),
    /// On the one that dials. Its result wakes the thread.
    Dialing(Receiver<Again>),
    /// Not any more: it lives, and has given this process up.
    GivenUp,
}

/// What a look at a connection that was cut has shown.
enum Outcome {
    Open,
    Lost(&'static str),
    Refused(String),
    Reached(Reached, u64),
}

impl Cuts {
    /// Connections may take so long to go on after they were cut.
    pub(super) const fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            open: BTreeMap::new(),
            returning: BTreeMap::new(),
            attempts: BTreeMap::new(),
            own_cuts: 0,
            left: BTreeSet::new(),
        }
    }

    /// Whether connections go on after they were cut.
    pub(super) const fn are_survived(&self) -> bool {
        !self.timeout.is_zero()
    }

    /// Whether there are connections that are to go on.
    pub(super) fn are_open(&self) -> bool {
        !self.open.is_empty()
    }

    pub(super) fn is_returning(&self, token: usize) -> bool {
        self.returning.contains_key(&token)
    }

    /// A process has said goodbye.
    pub(super) fn leaves(&mut self, member: Member) {
        self.left.insert(member);
    }

    /// Whether the other end has all that was said, or does not care any more.
    pub(super) fn is_told(&self, member: Member, connection: &Connection) -> bool {
        connection.is_flushed() || self.are_survived() && self.left.contains(&member)
    }

    /// When there is something to look at.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let due = |cut: &Cut| match &cut.search {
            Search::Asking(asking) => asking.deadline(now).min(cut.until),
            Search::Dialing(_) => cut.until.max(now + LOOK),
            Search::GivenUp => cut.until,
        };
        let returning = self.returning.values().map(|(_, _, until)| *until);
        self.open.values().map(due).chain(returning).min()
    }
}

impl Cut {
    const fn is_given_up(&self) -> bool {
        matches!(self.search, Search::GivenUp)
    }

    fn look(&mut self, now: Instant) -> Outcome {
        match &mut self.search {
            Search::Asking(asking) => match asking.finds_none(now) {
                true => Outcome::Lost("its port refuses connections"),
                false if self.until <= now => Outcome::Lost("it did not come back in time"),
                false => Outcome::Open,
            },
            Search::Dialing(again) => match again.try_recv() {
                Err(TryRecvError::Empty) => Outcome::Open,
                Ok(Again::Reached(reached, taken)) => Outcome::Reached(reached, taken),
                Ok(Again::Gone) => Outcome::Lost("its port refuses connections"),
                Ok(Again::Refused(why)) => Outcome::Refused(why),
                Ok(Again::Silent) | Err(TryRecvError::Disconnected) => {
                    Outcome::Lost("it was not reached in time")
                }
            },
            Search::GivenUp if self.until <= now => Outcome::Lost("it does not go on"),
            Search::GivenUp => Outcome::Open,
        }
    }
}

impl ViewsThread {
    /// Takes the end of a connection for a cut, if it may be one and the connection is needed any
    /// more.
    pub(super) fn cut(&mut self, token: usize) -> bool {
        let now = Instant::now();
        self.cut_until(token, (now, now + self.cuts.timeout))
    }

    /// The same of one that is to go on by then.
    fn cut_until(&mut self, token: usize, (now, until): (Instant, Instant)) -> bool {
        if self.cuts.open.contains_key(&token) {
            return true;
        }
        let Some((member, connection)) = self.connections.get(&token) else { return true };
        let (member, peer, taken) = (*member, connection.peer(), connection.taken());
        let (leaves, has_left) = (self.linger_until.is_some(), self.cuts.left.contains(&member));
        // Who has left waits until it knows that this was heard, and may not be able to dial.
        let is_awaited = !leaves && self.identity.own > member;
        let is_needed = if has_left { is_awaited } else { !leaves || !connection.is_settled() };
        // Who has not said yet where it listens can't be asked.
        let told = self.shared.addresses(member);
        let peer = peer.filter(|_| self.cuts.are_survived() && is_needed && !told.is_empty());
        let Some(peer) = peer else { return false };
        let search = self.search(member, (peer, told), taken, (now, until));
        let Some(search) = search else { return false };
        let Some((_, connection)) = self.connections.get_mut(&token) else { return true };
        // Closing it deregisters it too, but it stays open until another one goes on.
        let socket = connection.stream().as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
        connection.cut();
        tracing::info!(?member, "a connection of the elastic job was cut: it is to go on");
        self.cuts.open.insert(token, Cut { until, search });
        true
    }

    /// Begins to find out whether a process is there. `None` if that is not possible.
    fn search(
        &mut self,
        member: Member,
        (peer, told): (SocketAddr, Vec<SocketAddr>),
        taken: u64,
        (now, until): (Instant, Instant),
    ) -> Option<Search> {
        let is_there = |it: &SocketAddr| it.ip().to_canonical() == peer.ip().to_canonical();
        let (mut addresses, others): (Vec<_>, Vec<_>) = told.into_iter().partition(is_there);
        if self.identity.own < member {
            // Another address may lead to another host, which has nobody there.
            let proven = if addresses.is_empty() { others } else { addresses };
            return Some(Search::Asking(Asking::new(proven, now)));
        }
        // A newcomer may have dialled this process, from a port where nobody listens.
        if addresses.is_empty() || addresses.contains(&peer) {
            addresses.retain(|it| *it != peer);
            addresses.insert(0, peer);
        }
        addresses.extend(others);
        self.cuts.own_cuts += 1;
        let attempt = self.cuts.own_cuts << ATTEMPTS_BITS;
        self.mesh.again(member, addresses, (attempt, taken), until).map(Search::Dialing)
    }

    /// Takes those connections for cut that this process dials and on which nothing is heard of the
    /// other host, where TCP would miss the end of an outage for long. How long the host may be
    /// silent counts as well: this is no end.
    fn look_for_silence(&mut self, now: Instant) {
        let own = self.identity.own;
        let dialled = self.connections.iter_mut().filter(|(_, (member, _))| *member < own);
        let silent = dialled.filter_map(|(token, (_, it))| it.is_silent(now).then_some(*token));
        let until = now + self.identity.silence + self.cuts.timeout;
        for token in silent.collect::<Vec<_>>() {
            self.cut_until(token, (now, until));
        }
    }

    /// When to look for that next.
    pub(super) fn look_for_silence_at(&self, now: Instant) -> Option<Instant> {
        let dialled = self.connections.values().filter(|(it, _)| *it < self.identity.own);
        dialled.filter_map(|(_, connection)| connection.look_at(now)).min()
    }

    /// Looks what has become of the connections that were cut.
    pub(super) fn look_after_cuts(&mut self, now: Instant) {
        self.look_for_silence(now);
        self.cuts.returning.retain(|_, (_, _, until)| *until > now);
        let looks = self.cuts.open.iter_mut().map(|(token, cut)| (*token, cut.look(now)));
        for (token, outcome) in looks.collect::<Vec<_>>() {
            match outcome {
                Outcome::Open => {}
                Outcome::Lost(why) => self.give_up(token, why),
                Outcome::Refused(why) => self.refused(token, &why),
                Outcome::Reached(reached, taken) => self.reached_again(token, reached, taken),
            }
        }
    }

    /// A process does not go on with this one.
    fn refused(&mut self, token: usize, why: &str) {
        let Some((member, _)) = self.connections.get(&token) else { return };
        let (from, to) = (self.identity.own.0 as u32, member.0 as u32);
        let given_up = HandshakeError::Refused(Refusal::Rank { from, to }.to_string()).to_string();
        let is_over = self.linger_until.is_some() || self.cuts.left.contains(member);
        match self.cuts.open.get_mut(&token) {
            // It has lost this process, and says so to the others. If this one accused it in turn,
            // both could be left out; but if there are no others, it is lost when the time is up.
            Some(cut) if why == given_up && !is_over => {
                tracing::info!(?member, why, "a member does not go on with this process");
                cut.search = Search::GivenUp;
            }
            _ => self.give_up(token, why),
        }
    }

    /// Who leaves has nothing to say to those that have given it up.
    pub(super) fn forget_given_up(&mut self) {
        let given_up = self.cuts.open.iter().filter(|(_, cut)| cut.is_given_up());
        for token in given_up.map(|(token, _)| *token).collect::<Vec<_>>() {
            self.give_up(token, "this process leaves");
        }
    }

    fn give_up(&mut self, token: usize, why: &str) {
        if self.cuts.open.remove(&token).is_some()
            && let Some((member, _)) = self.connections.get(&token)
        {
            tracing::info!(?member, why, "a connection of the elastic job does not go on");
        }
        self.end(token);
    }

    /// Goes on with a process that has taken so many messages.
    fn reached_again(&mut self, token: usize, reached: Reached, taken: u64) {
        self.cuts.open.remove(&token);
        if self.connections.get(&token).is_some_and(|(it, _)| self.cuts.left.contains(it)) {
            // Now it knows that its goodbye was heard.
            return self.end(token);
        }
        match self.go_on(token, reached, taken) {
            Ok(Ok(())) => {
                // Something may have come together with the word that it goes on.
                self.serve(token);
            }
            Ok(Err(Impossible)) => self.give_up(token, NEVER_SAID),
            Err(error) => {
                tracing::info!(%error, "a connection of the elastic job that was to go on failed");
                self.ended(token);
            }
        }
    }

    fn go_on(
        &mut self,
        token: usize,
        reached: Reached,
        taken: u64,
    ) -> io::Result<Result<(), Impossible>> {
        let other = self.identity.connection((reached.connection, reached.coordinator))?;
        let Some((member, connection)) = self.connections.get_mut(&token) else {
            return Ok(Ok(()));
        };
        if connection.go_on(other, taken).is_err() {
            return Ok(Err(Impossible));
        }
        let socket = connection.stream().as_raw_fd();
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut SourceFd(&socket), Token(token), interest)?;
        tracing::info!(?member, "a connection of the elastic job goes on");
        Ok(Ok(()))
    }

    /// Takes a connection in that comes to go on for a process's.
    pub(super) fn returns(&mut self, admitted: Admitted, now: Instant) {
        let member = Member(u64::from(admitted.hello.from));
        match self.identity.connection((admitted.connection, admitted.address)) {
            Ok(connection) => {
                let returning = (member, connection, now + WORD_TIMEOUT);
                self.cuts.returning.insert(admitted.token, returning);
                self.hear_returning(admitted.token);
            }
            // It sees its connection end, and dials again.
            Err(error) => unisum_link::warning!(?member, %error, "a member's connection failed"),
        }
    }

    /// Hears what a connection says that comes to go on for a process's.
    pub(super) fn hear_returning(&mut self, token: usize) {
        while let Some((_, connection, _)) = self.cuts.returning.get_mut(&token) {
            let received = connection.receive();
            match (connection.word(), received) {
                (Ok(Some(Word::Resume { attempt, taken })), _) => {
                    return self.take_back(token, attempt, taken);
                }
                (Ok(None), Ok(Received::More)) => {}
                (Ok(None), Ok(Received::Drained)) => return,
                // Whoever it is dials again, and is told why not then.
                _ => drop(self.cuts.returning.remove(&token)),
            }
        }
    }

    /// Goes on with a process's connection in another one, unless that has made a newer attempt.
    fn take_back(&mut self, token: usize, attempt: u64, taken: u64) {
        let Some((member, mut other, _)) = self.cuts.returning.remove(&token) else { return };
        let newest = self.cuts.attempts.get(&member).copied().unwrap_or(0);
        let mut all = self.connections.iter();
        let before = all.find(|(_, (it, _))| *it == member).map(|(token, _)| *token);
        let Some(before) = before.filter(|_| attempt > newest) else { return };
        let Some((_, mut connection)) = self.connections.remove(&before) else { return };
        self.cuts.attempts.insert(member, attempt);
        if self.cuts.open.remove(&before).is_none() {
            // Its end has not been seen here.
            let socket = connection.stream().as_raw_fd();
            let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
            connection.cut();
        }
        other.queue_word(Word::Resumed { taken: connection.taken() });
        if connection.go_on(other, taken).is_ok() {
            tracing::info!(?member, "a connection of the elastic job goes on");
            self.connections.insert(token, (member, connection));
            return self.serve(token);
        }
        unisum_link::warning!(?member, "{NEVER_SAID}");
        drop(connection);
        self.parted(member);
    }
}

const NEVER_SAID: &str = "it says that it has taken messages which were never sent";
