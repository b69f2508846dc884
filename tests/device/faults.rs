//! What goes wrong on devices and streams beside the calls, and what must not.

use std::time::{Duration, Instant};

use cudarc::driver::sys;
use unisum::{Communicator, DeviceRoute, ErrorKind, ReduceOp};

use super::support::{Scenario, await_others, reach, tell, tell_error};
use super::{LIMIT, join, world};

pub const SCENARIOS: &[Scenario] = &[
    ("no_memory", no_memory),
    ("captured", captured),
    ("broken", broken),
    ("behind", behind),
    ("aborted", aborted),
    ("ranks_of_one_process", ranks_of_one_process),
    ("several_streams", several_streams),
    ("dropped_in_any_order", dropped_in_any_order),
];

/// The device has room for the buffer, and not for the scratch memory beside it.
fn no_memory() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<u8>(6 << 20).unwrap();
    let mut small = device.allocate::<u8>(100).unwrap();
    device.set_algorithm(Some("one-shot")).unwrap();
    let error = device.all_reduce(&mut buffer, ReduceOp::Max, &stream).unwrap_err();
    tell_error(&error);
    let error = device.allocate::<f64>(1 << 20).unwrap_err();
    assert_eq!(error.kind() == ErrorKind::Memory, communicator.rank() == 1, "{error}");
    // Nothing has begun: small calls still fit.
    device.all_reduce(&mut small, ReduceOp::Max, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
}

#[test]
fn a_device_without_memory_is_told_to_all_ranks() {
    let all = world(2, "no_memory", 2).set("CUDA_EMULATOR_MEMORY", 64 << 20);
    let short = all.clone().set("CUDA_EMULATOR_MEMORY", 11 << 20);
    let mut running = short.start_ranks(&[1]);
    running.add(&all, 0);
    for ended in running.wait(LIMIT) {
        let told = ended.told.first().unwrap_or_else(|| panic!("{ended:#?}"));
        assert!(told.starts_with("Device [1] "), "{told}");
        let text = "rank 1: 8388608 bytes beside the buffers: device 1: cuMemAlloc: \
                    CUDA_ERROR_OUT_OF_MEMORY (2)";
        assert!(told.contains(text), "{told}");
    }
}

fn captured() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(100).unwrap();
    let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
    if communicator.rank() == 1 {
        // SAFETY: the stream lives.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(stream.raw().cast(), mode) };
        assert_eq!(begun, sys::CUresult::CUDA_SUCCESS);
    }
    tell_error(&device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap_err());
    if communicator.rank() == 1 {
        // Whatever waits for it is refused, too, and fails nobody.
        let mut to = [0.0; 4];
        let refused = [
            device.synchronize(&stream, None),
            device.take_nonfinite(&stream, None).map(drop),
            buffer.write(0, &[1.0; 4], &stream),
            buffer.read(0, &mut to, &stream),
            buffer.write(0, &[], &stream),
        ];
        for refused in refused {
            let error = refused.unwrap_err();
            let words = "the stream is being captured into a graph: it can't be waited for";
            assert!(error.kind() == ErrorKind::Configuration, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; the driver writes one pointer, of nothing.
        let ended = unsafe { sys::cuStreamEndCapture(stream.raw().cast(), &raw mut graph) };
        let invalid = sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        assert_ne!(ended, invalid, "the capture was left alone");
        // It is a stream as any other from here on.
        buffer.write(0, &[1.0; 4], &stream).unwrap();
        device.synchronize(&stream, None).unwrap();
    }
    let fresh = device.stream().unwrap();
    device.all_reduce(&mut buffer, ReduceOp::Sum, &fresh).unwrap();
    device.synchronize(&fresh, None).unwrap();
}

#[test]
fn a_captured_stream_is_refused_on_all_ranks() {
    // By both routes.
    for peer_access in [1, 0] {
        let world = world(2, "captured", 2).set("CUDA_EMULATOR_PEER_ACCESS", peer_access);
        for told in world.succeed(LIMIT) {
            assert!(told[0].starts_with("Configuration [1] "), "{told:?}");
            let text = "rank 1: the stream is being captured into a graph";
            assert!(told[0].contains(text), "{told:?}");
        }
    }
}

/// A kernel or a copy of rank 1 fails, whether unisum's or the program's own, and the device with
/// it: the driver says so in whatever call comes next.
fn broken() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(5000).unwrap();
    let begin = Instant::now();
    let mut all = || {
        for _ in 0..20 {
            buffer.write(0, &[1.0; 100], &stream)?;
            device.all_reduce(&mut buffer, ReduceOp::Sum, &stream)?;
            device.synchronize(&stream, None)?;
        }
        Ok(())
    };
    let error: unisum::Error = all().unwrap_err();
    // The own copy tells on this rank alone: the next call tells all.
    let own = device.all_reduce(&mut buffer, ReduceOp::Sum, &stream);
    let error = if error.failed_ranks().is_empty() { own.unwrap_err() } else { error };
    tell_error(&error);
    tell(begin.elapsed().as_secs());
}

#[test]
fn a_device_that_breaks_is_told_to_all_ranks_by_both_routes() {
    let cases = [
        // In a fold or a wait of a collective, and in a copy of the program's own.
        (1, "kernel:5:700", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        (1, "unisum_staged_sum_f32:3:719", "CUDA_ERROR_LAUNCH_FAILED (719)"),
        (1, "copy:4:700", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        // On the way to the host, on the way back, and of the program's own.
        (0, "copy:2:700", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        (0, "copy:3:719", "CUDA_ERROR_LAUNCH_FAILED (719)"),
        (0, "copy:4:700", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
    ];
    for (peer_access, injected, text) in cases {
        let running = world(3, "broken", 3)
            .set("CUDA_EMULATOR_PEER_ACCESS", peer_access)
            .set("UNISUM_TIMEOUT", 20);
        // A broken device can't tell the others that it is done with their memory: by the direct
        // route, what they have open stays allocated.
        let running = match peer_access {
            0 => running,
            _ => running.set("CUDA_EMULATOR_LEAKS", ""),
        };
        let mut all = running.clone().set("CUDA_EMULATOR_FAIL", injected).start_ranks(&[1]);
        all.add(&running, 0);
        all.add(&running, 2);
        for ended in all.wait(LIMIT) {
            assert_eq!(ended.status, 0, "{injected}: {ended:#?}");
            let told = &ended.told[0];
            assert!(told.starts_with("Device [1] "), "{injected}: {told}");
            assert!(told.contains("rank 1: device 1: cu") && told.contains(text), "{told}");
            let seconds: u64 = ended.told[1].parse().unwrap();
            assert!(seconds < 20, "{injected}: after {seconds} s");
        }
    }
}

/// The stream of rank 1 takes up to 0.6 s for each operation.
fn behind() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(100).unwrap();
    let event = device.event().unwrap();
    if communicator.rank() == 1 {
        // Slow operations: all of them are never quick together.
        (0..20).for_each(|_| event.record(&stream).unwrap());
    }
    let mut result = Ok(());
    for _ in 0..3 {
        result = result.and_then(|()| device.all_reduce(&mut buffer, ReduceOp::Sum, &stream));
    }
    let limit = (communicator.rank() == 0).then_some(Duration::from_millis(600));
    let begin = Instant::now();
    let error = result.and_then(|()| device.synchronize(&stream, limit)).unwrap_err();
    tell_error(&error);
    tell(begin.elapsed().as_millis());
}

#[test]
fn a_device_that_is_behind_is_named_after_the_deadline() {
    let all = world(2, "behind", 2);
    let slow = all.clone().set("CUDA_EMULATOR_DELAY_US", 600_000);
    let mut running = slow.start_ranks(&[1]);
    running.add(&all, 0);
    let ended = running.wait(LIMIT);
    for ended in &ended {
        let told = ended.told.first().unwrap_or_else(|| panic!("{ended:#?}"));
        assert!(
            told.starts_with("Timeout [1] ") && told.contains("the devices of ranks [1]"),
            "{told}"
        );
    }
    let millis: u64 = ended[1].told[1].parse().unwrap();
    assert!(millis >= 600, "rank 0 waited {millis} ms");
}

/// Rank 2 ends the job while the streams of the others wait for the one of rank 1.
fn aborted() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(100).unwrap();
    let event = device.event().unwrap();
    if communicator.rank() == 1 {
        // Slow operations: all of them are never quick together.
        (0..20).for_each(|_| event.record(&stream).unwrap());
    }
    let mut result = Ok(());
    for _ in 0..3 {
        result = result.and_then(|()| device.all_reduce(&mut buffer, ReduceOp::Sum, &stream));
    }
    match communicator.rank() {
        2 => {
            await_others("enqueued", 2, LIMIT);
            tell_error(&communicator.abort("enough"));
        }
        _ => {
            reach("enqueued");
            tell_error(&result.and_then(|()| device.synchronize(&stream, None)).unwrap_err());
        }
    }
}

#[test]
fn an_abort_ends_what_streams_wait_for() {
    let all = world(3, "aborted", 3);
    let slow = all.clone().set("CUDA_EMULATOR_DELAY_US", 1_000_000);
    let mut running = slow.start_ranks(&[1]);
    running.add(&all, 0);
    running.add(&all, 2);
    for ended in running.wait(LIMIT) {
        let told = ended.told.first().unwrap_or_else(|| panic!("{ended:#?}"));
        assert!(told.starts_with("Aborted [2] ") && told.contains("enough"), "{told}");
    }
}

/// Two ranks in this process, on two devices.
fn ranks_of_one_process() {
    let rank = |rank: usize| {
        let communicator = Communicator::builder().rank(rank).world(2).connect().unwrap();
        let device = communicator.on_device(rank).unwrap();
        assert_eq!(*device.route(), DeviceRoute::CudaIpc, "{}", device.describe());
        let stream = device.stream().unwrap();
        let mut buffer = device.allocate::<i64>(3000).unwrap();
        for round in 0..10 {
            buffer.write(0, &vec![rank as i64 + round; 3000], &stream).unwrap();
            device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
            let mut result = vec![0; 3000];
            buffer.read(0, &mut result, &stream).unwrap();
            assert_eq!(result, vec![1 + 2 * round; 3000]);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rank(1));
        rank(0);
    });
}

#[test]
fn ranks_of_one_process_have_devices_of_their_own() {
    world(1, "ranks_of_one_process", 2).succeed(LIMIT);
}

/// Calls follow each other although they are in different streams.
fn several_streams() {
    let (communicator, device) = join();
    let world = communicator.world() as u32;
    let mut buffer = device.allocate::<u32>(2000).unwrap();
    let streams: Vec<_> = (0..3).map(|_| device.stream().unwrap()).collect();
    buffer.write(0, &vec![1; 2000], &streams[0]).unwrap();
    let mut expected = 1_u32;
    for round in 0..12 {
        // A stream of its own, which goes before the collective has ended.
        let short = device.stream().unwrap();
        let stream = if round % 4 == 3 { &short } else { &streams[round % 3] };
        device.all_reduce(&mut buffer, ReduceOp::Sum, stream).unwrap();
        expected = expected.wrapping_mul(world);
        drop(short);
    }
    // One more, so that this stream waits for all.
    device.all_reduce(&mut buffer, ReduceOp::Max, &streams[0]).unwrap();
    let mut result = vec![0; 2000];
    buffer.read(0, &mut result, &streams[0]).unwrap();
    assert_eq!(result, vec![expected; 2000]);
}

#[test]
fn calls_in_different_streams_are_ordered() {
    world(3, "several_streams", 3).set("CUDA_EMULATOR_DELAY_US", 2000).succeed(LIMIT);
}

/// Buffers that outlive their communicator, a communicator that outlives the job's, and ranks that
/// let go of theirs at different times.
fn dropped_in_any_order() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(5000).unwrap();
    device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
    let rank = communicator.rank();
    drop(communicator);
    std::thread::sleep(Duration::from_millis(200 * rank as u64));
    let begin = Instant::now();
    if rank == 1 {
        drop(buffer);
        drop(device);
    } else {
        drop(device);
        drop(buffer);
    }
    tell(begin.elapsed().as_millis());
}

#[test]
fn what_is_dropped_waits_for_the_others_and_leaves_nothing() {
    let millis = |_| -> Vec<u64> {
        let told = world(3, "dropped_in_any_order", 3).succeed(LIMIT);
        told.iter().map(|told| told[0].parse().unwrap()).collect()
    };
    let is_long = |millis: &Vec<u64>| millis.iter().any(|&millis| millis >= 1500);
    // Others may have the processors once or twice.
    let long: Vec<_> = (0..5).map(millis).take_while(is_long).collect();
    assert!(long.len() < 5, "each time one waited until it had enough: {long:?}");
}
