//! Groups: communicators of some of a communicator's ranks.
//!
//! A group has links of its own, so that what its ranks call and in which order concerns nobody
//! else: sockets are opened when first used, mailboxes and counters lie in memory of its own, queue
//! pairs are its own. What is the process's is shared with the job's communicator: the control
//! connection, the listening port, RDMA devices, registered memory. In an elastic job a group of
//! some of the ranks has control connections and a port of its own ([`super::group_control`]).

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use unisum_link::Rank;
use unisum_link::handshake::random;

use super::group_control::GroupControl;
use super::node::{JoinContext, Node, NodeEndpoint};
use super::unanimous::{self, Unanimous};
use super::{Assembly, Exchange, Job, others};
use crate::autotuning::saved::Which;
use crate::autotuning::selector::AlgorithmSelector;
use crate::execution::membership::Membership;
use crate::{Error, ErrorKind};
use unisum_control::Share;
use unisum_engine::Engine;

/// A group as its ranks agreed on it.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Unique among the groups of each of its ranks.
    pub(crate) communicator: u32,
    /// Its ranks as the parent numbers them, in the order of their numbers in the group.
    pub(crate) ranks: Vec<Rank>,
}

/// A rank's part in a group of two or more.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) membership: Membership,
    /// The job, by the numbers of the membership.
    pub(crate) job: Arc<Job>,
    pub(crate) engine: Engine,
    pub(crate) choice: AlgorithmSelector,
    pub(crate) transport: String,
}

/// What came of making a group.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// This rank is a member of it, or of none.
    Made(Option<Box<Member>>),
    /// Connections were cut meanwhile: all ranks of the parent try it again, with another number.
    Cut,
}

/// Who makes groups: a communicator whose ranks all take part, those in no group as well.
pub(crate) struct Parent<'a> {
    pub(crate) job: &'a Arc<Job>,
    pub(crate) membership: &'a Membership,
    pub(crate) choice: &'a AlgorithmSelector,
    pub(crate) rank: Rank,
    pub(crate) exchange: &'a Exchange<'a>,
    /// When this rank began to make the group, perhaps not for the first time.
    pub(crate) since: Instant,
}

impl Parent<'_> {
    /// Makes this rank a member of `group`, or, without one, only takes part in the exchanges. Of
    /// none in a group of one, too.
    ///
    /// # Errors
    /// If a rank is lost meanwhile; on all ranks if one can't be a member.
    pub(crate) fn join(&self, group: Option<&Group>) -> Result<Outcome, Error> {
        let group = group.filter(|group| group.ranks.len() > 1);
        let endpoint = group.map(|group| self.endpoint(group));
        let mut control = group.and_then(|group| GroupControl::begin(self, group));
        let drawn: [u8; 16] = random().map_err(|error| {
            Error::new(ErrorKind::Rendezvous, format!("drawing a session: {error}"))
        })?;
        let told = Told {
            session: drawn,
            ordinal: group.map_or(0, |group| self.ordinal(group)),
            addresses: control.as_ref().map_or_else(Vec::new, GroupControl::told),
            info: endpoint.as_ref().map_or_else(Vec::new, NodeEndpoint::info),
        };
        let blobs = (self.exchange)(told.encode().into())?;
        let rounds = Rounds::new(self);
        let member = match (group, endpoint) {
            (Some(group), Some(endpoint)) => {
                let told = group.ranks.iter().map(|&rank| Told::decode(&blobs[rank])).collect();
                self.connect(group, endpoint, (told, &mut control), &rounds).map(Some)
            }
            _ => Ok(None),
        };
        rounds.finish()?;
        // Those that the whole parent hears are the cause: itself, unless the rank knows better.
        let own = |error: Error| match error.failed_ranks().is_empty() {
            true => error.caused_by(vec![self.membership.job_rank()]),
            false => error,
        };
        let member = match member {
            Err(error) if rounds.failed.get() => return Err(error),
            member => member.map_err(own),
        };
        let mut why = member.as_ref().err().map_or_else(Vec::new, encode_reason);
        if rounds.follows.get() {
            why[0] = FOLLOWS;
        } else if rounds.was_cut.get() {
            why[0] = CUT;
        }
        // Nobody opens a connection before all are ready to take it.
        let reasons = (self.exchange)(why.into())?;
        let first = first_reason(&reasons);
        if first.is_some_and(|(_, reason)| reason[0] == CUT) {
            return Ok(Outcome::Cut);
        }
        let member = match member {
            // Another rank knows why.
            Err(_) if rounds.follows.get() => None,
            member => member?,
        };
        match first {
            None => {
                control.into_iter().for_each(GroupControl::keep);
                Ok(Outcome::Made(member.map(Box::new)))
            }
            Some((rank, reason)) => Err(self.decode_reason(rank, reason)),
        }
    }

    /// Why rank `rank` can't be in its group, for those that are in others.
    fn decode_reason(&self, rank: Rank, reason: &[u8]) -> Error {
        let rank = self.membership.job_ranks(&[rank])[0];
        let text = String::from_utf8_lossy(reason);
        let (kind, text) = KINDS
            .iter()
            .find_map(|&(kind, sign)| Some((kind, text.strip_prefix(sign)?)))
            .unwrap_or((ErrorKind::Rendezvous, &text));
        let (failed_ranks, text) = text.split_once(':').unwrap_or(("", text));
        let failed_ranks: Result<Vec<Rank>, _> = failed_ranks.split(',').map(str::parse).collect();
        let text = format!("rank {rank} can't be in a group: {text}");
        Error::new(kind, text).caused_by(failed_ranks.unwrap_or_else(|_| vec![rank]))
    }

    /// This rank's end of the link within its host.
    fn endpoint(&self, group: &Group) -> NodeEndpoint {
        let ranks = self.known_as(group);
        let place = (self.place_in(group), &ranks[..]);
        NodeEndpoint::new(self.job.within_hosts.clone(), &self.job.settings, place)
    }

    /// This rank's number in a group that it is in.
    pub(super) fn place_in(&self, group: &Group) -> Rank {
        let rank = group.ranks.iter().position(|&rank| rank == self.rank);
        rank.expect("a rank joins only groups that it is in")
    }

    /// The numbers by which the job's links know the ranks of a group.
    fn known_as(&self, group: &Group) -> Vec<Rank> {
        self.job.known_as(&self.membership.job_ranks(&group.ranks))
    }

    /// How many groups of the same ranks were before, if this is the first of them: it tells all.
    fn ordinal(&self, group: &Group) -> u32 {
        let is_first = group.ranks.first() == Some(&self.rank);
        let ranks = || self.known_as(group).into();
        if is_first { self.choice.next_ordinal(&ranks()) } else { 0 }
    }

    fn connect(
        &self,
        group: &Group,
        endpoint: NodeEndpoint,
        (told, control): (Vec<Told>, &mut Option<GroupControl>),
        rounds: &Rounds<'_>,
    ) -> Result<Member, Error> {
        let (session, ordinal) = (told[0].session, told[0].ordinal);
        let is_apart = control.is_some();
        let (membership, job) = self.enroll(group, (&told[0], control), rounds)?;
        let rank = self.place_in(group);
        let (parents, known_as) = (self.membership.job_ranks(&group.ranks), self.known_as(group));
        let exchange = |share| rounds.take_part(share, &group.ranks);
        let circle = JoinContext {
            rank,
            hosts: &self.job.hosts(&parents),
            infos: told.into_iter().map(|it| it.info).collect(),
            session,
            exchange: &exchange,
            membership: &membership,
            is_group: true,
        };
        let joined = endpoint.join(&circle, &job.settings);
        let Node { members, connected, topology } =
            joined.map_err(|error| rounds.in_parent(error, &parents))?;
        let others = others(&members, parents.len());
        let mut links = Assembly::new(parents.len());
        if let Some(connected) = connected {
            links.add(job.within_hosts.name(), connected, &members, &membership);
        }
        if let Some(transport) = job.unanimous.as_ref().filter(|_| !others.is_empty()) {
            let ways = job.ways(membership.ranks());
            let unanimous = Unanimous {
                rank,
                known_as: &known_as,
                others: &others,
                topology: &topology,
                session,
                settings: &job.settings,
                membership: &membership,
                exchange: &exchange,
                is_group: true,
                instead: job.to_any.name(),
                ways: ways.as_ref(),
            };
            let connected = unanimous.connect(&**transport).map_err(|error| match is_apart {
                true => rounds.in_parent(error, &parents),
                false => error,
            })?;
            if let Some(connected) = connected {
                links.add(transport.name(), connected, &others, &membership);
            }
        }
        links.reach_the_others(&job, &others, &membership, (rank, session))?;
        let transport = links.names.join("+");
        let sharing = membership.job_ranks(&members);
        let engine = links.engine(rank, job.ranks_and_cores(&sharing));
        engine.links().iter().for_each(|link| membership.add_waker(link.waker()));
        let shares_memory = members.len() == parents.len();
        let which = Which { ranks: known_as.into(), ordinal };
        let choice = self.choice.for_group(topology, shares_memory, which);
        // The job's rank 0, which saves it, is not in that control.
        let choice = if is_apart { choice.not_keeping() } else { choice };
        Ok(Member { membership, job, engine, choice, transport })
    }

    /// Makes this rank a member of a group, whose rank 0 told this, in a control of the group's own
    /// if it has one, or in the parent's.
    fn enroll(
        &self,
        group: &Group,
        (first, own): (&Told, &mut Option<GroupControl>),
        rounds: &Rounds<'_>,
    ) -> Result<(Membership, Arc<Job>), Error> {
        let (rank, ranks) = (self.place_in(group), self.membership.job_ranks(&group.ranks));
        let (number, session) = (group.communicator, first.session);
        let Some(own) = own else {
            if rounds.is_elastic {
                rounds.take_part(Share::Same(Vec::new()), &group.ranks)?;
            }
            let (control, bond) = (self.membership.control(), self.membership.bond().cloned());
            let membership =
                Membership::of_group(control.clone(), number, session, ranks.into(), rank, bond);
            return Ok((membership, self.job.clone()));
        };
        own.reach(self, &first.addresses);
        let told = rounds.take_part(Share::Same(own.told()), &group.ranks)?;
        let made = own.finish(self, &ranks, &told);
        if let Err(error) = &made {
            rounds.follows.set(own.has_met());
            rounds.was_cut.set(!own.has_met() && own.was_cut(error, self.since));
        }
        let (control, job) = made.map_err(|error| rounds.in_parent(error, &ranks))?;
        let (all, bond) = ((0..ranks.len()).collect(), Some(own.bond()));
        let membership = Membership::of_group(control, number, session, all, rank, bond);
        Ok((membership, Arc::new(job)))
    }
}

/// What a rank tells all ranks of the parent before a group is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// That of the group, if it is the group's rank 0.
    pub(super) session: [u8; 16],
    pub(super) ordinal: u32,
    /// Where it listens for the group, if it is rank 0 of one that has a control of its own.
    pub(super) addresses: Vec<u8>,
    /// For the ranks of its host.
    pub(super) info: Vec<u8>,
}

impl Told {
    pub(super) fn encode(&self) -> Vec<u8> {
        let length = self.addresses.len() as u32; // of a few addresses
        let head = [&self.ordinal.to_le_bytes()[..], &length.to_le_bytes()].concat();
        [&self.session[..], &head, &self.addresses, &self.info].concat()
    }

    /// As much of it as is there.
    pub(super) fn decode(blob: &[u8]) -> Self {
        let (session, rest) = blob.split_first_chunk().unwrap_or((&[0; 16], &[]));
        let (ordinal, rest) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let (length, rest) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let length = (u32::from_le_bytes(*length) as usize).min(rest.len());
        let (addresses, info) = rest.split_at(length);
        Self {
            session: *session,
            ordinal: u32::from_le_bytes(*ordinal),
            addresses: addresses.to_vec(),
            info: info.to_vec(),
        }
    }
}

/// What a reason begins with, by which all ranks know its kind; another is a failure to meet.
const KINDS: [(ErrorKind, char); 4] = [
    (ErrorKind::Resources, LACKS as char),
    (ErrorKind::Configuration, REFUSES as char),
    (ErrorKind::Rendezvous, ' '),
    (ErrorKind::Rendezvous, FOLLOWS as char),
];
/// Of a rank that has run out of something.
const LACKS: u8 = b'!';
/// Of one that can't be a member as it is set up.
const REFUSES: u8 = b'=';
/// Of a failure that follows from another rank's.
const FOLLOWS: u8 = b'~';
/// Of one that is worth another attempt, as connections may have been cut.
const CUT: u8 = b'^';

/// Why a rank can't be in its group: the kind, the ranks that caused it, and a text.
fn encode_reason(error: &Error) -> Vec<u8> {
    let sign = KINDS.iter().find(|(kind, _)| *kind == error.kind()).map_or(' ', |&(_, sign)| sign);
    let failed_ranks: Vec<String> = error.failed_ranks().iter().map(Rank::to_string).collect();
    format!("{sign}{}:{error}", failed_ranks.join(",")).into_bytes()
}

/// The reason that all ranks report: that of a rank which has run out of something, if there is
/// one or can't be in a group as it is set up, since others may have given up because of it; or
/// else that of one which was cut off.
fn first_reason(reasons: &[Vec<u8>]) -> Option<(Rank, &[u8])> {
    let some = || reasons.iter().enumerate().filter(|(_, reason)| !reason.is_empty());
    let begins = |sign| some().find(|(_, reason)| reason[0] == sign);
    let leads = |(_, reason): &(Rank, &Vec<u8>)| reason[0] != FOLLOWS;
    let found = begins(LACKS).or_else(|| begins(REFUSES)).or_else(|| begins(CUT));
    let found = found.or_else(|| some().find(leads)).or_else(|| some().next());
    found.map(|(rank, reason)| (rank, &reason[..]))
}

/// The exchanges in which links are made. All ranks of the parent take part in all of them: also
/// those that are in no group, need none, or have given up.
struct Rounds<'a> {
    exchange: &'a Exchange<'a>,
    world: usize,
    /// Whether ranks of groups say first where they listen for these.
    is_elastic: bool,
    /// By whether ranks have something for each.
    kinds: Vec<bool>,
    /// How many have been.
    done: Cell<usize>,
    /// Whether one failed: then all ranks hear of it.
    failed: Cell<bool>,
    /// Whether this rank can't be in its group because another one can't.
    follows: Cell<bool>,
    /// Whether it may have been cut off while its ranks met.
    was_cut: Cell<bool>,
}

impl<'a> Rounds<'a> {
    fn new(parent: &Parent<'a>) -> Self {
        let unanimous: &[bool] =
            if parent.job.unanimous.is_some() { &unanimous::EXCHANGES } else { &[] };
        let is_elastic = parent.membership.bond().is_some();
        let control: &[bool] = if is_elastic { &[false] } else { &[] };
        Self {
            exchange: parent.exchange,
            world: parent.membership.ranks().len(),
            is_elastic,
            // The second is about nodes.
            kinds: [control, &[false], unanimous].concat(),
            done: Cell::new(0),
            failed: Cell::new(false),
            follows: Cell::new(false),
            was_cut: Cell::new(false),
        }
    }

    /// The next exchange, as the ranks of a group see it.
    fn take_part(&self, share: Share, ranks: &[Rank]) -> Result<Vec<Vec<u8>>, Error> {
        let share = match share {
            Share::Same(blob) => Share::Same(blob),
            Share::Each(blobs) => {
                let mut for_all = vec![Vec::new(); self.world];
                ranks.iter().zip(blobs).for_each(|(&rank, blob)| for_all[rank] = blob);
                Share::Each(for_all)
            }
        };
        let mut blobs = self.next(share)?;
        Ok(ranks.iter().map(|&rank| std::mem::take(&mut blobs[rank])).collect())
    }

    fn next(&self, share: Share) -> Result<Vec<Vec<u8>>, Error> {
        let has_each = self.kinds[self.done.get()];
        assert_eq!(matches!(share, Share::Each(_)), has_each, "all ranks do the same");
        self.done.set(self.done.get() + 1);
        (self.exchange)(share).inspect_err(|_| self.failed.set(true))
    }

    /// An error of a group, naming ranks by the numbers that its ranks have in the parent's
    /// control; if an exchange has failed, it names them so already.
    fn in_parent(&self, error: Error, ranks: &[Rank]) -> Error {
        if self.failed.get() {
            return error;
        }
        let named = error.failed_ranks().iter().filter_map(|&rank| ranks.get(rank).copied());
        let named = named.collect();
        error.caused_by(named)
    }

    /// Goes through what is left of them.
    ///
    /// # Errors
    /// If one fails.
    fn finish(&self) -> Result<(), Error> {
        while !self.failed.get()
            && let Some(&has_each) = self.kinds.get(self.done.get())
        {
            let nothing = vec![Vec::new(); self.world];
            self.next(if has_each { Share::Each(nothing) } else { Share::Same(Vec::new()) })?;
        }
        Ok(())
    }
}
