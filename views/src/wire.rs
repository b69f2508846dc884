//! Messages as bytes: a kind, then 64-bit and 32-bit integers, little endian, lists with their
//! lengths before them.

use std::fmt;

use crate::{Ballot, Member, Message, Promise, View};

/// The bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes are no message about views")
    }
}

impl std::error::Error for Malformed {}

/// Beyond what any job comes to: there is always a next epoch, and a higher ballot.
const EPOCH_MAX: u64 = 1 << 62;
const ROUND_MAX: u32 = 1 << 31;

const WISH: u8 = 1;
const JOIN: u8 = 2;
const PREPARE: u8 = 3;
const PROMISED: u8 = 4;
const REFUSED: u8 = 5;
const ACCEPT: u8 = 6;
const ACCEPTED: u8 = 7;
const DECIDED: u8 = 8;

/// The message's bytes.
pub fn encode(message: &Message) -> Vec<u8> {
    let mut to = Vec::new();
    match message {
        Message::Wish { view, out, admits } => {
            to.push(WISH);
            put_view(&mut to, view);
            put_members(&mut to, out);
            to.push(u8::from(*admits));
        }
        Message::Join(Member(newcomer)) => {
            to.push(JOIN);
            put(&mut to, *newcomer);
        }
        Message::Prepare { view, ballot } => {
            to.push(PREPARE);
            put_view(&mut to, view);
            put_ballot(&mut to, *ballot);
        }
        Message::Promised { epoch, ballot, promise: Promise { accepted, out } } => {
            to.push(PROMISED);
            put(&mut to, *epoch);
            put_ballot(&mut to, *ballot);
            to.push(u8::from(accepted.is_some()));
            if let Some((ballot, view)) = accepted {
                put_ballot(&mut to, *ballot);
                put_view(&mut to, view);
            }
            put_members(&mut to, out);
        }
        Message::Refused { epoch, ballot } | Message::Accepted { epoch, ballot } => {
            let is_refusal = matches!(message, Message::Refused { .. });
            to.push(if is_refusal { REFUSED } else { ACCEPTED });
            put(&mut to, *epoch);
            put_ballot(&mut to, *ballot);
        }
        Message::Accept { ballot, next } => {
            to.push(ACCEPT);
            put_ballot(&mut to, *ballot);
            put_view(&mut to, next);
        }
        Message::Decided(view) => {
            to.push(DECIDED);
            put_view(&mut to, view);
        }
    }
    to
}

/// The message that the bytes are, all of them.
///
/// # Errors
/// If they are none.
pub fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
    let mut from = Reader(bytes);
    let message = from.message().filter(|_| from.0.is_empty());
    message.ok_or(Malformed)
}

fn put(to: &mut Vec<u8>, number: u64) {
    to.extend(number.to_le_bytes());
}

fn put_ballot(to: &mut Vec<u8>, Ballot { round, rank }: Ballot) {
    to.extend(round.to_le_bytes());
    to.extend(rank.to_le_bytes());
}

fn put_members(to: &mut Vec<u8>, members: &[Member]) {
    put(to, members.len() as u64);
    members.iter().for_each(|member| put(to, member.0));
}

fn put_view(to: &mut Vec<u8>, view: &View) {
    put(to, view.epoch);
    put_members(to, &view.members);
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const BYTES: usize>(&mut self) -> Option<[u8; BYTES]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.take()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn ballot(&mut self) -> Option<Ballot> {
        let (round, rank) = (self.take().map(u32::from_le_bytes)?, self.take()?);
        (round <= ROUND_MAX).then_some(Ballot { round, rank: u32::from_le_bytes(rank) })
    }

    fn members(&mut self) -> Option<Vec<Member>> {
        let count = self.number()?;
        // More can't be there, whatever is claimed: nothing is allocated for a claim.
        if count > self.0.len() as u64 / 8 {
            return None;
        }
        let members: Vec<Member> =
            (0..count).map(|_| self.number().map(Member)).collect::<Option<_>>()?;
        let mut sorted = members.clone();
        sorted.sort_unstable();
        sorted.windows(2).all(|pair| pair[0] != pair[1]).then_some(members)
    }

    fn view(&mut self) -> Option<View> {
        let epoch = self.number().filter(|epoch| *epoch <= EPOCH_MAX)?;
        Some(View { epoch, members: self.members()? })
    }

    fn message(&mut self) -> Option<Message> {
        let [kind] = self.take()?;
        Some(match kind {
            WISH => {
                Message::Wish { view: self.view()?, out: self.members()?, admits: self.flag()? }
            }
            JOIN => Message::Join(Member(self.number()?)),
            PREPARE => Message::Prepare { view: self.view()?, ballot: self.ballot()? },
            PROMISED => {
                let (epoch, ballot) = (self.number()?, self.ballot()?);
                let accepted = match self.flag()? {
                    true => Some((self.ballot()?, self.view()?)),
                    false => None,
                };
                let out = self.members()?;
                Message::Promised { epoch, ballot, promise: Promise { accepted, out } }
            }
            REFUSED => Message::Refused { epoch: self.number()?, ballot: self.ballot()? },
            ACCEPT => Message::Accept { ballot: self.ballot()?, next: self.view()? },
            ACCEPTED => Message::Accepted { epoch: self.number()?, ballot: self.ballot()? },
            DECIDED => Message::Decided(self.view()?),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        let view = View { epoch: 7, members: [3, 0, u64::MAX].map(Member).into() };
        let (ballot, epoch, out) = (Ballot { round: 2, rank: 1 }, 7, vec![Member(0), Member(3)]);
        let promise = |accepted| Promise { accepted, out: out.clone() };
        let accepted = Some((Ballot { round: 1, rank: 0 }, view.clone()));
        vec![
            Message::Wish { view: view.clone(), out: out.clone(), admits: true },
            Message::Wish { view: view.clone(), out: Vec::new(), admits: false },
            Message::Join(Member(9)),
            Message::Prepare { view: view.clone(), ballot },
            Message::Promised { epoch, ballot, promise: promise(None) },
            Message::Promised { epoch, ballot, promise: promise(accepted) },
            Message::Refused { epoch, ballot },
            Message::Accept { ballot, next: view.clone() },
            Message::Accepted { epoch, ballot },
            Message::Decided(view),
        ]
    }

    #[test]
    fn messages_survive_the_wire_and_nothing_else_passes_for_one() {
        for message in samples() {
            let encoded = encode(&message);
            assert_eq!(decode(&encoded), Ok(message));
            for end in 0..encoded.len() {
                assert_eq!(decode(&encoded[..end]), Err(Malformed));
            }
            assert_eq!(decode(&[&encoded[..], &[0]].concat()), Err(Malformed));
        }
        assert_eq!(decode(&[99]), Err(Malformed));
        for (epoch, round, is_right) in [
            (EPOCH_MAX, ROUND_MAX, true),
            (EPOCH_MAX + 1, 1, false),
            (u64::MAX, 1, false),
            (1, ROUND_MAX + 1, false),
            (1, u32::MAX, false),
        ] {
            let next = View { epoch, members: vec![Member(1)] };
            let last = Message::Accept { ballot: Ballot { round, rank: 0 }, next };
            assert_eq!(decode(&encode(&last)).is_ok(), is_right, "{last:?}");
        }
        let twice = View { epoch: 1, members: vec![Member(1), Member(1)] };
        assert_eq!(decode(&encode(&Message::Decided(twice))), Err(Malformed), "a member twice");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_error_or_the_message_that_they_encode(
            bytes in proptest::collection::vec(0..12_u8, 0..120),
        ) {
            if let Ok(message) = decode(&bytes) {
                proptest::prop_assert_eq!(encode(&message), bytes);
            }
        }
    }
}
