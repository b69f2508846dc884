//! Both directions of a socket, over all of its connections.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{self, SendFlags};
use unisum_link::fork::ParentOnly;
use unisum_link::secure::{RECORD_OVERHEAD, Session};
use unisum_link::silence::{self, Hush, Told};
use unisum_link::{LinkError, LinkErrorKind, Rank, Wake as _};

use super::meeting::Meeting;
use super::{
    ACKNOWLEDGED_AFTER, FRAME_BYTES, HEAD_BYTES, HOLDS, Head, LEAVES, SEALED_BYTES, WINDOW,
};
use crate::options;
use crate::sealed::Buffer;
use crate::sleep::Bell;
use crate::socket::{Message, failed};

/// Frames up to this size leave in one piece: several cost the kernel more than copying here.
pub(super) const SMALL_BYTES: usize = 1 << 10;

/// How long an end that dials may take to come back before its port is asked for it.
const KNOCK_AFTER: Duration = Duration::from_millis(100);
/// Between an answer and the next such question.
pub(super) const KNOCK_PAUSE: Duration = Duration::from_millis(250);

/// What a socket sends and receives.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(super) peer: Rank,
    pub(super) socket: u8,
    pub(super) connection: Option<Connection>,
    /// A new connection on which the other end has not said yet how much it has.
    pub(super) meeting: Option<Meeting>,
    /// The number of the newest connection.
    pub(super) attempt: u32,
    /// What was sent from byte `acknowledged` on, and may be asked for again.
    pub(super) kept: VecDeque<u8>,
    pub(super) acknowledged: u64,
    /// Up to where this connection's kernel has it, and up to where any had.
    pub(super) sent: u64,
    pub(super) promised: u64,
    /// What has come, what of that receives have taken, and what was acknowledged.
    pub(super) received: u64,
    pub(super) taken: u64,
    pub(super) told: u64,
    /// What has come and was not taken.
    pub(super) stash: VecDeque<u8>,
    /// Whether the other end sends nothing more and has not been told that all came.
    pub(super) peer_leaves: bool,
    pub(super) owes_answer: bool,
    /// Whether nothing more comes on this connection, as the other end had said: it only waits for
    /// the answer.
    pub(super) peer_ended: bool,
    /// Whether this end sends nothing more, and has said so on this connection.
    pub(super) leaves: bool,
    said_leaving: bool,
    /// Whether the other end has answered that.
    pub(super) is_answered: bool,
    /// Whether nothing can be sent on this connection any more.
    ended_sending: bool,
    /// How many connections have stood.
    stood: u32,
    /// Wakes the keeper.
    keeper: Arc<Bell>,
    pub(super) outage: Outage,
    /// When this connection stood, and whether it is silent, if it leads to another host.
    stands_since: Instant,
    hush: Option<Hush>,
    /// Why there will be no connection any more.
    pub(super) failed: Option<LinkError>,
}

/// How long a socket has been without a connection since bytes last moved.
#[derive(Debug)]
pub(super) struct Outage {
    /// Since when, unless a new connection stands and the other end has only not looked at it.
    pub(super) since: Option<Instant>,
    pub(super) left: Duration,
    limit: Duration,
    /// What broke the last connection.
    pub(super) cause: Option<LinkError>,
    /// Whether a connection is being dialled; and whether that began beside one that stood.
    pub(super) is_dialled: bool,
    pub(super) is_beside: bool,
    /// Whether the other end, which can't dial, has asked for another connection.
    pub(super) is_asked: bool,
    /// Connections since the last one that stood.
    pub(super) attempts: u32,
    /// Whether the other end's port is asked for it, which dials, or when that is next.
    pub(super) knock: Knock,
}

/// What is known of an end that dials and has not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Knock {
    /// Its port is asked then.
    Due(Instant),
    UnderWay,
    /// It does not listen for this socket any more: it will not come back.
    Gone,
}

impl Knock {
    /// What follows from an answer, or from none in the time that there was: that is no reason to
    /// pause, as the network may be back in the next moment, nor does it say that nobody is there.
    pub(super) fn after(answer: &Result<(), LinkError>, is_late: bool, now: Instant) -> Self {
        match answer {
            Err(_) if is_late => Self::Due(now),
            Err(LinkError { kind: LinkErrorKind::Unreachable(_), .. }) => Self::Gone,
            // It is there; or nobody knows.
            _ => Self::Due(now + KNOCK_PAUSE),
        }
    }
}

impl Outage {
    fn new(limit: Duration) -> Self {
        Self {
            since: None,
            left: limit,
            limit,
            cause: None,
            is_dialled: false,
            is_beside: false,
            is_asked: false,
            attempts: 0,
            knock: Knock::Due(Instant::now()),
        }
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: Arc<ParentOnly<TcpStream>>,
    pub(super) session: Option<Box<Session>>,
    /// The frame that is being sent.
    frame: Frame,
    pub(super) incoming: Buffer,
    /// Bytes of the frame that is being received.
    pub(super) left: usize,
    /// Where records are opened.
    pub(super) plain: Vec<u8>,
}

#[derive(Debug, Default)]
struct Frame {
    /// Its head, or all of it, and how much of that is through.
    wire: Vec<u8>,
    at: usize,
    /// Bytes of the stream that are sent with the last byte of that.
    covers: usize,
    /// Bytes of the stream that follow.
    follow: usize,
}

impl Flow {
    /// The flow of a socket whose connection may be away for so long.
    pub(super) fn new((peer, socket): (Rank, u8), limit: Duration, keeper: Arc<Bell>) -> Self {
        let outage = Outage::new(limit);
        Self {
            peer,
            socket,
            connection: None,
            meeting: None,
            attempt: 0,
            kept: VecDeque::new(),
            acknowledged: 0,
            sent: 0,
            promised: 0,
            received: 0,
            taken: 0,
            told: 0,
            stash: VecDeque::new(),
            peer_leaves: false,
            owes_answer: false,
            peer_ended: false,
            leaves: false,
            said_leaving: false,
            is_answered: false,
            ended_sending: false,
            stood: 0,
            keeper,
            outage,
            stands_since: Instant::now(),
            hush: None,
            failed: None,
        }
    }

    /// The connection's socket, while there is one.
    pub(crate) fn stream(&self) -> Option<&Arc<ParentOnly<TcpStream>>> {
        self.connection.as_ref().map(|it| &it.stream)
    }

    /// Whether bytes may wait that no event tells of, or a failure does.
    pub(crate) fn has_news(&self) -> bool {
        !self.stash.is_empty() || self.failed.is_some()
    }

    /// Whether nothing can be sent before something was acknowledged.
    pub(crate) fn is_full(&self) -> bool {
        self.kept.len() >= WINDOW
    }

    /// How many connections have stood.
    pub(crate) const fn stood(&self) -> u32 {
        self.stood
    }

    /// For how long this connection has been there.
    pub(super) fn stands_for(&self) -> Duration {
        self.stands_since.elapsed()
    }

    /// Looks, if that is due, whether the connection is silent, and for how long it has been; when
    /// to look next, if it may ever be.
    pub(super) fn listen(&mut self, now: Instant) -> (Option<Duration>, Option<Instant>) {
        let (Some(hush), Some(connection)) = (&mut self.hush, &self.connection) else {
            return (None, None);
        };
        let mut silent = None;
        if hush.is_due(now) {
            // What can't be asked is not known to be silent.
            let told = silence::ask(connection.stream.as_fd()).unwrap_or(Told::NOTHING);
            silent = hush.look(told, now);
        }
        (silent, Some(hush.look_at(now)))
    }

    /// Whether something awaits an answer on the connection that stands, or the other end has said
    /// so. After an outage a first answer may come at once, and the rest be sent again much later.
    pub(super) fn wants_another(&self) -> bool {
        let awaits = |connection: &Connection| {
            silence::ask(connection.stream.as_fd()).is_ok_and(|told| told.awaits)
        };
        self.outage.is_asked || self.hush.and(self.connection.as_ref()).is_some_and(awaits)
    }

    /// The first connection is being dialled.
    pub(super) const fn dials_first(&mut self) {
        (self.attempt, self.outage.is_dialled) = (1, true);
    }

    pub(super) const fn is_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Whether there is something to send that no call waits for.
    pub(crate) fn owes(&self) -> bool {
        let leaves = self.leaves && !self.said_leaving;
        self.connection.is_some()
            && !self.ended_sending
            && (self.is_sending()
                || self.sent < self.promised
                || self.owes_answer
                || self.owes_news()
                || leaves)
    }

    fn owes_news(&self) -> bool {
        self.taken - self.told >= ACKNOWLEDGED_AFTER
    }

    /// From now on nothing is sent any more.
    pub(super) const fn leave(&mut self) {
        self.leaves = true;
    }

    /// Whether something was sent of which it is not known that it came.
    pub(super) fn holds(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Once the other end can have seen that this one leaves, ends what it can read: that wakes its
    /// keeper if nobody reads there.
    pub(super) fn end_sending(&mut self) {
        let is_said = self.said_leaving && !self.is_sending() && !self.ended_sending;
        if let Some(connection) = self.connection.as_ref().filter(|_| is_said) {
            // If it fails, the connection has ended, and reading tells so.
            let _ = connection.stream.shutdown(Shutdown::Write);
            self.ended_sending = true;
        }
    }

    /// Whether the other end knows that this one leaves and has all that was sent, or never will.
    pub(super) fn is_through(&self) -> bool {
        let has_said = self.said_leaving && !self.is_sending();
        // Said is not heard: without the answer, the connection may break before it is. With it,
        // nothing is left to say on another one.
        let is_told = self.is_answered && self.kept.is_empty();
        // An end that leaves needs nothing more.
        let is_left = self.peer_leaves && (has_said || self.connection.is_none());
        is_told || is_left || self.failed.is_some() || self.stood == 0
    }

    /// Closes the connection, whoever has its socket.
    fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            // If it fails, the connection has ended already.
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        self.keeper.wake();
    }

    /// There will be no connection any more.
    pub(super) fn fail(&mut self, error: LinkError) {
        self.close();
        self.meeting = None;
        self.outage.since = None;
        self.failed.get_or_insert(error);
    }

    /// The connection broke; the socket waits for another one.
    ///
    /// # Errors
    /// If this rank lacks something, or the peer left in order.
    pub(crate) fn broke(&mut self, cause: LinkError) -> Result<(), LinkError> {
        let is_lacking = matches!(cause.kind, LinkErrorKind::Lacking { .. });
        if is_lacking || self.failed.is_some() {
            self.fail(cause.clone());
            return Err(cause);
        }
        if self.peer_ended {
            self.fail(LinkError::closed(self.peer));
            return Ok(());
        }
        tracing::info!(peer = self.peer, socket = self.socket, %cause, "a connection broke");
        self.close();
        if self.meeting.is_none() {
            self.outage.since.get_or_insert_with(Instant::now);
        }
        self.outage.knock = Knock::Due(Instant::now() + KNOCK_AFTER);
        self.outage.cause = Some(cause);
        // It may not have been heard.
        self.said_leaving = false;
        Ok(())
    }

    /// Continues on a new connection, from what its other end has.
    pub(super) fn resume(
        &mut self,
        stream: Arc<ParentOnly<TcpStream>>,
        session: Option<Box<Session>>,
        attempt: u32,
        has: u64,
    ) -> Result<(), LinkError> {
        if !(self.acknowledged..=self.promised).contains(&has) {
            let (from, to) = (self.acknowledged, self.promised);
            let what = format!("it has {has} bytes of a connection that broke, not {from} to {to}");
            return Err(LinkError::protocol(self.peer, what));
        }
        let (peer, socket) = (self.peer, self.socket);
        tracing::debug!(peer, socket, attempt, from = has, "a connection stands");
        self.close();
        (self.sent, self.attempt) = (has, attempt);
        (self.said_leaving, self.ended_sending, self.peer_ended) = (false, false, false);
        // Acknowledgements on the connection before may not have been read: a sender that has
        // filled its window would wait for one, and there would be nothing new to acknowledge.
        self.told = self.told.min(self.taken.saturating_sub(ACKNOWLEDGED_AFTER));
        self.stood += 1;
        self.stands_since = Instant::now();
        let is_far = options::is_far(&stream).is_ok_and(|is_far| is_far);
        self.hush = is_far.then(Hush::default);
        self.connection = Some(Connection {
            stream,
            session,
            frame: Frame::default(),
            incoming: Buffer::default(),
            left: 0,
            plain: Vec::new(),
        });
        self.outage = Outage::new(self.outage.limit);
        Ok(())
    }

    /// Sends what the socket takes. Gives the number of messages, from the first on, that the
    /// kernel has whole, or once had: those are kept here.
    ///
    /// # Errors
    /// If there will be no connection any more, or this rank lacks something.
    pub(crate) fn flush(
        &mut self,
        sends: &mut VecDeque<Message>,
        writable: &mut bool,
    ) -> Result<usize, LinkError> {
        while *writable && self.connection.is_some() && !self.ended_sending {
            if !self.is_sending() {
                if self.peer_ended && !self.owes_answer {
                    self.fail(LinkError::closed(self.peer));
                    break;
                }
                if !self.peer_ended {
                    self.keep(sends);
                }
                if !self.next_frame() {
                    break;
                }
            }
            match self.send() {
                // A short send found the buffer full: the next event tells of room.
                Ok(is_whole) => *writable = is_whole,
                Err(rustix::io::Errno::AGAIN) => *writable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.broke(failed(self.peer, "sending", error.into()))?,
            }
        }
        let is_through = |it: &&Message| it.through == it.total() && it.ends_at <= self.promised;
        let through = sends.iter().take_while(is_through).count();
        match &self.failed {
            Some(error) if through < sends.len() => Err(error.clone()),
            _ => Ok(through),
        }
    }

    fn is_sending(&self) -> bool {
        let frame = self.connection.as_ref().map(|it| &it.frame);
        frame.is_some_and(|it| it.at < it.wire.len() || it.follow > 0)
    }

    fn end(&self) -> u64 {
        self.acknowledged + self.kept.len() as u64
    }

    /// Copies as much of the messages as the next frame takes and the window allows.
    fn keep(&mut self, sends: &mut VecDeque<Message>) {
        let ahead = (self.end() - self.sent) as usize;
        let room = (WINDOW - self.kept.len().min(WINDOW)).min(FRAME_BYTES);
        let mut room = room.min(FRAME_BYTES - ahead.min(FRAME_BYTES));
        for message in sends {
            if message.through < message.total() {
                let (header, payload) = message.rest();
                let of_header = header.len().min(room);
                let of_payload = payload.len().min(room - of_header);
                self.kept.extend(&header[..of_header]);
                self.kept.extend(&payload[..of_payload]);
                message.through += of_header + of_payload;
                room -= of_header + of_payload;
                if message.through < message.total() {
                    return;
                }
                message.ends_at = self.acknowledged + self.kept.len() as u64;
            }
        }
    }

    /// Makes the next frame, if there is something to say.
    fn next_frame(&mut self) -> bool {
        let ready = (self.end() - self.sent) as usize;
        let mut flags = 0;
        if self.owes_answer {
            flags |= HOLDS;
        }
        if self.leaves && ready == 0 && !self.said_leaving {
            flags |= LEAVES;
        }
        if ready == 0 && flags == 0 && !self.owes_news() {
            return false;
        }
        let from = (self.sent - self.acknowledged) as usize;
        let Some(connection) = &mut self.connection else { return false };
        let most = if connection.session.is_some() { SEALED_BYTES } else { FRAME_BYTES };
        let bytes = ready.min(most);
        let acknowledged = if flags & HOLDS == 0 { self.taken } else { self.received };
        let head = Head { flags, bytes, acknowledged }.encode();
        let parts = part(&self.kept, from, bytes);
        let frame = &mut connection.frame;
        (frame.at, frame.covers, frame.follow) = (0, bytes, 0);
        frame.wire.clear();
        match &mut connection.session {
            Some(session) => {
                connection.plain.clear();
                parts.iter().for_each(|part| connection.plain.extend_from_slice(part));
                frame.wire.resize(HEAD_BYTES + bytes + RECORD_OVERHEAD, 0);
                session.sealer.seal(&head, &connection.plain, &mut frame.wire);
            }
            None => {
                frame.wire.extend_from_slice(&head);
                if bytes <= SMALL_BYTES {
                    parts.iter().for_each(|part| frame.wire.extend_from_slice(part));
                } else {
                    (frame.covers, frame.follow) = (0, bytes);
                }
            }
        }
        self.told = acknowledged.min(self.taken);
        self.owes_answer = false;
        self.said_leaving |= flags & LEAVES != 0;
        true
    }

    /// Sends of the frame what the socket takes; whether that is all of it.
    fn send(&mut self) -> Result<bool, rustix::io::Errno> {
        let Some(Connection { stream, frame, .. }) = &mut self.connection else {
            return Ok(false);
        };
        let from = (self.sent - self.acknowledged) as usize;
        let wire = &frame.wire[frame.at..];
        let [first, second] = part(&self.kept, from, frame.follow);
        // NOSIGNAL: the host program may not ignore SIGPIPE.
        let flags = SendFlags::NOSIGNAL;
        let mut sent = if frame.follow == 0 {
            net::send(&***stream, wire, flags)?
        } else {
            let parts = [IoSlice::new(wire), IoSlice::new(first), IoSlice::new(second)];
            net::sendmsg(&***stream, &parts, &mut Default::default(), flags)?
        };
        let of_wire = sent.min(wire.len());
        frame.at += of_wire;
        sent -= of_wire;
        if frame.at == frame.wire.len() {
            self.sent += std::mem::take(&mut frame.covers) as u64;
        }
        frame.follow -= sent;
        self.sent += sent as u64;
        self.promised = self.promised.max(self.sent);
        Ok(frame.at == frame.wire.len() && frame.follow == 0)
    }
}

/// So many bytes from a place on, which may lie in two pieces.
fn part(bytes: &VecDeque<u8>, from: usize, count: usize) -> [&[u8]; 2] {
    let (first, second) = bytes.as_slices();
    match from.checked_sub(first.len()) {
        Some(from) => [&second[from..][..count], &[]],
        None => {
            let of_first = count.min(first.len() - from);
            [&first[from..][..of_first], &second[..count - of_first]]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_asked_in_vain_is_asked_again_at_once_and_who_answers_after_a_pause() {
        let now = Instant::now();
        let later = Knock::Due(now + KNOCK_PAUSE);
        let after = |kind, is_late| Knock::after(&Err(LinkError { peer: 1, kind }), is_late, now);
        let why = || "connecting failed".to_owned();
        assert_eq!(Knock::after(&Ok(()), false, now), later);
        assert_eq!(after(LinkErrorKind::Unanswered(why()), true), Knock::Due(now));
        assert_eq!(after(LinkErrorKind::Unreachable(why()), false), Knock::Gone);
        // Somebody is there who has not said all in time: he is stopped, or was cut off again.
        assert_eq!(after(LinkErrorKind::Unreachable(why()), true), Knock::Due(now));
        // What may come without having taken time is followed by a pause.
        assert_eq!(after(LinkErrorKind::NotAccepted(why()), false), later);
        let lacking = LinkError::lacking(1, "dialling", std::io::ErrorKind::OutOfMemory);
        assert_eq!(Knock::after(&Err(lacking), false, now), later);
    }
}
