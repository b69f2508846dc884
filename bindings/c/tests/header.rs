//! `include/unisum.h` says what the library has: it is made of the source.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

use std::fs;
use std::path::Path;

use cbindgen::{Builder, Config, EnumConfig, ExportConfig, Language, Style};

/// In the order in which a reader wants them. Not `lib`: its modules would be declared again.
const SOURCES: [&str; 20] = [
    "status",
    "types",
    "config",
    "communicator",
    "observing",
    "reduction",
    "collective",
    "simple",
    "work",
    "messenger",
    "buckets",
    "checkpoint",
    "sharded",
    "shard_state",
    "elastic",
    "scaler",
    "device",
    "device_buckets",
    "memory",
    "version",
];

/// Enumerations whose constants C gives as numbers.
const NUMBERS: [&str; 6] = [
    "unisum_dtype",
    "unisum_op",
    "unisum_kind",
    "unisum_flags",
    "unisum_direction",
    "unisum_bucket_flags",
];

const INTRODUCTION: &str = "\
/* The C interface of unisum: collective communication between processes.
 *
 * Every function returns a status; unisum_last_error tells more of a failure. Pointers to
 * structures without a definition are handles: a handle that is NULL, was freed, or is of another
 * kind is refused. All functions may be called from several threads at once, and on the same
 * handles.
 *
 * This file is made of the library's source:
 * UNISUM_BLESS=1 cargo test -p unisum-c --test header */";

const DEFINITIONS: &str = "
/* Given as an input: the output is the input, too. */
#define UNISUM_IN_PLACE ((const void *)1)
";

fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let enumeration = EnumConfig { prefix_with_name: false, ..EnumConfig::default() };
    let named = NUMBERS.map(str::to_owned).to_vec();
    let export = ExportConfig { include: named, ..ExportConfig::default() };
    let config = Config {
        language: Language::C,
        cpp_compat: true,
        style: Style::Both,
        header: Some(INTRODUCTION.into()),
        include_guard: Some("UNISUM_H".into()),
        no_includes: true,
        sys_includes: vec!["stdbool.h".into(), "stddef.h".into(), "stdint.h".into()],
        after_includes: Some(DEFINITIONS.into()),
        usize_is_size_t: true,
        line_length: 100,
        tab_width: 4,
        enumeration,
        export,
        ..Config::default()
    };
    let source = |name: &str| root.join(format!("src/{name}.rs"));
    let mut builder = Builder::new().with_config(config);
    for name in SOURCES {
        builder = builder.with_src(source(name));
    }
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn the_header_is_made_of_the_source() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/unisum.h");
    let generated = generated();
    if std::env::var_os("UNISUM_BLESS").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    let differs =
        generated.lines().zip(checked_in.lines()).position(|(ours, theirs)| ours != theirs);
    assert!(
        generated == checked_in,
        "the header differs from the source, first in line {:?}: \
         UNISUM_BLESS=1 cargo test -p unisum-c --test header",
        differs.map(|line| line + 1)
    );
}

/// A module that is forgotten here would be missing from the header.
#[test]
fn every_module_with_functions_is_a_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let paths = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let has_functions = |path: &Path| fs::read_to_string(path).unwrap().contains("no_mangle");
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let files = paths.filter(|path| path.is_file() && has_functions(path));
    let modules: Vec<_> = files.map(|path| name(&path)).collect();
    assert!(modules.len() > 10, "{modules:?}");
    let missing: Vec<_> = modules.iter().filter(|it| !SOURCES.contains(&it.as_str())).collect();
    assert!(missing.is_empty(), "not in SOURCES: {missing:?}");
}

/// Compilers take a second declaration, and readers wonder.
#[test]
fn nothing_is_declared_twice() {
    let text = generated();
    let declared = text.lines().filter_map(|line| {
        let is_code = line.starts_with(|first: char| first.is_ascii_alphabetic());
        let name = line.split_once('(')?.0.rsplit([' ', '*']).next()?;
        (is_code && name.starts_with("unisum_")).then_some(name)
    });
    let mut declared: Vec<_> = declared.collect();
    assert!(declared.len() > 50, "{declared:?}");
    declared.sort_unstable();
    let twice: Vec<_> = declared.windows(2).filter(|it| it[0] == it[1]).collect();
    assert!(twice.is_empty(), "declared more than once: {twice:?}");
}

/// The list by which the linker gives functions their version, and hides the rest.
#[test]
fn every_function_of_the_header_has_a_version_and_nothing_else_has() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = fs::read_to_string(root.join("unisum.map")).unwrap();
    let is_name = |word: &&str| {
        let is_plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        word.starts_with("unisum_") && is_plain
    };
    let mut versioned: Vec<_> = map.split([';', ' ', '\n']).filter(is_name).collect();
    let text = generated();
    let declared = text.split(['(', ' ', '*', '\n']).filter(is_name);
    let declared = declared.filter(|name| text.contains(&format!("{name}(")));
    let mut declared: Vec<_> = declared.collect();
    versioned.sort_unstable();
    declared.sort_unstable();
    declared.dedup();
    assert!(declared.len() > 50, "{declared:?}");
    assert_eq!(versioned, declared);
}
