//! The job token: the secret every connection of a job must prove to know.
//!
//! Like Erlang's cookie or X's authority file, one file per user serves all jobs of that user, on
//! one host or on a shared home, without any set-up.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::local::check_private;
use crate::environment::Environment;

/// The job token. `Debug` shows where it came from, never what it is.
#[derive(Clone)]
pub struct Token {
    secret: Zeroizing<String>,
    origin: String,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The token is too short to be a secret, or so long that it must be something else.
    #[error("the token from {origin} has {length} bytes: expected {MIN_BYTES} to {MAX_BYTES}")]
    Length {
        /// The variable or file it came from.
        origin: String,
        /// Its length without white space at the ends.
        length: usize,
    },
    /// The token is not text: it may have been any of many others.
    #[error("the token from {origin} is not UTF-8: `openssl rand -hex 16` gives one that is")]
    NotText {
        /// The variable it came from.
        origin: String,
    },
    /// No token is given and there is no home directory to keep one in.
    #[error("no home directory for the token file (HOME is not set): set UNISUM_TOKEN")]
    NoHome,
    /// The token file cannot be made, read or trusted.
    #[error("{action} token file {}: {error} (or set UNISUM_TOKEN)", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The token file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        error: io::Error,
    },
}

impl Token {
    /// The token in `UNISUM_TOKEN`, else in the file `UNISUM_TOKEN_FILE`, else in the user's own
    /// file `unisum/token` under `XDG_CONFIG_HOME` or `~/.config`, which the first process to ask
    /// creates.
    ///
    /// Any number of processes may ask at once: all get the same token. Waits for nobody.
    ///
    /// # Errors
    /// [`TokenError`] if the token is too short, or the file cannot be made or read, belongs to
    /// another user or gives other users access.
    pub fn from_environment(environment: &Environment) -> Result<Self, TokenError> {
        if let Some(token) = environment.get("UNISUM_TOKEN") {
            let origin = "UNISUM_TOKEN".to_owned();
            // Where bytes were no text, they are replaced, all by the same.
            if token.contains(char::REPLACEMENT_CHARACTER) {
                return Err(TokenError::NotText { origin });
            }
            return Self::new(token, origin);
        }
        if let Some(path) = environment.get("UNISUM_TOKEN_FILE") {
            return Self::from_file(Path::new(path));
        }
        let path = own_path(environment)?;
        match Self::from_file(&path) {
            Err(TokenError::File { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            answer => return answer,
        }
        if let Err(error) = create(&path) {
            return Err(TokenError::File { action: "create", path, error });
        }
        Self::from_file(&path)
    }

    /// A token that was never used before.
    ///
    /// # Errors
    /// If the system gives no random bytes.
    pub fn fresh() -> io::Result<Self> {
        Ok(Self {
            secret: Zeroizing::new(random_hex::<32>()?),
            origin: "the program's store".to_owned(),
        })
    }

    /// A token that rank 0 told.
    ///
    /// # Errors
    /// [`TokenError::Length`] if it is too short or too long.
    pub fn told(secret: &str) -> Result<Self, TokenError> {
        Self::new(secret, "the program's store".to_owned())
    }

    /// Whether the environment gives a token, so that none is to be made.
    pub fn is_given(environment: &Environment) -> bool {
        let given = |name| environment.get(name).is_some();
        given("UNISUM_TOKEN") || given("UNISUM_TOKEN_FILE")
    }

    /// The token in words, for others to be told.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The secret's bytes, for the proof a connection gives. Never log them.
    pub fn as_bytes(&self) -> &[u8] {
        self.secret.as_bytes()
    }

    /// The variable or file the token came from, for logs and for errors when two ranks disagree.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    fn new(text: &str, origin: String) -> Result<Self, TokenError> {
        let secret = text.trim();
        if !(MIN_BYTES..=MAX_BYTES).contains(&secret.len()) {
            return Err(TokenError::Length { origin, length: secret.len() });
        }
        let bits = bits_at_most(secret);
        if bits >= MIN_BITS {
            return Ok(Self { secret: Zeroizing::new(secret.to_owned()), origin });
        }
        unisum_link::warning!(
            "the token from {origin} has at most {bits} bits, which is few: all ranks make it \
             dearer to guess, but `openssl rand -hex 16` gives one that nobody can guess"
        );
        Ok(Self { secret: stretched(secret), origin })
    }

    fn from_file(path: &Path) -> Result<Self, TokenError> {
        let failed = |error| TokenError::File { action: "read", path: path.to_owned(), error };
        let text = Zeroizing::new(read_private(path).map_err(failed)?);
        Self::new(&text, path.display().to_string())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("origin", &self.origin).finish_non_exhaustive()
    }
}

/// How many bits a text has at most: if each character was drawn from all of the kinds that occur
/// in it. Words have fewer, which can't be told from the text.
fn bits_at_most(text: &str) -> usize {
    type Kind = (fn(char) -> bool, f64);
    let kinds: [Kind; 6] = [
        (|it| it.is_ascii_digit(), 10.0),
        (|it| matches!(it, 'a'..='f'), 6.0),
        (|it| matches!(it, 'g'..='z'), 20.0),
        (|it| it.is_ascii_uppercase(), 26.0),
        (|it| it == ' ' || it.is_ascii_punctuation(), 33.0),
        (|it| !it.is_ascii() || it.is_ascii_control(), 128.0),
    ];
    let occur = kinds.iter().filter(|(is_one, _)| text.chars().any(is_one));
    let alphabet: f64 = occur.map(|(_, characters)| characters).sum();
    (text.chars().count() as f64 * alphabet.max(1.0).log2()) as usize
}

/// What is used in the place of a token that could be guessed: each guess costs as much as this.
fn stretched(secret: &str) -> Zeroizing<String> {
    let mut key = Zeroizing::new([0_u8; 32]);
    pbkdf2::pbkdf2_hmac::<sha2::Sha256>(secret.as_bytes(), SALT, ROUNDS, &mut *key);
    Zeroizing::new(key.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn own_path(environment: &Environment) -> Result<PathBuf, TokenError> {
    Ok(own_directory(environment).ok_or(TokenError::NoHome)?.join("token"))
}

/// Where the user's files are, which need not exist yet; `None` without a home.
pub(super) fn own_directory(environment: &Environment) -> Option<PathBuf> {
    let absolute =
        |name| environment.get(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(config.join("unisum"))
}

/// Makes the directory that [`own_directory`] names.
pub(super) fn make_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn read_private(path: &Path) -> io::Result<String> {
    // NONBLOCK: a pipe in place of the file must not stop the program before it is refused.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    check_private(&metadata)?;
    let mut text = String::new();
    // One byte more than allowed shows that there is more.
    file.take(MAX_BYTES as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// Makes the token file, or leaves the one that another process made first.
///
/// The file appears under its name whole or not at all: it is written and synced under another
/// name, and the name is then given to it only if it is free.
fn create(path: &Path) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_directory(directory)?;
    let draft = directory.join(format!(".token-{}", random_hex::<8>()?));
    let published = write_draft(&draft).and_then(|()| publish(&draft, path));
    // Already gone if it was renamed; a leftover is private and harmless.
    let _ = fs::remove_file(&draft);
    published
}

fn write_draft(draft: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(draft)?;
    fill(&mut file)
}

fn fill(file: &mut File) -> io::Result<()> {
    file.write_all(format!("{}\n", random_hex::<32>()?).as_bytes())?;
    file.sync_all()
}

fn publish(draft: &Path, path: &Path) -> io::Result<()> {
    let linked = rustix::fs::link(draft, path);
    let named = match linked {
        // File systems without hard links (some FUSE, exFAT).
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
            rustix::fs::renameat_with(CWD, draft, CWD, path, RenameFlags::NOREPLACE)
        }
        answer => answer,
    };
    match named {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn random_hex<const N: usize>() -> io::Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

const MIN_BYTES: usize = 16;
/// What nobody can try through (NIST SP 800-57, part 1).
const MIN_BITS: usize = 128;
const MAX_BYTES: usize = 4096;
/// All ranks have to come to the same bytes, so that a salt of their own is not to be had.
const SALT: &[u8] = b"unisum token";
/// Some 20 ms of a core, once a start.
const ROUNDS: u32 = 100_000;

#[cfg(test)]
mod tests {
    use super::super::tests::Scratch;
    use super::*;
    use std::collections::BTreeSet;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::process::{Command, Stdio};

    fn at_home(home: &Path) -> Environment {
        Environment::from_iter([("HOME", home.to_str().unwrap())])
    }

    fn with_file(path: &Path) -> Environment {
        Environment::from_iter([("UNISUM_TOKEN_FILE", path.to_str().unwrap())])
    }

    fn write_with_mode(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Each of its bytes would be taken for the same character.
    #[test]
    fn a_variable_that_is_no_text_is_no_token() {
        use std::os::unix::ffi::OsStringExt as _;
        if std::env::var_os("UNISUM_TOKEN").is_some() {
            let error = Token::from_environment(&Environment::from_process()).unwrap_err();
            assert!(error.to_string().contains("UNISUM_TOKEN is not UTF-8"), "{error}");
            return;
        }
        let name = "launcher::token::tests::a_variable_that_is_no_text_is_no_token";
        for bytes in
            [vec![0xff; 32], [&[b'a'; 31][..], &[0xe9]].concat(), "\u{fffd}".repeat(16).into()]
        {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name])
                .env("UNISUM_TOKEN", std::ffi::OsString::from_vec(bytes))
                .stdout(Stdio::null())
                .status();
            assert!(status.unwrap().success());
        }
    }

    #[test]
    fn the_variable_comes_first_and_must_be_long_enough() {
        let given = |token: &str| {
            Token::from_environment(&Environment::from_iter([("UNISUM_TOKEN", token)]))
        };
        let hex = "00112233445566778899aabbccddeeff";
        assert_eq!(given(&format!(" {hex}\n")).unwrap().as_bytes(), hex.as_bytes());
        assert!(given("0123456789abcde").unwrap_err().to_string().contains("has 15 bytes"));
        // What could be guessed is stretched, the same on all ranks.
        for weak in ["0123456789abcdef0123", &hex[1..], "0123456789abcdefghijklm"] {
            let token = given(weak).unwrap();
            assert_eq!(token.as_bytes().len(), 64, "{weak}");
            assert_ne!(token.as_bytes(), given(&weak.replace('1', "2")).unwrap().as_bytes());
            assert_eq!(token.as_bytes(), given(&format!("{weak} ")).unwrap().as_bytes());
        }
        assert_eq!(
            given("0123456789abcdefghijklmnop").unwrap().as_bytes(),
            b"0123456789abcdefghijklmnop"
        );
        assert_eq!(given("xB3$xB3$xB3$xB3$xB3$").unwrap().as_bytes(), b"xB3$xB3$xB3$xB3$xB3$");
        assert_eq!(
            given("one long sentence of small words").unwrap().as_bytes(),
            b"one long sentence of small words"
        );
        assert!(given(&"x".repeat(5000)).is_err());
    }

    #[test]
    fn debug_never_shows_the_secret() {
        let token =
            Token::new("0123456789abcdef0123456789abcdef", "UNISUM_TOKEN".to_owned()).unwrap();
        assert_eq!(format!("{token:?}"), r#"Token { origin: "UNISUM_TOKEN", .. }"#);
    }

    #[test]
    fn the_own_file_is_created_once_and_private() {
        let scratch = Scratch::new();
        let token = Token::from_environment(&at_home(scratch.path())).unwrap();
        let again = Token::from_environment(&at_home(scratch.path())).unwrap();
        assert_eq!((token.as_bytes(), token.as_bytes().len()), (again.as_bytes(), 64));
        let file = scratch.path().join(".config/unisum/token");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(token.origin(), file.to_str().unwrap());
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "a draft is left");
    }

    #[test]
    fn threads_that_start_at_once_get_one_token() {
        let scratch = Scratch::new();
        let environment = at_home(scratch.path());
        let start = std::sync::Barrier::new(16);
        let tokens: BTreeSet<_> = std::thread::scope(|scope| {
            let ask = || {
                start.wait();
                Token::from_environment(&environment).unwrap().secret.to_string()
            };
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(tokens.len(), 1);
    }

    /// Run by the next test in processes of their own; alone it has nothing to do.
    #[test]
    fn child_prints_its_token() {
        if std::env::var_os("UNISUM_TEST_TOKEN_CHILD").is_some() {
            let token = Token::from_environment(&Environment::from_process()).unwrap();
            println!("\ntoken {}", *token.secret);
        }
    }

    #[test]
    fn processes_that_start_at_once_get_one_token() {
        let scratch = Scratch::new();
        let (_, module) = module_path!().split_once("::").unwrap();
        let spawn = |_| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "--nocapture", &format!("{module}::child_prints_its_token")]);
            command.env("HOME", scratch.path()).env("UNISUM_TEST_TOKEN_CHILD", "1");
            for name in ["UNISUM_TOKEN", "UNISUM_TOKEN_FILE", "XDG_CONFIG_HOME"] {
                command.env_remove(name);
            }
            command.stdout(Stdio::piped()).spawn().unwrap()
        };
        let children: Vec<_> = (0..8).map(spawn).collect();
        let mut tokens = BTreeSet::new();
        for child in children {
            let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
            let token = output.lines().find_map(|line| line.strip_prefix("token "));
            tokens.insert(token.expect("the child prints its token").to_owned());
        }
        assert_eq!(tokens.len(), 1);
    }

    #[test]
    fn files_others_can_read_are_refused() {
        let scratch = Scratch::new();
        let path = scratch.path().join("token");
        for mode in [0o640, 0o604, 0o620, 0o666] {
            write_with_mode(&path, "0123456789abcdef0123456789abcdef", mode);
            let error = Token::from_environment(&with_file(&path)).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {mode:04o}")), "{error}");
        }
        write_with_mode(&path, "0123456789abcdef0123456789abcdef\n", 0o400);
        assert!(Token::from_environment(&with_file(&path)).is_ok());
    }

    #[test]
    fn what_is_no_token_file_is_refused_without_waiting() {
        let scratch = Scratch::new();
        let pipe = scratch.path().join("pipe");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(CWD, &pipe, kind, Mode::RUSR, 0).unwrap();
        for path in [scratch.path().to_owned(), pipe, scratch.path().join("absent")] {
            let error = Token::from_environment(&with_file(&path)).unwrap_err().to_string();
            assert!(error.starts_with("read token file"), "{error}");
        }
        let empty = scratch.path().join("empty");
        write_with_mode(&empty, "", 0o600);
        assert!(Token::from_environment(&with_file(&empty)).is_err());
    }

    #[test]
    fn homes_that_cannot_keep_a_token_are_clear_errors() {
        assert!(matches!(
            Token::from_environment(&Environment::default()),
            Err(TokenError::NoHome)
        ));
        // Nobody, not even root, can write there.
        let error = Token::from_environment(&at_home(Path::new("/proc"))).unwrap_err().to_string();
        assert!(error.starts_with("create token file /proc/.config"), "{error}");
        assert!(error.contains("set UNISUM_TOKEN"), "{error}");
    }

    #[test]
    fn a_full_disk_is_an_error_and_not_a_short_token() {
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_eq!(fill(&mut full).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_token_made_meanwhile_is_kept() {
        let scratch = Scratch::new();
        let path = scratch.path().join("token");
        write_with_mode(&path, "made by another process, not by this one", 0o600);
        create(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "made by another process, not by this one");
    }
}
