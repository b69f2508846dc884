//! What earlier runs of the job measured and settled, and what this one adds: `UNISUM_TUNING`.
//!
//! Only rank 0 reads and writes the file. At the start it sends the contents to all ranks, so that
//! they cannot differ; the first rank of a group reports to rank 0 what the group has settled.

mod file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use unisum_link::Rank;

use crate::autotuning::selector;
pub(crate) use file::Head;
use file::Unfit;
use unisum_control::Kept;

/// Identifies a communicator of the job across runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Which {
    /// The job's numbers of its ranks, in its order.
    pub(crate) ranks: Arc<[Rank]>,
    /// The number of communicators of the same ranks created before it.
    pub(crate) ordinal: u32,
}

/// Which algorithm was settled for a kind and a size class, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) kind: usize,
    pub(crate) class: usize,
    pub(crate) algorithm: usize,
}

/// At most this many communicators of the same ranks are saved: a program may create any number.
const ORDINALS: u32 = 256;
/// Maximum size of the saved body, in bytes.
const BODY_BYTES_MAX: usize = 4 << 20;

/// What all ranks know of the file, and, on rank 0, the file itself.
#[derive(Debug)]
pub(crate) struct Tunings {
    /// What earlier runs settled, as received from rank 0.
    told: BTreeMap<Which, Vec<Settled>>,
    /// The number of communicators of which this rank was the first, by their ranks.
    made: Mutex<BTreeMap<Arc<[Rank]>, u32>>,
    store: Option<Mutex<Store>>,
}

/// Rank 0's file, unless it is another job's.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    head: Head,
    /// In the order in which they were found.
    lines: Vec<String>,
    /// What the first ranks of groups report.
    kept: Arc<Kept>,
    has_failed: bool,
}

/// What rank 0 found when it looked at its file.
#[derive(Debug)]
pub(crate) struct Found {
    /// What it sends to all ranks: empty if there was nothing, or if the file is another job's.
    pub(crate) body: String,
    /// A note for the user.
    pub(crate) note: String,
    pub(crate) store: Option<Store>,
}

/// Reads rank 0's file.
///
/// # Errors
/// The message for the user, if the file cannot be read or is not a tuning file.
pub(crate) fn open(path: &Path, head: Head, kept: Arc<Kept>) -> Result<Found, String> {
    let name = path.display();
    let fresh =
        |lines| Store { path: path.to_owned(), head: head.clone(), lines, kept, has_failed: false };
    let text = file::read(path).map_err(|error| format!("UNISUM_TUNING={name}: {error}"))?;
    let Some(text) = text else {
        let note = format!("tuning is kept in {name}, which is new");
        return Ok(Found { body: String::new(), note, store: Some(fresh(Vec::new())) });
    };
    match file::body(&text, &head) {
        Ok(body) => {
            let lines: Vec<String> = body.lines().map(str::to_owned).collect();
            let note = format!("tuned by {name}");
            Ok(Found { body: body.to_owned(), note, store: Some(fresh(lines)) })
        }
        Err(Unfit::Broken(why)) => {
            Err(format!("UNISUM_TUNING={name}: {why}; remove it, or name another file"))
        }
        Err(Unfit::Other(why)) => {
            let note = format!(
                "UNISUM_TUNING={name} is another job's and neither used nor changed: {why}; \
                 remove it, or name another file"
            );
            unisum_link::warning!("{note}");
            Ok(Found { body: String::new(), note, store: None })
        }
    }
}

/// What each rank measured, by rank, in a body from rank 0; `None` if nothing was measured.
///
/// # Errors
/// A line that makes no sense.
pub(crate) fn measured(body: &str, world: usize) -> Result<Option<Vec<Vec<u8>>>, String> {
    // Of a rank without a line: no links.
    let mut all = vec![vec![0; 4]; world];
    let mut is_there = false;
    for line in body.lines() {
        let Some(line) = line.strip_prefix("measured ") else { continue };
        let parsed = line.split_once(' ').and_then(|(rank, digits)| {
            let rank: Rank = rank.parse().ok().filter(|&rank| rank < world)?;
            Some((rank, file::from_hexadecimal(digits)?))
        });
        let (rank, bytes) = parsed.ok_or_else(|| format!("`{line}` makes no sense"))?;
        all[rank] = bytes;
        is_there = true;
    }
    Ok(is_there.then_some(all))
}

impl Tunings {
    /// Reads what rank 0 sent; on rank 0, with its file.
    ///
    /// # Errors
    /// A line that makes no sense.
    pub(crate) fn new(body: &str, store: Option<Store>) -> Result<Self, String> {
        let mut told: BTreeMap<Which, Vec<Settled>> = BTreeMap::new();
        for line in body.lines().filter(|line| !line.starts_with("measured ")) {
            let parsed = parse(line).ok_or_else(|| format!("`{line}` makes no sense"))?;
            told.entry(parsed.0).or_default().push(parsed.1);
        }
        Ok(Self { told, made: Mutex::default(), store: store.map(Mutex::new) })
    }

    /// What earlier runs settled in a communicator.
    pub(crate) fn of(&self, which: &Which) -> &[Settled] {
        self.told.get(which).map_or(&[], Vec::as_slice)
    }

    /// On the first rank of a new communicator, including the job's: the number of earlier ones of
    /// the same ranks.
    pub(crate) fn next_ordinal(&self, ranks: &Arc<[Rank]>) -> u32 {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let next = made.entry(ranks.clone()).or_default();
        let ordinal = *next;
        *next = next.saturating_add(1);
        ordinal
    }

    /// Saves what the ranks measured.
    pub(crate) fn keep_measured(&self, blobs: &[Vec<u8>]) {
        let Some(store) = &self.store else { return };
        let has_told = |(_, blob): &(usize, &Vec<u8>)| **blob != [0; 4];
        let lines = blobs
            .iter()
            .enumerate()
            .filter(has_told)
            .map(|(rank, blob)| format!("measured {rank} {}", file::hexadecimal(blob)));
        lock(store).add(lines.collect());
    }

    /// Saves what the first rank of a communicator has settled; on a rank other than 0, returns
    /// what rank 0 must be told.
    pub(crate) fn keep(&self, which: &Which, settled: Settled, rank: Rank) -> Option<String> {
        if which.ordinal >= ORDINALS || which.ranks[0] != rank {
            return None;
        }
        let line = line(which, settled);
        if rank != 0 {
            return Some(line);
        }
        if let Some(store) = &self.store {
            lock(store).add(vec![line]);
        }
        None
    }
}

impl Drop for Tunings {
    fn drop(&mut self) {
        if let Some(store) = &self.store {
            lock(store).add(Vec::new());
        }
    }
}

impl Store {
    /// Adds lines, and those that came from other ranks, and writes the file if there are any.
    fn add(&mut self, mut lines: Vec<String>) {
        // What others tell is looked at as what a file says.
        lines.extend(self.kept.take().into_iter().filter(|line| parse(line).is_some()));
        if lines.is_empty() || self.has_failed {
            return;
        }
        self.lines.extend(lines);
        let mut body = self.lines.join("\n");
        body.push('\n');
        let written = match body.len() > BODY_BYTES_MAX {
            true => Err("it would be too long".to_owned()),
            false => file::write(&self.path, &file::text(&self.head, &body))
                .map_err(|error| error.to_string()),
        };
        if let Err(why) = written {
            self.has_failed = true;
            let path = self.path.display();
            unisum_link::fault!("UNISUM_TUNING={path} is not written any more: {why}");
        }
    }
}

fn lock(store: &Mutex<Store>) -> std::sync::MutexGuard<'_, Store> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

fn line(which: &Which, settled: Settled) -> String {
    let (ranks, ordinal) = (file::list(&which.ranks), which.ordinal);
    let [kind, bytes, name] = selector::names(settled);
    format!("settled {ranks} {ordinal} {kind} {bytes} {name}")
}

fn parse(line: &str) -> Option<(Which, Settled)> {
    let words: Vec<&str> = line.strip_prefix("settled ")?.split(' ').collect();
    let [ranks, ordinal, kind, bytes, name] = words.try_into().ok()?;
    let ranks: Arc<[Rank]> = file::from_list(ranks)?.into();
    let settled = selector::named([kind, bytes, name])?;
    Some((Which { ranks, ordinal: ordinal.parse().ok()? }, settled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_settled_is_found_again_by_its_communicator() {
        let which = |ranks: &[Rank], ordinal| Which { ranks: ranks.into(), ordinal };
        let settled = Settled { kind: 3, class: 16, algorithm: 1 };
        let text = line(&which(&[0, 2, 1], 1), settled);
        let tunings = Tunings::new(&text, None).unwrap();
        assert_eq!(tunings.of(&which(&[0, 2, 1], 1)), [settled], "{text}");
        assert_eq!(tunings.of(&which(&[0, 2, 1], 0)), []);
        assert_eq!(tunings.of(&which(&[0, 1, 2], 1)), []);
        for wrong in ["", "x", &text.replace("settled", "settle"), &(text.clone() + " 1")] {
            assert_eq!(parse(wrong), None);
        }
        assert!(Tunings::new(&text.replace("all-gather", "all-together"), None).is_err());
    }

    #[test]
    fn communicators_of_the_same_ranks_are_told_apart_by_their_order() {
        let tunings = Tunings::new("", None).unwrap();
        let (some, others): (Arc<[Rank]>, Arc<[Rank]>) = ([0, 1].into(), [1, 0].into());
        let ordinals = [&some, &others, &some].map(|ranks| tunings.next_ordinal(ranks));
        assert_eq!(ordinals, [0, 0, 1]);
    }

    #[test]
    fn what_was_measured_is_found_by_rank() {
        let body = "measured 0 0102\nsettled x\nmeasured 2 ff\n";
        let found = measured(body, 3).unwrap().unwrap();
        assert_eq!(found, [vec![1, 2], vec![0; 4], vec![255]]);
        assert_eq!(measured("", 3), Ok(None));
        assert!(measured(body, 2).is_err() && measured("measured 0 1\n", 2).is_err());
    }
}
