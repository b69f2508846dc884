//! The C interface of unisum: what `include/unisum.h` declares, which is made from this crate.
//!
//! Every function returns a status, and takes and gives *handles*: numbers that look like pointers,
//! are looked up in a table and never used again, so that a stale, foreign or NULL handle is a
//! status. Arguments are checked before the facade is called, panics are caught by one wrapper
//! ([`status::guard`]), and what went wrong is kept for the thread.
//!
//! What C promises, and no check can find out: pointers to as much readable or writable memory as
//! the call says, texts that end in a NUL byte, and that nobody else uses buffers during a call.

#![allow(
    non_camel_case_types,
    reason = "the names are those of the C header, which is made of them"
)]
#![allow(
    clippy::missing_safety_doc,
    reason = "the promises that C makes are those of the crate's documentation, for all functions"
)]

pub mod buckets;
pub mod checkpoint;
pub mod collective;
pub mod communicator;
pub mod config;
pub mod device;
pub mod device_buckets;
pub mod elastic;
pub mod handles;
pub mod memory;
pub mod messenger;
pub mod observing;
pub mod reduction;
pub mod scaler;
pub mod shard_state;
pub mod sharded;
pub mod simple;
pub mod status;
pub mod types;
pub mod version;
pub mod work;
