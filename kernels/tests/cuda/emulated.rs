//! A device of an emulated driver.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use libloading::Library;
use unisum_kernels::cuda::{FoldTask, TEXT};

use super::device::{Device, Grid};
use crate::harness::Misaligned;

/// The functions of a driver that are used here, by their names in the library.
macro_rules! driver {
    ($($name:ident($($argument:ty),*);)*) => {
        #[expect(non_snake_case, reason = "the names of the driver")]
        struct Driver {
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Driver {
            fn load(library: &Library) -> Self {
                Self {$(
                    // SAFETY: the driver documents this type.
                    $name: *unsafe { library.get(stringify!($name)) }.unwrap(),
                )*}
            }
        }
    };
}

driver! {
    cuInit(c_uint);
    cuDevicePrimaryCtxRetain(*mut usize, c_int);
    cuCtxSetCurrent(usize);
    cuModuleLoadData(*mut usize, *const c_void);
    cuModuleGetFunction(*mut usize, usize, *const i8);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemcpyHtoD_v2(u64, *const c_void, usize);
    cuMemcpyDtoH_v2(*mut c_void, u64, usize);
    cuLaunchKernel(
        usize, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, usize, *mut *mut c_void,
        *mut *mut c_void
    );
    cuCtxSynchronize();
}

pub(crate) struct Emulated {
    driver: Driver,
    context: usize,
    module: usize,
    _library: Library,
}

/// Calls a function of the driver, which must succeed.
macro_rules! call {
    ($driver:expr, $name:ident($($argument:expr),*)) => {{
        // SAFETY: handles and addresses are the driver's, and pointers lead to as much as it takes.
        let result = unsafe { ($driver.$name)($($argument),*) };
        assert_eq!(result, 0, stringify!($name));
    }};
}

impl Emulated {
    pub(crate) fn get() -> &'static Self {
        static EMULATED: OnceLock<Emulated> = OnceLock::new();
        let device = EMULATED.get_or_init(Self::new);
        // Each thread has a current context of its own.
        call!(device.driver, cuCtxSetCurrent(device.context));
        device
    }

    fn new() -> Self {
        // SAFETY: nothing runs when the library is loaded.
        let library = unsafe { Library::new(cuda_emulator::library_dir().join("libcuda.so.1")) };
        let library = library.unwrap();
        let driver = Driver::load(&library);
        let (mut context, mut module) = (0, 0);
        call!(driver, cuInit(0));
        call!(driver, cuDevicePrimaryCtxRetain(&mut context, 0));
        call!(driver, cuCtxSetCurrent(context));
        call!(driver, cuModuleLoadData(&mut module, TEXT.as_ptr().cast()));
        Self { driver, context, module, _library: library }
    }
}

/// Where in its allocation a memory begins.
fn offset(memory: &mut Misaligned) -> usize {
    memory.pointer() as usize % 16
}

impl Device for Emulated {
    /// The allocation ends where the memory ends: the driver reports what is written behind it.
    fn lend(&self, memory: &mut Misaligned) -> u64 {
        let (mut address, offset) = (0, offset(memory));
        let bytes: Vec<u8> = memory.values();
        call!(self.driver, cuMemAlloc_v2(&mut address, (offset + bytes.len()).max(1)));
        let start = address + offset as u64;
        call!(self.driver, cuMemcpyHtoD_v2(start, bytes.as_ptr().cast(), bytes.len()));
        start
    }

    fn take_back(&self, memory: &mut Misaligned, address: u64) {
        let (bytes, offset) = (memory.values::<u8>().len(), offset(memory) as u64);
        call!(self.driver, cuMemcpyDtoH_v2(memory.pointer().cast(), address, bytes));
        call!(self.driver, cuMemFree_v2(address - offset));
    }

    unsafe fn fold(&self, kernel: &str, grid: Grid, task: &FoldTask) {
        let (mut function, name) = (0, CString::new(kernel).unwrap());
        call!(self.driver, cuModuleGetFunction(&mut function, self.module, name.as_ptr().cast()));
        let mut parameters = [(&raw const *task).cast_mut().cast::<c_void>()];
        let Grid(blocks, threads) = grid;
        call!(
            self.driver,
            cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                0,
                parameters.as_mut_ptr(),
                null_mut()
            )
        );
        call!(self.driver, cuCtxSynchronize());
    }
}
