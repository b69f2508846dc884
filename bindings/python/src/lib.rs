//! The native part of unisum's Python package: what `unisum._unisum` has. It is thin: tensors
//! become memory, errors become exceptions, blocking calls leave the interpreter to others. What a
//! program sees is written in Python on top of it (`bindings/python/python/unisum`).

mod array;
mod buckets;
mod communicator;
mod device;
mod device_buckets;
mod dlpack;
mod elements;
mod errors;
mod messenger;
mod observing;
mod operands;
mod scaler;
mod sharded;
mod staging;
mod store;
mod tensor;
mod work;

use pyo3::prelude::*;

/// The native module.
#[pymodule]
mod _unisum {
    #[pymodule_export]
    use super::array::Array;
    #[pymodule_export]
    use super::buckets::{Buckets, Report, make_buckets};
    #[pymodule_export]
    use super::communicator::{Communicator, connect};
    #[pymodule_export]
    use super::device::{Device, cuda_devices};
    #[pymodule_export]
    use super::device_buckets::{DeviceArray, DeviceBuckets, make_device_buckets};
    #[pymodule_export]
    use super::messenger::Messenger;
    #[pymodule_export]
    use super::scaler::LossScaler;
    #[pymodule_export]
    use super::sharded::{ShardState, Weights, make_weights, shard_gradient, shard_of};
    #[pymodule_export]
    use super::work::{Work, next_completed};
}
