//! CUDA devices of one host: memory that other processes open, streams, and the kernels that reduce
//! on a device.
//!
//! The driver's library is found at run time ([`Driver::find`] says why there is none); neither
//! building nor starting a program needs it. The crate knows devices and addresses, but no ranks,
//! plans or collectives: those are the facade's. It uses `unisum-kernels` for the names of types
//! and operations and for the kernels' images.
//!
//! Start at [`Device`], then [`Allocation`] and [`Opened`] for memory, [`Mapped`] and [`Window`]
//! for what programs have mapped themselves, [`Multicast`] for one address of several devices,
//! [`Stream`] and [`Kernels`] for work.

mod device;
mod driver;
mod error;
mod functions;
mod ipc;
mod kernels;
mod mapped;
mod memory;
mod multicast;
mod stream;

pub use device::{Device, DeviceError, Reach};
pub use driver::{Absent, Driver, describe};
pub use error::CudaError;
pub use ipc::{Handle, Opened, opened, unclosed};
pub use kernels::Kernels;
pub use mapped::{Imported, Mapped, Ways, Window};
pub use memory::{Allocation, Origin, Pinned, PlaceError, allocations};
pub use multicast::{Bound, Multicast};
pub use stream::{Event, Stream};
