//! Groups: communicators of some of a communicator's ranks.
//!
//! A group has links of its own, so that what its ranks call and in which order concerns nobody
//! else: sockets are opened when first used, mailboxes and counters lie in memory of its own. What
//! is the process's is shared with the job's communicator: the control connection, the listening
//! port, registered memory.

use std::sync::Arc;

use unisum_link::Rank;
use unisum_link::handshake::random;

use super::node::{Circle, Node, Offer};
use super::{Assembly, Exchange, Job};
use crate::choice::Choice;
use crate::engine::Engine;
use crate::membership::Membership;
use crate::{Error, ErrorKind};

/// A group as its ranks agreed on it.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Unique among the groups of each of its ranks.
    pub(crate) communicator: u16,
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
    /// If a rank is lost meanwhile, or memory or descriptors run out.
    pub(crate) fn join(&self, group: Option<&Group>) -> Result<Option<Member>, Error> {
        let group = group.filter(|group| group.ranks.len() > 1);
        let offer = group.map(|_| Offer::new(self.job.settings.transport, &self.job.secret));
        let drawn: [u8; 16] = random().map_err(|error| {
            Error::new(ErrorKind::Rendezvous, format!("drawing a session: {error}"))
        })?;
        let card = offer.as_ref().map_or_else(Vec::new, Offer::card);
        let blobs = (self.exchange)([&drawn[..], &card].concat())?;
        let member = match (group, offer) {
            (Some(group), Some(offer)) => Some(self.connect(group, offer, &blobs)?),
            _ => {
                (self.exchange)(Vec::new())?;
                None
            }
        };
        // Nobody opens a connection before all are ready to take it.
        (self.exchange)(Vec::new())?;
        Ok(member)
    }

    fn connect(&self, group: &Group, offer: Offer, blobs: &[Vec<u8>]) -> Result<Member, Error> {
        let parents = |ranks: &[Rank]| -> Vec<Rank> { self.membership.job_ranks(ranks) };
        let rank = group.ranks.iter().position(|&rank| rank == self.rank);
        let rank = rank.expect("a rank joins only groups that it is in");
        let ranks: Arc<[Rank]> = parents(&group.ranks).into();
        let of_group = group.ranks.iter().map(|&rank| &blobs[rank]);
        let cards: Vec<(&[u8; 16], &[u8])> =
            of_group.filter_map(|blob| blob.split_first_chunk()).collect();
        if cards.len() < ranks.len() {
            let text = "a rank of the group told nothing that this version understands";
            return Err(Error::new(ErrorKind::Rendezvous, text));
        }
        let session = *cards[0].0;
        let control = self.membership.control().clone();
        let membership =
            Membership::of_group(control, group.communicator, session, ranks.clone(), rank);
        let exchange = |blob| {
            let blobs = (self.exchange)(blob)?;
            Ok(group.ranks.iter().map(|&rank| blobs[rank].clone()).collect())
        };
        let circle = Circle {
            rank,
            hosts: &self.job.hosts(&ranks),
            cards: cards.iter().map(|(_, card)| card.to_vec()).collect(),
            session,
            exchange: &exchange,
            #[cfg(feature = "shm")]
            heaps: self.job.heaps.as_ref().map(|heaps| (heaps, &ranks[..])),
        };
        let Node { members, link, topology } = offer.join(&circle, &self.job.settings)?;
        let mut links = Assembly::new(ranks.len());
        links.add_all(link, &members, self.job, &membership, (rank, session))?;
        let transport = links.names.join("+");
        let engine = links.engine(rank, &topology);
        engine.links().iter().for_each(|link| membership.add_waker(link.waker()));
        let choice = self.choice.for_group(topology, members.len() == ranks.len());
        Ok(Member { membership, engine, choice, transport })
    }
}
