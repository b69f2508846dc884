//! What goes wrong in a training step on one rank: all ranks get the same error, which names the
//! rank and the parameter, and where the job lives the next step is right.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use support::stopwatch::Stopwatch;
use support::{World, reach, setting, tell, tell_error};
use unisum::buckets::{AllReduce, Bucket, Buckets, Hook, Parameter};
use unisum::{Communicator, Dtype, Error, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("wrong_step", wrong_step),
        ("differ", differ),
        ("bad_hook", bad_hook),
        ("die", die),
        ("static_graph", static_graph),
        ("futures", futures),
        ("fork", fork),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

fn parameters() -> Vec<Parameter> {
    let new = |index: usize| Parameter::new(format!("layer{index}"), &[100, index], Dtype::F32);
    (0..6).map(new).collect()
}

/// A right step: every gradient is 1 on all ranks.
fn step_rightly(buckets: &mut Buckets) -> Result<(), Error> {
    let step = buckets.begin()?;
    for parameter in (0..parameters().len()).rev() {
        step.put(parameter, &vec![1_f32; parameters()[parameter].count()])?;
    }
    step.wait()?;
    for parameter in 0..parameters().len() {
        assert!(buckets.gradient::<f32>(parameter).iter().all(|&it| it == 1.0));
    }
    Ok(())
}

/// What rank 1 does wrong, and what all ranks' errors say.
const WRONGS: [(&str, &str); 11] = [
    ("missing", "on rank 1 `layer2` (f32 [100, 2]) of bucket 2 had no gradient"),
    ("twice", "on rank 1 `layer4` (f32 [100, 4]) of bucket 1 was marked ready before"),
    ("viewed", "on rank 1 `layer4` (f32 [100, 4]) of bucket 1 is viewed already"),
    ("type", "on rank 1 `layer4` (f32 [100, 4]) was viewed as f64"),
    ("length", "on rank 1 `layer4` (f32 [100, 4]) was given 3 elements"),
    ("row", "on rank 1 `layer4` (f32 [100, 4]) was given a row 100"),
    ("rows", "on rank 1 `layer4` (f32 [100, 4]) was given 7 elements in 2 rows"),
    ("dropped", "on rank 1 the step was dropped before it was waited for"),
    ("abandoned", "on rank 1 the learner has left"),
    ("abandoned without a word", "on rank 1 the step was abandoned"),
    ("abandoned at length", "on rank 1 ééé"),
];

#[test]
fn what_one_rank_does_wrong_fails_the_step_on_all_and_no_other() {
    for (wrong, says) in WRONGS {
        for transport in ["shm", "tcp"] {
            let world = World::new(3, "wrong_step").set("UNISUM_TRANSPORT", transport);
            for (rank, told) in world.set("WRONG", wrong).succeed(LIMIT).iter().enumerate() {
                let text = &told[0];
                if (wrong == "dropped" || wrong.starts_with("abandoned")) && rank == 1 {
                    assert_eq!(text, wrong);
                    continue;
                }
                assert!(text.starts_with("StepFailed [1]"), "{wrong}, rank {rank}: {text}");
                assert!(text.contains(says), "{wrong}, rank {rank}: {text}");
            }
        }
    }
}

fn wrong_step() {
    let communicator = Communicator::from_environment().unwrap();
    let builder = Buckets::builder(&communicator).bucket_bytes(2500).end_bucket_bytes(2500);
    let mut buckets = builder.relayout(false).build(&parameters()).unwrap();
    step_rightly(&mut buckets).unwrap();
    let step = buckets.begin().unwrap();
    let wrong = if communicator.rank() == 1 { setting("WRONG") } else { String::new() };
    for parameter in (0..6).rev().filter(|&parameter| wrong != "missing" || parameter != 2) {
        step.put(parameter, &vec![1_f32; 100 * parameter]).unwrap();
        let again = |result: Result<(), Error>| {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Configuration);
        };
        match &wrong[..] {
            "twice" if parameter == 4 => again(step.ready(4)),
            "viewed" if parameter == 5 => {
                let view = step.view::<f32>(4).unwrap();
                again(step.view::<f32>(4).map(drop));
                drop(view);
            }
            "type" if parameter == 5 => again(step.view::<f64>(4).map(drop)),
            "row" if parameter == 5 => again(step.put_rows(4, &[0, 100], &[1_f32; 8])),
            "rows" if parameter == 5 => again(step.put_rows(4, &[0, 99], &[1_f32; 7])),
            "length" if parameter == 5 => again(step.put(4, &[1_f32; 3])),
            _ => {}
        }
    }
    if wrong == "dropped" {
        drop(step);
        tell("dropped");
    } else if wrong.starts_with("abandoned") {
        let long = "é".repeat(100_000);
        step.abandon(match &wrong[..] {
            "abandoned without a word" => "",
            "abandoned at length" => &long,
            _ => "the learner has left",
        });
        tell(wrong);
    } else {
        tell_error(&step.wait().unwrap_err());
    }
    step_rightly(&mut buckets).unwrap();
}

/// What rank 2 has otherwise, and what all ranks' errors say.
const DIFFERENCES: [(&str, &str); 5] = [
    (
        "shape",
        "parameter 3 differs: `layer3` (f32 [100, 3]) on rank 0, `layer3` (f32 [3]) on rank 2",
    ),
    ("fewer", "parameter 5 differs: `layer5` (f32 [100, 5]) on rank 0, not there on rank 2"),
    (
        "settings",
        "the settings of the gradient buckets differ: bucket_bytes 26214400, static_graph false on \
         rank 0, bucket_bytes 77, static_graph true on rank 2",
    ),
    ("name", "rank 2 can't make gradient buckets: parameters 0 and 6 are both called `layer0`"),
    ("layout", "rank 2 can't make gradient buckets: a layout that is cut off"),
];

#[test]
fn what_differs_is_named_before_anything_is_reduced() {
    for (how, says) in DIFFERENCES {
        for told in World::new(4, "differ").set("HOW", how).succeed(LIMIT) {
            assert!(told[0].starts_with("Mismatch ["), "{how}: {}", told[0]);
            assert!(told[0].contains(says), "{how}: {}", told[0]);
        }
    }
}

fn differ() {
    let communicator = Communicator::from_environment().unwrap();
    let how = if communicator.rank() == 2 { setting("HOW") } else { String::new() };
    let (mut list, mut builder) = (parameters(), Buckets::builder(&communicator));
    match &how[..] {
        "shape" => list[3] = Parameter::new("layer3", &[3], Dtype::F32),
        "fewer" => drop(list.pop()),
        "settings" => builder = builder.bucket_bytes(77).static_graph(true),
        "name" => list.push(Parameter::new("layer0", &[3], Dtype::F32)),
        "layout" => builder = builder.layout(&[1, 2, 3]),
        _ => {}
    }
    tell_error(&builder.build(&list).unwrap_err());
    // The job lives on.
    let mut buckets = Buckets::builder(&communicator).build(&parameters()).unwrap();
    step_rightly(&mut buckets).unwrap();
}

#[test]
fn a_hook_that_fails_or_panics_ends_the_job_on_all_ranks() {
    for (how, kind) in [("fails", "Aborted"), ("panics", "Panicked")] {
        let world = World::new(3, "bad_hook").set("UNISUM_TRANSPORT", "tcp").set("HOW", how);
        for told in world.succeed(LIMIT) {
            assert!(told[0].starts_with(&format!("{kind} [1] ")), "{}", told[0]);
            assert!(told[0].contains("bucket 0 ("), "{}", told[0]);
            assert!(told[0].contains("as the test has it"), "{}", told[0]);
            assert!(told[1].starts_with("Aborted"), "{}", told[1]);
        }
    }
}

#[derive(Debug)]
struct BadHook;

impl Hook for BadHook {
    fn name(&self) -> String {
        "bad".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        let is_odd = bucket.communicator().rank() == 1 && bucket.step() == 1;
        match &setting("HOW")[..] {
            "panics" if is_odd => panic!("as the test has it"),
            "fails" if is_odd => bucket.communicator().set_algorithm(Some("as the test has it")),
            _ => AllReduce.reduce(bucket),
        }
    }
}

fn bad_hook() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = Buckets::builder(&communicator).hook(BadHook).build(&parameters()).unwrap();
    step_rightly(&mut buckets).unwrap();
    tell_error(&step_rightly(&mut buckets).unwrap_err());
    tell_error(&buckets.begin().unwrap_err());
}

#[test]
fn a_rank_that_dies_in_a_step_is_named_by_all_others() {
    for transport in ["shm", "tcp"] {
        let world = World::new(4, "die").set("UNISUM_TRANSPORT", transport);
        let running = world.start();
        running.wait_for("stepping", 4, LIMIT);
        let start = Stopwatch::start();
        running.signal(2, libc::SIGKILL);
        for (rank, ended) in running.wait(LIMIT).iter().enumerate().filter(|(rank, _)| *rank != 2) {
            assert_eq!(ended.status, 0, "rank {rank}: {ended:#?}");
            assert!(ended.told[0].starts_with("RankLost [2]"), "{}", ended.told[0]);
        }
        start.assert_within(Duration::from_secs(10), LIMIT / 2, "since the kill");
    }
}

fn die() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = Buckets::builder(&communicator).build(&parameters()).unwrap();
    for number in 0_u64.. {
        if let Err(error) = step_rightly(&mut buckets) {
            return tell_error(&error);
        }
        if number == 0 {
            reach("stepping");
        }
    }
}

#[test]
fn buckets_do_not_wait_for_what_is_never_used() {
    World::new(3, "static_graph").succeed(LIMIT);
}

fn static_graph() {
    let communicator = Communicator::from_environment().unwrap();
    let builder = Buckets::builder(&communicator).static_graph(true).end_bucket_bytes(100);
    let mut buckets = builder.build(&parameters()).unwrap();
    // Nobody uses parameter 3, only rank 1 uses parameter 4.
    let is_used = |parameter| parameter != 3 && (parameter != 4 || communicator.rank() == 1);
    for number in 0..4 {
        let step = buckets.begin().unwrap();
        let count = step.buckets();
        for parameter in (0..6).rev().filter(|&parameter| is_used(parameter)) {
            step.put(parameter, &vec![3_f32; 100 * parameter]).unwrap();
        }
        if number > 0 {
            // The step is not finished, but nothing is missing.
            for bucket in 0..count {
                step.bucket(bucket).wait().unwrap();
            }
        }
        let report = step.wait().unwrap();
        assert_eq!(report.unused, [3]);
        assert!(buckets.gradient::<f32>(4).iter().all(|&it| it == 1.0));
        assert!(buckets.gradient::<f32>(3).iter().all(|&it| it == 0.0));
    }
    let step = buckets.begin().unwrap();
    let error = step.view::<f32>(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert_eq!(step.wait().unwrap_err().kind(), ErrorKind::StepFailed);
}

#[test]
fn steps_and_buckets_are_futures() {
    World::new(2, "futures").succeed(LIMIT);
}

fn futures() {
    let communicator = Communicator::from_environment().unwrap();
    let builder = Buckets::builder(&communicator).bucket_bytes(1000).end_bucket_bytes(1000);
    let mut buckets = builder.build(&parameters()).unwrap();
    for _ in 0..20 {
        let step = buckets.begin().unwrap();
        let first = step.bucket(0);
        for parameter in (1..6).rev() {
            step.put(parameter, &vec![1_f32; 100 * parameter]).unwrap();
        }
        step.put_rows::<f32>(0, &[3, 7, 3], &[]).unwrap();
        block_on(first).unwrap();
        let report = block_on(step.finish()).unwrap();
        assert!(report.buckets.iter().all(|bucket| bucket.ready <= bucket.started));
        assert!(report.buckets.iter().all(|bucket| bucket.started <= bucket.finished));
        assert!(report.reduced <= report.ended && report.exposed() <= report.ended);
    }
}

#[test]
fn a_forked_child_is_refused_and_the_parent_goes_on() {
    World::new(2, "fork").succeed(LIMIT);
}

fn fork() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = Buckets::builder(&communicator).build(&parameters()).unwrap();
    step_rightly(&mut buckets).unwrap();
    // SAFETY: the child calls only what the library promises to refuse, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let is_refused = buckets.begin().is_err_and(|error| error.kind() == ErrorKind::Forked);
        drop((buckets, communicator));
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!is_refused)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made; `status` is valid.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child was refused and left quietly");
    for _ in 0..5 {
        step_rightly(&mut buckets).unwrap();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
