//! How rank 0 opens a job: it listens, and says where, unless another process does so already.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use crate::address::{Rendezvous, resolve};
use crate::verdict::{Finding, Report};
use crate::{Control, ControlConfig, ControlError, Joined, Role, dial, file, hello, listen};

/// Listens and tells where.
pub(super) fn open(config: &ControlConfig) -> Result<Joined, ControlError> {
    let session = super::new_session()?;
    let filter = config.interface.as_ref();
    let (listening, published) = match &config.rendezvous {
        Rendezvous::Tcp { host, port } => {
            let until = Instant::now() + config.connect_timeout;
            let listening = listen::at_rendezvous(host, *port, filter, until);
            (listening.map_err(|error| explained(error, config, (host, *port)))?, None)
        }
        Rendezvous::File(path) => {
            let listening = listen::at_free_port(filter, None, config.port_range)?;
            let look =
                |found: &_| dial::look_for_another(found, &hello(config), &config.credentials);
            let mark = super::new_session()?;
            let published = file::publish(path, mark, &listening.addresses, look)?;
            (listening, Some(published))
        }
        Rendezvous::Store { key, .. } => {
            let listening = listen::preferably(filter, config.towards, config.port_range)?;
            let published = config.publish.as_ref().map(|publish| publish.0(&listening.addresses));
            published.transpose().map_err(|why| ControlError::Store { key: key.clone(), why })?;
            (listening, None)
        }
    };
    let role = Role::Coordinator(published);
    Ok(Joined { listening, session, coordinator: None, role, patience: None })
}

/// Who has the port may be rank 0 of this very job.
fn explained(
    error: ControlError,
    config: &ControlConfig,
    (host, port): (&str, u16),
) -> ControlError {
    let is_in_use = |source: &io::Error| source.kind() == io::ErrorKind::AddrInUse;
    if !matches!(&error, ControlError::Listen { source, .. } if is_in_use(source)) {
        return error;
    }
    let Ok(addresses) = resolve(host, port) else { return error };
    let another = dial::look_for_another(&addresses, &hello(config), &config.credentials);
    another.err().unwrap_or(error)
}

/// Opens the job as rank 0 only to tell all ranks that it can't join, and why. Blocks until all
/// others have come and been told, or for `patience`.
///
/// # Errors
/// As [`Control::start`].
pub fn tell_all_that_not(
    config: ControlConfig,
    why: &dyn fmt::Display,
    patience: Duration,
) -> Result<(), ControlError> {
    let control = Control::start_with(config, Some(patience))?;
    control.accuse(Report::new(0, 0, Finding::CannotJoin, why.to_string()));
    control.leave_within(patience);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Scratch, config};

    /// Who may enter its folder may read it.
    #[test]
    fn a_rendezvous_file_does_not_tell_the_session() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        let control = Control::start(config(0, 2, Rendezvous::File(path.clone()))).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let hex = |bytes: [u8; 16]| bytes.map(|byte| format!("{byte:02x}")).concat();
        assert_eq!(text.split(' ').nth(1).unwrap().len(), 32, "{text}");
        assert!(!text.contains(&hex(control.session())), "{text}");
    }
}
