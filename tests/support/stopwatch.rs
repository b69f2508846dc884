//! How long something takes, and whether others had the processors meanwhile.

use std::time::{Duration, Instant};

/// Of something that processes do which this one has started, and has seen end by when it is read.
pub struct Stopwatch {
    since: Instant,
    /// Seconds in which processors worked, for anybody, or were kept from this machine.
    all: f64,
    /// Seconds of them for this process's ended children.
    own: f64,
}

impl Stopwatch {
    pub fn start() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        let times = stat.lines().next().unwrap().split_whitespace().skip(1).take(8);
        let times: Vec<f64> = times.map(|time| time.parse().unwrap()).collect();
        // SAFETY: it only asks.
        let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        // All but idle, and idle while a disk works.
        let all = (times.iter().sum::<f64>() - times[3] - times[4]) / hertz;
        Self { since: Instant::now(), all, own: childrens_seconds() }
    }

    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Panics if it took longer than `limit`, or, where others have had more than a quarter of the
    /// processors meanwhile, `busy`: whose processors others have ends later, which says nothing of
    /// the library.
    #[track_caller]
    pub fn assert_within(&self, limit: Duration, busy: Duration, context: &str) {
        self.assert_took(self.elapsed(), (limit, busy), context);
    }

    /// The same of something that took `took` of that time.
    #[track_caller]
    pub fn assert_took(&self, took: Duration, limits: (Duration, Duration), context: &str) {
        let limit = if self.was_others() { limits.1 } else { limits.0 };
        assert!(took < limit, "took {took:?}, not {limit:?} at most: {context}");
    }

    fn was_others(&self) -> bool {
        let now = Self::start();
        let cores = std::thread::available_parallelism().unwrap().get() as f64;
        let others = (now.all - self.all) - (now.own - self.own);
        others > 0.25 * cores * self.elapsed().as_secs_f64()
    }
}

/// Seconds of processor time of this process's ended children.
fn childrens_seconds() -> f64 {
    // SAFETY: zeros are a valid value, which the kernel overwrites.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one such value.
    let asked = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    assert_eq!(asked, 0);
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
