//! What unisum's transports share: the [`Link`] contract that each of them fulfils, the memory
//! [`Region`]s and [`Call`] descriptions that cross it, the frame and handshake formats (sans-IO),
//! the reduction [`kernels`], and the [`conformance`] suite that every transport passes.
//!
//! The crate knows nothing of algorithms, engines or rendezvous: a link moves bytes between ranks
//! in order and says when; what the bytes mean is decided above it.

mod boolean;
mod call;
pub mod conformance;
mod custom;
pub mod dial;
mod dtype;
mod error;
mod float8;
pub mod fork;
pub mod frame;
pub mod fuzzing;
pub mod handshake;
pub mod kernels;
mod link;
mod op;
mod panics;
mod region;
mod wait;

pub use boolean::Bool;
pub use call::{Call, Collective, PeerCounts};
pub use custom::{Custom, CustomOp, Function};
pub use dtype::{Dtype, Element};
pub use error::{LinkError, LinkErrorKind};
pub use float8::{f8e4m3, f8e5m2};
pub use link::{Arrival, Group, Landing, Link, Part, Ticket, Wake};
pub use op::{ReduceOp, Undefined};
pub use panics::{Panic, said_by_reduction};
pub use region::{Region, Regions};
pub use wait::{Backoff, Patience, Pause};

/// A process of the job, counted from 0.
pub type Rank = usize;
