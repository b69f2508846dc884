//! Groups: communicators of some of a communicator's ranks, for hybrid parallelism.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use unisum_link::{LinkError, Rank};

use super::elastic::Pauses;
use crate::collective::agreement::Purpose;
use crate::collective::{Buffers, Collective};
use crate::execution::background::Background;
use crate::execution::member::{Core, Member};
use crate::execution::runner::Runner;
use crate::wiring::{self, Description, Group, Outcome, Parent};
use crate::{Communicator, Error, ErrorKind};
use unisum_control::Share;
use unisum_engine::Tuning;

/// How a rank creates groups, with the arguments that all ranks must pass alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Making {
    Split,
    Duplicate,
    Subset(Vec<Rank>),
    Mesh { rows: usize, columns: usize },
    Messenger,
    Buckets,
    Device,
}

/// What a rank sends the others when a communicator is split.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SplitRequest {
    making: Making,
    color: Option<u32>,
    key: i64,
    next_communicator: u32,
}

impl Communicator {
    /// Divides the ranks into groups: ranks that pass the same `color` form a group, ordered by
    /// `key` and, where keys are equal, by their rank here. Returns `None` on a rank without a
    /// color.
    ///
    /// Collective: every rank calls it, and makes no other call on this communicator meanwhile.
    /// Blocks. A group has its own order of calls: collectives of different groups and of this
    /// communicator run concurrently if different threads call them, in any order. Registered
    /// memory, the control connection and the listening port are shared; sockets to the group's
    /// other ranks are opened on first use. A group of one costs nothing. If the job uses RDMA, so
    /// does the group, over the same devices: it has its own queue pairs and half a MiB of locked
    /// memory for each of its ranks on another host. If a rank cannot have these, the group uses
    /// TCP between hosts, and its rank 0 logs why. Errors name ranks by their numbers in the job.
    ///
    /// In an elastic job ([`Builder::elastic`](crate::Builder::elastic)), a group of some of the
    /// ranks goes on while none of its own is lost, also after [`Communicator::rebuild`] or if
    /// this communicator is dropped. If one is lost, its calls end with
    /// [`ErrorKind::ViewChanged`]. Other failures, and [`Communicator::abort`], concern the group
    /// alone. Errors name ranks by their numbers in the group there. Such a group has a thread, a
    /// port and control connections of its own, and dropping it may take 0.2 s on its rank 0. A
    /// group of all ranks ends with this communicator.
    ///
    /// Cost: the time of about ten small messages, twenty with RDMA, and a few milliseconds if the
    /// group shares memory or connects queue pairs.
    ///
    /// # Errors
    /// As [`Communicator::run`]. [`ErrorKind::Mismatch`] if ranks create groups in different ways,
    /// for example by this and by [`Communicator::subset`]. If a rank runs out of memory or
    /// descriptors, or the ranks of a group do not share the memory that was requested, the call
    /// fails with [`ErrorKind::Rendezvous`] or [`ErrorKind::Configuration`]. All of these occur on
    /// all ranks, and this communicator stays as it was.
    pub fn split(&self, color: Option<u32>, key: i64) -> Result<Option<Self>, Error> {
        self.make(&Making::Split, color, key)
    }

    /// The group of this rank, if it passes a color.
    pub(crate) fn make(
        &self,
        making: &Making,
        color: Option<u32>,
        key: i64,
    ) -> Result<Option<Self>, Error> {
        if self.member.is_none() {
            self.check_making(making)?;
            return Ok(color.map(|_| Self::of_one(self.origin().into())));
        }
        let (joined, group) = self.regroup(making, color, key)?;
        let Some(group) = group else { return Ok(None) };
        let world = group.ranks.len();
        let rank = group.ranks.iter().position(|&rank| rank == self.rank());
        let name = format!("group {} of {world} ranks", group.communicator);
        Ok(Some(match (joined, rank) {
            (Some(joined), Some(rank)) => {
                // Buckets keep what they reduce themselves.
                let restores = *making != Making::Buckets;
                self.group(joined, (rank, world), (name, restores))
            }
            _ => Self::of_one(name),
        }))
    }

    /// Agrees on groups and makes this rank a member of its own: what [`Communicator::split`]
    /// does, up to the links. Nothing in a world of one.
    pub(crate) fn regroup(
        &self,
        making: &Making,
        color: Option<u32>,
        key: i64,
    ) -> Result<(Option<wiring::Member>, Option<Group>), Error> {
        let Some(member) = &self.member else { return Ok((None, None)) };
        let (since, mut pauses) = (Instant::now(), Pauses::new());
        loop {
            let (joined, group) = self.regroup_once(&member.core, (making, color, key), since)?;
            if let Outcome::Made(joined) = joined {
                return Ok((joined.map(|joined| *joined), group));
            }
            // All ranks make it.
            thread::sleep(pauses.next());
        }
    }

    /// The same, which began at `since`, once.
    fn regroup_once(
        &self,
        core: &Core,
        (making, color, key): (&Making, Option<u32>, i64),
        since: Instant,
    ) -> Result<(Outcome, Option<Group>), Error> {
        let numbers = &core.job.next_communicator;
        // Relaxed: splits of one communicator come one after another, and of several at once the
        // later of two that draw a number finds out below.
        let next_communicator = numbers.load(Ordering::Relaxed);
        let request = SplitRequest { making: making.clone(), color, key, next_communicator };
        let blobs = self.exchange(request.encode())?;
        let requests: Option<Vec<SplitRequest>> =
            blobs.iter().map(|blob| SplitRequest::decode(blob)).collect();
        let refuse = |text: &str| Error::new(ErrorKind::Rendezvous, text).on(self.rank());
        let requests =
            requests.ok_or_else(|| refuse("a rank told no wish that this version knows"))?;
        self.compare(core.runner.membership.ranks(), &requests)?;
        self.check_making(making)?;
        let (group, next) = divide(&requests, self.rank())
            .ok_or_else(|| refuse("there have been 2^32 groups, and there can be no more"))?;
        // Relaxed: as above.
        numbers.fetch_max(next, Ordering::Relaxed);
        let exchange = |share: Share| self.exchange(share);
        let parent = Parent {
            job: &core.job,
            membership: &core.runner.membership,
            choice: &core.runner.choice,
            rank: self.rank(),
            exchange: &exchange,
            since,
        };
        let joined = parent.join(group.as_ref()).map_err(|error| error.on(self.rank()))?;
        Ok((joined, group))
    }

    /// The group of these ranks, in this order: rank `ranks[i]` becomes rank i of the group.
    /// Returns `None` on ranks that are not in it.
    ///
    /// Collective: every rank calls it with the same list; see [`Communicator::split`]. To create
    /// several groups at once, one for each rank, use `split`.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if ranks pass different lists, [`ErrorKind::Configuration`] if a
    /// rank is named twice or does not exist, both on all ranks; and as [`Communicator::split`].
    #[doc(alias = "new_group")]
    pub fn subset(&self, ranks: &[Rank]) -> Result<Option<Self>, Error> {
        let place = ranks.iter().position(|&rank| rank == self.rank());
        let making = Making::Subset(ranks.to_vec());
        self.make(&making, place.map(|_| 0), place.unwrap_or(0) as i64)
    }

    /// Checks that groups can be created this way: the same result on all ranks that pass the same
    /// arguments.
    fn check_making(&self, making: &Making) -> Result<(), Error> {
        let world = self.world();
        let refuse = |text| Err(Error::new(ErrorKind::Configuration, text).on(self.rank()));
        match making {
            Making::Subset(ranks) => {
                let mut sorted = ranks.clone();
                sorted.sort_unstable();
                let twice = sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
                let beyond = sorted.last().copied().filter(|&rank| rank >= world);
                match twice.or(beyond) {
                    Some(rank) => {
                        refuse(format!("{making} of {world} ranks: rank {rank} can't be in it"))
                    }
                    None => Ok(()),
                }
            }
            Making::Mesh { rows, columns } if rows.checked_mul(*columns) != Some(world) => {
                refuse(format!("{world} ranks make no {rows} rows of {columns}"))
            }
            _ => Ok(()),
        }
    }

    /// Checks that all ranks create groups in the same way: the same result on all. `ranks` are
    /// their numbers in the job.
    fn compare(&self, ranks: &[Rank], requests: &[SplitRequest]) -> Result<(), Error> {
        let making = |rank: Rank| &requests[rank].making;
        let Some(other) = (1..requests.len()).find(|&rank| making(rank) != making(0)) else {
            return Ok(());
        };
        let (first, second) = (ranks[0], ranks[other]);
        let text = format!(
            "ranks make groups in different ways: rank {first} called {}, rank {second} {}",
            making(0),
            making(other)
        );
        let error = Error::new(ErrorKind::Mismatch, text).on(ranks[self.rank()]);
        Err(error.caused_by(vec![first, second]))
    }

    /// A communicator of the same ranks with its own order of calls; see [`Communicator::split`].
    ///
    /// # Errors
    /// As [`Communicator::split`].
    #[doc(alias = "dup")]
    pub fn duplicate(&self) -> Result<Self, Error> {
        self.duplicate_for(&Making::Duplicate)
    }

    /// The same for what is built on it.
    pub(crate) fn duplicate_for(&self, making: &Making) -> Result<Self, Error> {
        let same = self.make(making, Some(0), self.rank() as i64)?;
        Ok(same.unwrap_or_else(|| unreachable!("every rank gave the color")))
    }

    fn of_one(origin: String) -> Self {
        Self::new(0, 1, None, Description::alone(origin))
    }

    fn group(
        &self,
        joined: wiring::Member,
        (rank, world): (Rank, usize),
        (name, restores): (String, bool),
    ) -> Self {
        let wiring::Member { membership, job, engine, choice, transport } = joined;
        let settings = &job.settings;
        let tuning = Tuning { slice_bytes: settings.slice_bytes, window: settings.window };
        let runner = Runner::new(rank, settings.timeout, membership, engine, choice, tuning);
        let restores = restores && runner.membership.bond().is_some();
        let core = Core { runner, job, rank, world, restores }.into();
        let member = Member { core, background: Background::default() };
        Self::new(rank, world, Some(member), Description::of(name, &transport))
    }

    /// Gives every rank's blobs to the ranks that they are for: what each rank has for this one, in
    /// rank order. All ranks have the same for all, or none has.
    pub(crate) fn exchange(&self, share: impl Into<Share>) -> Result<Vec<Vec<u8>>, Error> {
        let mut lengths = vec![0_u64; self.world()];
        let to_counts = |lengths: &[u64]| -> Vec<usize> {
            lengths.iter().map(|&length| length as usize).collect()
        };
        let checked = |lengths: &[u64]| match too_long(lengths) {
            None => Ok(to_counts(lengths)),
            Some(rank) => Err(self.refuse_share(rank, lengths[rank])),
        };
        let tell = |collective: Collective, own: &[u64], all: &mut [u64]| {
            // No call of the program passes for it.
            self.run(&collective.with_purpose(Purpose::Exchange), Buffers::OutOfPlace(own, all))
        };
        let (own, collective, counts) = match share.into() {
            Share::Same(blob) => {
                tell(Collective::all_gather(), &[blob.len() as u64], &mut lengths)?;
                let counts = checked(&lengths)?;
                (blob, Collective::all_gather().with_counts(&counts), counts)
            }
            Share::Each(blobs) => {
                let sends: Vec<u64> = blobs.iter().map(|blob| blob.len() as u64).collect();
                tell(Collective::all_to_all(), &sends, &mut lengths)?;
                let counts = checked(&lengths)?;
                let collective = Collective::all_to_all_v(&to_counts(&sends), &counts);
                (blobs.concat(), collective, counts)
            }
        };
        let mut all = vec![0_u8; counts.iter().sum()];
        let collective = collective.with_purpose(Purpose::Exchange);
        self.run(&collective, Buffers::OutOfPlace(&own, &mut all))?;
        if let Some(member) = &self.member {
            member.core.runner.membership.status().discount(2);
        }
        let mut rest = &all[..];
        let next = |&count: &usize| {
            let (blob, after) = rest.split_at(count);
            rest = after;
            blob.to_vec()
        };
        Ok(counts.iter().map(next).collect())
    }

    /// The error on all ranks for a rank that says it has more to tell than it can have.
    fn refuse_share(&self, rank: Rank, bytes: u64) -> Error {
        let text = format!("it has {bytes} bytes to tell, of {BLOB_BYTES_MAX} at most");
        let error = LinkError::protocol(rank, text);
        match &self.member {
            Some(member) => member.core.runner.membership.judge(error),
            None => Error::new(ErrorKind::RankLost, error.to_string()).caused_by(vec![rank]),
        }
    }
}

/// Most bytes that a rank tells another in an exchange.
const BLOB_BYTES_MAX: u64 = 1 << 30;

/// The first rank that says it has more to tell than it can have. All that others say is then a sum
/// that overflows nothing.
fn too_long(lengths: &[u64]) -> Option<Rank> {
    lengths.iter().position(|&length| length > BLOB_BYTES_MAX)
}

/// The group that a rank is in, and the lowest communicator number that none of the ranks had yet;
/// `None` if the numbers are used up.
fn divide(requests: &[SplitRequest], rank: Rank) -> Option<(Option<Group>, u32)> {
    let mut colors: BTreeMap<u32, Vec<Rank>> = BTreeMap::new();
    for (rank, request) in requests.iter().enumerate() {
        if let Some(color) = request.color {
            colors.entry(color).or_default().push(rank);
        }
    }
    let first = requests.iter().map(|request| request.next_communicator).max()?;
    let next = first.checked_add(u32::try_from(colors.len()).ok()?)?;
    let group = (first..).zip(colors).find_map(|(communicator, (_, mut ranks))| {
        ranks.sort_by_key(|&rank| requests[rank].key); // stable: by rank where keys are equal
        ranks.contains(&rank).then_some(Group { communicator, ranks })
    });
    Some((group, next))
}

impl Making {
    /// As words: what it is, and its arguments.
    fn words(&self) -> Vec<u64> {
        match self {
            Self::Split => vec![0],
            Self::Duplicate => vec![1],
            Self::Subset(ranks) => {
                [2].into_iter().chain(ranks.iter().map(|&it| it as u64)).collect()
            }
            Self::Mesh { rows, columns } => vec![3, *rows as u64, *columns as u64],
            Self::Messenger => vec![4],
            Self::Buckets => vec![5],
            Self::Device => vec![6],
        }
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        Some(match *words {
            [0] => Self::Split,
            [1] => Self::Duplicate,
            [2, ref ranks @ ..] => Self::Subset(ranks.iter().map(|&it| it as usize).collect()),
            [3, rows, columns] => Self::Mesh { rows: rows as usize, columns: columns as usize },
            [4] => Self::Messenger,
            [5] => Self::Buckets,
            [6] => Self::Device,
            _ => return None,
        })
    }
}

impl fmt::Display for Making {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Split => f.write_str("split"),
            Self::Duplicate => f.write_str("duplicate"),
            Self::Subset(ranks) => write!(f, "subset {ranks:?}"),
            Self::Mesh { rows, columns } => write!(f, "Mesh of {rows} rows of {columns}"),
            Self::Messenger => f.write_str("Messenger"),
            Self::Buckets => f.write_str("Buckets"),
            Self::Device => f.write_str("DeviceCommunicator"),
        }
    }
}

impl SplitRequest {
    fn encode(&self) -> Vec<u8> {
        let color = self.color.map_or(u64::MAX, u64::from);
        let first = [color, self.key as u64, u64::from(self.next_communicator)];
        first.into_iter().chain(self.making.words()).flat_map(u64::to_le_bytes).collect()
    }

    fn decode(blob: &[u8]) -> Option<Self> {
        let (words, rest) = blob.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|&word| u64::from_le_bytes(word)).collect();
        let [color, key, next_communicator, ref making @ ..] = words[..] else { return None };
        Some(Self {
            making: Making::from_words(making).filter(|_| rest.is_empty())?,
            color: if color == u64::MAX { None } else { Some(u32::try_from(color).ok()?) },
            key: key as i64,
            next_communicator: u32::try_from(next_communicator).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_color_are_numbered_by_key_and_then_by_rank() {
        let request =
            |color, key| SplitRequest { making: Making::Split, color, key, next_communicator: 3 };
        let requests =
            [request(Some(7), 1), request(None, 0), request(Some(2), 0), request(Some(7), -4)];
        let of = |rank| divide(&requests, rank).unwrap();
        let (group, next) = of(0);
        let group = group.unwrap();
        assert_eq!((group.communicator, group.ranks, next), (4, vec![3, 0], 5));
        assert!(of(1).0.is_none());
        assert_eq!(of(2).0.unwrap().communicator, 3);
        assert!(
            divide(&[SplitRequest { next_communicator: u32::MAX, ..request(Some(1), 0) }], 0)
                .is_none()
        );
    }

    #[test]
    fn a_rank_that_tells_too_great_a_length_is_found() {
        assert_eq!(too_long(&[0, BLOB_BYTES_MAX, 7]), None);
        assert_eq!(too_long(&[0, BLOB_BYTES_MAX + 1, u64::MAX]), Some(1));
        assert_eq!(too_long(&[u64::MAX, 1 << 63]), Some(0));
    }

    #[test]
    fn wishes_survive_the_wire() {
        let makings = [
            Making::Split,
            Making::Duplicate,
            Making::Subset(vec![]),
            Making::Subset(vec![3, usize::MAX]),
            Making::Mesh { rows: 0, columns: usize::MAX },
            Making::Messenger,
            Making::Buckets,
            Making::Device,
        ];
        for (making, color) in
            makings.iter().flat_map(|it| [None, Some(0), Some(u32::MAX)].map(|color| (it, color)))
        {
            let request = SplitRequest {
                making: making.clone(),
                color,
                key: -5,
                next_communicator: u32::MAX,
            };
            let encoded = request.encode();
            assert_eq!(SplitRequest::decode(&encoded), Some(request));
            assert_eq!(SplitRequest::decode(&encoded[1..]), None);
            assert_eq!(SplitRequest::decode(&encoded[..24]), None);
        }
    }
}
