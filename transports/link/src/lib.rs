//! What unisum's transports share: the [`Link`] contract that each of them fulfils, the memory
//! [`Region`]s and [`Call`] descriptions that cross it, the frame and handshake formats (sans-IO),
//! the reduction [`kernels`], and the [`conformance`] suite that every transport passes.
//!
//! The crate knows nothing of algorithms, engines or rendezvous: a link moves bytes between ranks
//! in order and says when; what the bytes mean is decided above it.

mod call;
pub mod conformance;
mod dtype;
mod error;
pub mod fork;
pub mod frame;
pub mod fuzzing;
pub mod handshake;
pub mod kernels;
mod link;
mod op;
mod region;
mod wait;

pub use call::{Call, Collective};
pub use dtype::{Dtype, Element};
pub use error::{LinkError, LinkErrorKind};
pub use link::{Arrival, Group, Landing, Link, Ticket, Wake};
pub use op::ReduceOp;
pub use region::Region;
pub use wait::{Backoff, Patience, Pause};

/// A process of the job, counted from 0.
pub type Rank = usize;
