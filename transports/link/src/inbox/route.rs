//! The way to a rank: the addresses that it told, and which of them has been found to work.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where a rank listens. Shared by all links of a job to that rank: what one has found out serves
/// the others.
#[derive(Debug)]
pub struct Route {
    /// In the order in which they are to be tried.
    addresses: Vec<SocketAddr>,
    /// The place of the one that worked last; the first until one did.
    worked: AtomicUsize,
}

impl Route {
    /// The way to a rank that listens at each of these addresses.
    pub const fn new(addresses: Vec<SocketAddr>) -> Self {
        Self { addresses, worked: AtomicUsize::new(0) }
    }

    /// Remembers that the rank was met at this address, if it is one of its.
    pub fn worked_at(&self, address: SocketAddr) {
        if let Some(place) = self.addresses.iter().position(|known| *known == address) {
            // Relaxed: the place says nothing of other memory.
            self.worked.store(place, Ordering::Relaxed);
        }
    }

    /// All addresses, the one that worked first.
    pub fn in_order(&self) -> Vec<SocketAddr> {
        let mut addresses = self.addresses.clone();
        // Relaxed: as above.
        let worked = self.worked.load(Ordering::Relaxed);
        if let Some(front) = addresses.get_mut(..=worked) {
            front.rotate_right(1);
        }
        addresses
    }

    /// Whether the rank listens at this address.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|address| address.ip() == ip)
    }
}

impl From<SocketAddr> for Route {
    fn from(address: SocketAddr) -> Self {
        Self::new(vec![address])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_worked_is_tried_first_and_nothing_is_left_out() {
        let ports = [1, 2, 3, 4];
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let route = Route::new(ports.map(address).to_vec());
        assert_eq!(route.in_order(), ports.map(address));
        route.worked_at(address(3));
        assert_eq!(route.in_order(), [3, 1, 2, 4].map(address));
        route.worked_at(address(9));
        assert_eq!(route.in_order(), [3, 1, 2, 4].map(address));
        route.worked_at(address(4));
        assert_eq!(route.in_order(), [4, 1, 2, 3].map(address));
        assert!(Route::new(Vec::new()).in_order().is_empty());
    }
}
