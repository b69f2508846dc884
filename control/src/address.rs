//! Where ranks meet: rendezvous addresses, and the ports a rank may listen on.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

/// The one place all ranks of a job know before they know each other.
///
/// Written `tcp://HOST:PORT`, `tcp://[IPV6%SCOPE]:PORT`, `file:///ABSOLUTE/PATH` or, where the
/// program hands in a store, `store://KEY`; `Display` gives back a text that parses to the same
/// value, but for addresses that were looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Rendezvous {
    /// Rank 0 listens on `port` of `host`; everybody else connects.
    Tcp {
        /// Host name or address literal, without brackets; IPv6 may carry `%scope`.
        host: String,
        /// Port, never 0: the others could not know which one the kernel picked.
        port: u16,
    },
    /// The ranks find each other through this path on a file system they all see.
    File(PathBuf),
    /// The ranks find each other by the program's key-value store.
    Store {
        /// Under which key, never empty.
        key: String,
        /// Where rank 0 listens, once that was looked up.
        addresses: Vec<SocketAddr>,
    },
}

/// A text that is no rendezvous address, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a rendezvous address: {problem} (expected tcp://HOST:PORT, tcp://[IPV6]:PORT \
     or file:///ABSOLUTE/PATH)"
)]
pub struct AddressError {
    text: String,
    problem: &'static str,
}

/// What is expected of a port range, and what is wrong with a text that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("LOW-HIGH or PORT, 1 to 65535: {problem}")]
pub struct PortRangeError {
    problem: &'static str,
}

/// The ports a rank may listen on, both ends included: `20000-20999`, or one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    low: u16,
    high: u16,
}

impl AddressError {
    /// What is wrong with the text.
    pub const fn problem(&self) -> &'static str {
        self.problem
    }
}

impl Rendezvous {
    /// A TCP rendezvous, with the same checks as the text form.
    ///
    /// # Errors
    /// [`AddressError`] if `host` is neither a host name nor an address literal, or `port` is 0.
    pub fn tcp(host: &str, port: u16) -> Result<Self, AddressError> {
        let shown = |problem| AddressError { text: format!("{host}:{port}"), problem };
        let host = checked_host(host).map_err(shown)?;
        if port == 0 {
            return Err(shown("port 0 cannot be known to other ranks"));
        }
        Ok(Self::Tcp { host, port })
    }
}

/// Resolves `host` through the system's resolver to all its addresses, in the resolver's order.
///
/// Blocks for as long as the resolver does. In clusters a name may appear only after its pod has
/// started: the caller retries until its own deadline.
///
/// # Errors
/// The resolver's error, with `host:port` in its text; also when it answers with no address.
pub fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let failed = |kind, why: &dyn fmt::Display| {
        io::Error::new(kind, format!("resolve {host}:{port}: {why}"))
    };
    let found = (host, port).to_socket_addrs().map_err(|error| failed(error.kind(), &error))?;
    let mut addresses = Vec::new();
    for address in found {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(failed(io::ErrorKind::NotFound, &"the name has no address"));
    }
    Ok(addresses)
}

impl FromStr for Rendezvous {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parsed = if let Some(rest) = text.strip_prefix("tcp://") {
            parse_tcp(rest)
        } else if let Some(path) = text.strip_prefix("file://") {
            parse_file(path)
        } else if let Some(key) = text.strip_prefix("store://") {
            parse_key(key)
        } else {
            Err("it starts with neither tcp:// nor file://")
        };
        parsed.map_err(|problem| AddressError { text: text.to_owned(), problem })
    }
}

impl fmt::Display for Rendezvous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Store { key, .. } => write!(f, "store://{key}"),
        }
    }
}

impl PortRange {
    /// All ports of the range, lowest first.
    pub fn ports(self) -> RangeInclusive<u16> {
        self.low..=self.high
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let failed = |problem| PortRangeError { problem };
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let low = parse_port(low.trim()).map_err(failed)?;
        let high = parse_port(high.trim()).map_err(failed)?;
        if low > high {
            return Err(failed("the low end is above the high end"));
        }
        Ok(Self { low, high })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            return write!(f, "{}", self.low);
        }
        write!(f, "{}-{}", self.low, self.high)
    }
}

fn parse_tcp(rest: &str) -> Result<Rendezvous, &'static str> {
    let (host, port) = match rest.strip_prefix('[') {
        Some(inside) => {
            let (host, after) = inside.split_once(']').ok_or("the closing `]` is missing")?;
            if !host.contains(':') {
                return Err("brackets are for IPv6 literals only");
            }
            (host, after.strip_prefix(':').ok_or("`:PORT` is missing after `]`")?)
        }
        None => {
            let (host, port) = rest.rsplit_once(':').ok_or("the port is missing")?;
            if host.contains(':') {
                return Err("an IPv6 literal must stand in brackets");
            }
            (host, port)
        }
    };
    Ok(Rendezvous::Tcp { host: checked_host(host)?, port: parse_port(port)? })
}

fn parse_file(path: &str) -> Result<Rendezvous, &'static str> {
    if !path.starts_with('/') {
        return Err("the path is not absolute (three slashes after `file:`)");
    }
    let last = path.rsplit('/').next().unwrap_or_default();
    if ["", ".", ".."].contains(&last) {
        return Err("the path ends in `/`, `.` or `..`: it must name a file, not a directory");
    }
    if path.contains('\0') {
        return Err("the path contains a NUL byte");
    }
    Ok(Rendezvous::File(PathBuf::from(path)))
}

fn parse_key(key: &str) -> Result<Rendezvous, &'static str> {
    if key.is_empty() || key.contains('\0') {
        return Err("the key of the store is missing, or contains a NUL byte");
    }
    Ok(Rendezvous::Store { key: key.to_owned(), addresses: Vec::new() })
}

fn parse_port(text: &str) -> Result<u16, &'static str> {
    // `u16::from_str` takes a leading `+`; a port has digits only.
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the port is not a number");
    }
    match text.parse() {
        Ok(0) => Err("port 0 cannot be known to other ranks"),
        Ok(port) => Ok(port),
        Err(_) => Err("the port is above 65535"),
    }
}

/// The host, an IPv4 address as such if it is written as one of IPv6 (RFC 4291, 2.5.5.2).
fn checked_host(host: &str) -> Result<String, &'static str> {
    check_host(host)?;
    match host.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(ip) if ip.is_unspecified() => {
            Err("this address stands for all of a host, and leads to none from another one")
        }
        Ok(IpAddr::V4(ip)) => Ok(ip.to_string()),
        _ => Ok(host.to_owned()),
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if host.is_empty() {
        return Err("the host is missing");
    }
    if host.contains("://") {
        return Err("the host has `://`, which no host name or address has");
    }
    if !host.contains(':') {
        let plain = host.len() <= MAX_HOST_BYTES && host.bytes().all(name_byte);
        return if plain { Ok(()) } else { Err("the host has a character no host name has") };
    }
    let (literal, scope) = match host.split_once('%') {
        Some((literal, scope)) => (literal, Some(scope)),
        None => (host, None),
    };
    if literal.parse::<Ipv6Addr>().is_err() {
        return Err(
            "the host is not an IPv6 literal, and nothing else has a `:` (not even a port)",
        );
    }
    match scope {
        Some(scope) if scope.is_empty() || !scope.bytes().all(name_byte) => {
            Err("the scope after `%` is not an interface name or number")
        }
        _ => Ok(()),
    }
}

/// The longest name the DNS allows (RFC 1035, section 2.3.4).
const MAX_HOST_BYTES: usize = 253;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn good_addresses_parse_and_print_back() {
        for text in [
            "tcp://node01:29500",
            "tcp://10.0.0.1:1",
            "tcp://[::1]:65535",
            "tcp://[fe80::1%eth0]:4000",
            "tcp://my_pod-0.svc.cluster.local:80",
            "file:///shared/run 7/unisum",
            "file:///shared/../.unisum",
            "file:///...",
            "store://run 7/unisum",
        ] {
            assert_eq!(text.parse::<Rendezvous>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_addresses_say_what_is_wrong() {
        for (text, problem) in [
            ("", "neither tcp:// nor file://"),
            ("node:1", "neither tcp:// nor file://"),
            ("tcp://node", "port is missing"),
            ("tcp://:1", "host is missing"),
            ("tcp://::1:80", "must stand in brackets"),
            ("tcp://[::1]", "`:PORT` is missing"),
            ("tcp://[::1:80", "closing `]`"),
            ("tcp://[node]:80", "IPv6 literals only"),
            ("tcp://[1::2::3]:80", "not an IPv6 literal"),
            ("tcp://[fe80::1%]:80", "scope after `%`"),
            ("tcp://tcp://node:80", "must stand in brackets"),
            ("tcp://0.0.0.0:80", "stands for all"),
            ("tcp://[::]:80", "stands for all"),
            ("tcp://[::ffff:0.0.0.0]:80", "stands for all"),
            ("tcp://node:0", "port 0"),
            ("tcp://node:+80", "not a number"),
            ("tcp://node:65536", "above 65535"),
            ("tcp://a b:1", "no host name has"),
            ("store://", "key of the store is missing"),
            ("file://shared/x", "not absolute"),
            ("file:///", "must name a file"),
            ("file:///.", "must name a file"),
            ("file:///..", "must name a file"),
            ("file:///shared/", "must name a file"),
            ("file:///shared/.", "must name a file"),
            ("file:///shared/run/..", "must name a file"),
        ] {
            let error = text.parse::<Rendezvous>().unwrap_err().to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_of_ipv4_may_be_written_as_ones_of_ipv6() {
        let mapped: Rendezvous = "tcp://[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(mapped.to_string(), "tcp://10.0.0.1:80");
        assert_eq!(Rendezvous::tcp("::ffff:10.0.0.1", 80), Ok(mapped));
    }

    #[test]
    fn port_ranges_parse_and_print_back() {
        for (text, low, high) in [("7", 7, 7), ("20000-20999", 20000, 20999), ("1-65535", 1, 65535)]
        {
            let range: PortRange = text.parse().unwrap();
            assert_eq!((range.ports(), range.to_string()), (low..=high, text.to_owned()));
        }
        for text in ["", "-", "0", "5-4", "1-65536", "a-b", "1-2-3", "-5"] {
            let error = text.parse::<PortRange>().unwrap_err().to_string();
            assert!(error.starts_with("LOW-HIGH or PORT, 1 to 65535: "), "{text}: {error}");
        }
    }

    #[test]
    fn literals_resolve_without_a_name_server() {
        assert_eq!(resolve("127.0.0.1", 9).unwrap(), ["127.0.0.1:9".parse().unwrap()]);
        assert_eq!(resolve("::1", 9).unwrap(), ["[::1]:9".parse().unwrap()]);
    }

    proptest! {
        #[test]
        fn tcp_addresses_round_trip(
            host in prop_oneof![
                "[a-z0-9][a-z0-9._-]{0,30}",
                any::<Ipv6Addr>()
                    .prop_filter("an address of a host", |ip| !ip.to_canonical().is_unspecified())
                    .prop_map(|ip| ip.to_string()),
                any::<u16>().prop_map(|low| format!("fe80::{low:x}%eth{}", low % 10)),
            ],
            port in 1u16..,
        ) {
            let address = Rendezvous::tcp(&host, port).unwrap();
            prop_assert_eq!(address.to_string().parse::<Rendezvous>(), Ok(address));
        }

        #[test]
        fn file_addresses_round_trip(path in "(/[^/\0]{1,12}){0,3}/[^/\0.]{1,12}") {
            let address = Rendezvous::File(PathBuf::from(path));
            prop_assert_eq!(address.to_string().parse::<Rendezvous>(), Ok(address));
        }
    }
}
