//! The structures of DLPack 1 that are read or written here (github.com/dmlc/dlpack).

use std::ffi::c_void;

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) number: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) dimensions: i32,
    pub(crate) data_type: DataType,
    pub(crate) shape: *const i64,
    pub(crate) strides: *const i64,
    pub(crate) byte_offset: u64,
}

/// `DLManagedTensor`, what a capsule called `dltensor` holds.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Managed {
    pub(crate) view: View,
    pub(crate) context: *mut c_void,
    pub(crate) deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLPackVersion`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// `DLPackExchangeAPI`: functions that a tensor's type offers for use without capsules.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ExchangeApi {
    pub(crate) version: Version,
    previous: *const Self,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    object_from_managed: *const c_void,
    pub(crate) view_of_object: Option<unsafe extern "C" fn(*mut c_void, *mut View) -> i32>,
    current_stream: *const c_void,
}

/// `kDLCPU`.
pub(crate) const CPU: i32 = 1;
/// `kDLCUDA`.
pub(crate) const CUDA: i32 = 2;
/// `kDLCUDAManaged`: memory that moves between host and devices.
pub(crate) const CUDA_MANAGED: i32 = 13;
/// `kDLCUDAHost`: pinned memory of the host.
pub(crate) const CUDA_HOST: i32 = 3;
