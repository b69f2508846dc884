//! Collective communication for training large models: reduces every rank's gradients on all ranks,
//! over TCP, RDMA and shared memory, with the algorithm that suits the size and the machines.
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
//! A debug build of a program leaves its dependencies unoptimised, and collectives hundreds of
//! times slower. This in `Cargo.toml` keeps them fast:
//!
//! ```toml
//! [profile.dev.package."*"]
//! opt-level = 3
//! ```
//!
//! The layers, from the caller down: [`Communicator`] numbers calls and turns failures into
//! errors; the engine executes a rank's plan (crate `unisum-algorithms`) over links (crate
//! `unisum-link` and one crate per transport). ARCHITECTURE.md has the picture.

#[cfg(not(any(feature = "tcp", feature = "shm", feature = "verbs")))]
compile_error!("unisum needs at least one of the features `tcp`, `shm` and `verbs`");

mod autotuning;
pub mod buckets;
mod collective;
mod communicator;
#[cfg(feature = "cuda")]
mod device;
mod epoch_log;
mod error;
mod execution;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod interrupt;
pub mod local;
mod memory;
mod messenger;
mod settings;
mod version;
mod wiring;

pub use autotuning::selector::AlgorithmRange;
pub use buckets::LossScaler;
pub use collective::raw::RawBuffers;
pub use collective::reduction::{Outcome, Reduction};
pub use collective::{Buffers, Collective, InPlace, OutOfPlace, Owned, OwnedRaw};
pub use communicator::Communicator;
pub use communicator::builder::Builder;
pub use communicator::elastic::{Elastic, View};
pub use communicator::mesh::Mesh;
#[cfg(feature = "cuda")]
pub use device::{
    DeviceBuffer, DeviceCommunicator, DeviceEvent, DeviceRoute, DeviceStream, RawDeviceBuffers,
};
pub use error::{Error, ErrorKind, MismatchedCall};
pub use execution::stats::{LinkStats, PeerStats, RunningCall, Stats};
pub use execution::work::Work;
pub use memory::buffer::Buffer;
pub use messenger::{Message, Messenger};
pub use settings::{ByteSizeError, parse_bytes};
pub use unisum_events as events;
pub use unisum_kernels::{Bool, CustomOp, Dtype, Element, ReduceOp, f8e4m3, f8e5m2};
pub use unisum_link as link;
pub use unisum_link::Rank;
pub use wiring::store::Store;
pub use wiring::{Description, MeasuredCost, RankDescription, Rates};

/// The names of all algorithms, as [`Communicator::set_algorithm`] takes them: first those of the
/// all-reduce, then those that only other collectives have.
pub fn algorithms() -> Vec<&'static str> {
    let mut names = Vec::new();
    for kind in unisum_link::CollectiveKind::ALL {
        for name in algorithms_of(kind) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// The names of the algorithms of a kind of collective.
fn algorithms_of(kind: unisum_link::CollectiveKind) -> Vec<&'static str> {
    let list = unisum_algorithms::algorithms(unisum_control::plan_of(kind, 0));
    list.iter().map(|algorithm| algorithm.name()).collect()
}

/// The transports in this build, as `UNISUM_TRANSPORT` takes them.
pub fn transports() -> Vec<&'static str> {
    wiring::builtin::built()
}

/// The RDMA devices of this host, one line for each port: its state, firmware, GID and MTU, or why
/// it cannot be used. Opens the devices. Empty if there are none or this build has no `verbs`.
pub fn rdma_devices() -> Vec<String> {
    wiring::builtin::describe_devices()
}

/// The CUDA driver of this host, for people: its version and devices, or why there is none. Starts
/// the driver.
pub fn cuda_driver() -> String {
    #[cfg(feature = "cuda")]
    return unisum_cuda_ipc::describe();
    #[cfg(not(feature = "cuda"))]
    "not in this build".into()
}

/// How many CUDA devices this process sees. Starts the driver.
///
/// # Errors
/// [`ErrorKind::Configuration`] if there are none, which says why.
pub fn cuda_devices() -> Result<usize, Error> {
    #[cfg(feature = "cuda")]
    return unisum_cuda_ipc::Driver::find()
        .map(unisum_cuda_ipc::Driver::devices)
        .map_err(|absent| Error::new(ErrorKind::Configuration, absent.to_string()));
    #[cfg(not(feature = "cuda"))]
    Err(Error::new(ErrorKind::Configuration, "this build has no CUDA devices"))
}

/// The instruction set that the reduction kernels use on this machine.
pub fn isa() -> &'static str {
    unisum_kernels::isa()
}

/// The README's example, compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The same of the book's pages.
#[cfg(doctest)]
#[doc = include_str!("../docs/elastic.md")]
struct ElasticJobs;

#[cfg(doctest)]
#[doc = include_str!("../docs/observing.md")]
struct Observing;

#[cfg(doctest)]
#[doc = include_str!("../docs/design/transports.md")]
struct OwnTransports;

#[cfg(all(doctest, feature = "cuda"))]
#[doc = include_str!("../docs/cuda.md")]
struct Cuda;
