//! How ranks find out whether their devices reach each other.

use std::fmt;
use std::sync::{Arc, OnceLock};

use unisum_cuda_ipc::{Device, PlaceError, Reach};
use unisum_link::Rank;

use super::card::{Exported, JoinCard, Via};
use super::flags::Flags;
use super::memories::Imports;
use super::multimem::{self, Multimem};
use super::page::{AbortWord, BLOCKS_MAX, Page, has_staging};
use super::post::{Door, Post};
use crate::{Communicator, Error, ErrorKind};

/// How collectives on device memory move data, the same on all ranks of a communicator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceRoute {
    /// Every device reads the memory of the others.
    CudaIpc,
    /// Every device reads the memory of the others of its host. All-reduces, all-gathers and
    /// reduce-scatters go both ways: within each host as `CudaIpc`, and between hosts as `Staged`;
    /// the other collectives are staged.
    Hierarchical {
        /// How many hosts there are.
        hosts: usize,
        /// How many ranks each of them has.
        ranks: usize,
    },
    /// Through pinned memory of the hosts, and their collectives.
    Staged {
        /// Why not otherwise.
        reason: String,
    },
}

impl DeviceRoute {
    /// This one, or if there are hosts with so many ranks, the hierarchical one.
    pub(super) fn with(self, extent: Option<(usize, usize)>) -> Self {
        extent.map_or(self, |(hosts, ranks)| Self::Hierarchical { hosts, ranks })
    }
}

impl fmt::Display for DeviceRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CudaIpc => f.write_str("the devices read each other's memory (CUDA IPC)"),
            Self::Hierarchical { hosts, ranks } => write!(
                f,
                "on {hosts} hosts, the {ranks} devices of each read each other's memory (CUDA IPC) \
                 for all-reduces, all-gathers and reduce-scatters; between hosts, and for the \
                 rest, through the hosts' memory"
            ),
            Self::Staged { reason } => {
                write!(f, "staged through the hosts' memory, since {reason}")
            }
        }
    }
}

/// What a rank has once all have joined.
pub(super) struct Joined {
    pub(super) device: Arc<Device>,
    pub(super) abort: Arc<AbortWord>,
    /// Unless collectives are staged.
    pub(super) direct: Option<Direct>,
    pub(super) route: DeviceRoute,
}

/// What a rank needs to read its peers' memory.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) flags: Flags,
    /// The peers in this process, whose addresses are valid here as they are.
    pub(super) is_here: Vec<bool>,
    pub(super) imports: Imports,
    /// For descriptors of mapped memory.
    pub(super) post: Post,
    /// Most blocks of an all-reduce in one launch, also in the switch; none if there can be no such
    /// launch.
    pub(super) blocks_max: u32,
    /// For all-reduces in the switch; all ranks have it, or none.
    pub(super) multimem: Option<Multimem>,
}

/// What tells this process from all others that there ever were.
fn process() -> u64 {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    *PROCESS.get_or_init(|| {
        let mut bytes = [0; 8];
        // Without the system's randomness: the process's number and the clock.
        if getrandom::fill(&mut bytes).is_err() {
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            bytes = (now.as_nanos() as u64 ^ u64::from(std::process::id()) << 40).to_le_bytes();
        }
        u64::from_le_bytes(bytes)
    })
}

/// Agrees with all ranks of `communicator`, of which this process's is `device`, on a route.
///
/// # Errors
/// On all ranks: if one has no device, or its driver fails.
pub(super) fn join(
    communicator: &Communicator,
    device: Result<Arc<Device>, String>,
) -> Result<Joined, Error> {
    let offer = device.and_then(|device| Offer::new(device, communicator.world()));
    let card = match &offer {
        Ok(Offer { device, exported, door, .. }) => {
            let (ordinal, uuid) = (device.ordinal() as u64, device.uuid());
            let (process, multiprocessors) = (process(), device.multiprocessors());
            let (page, door) = (*exported, door.as_ref().map(|door| door.address));
            let card = JoinCard { process, ordinal, uuid, multiprocessors, page, door };
            [vec![1], card.encode()].concat()
        }
        Err(why) => [vec![0], why.clone().into_bytes()].concat(),
    };
    let cards = all_well(communicator, &communicator.exchange(card)?)?;
    let Offer { device, page, abort, door, .. } =
        offer.map_err(|why| Error::new(ErrorKind::Configuration, why))?;
    let mut imports = Imports::default();
    let opened = open(communicator, &device, &page, &cards, &mut imports);
    let own = opened.as_ref().map_or_else(Clone::clone, |_| String::new());
    let doors: Vec<_> = match opened.is_ok() {
        true => cards.iter().map(|card| card.door).collect(),
        false => vec![None; cards.len()],
    };
    let mut post = Post::connect(communicator.rank(), &doors);
    let reasons = communicator.exchange(own.into_bytes())?;
    let reason = reasons.iter().find(|reason| !reason.is_empty());
    let (direct, route) = match (opened, reason) {
        (Ok(peers), None) => {
            if let Some(door) = door {
                post.let_in(communicator.rank(), door);
            }
            let is_here = cards.iter().map(|card| card.process == process()).collect();
            let flags = Flags::new(communicator.rank(), page, &peers, abort.clone());
            let blocks_max = blocks_max(&cards);
            let multimem = multimem::join(communicator, &device, &cards, &mut post)?;
            let direct = Direct { flags, is_here, imports, post, blocks_max, multimem };
            (Some(direct), DeviceRoute::CudaIpc)
        }
        (Err(reason), None) => (None, DeviceRoute::Staged { reason }),
        (_, Some(reason)) => {
            let reason = String::from_utf8_lossy(reason).into_owned();
            (None, DeviceRoute::Staged { reason })
        }
    };
    Ok(Joined { device, abort, direct, route })
}

/// How many blocks every rank's device runs at once beside those of the ranks that share it.
fn blocks_max(cards: &[JoinCard]) -> u32 {
    if !has_staging(cards.len()) {
        return 0;
    }
    let room = |card: &JoinCard| {
        let sharing = cards.iter().filter(|other| other.uuid == card.uuid).count();
        card.multiprocessors / sharing as u32
    };
    cards.iter().map(room).min().unwrap_or(0).min(BLOCKS_MAX as u32)
}

/// What a rank brings.
struct Offer {
    device: Arc<Device>,
    abort: Arc<AbortWord>,
    page: Page,
    /// The page, for others; `None` if the driver has no handles.
    exported: Option<Exported>,
    door: Option<Door>,
}

impl Offer {
    fn new(device: Arc<Device>, world: usize) -> Result<Self, String> {
        let make = || -> Result<_, PlaceError> {
            // Loaded before anything waits on the device: loading may wait for that.
            device.kernels()?;
            let page = Page::new(&device, world)?;
            let base = page.address();
            let id = device.origin(base, 1)?.id;
            let handle = device.export(base)?;
            let exported = handle.map(|handle| Exported { id, base, via: Via::Ipc(handle) });
            Ok((AbortWord::new(&device)?, page, exported))
        };
        let (abort, page, exported) = make().map_err(|error| error.to_string())?;
        let door = Door::open().filter(|_| world > 1);
        Ok(Self { device, abort: abort.into(), page, exported, door })
    }
}

/// The cards, if no rank has a reason to fail.
fn all_well(communicator: &Communicator, blobs: &[Vec<u8>]) -> Result<Vec<JoinCard>, Error> {
    let on = communicator.rank();
    let read = |(rank, blob): (Rank, &Vec<u8>)| {
        let (text, kind) = match blob.split_first() {
            Some((1, card)) => match JoinCard::decode(card) {
                Some(card) => return Ok(card),
                None => ("told what this version does not know".into(), ErrorKind::Rendezvous),
            },
            Some((0, why)) => {
                let why = String::from_utf8_lossy(why);
                (format!("can't use its device: {why}"), ErrorKind::Configuration)
            }
            _ => ("told nothing".into(), ErrorKind::Rendezvous),
        };
        Err(Error::new(kind, format!("rank {rank} {text}")).on(on).caused_by(vec![rank]))
    };
    blobs.iter().enumerate().map(read).collect()
}

/// Opens the pages of all peers; says why not, if one can't be.
fn open(
    communicator: &Communicator,
    device: &Arc<Device>,
    page: &Page,
    cards: &[JoinCard],
    imports: &mut Imports,
) -> Result<Vec<u64>, String> {
    let own = communicator.rank();
    let mut pages = Vec::new();
    for (rank, card) in cards.iter().enumerate() {
        if rank == own {
            pages.push(page.address());
            continue;
        }
        if !communicator.shares_host(rank) {
            return Err(format!("ranks {own} and {rank} are on different hosts"));
        }
        let pair = || format!("rank {own} on device {} and rank {rank}", device.ordinal());
        match device.reaches(card.uuid) {
            Ok(Reach::Same | Reach::Peer) => {}
            Ok(Reach::NoAccess) => {
                let theirs = card.ordinal;
                return Err(format!("{} on device {theirs} have no peer access", pair()));
            }
            // The other process may see more devices: opening its memory tells.
            Ok(Reach::Unseen) => {}
            Err(error) => return Err(format!("rank {own} can't ask for peer access: {error}")),
        }
        let exported = card.page.ok_or_else(|| {
            format!("the driver of rank {rank} has no handles that other processes can open")
        })?;
        let is_here = card.process == process();
        let base = if is_here {
            let other = usize::try_from(card.ordinal).unwrap_or(usize::MAX);
            let other = Device::open(other).map_err(|error| format!("{}: {error}", pair()))?;
            device.enable_peer(&other).map_err(|error| format!("{}: {error}", pair()))?;
            exported.base
        } else {
            let opened = imports.base(device, rank, &exported, None);
            opened.map_err(|error| format!("{}: {error}", pair()))?
        };
        pages.push(base);
    }
    Ok(pages)
}
