//! Gradient buckets in the memory of devices.

use std::time::Duration;

use cudarc::driver::sys;
use unisum::buckets::{DeviceBuckets, Parameter};
use unisum::{Communicator, Dtype, ErrorKind};

use super::driver::{self, Pool, Pooled};
use super::support::{self, Random, Scenario, await_others, reach, setting, tell, tell_error};
use super::{LIMIT, world};

pub const SCENARIOS: &[Scenario] = &[
    ("averages", averages),
    ("overflows", overflows),
    ("bad_steps", bad_steps),
    ("other_parameters", other_parameters),
    ("lost_in_a_step", lost_in_a_step),
    ("handed_in_by_drop", handed_in_by_drop),
    ("captured_streams", captured_streams),
    ("broken_device", broken_device),
    ("forked", forked),
];

/// Gradients of several types, some alone in a bucket, one without elements.
const SHAPES: [(&[usize], Dtype, usize); 8] = [
    (&[7, 3], Dtype::F32, 1),
    (&[500], Dtype::F32, 2),
    (&[0], Dtype::F32, 1),
    (&[33], Dtype::F64, 1),
    (&[64], Dtype::F32, 1),
    (&[1], Dtype::F32, 1),
    (&[90], Dtype::F64, 1),
    (&[2000], Dtype::F32, 1),
];

fn parameters() -> Vec<Parameter> {
    let new = |(at, (shape, dtype, uses)): (usize, &(&[usize], Dtype, usize))| {
        Parameter::new(format!("p{at}"), shape, *dtype).used(*uses)
    };
    SHAPES.iter().enumerate().map(new).collect()
}

fn buckets(communicator: &Communicator) -> DeviceBuckets {
    let devices: usize = setting("DEVICES").parse().unwrap();
    let builder = DeviceBuckets::builder(communicator).bucket_bytes(1000).end_bucket_bytes(300);
    let buckets = builder.build(communicator.rank() % devices, &parameters()).unwrap();
    assert!(buckets.layout().buckets().len() > 3, "{:?}", buckets.layout());
    buckets
}

fn value(rank: usize, step: usize, parameter: usize, at: usize) -> f64 {
    ((rank * 31 + step * 7 + parameter * 3 + at) % 64) as f64
}

/// What a gradient holds, as the bytes of its type.
fn bytes(parameter: &Parameter, value: impl Fn(usize) -> f64) -> Vec<u8> {
    let elements = (0..parameter.count()).map(value);
    match parameter.dtype() {
        Dtype::F32 => elements.flat_map(|it| (it as f32).to_ne_bytes()).collect(),
        _ => elements.flat_map(f64::to_ne_bytes).collect(),
    }
}

fn check(buckets: &DeviceBuckets, stream: &unisum::DeviceStream, world: usize, step: usize) {
    for (number, parameter) in buckets.parameters().iter().enumerate() {
        let mean = |at| {
            let sum: f64 = (0..world).map(|rank| value(rank, step, number, at)).sum();
            sum / world as f64
        };
        let context = format!("step {step}, {parameter}");
        if parameter.dtype() == Dtype::F64 {
            let mut found = vec![0_f64; parameter.count()];
            buckets.read(number, &mut found, stream).unwrap();
            let near = |(at, it): (usize, &f64)| (it - mean(at)).abs() < 1e-4;
            assert!(found.iter().enumerate().all(near), "{context}: {found:?}");
            continue;
        }
        let mut found = vec![0_f32; parameter.count()];
        buckets.read(number, &mut found, stream).unwrap();
        let near = |(at, it): (usize, &f32)| (f64::from(*it) - mean(at)).abs() < 1e-4;
        assert!(found.iter().enumerate().all(near), "{context}: {found:?}");
    }
}

/// Kernels that take their time write gradients, in streams of which no host waits, in an order
/// that each rank draws; the next step's overwrite them in the stream that waited for the step.
fn averages() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let mut buckets = buckets(&communicator);
    let list = parameters();
    let pool = Pool::new(buckets.device().ordinal());
    let streams = [(); 3].map(|()| buckets.device().stream().unwrap());
    let mut random = Random::new();
    for step in 0..4 {
        // What kernels will write; there before the step.
        let sources: Vec<Pooled> = list
            .iter()
            .enumerate()
            .map(|(number, parameter)| {
                let source = pool.allocate(parameter.count() * parameter.dtype().bytes());
                source.write(&bytes(parameter, |at| value(rank, step, number, at)), &streams[0]);
                source
            })
            .collect();
        for stream in &streams[1..] {
            stream.follow(&streams[0]).unwrap();
        }
        let under_way = buckets.begin().unwrap();
        let mut order: Vec<usize> = (0..list.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at + 1));
        }
        for &number in &order {
            let parameter = &list[number];
            let size = parameter.count() * parameter.dtype().bytes();
            let stream = &streams[random.below(3)];
            if SHAPES[number].2 == 2 {
                // A tied parameter: two streams write a half each.
                let (at, half) = (under_way.address(number), size as u64 / 2);
                sources[number].copy(0, at, size / 2, &streams[1]);
                under_way.ready(number, &streams[1]).unwrap();
                sources[number].copy(half, at + half, size / 2, &streams[2]);
                under_way.ready(number, &streams[2]).unwrap();
                continue;
            }
            sources[number].copy(0, under_way.address(number), size, stream);
            under_way.ready(number, stream).unwrap();
        }
        under_way.wait(&streams[0]).unwrap();
        check(&buckets, &streams[0], world, step);
    }
    assert!(!buckets.take_nonfinite(&streams[0], None).unwrap());
}

#[test]
fn gradients_of_all_streams_are_averaged_in_buckets() {
    for (ranks, devices, delay_us) in [(1, 1, 0), (2, 2, 2000), (3, 3, 500), (4, 2, 0)] {
        world(ranks, "averages", devices)
            .set("CUDA_EMULATOR_DELAY_US", delay_us)
            .set("UNISUM_TEST_SEED", support::seed())
            .succeed(LIMIT);
    }
    // Through the hosts.
    world(2, "averages", 2)
        .set("CUDA_EMULATOR_PEER_ACCESS", 0)
        .set("UNISUM_TEST_SEED", support::seed())
        .succeed(LIMIT);
}

fn overflows() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = buckets(&communicator);
    let list = parameters();
    let stream = buckets.device().stream().unwrap();
    for odd in [None, Some(0), None, Some(7)] {
        let step = buckets.begin().unwrap();
        for (number, parameter) in list.iter().enumerate() {
            if parameter.dtype() == Dtype::F32 {
                let is_odd = odd == Some(number) && communicator.rank() == 1;
                let value = if is_odd { f32::INFINITY } else { 1.0 };
                // A tied one: its second half comes from elsewhere.
                if SHAPES[number].2 == 2 {
                    step.ready(number, &stream).unwrap();
                }
                step.put(number, &vec![value; parameter.count()], &stream).unwrap();
            } else {
                step.put(number, &vec![1.0_f64; parameter.count()], &stream).unwrap();
            }
        }
        step.wait(&stream).unwrap();
        let found = buckets.take_nonfinite(&stream, None).unwrap();
        assert_eq!(found, odd.is_some(), "{odd:?}");
    }
}

#[test]
fn an_infinite_gradient_of_one_rank_is_found_by_all() {
    world(2, "overflows", 2).succeed(LIMIT);
}

/// Fills all gradients but the first `left_out`.
fn fill(
    step: &unisum::buckets::DeviceStep,
    stream: &unisum::DeviceStream,
    left_out: usize,
    value: f32,
) {
    for (number, parameter) in parameters().iter().enumerate().skip(left_out) {
        for _ in 0..SHAPES[number].2 {
            match parameter.dtype() {
                Dtype::F64 => {
                    step.put(number, &vec![f64::from(value); parameter.count()], stream).unwrap()
                }
                _ => step.put(number, &vec![value; parameter.count()], stream).unwrap(),
            }
        }
    }
}

/// A step that rank 1 does not end as it should fails on all ranks, and the next one is right.
fn bad_steps() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let mut buckets = buckets(&communicator);
    let stream = buckets.device().stream().unwrap();
    for how in 0..6 {
        let step = buckets.begin().unwrap();
        let is_bad = rank == 1;
        // What is left of it must not come into the next one.
        fill(&step, &stream, if is_bad { how.min(2) } else { 0 }, 100.0);
        let error = match how {
            _ if !is_bad => step.wait(&stream).unwrap_err(),
            0 => {
                let error = step.ready(3, &stream).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
                step.wait(&stream).unwrap_err()
            }
            1 | 2 => step.wait(&stream).unwrap_err(),
            3 => {
                drop(step);
                tell("dropped");
                continue;
            }
            4 => {
                step.abandon("out of data");
                tell("abandoned");
                continue;
            }
            _ => {
                std::mem::forget(step);
                tell("forgotten");
                continue;
            }
        };
        tell_error(&error);
    }
    let step = buckets.begin().unwrap();
    fill(&step, &stream, 0, 2.0);
    step.wait(&stream).unwrap();
    for (number, parameter) in parameters().iter().enumerate() {
        if parameter.dtype() == Dtype::F32 {
            let mut found = vec![0_f32; parameter.count()];
            buckets.read(number, &mut found, &stream).unwrap();
            assert!(found.iter().all(|it| *it == 2.0), "{parameter}: {found:?}");
        }
    }
    let wrong = buckets.read(0, &mut [0_f64; 21], &stream).unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::Configuration, "{wrong}");
    let none = buckets.read(99, &mut [0_f32], &stream).unwrap_err();
    assert!(none.to_string().contains("there is no parameter 99 among 8"), "{none}");
}

#[test]
fn a_step_that_one_rank_does_not_end_fails_on_all() {
    let reasons = [
        "on rank 1 `p3` (f64 [33]) was marked ready once more",
        "on rank 1 `p0` (f32 [7, 3]) had no gradient when the step ended",
        "on rank 1 `p0` (f32 [7, 3]) had no gradient when the step ended, nor had 1 others",
        "on rank 1 the step was dropped before it was waited for",
        "on rank 1 out of data",
        "on rank 1 the step was forgotten before it was waited for",
    ];
    let told = world(3, "bad_steps", 3).set("CUDA_EMULATOR_DELAY_US", 1500).succeed(LIMIT);
    assert_eq!(told[1][3..], ["dropped", "abandoned", "forgotten"]);
    for (rank, told) in told.iter().enumerate() {
        for (text, reason) in told.iter().zip(reasons).take(if rank == 1 { 3 } else { 6 }) {
            assert!(text.starts_with("StepFailed [1] "), "{text}");
            assert!(text.ends_with(reason), "{text}");
        }
    }
}

fn other_parameters() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, builder) = (communicator.rank(), DeviceBuckets::builder(&communicator));
    let weight = |rows| vec![Parameter::new("weight", &[rows, 2], Dtype::F32)];
    tell_error(&builder.build(0, &weight(3 + rank)).unwrap_err());
    let builder = DeviceBuckets::builder(&communicator).detect_nonfinite(rank == 0);
    tell_error(&builder.build(0, &weight(3)).unwrap_err());
    let builder = DeviceBuckets::builder(&communicator);
    let of_ints = [Parameter::new("ids", &[3], Dtype::I32)];
    tell_error(&builder.build(0, if rank == 1 { &of_ints } else { &[] }).unwrap_err());
    // Nothing is a model too.
    let mut buckets = DeviceBuckets::builder(&communicator).build(0, &[]).unwrap();
    let stream = buckets.device().stream().unwrap();
    buckets.begin().unwrap().wait(&stream).unwrap();
}

#[test]
fn layers_that_differ_between_ranks_are_refused_by_all() {
    for told in world(2, "other_parameters", 1).succeed(LIMIT) {
        let starts = ["Mismatch [0, 1] ", "Mismatch [0, 1] ", "Mismatch [1] "];
        let texts = [
            "parameter 0 differs: `weight` (f32 [3, 2]) on rank 0, `weight` (f32 [4, 2]) on rank 1",
            "detect_nonfinite true on rank 0, detect_nonfinite false on rank 1",
            "rank 1 can't make gradient buckets: `ids` (i32 [3]): gradients are f16, bf16, f32 or",
        ];
        for ((told, start), text) in told.iter().zip(starts).zip(texts) {
            assert!(told.starts_with(start) && told.contains(text), "{told}");
        }
    }
}

/// Rank 1 ends in the middle of a step.
fn lost_in_a_step() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = buckets(&communicator);
    let stream = buckets.device().stream().unwrap();
    let step = buckets.begin().unwrap();
    fill(&step, &stream, if communicator.rank() == 1 { 4 } else { 0 }, 2.0);
    if communicator.rank() == 1 {
        await_others("filled", 2, LIMIT);
        std::process::abort();
    }
    reach("filled");
    tell_error(&step.wait(&stream).unwrap_err());
    tell_error(&buckets.begin().unwrap_err());
}

#[test]
fn a_rank_that_is_lost_in_a_step_is_named_by_it_and_by_the_next() {
    let ended = world(3, "lost_in_a_step", 3).run(LIMIT);
    for rank in [0, 2] {
        let told = &ended[rank].told;
        assert!(told.len() == 2, "{:#?}", ended[rank]);
        assert!(told[0].starts_with("RankLost [1] "), "{told:?}");
        assert!(told[1].starts_with("Aborted [1] ") && told[1].contains("rank 1 died"), "{told:?}");
    }
}

/// Layers go while a step of theirs is under way on the device, or was never waited for.
fn handed_in_by_drop() {
    let communicator = Communicator::from_environment().unwrap();
    let mut first = buckets(&communicator);
    let stream = first.device().stream().unwrap();
    let step = first.begin().unwrap();
    fill(&step, &stream, 0, 2.0);
    std::mem::forget(step);
    drop(first);
    let mut second = buckets(&communicator);
    let step = second.begin().unwrap();
    fill(&step, &stream, 0, 2.0);
    step.wait(&stream).unwrap();
    drop(second);
    let _third = buckets(&communicator);
}

#[test]
fn a_layer_that_goes_in_a_step_leaves_nothing() {
    let world = world(2, "handed_in_by_drop", 2);
    world.set("CUDA_EMULATOR_DELAY_US", 1000).succeed(Duration::from_secs(100));
}

/// Streams that can't be waited in are refused where they are, and disturb nobody else.
fn captured_streams() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = buckets(&communicator);
    let (stream, captured) = [(); 2].map(|()| buckets.device().stream().unwrap()).into();
    let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
    let is_capturing = communicator.rank() == 1;
    if is_capturing {
        // SAFETY: the stream lives.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(captured.raw().cast(), mode) };
        assert_eq!(begun, sys::CUresult::CUDA_SUCCESS);
    }
    let waits_in = if is_capturing { &captured } else { &stream };
    let step = buckets.begin().unwrap();
    fill(&step, &stream, 0, 100.0);
    let ended = step.wait(waits_in);
    // The next step is begun all the same, and what is left of that one is not in it.
    let step = buckets.begin().unwrap();
    if is_capturing {
        tell_error(&ended.unwrap_err());
        tell_error(&step.put(0, &[1.0_f32; 21], waits_in).unwrap_err());
        tell_error(&step.ready(3, waits_in).unwrap_err());
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; the driver writes one pointer, of nothing.
        let captured = unsafe { sys::cuStreamEndCapture(captured.raw().cast(), &raw mut graph) };
        let invalid = sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        assert_ne!(captured, invalid, "it was left alone");
    } else {
        ended.unwrap();
        fill(&step, &stream, 0, 100.0);
    }
    tell_error(&step.wait(&stream).unwrap_err());
    let step = buckets.begin().unwrap();
    fill(&step, &stream, 0, 2.0);
    step.wait(&stream).unwrap();
    let mut found = [0_f32; 21];
    buckets.read(0, &mut found, &stream).unwrap();
    assert_eq!(found, [2.0; 21]);
}

#[test]
fn a_stream_that_is_captured_is_refused_on_its_rank() {
    let told = world(2, "captured_streams", 2).succeed(LIMIT);
    let expected = "the stream is being captured into a graph: gradients can't be";
    assert_eq!((told[0].len(), told[1].len()), (1, 4), "{told:?}");
    for text in &told[1][..3] {
        assert!(text.starts_with("Configuration ") && text.ends_with(expected), "{text}");
    }
    let failed = [&told[0][0], &told[1][3]];
    assert!(failed.iter().all(|text| text.starts_with("StepFailed [1] ")), "{failed:?}");
}

/// The device of rank 1 breaks before it marks a gradient ready: that ends the job.
fn broken_device() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = buckets(&communicator);
    let stream = buckets.device().stream().unwrap();
    if communicator.rank() == 1 {
        let mut found = [0_f32; 21];
        let fails = (0..100).any(|_| buckets.read(0, &mut found, &stream).is_err());
        assert!(fails, "one of the copies breaks the device");
        let step = buckets.begin().unwrap();
        tell_error(&step.ready(0, &stream).unwrap_err());
    } else {
        let step = buckets.begin().unwrap();
        fill(&step, &stream, 0, 1.0);
        // Whichever it hears first, of the step or of the job.
        step.wait(&stream).unwrap_err();
    }
    tell_error(&buckets.device().synchronize(&stream, None).unwrap_err());
}

#[test]
fn a_broken_device_is_not_taken_for_a_captured_stream() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver breaks at will");
        return;
    }
    let all = world(2, "broken_device", 2).set("CUDA_EMULATOR_LEAKS", "");
    let mut running = all.clone().set("CUDA_EMULATOR_FAIL", "copy:50:700").start_ranks(&[1]);
    running.add(&all, 0);
    let ended = running.wait(LIMIT);
    assert!(ended.iter().all(|ended| ended.status == 0), "{ended:#?}");
    let (own, others) = (&ended[0].told, &ended[1].told);
    let text = "rank 1: device 1: cuStreamIsCapturing: CUDA_ERROR_ILLEGAL_ADDRESS (700)";
    assert!(own[0].starts_with("Device [1] ") && own[0].contains(text), "{own:?}");
    assert!(own[1].starts_with("Aborted [1] ") && own[1].contains(text), "{own:?}");
    assert!(others[0].contains(" [1] ") && others[0].contains(text), "{others:?}");
}

/// A child of a rank with a step under way is refused, and does not wait for a thread that it has
/// not.
fn forked() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = buckets(&communicator);
    let stream = buckets.device().stream().unwrap();
    let step = buckets.begin().unwrap();
    if communicator.rank() == 0 {
        // SAFETY: the child only asks what is refused, and ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let is_refused =
                step.wait(&stream).is_err_and(|error| error.kind() == ErrorKind::Forked);
            let found = buckets.take_nonfinite(&stream, None);
            let status = i32::from(!is_refused || found.is_ok());
            // SAFETY: nothing of the parent's is torn down.
            unsafe { libc::_exit(status) };
        }
        let mut status = 0;
        // SAFETY: it is a child of this process, and the status has room.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0, "the child's calls are refused");
    }
    fill(&step, &stream, 0, 2.0);
    step.wait(&stream).unwrap();
}

#[test]
fn a_forked_child_waits_for_nothing() {
    world(2, "forked", 2).succeed(LIMIT);
}
