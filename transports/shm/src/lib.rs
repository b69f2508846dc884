//! unisum over shared memory between the processes of one host.
//!
//! Ranks that share a host join one sparse memfd. Each makes an [`Offer`]; whoever connects the job
//! exchanges the cards of all offers; [`Offer::join`] maps the memory (which proves that the ranks
//! are on one host), and [`Candidate::connect`] turns it into a [`ShmLink`]. Nothing is visible
//! outside the processes: no name under `/dev/shm`, no file, no port.
//!
//! What moves where:
//! * **registered memory** ([`Heap`]) is mapped by all: peers read and write it in place;
//! * **private memory** is *read* by its peers with `process_vm_readv(2)`, or copied through
//!   bounded staging slots where the kernel forbids that. Peers never write it: a late write after
//!   an abort would hit memory that its owner has long reused;
//! * **signals** are sequence numbers and counters in the mapping; sleepers wait on futexes.
//!
//! After a fork, the mapping is absent in the child (`MADV_DONTFORK`): buffers of the heap must not
//! be touched there, and dropping anything of this crate there does nothing.
//!
//! The crate uses `unisum-link` and `unisum-kernels`. Start at [`Offer`] and [`ShmLink`], then read
//! `layout` (what lies where in the mapping), `mailbox` (messages between two ranks) and `group`.

#[cfg(not(target_os = "linux"))]
compile_error!("unisum-shm needs Linux: memfd, futex, process_vm_readv");

mod card;
mod doorbell;
mod error;
mod ffi;
mod free_list;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod group;
mod heap;
mod heaps;
mod inbox;
mod join;
mod layout;
mod link;
mod mailbox;
mod mapping;
mod outbox;
mod spread;
mod transport;

pub use card::apart;
pub use error::ShmError;
pub use heap::{Block, Heap};
pub use heaps::Heaps;
pub use join::{Candidate, Offer};
pub use link::ShmLink;
pub use transport::{ShmConfig, ShmTransport};
