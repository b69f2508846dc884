//! Processes that join a job that runs: real ones, over each transport, and all that may go wrong
//! meanwhile.
//!
//! `UNISUM_TEST_JOINS=N` makes so many trials for each transport, by hand.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use support::{Ended, Random, Running, World, setting, tell, tell_error};
use unisum::{Communicator, Elastic, Error, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", train),
        ("newcomer", newcomer),
        ("closed", closed),
        ("knock", knock),
        ("share", share),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

fn elastic() -> unisum::Builder {
    let minimum = std::env::var("MINIMUM").map_or(1, |it| it.parse().unwrap());
    Communicator::builder().elastic(Elastic { minimum })
}

/// Whether the test has marked a point.
fn is_marked(name: &str) -> bool {
    Path::new(&setting("TEST_MARKS")).join(format!("{name}.test")).exists()
}

/// Marks that this process reached a point, again perhaps.
fn reach(name: &str) {
    let mark = Path::new(&setting("TEST_MARKS")).join(format!("{name}.{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(mark) {
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    }
}

/// What a program has to have to go on: which step is next, how many ranks took part in all steps
/// together, and weights that tell who took part in which.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State(Vec<u64>);

const STEP: usize = 0;
const PARTICIPANTS: usize = 1;
const COUNT: usize = 1000;

impl State {
    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|it| it.to_le_bytes()).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.as_chunks().0.iter().map(|it| u64::from_le_bytes(*it)).collect())
    }
}

/// A training as small as can be.
struct Training {
    communicator: Communicator,
    state: Option<State>,
    /// Whether newcomers are let in; else only once the test says so.
    admits: bool,
}

impl Training {
    /// All ranks of the view have the state of those that are furthest.
    fn align(&mut self) -> Result<(), Error> {
        let own = self.state.as_ref().map_or(0, |state| state.0[STEP] + 1);
        let mut steps = vec![0; self.communicator.world()];
        self.communicator.all_gather(&[own], &mut steps)?;
        if own < *steps.iter().max().unwrap() {
            self.state = None;
        }
        let bytes = self.state.as_ref().map(State::bytes);
        if let Some(told) = self.communicator.share_state(bytes.as_deref())? {
            self.state = Some(State::from_bytes(&told));
        }
        Ok(())
    }

    /// A step; whether all let a newcomer in, and whether it was the last.
    fn step(&mut self) -> Result<(bool, bool), Error> {
        let state = self.state.as_mut().unwrap();
        let step = state.0[STEP];
        let is_killed = is_marked("killed");
        let mut sums = vec![(step + 1) * (self.communicator.rank() as u64 + 1); COUNT];
        sums[PARTICIPANTS] = 1;
        let is_asked = self.communicator.newcomers() > 0;
        if is_asked {
            reach("asked");
        }
        let lets_in = is_asked && (self.admits || is_marked("admit"));
        sums.extend([u64::from(lets_in), u64::from(is_marked("end"))]);
        self.communicator.all_reduce(&mut sums, ReduceOp::Sum)?;
        let flags = sums.split_off(COUNT);
        let world = self.communicator.world() as u64;
        assert_eq!(sums[PARTICIPANTS], world);
        assert_eq!(sums[2], (step + 1) * world * (world + 1) / 2);
        state.0.iter_mut().zip(&sums).skip(PARTICIPANTS).for_each(|(it, sum)| *it += sum);
        state.0[STEP] = step + 1;
        if is_killed {
            reach("step-after-kill");
        }
        Ok((flags[0] == world, flags[1] > 0))
    }

    /// Trains until the test says that it is over.
    fn run(mut self) -> Result<Self, Error> {
        loop {
            match self.run_in_view() {
                Ok(true) => return Ok(self),
                Ok(false) => self.communicator = self.communicator.admit()?,
                Err(error) if error.kind() == ErrorKind::ViewChanged => {
                    self.communicator = self.communicator.rebuild()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether all is over; else there are newcomers.
    fn run_in_view(&mut self) -> Result<bool, Error> {
        self.align()?;
        reach(&format!("world-{}", self.communicator.world()));
        reach(&format!("epoch-{}", self.communicator.view().unwrap().epoch));
        loop {
            match self.step()? {
                (_, true) => return Ok(true),
                (true, false) => return Ok(false),
                (false, false) => {}
            }
        }
    }

    fn tell(result: Result<Self, Error>) {
        match result {
            Ok(Self { communicator, state, .. }) => {
                let State(state) = state.unwrap();
                let hash = state.iter().fold(7_u64, |hash, it| {
                    hash.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ it
                });
                let (world, step) = (communicator.world(), state[STEP]);
                let epoch = communicator.view().unwrap().epoch;
                tell(format!("of {world} after {step} steps by {} {hash:x}", state[PARTICIPANTS]));
                tell(format!("rank {} in epoch {epoch}", communicator.rank()));
            }
            Err(error) => tell_error(&error),
        }
    }
}

fn begin() -> Option<State> {
    Some(State(vec![0; COUNT]))
}

fn train() {
    let communicator = elastic().connect().unwrap();
    reach("training");
    Training::tell(Training { communicator, state: begin(), admits: true }.run());
}

/// Members that let nobody in before the test says so.
fn closed() {
    let communicator = elastic().connect().unwrap();
    reach("training");
    Training::tell(Training { communicator, state: begin(), admits: false }.run());
}

fn newcomer() {
    reach("started");
    let communicator = match elastic().join() {
        Ok(communicator) => communicator,
        Err(error) => return tell_error(&error),
    };
    reach("joined");
    reach(&format!("joined-{}", std::process::id()));
    Training::tell(Training { communicator, state: None, admits: true }.run());
}

/// A newcomer that only tells why it is not let in.
fn knock() {
    let started = Instant::now();
    tell_error(&elastic().join().map(drop).unwrap_err());
    tell(started.elapsed().as_secs());
}

fn members(ranks: usize, transport: &str) -> World {
    World::new(ranks, "train")
        .set("UNISUM_TRANSPORT", transport)
        .set("UNISUM_REPRODUCIBLE", 1)
        .set("UNISUM_TLS", "token")
}

/// The same for a process that has no rank yet.
fn newcomers(members: &World) -> World {
    members.clone().running("newcomer").set("UNISUM_RANK", "").set("UNISUM_WORLD", "")
}

/// What those that are not among `dead` told, which is the same but for their ranks.
fn alike(ended: &[Ended], dead: &[usize]) -> String {
    let mut told = ended.iter().enumerate().filter(|(it, _)| !dead.contains(it)).map(|(_, it)| {
        assert_eq!((it.status, it.told.len()), (0, 2), "{ended:#?}");
        it.told[0].clone()
    });
    let first = told.next().unwrap();
    assert!(told.all(|it| it == first), "{ended:#?}");
    first
}

fn finish(running: Running) -> Vec<Ended> {
    running.mark("end");
    running.wait(LIMIT)
}

#[test]
fn a_newcomer_enters_behind_the_others_and_has_their_state() {
    for transport in support::transports() {
        let world = members(3, transport);
        let mut running = world.start();
        running.wait_for("training", 3, LIMIT);
        running.add(&newcomers(&world), 3);
        running.wait_for("world-4", 4, LIMIT);
        let ended = finish(running);
        assert!(alike(&ended, &[]).starts_with("of 4 after "), "{ended:#?}");
        assert!(ended[3].told[1].starts_with("rank 3 in epoch "), "{ended:#?}");
    }
}

#[test]
fn newcomers_that_come_at_once_all_enter() {
    for transport in support::transports() {
        let world = members(2, transport);
        let mut running = world.start();
        running.wait_for("training", 2, LIMIT);
        (2..5).for_each(|it| running.add(&newcomers(&world), it));
        running.wait_for("world-5", 5, LIMIT);
        let ended = finish(running);
        assert!(alike(&ended, &[]).starts_with("of 5 after "), "{ended:#?}");
    }
}

#[test]
fn a_job_of_one_rank_grows_and_outlives_the_one_that_began_it() {
    let world = members(1, "tcp");
    let mut running = world.start();
    running.wait_for("training", 1, LIMIT);
    (1..3).for_each(|it| running.add(&newcomers(&world), it));
    running.wait_for("world-3", 3, LIMIT);
    running.signal(0, libc::SIGKILL);
    running.wait_for("world-2", 2, LIMIT);
    // By the record that the first rank of the later view has written.
    running.add(&newcomers(&world), 3);
    running.wait_for("joined", 3, LIMIT);
    let ended = finish(running);
    assert!(alike(&ended, &[0]).starts_with("of 3 after "), "{ended:#?}");
}

fn trials() -> usize {
    std::env::var("UNISUM_TEST_JOINS").map_or(4, |it| it.parse().unwrap())
}

#[test]
fn a_newcomer_that_dies_at_any_moment_disturbs_nobody() {
    let mut random = Random::new();
    for transport in support::transports() {
        for _ in 0..trials() {
            let world = members(3, transport);
            let mut running = world.start();
            running.wait_for("training", 3, LIMIT);
            running.add(&newcomers(&world), 3);
            running.wait_for("started", 1, LIMIT);
            let moment = Duration::from_micros(random.below(60_000) as u64);
            println!("{transport}: the newcomer dies after {moment:?}");
            std::thread::sleep(moment);
            running.signal(3, libc::SIGKILL);
            // Another one enters all the same.
            running.add(&newcomers(&world), 4);
            running.wait_for(&format!("joined-{}", running.pid(4)), 1, LIMIT);
            let ended = finish(running);
            assert!(alike(&ended, &[3]).starts_with("of 4 after "), "{ended:#?}");
        }
    }
}

/// No connection tells that it is stopped: it is in the view that is decided.
#[test]
fn a_newcomer_that_is_stopped_while_it_waits_is_left_behind() {
    for transport in support::transports() {
        let world = members(3, transport).running("closed").set("UNISUM_CONNECT_TIMEOUT", 3);
        let mut running = world.start();
        running.wait_for("training", 3, LIMIT);
        running.add(&newcomers(&world).set("UNISUM_CONNECT_TIMEOUT", 60), 3);
        running.wait_for("asked", 3, LIMIT);
        running.signal(3, libc::SIGSTOP);
        running.mark("admit");
        running.wait_for("epoch-3", 3, LIMIT);
        running.signal(3, libc::SIGCONT);
        let ended = finish(running);
        let told = &ended[3].told[0];
        assert!(told.contains("the other ranks went on without this one"), "{ended:#?}");
        assert!(alike(&ended, &[3]).starts_with("of 3 after "), "{ended:#?}");
    }
}

#[test]
fn a_member_that_dies_while_newcomers_enter_keeps_none_of_them_out() {
    let mut random = Random::new();
    for transport in support::transports() {
        for trial in 0..trials() {
            let world = members(5, transport);
            let mut running = world.start();
            running.wait_for("training", 5, LIMIT);
            let count = 1 + trial % 2;
            (0..count).for_each(|it| running.add(&newcomers(&world), 5 + it));
            running.wait_for("started", count, LIMIT);
            let victim = if trial % 2 == 0 { 0 } else { random.below(5) };
            let moment = Duration::from_micros(random.below(60_000) as u64);
            println!("{transport}: {victim} dies after {moment:?}, of 5 and {count} newcomers");
            std::thread::sleep(moment);
            running.signal(victim, libc::SIGKILL);
            running.mark("killed");
            running.wait_for("joined", count, LIMIT);
            // The victim may have taken part in that step, and in none after it.
            running.wait_for("step-after-kill", 4 + count, LIMIT);
            let ended = finish(running);
            let expected = format!("of {} after ", 4 + count);
            assert!(alike(&ended, &[victim]).starts_with(&expected), "{ended:#?}");
        }
    }
}

/// Starts a process that is not let in, beside three members that are not disturbed: what it told,
/// and for how many seconds it tried.
fn refused(change: impl FnOnce(World) -> World, members_as: &'static str) -> (String, u64) {
    let world = members(3, "tcp").running(members_as);
    let mut running = world.start();
    running.wait_for("training", 3, LIMIT);
    running.add(&change(newcomers(&world).running("knock")), 3);
    let deadline = Instant::now() + LIMIT;
    while running.lives(3) {
        assert!(Instant::now() < deadline, "the newcomer hangs");
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = finish(running);
    for member in &ended[..3] {
        assert!(member.told[1].ends_with("in epoch 1"), "{ended:#?}");
    }
    assert_eq!(ended[3].status, 0, "{ended:#?}");
    (ended[3].told[0].clone(), ended[3].told[1].parse().unwrap())
}

#[test]
fn a_process_that_does_not_belong_to_the_job_is_refused_at_once() {
    type Change = fn(World) -> World;
    let cases: [(Change, &str); 4] = [
        (|it| it.set("UNISUM_TOKEN", "another token, long enough to be one"), "token"),
        (|it| it.set("UNISUM_JOB", "another"), "another job"),
        (
            |it| it.set("UNISUM_SLICE_BYTES", "64K"),
            "settings that must be the same on all ranks differ: this process has \
             UNISUM_SLICE_BYTES=65536, the job has UNISUM_SLICE_BYTES=262144",
        ),
        (|it| it.set("MINIMUM", 2), "has UNISUM_ELASTIC=2, the job has UNISUM_ELASTIC=1"),
    ];
    for (change, why) in cases {
        let (told, seconds) = refused(change, "train");
        assert!(told.starts_with("Rendezvous ") && told.contains(why), "{told}");
        assert!(seconds < 30, "{told}: {seconds} s");
    }
}

#[test]
fn a_process_that_nobody_lets_in_ends_with_an_error_that_says_so() {
    let (told, _) = refused(|it| it.set("UNISUM_CONNECT_TIMEOUT", 6), "closed");
    assert!(told.starts_with("Rendezvous ") && told.contains("have not let this process in"));
}

#[test]
fn the_record_of_a_job_that_was_killed_is_found_out() {
    let world = members(2, "tcp");
    let mut running = world.start();
    running.wait_for("training", 2, LIMIT);
    (0..2).for_each(|rank| running.signal(rank, libc::SIGKILL));
    running.add(&newcomers(&world).running("knock"), 2);
    let ended = running.wait(LIMIT);
    let told = &ended[2].told[0];
    assert!(told.starts_with("Rendezvous ") && told.contains("it has ended"), "{told}");
    let seconds: u64 = ended[2].told[1].parse().unwrap();
    assert!(seconds < 30, "{seconds} s");
}

#[test]
fn where_there_is_no_record_a_process_waits_for_one_and_no_longer_than_it_may() {
    let world = members(1, "tcp").set("UNISUM_CONNECT_TIMEOUT", 1);
    let told = newcomers(&world).running("knock").succeed(LIMIT);
    assert!(told[0][0].starts_with("Rendezvous "), "{told:?}");
    assert!(told[0][0].contains("world.members: No such file"), "{told:?}");
    let tcp = newcomers(&world).running("knock").set("UNISUM_RENDEZVOUS", "tcp://127.0.0.1:9");
    let told = tcp.succeed(LIMIT);
    assert!(told[0][0].starts_with("Configuration "), "{told:?}");
    assert!(told[0][0].contains("expected UNISUM_RENDEZVOUS=file:///PATH"), "{told:?}");
}

/// Also when the rank is lost at whose address they met.
#[test]
fn newcomers_find_ranks_that_met_at_a_tcp_address_by_a_record_of_its_own() {
    let port = support::free_ports(1)[0];
    let name = format!("unisum-members-{}", std::process::id());
    let record = std::env::temp_dir().join(name);
    let world = members(3, "tcp")
        .set("UNISUM_RENDEZVOUS", format!("tcp://127.0.0.1:{port}"))
        .set("UNISUM_MEMBERS", record.display());
    let mut running = world.start();
    running.wait_for("training", 3, LIMIT);
    running.add(&newcomers(&world), 3);
    running.wait_for("world-4", 4, LIMIT);
    running.signal(0, libc::SIGKILL);
    running.wait_for("world-3", 3, LIMIT);
    running.add(&newcomers(&world), 4);
    running.wait_for("joined", 2, LIMIT);
    let ended = finish(running);
    assert!(alike(&ended, &[0]).starts_with("of 4 after "), "{ended:#?}");
    assert!(!record.exists(), "it ends with the job");
}

/// A newcomer waits, and the job ends in order, or because too few are left.
#[test]
fn a_newcomer_hears_that_the_job_ends_while_it_waits() {
    for (minimum, victim) in [(1, None), (3, Some(1))] {
        let world = members(3, "tcp").running("closed").set("MINIMUM", minimum);
        let mut running = world.start();
        running.wait_for("training", 3, LIMIT);
        running.add(&newcomers(&world).running("knock"), 3);
        // It may come at any moment: before it has asked as well.
        std::thread::sleep(Duration::from_millis(100));
        let ended = match victim {
            Some(victim) => {
                running.signal(victim, libc::SIGKILL);
                running.wait(LIMIT)
            }
            None => finish(running),
        };
        let told = ended[3].told[0].clone();
        assert!(told.starts_with("Rendezvous "), "{ended:#?}");
        assert!(told.contains("ended"), "{ended:#?}");
        let seconds: u64 = ended[3].told[1].parse().unwrap();
        assert!(seconds < 30, "{seconds} s: {ended:#?}");
        if victim.is_some() {
            assert!(ended[0].told[0].contains("2 ranks are left, and the job needs 3"));
        }
    }
}

/// Ranks share a state of several pieces; then they differ; then nobody has one.
fn share() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let state: Vec<u8> = (0..9_000_001_u32).map(|it| ((it * 31) >> 3) as u8).collect();
    let own = (rank % 2 == 1).then_some(&state[..]);
    let told = communicator.share_state(own).unwrap();
    assert_eq!(told.is_some(), rank.is_multiple_of(2));
    assert!(told.is_none_or(|it| it == state));
    assert_eq!(communicator.share_state(Some(&state)).unwrap(), None);
    assert_eq!(communicator.share_state(Some(&[])).unwrap(), None);
    let own = if rank == 2 { &b"2"[..] } else { &b"1"[..] };
    let error = communicator.share_state((rank != 0).then_some(own)).unwrap_err();
    assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Mismatch, &[2][..]), "{error}");
    let error = communicator.share_state(None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    communicator.barrier().unwrap();
    tell("fine");
}

#[test]
fn a_state_is_shared_by_those_that_have_it_if_it_is_the_same() {
    for transport in support::transports() {
        let told = World::new(4, "share").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
        assert!(told.iter().all(|it| it == &["fine"]), "{told:?}");
    }
}
