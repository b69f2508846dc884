//! Memory that programs map themselves, as expandable segments of PyTorch are: peers open it by
//! descriptors, or by fabric handles, where it was created for that. Else it is copied.

use unisum::{
    Collective, Communicator, DeviceCommunicator, DeviceRoute, DeviceStream, Dtype,
    RawDeviceBuffers, ReduceOp,
};

use super::driver::{Mapping, PART, Pool};
use super::support::{Random, Scenario, World, reach, setting, tell, tell_error};
use super::{LIMIT, join, kill_one, world};

pub const SCENARIOS: &[Scenario] = &[
    ("mapped", mapped),
    ("mapped_once", mapped_once),
    ("mapped_forever", mapped_forever),
    ("mapped_and_long", mapped_and_long),
    ("mapped_by_a_byte", mapped_by_a_byte),
    ("mapped_and_refused", mapped_and_refused),
    ("mapped_anew", mapped_anew),
    ("mapped_for_two_kinds", mapped_for_two_kinds),
    ("mapped_in_one_process", mapped_in_one_process),
    ("mapped_side_by_side", mapped_side_by_side),
];

/// `CU_MEM_HANDLE_TYPE_NONE`, `_POSIX_FILE_DESCRIPTOR` and `_FABRIC`.
const NONE: u32 = 0;
const FILES: u32 = 1;
const FABRIC: u32 = 8;

/// Why what has neither of the latter is copied.
const NEITHER: &str = "it was created without CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR";

/// In the warning that memory is copied.
const COPIED: &str = "collectives copy the";

fn kinds() -> u32 {
    setting("KINDS").parse().unwrap()
}

/// A type for which there is no single launch.
fn values(rank: usize, round: usize, count: usize) -> Vec<u32> {
    (0..count).map(|at| ((rank + 1) * 1000 * (round + 1) + at) as u32).collect()
}

/// Sums within the memory, from one place to another, or in place.
fn sum(
    device: &DeviceCommunicator,
    stream: &DeviceStream,
    memory: &Mapping<'_>,
    (from, to, count): (usize, usize, usize),
    round: usize,
) -> Result<(), unisum::Error> {
    let bytes = |values: Vec<u32>| values.into_iter().flat_map(u32::to_ne_bytes).collect();
    let own: Vec<u8> = bytes(values(device.rank(), round, count));
    memory.write(from, &own, stream);
    let [at, into] = [from, to].map(|offset| memory.base + offset as u64);
    let buffers = match from == to {
        // SAFETY: so many elements are there, and are read when the stream has passed.
        true => unsafe { RawDeviceBuffers::in_place(Dtype::U32, at, count) },
        // SAFETY: as above; the two do not overlap.
        false => unsafe { RawDeviceBuffers::out_of_place(Dtype::U32, (at, count), (into, count)) },
    };
    device.run_raw(&Collective::all_reduce(ReduceOp::Sum), buffers, stream)?;
    device.synchronize(stream, None)?;
    let mut result = vec![0; 4 * count];
    memory.read(to, &mut result, stream);
    let all = (0..device.world()).map(|rank| values(rank, round, count));
    let expected = all.reduce(|sum, own| sum.iter().zip(own).map(|(a, b)| a + b).collect());
    assert!(result == bytes(expected.unwrap()), "round {round}: {count} from {from} to {to}");
    Ok(())
}

/// Sums at all places of memory that comes and goes.
fn mapped() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let mut buffer = device.allocate::<u32>(600).unwrap();
    let mut own = || {
        device.all_reduce(&mut buffer, ReduceOp::Max, &stream).unwrap();
        device.synchronize(&stream, None).unwrap();
    };
    own();
    let before = unisum_cuda_ipc::opened();
    let mut memory = Mapping::new(&pool, 3, kinds());
    let other = Mapping::new(&pool, 1, kinds());
    let places = [
        (0, 0, 600),
        // Within the second part, and over the edge to the third.
        (PART + 4096, PART + 4096, 600),
        (2 * PART - 400, 2 * PART - 400, 600),
        // Parts that overlap with what was exported before, from one to another.
        (PART - 400, 2 * PART, 600),
        (2 * PART, 0, 700),
        (0, 4096, 1),
    ];
    for (round, place) in places.into_iter().enumerate() {
        sum(&device, &stream, &memory, place, round).unwrap();
        sum(&device, &stream, &other, (0, 8192, 300), round).unwrap();
    }
    assert!(kinds() != FILES || unisum_cuda_ipc::opened() > before, "windows are open");
    // In one launch, over an edge.
    let at = memory.base + (PART - 128) as u64;
    // SAFETY: so many elements are there, and stay until the stream has passed.
    let floats = unsafe { RawDeviceBuffers::in_place(Dtype::F32, at, 64) };
    memory.write(PART - 128, &vec![0; 256], &stream);
    device.run_raw(&Collective::all_reduce(ReduceOp::Sum), floats, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
    // Other memory at the same addresses, of one rank only or of all.
    for round in 0..12 {
        if round % 3 == 0 || communicator.rank() == 1 {
            memory.renew(round % 2, kinds());
        }
        let from = if round < 6 { 0 } else { PART - 1200 };
        sum(&device, &stream, &memory, (from, from, 600), 10 + round).unwrap();
    }
    // What the program has unmapped peers close, although nothing else comes there.
    drop((memory, other));
    for _ in 0..40 {
        own();
    }
    if kinds() == FILES {
        assert_eq!(unisum_cuda_ipc::opened(), before, "all windows are closed");
    }
    tell(device.describe());
}

fn of(ranks: usize, devices: usize, kinds: u32) -> World {
    world(ranks, "mapped", devices).set("KINDS", kinds).set("CUDA_EMULATOR_FABRIC", 1)
}

#[test]
fn mapped_memory_is_opened_by_its_descriptors() {
    if super::driver::is_installed() {
        println!("skipped: how much is mapped at once differs by device");
        return;
    }
    // Where there are fabric handles as well, several allocations go by descriptors only.
    let worlds =
        [(2, 2, FILES), (2, 2, FILES | FABRIC), (4, 4, FILES), (4, 2, FILES), (2, 1, FILES)];
    for (ranks, devices, kinds) in worlds {
        let all = of(ranks, devices, kinds).set("CUDA_EMULATOR_DELAY_US", 100);
        for (rank, ended) in all.run(LIMIT).iter().enumerate() {
            assert_eq!(ended.status, 0, "rank {rank}: {ended:#?}");
            assert!(!ended.log.contains(COPIED), "rank {rank}: {}", ended.log);
        }
    }
}

#[test]
fn mapped_memory_that_others_cannot_open_is_copied_and_the_reason_is_told() {
    if super::driver::is_installed() {
        return;
    }
    let several = "it is made of several allocations with fabric handles only";
    for (kinds, why) in [(NONE, NEITHER), (FABRIC, several)] {
        for (rank, ended) in of(2, 2, kinds).run(LIMIT).iter().enumerate() {
            assert_eq!(ended.status, 0, "rank {rank}: {ended:#?}");
            let lines: Vec<_> = ended.log.lines().filter(|line| line.contains(COPIED)).collect();
            assert_eq!(lines.len(), 1, "{}", ended.log);
            let told = lines[0].contains(&format!("rank {rank}: ")) && lines[0].contains(why);
            assert!(told, "{}", lines[0]);
        }
    }
}

/// One allocation, used once after another call.
fn mapped_once() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let memory = Mapping::new(&pool, setting("PARTS").parse().unwrap(), kinds());
    let length = memory.bytes / 4 - 8;
    let place = (memory.bytes - 4 * length.min(600), memory.bytes - 4 * length.min(600), 600);
    let mut result = Ok(());
    for round in 0..3 {
        result = result.and_then(|()| sum(&device, &stream, &memory, place, round));
    }
    match result {
        Ok(()) => tell("right"),
        Err(error) => tell_error(&error),
    }
}

fn once(kinds: u32) -> World {
    world(2, "mapped_once", 2)
        .set("KINDS", kinds)
        .set("PARTS", 1)
        .set("CUDA_EMULATOR_FABRIC", 1)
        .set("CUDA_EMULATOR_COUNTS", 1)
}

#[test]
fn a_fabric_handle_travels_in_the_card() {
    if super::driver::is_installed() {
        return;
    }
    for kinds in [FABRIC, FILES] {
        for ended in once(kinds).run(LIMIT) {
            assert!(ended.status == 0 && ended.told == ["right"], "{ended:#?}");
            assert!(!ended.log.contains(COPIED), "{}", ended.log);
            assert!(ended.log.contains("cuMemImportFromShareableHandle=1 "), "{}", ended.log);
        }
    }
}

/// Rank 1's driver fails in a call of unisum's for the memory: both are told, and nothing is left.
#[test]
fn a_driver_that_fails_to_share_memory_is_told_to_all_ranks() {
    if super::driver::is_installed() {
        return;
    }
    // The program's own calls come first: it reserves, maps and permits access once.
    let calls = [
        ("cuMemRetainAllocationHandle", 1),
        ("cuMemGetAllocationPropertiesFromHandle", 1),
        ("cuMemExportToShareableHandle", 1),
        ("cuMemImportFromShareableHandle", 1),
        ("cuMemAddressReserve", 2),
        ("cuMemMap", 2),
        ("cuMemSetAccess", 2),
    ];
    for (call, nth) in calls {
        let all = once(FILES);
        let failing = all.clone().set("CUDA_EMULATOR_FAIL", format!("{call}:{nth}:999"));
        let mut running = failing.start_ranks(&[1]);
        running.add(&all, 0);
        for ended in running.wait(LIMIT) {
            assert_eq!(ended.status, 0, "{call}: {ended:#?}");
            let text = format!("rank 1: device 1: {call}: CUDA_ERROR_UNKNOWN (999)");
            let told = &ended.told[0];
            assert!(told.starts_with("Device [1] ") && told.contains(&text), "{call}: {told}");
        }
    }
}

/// The driver has no descriptors after all: it is copied. It fails to let go: results are right,
/// and a warning says so.
#[test]
fn a_driver_that_refuses_to_share_memory_or_to_let_go_hurts_nobody() {
    if super::driver::is_installed() {
        return;
    }
    for (call, nth, code, is_copied) in [
        ("cuMemExportToShareableHandle", 1, 1, true),
        ("cuMemExportToShareableHandle", 1, 500, true),
        ("cuMemExportToShareableHandle", 1, 800, true),
        ("cuMemExportToShareableHandle", 1, 801, true),
        // After the program's own.
        ("cuMemUnmap", 2, 999, false),
        ("cuMemRelease", 2, 999, false),
        ("cuMemAddressFree", 2, 999, false),
    ] {
        let all = once(FILES);
        let failing = all
            .clone()
            .set("CUDA_EMULATOR_FAIL", format!("{call}:{nth}:{code}"))
            .set("CUDA_EMULATOR_LEAKS", if is_copied { "fail" } else { "" });
        let mut running = failing.start_ranks(&[1]);
        running.add(&all, 0);
        for (ended, rank) in running.wait(LIMIT).iter().zip([1, 0]) {
            assert!(ended.status == 0 && ended.told == ["right"], "{call}: {ended:#?}");
            assert_eq!(ended.log.contains(COPIED), is_copied && rank == 1, "{}", ended.log);
            // What can't be unmapped can't be given back either.
            let calls = if call == "cuMemUnmap" { 2 } else { 1 };
            let text = format!("rank 1: {calls} calls of the driver have failed");
            let unclosed = ended.log.contains(&text);
            assert_eq!(unclosed, !is_copied && rank == 1, "{call}: {}", ended.log);
        }
    }
}

/// Peers have the second part and the third; then one allocation takes the place of the first two.
fn mapped_anew() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let mut memory = Mapping::new(&pool, 4, FILES);
    let over = |edge: usize| (edge * PART - 400, edge * PART - 400, 600);
    sum(&device, &stream, &memory, over(2), 0).unwrap();
    memory.join(0, FILES);
    // What overlaps with what peers have now begins within an allocation.
    for (round, edge) in [3, 2, 1].into_iter().enumerate() {
        sum(&device, &stream, &memory, over(edge), 1 + round).unwrap();
    }
    drop(device);
}

#[test]
fn what_takes_the_place_of_known_memory_is_opened_as_it_lies() {
    if super::driver::is_installed() {
        return;
    }
    for ended in world(2, "mapped_anew", 2).run(LIMIT) {
        assert_eq!(ended.status, 0, "{ended:#?}");
        assert!(!ended.log.contains(COPIED), "{}", ended.log);
    }
}

/// A buffer that has one byte of a part, for which there is other memory after each call.
fn mapped_by_a_byte() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let mut memory = Mapping::new(&pool, 2, FILES);
    for round in 0..3 {
        let sent = [2 * round + 1, 2 * round + 2];
        if communicator.rank() == 0 {
            memory.write(PART - 1, &sent, &stream);
        }
        let at = memory.base + PART as u64 - 1;
        // SAFETY: so many bytes are there, until the stream has ended.
        let both = unsafe { RawDeviceBuffers::in_place(Dtype::U8, at, 2) };
        device.run_raw(&Collective::broadcast(0), both, &stream).unwrap();
        device.synchronize(&stream, None).unwrap();
        let mut read = [0; 2];
        memory.read(PART - 1, &mut read, &stream);
        assert_eq!(read, sent, "round {round}");
        memory.renew(0, FILES);
    }
    drop(device);
}

#[test]
fn other_memory_behind_a_single_byte_is_noticed() {
    if super::driver::is_installed() {
        return;
    }
    world(2, "mapped_by_a_byte", 2).succeed(LIMIT);
}

/// Two allocations side by side, of which one may not be exported.
fn mapped_for_two_kinds() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let mut memory = Mapping::new(&pool, 2, FILES);
    memory.renew(setting("PART").parse().unwrap(), NONE);
    for round in 0..2 {
        sum(&device, &stream, &memory, (PART - 400, PART - 400, 600), round).unwrap();
    }
    drop(device);
}

#[test]
fn memory_of_which_a_part_cannot_be_exported_is_copied_and_the_reason_is_told() {
    if super::driver::is_installed() {
        return;
    }
    for part in [0, 1] {
        for ended in world(2, "mapped_for_two_kinds", 2).set("PART", part).run(LIMIT) {
            assert_eq!(ended.status, 0, "{ended:#?}");
            assert!(ended.log.contains(COPIED) && ended.log.contains(NEITHER), "{}", ended.log);
        }
    }
}

/// A buffer over two allocations, of which rank 0's can't be used: the second is on the other
/// device, or the driver says once that the program has not mapped it.
fn mapped_and_refused() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let (pool, other) = (Pool::new(device.ordinal()), Pool::new(1 - device.ordinal()));
    let mut memory = Mapping::new(&pool, 2, FILES);
    if setting("ELSEWHERE") == "true" {
        memory.renew_on(&other, 1, FILES);
    }
    let over_the_edge = (PART - 400, PART - 400, 600);
    tell_error(&sum(&device, &stream, &memory, over_the_edge, 0).unwrap_err());
    sum(&device, &stream, &memory, (0, 0, 600), 1).unwrap();
    drop(device);
}

#[test]
fn a_buffer_that_ends_where_it_must_not_is_refused_on_all_ranks() {
    if super::driver::is_installed() {
        return;
    }
    let all = world(2, "mapped_and_refused", 2).set("ELSEWHERE", false);
    let on_other = all.clone().set("ELSEWHERE", true);
    // Memory of `cuMemAlloc` may lie side by side, too, but not as one: here nothing lies so.
    let not_mapped = all.clone().set("CUDA_EMULATOR_FAIL", "cuMemRetainAllocationHandle:1:1");
    for (refused, why) in [
        (on_other, "is on device 1, not on device 0"),
        (not_mapped, "go beyond the end of their allocation"),
    ] {
        let mut running = refused.start_ranks(&[0]);
        running.add(&all, 1);
        for ended in running.wait(LIMIT) {
            assert_eq!(ended.status, 0, "{ended:#?}");
            let told = &ended.told[0];
            let is_named = told.starts_with("Configuration [0] ") && told.contains("rank 0: ");
            assert!(is_named && told.contains(why), "{told}");
        }
    }
}

fn mapped_forever() {
    let (_communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let mut memory = Mapping::new(&pool, 2, FILES);
    let place = (PART - 400, PART - 400, 5000);
    sum(&device, &stream, &memory, place, 0).unwrap();
    reach("reducing");
    let error = (1..).find_map(|round| {
        if round % 5 == 0 {
            memory.renew(1, FILES);
        }
        sum(&device, &stream, &memory, place, round % 100).err()
    });
    tell_error(&error.unwrap());
    drop(device);
}

#[test]
fn a_killed_rank_whose_mapped_memory_is_open_is_named_and_nothing_is_left() {
    if super::driver::is_installed() {
        return;
    }
    let mut random = Random::new();
    for ranks in [2, 4, 4] {
        let running = world(ranks, "mapped_forever", ranks).start();
        kill_one(running, ranks, &mut random);
    }
}

/// A broadcast of all of a range, of which as many parts can be sent, or one more.
fn mapped_and_long() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let pool = Pool::new(device.ordinal());
    let memory = Mapping::new(&pool, setting("PARTS").parse().unwrap(), FILES);
    let marks: Vec<usize> = (0..memory.bytes).step_by(PART).collect();
    for mark in marks.iter().filter(|_| communicator.rank() == 0) {
        memory.write(*mark, &mark.to_ne_bytes(), &stream);
    }
    // SAFETY: so many bytes are there, until the stream has ended.
    let whole = unsafe { RawDeviceBuffers::in_place(Dtype::U8, memory.base, memory.bytes) };
    device.run_raw(&Collective::broadcast(0), whole, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
    for mark in marks {
        let mut read = [0; 8];
        memory.read(mark, &mut read, &stream);
        assert_eq!(usize::from_ne_bytes(read), mark);
    }
}

#[test]
fn as_many_allocations_as_descriptors_can_be_sent_are_opened() {
    if super::driver::is_installed() {
        return;
    }
    for parts in [64, 65] {
        let all = world(2, "mapped_and_long", 2).set("PARTS", parts);
        for ended in all.run(LIMIT) {
            assert_eq!(ended.status, 0, "{ended:#?}");
            let why = "65 allocations back it, of 64 at most";
            assert_eq!(ended.log.contains(why), parts == 65, "{}", ended.log);
        }
    }
}

/// Two ranks in this process, whose devices have no access to what the other has mapped.
fn mapped_in_one_process() {
    let rank = |rank: usize| {
        let communicator = Communicator::builder().rank(rank).world(2).connect().unwrap();
        let device = communicator.on_device(rank).unwrap();
        assert_eq!(*device.route(), DeviceRoute::CudaIpc, "{}", device.describe());
        let stream = device.stream().unwrap();
        let pool = Pool::new(rank);
        let memory = Mapping::new(&pool, 2, FILES);
        for round in 0..5 {
            sum(&device, &stream, &memory, (PART - 400, PART - 400, 3000), round).unwrap();
        }
        drop(device);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rank(1));
        rank(0);
    });
}

#[test]
fn ranks_of_one_process_open_each_others_mapped_memory() {
    if super::driver::is_installed() {
        return;
    }
    world(1, "mapped_in_one_process", 2).succeed(LIMIT);
}

/// What is assumed of the driver: it tells of the mapping that an address lies in, whatever lies
/// beside it.
fn mapped_side_by_side() {
    let (_communicator, device) = join();
    let pool = Pool::new(device.ordinal());
    let memory = Mapping::new(&pool, 3, FILES);
    for (part, within) in (0..3).flat_map(|part| [0, 1, PART / 2, PART - 1].map(|at| (part, at))) {
        let (at, length) = pool.range(memory.base + (part * PART + within) as u64);
        let told = (at.wrapping_sub(memory.base) as usize, length);
        assert_eq!(
            told,
            (part * PART, PART),
            "cuMemGetAddressRange does not tell of each mapping on its own: first byte and length, \
             from an address {within} bytes into mapping {part}"
        );
    }
}

#[test]
fn each_mapping_is_told_on_its_own() {
    let one = world(1, "mapped_side_by_side", 1);
    one.succeed(LIMIT);
    if super::driver::is_installed() {
        return;
    }
    for ended in one.set("CUDA_EMULATOR_MERGED", 1).run(LIMIT) {
        assert!(ended.status != 0, "{ended:#?}");
        let text = "cuMemGetAddressRange does not tell of each mapping on its own";
        assert!(ended.log.contains(text), "{}", ended.log);
    }
}
