//! Where the built library is.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What cargo calls the library.
const BUILT: &str = "libcuda_emulator.so";

/// The names under which programs look for the driver.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// The directory that holds the emulator under the names `libcuda.so.1` and `libcuda.so`: for
/// `LD_LIBRARY_PATH` of a process that is to use it.
///
/// Cargo has built the library if this function can be called: they are one crate, which a test
/// names under `[dev-dependencies]`. The directory is in cargo's target directory; the names in it
/// are links, so that they always lead to the library that was built last.
///
/// # Panics
///
/// Panics if the library is not where cargo places it.
#[must_use]
pub fn library_dir() -> PathBuf {
    let built = built();
    let folder = Path::new(env!("OUT_DIR")).join("driver");
    std::fs::create_dir_all(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for name in NAMES {
        link(&built, &folder.join(name));
    }
    folder
}

/// The library: in the directory for dependencies, which the build script's output is beside, or
/// beside the running program.
fn built() -> PathBuf {
    let beside_output = Path::new(env!("OUT_DIR")).ancestors().nth(3);
    let program = std::env::current_exe().ok();
    let beside_program = program.iter().flat_map(|path| path.ancestors().skip(1).take(2));
    let folders = beside_output.into_iter().chain(beside_program);
    let mut candidates = folders.flat_map(|folder| [folder.join("deps"), folder.to_path_buf()]);
    let found = candidates.find_map(|folder| Some(folder.join(BUILT)).filter(|path| path.exists()));
    found.unwrap_or_else(|| {
        panic!("{BUILT} is neither near {} nor near the program", env!("OUT_DIR"))
    })
}

/// Makes `path` lead to the library, also if other processes and threads do the same now.
fn link(built: &Path, path: &Path) {
    if std::fs::read_link(path).is_ok_and(|target| target == built) {
        return;
    }
    static LINKS: AtomicU64 = AtomicU64::new(0);
    // Relaxed: only the number counts, which no other link of this process has.
    let number = LINKS.fetch_add(1, Ordering::Relaxed);
    let new = path.with_extension(format!("new-{}-{number}", std::process::id()));
    let linked = match symlink(built, &new) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    linked
        .and_then(|()| std::fs::rename(&new, path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
