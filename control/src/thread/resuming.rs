//! Control connections that were cut while the processes at both ends live: they go on in others.
//!
//! A connection that ends looks the same whether the process at its other end has died or something
//! in between has cut it, so both ends look whether that process is there. The rank dials the
//! coordinator again, and the coordinator asks the rank's listening port (`asking`), as it can't
//! tell the rank to dial. A port that refuses has lost its process: that is a death, and known at
//! once. Who answers goes on, and both say again what the other has not taken (`resume`). Who is
//! silent, or answers and does not go on, is lost when the time is up.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Token};
use unisum_link::Rank;
use unisum_link::handshake::Purpose;

use super::{COORDINATOR, ControlThread, PULSE};
use crate::acceptor::Admitted;
use crate::asking::Asking;
use crate::connection::{Connection, Received};
use crate::dial::{self, Again, Reached};
use crate::pulse;
use crate::resume::{Impossible, Word};

/// How long a connection that comes to go on for another one may take to say so.
const WORD_TIMEOUT: Duration = Duration::from_secs(5);
/// Those whose time is up so soon after the first one's are lost together with it, once it is.
const GATHER: Duration = Duration::from_millis(1500);
/// How often to look what became of an attempt to dial.
const LOOK: Duration = Duration::from_millis(10);
/// Attempts to dial after one cut, at most: their numbers are not used after the next one.
const ATTEMPTS_BITS: u32 = 20;

/// What was cut, and who comes back.
pub(crate) struct Resuming {
    /// How long a connection may take to go on; zero if none ever does.
    timeout: Duration,
    /// By the connection's token.
    cuts: BTreeMap<usize, Cut>,
    /// Connections that come to go on for a rank's, and have not said so yet; until when they may.
    returning: BTreeMap<usize, (Rank, Connection, Instant)>,
    /// The newest attempt of each rank.
    attempts: BTreeMap<Rank, u64>,
    /// How often this rank's connection to a coordinator was cut.
    own_cuts: u64,
}

struct Cut {
    how: String,
    at: IpAddr,
    until: Instant,
    search: Search,
}

/// How it is found out whether the other end is there.
enum Search {
    /// On the coordinator.
    Asking(Asking),
    /// On other ranks.
    Dialing(Receiver<Again>),
}

/// What a look at a connection that was cut has shown.
enum Outcome {
    Open,
    Gone(String),
    Lost,
    Reached(Reached, u64),
}

impl Resuming {
    /// Connections may take so long to go on after they were cut.
    pub(crate) fn new(timeout: Duration) -> Self {
        let (cuts, returning, attempts) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { timeout, cuts, returning, attempts, own_cuts: 0 }
    }

    /// Whether connections go on after they were cut.
    pub(super) const fn is_on(&self) -> bool {
        !self.timeout.is_zero()
    }

    pub(super) const fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn is_returning(&self, token: usize) -> bool {
        self.returning.contains_key(&token)
    }

    /// When there is something to look at.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let due = |cut: &Cut| match &cut.search {
            Search::Asking(asking) => asking.deadline(now),
            Search::Dialing(_) => now + LOOK,
        };
        let returning = self.returning.values().map(|(_, _, until)| *until);
        // Its time may be up while the last attempt to dial still goes on.
        let loss = self.loss().map(|it| it.max(now + LOOK));
        self.cuts.values().map(due).chain(returning).chain(loss).min()
    }

    /// When connections are lost next, unless they go on. Nobody is lost before its time is up.
    fn loss(&self) -> Option<Instant> {
        let gather = GATHER.min(self.timeout / 4);
        last_with_first(self.cuts.values().map(|cut| cut.until), gather)
    }
}

/// The last of those that come `within` so much after the first one.
fn last_with_first(
    all: impl Iterator<Item = Instant> + Clone,
    within: Duration,
) -> Option<Instant> {
    let by = all.clone().min()? + within;
    all.filter(|it| *it <= by).max()
}

impl Cut {
    fn look(&mut self, now: Instant) -> Outcome {
        match &mut self.search {
            Search::Asking(asking) => match asking.finds_none(now) {
                true => Outcome::Gone(self.how.clone()),
                false if self.until <= now => Outcome::Lost,
                false => Outcome::Open,
            },
            Search::Dialing(again) => match again.try_recv() {
                Err(TryRecvError::Empty) => Outcome::Open,
                Ok(Again::Reached(reached, taken)) => Outcome::Reached(reached, taken),
                Ok(Again::Gone) => Outcome::Gone(self.how.clone()),
                Ok(Again::Refused(why)) => {
                    Outcome::Gone(format!("{}, and it does not go on: {why}", self.how))
                }
                Ok(Again::Silent) | Err(TryRecvError::Disconnected) => Outcome::Lost,
            },
        }
    }
}

impl ControlThread {
    /// Takes the end of a connection for a cut, if it may be one and the connection is needed any
    /// more.
    pub(super) fn cut(&mut self, token: usize, how: &str, now: Instant) -> bool {
        self.cut_until(token, how, (now, now + self.resuming.timeout))
    }

    /// The same of one that is to go on by then.
    fn cut_until(&mut self, token: usize, how: &str, (now, until): (Instant, Instant)) -> bool {
        if self.resuming.cuts.contains_key(&token) {
            return true;
        }
        let Some((rank, connection)) = self.connections.get(&token) else { return true };
        let (rank, peer) = (*rank, connection.peer());
        let told = self.shared.addresses_of(rank);
        // Until all know where each rank listens, nobody could be asked.
        let Some(peer) = peer.filter(|_| self.resuming.is_on() && !told.is_empty()) else {
            return false;
        };
        if !self.is_needed(rank, connection) {
            return false;
        }
        let Some(search) = self.search(rank, (peer, told), connection.taken(), (now, until)) else {
            return false;
        };
        let Some((_, connection)) = self.connections.get_mut(&token) else { return true };
        // Closing it deregisters it too, but it stays open until another one goes on.
        let socket = connection.stream().as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
        connection.cut();
        unisum_link::warning!(rank, how, "a control connection was cut: it is to go on");
        match &mut self.coordinator {
            Some(coordinator) => coordinator.cut(rank, now),
            None => self.member.cut(),
        }
        let (how, at) = (how.to_owned(), peer.ip().to_canonical());
        self.resuming.cuts.insert(token, Cut { how, at, until, search });
        true
    }

    /// Whether anything is yet to be said on a connection that has ended.
    fn is_needed(&self, rank: Rank, connection: &Connection) -> bool {
        let is_over = self.linger_until.is_some()
            || match &self.coordinator {
                Some(coordinator) => coordinator.is_over(),
                None => self.shared.verdict().is_some(),
            };
        let is_here = self.coordinator.as_ref().is_none_or(|it| it.has_joined(rank));
        is_here && !(is_over && connection.is_settled())
    }

    /// Begins to find out whether a process is there. `None` if that is not possible.
    fn search(
        &mut self,
        rank: Rank,
        (peer, told): (SocketAddr, Vec<SocketAddr>),
        taken: u64,
        (now, until): (Instant, Instant),
    ) -> Option<Search> {
        if self.coordinator.is_some() {
            // Another address may lead to another host, which has nobody there.
            let is_proven = |it: &&SocketAddr| it.ip().to_canonical() == peer.ip().to_canonical();
            let proven: Vec<_> = told.iter().filter(is_proven).copied().collect();
            let addresses = if proven.is_empty() { told } else { proven };
            return Some(Search::Asking(Asking::new(addresses, now)));
        }
        let hello = self.hello(Purpose::Resume, rank);
        let credentials = self.identity.credentials.clone();
        let others = told.into_iter().filter(|it| *it != peer);
        let addresses: Vec<_> = [peer].into_iter().chain(others).collect();
        self.resuming.own_cuts += 1;
        let attempt = self.resuming.own_cuts << ATTEMPTS_BITS;
        let (sender, again) = mpsc::channel();
        let dial = move || {
            let with = (&hello, &credentials);
            // Nobody waits for it any more if this rank has left.
            let _ = sender.send(dial::again(&addresses, with, (attempt, taken), until, true));
        };
        let spawned = thread::Builder::new().name("unisum-again".into()).spawn(dial);
        spawned.is_ok().then_some(Search::Dialing(again))
    }

    /// Takes a connection for cut on which nothing is heard of the coordinator's host, where TCP
    /// would miss the end of an outage for long. How long the host may be silent counts as well:
    /// this is no end.
    fn look_for_silence(&mut self, now: Instant) {
        if self.coordinator.is_some() {
            // The other end dials, and the kernel there asks every second.
            return;
        }
        let Some((_, connection)) = self.connections.get_mut(&COORDINATOR) else { return };
        if connection.is_silent(now) {
            let until = now + self.pulses.limit() + self.resuming.timeout;
            self.cut_until(COORDINATOR, "nothing is heard of its host", (now, until));
        }
    }

    /// When to look for that next.
    pub(super) fn look_for_silence_at(&self, now: Instant) -> Option<Instant> {
        let connection = self.connections.get(&COORDINATOR).filter(|_| self.coordinator.is_none());
        connection.and_then(|(_, connection)| connection.look_at(now))
    }

    /// Looks what has become of the connections that were cut, and of the pulses.
    pub(super) fn look_after_cuts(&mut self, now: Instant) {
        let ended = self.pulses.take_ended();
        if !self.resuming.is_on() {
            if ended.iter().any(|&rank| self.token_of(rank) == Some(COORDINATOR)) {
                self.member.pulse_ended();
            }
            return;
        }
        for rank in ended {
            // The other end dials: on the coordinator that is the rank. Who has said goodbye needs
            // no pulse: it ends with the coordinator, whose last words may be on their way.
            let dials = self.coordinator.is_none() && self.linger_until.is_none();
            if dials && self.token_of(rank) == Some(COORDINATOR) {
                self.cut(COORDINATOR, "the pulse beside its control connection ended", now);
            }
        }
        self.look_for_silence(now);
        let is_in_time = |(_, _, until): &(Rank, Connection, Instant)| *until > now;
        self.resuming.returning.retain(|_, returning| is_in_time(returning));
        let looks = self.resuming.cuts.iter_mut().map(|(token, cut)| (*token, cut.look(now)));
        let mut is_lost = false;
        for (token, outcome) in looks.collect::<Vec<_>>() {
            match outcome {
                Outcome::Open => {}
                Outcome::Lost => is_lost = true,
                Outcome::Gone(how) => {
                    self.resuming.cuts.remove(&token);
                    self.end(token, &how);
                }
                Outcome::Reached(reached, taken) => self.reached_again(reached, taken, now),
            }
        }
        if is_lost {
            self.lose(now);
        }
    }

    /// Ends the connections that have not gone on in time, together.
    fn lose(&mut self, now: Instant) {
        let timeout = self.resuming.timeout;
        let Some(by) = self.resuming.loss().filter(|by| *by <= now) else { return };
        let is_due = |(token, cut): (&usize, &Cut)| (cut.until <= by).then_some(*token);
        let due: Vec<_> = self.resuming.cuts.iter().filter_map(is_due).collect();
        let remove = |token: usize| Some((token, self.resuming.cuts.remove(&token)?));
        let cuts: Vec<_> = due.into_iter().filter_map(remove).collect();
        let rank_of = |token: &usize| self.connections.get(token).map(|(rank, _)| *rank);
        let lost = cuts.iter().filter_map(|(token, cut)| Some((rank_of(token)?, cut.at)));
        let mut lost: Vec<(Rank, IpAddr)> = lost.collect();
        lost.sort_unstable();
        if self.linger_until.is_none() {
            match &mut self.coordinator {
                Some(coordinator) => coordinator.unreachable(&lost, timeout),
                None => self.member.unreachable(&lost, timeout),
            }
        }
        for (token, cut) in cuts {
            self.end(token, &cut.how);
        }
    }

    /// Goes on with the coordinator, which has taken so many messages.
    fn reached_again(&mut self, reached: Reached, taken: u64, now: Instant) {
        self.resuming.cuts.remove(&COORDINATOR);
        match self.go_on(reached, taken) {
            Ok(Ok(())) => {
                tracing::info!("the connection to the coordinator goes on");
                self.member.goes_on(now);
                // Something may have come together with the word that it goes on.
                self.serve(COORDINATOR, now);
            }
            Ok(Err(Impossible)) => self.member.violated(NEVER_SAID),
            Err(error) => self.broke(COORDINATOR, &error),
        }
    }

    fn go_on(&mut self, reached: Reached, taken: u64) -> io::Result<Result<(), Impossible>> {
        let other = self.connection(reached.connection)?;
        let Some((rank, connection)) = self.connections.get_mut(&COORDINATOR) else {
            return Ok(Ok(()));
        };
        if connection.go_on(other, taken).is_err() {
            return Ok(Err(Impossible));
        }
        let (rank, socket) = (*rank, connection.stream().as_raw_fd());
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut SourceFd(&socket), Token(COORDINATOR), interest)?;
        if let Some(stream) = reached.pulse {
            pulse::register(self.poll.registry(), &stream, PULSE)?;
            self.pulses.add(PULSE, rank, stream)?;
        }
        Ok(Ok(()))
    }

    /// Takes a connection in that comes to go on for a rank's.
    pub(super) fn returns(&mut self, admitted: Admitted, now: Instant) {
        let Admitted { token, hello, connection, address } = admitted;
        let rank = hello.from as Rank;
        match self.connection(connection) {
            Ok(connection) => {
                let returning = (rank, connection, now + WORD_TIMEOUT);
                self.resuming.returning.insert(token, returning);
                self.hear_returning(token, now);
            }
            // It sees its connection end, and dials again.
            Err(error) => {
                unisum_link::warning!(%address, rank, %error, "a rank's connection failed")
            }
        }
    }

    /// Hears what a connection says that comes to go on for a rank's.
    pub(super) fn hear_returning(&mut self, token: usize, now: Instant) {
        while let Some((_, connection, _)) = self.resuming.returning.get_mut(&token) {
            let received = connection.receive();
            match (connection.word(), received) {
                (Ok(Some(Word::Resume { attempt, taken })), _) => {
                    return self.take_back(token, (attempt, taken), now);
                }
                (Ok(None), Ok(Received::More)) => {}
                (Ok(None), Ok(Received::Drained)) => return,
                // Who it is dials again, and is told why not then.
                _ => drop(self.resuming.returning.remove(&token)),
            }
        }
    }

    /// Goes on with a rank's connection in another one, unless the rank has made a newer attempt.
    fn take_back(&mut self, token: usize, (attempt, taken): (u64, u64), now: Instant) {
        let Some((rank, mut other, _)) = self.resuming.returning.remove(&token) else { return };
        let newest = self.resuming.attempts.get(&rank).copied().unwrap_or(0);
        let Some(before) = self.token_of(rank).filter(|_| attempt > newest) else { return };
        let Some((_, mut connection)) = self.connections.remove(&before) else { return };
        self.resuming.attempts.insert(rank, attempt);
        if self.resuming.cuts.remove(&before).is_none() {
            // Its end has not been seen here.
            let socket = connection.stream().as_raw_fd();
            let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
            connection.cut();
        }
        other.queue_word(Word::Resumed { taken: connection.taken() });
        let Some(coordinator) = &mut self.coordinator else { return };
        match connection.go_on(other, taken) {
            Ok(()) => {
                tracing::info!(rank, "a rank's connection goes on");
                coordinator.goes_on(rank);
                self.connections.insert(token, (rank, connection));
                self.serve(token, now);
            }
            Err(Impossible) => coordinator.violated(rank, NEVER_SAID),
        }
    }

    /// The token of a rank's connection.
    pub(super) fn token_of(&self, rank: Rank) -> Option<usize> {
        let mut all = self.connections.iter();
        all.find(|(_, (connected, _))| *connected == rank).map(|(token, _)| *token)
    }
}

const NEVER_SAID: &str = "it says that it has taken messages which were never sent";

#[cfg(test)]
mod tests {
    use super::*;

    fn last(of: &[u64], within: u64) -> Option<u64> {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let last = last_with_first(of.iter().map(|&it| start + ms(it)), ms(within));
        last.map(|it| (it - start).as_millis() as u64)
    }

    #[test]
    fn those_that_end_soon_after_the_first_are_waited_for() {
        assert_eq!(last(&[], 100), None);
        assert_eq!(last(&[7], 100), Some(7));
        assert_eq!(last(&[107, 7, 50], 100), Some(107));
        // Who comes later does not put it off, however many come one soon after another.
        assert_eq!(last(&[0, 60, 120, 180], 100), Some(60));
        assert_eq!(last(&[108, 7], 100), Some(7));
        assert_eq!(last(&[9, 8, 7], 0), Some(7));
    }

    /// Who is cut is asked about until the last of those is due that are lost together, and no
    /// deadline has passed that calls for nothing.
    #[test]
    fn nobody_is_lost_early_and_the_thread_rests_until_then() {
        let now = Instant::now();
        let mut resuming = Resuming::new(Duration::from_secs(8));
        let ms = Duration::from_millis;
        for (token, ends) in [(4, 1000), (5, 2400), (6, 2600)] {
            let mut asking = Asking::new(Vec::new(), now);
            assert!(!asking.finds_none(now + ms(1500)));
            let search = Search::Asking(asking);
            let (how, at) = (String::new(), IpAddr::from([127, 0, 0, 1]));
            resuming.cuts.insert(token, Cut { how, at, until: now + ms(ends), search });
        }
        assert_eq!(resuming.loss(), Some(now + ms(2400)));
        let due = resuming.deadline(now + ms(1500)).unwrap();
        assert!(now + ms(1500) < due && due <= now + ms(2400), "{:?}", due - now);
        resuming.cuts.remove(&5);
        assert_eq!(resuming.loss(), Some(now + ms(1000)));
        let (_sender, again) = mpsc::channel();
        resuming.cuts.values_mut().for_each(|cut| cut.until = now + ms(9000));
        let (how, at) = (String::new(), IpAddr::from([127, 0, 0, 1]));
        let search = Search::Dialing(again);
        resuming.cuts.insert(7, Cut { how, at, until: now + ms(1000), search });
        let due = resuming.deadline(now + ms(1501)).unwrap();
        assert!(now + ms(1501) < due, "it does not spin while an attempt to dial goes on");
    }
}
