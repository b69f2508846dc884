//! All-gathers and reduce-scatters over several hosts, in each of which the devices read each
//! other's memory, against what the hosts make of the same. The hosts are those of `hosts`.

use std::ops::Range;
use std::time::Duration;

use unisum::{
    Collective, Communicator, DeviceBuffer, DeviceCommunicator, DeviceRoute, DeviceStream, Dtype,
    ErrorKind, RawBuffers, RawDeviceBuffers, ReduceOp, Reduction,
};

use super::cases::Host;
use super::driver::{Pool, is_whole};
use super::hosts::world_on;
use super::support::hosts::Hosts;
use super::support::{Random, Scenario, reach, setting, tell, tell_error};
use super::{LIMIT, join, kill_one};

pub const SCENARIOS: &[Scenario] = &[
    ("blocks_over_hosts", blocks_over_hosts),
    ("blocks_forever", blocks_forever),
    ("staged_blocks", staged_blocks),
    ("no_room_for_blocks", no_room_for_blocks),
    ("blocks_that_grow", blocks_that_grow),
    ("blocks_in_two_streams", blocks_in_two_streams),
    ("one_call", one_call),
];

/// Elements before and behind each buffer.
const FRAME: usize = 3;

/// One call.
#[derive(Debug)]
struct Case {
    /// Of a reduce-scatter; else it is an all-gather.
    how: Option<Reduction>,
    op: ReduceOp,
    dtype: Dtype,
    /// Of each rank's block.
    counts: Vec<usize>,
    in_place: bool,
}

/// Small numbers that all types have.
fn number(dtype: Dtype, number: u8) -> Vec<u8> {
    let float = f32::from(number);
    match dtype {
        Dtype::F16 => half::f16::from_f32(float).to_ne_bytes().into(),
        Dtype::Bf16 => half::bf16::from_f32(float).to_ne_bytes().into(),
        Dtype::F32 => float.to_ne_bytes().into(),
        Dtype::F64 => f64::from(float).to_ne_bytes().into(),
        Dtype::F8E4M3 => vec![[0, 0x38, 0x40][usize::from(number)]],
        Dtype::F8E5M2 => vec![[0, 0x3c, 0x40][usize::from(number)]],
        Dtype::Bool => vec![number % 2],
        _ => u64::from(number).to_ne_bytes()[..dtype.bytes()].into(),
    }
}

impl Case {
    fn collective(&self) -> Collective {
        let collective = match self.how {
            Some(how) => Collective::reduce_scatter(how),
            None => Collective::all_gather(),
        };
        let is_even = self.counts.iter().all(|&count| count == self.counts[0]);
        if is_even { collective } else { collective.with_counts(&self.counts) }
    }

    /// Where the block of a rank lies, in bytes.
    fn block(&self, rank: usize) -> Range<usize> {
        let start: usize = self.counts[..rank].iter().sum();
        let each = self.dtype.bytes();
        start * each..(start + self.counts[rank]) * each
    }

    fn whole(&self) -> usize {
        self.counts.iter().sum::<usize>() * self.dtype.bytes()
    }

    /// What a rank puts in: numbers whose results in any order are the same.
    fn input(&self, rank: usize) -> Vec<u8> {
        let world = self.counts.len();
        let of = |at: usize| {
            let drawn = (at * 7 + rank * 13 + at / 5) as u8;
            match self.op {
                // An average of multiples of the world is one; whole numbers are divided once.
                ReduceOp::Average if self.dtype.is_float() => drawn % 2 * world as u8,
                ReduceOp::Average => drawn % 4,
                ReduceOp::Product if !at.is_multiple_of(3) => drawn % 2 + 1,
                ReduceOp::Product => drawn % 2,
                _ => drawn % 3 % 2,
            }
        };
        let range = if self.how.is_some() { 0..self.whole() } else { self.block(rank) };
        let each = self.dtype.bytes();
        match self.how {
            None if self.dtype != Dtype::Bool => {
                range.map(|at| (at * 31 + at / 256 + rank * 101) as u8).collect()
            }
            _ => (range.start / each..range.end / each)
                .flat_map(|at| number(self.dtype, of(at)))
                .collect(),
        }
    }

    /// What the hosts make of it, and whether that is infinite or NaN.
    fn by_hosts(&self, host: &Communicator) -> (Vec<u8>, bool) {
        let (rank, each) = (host.rank(), self.dtype.bytes());
        let mut input = Host::new(&self.input(rank));
        let gets = if self.how.is_some() { self.block(rank).len() } else { self.whole() };
        let mut output = Host::new(&vec![0; gets]);
        let (from, to) = ((input.start(), input.bytes().len() / each), output.start());
        // SAFETY: the memories have so many elements, and nobody else uses them.
        let raw = unsafe { RawBuffers::out_of_place(self.dtype, from, (to, gets / each)) };
        let found = host.run_raw(&self.collective(), raw).unwrap().nonfinite;
        (output.bytes().to_vec(), found)
    }

    /// The device's memory for so many bytes between frames, and where they begin in it.
    fn memory(&self, device: &DeviceCommunicator, bytes: usize) -> (DeviceBuffer<u8>, usize) {
        let frame = FRAME * self.dtype.bytes();
        (device.allocate(bytes + 2 * frame).unwrap(), frame)
    }

    /// Runs it on the device, and compares. The input is there only once the stream has come to it.
    fn check(
        &self,
        host: &Communicator,
        device: &DeviceCommunicator,
        stream: &DeviceStream,
        pool: &Pool,
    ) {
        let (rank, each) = (host.rank(), self.dtype.bytes());
        let (expected, found) = self.by_hosts(host);
        let (own, input) = (self.block(rank), self.input(rank));
        let gathers = self.how.is_none();
        let (mut from, frame) = self.memory(device, input.len());
        let gets = if self.in_place { self.whole() } else { expected.len() };
        let (mut to, _) = self.memory(device, gets);
        from.write(0, &vec![0xa5; from.len()], stream).unwrap();
        to.write(0, &vec![0x5a; to.len()], stream).unwrap();
        let begin = pool.allocate(input.len());
        begin.write(&input, stream);
        let (at, into) = (from.address() + frame as u64, to.address() + frame as u64);
        let puts = match (self.in_place, gathers) {
            (true, true) => into + own.start as u64,
            (true, false) => into,
            _ => at,
        };
        begin.copy(0, puts, input.len(), stream);
        let raw = match self.in_place {
            // SAFETY: so many elements are there, and are read when the stream has passed.
            true => unsafe { RawDeviceBuffers::in_place(self.dtype, into, gets / each) },
            // SAFETY: as above, and the two do not overlap.
            false => unsafe {
                let from = (at, input.len() / each);
                RawDeviceBuffers::out_of_place(self.dtype, from, (into, gets / each))
            },
        };
        device.run_raw(&self.collective(), raw, stream).unwrap();
        let mut result = vec![0; to.len()];
        to.read(0, &mut result, stream).unwrap();
        let got = match (self.in_place, gathers) {
            (true, false) => frame + own.start..frame + own.end,
            _ => frame..frame + gets,
        };
        let wrong = result[got].iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the first wrong byte on rank {rank}: {self:?}");
        let frames = [&result[..frame], &result[frame + gets..]].concat();
        assert_eq!(frames, vec![0x5a; 2 * frame], "around the output: {self:?}");
        if !self.in_place {
            let mut kept = vec![0; input.len()];
            from.read(frame, &mut kept, stream).unwrap();
            assert!(kept == input, "the input: {self:?}");
        }
        assert_eq!(device.take_nonfinite(stream, None).unwrap(), found, "{self:?}");
    }
}

/// Even counts and others, of which some may be 0.
fn counts(random: &mut Random, world: usize) -> Vec<usize> {
    let most = random.of(&[1, 2, 9, 200, 3000]);
    match random.below(2) {
        0 => vec![random.below(most + 1); world],
        _ => (0..world).map(|_| random.below(3) * random.below(most + 1) / 2).collect(),
    }
}

/// Each type and operation, with lengths that all ranks draw alike.
fn all_cases(
    host: &Communicator,
    device: &DeviceCommunicator,
    (stream, pool): (&DeviceStream, &Pool),
    few: bool,
) {
    let (mut random, world) = (Random::new(), host.world());
    let fixed = |count: usize| vec![count; world];
    let check = |how: Option<Reduction>, op, dtype, counts: Vec<usize>, in_place| {
        Case { how, op, dtype, counts, in_place }.check(host, device, stream, pool);
    };
    for in_place in [true, false] {
        for count in [0, 1] {
            check(None, ReduceOp::Sum, Dtype::F32, fixed(count), in_place);
            check(Some(ReduceOp::Sum.into()), ReduceOp::Sum, Dtype::F32, fixed(count), in_place);
        }
        let mut one = vec![0; world];
        one[random.below(world)] = 5;
        check(None, ReduceOp::Sum, Dtype::Bf16, one.clone(), in_place);
        check(Some(ReduceOp::Max.into()), ReduceOp::Max, Dtype::Bf16, one, in_place);
        let scaled = Some(Reduction::sum_scaled_by(0.5));
        check(scaled, ReduceOp::Sum, Dtype::F32, counts(&mut random, world), in_place);
        // What is divided twice is not what is divided once: these are staged.
        let average = Some(ReduceOp::Average.into());
        check(average, ReduceOp::Average, Dtype::I32, fixed(50), in_place);
        for dtype in Dtype::ALL {
            if few && random.below(4) > 0 {
                continue;
            }
            check(None, ReduceOp::Sum, dtype, counts(&mut random, world), in_place);
            for op in ReduceOp::ALL.into_iter().filter(|op| op.is_defined_for(dtype)) {
                // Numbers of 8 bits have no averages without rounding.
                let is_short = dtype.is_float() && dtype.bytes() == 1;
                if is_short && op == ReduceOp::Average || few && random.below(4) > 0 {
                    continue;
                }
                let how = Some(Reduction::new(op).detect_nonfinite());
                check(how, op, dtype, counts(&mut random, world), in_place);
            }
        }
    }
}

/// A result that is infinite in the block of one rank only: that one is told. In long blocks, it is
/// in the first of two waves.
fn one_is_infinite(device: &DeviceCommunicator, stream: &DeviceStream, block: usize) {
    let watched = Reduction::new(ReduceOp::Sum).detect_nonfinite();
    let (rank, world) = (device.rank(), device.world());
    let mut values = vec![1.0_f32; block * world];
    if rank == 0 {
        values[block * (world - 1) + 7] = f32::INFINITY;
    }
    let (mut from, mut to) =
        (device.allocate(values.len()).unwrap(), device.allocate::<f32>(block).unwrap());
    from.write(0, &values, stream).unwrap();
    device.reduce_scatter(&from, &mut to, watched, stream).unwrap();
    assert_eq!(device.take_nonfinite(stream, None).unwrap(), rank == world - 1);
}

fn blocks_over_hosts() {
    let (communicator, device) = join();
    let (hosts, world) = (setting("HOSTS").parse::<usize>().unwrap(), communicator.world());
    let expected = DeviceRoute::Hierarchical { hosts, ranks: world / hosts };
    assert_eq!(*device.route(), expected, "{}", device.describe());
    let (stream, pool) = (device.stream().unwrap(), Pool::new(device.ordinal()));
    let both = [Collective::all_gather(), Collective::reduce_scatter(ReduceOp::Sum)];
    for collective in &both {
        // By the model, what is long goes this way.
        assert_eq!(device.choice::<f32>(collective, 64 << 20), "hierarchical", "{collective:?}");
    }
    device.set_algorithm(Some("hierarchical")).unwrap();
    all_cases(&communicator, &device, (&stream, &pool), setting("FEW") == "1");
    one_is_infinite(&device, &stream, 50);
    if setting("LONG") == "1" {
        one_is_infinite(&device, &stream, (1 << 20) + 77);
        // Three waves, and two.
        let gathered = vec![(8 << 20) + 1001; world];
        let (op, dtype) = (ReduceOp::Max, Dtype::U8);
        Case { how: None, op, dtype, counts: gathered, in_place: true }.check(
            &communicator,
            &device,
            &stream,
            &pool,
        );
        let (how, counts) = (Some(op.into()), vec![(4 << 17) + 101; world]);
        Case { how, op, dtype: Dtype::U64, counts, in_place: false }.check(
            &communicator,
            &device,
            &stream,
            &pool,
        );
    }
    // Through the hosts alone, as any other algorithm.
    device.set_algorithm(Some("ring")).unwrap();
    let counts = vec![70; world];
    for how in [None, Some(ReduceOp::Sum.into())] {
        assert_eq!(device.choice::<f32>(&both[usize::from(how.is_some())], 70 * world), "ring");
        Case { how, op: ReduceOp::Sum, dtype: Dtype::I32, counts: counts.clone(), in_place: false }
            .check(&communicator, &device, &stream, &pool);
    }
    drop(device);
}

/// Ranks by host, in turns, and so that a host's places do not follow each other.
const BY_HOST: fn(usize, usize) -> usize = |rank, each| rank / each;
const IN_TURNS: fn(usize, usize) -> usize = |rank, _| rank % 3;
const MIXED: fn(usize, usize) -> usize = |rank, _| [0, 0, 1, 0, 1, 1, 1, 0][rank];

#[test]
fn hosts_gather_and_scatter_over_their_devices_and_the_network() {
    // All cases if they are wanted, else drawn ones; long ones in the first world.
    for (hosts, each, numbering) in [(2, 2, BY_HOST), (2, 4, MIXED), (3, 2, IN_TURNS)] {
        let Some(_hosts) = Hosts::new(hosts) else { return };
        let ranks = hosts * each;
        let world = world_on("blocks_over_hosts", hosts, ranks, move |rank| numbering(rank, each))
            .set("UNISUM_TEST_SEED", Random::new().below(1 << 30))
            .set("CUDA_EMULATOR_DELAY_US", 50 * ranks)
            .set("FEW", u8::from(!is_whole()))
            .set("LONG", u8::from(ranks == 4));
        world.succeed(Duration::from_secs(120));
    }
}

/// The same where hosts differ, or have one rank each.
fn staged_blocks() {
    let (communicator, device) = join();
    let DeviceRoute::Staged { reason } = device.route() else { panic!("{}", device.describe()) };
    tell(reason);
    let (stream, pool) = (device.stream().unwrap(), Pool::new(device.ordinal()));
    all_cases(&communicator, &device, (&stream, &pool), true);
}

#[test]
fn hosts_that_are_uneven_or_have_one_device_each_are_staged() {
    for (hosts, ranks, each) in [(2, 3, 2), (4, 4, 1)] {
        let Some(_hosts) = Hosts::new(hosts) else { return };
        let world = world_on("staged_blocks", hosts, ranks, move |rank| rank / each);
        let world = world.set("UNISUM_TEST_SEED", Random::new().below(1 << 30));
        let told = world.succeed(LIMIT);
        assert!(told[0][0].contains("are on different hosts"), "{}", told[0][0]);
    }
}

fn blocks_forever() {
    let (communicator, device) = join();
    let (stream, world) = (device.stream().unwrap(), communicator.world());
    let mut block = device.allocate::<f32>(5000).unwrap();
    let mut all = device.allocate::<f32>(5000 * world).unwrap();
    let mut both = || {
        device.all_gather(&block, &mut all, &stream)?;
        device.reduce_scatter(&all, &mut block, ReduceOp::Average, &stream)?;
        device.synchronize(&stream, None)
    };
    both().unwrap();
    reach("reducing");
    let error = std::iter::from_fn(|| Some(both())).find_map(Result::err).unwrap();
    tell_error(&error);
    let again = both().unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Aborted, "{again}");
    while !super::driver::is_done(&stream) {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop((communicator, block, all, stream, device));
}

#[test]
fn a_killed_rank_of_another_host_is_named_in_the_middle_of_a_gathering() {
    let Some(_hosts) = Hosts::new(2) else { return };
    let mut random = Random::new();
    for delay_us in [0, 500] {
        let running = world_on("blocks_forever", 2, 4, |rank| rank / 2)
            .set("UNISUM_ALGORITHM", "hierarchical")
            .set("CUDA_EMULATOR_DELAY_US", delay_us)
            .start();
        kill_one(running, 4, &mut random);
    }
}

/// A reduce-scatter for which rank 1's device has no memory beside the buffers.
fn no_room_for_blocks() {
    let (communicator, device) = join();
    let (stream, pool) = (device.stream().unwrap(), Pool::new(device.ordinal()));
    device.set_algorithm(Some("hierarchical")).unwrap();
    let case = |how| {
        let counts = vec![1000; communicator.world()];
        Case { how, op: ReduceOp::Sum, dtype: Dtype::I32, counts, in_place: false }
    };
    let (world, block) = (communicator.world(), 4 << 20);
    let from = device.allocate::<u8>(block * world).unwrap();
    let mut to = device.allocate::<u8>(block).unwrap();
    tell_error(&device.reduce_scatter(&from, &mut to, ReduceOp::Max, &stream).unwrap_err());
    // Nothing has begun: small calls still fit.
    case(None).check(&communicator, &device, &stream, &pool);
    case(Some(ReduceOp::Sum.into())).check(&communicator, &device, &stream, &pool);
}

#[test]
fn a_device_without_memory_for_what_its_host_reduces_is_told_to_all_ranks() {
    let Some(_hosts) = Hosts::new(2) else { return };
    let all = world_on("no_room_for_blocks", 2, 4, |rank| rank / 2);
    let short = all.clone().set("CUDA_EMULATOR_MEMORY", 26 << 20);
    let mut running = short.start_ranks(&[1]);
    [0, 2, 3].into_iter().for_each(|rank| running.add(&all, rank));
    for ended in running.wait(LIMIT) {
        assert_eq!(ended.status, 0, "{ended:#?}");
        let text = "rank 1: 8388608 bytes beside the buffers: device 1: cuMemAlloc: \
                    CUDA_ERROR_OUT_OF_MEMORY (2)";
        let told = &ended.told[0];
        assert!(told.starts_with("Device [1] ") && told.contains(text), "{told}");
    }
}

/// Reduce-scatters that need more memory each time, on the device and pinned, while the calls
/// before are under way: what is replaced stays as long as anybody uses it, and no longer.
fn blocks_that_grow() {
    let (_communicator, device) = join();
    let (stream, world) = (device.stream().unwrap(), device.world());
    // The last but one has most of a wave, the last has two long waves: half of one is not enough.
    let blocks = [5000, 100 << 10, 1 << 20, 3 << 20, (8 << 20) - 70];
    let longest = blocks[blocks.len() - 1];
    let mut from = device.allocate::<u8>(longest * world).unwrap();
    let own: Vec<u8> = (0..longest * world).map(|at| at as u8 / 2 + device.rank() as u8).collect();
    from.write(0, &own, &stream).unwrap();
    let mut outputs = blocks.map(|block| device.allocate::<u8>(block).unwrap());
    let scatter = Collective::reduce_scatter(ReduceOp::Max);
    let call = |block: usize, to: u64| {
        // SAFETY: so many elements are there, until the stream has ended; the two do not overlap.
        let raw = unsafe {
            let from = (from.address(), block * world);
            RawDeviceBuffers::out_of_place(Dtype::U8, from, (to, block))
        };
        device.run_raw(&scatter, raw, &stream).unwrap();
    };
    call(blocks[0], outputs[0].address());
    let opened = unisum_cuda_ipc::opened();
    for (block, output) in blocks.iter().zip(&outputs) {
        call(*block, output.address());
    }
    for (block, output) in blocks.iter().zip(&mut outputs) {
        let mut result = vec![0; *block];
        output.read(0, &mut result, &stream).unwrap();
        let begin = block * device.rank();
        let expected = |at: usize| (begin + at) as u8 / 2 + world as u8 - 1;
        let wrong = (0..*block).find(|&at| result[at] != expected(at));
        assert_eq!(wrong, None, "{block} elements");
    }
    for _ in 0..10 {
        call(blocks[0], outputs[0].address());
        device.synchronize(&stream, None).unwrap();
    }
    assert_eq!(unisum_cuda_ipc::opened(), opened, "what was replaced is closed");
}

#[test]
fn what_hosts_reduce_into_grows_while_calls_are_under_way() {
    let Some(_hosts) = Hosts::new(2) else { return };
    for delay_us in [0, 3000] {
        world_on("blocks_that_grow", 2, 4, |rank| rank / 2)
            .set("UNISUM_ALGORITHM", "hierarchical")
            .set("CUDA_EMULATOR_DELAY_US", delay_us)
            .succeed(LIMIT);
    }
}

/// A gathering of what a gathering in another stream has brought: nobody waits between them.
fn blocks_in_two_streams() {
    let (_communicator, device) = join();
    let streams = [device.stream().unwrap(), device.stream().unwrap()];
    let (rank, world, pool) = (device.rank(), device.world(), Pool::new(device.ordinal()));
    let own = pool.allocate(100);
    let once = device.allocate::<u8>(100 * world).unwrap();
    let twice = device.allocate::<u8>(100 * world * world).unwrap();
    let gather = |(from, bytes): (u64, usize), to: u64, stream| {
        // SAFETY: so many elements are there, until the streams have ended; the two do not overlap.
        let raw = unsafe {
            RawDeviceBuffers::out_of_place(Dtype::U8, (from, bytes), (to, bytes * world))
        };
        device.run_raw(&Collective::all_gather(), raw, stream).unwrap();
    };
    for round in 0..8 {
        let (first, second) = (&streams[round % 2], &streams[1 - round % 2]);
        let of = |rank: usize| (round * 20 + rank) as u8;
        own.write(&[of(rank); 100], first);
        gather((own.address, 100), once.address(), first);
        gather((once.address(), 100 * world), twice.address(), second);
        let mut result = vec![0; 100 * world * world];
        twice.read(0, &mut result, second).unwrap();
        let right = (0..world * world).flat_map(|block| [of(block % world); 100]);
        assert!(right.eq(result), "round {round}");
    }
}

#[test]
fn calls_over_hosts_in_two_streams_follow_each_other() {
    let Some(_hosts) = Hosts::new(2) else { return };
    world_on("blocks_in_two_streams", 2, 4, |rank| rank / 2)
        .set("UNISUM_ALGORITHM", "hierarchical")
        .set("CUDA_EMULATOR_DELAY_US", 3000)
        .succeed(LIMIT);
}

/// A call, of which nothing else is copied from or to the host.
fn one_call() {
    let (_communicator, device) = join();
    let (stream, world) = (device.stream().unwrap(), device.world());
    let mut block = device.allocate::<f32>(1000).unwrap();
    let mut all = device.allocate::<f32>(1000 * world).unwrap();
    let called = match &setting("CALL")[..] {
        "all_gather" => device.all_gather(&block, &mut all, &stream),
        _ => device.reduce_scatter(&all, &mut block, ReduceOp::Sum, &stream),
    };
    called.unwrap();
    device.synchronize(&stream, None).unwrap();
}

#[test]
fn only_what_other_hosts_need_or_have_made_crosses_to_and_from_a_host() {
    let Some(_hosts) = Hosts::new(3) else { return };
    // Of the blocks of a rail over three hosts.
    for (call, down, up) in [("all_gather", 1, 2), ("reduce_scatter", 3, 1)] {
        let world = world_on("one_call", 3, 6, |rank| rank / 2)
            .set("CALL", call)
            .set("UNISUM_ALGORITHM", "hierarchical")
            .set("CUDA_EMULATOR_COUNTS", 1);
        for ended in world.run(LIMIT) {
            assert_eq!(ended.status, 0, "{ended:#?}");
            for (copy, times) in [("cuMemcpyDtoHAsync_v2", down), ("cuMemcpyHtoDAsync_v2", up)] {
                let counted = format!(" {copy}={times} ");
                assert!(ended.log.contains(&counted), "{call}, {counted}: {}", ended.log);
            }
        }
    }
}
