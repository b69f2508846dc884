//! Ranks that wait for each other in calls of different communicators: what each of them is in is
//! told after seconds, and nobody who is merely late is taken for one of them.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use support::{World, setting, tell};
use unisum::{Communicator, Error, Messenger, ReduceOp};

/// Without the harness, which runs tests on threads of its own: ranks are only known to wait for
/// ever where the first thread of each process waits.
fn main() {
    if support::is_rank() {
        return support::run_if_rank(&[
            ("cross", cross),
            ("late", late),
            ("threads", threads),
            ("other threads", cross_on_another_thread),
        ]);
    }
    thread::scope(|scope| {
        scope.spawn(ranks_that_wait_for_each_other_in_different_communicators_are_told_both_calls);
        scope.spawn(a_rank_that_computes_is_waited_for_in_whichever_communicators);
        scope.spawn(at_the_deadline_a_rank_that_computes_is_named_alone);
        scope.spawn(threads_that_come_late_to_two_communicators_do_not_cross);
        scope.spawn(other_threads_that_wait_for_each_other_are_told_at_the_deadline);
    });
}

const LIMIT: Duration = Duration::from_secs(90);
/// Ranks that cross hear of it long before.
const TIMEOUT_S: u64 = 30;

/// All transports and ways of a scenario, at once.
fn check(scenario: &'static str, ways: &[&str], check: impl Fn(&str, &[String]) + Sync) {
    let transports = support::transports().into_iter();
    let cases: Vec<_> = transports.flat_map(|it| ways.iter().map(move |way| (it, *way))).collect();
    thread::scope(|scope| {
        for (transport, way) in cases {
            let world = World::new(3, scenario)
                .set("UNISUM_TRANSPORT", transport)
                .set("UNISUM_TIMEOUT", TIMEOUT_S)
                .set("WAY", way);
            let check = &check;
            scope.spawn(move || {
                let told = world.succeed(LIMIT);
                let context = format!("{transport}, {way}: {told:#?}");
                told.iter().for_each(|told| check(&context, told));
            });
        }
    });
}

fn ranks_that_wait_for_each_other_in_different_communicators_are_told_both_calls() {
    let ways = ["group", "circle", "rooted", "message", "async", "first"];
    check("cross", &ways, |context, told| {
        let [error, seconds] = told else { panic!("{context}") };
        let ranks = if context.contains("circle") { "[0, 1, 2]" } else { "[0, 1]" };
        assert!(error.starts_with(&format!("Mismatch {ranks} ")), "{context}");
        assert!(error.contains("wait for each other in calls of different"), "{context}");
        assert!(error.matches(" waits for rank ").count() >= 2, "{context}");
        let seconds: f64 = seconds.parse().unwrap();
        assert!(seconds < 25.0, "{context}");
    });
}

/// What a rank does in the groups and messengers of the ways, in turns with others or not.
struct All {
    job: Communicator,
    /// Of ranks 0 and 1, 1 and 2, 2 and 0.
    groups: [Option<Communicator>; 3],
    messenger: Messenger,
}

impl All {
    fn new() -> Self {
        let job = Communicator::from_environment().unwrap();
        let groups = [[0, 1], [1, 2], [2, 0]].map(|ranks| job.subset(&ranks).unwrap());
        let messenger = Messenger::new(&job).unwrap();
        Self { job, groups, messenger }
    }

    fn group(&self, number: usize) -> &Communicator {
        self.groups[number].as_ref().unwrap()
    }

    /// Every communicator is used once, in an order that suits all ranks.
    fn warm_up(&self) -> Result<(), Error> {
        let (rank, mut data) = (self.job.rank(), [1.0_f32; 16]);
        self.job.all_reduce(&mut data, ReduceOp::Sum)?;
        for group in self.groups.iter().flatten() {
            group.all_reduce(&mut data, ReduceOp::Sum)?;
        }
        match rank {
            0 => self.messenger.receive(&mut data, 1, 1),
            1 => self.messenger.send(&data, 0, 1),
            _ => Ok(()),
        }
    }
}

fn cross() {
    let all = All::new();
    let way = setting("WAY");
    if way != "first" {
        all.warm_up().unwrap();
    }
    let (rank, mut data) = (all.job.rank(), [1.0_f32; 1000]);
    let begun = Instant::now();
    let error = match (way.as_str(), rank) {
        ("circle", rank) => all.group(rank).all_reduce(&mut data, ReduceOp::Sum),
        ("rooted", 0) => all.group(0).broadcast(&mut data, 1),
        ("rooted", _) => all.job.reduce(&mut data, ReduceOp::Max, 1),
        ("message", 0) => all.messenger.receive(&mut data, 1, 7),
        ("async", 0) => all.job.all_reduce_async(data.to_vec(), ReduceOp::Sum).wait().map(drop),
        ("group" | "async" | "first", 1) => all.group(0).all_reduce(&mut data, ReduceOp::Sum),
        (_, _) => all.job.all_reduce(&mut data, ReduceOp::Sum),
    };
    tell(error_in_a_line(&error.unwrap_err()));
    tell(begun.elapsed().as_secs_f64());
}

/// Where any thread may call next, as in a pool, that they wait for each other is not certain.
fn other_threads_that_wait_for_each_other_are_told_at_the_deadline() {
    check("other threads", &["group", "message"], |context, told| {
        let [error, seconds] = told else { panic!("{context}") };
        assert!(error.starts_with("Timeout [0, 1] "), "{context}");
        assert!(error.contains("wait for each other in calls of different"), "{context}");
        let seconds: f64 = seconds.parse().unwrap();
        assert!(seconds > TIMEOUT_S as f64 - 1.0, "{context}");
    });
}

fn cross_on_another_thread() {
    thread::spawn(cross).join().unwrap();
}

fn error_in_a_line(error: &Error) -> String {
    format!("{:?} {:?} {error}", error.kind(), error.failed_ranks()).replace('\n', " / ")
}

fn a_rank_that_computes_is_waited_for_in_whichever_communicators() {
    check("late", &["in time"], |context, told| assert_eq!(told, ["done"], "{context}"));
}

/// At the deadline it is named alone, and not the rank that waits for it elsewhere.
fn at_the_deadline_a_rank_that_computes_is_named_alone() {
    check("late", &["for ever"], |context, told| {
        let [error] = told else { panic!("{context}") };
        assert!(error.starts_with("Timeout [1] "), "{context}");
    });
}

/// Rank 2 waits for rank 1 in a group, rank 0 for both in the job.
fn late() {
    let all = All::new();
    all.warm_up().unwrap();
    let (rank, mut data) = (all.job.rank(), [1.0_f32; 1000]);
    let is_for_ever = setting("WAY") == "for ever";
    if rank == 1 {
        let seconds = if is_for_ever { TIMEOUT_S + 8 } else { 8 };
        thread::sleep(Duration::from_secs(seconds));
    }
    let in_group = match rank {
        0 => Ok(()),
        _ => all.group(1).all_reduce(&mut data, ReduceOp::Sum),
    };
    match in_group.and_then(|()| all.job.all_reduce(&mut data, ReduceOp::Sum)) {
        Ok(()) => tell("done"),
        Err(error) => tell(error_in_a_line(&error)),
    }
}

/// In each of two ranks one thread waits in a communicator, and the other computes before it comes
/// to the one in which the other rank waits.
fn threads_that_come_late_to_two_communicators_do_not_cross() {
    check("threads", &["now", "first"], |context, told| assert_eq!(told, ["done"], "{context}"));
}

fn threads() {
    let all = All::new();
    if setting("WAY") != "first" {
        all.warm_up().unwrap();
    }
    let rank = all.job.rank();
    let late = |is_late: bool, communicator: &Communicator| {
        if is_late {
            thread::sleep(Duration::from_secs(8));
        }
        communicator.all_reduce(&mut [1.0_f32; 1000], ReduceOp::Sum).unwrap();
    };
    thread::scope(|scope| {
        scope.spawn(|| late(rank == 1, &all.job));
        if rank < 2 {
            late(rank == 0, all.group(0));
        }
    });
    tell("done");
}
