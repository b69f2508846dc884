//! Starts the ranks of a job on this machine: a function that does what `mpirun -n N` does for one
//! host.
//!
//! ```no_run
//! use std::process::Command;
//!
//! // Four processes of this program, which join with `Communicator::from_environment`.
//! let program = std::env::current_exe()?;
//! let mut ranks = unisum::local::spawn(4, |_rank| Command::new(&program))?;
//! ranks.wait()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod meeting;

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use unisum_control::Environment;
use unisum_control::launcher;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use meeting::Meeting;

/// Whether this process is a rank that [`spawn`] or any launcher started, or is meant to be one:
/// its environment has the variables of one. A program that starts its ranks itself asks this
/// first, so that it runs under mpirun, srun and torchrun as well.
///
/// ```no_run
/// use std::process::Command;
/// use unisum::{Communicator, local};
///
/// if !local::is_rank() {
///     let program = std::env::current_exe()?;
///     return Ok(local::spawn(4, |_rank| Command::new(&program))?.wait()?);
/// }
/// let communicator = Communicator::from_environment()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn is_rank() -> bool {
    launcher::is_launched(&Environment::from_process())
}

/// Starts `ranks` processes that can find each other; `command` creates the command of each rank.
///
/// Sets the variables that [`crate::Communicator::from_environment`] reads, in addition to the
/// command's own: rank, world, a rendezvous in a fresh directory that only this user can enter, and
/// a random job token. They take precedence over what an outer launcher (Slurm, mpirun, torchrun)
/// left in the environment.
///
/// Unless the environment names interfaces, the ranks listen on the loopback interface only.
///
/// The processes are killed when the returned value is dropped, and by the kernel when the *thread*
/// that called this ends, for whatever reason: no rank outlives its launcher. The directory is
/// removed with the returned value; if a launcher is killed, the next one removes it.
///
/// # Errors
/// If the directory cannot be created or a process cannot be started; processes already started are
/// killed.
pub fn spawn(ranks: usize, mut command: impl FnMut(usize) -> Command) -> io::Result<LocalRanks> {
    let token = random_hex()?;
    let mut local =
        LocalRanks { meeting: Meeting::new()?, ranks: Vec::new(), failures: Vec::new() };
    let mut rendezvous = OsString::from("file://");
    rendezvous.push(local.meeting.path().join("world"));
    for rank in 0..ranks {
        let mut command = command(rank);
        command
            .env("UNISUM_RANK", rank.to_string())
            .env("UNISUM_WORLD", ranks.to_string())
            .env("UNISUM_LOCAL_RANK", rank.to_string())
            .env("UNISUM_LOCAL_SIZE", ranks.to_string())
            .env("UNISUM_RENDEZVOUS", &rendezvous)
            .env("UNISUM_TOKEN", &token);
        let names_interface = command.get_envs().any(|(name, _)| name == INTERFACE);
        if !names_interface && std::env::var_os(INTERFACE).is_none() {
            command.env(INTERFACE, "=lo");
        }
        die_with_parent(&mut command);
        local.ranks.push(LocalRank::start(&mut command)?);
    }
    Ok(local)
}

const INTERFACE: &str = "UNISUM_INTERFACE";

/// Processes started by [`spawn`]. Dropping it kills those still running.
#[derive(Debug)]
pub struct LocalRanks {
    meeting: Meeting,
    ranks: Vec<LocalRank>,
    /// The first first.
    failures: Vec<RankFailure>,
}

impl LocalRanks {
    /// The process ids, by rank.
    pub fn pids(&self) -> Vec<u32> {
        self.ranks.iter().map(|rank| rank.child.id()).collect()
    }

    /// Blocks until every rank has ended.
    ///
    /// Once a rank has failed, the others have ten seconds to notice and report it themselves; then
    /// they are killed.
    ///
    /// # Errors
    /// The rank that failed first: it ended by a signal or with an exit status other than 0.
    pub fn wait(&mut self) -> Result<(), RankFailure> {
        self.wait_with_grace(Duration::from_secs(10))
    }

    /// Blocks until every rank has ended. In an elastic job
    /// ([`Builder::elastic`](crate::Builder::elastic)) some may be killed while the others go on.
    ///
    /// # Errors
    /// If a rank ended with another status than 0, not by a signal, or if all were killed: the
    /// first such rank.
    pub fn wait_for_survivors(&mut self) -> Result<(), RankFailure> {
        while self.running().next().is_some() {
            self.reap();
            if self.running().next().is_some() {
                self.sleep_until_one_ends(None);
            }
        }
        let have_all = self.failures.len() == self.ranks.len();
        let failed = self.failures.iter().find(|failure| failure.signal().is_none());
        let failure = failed.or_else(|| self.failures.first().filter(|_| have_all));
        failure.map_or(Ok(()), |failure| Err(*failure))
    }

    /// Kills a rank (SIGKILL). Does nothing if it has ended.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn kill(&mut self, rank: usize) -> io::Result<()> {
        self.ranks[rank].child.kill()
    }

    fn wait_with_grace(&mut self, grace: Duration) -> Result<(), RankFailure> {
        let mut deadline = None;
        loop {
            self.reap();
            if self.running().next().is_none() {
                return self.failures.first().map_or(Ok(()), |failure| Err(*failure));
            }
            if !self.failures.is_empty() {
                let until = *deadline.get_or_insert_with(|| Instant::now() + grace);
                if Instant::now() >= until {
                    self.kill_all();
                }
            }
            self.sleep_until_one_ends(deadline);
        }
    }

    fn running(&self) -> impl Iterator<Item = &LocalRank> {
        self.ranks.iter().filter(|rank| !rank.ended)
    }

    /// Collects the processes that ended. Of several failures seen at once the one by a signal
    /// is the cause: the others died of it.
    fn reap(&mut self) {
        let mut failures = Vec::new();
        for (number, rank) in self.ranks.iter_mut().enumerate().filter(|(_, rank)| !rank.ended) {
            let status = match rank.child.try_wait() {
                Ok(None) => continue,
                Ok(status) => status,
                Err(_) => None,
            };
            rank.ended = true;
            if !status.is_some_and(|status| status.success()) {
                failures.push(RankFailure { rank: number, status });
            }
        }
        failures.sort_by_key(|failure| failure.signal().is_none());
        self.failures.extend(failures);
    }

    fn sleep_until_one_ends(&self, deadline: Option<Instant>) {
        let timeout = deadline.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        // Past the deadline all were killed: they end without further ado.
        let timeout = timeout.filter(|left| left.tv_sec > 0 || left.tv_nsec > 0);
        let mut ends: Vec<_> =
            self.running().map(|rank| PollFd::new(&rank.end, PollFlags::IN)).collect();
        // An interrupted or refused poll only makes the caller look again.
        let _ = poll(&mut ends, timeout.as_ref());
    }

    fn kill_all(&mut self) {
        for rank in self.ranks.iter_mut().filter(|rank| !rank.ended) {
            // It can only fail because the process ended meanwhile.
            let _ = rank.child.kill();
        }
    }
}

impl Drop for LocalRanks {
    fn drop(&mut self) {
        self.kill_all();
        for rank in &mut self.ranks {
            // Nobody is left to tell that it failed.
            let _ = rank.child.wait();
        }
    }
}

/// One process.
#[derive(Debug)]
struct LocalRank {
    child: Child,
    /// The process's descriptor: readable once it ended.
    end: OwnedFd,
    ended: bool,
}

impl LocalRank {
    fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(end) => Ok(Self { child, end, ended: false }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }
}

/// The rank that failed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankFailure {
    /// The rank.
    pub rank: usize,
    /// How it ended; `None` if the kernel does not report it because the program ignores SIGCHLD.
    pub status: Option<ExitStatus>,
}

impl RankFailure {
    /// The signal that ended the rank, if one did.
    pub fn signal(&self) -> Option<i32> {
        self.status.and_then(|status| status.signal())
    }
}

impl fmt::Display for RankFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, status } = self;
        match (self.signal(), status.and_then(|status| status.code())) {
            (Some(signal), _) => write!(f, "rank {rank} was killed by signal {signal}"),
            (None, Some(code)) => write!(f, "rank {rank} ended with exit status {code}"),
            (None, None) => write!(f, "rank {rank} ended, and its exit status is not known"),
        }
    }
}

impl std::error::Error for RankFailure {}

/// 128 random bits.
fn random_hex() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let mut hex = String::new();
    for byte in bytes {
        write!(hex, "{byte:02x}").map_err(io::Error::other)?;
    }
    Ok(hex)
}

/// Has the kernel kill the process when the thread that starts it ends.
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let hook = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before the request: then no signal will come.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(rustix::io::Errno::SRCH.into())
        }
    };
    // SAFETY: between fork and exec the hook makes two system calls; it takes no lock and
    // allocates nothing (an `io::Error` made of an errno holds just the number).
    unsafe { command.pre_exec(hook) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn ranks_get_their_numbers_and_one_private_meeting_place() {
        let script = r#"test "$UNISUM_RANK" = "$0" -a "$UNISUM_WORLD" = 3 -a -n "$UNISUM_TOKEN" &&
            test "$(stat -c %a "$(dirname "${UNISUM_RENDEZVOUS#file://}")")" = 700"#;
        let mut ranks = spawn(3, |rank| {
            let mut command = shell(script);
            command.arg(rank.to_string());
            command
        })
        .unwrap();
        assert_eq!(ranks.wait(), Ok(()));
    }

    #[test]
    fn a_failed_rank_is_named_and_the_others_are_killed_after_the_grace() {
        let mut ranks =
            spawn(3, |rank| shell(if rank == 1 { "exit 7" } else { "exec sleep 60" })).unwrap();
        let failure = ranks.wait_with_grace(Duration::from_millis(50)).unwrap_err();
        assert_eq!(failure.to_string(), "rank 1 ended with exit status 7");
        assert_eq!(ranks.wait(), Err(failure));
    }

    #[test]
    fn a_killed_rank_is_told_from_those_that_died_of_it() {
        let mut ranks = spawn(2, |_| shell("exec sleep 60")).unwrap();
        ranks.kill(1).unwrap();
        let failure = ranks.wait_with_grace(Duration::ZERO).unwrap_err();
        assert_eq!(failure.to_string(), "rank 1 was killed by signal 9");
    }

    #[test]
    fn survivors_may_go_on_without_those_that_were_killed_and_not_without_those_that_failed() {
        let wait = |script: fn(usize) -> &'static str| {
            spawn(3, |rank| shell(script(rank))).unwrap().wait_for_survivors()
        };
        let killed = |rank: usize| if rank == 0 { "kill -9 $$" } else { "sleep 0.05" };
        assert_eq!(wait(killed), Ok(()));
        let failed = |rank: usize| if rank == 2 { "exit 3" } else { "kill -9 $$" };
        assert_eq!(wait(failed).unwrap_err().to_string(), "rank 2 ended with exit status 3");
        assert_eq!(wait(|_| "kill -9 $$").unwrap_err().signal(), Some(9));
    }

    #[test]
    fn dropping_kills_the_ranks_and_removes_their_directory() {
        let ranks = spawn(2, |_| shell("exec sleep 60")).unwrap();
        let (pids, meeting) = (ranks.pids(), ranks.meeting.path().to_owned());
        assert!(meeting.exists());
        drop(ranks);
        assert!(!meeting.exists());
        for pid in pids {
            assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
    }

    #[test]
    fn a_command_that_does_not_exist_is_an_error() {
        let error = spawn(1, |_| Command::new("/nonexistent/program")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
