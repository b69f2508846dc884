//! `allreduce-bench -t cuda`, on the devices of an emulated driver.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn run(line: &str, libraries: &Path, devices: usize) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_allreduce-bench"));
    command.env("LD_LIBRARY_PATH", libraries).env("CUDA_EMULATOR_DEVICES", devices.to_string());
    command.env("CUDA_EMULATOR_LEAKS", "fail");
    command.args(line.split_whitespace()).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// The objects of a run that must succeed.
fn objects(line: &str, devices: usize) -> Vec<Value> {
    let line = format!("{line} -t cuda --format json");
    let output = run(&line, &cuda_emulator::library_dir(), devices);
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("one object per line"))
        .collect()
}

#[test]
fn every_collective_is_right_in_place_and_out_of_place() {
    // Ranks that have no device for themselves share one.
    for (ranks, devices) in [(1, 1), (2, 2), (3, 2)] {
        let line = format!(
            "-n {ranks} -b 64 -e 4K -f 64 -i 3 -w 0 --collective all --place both --root all"
        );
        let objects = objects(&line, devices);
        let names: std::collections::BTreeSet<_> =
            objects.iter().map(|object| object["collective"].to_string()).collect();
        assert_eq!(names.len(), 14, "{names:?}");
        for object in &objects {
            assert_eq!(object["wrong"], 0, "{object}");
            assert_eq!(
                (&object["transport"], &object["memory"]),
                (&"cuda-ipc".into(), &"device".into())
            );
            let microseconds = |key: &str| object[key].as_f64().expect(key);
            assert!(microseconds("wall_us") > 0.0, "{object}");
            assert!(microseconds("min_us") >= 0.0, "{object}");
            assert!(microseconds("p50_us") <= microseconds("max_us"), "{object}");
        }
    }
}

#[test]
fn every_type_operation_and_algorithm_is_right() {
    let types = objects("-n 2 -d all -o all -b 512 -e 512 -i 1 -w 0", 2);
    assert!(types.len() > 90 && types.iter().all(|object| object["wrong"] == 0));
    let algorithms = objects("-n 3 -a all -b 48 -e 96K -f 2048 -i 1 -w 0", 3);
    assert!(algorithms.len() > 8, "{}", algorithms.len());
    assert!(algorithms.iter().all(|object| object["wrong"] == 0));
    let automatic = algorithms.iter().filter(|object| object["automatic"] == true);
    assert_eq!(automatic.count(), 2, "one automatic choice per size");
}

#[test]
fn tables_and_csv_have_both_times() {
    let libraries = cuda_emulator::library_dir();
    let output = run("-n 2 -t cuda -e 1K -f 128 -i 2", &libraries, 2);
    let (table, told) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && table.ends_with("# Wrong elements: 0 OK\n"), "{told}");
    assert!(table.contains("transport cuda-ipc, device memory") && table.contains("wall"));
    assert!(told.contains("rank 0 of 2 on device 0"), "{told}");
    let output = run("-n 2 -t cuda -e 8 -i 2 --format csv", &libraries, 2);
    let lines: Vec<Vec<&str>> =
        text(&output.stdout).lines().map(|line| line.split(',').collect()).collect();
    let wall = lines[0].iter().position(|name| *name == "wall_us").expect("a column");
    assert!(lines[1][wall].parse::<f64>().expect("a number") > 0.0);
    assert_eq!(lines[0].len(), lines[1].len());
}

#[test]
fn without_a_driver_or_a_device_one_sentence_says_so() {
    let nowhere = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let version = run("--version", &cuda_emulator::library_dir(), 3);
    assert!(text(&version.stdout).contains("\nCUDA: CUDA 12."), "{version:?}");
    assert!(text(&version.stdout).contains(", 3 devices"), "{version:?}");
    let output = run("-n 2 -t cuda", &cuda_emulator::library_dir(), 0);
    let told = "allreduce-bench: -t cuda: there is a CUDA driver, but no device \
                (CUDA_VISIBLE_DEVICES may hide them)\n";
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), told));
    let places = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/cuda/compat"];
    if places.iter().any(|place| Path::new(place).join("libcuda.so.1").exists()) {
        return;
    }
    let output = run("-n 2 -t cuda", nowhere, 2);
    let told = "allreduce-bench: -t cuda: there is no CUDA driver: libcuda.so.1 can't be opened\n";
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), told));
    // Also a rank that no one started.
    let output = run("-t cuda -e 8 -i 1", nowhere, 2);
    assert!(text(&output.stderr).contains("there is no CUDA driver"), "{output:?}");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
    let version = run("--version", nowhere, 2);
    assert!(text(&version.stdout).contains("\nCUDA: there is no CUDA driver"), "{version:?}");
}
