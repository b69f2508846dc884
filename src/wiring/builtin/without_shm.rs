//! No shared memory in this build.

use std::sync::Arc;

use unisum_link::handshake::Secret;
use unisum_link::{Reach, Refusal, Transport};

use super::Barred;
use crate::settings::Settings;

pub(super) const IS_BUILT: bool = false;

pub(in crate::wiring) fn sharing(_: &Settings, _: &Secret) -> Arc<dyn Transport> {
    let why = "this build has no shared-memory transport";
    Barred::new("shm", Reach::Host, Refusal::NotWanted(why.into()))
}
