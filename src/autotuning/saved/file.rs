//! The text of a tuning file, and how it is read and written.
//!
//! ```text
//! unisum tuning, form 1
//! version 0.1.0              for which job it is: a line for each thing that has to be the same
//! …
//!
//! measured 0 0100…           what a rank told of its links, in hexadecimal digits
//! settled 0-3 0 all-reduce 65536 ring
//! check 5f0c…                a fingerprint of all that is above
//! ```

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use unisum_link::Rank;
use unisum_link::handshake::job_hash;

const TITLE: &str = "unisum tuning, form ";
const FORM: &str = "1";
const CHECK: &str = "check ";
/// Longest file that is read.
const BYTES_MAX: u64 = 16 << 20;
/// Most ranks in a list.
const RANKS_MAX: usize = 1 << 16;

/// The job that a file is for, as names and values.
pub(crate) type Head = Vec<(&'static str, String)>;

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It is not a tuning file, or is damaged.
    Broken(String),
    /// It is the tuning file of another job.
    Other(String),
}

/// The text of the file for a job with the results `body`, in whole lines.
pub(super) fn text(head: &Head, body: &str) -> String {
    let mut text = format!("{TITLE}{FORM}\n");
    for (name, value) in head {
        text += &format!("{name} {value}\n");
    }
    text += "\n";
    text += body;
    let check = hexadecimal(&job_hash(&text));
    text + CHECK + &check + "\n"
}

/// The results in a file's text, if it is for this job.
pub(super) fn body<'a>(text: &'a str, head: &Head) -> Result<&'a str, Unfit> {
    let broken = |why: &str| Unfit::Broken(why.to_owned());
    let form = text.strip_prefix(TITLE).ok_or_else(|| broken("it is no tuning file"))?;
    let (form, rest) = form.split_once('\n').ok_or_else(|| broken("it ends early"))?;
    if form != FORM {
        return Err(Unfit::Other(format!("it has form {form}, this version writes {FORM}")));
    }
    let end = text.rfind(CHECK).ok_or_else(|| broken("it ends early"))?;
    let (before, check) = text.split_at(end);
    if check != format!("{CHECK}{}\n", hexadecimal(&job_hash(before))) {
        return Err(broken("its fingerprint is of another text: it was damaged or changed"));
    }
    let rest = &rest[..before.len() - (text.len() - rest.len())];
    let (lines, body) = rest.split_once("\n\n").ok_or_else(|| broken("it has no findings"))?;
    let mut lines = lines.lines();
    for (name, value) in head {
        let line = lines.next().unwrap_or_default();
        let told = line.strip_prefix(name).and_then(|line| line.strip_prefix(' '));
        if told != Some(value) {
            let told = shortened(told.unwrap_or(line));
            let here = shortened(value);
            return Err(Unfit::Other(format!("it has {name} `{told}`, this job `{here}`")));
        }
    }
    Ok(body)
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(200).collect();
    if short.len() < text.len() {
        short += "…";
    }
    short
}

/// The contents of a file, or `None` if there is none.
pub(super) fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(found) if found.is_file() => {}
        // Opening another thing may block.
        Ok(_) => return Err(io::Error::other("it is no regular file")),
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Replaces a file atomically: it holds either the old or the new text at any time.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let fresh = path.with_file_name(name);
    let result = fill(&fresh, text).and_then(|()| fs::rename(&fresh, path));
    if result.is_err() {
        // Reports why it could not be written.
        let _ = fs::remove_file(&fresh);
    }
    result
}

fn fill(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn from_hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.chars().map(|it| it.to_digit(16).map(|it| it as u8)).collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|pair| 16 * pair[0] + pair[1]).collect())
}

/// A list of ranks in its order, as in `0-3,8-24/8,7`: runs with the same distance are put
/// together.
pub(super) fn list(ranks: &[Rank]) -> String {
    let mut parts = Vec::new();
    let mut rest = ranks;
    while let [first, after @ ..] = rest {
        let step =
            after.first().and_then(|second| second.checked_sub(*first)).filter(|&step| step > 0);
        let follows = |(two, step): (&[Rank], Rank)| two[1].checked_sub(two[0]) == Some(step);
        let run = step
            .map_or(1, |step| 1 + rest.windows(2).take_while(|two| follows((two, step))).count());
        let run = if run < 3 { 1 } else { run };
        let last = rest[run - 1];
        parts.push(match step {
            Some(1) if run > 1 => format!("{first}-{last}"),
            Some(step) if run > 1 => format!("{first}-{last}/{step}"),
            _ => first.to_string(),
        });
        rest = &rest[run..];
    }
    parts.join(",")
}

pub(super) fn from_list(text: &str) -> Option<Vec<Rank>> {
    let mut ranks = Vec::new();
    for part in text.split(',') {
        let (run, step) = part.split_once('/').unwrap_or((part, "1"));
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let (first, last): (Rank, Rank) = (first.parse().ok()?, last.parse().ok()?);
        let step = step.parse().ok().filter(|&step: &Rank| step > 0)?;
        if last >= RANKS_MAX {
            return None;
        }
        ranks.extend((first..=last).step_by(step));
        if ranks.len() > RANKS_MAX {
            return None;
        }
    }
    Some(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(world: &str) -> Head {
        vec![("version", "1".into()), ("world", world.into())]
    }

    #[test]
    fn what_is_written_is_read_and_every_other_text_is_refused() {
        let body_text = "measured 0 00\nsettled 0-3 0 all-reduce 65536 ring\n";
        let written = text(&head("4"), body_text);
        assert_eq!(body(&written, &head("4")), Ok(body_text));
        assert_eq!(body(&text(&head("4"), ""), &head("4")), Ok(""));
        // Cut anywhere, or with any byte changed.
        for end in 0..written.len() {
            assert!(matches!(body(&written[..end], &head("4")), Err(Unfit::Broken(_))), "{end}");
            let mut other = written.clone().into_bytes();
            other[end] ^= 1;
            let other = String::from_utf8(other).unwrap();
            assert!(body(&other, &head("4")).is_err(), "{other}");
        }
        let foreign = body("#!/bin/sh\n", &head("4"));
        assert_eq!(foreign, Err(Unfit::Broken("it is no tuning file".into())));
    }

    #[test]
    fn a_file_of_another_job_says_what_differs() {
        let written = text(&head("4"), "");
        let why = Unfit::Other("it has world `4`, this job `8`".into());
        assert_eq!(body(&written, &head("8")), Err(why));
        let later = written.replace("form 1", "form 2");
        assert!(
            matches!(body(&later, &head("4")), Err(Unfit::Other(why)) if why.contains("form 2"))
        );
    }

    #[test]
    fn lists_of_ranks_are_short_and_keep_their_order() {
        for (ranks, short) in [
            (&[0, 1, 2, 3][..], "0-3"),
            (&[5], "5"),
            (&[0, 1], "0,1"),
            (&[0, 8, 16, 24, 7], "0-24/8,7"),
            (&[3, 2, 1, 0, 0], "3,2,1,0,0"),
            (&[9, 0, 1, 2], "9,0-2"),
        ] {
            assert_eq!(list(ranks), short);
            assert_eq!(from_list(short).as_deref(), Some(ranks), "{short}");
        }
        for wrong in ["", "a", "0-", "0-3/0", "0-99999999999", "0-65535,0-65535", "1,,2"] {
            assert_eq!(from_list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn digits_stand_for_bytes() {
        assert_eq!(from_hexadecimal(&hexadecimal(&[0, 255, 18])), Some(vec![0, 255, 18]));
        assert_eq!(
            (from_hexadecimal("0"), from_hexadecimal("0g"), from_hexadecimal("é0")),
            (None, None, None)
        );
    }
}
