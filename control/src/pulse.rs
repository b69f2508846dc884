//! Pulses: how a host that is lost is told from one on which a process is stopped, or busy.
//!
//! A rank on another host than the coordinator's opens a second connection to it, on which nobody
//! ever says anything. The kernels at its ends ask each other once a second whether they are there
//! (TCP keepalive), also for processes that are stopped, and end the connection when no answer has
//! come for the limit. On the control connection that would not do: while something that was sent
//! is not acknowledged, TCP asks nothing else, and sends it again after pauses that double, so that
//! a network that was away for six seconds is missed for twelve.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::{SockRef, TcpKeepalive};
use unisum_link::Rank;
use unisum_link::dial::Within;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{HandshakeError, Hello, Purpose};
use unisum_link::secure::{self, Credentials};

/// How often the kernel asks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long after the first host others may turn out lost with it: those that were asked a moment
/// later, on the same host or beyond the same cable. If it is this host that is cut off, all are.
const GATHER: Duration = Duration::from_millis(1500);
/// Between two attempts to open a pulse.
const PAUSE: Duration = Duration::from_millis(20);

/// The pulses that this process feels: those of all ranks of other hosts on the coordinator, the
/// coordinator's elsewhere.
#[derive(Debug)]
pub(super) struct Pulses {
    limit: Duration,
    by_token: BTreeMap<usize, Pulse>,
    lost: Vec<(Rank, IpAddr)>,
    /// Ranks whose pulses ended in another way.
    ended: Vec<Rank>,
    lost_until: Option<Instant>,
}

#[derive(Debug)]
struct Pulse {
    rank: Rank,
    stream: ParentOnly<TcpStream>,
    address: IpAddr,
}

impl Pulses {
    /// None yet; hosts are lost that have not answered for `limit`.
    pub(super) fn new(limit: Duration) -> Self {
        let (by_token, lost, ended) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { limit, by_token, lost, ended, lost_until: None }
    }

    pub(super) const fn limit(&self) -> Duration {
        self.limit
    }

    /// Feels the pulse of a rank's host from now on, and no other one of that rank. The stream is
    /// registered under `token`.
    ///
    /// # Errors
    /// If the kernel refuses an option.
    pub(super) fn add(
        &mut self,
        token: usize,
        rank: Rank,
        stream: ParentOnly<TcpStream>,
    ) -> io::Result<()> {
        let address = stream.peer_addr()?.ip().to_canonical();
        stream.set_nonblocking(true)?;
        let socket = SockRef::from(&*stream);
        let keepalive = TcpKeepalive::new().with_time(PERIOD).with_interval(PERIOD);
        socket.set_tcp_keepalive(&keepalive)?;
        // From the last answer on, which may have come a period before an outage began.
        socket.set_tcp_user_timeout(Some(self.limit.saturating_add(PERIOD)))?;
        self.by_token.retain(|_, pulse| pulse.rank != rank);
        self.by_token.insert(token, Pulse { rank, stream, address });
        Ok(())
    }

    pub(super) fn has(&self, token: usize) -> bool {
        self.by_token.contains_key(&token)
    }

    /// Looks what has become of a pulse.
    pub(super) fn feel(&mut self, token: usize, now: Instant) {
        let Some(pulse) = self.by_token.get_mut(&token) else { return };
        let (rank, address) = (pulse.rank, pulse.address);
        match pulse.stream.read(&mut [0; 16]) {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // The other process has ended, or its host was started anew: the control connection
            // says how. Or something in between has cut this one.
            Ok(_) => self.ended(token, rank),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.ended(token, rank),
            Err(_) => {
                self.by_token.remove(&token);
                self.lost.push((rank, address));
                self.lost_until.get_or_insert(now + GATHER);
            }
        }
    }

    fn ended(&mut self, token: usize, rank: Rank) {
        self.by_token.remove(&token);
        self.ended.push(rank);
    }

    /// The ranks whose pulses have ended since this was asked last, and not because a host is lost.
    pub(super) fn take_ended(&mut self) -> Vec<Rank> {
        std::mem::take(&mut self.ended)
    }

    /// The ranks whose hosts are lost, with their addresses, once all are known that were lost with
    /// the first.
    pub(super) fn lost(&mut self, now: Instant) -> Vec<(Rank, IpAddr)> {
        if self.lost_until.is_none_or(|until| until > now && !self.by_token.is_empty()) {
            return Vec::new();
        }
        self.lost_until = None;
        self.lost.sort_unstable();
        std::mem::take(&mut self.lost)
    }

    /// When [`Pulses::lost`] has something to tell.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        self.lost_until
    }
}

/// Opens this rank's pulse to who has admitted `hello` on the `control` connection; none is needed
/// inside a host. Blocks for `time` at most.
///
/// # Errors
/// If there is none in that time, or it is refused.
pub(super) fn open(
    control: &TcpStream,
    hello: &Hello,
    session: [u8; 16],
    (credentials, time): (&Credentials, Duration),
) -> Result<Option<ParentOnly<TcpStream>>, HandshakeError> {
    let address = control.peer_addr()?;
    if address.ip() == control.local_addr()?.ip() {
        return Ok(None);
    }
    let hello = Hello { purpose: Purpose::Pulse, session, ..*hello };
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now()).max(PAUSE);
        match dial(address, &hello, credentials, left) {
            // The process has ended since it admitted this rank.
            Err(HandshakeError::Io(error)) if error.kind() == ErrorKind::ConnectionRefused => {
                return Err(error.into());
            }
            // There may be too many strangers, or somebody in between who alters what is said.
            Err(error) if !error.is_refusal() && Instant::now() < until => thread::sleep(PAUSE),
            result => return result.map(Some),
        }
    }
}

fn dial(
    address: SocketAddr,
    hello: &Hello,
    credentials: &Credentials,
    time: Duration,
) -> Result<ParentOnly<TcpStream>, HandshakeError> {
    let stream = ParentOnly::new(TcpStream::connect_timeout(&address, time)?);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(time))?;
    stream.set_write_timeout(Some(time))?;
    // What carries nothing needs no keys.
    secure::dial(&mut Within::new(&stream, time), hello, credentials, false)?;
    Ok(stream)
}

/// Registers a pulse that this rank has opened.
pub(super) fn register(registry: &Registry, stream: &TcpStream, token: usize) -> io::Result<()> {
    registry.register(&mut SourceFd(&stream.as_raw_fd()), Token(token), Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc;

    use socket2::{Domain, Socket, Type};
    use unisum_link::handshake::{Build, Secret};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// The two ends of a connection.
    fn pair() -> (ParentOnly<TcpStream>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ParentOnly::new(listener.accept().unwrap().0), other)
    }

    #[test]
    fn a_pulse_that_ends_says_nothing_about_the_host() {
        let (mut pulses, now) = (Pulses::new(LIMIT), Instant::now());
        let ((closed, other), (reset, another)) = (pair(), pair());
        pulses.add(7, 1, closed).unwrap();
        pulses.add(8, 2, reset).unwrap();
        pulses.feel(7, now);
        assert!(pulses.has(7) && pulses.has(8));
        drop(other);
        SockRef::from(&another).set_linger(Some(Duration::ZERO)).unwrap();
        drop(another);
        let until = now + LIMIT;
        while pulses.has(7) || pulses.has(8) {
            assert!(Instant::now() < until, "nobody saw the end");
            pulses.feel(7, now);
            pulses.feel(8, now);
        }
        assert_eq!((pulses.deadline(), pulses.lost(until)), (None, Vec::new()));
        let mut ended = pulses.take_ended();
        ended.sort_unstable();
        assert_eq!((ended, pulses.take_ended()), (vec![1, 2], Vec::new()));
    }

    /// It was killed when it had admitted this rank: the members of an elastic job that are left
    /// wait for this one.
    #[test]
    fn no_pulse_is_waited_for_of_a_process_that_has_ended() {
        let listener = TcpListener::bind("127.0.0.2:0").unwrap();
        let address = listener.local_addr().unwrap();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.connect(&address.into()).unwrap();
        let control = TcpStream::from(socket);
        // It stands until the kernel says otherwise.
        let _accepted = listener.accept().unwrap();
        drop(listener);
        let hello = Hello {
            purpose: Purpose::Control,
            socket: 0,
            from: 1,
            to: 0,
            world: 2,
            session: [7; 16],
            job: [8; 16],
            build: Build::default(),
        };
        let credentials = Credentials::clear(Secret::new(b"the token of these tests"));
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let hour = Duration::from_secs(3600);
            let opened = open(&control, &hello, [7; 16], (&credentials, hour));
            sender.send(opened.map(|_| ()).unwrap_err().to_string()).unwrap();
        });
        let error = receiver.recv_timeout(Duration::from_secs(60)).expect("it gives up");
        assert!(error.contains("refused"), "{error}");
    }

    #[test]
    fn a_rank_that_comes_again_has_one_pulse() {
        let mut pulses = Pulses::new(LIMIT);
        let ((first, mut other), (second, _another)) = (pair(), pair());
        pulses.add(7, 1, first).unwrap();
        pulses.add(9, 1, second).unwrap();
        assert!(!pulses.has(7) && pulses.has(9));
        other.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0, "it was closed");
    }

    #[test]
    fn those_lost_together_are_told_together() {
        let (mut pulses, now) = (Pulses::new(LIMIT), Instant::now());
        let (still_there, _other) = pair();
        pulses.add(7, 3, still_there).unwrap();
        let [first, second] = ["10.0.0.2", "10.0.0.1"].map(|address| address.parse().unwrap());
        pulses.lost = vec![(2, first), (1, second)];
        pulses.lost_until = Some(now + GATHER);
        assert_eq!(pulses.lost(now), []);
        assert_eq!(pulses.lost(now + GATHER), [(1, second), (2, first)]);
        assert_eq!((pulses.deadline(), pulses.lost(now + GATHER)), (None, Vec::new()));
        // Where nobody else is left, nobody is waited for.
        (pulses.lost, pulses.lost_until) = (vec![(1, second)], Some(now + GATHER));
        pulses.by_token.clear();
        assert_eq!(pulses.lost(now), [(1, second)]);
    }
}
