//! What members of an elastic job tell each other, beside what they agree on.

use std::net::SocketAddr;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use unisum_views::{Member, Message};

/// Most addresses of one member.
const ADDRESSES_MAX: usize = 64;

/// What is said on a connection between two members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// About views.
    Agreement(Message),
    /// The sender leaves, in order. Nothing follows.
    Bye,
    /// Where the first rank of an epoch can be reached.
    Tell { epoch: u64, value: Bytes },
    /// Where members, and those that ask to be let in, listen.
    Directory(Vec<(Member, Vec<SocketAddr>)>),
    /// What all members have to have alike, for a process that asks to be let in.
    Terms(String),
}

impl Word {
    pub(super) fn encode(&self) -> Bytes {
        let mut to = BytesMut::new();
        match self {
            Self::Agreement(message) => {
                to.put_u8(1);
                to.put_slice(&unisum_views::encode(message));
            }
            Self::Bye => to.put_u8(2),
            Self::Tell { epoch, value } => {
                to.put_u8(3);
                to.put_u64_le(*epoch);
                to.put_slice(value);
            }
            Self::Directory(members) => {
                to.put_u8(4);
                for (member, addresses) in members {
                    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                    let line = format!("{} {}\n", member.0, addresses.join(" "));
                    to.put_slice(line.as_bytes());
                }
            }
            Self::Terms(terms) => {
                to.put_u8(5);
                to.put_slice(terms.as_bytes());
            }
        }
        to.freeze()
    }

    /// The word that the bytes are; `None` if they are none.
    pub(super) fn decode(mut bytes: Bytes) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        match bytes.get_u8() {
            1 => unisum_views::decode(&bytes).ok().map(Self::Agreement),
            2 => bytes.is_empty().then_some(Self::Bye),
            3 => {
                let (epoch, _) = bytes.split_first_chunk::<8>()?;
                let epoch = u64::from_le_bytes(*epoch);
                Some(Self::Tell { epoch, value: bytes.slice(8..) })
            }
            4 => {
                let text = std::str::from_utf8(&bytes).ok()?;
                text.lines().map(entry).collect::<Option<_>>().map(Self::Directory)
            }
            5 => String::from_utf8(bytes.to_vec()).ok().map(Self::Terms),
            _ => None,
        }
    }
}

fn entry(line: &str) -> Option<(Member, Vec<SocketAddr>)> {
    let mut words = line.split(' ');
    let member = Member(words.next()?.parse().ok()?);
    // A member without any has an empty word.
    let words = words.filter(|word| !word.is_empty());
    let addresses: Vec<SocketAddr> = words.map(|it| it.parse().ok()).collect::<Option<_>>()?;
    (addresses.len() <= ADDRESSES_MAX).then_some((member, addresses))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_wire() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let directory = vec![
            (Member(0), vec![at("10.0.0.1:4000"), at("[fe80::1]:4000")]),
            (Member(1 << 31), vec![at("127.0.0.1:1")]),
            (Member(2), Vec::new()),
        ];
        for word in [
            Word::Agreement(Message::Join(Member(7))),
            Word::Bye,
            Word::Tell { epoch: 3, value: Bytes::from_static(b"value") },
            Word::Tell { epoch: u64::MAX, value: Bytes::new() },
            Word::Directory(directory),
            Word::Directory(Vec::new()),
            Word::Terms("minimum:2 transport=auto".into()),
        ] {
            assert_eq!(Word::decode(word.encode()), Some(word));
        }
    }

    #[test]
    fn what_is_no_word_is_refused() {
        for bytes in [
            &b""[..],
            b"\x00",
            b"\x02x",
            b"\x03short",
            b"\x04x 127.0.0.1:1\n",
            b"\x05\xff",
            b"\x09",
        ] {
            assert_eq!(Word::decode(Bytes::from_static(bytes)), None, "{bytes:?}");
        }
        assert_eq!(Word::decode(Bytes::from_static(b"\x041 nowhere\n")), None);
    }
}
