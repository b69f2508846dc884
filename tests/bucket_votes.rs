//! Whatever a rank does between its last gradient and the wait ends the step alike on all ranks:
//! they commit to it, or all fail with the same error, and where the job lives the next step is
//! right.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use support::stopwatch::Stopwatch;
use support::{World, setting, tell, tell_error};
use unisum::buckets::{Buckets, Compressed, Encoding, LowRank, Parameter, Step};
use unisum::{Communicator, Dtype, Error};

#[test]
fn rank_process() {
    support::run_if_rank(&[("late", late), ("ends", ends), ("sleeps", sleeps)]);
}

const LIMIT: Duration = Duration::from_secs(90);
const RANKS: usize = 3;

const HOOKS: [&str; 8] =
    ["plain", "F16", "Bf16", "F8E4M3", "F8E5M2", "Int8", "low rank", "sharded"];

/// What a rank does, and what the errors of all ranks say of it; nothing if all is well.
const WAYS: [(&str, &str); 10] = [
    ("drops", "the step was dropped before it was waited for"),
    ("panics", "the step was dropped by a panic of the thread that had it"),
    ("marks twice", "`layer2` (f32 [10, 10]) of bucket 0 was marked ready before"),
    ("puts twice", "`layer2` (f32 [10, 10]) of bucket 0 was marked ready before"),
    ("views late", "`layer2` (f32 [10, 10]) of bucket 0 was marked ready before"),
    ("forgets", "the step was forgotten before it was waited for"),
    ("accumulates and drops", "while gradients were accumulated, the step was dropped"),
    ("accumulates twice", "while gradients were accumulated, `layer2` (f32 [10, 10]) of bucket 0"),
    ("accumulates more", "different numbers of steps before this one: 2 on rank"),
    ("sleeps", ""),
];

fn cases() -> Vec<(&'static str, &'static str)> {
    let of_all = |transport| HOOKS.into_iter().map(move |hook| (transport, hook));
    support::transports().into_iter().flat_map(of_all).collect()
}

#[test]
fn what_comes_after_the_last_gradient_ends_the_step_alike_on_all_ranks() {
    for (transport, hook) in support::sample(cases(), 10) {
        let world = World::new(RANKS, "late").set("UNISUM_TRANSPORT", transport);
        for (rank, told) in world.set("HOOK", hook).succeed(LIMIT).iter().enumerate() {
            let mut lines = told.iter();
            for odd in 0..RANKS {
                for (way, says) in WAYS {
                    let context = format!("{transport}, {hook}, rank {odd} {way}, rank {rank}");
                    let line = lines.next().unwrap_or_else(|| panic!("{context}: no line"));
                    // The step is gone for the rank that gave it away without waiting.
                    let is_gone = ["drops", "panics", "forgets"].contains(&way) && rank == odd;
                    if says.is_empty() || is_gone {
                        assert_eq!(line, if is_gone { "gone" } else { "committed" }, "{context}");
                        continue;
                    }
                    if way == "accumulates more" {
                        let begin = format!("Mismatch [{odd}] rank {rank}: ");
                        let says = format!("{says} {odd}, 1 on the others");
                        assert!(line.starts_with(&begin), "{context}: {line}");
                        assert!(line.contains(&says), "{context}: {line}");
                        continue;
                    }
                    let begin = format!("StepFailed [{odd}] rank {rank}: ");
                    assert!(line.starts_with(&begin), "{context}: {line}");
                    let says = format!("on rank {odd} {says}");
                    assert!(line.contains(&says), "{context}: {line}");
                }
            }
        }
    }
}

fn parameters() -> Vec<Parameter> {
    (0..4).map(|at| Parameter::new(format!("layer{at}"), &[10, 10], Dtype::F32)).collect()
}

fn layer(communicator: &Communicator) -> Buckets {
    let builder = Buckets::builder(communicator).relayout(false);
    let encoding = |encoding| Compressed::new(encoding).in_slices_of(600);
    let builder = match &setting("HOOK")[..] {
        "F16" => builder.hook(encoding(Encoding::F16)),
        "Bf16" => builder.hook(encoding(Encoding::Bf16)),
        "F8E4M3" => builder.hook(encoding(Encoding::F8E4M3)),
        "F8E5M2" => builder.hook(encoding(Encoding::F8E5M2)),
        "Int8" => builder.hook(encoding(Encoding::Int8)),
        "low rank" => builder.hook(LowRank::new(1).starting_at(0)),
        "sharded" => builder.sharded(),
        _ => builder,
    };
    builder.build(&parameters()).unwrap()
}

fn put_all(step: &Step<'_>) {
    (0..4).rev().for_each(|at| step.put(at, &[1_f32; 100]).unwrap());
}

fn step_rightly(buckets: &mut Buckets) -> Result<(), Error> {
    let step = buckets.begin()?;
    put_all(&step);
    step.wait().map(drop)
}

fn late() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = layer(&communicator);
    for odd in 0..RANKS {
        for (way, _) in WAYS {
            let is_odd = communicator.rank() == odd;
            match go(&mut buckets, way, is_odd) {
                Ok(()) => tell(if is_odd && is_gone(way) { "gone" } else { "committed" }),
                Err(error) => tell_error(&error),
            }
            step_rightly(&mut buckets).unwrap();
        }
    }
}

fn is_gone(way: &str) -> bool {
    ["drops", "panics", "forgets"].contains(&way)
}

/// A step in which this rank goes the way if it is the odd one.
fn go(buckets: &mut Buckets, way: &str, is_odd: bool) -> Result<(), Error> {
    if way.starts_with("accumulates") {
        let step = buckets.begin_accumulating()?;
        put_all(&step);
        match way {
            "accumulates and drops" if is_odd => drop(step),
            "accumulates twice" if is_odd => {
                step.ready(2).unwrap_err();
                // Nothing of this rank's is of use now; the others are told by the reduction.
                step.wait().unwrap_err();
            }
            "accumulates more" if is_odd => {
                step.wait()?;
                let step = buckets.begin_accumulating()?;
                put_all(&step);
                step.wait()?;
            }
            _ => drop(step.wait()?),
        }
        return step_rightly(buckets);
    }
    let step = buckets.begin()?;
    put_all(&step);
    if is_odd {
        // Nothing is left to be reduced: all but the end of the step has happened.
        (0..step.buckets()).try_for_each(|bucket| step.bucket(bucket).wait())?;
        thread::sleep(Duration::from_millis(20));
        match way {
            "drops" => {
                drop(step);
                return Ok(());
            }
            "panics" => {
                let panics = AssertUnwindSafe(|| {
                    let _step = step;
                    panic!("this panic is part of a test");
                });
                catch_unwind(panics).unwrap_err();
                return Ok(());
            }
            "marks twice" => drop(step.ready(2).unwrap_err()),
            "puts twice" => drop(step.put(2, &[1_f32; 100]).unwrap_err()),
            "views late" => drop(step.view::<f32>(2).unwrap_err()),
            "forgets" => {
                std::mem::forget(step);
                return Ok(());
            }
            _ => {}
        }
    }
    step.wait().map(drop)
}

#[test]
fn a_process_that_ends_after_its_last_gradient_fails_the_step_on_all_others() {
    let ways = [("exits", "RankLost"), ("dies of a panic", "StepFailed"), ("aborts", "RankLost")];
    let mut cases = Vec::new();
    for transport in support::transports() {
        for hook in HOOKS {
            let of_way = |(way, kind)| (0..RANKS).map(move |odd| (transport, hook, way, kind, odd));
            cases.extend(ways.into_iter().flat_map(of_way));
        }
    }
    for (transport, hook, way, kind, odd) in support::sample(cases, 10) {
        let world = World::new(RANKS, "ends").set("UNISUM_TRANSPORT", transport);
        let start = Stopwatch::start();
        let ended = world.set("HOOK", hook).set("WAY", way).set("ODD", odd).run(LIMIT);
        for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != odd) {
            let context = format!("{transport}, {hook}, rank {odd} {way}, rank {rank}");
            assert_eq!(ended.status, 0, "{context}: {ended:#?}");
            let begin = format!("{kind} [{odd}] ");
            assert!(ended.told[0].starts_with(&begin), "{context}: {:?}", ended.told);
        }
        start.assert_within(
            Duration::from_secs(20),
            LIMIT / 3,
            &format!("{transport}, {hook}, {way}"),
        );
    }
}

fn ends() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = layer(&communicator);
    step_rightly(&mut buckets).unwrap();
    let step = buckets.begin().unwrap();
    put_all(&step);
    if communicator.rank().to_string() == setting("ODD") {
        (0..step.buckets()).for_each(|bucket| step.bucket(bucket).wait().unwrap());
        match &setting("WAY")[..] {
            "exits" => std::process::exit(0),
            "aborts" => std::process::abort(),
            _ => panic!("this panic is part of a test"),
        }
    }
    tell_error(&step.wait().unwrap_err());
}

#[test]
fn a_rank_that_sleeps_past_the_deadline_fails_the_step_with_all_others() {
    for transport in support::transports() {
        let world = World::new(RANKS, "sleeps").set("UNISUM_TRANSPORT", transport);
        let world = world.set("HOOK", "plain").set("UNISUM_TIMEOUT", 5);
        for (rank, told) in world.succeed(LIMIT).iter().enumerate() {
            assert!(told[0].starts_with("Timeout [1] "), "{transport}, rank {rank}: {told:?}");
        }
    }
}

fn sleeps() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = layer(&communicator);
    step_rightly(&mut buckets).unwrap();
    let step = buckets.begin().unwrap();
    put_all(&step);
    if communicator.rank() == 1 {
        // Until the others have given up.
        support::await_others("gave-up", RANKS - 1, LIMIT);
    }
    let error = step.wait().unwrap_err();
    if communicator.rank() != 1 {
        support::reach("gave-up");
    }
    tell_error(&error);
    if communicator.rank() == 0 {
        // It tells the others what the verdict is.
        support::await_others("done", RANKS - 1, LIMIT);
    } else {
        support::reach("done");
    }
}
