//! The fuzz targets of this crate (see `unisum_link::fuzzing`).

use unisum_link::fuzzing::Target;

use crate::autotuning::saved;
use crate::communicator::groups;
use crate::epoch_log;
use crate::settings::{Settings, parse_bytes};
use crate::{buckets, messenger, wiring};
use unisum_control::Environment;
use unisum_kernels::{Encoding, Isa};

/// The targets of this crate.
pub fn targets() -> Vec<Target> {
    let modules = [
        buckets::fuzzing::TARGETS,
        epoch_log::fuzzing::TARGETS,
        groups::fuzzing::TARGETS,
        messenger::fuzzing::TARGETS,
        saved::fuzzing::TARGETS,
        wiring::fuzzing::TARGETS,
    ];
    let targets = [&modules.concat(), TARGETS].concat();
    #[cfg(feature = "cuda")]
    let targets = [&targets, crate::device::fuzzing::TARGETS].concat();
    // Its tests attack them.
    #[cfg(not(test))]
    let targets = [targets, unisum_control::fuzzing::targets()].concat();
    targets
}

const TARGETS: &[Target] = &[
    Target { name: "byte_size", check: check_byte_size, seeds: byte_size_seeds },
    Target { name: "settings", check: check_settings, seeds: settings_seeds },
    Target { name: "encodings", check: check_encodings, seeds: encoding_seeds },
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

/// Any bytes encode some values, the same on every instruction set; what is not finite is told, and
/// what was decoded can be encoded again. The first byte says which encoding.
fn check_encodings(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let encodings =
        [Encoding::F16, Encoding::Bf16, Encoding::F8E4M3, Encoding::F8E5M2, Encoding::Int8];
    let encoding = encodings[usize::from(which) % encodings.len()];
    let fits = (0..=bytes.len()).rev().find(|&count| encoding.bytes(count) <= bytes.len());
    let count = fits.unwrap_or(0);
    let bytes = &bytes[..encoding.bytes(count)];
    let mut first: Option<(Vec<u32>, Vec<u8>, bool)> = None;
    for isa in Isa::available() {
        let (mut values, mut sum) = (vec![0.0_f32; count], vec![0.0_f32; count]);
        let is_marked = encoding.decode_with(isa, bytes, &mut values);
        assert_eq!(is_marked, values.iter().any(|value| !value.is_finite()), "{isa:?}");
        assert_eq!(encoding.add_with(isa, bytes, &mut sum), is_marked, "{isa:?}");
        let mut again = vec![0; bytes.len()];
        encoding.encode_with(isa, &values, &mut again);
        // No encoder writes a NaN into a block whose scale is one: which of them remains is open.
        let bits = |value: &f32| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() };
        let bits = values.iter().chain(&sum).map(bits).collect();
        let result = (bits, again, is_marked);
        assert_eq!(first.get_or_insert_with(|| result.clone()), &result, "{isa:?}");
    }
}

fn encoding_seeds() -> Vec<Vec<u8>> {
    (0..5)
        .map(|which| [which].into_iter().chain((0..150_u8).map(|at| at.wrapping_mul(5))).collect())
        .collect()
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
