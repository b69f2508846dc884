//! The results of earlier runs of the job, from rank 0's tuning file.

use std::sync::Arc;

use super::costs::{MeasureContext, Told};
use super::{common_settings, rendezvous_error};
use crate::autotuning::saved::{self, Head, Tunings};
use crate::{Error, ErrorKind};
use unisum_control::Control;

/// The same on all ranks.
pub(super) struct Earlier {
    /// What each rank measured, if that is known.
    pub(super) measured: Option<Vec<Vec<u8>>>,
    pub(super) tunings: Arc<Tunings>,
    /// A note for people.
    pub(super) note: String,
}

/// The number of bytes of a text that are sent at once.
const PIECE: usize = 48 << 10;

/// Reads the file on rank 0, which sends the contents to all ranks.
///
/// # Errors
/// On all ranks, if rank 0 cannot read it.
pub(super) fn look_up(context: MeasureContext<'_>, told: &[Told<'_>]) -> Result<Earlier, Error> {
    let control = context.membership.control();
    let failed = |text: String| Error::new(ErrorKind::Configuration, text).on(context.rank);
    let path = context.job.settings.tuning.as_ref().filter(|_| context.rank == 0);
    let found = path.map(|path| saved::open(path, head(context, told), control.kept()));
    let text = match &found {
        None => String::new(),
        Some(Ok(found)) => format!("+{}\n{}", found.note.replace('\n', " "), found.body),
        Some(Err(why)) => format!("-{why}"),
    };
    let text = tell_all(control, &text)?;
    let parts = text.strip_prefix('+').and_then(|text| text.split_once('\n'));
    let Some((note, body)) = parts else {
        let why = text.get(1..).unwrap_or("rank 0 told nothing of its tuning file");
        return Err(failed(why.to_owned()).caused_by(vec![0]));
    };
    let unknown = |why: String| failed(format!("the tuning file: {why}")).caused_by(vec![0]);
    let store = found.and_then(Result::ok).and_then(|found| found.store);
    let tunings = Arc::new(Tunings::new(body, store).map_err(unknown)?);
    let measured = saved::measured(body, context.topology.world()).map_err(unknown)?;
    Ok(Earlier { measured, tunings, note: note.to_owned() })
}

/// Sends a text of rank 0, of any length, to all ranks.
fn tell_all(control: &Control, text: &str) -> Result<String, Error> {
    let (mut all, mut pieces) = (Vec::new(), text.as_bytes().chunks(PIECE));
    loop {
        let piece = pieces.next().unwrap_or_default().to_vec();
        let told = control.exchange(piece).map_err(rendezvous_error)?.swap_remove(0);
        all.extend_from_slice(&told);
        if told.len() < PIECE {
            return Ok(String::from_utf8_lossy(&all).into_owned());
        }
    }
}

/// What must be the same for a file to be usable.
fn head(context: MeasureContext<'_>, told: &[Told<'_>]) -> Head {
    let ranks: Vec<usize> = (0..context.topology.world()).collect();
    let hosts = context.job.hosts(&ranks);
    // What follows changes when a host starts anew.
    let host = |host: &&str| host.split('/').next().unwrap_or_default().to_owned();
    let hosts: Vec<String> = hosts.iter().map(host).collect();
    let nodes = ranks.iter().map(|&rank| context.topology.node_of(rank).to_string());
    let transport = |told: &Told<'_>| String::from_utf8_lossy(told.transport).into_owned();
    let transports: Vec<String> = told.iter().map(transport).collect();
    vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("world", ranks.len().to_string()),
        ("hosts", hosts.join(" ")),
        ("nodes", nodes.collect::<Vec<_>>().join(" ")),
        ("transports", transports.join(" ")),
        ("settings", common_settings(&context.job.settings)),
    ]
}
