//! The transports that are built in, each as its feature says: no other place of this crate depends
//! on which they are.

mod barred;
#[cfg(feature = "shm")]
mod shm;
#[cfg(not(feature = "shm"))]
#[path = "without_shm.rs"]
mod shm;
#[cfg(feature = "tcp")]
mod tcp;
#[cfg(not(feature = "tcp"))]
#[path = "without_tcp.rs"]
mod tcp;
#[cfg(feature = "verbs")]
mod verbs;
#[cfg(not(feature = "verbs"))]
#[path = "without_verbs.rs"]
mod verbs;

pub(super) use barred::Barred;
pub(super) use shm::sharing;
pub(super) use tcp::{internet, prepare_listener};
pub(super) use verbs::rdma;
pub(crate) use verbs::{check_devices, describe_devices};

/// Names and whether they are in this build.
const BUILT_IN: [(&str, bool); 3] =
    [("tcp", tcp::IS_BUILT), ("shm", shm::IS_BUILT), ("verbs", verbs::IS_BUILT)];

/// The names that users may ask for, in this build or another.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.into_iter().map(|(name, _)| name)
}

/// The names of the transports in this build.
pub(crate) fn built() -> Vec<&'static str> {
    BUILT_IN.into_iter().filter_map(|(name, is_built)| is_built.then_some(name)).collect()
}

/// A transport's name for people.
pub(super) fn called(name: &str) -> &str {
    match name {
        "tcp" => "TCP",
        "shm" => "shared memory",
        "verbs" => "RDMA",
        name => name,
    }
}
