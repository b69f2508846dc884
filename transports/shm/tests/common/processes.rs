//! Worlds of real processes: the parent passes cards and words on, the children link up.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use unisum_link::handshake::Secret;
use unisum_shm::{Offer, ShmLink};

const RANK: &str = "UNISUM_SHM_TEST_RANK";
/// Lines that belong to the exchange begin so; a test harness prints others.
const MARK: &str = "shm-exchange ";

/// The rank that this process was started as, if it is a child.
pub(crate) fn rank() -> Option<usize> {
    std::env::var(RANK).ok()?.parse().ok()
}

/// Starts `world` copies of this program with `arguments`, connects them, and hands over what
/// each tells in the end.
pub(crate) fn run(world: usize, arguments: &[&str]) -> Vec<String> {
    let mut ranks: Vec<Process> = (0..world).map(|rank| Process::start(rank, arguments)).collect();
    let cards: Vec<String> = ranks.iter_mut().map(Process::hear).collect();
    for round in [cards.join(" "), "connect".to_string()] {
        ranks.iter_mut().for_each(|rank| rank.tell(&round));
        if round != "connect" {
            ranks.iter_mut().for_each(|rank| assert_eq!(rank.hear(), "joined"));
        }
    }
    let told = ranks.iter_mut().map(Process::hear).collect();
    for mut rank in ranks {
        assert!(rank.child.wait().unwrap().success());
    }
    told
}

/// A child's side: links up with the other children.
pub(crate) fn connect(rank: usize) -> ShmLink {
    let deadline = Instant::now() + Duration::from_secs(20);
    let offer = Offer::new(&Secret::new(b"processes")).unwrap();
    tell(&hex(&offer.card()));
    let cards: Vec<Vec<u8>> = hear().split(' ').map(unhex).collect();
    let members: Vec<usize> = (0..cards.len()).collect();
    let candidate = offer.join(rank, &cards, [1; 16], None, deadline).unwrap();
    tell("joined");
    assert_eq!(hear(), "connect");
    candidate.connect(&members, deadline).unwrap()
}

/// Tells the parent something.
pub(crate) fn tell(words: &str) {
    println!("\n{MARK}{words}");
}

fn hear() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim_end().to_string()
}

struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(rank: usize, arguments: &[&str]) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .env(RANK, rank.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    fn tell(&mut self, words: &str) {
        writeln!(self.input, "{words}").unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "a rank ended early");
            if let Some(words) = line.strip_prefix(MARK) {
                return words.trim_end().to_string();
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}
