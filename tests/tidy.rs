//! The house rules that a machine can hold: which crate may depend on which, how long lines,
//! functions and files get, and that nothing unfinished is committed.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = [
        "src",
        "algorithms",
        "kernels",
        "engine",
        "control",
        "views",
        "transports",
        "benches",
        "bindings",
        "examples",
        "tests",
        "fuzz",
    ]
    .map(|folder| root().join(folder))
    .to_vec();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(found.len() > 50, "the sources are where this test looks");
    found
}

fn complain(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn dependencies_between_our_crates_follow_the_arrows() {
    let arrows = [
        ("unisum-algorithms", &[][..]),
        // For tests only.
        ("unisum-kernels", &["cuda-emulator"]),
        ("unisum-link", &["unisum-kernels"]),
        ("unisum-tcp", &["unisum-link", "unisum-kernels"]),
        ("unisum-shm", &["unisum-link", "unisum-kernels"]),
        ("unisum-verbs", &["unisum-link", "unisum-kernels"]),
        ("unisum-cuda-ipc", &["unisum-link", "unisum-kernels"]),
        ("unisum-events", &[]),
        ("unisum-engine", &["unisum-algorithms", "unisum-events", "unisum-link", "unisum-kernels"]),
        ("unisum-views", &[]),
        // The names of algorithms and types, for errors.
        ("unisum-control", &["unisum-link", "unisum-algorithms", "unisum-kernels", "unisum-views"]),
        (
            "unisum",
            &[
                "unisum-algorithms",
                "unisum-control",
                "unisum-cuda-ipc",
                "unisum-engine",
                "unisum-events",
                "unisum-kernels",
                "unisum-link",
                "unisum-shm",
                "unisum-tcp",
                "unisum-verbs",
                // Of its tests.
                "cuda-emulator",
            ],
        ),
        // The emulator is for their tests.
        ("allreduce-bench", &["unisum", "cuda-emulator", "features"]),
        ("unisum-c", &["unisum", "cuda-emulator"]),
        (
            "instructions",
            &[
                "unisum-algorithms",
                "unisum-engine",
                "unisum-kernels",
                "unisum-link",
                "unisum-shm",
                "unisum-tcp",
                "features",
            ],
        ),
        ("unisum-python", &["unisum", "features"]),
        // For tests; it depends on nothing of unisum.
        ("cuda-emulator", &[]),
        // Chooses features, and has no code.
        ("features", &[]),
    ];
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(packages.len(), arrows.len(), "a new crate needs a row here");
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = arrows.iter().find(|(known, _)| *known == name).unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = dependency["name"].as_str().unwrap();
            let ours = packages.iter().any(|package| package["name"] == dependency);
            assert!(!ours || allowed.contains(&dependency), "{name} must not use {dependency}");
        }
    }
}

#[test]
fn lines_have_at_most_100_columns() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            if line.chars().count() > 100 {
                faults.push(format!("{}:{} is too wide", path.display(), number + 1));
            }
        }
    }
    complain(&faults);
}

#[test]
fn files_have_at_most_600_lines() {
    let long = |(path, text): &(PathBuf, String)| {
        let lines = text.lines().count();
        (lines > 600).then(|| format!("{} has {lines} lines", path.display()))
    };
    complain(&sources().iter().filter_map(long).collect::<Vec<_>>());
}

/// From its `fn` to the closing brace at the same indentation.
#[test]
fn functions_have_at_most_70_lines() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            let indent = line.len() - code.len();
            let qualifiers = ["pub", "pub(crate)", "pub(super)", "const", "unsafe", "fn"];
            let before = code.split_whitespace().take_while(|word| qualifiers.contains(word));
            // A declaration without a body ends in a semicolon.
            let body = lines[start..].iter().find(|line| line.ends_with(['{', ';']));
            if before.last() != Some("fn") || body.is_none_or(|line| line.ends_with(';')) {
                continue;
            }
            let closing = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|line| *line == closing).unwrap_or(0);
            if length > 70 {
                faults.push(format!("{}:{} has {length} lines", path.display(), start + 1));
            }
        }
    }
    complain(&faults);
}

/// In a program without a subscriber nobody would see them.
#[test]
fn warnings_are_told_by_the_macro_that_prints_them_too() {
    let words = ["warn", "error"].map(|level| format!("tracing::{level}!"));
    let is_ours = |path: &Path| {
        let path = path.strip_prefix(root()).unwrap_or(path);
        ["src", "control", "transports"].iter().any(|it| path.starts_with(it))
    };
    let mut faults = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| is_ours(path)) {
        let is_comment = |line: &str| line.trim_start().starts_with("//");
        if text.lines().any(|line| !is_comment(line) && words.iter().any(|it| line.contains(it))) {
            faults.push(format!("{}: use unisum_link::warning!", path.display()));
        }
    }
    complain(&faults);
}

#[test]
fn nothing_is_marked_as_unfinished() {
    let marks = ["todo!(", "unimplemented!(", "dbg!(", "FIXME", "XXX"];
    let mut faults = Vec::new();
    for (path, text) in sources().iter().filter(|(path, _)| !path.ends_with("tests/tidy.rs")) {
        for mark in marks.iter().filter(|mark| text.contains(**mark)) {
            faults.push(format!("{} contains {mark}", path.display()));
        }
    }
    complain(&faults);
}

#[test]
fn unsafe_code_stays_where_it_is_allowed() {
    let allowed = [
        "src/buckets/",
        "src/collective/raw.rs",
        "src/communicator/",
        "src/device/",
        "src/execution/batch.rs",
        "src/execution/member.rs",
        "src/execution/single_rank.rs",
        "src/execution/ticket_lock.rs",
        "src/execution/tournament/mod.rs",
        "control/src/launcher/pmi/connection.rs",
        // The library of PMIx, which is C's.
        "control/src/launcher/pmix/library",
        "engine/src/",
        "events/src/clock.rs",
        "kernels/src/",
        "src/local/mod.rs",
        "src/memory/",
        "src/messenger/",
        "src/wiring/calibrate.rs",
        "src/wiring/costs.rs",
        "transports/link/src/fork",
        "transports/link/src/listener.rs",
        "transports/link/src/conformance/",
        "transports/link/src/region.rs",
        "transports/link/src/silence.rs",
        "transports/shm/",
        "transports/tcp/src/socket.rs",
        "transports/tcp/src/silence.rs",
        "transports/tcp/src/sleep.rs",
        "transports/cuda-ipc/src/",
        "transports/verbs/src/area.rs",
        "transports/verbs/src/completions.rs",
        "transports/verbs/src/connection.rs",
        "transports/verbs/src/domain.rs",
        "transports/verbs/src/ffi.rs",
        // A library of C's for tests, and its users.
        "transports/verbs/src/ffi/simulated.rs",
        "transports/verbs/src/link/renewal/tests.rs",
        "transports/verbs/src/link_state.rs",
        "transports/verbs/src/memory.rs",
        "transports/verbs/src/peer.rs",
        "transports/verbs/src/profile.rs",
        "transports/verbs/src/queue_pair.rs",
        "benches/",
        "bindings/c/src/",
        "bindings/python/src/array.rs",
        "bindings/python/src/buckets.rs",
        "bindings/python/src/device.rs",
        "bindings/python/src/device_buckets.rs",
        "bindings/python/src/operands.rs",
        "bindings/python/src/tensor.rs",
    ];
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let path = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let is_test = path.contains("tests/") || path.contains("examples/");
        let has_unsafe = text.contains("unsafe {") || text.contains("unsafe impl");
        if has_unsafe && !is_test && !allowed.iter().any(|prefix| path.starts_with(prefix)) {
            faults.push(format!("{path} has unsafe code"));
        }
    }
    complain(&faults);
}

/// Each fuzz target is in the table that says what it is for, and nothing else is.
#[test]
fn every_fuzz_target_is_in_the_table() {
    let text = fs::read_to_string(root().join("fuzz/README.md")).unwrap();
    let (_, table) = text.split_once("## What has a target").unwrap();
    let rows = table.lines().filter_map(|line| line.trim_end_matches([' ', '|']).rsplit_once('|'));
    let names = rows.flat_map(|(_, last)| last.split('`').skip(1).step_by(2));
    let mut told: Vec<&str> = names.collect();
    let sources = sources();
    // Not as one text, else this file would have it.
    let begins = format!("Target {{ {}: \"", "name");
    let mut there: Vec<&str> = Vec::new();
    for (_, text) in &sources {
        let parts = text.split(&begins).skip(1);
        there.extend(parts.filter_map(|part| part.split('"').next()));
    }
    told.sort_unstable();
    there.sort_unstable();
    assert_eq!(told, there);
}
