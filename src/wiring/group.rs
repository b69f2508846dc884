//! Groups: communicators of some of a communicator's ranks.
//!
//! A group has links of its own, so that what its ranks call and in which order concerns nobody
//! else: sockets are opened when first used, mailboxes and counters lie in memory of its own, queue
//! pairs are its own. What is the process's is shared with the job's communicator: the control
//! connection, the listening port, RDMA devices, registered memory.

use std::cell::Cell;
use std::sync::Arc;

use unisum_link::Rank;
use unisum_link::handshake::random;

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
    pub(crate) engine: Engine,
    pub(crate) choice: AlgorithmSelector,
    pub(crate) transport: String,
}

/// Who makes groups: a communicator whose ranks all take part, those in no group as well.
pub(crate) struct Parent<'a> {
    pub(crate) job: &'a Job,
    pub(crate) membership: &'a Membership,
    pub(crate) choice: &'a AlgorithmSelector,
    pub(crate) rank: Rank,
    pub(crate) exchange: &'a Exchange<'a>,
}

impl Parent<'_> {
    /// Makes this rank a member of `group`, or, without one, only takes part in the exchanges.
    /// `None` in a group of one, too.
    ///
    /// # Errors
    /// If a rank is lost meanwhile; on all ranks if one can't be a member.
    pub(crate) fn join(&self, group: Option<&Group>) -> Result<Option<Member>, Error> {
        let group = group.filter(|group| group.ranks.len() > 1);
        let endpoint = group.map(|group| self.endpoint(group));
        let drawn: [u8; 16] = random().map_err(|error| {
            Error::new(ErrorKind::Rendezvous, format!("drawing a session: {error}"))
        })?;
        let info = endpoint.as_ref().map_or_else(Vec::new, NodeEndpoint::info);
        let ordinal = group.map_or(0, |group| self.ordinal(group));
        let blobs = (self.exchange)([&drawn[..], &ordinal.to_le_bytes(), &info].concat().into())?;
        let rounds = Rounds::new(self);
        let member = match (group, endpoint) {
            (Some(group), Some(endpoint)) => {
                self.connect(group, endpoint, &blobs, &rounds).map(Some)
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
        let why = member.as_ref().err().map_or_else(Vec::new, encode_reason);
        // Nobody opens a connection before all are ready to take it.
        let reasons = (self.exchange)(why.into())?;
        let member = member?;
        match first_reason(&reasons) {
            None => Ok(member),
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
        let ranks = self.membership.job_ranks(&group.ranks);
        let place = (self.place_in(group), &ranks[..]);
        NodeEndpoint::new(self.job.within_hosts.clone(), &self.job.settings, place)
    }

    /// This rank's number in a group that it is in.
    fn place_in(&self, group: &Group) -> Rank {
        let rank = group.ranks.iter().position(|&rank| rank == self.rank);
        rank.expect("a rank joins only groups that it is in")
    }

    /// How many groups of the same ranks were before, if this is the first of them: it tells all.
    fn ordinal(&self, group: &Group) -> u32 {
        let is_first = group.ranks.first() == Some(&self.rank);
        let ranks = || self.membership.job_ranks(&group.ranks).into();
        if is_first { self.choice.next_ordinal(&ranks()) } else { 0 }
    }

    fn connect(
        &self,
        group: &Group,
        endpoint: NodeEndpoint,
        blobs: &[Vec<u8>],
        rounds: &Rounds<'_>,
    ) -> Result<Member, Error> {
        let rank = self.place_in(group);
        let ranks: Arc<[Rank]> = self.membership.job_ranks(&group.ranks).into();
        let told = |&rank: &Rank| {
            let (session, rest) = blobs[rank].split_first_chunk().unwrap_or((&[0; 16], &[]));
            let (ordinal, info) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
            (*session, u32::from_le_bytes(*ordinal), info)
        };
        let all: Vec<([u8; 16], u32, &[u8])> = group.ranks.iter().map(told).collect();
        let (session, ordinal, _) = all[0];
        let control = self.membership.control().clone();
        let epoch = self.membership.epoch().cloned();
        let membership =
            Membership::of_group(control, group.communicator, session, ranks.clone(), rank, epoch);
        let exchange = |share| rounds.take_part(share, &group.ranks);
        let circle = JoinContext {
            rank,
            hosts: &self.job.hosts(&ranks),
            infos: all.iter().map(|(_, _, info)| info.to_vec()).collect(),
            session,
            exchange: &exchange,
            membership: &membership,
            is_group: true,
        };
        let joined = endpoint.join(&circle, &self.job.settings);
        let Node { members, connected, topology } =
            joined.map_err(|error| match rounds.failed.get() {
                false => {
                    let failed_ranks =
                        error.failed_ranks().iter().map(|&rank| ranks[rank]).collect();
                    error.caused_by(failed_ranks)
                }
                true => error,
            })?;
        let others = others(&members, ranks.len());
        let mut links = Assembly::new(ranks.len());
        if let Some(connected) = connected {
            links.add(self.job.within_hosts.name(), connected, &members, &membership);
        }
        if let Some(transport) = self.job.unanimous.as_ref().filter(|_| !others.is_empty()) {
            let unanimous = Unanimous {
                rank,
                others: &others,
                topology: &topology,
                session,
                settings: &self.job.settings,
                membership: &membership,
                exchange: &exchange,
                is_group: true,
                instead: self.job.to_any.name(),
            };
            if let Some(connected) = unanimous.connect(&**transport)? {
                links.add(transport.name(), connected, &others, &membership);
            }
        }
        links.reach_the_others(self.job, &others, &membership, (rank, session))?;
        let transport = links.names.join("+");
        let sharing: Vec<Rank> = members.iter().map(|&member| ranks[member]).collect();
        let engine = links.engine(rank, self.job.ranks_and_cores(&sharing));
        engine.links().iter().for_each(|link| membership.add_waker(link.waker()));
        let shares_memory = members.len() == ranks.len();
        let choice = self.choice.for_group(topology, shares_memory, Which { ranks, ordinal });
        Ok(Member { membership, engine, choice, transport })
    }
}

/// What a reason begins with, by which all ranks know its kind; another is a failure to meet.
const KINDS: [(ErrorKind, char); 3] =
    [(ErrorKind::Resources, '!'), (ErrorKind::Configuration, '='), (ErrorKind::Rendezvous, ' ')];

/// Why a rank can't be in its group: the kind, the ranks that caused it, and a text.
fn encode_reason(error: &Error) -> Vec<u8> {
    let sign = KINDS.iter().find(|(kind, _)| *kind == error.kind()).map_or(' ', |&(_, sign)| sign);
    let failed_ranks: Vec<String> = error.failed_ranks().iter().map(Rank::to_string).collect();
    format!("{sign}{}:{error}", failed_ranks.join(",")).into_bytes()
}

/// The reason that all ranks report: that of a rank which has run out of something, if there is
/// one, since others may have given up because of it.
fn first_reason(reasons: &[Vec<u8>]) -> Option<(Rank, &[u8])> {
    let some = || reasons.iter().enumerate().filter(|(_, reason)| !reason.is_empty());
    let lacks = |(_, reason): &(Rank, &Vec<u8>)| reason.starts_with(b"!");
    some().find(lacks).or_else(|| some().next()).map(|(rank, reason)| (rank, &reason[..]))
}

/// The exchanges in which links are made. All ranks of the parent take part in all of them: also
/// those that are in no group, need none, or have given up.
struct Rounds<'a> {
    exchange: &'a Exchange<'a>,
    world: usize,
    /// By whether ranks have something for each.
    kinds: Vec<bool>,
    /// How many have been.
    done: Cell<usize>,
    /// Whether one failed: then all ranks hear of it.
    failed: Cell<bool>,
}

impl<'a> Rounds<'a> {
    fn new(parent: &Parent<'a>) -> Self {
        let unanimous: &[bool] =
            if parent.job.unanimous.is_some() { &unanimous::EXCHANGES } else { &[] };
        Self {
            exchange: parent.exchange,
            world: parent.membership.ranks().len(),
            // The first is about nodes.
            kinds: [&[false], unanimous].concat(),
            done: Cell::new(0),
            failed: Cell::new(false),
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
