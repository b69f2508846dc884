//! Collectives on the memory of CUDA devices, in the order of streams.

use std::ffi::{c_char, c_void};
use std::time::Duration;

use unisum::{DeviceCommunicator, DeviceStream, Dtype, RawDeviceBuffers};

use crate::collective::{IN_PLACE, collective, unisum_buffers, unisum_collective};
use crate::communicator::{Comm, unisum_comm};
use crate::handles::{self, Object};
use crate::memory::{check, check_apart, check_place, list, put, put_text, text};
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::dtype;

/// A communicator whose ranks have a CUDA device each: collectives on its memory.
#[derive(Debug)]
pub struct unisum_device {
    _private: [u8; 0],
}

struct OnDevice(DeviceCommunicator);

impl Object for OnDevice {
    const KIND: usize = 6;
    const NAME: &'static str = "device communicator";
}

/// How many CUDA devices this process sees. UNISUM_CONFIGURATION if there is no driver or no
/// device: the text says which.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_count(count: *mut u32) -> unisum_status {
    guard(|| {
        check_place(count, "the number")?;
        let devices = u32::try_from(unisum::cuda_devices()?).unwrap_or(u32::MAX);
        // SAFETY: C promises that it may be written.
        unsafe { put(count, devices, "the number") }
    })
}

/// Gives each rank of a communicator a CUDA device, this one the device with number `ordinal` of
/// this process; unisum_comm_local_rank often is a good one, and two ranks may have the same. It
/// may outlive the communicator, and is freed by unisum_device_free. Collective: every rank calls
/// it. Blocks. UNISUM_CONFIGURATION on all ranks if one has no such device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_create(
    comm: *const unisum_comm,
    ordinal: u32,
    device: *mut *mut unisum_device,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(device, "the device communicator")?;
        let made = OnDevice(comm.communicator.on_device(ordinal as usize)?);
        // SAFETY: checked just above, and C promises that it may be written.
        unsafe { handles::give(made, device) };
        Ok(())
    })
}

/// The device, and how data moves: whether the devices read each other's memory, or why not. Else
/// as unisum_comm_describe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_describe(
    device: *const unisum_device,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> unisum_status {
    guard(|| {
        let device = handles::get::<OnDevice, _>(device)?;
        // SAFETY: C promises that both may be written.
        unsafe { put_text(&device.0.describe(), text, capacity, length) }
    })
}

/// Fixes the algorithm of all later calls on devices, as unisum_comm_set_algorithm.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_set_algorithm(
    device: *const unisum_device,
    name: *const c_char,
) -> unisum_status {
    guard(|| {
        let device = handles::get::<OnDevice, _>(device)?;
        // SAFETY: C promises a text.
        let name = (!name.is_null()).then(|| unsafe { text(name, "the name") }).transpose()?;
        Ok(device.0.set_algorithm(name)?)
    })
}

/// Puts a collective into a stream, on memory of the device, in place or apart as unisum_run.
/// `stream` is a CUstream or cudaStream_t of the device's primary context; NULL is the legacy
/// default stream. The collective begins after what is in the stream, and what is put there later
/// comes after it: until it has ended, the buffers are its own. Blocks until all ranks have called,
/// not until it has ended.
///
/// UNISUM_CONFIGURATION, UNISUM_MISMATCH, and UNISUM_DEVICE for want of memory are on all ranks:
/// nothing was put into a stream. After other errors the communicators of the job are aborted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_run(
    device: *const unisum_device,
    collective: *const unisum_collective,
    dtype: u32,
    buffers: *const unisum_buffers,
    stream: *mut c_void,
) -> unisum_status {
    guard(|| {
        let device = &handles::get::<OnDevice, _>(device)?.0;
        // SAFETY: C promises counts.
        let asked = unsafe { self::collective(collective, device.world()) }?;
        if asked.reduction.is_some() {
            return invalid("a reduction of the program's own reduces host memory only");
        }
        // SAFETY: C promises one.
        let buffers = unsafe { list(buffers, 1, "the buffers") }?;
        let buffers = lent(self::dtype(dtype)?, &buffers[0])?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { DeviceStream::from_raw(device, stream) };
        Ok(device.run_raw(&asked.collective, buffers, &stream)?)
    })
}

/// Waits until everything in a stream has ended, for `timeout_s` seconds at most, or, if that is
/// negative, for as long as a call may take; tells whether collectives ended in order. Not
/// collective. UNISUM_TIMEOUT if they have not ended, with the ranks whose devices are behind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_synchronize(
    device: *const unisum_device,
    stream: *mut c_void,
    timeout_s: f64,
) -> unisum_status {
    guard(|| {
        let device = &handles::get::<OnDevice, _>(device)?.0;
        let limit = limit(timeout_s)?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { DeviceStream::from_raw(device, stream) };
        Ok(device.synchronize(&stream, limit)?)
    })
}

/// Waits as unisum_device_synchronize, and tells whether a result of the calls with
/// UNISUM_DETECT_NONFINITE since this was last asked is infinite or NaN: the same on all ranks
/// after all-reduces; of the rank's own block after a reduce-scatter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_take_nonfinite(
    device: *const unisum_device,
    stream: *mut c_void,
    timeout_s: f64,
    nonfinite: *mut bool,
) -> unisum_status {
    guard(|| {
        let device = &handles::get::<OnDevice, _>(device)?.0;
        check_place(nonfinite, "`nonfinite`")?;
        let limit = limit(timeout_s)?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { DeviceStream::from_raw(device, stream) };
        let found = device.take_nonfinite(&stream, limit)?;
        // SAFETY: C promises that it may be written.
        unsafe { put(nonfinite, found, "`nonfinite`") }
    })
}

/// Frees a device communicator, after the collectives on its device have ended. Waits for the other
/// ranks to free theirs, 2 s at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_free(device: *const unisum_device) -> unisum_status {
    guard(|| handles::remove::<OnDevice, _>(device).map(drop))
}

pub(crate) fn limit(timeout_s: f64) -> Outcome<Option<Duration>> {
    match Duration::try_from_secs_f64(timeout_s) {
        Ok(limit) => Ok(Some(limit)),
        Err(_) if timeout_s < 0.0 => Ok(None),
        Err(_) => invalid(format!("a timeout of {timeout_s} s")),
    }
}

/// Buffers of a device, checked as those of the host; whether they are on the device is found out
/// by the call.
fn lent(dtype: Dtype, buffers: &unisum_buffers) -> Outcome<RawDeviceBuffers> {
    let unisum_buffers { input, input_count, output, output_count } = *buffers;
    let to_write = check(dtype, output, output_count, true, "the output")?;
    let to = (output.addr() as u64, output_count);
    let is_same = input == output.cast_const() && input_count == output_count;
    if input.addr() == IN_PLACE || is_same && input_count > 0 {
        // SAFETY: C promises the memory, until the collective has ended in its stream.
        return Ok(unsafe { RawDeviceBuffers::in_place(dtype, to.0, to.1) });
    }
    let to_read = check(dtype, input, input_count, false, "the input")?;
    check_apart(&mut [to_write, to_read])?;
    // SAFETY: as above; the two were found apart.
    Ok(unsafe { RawDeviceBuffers::out_of_place(dtype, (input.addr() as u64, input_count), to) })
}
