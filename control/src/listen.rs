//! Where the process listens: one port.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{self, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{self, SocketFlags};
use socket2::{Domain, Socket, Type};
use unisum_link::fork::ParentOnly;
use unisum_link::{handshake, listener};

use super::ControlError;
use crate::address::{self, PortRange};
use crate::interface::{self, Choice, InterfaceError, InterfaceFilter, Paths};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// Between two attempts at a port or a name.
const PAUSE: Duration = Duration::from_millis(100);
/// How many ports are tried before one address must do.
const ATTEMPTS: usize = 20;
/// How long the rendezvous port may be in use before that is an error.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Where this process listens, and what the other ranks are told of it.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) listeners: Listeners,
    /// By which addresses other ranks reach it, the best first.
    pub(super) addresses: Vec<SocketAddr>,
    /// What may keep the others from finding rank 0.
    pub(super) doubt: Option<String>,
}

const OTHER_PORT: &str = ": give all ranks a port that is free, in UNISUM_RENDEZVOUS or \
    MASTER_PORT, or set UNISUM_PORT";
const OTHER_RANGE: &str = ": UNISUM_PORT_RANGE needs a free port for each rank of the host";

/// What to set if a port can't be used.
fn hint(error: &io::Error, other: &'static str) -> &'static str {
    match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::PermissionDenied => other,
        _ => "",
    }
}

/// The listening sockets: one port on one address or several, or on all.
#[derive(Debug)]
pub(super) struct Listeners {
    all: Vec<ParentOnly<TcpListener>>,
    /// Which is asked first.
    next: Cell<usize>,
}

impl Listeners {
    const fn new(all: Vec<ParentOnly<TcpListener>>) -> Self {
        Self { all, next: Cell::new(0) }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &TcpListener> {
        self.all.iter().map(|listener| &**listener)
    }

    /// Accepts a connection of any of them, in turns. It does not block.
    ///
    /// # Errors
    /// `WouldBlock` if nobody waits at any of them, else what went wrong at one.
    pub(super) fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        for _ in &self.all {
            let at = self.next.get();
            self.next.set((at + 1) % self.all.len());
            match accept(&self.all[at]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
        Err(ErrorKind::WouldBlock.into())
    }

    /// Whether a connection waits to be accepted, as far as the kernel says: perhaps, if it does
    /// not.
    pub(super) fn has_visitor(&self) -> bool {
        let poll = |listener| PollFd::new(listener, PollFlags::IN);
        let mut listeners: Vec<PollFd<'_>> = self.iter().map(poll).collect();
        event::poll(&mut listeners, Some(&Timespec::default())).map_or(true, |ready| ready > 0)
    }
}

/// Accepts a connection that does not block, by one system call.
fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (stream, address) = net::acceptfrom_with(listener, flags)?;
    let address = address.ok_or(Errno::CONNABORTED)?;
    Ok((stream.into(), address.try_into()?))
}

/// Listens on the rendezvous port itself: on all addresses of the rendezvous, if it is given as an
/// address of this host and data goes there too; else on all addresses, for a name may mean
/// something else on other hosts.
pub(super) fn at_rendezvous(
    host: &str,
    port: u16,
    filter: Option<&InterfaceFilter>,
    until: Instant,
) -> Result<Listening, ControlError> {
    let rendezvous = resolve(host, port, until)?;
    // A link-local address may be at any of this host's interfaces.
    let paths = Paths::new(None).map_err(InterfaceError::List)?;
    let rendezvous = paths.to(&rendezvous, true);
    let is_literal = is_literal(host);
    // Many systems resolve their own name to a loopback address, which nobody else can reach.
    let misleads = |address: &&SocketAddr| address.ip().is_loopback() && !is_literal;
    let choices = towards_one_of(filter, rendezvous.iter().filter(|it| !misleads(it)))?;
    let goes_there = filter.is_none()
        || choices.iter().any(|it| rendezvous.iter().any(|address| address.ip() == it.address));
    let failed = |source| {
        let hint = hint(&source, OTHER_PORT);
        ControlError::Listen { target: format!("{host}:{port}"), source, hint }
    };
    if is_literal && goes_there {
        let listeners = bind_each_patiently(&rendezvous).map_err(failed)?;
        // None is of this host if the address is translated on its way here.
        if !listeners.all.is_empty() {
            let addresses = listeners.iter().map(TcpListener::local_addr);
            let addresses = addresses.collect::<io::Result<_>>().map_err(failed)?;
            return Ok(Listening { listeners, addresses, doubt: None });
        }
    }
    let listener = bind_everywhere(port).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let addresses: Vec<_> = choices.iter().map(|choice| choice.socket_address(port)).collect();
    let doubt = is_elsewhere(&rendezvous).then(|| doubt(host, port, &addresses));
    if let Some(doubt) = &doubt {
        tracing::info!("{doubt}");
    }
    Ok(Listening { listeners: Listeners::new(vec![listener]), addresses, doubt })
}

/// Whether none of the addresses is one of this host: what is sent there may yet be led here.
fn is_elsewhere(addresses: &[SocketAddr]) -> bool {
    let is_missing_here = |address: &SocketAddr| {
        let mut address = *address;
        address.set_port(0);
        bind(address).is_err_and(|error| is_missing(&error))
    };
    addresses.iter().all(is_missing_here)
}

fn doubt(host: &str, port: u16, addresses: &[SocketAddr]) -> String {
    let own: Vec<_> = addresses.iter().map(|address| address.ip().to_string()).collect();
    format!(
        "{host} is none of the addresses of rank 0's host, which listens at port {port} of {}: \
         expected the host of rank 0 in UNISUM_RENDEZVOUS or MASTER_ADDR",
        own.join(", ")
    )
}

/// Whether a rendezvous host is an address and means the same everywhere, or at least the host
/// itself everywhere.
pub(super) fn is_literal(host: &str) -> bool {
    let without_scope = host.split('%').next().unwrap_or(host);
    host == "localhost" || without_scope.parse::<IpAddr>().is_ok()
}

/// This host's addresses, first the one by which it reaches the first of `rendezvous` that it can
/// reach.
fn towards_one_of<'a>(
    filter: Option<&InterfaceFilter>,
    rendezvous: impl Iterator<Item = &'a SocketAddr>,
) -> Result<Vec<Choice>, ControlError> {
    let mut first_error = None;
    for &towards in rendezvous {
        match interface::source_addresses(filter, Some(towards)) {
            Ok(choices) => return Ok(choices),
            Err(error) => drop(first_error.get_or_insert(error)),
        }
    }
    match first_error {
        Some(error) => Err(error.into()),
        None => Ok(interface::source_addresses(filter, None)?),
    }
}

/// Listens on a free port, of the range if there is one, on all addresses by which other ranks may
/// reach this host, the best of which is that by which it reaches the rendezvous, if that is
/// known.
pub(super) fn at_free_port(
    filter: Option<&InterfaceFilter>,
    towards: Option<SocketAddr>,
    ports: Option<PortRange>,
) -> Result<Listening, ControlError> {
    let choices = interface::source_addresses(filter, towards)?;
    let bound = match ports {
        None => bind_choices_at_any_port(&choices),
        Some(range) => bind_choices_in(&choices, range),
    };
    let listening = bound.map_err(|source| {
        let ip = choices[0].address;
        let (target, other) = match ports {
            None => (ip.to_string(), ""),
            Some(range) => (format!("{ip}, ports {range}"), OTHER_RANGE),
        };
        let hint = hint(&source, other);
        ControlError::Listen { target, source, hint }
    })?;
    tracing::info!(
        addresses = ?listening.addresses, interface = %choices[0].interface,
        reason = %choices[0].reason, "other ranks reach this rank here"
    );
    Ok(listening)
}

/// The same, where `towards` is only a preference: there may be no way to it any more.
pub(super) fn preferably(
    filter: Option<&InterfaceFilter>,
    towards: Option<SocketAddr>,
    ports: Option<PortRange>,
) -> Result<Listening, ControlError> {
    match at_free_port(filter, towards, ports) {
        Err(ControlError::Interface(
            error @ (InterfaceError::NoRoute { .. } | InterfaceError::NoneAllowed { .. }),
        )) if towards.is_some() => {
            tracing::info!("listening by the default route instead: {error}");
            at_free_port(filter, None, ports)
        }
        done => done,
    }
}

/// In clusters a name may appear some time after the process.
fn resolve(host: &str, port: u16, until: Instant) -> Result<Vec<SocketAddr>, ControlError> {
    loop {
        match address::resolve(host, port) {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() + PAUSE >= until => {
                return Err(ControlError::Resolve(error));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Listens on those of the addresses that are this host's, at one port. Waits a moment for a port
/// that is in use: the job may have been restarted.
fn bind_each_patiently(addresses: &[SocketAddr]) -> io::Result<Listeners> {
    patiently(|| bind_each(addresses))
}

fn bind_each(addresses: &[SocketAddr]) -> io::Result<Listeners> {
    let mut all: Vec<ParentOnly<TcpListener>> = Vec::new();
    for &(mut address) in addresses {
        if let (0, Some(first)) = (address.port(), all.first()) {
            address.set_port(first.local_addr()?.port());
        }
        match bind(address) {
            Ok(listener) => all.push(listener),
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Listeners::new(all))
}

/// Whether this host lacks the address, or the whole family of addresses.
fn is_missing(error: &io::Error) -> bool {
    let lacks_family = error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error());
    error.kind() == ErrorKind::AddrNotAvailable || lacks_family
}

fn patiently<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + BUSY_TIMEOUT;
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// Listens on all addresses of both families, or of IPv4 if the kernel has no other.
fn bind_everywhere(port: u16) -> io::Result<ParentOnly<TcpListener>> {
    let at = |ip: IpAddr| patiently(|| bind((ip, port).into()));
    at(Ipv6Addr::UNSPECIFIED.into()).or_else(|error| match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::PermissionDenied => Err(error),
        _ => at(Ipv4Addr::UNSPECIFIED.into()),
    })
}

/// Takes the first port after a random one that is free on all addresses: ranks that start together
/// try different ones.
fn bind_choices_in(choices: &[Choice], range: PortRange) -> io::Result<Listening> {
    let ports: Vec<u16> = range.ports().collect();
    let start = usize::from(u16::from_le_bytes(handshake::random()?)) % ports.len();
    let mut error = None;
    for &port in ports[start..].iter().chain(&ports[..start]) {
        match bind_choices(choices, port) {
            Ok(listening) => return Ok(listening),
            Err(failed) => error = Some(failed),
        }
    }
    Err(error.unwrap_or_else(|| io::Error::other("the range is empty")))
}

/// A port that is free on one address may be in use on another.
fn bind_choices_at_any_port(choices: &[Choice]) -> io::Result<Listening> {
    for _ in 1..ATTEMPTS {
        match bind_choices(choices, 0) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
    bind_choices(&choices[..1], 0)
}

/// Listens at a port, 0 for any, of the addresses. Those at which that is not possible are left
/// out, unless the port is in use there.
fn bind_choices(choices: &[Choice], mut port: u16) -> io::Result<Listening> {
    let (mut all, mut addresses, mut failed) = (Vec::new(), Vec::new(), None);
    for choice in choices {
        let address = choice.socket_address(port);
        match bind(address) {
            Ok(listener) => {
                port = listener.local_addr()?.port();
                addresses.push(choice.socket_address(port));
                all.push(listener);
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(error),
            Err(error) => {
                tracing::debug!(%address, %error, "this rank does not listen here");
                failed.get_or_insert(error);
            }
        }
    }
    match failed {
        Some(error) if all.is_empty() => Err(error),
        _ => Ok(Listening { listeners: Listeners::new(all), addresses, doubt: None }),
    }
}

fn bind(address: SocketAddr) -> io::Result<ParentOnly<TcpListener>> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restarted job need not wait for the old one's connections to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Accepted connections inherit it: the answers are small and awaited.
    socket.set_tcp_nodelay(true)?;
    if let Err(error) = listener::defer_silent(&socket) {
        tracing::debug!(%error, "this system shows listeners also those who say nothing");
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(ParentOnly::new(socket.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_full_port_range_is_an_error_that_names_it() {
        let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = first.local_addr().unwrap().port();
        let range: PortRange = format!("{port}-{port}").parse().unwrap();
        let towards = Some("127.0.0.1:1".parse().unwrap());
        let error = at_free_port(None, towards, Some(range)).unwrap_err();
        assert!(error.to_string().contains(&port.to_string()), "{error}");
        assert!(error.to_string().ends_with(OTHER_RANGE), "{error}");
    }

    #[test]
    fn a_rendezvous_port_that_is_taken_is_an_error_that_says_what_to_set() {
        let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = first.local_addr().unwrap().port();
        let error = at_rendezvous("127.0.0.1", port, None, soon()).unwrap_err().to_string();
        assert!(error.contains(&format!("127.0.0.1:{port}")), "{error}");
        assert!(error.ends_with(OTHER_PORT), "{error}");
    }

    /// As where a load balancer leads to it, or by mistake.
    #[test]
    fn a_rendezvous_at_another_host_is_listened_for_everywhere_and_doubted() {
        let listening = at_rendezvous("192.0.2.77", 0, None, soon());
        // Without a route there, it is an error.
        let Ok(listening) = listening else { return };
        let doubt = listening.doubt.unwrap();
        assert!(doubt.starts_with("192.0.2.77 is none of the addresses of rank 0's"), "{doubt}");
        assert!(doubt.contains(&listening.addresses[0].ip().to_string()), "{doubt}");
        assert_eq!(at_rendezvous("127.0.0.1", 0, None, soon()).unwrap().doubt, None);
        assert_eq!(at_rendezvous("localhost", 0, None, soon()).unwrap().doubt, None);
    }

    #[test]
    fn a_link_local_rendezvous_needs_no_scope_on_its_own_host() {
        let all = interface::source_addresses(None, None).unwrap();
        let is_link_local = |it: &&Choice| match it.address {
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
            IpAddr::V4(_) => false,
        };
        let Some(choice) = all.iter().find(is_link_local) else { return };
        let listening = at_rendezvous(&choice.address.to_string(), 0, None, soon()).unwrap();
        assert!(listening.addresses.iter().all(|it| it.ip() == choice.address), "{listening:?}");
    }

    #[test]
    fn everywhere_includes_ipv4() {
        let listener = bind_everywhere(0).unwrap();
        assert!(listener.local_addr().unwrap().ip().is_unspecified());
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    fn soon() -> Instant {
        Instant::now() + BUSY_TIMEOUT
    }

    fn bound(listening: &Listening) -> Vec<SocketAddr> {
        listening.listeners.iter().map(|it| it.local_addr().unwrap()).collect()
    }

    #[test]
    fn a_literal_address_is_listened_on_and_nothing_else() {
        for host in ["127.0.0.1", "127.0.0.2"] {
            let listening = at_rendezvous(host, 0, None, soon()).unwrap();
            assert_eq!(bound(&listening), listening.addresses);
            assert_eq!(listening.addresses.len(), 1);
            assert_eq!(listening.addresses[0].ip().to_string(), host);
        }
    }

    /// What other ranks may try first, nobody else may take.
    #[test]
    fn all_addresses_of_a_name_are_listened_on_or_the_start_fails() {
        let free = bind("127.0.0.1:0".parse().unwrap()).unwrap().local_addr().unwrap().port();
        let named = address::resolve("localhost", free).unwrap();
        let listening = at_rendezvous("localhost", free, None, soon()).unwrap();
        for address in named.iter().filter(|it| !is_missing_here(**it)) {
            assert!(bound(&listening).contains(address) && listening.addresses.contains(address));
            assert_eq!(bind(*address).unwrap_err().kind(), ErrorKind::AddrInUse);
        }
        drop(listening);
        for address in named.iter().filter(|it| !is_missing_here(**it)) {
            let _somebody = bind(*address).unwrap();
            let error = bind_each(&named).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AddrInUse);
        }
    }

    fn is_missing_here(mut address: SocketAddr) -> bool {
        address.set_port(0);
        bind(address).is_err_and(|error| is_missing(&error))
    }

    #[test]
    fn whoever_connects_to_any_address_is_let_in() {
        let listeners = [(); 3].map(|()| bind("127.0.0.1:0".parse().unwrap()).unwrap());
        let listeners = Listeners::new(listeners.into());
        assert_eq!(listeners.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        // Who says nothing is not shown at once.
        let preamble = |listener: &TcpListener| {
            let mut stream = TcpStream::connect(listener.local_addr().unwrap())?;
            stream.write_all(b"x").map(|()| stream)
        };
        for listener in listeners.iter() {
            let _pending = preamble(listener).unwrap();
            listeners.accept().unwrap();
        }
        // A crowd at the first does not keep the last waiting.
        let crowd: Vec<_> = (0..9).map(|_| preamble(&listeners.all[0]).unwrap()).collect();
        let last = preamble(&listeners.all[2]).unwrap();
        let accepted: Vec<_> = (0..3).map(|_| listeners.accept().unwrap().1).collect();
        assert!(accepted.contains(&last.local_addr().unwrap()), "{crowd:?}");
    }

    #[test]
    fn a_port_that_is_taken_at_one_address_is_used_at_none() {
        let choice = |ip: &str| Choice {
            address: ip.parse().unwrap(),
            scope_id: 0,
            interface: "lo".into(),
            reason: String::new(),
            caution: None,
        };
        let choices = [choice("127.0.0.1"), choice("127.0.0.2")];
        let taken = bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_eq!(bind_choices(&choices, port).unwrap_err().kind(), ErrorKind::AddrInUse);
        let listening = bind_choices_at_any_port(&choices).unwrap();
        assert_eq!(bound(&listening), listening.addresses);
        assert_eq!(listening.addresses[0].port(), listening.addresses[1].port());
        // An address that this host lacks is left out.
        let choices = [choice("192.0.2.1"), choice("127.0.0.3")];
        let listening = bind_choices_at_any_port(&choices).unwrap();
        assert_eq!(listening.addresses[0].ip().to_string(), "127.0.0.3");
    }
}
