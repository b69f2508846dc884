//! Meeting on one host: a directory only this user can enter, and a name only this run has.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{LauncherError, token};
use crate::environment::Environment;
use crate::leftovers;

/// The path of the meeting file for `job`, in a private directory that exists when this returns,
/// without what killed jobs left there.
pub(super) fn meeting_file(environment: &Environment, job: &str) -> Result<PathBuf, LauncherError> {
    let directory = directory_for(environment);
    match make_private(&directory) {
        Ok(()) => {
            leftovers::remove(&directory, is_file_name);
            Ok(directory.join(file_name(job)))
        }
        Err(error) => Err(LauncherError::PrivateDirectory { path: directory, error }),
    }
}

/// The path of a meeting file for `job` in a private directory of the user's home, beside the
/// token, for hosts that share it. `None` without a home.
pub(super) fn home_file(
    environment: &Environment,
    job: &str,
) -> Result<Option<PathBuf>, LauncherError> {
    let Some(directory) = token::own_directory(environment) else { return Ok(None) };
    let jobs = directory.join("jobs");
    match token::make_directory(&directory).and_then(|()| make_private(&jobs)) {
        Ok(()) => {
            // Locks may not be seen on other hosts, so that only age tells what was left behind.
            leftovers::remove_old(&jobs, HOME_FILE_AGE, is_file_name);
            Ok(Some(jobs.join(file_name(job))))
        }
        Err(error) => Err(LauncherError::PrivateDirectory { path: jobs, error }),
    }
}

/// Refuses what another user owns or may enter, read or write.
pub(super) fn check_private(metadata: &Metadata) -> io::Result<()> {
    let user = rustix::process::geteuid().as_raw();
    let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if metadata.uid() != user {
        return refused(format!("it belongs to user {}, not to {user}", metadata.uid()));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return refused(format!("mode {mode:04o} gives other users access: chmod go= it"));
    }
    Ok(())
}

/// The process that started the ranks of this host, as `PID-STARTTIME`: the nearest ancestor that
/// was not given `rank_variable`.
///
/// Ranks can have wrapper scripts as parents, one each, so the parent alone would not do. What may
/// not be inspected belongs to another user, so is the launcher.
pub(super) fn launcher_process(rank_variable: &str) -> String {
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let mut ancestor = parent;
    for _ in 0..MAX_GENERATIONS {
        if !was_given(ancestor, rank_variable) {
            break;
        }
        match status(ancestor) {
            Some(Status { parent, .. }) if parent > 0 => ancestor = parent,
            _ => break,
        }
    }
    let started = status(ancestor).map_or(0, |status| status.started);
    format!("{ancestor}-{started}")
}

/// FNV-1a, 64 bits: the same on all ranks, whatever compiler built them. Not for secrets.
///
/// Source: Fowler, Noll, Vo, "The FNV Non-Cryptographic Hash Algorithm" (IETF draft).
pub(super) fn fnv1a(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

fn directory_for(environment: &Environment) -> PathBuf {
    let is_private =
        |path: &Path| fs::metadata(path).is_ok_and(|m| m.is_dir() && check_private(&m).is_ok());
    // Slurm hands on the variable to nodes where the user has no such directory.
    let session = environment.get("XDG_RUNTIME_DIR").map(Path::new);
    match session.filter(|path| path.is_absolute() && is_private(path)) {
        Some(path) => path.join("unisum"),
        None => format!("/tmp/unisum-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Of the link itself: in /tmp anybody may have put one there first.
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a directory"));
    }
    check_private(&metadata)
}

/// A readable, safe and distinct file name for `job`.
fn file_name(job: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }
    };
    let readable: String = job.chars().map(plain).take(MAX_NAME_CHARS).collect();
    format!("{readable}-{:016x}", fnv1a(job))
}

/// Whether a path is that of the meeting file for `job`.
pub(super) fn is_named_after(path: &Path, job: &str) -> bool {
    path.file_name().is_some_and(|name| name == &*file_name(job))
}

/// Whether [`file_name`] made a name, or it is that of the members record beside such a file, or of
/// a draft.
fn is_file_name(name: &str) -> bool {
    let (name, mark) = match name.strip_prefix('.').and_then(|name| name.rsplit_once('.')) {
        Some((name, suffix)) => (name, Some(suffix)),
        None => (name, None),
    };
    let name = name.strip_suffix(".members").unwrap_or(name);
    let hash = name.rsplit_once('-').map(|(_, hash)| hash);
    let is_hex = |it: &str| it.len() == 16 && it.bytes().all(|byte| byte.is_ascii_hexdigit());
    hash.is_some_and(is_hex) && mark.is_none_or(is_hex)
}

struct Status {
    parent: i32,
    /// Clock ticks after boot.
    started: u64,
}

/// Fields 4 and 22 of `/proc/PID/stat` (proc_pid_stat(5)).
fn status(pid: i32) -> Option<Status> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2, the name, may hold blanks and brackets; field 3 comes after its last bracket.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(17)?.parse().ok()?;
    Some(Status { parent, started })
}

/// Whether process `pid` was started with `variable` in its environment.
fn was_given(pid: i32, variable: &str) -> bool {
    let mut bytes = Vec::new();
    let read = File::open(format!("/proc/{pid}/environ"))
        .and_then(|file| file.take(MAX_ENVIRONMENT_BYTES).read_to_end(&mut bytes));
    let named = |entry: &[u8]| {
        entry.strip_prefix(variable.as_bytes()).is_some_and(|rest| rest.starts_with(b"="))
    };
    read.is_ok() && bytes.split(|byte| *byte == 0).any(named)
}

/// Wrappers in wrappers; no real job is deeper.
const MAX_GENERATIONS: usize = 64;
/// A quarter of the default stack limit is what the kernel allows (execve(2)); this is above it.
const MAX_ENVIRONMENT_BYTES: u64 = 8 << 20;
const MAX_NAME_CHARS: usize = 64;
/// No job starts for so long.
const HOME_FILE_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::super::tests::Scratch;
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const RANK: &str = "SOME_LAUNCHERS_RANK";

    fn in_session(path: &Path) -> Environment {
        Environment::from_iter([("XDG_RUNTIME_DIR", path.to_str().unwrap())])
    }

    #[test]
    fn the_directory_is_made_private_and_reused() {
        let scratch = Scratch::new();
        let environment = in_session(scratch.path());
        let first = meeting_file(&environment, "job 1").unwrap();
        assert_eq!(first, meeting_file(&environment, "job 1").unwrap());
        assert_ne!(first, meeting_file(&environment, "job_1").unwrap());
        let mode = fs::metadata(first.parent().unwrap()).unwrap().mode();
        assert_eq!((mode & 0o7777, first.starts_with(scratch.path())), (0o700, true));
    }

    #[test]
    fn hosts_with_a_common_home_meet_in_it_and_only_age_removes_what_is_left() {
        let scratch = Scratch::new();
        let home = Environment::from_iter([("HOME", scratch.path().to_str().unwrap())]);
        let left = home_file(&home, "job 1").unwrap().unwrap();
        assert_eq!(left.parent().unwrap(), scratch.path().join(".config/unisum/jobs"));
        fs::write(&left, "").unwrap();
        let next = home_file(&home, "job 2").unwrap().unwrap();
        assert!(next != left && left.exists(), "it may be another host's");
        let old = std::time::SystemTime::now() - 2 * HOME_FILE_AGE;
        File::options().write(true).open(&left).unwrap().set_modified(old).unwrap();
        fs::write(next.with_file_name("notes"), "").unwrap();
        home_file(&home, "job 2").unwrap();
        assert!(!left.exists() && next.with_file_name("notes").exists());
        assert_eq!(home_file(&Environment::default(), "job").unwrap(), None);
    }

    #[test]
    fn a_directory_others_can_enter_is_refused() {
        let scratch = Scratch::new();
        let directory = scratch.path().join("unisum");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o711)).unwrap();
        let error = meeting_file(&in_session(scratch.path()), "job").unwrap_err().to_string();
        assert!(error.contains("mode 0711") && error.contains("UNISUM_RENDEZVOUS"), "{error}");
    }

    #[test]
    fn a_link_or_a_file_in_place_of_the_directory_is_refused() {
        let scratch = Scratch::new();
        let target = scratch.path().join("target");
        DirBuilder::new().mode(0o700).create(&target).unwrap();
        symlink(&target, scratch.path().join("unisum")).unwrap();
        assert!(meeting_file(&in_session(scratch.path()), "job").is_err());
        let (scratch, file) = (Scratch::new(), "unisum");
        fs::write(scratch.path().join(file), "").unwrap();
        assert!(meeting_file(&in_session(scratch.path()), "job").is_err());
    }

    #[test]
    fn a_session_directory_that_is_not_private_is_not_used() {
        let scratch = Scratch::new();
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for path in [scratch.path(), Path::new("relative"), Path::new("/nonexistent")] {
            assert!(directory_for(&in_session(path)).starts_with("/tmp"), "{path:?}");
        }
    }

    #[test]
    fn only_what_dead_processes_left_is_removed() {
        let scratch = Scratch::new();
        let environment = in_session(scratch.path());
        let meeting = |job| meeting_file(&environment, job).unwrap();
        let [left, living] = ["left", "living"].map(meeting);
        let draft = |path: &Path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            path.with_file_name(format!(".{name}.0123456789abcdef"))
        };
        let others = ["notes", ".notes.0123456789abcdef", "notes-0123456789abcdef"];
        let others = others.map(|name| living.with_file_name(name));
        fs::create_dir(&others[2]).unwrap();
        let [_living, _draft] = [living.clone(), draft(&living)].map(|path| {
            let file = File::create(&path).unwrap();
            leftovers::mark(&file);
            file
        });
        for path in [&left, &draft(&left), &others[0], &others[1]] {
            fs::write(path, "").unwrap();
        }
        // Somebody is about to put a file there, and may not have locked it yet.
        let kept = leftovers::keep(living.parent().unwrap()).unwrap();
        assert!(kept.is_some() && meeting("next") != left && left.exists());
        drop(kept);
        meeting("next");
        assert!(!left.exists() && !draft(&left).exists());
        assert!([&living, &draft(&living)].into_iter().chain(&others).all(|path| path.exists()));
    }

    /// Run by the next test in processes of their own; alone it has nothing to do.
    #[test]
    fn child_prints_its_launcher() {
        if std::env::var_os(RANK).is_some() {
            println!("\nlauncher {}", launcher_process(RANK));
        }
    }

    #[test]
    fn the_launcher_is_found_through_wrapper_scripts() {
        let (_, module) = module_path!().split_once("::").unwrap();
        let name = format!("{module}::child_prints_its_launcher");
        // The command after the program keeps the shells from becoming it.
        let run = r#""$0" "$@"; true"#;
        let wrap = |wrappers: usize| {
            let mut command = std::process::Command::new("sh");
            for _ in 1..wrappers {
                command.args(["-c", run, "sh"]);
            }
            command.args(["-c", run]).arg(std::env::current_exe().unwrap());
            command.args(["--exact", "--nocapture", &name]).env(RANK, "1");
            let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
            let found = output.lines().find_map(|line| line.strip_prefix("launcher "));
            found.expect("the child prints its launcher").to_owned()
        };
        let us = std::process::id();
        let started = status(i32::try_from(us).unwrap()).unwrap().started;
        for wrappers in [1, 3] {
            assert_eq!(wrap(wrappers), format!("{us}-{started}"), "{wrappers} wrappers");
        }
    }

    #[test]
    fn names_are_safe_and_short() {
        let name = file_name(&"../../etc/passwd ä".repeat(50));
        assert!(name.len() < 100 && !name.contains('/') && name.is_ascii(), "{name}");
        assert_eq!(fnv1a("foobar"), 0x8594_4171_f739_67e8);
    }
}
