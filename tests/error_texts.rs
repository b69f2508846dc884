//! Every text that the library can put into an error or a warning is explained in docs/errors.md,
//! or says itself what to do; and everything that the page quotes can still be said.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Whose texts reach users.
const SOURCES: [&str; 11] = [
    "bindings/c/src",
    "bindings/python/src",
    "src",
    "control/src",
    "engine/src",
    "kernels/src",
    "transports/cuda-ipc/src",
    "transports/link/src",
    "transports/shm/src",
    "transports/tcp/src",
    "transports/verbs/src",
];

/// What is only for tests.
const FOR_TESTS: [&str; 6] =
    ["tests", "tests.rs", "fuzzing", "fuzzing.rs", "conformance", "simulation.rs"];

/// What encloses a text that is in no error: broken invariants, lines of the log, attributes, the
/// names of variables, what `describe` prints.
const NO_ERRORS: &[&str] = &[
    "expect",
    "assert!",
    "assert_eq!",
    "assert_ne!",
    "debug_assert!",
    "debug_assert_eq!",
    "debug_assert_ne!",
    "panic!",
    "unreachable!",
    "error!",
    "warn!",
    "info!",
    "debug!",
    "trace!",
    "concat!",
    "include_str!",
    "doc",
    "must_use",
    "reason",
    "variable",
    "writeln!",
];

/// Whose argument is a text of a class, and the section of the page that explains the class.
const CLASSES: [(&[&str], &str); 2] = [
    (
        &["os", "Os", "system", "lacking", "own_error", "starting_failed"],
        "Memory, descriptors, threads, and what the system refuses",
    ),
    (&["protocol", "require", "violated", "Protocol"], "What came makes no sense"),
];

/// What a text says that names its remedy.
const REMEDIES: [&str; 9] = [
    "set UNISUM_",
    "UNISUM_TLS must be the same on all ranks",
    "that must be the same on all ranks",
    "must be positive",
    "expected ",
    "raise ",
    "do all ranks run the same",
    "(CUDA_VISIBLE_DEVICES may",
    "is needed",
];

/// Texts of no error that nothing around them tells: what `describe`, `Display` and `Debug` print,
/// what is sent, what keys are derived for. Whole texts, as the tests print them.
const DESCRIPTIONS: &str = include_str!("error_texts/descriptions.txt");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A string literal of a source, with `…` for placeholders.
struct Literal {
    place: String,
    text: String,
    /// What it is an argument of, the innermost last.
    enclosing: Vec<String>,
}

impl Literal {
    fn is_within(&self, names: &[&str]) -> bool {
        self.enclosing.iter().any(|name| names.contains(&name.as_str()))
    }

    /// Whether it says anything, and to users.
    fn is_told(&self) -> bool {
        let is_word = |word: &&str| word.chars().any(char::is_alphabetic);
        let words = self.text.split_whitespace().filter(is_word).count();
        words >= 2 && !self.is_within(NO_ERRORS)
    }

    fn is_explained(&self, page: &Page) -> bool {
        page.quotes.iter().any(|quote| is_in(quote, &self.text))
            || REMEDIES.iter().any(|remedy| self.text.contains(remedy))
            || CLASSES.iter().any(|(names, _)| {
                let inner = self.enclosing.iter().rev().find(|name| *name != "format!");
                inner.is_some_and(|name| names.contains(&name.as_str())) || self.is_within(names)
            })
            || DESCRIPTIONS.lines().any(|line| line == self.text)
    }
}

struct Page {
    /// What it quotes, with `…` for what differs.
    quotes: Vec<String>,
    headings: Vec<String>,
    text: String,
}

impl Page {
    fn read() -> Self {
        let text = fs::read_to_string(root().join("docs/errors.md")).unwrap();
        let quotes = text.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        let headings =
            text.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_owned).collect();
        Self { quotes, headings, text }
    }
}

/// Whether a text is what is quoted: the parts between the quote's `…` are in it, in that order. A
/// quote of a few letters, which many texts have, is a whole text.
fn is_in(quote: &str, text: &str) -> bool {
    if quote.chars().filter(|it| it.is_alphanumeric()).count() < 8 {
        return quote == text;
    }
    let mut rest = text;
    quote.split('…').map(str::trim).filter(|part| !part.is_empty()).all(|part| {
        let found = rest.find(part);
        found.map(|at| rest = &rest[at + part.len()..]).is_some()
    })
}

fn sources() -> Vec<PathBuf> {
    let mut open: Vec<PathBuf> = SOURCES.iter().map(|folder| root().join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if FOR_TESTS.iter().any(|name| path.ends_with(name)) {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 100, "the sources are where this test looks");
    found
}

#[derive(Debug, PartialEq)]
enum Token {
    Word(String),
    Sign(char),
    Text(String),
}

/// A source's tokens, each with its line; comments, characters and numbers do not matter.
struct Tokens<'a> {
    rest: &'a str,
    line: usize,
}

impl Tokens<'_> {
    fn take(&mut self, bytes: usize) {
        self.line += self.rest[..bytes].matches('\n').count();
        self.rest = &self.rest[bytes..];
    }

    /// The text of a string literal whose first quote was taken.
    fn text(&mut self) -> String {
        let mut text = String::new();
        loop {
            let at = self.rest.find(['"', '\\']).expect("literals end");
            text += &self.rest[..at];
            let escaped = self.rest[at + 1..].chars().next();
            if self.rest[at..].starts_with('"') {
                self.take(at + 1);
                return text;
            }
            self.take(at + 1 + escaped.map_or(0, char::len_utf8));
            match escaped {
                Some('\n') => self.take(self.rest.len() - self.rest.trim_start().len()),
                Some('n') => text.push(' '),
                other => text.extend(other),
            }
        }
    }
}

impl Iterator for Tokens<'_> {
    type Item = (usize, Token);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.take(self.rest.len() - self.rest.trim_start().len());
            let line = self.line;
            let first = self.rest.chars().next()?;
            let word = self.rest.find(|it: char| !it.is_alphanumeric() && it != '_').unwrap_or(0);
            if self.rest.starts_with("//") {
                self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
            } else if first == '"' {
                self.take(1);
                return Some((line, Token::Text(self.text())));
            } else if let Some((text, length)) = raw_string(self.rest) {
                self.take(length);
                return Some((line, Token::Text(text)));
            } else if let Some(character) = self.rest.strip_prefix('\'') {
                // A character, or the name of a lifetime.
                let escaped = usize::from(character.starts_with('\\'));
                let inner: usize = character.chars().take(1 + escaped).map(char::len_utf8).sum();
                let length = character[inner..].find('\'').unwrap_or(usize::MAX);
                let is_character = length == 0 || escaped == 1;
                self.take(if is_character { 1 + inner + length + 1 } else { 1 });
            } else if word > 0 {
                let found = self.rest[..word].to_owned();
                self.take(word);
                return Some((line, Token::Word(found)));
            } else {
                self.take(first.len_utf8());
                return Some((line, Token::Sign(first)));
            }
        }
    }
}

/// The text and the length of a raw string literal that the source begins with.
fn raw_string(source: &str) -> Option<(String, usize)> {
    let rest = source.strip_prefix('b').unwrap_or(source).strip_prefix('r')?;
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    let inside = rest[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&end).expect("literals end");
    let before = source.len() - inside.len();
    Some((inside[..length].to_owned(), before + length + end.len()))
}

/// A format string with `…` for each placeholder.
fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '{' | '}' if characters.next_if_eq(&character).is_some() => out.push(character),
            '{' => {
                characters.by_ref().take_while(|inner| *inner != '}').for_each(drop);
                out.push('…');
            }
            other => out.push(other),
        }
    }
    out
}

/// The string literals of a source, without those in `#[cfg(test)]` items.
fn literals(name: &str, source: &str) -> Vec<Literal> {
    let tokens: Vec<_> = Tokens { rest: source, line: 1 }.collect();
    let mut found = Vec::new();
    let mut open: Vec<String> = Vec::new();
    let mut test_depth = None;
    for (at, (line, token)) in tokens.iter().enumerate() {
        match token {
            Token::Sign('(' | '[' | '{') => open.push(opener(&tokens[..at])),
            Token::Sign(end @ (')' | ']' | '}')) => {
                open.pop();
                if *end == '}' && test_depth.is_some_and(|depth| open.len() <= depth) {
                    test_depth = None;
                }
            }
            // Within `#[cfg(`: two brackets are open.
            Token::Word(word) if word == "test" && open.last().is_some_and(|it| it == "cfg") => {
                test_depth = Some(open.len() - 2);
            }
            Token::Text(text) if test_depth.is_none() => {
                let mut enclosing = open.clone();
                if let [.., (_, Token::Word(attribute)), (_, Token::Sign('='))] = &tokens[..at] {
                    enclosing.push(attribute.clone());
                }
                let place = format!("{name}:{line}");
                found.push(Literal { place, text: plain(text), enclosing });
            }
            _ => {}
        }
    }
    found
}

/// What is called, or which macro is used, where a bracket opens after these tokens.
fn opener(before: &[(usize, Token)]) -> String {
    match before {
        [.., (_, Token::Word(word)), (_, Token::Sign('!'))] => format!("{word}!"),
        [.., (_, Token::Word(word))] => word.clone(),
        _ => String::new(),
    }
}

fn all_literals() -> Vec<Literal> {
    let of_file = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        literals(&name, &fs::read_to_string(&path).unwrap())
    };
    sources().into_iter().flat_map(of_file).collect()
}

fn complain(what: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{what}:\n{}", faults.join("\n"));
}

#[test]
fn every_error_text_is_explained_or_says_what_to_do() {
    let page = Page::read();
    let told: Vec<Literal> = all_literals().into_iter().filter(Literal::is_told).collect();
    assert!(told.len() > 400, "only {} texts were found", told.len());
    let faults: Vec<String> = told
        .iter()
        .filter(|literal| !literal.is_explained(&page))
        .map(|literal| format!("{}: {}", literal.place, literal.text))
        .collect();
    complain("docs/errors.md has no entry for", &faults);
}

#[test]
fn what_the_page_quotes_can_still_be_said() {
    let page = Page::read();
    let literals = all_literals();
    assert!(page.quotes.len() > 200, "the page quotes texts");
    let is_said = |quote: &String| literals.iter().any(|literal| is_in(quote, &literal.text));
    let stale: Vec<String> = page.quotes.iter().filter(|quote| !is_said(quote)).cloned().collect();
    complain("docs/errors.md quotes what no source says", &stale);
    let dead = DESCRIPTIONS.lines().filter(|line| literals.iter().all(|it| it.text != *line));
    complain(
        "descriptions.txt has what no source says",
        &dead.map(str::to_owned).collect::<Vec<_>>(),
    );
}

#[test]
fn the_page_has_the_sections_and_variables_that_it_refers_to() {
    let page = Page::read();
    for (_, section) in CLASSES {
        assert!(page.headings.iter().any(|heading| heading == section), "no section {section}");
    }
    // Variables, and the constants of the C interface.
    let pages = ["docs/configuration.md", "bindings/c/include/unisum.h"];
    let known = pages.map(|page| fs::read_to_string(root().join(page)).unwrap()).concat();
    let is_name = |it: char| it.is_ascii_uppercase() || it == '_';
    let names: BTreeSet<&str> =
        page.text.split(|it| !is_name(it)).filter(|word| word.starts_with("UNISUM_")).collect();
    let unknown = names.into_iter().filter(|name| !name.ends_with('_') && !known.contains(name));
    complain("docs/errors.md names", &unknown.map(str::to_owned).collect::<Vec<_>>());
}

#[test]
fn texts_are_found_where_they_are() {
    let source = r##"
        // "a comment's text"
        #[error("no way to {0} at all")]
        fn one<'a>(it: &'a str) { os("making \"it\" \
            work", '"'); Err(format!("{{}} {it:?} is bad")) }
        #[cfg(test)]
        mod tests { fn two() { fail("not this one") } }
        const LAST: &str = "the last one"; const RAW: &str = r#"with one " in it"#;
    "##;
    let found: Vec<_> = literals("x.rs", source)
        .into_iter()
        .map(|literal| (literal.place, literal.text, literal.enclosing.join(" ")))
        .collect();
    let expected = [
        ("x.rs:3", "no way to … at all", " error"),
        ("x.rs:4", "making \"it\" work", " os"),
        ("x.rs:5", "{} … is bad", " Err format!"),
        ("x.rs:8", "the last one", "str"),
        ("x.rs:8", "with one \" in it", "str"),
    ];
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for ((place, text, enclosing), (at, says, within)) in found.iter().zip(expected) {
        assert_eq!((&place[..], &text[..]), (at, says));
        assert_eq!(enclosing.trim(), within.trim(), "{place}");
    }
    assert!(is_in("… of a line … is", "the end of a line that is near"));
    assert!(!is_in("the line … the end", "the end of the line"));
    assert!(is_in("no text", "no text") && !is_in("no text", "there is no text"));
}
