//! The members record: where the members of an elastic job can be reached, for processes that want
//! to join it.
//!
//! `unisum-members1 SESSION EPOCH`, a line `NUMBER ADDRESS…` for each member, and `end`, which
//! shows that it is whole. One living member is enough to be led to the others. Who reads it
//! without the token can't dial as a member: see [`unisum_link::secure::Preamble`].

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use unisum_views::Member;

use crate::file::{self, Published};
use crate::interface::{ADDRESSES_MAX, without_scope};

const MAGIC: &str = "unisum-members1";
const END: &str = "end";
/// Longest record: 65,536 members with three addresses each.
const BYTES_MAX: u64 = 16 << 20;

/// Who is in an elastic job, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The session of the job's start.
    pub session: [u8; 16],
    /// The epoch of the view whose members these are.
    pub epoch: u64,
    /// By rank, where each member listens.
    pub members: Vec<(Member, Vec<SocketAddr>)>,
}

/// A record in a file, which is removed when this is dropped, unless another one has taken its
/// place.
#[derive(Debug)]
pub struct PublishedRecord(#[expect(dead_code, reason = "dropped, not read")] Published);

impl Record {
    /// The record as text.
    pub fn encode(&self) -> String {
        let mut text = format!("{MAGIC} ");
        self.session.iter().for_each(|byte| text.push_str(&format!("{byte:02x}")));
        text.push_str(&format!(" {}\n", self.epoch));
        for (Member(number), addresses) in &self.members {
            text.push_str(&number.to_string());
            addresses.iter().for_each(|&it| text.push_str(&format!(" {}", without_scope(it))));
            text.push('\n');
        }
        text + END + "\n"
    }

    /// The record that the text is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(text: &str) -> Result<Self, &'static str> {
        match text.split(' ').next() {
            Some(MAGIC) => {}
            Some(word) if word.starts_with("unisum-members") => {
                return Err("another version of unisum has written it");
            }
            _ => return Err(NOT_WHOLE),
        }
        parse(text).ok_or(NOT_WHOLE)
    }

    /// Writes the record to a file, in place of what it said before: others see the old content or
    /// the new, never a part.
    ///
    /// # Errors
    /// The system's.
    pub fn publish(&self, path: &Path) -> io::Result<PublishedRecord> {
        file::publish_text(path, self.encode()).map(PublishedRecord)
    }

    /// The record in a file.
    ///
    /// # Errors
    /// If the file can't be read, or is no record.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = file::read_text(path, BYTES_MAX)?;
        Self::decode(&text).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
    }
}

const NOT_WHOLE: &str = "it is not a whole members record (yet)";

fn parse(text: &str) -> Option<Record> {
    let mut lines = text.strip_suffix('\n')?.split('\n');
    let mut head = lines.next()?.split(' ').skip(1);
    let (hex, epoch) = (head.next()?, head.next()?.parse().ok()?);
    let digits = hex.len() == 32 && hex.bytes().all(|it| it.is_ascii_hexdigit());
    if !digits || head.next().is_some() {
        return None;
    }
    let session = u128::from_str_radix(hex, 16).ok()?.to_be_bytes();
    let mut members = Vec::new();
    loop {
        let line = lines.next()?;
        if line == END {
            break;
        }
        let mut words = line.split(' ');
        let member = Member(words.next()?.parse().ok()?);
        let addresses: Vec<SocketAddr> = words.map(|it| it.parse().ok()).collect::<Option<_>>()?;
        if !(1..=ADDRESSES_MAX).contains(&addresses.len()) {
            return None;
        }
        members.push((member, addresses));
    }
    let is_whole = !members.is_empty() && lines.next().is_none();
    is_whole.then_some(Record { session, epoch, members })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Scratch;

    fn record() -> Record {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let members = vec![
            (Member(0), vec![at("10.0.0.1:4000"), at("[fe80::1]:4000")]),
            (Member(1 << 31 | 5), vec![at("127.0.0.1:1")]),
        ];
        Record { session: [0x0a; 16], epoch: 7, members }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_until_it_is_dropped() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting.members");
        assert!(Record::read(&path).is_err());
        let published = record().publish(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record());
        let later = Record { epoch: 8, ..record() };
        let second = later.publish(&path).unwrap();
        drop(published);
        assert_eq!(Record::read(&path).unwrap(), later, "the later one stays");
        drop(second);
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_whole_record_is_refused() {
        let whole = record().encode();
        for end in 0..whole.len() {
            assert!(Record::decode(&whole[..end]).is_err(), "{:?}", &whole[..end]);
        }
        assert!(Record::decode(&(whole.clone() + "x")).is_err());
        assert!(Record::decode(&whole.replace("127.0.0.1:1", "nowhere")).is_err());
        let other = whole.replace("members1", "members2");
        assert_eq!(Record::decode(&other), Err("another version of unisum has written it"));
    }
}
