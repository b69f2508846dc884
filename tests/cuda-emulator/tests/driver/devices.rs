//! Several devices of a process.

use cudarc::driver::sys::{self, CUresult};

use crate::KERNELS;
use crate::support::{Gpu, leave, role, run};

fn can_access(one: i32, other: i32) -> bool {
    let mut can = -1;
    // SAFETY: the driver writes to a variable of its type.
    unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, one, other) }.result().unwrap();
    can == 1
}

/// Copies a word of `from`, on another device, to `to` by a kernel.
fn reads(gpu: &Gpu, to: u64, from: u64) -> CUresult {
    gpu.bind();
    let copy = gpu.kernel(KERNELS, "copy");
    gpu.launch(copy, 1, 1, &mut [to.into(), from.into(), 1_u32.into()]);
    gpu.try_synchronize()
}

#[test]
fn kernels_need_peer_access_and_copies_do_not() {
    let name = "devices::kernels_need_peer_access_and_copies_do_not";
    if role().is_none() {
        let ended = run(name, &[("DEVICES", "3")]);
        ended.assert_success();
        ended.assert_says(&["error 700", "without peer access"]);
        return;
    }
    let (zero, one, two) = (Gpu::open(0), Gpu::open(1), Gpu::open(2));
    two.bind();
    let on_two = two.upload(&[22_u32]);
    zero.bind();
    let on_zero = zero.upload(&[0_u32]);
    // SAFETY: both ranges exist.
    unsafe { sys::cuMemcpyDtoDAsync_v2(on_zero, on_two, 4, zero.stream) }.result().unwrap();
    assert_eq!(zero.download::<u32>(on_zero, 1), [22], "a copy needs no peer access");
    zero.fill(on_zero, 0, 4);
    // SAFETY: the context exists.
    let enable = || unsafe { sys::cuCtxEnablePeerAccess(two.context, 0) };
    assert_eq!(enable(), CUresult::CUDA_SUCCESS);
    assert_eq!(enable(), CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    assert_eq!(reads(&zero, on_zero, on_two), CUresult::CUDA_SUCCESS);
    assert_eq!(zero.download::<u32>(on_zero, 1), [22]);
    one.bind();
    let on_one = one.upload(&[0_u32]);
    assert_eq!(reads(&one, on_one, on_two), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    leave();
}

#[test]
fn pairs_without_peer_access_say_so() {
    let name = "devices::pairs_without_peer_access_say_so";
    if role().is_none() {
        run(name, &[("DEVICES", "3"), ("NO_PEER", "1:0")]).assert_success();
        return;
    }
    let (one, _zero) = (Gpu::open(1), Gpu::open(0));
    assert!(!can_access(0, 1) && !can_access(1, 0) && can_access(0, 2) && can_access(2, 1));
    // SAFETY: the context exists.
    let enabled = unsafe { sys::cuCtxEnablePeerAccess(one.context, 0) };
    assert_eq!(enabled, CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
    leave();
}

#[test]
fn visible_devices_are_renumbered_and_stay_the_same_devices() {
    let name = "devices::visible_devices_are_renumbered_and_stay_the_same_devices";
    if role().is_none() {
        let settings = [("DEVICES", "4"), ("CUDA_VISIBLE_DEVICES", "2,0"), ("NO_PEER", "0:2")];
        run(name, &settings).assert_success();
        let none = [("DEVICES", "4"), ("CUDA_VISIBLE_DEVICES", "")];
        super::support::start(name, "none", &none).wait().assert_success();
        return;
    }
    if role().as_deref() == Some("none") {
        // SAFETY: no pointers.
        assert_eq!(unsafe { sys::cuInit(0) }, CUresult::CUDA_ERROR_NO_DEVICE);
        leave();
    }
    let _gpu = Gpu::open(0);
    let mut count = 0;
    // SAFETY: the driver writes to a variable of its type.
    unsafe { sys::cuDeviceGetCount(&raw mut count) }.result().unwrap();
    assert_eq!(count, 2);
    let uuid = |device| {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: as above.
        unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) }.result().unwrap();
        uuid.bytes[15]
    };
    assert_eq!((uuid(0), uuid(1)), (2, 0));
    assert!(!can_access(0, 1), "the pair is one of physical devices");
    leave();
}

#[test]
fn devices_work_at_the_same_time() {
    let name = "devices::devices_work_at_the_same_time";
    if role().is_none() {
        run(name, &[("DEVICES", "2"), ("LEAKS", "fail")]).assert_success();
        return;
    }
    let (zero, one) = (Gpu::open(0), Gpu::open(1));
    zero.bind();
    // SAFETY: the context exists.
    unsafe { sys::cuCtxEnablePeerAccess(one.context, 0) }.result().unwrap();
    let on_zero = zero.upload(&[0_u32]);
    let of_zero = zero.kernel(KERNELS, "store");
    let spin = zero.kernel_of(of_zero.module, "spin");
    one.bind();
    let on_one = one.upload(&[0_u32]);
    let of_one = one.kernel(KERNELS, "spin");
    // Each waits for the other, so both have to run.
    one.launch(of_one, 1, 1, &mut [on_one.into(), 1_u32.into()]);
    zero.bind();
    zero.launch(of_zero, 1, 1, &mut [on_one.into(), 1_u32.into()]);
    zero.launch(of_zero, 1, 1, &mut [on_zero.into(), 1_u32.into()]);
    zero.launch(spin, 1, 1, &mut [on_zero.into(), 1_u32.into()]);
    zero.synchronize();
    one.synchronize();
    let foreign = one.try_launch(of_zero, 1, 1, &mut [on_one.into(), 1_u32.into()]);
    assert_eq!(foreign, CUresult::CUDA_ERROR_INVALID_HANDLE, "a kernel of another context");
    zero.free(on_zero);
    one.free(on_one);
    zero.unload(of_zero);
    one.unload(of_one);
    zero.close();
    one.close();
    leave();
}

#[test]
fn blocks_that_wait_for_each_other_run_together() {
    let name = "devices::blocks_that_wait_for_each_other_run_together";
    if role().is_none() {
        run(name, &[]).assert_success();
        run(name, &[("DELAY_US", "10")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let relay = gpu.kernel(KERNELS, "relay");
    for _ in 0..20 {
        let words = gpu.upload(&[0_u32; 64]);
        gpu.launch(relay, 64, 1, &mut [words.into()]);
        gpu.synchronize();
        assert_eq!(gpu.download::<u32>(words, 64), [1; 64]);
    }
    leave();
}
