//! Streams, and what orders them.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult, CUstream, CUstreamCaptureStatus};

use crate::KERNELS;
use crate::support::{Gpu, leave, role, run};

fn stream(flags: u32) -> CUstream {
    let mut stream = std::ptr::null_mut();
    // SAFETY: the driver writes to a variable of its type.
    unsafe { sys::cuStreamCreate(&raw mut stream, flags) }.result().unwrap();
    stream
}

/// The same device with another stream.
fn on(gpu: &Gpu, stream: CUstream) -> Gpu {
    Gpu { ordinal: gpu.ordinal, context: gpu.context, stream }
}

#[test]
fn calls_return_before_operations_have_run() {
    if role().is_none() {
        run("order::calls_return_before_operations_have_run", &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let (word, spin) = (gpu.upload(&[0_u32]), gpu.kernel(KERNELS, "spin"));
    gpu.launch(spin, 1, 1, &mut [word.into(), 1_u32.into()]);
    // SAFETY: the stream is this one's.
    let query = || unsafe { sys::cuStreamQuery(gpu.stream) };
    assert_eq!(query(), CUresult::CUDA_ERROR_NOT_READY);
    let event = gpu.event(0);
    // SAFETY: the event exists.
    let event_query = || unsafe { sys::cuEventQuery(event) };
    assert_eq!(event_query(), CUresult::CUDA_SUCCESS, "never recorded");
    gpu.record(event);
    assert_eq!(event_query(), CUresult::CUDA_ERROR_NOT_READY);
    let other = on(&gpu, stream(1));
    let store = gpu.kernel_of(spin.module, "store");
    other.launch(store, 1, 1, &mut [word.into(), 1_u32.into()]);
    gpu.synchronize();
    assert_eq!((query(), event_query()), (CUresult::CUDA_SUCCESS, CUresult::CUDA_SUCCESS));
    leave();
}

/// With random delays, unordered streams do what they do in either order.
fn race(waits: bool) -> u32 {
    let gpu = Gpu::open(0);
    let (writer, reader) = (on(&gpu, stream(1)), on(&gpu, stream(1)));
    let (memory, event) = (gpu.upload(&[0_u8; 4]), gpu.event(2));
    let mut stale = 0;
    for round in 1..=40_u8 {
        writer.fill(memory, round, 4);
        writer.record(event);
        if waits {
            reader.wait(event);
        }
        stale += u32::from(reader.download::<u8>(memory, 4) != [round; 4]);
        writer.synchronize();
    }
    stale
}

#[test]
fn an_event_orders_streams() {
    if role().is_none() {
        run("order::an_event_orders_streams", &[("DELAY_US", "1000")]).assert_success();
        return;
    }
    assert_eq!(race(true), 0);
    leave();
}

#[test]
fn without_the_event_delays_show_the_race() {
    if role().is_none() {
        let settings = [("DELAY_US", "1000"), ("SEED", "7")];
        run("order::without_the_event_delays_show_the_race", &settings).assert_success();
        return;
    }
    assert_ne!(race(false), 0);
    leave();
}

/// The default stream waits for streams that block, and they for it, but not for others.
#[test]
fn the_default_stream_waits_for_blocking_streams() {
    if role().is_none() {
        run("order::the_default_stream_waits_for_blocking_streams", &[("DELAY_US", "2000")])
            .assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let (blocking, default) = (on(&gpu, stream(0)), on(&gpu, std::ptr::null_mut()));
    let memory = gpu.upload(&[0_u8]);
    for round in (1..=99_u8).step_by(2) {
        blocking.fill(memory, round, 1);
        assert_eq!(default.download::<u8>(memory, 1), [round]);
        default.fill(memory, round + 1, 1);
        assert_eq!(blocking.download::<u8>(memory, 1), [round + 1]);
    }
    leave();
}

#[test]
fn streams_wait_for_and_write_values() {
    if role().is_none() {
        run("order::streams_wait_for_and_write_values", &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let (memory, other) = (gpu.upload(&[0_u64, 0]), on(&gpu, stream(1)));
    // SAFETY: streams and addresses exist.
    unsafe { sys::cuStreamWaitValue32_v2(other.stream, memory, 5, 0) }.result().unwrap();
    // SAFETY: as above.
    unsafe { sys::cuStreamWriteValue64_v2(other.stream, memory + 8, u64::MAX, 0) }
        .result()
        .unwrap();
    // SAFETY: as above.
    unsafe { sys::cuStreamWriteValue32_v2(gpu.stream, memory, 4, 0) }.result().unwrap();
    gpu.synchronize();
    // SAFETY: as above.
    assert_eq!(unsafe { sys::cuStreamQuery(other.stream) }, CUresult::CUDA_ERROR_NOT_READY);
    // SAFETY: as above.
    unsafe { sys::cuStreamWriteValue32_v2(gpu.stream, memory, 6, 0) }.result().unwrap();
    other.synchronize();
    assert_eq!(gpu.download::<u64>(memory, 2), [6, u64::MAX]);
    // SAFETY: as above.
    let misaligned = unsafe { sys::cuStreamWriteValue32_v2(gpu.stream, memory + 2, 6, 0) };
    assert_eq!(misaligned, CUresult::CUDA_ERROR_INVALID_VALUE);
    leave();
}

static CALLED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn on_host(argument: *mut c_void) {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the driver writes to variables of its types.
    let result = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
    assert_eq!(result, CUresult::CUDA_ERROR_NOT_PERMITTED, "no calls from a host function");
    // Release: pairs with the acquire of the test.
    CALLED.store(u32::try_from(argument.addr()).unwrap(), Ordering::Release);
}

#[test]
fn host_functions_run_in_order_and_must_not_call_the_driver() {
    let name = "order::host_functions_run_in_order_and_must_not_call_the_driver";
    if role().is_none() {
        run(name, &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let argument = std::ptr::without_provenance_mut(42);
    // SAFETY: the function takes any argument.
    unsafe { sys::cuLaunchHostFunc(gpu.stream, Some(on_host), argument) }.result().unwrap();
    gpu.synchronize();
    // Acquire: pairs with the release of the function.
    assert_eq!(CALLED.load(Ordering::Acquire), 42);
    leave();
}

#[test]
fn delays_are_there_and_repeat_with_their_seed() {
    let name = "order::delays_are_there_and_repeat_with_their_seed";
    if role().is_none() {
        run(name, &[("DELAY_US", "40000"), ("SEED", "3")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let memory = gpu.allocate(4);
    let start = Instant::now();
    for _ in 0..20 {
        gpu.fill(memory, 1, 4);
    }
    gpu.synchronize();
    // 20 times 10 ms are expected; a tenth of that by chance is out of the question.
    assert!(start.elapsed() > Duration::from_millis(20), "{:?}", start.elapsed());
    leave();
}

#[test]
fn capture_is_seen_and_can_not_be_used() {
    if role().is_none() {
        run("order::capture_is_seen_and_can_not_be_used", &[]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let memory = gpu.allocate(4);
    let status = || {
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the driver writes to a variable of its type.
        unsafe { sys::cuStreamIsCapturing(gpu.stream, &raw mut status) }.result().unwrap();
        status
    };
    assert_eq!(status(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the stream exists.
    unsafe { sys::cuStreamBeginCapture_v2(gpu.stream, mode) }.result().unwrap();
    assert_eq!(status(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    // SAFETY: the driver checks the range.
    let fill = unsafe { sys::cuMemsetD8Async(memory, 1, 4, gpu.stream) };
    assert_eq!(fill, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(status(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    let mut graph = std::ptr::null_mut();
    // SAFETY: as above.
    let ended = unsafe { sys::cuStreamEndCapture(gpu.stream, &raw mut graph) };
    assert_eq!(ended, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    gpu.fill(memory, 1, 4);
    gpu.synchronize();
    leave();
}
