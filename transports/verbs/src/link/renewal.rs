//! Queue pairs that fail are made anew, where connections may be away for a time.
//!
//! The end that notices first has all its queue pairs with the peer fail. The higher rank dials the
//! lower one's port; the lower one asks at the higher one's until that dials, or its port refuses,
//! which is a death. On that connection each end says how many writes it has heard (see
//! [`crate::exchange`]), once its queue pairs have flushed all that they held. What was heard is
//! done; the rest is posted again, in its order, through new queue pairs.
//!
//! Nothing here blocks: the inbox has threads that dial. An end whose program is not in a call
//! answers at its next one, or when it leaves; that it is there its port says meanwhile, and the
//! other end's clock stands.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use unisum_link::handshake::random;
use unisum_link::inbox::{Arrived, Inbox, Ways};
use unisum_link::{Cause, LinkError, LinkErrorKind, Wake};

use super::{LAST_WORDS, VerbsLink};
use crate::card::NUMBER_LIMIT;
use crate::exchange::{Exchange, First};
use crate::ffi;
use crate::sleep::Doorbell;

/// The number before that of the first connection on which queue pairs are made anew.
pub(crate) const FIRST_ATTEMPT: u32 = 1;
/// In place of a number: this end, which does not dial, asks whether the other one is there.
const KNOCK: u32 = u32::MAX;
/// How long after an answer it asks again, and how long queue pairs have to stand before somebody
/// who asks is taken to have lost them.
const KNOCK_PAUSE: Duration = Duration::from_millis(250);
/// The pause before the next connection after one that broke; twice as long each time, up to the
/// second of these.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(320);
/// How long an end that leaves sleeps at a time.
const NAP: Duration = Duration::from_millis(2);

/// Whether a completion's status says that packets do not come through, or follows from it.
pub(super) const fn may_pass(status: u32) -> bool {
    matches!(status, ffi::WC_FLUSHED | ffi::WC_RETRIES_EXCEEDED | ffi::WC_NOT_READY_EXCEEDED)
}

/// By what queue pairs are made anew.
#[derive(Debug)]
pub(super) struct Renewer {
    ways: Ways,
    session: [u8; 16],
    inbox: Arc<Inbox>,
    mail: Arc<Mail>,
    /// Peers with a [`Renewal`].
    under_way: Vec<usize>,
}

/// Wakes the link for the inbox, and remembers that.
#[derive(Debug)]
struct Mail {
    has_come: AtomicBool,
    doorbell: Arc<Doorbell>,
}

impl Wake for Mail {
    fn wake(&self) {
        // Relaxed: the inbox has a lock of its own, and whoever sleeps is woken after this.
        self.has_come.store(true, Ordering::Relaxed);
        self.doorbell.wake();
    }
}

/// A peer whose queue pairs have failed.
#[derive(Debug)]
pub(crate) struct Renewal {
    cause: LinkError,
    /// Since when there is no connection to agree on others, and how long there may be none.
    since: Option<Instant>,
    left: Duration,
    /// Whether one is being dialled, or asked for.
    is_dialled: bool,
    pause: Duration,
    exchange: Option<Exchange>,
}

/// What prevents that a peer's queue pairs are made anew.
enum Hitch {
    /// This connection broke: another one may do.
    Broke(io::Error),
    /// The peer is lost.
    Lost(LinkError),
    /// The link fails.
    Wrong(LinkError),
}

impl From<io::Error> for Hitch {
    fn from(error: io::Error) -> Self {
        Self::Broke(error)
    }
}

impl Renewal {
    fn left(&self) -> Duration {
        self.left.saturating_sub(self.since.map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// There is no connection from now on, for so long at most.
    fn misses(&mut self, left: Duration) {
        (self.left, self.since) = (left, Some(Instant::now()));
    }

    fn later(&mut self) {
        self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
    }
}

impl VerbsLink {
    pub(crate) fn with_ways(mut self, ways: Ways, session: [u8; 16]) -> Self {
        let doorbell = self.sleeper.doorbell();
        let mail = Arc::new(Mail { has_come: AtomicBool::new(false), doorbell });
        let inbox = Arc::new(Inbox::new(mail.clone()));
        self.rails.iter().for_each(|rail| rail.device().renews());
        self.renewer = Some(Renewer { ways, session, inbox, mail, under_way: Vec::new() });
        self
    }

    /// Where connections go that peers open to have queue pairs made anew; `None` if they are not.
    pub fn inbox(&self) -> Option<Arc<Inbox>> {
        self.renewer.as_ref().map(|renewer| renewer.inbox.clone())
    }

    /// Takes no more connections.
    pub(super) fn close_inbox(&mut self) {
        if let Some(renewer) = &mut self.renewer {
            renewer.inbox.close();
            renewer.under_way.clear();
        }
    }

    /// How long an end that leaves waits until its last messages have arrived.
    pub(super) fn last_words(&self) -> Duration {
        self.renewer.as_ref().map_or(LAST_WORDS, |it| it.ways.reconnect_timeout.max(LAST_WORDS))
    }

    pub(super) fn is_renewing(&self) -> bool {
        self.renewer.as_ref().is_some_and(|renewer| !renewer.under_way.is_empty())
    }

    /// Waits a moment for news.
    pub(super) fn nap(&mut self) {
        if let Ok(news) = self.sleeper.sleep(NAP) {
            self.wake_up(news);
        }
    }

    /// Asks the peers that are not known to have everything what they have heard: where they have
    /// ended, their ports say so at once, and the devices much later.
    pub(super) fn ask_busy(&mut self) {
        for index in 0..self.peers.len() {
            let peer = &self.peers[index];
            if peer.is_busy() {
                let unheard = Cause::other("no report of the last messages");
                let cause = LinkError::os(peer.rank, "leaving", unheard);
                self.begins_anew(index, &cause);
            }
        }
    }

    /// A queue pair with a peer has failed, or a write was not to be posted: has all of them fail,
    /// so that they are made anew. `false` if that is not to be.
    pub(super) fn begins_anew(&mut self, index: usize, cause: &LinkError) -> bool {
        let is_gone = self.peers[index].is_gone();
        self.is_proven && !is_gone && self.begin_anew(index, cause)
    }

    fn begin_anew(&mut self, index: usize, cause: &LinkError) -> bool {
        let Some(renewer) = &mut self.renewer else { return false };
        let peer = &mut self.peers[index];
        if peer.renewal.is_some() {
            return true;
        }
        tracing::info!(peer = peer.rank, %cause, "queue pairs are made anew");
        peer.renewal = Some(Box::new(Renewal {
            cause: cause.clone(),
            since: Some(Instant::now()),
            left: renewer.ways.reconnect_timeout,
            is_dialled: false,
            pause: Duration::ZERO,
            exchange: None,
        }));
        renewer.under_way.push(index);
        self.fail_pairs(index);
        true
    }

    /// Has the queue pairs fail that were connected.
    fn fail_pairs(&mut self, index: usize) {
        let failed = self.peers[index].connections.iter().try_for_each(|it| it.fail());
        if let Err(error) = failed {
            let error = self.state.own_error(error);
            self.lose(index, error);
        }
    }

    /// There will be no other queue pairs with a peer.
    fn lose(&mut self, index: usize, error: LinkError) {
        let peer = &mut self.peers[index];
        peer.renewal = None;
        peer.is_lost(error);
        if let Some(renewer) = &mut self.renewer {
            renewer.under_way.retain(|it| *it != index);
        }
        self.note_gone(index);
    }

    /// Goes on with what was begun, as far as that goes now. Whether peers may go on.
    pub(super) fn renew(&mut self) -> Result<bool, LinkError> {
        let Some(renewer) = &self.renewer else { return Ok(false) };
        // Relaxed: see `Mail::wake`.
        if self.is_proven && renewer.mail.has_come.load(Ordering::Relaxed) {
            renewer.mail.has_come.store(false, Ordering::Relaxed);
            renewer.inbox.take().into_iter().for_each(|arrived| self.take_mail(arrived));
        }
        let Some(renewer) = &self.renewer else { return Ok(false) };
        if renewer.under_way.is_empty() {
            return Ok(false);
        }
        for index in renewer.under_way.clone() {
            match self.meet(index) {
                Ok(false) => {}
                Ok(true) => self.stands(index),
                Err(Hitch::Broke(error)) => self.broke(index, &error),
                Err(Hitch::Lost(error)) => self.lose(index, error),
                Err(Hitch::Wrong(error)) => return Err(error),
            }
            self.reach(index);
        }
        Ok(true)
    }

    /// Takes over a connection that was dialled, or came, or was not to be had.
    fn take_mail(&mut self, arrived: Arrived) {
        let Arrived { peer: rank, attempt, result, .. } = arrived;
        let Some(index) = self.places.get(rank).copied().flatten() else { return };
        let peer = &self.peers[index];
        let (is_dialer, is_dialled) = (rank < self.state.rank, attempt > 0);
        if peer.is_gone() && !peer.has_left() {
            return;
        }
        match result {
            Err(error) => self.not_reached(index, error),
            Ok(_) if attempt == KNOCK => self.is_there(index),
            Ok(_) if is_dialer && !is_dialled => {
                let stands_for = peer.renewed_at.map(|at| at.elapsed());
                if stands_for.is_none_or(|time| time >= KNOCK_PAUSE) {
                    self.begin_anew(index, &failed_there(rank));
                }
            }
            Ok(_) if is_dialled && peer.attempt != attempt => {}
            Ok(connection) => {
                let attempt = is_dialled.then_some(attempt);
                let exchange = Exchange::new(connection, attempt).and_then(|exchange| {
                    self.sleeper.add_words(exchange.descriptor())?;
                    Ok(exchange)
                });
                self.take_over(index, exchange);
            }
        }
    }

    fn take_over(&mut self, index: usize, exchange: io::Result<Exchange>) {
        let rank = self.peers[index].rank;
        self.begin_anew(index, &failed_there(rank));
        // What was agreed on the one before does not hold any more.
        self.fail_pairs(index);
        let Some(renewal) = &mut self.peers[index].renewal else { return };
        if rank < self.state.rank {
            renewal.is_dialled = false;
        }
        match exchange {
            Ok(exchange) => {
                renewal.left = renewal.left();
                renewal.since = None;
                renewal.exchange = Some(exchange);
            }
            Err(error) => self.broke(index, &error),
        }
    }

    /// The other end was asked, and is there: it comes when it can.
    fn is_there(&mut self, index: usize) {
        let Some(renewer) = &self.renewer else { return };
        let limit = renewer.ways.reconnect_timeout;
        let Some(renewal) = &mut self.peers[index].renewal else { return };
        renewal.is_dialled = false;
        if renewal.exchange.is_none() {
            renewal.pause = KNOCK_PAUSE;
            renewal.misses(limit);
        }
    }

    /// The other end refuses, or did not answer in time.
    fn not_reached(&mut self, index: usize, error: LinkError) {
        let peer = self.peers[index].rank;
        let Some(renewal) = &mut self.peers[index].renewal else { return };
        renewal.is_dialled = false;
        if renewal.exchange.is_some() {
            return;
        }
        tracing::info!(peer, %error, "queue pairs can't be made anew");
        let is_lack = matches!(error.kind, LinkErrorKind::Lacking { .. });
        let error = if is_lack { error } else { renewal.cause.clone() };
        self.lose(index, error);
    }

    /// A connection broke before queue pairs were agreed on.
    fn broke(&mut self, index: usize, error: &io::Error) {
        let peer = &mut self.peers[index];
        tracing::debug!(peer = peer.rank, %error, "a connection to make queue pairs anew broke");
        if peer.has_left() {
            // It may have what it came for.
            return self.stands(index);
        }
        if let Some(renewal) = &mut peer.renewal {
            renewal.exchange = None;
            renewal.later();
            renewal.misses(renewal.left);
        }
        self.fail_pairs(index);
    }

    /// Sees to a connection: the higher rank dials, the lower one asks.
    fn reach(&mut self, index: usize) {
        let (Some(renewer), own) = (&self.renewer, self.state.rank) else { return };
        let peer = &mut self.peers[index];
        let rank = peer.rank;
        let Some(renewal) = &mut peer.renewal else { return };
        if renewal.is_dialled || renewal.exchange.is_some() {
            return;
        }
        let attempt = if rank < own {
            peer.attempt += 1;
            peer.attempt
        } else {
            KNOCK
        };
        let times = (renewal.pause, renewal.left());
        let dial = renewer.ways.dial((own, rank), renewer.session, attempt, times);
        match renewer.inbox.dial(dial) {
            Ok(()) => renewal.is_dialled = true,
            Err(error) => self.lose(index, error),
        }
    }

    /// Says and hears what there is to say now; whether both ends take packets.
    fn meet(&mut self, index: usize) -> Result<bool, Hitch> {
        let Self { peers, rails, state, .. } = self;
        let peer = &mut peers[index];
        let Some(renewal) = &mut peer.renewal else { return Ok(false) };
        let Some(exchange) = &mut renewal.exchange else { return Ok(false) };
        exchange.move_on()?;
        let wrong = |what: String| Hitch::Wrong(LinkError::protocol(peer.rank, what));
        if exchange.first.is_none()
            && let Some(first) = exchange.hear_first(peer.connections.len())?
        {
            let first = first.map_err(wrong)?;
            let is_right = match exchange.attempt {
                Some(attempt) => first.attempt == attempt,
                None => first.attempt > peer.attempt,
            };
            if !is_right {
                return Err(Hitch::Broke(io::ErrorKind::InvalidData.into()));
            }
            peer.attempt = first.attempt;
            exchange.first = Some(first);
        }
        let may_say = exchange.attempt.is_some() || exchange.first.is_some();
        let is_drained = peer.connections.iter().all(|it| it.is_drained());
        if !exchange.has_said && may_say && is_drained {
            let psn = u32::from_le_bytes(random()?) % NUMBER_LIMIT;
            let mut connections = Vec::new();
            for (place, connection) in peer.connections.iter_mut().enumerate() {
                let rail = &mut rails[connection.rail];
                let replaced = connection.replace(&rail.completions);
                replaced.map_err(|error| Hitch::Lost(state.own_error(error)))?;
                rail.pairs.retain(|(_, at, of)| (*at, *of) != (index, place));
                let number = connection.pair.number();
                rail.pairs.push((number, index, place));
                rail.pairs.sort_unstable();
                connections.push((number, connection.ledger.heard()));
                connection.path.own_psn = psn;
            }
            exchange.say_first(&First { attempt: peer.attempt, psn, connections });
        }
        if exchange.has_said
            && !exchange.is_ready
            && let Some(first) = exchange.first.clone()
        {
            for (connection, (number, _)) in peer.connections.iter_mut().zip(&first.connections) {
                let psns = (connection.path.own_psn, first.psn);
                connection.go_on(*number, psns).map_err(|it| Hitch::Broke(io::Error::other(it)))?;
            }
            exchange.say_ready();
            let heard = first.connections.iter().map(|(_, heard)| *heard);
            peer.go_on(heard, state).map_err(Hitch::Wrong)?;
        }
        let Some(renewal) = &mut peer.renewal else { return Ok(false) };
        let Some(exchange) = &mut renewal.exchange else { return Ok(false) };
        let has_said_all = exchange.move_on()?;
        Ok(exchange.is_ready && has_said_all && exchange.hear_ready()?)
    }

    /// Both ends go on.
    fn stands(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        peer.renewal = None;
        peer.renewed_at = Some(Instant::now());
        tracing::info!(peer = peer.rank, "queue pairs were made anew");
        if let Some(renewer) = &mut self.renewer {
            renewer.under_way.retain(|it| *it != index);
        }
        self.list(index);
    }
}

/// Why queue pairs are made anew where this end has noticed nothing.
fn failed_there(rank: unisum_link::Rank) -> LinkError {
    LinkError::os(rank, "queue pairs", Cause::other("they failed at the other end"))
}

#[cfg(test)]
mod tests;
