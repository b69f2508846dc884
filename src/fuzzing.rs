//! The fuzz targets of this crate (see `unisum_link::fuzzing`).

use unisum_link::fuzzing::Target;

use crate::settings::{Settings, parse_bytes};
use crate::{buckets, tunings, wiring};
use unisum_control::Environment;

/// The targets of this crate.
pub fn targets() -> Vec<Target> {
    let modules = [buckets::fuzzing::TARGETS, tunings::fuzzing::TARGETS, wiring::fuzzing::TARGETS];
    let targets = [&modules.concat(), TARGETS].concat();
    // Its tests attack them.
    #[cfg(not(test))]
    let targets = [targets, unisum_control::fuzzing::targets()].concat();
    targets
}

const TARGETS: &[Target] = &[
    Target { name: "byte_size", check: check_byte_size, seeds: byte_size_seeds },
    Target { name: "settings", check: check_settings, seeds: settings_seeds },
];

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
    let text = String::from_utf8_lossy(bytes);
    let environment: Environment = text.lines().filter_map(|line| line.split_once('=')).collect();
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
