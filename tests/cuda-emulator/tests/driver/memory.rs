//! Memory: bounds, kinds, and what is left.

use cudarc::driver::sys::{self, CUpointer_attribute, CUresult};

use crate::KERNELS;
use crate::support::{Gpu, leave, role, run};

fn attribute<T: Default>(attribute: CUpointer_attribute, address: u64) -> Result<T, CUresult> {
    let mut value = T::default();
    // SAFETY: the tests ask for attributes with the type that CUDA documents.
    match unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), attribute, address) } {
        CUresult::CUDA_SUCCESS => Ok(value),
        result => Err(result),
    }
}

#[test]
fn an_access_past_the_end_names_kernel_instruction_and_allocation() {
    let name = "memory::an_access_past_the_end_names_kernel_instruction_and_allocation";
    if role().is_none() {
        let ended = run(name, &[("DEVICES", "2")]);
        ended.assert_success();
        let words = ["error 700", "kernel copy", "block (2, 0, 0)", "thread (0, 0, 0)"];
        ended.assert_says(&words);
        ended.assert_says(&["st.global.u32", "offset 256 of an allocation of 256 bytes"]);
        return;
    }
    let (other, gpu) = (Gpu::open(1), Gpu::open(0));
    let copy = gpu.kernel(KERNELS, "copy");
    let (from, to) = (gpu.upload(&[7_u32; 65]), gpu.upload(&[0_u32; 64]));
    gpu.launch(copy, 2, 32, &mut [to.into(), from.into(), 64_u32.into()]);
    assert_eq!(gpu.download::<u32>(to, 64), [7; 64], "within the bounds");
    gpu.launch(copy, 3, 32, &mut [to.into(), from.into(), 65_u32.into()]);
    assert_eq!(gpu.try_synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    // The error stays, for everything of this context and for nothing else.
    assert_eq!(gpu.try_allocate(4), Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
    assert_eq!(gpu.try_download::<u32>(to, 1), Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
    other.bind();
    assert_eq!(other.download::<u32>(other.upload(&[5_u32]), 1), [5]);
    leave();
}

#[test]
fn addresses_that_are_not_there_are_refused() {
    let name = "memory::addresses_that_are_not_there_are_refused";
    if role().is_none() {
        let ended = run(name, &[]);
        ended.assert_success();
        ended.assert_says(&["error 700", "ld.global.u32", "is not pinned host memory"]);
        return;
    }
    let gpu = Gpu::open(0);
    let memory = gpu.upload(&[1_u32; 4]);
    assert_eq!(gpu.free(memory + 4), CUresult::CUDA_ERROR_INVALID_VALUE, "not its beginning");
    assert_eq!(gpu.free(memory), CUresult::CUDA_SUCCESS);
    assert_eq!(gpu.free(memory), CUresult::CUDA_ERROR_INVALID_VALUE, "twice");
    let stale = gpu.try_download::<u32>(memory, 1);
    assert_eq!(stale, Err(CUresult::CUDA_ERROR_INVALID_VALUE));
    let memory = gpu.upload(&[1_u32; 4]);
    let long = gpu.try_download::<u32>(memory, 5);
    assert_eq!(long, Err(CUresult::CUDA_ERROR_INVALID_VALUE), "longer than it is");
    // Memory of the host that is not pinned.
    let host = [3_u32; 4];
    let copy = gpu.kernel(KERNELS, "copy");
    let from = host.as_ptr().expose_provenance() as u64;
    gpu.launch(copy, 1, 4, &mut [memory.into(), from.into(), 4_u32.into()]);
    assert_eq!(gpu.try_synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    leave();
}

#[test]
fn a_misaligned_access_is_an_error_of_its_own() {
    let name = "memory::a_misaligned_access_is_an_error_of_its_own";
    if role().is_none() {
        run(name, &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let (memory, copy) = (gpu.upload(&[1_u32; 8]), gpu.kernel(KERNELS, "copy"));
    gpu.launch(copy, 1, 1, &mut [memory.into(), (memory + 2).into(), 1_u32.into()]);
    assert_eq!(gpu.try_synchronize(), CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
    leave();
}

#[test]
fn pinned_host_memory_is_accessible_and_found() {
    let name = "memory::pinned_host_memory_is_accessible_and_found";
    if role().is_none() {
        run(name, &[("LEAKS", "fail")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let mut pointer = std::ptr::null_mut();
    // SAFETY: the driver writes to a variable of its type.
    unsafe { sys::cuMemHostAlloc(&raw mut pointer, 16, 0) }.result().unwrap();
    let address = pointer.expose_provenance() as u64;
    let (from, copy) = (gpu.upload(&[1_u32, 2, 3, 4]), gpu.kernel(KERNELS, "copy"));
    gpu.launch(copy, 1, 4, &mut [address.into(), from.into(), 4_u32.into()]);
    gpu.synchronize();
    // SAFETY: four words were allocated and written.
    assert_eq!(unsafe { *pointer.cast::<[u32; 4]>() }, [1, 2, 3, 4]);
    let kind = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    assert_eq!(attribute::<u32>(kind, address), Ok(1));
    assert_eq!(attribute::<u32>(kind, from), Ok(2));
    let stack = (&raw const pointer).expose_provenance() as u64;
    assert_eq!(attribute::<u32>(kind, stack), Err(CUresult::CUDA_ERROR_INVALID_VALUE));
    // SAFETY: nothing uses the memory any more.
    unsafe { sys::cuMemFreeHost(pointer) }.result().unwrap();
    let mut own = vec![0_u32; 4];
    let (start, bytes) = (own.as_mut_ptr().cast(), 16);
    // SAFETY: the range is that of `own`, which lives until it is unregistered.
    unsafe { sys::cuMemHostRegister_v2(start, bytes, 0) }.result().unwrap();
    let twice = CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    // SAFETY: as above.
    assert_eq!(unsafe { sys::cuMemHostRegister_v2(start, bytes, 0) }, twice);
    let address = start.expose_provenance() as u64;
    gpu.launch(copy, 1, 4, &mut [address.into(), from.into(), 4_u32.into()]);
    gpu.synchronize();
    // SAFETY: as above.
    unsafe { sys::cuMemHostUnregister(start) }.result().unwrap();
    assert_eq!(own, [1, 2, 3, 4]);
    gpu.free(from);
    gpu.unload(copy);
    gpu.close();
    leave();
}

#[test]
fn attributes_and_ranges_describe_an_allocation() {
    let name = "memory::attributes_and_ranges_describe_an_allocation";
    if role().is_none() {
        run(name, &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(1);
    let (one, other) = (gpu.allocate(1000), gpu.allocate(1000));
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: the driver writes to variables of its types.
    let result = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, one + 999) };
    assert_eq!((result, base, bytes), (CUresult::CUDA_SUCCESS, one, 1000));
    // SAFETY: as above.
    let result = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, one + 1000) };
    assert_eq!(result, CUresult::CUDA_ERROR_NOT_FOUND);
    let id = CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
    let (first, second): (u64, u64) = (attribute(id, one).unwrap(), attribute(id, other).unwrap());
    assert_ne!(first, second);
    assert_eq!(attribute::<u64>(id, one + 5), Ok(first));
    let device = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    assert_eq!(attribute::<i32>(device, one), Ok(1));
    let exportable = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
    assert_eq!(attribute::<u32>(exportable, one), Ok(1));
    leave();
}

#[test]
fn pool_memory_can_not_be_exported() {
    let name = "memory::pool_memory_can_not_be_exported";
    if role().is_none() {
        run(name, &[("LEAKS", "fail")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let mut address = 0;
    // SAFETY: the driver writes to a variable of its type.
    unsafe { sys::cuMemAllocAsync(&raw mut address, 64, gpu.stream) }.result().unwrap();
    gpu.fill(address, 1, 64);
    assert_eq!(gpu.export(address), Err(CUresult::CUDA_ERROR_INVALID_VALUE));
    let exportable = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
    assert_eq!(attribute::<u32>(exportable, address), Ok(0));
    assert_eq!(gpu.download::<u8>(address, 64), [1; 64]);
    // SAFETY: nothing uses the memory after what is enqueued.
    unsafe { sys::cuMemFreeAsync(address, gpu.stream) }.result().unwrap();
    // SAFETY: the driver says that it is freed already.
    let twice = unsafe { sys::cuMemFreeAsync(address, gpu.stream) };
    assert_eq!(twice, CUresult::CUDA_ERROR_INVALID_VALUE);
    gpu.synchronize();
    assert!(gpu.try_download::<u8>(address, 1).is_err(), "it is gone");
    gpu.close();
    leave();
}

#[test]
fn a_device_without_pools_says_so() {
    if role().is_none() {
        run("memory::a_device_without_pools_says_so", &[("POOLS", "0")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let mut address = 0;
    // SAFETY: the driver writes to a variable of its type.
    let result = unsafe { sys::cuMemAllocAsync(&raw mut address, 64, gpu.stream) };
    assert_eq!(result, CUresult::CUDA_ERROR_NOT_SUPPORTED);
    let mut supported = -1;
    let pools = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    // SAFETY: as above.
    unsafe { sys::cuDeviceGetAttribute(&raw mut supported, pools, 0) }.result().unwrap();
    assert_eq!(supported, 0);
    leave();
}

#[test]
fn memory_runs_out() {
    if role().is_none() {
        run("memory::memory_runs_out", &[("MEMORY", "10000")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let first = gpu.allocate(6000);
    assert_eq!(gpu.try_allocate(6000), Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    let second = gpu.allocate(4000);
    assert_eq!(gpu.try_allocate(1), Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    gpu.free(first);
    gpu.free(second);
    gpu.allocate(10000);
    leave();
}

#[test]
fn new_memory_holds_garbage() {
    if role().is_none() {
        run("memory::new_memory_holds_garbage", &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let memory = gpu.allocate(100);
    assert!(gpu.download::<u8>(memory, 100).iter().all(|byte| *byte != 0));
    leave();
}

#[test]
fn what_is_left_is_reported() {
    let name = "memory::what_is_left_is_reported";
    if role().is_none() {
        let ended = run(name, &[("LEAKS", "fail")]);
        assert_eq!(ended.code, Some(86), "{}", ended.text);
        ended.assert_says(&["2 device allocations", "1 events", "1 streams", "1 modules"]);
        ended.assert_says(&["left behind", "1 retained contexts"]);
        let ended = run(name, &[("LEAKS", "report")]);
        ended.assert_success();
        ended.assert_says(&["left behind"]);
        return;
    }
    let gpu = Gpu::open(0);
    gpu.allocate(4);
    gpu.allocate(4);
    gpu.event(0);
    gpu.kernel(KERNELS, "copy");
    leave();
}
