//! TCP, in this build.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use unisum_link::Transport;
use unisum_link::handshake::job_hash;
use unisum_link::secure::Credentials;
use unisum_tcp::{TcpJob, TcpTransport};

use crate::settings::Settings;

pub(super) const IS_BUILT: bool = true;

/// By rank of the job, where it listens; where rank 0 was met; and the job's name.
pub(in crate::wiring) fn internet(
    settings: &Settings,
    credentials: &Credentials,
    (addresses, coordinator): (Vec<Vec<SocketAddr>>, Option<SocketAddr>),
    job: &str,
) -> Arc<dyn Transport> {
    Arc::new(TcpTransport::new(TcpJob {
        addresses,
        coordinator,
        job: job_hash(job),
        credentials: credentials.clone(),
        sockets_per_peer: settings.sockets_per_peer as u8,
        // The others, which wait for this rank as long as the whole, are to hear which rank can't
        // be reached.
        connect_timeout: settings.connect_timeout / 2,
        heartbeat_timeout: settings.heartbeat_timeout,
        reconnect_timeout: settings.reconnect_timeout,
    }))
}

pub(in crate::wiring) fn prepare_listener(listener: &TcpListener) {
    unisum_tcp::prepare_listener(listener);
}
