//! unisum over TCP: one or several sockets per pair of ranks, opened when first needed.
//!
//! Each message is a [`unisum_link::frame::Header`] followed by its payload; header and payload
//! leave in one system call and arrive in one. Arrivals that store are received straight into the
//! caller's memory, arrivals that reduce into recycled slots. Nothing is received that was not
//! posted, so a fast peer is held back by TCP's own flow control and memory stays bounded.
//!
//! The crate uses `unisum-link` and `unisum-kernels`. Start at [`TcpLink`], then `socket` (one to
//! one peer: its queues of posted sends and receives) and `resume` (connections that break).

mod config;
mod link;
mod options;
mod resume;
mod sealed;
mod silence;
mod sleep;
mod slots;
mod socket;
mod transport;

pub use config::TcpConfig;
pub use link::TcpLink;
#[cfg(any(test, fuzzing))]
pub use resume::fuzzing;
pub use transport::{TcpJob, TcpTransport};
pub use unisum_link::congestion::prepare_listener;
pub use unisum_link::inbox::{Inbox, Route};
