//! Congestion control inside a host, where nothing is ever congested.
//!
//! bbr, the default of some systems, paces: between packets a timer runs, and two opposite streams
//! get half of the throughput. A socket that once had bbr keeps the timers, whatever it is switched
//! to later. So the ends of a connection inside the host never have bbr: the dialler's socket is
//! switched before it connects, and accepted sockets inherit from the listener.

use std::io;
use std::os::fd::AsFd;

use socket2::{Domain, SockRef, Socket, Type};

/// Paces nothing, and gets out of the way.
const UNPACED: &[u8] = b"cubic";
/// How the names begin of those that pace.
const PACED: &[u8] = b"bbr";

/// Sees to it that what `listener` accepts is not paced if it turns out to come from this host.
/// Connections from other hosts get the system's default again when a link takes them over.
///
/// Does nothing where the default does not pace; then even the first packets are the default's.
pub fn prepare_listener(listener: &impl AsFd) {
    let listener = SockRef::from(listener);
    if listener.tcp_congestion().is_ok_and(|name| name.starts_with(PACED)) {
        switch(&listener, UNPACED);
    }
}

/// For a socket to a rank on this host.
pub fn inside(socket: &SockRef<'_>) {
    switch(socket, UNPACED);
}

/// For a socket to a rank on another host.
///
/// # Errors
/// If the system does not say what it uses by default.
pub fn across(socket: &SockRef<'_>) -> io::Result<()> {
    let default = Socket::new(Domain::IPV4, Type::STREAM, None)?.tcp_congestion()?;
    if socket.tcp_congestion()? != default {
        switch(socket, &default);
    }
    Ok(())
}

/// A system without that algorithm keeps what it has, which works as well.
fn switch(socket: &SockRef<'_>, name: &[u8]) {
    if let Err(error) = socket.set_tcp_congestion(name) {
        let name = String::from_utf8_lossy(name);
        tracing::debug!("this system does not allow {name} congestion control: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn algorithm(socket: &impl AsFd) -> String {
        let name = SockRef::from(socket).tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
    }

    #[test]
    fn what_is_accepted_never_paces_and_gets_the_default_if_it_comes_from_afar() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let default = algorithm(&listener);
        prepare_listener(&listener);
        let _dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(!algorithm(&accepted).starts_with("bbr"), "{default}");
        across(&SockRef::from(&accepted)).unwrap();
        assert_eq!(algorithm(&accepted), default);
        inside(&SockRef::from(&accepted));
        assert_eq!(algorithm(&accepted), "cubic");
    }
}
