//! The messages on a control connection and their wire form (sans-IO).
//!
//! ```text
//! length u32   bytes that follow, at most FRAME_BYTES_MAX
//! kind   u8
//! body         see `Message::put`; integers little endian, texts and blobs last or with a length
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use unisum_link::{Call, Rank};

use super::doing::{self, Doing};
use super::status::{Snapshot, Told};
use super::verdict::{Calls, Finding, Report, Verdict, VerdictKind};

/// Largest blob of an exchange in bytes.
pub(super) const BLOB_BYTES_MAX: usize = 64 << 10;
/// Most bytes of the blobs that a rank has for each rank, one for each rank on average.
const EACH_BYTES_MAX: usize = 1 << 10;
/// Largest frame in bytes, without its length.
pub(super) const FRAME_BYTES_MAX: usize = BLOB_BYTES_MAX + 1024;
/// Most failed ranks that a verdict names on the wire.
const FAILED_RANKS_MAX: usize = 4096;
/// Most ranks that a stalled call names on the wire.
const RANKS_MAX: usize = 16_000;
/// Of most communicators it is said on the wire what a rank did last there.
const LASTS_MAX: usize = 512;
/// Longest text in bytes.
const TEXT_BYTES_MAX: usize = 16 << 10;

/// What ranks and coordinator tell each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Coordinator, first: you are in, and this is the session.
    Welcome { session: [u8; 16] },
    /// Rank, first: the welcome has come. From here on the end of the connection is a death.
    Joined,
    /// Rank: its blob of an exchange, for all ranks, or one of its blobs for each, in rank order.
    Blob { round: u32, to: Option<Rank>, blob: Bytes },
    /// Coordinator: a rank's blob for this one. All blobs of a round come together, in the order of
    /// the ranks that they are from.
    Gathered { round: u32, rank: Rank, blob: Bytes },
    /// Rank: another rank misbehaves.
    Accuse(Report),
    /// Rank: it has concluded on its own that the job is over, and why.
    Concluded(Verdict),
    /// Rank: the deadline of this call expired.
    Overdue(StalledCall),
    /// Rank: it has waited in this call for a while: is everybody in the same one?
    Stalled(StalledCall),
    /// Coordinator: what are you doing in this communicator? A verdict follows if it asks because a
    /// call is overdue, unless all that wait leave.
    StatusRequest { query: u32, communicator: u32, is_overdue: bool },
    /// Rank: this, and this elsewhere.
    Status { query: u32, doing: Doing },
    /// Coordinator: what did you call last in this communicator?
    Recount { communicator: u32 },
    /// Rank: this, the oldest first.
    Recounted { communicator: u32, calls: Vec<Told> },
    /// Coordinator: the communicator is over.
    Verdict(Verdict),
    /// Coordinator: a rank has left in order, doing this last in the job's own communicator, and
    /// this in those it had left from before.
    Left { rank: Rank, last: Snapshot, left_group: Vec<(u32, Snapshot)> },
    /// Rank: it is no longer in this communicator, where it did this last.
    LeftGroup { communicator: u32, last: Snapshot },
    /// Coordinator: this rank, for whose message you wait, is no longer in the communicator.
    HasParted { communicator: u32, rank: Rank },
    /// Rank: it has waited so long, all it may, for others to take part in the exchange.
    Missing { round: u32, millis: u32 },
    /// Rank: keep this line.
    Keep(String),
    /// Between members of an elastic job: what they say about views.
    View(Bytes),
    /// Rank: I leave in order.
    Bye(Snapshot),
}

/// A call that takes long, and whose ranks it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StalledCall {
    /// The call.
    pub call: Call,
    /// How many collectives before it were none of the program's calls.
    pub uncounted: u64,
    /// The communicator's ranks, by their numbers in the job; none stands for all.
    pub ranks: Vec<Rank>,
}

impl From<Call> for StalledCall {
    fn from(call: Call) -> Self {
        Self { call, uncounted: 0, ranks: Vec::new() }
    }
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    #[error("a control message of {0} bytes; the largest has {FRAME_BYTES_MAX}")]
    Length(u32),
    #[error("a control message of unknown kind {0}")]
    Kind(u8),
    #[error("a control message of kind {0} with a malformed body")]
    Body(u8),
}

impl Message {
    /// The kind, on the wire, of [`Message::Welcome`].
    pub(super) const WELCOME: u8 = 1;

    /// Appends the wire form.
    pub(super) fn encode(&self, to: &mut BytesMut) {
        let start = to.len();
        to.put_u32_le(0);
        self.put(to);
        let length = u32::try_from(to.len() - start - 4).expect("messages are bounded");
        to[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn put(&self, to: &mut BytesMut) {
        to.put_u8(self.kind());
        match self {
            Self::Welcome { session } => to.put_slice(session),
            Self::Joined => {}
            Self::Blob { round, to: receiver, blob } => {
                to.put_u32_le(*round);
                to.put_u32_le(receiver.map_or(TO_ALL, |rank| rank as u32));
                to.put_slice(blob);
            }
            Self::Gathered { round, rank, blob } => {
                to.put_u32_le(*round);
                put_rank(to, *rank);
                to.put_slice(blob);
            }
            Self::Accuse(report) => put_report(to, report),
            Self::Overdue(StalledCall { call, uncounted, ranks })
            | Self::Stalled(StalledCall { call, uncounted, ranks }) => {
                to.put_slice(&call.encode());
                to.put_u64_le(*uncounted);
                // Of too many ranks none is named: then all are asked.
                let named = if ranks.len() > RANKS_MAX { &[] } else { &ranks[..] };
                named.iter().for_each(|rank| put_rank(to, *rank));
            }
            Self::StatusRequest { query, communicator, is_overdue } => {
                to.put_u32_le(*query);
                to.put_u32_le(*communicator);
                to.put_u8((*is_overdue).into());
            }
            Self::Status { query, doing } => {
                to.put_u32_le(*query);
                doing::put(to, doing);
            }
            Self::Recount { communicator } => to.put_u32_le(*communicator),
            Self::Recounted { communicator, calls } => {
                to.put_u32_le(*communicator);
                calls.iter().for_each(|call| put_told(to, call));
            }
            Self::Verdict(verdict) | Self::Concluded(verdict) => put_verdict(to, verdict),
            Self::Left { rank, last, left_group } => {
                put_rank(to, *rank);
                put_snapshot(to, last);
                // The newest count most.
                for (communicator, last) in
                    &left_group[left_group.len().saturating_sub(LASTS_MAX)..]
                {
                    to.put_u32_le(*communicator);
                    put_snapshot(to, last);
                }
            }
            Self::LeftGroup { communicator, last } => {
                to.put_u32_le(*communicator);
                put_snapshot(to, last);
            }
            Self::HasParted { communicator, rank } => {
                to.put_u32_le(*communicator);
                put_rank(to, *rank);
            }
            Self::Missing { round, millis } => {
                to.put_u32_le(*round);
                to.put_u32_le(*millis);
            }
            Self::Keep(line) => put_text(to, line),
            Self::View(word) => to.put_slice(word),
            Self::Bye(snapshot) => put_snapshot(to, snapshot),
        }
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Welcome { .. } => Self::WELCOME,
            Self::Joined => 2,
            Self::Blob { .. } => 3,
            Self::Gathered { .. } => 4,
            Self::Accuse(_) => 5,
            Self::Overdue(_) => 6,
            Self::StatusRequest { .. } => 7,
            Self::Status { .. } => 8,
            Self::Verdict(_) => 9,
            Self::Left { .. } => 10,
            Self::Bye(_) => 11,
            Self::Stalled(_) => 12,
            Self::LeftGroup { .. } => 13,
            Self::Concluded(_) => 14,
            Self::Missing { .. } => 15,
            Self::Keep(_) => 16,
            Self::Recount { .. } => 17,
            Self::Recounted { .. } => 18,
            Self::HasParted { .. } => 19,
            Self::View(_) => 20,
        }
    }

    /// Takes the next message off the front of `from`; `None` if it is not all there.
    ///
    /// # Errors
    /// If the bytes are no message; nothing sensible can follow.
    pub(super) fn decode(from: &mut BytesMut) -> Result<Option<Self>, MessageError> {
        let Some(head) = from.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head);
        if length == 0 || length as usize > FRAME_BYTES_MAX {
            return Err(MessageError::Length(length));
        }
        if from.len() < 4 + length as usize {
            return Ok(None);
        }
        from.advance(4);
        let mut body = from.split_to(length as usize).freeze();
        let kind = body.get_u8();
        let message = Self::parse(kind, &mut body)?;
        match message {
            Some(message) if body.is_empty() => Ok(Some(message)),
            _ => Err(MessageError::Body(kind)),
        }
    }

    /// Reads a body; `None` if it is malformed, and bytes that remain are malformed as well.
    fn parse(kind: u8, body: &mut Bytes) -> Result<Option<Self>, MessageError> {
        Ok(match kind {
            Self::WELCOME => take::<16>(body).map(|session| Self::Welcome { session }),
            2 => Some(Self::Joined),
            3 => parse_blob(body),
            4 => parse_gathered(body),
            5 => parse_report(body).map(Self::Accuse),
            6 => parse_stalled_call(body).map(Self::Overdue),
            7 => parse_request(body),
            8 => parse_status(body),
            9 => parse_verdict(body).map(Self::Verdict),
            10 => parse_left(body),
            11 => parse_snapshot(body).map(Self::Bye),
            12 => parse_stalled_call(body).map(Self::Stalled),
            13 => parse_left_group(body),
            14 => parse_verdict(body).map(Self::Concluded),
            15 => parse_missing(body),
            16 => text(body).map(Self::Keep),
            17 => word(body).map(|communicator| Self::Recount { communicator }),
            18 => parse_recounted(body),
            19 => parse_has_left_group(body),
            20 => Some(Self::View(body.split_off(0))),
            kind => return Err(MessageError::Kind(kind)),
        })
    }
}

/// Most bytes of all blobs that one rank may give in an exchange of a world: what bounds the memory
/// that the coordinator needs for it.
pub(super) fn blobs_bytes_max(world: usize) -> usize {
    (world * EACH_BYTES_MAX).max(BLOB_BYTES_MAX)
}

/// Stands for all ranks where a rank is named.
const TO_ALL: u32 = u32::MAX;

pub(super) fn put_rank(to: &mut BytesMut, rank: Rank) {
    to.put_u32_le(u32::try_from(rank).expect("ranks are below WORLD_MAX"));
}

/// A text, cut between characters where it is too long.
pub(super) fn cut(text: &str) -> &str {
    let longest = text.len().min(TEXT_BYTES_MAX);
    let end = (0..=longest).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}

/// Appends a text, cut where it is too long.
fn put_text(to: &mut BytesMut, text: &str) {
    to.put_slice(cut(text).as_bytes());
}

fn put_verdict(to: &mut BytesMut, verdict: &Verdict) {
    let failed_ranks = &verdict.failed_ranks[..verdict.failed_ranks.len().min(FAILED_RANKS_MAX)];
    to.put_u8(verdict.kind as u8);
    put_rank(to, failed_ranks.len());
    for failed_rank in failed_ranks {
        put_rank(to, *failed_rank);
    }
    put_calls(to, verdict.calls.as_deref());
    put_text(to, &verdict.text);
}

fn put_report(to: &mut BytesMut, report: &Report) {
    to.put_u32_le(report.communicator);
    to.put_u8(report.finding as u8);
    put_rank(to, report.against);
    put_calls(to, report.calls.as_ref());
    put_text(to, &report.text);
}

fn put_calls(to: &mut BytesMut, calls: Option<&Calls>) {
    to.put_u8(u8::from(calls.is_some()));
    for (rank, call) in calls.into_iter().flatten() {
        put_rank(to, *rank);
        to.put_slice(&call.encode());
    }
}

fn put_told(to: &mut BytesMut, told: &Told) {
    to.put_slice(&told.call.encode());
    to.put_u32_le(u32::try_from(told.text.len()).expect("texts are bounded"));
    to.put_slice(told.text.as_bytes());
}

pub(super) fn put_snapshot(to: &mut BytesMut, snapshot: &Snapshot) {
    let Snapshot { call, inside, step, steps, bytes, uncounted } = snapshot;
    to.put_u8(u8::from(call.is_some()));
    to.put_u8(u8::from(*inside));
    to.put_slice(&call.map_or([0; Call::ENCODED], |call| call.encode()));
    to.put_u32_le(*step);
    to.put_u32_le(*steps);
    to.put_u64_le(*bytes);
    to.put_u64_le(*uncounted);
}

pub(super) fn take<const N: usize>(body: &mut Bytes) -> Option<[u8; N]> {
    let taken = *body.first_chunk::<N>()?;
    body.advance(N);
    Some(taken)
}

pub(super) fn word(body: &mut Bytes) -> Option<u32> {
    take(body).map(u32::from_le_bytes)
}

pub(super) fn rank(body: &mut Bytes) -> Option<Rank> {
    word(body).map(|rank| rank as Rank)
}

fn flag(body: &mut Bytes) -> Option<bool> {
    match take(body)? {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// All that remains, as a text.
fn text(body: &mut Bytes) -> Option<String> {
    let text = body.split_off(0);
    if text.len() > TEXT_BYTES_MAX {
        return None;
    }
    String::from_utf8(text.into()).ok()
}

/// All that remains, as a blob.
fn blob(body: &mut Bytes) -> Option<Bytes> {
    let blob = body.split_off(0);
    (blob.len() <= BLOB_BYTES_MAX).then_some(blob)
}

fn parse_blob(body: &mut Bytes) -> Option<Message> {
    let (round, to) = (word(body)?, word(body)?);
    let to = (to != TO_ALL).then_some(to as Rank);
    Some(Message::Blob { round, to, blob: blob(body)? })
}

fn parse_gathered(body: &mut Bytes) -> Option<Message> {
    Some(Message::Gathered { round: word(body)?, rank: rank(body)?, blob: blob(body)? })
}

fn parse_report(body: &mut Bytes) -> Option<Report> {
    let communicator = word(body)?;
    let [code] = take(body)?;
    let finding = Finding::from_code(code)?;
    let (against, calls) = (rank(body)?, calls(body)?);
    Some(Report { communicator, finding, against, text: text(body)?, calls })
}

fn calls(body: &mut Bytes) -> Option<Option<Calls>> {
    if !flag(body)? {
        return Some(None);
    }
    let mut call = || Some((rank(body)?, Call::decode(&take(body)?)?));
    Some(Some([call()?, call()?]))
}

fn parse_recounted(body: &mut Bytes) -> Option<Message> {
    let communicator = word(body)?;
    let mut calls = Vec::new();
    while !body.is_empty() {
        let call = Call::decode(&take(body)?)?;
        let length = word(body)? as usize;
        let text = (length <= body.len()).then(|| body.split_to(length))?;
        calls.push(Told { call, text: String::from_utf8(text.into()).ok()? });
    }
    Some(Message::Recounted { communicator, calls })
}

fn parse_stalled_call(body: &mut Bytes) -> Option<StalledCall> {
    let call = Call::decode(&take(body)?)?;
    let uncounted = u64::from_le_bytes(take(body)?);
    let mut ranks = Vec::new();
    while !body.is_empty() {
        ranks.push(rank(body)?);
    }
    Some(StalledCall { call, uncounted, ranks })
}

fn parse_request(body: &mut Bytes) -> Option<Message> {
    let (query, communicator) = (word(body)?, word(body)?);
    let is_overdue = match take(body)? {
        [0] => false,
        [1] => true,
        _ => return None,
    };
    Some(Message::StatusRequest { query, communicator, is_overdue })
}

fn parse_left(body: &mut Bytes) -> Option<Message> {
    let (rank, last) = (rank(body)?, parse_snapshot(body)?);
    let mut left_group = Vec::new();
    while !body.is_empty() {
        left_group.push((word(body)?, parse_snapshot(body)?));
    }
    Some(Message::Left { rank, last, left_group })
}

fn parse_left_group(body: &mut Bytes) -> Option<Message> {
    let communicator = word(body)?;
    Some(Message::LeftGroup { communicator, last: parse_snapshot(body)? })
}

fn parse_has_left_group(body: &mut Bytes) -> Option<Message> {
    Some(Message::HasParted { communicator: word(body)?, rank: rank(body)? })
}

fn parse_missing(body: &mut Bytes) -> Option<Message> {
    Some(Message::Missing { round: word(body)?, millis: word(body)? })
}

fn parse_status(body: &mut Bytes) -> Option<Message> {
    Some(Message::Status { query: word(body)?, doing: doing::parse(body)? })
}

pub(super) fn parse_snapshot(body: &mut Bytes) -> Option<Snapshot> {
    let (called, inside, call) = (flag(body)?, flag(body)?, take(body)?);
    let call = match called {
        true => Some(Call::decode(&call)?),
        false if call == [0; Call::ENCODED] => None,
        false => return None,
    };
    let (step, steps) = (word(body)?, word(body)?);
    let (bytes, uncounted) = (u64::from_le_bytes(take(body)?), u64::from_le_bytes(take(body)?));
    Some(Snapshot { call, inside, step, steps, bytes, uncounted })
}

fn parse_verdict(body: &mut Bytes) -> Option<Verdict> {
    let [code] = take(body)?;
    let kind = VerdictKind::from_code(code)?;
    let count = rank(body)?;
    if count > FAILED_RANKS_MAX {
        return None;
    }
    let failed_ranks = (0..count).map(|_| rank(body)).collect::<Option<Vec<_>>>()?;
    let calls = calls(body)?.map(Box::new);
    Some(Verdict { kind, failed_ranks, text: text(body)?, calls })
}

#[cfg(test)]
pub(super) mod tests;
