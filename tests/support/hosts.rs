//! Hosts for tests: network namespaces that are joined by veth pairs and a bridge in one more.
//!
//! They need root. Without it the tests say so and pass, unless UNISUM_TEST_NAMESPACES is
//! `required`, as in CI.

use std::cell::Cell;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Written to by hosts that are the only ones of this process.
static ALONE: RwLock<()> = RwLock::new(());

thread_local! {
    /// Which set of hosts this thread has made; 0 where there is one set at a time.
    static SET: Cell<usize> = const { Cell::new(0) };
}

/// The namespace of a host of this thread's.
pub fn namespace(host: usize) -> String {
    format!("unisum-{}-{}-{host}", std::process::id(), SET.get())
}

/// What runs a command on a host.
pub fn inside(host: usize) -> Vec<String> {
    ["ip", "netns", "exec", &namespace(host)].map(str::to_owned).to_vec()
}

/// Runs a command to set up hosts.
pub fn sh(command: &str) -> Result<(), String> {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command}: {error}")) }
}

/// Hosts 0..n, whose `eth0`s are ports of one switch; deleted when dropped.
pub struct Hosts {
    count: usize,
    _turn: Turn,
}

/// Held for as long as hosts are there.
enum Turn {
    Alone { _lock: RwLockWriteGuard<'static, ()> },
    BesideOthers { _lock: RwLockReadGuard<'static, ()> },
}

impl Hosts {
    /// Hosts with addresses 10.77.0.1… and fd77::1…, the only ones of this process; `None` if this
    /// user may not have any.
    pub fn new(count: usize) -> Option<Self> {
        Self::without_addresses(count).map(Self::with_addresses)
    }

    /// The same, for what mostly waits: other threads may have hosts meanwhile, of the same
    /// addresses on a switch of their own. The hosts belong to the thread that calls this.
    pub fn beside_others(count: usize) -> Option<Self> {
        static SETS: AtomicUsize = AtomicUsize::new(1);
        let _lock = ALONE.read().unwrap_or_else(PoisonError::into_inner);
        // Relaxed: only the numbers must differ.
        SET.set(SETS.fetch_add(1, Ordering::Relaxed));
        Self::make(count, Turn::BesideOthers { _lock }).map(Self::with_addresses)
    }

    /// Hosts that have no address but that of loopback. Their interfaces have different numbers.
    pub fn without_addresses(count: usize) -> Option<Self> {
        let _lock = ALONE.write().unwrap_or_else(PoisonError::into_inner);
        Self::make(count, Turn::Alone { _lock })
    }

    fn with_addresses(self) -> Self {
        for host in 0..self.count {
            let number = host + 1;
            self.on(host, &format!("ip addr add 10.77.0.{number}/24 dev eth0"));
            self.on(host, &format!("ip addr add fd77::{number}/64 dev eth0 nodad"));
        }
        self
    }

    fn make(count: usize, _turn: Turn) -> Option<Self> {
        let this = Self { count, _turn };
        match this.set_up() {
            Ok(()) => Some(this),
            Err(why) => {
                let required =
                    std::env::var("UNISUM_TEST_NAMESPACES").is_ok_and(|v| v == "required");
                assert!(!required, "no network namespaces: {why}");
                println!("skipped: no network namespaces: {why}");
                None
            }
        }
    }

    fn set_up(&self) -> Result<(), String> {
        let switch = self.switch();
        sh(&format!("ip netns add {switch} && ip -n {switch} link add br0 type bridge"))?;
        sh(&format!("ip -n {switch} link set br0 up"))?;
        for host in 0..self.count {
            let (name, index) = (namespace(host), 10 + 3 * host);
            sh(&format!("ip netns add {name} && ip -n {name} link set lo up"))?;
            let peer = format!("peer name port{host} netns {switch}");
            sh(&format!("ip -n {name} link add eth0 index {index} type veth {peer}"))?;
            sh(&format!("ip -n {switch} link set port{host} master br0 up"))?;
            sh(&format!("ip -n {name} link set eth0 addrgenmode none up"))?;
        }
        Ok(())
    }

    /// The namespace of the switch.
    pub fn switch(&self) -> String {
        namespace(self.count)
    }

    /// Runs a command on a host, which must succeed.
    pub fn on(&self, host: usize, command: &str) {
        sh(&format!("ip netns exec {} {command}", namespace(host))).unwrap();
    }

    /// What names mean on a host, beside `localhost`.
    pub fn set_names(&self, host: usize, lines: &str) {
        let directory = format!("/etc/netns/{}", namespace(host));
        std::fs::create_dir_all(&directory).unwrap();
        let text = format!("127.0.0.1 localhost\n::1 localhost\n{lines}\n");
        std::fs::write(format!("{directory}/hosts"), text).unwrap();
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 0..=self.count {
            // They may not exist if setting up failed half-way.
            let _ = sh(&format!("ip netns del {}", namespace(host)));
            let _ = std::fs::remove_dir_all(format!("/etc/netns/{}", namespace(host)));
        }
    }
}
