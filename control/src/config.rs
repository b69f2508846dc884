//! What a rank needs to know to join a job.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use unisum_link::Rank;
use unisum_link::handshake::Build;
use unisum_link::secure::Credentials;

use crate::address::{PortRange, Rendezvous};
use crate::interface::InterfaceFilter;

/// What a rank needs to know to join a job.
#[derive(Debug)]
pub struct ControlConfig {
    /// This process's rank, below `world`.
    pub rank: Rank,
    /// How many ranks the job has.
    pub world: usize,
    /// Where the ranks meet.
    pub rendezvous: Rendezvous,
    /// The job's name, the same on all ranks.
    pub job: String,
    /// What proves that a process belongs to the job.
    pub credentials: Credentials,
    /// Where the token is from, in words.
    pub secret_origin: String,
    /// Which network interfaces other ranks may reach this one by.
    pub interface: Option<InterfaceFilter>,
    /// Which ports this rank may listen on; rank 0 listens on the rendezvous port instead if
    /// that is one.
    pub port_range: Option<PortRange>,
    /// An address on the network by which other ranks are to reach rank 0 first, where they meet by
    /// a store: this process's own will do. None: that of the default route.
    pub towards: Option<SocketAddr>,
    /// How long the other ranks may take to join, and to take part in each exchange.
    pub connect_timeout: Duration,
    /// How long another host may give no sign of life before it is lost.
    pub heartbeat_timeout: Duration,
    /// How long a control connection that was cut may take to go on in another one, while the
    /// processes at both ends live; zero if it never does.
    pub reconnect_timeout: Duration,
    /// Which build this is: ranks of different builds are refused.
    pub build: Build,
    /// What a transport has to set on a listening socket, for the connections that it accepts.
    pub prepare_listener: fn(&TcpListener),
    /// How rank 0 tells the others where it listens, if they meet by a store of the program.
    pub publish: Option<Publish>,
    /// Whether joining has no purpose any more, because the job is in another view.
    pub is_moot: Option<IsMoot>,
}

/// Says whether something has no purpose any more.
pub struct IsMoot(pub Box<dyn Fn() -> bool + Send>);

impl fmt::Debug for IsMoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IsMoot")
    }
}

/// Tells the ranks that look for it where rank 0 listens. An error is the store's words.
pub struct Publish(pub Box<PublishAddresses>);

type PublishAddresses = dyn Fn(&[SocketAddr]) -> Result<(), String> + Send;

impl fmt::Debug for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Publish")
    }
}
