//! Setting up: from devices to a link whose connections have all been tested.
//!
//! All ranks do the same: create an [`Offer`], give each peer its card, call [`Offer::connect`],
//! exchange the outcome, call [`VerbsLink::prove`], and exchange the outcome again. Packets to a
//! queue pair that is not connected yet would be lost, and their retransmission takes a while:
//! hence the exchange between connecting and proving.

use std::net::Ipv6Addr;
use std::sync::Arc;

use unisum_link::Rank;
use unisum_link::handshake::random;
use unisum_link::inbox::Ways;

use crate::area::{Area, Layout};
use crate::card::{Card, MTU_CODES, NUMBER_LIMIT, RailCard};
use crate::completions::Completions;
use crate::connection::{Connection, REFILL, WRITES};
use crate::device::{self, Port};
use crate::domain::Domain;
use crate::error::VerbsError;
use crate::filter::DeviceFilter;
use crate::link::{Rail, VerbsLink};
use crate::link_state::LinkState;
use crate::memory::{Pages, Registry};
use crate::peer::Peer;
use crate::queue_pair::{Path, QueuePair};
use crate::wire::RAILS_MAX;

/// The settings of a rank's devices.
#[derive(Clone, Debug)]
pub struct VerbsConfig {
    /// The devices that may be used; `None` means all hardware devices.
    pub devices: Option<DeviceFilter>,
    /// Whether software devices may be used even if they are not named.
    pub software: bool,
    /// Index of the address in the port's table; `None` chooses automatically.
    pub gid_index: Option<u8>,
    /// Queue pairs for each peer on each device, 1 to 16.
    pub pairs_per_peer: usize,
    /// Largest packet in bytes; `None` takes what the ports agree on.
    pub mtu: Option<usize>,
    /// A lost packet is retransmitted after 4.096 µs · 2^this, 1 to 31.
    pub timeout: u8,
    /// How often a packet is retransmitted before the connection counts as broken, 0 to 7.
    pub retries: u8,
    /// The traffic class of packets (for RoCE the IP header's, with DSCP in its upper six bits).
    pub traffic_class: u8,
    /// InfiniBand's service level, 0 to 15.
    pub service_level: u8,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            devices: None,
            software: false,
            gid_index: None,
            pairs_per_peer: 2,
            mtu: None,
            timeout: 18,
            retries: 7,
            traffic_class: 0,
            service_level: 0,
        }
    }
}

/// Open devices with a queue pair for every peer, not connected yet.
#[derive(Debug)]
pub struct Offer {
    rank: Rank,
    world: usize,
    config: VerbsConfig,
    layout: Layout,
    rails: Vec<Rail>,
    peers: Vec<(Rank, Vec<QueuePair>)>,
    registry: Arc<Registry>,
    areas: Pages,
    psn: u32,
    /// By what queue pairs that fail are made anew, in which session.
    ways: Option<(Ways, [u8; 16])>,
}

impl Offer {
    /// Opens the devices and creates what `rank` needs for `peers`.
    ///
    /// # Errors
    /// A [`VerbsError`] that names what is missing: the library, a device, an active port, an
    /// address, memory that may be locked.
    pub fn new(
        rank: Rank,
        world: usize,
        peers: &[Rank],
        config: VerbsConfig,
    ) -> Result<Self, VerbsError> {
        let mut domains = Vec::new();
        for port in chosen_ports(&config)? {
            let gid = port.gid(config.gid_index).map_err(|why| {
                VerbsError::Device(format!("port {} of {} {why}", port.number, port.device))
            })?;
            domains.push(Domain::open(port, gid)?);
        }
        Self::beside(&Registry::new(domains), rank, world, peers, config)
    }

    /// The same for another link over devices that are already open. The link has its own queue
    /// pairs and memory to receive in, and shares the memory registered in `registry`. The choice
    /// of devices in `config` is ignored.
    ///
    /// # Errors
    /// As [`Offer::new`].
    pub fn beside(
        registry: &Arc<Registry>,
        rank: Rank,
        world: usize,
        peers: &[Rank],
        config: VerbsConfig,
    ) -> Result<Self, VerbsError> {
        let (layout, domains) = (Layout::new(world), registry.domains());
        let connections = peers.len() * config.pairs_per_peer;
        let entries = connections * (layout.announcements() + REFILL + WRITES);
        let rails: Vec<Rail> = domains
            .iter()
            .map(|domain| Completions::new(domain, entries).map(Rail::new))
            .collect::<Result<_, _>>()?;
        let queue_pairs = |&peer: &Rank| {
            let turns = (0..config.pairs_per_peer).flat_map(|_| &rails).map(|rail| {
                let announcements = layout.announcements() + REFILL;
                QueuePair::filled(&rail.completions, announcements, 0)
            });
            Ok((peer, turns.collect::<Result<Vec<_>, VerbsError>>()?))
        };
        let peers = peers.iter().map(queue_pairs).collect::<Result<Vec<_>, VerbsError>>()?;
        let areas = Pages::new(domains, 2 * peers.len() * layout.bytes())?;
        let random: [u8; 4] =
            random().map_err(|error| VerbsError::Os("choosing a packet number".into(), error))?;
        let psn = u32::from_le_bytes(random) % NUMBER_LIMIT;
        let registry = registry.clone();
        Ok(Self { rank, world, config, layout, rails, peers, registry, areas, psn, ways: None })
    }

    /// Has queue pairs that fail be made anew, over these ways, in a session that no other link
    /// has. Connections that peers open for it go to [`VerbsLink::inbox`].
    #[must_use]
    pub fn with_ways(mut self, ways: Ways, session: [u8; 16]) -> Self {
        self.ways = Some((ways, session));
        self
    }

    /// What each peer must know, by rank; empty for ranks that are not peers.
    pub fn cards(&self) -> Vec<Vec<u8>> {
        let rail = |domain: &Arc<Domain>| RailCard {
            gid: domain.gid.raw,
            lid: domain.attributes.lid,
            mtu: self.mtu(domain),
            is_ethernet: domain.port.is_ethernet,
        };
        let rails: Vec<RailCard> = self.registry.domains().iter().map(rail).collect();
        let mut cards = vec![Vec::new(); self.world];
        for (index, (rank, pairs)) in self.peers.iter().enumerate() {
            let card = Card {
                psn: self.psn,
                area: self.inbound(index) as u64,
                area_key: self.areas.keys().remote[0],
                rails: rails.clone(),
                pairs: pairs.iter().map(QueuePair::number).collect(),
            };
            cards[*rank] = card.encode();
        }
        cards
    }

    /// Code of the largest packet that this rank's port and settings allow.
    fn mtu(&self, domain: &Domain) -> u8 {
        let port = (domain.attributes.active_mtu as u8).clamp(*MTU_CODES.start(), *MTU_CODES.end());
        let allowed = self.config.mtu.map_or(*MTU_CODES.end(), |bytes| {
            MTU_CODES.filter(|code| mtu_bytes(*code) <= bytes).max().unwrap_or(*MTU_CODES.start())
        });
        port.min(allowed)
    }

    /// Connects to all peers. `cards` has their cards for this rank, by rank. Nothing is sent yet.
    ///
    /// # Errors
    /// If a card cannot be decoded or offers nothing to this rank, or a device refuses a path.
    pub fn connect(mut self, cards: &[Vec<u8>]) -> Result<VerbsLink, VerbsError> {
        let mut peers = Vec::new();
        let mut mtu = *MTU_CODES.end();
        for (index, (peer, pairs)) in std::mem::take(&mut self.peers).into_iter().enumerate() {
            let wrong = |why: String| VerbsError::Card(peer, why);
            let card = Card::decode(&cards[peer]).map_err(wrong)?;
            let rails = self.rails.len().min(card.rails.len());
            let turns = self.config.pairs_per_peer.min(card.pairs.len() / card.rails.len());
            let mut connections = Vec::new();
            for (place, pair) in pairs.into_iter().enumerate() {
                let (turn, rail) = (place / self.rails.len(), place % self.rails.len());
                if turn >= turns || rail >= rails {
                    continue;
                }
                let path = self
                    .path(&card, rail, card.pairs[turn * card.rails.len() + rail])
                    .map_err(wrong)?;
                mtu = mtu.min(path.mtu);
                pair.connect(&path).map_err(|error| {
                    let address = Ipv6Addr::from(path.gid).to_canonical();
                    VerbsError::Path(peer, format!("at {address}: {error}"))
                })?;
                self.rails[rail].pairs.push((pair.number(), index, connections.len()));
                let receives = self.layout.announcements() + REFILL;
                let keeps = self.ways.is_some();
                connections.push(Connection::new(rail, pair, path, receives, keeps));
            }
            peers.push(Peer::new(peer, connections, self.area(index, &card)));
        }
        self.rails.iter_mut().for_each(|rail| rail.pairs.sort_unstable());
        let description = self.describe(mtu);
        let state = LinkState::new(self.rank, self.registry);
        let link = VerbsLink::new(self.world, peers, state, self.rails, self.areas, description);
        let link = link.map(|link| match self.ways {
            Some((ways, session)) => link.with_ways(ways, session),
            None => link,
        });
        link.map_err(|error| VerbsError::Os("making an event queue".into(), error))
    }

    fn path(&self, card: &Card, rail: usize, number: u32) -> Result<Path, String> {
        let (own, theirs) = (&self.registry.domains()[rail], card.rails[rail]);
        if own.port.is_ethernet != theirs.is_ethernet {
            return Err(format!(
                "of a device that {} can't reach: one is Ethernet",
                own.port.device
            ));
        }
        Ok(Path {
            number,
            gid: theirs.gid,
            lid: theirs.lid,
            mtu: theirs.mtu.min(self.mtu(own)),
            own_psn: self.psn,
            peer_psn: card.psn,
            timeout: self.config.timeout,
            retries: self.config.retries,
            traffic_class: self.config.traffic_class,
            service_level: self.config.service_level,
        })
    }

    /// The area of the peer with this index: inbound areas come first, outbound ones behind them.
    fn area(&self, index: usize, card: &Card) -> Area {
        let peers = self.areas.bytes() / self.layout.bytes() / 2;
        Area {
            layout: self.layout,
            inbound: self.inbound(index).cast_const(),
            outbound: self.inbound(peers + index),
            outbound_key: self.areas.keys().local[0],
            remote: card.area,
            remote_key: card.area_key,
        }
    }

    /// Where the peer with this index writes.
    fn inbound(&self, index: usize) -> *mut u8 {
        self.areas.start().wrapping_add(index * self.layout.bytes())
    }

    fn describe(&self, mtu: u8) -> String {
        let ports: Vec<String> = self
            .registry
            .domains()
            .iter()
            .map(|domain| format!("{}, GID {}", domain.port, domain.gid))
            .collect();
        let pairs = self.config.pairs_per_peer;
        format!("{}; MTU {}, {pairs} queue pairs a peer", ports.join("; "), mtu_bytes(mtu))
    }
}

fn chosen_ports(config: &VerbsConfig) -> Result<Vec<Port>, VerbsError> {
    let ports = device::ports();
    let mut ports = device::choose(ports, config.devices.as_ref(), config.software)?;
    ports.truncate(RAILS_MAX);
    Ok(ports)
}

/// The packet size of a code, in bytes.
const fn mtu_bytes(code: u8) -> usize {
    128 << code
}

/// Describes what this host offers, one line for each port: whether libibverbs is there, and each
/// port's firmware, address and packet size. Opens the devices.
pub fn describe_devices() -> Vec<String> {
    let describe = |port: Port| {
        let text = port.to_string();
        let found =
            port.gid(None).map_err(VerbsError::Device).and_then(|gid| Domain::open(port, gid));
        match found {
            Ok(domain) => {
                let mtu = mtu_bytes(domain.attributes.active_mtu as u8 & 7);
                format!("{text}, GID {}, MTU {mtu}", domain.gid)
            }
            Err(error) => format!("{text}: {error}"),
        }
    };
    device::ports().into_iter().map(describe).collect()
}
