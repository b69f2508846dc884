//! What a rank tells all others of its devices and queue pairs.

use bytes::{Buf, BufMut};
use unisum_link::Rank;

use crate::wire::RAILS_MAX;

/// A rank's offer of connections. Its encoding begins with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    /// Number of the first packet of each of its connections.
    pub(crate) psn: u32,
    /// Where peers may write: one area after another, in the order of `peers`.
    pub(crate) areas: u64,
    pub(crate) areas_key: u32,
    /// Its devices.
    pub(crate) rails: Vec<RailCard>,
    /// The peers it has queue pairs for.
    pub(crate) peers: Vec<PeerCard>,
}

/// One device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RailCard {
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    /// Code of the largest packet.
    pub(crate) mtu: u8,
    pub(crate) is_ethernet: bool,
}

/// The queue pairs for one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerCard {
    pub(crate) rank: Rank,
    /// The first of each device, then the second of each, and so on.
    pub(crate) pairs: Vec<u32>,
}

const VERSION: u32 = 1;
/// Most queue pairs for a peer on each device.
pub(crate) const PAIRS_MAX: usize = 16;
/// Codes of the smallest and the largest packet: 256 and 4096 bytes.
pub(crate) const MTU_CODES: std::ops::RangeInclusive<u8> = 1..=5;
/// Queue pair and packet numbers have 24 bits.
pub(crate) const NUMBER_LIMIT: u32 = 1 << 24;

impl Card {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(self.psn);
        bytes.put_u64_le(self.areas);
        bytes.put_u32_le(self.areas_key);
        bytes.put_u8(self.rails.len() as u8);
        bytes.put_u8(self.peers.first().map_or(0, |peer| peer.pairs.len()) as u8);
        for rail in &self.rails {
            bytes.put_slice(&rail.gid);
            bytes.put_u16_le(rail.lid);
            bytes.put_u8(rail.mtu);
            bytes.put_u8(u8::from(rail.is_ethernet));
        }
        for peer in &self.peers {
            bytes.put_u32_le(peer.rank as u32);
            peer.pairs.iter().for_each(|pair| bytes.put_u32_le(*pair));
        }
        bytes
    }

    /// Reads a card; the error says what is wrong with it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut from = bytes;
        let version = from.try_get_u32_le().map_err(|_| ENDS)?;
        if version != VERSION {
            return Err(format!("version {version} of the RDMA protocol, not {VERSION}"));
        }
        let psn = from.try_get_u32_le().map_err(|_| ENDS)?;
        let areas = from.try_get_u64_le().map_err(|_| ENDS)?;
        let areas_key = from.try_get_u32_le().map_err(|_| ENDS)?;
        let rails = usize::from(from.try_get_u8().map_err(|_| ENDS)?);
        let pairs = usize::from(from.try_get_u8().map_err(|_| ENDS)?);
        let is_sane = (1..=RAILS_MAX).contains(&rails)
            && pairs.is_multiple_of(rails)
            && pairs / rails <= PAIRS_MAX
            && psn < NUMBER_LIMIT;
        if !is_sane {
            return Err(format!("{rails} devices, {pairs} queue pairs and packet number {psn}"));
        }
        let rails = (0..rails).map(|_| RailCard::decode(&mut from)).collect::<Result<_, _>>()?;
        let mut peers = Vec::new();
        while !from.is_empty() {
            peers.push(PeerCard::decode(&mut from, pairs)?);
        }
        if peers.is_empty() != (pairs == 0) {
            return Err("queue pairs for nobody, or none for somebody".into());
        }
        Ok(Self { psn, areas, areas_key, rails, peers })
    }

    /// What it offers to `rank`: which of its areas, and its queue pairs.
    pub(crate) fn offer_to(&self, rank: Rank) -> Option<(usize, &[u32])> {
        let index = self.peers.iter().position(|peer| peer.rank == rank)?;
        Some((index, &self.peers[index].pairs))
    }
}

impl RailCard {
    fn decode(from: &mut &[u8]) -> Result<Self, String> {
        let mut gid = [0; 16];
        from.try_copy_to_slice(&mut gid).map_err(|_| ENDS)?;
        let lid = from.try_get_u16_le().map_err(|_| ENDS)?;
        let mtu = from.try_get_u8().map_err(|_| ENDS)?;
        let kind = from.try_get_u8().map_err(|_| ENDS)?;
        if !MTU_CODES.contains(&mtu) || kind > 1 {
            return Err(format!("a device of kind {kind} with packets of code {mtu}"));
        }
        Ok(Self { gid, lid, mtu, is_ethernet: kind == 1 })
    }
}

impl PeerCard {
    fn decode(from: &mut &[u8], pairs: usize) -> Result<Self, String> {
        let rank = from.try_get_u32_le().map_err(|_| ENDS)? as Rank;
        let pairs: Vec<u32> = (0..pairs)
            .map(|_| from.try_get_u32_le().map_err(|_| ENDS))
            .collect::<Result<_, _>>()?;
        match pairs.iter().find(|&&pair| pair >= NUMBER_LIMIT) {
            Some(pair) => Err(format!("a queue pair {pair}")),
            None => Ok(Self { rank, pairs }),
        }
    }
}

const ENDS: &str = "a card that ends early";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn card() -> Card {
        let rail = RailCard { gid: [7; 16], lid: 3, mtu: 5, is_ethernet: true };
        let peers = [1, 3].map(|rank| PeerCard { rank, pairs: vec![17, 18, 19, 1 << 23] });
        Card { psn: 99, areas: 1 << 40, areas_key: 5, rails: vec![rail; 2], peers: peers.into() }
    }

    #[test]
    fn cards_survive_the_wire_and_say_what_is_wrong() {
        let encoded = card().encode();
        assert_eq!(Card::decode(&encoded), Ok(card()));
        for end in 0..encoded.len() {
            let short = Card::decode(&encoded[..end]);
            assert!(short.is_err() || (end - 62) % 20 == 0, "{end} bytes were accepted: {short:?}");
        }
        assert_eq!(card().offer_to(3).map(|(area, _)| area), Some(1));
        assert_eq!(card().offer_to(2), None);
    }
}
