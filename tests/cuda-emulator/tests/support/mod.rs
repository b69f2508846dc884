//! Processes that use the emulator, started by the test that says what they do.
//!
//! A test function is run twice: by the test itself, which starts processes of the same program and
//! looks at how they end, and in each of them, where [`role`] says what to do.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod gpu;

pub(crate) use gpu::Gpu;

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROLE: &str = "CUDA_EMULATOR_TEST_ROLE";
const MEETING: &str = "CUDA_EMULATOR_TEST_MEETING";

/// What a process prints that has done what its role demands.
const DONE: &str = "the role is played";

/// The longest that a process may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What this process is to do; `None` in the test itself.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// A process that the test has started.
pub(crate) struct Process {
    child: Child,
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    /// What it wrote to standard error and standard output.
    pub(crate) text: String,
}

/// Starts a process that runs the test `name` in a role, with settings of the emulator.
pub(crate) fn start(name: &str, role: &str, settings: &[(&str, &str)]) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", cuda_emulator::library_dir()).env(ROLE, role);
    command.env_remove("CUDA_VISIBLE_DEVICES");
    if std::env::var(MEETING).is_err() {
        command.env(MEETING, format!("{name}-{}", std::process::id()));
    }
    for (variable, value) in settings {
        let is_whole = variable.starts_with("CUDA_");
        let prefix = if is_whole { "" } else { "CUDA_EMULATOR_" };
        command.env(format!("{prefix}{variable}"), value);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Process { child: command.spawn().unwrap() }
}

/// Runs one process to its end.
pub(crate) fn run(name: &str, settings: &[(&str, &str)]) -> Ended {
    start(name, "main", settings).wait()
}

impl Process {
    /// Waits for the end, within the limit.
    pub(crate) fn wait(mut self) -> Ended {
        let (stdout, stderr) =
            (self.child.stdout.take().unwrap(), self.child.stderr.take().unwrap());
        let read = |mut from: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                from.read_to_end(&mut text).unwrap();
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        let (stdout, stderr) = (read(Box::new(stdout)), read(Box::new(stderr)));
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    self.child.kill().unwrap();
                    break self.child.wait().unwrap();
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let text = stderr.join().unwrap() + &stdout.join().unwrap();
        Ended { code: status.code(), text }
    }

    /// Ends the process at once.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Ended {
    pub(crate) fn assert_success(&self) {
        assert_eq!(self.code, Some(0), "{}", self.text);
        // A name that no test has would also end well.
        assert!(self.text.contains(DONE), "{}", self.text);
    }

    /// That standard error has a line with all of `words`.
    pub(crate) fn assert_says(&self, words: &[&str]) {
        let has_all = |line: &str| words.iter().all(|word| line.contains(word));
        assert!(self.text.lines().any(has_all), "no line with {words:?}:\n{}", self.text);
    }
}

/// Ends this process successfully, with its exit handlers.
pub(crate) fn leave() -> ! {
    println!("{DONE}");
    std::process::exit(0)
}

/// A connection between two processes of a test.
pub(crate) struct Line(UnixStream);

fn address() -> SocketAddr {
    let name = std::env::var(MEETING).unwrap();
    SocketAddr::from_abstract_name(format!("cuda-emulator-{name}")).unwrap()
}

/// A place where processes of this test can call.
pub(crate) fn listen() -> UnixListener {
    UnixListener::bind_addr(&address()).unwrap()
}

pub(crate) fn accept(listener: &UnixListener) -> Line {
    Line(listener.accept().unwrap().0)
}

/// Calls the process that listens.
pub(crate) fn connect() -> Line {
    let deadline = Instant::now() + LIMIT;
    loop {
        match UnixStream::connect_addr(&address()) {
            Ok(stream) => return Line(stream),
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

impl Line {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.set_read_timeout(Some(LIMIT)).unwrap();
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Waits until the other process is here, too.
    pub(crate) fn meet(&mut self) {
        self.send(&[1]);
        self.receive::<1>();
    }
}
