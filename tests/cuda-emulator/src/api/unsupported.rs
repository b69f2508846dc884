//! Entry points that libraries look for, and that always say that they are not supported.

use crate::driver::codes::Code;

macro_rules! not_supported {
    ($($name:ident)*) => {$(
        // SAFETY: the process loads one driver, which defines this name once. Arguments that the
        // caller passes are not looked at, which the calling convention of C allows.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the driver's name")]
        extern "C" fn $name() -> i32 {
            Code::NOT_SUPPORTED.0
        }
    )*};
}

not_supported! {
    cuMemAllocManaged cuMemPrefetchAsync cuMemAdvise cuStreamAttachMemAsync
    cuMemGetAccess
    cuMulticastBindAddr
    cuMemPoolCreate cuMemPoolDestroy cuMemPoolSetAccess cuMemPoolGetAccess
    cuMemPoolExportToShareableHandle cuMemPoolImportFromShareableHandle
    cuCtxCreate_v2 cuCtxCreate_v3 cuCtxDestroy_v2 cuDevicePrimaryCtxReset_v2
    cuStreamBatchMemOp_v2 cuStreamAddCallback cuFuncGetName
    cuGraphCreate cuGraphDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload
    cuGraphExecDestroy
    cuImportExternalMemory cuDestroyExternalMemory cuExternalMemoryGetMappedBuffer
    cuMemGetHandleForAddressRange cuFlushGPUDirectRDMAWrites
    cuOccupancyMaxPotentialBlockSizeWithFlags cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveClusters cuOccupancyMaxPotentialClusterSize
}
