//! What concerns the whole process: its descriptors, threads and processor time.

use super::*;

/// Runs the test of this name again in a process of its own, where nothing else opens descriptors
/// or starts threads. `true` in that process.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "UNISUM_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let output = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{test}"), "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{error}");
    false
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn leaving_leaves_no_thread_and_no_descriptor() {
    if !is_alone("leaving_leaves_no_thread_and_no_descriptor") {
        return;
    }
    let before = (open_descriptors(), threads());
    for world in [2, 5] {
        let (controls, _) = start(world, &[]);
        exchange(&controls, 0);
        drop(controls);
        let (controls, rendezvous) = start(world, &[1]);
        drop(join_by_hand(1, world as u32, &rendezvous));
        expect_verdict(&controls, PATIENCE, VerdictKind::Died, &[1]);
    }
    let until = Instant::now() + PATIENCE;
    while (open_descriptors(), threads()) != before {
        assert!(Instant::now() < until, "{before:?} {:?}", (open_descriptors(), threads()));
        thread::yield_now();
    }
}

#[test]
fn running_out_of_descriptors_neither_spins_nor_ends_the_job() {
    if !is_alone("running_out_of_descriptors_neither_spins_nor_ends_the_job") {
        return;
    }
    let (control, rendezvous) = coordinator(2);
    let dialer = TcpStream::connect(control.addresses()[0]);
    let mut hoard = hoard();
    // One descriptor for a stranger whom the coordinator then can't accept; and one more if the
    // coordinator takes that for the dialer, whom it had not accepted yet.
    let stranger = loop {
        drop(hoard.pop().expect("one of these is enough"));
        if let Ok(stranger) = TcpStream::connect(control.addresses()[0]) {
            break stranger;
        }
    };
    let before = cpu_time();
    thread::sleep(Duration::from_millis(500));
    assert!(cpu_time() - before < Duration::from_millis(100), "it spins");
    drop((hoard, stranger, dialer));
    let second = Control::start(config(1, 2, rendezvous)).unwrap();
    exchange(&[control, second], 0);
}

/// All descriptors that this process may have.
fn hoard() -> Vec<fs::File> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let few = rustix::process::Rlimit { current: Some(64), ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
    std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect()
}

#[test]
fn the_last_descriptor_is_for_a_rank_that_comes() {
    if !is_alone("the_last_descriptor_is_for_a_rank_that_comes") {
        return;
    }
    let (control, _) = coordinator(2);
    let mut hoard = hoard();
    // One for the dialer, and one for who lets it in.
    hoard.truncate(hoard.len() - 2);
    let address = control.addresses()[0];
    let stream = TcpStream::connect(address).unwrap();
    let reached = dial::preamble(stream, address, &hello(1, 2), &credentials(), PATIENCE);
    let reached = reached.unwrap_or_else(|error| panic!("it is turned away: {error}"));
    assert_eq!(reached.session, control.session());
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
