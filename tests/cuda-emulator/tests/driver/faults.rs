//! Errors: injected ones, refused kernels, and wrong use.

use cudarc::driver::sys::{self, CUresult};

use crate::KERNELS;
use crate::support::{Gpu, leave, role, run};

#[test]
fn the_chosen_call_fails_with_the_chosen_code() {
    let name = "faults::the_chosen_call_fails_with_the_chosen_code";
    if role().is_none() {
        run(name, &[("FAIL", "cuMemAlloc_v2:2:2,cuStreamCreate:2:999")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    assert!(gpu.try_allocate(4).is_ok());
    assert_eq!(gpu.try_allocate(4), Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    assert!(gpu.try_allocate(4).is_ok());
    let mut stream = std::ptr::null_mut();
    // SAFETY: the driver writes to a variable of its type.
    let result = unsafe { sys::cuStreamCreate(&raw mut stream, 0) };
    assert_eq!(result, CUresult::CUDA_ERROR_UNKNOWN);
    leave();
}

#[test]
fn an_injected_error_of_a_kernel_stays() {
    let name = "faults::an_injected_error_of_a_kernel_stays";
    if role().is_none() {
        let ended = run(name, &[("FAIL", "kernel:3:214"), ("LEAKS", "fail")]);
        ended.assert_success();
        ended.assert_says(&["error 214", "injected into store"]);
        return;
    }
    let gpu = Gpu::open(0);
    let (word, store) = (gpu.upload(&[0_u32]), gpu.kernel(KERNELS, "store"));
    for value in [1_u32, 2] {
        gpu.launch(store, 1, 1, &mut [word.into(), value.into()]);
    }
    assert_eq!(gpu.download::<u32>(word, 1), [2]);
    gpu.launch(store, 1, 1, &mut [word.into(), 3_u32.into()]);
    let broken = CUresult::CUDA_ERROR_ECC_UNCORRECTABLE;
    assert_eq!(gpu.try_synchronize(), broken);
    // Whatever is freed now is freed, although each call returns the error.
    assert_eq!(gpu.free(word), broken);
    // SAFETY: the module is loaded.
    assert_eq!(unsafe { sys::cuModuleUnload(store.module) }, broken);
    gpu.close();
    leave();
}

#[test]
fn the_chosen_launches_of_a_kernel_do_nothing() {
    let name = "faults::the_chosen_launches_of_a_kernel_do_nothing";
    if role().is_none() {
        run(name, &[("SKIP", "store:2:3,none:1:1"), ("LEAKS", "fail")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let (word, store) = (gpu.upload(&[0_u32]), gpu.kernel(KERNELS, "store"));
    let mut seen = Vec::new();
    for value in 1..=7_u32 {
        gpu.launch(store, 1, 1, &mut [word.into(), value.into()]);
        seen.extend(gpu.download::<u32>(word, 1));
    }
    assert_eq!(seen, [1, 1, 3, 4, 4, 6, 7]);
    gpu.free(word);
    // SAFETY: the module is loaded.
    assert_eq!(unsafe { sys::cuModuleUnload(store.module) }, CUresult::CUDA_SUCCESS);
    gpu.close();
    leave();
}

#[test]
fn an_unknown_instruction_is_named_when_the_module_is_loaded() {
    let name = "faults::an_unknown_instruction_is_named_when_the_module_is_loaded";
    if role().is_none() {
        let ended = run(name, &[]);
        ended.assert_success();
        ended.assert_says(&["PTX refused", "line 6", "unknown instruction add.rm.f32"]);
        ended.assert_says(&["PTX refused", "unknown name %r9"]);
        ended.assert_says(&["PTX refused", "there is no label NOWHERE"]);
        ended.assert_says(&["PTX refused", "PTX version 90 is too new"]);
        ended.assert_says(&["PTX refused", "PTX for sm_90 on sm_80"]);
        return;
    }
    let gpu = Gpu::open(0);
    let with = |version: &str, target: &str, body: &str| {
        gpu.try_load(&format!(
            ".version {version}\n.target {target}\n.address_size 64\n\
             .entry k() {{\n.reg .f32 %f<3>; .reg .b32 %r<3>;\n{body}\n}}"
        ))
    };
    let refused = Err(CUresult::CUDA_ERROR_INVALID_PTX);
    assert!(with("8.1", "sm_70", "ret;").is_ok());
    assert_eq!(with("8.1", "sm_70", "add.rm.f32 %f0, %f1, %f2;"), refused);
    assert_eq!(with("8.1", "sm_70", "add.f32.more %f0, %f1, %f2;"), refused);
    assert_eq!(with("8.1", "sm_70", "mov.u32 %r1, %r9;"), refused);
    assert_eq!(with("8.1", "sm_70", "bra NOWHERE;"), refused);
    assert_eq!(with("8.1", "sm_70", "ld.global.v4.u32 {%r0, %r1}, [%r2];"), refused);
    assert_eq!(with("8.1", "sm_70", "ret"), refused);
    let unsupported = CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    assert_eq!(with("9.0", "sm_70", "ret;"), Err(unsupported));
    let no_binary = Err(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(with("8.1", "sm_90", "ret;"), no_binary);
    assert_eq!(gpu.try_load("\x7FELF and so on"), no_binary, "a binary image");
    let no_image = Err(CUresult::CUDA_ERROR_INVALID_IMAGE);
    assert_eq!(gpu.try_load("nothing of the kind"), no_image);
    leave();
}

#[test]
fn the_compilers_log_has_the_reason() {
    if role().is_none() {
        run("faults::the_compilers_log_has_the_reason", &[]).assert_success();
        return;
    }
    let _gpu = Gpu::open(0);
    let (mut module, mut log) = (std::ptr::null_mut(), [1_u8; 64]);
    let text = c".version 8.1 .target sm_70 .address_size 64 .entry k() { wgmma.fence; }";
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    let length = std::ptr::without_provenance_mut(log.len());
    let mut values = [log.as_mut_ptr().cast(), length];
    // SAFETY: the image is a C string, and there is a value for each option.
    let result = unsafe {
        let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
        sys::cuModuleLoadDataEx(&raw mut module, text.as_ptr().cast(), 2, options, values)
    };
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_PTX);
    let end = log.iter().position(|byte| *byte == 0).unwrap();
    let reason = std::str::from_utf8(&log[..end]).unwrap();
    assert_eq!(reason, "line 1: unknown instruction wgmma.fence");

    leave();
}

#[test]
fn a_trap_fails_the_launch() {
    if role().is_none() {
        let ended = run("faults::a_trap_fails_the_launch", &[]);
        ended.assert_success();
        ended.assert_says(&["error 719", "kernel fail", "`trap;`"]);
        return;
    }
    let gpu = Gpu::open(0);
    let (word, fail) = (gpu.upload(&[0_u32]), gpu.kernel(KERNELS, "fail"));
    gpu.launch(fail, 1, 1, &mut [word.into()]);
    assert_eq!(gpu.try_synchronize(), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    leave();
}

#[test]
fn wrong_use_gets_an_error() {
    if role().is_none() {
        run("faults::wrong_use_gets_an_error", &[]).assert_success();
        return;
    }
    let mut count = 0;
    // SAFETY: the driver writes to a variable of its type; here and below.
    let before = unsafe { sys::cuDeviceGetCount(&raw mut count) };
    assert_eq!(before, CUresult::CUDA_ERROR_NOT_INITIALIZED);
    let gpu = Gpu::open(0);
    assert_eq!(gpu.try_allocate(0), Err(CUresult::CUDA_ERROR_INVALID_VALUE));
    let store = gpu.kernel(KERNELS, "store");
    let word = gpu.upload(&[0_u32]);
    let params = || [word.into(), 1_u32.into()];
    let invalid = CUresult::CUDA_ERROR_INVALID_VALUE;
    assert_eq!(gpu.try_launch(store, 0, 1, &mut params()), invalid);
    assert_eq!(gpu.try_launch(store, 1, 1025, &mut params()), invalid);
    gpu.unload(store);
    let stale = gpu.try_launch(store, 1, 1, &mut params());
    assert_eq!(stale, CUresult::CUDA_ERROR_INVALID_HANDLE);
    let event = gpu.event(0);
    gpu.destroy(event);
    // SAFETY: the driver says that the event does not exist.
    let stale = unsafe { sys::cuEventRecord(event, gpu.stream) };
    assert_eq!(stale, CUresult::CUDA_ERROR_INVALID_HANDLE);
    let on_other_thread = std::thread::spawn(|| {
        let mut address = 0;
        // SAFETY: as above.
        unsafe { sys::cuMemAlloc_v2(&raw mut address, 4) }
    });
    let result = on_other_thread.join().unwrap();
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_CONTEXT, "none is current");
    leave();
}

#[test]
fn a_setting_that_can_not_be_read_ends_the_process() {
    let name = "faults::a_setting_that_can_not_be_read_ends_the_process";
    if role().is_none() {
        for (variable, value) in [("DEVICES", "many"), ("FAIL", "cuInit"), ("DELAY", "3")] {
            let ended = run(name, &[(variable, value)]);
            assert_eq!(ended.code, None, "{}", ended.text);
            ended.assert_says(&["CUDA_EMULATOR_", variable]);
        }
        return;
    }
    Gpu::open(0);
    leave();
}
