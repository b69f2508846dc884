//! The driver's functions, as its library has them.
//!
//! Results are plain numbers here. cudarc's own functions return an enumeration, which a newer
//! driver's code is no value of: that would be undefined behaviour. Of cudarc, only the types and
//! constants are used, and that it finds the library.

use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction,
    CUipcMemHandle, CUmodule, CUpointer_attribute, CUstream, CUuuid,
};

/// What every function returns: 0, or the driver's code.
pub(crate) type Code = c_int;

/// `CUmemAllocationProp`, with numbers in place of its enumerations: the driver writes it.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Properties {
    kind: c_uint,
    /// `CUmemAllocationHandleType`, by which it can be exported: a mask.
    pub(crate) handle_kinds: c_uint,
    /// Where it is: what kind of place, and which.
    location: [c_int; 2],
    meta: usize,
    flags: [c_uchar; 8],
}

impl Properties {
    /// Memory of a device, with these kinds of handles.
    pub(crate) const fn of_device(device: CUdevice, handle_kinds: u32) -> Self {
        const PINNED: c_uint = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED as c_uint;
        let (location, meta, flags) = ([DEVICE, device], 0, [0; 8]);
        Self { kind: PINNED, handle_kinds, location, meta, flags }
    }
}

/// `CUmulticastObjectProp`: the driver reads it.
#[repr(C)]
pub(crate) struct MulticastProperties {
    devices: c_uint,
    pub(crate) bytes: usize,
    handle_kinds: u64,
    flags: u64,
}

impl MulticastProperties {
    /// Of an object of so many bytes for so many devices.
    pub(crate) fn new(devices: usize, bytes: usize, handle_kinds: u32) -> Self {
        let devices = c_uint::try_from(devices).unwrap_or(c_uint::MAX);
        Self { devices, bytes, handle_kinds: handle_kinds.into(), flags: 0 }
    }
}

const DEVICE: c_int = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as c_int;

/// `CUmemAccessDesc`: which device may do what. Its layout, too, is the same in all versions.
#[repr(C)]
pub(crate) struct Access {
    /// A device, and its number.
    location: [c_int; 2],
    flags: c_uint,
}

impl Access {
    /// A device may read and write.
    pub(crate) const fn of(device: CUdevice) -> Self {
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE as c_uint;
        Self { location: [DEVICE, device], flags }
    }
}

macro_rules! functions {
    ($(#[$about:meta])* struct $Functions:ident;
     $(fn $name:ident($($argument:ty),* $(,)?);)*) => {
        $(#[$about])*
        #[allow(non_snake_case, reason = "the driver's names")]
        #[derive(Debug)]
        pub(crate) struct $Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> Code,)*
        }

        impl $Functions {
            /// Looks all of them up.
            ///
            /// # Errors
            /// The first one that the library lacks.
            fn find() -> Result<Self, &'static str> {
                // SAFETY: the library is present: the caller has asked.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        // SAFETY: the type is that of the function of this name in cuda.h, of which
                        // the driver keeps every version; enumerations that it writes are numbers.
                        let found = unsafe { library.get(name.as_bytes()) };
                        *found.map_err(|_| name)?
                    },)*
                })
            }
        }
    };
}

// What every call needs to find in the library. The driver is backward compatible: a newer one has
// them all.
functions! {
    /// The addresses of the functions that this crate calls, but for the few that a driver may
    /// lack.
    struct Functions;
    fn cuInit(c_uint);
    fn cuDriverGetVersion(*mut c_int);
    fn cuGetErrorName(Code, *mut *const c_char);
    fn cuDeviceGetCount(*mut c_int);
    fn cuDeviceGet(*mut CUdevice, c_int);
    fn cuDeviceGetName(*mut c_char, c_int, CUdevice);
    fn cuDeviceGetUuid_v2(*mut CUuuid, CUdevice);
    fn cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
    fn cuDeviceCanAccessPeer(*mut c_int, CUdevice, CUdevice);
    fn cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(CUdevice);
    fn cuCtxPushCurrent_v2(CUcontext);
    fn cuCtxPopCurrent_v2(*mut CUcontext);
    fn cuCtxEnablePeerAccess(CUcontext, c_uint);
    fn cuMemAlloc_v2(*mut CUdeviceptr, usize);
    fn cuMemFree_v2(CUdeviceptr);
    fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    fn cuMemFreeHost(*mut c_void);
    fn cuMemHostGetDevicePointer_v2(*mut CUdeviceptr, *mut c_void, c_uint);
    fn cuMemGetAddressRange_v2(*mut CUdeviceptr, *mut usize, CUdeviceptr);
    fn cuPointerGetAttribute(*mut c_void, CUpointer_attribute, CUdeviceptr);
    fn cuMemcpyAsync(CUdeviceptr, CUdeviceptr, usize, CUstream);
    fn cuMemcpyHtoD_v2(CUdeviceptr, *const c_void, usize);
    fn cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr, usize);
    fn cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    fn cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    fn cuMemsetD8_v2(CUdeviceptr, c_uchar, usize);
    fn cuIpcGetMemHandle(*mut CUipcMemHandle, CUdeviceptr);
    fn cuIpcOpenMemHandle_v2(*mut CUdeviceptr, CUipcMemHandle, c_uint);
    fn cuIpcCloseMemHandle(CUdeviceptr);
    fn cuMemCreate(*mut u64, usize, *const Properties, u64);
    fn cuMemRetainAllocationHandle(*mut u64, *mut c_void);
    fn cuMemGetAllocationPropertiesFromHandle(*mut Properties, u64);
    fn cuMemExportToShareableHandle(*mut c_void, u64, c_uint, u64);
    fn cuMemImportFromShareableHandle(*mut u64, *mut c_void, c_uint);
    fn cuMemRelease(u64);
    fn cuMemAddressReserve(*mut CUdeviceptr, usize, usize, CUdeviceptr, u64);
    fn cuMemAddressFree(CUdeviceptr, usize);
    fn cuMemMap(CUdeviceptr, usize, usize, u64, u64);
    fn cuMemUnmap(CUdeviceptr, usize);
    fn cuMemSetAccess(CUdeviceptr, usize, *const Access, usize);
    fn cuStreamCreate(*mut CUstream, c_uint);
    fn cuStreamDestroy_v2(CUstream);
    fn cuStreamQuery(CUstream);
    fn cuStreamSynchronize(CUstream);
    fn cuStreamWaitEvent(CUstream, CUevent, c_uint);
    fn cuStreamIsCapturing(CUstream, *mut c_uint);
    fn cuEventCreate(*mut CUevent, c_uint);
    fn cuEventRecord(CUevent, CUstream);
    fn cuEventQuery(CUevent);
    fn cuEventElapsedTime(*mut f32, CUevent, CUevent);
    fn cuEventDestroy_v2(CUevent);
    fn cuModuleLoadDataEx(*mut CUmodule, *const c_void, c_uint, *mut c_int, *mut *mut c_void);
    fn cuModuleUnload(CUmodule);
    fn cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    fn cuLaunchKernel(
        CUfunction,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        CUstream,
        *mut *mut c_void,
        *mut *mut c_void,
    );
}

functions! {
    /// What only multicast needs, since CUDA 12.1.
    struct MulticastFunctions;
    fn cuMulticastGetGranularity(*mut usize, *const MulticastProperties, c_uint);
    fn cuMulticastCreate(*mut u64, *const MulticastProperties);
    fn cuMulticastAddDevice(u64, CUdevice);
    fn cuMulticastBindMem(u64, usize, u64, usize, usize, u64);
    fn cuMulticastUnbind(u64, CUdevice, usize, usize);
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Looks the functions up, before anything is called. The library must be present.
///
/// # Errors
/// The first one that it lacks.
pub(crate) fn load() -> Result<(), &'static str> {
    if FUNCTIONS.get().is_none() {
        let found = Functions::find()?;
        // Another thread may have been faster, with the same.
        let _ = FUNCTIONS.set(found);
    }
    Ok(())
}

/// The functions: only [`crate::Driver::find`] gives what calls are made with, and loads them.
pub(crate) fn functions() -> &'static Functions {
    FUNCTIONS.get().expect("the driver was found before anything was called")
}

/// The functions for multicast. The driver was found.
///
/// # Errors
/// The first one that its library lacks.
pub(crate) fn multicast() -> Result<&'static MulticastFunctions, &'static str> {
    static FOUND: OnceLock<Result<MulticastFunctions, &'static str>> = OnceLock::new();
    FOUND.get_or_init(MulticastFunctions::find).as_ref().map_err(|missing| *missing)
}
