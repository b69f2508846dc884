//! What must hold of addresses and ranges of ports.

use unisum_link::fuzzing::Target;

use super::{PortRange, Rendezvous};

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "rendezvous", check: check_rendezvous, seeds: rendezvous_seeds },
    Target { name: "port_range", check: check_port_range, seeds: port_range_seeds },
];

/// An address that is accepted prints as one that means the same, and has a port that others can
/// know.
fn check_rendezvous(bytes: &[u8]) {
    let Ok(address) = String::from_utf8_lossy(bytes).parse::<Rendezvous>() else { return };
    assert_eq!(address.to_string().parse().as_ref(), Ok(&address));
    match address {
        Rendezvous::Tcp { host, port } => assert!(port > 0 && !host.is_empty()),
        Rendezvous::File(path) => assert!(path.is_absolute() && path.file_name().is_some()),
        Rendezvous::Store { key, addresses } => assert!(!key.is_empty() && addresses.is_empty()),
    }
}

fn rendezvous_seeds() -> Vec<Vec<u8>> {
    let texts = ["tcp://node-1.x:29500", "tcp://[fe80::1%eth0]:4000", "file:///shared/run 7/meet"];
    texts.map(Vec::from).to_vec()
}

/// A range that is accepted is not empty and prints as the same range.
fn check_port_range(bytes: &[u8]) {
    let Ok(range) = String::from_utf8_lossy(bytes).parse::<PortRange>() else { return };
    assert_eq!(range.to_string().parse(), Ok(range));
    assert!(!range.ports().is_empty() && !range.ports().contains(&0));
}

fn port_range_seeds() -> Vec<Vec<u8>> {
    ["20000-20999", "1-65535", "7"].map(Vec::from).to_vec()
}
