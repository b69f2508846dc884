//! How the connections between ranks are set up.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use unisum_link::congestion;

use crate::silence;

/// What a socket inside the host may hold before its sender waits: with the megabytes that the
/// kernel allows by itself, data leaves the caches between the two copies (2 ranks, 1 MiB: 263 us
/// instead of 203; no difference with more ranks).
const LOCAL_SEND_BYTES: usize = 512 << 10;

/// How often the kernel asks in vain for a sign of life, a quarter of the time apart.
const PROBES: u32 = 8;

/// Sets a socket up; whether it leads to another host.
pub(crate) fn prepare(stream: &TcpStream, limit: Duration) -> io::Result<bool> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    // No TCP_USER_TIMEOUT: it ends a connection also if the peer only reads nothing for so long,
    // and after an outage that was shorter. `Silences` looks at what the kernel knows instead.
    let period = (limit / 4).clamp(Duration::from_secs(1), Duration::from_secs(3600));
    let keepalive =
        TcpKeepalive::new().with_time(period).with_interval(period).with_retries(PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    let is_far = is_far(stream)?;
    if is_far {
        congestion::across(&socket)?;
        silence::limit_pauses(stream.as_fd(), limit);
    } else {
        congestion::inside(&socket);
        socket.set_send_buffer_size(LOCAL_SEND_BYTES)?;
    }
    stream.set_nonblocking(true)?;
    Ok(is_far)
}

/// Whether a socket leads to another host.
pub(crate) fn is_far(stream: &TcpStream) -> io::Result<bool> {
    Ok(stream.peer_addr()?.ip() != stream.local_addr()?.ip())
}
