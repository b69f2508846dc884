//! The InfiniBand verbs transport: RDMA over InfiniBand and RoCE.
//!
//! libibverbs is opened at run time ([`Offer::new`] reports if it is missing); neither building nor
//! starting a program needs it. Every rank has reliable connections to all its peers, on up to four
//! devices. The sender's device writes data into the receiver's memory: directly to its place if
//! that is registered, and to slots otherwise ([`Registry`]).
//!
//! The crate uses `unisum-link` and `unisum-kernels`. Start at [`Offer`] and [`VerbsLink`], then
//! read `peer` (the protocol state between two ranks), `wire` (its messages) and `ffi` (the
//! binding).

mod area;
mod card;
mod completions;
mod connection;
mod device;
mod domain;
mod error;
mod exchange;
mod ffi;
mod filter;
pub mod fuzzing;
mod ledger;
mod link;
mod link_state;
mod memory;
mod offer;
mod peer;
mod profile;
mod queue_pair;
mod sleep;
mod slots;
mod transport;
mod wire;

pub use device::{Gid, Port, ports};
pub use error::VerbsError;
pub use filter::{DeviceFilter, FilterError};
pub use link::{Counts, VerbsLink};
pub use memory::{Adopted, Registry};
pub use offer::{Offer, VerbsConfig, describe_devices};
pub use transport::VerbsTransport;
