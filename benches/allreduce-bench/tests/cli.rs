//! `allreduce-bench` as its users run it.

use std::process::{Command, Output};

use serde_json::Value;
use unisum::{Collective, Dtype, ReduceOp};

/// The keys that scripts rely on.
const KEYS: [&str; 20] = [
    "collective",
    "place",
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
        assert_eq!((&object["collective"], &object["place"]), (&"all_reduce".into(), &"in".into()));
        assert!(object["root"].is_null());
    }
}

/// All collectives, those with blocks that differ last.
const COLLECTIVES: [&str; 14] = [
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "gather",
    "scatter",
    "barrier",
    "all_gather_v",
    "reduce_scatter_v",
    "all_to_all_v",
    "gather_v",
    "scatter_v",
];

#[test]
fn every_collective_is_right_from_every_root_in_place_and_out_of_place() {
    for (ranks, transport) in [(1, "auto"), (3, "tcp"), (3, "shm"), (4, "shm")] {
        let line = format!("-n {ranks} -t {transport} -b 64 -e 64K -f 32 -i 2 -w 0");
        let objects = objects(&format!("{line} --collective all --root all --place both"));
        assert!(objects.iter().all(|object| object["wrong"] == 0));
        let with_root = ["reduce", "broadcast", "gather", "scatter", "gather_v", "scatter_v"];
        for name in COLLECTIVES {
            let mut of_name = objects.iter().filter(|object| object["collective"] == name);
            let roots = if with_root.contains(&name) { ranks } else { 1 };
            let tables = if name == "barrier" { 1 } else { 2 * roots * 3 };
            assert_eq!(of_name.clone().count(), tables, "{name}");
            let last = of_name.next_back().unwrap();
            let root = with_root.contains(&name).then(|| ranks - 1);
            assert_eq!(last["root"].as_u64(), root.map(|root| root as u64), "{name}");
        }
    }
}

#[test]
fn every_algorithm_of_every_collective_is_right() {
    for transport in ["tcp", "shm"] {
        let line = format!("-n 3 -t {transport} -b 60K -e 60K -i 2 -w 0 --collective all -a all");
        let objects = objects(&line);
        for name in COLLECTIVES {
            let of_name: Vec<_> =
                objects.iter().filter(|object| object["collective"] == name).collect();
            assert!(of_name.len() >= 2, "{name} by {} algorithms", of_name.len());
            let automatic = of_name.iter().filter(|object| object["automatic"] == true).count();
            assert_eq!(automatic, 1, "{name}");
        }
    }
}

#[test]
fn bandwidths_of_all_collectives_are_those_of_nccl_tests() {
    let factors = [
        ("all_reduce", 1.5),
        ("reduce", 1.0),
        ("broadcast", 1.0),
        ("all_gather", 0.75),
        ("reduce_scatter", 0.75),
        ("all_to_all", 0.75),
        ("gather", 0.75),
        ("scatter", 0.75),
    ];
    let names = factors.map(|(name, _)| name).join(",");
    let objects = objects(&format!("-n 4 -b 64K -e 64K -i 2 -w 0 --collective {names}"));
    for (object, (name, factor)) in objects.iter().zip(factors) {
        assert_eq!((&object["collective"], &object["bytes"]), (&name.into(), &65536.into()));
        let rate = |key: &str| object[key].as_f64().unwrap();
        assert!((rate("busbw_GBps") / rate("algbw_GBps") - factor).abs() < 1e-4, "{name}");
    }
}

#[test]
fn tables_are_one_a_collective_and_say_where_results_go() {
    let output = run("-n 2 -b 64 -e 64 -i 2 --collective all");
    let titles: Vec<_> =
        text(&output.stdout).lines().filter(|line| line.contains("place")).collect();
    assert_eq!(titles.len(), COLLECTIVES.len() - 1, "{titles:?}");
    assert_eq!(titles[1], "# reduce, root 0, in place");
    assert_eq!(titles[3], "# all_gather, out of place; counts are multiples of 2");
}

#[test]
fn every_algorithm_is_right_on_both_transports() {
    for transport in ["tcp", "shm"] {
        let objects = objects(&format!("-n 4 -t {transport} -a all -b 256 -e 256K -f 1024 -i 3"));
        let all = Collective::all_reduce(ReduceOp::Sum).algorithms().len();
        let algorithms = objects.len() / 2;
        assert!((7..=all).contains(&algorithms), "{algorithms} of {all} algorithms");
        assert!(objects.iter().all(|object| object["transport"] == transport));
        let automatic = objects.iter().filter(|object| object["automatic"] == true).count();
        assert_eq!(automatic, 2, "one automatic choice per size");
    }
}

#[test]
fn every_type_and_operation_is_right() {
    let objects = objects("-n 3 -d all -o all -b 4K -e 4K -i 1 -w 0");
    let defined = |op: ReduceOp| Dtype::ALL.iter().filter(move |dtype| op.is_defined_for(**dtype));
    assert_eq!(objects.len(), ReduceOp::ALL.into_iter().flat_map(defined).count());
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
    assert!(text(&output.stderr).contains("rounded down to whole f32 (4 B)"));
    assert!(text(&output.stdout).contains("\"bytes\":8,"));
}

#[test]
fn bad_arguments_are_refused_before_anything_starts() {
    let of_collectives = ["--collective all_sum", "--root x", "--collective scatter -a ring"];
    for line in ["-n 0", "-f 1", "-b 2 -e 1", "-d f33", "-o xor", "-a rign", "-b 1 -d f64"]
        .iter()
        .chain(&of_collectives)
    {
        let output = run(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line}");
    }
}

#[test]
fn what_a_world_cannot_measure_is_said() {
    for (line, reason) in [
        ("--collective reduce --root 2", "--root 2: the last of 2 ranks is 1"),
        ("--collective all_gather -b 4 -e 4", "one f32 of each is 8 B, which no size holds"),
    ] {
        let output = run(&format!("-n 2 {line}"));
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(text(&output.stderr).contains(reason), "{line}: {}", text(&output.stderr));
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
fn models_are_replayed_in_every_way_and_all_averages_are_right() {
    for (ranks, transport) in [(1, "auto"), (3, "tcp"), (3, "shm")] {
        let model = "--model resnet50 --scale 500 --steps 2 --backward-ms 8 --bucket-bytes 32K";
        let line = format!("-n {ranks} -t {transport} {model} --end-bucket-bytes 8K --wire all");
        let objects = objects(&line);
        let of = |key: &str| objects.iter().map(|it| it[key].clone()).collect::<Vec<_>>();
        let buckets = ["f32", "bf16", "f16", "f8e4m3", "f8e5m2", "int8"];
        let ways = [["buckets"; 6].as_slice(), &["at_end", "each_tensor"]].concat();
        assert_eq!(of("way"), ways);
        assert_eq!(of("wire"), [&buckets[..], &["f32"; 2]].concat());
        for object in &objects {
            let ms = |key: &str| object[key].as_f64().unwrap();
            assert_eq!((&object["wrong"], ms("backward_ms")), (&0.into(), 8.0));
            assert!(ms("step_min_ms") >= 8.0 && ms("hideable_ms") <= 8.0, "{object}");
            let parts_ms = ms("exposed_ms") + ms("hidden_ms");
            // Six digits of each are told.
            let longest_ms = ms("communication_ms").max(ms("exposed_ms"));
            let rounding_ms = 2e-5 * longest_ms;
            assert!((parts_ms - ms("communication_ms")).abs() < rounding_ms, "{object}");
        }
        let launches: Vec<_> = of("launches").iter().map(|it| it.as_u64().unwrap()).collect();
        assert!(launches[0] > 5, "{launches:?}");
        assert_eq!(launches[6..], [1, 161]);
    }
}

#[test]
fn the_backward_pass_is_a_multiple_of_the_communication() {
    let output = run("-n 2 --model bert-large --scale 5000 --backward-ratio 3 --steps 1");
    let report = text(&output.stdout);
    assert!(report.contains("391 parameters") && report.contains("Wrong elements: 0 OK"));
    let row = &objects("-n 2 --model bert-large --scale 5000 --backward-ratio 3 --steps 1")[0];
    let ratio = row["backward_ms"].as_f64().unwrap() / row["communication_ms"].as_f64().unwrap();
    assert!((ratio - 3.0).abs() < 1e-3, "{ratio}");
}

#[test]
fn a_model_that_no_memory_holds_is_refused_with_what_it_takes() {
    let output = run("-n 32 --model llama-7b --wire int8");
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("138.3 GiB on each rank") && error.contains("--scale"), "{error}");
    // The first line says how the ranks met.
    assert_eq!(error.lines().count(), 2, "{error}");
}

#[test]
fn the_version_names_the_kernels() {
    let output = run("--version");
    let version = text(&output.stdout);
    assert!(version.contains(env!("CARGO_PKG_VERSION")));
    assert!(version.contains("kernels"));
}
