//! A group's own control: connections among its members only, so that it goes on when an elastic
//! job loses ranks that are in no need of it.
//!
//! The group's rank 0 listens first, and tells where as it tells what else the group needs; the
//! others reach it there, as ranks reach the first one of a view. In that control ranks have their
//! numbers in the group.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_control::address::Rendezvous;
use unisum_control::interface::without_scope;
use unisum_control::{Control, ControlConfig, ControlError, Finding, IsMoot, Report};
use unisum_link::{Rank, is_lack};

use super::bond::{Bond, Members};
use super::group::{Group, Parent};
use super::lineage::{Lineage, parse_addresses};
use super::{Job, builtin, rendezvous_error};
use crate::version::BUILD;
use crate::{Error, ErrorKind};

/// How long an attempt to meet may take where connections go on after they were cut: ranks that
/// were cut off just then may wait for each other for ever.
const MEETS_WITHIN: Duration = Duration::from_secs(2);

/// The control of a group, as it is made. It is given up on all its ranks unless it is kept.
pub(super) struct GroupControl {
    members: Members,
    /// By which connections are known to be the group's.
    name: String,
    number: u32,
    rank: Rank,
    world: usize,
    made: Option<Result<Arc<Control>, Error>>,
}

impl GroupControl {
    /// What this rank begins with in a group; nothing if its control is the parent's: where the job
    /// is not elastic, and where the group has all ranks, so that what ends one ends the other.
    pub(super) fn begin(parent: &Parent<'_>, group: &Group) -> Option<Self> {
        let bond = parent.membership.bond()?;
        let world = group.ranks.len();
        if world == parent.membership.ranks().len() {
            return None;
        }
        let members = bond.members(&parent.membership.job_ranks(&group.ranks));
        let session = u128::from_be_bytes(parent.membership.control().session());
        let (job, number) = (members.lineage().job(), group.communicator);
        let name = format!("{job} group {number} of {session:032x}");
        let rank = parent.place_in(group);
        let mut control = Self { members, name, number, rank, world, made: None };
        if rank == 0 {
            control.start(parent, Vec::new());
        }
        Some(control)
    }

    fn lineage(&self) -> &Arc<Lineage> {
        self.members.lineage()
    }

    /// What the communicator ends with.
    pub(super) fn bond(&self) -> Bond {
        Bond::Members(self.members.clone())
    }

    /// Where this rank listens for the group, if it does.
    pub(super) fn told(&self) -> Vec<u8> {
        let Some(Ok(control)) = &self.made else { return Vec::new() };
        let addresses = control.addresses().iter().map(|&it| without_scope(it).to_string());
        addresses.collect::<Vec<_>>().join(" ").into_bytes()
    }

    /// Reaches rank 0 of the group where that listens, on the other ranks.
    pub(super) fn reach(&mut self, parent: &Parent<'_>, told: &[u8]) {
        if self.rank == 0 {
            return;
        }
        match parse_addresses(told) {
            Some(addresses) => self.start(parent, addresses),
            None => self.made = Some(Err(not_there(0))),
        }
    }

    /// Whether this rank has come as far as it can without the others.
    pub(super) const fn has_met(&self) -> bool {
        matches!(self.made, Some(Ok(_)))
    }

    /// How long its ranks may take to meet.
    fn patience(&self) -> Duration {
        let settings = self.lineage().settings();
        settings.connect_timeout.min(settings.timeout) / 2
    }

    fn start(&mut self, parent: &Parent<'_>, addresses: Vec<std::net::SocketAddr>) {
        let started = Control::start(self.config(parent, addresses)).map(Arc::new);
        if let Ok(control) = &started {
            self.members.bind(control);
        }
        self.made = Some(started.map_err(own_error));
    }

    fn config(&self, parent: &Parent<'_>, addresses: Vec<std::net::SocketAddr>) -> ControlConfig {
        let settings = &parent.job.settings;
        let (credentials, secret_origin) = self.lineage().credentials.clone();
        let control = parent.membership.control().clone();
        ControlConfig {
            rank: self.rank,
            world: self.world,
            rendezvous: Rendezvous::Store { key: format!("group {}", self.number), addresses },
            job: self.name.clone(),
            credentials,
            secret_origin,
            interface: settings.interface.clone(),
            port_range: settings.port_range,
            towards: self.lineage().towards(),
            // The others wait for this rank in a collective.
            connect_timeout: match self.lineage().survives_cuts() {
                true => self.patience().min(MEETS_WITHIN),
                false => self.patience(),
            },
            heartbeat_timeout: settings.heartbeat_timeout,
            reconnect_timeout: settings.reconnect_timeout,
            publish: None,
            is_moot: Some(IsMoot(Box::new(move || control.is_over()))),
            build: BUILD,
            prepare_listener: builtin::prepare_listener,
        }
    }

    /// The control, and what the job is to the group, whose ranks have these numbers in the
    /// parent's control and listen where they told.
    ///
    /// # Errors
    /// If this rank, or another one, has not reached the group's rank 0.
    pub(super) fn finish(
        &mut self,
        parent: &Parent<'_>,
        ranks: &[Rank],
        told: &[Vec<u8>],
    ) -> Result<(Arc<Control>, Job), Error> {
        let control = match &self.made {
            Some(Ok(control)) => control.clone(),
            Some(Err(error)) => return Err(error.clone()),
            None => return Err(not_there(self.rank)),
        };
        let addresses = told
            .iter()
            .enumerate()
            .map(|(rank, blob)| parse_addresses(blob).ok_or_else(|| not_there(rank)));
        let addresses: Vec<_> = addresses.collect::<Result<_, _>>()?;
        let (credentials, _) = &self.lineage().credentials;
        let by = (&*control, &self.name[..]);
        let job = parent.job.of_group((self.rank, ranks), &addresses, credentials, by);
        if !self.lineage().survives_cuts() {
            return Ok((control, job?));
        }
        // Before, an end was a death; once all are past that, connections go on that are cut.
        let all_met = || control.exchange(Vec::new()).map_err(rendezvous_error);
        match job.and_then(|job| all_met().map(|_| job)) {
            Ok(job) => Ok((control, job)),
            Err(error) => {
                // The others wait for this rank there, and may take it for one that is cut off:
                // its port has to refuse them.
                drop(control);
                self.give_up();
                self.made = Some(Err(error.clone()));
                Err(error)
            }
        }
    }

    /// Whether making the group, begun at `since`, may have failed because connections were cut,
    /// and is worth another attempt: see [`Epoch::was_cut`](super::Epoch::was_cut).
    pub(super) fn was_cut(&self, error: &Error, since: Instant) -> bool {
        let settings = self.lineage().settings();
        self.lineage().may_be_cut(error, since, settings.reconnect_timeout.max(self.patience()))
    }

    /// Or rank 0 of the group would wait for those that do not come.
    fn give_up(&mut self) {
        if let Some(Ok(control)) = self.made.take() {
            let why = "the group was not made";
            control.accuse(Report::new(0, self.rank, Finding::CannotJoin, why));
        }
    }

    /// The group is made.
    pub(super) fn keep(mut self) {
        self.made = None;
    }
}

/// Why this rank has no control for the group. What it could not do alone, to listen for one, no
/// connection that is cut explains, unless a cable that is out has taken its addresses along.
fn own_error(error: ControlError) -> Error {
    let kind = match &error {
        ControlError::Listen { source, .. } if is_lack(source) => ErrorKind::Resources,
        ControlError::System { .. } => ErrorKind::Resources,
        ControlError::Listen { source, .. } if !is_by_an_outage(source) => ErrorKind::Configuration,
        ControlError::Resolve(_) => ErrorKind::Configuration,
        _ => return rendezvous_error(error),
    };
    Error::new(kind, error.to_string())
}

/// Whether it may pass when the network is back.
fn is_by_an_outage(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, NetworkDown, NetworkUnreachable};
    matches!(error.kind(), AddrNotAvailable | NetworkDown | NetworkUnreachable)
}

/// The error for a rank of the group that has no control connection there.
fn not_there(rank: Rank) -> Error {
    let text = format!("rank {rank} of the group has not connected with the others");
    Error::new(ErrorKind::Rendezvous, text).caused_by(vec![rank])
}

impl Drop for GroupControl {
    fn drop(&mut self) {
        self.give_up();
    }
}
