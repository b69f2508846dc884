//! Collectives on device memory, between processes, against the hosts' collectives by the same
//! algorithm on the same values. The devices are those of an emulated driver
//! (`tests/cuda-emulator`), which interprets the kernels as they are shipped and delays the
//! operations of streams at random.
//!
//! What draws its cases draws other ones in each run; `UNISUM_TEST_DRAWS=all` has all of them.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]
#![allow(unreachable_pub, reason = "modules of a test")]

#[path = "device/buckets.rs"]
mod buckets;
#[path = "device/cases.rs"]
mod cases;
#[path = "device/driver.rs"]
mod driver;
#[path = "device/faults.rs"]
mod faults;
#[path = "device/hosts.rs"]
mod hosts;
#[path = "device/mapped.rs"]
mod mapped;
#[path = "device/multimem.rs"]
mod multimem;
#[path = "device/rails.rs"]
mod rails;
#[path = "device/streams.rs"]
mod streams;
mod support;
#[path = "device/waits.rs"]
mod waits;

use std::time::{Duration, Instant};

use driver::Pool;
use support::{
    Ended, Random, Running, Scenario, World, await_others, reach, setting, tell, tell_error,
};
use unisum::{
    Collective, Communicator, DeviceCommunicator, DeviceRoute, Dtype, ErrorKind, RawDeviceBuffers,
    ReduceOp, Reduction,
};

#[test]
fn rank_process() {
    let here: &[Scenario] = &[
        ("all_reduce_in_place", all_reduce_in_place),
        ("drawn_cases", drawn_cases),
        ("no_driver", no_driver),
        ("staged", staged),
        ("groups", groups),
        ("differ", differ),
        ("reduce_forever", reduce_forever),
        ("buffers_come_and_go", buffers_come_and_go),
        ("one_fails", one_fails),
        ("late_stream", late_stream),
        ("by_pair", by_pair),
        ("refused", refused),
    ];
    let rooms = [here, buckets::SCENARIOS, faults::SCENARIOS, hosts::SCENARIOS];
    let more = [
        mapped::SCENARIOS,
        multimem::SCENARIOS,
        rails::SCENARIOS,
        streams::SCENARIOS,
        waits::SCENARIOS,
    ];
    support::run_if_rank(&[rooms.concat(), more.concat()].concat());
}

const LIMIT: Duration = Duration::from_secs(60);

/// A world with `devices` devices, one for each rank if there are as many; ranks fail if they leave
/// anything behind on them.
fn world(ranks: usize, scenario: &'static str, devices: usize) -> World {
    driver::with(World::new(ranks, scenario), devices)
        .set("UNISUM_TRANSPORT", "shm")
        .set("DEVICES", driver::available(devices))
}

/// The communicator of this rank, on the device that its number says.
fn join() -> (Communicator, DeviceCommunicator) {
    let communicator = Communicator::from_environment().unwrap();
    let devices: usize = setting("DEVICES").parse().unwrap();
    let device = communicator.on_device(communicator.rank() % devices).unwrap();
    (communicator, device)
}

fn all_reduce_in_place() {
    let (communicator, device) = join();
    assert_eq!(*device.route(), DeviceRoute::CudaIpc, "{}", device.describe());
    let stream = device.stream().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let mut buffer = device.allocate::<f32>(1000).unwrap();
    for round in 0..20 {
        let values: Vec<f32> = (0..1000).map(|at| (rank * 7 + at + round) as f32).collect();
        buffer.write(0, &values, &stream).unwrap();
        device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
        let mut result = vec![0.0; 1000];
        buffer.read(0, &mut result, &stream).unwrap();
        device.synchronize(&stream, None).unwrap();
        let expected = |at| (0..world).map(|rank| (rank * 7 + at + round) as f32).sum::<f32>();
        assert_eq!(result, (0..1000).map(expected).collect::<Vec<_>>(), "round {round}");
    }
}

#[test]
fn devices_of_several_processes_reduce() {
    for ranks in [1, 2, 4, 8] {
        world(ranks, "all_reduce_in_place", ranks).succeed(LIMIT);
    }
}

#[test]
fn ranks_share_a_device() {
    world(2, "all_reduce_in_place", 1).succeed(LIMIT);
    world(4, "all_reduce_in_place", 2).succeed(LIMIT);
}

/// Runs the cases that `SEED` draws.
fn drawn_cases() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let cases = cases::drawn(communicator.world());
    let checked = cases.iter().filter(|case| case.check(&communicator, &device, &stream, &pool));
    tell(checked.count());
}

fn draw(ranks: usize, few: usize, delay_us: usize) {
    let seed = support::seed();
    let told = world(ranks, "drawn_cases", ranks)
        .set("SEED", seed)
        .set("FEW", few)
        .set("CUDA_EMULATOR_DELAY_US", delay_us)
        .succeed(if driver::is_whole() { Duration::from_secs(3000) } else { LIMIT });
    println!("{} of {few} drawn cases on {ranks} ranks", told[0][0]);
    let checked: usize = told[0][0].parse().unwrap();
    assert!(checked > few / 2, "most algorithms support {ranks} ranks");
}

#[test]
fn every_collective_gives_the_bits_of_the_hosts_on_2_ranks() {
    draw(2, 120, 0);
    draw(2, 30, 300);
}

#[test]
fn every_collective_gives_the_bits_of_the_hosts_on_4_ranks() {
    draw(4, 60, 0);
    draw(4, 20, 300);
}

#[test]
fn every_collective_gives_the_bits_of_the_hosts_on_8_ranks() {
    draw(8, 30, 0);
}

/// Without one of the waits, the results are wrong in some run; which wait it is, is drawn.
#[test]
fn a_wait_that_is_left_out_is_noticed() {
    let mut random = Random::new();
    let mut noticed = 0;
    for _ in 0..3 {
        let ended = world(2, "drawn_cases", 2)
            .set("SEED", 5)
            .set("FEW", 12)
            .set("CUDA_EMULATOR_DELAY_US", 3000)
            .set("UNISUM_TEST_DROPPED_WAIT", random.below(2))
            .run(LIMIT);
        noticed += usize::from(ended.iter().any(|rank| rank.log.contains(cases::DIFFERS)));
    }
    assert!(noticed > 0, "three runs with a wait left out gave the right bits");
}

fn no_driver() {
    let communicator = Communicator::from_environment().unwrap();
    let ordinal = setting("ORDINAL").parse().unwrap();
    let error = communicator.on_device(ordinal).unwrap_err();
    tell_error(&error);
    let mut data = [1];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    assert_eq!(data, [2], "the communicator is as it was");
}

#[test]
fn without_a_driver_one_sentence_says_so() {
    let world = World::new(2, "no_driver");
    let hidden = world.clone().set("LD_LIBRARY_PATH", driver::empty_directory()).set("ORDINAL", 0);
    for ended in hidden.succeed(LIMIT) {
        let told = &ended[0];
        if driver::has_real_one() {
            continue;
        }
        let expected = "Configuration [0] rank ";
        assert!(told.starts_with(expected), "{told}");
        assert!(told.contains("rank 0 can't use its device: there is no CUDA driver: "), "{told}");
    }
    for (devices, text) in [(0, "but no device"), (1, "there is no device 1: this process sees 1")]
    {
        for ended in driver::with(world.clone(), devices).set("ORDINAL", devices).succeed(LIMIT) {
            assert!(ended[0].contains(text), "{devices} devices: {}", ended[0]);
        }
    }
}

fn staged() {
    let (communicator, device) = join();
    let DeviceRoute::Staged { reason } = device.route() else { panic!("{}", device.describe()) };
    tell(reason);
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    for case in cases::drawn(communicator.world()) {
        let _supported = case.check(&communicator, &device, &stream, &pool);
    }
}

#[test]
fn devices_without_peer_access_go_through_the_hosts() {
    let seed = support::seed();
    let world = world(3, "staged", 3).set("SEED", seed).set("FEW", 40);
    let ended = world.set("CUDA_EMULATOR_PEER_ACCESS", 0).run(LIMIT);
    for (rank, ended) in ended.iter().enumerate() {
        assert_eq!(ended.status, 0, "{ended:#?}");
        let told = &ended.told[0];
        assert!(told.contains("have no peer access") && told.contains("rank 0"), "{told}");
        let warned = ended.log.contains("collectives on device memory go through the hosts'");
        assert_eq!(warned, rank == 0, "{}", ended.log);
    }
}

fn groups() {
    let (communicator, device) = join();
    let rank = communicator.rank();
    let group = communicator.split(Some((rank % 2) as u32), 0).unwrap().unwrap();
    let on_group = group.on_device(device.ordinal()).unwrap();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<i32>(300).unwrap();
    // The same memory in both, in turns.
    for round in 0..5 {
        buffer.write(0, &vec![rank as i32 + round; 300], &stream).unwrap();
        on_group.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
        device.all_reduce(&mut buffer, ReduceOp::Max, &stream).unwrap();
        let mut result = vec![0; 300];
        buffer.read(0, &mut result, &stream).unwrap();
        assert_eq!(result, vec![1 + 3 + 2 * round; 300]);
    }
    drop(on_group);
    device.all_reduce(&mut buffer, ReduceOp::Max, &stream).unwrap();
    drop(buffer);
    device.synchronize(&stream, None).unwrap();
}

#[test]
fn groups_have_device_communicators_of_their_own() {
    world(4, "groups", 4).succeed(LIMIT);
}

/// Ranks disagree in one thing after the other; the communicator stays usable.
fn differ() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let rank = communicator.rank();
    let mut buffer = device.allocate::<f32>(64).unwrap();
    let mut other = device.allocate::<i32>(64).unwrap();
    let mut long = device.allocate::<f32>(65).unwrap();
    let ops = if rank == 1 { [ReduceOp::Max, ReduceOp::Sum] } else { [ReduceOp::Sum; 2] };
    for op in ops {
        let result = device.all_reduce(&mut buffer, op, &stream);
        if let Err(error) = result {
            tell_error(&error);
        }
    }
    let result = match rank {
        1 => device.all_reduce(&mut other, ReduceOp::Sum, &stream),
        _ => device.all_reduce(&mut buffer, ReduceOp::Sum, &stream),
    };
    tell_error(&result.unwrap_err());
    let result = match rank {
        1 => device.all_reduce(&mut long, ReduceOp::Sum, &stream),
        _ => device.all_reduce(&mut buffer, ReduceOp::Sum, &stream),
    };
    tell_error(&result.unwrap_err());
    let scaled = |factor| Reduction::sum_scaled_by(factor);
    let factor = if rank == 1 { 0.25 } else { 0.5 };
    tell_error(&device.all_reduce(&mut buffer, scaled(factor), &stream).unwrap_err());
    let result = device.reduce_scatter(&long, &mut buffer, ReduceOp::Sum, &stream);
    tell_error(&result.unwrap_err());
    device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
}

#[test]
fn ranks_that_differ_are_told_both_values() {
    let expected = [
        &["rank 0 called all_reduce #0 of group 1 (f32 x 64, sum", "(f32 x 64, max"][..],
        &["all_reduce #2 of group 1 (f32 x 64", "all_reduce #2 of group 1 (i32 x 64"],
        &["f32 x 64", "f32 x 65"],
        &["factor 0.5", "factor 0.25"],
        &["rank 0: reduce_scatter of f32 on 2 ranks", "the input has 65 elements"],
    ];
    for told in world(2, "differ", 2).succeed(LIMIT) {
        assert_eq!(told.len(), expected.len(), "{told:#?}");
        for (told, expected) in told.iter().zip(expected) {
            assert!(told.starts_with("Mismatch [0"), "{told}");
            assert!(expected.iter().all(|text| told.contains(text)), "{told}: {expected:?}");
        }
    }
}

fn reduce_forever() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(20_000).unwrap();
    let mut reduce = || {
        device.all_reduce(&mut buffer, ReduceOp::Sum, &stream)?;
        device.synchronize(&stream, None)
    };
    reduce().unwrap();
    reach("reducing");
    let error = loop {
        if let Err(error) = reduce() {
            break error;
        }
    };
    tell_error(&error);
    let again = device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Aborted, "{again}");
    // What is left in the stream ends by itself.
    while !driver::is_done(&stream) {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop((communicator, buffer, stream, device));
}

/// Kills one of these ranks as they reduce: all others name it.
fn kill_one(running: Running, ranks: usize, random: &mut Random) {
    running.wait_for("reducing", ranks, LIMIT);
    let victim = random.below(ranks);
    std::thread::sleep(Duration::from_micros(random.below(30_000) as u64));
    running.signal(victim, libc::SIGKILL);
    let killed = Instant::now();
    let ended = running.wait(Duration::from_secs(20));
    for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        assert_eq!(ended.status, 0, "rank {rank}, victim {victim}: {ended:#?}");
        let told = &ended.told[0];
        assert!(told.starts_with(&format!("RankLost [{victim}] ")), "{told}");
    }
    println!("all others ended {:?} after rank {victim} was killed", killed.elapsed());
}

#[test]
fn a_killed_rank_is_named_and_no_stream_hangs() {
    let mut random = Random::new();
    for delay_us in [0, 0, 500] {
        let world = world(4, "reduce_forever", 4).set("CUDA_EMULATOR_DELAY_US", delay_us);
        let running = world.start();
        kill_one(running, 4, &mut random);
    }
}

/// Buffers that are dropped while others have them open, and memory of a pool.
fn buffers_come_and_go() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let world = communicator.world() as i32;
    for round in 1..40 {
        let mut buffer = device.allocate::<i32>(100 * round).unwrap();
        buffer.write(0, &vec![1; 100 * round], &stream).unwrap();
        device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
        if round % 3 == 0 {
            let mut result = vec![0; 100 * round];
            buffer.read(0, &mut result, &stream).unwrap();
            assert_eq!(result, vec![world; 100 * round]);
        }
    }
    device.synchronize(&stream, None).unwrap();
    tell(driver::allocations());
}

#[test]
fn dropped_buffers_are_freed_once_nobody_has_them_open() {
    for told in world(3, "buffers_come_and_go", 3).succeed(LIMIT) {
        let left: usize = told[0].parse().unwrap();
        assert!(left < 8, "{left} allocations are left of 39");
    }
}

/// The driver of one rank fails in a call.
fn one_fails() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(5000).unwrap();
    let mut all = || {
        for _ in 0..20 {
            device.all_reduce(&mut buffer, ReduceOp::Sum, &stream)?;
            device.synchronize(&stream, None)?;
        }
        Ok(())
    };
    let error: unisum::Error = all().unwrap_err();
    tell_error(&error);
    drop(communicator);
}

#[test]
fn a_failing_driver_is_told_to_all_ranks() {
    let cases = [
        ("cuLaunchKernel:10:700", "cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        ("cuEventRecord:7:719", "cuEventRecord: CUDA_ERROR_LAUNCH_FAILED (719)"),
        ("cuStreamQuery:5:700", "cuStreamQuery: CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        // Codes that a newer driver may have.
        ("cuStreamQuery:5:9999", "cuStreamQuery: an unknown error (9999)"),
        ("cuLaunchKernel:5:1234", "cuLaunchKernel: an unknown error (1234)"),
    ];
    for (injected, text) in cases {
        let running = world(3, "one_fails", 3);
        let failing = running.clone().set("CUDA_EMULATOR_FAIL", injected);
        let mut all = failing.start_ranks(&[1]);
        all.add(&running, 0);
        all.add(&running, 2);
        for ended in all.wait(LIMIT) {
            assert_eq!(ended.status, 0, "{injected}: {ended:#?}");
            let told = &ended.told[0];
            assert!(told.starts_with("Device [1] "), "{injected}: {told}");
            assert!(told.contains("rank 1: device 1: ") && told.contains(text), "{told}");
        }
    }
}

/// One rank never calls.
fn late_stream() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(64).unwrap();
    device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
    if communicator.rank() == 1 {
        await_others("told", 1, LIMIT);
        return;
    }
    let error = device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap_err();
    tell_error(&error);
    reach("told");
}

#[test]
fn a_rank_that_does_not_call_is_named_after_the_deadline() {
    let ended: Vec<Ended> = world(2, "late_stream", 2).set("UNISUM_TIMEOUT", 4).run(LIMIT);
    let told = &ended[0].told[0];
    assert!(told.starts_with("Timeout [1] ") && told.contains("of device memory"), "{told}");
}

/// An all-to-all whose ranks know only their own counts.
fn by_pair() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let count = |from: usize, to: usize| (from * 5 + to * 3) % 7 * 100;
    let sends: Vec<usize> = (0..world).map(|to| count(rank, to)).collect();
    let receives: Vec<usize> = (0..world).map(|from| count(from, rank)).collect();
    let value = |from: usize, to: usize| (from * 100 + to) as u16;
    let input: Vec<u16> = (0..world).flat_map(|to| vec![value(rank, to); sends[to]]).collect();
    let expected: Vec<u16> =
        (0..world).flat_map(|from| vec![value(from, rank); receives[from]]).collect();
    let mut from = device.allocate::<u16>(input.len()).unwrap();
    let mut to = device.allocate::<u16>(expected.len()).unwrap();
    from.write(0, &input, &stream).unwrap();
    let collective = Collective::all_to_all_v(&sends, &receives);
    for _ in 0..3 {
        device.run(&collective, Some(&from), &mut to, &stream).unwrap();
        let mut result = vec![0; expected.len()];
        to.read(0, &mut result, &stream).unwrap();
        assert_eq!(result, expected);
    }
    // One that expects more than it is sent.
    let mut wrong = receives;
    wrong[(rank + 1) % world] += usize::from(rank == 0);
    let mut to = device.allocate::<u16>(wrong.iter().sum()).unwrap();
    let collective = Collective::all_to_all_v(&sends, &wrong);
    tell_error(&device.run(&collective, Some(&from), &mut to, &stream).unwrap_err());
}

#[test]
fn counts_by_pair_are_compared() {
    for told in world(3, "by_pair", 3).succeed(LIMIT) {
        assert!(told[0].starts_with("Mismatch [0, 1] "), "{told:?}");
        assert!(
            told[0].contains("rank 1 sends 500 elements to rank 0, which expects 501"),
            "{told:?}"
        );
    }
}

/// What is refused on all ranks because of one.
fn refused() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(8).unwrap();
    let sum = Collective::all_reduce(ReduceOp::Sum);
    let mut on_host = [0_f32; 8];
    let is_one = communicator.rank() == 1;
    let run = |address: u64, count| {
        // SAFETY: what is not memory of the device is refused.
        let raw = unsafe { RawDeviceBuffers::in_place(Dtype::F32, address, count) };
        device.run_raw(&sum, raw, &stream)
    };
    let host_address = on_host.as_mut_ptr().addr() as u64;
    let address = if is_one { host_address } else { buffer.address() };
    tell_error(&run(address, 8).unwrap_err());
    let address = buffer.address() + if is_one { 1 } else { 0 };
    tell_error(&run(address, 4).unwrap_err());
    // Beyond the end of the allocation.
    tell_error(&run(buffer.address(), 1 << 40).unwrap_err());
    device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
}

#[test]
fn what_one_rank_cannot_do_is_refused_on_all() {
    let expected = [
        ("Configuration [1] ", "is no address of CUDA memory"),
        ("Configuration [1] ", "is not aligned to the 4 bytes of an element"),
        ("Configuration [0] ", "go beyond the end of their allocation"),
    ];
    for told in world(2, "refused", 2).succeed(LIMIT) {
        for (told, (begin, text)) in told.iter().zip(expected) {
            assert!(told.starts_with(begin) && told.contains(text), "{told}");
        }
        assert_eq!(told.len(), expected.len());
    }
}
