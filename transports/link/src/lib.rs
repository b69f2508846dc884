//! What unisum's transports share: the [`Link`] contract that each of them fulfils, the memory
//! [`Region`]s and [`Call`] descriptions that cross it, the frame and handshake formats (sans-IO),
//! and the [`conformance`] suite that every transport passes.
//!
//! The crate uses `unisum-kernels` and knows nothing of algorithms, engines or rendezvous: a link
//! moves bytes between ranks in order and says when; what the bytes mean is decided above it. Start
//! at [`Link`], and at [`Group`] for ranks that share memory; who writes a transport then reads
//! [`conformance`].

mod call;
pub mod conformance;
pub mod dial;
mod error;
pub mod fork;
pub mod frame;
pub mod fuzzing;
pub mod handshake;
mod link;
mod region;
mod wait;

pub use call::{Call, Collective, PeerCounts};
pub use error::{LinkError, LinkErrorKind};
pub use link::{Arrival, Group, Landing, Link, Part, Ticket, Wake};
pub use region::{Region, Regions};
pub use wait::{Backoff, Patience, Pause};

/// A process of the job, counted from 0.
pub type Rank = usize;
