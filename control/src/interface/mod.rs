//! The addresses this rank tells the others, by route or by the user's filter, and those of the
//! others as they are dialled from here.
//!
//! Wrong guesses here are what users of other libraries complain of most (docker0, loopback, the
//! slow network), so little is guessed: the kernel's route to the rendezvous host decides which
//! address comes first, all others that may serve follow, a filter overrides both, and the choice
//! with its reason is there to be logged.

mod filter;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod netlink;
mod paths;

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

pub use filter::{FilterError, InterfaceFilter};
use netlink::{Address, Interface};
pub use paths::{Paths, without_scope};

/// The source address chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// An address of this host that the other ranks can reach.
    pub address: IpAddr,
    /// Index of the interface if `address` is IPv6 link-local, else 0.
    pub scope_id: u32,
    /// Name of the interface that holds `address`.
    pub interface: String,
    /// Why this one, for the log.
    pub reason: String,
    /// What the user should know of it.
    pub caution: Option<String>,
}

/// Why no source address could be chosen. The text lists the interfaces there are.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The kernel did not list the interfaces.
    #[error("list the network interfaces: {0}")]
    List(#[source] io::Error),
    /// No route leads to the rendezvous host.
    #[error("no route to {towards}: {error} (interfaces: {existing})")]
    NoRoute {
        /// Where the rendezvous is.
        towards: IpAddr,
        /// What the kernel said.
        #[source]
        error: io::Error,
        /// The interfaces of this host.
        existing: String,
    },
    /// No interface is up with an address, whatever the filter.
    #[error(
        "no network interface of this host is up (interfaces: {existing}); ranks of one host need \
         the loopback interface: ip link set lo up"
    )]
    NoneUp {
        /// The interfaces of this host.
        existing: String,
    },
    /// Interfaces are up, and nothing is at their other ends.
    #[error("no network interface of this host is connected (interfaces: {existing})")]
    NoneConnected {
        /// The interfaces of this host.
        existing: String,
    },
    /// The filter leaves no interface that is up with an address that can reach the others.
    #[error("interface filter `{filter}` leaves no {needed} (interfaces: {existing})")]
    NoneAllowed {
        /// The filter as given.
        filter: String,
        /// What was looked for.
        needed: &'static str,
        /// The interfaces of this host.
        existing: String,
    },
}

impl Choice {
    /// The choice as a socket address with `port`, the scope included.
    pub fn socket_address(&self, port: u16) -> SocketAddr {
        match self.address {
            IpAddr::V4(ip) => (ip, port).into(),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, self.scope_id).into(),
        }
    }
}

/// The most addresses that a rank tells.
pub const ADDRESSES_MAX: usize = 16;

/// The addresses of this host by which other ranks may reach it, at most [`ADDRESSES_MAX`], the
/// best first. Those that follow it are on interfaces that the filter allows, last those that have
/// nothing at their other ends as yet; none follows a loopback address.
///
/// `towards` is the rendezvous host, if it is known. Without a filter the kernel's route to it
/// decides (or the default route if it is not known); with one, the best address among the
/// interfaces that are allowed and up: the routed one, else one on the network of `towards`, else
/// by the order of the list. A loopback address is chosen only if `towards` is one, or if this host
/// has nothing else and `towards` is not known.
///
/// Sends nothing and blocks only for system calls that do not wait.
///
/// # Errors
/// [`InterfaceError`], whose text lists the interfaces that exist.
pub fn source_addresses(
    filter: Option<&InterfaceFilter>,
    towards: Option<SocketAddr>,
) -> Result<Vec<Choice>, InterfaceError> {
    let interfaces = netlink::interfaces().map_err(InterfaceError::List)?;
    let best = choose(&interfaces, filter, towards, routed_source)?;
    if let Some(caution) = &best.caution {
        unisum_link::warning!("{caution}");
    }
    Ok(with_others(&interfaces, filter, best))
}

/// The best choice and those that may serve where it does not.
fn with_others(
    interfaces: &[Interface],
    filter: Option<&InterfaceFilter>,
    best: Choice,
) -> Vec<Choice> {
    let mut choices = vec![best];
    if choices[0].address.is_loopback() {
        return choices;
    }
    let serves = |(interface, _): &(&Interface, Address)| {
        !interface.loopback && filter.is_none_or(|filter| filter.allows(&interface.name))
    };
    let mut others: Vec<_> = candidates(interfaces).filter(serves).collect();
    others.sort_by_key(|(interface, address)| {
        (
            // Last what leads nowhere, or not yet: a link may be coming up just now.
            !interface.running,
            is_link_local(address.ip),
            filter.and_then(|filter| filter.position(&interface.name)),
            interface.name != choices[0].interface,
            address.ip.is_ipv6(),
            interface.index,
        )
    });
    for (interface, address) in others {
        let reason = "another address of this host".to_owned();
        // Link-local ones that are on several interfaces are told once.
        if choices.len() < ADDRESSES_MAX && choices.iter().all(|it| it.address != address.ip) {
            choices.push(on_interface(interface, address.ip, reason));
        }
    }
    choices
}

type Route = fn(SocketAddr) -> io::Result<IpAddr>;

/// The address the kernel would send from: connecting a UDP socket looks up the route, sends
/// nothing.
fn routed_source(towards: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match towards {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(towards)?;
    Ok(socket.local_addr()?.ip())
}

fn choose(
    interfaces: &[Interface],
    filter: Option<&InterfaceFilter>,
    towards: Option<SocketAddr>,
    route: Route,
) -> Result<Choice, InterfaceError> {
    if candidates(interfaces).next().is_none() {
        return Err(InterfaceError::NoneUp { existing: describe(interfaces) });
    }
    match (filter, towards) {
        (Some(filter), _) => allowed(interfaces, filter, towards, route),
        (None, Some(towards)) => routed(interfaces, towards, route),
        (None, None) => default_route(interfaces, route),
    }
}

fn routed(
    interfaces: &[Interface],
    towards: SocketAddr,
    route: Route,
) -> Result<Choice, InterfaceError> {
    let refused = |error| InterfaceError::NoRoute {
        towards: towards.ip(),
        error,
        existing: describe(interfaces),
    };
    let ip = route(towards).map_err(refused)?;
    if ip.is_loopback() && !towards.ip().is_loopback() {
        let error = io::Error::other("the route leads through the loopback interface");
        return Err(refused(error));
    }
    Ok(choice(interfaces, ip, towards, format!("route to {}", towards.ip())))
}

fn default_route(interfaces: &[Interface], route: Route) -> Result<Choice, InterfaceError> {
    for outside in OUTSIDE {
        match route(outside) {
            Ok(ip) if !ip.is_loopback() => {
                return Ok(choice(interfaces, ip, outside, "default route".to_owned()));
            }
            _ => {}
        }
    }
    let running = candidates(interfaces).filter(|(interface, _)| interface.running);
    let best = running.min_by_key(|(interface, address)| {
        (interface.loopback, is_link_local(address.ip), address.ip.is_ipv6(), interface.index)
    });
    let Some((interface, address)) = best else {
        return Err(InterfaceError::NoneConnected { existing: describe(interfaces) });
    };
    let reason = match interface.loopback {
        true => {
            "no other interface is up and connected: ranks on other hosts cannot reach this one"
        }
        false => "first interface that is connected, as there is no default route",
    };
    Ok(on_interface(interface, address.ip, reason.to_owned()))
}

fn allowed(
    interfaces: &[Interface],
    filter: &InterfaceFilter,
    towards: Option<SocketAddr>,
    route: Route,
) -> Result<Choice, InterfaceError> {
    let by_route = route(towards.unwrap_or(OUTSIDE[0])).ok();
    let usable = |&(interface, address): &(&Interface, Address)| {
        filter.allows(&interface.name) && reaches(interface, address, towards)
    };
    let best = candidates(interfaces).filter(usable).min_by_key(|(interface, address)| {
        (
            Reverse(Some(address.ip) == by_route),
            Reverse(towards.is_some_and(|towards| same_network(*address, towards.ip()))),
            !interface.running,
            // Only for the case that `towards` is not known and `lo` is among what is allowed.
            interface.loopback,
            is_link_local(address.ip) != towards.is_some_and(|towards| is_link_local(towards.ip())),
            filter.position(&interface.name),
            address.ip.is_ipv6(),
            interface.index,
        )
    });
    match best {
        Some((interface, address)) => {
            let choice =
                on_interface(interface, address.ip, format!("interface filter `{filter}`"));
            let caution = by_route.and_then(|ip| leaves_elsewhere(interfaces, address, ip));
            Ok(Choice { caution, ..choice })
        }
        None => Err(InterfaceError::NoneAllowed {
            filter: filter.to_string(),
            needed: needed(towards),
            existing: describe(interfaces),
        }),
    }
}

/// What is wrong if the kernel sends what is for the network of `chosen` by the interface that
/// holds `routed`, as it does for one of two interfaces in a network, whatever address a socket
/// has.
fn leaves_elsewhere(interfaces: &[Interface], chosen: Address, routed: IpAddr) -> Option<String> {
    if chosen.ip == routed || !same_network(chosen, routed) {
        return None;
    }
    let holds = |ip| candidates(interfaces).find(|(_, address)| address.ip == ip);
    let ((theirs, _), (ours, _)) = (holds(routed)?, holds(chosen.ip)?);
    (theirs.index != ours.index).then(|| {
        format!(
            "{0} ({1}) and {2} ({routed}) are in one network: what this host sends there leaves by \
             {2}, though {0} is chosen; give them networks of their own, or a route by source \
             (ip rule)",
            ours.name, chosen.ip, theirs.name
        )
    })
}

/// Whether a socket bound to `address` can talk to `towards` at all.
fn reaches(interface: &Interface, address: Address, towards: Option<SocketAddr>) -> bool {
    let Some(towards) = towards else {
        return true;
    };
    if interface.loopback && !towards.ip().is_loopback() {
        return false;
    }
    let scope_fits = match towards {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => v6.scope_id() == interface.index,
        _ => true,
    };
    address.ip.is_ipv4() == towards.is_ipv4() && scope_fits
}

fn needed(towards: Option<SocketAddr>) -> &'static str {
    match towards {
        None => "interface that is up with an address",
        Some(SocketAddr::V4(v4)) if v4.ip().is_loopback() => "interface with an IPv4 address",
        Some(SocketAddr::V4(_)) => "interface but loopback that is up with an IPv4 address",
        Some(SocketAddr::V6(v6)) if v6.ip().is_loopback() => "interface with an IPv6 address",
        Some(SocketAddr::V6(_)) => "interface but loopback that is up with an IPv6 address",
    }
}

fn candidates(interfaces: &[Interface]) -> impl Iterator<Item = (&Interface, Address)> {
    let up = interfaces.iter().filter(|interface| interface.up);
    up.flat_map(|interface| interface.addresses.iter().map(move |address| (interface, *address)))
}

/// The choice of `ip`, with the interface that holds it; of several, the one `towards` names.
fn choice(interfaces: &[Interface], ip: IpAddr, towards: SocketAddr, reason: String) -> Choice {
    let scope = match towards {
        SocketAddr::V6(v6) => v6.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    let holders = candidates(interfaces).filter(|(_, address)| address.ip == ip);
    match holders.min_by_key(|(interface, _)| (interface.index != scope, interface.index)) {
        Some((interface, _)) => on_interface(interface, ip, reason),
        // Any address of 127.0.0.0/8, and of a network routed as local, is ours without being
        // listed.
        None => {
            let interface = "unlisted".to_owned();
            Choice { address: ip, scope_id: scope, interface, reason, caution: None }
        }
    }
}

fn on_interface(interface: &Interface, ip: IpAddr, reason: String) -> Choice {
    let scope_id = if is_link_local(ip) && ip.is_ipv6() { interface.index } else { 0 };
    Choice { address: ip, scope_id, interface: interface.name.clone(), reason, caution: None }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn same_network(address: Address, other: IpAddr) -> bool {
    let (ours, theirs, width) = match (address.ip, other) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a).into(), u32::from(b).into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a), u128::from(b), 128),
        _ => return false,
    };
    let host_bits = width - u32::from(address.prefix).min(width);
    (ours ^ theirs).checked_shr(host_bits).unwrap_or(0) == 0
}

/// The interfaces as errors list them: `eth0 (10.0.0.2, fe80::1), docker0 (down)`.
fn describe(interfaces: &[Interface]) -> String {
    let mut text = String::new();
    for interface in interfaces {
        let mut notes: Vec<_> = interface.addresses.iter().map(|a| a.ip.to_string()).collect();
        if !interface.up {
            notes.push("down".to_owned());
        }
        let comma = if text.is_empty() { "" } else { ", " };
        write!(text, "{comma}{} ({})", interface.name, notes.join(", "))
            .expect("writing to a string cannot fail");
    }
    if text.is_empty() { "none".to_owned() } else { text }
}

/// DNS root server A: an address that is on no private network, so that only the default route
/// leads there. Nothing is sent to it.
const OUTSIDE: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 41, 0, 4)), 53),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30)), 53),
];

#[cfg(test)]
mod tests;
