//! What this process has used so far.

use std::fs;

use rustix::time::{ClockId, clock_gettime};

use crate::Result;

/// Processor time and context switches, since the process started or between two looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Processor time of all threads, user and system, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Times a thread that lives now gave the processor up to wait.
    pub(crate) voluntary_switches: f64,
}

impl Usage {
    /// So far.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub(crate) fn now() -> Result<Self> {
        let voluntary_switches = voluntary_switches()?;
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu_seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 * 1e-9;
        Ok(Self { cpu_seconds, voluntary_switches })
    }

    /// Since then.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub(crate) fn since(then: Self) -> Result<Self> {
        let now = Self::now()?;
        Ok(Self {
            cpu_seconds: now.cpu_seconds - then.cpu_seconds,
            voluntary_switches: (now.voluntary_switches - then.voluntary_switches).max(0.0),
        })
    }
}

/// Source: proc_pid_status(5), `voluntary_ctxt_switches`, of each thread.
fn voluntary_switches() -> Result<f64> {
    let mut switches = 0.0;
    for task in fs::read_dir("/proc/self/task")? {
        // A thread may end between the listing and the look at it.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        switches += count.ok_or("no voluntary_ctxt_switches in /proc")?.trim().parse::<f64>()?;
    }
    Ok(switches)
}

/// The monotonic clock in nanoseconds: the same for all processes of this machine.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_is_a_voluntary_switch_and_no_processor_time_to_speak_of() {
        let before = Usage::now().unwrap();
        // One may be taken off its core as it goes to sleep, which counts otherwise.
        (0..20).for_each(|_| std::thread::sleep(std::time::Duration::from_millis(1)));
        let used = Usage::since(before).unwrap();
        assert!(used.voluntary_switches >= 1.0);
        assert!(used.cpu_seconds >= 0.0);
    }
}
