//! What unisum's transports have in common: the [`Transport`] and [`Link`] contracts that each of
//! them implements, the memory [`Region`]s and [`Call`] descriptions that cross a link, the frame
//! and handshake formats (sans-IO), and the [`conformance`] suite that every transport passes.
//!
//! The crate uses `unisum-kernels` and knows nothing of algorithms, engines or rendezvous. A link
//! moves bytes between ranks in order and reports completions; the layers above decide what the
//! bytes mean. Start at [`Transport`] (how a link comes to be) and [`Link`] (what it does), and at
//! [`Group`] for ranks that share memory. To write a transport, read [`conformance`] next.

mod call;
pub mod conformance;
pub mod congestion;
mod counters;
pub mod dial;
mod error;
pub mod fork;
pub mod frame;
pub mod fuzzing;
pub mod handshake;
pub mod inbox;
mod limit;
mod link;
pub mod listener;
mod region;
pub mod secure;
pub mod silence;
mod transport;
mod wait;
pub mod warning;

pub use call::{Call, CollectiveKind, PeerCounts};
pub use counters::LinkCounters;
pub use error::{Cause, LinkError, LinkErrorKind, is_lack};
pub use limit::{Limit, Passed};
pub use link::{Arrival, Group, Landing, Link, Part, Ticket, Wake};
pub use region::{Region, Regions};
pub use transport::{
    Allocation, Connected, Endpoint, EndpointInfo, Heap, Inbox, Reach, Refusal, Registrar,
    Registration, Setup, Site, Transport,
};
pub use wait::{Backoff, Patience, Pause};

/// A process of the job, counted from 0.
pub type Rank = usize;
