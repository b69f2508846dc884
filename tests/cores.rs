//! Ranks and the cores that they run on: two of each, and nothing else meanwhile.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use support::{World, tell};
use unisum::{Communicator, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("on_a_core", on_a_core), ("from_one_core", from_one_core)]);
}

const LIMIT: Duration = Duration::from_secs(300);

/// Waits for the other tests here; nothing if there are no two cores.
fn two_cores() -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    if cores().len() < 2 {
        println!("skipped: one core");
        return None;
    }
    Some(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Tells how often the ranks' threads slept at most in 10,000 small operations, in a round in which
/// they hardly did, or else in the best: others may want the cores meanwhile, for a while.
fn on_a_core() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = communicator.allocate::<f32>(2).unwrap();
    let mut round = || {
        let before = sleeps();
        for _ in 0..10_000 {
            communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
        }
        sleeps() - before
    };
    round();
    let (start, mut fewest) = (Instant::now(), i64::MAX);
    loop {
        let slept = round();
        let mut told = [slept, i64::from(start.elapsed() > LIMIT / 2)];
        communicator.all_reduce(&mut told, ReduceOp::Max).unwrap();
        let [slept, is_over] = told;
        fewest = fewest.min(slept);
        if fewest < FEW || is_over == 1 {
            return tell(fewest);
        }
    }
}

/// Of 10,000 waits.
const FEW: i64 = 100;

/// Some times: goes to the first core, may run on all as before, and tells where it is after 2,000
/// small operations.
fn from_one_core() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = communicator.allocate::<f32>(2).unwrap();
    let before = affinity();
    for _ in 0..ROUNDS_FROM_ONE {
        // SAFETY: zero is a value of every field.
        let mut first: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: it is a core of this machine.
        unsafe { libc::CPU_SET(cores()[0], &mut first) };
        set_affinity(&first);
        set_affinity(&before);
        for _ in 0..2000 {
            communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
        }
        // SAFETY: it has no preconditions.
        tell(unsafe { libc::sched_getcpu() });
        // A rank moves at most every 5 ms.
        std::thread::sleep(Duration::from_millis(10));
    }
    // SAFETY: it has no preconditions.
    assert!(unsafe { libc::CPU_EQUAL(&affinity(), &before) }, "a rank may run elsewhere now");
}

/// The cores that this thread may run on.
fn cores() -> Vec<usize> {
    let set = affinity();
    // SAFETY: all of them lie in a set.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

const ROUNDS_FROM_ONE: usize = 9;

fn affinity() -> libc::cpu_set_t {
    // SAFETY: zero is a value of every field.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is there to be written, and that long.
    let outcome = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(outcome, 0);
    set
}

fn set_affinity(set: &libc::cpu_set_t) {
    // SAFETY: `set` is that long.
    let outcome = unsafe { libc::sched_setaffinity(0, size_of_val(set), set) };
    assert_eq!(outcome, 0);
}

/// How often this thread gave up its core to wait.
fn sleeps() -> i64 {
    // SAFETY: zero is a value of every field.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is there to be written.
    let outcome = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(outcome, 0);
    usage.ru_nvcsw
}

/// Launchers bind ranks like this, so that each sees a single core.
#[test]
fn ranks_on_cores_of_their_own_wait_without_sleeping() {
    let Some(_alone) = two_cores() else { return };
    let world = World::new(2, "on_a_core").set("UNISUM_TRANSPORT", "shm");
    let bound = world
        .through(|rank| ["taskset", "-c", &cores()[rank].to_string()].map(str::to_owned).into());
    for told in bound.succeed(LIMIT) {
        let sleeps: i64 = told[0].parse().unwrap();
        assert!(sleeps < FEW, "{sleeps} sleeps in 10,000 operations");
    }
}

#[test]
fn ranks_that_meet_on_one_core_spread_at_once() {
    let Some(_alone) = two_cores() else { return };
    let told = World::new(2, "from_one_core").set("UNISUM_TRANSPORT", "shm").succeed(LIMIT);
    // Others may want the cores, and the scheduler has its say, too.
    let apart = told[0].iter().zip(&told[1]).filter(|(first, second)| first != second).count();
    assert!(2 * apart > ROUNDS_FROM_ONE, "apart {apart} times of {ROUNDS_FROM_ONE}: {told:?}");
}
