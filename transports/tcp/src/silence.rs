//! Connections on which the other host acknowledges nothing any more, while both hosts reach
//! others: neither the control connections nor the pulses tell of that, and TCP itself goes on
//! sending for a quarter of an hour.
//!
//! The kernel acknowledges for a process that is stopped or reads nothing, so that only a host or a
//! network that is away is silent. What was lost is sent again after pauses that double: a silence
//! counts only once something was sent after the limit and not answered either, so that an outage
//! that is shorter than the limit ends no connection, however long the pause at its end.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use unisum_link::silence::Told;

/// How long the answer to one more attempt may take.
const ANSWER: Duration = Duration::from_secs(1);
/// By how much the kernel's times may differ from one look to the next: it counts ticks.
const TICKS: Duration = Duration::from_millis(100);
/// The first pause between two attempts, and how short and how long the longest may be.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(120);
/// The steps in which a longest pause is looked for.
const PAUSE_STEP: Duration = Duration::from_millis(250);
/// How much longer than twice the limit the kernel tries: it must not give up before it is clear
/// that the other host is silent.
const SPARE: Duration = Duration::from_secs(10);
/// Milliseconds (Linux 6.15, `include/uapi/linux/tcp.h`).
const TCP_RTO_MAX_MS: libc::c_int = 44;

/// How often to look, at least and at most.
const LOOK_MIN: Duration = Duration::from_millis(250);
const LOOK_MAX: Duration = Duration::from_secs(1);

/// The sockets to other hosts, and how long each has been silent.
#[derive(Debug)]
pub(crate) struct Silences {
    limit: Duration,
    /// The time of the last look.
    looked: Instant,
    by_socket: Vec<(usize, Option<Silence>)>,
}

/// Of a socket: something was sent and is not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Silence {
    since: Instant,
    attempts: u32,
    /// When the answer to an attempt after the limit is due.
    answer_by: Option<Instant>,
}

impl Silences {
    /// Sockets are lost that were silent for `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, looked: Instant::now(), by_socket: Vec::new() }
    }

    /// A socket to another host.
    pub(crate) fn add(&mut self, socket: usize) {
        self.by_socket.retain(|(known, _)| *known != socket);
        self.by_socket.push((socket, None));
    }

    /// How long a sleep may last until the next look.
    pub(crate) fn pause(&self) -> Duration {
        match self.by_socket.is_empty() {
            true => Duration::MAX,
            false => (self.limit / 4).clamp(LOOK_MIN, LOOK_MAX),
        }
    }

    /// Looks at all sockets, unless that was done a moment ago; the first that is lost, or whose
    /// kernel can't be asked, and for how long it has been silent.
    pub(crate) fn look(
        &mut self,
        ask: impl Fn(usize) -> io::Result<Told>,
    ) -> Option<(usize, io::Result<Duration>)> {
        if self.by_socket.is_empty() {
            return None;
        }
        let (looked, now) = (self.looked, Instant::now());
        if now - looked < self.pause() {
            return None;
        }
        self.looked = now;
        let limit = self.limit;
        self.by_socket.iter_mut().find_map(|(socket, silence)| match ask(*socket) {
            Ok(told) => {
                *silence = Silence::after(*silence, told, (looked, now), limit);
                let lost = silence.filter(|it| it.answer_by.is_some_and(|by| by <= now))?;
                Some((*socket, Ok(now - lost.since)))
            }
            Err(error) => Some((*socket, Err(error))),
        })
    }
}

impl Silence {
    /// What follows for a socket from what the kernel says `now`, after the last look at `looked`.
    fn after(
        before: Option<Self>,
        told: Told,
        (looked, now): (Instant, Instant),
        limit: Duration,
    ) -> Option<Self> {
        if !told.awaits {
            return None;
        }
        let was_silent = |it: &Self| told.heard + TICKS >= now - it.since;
        let Some(mut silence) = before.filter(was_silent) else {
            return Some(Self { since: now, attempts: told.attempts, answer_by: None });
        };
        // The attempt was made after the last look, perhaps at once.
        if told.attempts != silence.attempts && looked - silence.since >= limit {
            silence.answer_by.get_or_insert(now + ANSWER);
        }
        silence.attempts = told.attempts;
        Some(silence)
    }
}

/// Has the kernel not double the pauses any further between its attempts to send again what was not
/// acknowledged: after an outage a connection goes on when the next one is due. Does nothing on
/// systems that can't.
///
/// It gives up after so many attempts (`tcp_retries2`), however short the pauses, so that they
/// can't be as short as one would like.
pub(crate) fn limit_pauses(socket: BorrowedFd<'_>, limit: Duration) {
    let attempts = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_retries2");
    let attempts = attempts.ok().and_then(|it| it.trim().parse().ok()).unwrap_or(0);
    let Some(pause) = pause_max(limit, attempts) else { return };
    let millis = libc::c_int::try_from(pause.as_millis()).unwrap_or(libc::c_int::MAX);
    let bytes = size_of_val(&millis) as libc::socklen_t;
    // SAFETY: the kernel reads `bytes` bytes of `millis`; the socket is open while it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_RTO_MAX_MS,
            (&raw const millis).cast(),
            bytes,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "the pauses between attempts are as long as the system has them");
    }
}

/// The shortest pause with which a kernel that makes so many attempts does not give up too early;
/// `None` if there is none.
fn pause_max(limit: Duration, attempts: u32) -> Option<Duration> {
    let least = limit.saturating_mul(2).saturating_add(SPARE);
    let steps = PAUSE_MAX.as_millis() / PAUSE_STEP.as_millis();
    let mut pauses = (1..steps as u32).map(|step| PAUSE_STEP * step);
    pauses.find(|pause| *pause >= PAUSE_MIN && gives_up_after(*pause, attempts) >= least)
}

/// How long the kernel sends again what is not acknowledged, as `tcp_model_timeout` has it.
fn gives_up_after(pause: Duration, attempts: u32) -> Duration {
    let doubled = |it: u32| PAUSE_FIRST.saturating_mul(1 << it.min(20)).min(pause);
    (0..=attempts).map(doubled).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(6);

    /// Looks once a second at a socket that was last heard `heard(second)` seconds ago and has made
    /// `attempts(second)` attempts since; the second at which it is lost.
    fn lost_at(heard: impl Fn(u64) -> u64, attempts: impl Fn(u64) -> u32) -> Option<u64> {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut silence = None;
        (1..60).find(|&second| {
            let heard = Duration::from_secs(heard(second));
            let told = Told { awaits: true, attempts: attempts(second), heard, ..Told::NOTHING };
            silence = Silence::after(silence, told, (at(second - 1), at(second)), LIMIT);
            silence.is_some_and(|it| it.answer_by.is_some_and(|by| by <= at(second)))
        })
    }

    /// Attempts after 1, 3, 7, 15, … seconds.
    fn doubling(second: u64) -> u32 {
        (second + 1).ilog2()
    }

    #[test]
    fn a_socket_is_lost_that_answers_no_attempt_after_the_limit() {
        // Silent from the first second on; the attempt of second 7 may have come before the limit.
        assert_eq!(lost_at(|second| second + 90, doubling), Some(16));
        assert_eq!(lost_at(|second| second + 90, |second| second as u32), Some(9));
    }

    #[test]
    fn without_an_attempt_after_the_limit_nothing_is_known() {
        assert_eq!(lost_at(|second| second + 90, |second| second.min(6) as u32), None);
    }

    #[test]
    fn any_acknowledgement_begins_anew() {
        // The outage ended in second 12, before what was sent again in second 15 could be missed.
        let heard = |second: u64| if second < 15 { second } else { (second - 15) % 5 };
        assert_eq!(lost_at(heard, doubling), None);
        assert_eq!(lost_at(|second| second % 5, |second| second as u32), None);
    }

    #[test]
    fn what_awaits_nothing_is_not_silent() {
        let (start, hour) = (Instant::now(), Duration::from_secs(3600));
        let told = Told { heard: hour, ..Told::NOTHING };
        let before = Some(Silence { since: start, attempts: 3, answer_by: Some(start) });
        assert_eq!(Silence::after(before, told, (start, start + hour), LIMIT), None);
    }

    #[test]
    fn the_kernel_does_not_give_up_before_a_silence_counts() {
        let pause = |limit, attempts| pause_max(Duration::from_secs(limit), attempts);
        assert_eq!(pause(10, 15), Some(Duration::from_millis(2250)));
        assert_eq!(pause(2, 15), Some(Duration::from_secs(1)));
        assert_eq!(pause(10, 8), Some(Duration::from_secs(6)));
        // Even with the pauses that it has by itself.
        assert_eq!(pause(10, 5), None);
        assert_eq!(pause(3600, 15), None);
        assert_eq!(gives_up_after(Duration::from_millis(2250), 15), Duration::from_secs(30));
    }
}
