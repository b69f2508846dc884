//! `allreduce-bench` as its users run it.

use std::process::{Command, Output};

use serde_json::Value;

/// The keys that scripts rely on.
const KEYS: [&str; 19] = [
    "collective",
    "transport",
    "algorithm",
    "ranks",
    "bytes",
    "count",
    "dtype",
    "op",
    "memory",
    "iterations",
    "min_us",
    "p50_us",
    "p99_us",
    "max_us",
    "algbw_GBps",
    "busbw_GBps",
    "wrong",
    "cpu_seconds",
    "voluntary_switches",
];

fn run(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_allreduce-bench"));
    command.args(line.split_whitespace()).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// The objects of a run that must succeed.
fn objects(line: &str) -> Vec<Value> {
    let output = run(&format!("{line} --format json"));
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("one object per line"))
        .collect()
}

#[test]
fn json_is_one_object_per_size_with_all_keys_and_nothing_else() {
    let objects = objects("-n 3 -b 8 -e 64K -f 16 -i 3");
    let bytes: Vec<_> = objects.iter().map(|object| object["bytes"].as_u64().unwrap()).collect();
    assert_eq!(bytes, [8, 128, 2048, 32768]);
    for object in &objects {
        for key in KEYS {
            assert!(!object[key].is_null(), "{key} in {object}");
        }
        assert_eq!((&object["ranks"], &object["wrong"]), (&3.into(), &0.into()));
    }
}

#[test]
fn every_algorithm_is_right_on_both_transports() {
    for transport in ["tcp", "shm"] {
        let objects = objects(&format!("-n 4 -t {transport} -a all -b 256 -e 256K -f 1024 -i 3"));
        let algorithms = objects.len() / 2;
        assert!(algorithms >= 7, "{algorithms} algorithms");
        assert!(objects.iter().all(|object| object["transport"] == transport));
        let automatic = objects.iter().filter(|object| object["automatic"] == true).count();
        assert_eq!(automatic, 2, "one automatic choice per size");
    }
}

#[test]
fn every_type_and_operation_is_right() {
    let objects = objects("-n 3 -d all -o all -b 4K -e 4K -i 1 -w 0");
    assert_eq!(objects.len(), 12 * 5);
}

#[test]
fn private_memory_is_right() {
    for transport in ["tcp", "shm"] {
        let objects = objects(&format!("-n 2 -t {transport} --memory private -b 1M -e 1M -i 3"));
        assert_eq!(objects[0]["memory"], "private");
    }
}

#[test]
fn tables_end_with_the_number_of_wrong_elements() {
    for line in ["-n 2 -e 64 -i 3", "-n 2 -e 64 -i 3 -a all"] {
        let output = run(line);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).ends_with("# Wrong elements: 0 OK\n"));
    }
}

#[test]
fn csv_has_a_header_and_as_many_columns_in_each_line() {
    let output = run("-n 2 -e 64 -i 3 --format csv");
    let mut columns = text(&output.stdout).lines().map(|line| line.split(',').count());
    let header = columns.next().unwrap();
    assert!(header >= KEYS.len());
    assert!(columns.all(|count| count == header));
}

#[test]
fn odd_sizes_are_rounded_down_and_said_so() {
    let output = run("-n 2 -b 10 -e 10 -i 1 --format json");
    assert!(text(&output.stderr).contains("10 B is no whole number of f32"));
    assert!(text(&output.stdout).contains("\"bytes\":8,"));
}

#[test]
fn bad_arguments_are_refused_before_anything_starts() {
    for line in ["-n 0", "-f 1", "-b 2 -e 1", "-d f33", "-o xor", "-a rign", "-b 1 -d f64"] {
        let output = run(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line}");
    }
}

#[test]
fn waiting_ranks_do_not_spin() {
    let objects = objects("-n 3 -b 1K -e 1K --late-ms 500 --late-rank 1");
    let burnt_ms = objects[0]["waiting_cpu_ms_max"].as_f64().unwrap();
    assert!(burnt_ms < 20.0, "{burnt_ms} ms of processor time while waiting for 500 ms");
}

#[test]
fn starting_worlds_is_timed() {
    let objects = objects("--startup 2,4");
    let ranks: Vec<_> = objects.iter().map(|object| object["ranks"].as_u64().unwrap()).collect();
    assert_eq!(ranks, [2, 4]);
    assert!(objects.iter().all(|it| it["launch_to_first_all_reduce_ms"].as_f64() > Some(0.0)));
}

#[test]
fn the_version_names_the_kernels() {
    let output = run("--version");
    let version = text(&output.stdout);
    assert!(version.contains(env!("CARGO_PKG_VERSION")));
    assert!(version.contains("kernels"));
}
