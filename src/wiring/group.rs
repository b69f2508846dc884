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

use super::node::{Circle, Node, Offer};
use super::{Assembly, Exchange, Job, others, verbs};
use crate::choice::Choice;
use crate::membership::Membership;
use crate::tunings::Which;
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
    pub(crate) choice: Choice,
    pub(crate) transport: String,
}

/// Who makes groups: a communicator whose ranks all take part, those in no group as well.
pub(crate) struct Parent<'a> {
    pub(crate) job: &'a Job,
    pub(crate) membership: &'a Membership,
    pub(crate) choice: &'a Choice,
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
        let offer = group.map(|_| self.offer());
        let drawn: [u8; 16] = random().map_err(|error| {
            Error::new(ErrorKind::Rendezvous, format!("drawing a session: {error}"))
        })?;
        let card = offer.as_ref().map_or_else(Vec::new, Offer::card);
        let ordinal = group.map_or(0, |group| self.ordinal(group));
        let blobs = (self.exchange)([&drawn[..], &ordinal.to_le_bytes(), &card].concat().into())?;
        let rounds = Rounds::new(self);
        let member = match (group, offer) {
            (Some(group), Some(offer)) => self.connect(group, offer, &blobs, &rounds).map(Some),
            _ => Ok(None),
        };
        rounds.finish()?;
        let why = match &member {
            Ok(_) => String::new(),
            Err(_) if rounds.failed.get() => return member,
            Err(error) => error.to_string(),
        };
        // Nobody opens a connection before all are ready to take it.
        let reasons = (self.exchange)(why.into_bytes().into())?;
        let is_own = |error: &Error| error.culprits().is_empty();
        let member = member.map_err(|error| match is_own(&error) {
            true => error.caused_by(vec![self.membership.job_rank()]),
            false => error,
        })?;
        let Some(rank) = reasons.iter().position(|reason| !reason.is_empty()) else {
            return Ok(member);
        };
        let culprits = self.membership.job_ranks(&[rank]);
        let text = String::from_utf8_lossy(&reasons[rank]);
        let text = format!("rank {} can't be in a group: {text}", culprits[0]);
        Err(Error::new(ErrorKind::Rendezvous, text).caused_by(culprits))
    }

    /// Only a rank whose registered memory the others of its node map can share a group's memory.
    fn offer(&self) -> Offer {
        #[cfg(feature = "shm")]
        if self.job.heaps.is_none() {
            return Offer::none("it shares none in the job");
        }
        Offer::new(self.job.settings.transport, &self.job.secret)
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
        offer: Offer,
        blobs: &[Vec<u8>],
        rounds: &Rounds<'_>,
    ) -> Result<Member, Error> {
        let rank = group.ranks.iter().position(|&rank| rank == self.rank);
        let rank = rank.expect("a rank joins only groups that it is in");
        let ranks: Arc<[Rank]> = self.membership.job_ranks(&group.ranks).into();
        let told = |&rank: &Rank| {
            let (session, rest) = blobs[rank].split_first_chunk().unwrap_or((&[0; 16], &[]));
            let (ordinal, card) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
            (*session, u32::from_le_bytes(*ordinal), card)
        };
        let cards: Vec<([u8; 16], u32, &[u8])> = group.ranks.iter().map(told).collect();
        let (session, ordinal, _) = cards[0];
        let control = self.membership.control().clone();
        let membership =
            Membership::of_group(control, group.communicator, session, ranks.clone(), rank);
        let exchange = |share| rounds.take_part(share, &group.ranks);
        let circle = Circle {
            rank,
            hosts: &self.job.hosts(&ranks),
            cards: cards.iter().map(|(_, _, card)| card.to_vec()).collect(),
            session,
            exchange: &exchange,
            membership: &membership,
            #[cfg(feature = "shm")]
            heaps: self.job.heaps.as_ref().map(|heaps| (heaps, &ranks[..])),
        };
        let joined = offer.join(&circle, &self.job.settings);
        let Node { members, link, topology } =
            joined.map_err(|error| match rounds.failed.get() {
                false => {
                    let culprits = error.culprits().iter().map(|&rank| ranks[rank]).collect();
                    error.caused_by(culprits)
                }
                true => error,
            })?;
        let others = others(&members, ranks.len());
        let asking = verbs::Asking {
            rank,
            others: &others,
            topology: &topology,
            settings: &self.job.settings,
            membership: &membership,
            exchange: &exchange,
            #[cfg(feature = "verbs")]
            registry: self.job.arena.registry(),
        };
        let has_rdma = self.job.uses_rdma() && !others.is_empty();
        let rdma = if has_rdma { asking.link()? } else { None };
        let mut links = Assembly::new(ranks.len());
        links.add_all((link, rdma), &members, self.job, &membership, (rank, session))?;
        let transport = links.names.join("+");
        let sharing: Vec<Rank> = members.iter().map(|&member| ranks[member]).collect();
        let engine = links.engine(rank, self.job.ranks_and_cores(&sharing));
        engine.links().iter().for_each(|link| membership.add_waker(link.waker()));
        let shares_memory = members.len() == ranks.len();
        let choice = self.choice.for_group(topology, shares_memory, Which { ranks, ordinal });
        Ok(Member { membership, engine, choice, transport })
    }
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
        let rdma: &[bool] = if parent.job.uses_rdma() { &verbs::EXCHANGES } else { &[] };
        Self {
            exchange: parent.exchange,
            world: parent.membership.ranks().len(),
            // The first is about shared memory.
            kinds: [&[false], rdma].concat(),
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
