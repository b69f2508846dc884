//! The process's one listening socket.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake;

use super::ControlError;
use crate::address::{self, PortRange};
use crate::interface::{self, InterfaceFilter};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// Between two attempts at a port or a name.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the rendezvous port may be in use before that is an error.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A listening socket and the address by which other ranks reach it.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) listener: ParentOnly<TcpListener>,
    pub(super) address: SocketAddr,
}

/// Listens on the rendezvous port itself: on the rendezvous address, if it is given as an address
/// of this host and data goes there too; else on all addresses, for a name may mean something
/// else on other hosts.
pub(super) fn at_rendezvous(
    host: &str,
    port: u16,
    filter: Option<&InterfaceFilter>,
    until: Instant,
) -> Result<Listening, ControlError> {
    let rendezvous = resolve(host, port, until)?;
    let without_scope = host.split('%').next().unwrap_or(host);
    let is_literal = host == "localhost" || without_scope.parse::<IpAddr>().is_ok();
    // Many systems resolve their own name to a loopback address, which nobody else can reach.
    let is_misleading = rendezvous.ip().is_loopback() && !is_literal;
    let towards = (!is_misleading).then_some(rendezvous);
    let mut address = interface::source_address(filter, towards)?.socket_address(port);
    let goes_there = filter.is_none() || address.ip() == rendezvous.ip();
    let failed = |source| ControlError::Listen { target: format!("{host}:{port}"), source };
    let listener = if is_literal && goes_there {
        match bind_patiently(rendezvous) {
            // An address that is translated on its way here.
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => bind_everywhere(port),
            bound => bound.inspect(|_| address = rendezvous),
        }
    } else {
        bind_everywhere(port)
    };
    let listener = listener.map_err(failed)?;
    address.set_port(local_port(&listener)?);
    Ok(Listening { listener, address })
}

/// Listens on a free port, of the range if there is one, on the address by which the rendezvous
/// (if known) and so the other ranks reach this host.
pub(super) fn at_free_port(
    filter: Option<&InterfaceFilter>,
    towards: Option<SocketAddr>,
    ports: Option<PortRange>,
) -> Result<Listening, ControlError> {
    let choice = interface::source_address(filter, towards)?;
    tracing::info!(
        address = %choice.address, interface = %choice.interface, reason = %choice.reason,
        "other ranks reach this rank here"
    );
    let address = choice.socket_address(0);
    let bound = match ports {
        None => bind(address),
        Some(range) => bind_in(address, range),
    };
    let listener = bound.map_err(|source| {
        let target = match ports {
            None => address.ip().to_string(),
            Some(range) => format!("{}, ports {range}", address.ip()),
        };
        ControlError::Listen { target, source }
    })?;
    let port = local_port(&listener)?;
    Ok(Listening { listener, address: choice.socket_address(port) })
}

/// In clusters a name may appear some time after the process.
fn resolve(host: &str, port: u16, until: Instant) -> Result<SocketAddr, ControlError> {
    loop {
        match address::resolve(host, port) {
            Ok(found) => return Ok(found[0]),
            Err(error) if Instant::now() + PAUSE >= until => {
                return Err(ControlError::Resolve(error));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Waits a moment for a port that is in use: the job may have been restarted.
fn bind_patiently(address: SocketAddr) -> io::Result<ParentOnly<TcpListener>> {
    let until = Instant::now() + BUSY_TIMEOUT;
    loop {
        match bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// Listens on all addresses of both families, or of IPv4 if the kernel has no other.
fn bind_everywhere(port: u16) -> io::Result<ParentOnly<TcpListener>> {
    bind_patiently((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error| match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::PermissionDenied => Err(error),
        _ => bind_patiently((Ipv4Addr::UNSPECIFIED, port).into()),
    })
}

/// Takes the first free port after a random one: ranks that start together try different ones.
fn bind_in(mut address: SocketAddr, range: PortRange) -> io::Result<ParentOnly<TcpListener>> {
    let ports: Vec<u16> = range.ports().collect();
    let start = usize::from(u16::from_le_bytes(handshake::random()?)) % ports.len();
    let mut error = None;
    for port in ports[start..].iter().chain(&ports[..start]) {
        address.set_port(*port);
        match bind(address) {
            Ok(listener) => return Ok(listener),
            Err(failed) => error = Some(failed),
        }
    }
    Err(error.unwrap_or_else(|| io::Error::other("the range is empty")))
}

fn bind(address: SocketAddr) -> io::Result<ParentOnly<TcpListener>> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restarted job need not wait for the old one's connections to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    #[cfg(feature = "tcp")]
    unisum_tcp::prepare_listener(&socket);
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(ParentOnly::new(socket.into()))
}

fn local_port(listener: &TcpListener) -> Result<u16, ControlError> {
    let address = listener.local_addr();
    Ok(address.map_err(|error| ControlError::system("asking for the bound port", error))?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_port_range_is_an_error_that_names_it() {
        let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = first.local_addr().unwrap().port();
        let range: PortRange = format!("{port}-{port}").parse().unwrap();
        let towards = Some("127.0.0.1:1".parse().unwrap());
        let error = at_free_port(None, towards, Some(range)).unwrap_err();
        assert!(error.to_string().contains(&port.to_string()), "{error}");
    }

    #[test]
    fn everywhere_includes_ipv4() {
        let listener = bind_everywhere(0).unwrap();
        assert!(listener.local_addr().unwrap().ip().is_unspecified());
        let port = listener.local_addr().unwrap().port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    #[test]
    fn a_literal_address_is_listened_on_and_nothing_else() {
        let soon = Instant::now() + BUSY_TIMEOUT;
        for host in ["127.0.0.1", "127.0.0.2"] {
            let listening = at_rendezvous(host, 0, None, soon).unwrap();
            let bound = listening.listener.local_addr().unwrap();
            assert_eq!(bound, listening.address);
            assert_eq!(bound.ip().to_string(), host);
        }
    }
}
