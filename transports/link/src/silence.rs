//! What the kernel knows of a TCP connection to another host, and connections that stand while
//! nothing is heard of that host, though it was sent something.
//!
//! Where packets are lost, TCP sends again after pauses that double: a network that was away for
//! ten seconds is missed for seconds after it is back. Where connections can go on in others, their
//! owners therefore look now and then, and dial anew. The kernel of a process that is stopped, or
//! reads nothing, acknowledges what comes: that is no silence.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

/// What the kernel says of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Whether something awaits an acknowledgement: data, a probe of a full receiver, a keepalive.
    pub awaits: bool,
    /// How often it was sent again since the last acknowledgement.
    pub attempts: u32,
    /// How long ago the last acknowledgement came.
    pub heard: Duration,
    /// How long an answer takes at most, going by the last ones.
    pub round_trip: Duration,
}

impl Told {
    /// What there is to say of a connection that is not there.
    pub const NOTHING: Self =
        Self { awaits: false, attempts: 0, heard: Duration::ZERO, round_trip: Duration::ZERO };
}

/// Between two looks: where nothing awaits an answer, and where something does.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_SOON: Duration = Duration::from_millis(50);
/// How much longer than a round trip an answer may take: a kernel holds acknowledgements back for
/// some 40 ms, and sends again after 200 ms.
const QUIET: Duration = Duration::from_millis(150);
/// The kernel counts its times in ticks.
const TICKS: Duration = Duration::from_millis(10);

/// Since when a connection has been silent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hush {
    since: Option<Instant>,
    attempts: u32,
    look_at: Option<Instant>,
}

impl Hush {
    /// Whether it is time to look.
    pub fn is_due(&self, now: Instant) -> bool {
        self.look_at.is_none_or(|at| at <= now)
    }

    /// When to look next.
    pub fn look_at(&self, now: Instant) -> Instant {
        self.look_at.unwrap_or(now)
    }

    /// Takes in what the kernel says `now`; for how long the connection has been silent, if that is
    /// longer than an answer takes. What the other host sends of its own accord is no answer: after
    /// an outage it may be heard long before it hears what is sent again.
    pub fn look(&mut self, told: Told, now: Instant) -> Option<Duration> {
        let attempts = std::mem::replace(&mut self.attempts, told.attempts);
        let is_unanswered = attempts > 0 && told.attempts >= attempts;
        let is_silent = |since: &Instant| is_unanswered || told.heard + TICKS >= now - *since;
        let since = self.since.filter(is_silent).unwrap_or(now);
        self.since = told.awaits.then_some(since);
        self.look_at = Some(now + if told.awaits { LOOK_SOON } else { LOOK });
        let silent = now - self.since?;
        (silent >= QUIET + told.round_trip).then_some(silent)
    }
}

/// Asks the kernel about a connection.
///
/// # Errors
/// If it is none.
pub fn ask(socket: BorrowedFd<'_>) -> io::Result<Told> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut bytes = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes to `info`, and their number to `bytes`; the
    // socket is open while it is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: numbers of which all bits are valid; what the kernel did not write is zero.
    let info = unsafe { info.assume_init() };
    Ok(Told {
        awaits: info.tcpi_unacked > 0 || info.tcpi_probes > 0,
        attempts: u32::from(info.tcpi_retransmits) + u32::from(info.tcpi_probes),
        heard: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        // As the kernel reckons before it sends again (RFC 6298).
        round_trip: Duration::from_micros(
            u64::from(info.tcpi_rtt) + 4 * u64::from(info.tcpi_rttvar),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Looks whenever that is due at a connection on which something awaits an answer, and was
    /// heard so many milliseconds ago; the millisecond at which it is silent.
    fn silent_at(heard: impl Fn(u32) -> u32, round_trip: u32) -> Option<u32> {
        let (start, mut hush) = (Instant::now(), Hush::default());
        (0..2000).find(|&ms| {
            let now = start + MS * ms;
            let told = Told {
                awaits: true,
                heard: MS * heard(ms),
                round_trip: MS * round_trip,
                ..Told::NOTHING
            };
            hush.is_due(now) && hush.look(told, now).is_some()
        })
    }

    #[test]
    fn who_does_not_answer_within_a_round_trip_and_some_is_silent() {
        assert_eq!(silent_at(|ms| ms, 0), Some(150));
        assert_eq!(silent_at(|ms| ms + 5000, 30), Some(200));
        assert_eq!(silent_at(|ms| ms, 300), Some(450));
    }

    #[test]
    fn who_answers_anything_is_not() {
        assert_eq!(silent_at(|ms| ms % 100, 0), None);
        assert_eq!(silent_at(|_| 0, 0), None);
        // The last answer came after 400 ms.
        let heard = |ms| if ms < 400 { ms % 40 } else { ms - 400 };
        assert!((550..=650).contains(&silent_at(heard, 0).unwrap()));
    }

    #[test]
    fn who_is_heard_and_answers_nothing_is_silent() {
        let (start, mut hush) = (Instant::now(), Hush::default());
        let told = |attempts| Told { awaits: true, attempts, ..Told::NOTHING };
        assert_eq!(hush.look(told(1), start), None);
        assert_eq!(hush.look(told(1), start + 100 * MS), None);
        assert_eq!(hush.look(told(2), start + 200 * MS), Some(200 * MS));
        // An answer has the kernel count anew.
        assert_eq!(hush.look(told(1), start + 250 * MS), None);
        assert_eq!(hush.look(told(1), start + 350 * MS), None);
        assert_eq!(hush.look(told(1), start + 400 * MS), Some(150 * MS));
        assert_eq!(hush.look(told(0), start + 450 * MS), None);
    }

    #[test]
    fn where_nothing_awaits_an_answer_nobody_is() {
        let (start, mut hush) = (Instant::now(), Hush::default());
        let told = |awaits| Told { awaits, heard: 5000 * MS, ..Told::NOTHING };
        assert_eq!(hush.look(told(true), start), None);
        assert_eq!(hush.look(told(false), start + 100 * MS), None);
        assert_eq!(hush.look(told(true), start + 200 * MS), None);
        assert!(!hush.is_due(start + 249 * MS) && hush.is_due(start + 250 * MS));
        assert_eq!(hush.look(told(true), start + 350 * MS), Some(150 * MS));
    }

    #[test]
    fn a_connection_that_is_read_awaits_nothing() {
        use std::io::{Read as _, Write as _};
        use std::net::{TcpListener, TcpStream};
        use std::os::fd::AsFd as _;

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[1; 100]).unwrap();
        other.read_exact(&mut [0; 100]).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while ask(stream.as_fd()).unwrap().awaits {
            assert!(Instant::now() < until, "it was read");
        }
        assert!(ask(stream.as_fd()).unwrap().heard < Duration::from_secs(10));
    }
}
