//! The InfiniBand verbs transport: RDMA over InfiniBand and RoCE.
//!
//! libibverbs is opened at run time ([`Offer::new`] says if it is missing): nothing of it is
//! needed to build or to start a program. Every rank has reliable connections to all of its peers,
//! on up to four devices. Data is written by the sender's device into the receiver's memory:
//! straight to where it belongs if that is registered, else to slots ([`Registry`]).
//!
//! The crate uses `unisum-link` and `unisum-kernels`. Start at [`Offer`] and [`VerbsLink`], then
//! `peer` (what two ranks owe each other), `wire` (what they say) and `ffi` (the binding).

mod area;
mod card;
mod completions;
mod desk;
mod device;
mod domain;
mod error;
mod ffi;
mod filter;
pub mod fuzzing;
mod lane;
mod link;
mod memory;
mod offer;
mod peer;
mod profile;
mod queue_pair;
mod sleep;
mod slots;
mod wire;

pub use device::{Gid, Port, ports};
pub use error::VerbsError;
pub use filter::{DeviceFilter, FilterError};
pub use link::{Counts, VerbsLink};
pub use memory::{Adopted, Registry};
pub use offer::{Offer, VerbsConfig, describe_devices};
