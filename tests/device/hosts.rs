//! All-reduces over several hosts, in each of which the devices read each other's memory. The hosts
//! are network namespaces of this one, whose devices are all those of one emulated driver: that
//! devices of different hosts can't read each other's memory is agreed upon by the ranks, not held
//! by the driver.

use std::time::Duration;

use unisum::{
    Collective, DeviceCommunicator, DeviceRoute, DeviceStream, Element, RawDeviceBuffers, ReduceOp,
    Reduction,
};

use super::support::hosts::{Hosts, inside};
use super::support::{Random, Scenario, World, await_others, reach, setting, tell, tell_error};
use super::{LIMIT, join};

pub const SCENARIOS: &[Scenario] = &[
    ("hierarchical", hierarchical),
    ("hosts_reduce_forever", super::reduce_forever),
    ("uneven_hosts", uneven_hosts),
    ("other_stream_is_late", other_stream_is_late),
];

/// A world of hosts with `each` ranks, which are numbered host by host or in turns.
fn world(scenario: &'static str, (hosts, each): (usize, usize), in_turns: bool) -> World {
    let host = move |rank| if in_turns { rank % hosts } else { rank / each };
    world_on(scenario, hosts, hosts * each, host).set("DRAWN", Random::new().below(3000))
}

/// A world on so many hosts; `host` says on which one each rank is.
pub fn world_on(
    scenario: &'static str,
    hosts: usize,
    ranks: usize,
    host: impl Fn(usize) -> usize + Send + Sync + 'static,
) -> World {
    super::world(ranks, scenario, ranks)
        .set("UNISUM_TRANSPORT", "auto")
        .set("UNISUM_INTERFACE", "")
        .set("HOSTS", hosts)
        .through(move |rank| inside(host(rank)))
}

/// How an element of the result is made of those of the ranks.
fn expected(op: ReduceOp, inputs: impl Iterator<Item = i64>, world: i64) -> i64 {
    match op {
        ReduceOp::Sum => inputs.sum(),
        ReduceOp::Average => inputs.sum::<i64>() / world,
        ReduceOp::Min => inputs.min().unwrap(),
        ReduceOp::Max => inputs.max().unwrap(),
        ReduceOp::Product => inputs.product(),
        _ => inputs.fold(0, |a, b| a ^ b),
    }
}

/// Small numbers, whose results all types have exactly.
fn value(rank: usize, at: usize, op: ReduceOp) -> i64 {
    let number = (at * 7 + rank * 13) as i64;
    match op {
        ReduceOp::Product => number % 2 + 1,
        _ => number % 5,
    }
}

/// Reduces one buffer, in place or not, within memory that is longer; the result must be that of
/// whole numbers, and nothing else may have changed.
fn reduce<T: Element + PartialEq + std::fmt::Debug>(
    device: &DeviceCommunicator,
    stream: &DeviceStream,
    (op, count, in_place): (ReduceOp, usize, bool),
    of: fn(i64) -> T,
) {
    const SKIPPED: usize = 3;
    let (rank, world) = (device.rank(), device.world());
    // An average of values that are multiples of the world is one.
    let times = if op == ReduceOp::Average { world as i64 } else { 1 };
    let values = |rank| (0..count).map(move |at| value(rank, at, op) * times);
    let framed = |inner: Vec<T>| [vec![of(1); SKIPPED], inner, vec![of(1); SKIPPED]].concat();
    let own = framed(values(rank).map(of).collect());
    let (mut input, mut output) =
        (device.allocate::<T>(own.len()).unwrap(), device.allocate::<T>(own.len()).unwrap());
    input.write(0, &own, stream).unwrap();
    output.write(0, &framed(vec![of(2); count]), stream).unwrap();
    let at = |buffer: u64| buffer + (SKIPPED * size_of::<T>()) as u64;
    let (from, to) = (at(input.address()), at(output.address()));
    let result = if in_place { &input } else { &output };
    let buffers = match in_place {
        // SAFETY: so many elements are there, and are read when the stream has passed.
        true => unsafe { RawDeviceBuffers::in_place(T::DTYPE, from, count) },
        // SAFETY: as above, and the two buffers do not overlap.
        false => unsafe { RawDeviceBuffers::out_of_place(T::DTYPE, (from, count), (to, count)) },
    };
    device.run_raw(&Collective::all_reduce(op), buffers, stream).unwrap();
    let mut read = vec![of(0); own.len()];
    result.read(0, &mut read, stream).unwrap();
    let all: Vec<Vec<i64>> = (0..world).map(|rank| values(rank).collect()).collect();
    let reduced = (0..count).map(|at| expected(op, all.iter().map(|it| it[at]), world as i64));
    let what = format!("{op} of {count} elements of {}, in place: {in_place}", T::DTYPE);
    assert!(read == framed(reduced.map(of).collect()), "{what}");
    if !in_place {
        input.read(0, &mut read, stream).unwrap();
        assert!(read == own, "the input of {what}");
    }
}

fn all_lengths(device: &DeviceCommunicator, stream: &DeviceStream, op: ReduceOp) {
    let drawn = setting("DRAWN").parse().unwrap();
    for count in [0, 1, device.world() + 1, 1000, drawn] {
        for in_place in [true, false] {
            let call = (op, count, in_place);
            reduce::<i32>(device, stream, call, |it| it as i32);
            reduce::<u8>(device, stream, call, |it| it as u8);
            if op != ReduceOp::BitXor {
                reduce::<f32>(device, stream, call, |it| it as f32);
                reduce::<half::f16>(device, stream, call, |it| half::f16::from_f32(it as f32));
                reduce::<f64>(device, stream, call, |it| it as f64);
            }
        }
    }
}

/// A result that is infinite in one element of one rank's: all ranks are told, by its kind only.
fn one_is_infinite(device: &DeviceCommunicator, stream: &DeviceStream) {
    let watched = Reduction::new(ReduceOp::Sum).detect_nonfinite();
    let world = device.world();
    let mut buffer = device.allocate::<f32>(64 * world).unwrap();
    for place in [None, Some(0), Some(64 * world - 1), Some(100), None] {
        let mut values = vec![1.0; 64 * world];
        if let Some(place) = place.filter(|_| device.rank() == world - 1) {
            values[place] = f32::INFINITY;
        }
        buffer.write(0, &values, stream).unwrap();
        device.all_reduce(&mut buffer, watched, stream).unwrap();
        assert_eq!(device.take_nonfinite(stream, None).unwrap(), place.is_some(), "{place:?}");
    }
}

fn hierarchical() {
    let (communicator, device) = join();
    let (hosts, world) = (setting("HOSTS").parse::<usize>().unwrap(), communicator.world());
    let expected = DeviceRoute::Hierarchical { hosts, ranks: world / hosts };
    assert_eq!(*device.route(), expected, "{}", device.describe());
    tell(device.describe());
    let stream = device.stream().unwrap();
    let all_reduce = Collective::all_reduce(ReduceOp::Sum);
    // By the model, what is long goes this way.
    assert_eq!(device.choice::<f32>(&all_reduce, 64 << 20), "hierarchical");
    device.set_algorithm(Some("hierarchical")).unwrap();
    assert_eq!(device.choice::<f32>(&all_reduce, 2), "hierarchical");
    for op in ReduceOp::ALL {
        if !matches!(op, ReduceOp::BitAnd | ReduceOp::BitOr) {
            all_lengths(&device, &stream, op);
        }
    }
    one_is_infinite(&device, &stream);
    // In pieces: a block of each device and 4 MiB of another.
    let long = ((world / hosts) << 20) + 1001;
    reduce::<f32>(&device, &stream, (ReduceOp::Sum, long, true), |it| it as f32);
    // Through the hosts alone, as any other algorithm.
    device.set_algorithm(Some("ring")).unwrap();
    assert_eq!(device.choice::<f32>(&all_reduce, 1000), "ring");
    all_lengths(&device, &stream, ReduceOp::Sum);
    device.set_algorithm(None).unwrap();
    all_lengths(&device, &stream, ReduceOp::Max);
    drop(device);
}

#[test]
fn hosts_reduce_over_their_devices_and_the_network() {
    for (hosts, each, in_turns) in [(2, 2, false), (3, 2, true), (2, 3, false)] {
        let Some(_hosts) = Hosts::new(hosts) else { return };
        let world = world("hierarchical", (hosts, each), in_turns);
        let world = world.set("CUDA_EMULATOR_DELAY_US", 50 * hosts * each);
        let told = world.succeed(Duration::from_secs(120));
        let line = format!("on {hosts} hosts, the {each} devices of each");
        assert!(told[0][0].contains(&line), "{}", told[0][0]);
    }
}

fn uneven_hosts() {
    let (_communicator, device) = join();
    let DeviceRoute::Staged { reason } = device.route() else { panic!("{}", device.describe()) };
    tell(reason);
    let stream = device.stream().unwrap();
    all_lengths(&device, &stream, ReduceOp::Sum);
}

/// One device here and two there; two on each, of which one pair has no access.
#[test]
fn hosts_that_differ_are_staged() {
    let Some(_hosts) = Hosts::new(2) else { return };
    let three = world("uneven_hosts", (2, 2), false);
    let uneven = super::world(3, "uneven_hosts", 3)
        .set("UNISUM_TRANSPORT", "auto")
        .set("UNISUM_INTERFACE", "")
        .set("DRAWN", 77)
        .through(|rank| inside(rank / 2));
    let told = uneven.succeed(LIMIT);
    assert!(told[0][0].contains("are on different hosts"), "{}", told[0][0]);
    let told = three.set("CUDA_EMULATOR_PEER_ACCESS", 0).succeed(LIMIT);
    assert!(told[0][0].contains("no peer access"), "{}", told[0][0]);
}

#[test]
fn a_killed_rank_of_another_host_is_named_and_no_stream_hangs() {
    let Some(_hosts) = Hosts::new(2) else { return };
    let mut random = Random::new();
    for delay_us in [0, 500] {
        let world = world("hosts_reduce_forever", (2, 2), false)
            .set("UNISUM_ALGORITHM", "hierarchical")
            .set("CUDA_EMULATOR_DELAY_US", delay_us);
        let running = world.start();
        running.wait_for("reducing", 4, LIMIT);
        let victim = random.below(4);
        std::thread::sleep(Duration::from_micros(random.below(30_000) as u64));
        running.signal(victim, libc::SIGKILL);
        let ended = running.wait(Duration::from_secs(20));
        for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            assert_eq!(ended.status, 0, "rank {rank}, victim {victim}: {ended:#?}");
            let told = &ended.told[0];
            assert!(told.starts_with(&format!("RankLost [{victim}] ")), "{told}");
        }
    }
}

/// A rank whose stream does other work for longer than a call may take.
fn other_stream_is_late() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let mut buffer = device.allocate::<f32>(1000).unwrap();
    device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
    device.synchronize(&stream, None).unwrap();
    if communicator.rank() == 3 {
        await_others("told", 3, LIMIT);
        return;
    }
    let error = device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap_err();
    tell_error(&error);
    reach("told");
}

#[test]
fn a_rank_that_does_not_call_on_another_host_is_named() {
    let Some(_hosts) = Hosts::new(2) else { return };
    let world = world("other_stream_is_late", (2, 2), false);
    let ended = world.set("UNISUM_ALGORITHM", "hierarchical").set("UNISUM_TIMEOUT", 4).run(LIMIT);
    for ended in &ended[..3] {
        let told = &ended.told[0];
        assert!(told.starts_with("Timeout [3] ") && told.contains("of device memory"), "{told}");
    }
}
