//! The verbs link to the ranks of a communicator that share no memory with this one, if all ranks
//! can have it.
//!
//! Every rank takes part in every exchange, whatever it has and whatever its build knows, until
//! all have heard that one can't: so all ranks decide alike.

#[cfg(feature = "verbs")]
use std::sync::Arc;
#[cfg(feature = "verbs")]
use std::time::{Duration, Instant};

use unisum_algorithms::Topology;
use unisum_link::Rank;

use super::Exchange;
use crate::membership::Membership;
use crate::settings::{Settings, TransportChoice};
use crate::{Error, ErrorKind};
use unisum_control::Share;

/// How long the first packets may take to come through.
#[cfg(feature = "verbs")]
const PROOF_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a rank has no RDMA.
struct Refusal {
    /// Whether there is nothing that anybody would miss.
    is_expected: bool,
    why: String,
}

/// Who asks.
#[derive(Clone, Copy)]
pub(super) struct Asking<'a> {
    pub(super) rank: Rank,
    /// The ranks to reach.
    #[cfg_attr(not(feature = "verbs"), expect(dead_code, reason = "nobody is reached"))]
    pub(super) others: &'a [Rank],
    pub(super) topology: &'a Topology,
    pub(super) settings: &'a Settings,
    pub(super) membership: &'a Membership,
    /// Three of them are needed at most: see [`EXCHANGES`].
    pub(super) exchange: &'a Exchange<'a>,
    /// Of a group: the devices that the job has opened.
    #[cfg(feature = "verbs")]
    pub(super) registry: Option<&'a Arc<unisum_verbs::Registry>>,
}

/// The exchanges that agreeing on a link takes, by whether ranks have something for each.
pub(super) const EXCHANGES: [bool; 3] = [true, false, false];

#[cfg(feature = "verbs")]
pub(super) type VerbsLink = unisum_verbs::VerbsLink;
/// Without the transport there is no link.
#[cfg(not(feature = "verbs"))]
pub(super) type VerbsLink = std::convert::Infallible;

impl Asking<'_> {
    /// The link, or `None` if TCP has to do. All ranks get the same answer, and call this if one
    /// does.
    pub(super) fn link(self) -> Result<Option<VerbsLink>, Error> {
        let wanted = match self.settings.transport {
            TransportChoice::Verbs => true,
            TransportChoice::Auto => self.topology.node_count() > 1,
            TransportChoice::Tcp | TransportChoice::Shm => false,
        };
        if !wanted {
            return Ok(None);
        }
        self.attempt()?.map(Some).or_else(|refusals| self.do_without(&refusals).map(|()| None))
    }

    /// Tells all ranks what this one has come to, and gives what each says; or who can't go on.
    #[cfg(feature = "verbs")]
    fn agree(self, own: Result<Vec<u8>, Refusal>) -> Result<Result<Vec<Vec<u8>>, Refusals>, Error> {
        self.settle(Share::Same(report(own.as_deref())))
    }

    /// Tells each rank what this one has for it.
    fn agree_each(
        self,
        own: Result<Vec<Vec<u8>>, Refusal>,
    ) -> Result<Result<Vec<Vec<u8>>, Refusals>, Error> {
        let reports = match &own {
            Ok(cards) => cards.iter().map(|card| report(Ok(card))).collect(),
            Err(refusal) => vec![report(Err(refusal)); self.topology.world()],
        };
        self.settle(Share::Each(reports))
    }

    fn settle(self, share: Share) -> Result<Result<Vec<Vec<u8>>, Refusals>, Error> {
        let reports = (self.exchange)(share)?;
        let mut refusals = Vec::new();
        let mut cards = Vec::new();
        for (rank, report) in reports.iter().enumerate() {
            match report.split_first() {
                Some((b'+', card)) => cards.push(card.to_vec()),
                Some((kind, why)) => {
                    let why = String::from_utf8_lossy(why).into_owned();
                    refusals.push((rank, Refusal { is_expected: *kind == b'0', why }));
                }
                None => refusals.push((rank, Refusal::from_text("it has given up"))),
            }
        }
        Ok(if refusals.is_empty() { Ok(cards) } else { Err(refusals) })
    }

    fn do_without(self, refusals: &Refusals) -> Result<(), Error> {
        let in_job = self.membership.ranks();
        let reasons: Vec<String> = refusals
            .iter()
            .map(|(rank, refusal)| format!("rank {}: {}", in_job[*rank], refusal.why))
            .collect();
        let reasons = reasons.join("; ");
        if self.settings.transport == TransportChoice::Verbs {
            let text =
                format!("transport verbs was asked for, but not all ranks have it ({reasons})");
            let culprits = refusals.iter().map(|(rank, _)| in_job[*rank]).collect();
            return Err(Error::new(ErrorKind::Configuration, text)
                .on(self.membership.job_rank())
                .caused_by(culprits));
        }
        if refusals.iter().all(|(_, refusal)| refusal.is_expected) {
            tracing::debug!("no RDMA: {reasons}");
        } else if self.rank == 0 {
            let whose = match self.membership.communicator() {
                0 => String::new(),
                number => format!(" in group {number}"),
            };
            crate::warning::warning!(
                "TCP is used between hosts{whose}, as RDMA can't be: {reasons}"
            );
        }
        Ok(())
    }

    #[cfg(feature = "verbs")]
    fn attempt(self) -> Result<Result<VerbsLink, Refusals>, Error> {
        let offer = self.offer();
        let cards = offer.as_ref().map(unisum_verbs::Offer::cards).map_err(Refusal::copy);
        let (cards, offer) = match (self.agree_each(cards)?, offer) {
            (Ok(cards), Ok(offer)) => (cards, offer),
            (Err(refusals), _) => return Ok(Err(refusals)),
            (Ok(_), Err(refusal)) => return Ok(Err(vec![(self.rank, refusal)])),
        };
        let link = offer.connect(&cards).map_err(|error| Refusal::from_text(self.in_job(error)));
        let mut link = match (self.agree(Refusal::of(&link))?, link) {
            (Ok(_), Ok(link)) => link,
            (Err(refusals), _) => return Ok(Err(refusals)),
            (Ok(_), Err(refusal)) => return Ok(Err(vec![(self.rank, refusal)])),
        };
        // The others wait for this one no longer than that: of a group, in a collective.
        let Settings { connect_timeout, timeout, .. } = self.settings;
        let patience = if self.registry.is_some() { *timeout / 2 } else { *connect_timeout };
        let until = Instant::now() + PROOF_TIMEOUT.min(patience);
        let is_pointless = || self.membership.verdict().is_some();
        let proven = link
            .prove(until, &is_pointless)
            .map_err(|error| Refusal::from_text(self.membership.in_job(error)));
        Ok(self.agree(Refusal::of(&proven))?.map(|_| link))
    }

    /// Without the transport this rank can only say so.
    #[cfg(not(feature = "verbs"))]
    fn attempt(self) -> Result<Result<VerbsLink, Refusals>, Error> {
        let refusal = || Refusal::from_text("this build has no verbs transport");
        let refusals = self.agree_each(Err(refusal()))?.err();
        Ok(Err(refusals.unwrap_or_else(|| vec![(self.rank, refusal())])))
    }

    /// An error with the job's number of the rank it blames.
    #[cfg(feature = "verbs")]
    fn in_job(self, error: unisum_verbs::VerbsError) -> unisum_verbs::VerbsError {
        use unisum_verbs::VerbsError;
        let ranks = self.membership.ranks();
        match error {
            VerbsError::Card(rank, why) => VerbsError::Card(ranks[rank], why),
            VerbsError::Path(rank, why) => VerbsError::Path(ranks[rank], why),
            error => error,
        }
    }

    #[cfg(feature = "verbs")]
    fn offer(self) -> Result<unisum_verbs::Offer, Refusal> {
        let verbs = &self.settings.verbs;
        let asked_for = self.settings.transport == TransportChoice::Verbs;
        if !verbs.allowed && !asked_for {
            let why = "RDMA is switched off (UNISUM_VERBS or NCCL_IB_DISABLE)".into();
            return Err(Refusal { is_expected: true, why });
        }
        let config = unisum_verbs::VerbsConfig {
            devices: verbs.devices.clone(),
            software: asked_for,
            // The settings' ranges are those of the fields.
            gid_index: verbs.gid_index.map(|index| index as u8),
            pairs_per_peer: verbs.pairs_per_peer,
            mtu: verbs.mtu,
            timeout: verbs.timeout as u8,
            retries: verbs.retries as u8,
            traffic_class: verbs.traffic_class as u8,
            service_level: verbs.service_level as u8,
        };
        let (rank, world) = (self.rank, self.topology.world());
        let offer = match self.registry {
            None => unisum_verbs::Offer::new(rank, world, self.others, config),
            Some(devices) => unisum_verbs::Offer::beside(devices, rank, world, self.others, config),
        };
        offer.map_err(|error| {
            let is_expected = matches!(error, unisum_verbs::VerbsError::Absent(_));
            Refusal { is_expected, why: error.to_string() }
        })
    }
}

type Refusals = Vec<(Rank, Refusal)>;

/// What a rank tells of what it has come to.
fn report(own: Result<&[u8], &Refusal>) -> Vec<u8> {
    match own {
        Ok(card) => [b"+", card].concat(),
        Err(Refusal { is_expected: true, why }) => format!("0{why}").into_bytes(),
        Err(Refusal { why, .. }) => format!("-{why}").into_bytes(),
    }
}

impl Refusal {
    fn from_text(why: impl ToString) -> Self {
        Self { is_expected: false, why: why.to_string() }
    }

    #[cfg(feature = "verbs")]
    fn copy(&self) -> Self {
        Self { is_expected: self.is_expected, why: self.why.clone() }
    }

    /// What to tell of a step that gives nothing to tell.
    #[cfg(feature = "verbs")]
    fn of<T>(result: &Result<T, Self>) -> Result<Vec<u8>, Self> {
        result.as_ref().map(|_| Vec::new()).map_err(Self::copy)
    }
}
