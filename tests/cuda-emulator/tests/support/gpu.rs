//! The driver's calls that the tests make, through cudarc.

use std::ffi::{CString, c_char, c_void};
use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    self, CUcontext, CUdeviceptr, CUevent, CUfunction, CUipcEventHandle, CUipcMemHandle, CUmodule,
    CUresult, CUstream,
};

fn check(result: CUresult, what: &str) {
    assert_eq!(result, CUresult::CUDA_SUCCESS, "{what}");
}

/// A value of which every bit pattern is valid.
pub(crate) trait Fill: Copy + Default {}

impl Fill for u8 {}
impl Fill for u32 {}
impl Fill for u64 {}
impl Fill for f32 {}

/// A device with a stream.
pub(crate) struct Gpu {
    pub(crate) ordinal: i32,
    pub(crate) context: CUcontext,
    pub(crate) stream: CUstream,
}

/// A parameter of a kernel: its bytes.
pub(crate) struct Param(pub(crate) Vec<u8>);

impl From<u64> for Param {
    fn from(value: u64) -> Self {
        Self(value.to_le_bytes().to_vec())
    }
}

impl From<u32> for Param {
    fn from(value: u32) -> Self {
        Self(value.to_le_bytes().to_vec())
    }
}

/// A kernel, with the module that it is of.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) module: CUmodule,
    pub(crate) function: CUfunction,
}

impl Gpu {
    /// Retains a device's context, makes it current, and makes a stream that does not block.
    pub(crate) fn open(ordinal: i32) -> Self {
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the driver writes to variables of its types; here and below, the emulator is
        // loaded, and all pointers are to what the driver expects.
        check(unsafe { sys::cuInit(0) }, "cuInit");
        // SAFETY: as above.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, ordinal) };
        check(result, "cuDevicePrimaryCtxRetain");
        // SAFETY: as above.
        check(unsafe { sys::cuCtxSetCurrent(context) }, "cuCtxSetCurrent");
        // SAFETY: as above.
        check(unsafe { sys::cuStreamCreate(&raw mut stream, 1) }, "cuStreamCreate");
        Self { ordinal, context, stream }
    }

    /// Makes the context current on this thread.
    pub(crate) fn bind(&self) {
        // SAFETY: the context is retained.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "cuCtxSetCurrent");
    }

    /// Destroys the stream and releases the context.
    pub(crate) fn close(self) {
        // SAFETY: the stream is this one's, and not used any more.
        unsafe { sys::cuStreamDestroy_v2(self.stream) };
        // SAFETY: the context was retained by `open`.
        check(unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.ordinal) }, "release");
    }

    pub(crate) fn try_allocate(&self, bytes: usize) -> Result<CUdeviceptr, CUresult> {
        let mut address = 0;
        // SAFETY: the driver writes to a variable of its type.
        match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) } {
            CUresult::CUDA_SUCCESS => Ok(address),
            result => Err(result),
        }
    }

    pub(crate) fn allocate(&self, bytes: usize) -> CUdeviceptr {
        self.try_allocate(bytes).unwrap()
    }

    pub(crate) fn free(&self, address: CUdeviceptr) -> CUresult {
        // SAFETY: the driver says whether the address is right.
        unsafe { sys::cuMemFree_v2(address) }
    }

    /// Device memory that holds the values, written by the stream when this returns.
    pub(crate) fn upload<T: Fill>(&self, values: &[T]) -> CUdeviceptr {
        let bytes = size_of_val(values);
        let address = self.allocate(bytes);
        let from = values.as_ptr().cast::<c_void>();
        // SAFETY: `values` has so many bytes; pageable memory is read before the call returns.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(address, from, bytes, self.stream) };
        check(result, "cuMemcpyHtoDAsync");
        self.synchronize();
        address
    }

    pub(crate) fn try_download<T: Fill>(
        &self,
        address: CUdeviceptr,
        count: usize,
    ) -> Result<Vec<T>, CUresult> {
        let mut values = vec![T::default(); count];
        let (to, bytes) = (values.as_mut_ptr().cast::<c_void>(), count * size_of::<T>());
        // SAFETY: `values` has so many bytes; pageable memory is written before the call returns.
        match unsafe { sys::cuMemcpyDtoHAsync_v2(to, address, bytes, self.stream) } {
            CUresult::CUDA_SUCCESS => Ok(values),
            result => Err(result),
        }
    }

    pub(crate) fn download<T: Fill>(&self, address: CUdeviceptr, count: usize) -> Vec<T> {
        self.try_download(address, count).unwrap()
    }

    pub(crate) fn try_synchronize(&self) -> CUresult {
        // SAFETY: the stream is this one's.
        unsafe { sys::cuStreamSynchronize(self.stream) }
    }

    pub(crate) fn synchronize(&self) {
        check(self.try_synchronize(), "cuStreamSynchronize");
    }

    pub(crate) fn try_load(&self, text: &str) -> Result<CUmodule, CUresult> {
        let (mut module, text) = (std::ptr::null_mut(), CString::new(text).unwrap());
        // SAFETY: the image is a C string, as PTX has to be.
        match unsafe { sys::cuModuleLoadData(&raw mut module, text.as_ptr().cast()) } {
            CUresult::CUDA_SUCCESS => Ok(module),
            result => Err(result),
        }
    }

    /// Loads a kernel from PTX.
    pub(crate) fn kernel(&self, text: &str, name: &str) -> Kernel {
        self.kernel_of(self.try_load(text).unwrap(), name)
    }

    pub(crate) fn kernel_of(&self, module: CUmodule, name: &str) -> Kernel {
        let (mut function, name) = (std::ptr::null_mut(), CString::new(name).unwrap());
        // SAFETY: the name is a C string.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        check(found, "cuModuleGetFunction");
        Kernel { module, function }
    }

    pub(crate) fn unload(&self, kernel: Kernel) {
        // SAFETY: the module is loaded.
        check(unsafe { sys::cuModuleUnload(kernel.module) }, "cuModuleUnload");
    }

    pub(crate) fn try_launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: &mut [Param],
    ) -> CUresult {
        let pointers = params.iter_mut().map(|param| param.0.as_mut_ptr().cast::<c_void>());
        let mut pointers: Vec<*mut c_void> = pointers.collect();
        let (function, params) = (kernel.function, pointers.as_mut_ptr());
        let extra = std::ptr::null_mut();
        // SAFETY: there is a pointer for each parameter of the kernel, as the test promises.
        unsafe {
            sys::cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                self.stream,
                params,
                extra,
            )
        }
    }

    pub(crate) fn launch(&self, kernel: Kernel, blocks: u32, threads: u32, params: &mut [Param]) {
        check(self.try_launch(kernel, blocks, threads, params), "cuLaunchKernel");
    }

    pub(crate) fn fill(&self, address: CUdeviceptr, value: u8, bytes: usize) {
        // SAFETY: the driver checks the range.
        let result = unsafe { sys::cuMemsetD8Async(address, value, bytes, self.stream) };
        check(result, "cuMemsetD8Async");
    }

    // Between processes.

    pub(crate) fn export(&self, address: CUdeviceptr) -> Result<[u8; 64], CUresult> {
        let mut handle = MaybeUninit::<[u8; 64]>::zeroed();
        // SAFETY: a handle is 64 bytes.
        match unsafe { sys::cuIpcGetMemHandle(handle.as_mut_ptr().cast(), address) } {
            CUresult::CUDA_SUCCESS => {
                // SAFETY: 64 bytes were zero before, and any bytes are valid.
                Ok(unsafe { handle.assume_init() })
            }
            result => Err(result),
        }
    }

    pub(crate) fn import(&self, handle: [u8; 64]) -> Result<CUdeviceptr, CUresult> {
        let mut address = 0;
        let handle = CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        // SAFETY: the driver checks the handle.
        match unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, 1) } {
            CUresult::CUDA_SUCCESS => Ok(address),
            result => Err(result),
        }
    }

    pub(crate) fn close_import(&self, address: CUdeviceptr) -> CUresult {
        // SAFETY: the driver checks the address.
        unsafe { sys::cuIpcCloseMemHandle(address) }
    }

    pub(crate) fn event(&self, flags: u32) -> CUevent {
        let mut event = std::ptr::null_mut();
        // SAFETY: the driver writes to a variable of its type.
        check(unsafe { sys::cuEventCreate(&raw mut event, flags) }, "cuEventCreate");
        event
    }

    pub(crate) fn record(&self, event: CUevent) {
        // SAFETY: the event exists.
        check(unsafe { sys::cuEventRecord(event, self.stream) }, "cuEventRecord");
    }

    pub(crate) fn wait(&self, event: CUevent) {
        // SAFETY: the event exists.
        check(unsafe { sys::cuStreamWaitEvent(self.stream, event, 0) }, "cuStreamWaitEvent");
    }

    pub(crate) fn destroy(&self, event: CUevent) {
        // SAFETY: the event exists and is not used any more.
        check(unsafe { sys::cuEventDestroy_v2(event) }, "cuEventDestroy");
    }

    pub(crate) fn export_event(&self, event: CUevent) -> [u8; 64] {
        let mut handle = [0_u8; 64];
        // SAFETY: a handle is 64 bytes.
        let result = unsafe { sys::cuIpcGetEventHandle(handle.as_mut_ptr().cast(), event) };
        check(result, "cuIpcGetEventHandle");
        handle
    }

    pub(crate) fn import_event(&self, handle: [u8; 64]) -> CUevent {
        let mut event = std::ptr::null_mut();
        let handle = CUipcEventHandle { reserved: handle.map(|byte| byte as c_char) };
        // SAFETY: the driver checks the handle.
        let result = unsafe { sys::cuIpcOpenEventHandle(&raw mut event, handle) };
        check(result, "cuIpcOpenEventHandle");
        event
    }
}
