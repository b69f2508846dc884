//! Other ranks' addresses as they are dialled from this host.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use super::netlink::{self, Interface};
use super::{InterfaceFilter, candidates, is_link_local};

/// What this host's interfaces say about the addresses that other ranks tell.
#[derive(Debug)]
pub struct Paths {
    own: Vec<IpAddr>,
    /// The numbers of the interfaces with IPv6 link-local addresses.
    scopes: Vec<u32>,
}

impl Paths {
    /// Of the interfaces that `filter` allows. Blocks only for system calls that do not wait.
    ///
    /// # Errors
    /// If the kernel does not list the interfaces.
    pub fn new(filter: Option<&InterfaceFilter>) -> io::Result<Self> {
        Ok(Self::of(&netlink::interfaces()?, filter))
    }

    pub(super) fn of(interfaces: &[Interface], filter: Option<&InterfaceFilter>) -> Self {
        let mut scopes = Vec::new();
        for (interface, address) in candidates(interfaces) {
            let is_allowed = filter.is_none_or(|filter| filter.allows(&interface.name));
            let has_scope = address.ip.is_ipv6() && is_link_local(address.ip);
            if is_allowed && has_scope && !scopes.contains(&interface.index) {
                scopes.push(interface.index);
            }
        }
        Self { own: candidates(interfaces).map(|(_, address)| address.ip).collect(), scopes }
    }

    /// The addresses with which to reach a process that told these. A link-local one, which comes
    /// without a scope as interfaces have other numbers on other hosts, may be behind any of this
    /// host's interfaces. One that this host has as well leads to nobody but itself, so unless the
    /// process `is_here`, in the same network namespace, it is left out, unless nothing remains.
    pub fn to(&self, told: &[SocketAddr], is_here: bool) -> Vec<SocketAddr> {
        let mut found = Vec::new();
        let leads_there = |told: &SocketAddr| {
            is_here || is_link_local(told.ip()) || !self.own.contains(&told.ip())
        };
        for &address in told.iter().filter(|told| leads_there(told)) {
            match address {
                SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 => {
                    let at = |&scope: &u32| SocketAddrV6::new(*v6.ip(), v6.port(), 0, scope);
                    found.extend(self.scopes.iter().map(at).map(SocketAddr::from));
                }
                other => found.push(other),
            }
        }
        if found.is_empty() { told.to_vec() } else { found }
    }
}

/// The address as other hosts are told it: the number of this host's interface means nothing there.
pub fn without_scope(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}
