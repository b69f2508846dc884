//! What each rank sends to all others when it joins.

use std::net::SocketAddr;

use bytes::{Buf, BufMut};

use super::cores::Cores;
use unisum_control::interface::without_scope;

/// A rank's card. Its encoding needs no version, because ranks of other builds are refused before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Card {
    /// Where the rank accepts connections, the best address first. Interface indices are left out:
    /// they mean nothing on other hosts.
    pub(crate) addresses: Vec<SocketAddr>,
    /// The host it is on, according to its name; sharing memory proves it.
    pub(crate) host: String,
    /// Process id, for messages.
    pub(crate) pid: u32,
    /// Its place on its host and how many ranks are there, where the launcher says both.
    pub(crate) place: Option<(u32, u32)>,
    /// The cores it may run on.
    pub(super) cores: Cores,
    /// Settings that must be the same on all ranks, as text.
    pub(crate) settings: String,
    /// What it tells of its end of the link among the ranks of its host; empty if it has none.
    pub(crate) node: Vec<u8>,
    /// How far the rank of an elastic job is as it enters a view; empty at the start.
    pub(crate) standing: Vec<u8>,
}

impl Card {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u32_le(self.pid);
        let (local_rank, local_size) = self.place.unwrap_or_default();
        bytes.put_u32_le(local_rank);
        bytes.put_u32_le(local_size);
        let told = |&address: &SocketAddr| without_scope(address).to_string();
        let addresses = self.addresses.iter().map(told).collect::<Vec<_>>().join(" ");
        let (host, settings) = (self.host.as_bytes(), self.settings.as_bytes());
        let (node, standing, cores) = (&self.node, &self.standing, self.cores.encode());
        for field in [addresses.as_bytes(), host, settings, node, standing, &cores] {
            bytes.put_u32_le(u32::try_from(field.len()).expect("cards are small"));
            bytes.put_slice(field);
        }
        bytes
    }

    /// Reads a card; the error says what is wrong with it.
    pub(crate) fn decode(mut bytes: &[u8]) -> Result<Self, String> {
        let pid = bytes.try_get_u32_le().map_err(|_| "a card without process id")?;
        let mut number = || bytes.try_get_u32_le().map_err(|_| "a card without a place");
        let (local_rank, local_size) = (number()?, number()?);
        let place = match (local_rank, local_size) {
            (0, 0) => None,
            place if local_rank < local_size => Some(place),
            _ => return Err("a card with a place that is none".into()),
        };
        let addresses = text(&mut bytes)?;
        let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is not an address"));
        let addresses = addresses
            .split(' ')
            .filter(|text| !text.is_empty())
            .map(parse)
            .collect::<Result<_, _>>()?;
        let (host, settings) = (text(&mut bytes)?, text(&mut bytes)?);
        let node = field(&mut bytes)?.to_vec();
        let standing = field(&mut bytes)?.to_vec();
        let cores = Cores::decode(field(&mut bytes)?).ok_or("a card that tells no cores")?;
        if !bytes.is_empty() {
            return Err("a card with something behind it".into());
        }
        Ok(Self { addresses, host, pid, place, cores, settings, node, standing })
    }
}

fn text(bytes: &mut &[u8]) -> Result<String, String> {
    String::from_utf8(field(bytes)?.to_vec()).map_err(|_| "text that is not UTF-8".into())
}

fn field<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let length = bytes.try_get_u32_le().map_err(|_| "a card that ends early")? as usize;
    bytes.split_off(..length).ok_or_else(|| "a card that ends early".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_survive_the_wire() {
        let card = Card {
            addresses: vec!["[fe80::1]:4000".parse().unwrap(), "10.0.0.1:4000".parse().unwrap()],
            host: "boot/net".into(),
            pid: 7,
            place: Some((3, 8)),
            cores: Cores::own(),
            settings: "transport=auto".into(),
            node: vec![1, 2, 3],
            standing: vec![4, 5],
        };
        assert_eq!(Card::decode(&card.encode()).as_ref(), Ok(&card));
        let scoped = Card { addresses: vec!["[fe80::1%7]:4000".parse().unwrap()], ..card };
        let told = Card::decode(&scoped.encode()).unwrap().addresses;
        assert_eq!(told, ["[fe80::1]:4000".parse().unwrap()]);
        assert_eq!(Card::decode(&Card::default().encode()), Ok(Card::default()));
    }
}
