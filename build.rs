//! Gives the crate a fingerprint of the sources, in `SOURCES_OF_UNISUM`, and how far the compiler
//! optimises it, in `OPT_LEVEL_OF_UNISUM`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// What decides how ranks talk and what they plan. Of a published crate only the first is there:
/// the others' versions are then pinned by this one's.
const FOLDERS: [&str; 12] = [
    "src",
    "algorithms/src",
    "kernels/src",
    "engine/src",
    "events/src",
    "control/src",
    "views/src",
    "transports/link/src",
    "transports/shm/src",
    "transports/tcp/src",
    "transports/verbs/src",
    "transports/cuda-ipc/src",
];

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let mut files = Vec::new();
    for folder in FOLDERS.iter().filter(|folder| root.join(folder).is_dir()) {
        println!("cargo::rerun-if-changed={folder}");
        list(&root.join(folder), &mut files)?;
    }
    files.sort();
    let mut hash = Fnv::new();
    for file in files {
        let name = file.strip_prefix(&root).unwrap_or(&file);
        hash.add(name.to_string_lossy().as_bytes());
        hash.add(&fs::read(&file)?);
    }
    println!("cargo::rustc-env=OPT_LEVEL_OF_UNISUM={}", env::var("OPT_LEVEL").unwrap_or_default());
    println!("cargo::rustc-env=SOURCES_OF_UNISUM={:016x}", hash.0);
    Ok(())
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): against mistakes, not against malice.
struct Fnv(u64);

impl Fnv {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
