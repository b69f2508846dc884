//! Shared memory, in this build.

use std::sync::Arc;

use unisum_link::Transport;
use unisum_link::handshake::Secret;
use unisum_shm::{ShmConfig, ShmTransport};

use crate::settings::Settings;

pub(super) const IS_BUILT: bool = true;

pub(in crate::wiring) fn sharing(settings: &Settings, secret: &Secret) -> Arc<dyn Transport> {
    Arc::new(ShmTransport::new(ShmConfig {
        secret: secret.clone(),
        heap_bytes: settings.shm_heap,
        reads_private: settings.cross_memory,
    }))
}
