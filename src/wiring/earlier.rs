//! What earlier runs of the job found, as rank 0's tuning file has it.

use std::sync::Arc;

use super::costs::{Site, Told};
use super::{common_settings, rendezvous_error};
use crate::tunings::{self, Head, Tunings};
use crate::{Error, ErrorKind};
use unisum_control::Control;

/// The same on all ranks.
pub(super) struct Earlier {
    /// What each rank measured, if that is known.
    pub(super) measured: Option<Vec<Vec<u8>>>,
    pub(super) tunings: Arc<Tunings>,
    /// To be read.
    pub(super) note: String,
}

/// Bytes of a text that are told at once.
const PIECE: usize = 48 << 10;

/// Reads the file on rank 0, which tells all ranks what it says.
///
/// # Errors
/// On all ranks, if rank 0 can't read it.
pub(super) fn look_up(site: Site<'_>, told: &[Told<'_>]) -> Result<Earlier, Error> {
    let control = site.limit.membership.control();
    let failed = |text: String| Error::new(ErrorKind::Configuration, text).on(site.rank);
    let path = site.job.settings.tuning.as_ref().filter(|_| site.rank == 0);
    let found = path.map(|path| tunings::open(path, head(site, told), control.kept()));
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
    let measured = tunings::measured(body, site.topology.world()).map_err(unknown)?;
    Ok(Earlier { measured, tunings, note: note.to_owned() })
}

/// Gives all ranks a text of rank 0's, however long.
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

/// What has to be the same for a file to be of use.
fn head(site: Site<'_>, told: &[Told<'_>]) -> Head {
    let ranks: Vec<usize> = (0..site.topology.world()).collect();
    let hosts = site.job.hosts(&ranks);
    // What follows changes when a host starts anew.
    let host = |host: &&str| host.split('/').next().unwrap_or_default().to_owned();
    let hosts: Vec<String> = hosts.iter().map(host).collect();
    let nodes = ranks.iter().map(|&rank| site.topology.node_of(rank).to_string());
    let transport = |told: &Told<'_>| String::from_utf8_lossy(told.transport).into_owned();
    let transports: Vec<String> = told.iter().map(transport).collect();
    vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("world", ranks.len().to_string()),
        ("hosts", hosts.join(" ")),
        ("nodes", nodes.collect::<Vec<_>>().join(" ")),
        ("transports", transports.join(" ")),
        ("settings", common_settings(&site.job.settings)),
    ]
}
