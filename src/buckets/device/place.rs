//! Where a gradient lies on a device, for who can't be held to a borrow: bindings to other
//! languages.

use std::sync::Arc;

use unisum_kernels::Dtype;

use crate::DeviceBuffer;

/// The memory of a parameter's gradient on a device ([`DeviceBuckets::place`]), which stays
/// allocated while this lives, also when the buckets are gone.
///
/// When it may be touched is up to the program: as [`DeviceStep`] says.
///
/// [`DeviceBuckets::place`]: super::DeviceBuckets::place
/// [`DeviceStep`]: super::DeviceStep
#[derive(Clone, Debug)]
pub struct DevicePlace {
    pub(super) bucket: Arc<DeviceBuffer<u8>>,
    /// In bytes, within the bucket.
    pub(super) start: usize,
    pub(super) count: usize,
    pub(super) dtype: Dtype,
    pub(super) ordinal: usize,
}

impl DevicePlace {
    /// The address of the first element.
    pub fn address(&self) -> u64 {
        self.bucket.address() + self.start as u64
    }

    /// How many elements there are, back to back.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// The type of the elements.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The number of the device in this process.
    pub const fn ordinal(&self) -> usize {
        self.ordinal
    }
}
