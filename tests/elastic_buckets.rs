//! Steps of gradient buckets that deaths interrupt: real processes, killed at random moments. The
//! others end the same steps with the same bits, and no call of theirs fails.
//!
//! `UNISUM_TEST_KILLS=N` makes so many trials for each transport, by hand.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::{Duration, Instant};

use support::{Random, World, await_others, reach, setting, tell};
use unisum::buckets::{AllReduce, Bucket, Buckets, Compressed, Encoding, Hook, LowRank, Parameter};
use unisum::buckets::{Step, StepReport};
use unisum::{Communicator, Dtype, Elastic, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", train),
        ("shard", shard),
        ("hold", hold),
        ("leave_the_step", leave_the_step),
        ("fail_and_die", fail_and_die),
        ("make_anew", make_anew),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);
/// Elements of the first parameter, by which it can be seen who took part in a step.
const PROCESSES: usize = 64;

fn connect() -> Communicator {
    Communicator::builder().elastic(Elastic::default()).connect().unwrap()
}

/// Not one of unisum's: all ranks tell each other after each step how it went there.
#[derive(Debug)]
struct Foreign(AllReduce);

impl Hook for Foreign {
    fn name(&self) -> String {
        "a hook of the test's".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), unisum::Error> {
        self.0.reduce(bucket)
    }
}

fn hook(name: &str) -> Box<dyn Hook> {
    match name {
        "foreign" => Box::new(Foreign(AllReduce)),
        "int8" => Box::new(Compressed::new(Encoding::Int8)),
        "low_rank" => Box::new(LowRank::new(2)),
        _ => Box::new(AllReduce),
    }
}

fn parameters(count: usize) -> Vec<Parameter> {
    vec![
        Parameter::new("who", &[PROCESSES], Dtype::F64),
        Parameter::new("first", &[count / 8 + 1, 8], Dtype::F32),
        Parameter::new("second", &[count / 16 + 1, 16], Dtype::F32),
        Parameter::new("last", &[3], Dtype::F64),
    ]
}

struct Training {
    communicator: Communicator,
    buckets: Buckets,
    process: u64,
    /// In how many steps each process took part.
    took_part: [u64; PROCESSES],
    weights: Vec<Vec<f32>>,
    steps: u64,
    redone: u64,
    committed: u64,
    last: Option<Instant>,
    stall: Duration,
    took: Duration,
}

impl Training {
    fn new(communicator: Communicator, count: usize) -> Self {
        let builder = Buckets::builder(&communicator).bucket_bytes(32 << 10).end_bucket_bytes(1024);
        let builder = match setting("HOOK").as_str() {
            "all_reduce" => builder,
            other => builder.hook(hook(other)),
        };
        let buckets = builder.build(&parameters(count)).unwrap();
        let weights = [1, 2].map(|it| vec![0.0; buckets.parameters()[it].count()]).into();
        let process = communicator.view().unwrap().processes[communicator.rank()];
        let zero = Duration::ZERO;
        let (steps, redone, committed, last) = (0, 0, 0, None);
        let took_part = [0; PROCESSES];
        Self {
            communicator,
            buckets,
            process,
            took_part,
            weights,
            steps,
            redone,
            committed,
            last,
            stall: zero,
            took: zero,
        }
    }

    /// Gradients that follow from step and process.
    fn fill(step: &Step<'_>, process: u64, number: u64) {
        step.view::<f64>(3).unwrap().ready();
        for parameter in [2, 1] {
            let mut view = step.view::<f32>(parameter).unwrap();
            for (at, element) in view.iter_mut().enumerate() {
                *element = ((at as u64 * 7 + number * 3 + process) % 41) as f32 - 20.0;
            }
            view.ready();
        }
        let mut who = step.view::<f64>(0).unwrap();
        who[process as usize] = 1.0;
        who.ready();
    }

    /// Takes a step; how many ranks it is the average of, which is the same on all.
    fn take_step(&mut self) -> usize {
        let step = self.buckets.begin().unwrap();
        Self::fill(&step, self.process, self.steps);
        let report = step.wait().unwrap();
        self.steps += 1;
        self.learn(&report);
        if let Some(change) = &report.change {
            self.redone += u64::from(change.redone);
            self.committed += u64::from(!change.redone);
            self.took = self.took.max(change.took);
            assert!(!change.lost.is_empty(), "{change:?}");
            self.communicator = self.buckets.take_communicator().unwrap();
            assert_eq!(self.communicator.view().as_ref(), Some(&change.view));
            assert_eq!(self.buckets.view().as_ref(), Some(&change.view));
        }
        assert!(self.buckets.take_communicator().is_none());
        let now = Instant::now();
        self.stall = self.stall.max(self.last.map_or(Duration::ZERO, |last| now - last));
        self.last = Some(now);
        report.participants
    }

    /// The averages are over whole ranks: as many as the report says, and those of the view if the
    /// step was made in it from its beginning.
    fn learn(&mut self, report: &StepReport) {
        let who = self.buckets.gradient::<f64>(0);
        let part = 1.0 / report.participants as f64;
        let there = |it: &usize| who[*it] != 0.0;
        let those: Vec<u64> = (0..PROCESSES).filter(there).map(|it| it as u64).collect();
        assert!(those.iter().all(|&it| (who[it as usize] - part).abs() < 1e-12), "{who:?}");
        assert_eq!(those.len(), report.participants, "{report:?}");
        if report.change.as_ref().is_none_or(|it| it.redone) {
            assert_eq!(those, self.buckets.view().unwrap().processes, "{report:?}");
        }
        those.iter().for_each(|&it| self.took_part[it as usize] += 1);
        for (weights, parameter) in self.weights.iter_mut().zip([1, 2]) {
            let gradient = self.buckets.gradient::<f32>(parameter);
            weights.iter_mut().zip(gradient).for_each(|(weight, it)| *weight += it);
        }
    }

    /// What is the same on all ranks in the end.
    fn check(&self) -> String {
        let view = self.communicator.view().unwrap();
        for &process in &view.processes {
            assert_eq!(self.took_part[process as usize], self.steps, "process {process}");
        }
        let bits = self.weights.iter().flatten().map(|it| u64::from(it.to_bits()));
        let hash = bits.fold(7_u64, |hash, it| hash.wrapping_mul(0x0100_0000_01b3) ^ it);
        let (steps, took_part) = (self.steps, &self.took_part[..12]);
        format!("{view:?} after {steps} steps: {took_part:?}, weights {hash:x}")
    }
}

/// Trains until a step was made by the last ranks, and 5 steps more. Some ranks may hear of the
/// change in an earlier step than others.
fn train() {
    let count = setting("COUNT").parse().unwrap();
    let last: usize = setting("LAST").parse().unwrap();
    let mut training = Training::new(connect(), count);
    let mut until = u64::MAX;
    while training.steps < until {
        let participants = training.take_step();
        if training.steps == 3 {
            reach("training");
        }
        if participants == last && until == u64::MAX {
            until = training.steps + 5;
        }
    }
    // What was taken is a communicator as any other.
    training.communicator.barrier().unwrap();
    tell(training.check());
    tell(training.stall.as_millis());
    tell(training.took.as_millis());
    tell(format!("{} redone, {} committed", training.redone, training.committed));
}

/// One at a time: two worlds slow each other.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn trials(transport: &str) {
    let _one = alone();
    let mut random = Random::new();
    let (mut stalls, mut took, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    let trials = std::env::var("UNISUM_TEST_KILLS").map_or(6, |it| it.parse().unwrap());
    for trial in 0..trials {
        let ranks = 4 + random.below(5);
        let mut victims = vec![if trial % 2 == 0 { 0 } else { random.below(ranks) }];
        // Of four ranks that lose two, those with rank 0 go on: here it may be lost.
        if ranks > 4 && trial % 3 == 0 {
            victims.push((victims[0] + 1 + random.below(ranks - 1)) % ranks);
        }
        let count = random.of(&[0, 3000, 100_000]);
        let hook = ["all_reduce", "foreign", "all_reduce", "int8", "low_rank"][trial % 5];
        let (after, between) = (random.below(30_000) as u64, random.of(&[0, 300, 20_000]));
        println!(
            "{transport}, trial {trial}: of {ranks}, {victims:?} die, {count} by {hook}, \
             {after} {between}"
        );
        let world = World::new(ranks, "train")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_REPRODUCIBLE", 1)
            .set("LAST", ranks - victims.len())
            .set("HOOK", hook)
            .set("COUNT", count);
        let running = world.start();
        running.wait_for("training", ranks, LIMIT);
        std::thread::sleep(Duration::from_micros(after));
        for (index, &victim) in victims.iter().enumerate() {
            if index > 0 {
                std::thread::sleep(Duration::from_micros(between));
            }
            running.signal(victim, libc::SIGKILL);
        }
        let ended = running.wait(LIMIT);
        let survivors = ended.iter().enumerate().filter(|(rank, _)| !victims.contains(rank));
        let told: Vec<&Vec<String>> = survivors
            .map(|(rank, it)| {
                assert_eq!((it.status, it.told.len()), (0, 4), "rank {rank}: {ended:#?}");
                &it.told
            })
            .collect();
        assert!(told.iter().all(|it| it[0] == told[0][0]), "{told:#?}");
        println!("  {}; {:?}", told[0][0], told.iter().map(|it| &it[3]).collect::<Vec<_>>());
        let most = |which: usize| told.iter().map(|it| it[which].parse::<u64>().unwrap()).max();
        stalls.extend(most(1));
        took.extend(most(2));
        ends.extend(told.iter().map(|it| it[3].clone()));
    }
    for (what, mut times) in [("between two steps", stalls), ("until in the next view", took)] {
        times.sort_unstable();
        let (p50, p99) = (times[times.len() / 2], times[(times.len() * 99 / 100).max(1) - 1]);
        println!("{transport}, {trials} changes, {what}: p50 {p50} ms, p99 {p99} ms");
    }
    ends.sort_unstable();
    let count = |it: &str| ends.iter().filter(|end| *end == it).count();
    let kinds: std::collections::BTreeSet<&String> = ends.iter().collect();
    kinds.into_iter().for_each(|kind| println!("{kind}: {} ranks", count(kind)));
}

#[test]
fn survivors_end_the_step_that_a_death_interrupts_on_tcp() {
    trials("tcp");
}

#[test]
fn survivors_end_the_step_that_a_death_interrupts_on_shared_memory() {
    trials("shm");
}

/// Shards die with their ranks: the step says so, and the program begins again.
fn shard() {
    let communicator = connect();
    let builder = Buckets::builder(&communicator).sharded();
    let mut buckets = builder.build(&parameters(100)).unwrap();
    reach("training");
    let error = loop {
        let step = buckets.begin().unwrap();
        Training::fill(&step, communicator.rank() as u64, 1);
        if let Err(error) = step.wait() {
            break error;
        }
    };
    assert_eq!((error.kind(), error.lost()), (ErrorKind::ViewChanged, &[1][..]), "{error}");
    assert_eq!(buckets.begin().unwrap_err().kind(), ErrorKind::ViewChanged);
    let communicator = communicator.rebuild().unwrap();
    let builder = Buckets::builder(&communicator).sharded();
    let mut buckets = builder.build(&parameters(100)).unwrap();
    let step = buckets.begin().unwrap();
    Training::fill(&step, communicator.rank() as u64, 1);
    tell(step.wait().unwrap().participants);
}

#[test]
fn sharded_steps_end_with_an_error_and_can_be_begun_again() {
    let _one = alone();
    let running = World::new(4, "shard").set("UNISUM_TRANSPORT", "shm").start();
    running.wait_for("training", 4, LIMIT);
    running.signal(1, libc::SIGKILL);
    let ended = running.wait(LIMIT);
    for rank in [0, 2, 3] {
        assert_eq!(ended[rank].told, ["3"], "{ended:#?}");
    }
}

/// Rank 1 dies when all buckets are reduced, and the others know of it before they give their step
/// away: no call of the layer fails.
fn hold() {
    let communicator = match setting("ELASTIC").as_str() {
        "yes" => connect(),
        _ => Communicator::from_environment().unwrap(),
    };
    let mut buckets = Buckets::builder(&communicator).sharded().build(&parameters(100)).unwrap();
    let step = buckets.begin().unwrap();
    Training::fill(&step, communicator.rank() as u64, 1);
    (0..step.buckets()).for_each(|bucket| step.bucket(bucket).wait().unwrap());
    reach("reduced");
    if communicator.rank() == 1 {
        std::thread::sleep(LIMIT);
    }
    let lost = communicator.barrier().unwrap_err().kind();
    let ended = step.wait().unwrap_err();
    assert_eq!(ended.kind(), lost, "{ended}");
    let refused = buckets.begin().unwrap_err();
    tell(format!("{:?} {:?} {:?}", lost, refused.kind(), refused.failed_ranks()));
    if lost == ErrorKind::ViewChanged {
        // Nobody leaves before all know of the change.
        communicator.rebuild().unwrap().barrier().unwrap();
    }
}

#[test]
fn no_step_begins_after_one_that_ended_with_the_job_between_two_calls() {
    let _one = alone();
    for (elastic, told) in [("yes", "ViewChanged ViewChanged [1]"), ("no", "RankLost Aborted [1]")]
    {
        for transport in support::transports() {
            let world = World::new(4, "hold").set("ELASTIC", elastic);
            let running = world.set("UNISUM_TRANSPORT", transport).start();
            running.wait_for("reduced", 4, LIMIT);
            running.signal(1, libc::SIGKILL);
            let ended = running.wait(LIMIT);
            for rank in [0, 2, 3] {
                assert_eq!(ended[rank].told, [told], "{ended:#?}");
            }
        }
    }
}

/// Rank 0 is in the program when rank 3 dies, the others are in a step: all meet in the program.
fn leave_the_step() {
    let mut communicator = connect();
    let mut buckets = Buckets::builder(&communicator).build(&parameters(100)).unwrap();
    let rank = communicator.rank();
    if rank == 3 {
        reach("victim");
        std::thread::sleep(LIMIT);
    }
    reach("waiting");
    let error = if rank == 0 {
        communicator.barrier().unwrap_err()
    } else {
        let step = buckets.begin().unwrap();
        Training::fill(&step, rank as u64, 1);
        step.wait().unwrap_err()
    };
    assert_eq!((error.kind(), error.lost()), (ErrorKind::ViewChanged, &[3][..]), "{error}");
    communicator = communicator.rebuild().unwrap();
    // Those of the old communicator have ended with it.
    let refused = buckets.begin().and_then(|step| {
        Training::fill(&step, rank as u64, 1);
        step.wait()
    });
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ViewChanged);
    drop(buckets);
    let mut buckets = Buckets::builder(&communicator).build(&parameters(100)).unwrap();
    let step = buckets.begin().unwrap();
    Training::fill(&step, rank as u64, 1);
    tell(step.wait().unwrap().participants);
}

#[test]
fn a_step_that_some_survivors_are_not_in_fails_and_all_meet_in_the_program() {
    let _one = alone();
    for transport in support::transports() {
        let running = World::new(4, "leave_the_step").set("UNISUM_TRANSPORT", transport).start();
        running.wait_for("victim", 1, LIMIT);
        running.wait_for("waiting", 3, LIMIT);
        running.signal(3, libc::SIGKILL);
        let ended = running.wait(LIMIT);
        for rank in 0..3 {
            assert_eq!(ended[rank].told, ["3"], "{ended:#?}");
        }
    }
}

/// Rank 1 drops its step, rank 2 dies in it: it fails on all that are left, and the next does not.
fn fail_and_die() {
    let communicator = connect();
    let mut buckets = Buckets::builder(&communicator).build(&parameters(100)).unwrap();
    let rank = communicator.rank();
    let step = buckets.begin().unwrap();
    if rank == 2 {
        reach("victim");
        std::thread::sleep(LIMIT);
    }
    Training::fill(&step, rank as u64, 1);
    reach("waiting");
    let failed = match rank {
        1 => {
            step.abandon("no reason");
            None
        }
        _ => Some(step.wait().unwrap_err()),
    };
    if let Some(error) = failed {
        assert_eq!(error.kind(), ErrorKind::StepFailed, "{error}");
        assert!(error.to_string().contains("on rank 1 no reason"), "{error}");
    }
    let step = buckets.begin().unwrap();
    Training::fill(&step, rank as u64, 1);
    tell(step.wait().unwrap().participants);
}

#[test]
fn a_step_that_fails_in_one_view_fails_in_the_next() {
    let _one = alone();
    let running = World::new(4, "fail_and_die").set("UNISUM_TRANSPORT", "tcp").start();
    running.wait_for("victim", 1, LIMIT);
    running.wait_for("waiting", 3, LIMIT);
    running.signal(2, libc::SIGKILL);
    let ended = running.wait(LIMIT);
    for rank in [0, 1, 3] {
        assert_eq!(ended[rank].told, ["3"], "{ended:#?}");
    }
}

/// Layers are made while an earlier one is still there on some of the ranks only: in Python, when
/// it ends may differ. Then rank 3 dies in a step of a layer before which all others had ended.
fn make_anew() {
    let communicator = connect();
    let rank = communicator.rank();
    let is_sharded = setting("SHARDED") == "yes";
    let build = || {
        let builder = Buckets::builder(&communicator);
        let builder = if is_sharded { builder.sharded() } else { builder };
        builder.build(&parameters(100)).unwrap()
    };
    let try_step = |buckets: &mut Buckets| {
        let step = buckets.begin()?;
        Training::fill(&step, rank as u64, 1);
        step.wait()
    };
    let mut first = Some(build());
    for stays in 0..4 {
        if rank != stays {
            first = None;
        }
        let mut second = build();
        assert_eq!(try_step(&mut second).unwrap().participants, 4);
        drop((second, first.take()));
        first = Some(build());
        assert_eq!(try_step(first.as_mut().unwrap()).unwrap().participants, 4);
    }
    reach("made");
    let last = first.as_mut().unwrap();
    // This one outlives the view, unless the shards of rank 3 are lost.
    let outcome = loop {
        match try_step(last) {
            Ok(report) if report.participants == 4 => {}
            outcome => break outcome,
        }
    };
    match outcome {
        Ok(report) if !is_sharded => tell(report.participants),
        Err(error) if is_sharded && error.kind() == ErrorKind::ViewChanged => tell(3),
        other => tell(format!("{other:?}")),
    }
    // Who leaves is lost to those that are still in the step.
    reach("ended");
    await_others("ended", 3, LIMIT);
}

#[test]
fn a_layer_outlives_views_on_all_ranks_or_on_none() {
    let _one = alone();
    for sharded in ["no", "yes"] {
        let world = World::new(4, "make_anew").set("UNISUM_TRANSPORT", "shm");
        let running = world.set("SHARDED", sharded).start();
        running.wait_for("made", 4, LIMIT);
        running.signal(3, libc::SIGKILL);
        let ended = running.wait(LIMIT);
        for rank in 0..3 {
            assert_eq!(ended[rank].told, ["3"], "{ended:#?}");
        }
    }
}
