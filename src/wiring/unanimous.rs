//! The link to the ranks of a communicator that do not share memory with this one, over a transport
//! that all ranks have to have.
//!
//! Every rank takes part in every exchange, whatever it has and whatever its build supports, until
//! all have learned that one cannot: all ranks thus decide alike.

use std::time::{Duration, Instant};

use unisum_algorithms::Topology;
use unisum_link::inbox::Ways;
use unisum_link::{Connected, EndpointInfo, Limit, Rank, Refusal, Setup, Site, Transport};

use super::report::{decode, encode};
use super::{Exchange, builtin};
use crate::execution::membership::Membership;
use crate::settings::Settings;
use crate::{Error, ErrorKind};
use unisum_control::Share;

/// How long the first packets may take to arrive.
const PROOF_TIMEOUT: Duration = Duration::from_secs(20);

/// What setting up such a link needs.
#[derive(Clone, Copy)]
pub(super) struct Unanimous<'a> {
    pub(super) rank: Rank,
    /// The numbers by which the transport knows the ranks.
    pub(super) known_as: &'a [Rank],
    /// The ranks to reach.
    pub(super) others: &'a [Rank],
    pub(super) topology: &'a Topology,
    pub(super) session: [u8; 16],
    pub(super) settings: &'a Settings,
    pub(super) membership: &'a Membership,
    /// At most three are needed: see [`EXCHANGES`].
    pub(super) exchange: &'a Exchange<'a>,
    /// Whether it is a group of a job that has started.
    pub(super) is_group: bool,
    /// What is used where this can't be.
    pub(super) instead: &'a str,
    /// How the ranks are reached after the start, if connections are to be made anew.
    pub(super) ways: Option<&'a Ways>,
}

/// The exchanges that agreeing on a link takes, by whether ranks have something for each.
pub(super) const EXCHANGES: [bool; 3] = [true, false, false];

/// The ranks that can't, and why.
type Refusals = Vec<(Rank, Refusal)>;

impl Unanimous<'_> {
    /// Returns the link, or `None` if another transport must be used. All ranks get the same
    /// answer, and all call this if one does.
    pub(super) fn connect(self, transport: &dyn Transport) -> Result<Option<Connected>, Error> {
        let name = transport.name();
        let is_asked_for = self.settings.transport.is(name);
        if !is_asked_for && self.topology.node_count() == 1 {
            return Ok(None);
        }
        match self.attempt(transport, is_asked_for)? {
            Ok(connected) => Ok(Some(connected)),
            Err(refusals) if is_asked_for => Err(self.not_all_have(name, &refusals)),
            Err(refusals) => {
                self.do_without(name, &refusals);
                Ok(None)
            }
        }
    }

    /// Reports this rank's result to all ranks, and returns theirs, or the ranks that cannot
    /// continue.
    fn agree(
        self,
        own: Result<Vec<u8>, &Refusal>,
    ) -> Result<Result<Vec<Vec<u8>>, Refusals>, Error> {
        self.settle(Share::Same(encode(own.as_deref().map_err(|refusal| *refusal))))
    }

    /// Sends each rank what this one has for it.
    fn agree_each(
        self,
        own: Result<EndpointInfo, &Refusal>,
    ) -> Result<Result<Vec<Vec<u8>>, Refusals>, Error> {
        let world = self.topology.world();
        let reports = match &own {
            Ok(EndpointInfo::Each(infos)) => infos.iter().map(|info| encode(Ok(info))).collect(),
            Ok(EndpointInfo::Same(info)) => vec![encode(Ok(info)); world],
            Err(refusal) => vec![encode(Err(refusal)); world],
        };
        self.settle(Share::Each(reports))
    }

    fn settle(self, share: Share) -> Result<Result<Vec<Vec<u8>>, Refusals>, Error> {
        let reports = (self.exchange)(share)?;
        let mut refusals = Vec::new();
        let mut told = Vec::new();
        for (rank, report) in reports.iter().enumerate() {
            match decode(report) {
                Ok(it) => told.push(it.to_vec()),
                Err(refusal) => refusals.push((rank, refusal)),
            }
        }
        Ok(if refusals.is_empty() { Ok(told) } else { Err(refusals) })
    }

    fn reasons(self, refusals: &Refusals) -> String {
        let in_job = self.membership.ranks();
        let reasons: Vec<String> = refusals
            .iter()
            .map(|(rank, refusal)| format!("rank {}: {}", in_job[*rank], refusal.why()))
            .collect();
        reasons.join("; ")
    }

    /// The error where the transport was asked for.
    fn not_all_have(self, name: &str, refusals: &Refusals) -> Error {
        let in_job = self.membership.ranks();
        let reasons = self.reasons(refusals);
        let text = format!("transport {name} was asked for, but not all ranks have it ({reasons})");
        // Who has run out of something is the cause, if one has.
        let lacks = |(_, refusal): &(Rank, Refusal)| matches!(refusal, Refusal::Lacks(_));
        let kind = match refusals.iter().any(lacks) {
            true => ErrorKind::Resources,
            false => ErrorKind::Configuration,
        };
        let is_cause = |it: &&(Rank, Refusal)| kind == ErrorKind::Configuration || lacks(it);
        let failed_ranks = refusals.iter().filter(is_cause).map(|(rank, _)| in_job[*rank]);
        Error::new(kind, text).on(self.membership.job_rank()).caused_by(failed_ranks.collect())
    }

    /// Says that another transport is used.
    fn do_without(self, name: &str, refusals: &Refusals) {
        let (called, reasons) = (builtin::called(name), self.reasons(refusals));
        if refusals.iter().all(|(_, refusal)| matches!(refusal, Refusal::NotWanted(_))) {
            tracing::debug!("no {called}: {reasons}");
        } else if self.rank == 0 {
            let whose = match self.membership.communicator() {
                0 => String::new(),
                number => format!(" in group {number}"),
            };
            let instead = builtin::called(self.instead);
            unisum_link::warning!(
                "{instead} is used between hosts{whose}, as {called} can't be: {reasons}"
            );
        }
    }

    fn attempt(
        self,
        transport: &dyn Transport,
        is_asked_for: bool,
    ) -> Result<Result<Connected, Refusals>, Error> {
        let (rank, ranks, peers) = (self.rank, self.known_as, self.others);
        let own = |refusal| Ok(Err(vec![(rank, refusal)]));
        let endpoint = transport.endpoint(&Site { rank, ranks, peers, is_asked_for });
        let infos = self.agree_each(endpoint.as_ref().map(|it| it.info()))?;
        let (infos, mut endpoint) = match (infos, endpoint) {
            (Ok(infos), Ok(endpoint)) => (infos, endpoint),
            (Err(refusals), _) => return Ok(Err(refusals)),
            (Ok(_), Err(refusal)) => return own(refusal),
        };
        // The others wait for this one no longer than that: of a group, in a collective.
        let Settings { connect_timeout, timeout, .. } = self.settings;
        let patience = if self.is_group { *timeout / 2 } else { *connect_timeout };
        let is_over = || self.membership.verdict().is_some();
        let setup = || {
            let limit = Limit::new(Instant::now() + PROOF_TIMEOUT.min(patience), &is_over);
            Setup { session: self.session, limit, ways: self.ways }
        };
        let agreed = endpoint.agree(&infos, &setup());
        let leaders = self.agree(agreed.as_ref().map(|it| it.to_string().into_bytes()))?;
        let leaders = match (leaders, agreed) {
            (Ok(leaders), Ok(_)) => leaders,
            (Err(refusals), _) => return Ok(Err(refusals)),
            (Ok(_), Err(refusal)) => return own(refusal),
        };
        if let Some(other) = leaders.iter().position(|leader| *leader != leaders[0]) {
            let why = "it has agreed with other ranks than rank 0";
            return Ok(Err(vec![(other, Refusal::Own(why.into()))]));
        }
        let mut members = [self.others, &[rank]].concat();
        members.sort_unstable();
        let connected = endpoint.connect(&members, &setup());
        match (self.agree(connected.as_ref().map(|_| Vec::new()))?, connected) {
            (Ok(_), Ok(connected)) => Ok(Ok(connected)),
            (Err(refusals), _) => Ok(Err(refusals)),
            (Ok(_), Err(refusal)) => own(refusal),
        }
    }
}
