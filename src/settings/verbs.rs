//! What a user can set about RDMA devices.

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
            timeout: 18,
            retries: 7,
            traffic_class: 0,
            service_level: 0,
        }
    }
}

impl VerbsSettings {
    pub(super) fn read(read: &Reader<'_>) -> Result<Self, SettingsError> {
        let defaults = Self::default();
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
            timeout: read.number("UNISUM_VERBS_TIMEOUT", 1..=31)?.unwrap_or(defaults.timeout),
            retries: read.number("UNISUM_VERBS_RETRIES", 0..=7)?.unwrap_or(defaults.retries),
            traffic_class: number_of(["UNISUM_VERBS_TRAFFIC_CLASS", "NCCL_IB_TC"], 255)?
                .unwrap_or(defaults.traffic_class),
            service_level: number_of(["UNISUM_VERBS_SERVICE_LEVEL", "NCCL_IB_SL"], 15)?
                .unwrap_or(defaults.service_level),
        })
    }
}
