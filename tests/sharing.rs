//! Sharing memory where something stands against it: namespaces, limits, deaths. It works, or the
//! rank that stands in the way is named by all, at once.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use support::{Ended, Random, World, reach, setting, tell, tell_error};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Buffers, Collective, Communicator, Dtype, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("sum", sum),
        ("fall_at_start", fall_at_start),
        ("make", make),
        ("full_heap", full_heap),
        ("small_stack", small_stack),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);
/// Half of what ranks wait for one that they don't know to be gone: the machine may be busy.
const MOMENTS: Duration = Duration::from_secs(30);

/// Joins, sums, and tells over what, how long joining took, and how it ended.
fn sum() {
    let start = Instant::now();
    let result = Communicator::from_environment().and_then(|communicator| {
        tell(format!("{} {}", communicator.transport(), start.elapsed().as_millis()));
        let rank = communicator.rank() as u64;
        let expected: u64 = (0..communicator.world() as u64).sum();
        for count in [1, 3000, 300_000] {
            let (mut private, mut shared) = (vec![rank; count], communicator.allocate(count)?);
            shared.fill(rank);
            communicator.all_reduce(&mut private, ReduceOp::Sum)?;
            communicator.all_reduce(&mut shared, ReduceOp::Sum)?;
            assert!(private.iter().chain(shared.iter()).all(|&sum| sum == expected));
        }
        Ok(())
    });
    match result {
        Ok(()) => tell("Ok"),
        Err(error) => tell_error(&error),
    }
}

/// Whether the commands of a container can be had here.
fn has_namespaces() -> bool {
    let output = Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).output();
    let works = output.is_ok_and(|output| output.status.success());
    let required = std::env::var("UNISUM_TEST_NAMESPACES").is_ok_and(|word| word == "required");
    assert!(works || !required, "no namespaces");
    if !works {
        println!("skipped: no namespaces");
    }
    works
}

const KINDS: [&[&str]; 6] = [
    &["--pid", "--fork", "--kill-child", "--mount-proc"],
    &["--ipc"],
    &["--uts"],
    &["--mount"],
    &["--user", "--map-root-user"],
    &["--user"],
];

/// A command that runs another in namespaces of its own, of the kinds whose bits are set.
fn container(kinds: usize) -> Vec<String> {
    let chosen = (0..KINDS.len()).filter(|kind| kinds >> kind & 1 == 1);
    let words: Vec<&str> = chosen.flat_map(|kind| KINDS[kind].iter().copied()).collect();
    if words.is_empty() {
        return Vec::new();
    }
    ["unshare"].into_iter().chain(words).map(str::to_owned).collect()
}

#[test]
fn containers_of_one_host_and_network_share_memory_at_once() {
    if !has_namespaces() {
        return;
    }
    let mut draw = Random::new();
    let mut cases: Vec<Vec<usize>> = (0..KINDS.len()).map(|kind| vec![1 << kind; 2]).collect();
    // Some inside and some outside; any kinds together.
    cases.push(vec![0, 1, 0]);
    for _ in 0..4 {
        cases.push((0..3).map(|_| draw.below(1 << KINDS.len())).collect());
    }
    for case in cases {
        println!("namespaces: {case:?}");
        let kinds = case.clone();
        let world = World::new(case.len(), "sum").through(move |rank| container(kinds[rank]));
        for told in world.succeed(LIMIT) {
            let (transport, millis) = told[0].split_once(' ').unwrap();
            let took = Duration::from_millis(millis.parse().unwrap());
            assert!(transport == "shm" && took < MOMENTS, "{case:?}: {told:?}");
            assert_eq!(told[1], "Ok");
        }
    }
}

/// Runs one rank of a world with a limit of `prlimit`.
fn limited(world: &World, victim: usize, limit: String) -> World {
    let words = move |rank| match rank == victim {
        true => vec!["prlimit".to_owned(), limit.clone()],
        false => Vec::new(),
    };
    world.clone().through(words)
}

/// All end with what `is_right` finds right, within moments.
fn expect(ended: &[Ended], case: &str, is_right: impl Fn(usize, &str) -> bool) {
    for (rank, it) in ended.iter().enumerate() {
        let last = it.told.last().map_or("", String::as_str);
        assert!(it.status == 0 && is_right(rank, last), "{case}, rank {rank}: {ended:#?}");
    }
}

#[test]
fn where_no_memory_can_be_made_all_use_tcp_at_once_and_the_log_says_why() {
    let world = World::new(3, "sum");
    let start = Instant::now();
    let ended = limited(&world, 0, "--fsize=65536".into()).run(LIMIT);
    assert!(start.elapsed() < MOMENTS, "{:?}", start.elapsed());
    expect(&ended, "auto", |_, told| told == "Ok");
    assert!(ended.iter().all(|ended| ended.told[0].starts_with("tcp ")), "{ended:#?}");
    let says_why = |ended: &&Ended| {
        let mut lines = ended.log.lines();
        lines.any(|line| line.contains("WARN") && line.contains("fitting shared memory"))
    };
    assert_eq!(ended.iter().filter(says_why).count(), 1, "{ended:#?}");

    // The rank that could make none is the one to name, and not those that asked it for memory.
    let world = world.set("UNISUM_TRANSPORT", "shm");
    let start = Instant::now();
    let ended = limited(&world, 0, "--fsize=65536".into()).run(LIMIT);
    assert!(start.elapsed() < MOMENTS, "{:?}", start.elapsed());
    expect(&ended, "shm", |_, told| {
        told.starts_with("Configuration [0] ") && told.contains("fitting shared memory")
    });
}

/// Ends, or stops, this process some time after it has mapped the memory of its host.
fn fall_after_mapping() {
    let (signal, micros) = (setting("SIGNAL").parse().unwrap(), setting("MICROS").parse().unwrap());
    std::thread::spawn(move || {
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        while !maps().contains("memfd:unisum") {}
        std::thread::sleep(Duration::from_micros(micros));
        reach("fallen");
        // SAFETY: ends or stops this process, and nothing else.
        unsafe { libc::kill(std::process::id() as i32, signal) };
    });
}

fn fall_at_start() {
    if setting("UNISUM_RANK") == setting("VICTIM") {
        fall_after_mapping();
    }
    let forever = |communicator: Communicator| {
        loop {
            if let Err(error) = communicator.all_reduce(&mut [1_u8; 100], ReduceOp::Sum) {
                return error;
            }
        }
    };
    tell_error(&Communicator::from_environment().map_or_else(|error| error, forever));
    reach("told");
}

#[test]
fn a_rank_that_dies_while_memory_is_shared_at_the_start_is_named_at_once() {
    let mut draw = Random::new();
    for trial in 0..10 {
        let ranks = 2 + draw.below(4);
        let (victim, micros) = (draw.below(ranks), draw.below(4000) * (trial % 2));
        let case = format!("rank {victim} of {ranks} dies {micros} us after it has mapped memory");
        let running = World::new(ranks, "fall_at_start")
            .set("VICTIM", victim)
            .set("SIGNAL", libc::SIGKILL)
            .set("MICROS", micros)
            .start();
        running.wait_for("fallen", 1, LIMIT);
        let start = Instant::now();
        let mut ended = running.wait(LIMIT);
        assert!(start.elapsed() < MOMENTS, "{case}: {:?} {ended:#?}", start.elapsed());
        ended.remove(victim);
        expect(&ended, &case, |_, told| told.contains(&format!(" [{victim}] ")));
    }
}

#[test]
fn a_rank_that_stops_while_memory_is_shared_is_named_and_nobody_else() {
    for victim in [0, 1] {
        let running = World::new(3, "fall_at_start")
            .set("VICTIM", victim)
            .set("SIGNAL", libc::SIGSTOP)
            .set("MICROS", 0)
            .set("UNISUM_CONNECT_TIMEOUT", 8)
            .set("UNISUM_TIMEOUT", 8)
            .start();
        running.wait_for("fallen", 1, LIMIT);
        running.wait_for("told", 2, LIMIT);
        running.signal(victim, libc::SIGKILL);
        let mut ended = running.wait(LIMIT);
        ended.remove(victim);
        expect(&ended, "stopped", |_, told| told.contains(&format!(" [{victim}] ")));
    }
}

/// Makes what has links of its own, again and again, until that fails.
fn make() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let parameters = [Parameter::new("weight", &[100], Dtype::F32)];
    for round in 0_usize.. {
        let result = match setting("WHAT").as_str() {
            "split" => communicator.split(Some(0), (rank + round) as i64 % world as i64).map(drop),
            "messenger" => Messenger::new(&communicator).map(drop),
            _ => Buckets::builder(&communicator).build(&parameters).map(drop),
        };
        if let Err(error) = result {
            return tell_error(&error);
        }
        if round == 0 {
            reach("making");
        }
    }
}

#[test]
fn a_rank_that_dies_while_a_group_shares_memory_is_named_at_once() {
    let mut draw = Random::new();
    for trial in 0..12 {
        let what = ["split", "messenger", "buckets"][trial % 3];
        let ranks = 2 + draw.below(4);
        let (victim, micros) = (draw.below(ranks), draw.below(30_000) as u64);
        let case = format!("{what}: rank {victim} of {ranks} dies after {micros} us");
        let running = World::new(ranks, "make").set("WHAT", what).start();
        running.wait_for("making", ranks, LIMIT);
        std::thread::sleep(Duration::from_micros(micros));
        running.signal(victim, libc::SIGKILL);
        let start = Instant::now();
        let mut ended = running.wait(LIMIT);
        assert!(start.elapsed() < MOMENTS, "{case}: {:?} {ended:#?}", start.elapsed());
        ended.remove(victim);
        expect(&ended, &case, |_, told| told.contains(&format!(" [{victim}] ")));
    }
}

/// Batches of private tensors while one rank has no registered memory left.
fn full_heap() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    let mut held = Vec::new();
    if setting("VICTIM") == rank.to_string() {
        for bytes in [1 << 20, 1 << 16, 1 << 12, 1] {
            held.extend(std::iter::from_fn(|| communicator.allocate::<u8>(bytes).ok()));
        }
        assert!(held.len() > 3, "nothing to hold: the test tests nothing");
    }
    for round in 0..3 {
        let mut tensors: Vec<Vec<u64>> = (1..20).map(|len| vec![rank + round; len * 10]).collect();
        let mut batch: Vec<_> =
            tensors.iter_mut().map(|it| Buffers::InPlace(&mut it[..])).collect();
        communicator.run_batch(&Collective::all_reduce(ReduceOp::Sum), &mut batch).unwrap();
        let expected = world * round + (0..world).sum::<u64>();
        assert!(tensors.iter().flatten().all(|&sum| sum == expected), "round {round}");
    }
}

#[test]
fn a_batch_of_private_tensors_needs_no_registered_memory() {
    for victim in 0..3 {
        World::new(3, "full_heap")
            .set("UNISUM_SHM_HEAP", 4 << 20)
            .set("VICTIM", victim)
            .set("UNISUM_TIMEOUT", 10)
            .succeed(LIMIT);
    }
}

/// All that makes links, on a thread with a stack as small as some C libraries give.
fn small_stack() {
    let kibibytes: usize = std::env::var("STACK_KIB").unwrap().parse().unwrap();
    let thread = std::thread::Builder::new().stack_size(kibibytes << 10).spawn(|| {
        let communicator = Communicator::from_environment().unwrap();
        let group = communicator.split(Some(0), 0).unwrap().unwrap();
        Messenger::new(&communicator).unwrap();
        group.all_reduce(&mut vec![1_f32; 5000], ReduceOp::Sum).unwrap();
    });
    thread.unwrap().join().unwrap();
}

/// TLS handshakes take more; musl gives threads 128 KiB.
#[test]
fn joining_needs_little_stack() {
    for (tls, kibibytes) in [("off", 48), ("token", 112)] {
        for transport in ["shm", "tcp"] {
            let world = World::new(2, "small_stack").set("UNISUM_TRANSPORT", transport);
            world.set("UNISUM_TLS", tls).set("STACK_KIB", kibibytes).succeed(LIMIT);
        }
    }
}
