//! C and C++ programs that are compiled against an installed library, as users do it, and run: the
//! examples, and tests of the interface.
//!
//! Without a C compiler they are skipped, unless `UNISUM_TEST_C` is `required`.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(180);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether the tools are there. Where `UNISUM_TEST_C` is `required`, they must.
fn has(tools: &[&str]) -> bool {
    let is_there = |tool: &&&str| {
        let mut asked = Command::new(tool);
        asked.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        asked.status().is_ok_and(|status| status.success())
    };
    let missing: Vec<_> = tools.iter().filter(|tool| !is_there(tool)).collect();
    let required = std::env::var("UNISUM_TEST_C").is_ok_and(|word| word == "required");
    assert!(missing.is_empty() || !required, "missing: {missing:?}");
    if !missing.is_empty() {
        println!("skipped: this machine lacks {missing:?}");
    }
    missing.is_empty()
}

/// Where the library is installed, for all tests of this process: `install` was run.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("installed");
        let _ = fs::remove_dir_all(&prefix);
        let mut install = Command::new(root().join("install"));
        install.arg(&prefix).env("UNISUM_STATIC_LIBRARY", static_library());
        succeed(&mut install);
        prefix
    })
}

/// The static library that was built with this test.
fn static_library() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let files = fs::read_dir(tests.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("libunisum_c") && name.ends_with(".a")
    };
    let newest = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    files.filter(is_library).max_by_key(newest).expect("cargo builds it for the tests")
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    stdout
}

/// Compiles a program, with what pkg-config says and no more.
fn compile(compiler: &str, source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let packages = prefix().join("lib/pkgconfig");
    let mut config = Command::new("pkg-config");
    config.args(["--cflags", "--libs", "unisum"]).env("PKG_CONFIG_PATH", packages);
    let config = succeed(&mut config);
    let to = prefix().join(name);
    let mut command = Command::new(compiler);
    command.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-pthread"]).args(flags);
    command.arg(root().join(source)).arg("-o").arg(&to).args(config.split_whitespace());
    let library = prefix().join("lib");
    command.arg(format!("-Wl,-rpath,{}", library.display()));
    succeed(&mut command);
    to
}

/// Processes that are killed when a test fails.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended can't be killed any more: that is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs so many ranks of a program; all have to end well, in time. What they printed.
fn run(command: &[&str], ranks: usize) -> Vec<String> {
    run_with(command, ranks, |_, _| {})
}

/// The same; `set` sets the environment of each rank.
fn run_with(command: &[&str], ranks: usize, set: impl Fn(usize, &mut Command)) -> Vec<String> {
    let scratch = tempfile::tempdir().unwrap();
    let start = |rank: usize| {
        let log = |what| fs::File::create(scratch.path().join(format!("{what}-{rank}"))).unwrap();
        let mut process = Command::new(command[0]);
        process.args(&command[1..]);
        process.env("UNISUM_RANK", rank.to_string()).env("UNISUM_WORLD", ranks.to_string());
        process.env("UNISUM_TOKEN", "a token of the tests, long enough");
        process.env("UNISUM_RENDEZVOUS", format!("file://{}/world", scratch.path().display()));
        process.env("UNISUM_INTERFACE", "=lo").env("UNISUM_TIMEOUT", "60");
        process.env("TEST_DIRECTORY", scratch.path());
        set(rank, &mut process);
        process.stdout(log("out")).stderr(log("err")).spawn().unwrap()
    };
    let mut running = Ranks((0..ranks).map(start).collect());
    let said = |what: &str, rank: usize| {
        fs::read_to_string(scratch.path().join(format!("{what}-{rank}"))).unwrap()
    };
    let told = |rank| format!("rank {rank}: {}{}", said("out", rank), said("err", rank));
    let all = || (0..ranks).map(told).collect::<Vec<_>>().join("\n");
    let deadline = Instant::now() + LIMIT;
    for rank in 0..ranks {
        let status = loop {
            if let Some(status) = running.0[rank].try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "{command:?} takes too long\n{}", all());
            std::thread::sleep(Duration::from_millis(2));
        };
        assert!(status.success(), "{command:?}, rank {rank}: {status}\n{}", all());
    }
    (0..ranks).map(|rank| said("out", rank)).collect()
}

const TOOLS: [&str; 3] = ["gcc", "g++", "pkg-config"];
const SCENARIOS: [&str; 11] = [
    "reductions",
    "sharding",
    "saving",
    "collectives",
    "asynchronous",
    "groups",
    "training",
    "store",
    "aborting",
    "dying",
    "differing",
];

#[test]
fn examples_compile_from_what_is_installed_and_run() {
    if !has(&TOOLS) {
        return;
    }
    let c = ["-std=c11"];
    let all_reduce = compile("gcc", "examples/all_reduce.c", "all_reduce", &c);
    let buckets = compile("gcc", "examples/buckets.c", "buckets", &c);
    let overlap = compile("g++", "examples/overlap.cpp", "overlap", &["-std=c++17"]);
    let [all_reduce, buckets, overlap] =
        [&all_reduce, &buckets, &overlap].map(|it| it.to_str().unwrap());
    for ranks in [2, 4] {
        let average = (ranks - 1) as f64 / 2.0;
        for (rank, said) in run(&[all_reduce], ranks).iter().enumerate() {
            assert_eq!(*said, format!("rank {rank} of {ranks}: the average is {average}\n"));
        }
        for (rank, said) in run(&[buckets], ranks).iter().enumerate() {
            let last = format!("rank {rank}, step 2: {} of {ranks} ranks\n", average + 1.0);
            assert!(said.ends_with(&last), "{said}");
        }
        run(&[overlap], ranks);
    }
}

#[test]
fn ranks_in_c_get_what_ranks_in_rust_get() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/worlds.c", "worlds", &["-std=c11"]);
    for scenario in SCENARIOS {
        for ranks in [2, 4] {
            run(&[program.to_str().unwrap(), scenario], ranks);
        }
    }
}

/// On the devices of an emulated driver.
#[test]
fn collectives_on_devices_are_right_and_their_failures_a_status() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/device.c", "device", &["-std=c11"]);
    let program = program.to_str().unwrap();
    let installed = prefix().join("lib").display().to_string();
    let libraries = cuda_emulator::library_dir().display().to_string();
    let on_devices = |scenario: &str, ranks: usize| {
        run_with(&[program, scenario], ranks, |rank, process| {
            process.env("LD_LIBRARY_PATH", format!("{libraries}:{installed}"));
            process.env("CUDA_EMULATOR_DEVICES", ranks.to_string());
            match (scenario, rank) {
                ("failing", 1) => process.env("CUDA_EMULATOR_FAIL", "cuLaunchKernel:7:719"),
                ("failing", _) => process.env("CUDA_EMULATOR_LEAKS", "report"),
                _ => process.env("CUDA_EMULATOR_LEAKS", "fail"),
            };
        })
    };
    on_devices("collectives", 2);
    on_devices("collectives", 3);
    on_devices("refusals", 2);
    on_devices("failing", 3);
    if !Path::new("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists() {
        run(&[program, "absent"], 2);
    }
}

#[test]
fn wrong_use_is_a_status() {
    if !has(&TOOLS) {
        return;
    }
    // What the header says is C of 1999, and C++.
    for (compiler, standard) in [("gcc", "-std=c99"), ("g++", "-std=c++11")] {
        compile(compiler, "tests/empty.c", "empty", &[standard]);
    }
    let program = compile("gcc", "tests/edges.c", "edges", &["-std=c11"]);
    run(&[program.to_str().unwrap()], 1);
}

#[test]
fn sanitizers_find_nothing() {
    if !has(&TOOLS) {
        return;
    }
    let flags = ["-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let edges = compile("gcc", "tests/edges.c", "edges-sanitized", &flags);
    run(&[edges.to_str().unwrap()], 1);
    let worlds = compile("gcc", "tests/worlds.c", "worlds-sanitized", &flags);
    for scenario in SCENARIOS {
        run(&[worlds.to_str().unwrap(), scenario], 2);
    }
}

#[test]
fn valgrind_finds_nothing() {
    if !has(&TOOLS) || !has(&["valgrind"]) {
        return;
    }
    // In a world of one: in others, rustix calls into the vDSO, which valgrind takes away.
    let edges = compile("gcc", "tests/edges.c", "edges-valgrind", &["-std=c11"]);
    run(&["valgrind", "-q", "--error-exitcode=9", "--fair-sched=yes", edges.to_str().unwrap()], 1);
}

#[test]
fn symbols_have_versions_and_nothing_else_is_exported() {
    if !has(&TOOLS) || !has(&["nm", "readelf"]) {
        return;
    }
    let library = prefix().join("lib/libunisum.so");
    let symbols = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let names = symbols.lines().filter_map(|line| line.split(' ').nth(2));
    let names: Vec<_> = names.filter(|name| !name.starts_with("UNISUM_")).collect();
    let map = fs::read_to_string(root().join("unisum.map")).unwrap();
    assert_eq!(names.len(), map.matches("unisum_").count(), "{names:?}");
    for name in names {
        let (name, version) = name.split_once("@@").unwrap();
        assert!(name.starts_with("unisum_") && version == "UNISUM_0.1", "{name}@@{version}");
    }
    let dynamic = succeed(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("Library soname: [libunisum.so.0]"), "{dynamic}");
}

#[test]
fn cmake_finds_it() {
    if !has(&TOOLS) || !has(&["cmake"]) {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let project = format!(
        "cmake_minimum_required(VERSION 3.16)\nproject(user C)\n\
         find_package(unisum 0.1 REQUIRED)\n\
         add_executable(shared {source})\ntarget_link_libraries(shared unisum::unisum)\n\
         add_executable(static {source})\ntarget_link_libraries(static unisum::static)\n",
        source = root().join("examples/all_reduce.c").display()
    );
    fs::write(scratch.path().join("CMakeLists.txt"), project).unwrap();
    let build = scratch.path().join("build");
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(scratch.path()).arg("-B").arg(&build);
    configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display()));
    succeed(&mut configure);
    succeed(Command::new("cmake").arg("--build").arg(&build));
    for program in ["shared", "static"] {
        run(&[build.join(program).to_str().unwrap()], 2);
    }
}
