//! After the first few calls, a blocking all-reduce allocates nothing, on no thread, and makes
//! only the system calls that move bytes or wait, and few of those.
//!
//! System calls are counted by strace. Without it that test says so and passes, unless
//! UNISUM_TEST_STRACE is `required`, as in CI.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "support/allocations.rs"]
mod allocations;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::{World, setting, tell};
use unisum::{Collective, Communicator, ReduceOp};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

#[test]
fn rank_process() {
    support::run_if_rank(&[("as_chosen", as_chosen), ("every_algorithm", every_algorithm)]);
}

const LIMIT: Duration = Duration::from_secs(300);

/// One element or two, one slice, several slices.
const SIZES: [usize; 3] = [8, 64 << 10, 4 << 20];

const OPERATIONS: usize = 100;
const ROUNDS: usize = 3;
/// How often buffers of one size may grow in all rounds together.
const GROWTHS: usize = 12;

/// Transport, memory.
const WAYS: [(&str, &str); 3] = [("shm", "registered"), ("shm", "private"), ("tcp", "private")];

fn world(ranks: usize, scenario: &'static str, (transport, memory): (&str, &str)) -> World {
    World::new(ranks, scenario).set("UNISUM_TRANSPORT", transport).set("TEST_MEMORY", memory)
}

fn as_chosen() {
    let communicator = Communicator::from_environment().unwrap();
    for bytes in SIZES {
        reduce_size(&communicator, "auto", bytes, OPERATIONS);
    }
}

fn every_algorithm() {
    let communicator = Communicator::from_environment().unwrap();
    for algorithm in Collective::all_reduce(ReduceOp::Sum).algorithms() {
        communicator.set_algorithm(Some(algorithm)).unwrap();
        for bytes in [8, 1 << 20] {
            reduce_size(&communicator, algorithm, bytes, 30);
        }
    }
}

/// Reduces buffers of one size, first unobserved, then several rounds between two marks. Tells how
/// often any thread of this process allocated in each round; where, it says in its log.
fn reduce_size(communicator: &Communicator, algorithm: &str, bytes: usize, operations: usize) {
    let count = bytes / size_of::<f32>();
    let mut private = vec![0_f32; count];
    let mut registered = communicator.allocate::<f32>(count).unwrap();
    let is_registered = setting("TEST_MEMORY") == "registered";
    let data = if is_registered { &mut registered[..] } else { &mut private[..] };
    let mut reduce = |operations| {
        for _ in 0..operations {
            communicator.all_reduce(data, ReduceOp::Max).unwrap();
        }
    };
    reduce(operations);
    let (begin, end) = (format!("begin {bytes}"), format!("end {bytes}"));
    let mut work = || {
        mark(&begin);
        reduce(operations);
        mark(&end);
    };
    let traced = std::env::var_os(TRACES).is_some();
    // Finding out where an allocation comes from makes system calls: one or the other.
    let rounds = if traced { 0 } else { ROUNDS };
    let rounds: Vec<_> = (0..rounds).map(|_| allocations::watch(&mut work)).collect();
    if traced {
        work();
    }
    // No rank leaves, which the others' control threads hear, before all have made their marks.
    reduce(1);
    let counts: Vec<String> = rounds.iter().map(|seen| seen.count.to_string()).collect();
    let counts = counts.join(" ");
    tell(format!("{algorithm}, {bytes} bytes, {ROUNDS} x {operations} operations: {counts}"));
    for origin in rounds.iter().flat_map(|seen| &seen.origins) {
        eprintln!("{algorithm}, {bytes} bytes: allocation by {origin}");
    }
}

/// Makes a system call that fails, to be found in a trace.
fn mark(name: &str) {
    // SAFETY: a plain system call on memory of ours; there is no descriptor -1.
    let written = unsafe { libc::write(-1, name.as_ptr().cast(), name.len()) };
    assert_eq!(written, -1);
}

#[test]
fn a_steady_all_reduce_allocates_nothing() {
    for way in WAYS {
        for ranks in [2, 5] {
            check_allocations(&world(ranks, "as_chosen", way));
        }
    }
}

#[test]
fn no_algorithm_allocates_once_it_has_run() {
    for way in WAYS {
        check_allocations(&world(5, "every_algorithm", way));
    }
}

/// A buffer may still grow when the ranks meet in an order that was not there before: that happens
/// a few times, and not in every round.
fn check_allocations(world: &World) {
    for (rank, ended) in world.run(LIMIT).iter().enumerate() {
        assert_eq!(ended.status, 0, "rank {rank}: {ended:#?}");
        assert!(!ended.told.is_empty());
        let faults: Vec<&String> = ended.told.iter().filter(|told| allocates(told)).collect();
        assert!(faults.is_empty(), "rank {rank}, allocations: {faults:#?}\n{}", ended.log);
    }
}

fn allocates(told: &str) -> bool {
    let (_, counts) = told.rsplit_once(": ").unwrap();
    let counts = counts.split(' ').map(|count| count.parse().unwrap());
    let counts: [usize; ROUNDS] = counts.collect::<Vec<_>>().try_into().unwrap();
    counts.iter().all(|&count| count > 0) || counts.iter().sum::<usize>() > GROWTHS
}

#[test]
fn a_steady_all_reduce_makes_few_system_calls_and_none_that_set_things_up() {
    if let Err(why) = find_strace() {
        let required = std::env::var("UNISUM_TEST_STRACE").is_ok_and(|v| v == "required");
        assert!(!required, "no strace: {why}");
        return println!("skipped: no strace: {why}");
    }
    for way in WAYS {
        for ranks in [2, 5] {
            let traces = Traces::new();
            let world = world(ranks, "as_chosen", way).set(TRACES, traces.0.display());
            world.through(|_| strace()).succeed(LIMIT);
            for rank in 0..ranks {
                check_calls(&traces.of(rank), way, ranks);
            }
        }
    }
}

/// Names the directory that traces go to.
const TRACES: &str = "TEST_TRACES";

fn find_strace() -> Result<(), String> {
    let output = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).output();
    let output = output.map_err(|error| error.to_string())?;
    let error = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(error.into_owned()) }
}

/// Runs a rank with each of its system calls written to a file, those of all threads in the
/// order of time.
fn strace() -> Vec<String> {
    let script = r#"exec strace -f -qq -o "$TEST_TRACES/$UNISUM_RANK" "$@""#;
    ["sh", "-c", script, "sh"].map(str::to_owned).to_vec()
}

/// A directory for the traces of one world; removed when dropped.
struct Traces(PathBuf);

impl Traces {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("unisum-traces-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        Self(directory)
    }

    fn of(&self, rank: usize) -> String {
        std::fs::read_to_string(Path::new(&self.0).join(rank.to_string())).unwrap()
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A call that found nothing.
const LOOK: &str = "recvmsg of nothing";

/// The lines of each system call that was made between the marks of a size.
fn calls(trace: &str, bytes: usize) -> BTreeMap<&str, Vec<&str>> {
    let place = |mark: &str| {
        let mark = format!("write(-1, \"{mark} {bytes}\"");
        trace.lines().position(|line| line.contains(&mark)).unwrap_or_else(|| panic!("no {mark}"))
    };
    let mut calls: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in trace.lines().take(place("end")).skip(place("begin") + 1) {
        // "PID name(arguments) = result"; the second half of an interrupted line begins with
        // "<... name resumed>", signals with "---".
        let call = line.split_once(' ').map_or(line, |(_, call)| call.trim_start());
        if let Some((name, _)) = call.split_once('(')
            && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
        {
            // Small messages pass through one buffer, which takes the calls for that.
            let name = match name {
                "sendto" => "sendmsg",
                "recvfrom" => "recvmsg",
                name => name,
            };
            let looked = name == "recvmsg" && line.contains("EAGAIN");
            calls.entry(if looked { LOOK } else { name }).or_default().push(line);
        }
    }
    calls
}

/// What OPERATIONS operations may call, and how often. Whatever is not listed must not be called
/// at all.
fn allowed(way: (&str, &str), ranks: usize, bytes: usize) -> Vec<(&'static str, usize)> {
    let (transport, memory) = way;
    let each = |(call, times)| (call, times * OPERATIONS);
    // Large buffers go in pieces, and each may be waited for: a sleep and who ends it. Yields are
    // cheap, and how many a wait takes is up to the scheduler.
    let waits = 1 + bytes / (256 << 10);
    let waits = [("sched_yield", 64 * waits), ("futex", 3 * waits)].map(each);
    let peers = ranks - 1;
    if transport == "shm" {
        // One look at where ranks may run for 64 yields, if others are on the same core; a move
        // takes three calls, at most every 5 ms.
        let spreading = [("sched_getaffinity", 2), ("sched_setaffinity", 2)].map(each);
        // A slice is read in blocks of 64 KiB from each peer, and the other slices once.
        let reads = each(("process_vm_readv", peers * (2 + bytes / (64 << 10))));
        let reads = (memory == "private").then_some(reads);
        return waits.into_iter().chain(spreading).chain(reads).collect();
    }
    // Slices of 256 KiB at most, to and from each peer; the kernel may take and give them in
    // pieces.
    let messages = 2 * peers * (1 + bytes / (256 << 10));
    let pieces = messages + peers * bytes / (32 << 10);
    let moves = [("sendmsg", pieces), ("recvmsg", 2 * pieces)].map(each);
    // Looks at all sockets, and sleeps: the looks of one wait are bounded, but on a busy machine
    // each yield may bring one.
    let looks = ["epoll_wait", "ppoll", LOOK].map(|call| each((call, 16 * messages)));
    // The first sleep finds the wakes of the connections that were opened, and takes them back.
    let wakes = [("read", 1)];
    moves.into_iter().chain(looks).chain(waits).chain(wakes).collect()
}

fn check_calls(trace: &str, way: (&str, &str), ranks: usize) {
    for bytes in SIZES {
        let allowed = allowed(way, ranks, bytes);
        let calls = calls(trace, bytes);
        let times: Vec<_> = calls.iter().map(|(call, lines)| (call, lines.len())).collect();
        let context = format!("{way:?}, {ranks} ranks, {bytes} bytes, {OPERATIONS} operations");
        println!("{context}: {times:?}");
        for (call, lines) in &calls {
            let limit = allowed.iter().find(|(name, _)| name == call).map_or(0, |(_, most)| *most);
            let (times, first) = (lines.len(), &lines[..lines.len().min(8)]);
            assert!(times <= limit, "{context}: {times} {call}, as in {first:#?}");
        }
    }
}
