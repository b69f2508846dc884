//! All-reduces in one launch, barriers, events, and infinite and NaN results.

use std::time::{Duration, Instant, SystemTime};

use unisum::{
    Collective, Communicator, DeviceCommunicator, DeviceStream, ErrorKind, ReduceOp, Reduction,
};

use super::driver::Pool;
use super::support::{Scenario, setting, tell};
use super::{LIMIT, join, world};

pub const SCENARIOS: &[Scenario] = &[
    ("one_launch", one_launch),
    ("nonfinite", nonfinite),
    ("barrier", barrier),
    ("follow", follow),
    ("refused_by_a_capture", refused_by_a_capture),
];

/// All-reduces of changing lengths, one right after the other, in place and of memory that other
/// processes can't open.
fn one_launch() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let (rank, world) = (communicator.rank() as i64, communicator.world() as i64);
    let pool = Pool::new(device.ordinal());
    let lengths = [1_usize, 1000, 3, 40_000, 64, 9000];
    let mut buffers: Vec<_> = lengths
        .iter()
        .map(|&length| {
            let mut buffer = device.allocate::<i64>(length).unwrap();
            let values: Vec<i64> = (0..length as i64).map(|at| rank + at).collect();
            buffer.write(0, &values, &stream).unwrap();
            buffer
        })
        .collect();
    let pooled = pool.allocate(800);
    pooled.write(&[1_i64.to_ne_bytes(); 100].concat(), &stream);
    let all_reduce = Collective::all_reduce(ReduceOp::Sum);
    for _ in 0..2 {
        for buffer in &mut buffers {
            assert_eq!(device.choice::<i64>(&all_reduce, buffer.len()), "one-shot");
            device.all_reduce(buffer, ReduceOp::Sum, &stream).unwrap();
        }
        // SAFETY: so many elements are there until the stream has ended, below.
        let raw =
            unsafe { unisum::RawDeviceBuffers::in_place(unisum::Dtype::I64, pooled.address, 100) };
        device.run_raw(&all_reduce, raw, &stream).unwrap();
    }
    for buffer in &buffers {
        let mut result = vec![0; buffer.len()];
        buffer.read(0, &mut result, &stream).unwrap();
        let once = |at: i64| (0..world).map(|rank| rank + at).sum::<i64>();
        let expected: Vec<i64> = (0..buffer.len() as i64).map(|at| world * once(at)).collect();
        assert_eq!(result, expected, "{} elements", buffer.len());
    }
    let mut bytes = vec![0; 800];
    pooled.read(&mut bytes, &stream);
    assert_eq!(bytes, [(world * world).to_ne_bytes(); 100].concat());
    device.synchronize(&stream, None).unwrap();
}

#[test]
fn small_all_reduces_are_one_launch_each() {
    for (ranks, devices, delay_us) in [(2, 2, 0), (4, 4, 1500), (3, 1, 300), (8, 8, 0)] {
        let world = world(ranks, "one_launch", devices)
            .set("CUDA_EMULATOR_DELAY_US", delay_us)
            .set("CUDA_EMULATOR_COUNTS", 1);
        for ended in world.run(LIMIT) {
            assert_eq!(ended.status, 0, "{ended:#?}");
            let (_, counted) = ended.log.split_once("cuLaunchKernel=").unwrap();
            let launches = counted.split(|letter: char| !letter.is_ascii_digit()).next();
            assert_eq!(launches, Some("14"), "{}", ended.log);
        }
    }
}

/// Every way to an all-reduce and a reduce-scatter, with and without what is not finite.
fn nonfinite() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let ways = [
        (Some("one-shot"), ReduceOp::Sum, 500),
        (Some("one-shot"), ReduceOp::Product, 500),
        (Some("ring"), ReduceOp::Average, 700),
        (Some("two-shot"), ReduceOp::Sum, 700),
        (None, ReduceOp::Sum, 2),
    ];
    for (algorithm, op, count) in ways {
        device.set_algorithm(algorithm).unwrap();
        for odd in [None, Some(f32::INFINITY), None, Some(f32::NAN)] {
            let context = format!("{algorithm:?}, {op}, {odd:?}");
            let found = reduced(&communicator, &device, &stream, (op, count, odd));
            assert_eq!(found, [odd.is_some(); 2], "{context}");
        }
    }
    device.set_algorithm(None).unwrap();
    // Two calls before anybody asks, the first of which found something.
    let mut bad = device.allocate::<f32>(10).unwrap();
    let mut good = device.allocate::<f32>(10).unwrap();
    bad.write(3, &[f32::MAX], &stream).unwrap();
    let how = Reduction::new(ReduceOp::Sum).detect_nonfinite();
    device.all_reduce(&mut bad, how, &stream).unwrap();
    device.all_reduce(&mut good, how, &stream).unwrap();
    let overflows = communicator.world() > 1;
    assert_eq!(device.take_nonfinite(&stream, None).unwrap(), overflows, "the sum is infinite");
    // Nobody asked for it to be looked for.
    bad.write(3, &[f32::NAN], &stream).unwrap();
    device.all_reduce(&mut bad, ReduceOp::Sum, &stream).unwrap();
    assert!(!device.take_nonfinite(&stream, None).unwrap());
}

/// Whether something was found in an all-reduce, and in the blocks of a reduce-scatter of which
/// only that of the last rank has something.
fn reduced(
    communicator: &Communicator,
    device: &DeviceCommunicator,
    stream: &DeviceStream,
    (op, count, odd): (ReduceOp, usize, Option<f32>),
) -> [bool; 2] {
    let (rank, world) = (communicator.rank(), communicator.world());
    let mut values = vec![1.0; count * world];
    if rank == world / 2 {
        values[count * world - 1] = odd.unwrap_or(2.0);
    }
    let how = Reduction::new(op).detect_nonfinite();
    let mut all = device.allocate::<f32>(count * world).unwrap();
    all.write(0, &values, stream).unwrap();
    let mut block = device.allocate::<f32>(count).unwrap();
    device.reduce_scatter(&all, &mut block, how, stream).unwrap();
    let of_block = device.take_nonfinite(stream, None).unwrap();
    let is_last = rank == world - 1;
    assert!(!of_block || is_last, "only the last block has anything");
    device.all_reduce(&mut all, how, stream).unwrap();
    let of_all = device.take_nonfinite(stream, None).unwrap();
    [of_all, if is_last { of_block } else { of_all }]
}

#[test]
fn infinite_and_nan_results_are_found_on_every_way() {
    for (ranks, delay_us) in [(1, 0), (2, 0), (3, 300), (5, 0)] {
        world(ranks, "nonfinite", ranks).set("CUDA_EMULATOR_DELAY_US", delay_us).succeed(LIMIT);
    }
    let staged = world(2, "nonfinite", 2).set("CUDA_EMULATOR_PEER_ACCESS", 0);
    staged.succeed(LIMIT);
}

/// Rank 1 comes late to a barrier, on its device.
fn barrier() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<u8>(64).unwrap();
    let came = device.event().unwrap();
    if communicator.rank() == 1 {
        // Slow operations, which no host waits for.
        for _ in 0..8 {
            came.record(&stream).unwrap();
        }
    }
    came.record(&stream).unwrap();
    device.barrier(&stream).unwrap();
    let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros();
    if communicator.rank() == 1 {
        // When it was last seen not to have come.
        let mut before = 0;
        loop {
            let looked = now();
            if came.is_done().unwrap() {
                break;
            }
            before = looked;
            std::thread::sleep(Duration::from_micros(100));
        }
        tell(before);
    }
    device.synchronize(&stream, None).unwrap();
    tell(now());
    // Flags are as far as everything else believes.
    device.all_reduce(&mut buffer, ReduceOp::Max, &stream).unwrap();
    device.barrier(&stream).unwrap();
    device.synchronize(&stream, None).unwrap();
    // Of the program's own clock and the device's.
    let (begin, events) = (Instant::now(), [(); 2].map(|()| device.event().unwrap()));
    events[0].record(&stream).unwrap();
    device.all_reduce(&mut buffer, ReduceOp::Max, &stream).unwrap();
    events[1].record(&stream).unwrap();
    device.synchronize(&stream, None).unwrap();
    let seconds = events[1].seconds_since(&events[0]).unwrap();
    assert!((0.0..=begin.elapsed().as_secs_f64()).contains(&seconds), "{seconds} s");
    let never = device.event().unwrap();
    assert!(never.seconds_since(&events[0]).is_err(), "it has not happened");
}

#[test]
fn no_stream_passes_a_barrier_before_the_last_has_come() {
    for peer_access in [1, 0] {
        let all = world(3, "barrier", 3).set("CUDA_EMULATOR_PEER_ACCESS", peer_access);
        let slow = all.clone().set("CUDA_EMULATOR_DELAY_US", 150_000);
        let mut running = slow.start_ranks(&[1]);
        running.add(&all, 0);
        running.add(&all, 2);
        let ended = running.wait(LIMIT);
        assert!(ended.iter().all(|ended| ended.status == 0), "{ended:#?}");
        let told: Vec<u128> = ended.iter().map(|it| it.told[0].parse().unwrap()).collect();
        // In the order in which they were started: the slow one first.
        assert!(told[1] >= told[0] && told[2] >= told[0], "{told:?}");
    }
}

/// A stream that follows another has what that one does.
fn follow() {
    let (communicator, device) = join();
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let rounds: i32 = setting("ROUNDS").parse().unwrap();
    let mut buffer = device.allocate::<i32>(100).unwrap();
    for round in 0..rounds {
        buffer.write(0, &[round; 100], &first).unwrap();
        device.all_reduce(&mut buffer, ReduceOp::Sum, &first).unwrap();
        second.follow(&first).unwrap();
        let mut result = [0; 100];
        buffer.read(0, &mut result, &second).unwrap();
        assert_eq!(result, [round * communicator.world() as i32; 100]);
        first.follow(&second).unwrap();
    }
}

#[test]
fn a_stream_follows_another() {
    world(2, "follow", 2).set("ROUNDS", 20).set("CUDA_EMULATOR_DELAY_US", 800).succeed(LIMIT);
}

/// The driver of one rank can't say whether its stream is being captured, because another one is.
fn refused_by_a_capture() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut refused = 0;
    for round in 0..12 {
        let mut buffer = device.allocate::<i32>(100).unwrap();
        match device.all_reduce(&mut buffer, ReduceOp::Max, &stream) {
            Ok(()) => device.synchronize(&stream, None).unwrap(),
            Err(error) => {
                let text = "rank 1: device 1: cuStreamIsCapturing: \
                            CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)";
                assert!(error.to_string().contains(text), "{error}");
                assert_eq!(error.kind(), ErrorKind::Configuration, "round {round}");
                assert_eq!(error.failed_ranks(), [1]);
                refused += 1;
            }
        }
    }
    tell(refused);
    drop(communicator);
}

#[test]
fn a_stream_that_a_capture_elsewhere_forbids_is_refused_on_all_ranks() {
    let running = world(2, "refused_by_a_capture", 2);
    let failing = running.clone().set("CUDA_EMULATOR_FAIL", "cuStreamIsCapturing:5:901");
    let mut all = failing.start_ranks(&[1]);
    all.add(&running, 0);
    for ended in all.wait(LIMIT) {
        assert_eq!(ended.status, 0, "{ended:#?}");
        assert_eq!(ended.told[0], "1", "one call of all");
    }
}
