//! The fuzz targets of this crate (see `unisum_link::fuzzing`).

use unisum_link::fuzzing::Target;

use crate::address::{PortRange, Rendezvous};
use crate::settings::{Environment, Settings, parse_bytes};
use crate::{buckets, control, interface, launcher, tunings, wiring};

/// The targets of this crate.
pub fn targets() -> Vec<Target> {
    let modules = [
        buckets::fuzzing::TARGETS,
        control::fuzzing::TARGETS,
        interface::fuzzing::TARGETS,
        launcher::fuzzing::TARGETS,
        tunings::fuzzing::TARGETS,
        wiring::fuzzing::TARGETS,
    ];
    [&modules.concat(), TARGETS].concat()
}

const TARGETS: &[Target] = &[
    Target { name: "rendezvous", check: check_rendezvous, seeds: rendezvous_seeds },
    Target { name: "port_range", check: check_port_range, seeds: port_range_seeds },
    Target { name: "byte_size", check: check_byte_size, seeds: byte_size_seeds },
    Target { name: "settings", check: check_settings, seeds: settings_seeds },
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

/// A size that is accepted is the number at its start times a power of 1024.
fn check_byte_size(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(size) = parse_bytes(&text) else { return };
    let digits: String = text.trim_start().chars().take_while(char::is_ascii_digit).collect();
    let number: u64 = digits.parse().expect("it was accepted");
    assert!([0, 10, 20, 30, 40].iter().any(|power| number.checked_mul(1 << power) == Some(size)));
    assert_eq!(parse_bytes(&size.to_string()), Ok(size));
}

fn byte_size_seeds() -> Vec<Vec<u8>> {
    ["64", "1 MiB", "17592186044415T", "18446744073709551615"].map(Vec::from).to_vec()
}

/// Settings that are accepted are within the limits that are documented.
fn check_settings(bytes: &[u8]) {
    let environment = environment(bytes);
    let Ok(settings) = Settings::from_environment(&environment) else { return };
    for timeout in [settings.timeout, settings.connect_timeout] {
        assert!((0.001..=1e6).contains(&timeout.as_secs_f64()));
    }
    assert!((1..=16).contains(&settings.sockets_per_peer));
    assert!((1..=1024).contains(&settings.window));
    assert!((4 << 10..=1 << 30).contains(&settings.slice_bytes));
    assert!(settings.shm_heap.is_none_or(|bytes| (1..=1 << 46).contains(&bytes)));
    assert!(settings.algorithm.is_none_or(|name| name != "auto" && !name.is_empty()));
}

fn settings_seeds() -> Vec<Vec<u8>> {
    let all = "UNISUM_TIMEOUT=1.5\nUNISUM_CONNECT_TIMEOUT= 7 \nUNISUM_ALGORITHM=Ring\n\
               UNISUM_TRANSPORT=shm\nUNISUM_INTERFACE=^docker\nUNISUM_PORT_RANGE=20000-20010\n\
               UNISUM_TCP_SOCKETS=4\nUNISUM_SLICE_BYTES=1M\nUNISUM_WINDOW=8\nUNISUM_SHM_HEAP=2G\n\
               UNISUM_CMA=off";
    let others = "NCCL_SOCKET_IFNAME=eth,ib\nGLOO_SOCKET_IFNAME=eth0";
    [all, others].map(Vec::from).to_vec()
}

/// An environment of lines `NAME=VALUE`. It must not say where to make directories.
pub(crate) fn environment(bytes: &[u8]) -> Environment {
    let text = String::from_utf8_lossy(bytes);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.filter(|(name, _)| *name != "XDG_RUNTIME_DIR").collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_breaks_a_parser(
            bytes in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..120),
                "[0-9a-c=,.:^\\[\\]() \n-]{0,60}".prop_map(String::into_bytes),
            ],
        ) {
            super::targets().iter().for_each(|target| target.attack(&bytes));
        }
    }
}
