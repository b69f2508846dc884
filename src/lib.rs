//! Collective communication for training large models: every rank's gradients summed on every
//! rank, over TCP, RDMA and shared memory, by the algorithm that fits.
//!
//! ```no_run
//! use unisum::{Communicator, ReduceOp};
//!
//! # fn main() -> Result<(), unisum::Error> {
//! let communicator = Communicator::from_environment()?; // torchrun, mpirun, srun, UNISUM_RANK …
//! let mut gradients = communicator.allocate::<f32>(1 << 20)?; // peers on this host map it
//! gradients.fill(communicator.rank() as f32);
//! communicator.all_reduce(&mut gradients, ReduceOp::Average)?;
//! # Ok(())
//! # }
//! ```
//!
//! The layers, from the caller down: [`Communicator`] numbers calls and turns failures into
//! errors; the engine executes a rank's plan (crate `unisum-algorithms`) over links (crate
//! `unisum-link` and one crate per transport). ARCHITECTURE.md has the picture.

#[cfg(not(any(feature = "tcp", feature = "shm", feature = "verbs")))]
compile_error!("unisum needs at least one of the features `tcp`, `shm` and `verbs`");

mod agreement;
mod alone;
mod background;
mod batch;
pub mod buckets;
mod buffer;
mod builder;
mod callbacks;
mod choice;
mod collective;
mod communicator;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod groups;
pub mod interrupt;
mod judgement;
pub mod local;
mod member;
mod membership;
mod memory;
mod mesh;
mod messenger;
mod programs;
mod ready;
mod reduction;
mod runner;
mod settings;
mod store;
mod trial;
mod tunings;
mod turns;
mod version;
mod warning;
mod wiring;
mod work;

pub use buckets::LossScaler;
pub use buffer::Buffer;
pub use builder::Builder;
pub use collective::{Apart, Buffers, Collective, InPlace, Owned};
pub use communicator::Communicator;
pub use error::{Error, ErrorKind};
pub use mesh::Mesh;
pub use messenger::{Message, Messenger};
pub use reduction::{Outcome, Reduction};
pub use settings::{ByteSizeError, parse_bytes};
pub use store::Store;
pub use unisum_kernels::{Bool, CustomOp, Dtype, Element, ReduceOp, f8e4m3, f8e5m2};
pub use unisum_link::Rank;
pub use work::Work;

/// The names of all algorithms, as [`Communicator::set_algorithm`] takes them: those of the
/// all-reduce first, then those that only other collectives have.
pub fn algorithms() -> Vec<&'static str> {
    let mut names = Vec::new();
    for kind in unisum_link::Collective::ALL {
        for name in algorithms_of(kind) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// The names of the algorithms that a kind of collective has.
fn algorithms_of(kind: unisum_link::Collective) -> Vec<&'static str> {
    let list = unisum_algorithms::algorithms(unisum_control::plan_of(kind, 0));
    list.iter().map(|algorithm| algorithm.name()).collect()
}

/// The transports that this build has, as `UNISUM_TRANSPORT` takes them.
pub fn transports() -> Vec<&'static str> {
    let known = [
        ("tcp", cfg!(feature = "tcp")),
        ("shm", cfg!(feature = "shm")),
        ("verbs", cfg!(feature = "verbs")),
    ];
    known.into_iter().filter_map(|(name, built)| built.then_some(name)).collect()
}

/// The RDMA devices of this host, a line for each port: its state, firmware, GID and MTU, or why it
/// can't be used. Opens the devices. Empty where there are none or this build has no `verbs`.
pub fn rdma_devices() -> Vec<String> {
    #[cfg(feature = "verbs")]
    return unisum_verbs::describe_devices();
    #[cfg(not(feature = "verbs"))]
    Vec::new()
}

/// The instruction set that the reduction kernels use on this machine.
pub fn isa() -> &'static str {
    unisum_kernels::isa()
}

/// The README's example, compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
