//! The control connection.

use std::time::Duration;

use super::{Meeting, builtin, rendezvous_error, with_hint};
use crate::settings::Settings;
use crate::version::BUILD;
use crate::{Error, ErrorKind};
use unisum_control::launcher::Detected;
use unisum_control::{Control, ControlConfig};

/// How long others may take to come that are to hear of a failure.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tells the others, which would wait for it, that this rank can't join, and why: by rank 0, if
/// that is there, or as rank 0. Blocks for little more than 5 s at most.
pub(super) fn tell_that_not(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
    why: &Error,
) {
    let told =
        config(detected, settings, meeting).map_err(|error| error.to_string()).and_then(|config| {
            let told = match config.rank {
                0 => unisum_control::tell_all_that_not(config, why, PATIENCE),
                _ => unisum_control::tell_that_not(&config, why, PATIENCE),
            };
            told.map_err(|error| error.to_string())
        });
    if let Err(error) = told {
        tracing::info!("the other ranks are not told why this one does not join: {error}");
    }
}

pub(super) fn start_control(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
) -> Result<Control, Error> {
    Control::start(config(detected, settings, meeting)?).map_err(|error| {
        let error = rendezvous_error(error);
        let is_own = error.failed_ranks().is_empty();
        if is_own { error.caused_by(vec![detected.rank]) } else { with_hint(error, detected) }
    })
}

fn config(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
) -> Result<ControlConfig, Error> {
    let rendezvous = detected.rendezvous.clone().ok_or_else(|| {
        let text = "no rendezvous address; set UNISUM_RENDEZVOUS=tcp://HOST:PORT";
        Error::new(ErrorKind::Configuration, text)
    })?;
    Ok(ControlConfig {
        rank: detected.rank,
        world: detected.world,
        rendezvous,
        job: detected.job.clone(),
        credentials: meeting.credentials.clone(),
        secret_origin: meeting.secret_origin.clone(),
        interface: settings.interface.clone(),
        port_range: settings.port_range,
        towards: meeting.towards,
        connect_timeout: settings.connect_timeout,
        heartbeat_timeout: settings.heartbeat_timeout,
        reconnect_timeout: settings.reconnect_timeout,
        publish: meeting.publish(),
        is_moot: meeting.is_moot(),
        build: BUILD,
        prepare_listener: builtin::prepare_listener,
    })
}
