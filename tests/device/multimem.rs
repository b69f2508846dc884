//! All-reduces in the switch between devices, which the emulated driver has: addresses, barriers,
//! and what happens where a call of the driver fails. It folds in an order that changes from access
//! to access; values whose sums are exact show the rest.

use half::{bf16, f16};
use unisum::{
    Collective, Communicator, DeviceCommunicator, DeviceRoute, DeviceStream, Dtype,
    RawDeviceBuffers, ReduceOp, Reduction,
};

use super::driver;
use super::support::{Ended, Random, Scenario, World, tell};
use super::{LIMIT, join, kill_one, world};

pub const SCENARIOS: &[Scenario] = &[
    ("sums_of_the_switch", sums_of_the_switch),
    ("long_sum", long_sum),
    ("any_values", any_values),
    ("choices_by_size", choices_by_size),
    ("which_way", which_way),
    ("switch_in_one_process", switch_in_one_process),
];

/// With devices that have multicast, and the setting.
fn with_switch(world: &World) -> World {
    let world = world.clone().set("UNISUM_MULTIMEM", 1);
    if driver::is_installed() {
        return world;
    }
    world.set("CUDA_EMULATOR_MULTICAST", 1).set("CUDA_EMULATOR_COMPUTE", 90)
}

/// The same, whatever the model says.
pub fn always(world: &World) -> World {
    with_switch(world).set("UNISUM_TEST_MULTIMEM", 1)
}

const NAME: &str = "multimem";

/// Whether the hardware has none, or fewer devices than ranks. The emulated driver has all.
fn lacks_switch(device: &DeviceCommunicator) -> bool {
    let has = device.describe().contains("the switch adds (multimem)");
    assert!(has || driver::is_installed(), "{}", device.describe());
    if !has {
        println!("skipped: no switch of this machine adds");
    }
    !has
}

/// A whole number as an element.
fn element(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::F32 => value.to_ne_bytes().into(),
        Dtype::F16 => f16::from_f32(value).to_ne_bytes().into(),
        _ => bf16::from_f32(value).to_ne_bytes().into(),
    }
}

fn elements(dtype: Dtype, values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(|value| element(dtype, value)).collect()
}

/// Small enough for sums to be exact in every type.
fn value(rank: usize, at: usize, round: usize) -> f32 {
    ((rank * 5 + at * 3 + round) % 13) as f32 - 4.0
}

/// One call, of which input and output lie in one buffer, behind elements that stay.
struct Call {
    dtype: Dtype,
    op: ReduceOp,
    /// Of f32 sums.
    factor: Option<f64>,
    count: usize,
    shift: usize,
    in_place: bool,
    round: usize,
}

impl Call {
    /// Enqueues it; whoever calls the result gets what is in the output, and around it, then.
    fn enqueue(
        &self,
        device: &DeviceCommunicator,
        stream: &DeviceStream,
    ) -> impl FnOnce() -> (Vec<u8>, Vec<u8>) {
        let &Self { dtype, op, factor, count, shift, in_place, round } = self;
        let how = factor.map_or_else(|| op.into(), Reduction::sum_scaled_by);
        let (unit, rank) = (dtype.bytes(), device.rank());
        let input = elements(dtype, (0..count).map(|at| value(rank, at, round)));
        // Aligned to the element alone, and something behind each.
        let (from, room) = (shift * unit, (shift + count + 5) * unit);
        let to = if in_place { from } else { room + from };
        let mut buffer = device.allocate::<u8>(2 * room).unwrap();
        let mut expected = vec![0xEE; 2 * room];
        buffer.write(0, &expected, stream).unwrap();
        buffer.write(from, &input, stream).unwrap();
        expected[from..from + input.len()].copy_from_slice(&input);
        let at = |offset: usize| (buffer.address() + offset as u64, count);
        let buffers = match in_place {
            // SAFETY: so many elements are there, and are read when the stream has passed.
            true => unsafe { RawDeviceBuffers::in_place(dtype, at(from).0, count) },
            // SAFETY: as above; the two do not overlap.
            false => unsafe { RawDeviceBuffers::out_of_place(dtype, at(from), at(to)) },
        };
        device.run_raw(&Collective::all_reduce(how), buffers, stream).unwrap();
        let world = device.world();
        let sum = |at| (0..world).map(|rank| value(rank, at, round)).sum::<f32>();
        let by = if op == ReduceOp::Average { world as f32 } else { 1.0 };
        let times = factor.unwrap_or(1.0) as f32;
        let output = elements(dtype, (0..count).map(|at| sum(at) * times / by));
        expected[to..to + output.len()].copy_from_slice(&output);
        move || {
            let mut found = vec![0; 2 * room];
            buffer.read(0, &mut found, stream).unwrap();
            (found, expected)
        }
    }
}

/// All types and operations, tails and misaligned places, in place and out of place, and many in
/// flight.
fn sums_of_the_switch() {
    let (_communicator, device) = join();
    if lacks_switch(&device) {
        return;
    }
    let streams = [device.stream().unwrap(), device.stream().unwrap()];
    let ways = [
        (Dtype::F32, ReduceOp::Sum, None),
        (Dtype::F16, ReduceOp::Sum, None),
        (Dtype::Bf16, ReduceOp::Sum, None),
        (Dtype::F32, ReduceOp::Average, None),
        (Dtype::Bf16, ReduceOp::Average, None),
        (Dtype::F32, ReduceOp::Sum, Some(0.5)),
    ];
    let counts = [1, 3, 8, 9, 250, 1023, 5000, 20_001];
    for (number, (dtype, op, factor)) in ways.into_iter().enumerate() {
        let stream = &streams[number % 2];
        let call = |(round, count): (usize, usize)| {
            let (shift, in_place) = ((round + number) % 4, (round + number).is_multiple_of(3));
            Call { dtype, op, factor, count, shift, in_place, round }
        };
        let calls: Vec<_> = counts.into_iter().enumerate().map(call).collect();
        let waiting: Vec<_> = calls.iter().map(|call| call.enqueue(&device, stream)).collect();
        for (call, end) in calls.iter().zip(waiting) {
            let (found, expected) = end();
            let Call { count, shift, in_place, .. } = call;
            let what = format!("{op} of {count} {dtype}, {shift} behind, in place: {in_place}");
            assert!(found == expected, "{what}");
        }
    }
    streams.iter().for_each(|stream| device.synchronize(stream, None).unwrap());
}

/// Counts launches: nothing else may have done it.
fn launches(ended: &[Ended], expected: usize) {
    for ended in ended {
        let counted = |word: &str| {
            let (name, number) = word.split_once('=')?;
            let is_one = name.starts_with("unisum_multimem_");
            number.parse::<usize>().ok().filter(|_| is_one)
        };
        let all: usize = ended.log.split_whitespace().filter_map(counted).sum();
        assert!(ended.status == 0 && all == expected, "{all} launches: {ended:#?}");
    }
}

#[test]
fn the_switch_adds_all_that_it_can() {
    for (ranks, delay_us) in [(2, 0), (2, 300), (3, 300), (4, 0), (8, 0)] {
        let all = always(&world(ranks, "sums_of_the_switch", ranks))
            .set("CUDA_EMULATOR_DELAY_US", delay_us)
            .set("CUDA_EMULATOR_COUNTS", 1);
        if driver::is_installed() {
            all.succeed(LIMIT);
            continue;
        }
        launches(&all.run(LIMIT), 48);
    }
}

/// Longer than the memory that is bound: several launches, which follow one another in it.
fn long_sum() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let count = (8 << 20) / 4 + 1001;
    let (dtype, op) = (Dtype::F32, ReduceOp::Sum);
    for round in 0..2 {
        let call = Call { dtype, op, factor: None, count, shift: 1, in_place: round == 0, round };
        let (found, expected) = call.enqueue(&device, &stream)();
        assert!(found == expected, "round {round}");
    }
}

#[test]
fn what_is_longer_than_the_bound_memory_goes_piece_by_piece() {
    let all = always(&world(2, "long_sum", 2)).set("CUDA_EMULATOR_COUNTS", 1);
    if driver::is_installed() {
        all.succeed(LIMIT);
        return;
    }
    launches(&all.run(LIMIT), 4);
}

/// The switch's order is its own: all ranks get the same bits, near the sum.
fn any_values() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let (rank, world, count) = (communicator.rank(), communicator.world(), 3000);
    let value = |rank: usize, at: usize| ((rank * 7919 + at * 31) as f32 * 0.37).sin() * 1e3;
    let mut buffer = device.allocate::<f32>(count).unwrap();
    buffer.write(0, &(0..count).map(|at| value(rank, at)).collect::<Vec<_>>(), &stream).unwrap();
    let how = Reduction::new(ReduceOp::Sum).detect_nonfinite();
    device.all_reduce(&mut buffer, how, &stream).unwrap();
    let mut found = vec![0.0; count];
    buffer.read(0, &mut found, &stream).unwrap();
    for (at, found) in found.iter().enumerate() {
        let exact = (0..world).map(|rank| f64::from(value(rank, at))).sum::<f64>();
        assert!((f64::from(*found) - exact).abs() < 1e-2, "{found}, not {exact}");
    }
    assert!(!device.take_nonfinite(&stream, None).unwrap(), "all are finite");
    let bits = found
        .iter()
        .fold(0_u64, |hash, it| (hash ^ u64::from(it.to_bits())).wrapping_mul(0x0100_0000_01b3));
    // One rank alone has what is not finite, in the part of another.
    let mut values = vec![1.0_f32; count];
    values[17] = if rank == world - 1 { f32::INFINITY } else { 1.0 };
    buffer.write(0, &values, &stream).unwrap();
    device.all_reduce(&mut buffer, how, &stream).unwrap();
    assert!(device.take_nonfinite(&stream, None).unwrap(), "element 17 is infinite");
    assert!(!device.take_nonfinite(&stream, None).unwrap(), "it was told");
    tell(bits);
}

#[test]
fn all_ranks_get_the_same_bits_of_the_switch() {
    for ranks in [2, 4, 8] {
        let told = always(&world(ranks, "any_values", ranks)).succeed(LIMIT);
        assert!(told.iter().all(|bits| *bits == told[0]), "{told:?}");
    }
}

/// What is done in the switch, with 8 ranks.
fn choices_by_size() {
    let (_communicator, device) = join();
    if lacks_switch(&device) {
        return;
    }
    let sum = Collective::all_reduce(ReduceOp::Sum);
    let average = Collective::all_reduce(ReduceOp::Average);
    let of = |bytes: usize| device.choice::<f32>(&sum, bytes / 4);
    assert_eq!(
        (of(0), of(4 << 10), of(1 << 20), of(64 << 20)),
        ("one-shot", "one-shot", NAME, NAME)
    );
    let count = 1 << 20;
    assert_eq!(
        (device.choice::<f16>(&sum, count), device.choice::<bf16>(&sum, count)),
        (NAME, NAME)
    );
    assert_eq!(device.choice::<bf16>(&average, count), NAME);
    let scaled = Collective::all_reduce(Reduction::sum_scaled_by(0.5));
    assert_eq!(device.choice::<f32>(&scaled, count), NAME);
    let others = [
        device.choice::<f16>(&average, count),
        device.choice::<bf16>(&scaled, count),
        device.choice::<i32>(&sum, count),
        device.choice::<f64>(&sum, count),
        device.choice::<f32>(&Collective::all_reduce(ReduceOp::Max), count),
        device.choice::<f32>(&Collective::reduce_scatter(ReduceOp::Sum), count),
        device.choice::<f32>(&Collective::all_gather(), count),
    ];
    assert!(!others.contains(&NAME), "{others:?}");
    device.set_algorithm(Some("ring")).unwrap();
    assert_eq!(of(1 << 20), "ring", "whoever names an algorithm gets its bits");
    device.set_algorithm(None).unwrap();
    assert_eq!(of(1 << 20), NAME);
}

#[test]
fn a_model_chooses_the_switch() {
    with_switch(&world(8, "choices_by_size", 8)).succeed(LIMIT);
}

/// A sum that is right whoever adds, and who does.
fn which_way() {
    let (communicator, device) = join();
    assert_eq!(*device.route(), DeviceRoute::CudaIpc, "{}", device.describe());
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(1000).unwrap();
    for _ in 0..3 {
        buffer.write(0, &[1.0; 1000], &stream).unwrap();
        device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
        let mut found = [0.0; 1000];
        buffer.read(0, &mut found, &stream).unwrap();
        assert_eq!(found, [communicator.world() as f32; 1000]);
    }
    device.synchronize(&stream, None).unwrap();
    tell(device.choice::<f32>(&Collective::all_reduce(ReduceOp::Sum), 1000));
}

/// Ranks that go without, all of them, and leave nothing behind; what rank 0 alone says of it.
fn without(ended: &[Ended]) -> String {
    for ended in ended {
        assert!(ended.status == 0 && ended.told == ["one-shot"], "{ended:#?}");
    }
    let warned =
        |line: &&str| line.contains("no all-reduce of device memory is done in the switch");
    let told: Vec<_> = ended.iter().flat_map(|ended| ended.log.lines().filter(warned)).collect();
    assert!(told.len() <= 1, "{told:?}");
    told.concat()
}

#[test]
fn the_switch_adds_only_where_it_is_asked_to() {
    let plain = world(2, "which_way", 2);
    let asked = always(&plain);
    let off = asked.clone().set("UNISUM_MULTIMEM", 0);
    let reproducible = asked.clone().set("UNISUM_REPRODUCIBLE", 1);
    for world in [off, reproducible] {
        assert_eq!(without(&world.run(LIMIT)), "");
    }
    if !driver::is_installed() {
        assert_eq!(asked.succeed(LIMIT), [[NAME]; 2]);
    }
}

#[test]
fn without_multicast_on_one_rank_all_go_without() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver has devices that differ");
        return;
    }
    let shared = always(&world(4, "which_way", 2));
    assert!(without(&shared.run(LIMIT)).contains(": ranks share a device"));
    let all = always(&world(3, "which_way", 3));
    for rank in 0..3 {
        let lacking = all.clone().set("CUDA_EMULATOR_MULTICAST", 0);
        let mut running = lacking.start_ranks(&[rank]);
        (0..3).filter(|&other| other != rank).for_each(|other| running.add(&all, other));
        let told = without(&running.wait(LIMIT));
        let why = format!(": rank {rank}: device {rank} (Emulated device {rank}) has no multicast");
        assert!(told.contains(&why), "{told}");
    }
}

/// Each call of the driver that setting it up takes, on a rank that makes it.
#[test]
fn a_call_of_the_driver_that_fails_has_all_go_without() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver injects errors");
        return;
    }
    let all = always(&world(3, "which_way", 3));
    let calls = [
        (0, "cuMulticastGetGranularity:1:1", "CUDA_ERROR_INVALID_VALUE"),
        (0, "cuMulticastCreate:1:801", "CUDA_ERROR_NOT_SUPPORTED"),
        (0, "cuMemExportToShareableHandle:1:999", "CUDA_ERROR_UNKNOWN"),
        (1, "cuMemImportFromShareableHandle:1:999", "CUDA_ERROR_UNKNOWN"),
        (0, "cuMulticastAddDevice:1:101", "CUDA_ERROR_INVALID_DEVICE"),
        (2, "cuMulticastAddDevice:1:101", "CUDA_ERROR_INVALID_DEVICE"),
        (1, "cuMemCreate:1:2", "CUDA_ERROR_OUT_OF_MEMORY"),
        (0, "cuMulticastBindMem:1:2", "CUDA_ERROR_OUT_OF_MEMORY"),
        (2, "cuMulticastBindMem:1:401", "CUDA_ERROR_ILLEGAL_STATE"),
        (1, "cuMemAddressReserve:1:2", "CUDA_ERROR_OUT_OF_MEMORY"),
        (0, "cuMemAddressReserve:2:2", "CUDA_ERROR_OUT_OF_MEMORY"),
        (2, "cuMemMap:1:1", "CUDA_ERROR_INVALID_VALUE"),
        (1, "cuMemMap:2:1", "CUDA_ERROR_INVALID_VALUE"),
        (0, "cuMemSetAccess:1:101", "CUDA_ERROR_INVALID_DEVICE"),
        (2, "cuMemSetAccess:2:101", "CUDA_ERROR_INVALID_DEVICE"),
        // After the other kernels: machine code, which no emulated device takes, then text.
        (1, "cuModuleLoadDataEx:4:222", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    ];
    for (rank, injected, name) in calls {
        let failing = all.clone().set("CUDA_EMULATOR_FAIL", injected);
        let mut running = failing.start_ranks(&[rank]);
        (0..3).filter(|&other| other != rank).for_each(|other| running.add(&all, other));
        let told = without(&running.wait(LIMIT));
        let (call, _) = injected.split_once(':').unwrap();
        let why = format!(": rank {rank}: device {rank}: {call}: {name} (");
        assert!(told.contains(&why), "{injected}: {told}");
    }
}

#[test]
fn a_rank_that_is_killed_while_the_switch_adds_is_named() {
    let mut random = Random::new();
    for delay_us in [0, 500] {
        let all = always(&world(4, "reduce_forever", 4)).set("CUDA_EMULATOR_DELAY_US", delay_us);
        kill_one(all.start(), 4, &mut random);
    }
}

#[test]
fn a_device_that_is_behind_in_the_switch_is_named() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver delays operations");
        return;
    }
    let all = always(&world(2, "behind", 2));
    let slow = all.clone().set("CUDA_EMULATOR_DELAY_US", 600_000);
    let mut running = slow.start_ranks(&[1]);
    running.add(&all, 0);
    for ended in running.wait(LIMIT) {
        let told = ended.told.first().unwrap_or_else(|| panic!("{ended:#?}"));
        let is_named = told.contains("the devices of ranks [1]");
        assert!(told.starts_with("Timeout [1] ") && is_named, "{told}");
    }
}

/// Two ranks in a process, which share two objects.
fn switch_in_one_process() {
    let rank = |rank: usize| {
        let communicator = Communicator::builder().rank(rank).world(2).connect().unwrap();
        let devices = [(); 2].map(|()| communicator.on_device(rank).unwrap());
        for round in 0..10 {
            let device = &devices[round % 2];
            let stream = device.stream().unwrap();
            let (dtype, op) = (Dtype::F32, ReduceOp::Sum);
            let call =
                Call { dtype, op, factor: None, count: 999, shift: 1, in_place: true, round };
            let (found, expected) = call.enqueue(device, &stream)();
            assert!(found == expected, "round {round}");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rank(1));
        rank(0);
    });
}

#[test]
fn ranks_of_one_process_share_the_switch() {
    let all = always(&world(1, "switch_in_one_process", 2)).set("CUDA_EMULATOR_COUNTS", 1);
    if driver::is_installed() {
        all.succeed(LIMIT);
        return;
    }
    launches(&all.run(LIMIT), 20);
}
