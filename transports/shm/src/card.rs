//! What a rank tells the others before they try to share memory.

use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::process::{Resource, getrlimit};
use unisum_link::Rank;

use crate::ShmError;
use crate::layout::{HEAP_ALIGN, Layout};

const VERSION: u8 = 2;
const CARD_BYTES: usize = 1 + 16 + 8 + 8 + 32;

/// A rank's card. Equal `boot` and `network` only make two ranks candidates: that they share a host
/// is proven by mapping the same memory. Which user a rank is says nothing: user namespaces have
/// numbers of their own, and the job's secret is what admits a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    /// The kernel's boot id.
    boot: [u8; 16],
    /// The inode of the network namespace, in which abstract sockets have their names.
    network: u64,
    /// Bytes of address space that the rank can spare.
    pub(crate) room: u64,
    /// The abstract name of its socket.
    pub(crate) socket: [u8; 32],
}

impl Card {
    /// This process's card.
    pub(crate) fn here(socket: [u8; 32]) -> Result<Self, ShmError> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .and_then(|text| parse_uuid(&text).ok_or_else(|| io::ErrorKind::InvalidData.into()))
            .map_err(ShmError::os("reading the boot id"))?;
        let network = std::fs::metadata("/proc/self/ns/net")
            .map_err(ShmError::os("looking at the network namespace"))?
            .ino();
        Ok(Self { boot, network, room: spare_room()?, socket })
    }

    /// The bytes that travel.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CARD_BYTES);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.boot);
        bytes.extend_from_slice(&self.network.to_le_bytes());
        bytes.extend_from_slice(&self.room.to_le_bytes());
        bytes.extend_from_slice(&self.socket);
        bytes
    }

    /// Reads them; `None` if they are of another version or no card at all.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&VERSION, rest) = bytes.split_first()? else {
            return None;
        };
        let (boot, rest) = rest.split_first_chunk()?;
        let (network, rest) = rest.split_first_chunk()?;
        let (room, socket) = rest.split_first_chunk()?;
        Some(Self {
            boot: *boot,
            network: u64::from_le_bytes(*network),
            room: u64::from_le_bytes(*room),
            socket: socket.try_into().ok()?,
        })
    }

    fn may_share_with(&self, other: &Self) -> bool {
        (self.boot, self.network) == (other.boot, other.network)
    }
}

/// The ranks that may share memory with `me`, itself included, ascending, with their cards. Every
/// candidate computes the same.
pub(crate) fn candidates(me: Rank, cards: &[Vec<u8>]) -> Result<Vec<(Rank, Card)>, ShmError> {
    let mut offered = Vec::new();
    for (rank, card) in cards.iter().enumerate().filter(|(_, card)| !card.is_empty()) {
        offered.push((rank, Card::decode(card).ok_or(ShmError::Card(rank))?));
    }
    let Some((_, own)) = offered.iter().find(|(rank, _)| *rank == me).cloned() else {
        return Err(ShmError::Card(me));
    };
    offered.retain(|(_, card)| card.may_share_with(&own));
    // Who has no room for the least there can be says so, and the others share without it.
    let layout = Layout::new(offered.len(), HEAP_ALIGN);
    let least = layout.map_or(u64::MAX, |layout| layout.bytes());
    if own.room < least && offered.len() > 1 {
        return Err(ShmError::Narrow { room: own.room, least });
    }
    offered.retain(|(_, card)| card.room >= least);
    if offered.len() < 2 {
        return Err(ShmError::Alone);
    }
    Ok(offered)
}

/// The ranks that run on the kernel of `me` in other network namespaces, and therefore can't share
/// memory with it; only on the lowest rank of that kernel, so that one rank says so.
pub fn apart(me: Rank, cards: &[Vec<u8>]) -> Vec<Rank> {
    let known: Vec<_> =
        (0..).zip(cards).filter_map(|it| Some((it.0, Card::decode(it.1)?))).collect();
    let Some((_, own)) = known.iter().find(|(rank, _)| *rank == me) else { return Vec::new() };
    let here = || known.iter().filter(|(_, card)| card.boot == own.boot);
    if here().any(|(rank, _)| *rank < me) {
        return Vec::new();
    }
    here().filter(|(_, card)| card.network != own.network).map(|(rank, _)| *rank).collect()
}

/// Half of what the address-space limit leaves: the rest is for everybody else in the process.
fn spare_room() -> Result<u64, ShmError> {
    let Some(limit) = getrlimit(Resource::As).current else {
        return Ok(u64::MAX);
    };
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(ShmError::os("reading how much address space is in use"))?;
    let used_kib = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmSize:")?.trim().strip_suffix("kB")?.trim().parse().ok()
        })
        .unwrap_or(0u64);
    Ok(limit.saturating_sub(used_kib << 10) / 2)
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().split('-').collect();
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(socket: u8) -> Card {
        Card::here([socket; 32]).unwrap()
    }

    #[test]
    fn cards_survive_the_wire_and_garbage_is_refused() {
        let bytes = card(1).encode();
        assert_eq!(bytes.len(), CARD_BYTES);
        assert_eq!(Card::decode(&bytes), Some(card(1)));
        assert_eq!(Card::decode(&bytes[1..]), None);
        assert_eq!(Card::decode(&[bytes.clone(), vec![0]].concat()), None);
        assert_eq!(Card::decode(&[vec![VERSION + 1], bytes[1..].to_vec()].concat()), None);
        assert_eq!(Card::decode(&[]), None);
    }

    #[test]
    fn one_rank_knows_who_is_in_another_network_on_its_host() {
        let other = |network| Card { network: card(0).network + network, ..card(0) };
        let elsewhere = Card { boot: [9; 16], ..card(0) };
        let cards = [elsewhere, other(0), other(1), other(0), other(2), other(1)];
        let cards = cards.map(|card| card.encode());
        let found: Vec<_> = (0..6).map(|me| apart(me, &cards)).collect();
        assert_eq!(found[1], [2, 4, 5]);
        assert!((0..6).all(|me| me == 1 || found[me].is_empty()), "{found:?}");
        assert!(apart(1, &[cards[1].clone(), Vec::new()]).is_empty());
    }

    #[test]
    fn candidates_are_those_of_one_host_and_network() {
        let elsewhere = Card { boot: [9; 16], ..card(0) };
        let stranger = Card { network: card(0).network + 1, ..card(0) };
        let cards = [card(0), elsewhere, card(2), stranger].map(|card| card.encode());
        let cards = [cards.to_vec(), vec![Vec::new()]].concat();
        let ranks = |me| {
            let found = candidates(me, &cards);
            found.map(|found| found.into_iter().map(|(rank, _)| rank).collect::<Vec<_>>())
        };
        assert_eq!(ranks(0).unwrap(), [0, 2]);
        assert_eq!(ranks(2).unwrap(), [0, 2]);
        assert!(matches!(ranks(1), Err(ShmError::Alone)));
        assert!(matches!(ranks(4), Err(ShmError::Card(4))));
        // A limit of one rank is its own business.
        let narrow = Card { room: 1 << 20, ..card(1) };
        let cards = [card(0), narrow, card(2)].map(|card| card.encode());
        let ranks = |me| candidates(me, &cards).map(|it| it.iter().map(|it| it.0).collect());
        assert_eq!(ranks(0).unwrap(), vec![0, 2]);
        assert!(matches!(ranks(1), Err::<Vec<_>, _>(ShmError::Narrow { .. })));
        assert!(matches!(candidates(0, &[card(0).encode(), vec![1, 2]]), Err(ShmError::Card(1))));
    }
}
