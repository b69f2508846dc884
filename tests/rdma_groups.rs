//! Groups and messengers over RDMA devices.
//!
//! Where there is no device the tests say so and pass, unless UNISUM_TEST_RDMA is `required`, as in
//! the virtual machines of tests/softroce. The scenario `across` is for ranks of two hosts, which
//! tests/softroce/inside/host starts.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use support::{World, has_rdma, reach, tell_error};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, Dtype, ErrorKind, Mesh, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("everything", everything),
        ("no_memory", no_memory),
        ("reduce_forever", reduce_forever),
        ("across", across),
    ]);
}

const LIMIT: Duration = Duration::from_secs(150);

fn world(ranks: usize, scenario: &'static str) -> World {
    World::new(ranks, scenario).set("UNISUM_TRANSPORT", "verbs")
}

/// A world of the job itself, of groups, of groups of them, of duplicates, of buckets and of a
/// messenger: all of it over RDMA, and nothing over TCP.
#[test]
fn groups_duplicates_buckets_and_messengers_use_the_devices() {
    if has_rdma() {
        world(5, "everything").succeed(LIMIT);
    }
}

fn everything() {
    let all = Communicator::from_environment().unwrap();
    let rank = all.rank();
    let before = sockets();
    // Ranks 0 and 2, 1 and 3; 4 is in none.
    let group = all.split((rank < 4).then_some(rank as u32 % 2), 0).unwrap();
    let copy = all.duplicate().unwrap();
    let messenger = Messenger::new(&copy).unwrap();
    assert_eq!(messenger.transport(), "verbs");
    thread::scope(|scope| {
        scope.spawn(|| reduces(&all, "verbs"));
        scope.spawn(|| reduces(&copy, "verbs"));
        scope.spawn(|| group.as_ref().map(|group| reduces(group, "verbs")));
        scope.spawn(|| passes_round(&all, &messenger));
    });
    if let Some(group) = &group {
        let twin = group.duplicate().unwrap();
        drop(group.subset(&[1]).unwrap());
        reduces(&twin, "verbs");
    }
    drop(group);
    steps(&copy);
    let quad = copy.subset(&[3, 1, 0, 2]).unwrap();
    if let Some(quad) = quad {
        let mesh = Mesh::new(&quad, 2, 2).unwrap();
        reduces(&mesh.row, "verbs");
        reduces(&mesh.column, "verbs");
    }
    all.barrier().unwrap();
    let what = "there are as many sockets as before, as nothing is sent over TCP";
    support::wait_until(what, Duration::from_secs(10), || sockets() == before);
}

/// How many sockets this process has.
fn sockets() -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    // One may be gone meanwhile: the directory's own.
    let links = descriptors.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

/// Sums of small and large, private and registered buffers; averages come out the same.
fn reduces(communicator: &Communicator, transport: &str) {
    assert_eq!(communicator.transport(), transport);
    let (rank, world) = (communicator.rank() as u32, communicator.world() as u32);
    for (round, count) in [1, 1000, 70_000, 400_000].into_iter().enumerate() {
        let element = |at: usize, rank: u32| (at as u32 % 1000) * (rank + 1) + round as u32;
        let mut registered = communicator.allocate::<u32>(count).unwrap();
        let mut private = vec![0; count];
        for data in [&mut registered[..], &mut private] {
            data.iter_mut().enumerate().for_each(|(at, it)| *it = element(at, rank));
            communicator.all_reduce(data, ReduceOp::Sum).unwrap();
            let sum = |at| (0..world).map(|rank| element(at, rank)).sum::<u32>();
            assert!(data.iter().enumerate().all(|(at, it)| *it == sum(at)), "{count} elements");
        }
    }
}

/// Messages of all lengths in a ring, from registered and private memory, many at once.
fn passes_round(communicator: &Communicator, messenger: &Messenger) {
    let (rank, world) = (messenger.rank(), messenger.world());
    let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
    let contents = |rank: usize, count: usize| -> Vec<u32> {
        (0..count as u32).map(|at| at.wrapping_mul(rank as u32 + 7)).collect()
    };
    for count in [0, 1, 2000, 2041, 2045, 100_000, 700_000] {
        let mut out = communicator.allocate::<u32>(count).unwrap();
        out.copy_from_slice(&contents(rank, count));
        let private = contents(rank, count);
        let (mut inn, mut again) = (vec![0; count], communicator.allocate::<u32>(count).unwrap());
        messenger
            .exchange(&mut [
                Message::Receive { data: &mut again[..], from: before, tag: 2 },
                Message::Send { data: &out[..], to: next, tag: 1 },
                Message::Receive { data: &mut inn, from: before, tag: 1 },
                Message::Send { data: &private, to: next, tag: 2 },
            ])
            .unwrap();
        assert!(inn == contents(before, count) && again[..] == inn[..], "{count} elements");
    }
}

/// Two steps through gradient buckets.
fn steps(communicator: &Communicator) {
    let parameters = [
        Parameter::new("large", &[600, 600], Dtype::F32),
        Parameter::new("small", &[7], Dtype::F32),
    ];
    let mut buckets = Buckets::builder(communicator).build(&parameters).unwrap();
    let world = communicator.world() as f32;
    for round in 0..2 {
        let step = buckets.begin().unwrap();
        for parameter in [1, 0] {
            let mut gradient = step.view::<f32>(parameter).unwrap();
            gradient.fill((communicator.rank() + round) as f32 * world);
            gradient.ready();
        }
        step.wait().unwrap();
        let average = world * (world - 1.0) / 2.0 + round as f32 * world;
        for parameter in [0, 1] {
            assert!(buckets.gradient::<f32>(parameter).iter().all(|it| *it == average));
        }
    }
}

/// Rank 1 may lock no memory when a group is made. As RDMA was asked for, all ranks hear why.
#[test]
fn a_group_for_which_a_rank_has_no_memory_left_is_refused_on_all_ranks() {
    if has_rdma() {
        let limited = |_| ["setpriv", "--bounding-set=-ipc_lock"].map(str::to_owned).to_vec();
        world(5, "no_memory").through(limited).succeed(LIMIT);
    }
}

fn no_memory() {
    let all = Communicator::from_environment().unwrap();
    let rank = all.rank();
    // Ranks 0 and 1 are a group, 2 and 3 another, 4 is in none.
    let color = [Some(0), Some(0), Some(1), Some(1), None][rank];
    let locked = (rank == 1).then(Locked::forbid);
    let error = all.split(color, 0).unwrap_err();
    let names_it =
        ["rank 1: ", "RLIMIT_MEMLOCK"].iter().all(|word| error.to_string().contains(word));
    assert!(names_it, "{error}");
    assert_eq!(
        (error.kind(), error.failed_ranks()),
        (ErrorKind::Configuration, &[1][..]),
        "{error}"
    );
    drop(locked);
    // All go on, and can do it again.
    all.all_reduce(&mut [1_u32], ReduceOp::Sum).unwrap();
    if let Some(group) = all.split(color, 0).unwrap() {
        reduces(&group, "verbs");
    }
}

/// While it lives, this process can lock no memory for devices, if it lacks the capability to do
/// so regardless. (Devices refuse processes that give it up once they use them.)
struct Locked(libc::rlimit);

impl Locked {
    fn forbid() -> Self {
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the struct outlives the call.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut before) }, 0);
        Self::set(libc::rlimit { rlim_cur: 0, ..before });
        Self(before)
    }

    fn set(limit: libc::rlimit) {
        // SAFETY: the struct outlives the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }, 0);
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        Self::set(self.0);
    }
}

#[test]
fn a_rank_that_is_killed_in_a_group_is_named_by_all() {
    if !has_rdma() {
        return;
    }
    for victim in [0, 3] {
        let running = world(4, "reduce_forever").start();
        running.wait_for("reducing", 4, LIMIT);
        running.signal(victim, libc::SIGKILL);
        let killed = Instant::now();
        let ended = running.wait(LIMIT);
        assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
        for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            assert_eq!(ended.status, 0, "rank {rank}, victim {victim}: {ended:#?}");
            assert!(ended.told[0].starts_with(&format!("RankLost [{victim}]")), "{ended:#?}");
        }
    }
}

/// In groups whose numbers are not the job's.
fn reduce_forever() {
    let all = Communicator::from_environment().unwrap();
    let group = all.subset(&[3, 1, 0, 2]).unwrap().unwrap();
    let mut data = group.allocate::<f32>(100_000).unwrap();
    for round in 0_u64.. {
        if let Err(error) = group.all_reduce(&mut data, ReduceOp::Sum) {
            tell_error(&error);
            let again = group.all_reduce(&mut data, ReduceOp::Sum).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Aborted);
            assert!(all.all_reduce(&mut data, ReduceOp::Sum).is_err());
            return;
        }
        if round == 0 {
            reach("reducing");
        }
    }
}

/// Two hosts of two ranks that share memory: groups inside a host, between the hosts and of all;
/// and one in which rank 3 has no memory left, which uses TCP.
fn across() {
    let all = Communicator::from_environment().unwrap();
    let rank = all.rank();
    reduces(&all, "shm+verbs");
    let host = all.split(Some(rank as u32 / 2), 0).unwrap().unwrap();
    let wire = all.split(Some(rank as u32 % 2), 0).unwrap().unwrap();
    let copy = all.duplicate().unwrap();
    let messenger = Messenger::new(&copy).unwrap();
    assert_eq!(messenger.transport(), "shm+verbs");
    reduces(&host, "shm");
    reduces(&wire, "verbs");
    reduces(&copy, "shm+verbs");
    passes_round(&all, &messenger);
    let locked = (rank == 3).then(Locked::forbid);
    let without = all.duplicate().unwrap();
    drop(locked);
    reduces(&without, "shm+tcp");
    reduces(&all, "shm+verbs");
}
