//! The control connection, and the TCP link beside it.

#[cfg(feature = "tcp")]
use std::sync::Arc;

use unisum_link::{Link, Rank};

use super::job::Job;
use super::{Meeting, rendezvous_error, with_hint};
use crate::membership::Membership;
use crate::settings::Settings;
use crate::version::BUILD;
use crate::{Error, ErrorKind};
use unisum_control::launcher::Detected;
use unisum_control::{Control, ControlConfig};

pub(super) fn start_control(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
) -> Result<Control, Error> {
    let rendezvous = detected.rendezvous.clone().ok_or_else(|| {
        let text = "no rendezvous address; set UNISUM_RENDEZVOUS=tcp://HOST:PORT";
        Error::new(ErrorKind::Configuration, text)
    })?;
    let config = ControlConfig {
        rank: detected.rank,
        world: detected.world,
        rendezvous,
        job: detected.job.clone(),
        secret: meeting.secret.clone(),
        secret_origin: meeting.secret_origin.clone(),
        interface: settings.interface.clone(),
        port_range: settings.port_range,
        connect_timeout: settings.connect_timeout,
        heartbeat_timeout: settings.heartbeat_timeout,
        publish: meeting.publish(),
        build: BUILD,
        #[cfg(feature = "tcp")]
        prepare_listener: |listener| unisum_tcp::prepare_listener(listener),
        #[cfg(not(feature = "tcp"))]
        prepare_listener: |_| {},
    };
    Control::start(config).map_err(|error| {
        let error = rendezvous_error(error);
        let is_own = error.culprits().is_empty();
        if is_own { error.caused_by(vec![detected.rank]) } else { with_hint(error, detected) }
    })
}

/// The link of a communicator to the ranks that share no memory with this one.
#[cfg(feature = "tcp")]
pub(super) fn connect(
    job: &Job,
    membership: &Membership,
    (rank, session): (Rank, [u8; 16]),
) -> Result<Box<dyn Link>, Error> {
    let settings = &job.settings;
    let config = unisum_tcp::TcpConfig {
        rank,
        routes: membership.ranks().iter().map(|&rank| job.places[rank].route.clone()).collect(),
        session,
        job: job.name,
        secret: job.secret.clone(),
        sockets_per_peer: settings.sockets_per_peer as u8,
        // The others, which wait for this rank as long as the whole, are to hear who can't be
        // reached.
        connect_timeout: settings.connect_timeout / 2,
        heartbeat_timeout: settings.heartbeat_timeout,
    };
    let link = unisum_tcp::TcpLink::new(config).map_err(|error| {
        let text = format!("making an event queue for TCP: {error}");
        Error::new(ErrorKind::Rendezvous, text).on(rank)
    })?;
    let inbox = link.inbox();
    let deliver = move |peer, socket, stream| inbox.deliver(peer, socket, stream);
    membership.set_inbox(Arc::new(deliver));
    Ok(Box::new(link))
}

/// Without the `tcp` feature nobody else can be reached.
#[cfg(not(feature = "tcp"))]
pub(super) fn connect(
    _job: &Job,
    _membership: &Membership,
    (rank, _session): (Rank, [u8; 16]),
) -> Result<Box<dyn Link>, Error> {
    let text = "some ranks share no memory with this one, and this build has no TCP transport";
    Err(Error::new(ErrorKind::Configuration, text).on(rank))
}
