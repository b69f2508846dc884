//! What must hold of tuning files, whatever is in them.

use unisum_link::fuzzing::Target;

use super::{file, line, measured, parse};

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "tuning_file", check: check_file, seeds: file_seeds },
    Target { name: "tuning_lines", check: check_lines, seeds: lines_seeds },
];

const LINES: &str = "measured 0 0100\nsettled 0-3,9-1000/3,5 2 all-reduce 65536 ring\n";

fn head() -> super::Head {
    vec![("version", "0".into()), ("world", "4".into())]
}

/// A file that is accepted is what would be written.
fn check_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(body) = file::body(&text, &head()) else { return };
    assert_eq!(file::text(&head(), body), text);
}

fn file_seeds() -> Vec<Vec<u8>> {
    vec![file::text(&head(), LINES).into(), file::text(&Vec::new(), "").into()]
}

/// A finding that is accepted says the same when it is written again.
fn check_lines(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(Some(found)) = measured(&text, 4) {
        assert_eq!(found.len(), 4);
    }
    for (which, settled) in text.lines().filter_map(parse) {
        assert_eq!(parse(&line(&which, settled)), Some((which, settled)));
    }
}

fn lines_seeds() -> Vec<Vec<u8>> {
    vec![LINES.into()]
}
