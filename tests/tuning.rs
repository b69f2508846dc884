//! Choices that hold for more than a run: a tuning file gives a second run of the same job the
//! first one's, and without clocks any run of the same shape takes the same.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use support::{World, setting, tell};
use unisum::{Collective, Communicator, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("sum", sum),
        ("sum_alone", sum_alone),
        ("sum_under_load", sum_under_load),
        ("files_of_their_own", files_of_their_own),
        ("described", described),
        ("refused", refused),
        ("both", both),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);
/// Below what is tried, within it, and the same size class twice.
const COUNTS: [usize; 5] = [50, 400, 5000, 5001, 100_000];

/// A directory of a test; deleted when dropped.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("unisum-{test}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("tuning")
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn world(ranks: usize, scenario: &'static str, transport: &str, file: &Path) -> World {
    World::new(ranks, scenario)
        .set("UNISUM_TRANSPORT", transport)
        .set("UNISUM_TUNING", file.display())
        // What was measured over encrypted connections is not taken for others.
        .set("UNISUM_TLS", "off")
}

/// On a busy machine trials may be given up, and be made in the second run.
#[test]
fn a_second_run_begins_tuned_and_gives_the_same_bits() {
    for transport in ["tcp", "shm"] {
        let mut turns = (0..5).map(|turn| begins_tuned(transport, turn));
        assert!(turns.any(|is_tuned| is_tuned), "{transport}: something is always tried again");
    }
}

/// Whether the first of two runs settled all and the second tried nothing; what then holds.
fn begins_tuned(transport: &str, turn: usize) -> bool {
    let directory = Directory::new(&format!("again-{transport}-{turn}"));
    let file = directory.file();
    let first = world(4, "sum", transport, &file).succeed(LIMIT);
    let written = fs::read_to_string(&file).unwrap();
    let second = world(4, "sum", transport, &file).succeed(LIMIT);
    // The job, a duplicate, and a group without rank 0.
    let of = ["settled 0-3 0 all-reduce", "settled 0-3 1 ", "settled 2,1 "];
    let is_settled = of.iter().all(|of| written.lines().any(|line| line.starts_with(of)));
    let is_tried = |told: &Vec<String>| parts(told).iter().any(|call| call[0] != call[1]);
    if !is_settled || second.iter().any(is_tried) {
        return false;
    }
    for (first, second) in first.iter().zip(&second) {
        let (tried, known) = (parts(first), parts(second));
        assert!(tried.iter().zip(&known).all(|(a, b)| a[1..] == b[1..]), "{first:?} {second:?}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), written, "nothing to add");
    assert_eq!(directory.names(), ["tuning"], "nothing is left beside it");
    true
}

/// Of each call: the algorithm before it, the algorithm after it, and its bits.
fn parts(told: &[String]) -> Vec<Vec<&str>> {
    told.iter().map(|line| line.split(' ').collect()).collect()
}

fn sum() {
    let communicator = Communicator::from_environment().unwrap();
    // Ranks 2 and 1 are a group, in that order. What they settle is with rank 0 long before it
    // leaves.
    let rank = communicator.rank();
    let color = (1..3).contains(&rank).then_some(0);
    let group = communicator.split(color, -(rank as i64)).unwrap();
    group.iter().for_each(sum_on);
    sum_on(&communicator);
    sum_on(&communicator.duplicate().unwrap());
}

fn sum_on(communicator: &Communicator) {
    let sum = Collective::all_reduce(ReduceOp::Sum);
    for count in COUNTS {
        let own = (communicator.rank() + 1) as f32;
        // Sums of these are rounded: other orders give other bits.
        let mut data: Vec<f32> = (0..count).map(|at| (at as f32 + own).sqrt() / own).collect();
        let before = communicator.choice::<f32>(&sum, count);
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        let fold =
            |hash: u64, it: &f32| (hash ^ u64::from(it.to_bits())).wrapping_mul(0x100_0000_01b3);
        let bits = data.iter().fold(0xcbf2_9ce4_8422_2325, fold);
        tell(format!("{before} {} {bits:x}", communicator.choice::<f32>(&sum, count)));
    }
}

#[test]
fn a_file_that_is_none_is_an_error_that_names_it_on_every_rank() {
    let directory = Directory::new("broken");
    let file = directory.file();
    fs::create_dir(directory.0.join("folder")).unwrap();
    world(2, "sum_alone", "shm", &file).succeed(LIMIT);
    let whole = fs::read_to_string(&file).unwrap();
    for text in ["", "#!/bin/sh\n", &whole[..whole.len() / 2], &whole.replace("ring", "ding")] {
        if text == whole {
            continue;
        }
        fs::write(&file, text).unwrap();
        let told = world(2, "refused", "shm", &file).succeed(LIMIT);
        let name = file.display().to_string();
        assert!(told.iter().all(|told| told[0].contains(&name)), "{told:?}");
        assert_eq!(fs::read_to_string(&file).unwrap(), text, "it is left alone");
    }
    let folder = directory.0.join("folder");
    let told = world(2, "refused", "shm", &folder).succeed(LIMIT);
    assert!(told.iter().all(|told| told[0].contains("no regular file")), "{told:?}");
}

fn refused() {
    let error = Communicator::from_environment().unwrap_err();
    assert_eq!(
        (error.kind(), error.failed_ranks()),
        (ErrorKind::Configuration, &[0][..]),
        "{error}"
    );
    tell(error);
}

#[test]
fn a_file_of_another_job_is_told_and_neither_used_nor_changed() {
    let directory = Directory::new("other");
    let file = directory.file();
    world(2, "sum_alone", "tcp", &file).succeed(LIMIT);
    let written = fs::read_to_string(&file).unwrap();
    let later = written.replace("form 1", "form 9");
    let worlds = [
        (3, "tcp", &written, "it has world `2`, this job `3`"),
        (2, "shm", &written, "it has transports `tcp tcp`, this job `shm shm`"),
        (2, "tcp", &later, "form 9"),
    ];
    for (ranks, transport, text, why) in worlds {
        fs::write(&file, text).unwrap();
        let ended = world(ranks, "described", transport, &file).run(LIMIT);
        assert!(ended.iter().all(|ended| ended.status == 0), "{ended:#?}");
        let is_warning = |line: &str| line.contains("WARN") && line.contains(why);
        assert!(ended[0].log.lines().any(is_warning), "{why}: {}", ended[0].log);
        assert!(ended.iter().all(|ended| ended.told[0].contains(why)), "{ended:#?}");
        assert_eq!(fs::read_to_string(&file).unwrap(), *text);
    }
}

/// Every rank names another file: rank 0's counts, and what the others' say does not matter.
#[test]
fn files_that_differ_between_ranks_do_not_split_them() {
    let directory = Directory::new("differ");
    let file = directory.file();
    for (rank, text) in [(1, "no tuning file"), (2, "unisum tuning, form 1\n")] {
        fs::write(format!("{}.{rank}", file.display()), text).unwrap();
    }
    let run = || world(3, "files_of_their_own", "tcp", &file).succeed(LIMIT);
    let (first, second) = (run(), run());
    assert_eq!(first, second);
    assert!(first.windows(2).all(|two| two[0] == two[1]), "{first:?}");
    let names = fs::read_dir(&directory.0).unwrap().count();
    assert_eq!(names, 3, "rank 0 alone has written");
}

fn files_of_their_own() {
    let file = format!("{}.{}", setting("UNISUM_TUNING"), setting("UNISUM_RANK"));
    let communicator = Communicator::builder().tuning(&file).connect().unwrap();
    let sum = Collective::all_reduce(ReduceOp::Sum);
    for count in COUNTS {
        communicator.all_reduce(&mut vec![1_f32; count], ReduceOp::Sum).unwrap();
        tell(communicator.choice::<f32>(&sum, count));
    }
}

/// Where other programs have the cores, measured figures would be others.
#[test]
fn reproducible_runs_choose_alike_however_busy_the_host_is() {
    for (transport, ranks) in [("tcp", 4), ("shm", 4), ("tcp", 2)] {
        let run = |scenario| {
            let world = World::new(ranks, scenario).set("UNISUM_TRANSPORT", transport);
            world.set("UNISUM_REPRODUCIBLE", 1).succeed(LIMIT)
        };
        let (quiet, busy) = (run("sum_alone"), run("sum_under_load"));
        for (quiet, busy) in quiet.iter().zip(&busy) {
            let calls = parts(quiet);
            assert_eq!(calls, parts(busy), "{transport}, {ranks}");
            assert!(calls.iter().all(|call| call[0] == call[1]), "nothing is tried: {quiet:?}");
        }
    }
}

fn sum_alone() {
    sum_on(&Communicator::from_environment().unwrap());
}

fn sum_under_load() {
    let builder = Communicator::builder();
    for _ in 0..4 {
        // They end with the process.
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    sum_on(&builder.connect().unwrap());
}

fn described() {
    let communicator = Communicator::from_environment().unwrap();
    communicator.all_reduce(&mut vec![1_f32; 5000], ReduceOp::Sum).unwrap();
    tell(communicator.describe().to_string().replace('\n', "; "));
}

#[test]
fn what_may_not_be_measured_has_no_tuning_file() {
    let directory = Directory::new("both");
    let told = world(2, "both", "shm", &directory.file()).succeed(LIMIT);
    assert!(told.iter().all(|told| told[0].contains("UNISUM_TUNING")), "{told:?}");
}

fn both() {
    let error = Communicator::builder().reproducible(true).connect().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    tell(error);
}
