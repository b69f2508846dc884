//! What a rank tells a peer of its devices and of the queue pairs that it has for that peer.

use bytes::{Buf, BufMut};

use crate::wire::RAILS_MAX;

/// A rank's offer of connections to one peer. Its encoding begins with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    /// Number of the first packet of each connection.
    pub(crate) psn: u32,
    /// Where the peer may write, and the key for it.
    pub(crate) area: u64,
    pub(crate) area_key: u32,
    /// Its devices.
    pub(crate) rails: Vec<RailCard>,
    /// The numbers of the queue pairs: the first of each device, then the second of each, and so
    /// on.
    pub(crate) pairs: Vec<u32>,
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

const VERSION: u32 = 2;
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
        bytes.put_u64_le(self.area);
        bytes.put_u32_le(self.area_key);
        bytes.put_u8(self.rails.len() as u8);
        bytes.put_u8(self.pairs.len() as u8);
        for rail in &self.rails {
            bytes.put_slice(&rail.gid);
            bytes.put_u16_le(rail.lid);
            bytes.put_u8(rail.mtu);
            bytes.put_u8(u8::from(rail.is_ethernet));
        }
        self.pairs.iter().for_each(|pair| bytes.put_u32_le(*pair));
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
        let area = from.try_get_u64_le().map_err(|_| ENDS)?;
        let area_key = from.try_get_u32_le().map_err(|_| ENDS)?;
        let rails = usize::from(from.try_get_u8().map_err(|_| ENDS)?);
        let pairs = usize::from(from.try_get_u8().map_err(|_| ENDS)?);
        let is_sane = (1..=RAILS_MAX).contains(&rails)
            && pairs.is_multiple_of(rails)
            && (1..=PAIRS_MAX).contains(&(pairs / rails))
            && psn < NUMBER_LIMIT;
        if !is_sane {
            return Err(format!("{rails} devices, {pairs} queue pairs and packet number {psn}"));
        }
        let rails = (0..rails).map(|_| RailCard::decode(&mut from)).collect::<Result<_, _>>()?;
        let pair = |_| from.try_get_u32_le().map_err(|_| ENDS);
        let pairs = (0..pairs).map(pair).collect::<Result<Vec<u32>, _>>()?;
        if let Some(pair) = pairs.iter().find(|&&pair| pair >= NUMBER_LIMIT) {
            return Err(format!("a queue pair {pair}"));
        }
        if !from.is_empty() {
            return Err("a card with something behind it".into());
        }
        Ok(Self { psn, area, area_key, rails, pairs })
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

const ENDS: &str = "a card that ends early";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn card() -> Card {
        let rail = RailCard { gid: [7; 16], lid: 3, mtu: 5, is_ethernet: true };
        let pairs = vec![17, 18, 19, 1 << 23];
        Card { psn: 99, area: 1 << 40, area_key: 5, rails: vec![rail; 2], pairs }
    }

    #[test]
    fn cards_survive_the_wire_and_say_what_is_wrong() {
        let encoded = card().encode();
        assert_eq!(Card::decode(&encoded), Ok(card()));
        for end in 0..encoded.len() {
            assert!(Card::decode(&encoded[..end]).is_err(), "{end} bytes were accepted");
        }
        assert!(Card::decode(&[&encoded[..], &[0]].concat()).is_err());
    }
}
