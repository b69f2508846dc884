//! What a user can set about RDMA devices.

use std::time::Duration;

use super::{Reader, SettingsError};
use crate::wiring::builtin;

/// Settings of the verbs transport.
#[derive(Debug, Clone, PartialEq)]
#[allow(dead_code, reason = "a build without the transport does not read them")]
pub(crate) struct VerbsSettings {
    /// Whether RDMA devices may be used where the transport is chosen automatically.
    pub(crate) allowed: bool,
    /// Which devices, as the transport reads it; `None` means all that are not software.
    pub(crate) devices: Option<String>,
    /// Place of the address in the port's table; `None` chooses.
    pub(crate) gid_index: Option<usize>,
    /// Queue pairs for each peer on each device.
    pub(crate) pairs_per_peer: usize,
    /// Largest packet; `None` takes what the ports agree on.
    pub(crate) mtu: Option<usize>,
    /// A lost packet is repeated after 4.096 µs · 2^this.
    pub(crate) timeout: usize,
    /// How often a packet is repeated.
    pub(crate) retries: usize,
    pub(crate) traffic_class: usize,
    pub(crate) service_level: usize,
}

impl Default for VerbsSettings {
    fn default() -> Self {
        Self {
            allowed: true,
            devices: None,
            gid_index: None,
            pairs_per_peer: 2,
            mtu: None,
            // For an outage of 10 s.
            timeout: 19,
            retries: 7,
            traffic_class: 0,
            service_level: 0,
        }
    }
}

impl VerbsSettings {
    /// An `outage` that is no longer than this only delays a job.
    pub(super) fn read(read: &Reader<'_>, outage: Duration) -> Result<Self, SettingsError> {
        let defaults = Self::default();
        let retries = read.number("UNISUM_VERBS_RETRIES", 0..=7)?.unwrap_or(defaults.retries);
        // Users of NCCL have said once already which devices to use and how.
        let forbidden = read.switch("NCCL_IB_DISABLE")?.unwrap_or(false);
        let number_of = |names: [&'static str; 2], most| {
            let [own, nccl] = names.map(|name| read.number(name, 0..=most));
            own.and_then(|own| Ok(own.or(nccl?)))
        };
        let filter = |variable| {
            read.read(variable, |text| builtin::check_devices(text).map(|()| text.to_owned()))
        };
        let devices = match filter("UNISUM_VERBS_DEVICE")? {
            None => filter("NCCL_IB_HCA")?,
            own => own,
        };
        Ok(Self {
            allowed: read.switch("UNISUM_VERBS")?.unwrap_or(!forbidden),
            devices,
            gid_index: number_of(["UNISUM_VERBS_GID_INDEX", "NCCL_IB_GID_INDEX"], 255)?,
            pairs_per_peer: read
                .number("UNISUM_VERBS_PAIRS", 1..=16)?
                .unwrap_or(defaults.pairs_per_peer),
            mtu: read.bytes("UNISUM_VERBS_MTU", 256..=4096)?.map(|bytes| bytes as usize),
            timeout: read
                .number("UNISUM_VERBS_TIMEOUT", 1..=31)?
                .unwrap_or_else(|| timeout_for(outage, retries)),
            retries,
            traffic_class: number_of(["UNISUM_VERBS_TRAFFIC_CLASS", "NCCL_IB_TC"], 255)?
                .unwrap_or(defaults.traffic_class),
            service_level: number_of(["UNISUM_VERBS_SERVICE_LEVEL", "NCCL_IB_SL"], 15)?
                .unwrap_or(defaults.service_level),
        })
    }
}

/// The shortest time-out of a packet with which so many repetitions outlast an outage: the last of
/// them gets through. Devices may take longer.
fn timeout_for(outage: Duration, retries: usize) -> usize {
    const UNIT: Duration = Duration::from_nanos(4096);
    // Shorter ones would repeat what is only late.
    const CODES: std::ops::RangeInclusive<usize> = 18..=31;
    let outlasts = |code: &usize| UNIT * (1 << code) * retries as u32 >= outage;
    match retries {
        // Nothing is outlasted by a packet that is sent once.
        0 => *CODES.start(),
        _ => CODES.into_iter().find(outlasts).unwrap_or(*CODES.end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_outlast_the_outage_and_are_no_rarer_than_that_takes() {
        let seconds =
            |retries: usize, code: usize| retries as f64 * 4.096e-6 * 2_f64.powi(code as i32);
        for retries in 1..=7 {
            for outage in [0.1, 1.0, 7.6, 10.0, 20.0, 40.0, 310.0] {
                let code = timeout_for(Duration::from_secs_f64(outage), retries);
                assert!(seconds(retries, code) >= outage, "{retries}, {outage} s: {code}");
                assert!(code == 18 || seconds(retries, code - 1) < outage, "{retries}, {outage} s");
            }
        }
        // As far as there are codes.
        assert_eq!(timeout_for(Duration::from_secs(2_000_000), 7), 31);
        assert_eq!(timeout_for(Duration::from_secs(10), 0), 18);
    }
}
