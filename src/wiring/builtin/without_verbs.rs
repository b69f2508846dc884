//! No RDMA in this build.

use std::sync::Arc;

use unisum_link::{Reach, Refusal, Transport};

use super::Barred;
use crate::settings::Settings;

pub(super) const IS_BUILT: bool = false;

pub(in crate::wiring) fn rdma(_: &Settings) -> Arc<dyn Transport> {
    let why = "this build has no verbs transport";
    Barred::new("verbs", Reach::Unanimous, Refusal::Own(why.into()))
}

/// Without the transport nobody knows more of devices than their text.
#[expect(clippy::unnecessary_wraps, reason = "as with the transport")]
pub(crate) fn check_devices(_: &str) -> Result<(), String> {
    Ok(())
}

/// Nobody looks for devices.
pub(crate) fn describe_devices() -> Vec<String> {
    Vec::new()
}
