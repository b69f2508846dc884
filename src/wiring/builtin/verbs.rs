//! RDMA, in this build.

use std::sync::Arc;

use unisum_link::Transport;
use unisum_verbs::{DeviceFilter, VerbsConfig, VerbsTransport};

use crate::settings::Settings;

pub(super) const IS_BUILT: bool = true;

pub(in crate::wiring) fn rdma(settings: &Settings) -> Arc<dyn Transport> {
    let verbs = &settings.verbs;
    let devices = verbs.devices.as_ref().map(|text| text.parse::<DeviceFilter>());
    Arc::new(VerbsTransport::new(VerbsConfig {
        // The settings check it.
        devices: devices.and_then(Result::ok),
        software: false,
        // The settings' ranges are those of the fields.
        gid_index: verbs.gid_index.map(|index| index as u8),
        pairs_per_peer: verbs.pairs_per_peer,
        mtu: verbs.mtu,
        timeout: verbs.timeout as u8,
        retries: verbs.retries as u8,
        traffic_class: verbs.traffic_class as u8,
        service_level: verbs.service_level as u8,
    }))
}

/// Whether a text names devices.
///
/// # Errors
/// What is accepted.
pub(crate) fn check_devices(text: &str) -> Result<(), String> {
    text.parse::<DeviceFilter>().map(drop).map_err(|error| error.to_string())
}

/// The devices of this host, for people.
pub(crate) fn describe_devices() -> Vec<String> {
    unisum_verbs::describe_devices()
}
