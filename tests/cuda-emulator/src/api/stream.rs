//! Streams, what they wait for, and capture.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::context::GREATEST_PRIORITY;
use super::{IN_HOST_FUNCTION, Ignored, Out, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::device::{self, current};
use crate::driver::event;
use crate::driver::stream::{self, Capture, Failure, Stream, wait_until};
use crate::driver::{driver, memory};

fn create(stream: Out<u64>, flags: u32, priority: i32) -> Done {
    if flags > 1 {
        return Err(Code::INVALID_VALUE);
    }
    let (device, driver) = (current()?, driver()?);
    let number = stream::next_number();
    let started = Stream::start(device, flags, priority.clamp(GREATEST_PRIORITY, 0), number);
    let handle = driver.streams.reserve();
    driver.streams.insert(handle, started);
    stream.put(handle)
}

/// Where a value in memory is that a stream waits for or writes.
fn word<T>(address: u64) -> Result<*mut T, Failure> {
    let fail = |code, reason: String| Failure { code, reason: format!("stream value: {reason}") };
    if !address.is_multiple_of(size_of::<T>() as u64) {
        return Err(fail(Code::MISALIGNED_ADDRESS, format!("{address:#x}")));
    }
    device::place(address, size_of::<T>(), None)
        .map(<*mut u8>::cast)
        .map_err(|reason| fail(Code::ILLEGAL_ADDRESS, reason))
}

/// Whether a value is what a wait asks for.
fn is_reached(found: u64, wanted: u64, flags: u32, bits: u32) -> bool {
    let mask = u64::MAX >> (64 - bits);
    match flags & 3 {
        // Cyclic: ahead by less than half of all values.
        0 => found.wrapping_sub(wanted) & mask <= mask >> 1,
        1 => found == wanted,
        2 => found & wanted != 0,
        _ => !(found | wanted) & mask != 0,
    }
}

fn wait_value(stream: u64, address: u64, wanted: u64, flags: u32, bits: u32) -> Done {
    let stream = stream::find(stream)?;
    stream.push(move |device| {
        let read: Box<dyn Fn() -> u64> = if bits == 32 {
            let word = word(address)?;
            // SAFETY: the word is aligned and stays mapped while the operation runs; everybody
            // accesses it atomically.
            let word = unsafe { AtomicU32::from_ptr(word) };
            // Acquire: pairs with the release of who writes the value.
            Box::new(move || u64::from(word.load(Ordering::Acquire)))
        } else {
            let word = word(address)?;
            // SAFETY: as above.
            let word = unsafe { AtomicU64::from_ptr(word) };
            // Acquire: as above.
            Box::new(move || word.load(Ordering::Acquire))
        };
        wait_until(device, || is_reached(read(), wanted, flags, bits));
        Ok(())
    })
}

fn write_value(stream: u64, address: u64, value: u64, bits: u32) -> Done {
    stream::find(stream)?.push(move |_| {
        if bits == 32 {
            let word = word(address)?;
            // SAFETY: the word is aligned and stays mapped while the operation runs; everybody
            // accesses it atomically.
            let word = unsafe { AtomicU32::from_ptr(word) };
            // Release: pairs with the acquire of who waits for the value.
            word.store(u32::try_from(value).unwrap_or(u32::MAX), Ordering::Release);
        } else {
            let word = word(address)?;
            // SAFETY: as above.
            let word = unsafe { AtomicU64::from_ptr(word) };
            // Release: as above.
            word.store(value, Ordering::Release);
        }
        Ok(())
    })
}

fn check_value(stream: u64, address: u64, bits: u32) -> Done {
    stream::find(stream)?;
    let bytes = bits as usize / 8;
    let pointer = usize::try_from(address).unwrap_or(usize::MAX);
    let is_there =
        memory::contains(address, bytes) || crate::driver::host::contains(pointer, bytes);
    if is_there && address.is_multiple_of(bytes as u64) { Ok(()) } else { Err(Code::INVALID_VALUE) }
}

/// A function of the caller that a stream calls, with its argument.
#[derive(Clone, Copy)]
struct HostFunction {
    function: extern "C" fn(*mut c_void),
    argument: *mut c_void,
}

// SAFETY: by the contract of `cuLaunchHostFunc`, the function may be called on any thread.
unsafe impl Send for HostFunction {}

impl HostFunction {
    fn call(self) {
        IN_HOST_FUNCTION.set(true);
        (self.function)(self.argument);
        IN_HOST_FUNCTION.set(false);
    }
}

entry_points! {
    fn cuStreamCreate(stream: Out<u64>, flags: u32) {
        create(stream, flags, 0)
    }

    fn cuStreamCreateWithPriority(stream: Out<u64>, flags: u32, priority: i32) {
        create(stream, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: u64) {
        // What is enqueued still runs.
        let stream = driver()?.streams.remove(stream)?;
        stream.close();
        stream.device.check()
    }

    fn cuStreamSynchronize(stream: u64) {
        let stream = stream::find(stream)?;
        if stream.capture() != Capture::None {
            stream.set_capture(Capture::Invalidated);
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        stream.synchronize();
        stream.device.check()
    }

    fn cuStreamQuery(stream: u64) {
        let stream = stream::find(stream)?;
        if stream.is_idle() { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuStreamWaitEvent(stream: u64, event: u64, _flags: u32) {
        let (stream, event) = (stream::find(stream)?, event::find(event)?);
        let record = event.last_record();
        stream.push(move |device| {
            wait_until(device, || event.is_complete(record));
            Ok(())
        })
    }

    fn cuStreamGetCtx(stream: u64, context: Out<u64>) {
        context.put(stream::find_or_failed(stream)?.device.context())
    }

    fn cuStreamGetFlags(stream: u64, flags: Out<u32>) {
        flags.put(stream::find_or_failed(stream)?.flags)
    }

    fn cuStreamGetPriority(stream: u64, priority: Out<i32>) {
        priority.put(stream::find_or_failed(stream)?.priority)
    }

    fn cuStreamGetId(stream: u64, number: Out<u64>) {
        number.put(stream::find_or_failed(stream)?.number)
    }

    fn cuStreamWaitValue32_v2(stream: u64, address: u64, value: u32, flags: u32) {
        check_value(stream, address, 32)?;
        wait_value(stream, address, u64::from(value), flags, 32)
    }

    fn cuStreamWaitValue64_v2(stream: u64, address: u64, value: u64, flags: u32) {
        check_value(stream, address, 64)?;
        wait_value(stream, address, value, flags, 64)
    }

    fn cuStreamWriteValue32_v2(stream: u64, address: u64, value: u32, _flags: u32) {
        check_value(stream, address, 32)?;
        write_value(stream, address, u64::from(value), 32)
    }

    fn cuStreamWriteValue64_v2(stream: u64, address: u64, value: u64, _flags: u32) {
        check_value(stream, address, 64)?;
        write_value(stream, address, value, 64)
    }

    fn cuLaunchHostFunc(
        stream: u64,
        function: Option<extern "C" fn(*mut c_void)>,
        argument: *mut c_void,
    ) {
        let function = function.ok_or(Code::INVALID_VALUE)?;
        let function = HostFunction { function, argument };
        stream::find(stream)?.push(move |_| {
            function.call();
            Ok(())
        })
    }

    fn cuStreamIsCapturing(stream: u64, status: Out<u32>) {
        status.put(stream::find(stream)?.capture() as u32)
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: u64,
        status: Out<u32>,
        number: Out<u64>,
        graph: Out<u64>,
        dependencies: Out<u64>,
        count: Out<usize>,
    ) {
        let stream = stream::find(stream)?;
        let capture = stream.capture();
        status.put(capture as u32)?;
        if capture == Capture::Active {
            number.put_if_wanted(stream.number);
            graph.put_if_wanted(0);
            dependencies.put_if_wanted(0);
            count.put_if_wanted(0);
        }
        Ok(())
    }

    fn cuStreamBeginCapture_v2(stream: u64, _mode: u32) {
        let stream: Arc<Stream> = match stream {
            // The legacy default stream can't be captured.
            0 | 1 => return Err(Code::STREAM_CAPTURE_UNSUPPORTED),
            stream => stream::find(stream)?,
        };
        match stream.capture() {
            Capture::None => {
                stream.set_capture(Capture::Active);
                Ok(())
            }
            _ => Err(Code::ILLEGAL_STATE),
        }
    }

    fn cuStreamEndCapture(stream: u64, graph: Out<u64>) {
        let stream = stream::find(stream)?;
        let capture = stream.capture();
        stream.set_capture(Capture::None);
        graph.put_if_wanted(0);
        match capture {
            // An empty graph would do, but none can be launched here.
            Capture::Active => Err(Code::NOT_SUPPORTED),
            Capture::Invalidated => Err(Code::STREAM_CAPTURE_INVALIDATED),
            Capture::None => Err(Code::ILLEGAL_STATE),
        }
    }

    fn cuThreadExchangeStreamCaptureMode(_mode: Ignored) {
        Ok(())
    }
}
