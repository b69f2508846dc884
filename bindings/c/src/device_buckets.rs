//! Gradient buckets in the memory of CUDA devices.

use std::ffi::c_void;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use unisum::buckets::{DeviceBuckets, DeviceStep, Parameter};
use unisum::{DeviceCommunicator, DeviceStream, Dtype};

use crate::buckets::{
    BUSY, for_gradient, give_gradient, parameter, unisum_bucket_flags, unisum_bucket_options,
    unisum_parameter,
};
use crate::communicator::{Comm, unisum_comm};
use crate::device::limit;
use crate::handles::{self, Object};
use crate::memory::{check, check_place, elements, elements_mut, list, put};
use crate::status::{Outcome, guard, invalid, unisum_status};

/// Gradient buckets in the memory of this rank's CUDA device.
#[derive(Debug)]
pub struct unisum_device_buckets {
    _private: [u8; 0],
}

struct Layer(RwLock<State>);

struct State {
    /// The step under way, which borrows the buckets. Before them: it is dropped first.
    step: Option<DeviceStep<'static>>,
    buckets: Box<DeviceBuckets>,
}

impl Object for Layer {
    const KIND: usize = 10;
    const NAME: &'static str = "device buckets";
}

impl Layer {
    fn alone(&self) -> Outcome<RwLockWriteGuard<'_, State>> {
        self.0.try_write().or_else(|_| invalid(BUSY))
    }

    fn shared(&self) -> Outcome<RwLockReadGuard<'_, State>> {
        self.0.try_read().or_else(|_| invalid(BUSY))
    }
}

impl State {
    fn step(&self) -> Outcome<&DeviceStep<'static>> {
        let none = "no step is under way: unisum_device_buckets_begin begins one";
        self.step.as_ref().map_or_else(|| invalid(none), Ok)
    }

    /// The buckets between two steps.
    fn idle(&mut self) -> Outcome<&mut DeviceBuckets> {
        match self.step {
            Some(_) => invalid("a step is under way: unisum_device_buckets_wait ends it"),
            None => Ok(&mut self.buckets),
        }
    }

    fn parameter(&self, number: usize) -> Outcome<&Parameter> {
        let all = self.buckets.parameters();
        let none = || invalid(format!("there is no parameter {number} among {}", all.len()));
        all.get(number).map_or_else(none, Ok)
    }
}

/// A stream of C's.
///
/// # Safety
/// C promises that it is one of the device, and lives.
unsafe fn lent(device: &DeviceCommunicator, stream: *mut c_void) -> DeviceStream {
    // SAFETY: the caller vouches for it.
    unsafe { DeviceStream::from_raw(device, stream) }
}

/// Makes buckets for a model's parameters in the memory of the device with number `ordinal` of this
/// process, in the order in which they were registered. Of the options there are bucket_bytes,
/// end_bucket_bytes and UNISUM_IGNORE_NONFINITE; NULL is the defaults. Gradients are zero at first,
/// and stay where they are. Freed by unisum_device_buckets_free. Collective: every rank of the
/// communicator, which they may outlive, calls it with the same parameters and settings, and any
/// device. Blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_create(
    comm: *const unisum_comm,
    ordinal: u32,
    parameters: *const unisum_parameter,
    count: usize,
    options: *const unisum_bucket_options,
    buckets: *mut *mut unisum_device_buckets,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(buckets, "the buckets")?;
        // SAFETY: C promises so many.
        let parameters = unsafe { list(parameters, count, "the parameters") }?;
        // SAFETY: C promises names and shapes.
        let parameters = parameters.iter().map(|it| unsafe { parameter(it) });
        let parameters = parameters.collect::<Outcome<Vec<_>>>()?;
        let mut builder = DeviceBuckets::builder(&comm.communicator);
        if !options.is_null() {
            // SAFETY: C promises one.
            let options = unsafe { list(options, 1, "the options") }?;
            let Taken { bytes, end_bytes, detects_nonfinite } = taken(&options[0])?;
            builder = builder.detect_nonfinite(detects_nonfinite);
            if bytes > 0 {
                builder = builder.bucket_bytes(bytes);
            }
            if end_bytes > 0 {
                builder = builder.end_bucket_bytes(end_bytes);
            }
        }
        let made = Box::new(builder.build(ordinal as usize, &parameters)?);
        let layer = Layer(RwLock::new(State { step: None, buckets: made }));
        // SAFETY: checked above, and C promises that it may be written.
        unsafe { handles::give(layer, buckets) };
        Ok(())
    })
}

/// Options of buckets on devices.
struct Taken {
    bytes: usize,
    end_bytes: usize,
    detects_nonfinite: bool,
}

fn taken(options: &unisum_bucket_options) -> Outcome<Taken> {
    let unisum_bucket_options { bucket_bytes, end_bucket_bytes, flags, .. } = *options;
    let ignore = unisum_bucket_flags::UNISUM_IGNORE_NONFINITE as u32;
    let others = [options.encoding, options.low_rank, flags & !ignore];
    if others != [0; 3] || !options.layout.is_null() {
        return invalid(
            "buckets on devices take bucket_bytes, end_bucket_bytes and UNISUM_IGNORE_NONFINITE, \
             and no other options",
        );
    }
    let detects_nonfinite = flags & ignore == 0;
    Ok(Taken { bytes: bucket_bytes, end_bytes: end_bucket_bytes, detects_nonfinite })
}

/// Where a parameter's gradient lies on the device, as long as the buckets live: a CUdeviceptr. It
/// is the program's from unisum_device_buckets_begin until it is marked ready, and again in a
/// stream that has waited for the step. `count`, which may be NULL, gets how many elements it has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_view(
    buckets: *const unisum_device_buckets,
    parameter: usize,
    gradient: *mut *mut c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(gradient, "the gradient")?;
        let state = layer.shared()?;
        let len = state.parameter(parameter)?.count();
        let address = state.buckets.address(parameter) as usize; // as wide as pointers
        let start = std::ptr::without_provenance_mut(address);
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient((start, len), gradient, count) }
    })
}

/// Begins a step whose gradients are averaged over all ranks. Collective: every rank begins the
/// same number of steps. Blocks until all ranks have handed in the step before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_begin(
    buckets: *const unisum_device_buckets,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let mut state = layer.alone()?;
        let step = state.idle()?.begin()?;
        // SAFETY: the step is dropped before the buckets, which stay where they are in their box,
        // and which nobody has for itself while there is a step: `idle` sees to it.
        let step = unsafe { std::mem::transmute::<DeviceStep<'_>, DeviceStep<'static>>(step) };
        state.step = Some(step);
        Ok(())
    })
}

/// Marks a gradient ready once what is in `stream` now has ended: a CUstream or cudaStream_t of the
/// device's primary context; NULL is the legacy default stream. Nothing may write the gradient from
/// then on. Threads may mark different gradients at once. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_ready(
    buckets: *const unisum_device_buckets,
    parameter: usize,
    stream: *mut c_void,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let state = layer.shared()?;
        let step = state.step()?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { lent(step.device(), stream) };
        Ok(step.ready(parameter, &stream)?)
    })
}

/// Copies a gradient from the host's memory into its place, after what is in `stream`, and marks it
/// ready. Blocks until it is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_put(
    buckets: *const unisum_device_buckets,
    parameter: usize,
    gradient: *const c_void,
    count: usize,
    stream: *mut c_void,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let state = layer.shared()?;
        let step = state.step()?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { lent(step.device(), stream) };
        for_gradient!(state.parameter(parameter)?.dtype(), T => {
            check(<T as unisum::Element>::DTYPE, gradient, count, false, "the gradient")?;
            // SAFETY: C promises the memory; it was checked.
            Ok(step.put::<T>(parameter, unsafe { elements(gradient, count) }, &stream)?)
        })
    })
}

/// Ends the step: what is put into `stream` from here on comes after all averages. Blocks until all
/// ranks have handed it in, not until it has ended on the devices. UNISUM_STEP_FAILED, on all ranks
/// alike, if one has not marked all gradients ready, or one too often: the next step can be begun.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_wait(
    buckets: *const unisum_device_buckets,
    stream: *mut c_void,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let mut state = layer.alone()?;
        state.step()?;
        let step = state.step.take().expect("it was looked at");
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { lent(step.device(), stream) };
        Ok(step.wait(&stream)?)
    })
}

/// Copies a parameter's gradient, of `count` elements, to the host's memory, after what is in
/// `stream`: the average, in a stream that has waited for the step. Blocks until it is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_read(
    buckets: *const unisum_device_buckets,
    parameter: usize,
    gradient: *mut c_void,
    count: usize,
    stream: *mut c_void,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let mut state = layer.alone()?;
        let dtype: Dtype = state.parameter(parameter)?.dtype();
        let buckets = state.idle()?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { lent(buckets.device(), stream) };
        for_gradient!(dtype, T => {
            check(<T as unisum::Element>::DTYPE, gradient, count, true, "the gradient")?;
            // SAFETY: C promises the memory; it was checked.
            let elements = unsafe { elements_mut::<T>(gradient, count) };
            Ok(buckets.read::<T>(parameter, elements, &stream)?)
        })
    })
}

/// Waits until everything in a stream has ended, as unisum_device_synchronize.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_synchronize(
    buckets: *const unisum_device_buckets,
    stream: *mut c_void,
    timeout_s: f64,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let state = layer.shared()?;
        let limit = limit(timeout_s)?;
        let device = state.buckets.device();
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { lent(device, stream) };
        Ok(device.synchronize(&stream, limit)?)
    })
}

/// Waits for the averages and for the stream, as unisum_device_synchronize, and tells whether an
/// average since this was last asked is infinite or NaN: the same on all ranks that ask after the
/// same steps. Not with UNISUM_IGNORE_NONFINITE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_take_nonfinite(
    buckets: *const unisum_device_buckets,
    stream: *mut c_void,
    timeout_s: f64,
    nonfinite: *mut bool,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(nonfinite, "`nonfinite`")?;
        let limit = limit(timeout_s)?;
        let mut state = layer.alone()?;
        let buckets = state.idle()?;
        // SAFETY: C promises a stream that lives.
        let stream = unsafe { lent(buckets.device(), stream) };
        let found = buckets.take_nonfinite(&stream, limit)?;
        // SAFETY: C promises that it may be written.
        unsafe { put(nonfinite, found, "`nonfinite`") }
    })
}

/// Frees buckets, once their averages have ended on the device. A step under way is dropped, and
/// fails on all ranks. Waits for the other ranks to free theirs, 2 s at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_device_buckets_free(
    buckets: *const unisum_device_buckets,
) -> unisum_status {
    guard(|| handles::remove::<Layer, _>(buckets).map(drop))
}
