//! Which build of unisum this is.

use unisum_link::handshake::Build;

/// This build, as ranks tell each other: ranks of different builds are refused, since any change of
/// the sources may change a plan or a message.
pub(crate) const BUILD: Build = Build {
    version: [
        number(env!("CARGO_PKG_VERSION_MAJOR"), 10) as u16,
        number(env!("CARGO_PKG_VERSION_MINOR"), 10) as u16,
        number(env!("CARGO_PKG_VERSION_PATCH"), 10) as u16,
    ],
    sources: number(env!("SOURCES_OF_UNISUM"), 16),
};

/// Whether the compiler was told not to optimise this crate, as in a dependant's debug build.
pub(crate) const IS_UNOPTIMISED: bool = matches!(env!("OPT_LEVEL_OF_UNISUM").as_bytes(), b"0");

const fn number(text: &str, radix: u32) -> u64 {
    match u64::from_str_radix(text, radix) {
        Ok(number) => number,
        Err(_) => panic!("cargo and build.rs write numbers"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_build_is_told_by_version_and_sources() {
        assert!(BUILD.to_string().starts_with(concat!(env!("CARGO_PKG_VERSION"), " (sources ")));
    }

    /// A crate that is added is not forgotten.
    #[test]
    fn the_sources_of_all_crates_below_this_one_count() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = include_str!("../build.rs");
        let transports = fs::read_dir(root.join("transports")).unwrap();
        let transports = transports.map(|it| it.unwrap().file_name().into_string().unwrap());
        let folders = transports.map(|name| format!("\"transports/{name}/src\""));
        let others = ["src", "algorithms/src", "kernels/src", "engine/src", "control/src"];
        for folder in folders.chain(others.map(|folder| format!("\"{folder}\""))) {
            assert!(script.contains(&folder), "{folder}");
        }
    }
}
