//! Addresses that stand for memory of several devices.

use std::os::fd::AsRawFd;

use cudarc::driver::sys::{self, CUresult};

use crate::KERNELS;
use crate::mapped::{
    FILES, INVALID, OK, create, done, export, free_range, import, permit, release, reserve, unmap,
};
use crate::support::{Gpu, leave, role, run};

const PART: usize = 4 << 20;
const TOO_EARLY: CUresult = CUresult::CUDA_ERROR_ILLEGAL_STATE;
const NOT_HERE: CUresult = CUresult::CUDA_ERROR_NOT_SUPPORTED;

/// `sum_*` loads 16 bytes of sums from one place, and stores them at another; `spread` stores four
/// words at a multicast address.
const SUMS: &str = "
.version 8.2
.target sm_90
.address_size 64

.visible .entry sum_f32(.param .u64 to, .param .u64 from) {
    .reg .b64 %rd<2>;
    .reg .f32 %f<4>;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%f0, %f1, %f2, %f3}, [%rd1];
    st.global.v4.f32 [%rd0], {%f0, %f1, %f2, %f3};
    ret;
}

.visible .entry sum_f16(.param .u64 to, .param .u64 from) {
    .reg .b64 %rd<2>;
    .reg .b32 %r<4>;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%r0, %r1, %r2, %r3}, [%rd1];
    st.global.v4.u32 [%rd0], {%r0, %r1, %r2, %r3};
    ret;
}

.visible .entry sum_bf16(.param .u64 to, .param .u64 from) {
    .reg .b64 %rd<2>;
    .reg .b32 %r<4>;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%r0, %r1, %r2, %r3}, [%rd1];
    st.global.v4.u32 [%rd0], {%r0, %r1, %r2, %r3};
    ret;
}

.visible .entry spread(.param .u64 to, .param .u32 value) {
    .reg .b64 %rd;
    .reg .b32 %r;
    .reg .f32 %f;
    ld.param.u64 %rd, [to];
    ld.param.u32 %r, [value];
    mov.b32 %f, %r;
    multimem.st.relaxed.sys.global.v4.f32 [%rd], {%f, %f, %f, %f};
    ret;
}
";

fn object(devices: u32, bytes: usize) -> Result<u64, CUresult> {
    let properties = sys::CUmulticastObjectProp {
        numDevices: devices,
        size: bytes,
        handleTypes: FILES.into(),
        flags: 0,
    };
    let mut handle = 0;
    // SAFETY: the driver writes one handle and reads the properties; here and below, it checks
    // handles and ranges.
    done(unsafe { sys::cuMulticastCreate(&raw mut handle, &raw const properties) }, handle)
}

fn add(object: u64, device: i32) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMulticastAddDevice(object, device) }
}

fn bind(object: u64, memory: u64, bytes: usize) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMulticastBindMem(object, 0, memory, 0, bytes, 0) }
}

fn unbind(object: u64, device: i32) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMulticastUnbind(object, device, 0, PART) }
}

/// Where an allocation is mapped for a device from now on.
fn mapped(handle: u64, device: i32) -> u64 {
    let at = reserve(PART).unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { sys::cuMemMap(at, PART, 0, handle, 0) }, OK);
    assert_eq!(permit(at, PART, device), OK);
    at
}

fn unmapped(at: u64) {
    assert_eq!((unmap(at, PART), free_range(at, PART)), (OK, OK));
}

const SETTINGS: [(&str, &str); 3] = [("LEAKS", "fail"), ("MULTICAST", "1"), ("COMPUTE", "90")];

#[test]
fn nothing_is_bound_before_all_devices_are_there() {
    let name = "multicast::nothing_is_bound_before_all_devices_are_there";
    if role().is_none() {
        run(name, &SETTINGS).assert_success();
        return;
    }
    let gpus = [Gpu::open(0), Gpu::open(1)];
    let (mut granularity, mut has) = (0, 0);
    let properties =
        sys::CUmulticastObjectProp { numDevices: 2, size: PART, handleTypes: 1, flags: 0 };
    let least = sys::CUmulticastGranularity_flags::CU_MULTICAST_GRANULARITY_MINIMUM;
    // SAFETY: the driver writes one length and reads the properties.
    let asked = unsafe {
        sys::cuMulticastGetGranularity(&raw mut granularity, &raw const properties, least)
    };
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED;
    // SAFETY: the driver writes one number.
    assert_eq!(unsafe { sys::cuDeviceGetAttribute(&raw mut has, attribute, 1) }, OK);
    assert_eq!((asked, granularity, has), (OK, PART, 1));
    assert_eq!((object(3, PART), object(2, PART / 2)), (Err(INVALID), Err(INVALID)));
    let object = object(2, PART).unwrap();
    let memories = [0, 1].map(|device| create(device, PART, FILES).unwrap());
    let [first, second] = memories;
    assert_eq!(bind(object, first, PART), INVALID, "its device was not added");
    assert_eq!((add(object, 0), add(object, 0)), (OK, INVALID));
    assert_eq!(bind(object, first, PART), TOO_EARLY);
    assert_eq!((add(first, 1), add(object, 1)), (INVALID, OK));
    let small = create(0, PART / 2, FILES).unwrap();
    assert_eq!(bind(object, small, PART / 2), INVALID, "the granularity is that of objects");
    assert_eq!((bind(object, small, PART), release(small)), (INVALID, OK));
    assert_eq!((bind(object, first, PART), bind(object, second, PART)), (OK, OK));
    assert_eq!(unbind(object, 1), OK);
    assert_eq!((unbind(object, 1), unbind(object, 0)), (INVALID, OK));
    assert_eq!([object, first, second].map(release), [OK; 3]);
    gpus.into_iter().for_each(Gpu::close);
    leave();
}

#[test]
fn a_multicast_address_is_that_of_all_memories() {
    let name = "multicast::a_multicast_address_is_that_of_all_memories";
    if role().is_none() {
        run(name, &SETTINGS).assert_success();
        return;
    }
    let gpus = [Gpu::open(0), Gpu::open(1)];
    let here = object(2, PART).unwrap();
    // Another process would get it so.
    let file = export(here).unwrap();
    let there = import(file.as_raw_fd()).unwrap();
    drop(file);
    assert_eq!((add(here, 0), add(there, 1)), (OK, OK));
    let memories = [0, 1].map(|device| create(device, PART, FILES).unwrap());
    assert_eq!((bind(here, memories[0], PART), bind(there, memories[1], PART)), (OK, OK));
    let own = [mapped(memories[0], 0), mapped(memories[1], 1)];
    let all = [mapped(here, 0), mapped(there, 1)];
    // 1.5 and 2.25 in f32; in f16; in bf16.
    let words =
        [(0x3FC0_0000, 0x4010_0000), (0x3E00_3E00, 0x4080_4080), (0x3FC0_3FC0, 0x4010_4010)];
    let sums: [u32; 3] = [0x4070_0000, 0x4380_4380, 0x4070_4070];
    for (device, gpu) in gpus.iter().enumerate() {
        gpu.bind();
        let module = gpu.try_load(SUMS).unwrap();
        let (spread, to) = (gpu.kernel_of(module, "spread"), gpu.allocate(16));
        for (at, (kind, word)) in (0..).zip(["f32", "f16", "bf16"].into_iter().zip(words)) {
            let values = [word.0, word.1];
            for (gpu, (own, value)) in gpus.iter().zip(own.into_iter().zip(values)) {
                gpu.bind();
                let value: [u32; 4] = [value; 4];
                // SAFETY: the driver checks the range, and reads 16 bytes.
                let put = unsafe { sys::cuMemcpyHtoD_v2(own + at * 16, value.as_ptr().cast(), 16) };
                assert_eq!(put, OK);
            }
            gpu.bind();
            let sum = gpu.kernel_of(module, &format!("sum_{kind}"));
            gpu.launch(sum, 1, 1, &mut [to.into(), (all[device] + at * 16).into()]);
            gpu.synchronize();
            assert_eq!(gpu.download::<u32>(to, 4), [sums[at as usize]; 4], "{kind}");
        }
        let value = 7 + device as u32;
        gpu.launch(spread, 1, 1, &mut [(all[device] + 64).into(), value.into()]);
        gpu.synchronize();
        for (gpu, own) in gpus.iter().zip(own) {
            gpu.bind();
            assert_eq!(gpu.download::<u32>(own + 64, 4), [value; 4]);
        }
        gpu.bind();
        assert_eq!(gpu.free(to), OK);
        gpu.unload(spread);
    }
    own.into_iter().chain(all).for_each(unmapped);
    assert_eq!((unbind(here, 0), unbind(there, 1)), (OK, OK));
    assert_eq!([here, there, memories[0], memories[1]].map(release), [OK; 4]);
    gpus.into_iter().for_each(Gpu::close);
    leave();
}

/// Device 0's kernel fails, in a process of its own: the settings say how.
#[test]
fn wrong_accesses_are_told() {
    let name = "multicast::wrong_accesses_are_told";
    if role().is_none() {
        for (what, words) in [
            ("plain", "is a multicast address, which is not for this"),
            ("single", "is no multicast address"),
            ("unbound", "not all devices have memory"),
        ] {
            let ended = run(name, &[&[("TEST_WHAT", what)], &SETTINGS[1..]].concat());
            ended.assert_success();
            ended.assert_says(&["error 700", words]);
        }
        let ended = run(name, &[("TEST_WHAT", "leak"), SETTINGS[0], SETTINGS[1], SETTINGS[2]]);
        assert_eq!(ended.code, Some(86), "{}", ended.text);
        ended.assert_says(&["1 multicast bindings", "2 allocation handles"]);
        run(name, &[("TEST_WHAT", "none")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    let what = std::env::var("CUDA_EMULATOR_TEST_WHAT").unwrap();
    if what == "none" {
        assert_eq!(object(1, PART), Err(NOT_HERE));
        leave();
    }
    let (object, memory) = (object(1, PART).unwrap(), create(0, PART, FILES).unwrap());
    assert_eq!(add(object, 0), OK);
    if what != "unbound" {
        assert_eq!(bind(object, memory, PART), OK);
    }
    if what == "leak" {
        leave();
    }
    let (own, all, to) = (mapped(memory, 0), mapped(object, 0), gpu.allocate(16));
    let sum = gpu.kernel(SUMS, "sum_f32");
    match &what[..] {
        "plain" => {
            let copy = gpu.kernel(KERNELS, "copy");
            gpu.launch(copy, 1, 1, &mut [to.into(), all.into(), 1_u32.into()]);
        }
        "single" => gpu.launch(sum, 1, 1, &mut [to.into(), own.into()]),
        _ => gpu.launch(sum, 1, 1, &mut [to.into(), all.into()]),
    }
    assert_eq!(gpu.try_synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    leave();
}
