//! What the user's files say: certificates, keys and lists of peers, or why they can't be used.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Once;

use rustls::Error;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// What a file has at most: bundles of all CAs that browsers know have 0.3 MB.
const BYTES_MAX: u64 = 4 << 20;

/// Some editors write it in front of UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Why certificates can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {why}", path.display())]
pub struct CertificateError {
    /// What the file should be.
    what: &'static str,
    path: PathBuf,
    why: String,
}

impl CertificateError {
    pub(super) fn new(what: &'static str, path: &Path, why: impl Into<String>) -> Self {
        Self { what, path: path.to_owned(), why: why.into() }
    }
}

/// What a file says. Waits for nobody.
pub(super) fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, CertificateError> {
    read_regular(path).map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "no such file".into(),
            _ => error.to_string(),
        };
        CertificateError::new(what, path, why)
    })
}

fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    // NONBLOCK: a pipe in place of the file must not stop the program before it is refused.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(invalid("it is not a regular file"));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(about.len().min(BYTES_MAX)).unwrap_or(0));
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(invalid("it has more than 4 MiB"));
    }
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(bytes)
}

/// Says, once in a process, that anybody on the host may read a key, if so.
pub(super) fn warn_of_access(key: &Path) {
    static ONCE: Once = Once::new();
    let Ok(about) = std::fs::metadata(key) else { return };
    let mode = about.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        ONCE.call_once(|| {
            crate::warning!(
                "all users who reach the key {} may read it (mode {mode:04o}): `chmod o= ` it",
                key.display()
            );
        });
    }
}

pub(super) fn certificates(
    what: &'static str,
    path: &Path,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let read: Result<_, pem::Error> = CertificateDer::pem_slice_iter(text).collect();
    let read: Vec<_> = read.map_err(|error| of_pem(what, path, &error))?;
    match read.is_empty() {
        true => Err(of_pem(what, path, &pem::Error::NoItemsFound)),
        false => Ok(read),
    }
}

/// A rank's own certificate and its key.
pub(super) fn certified_key(
    (certificate, text): (&Path, &[u8]),
    (key, secret): (&Path, &[u8]),
    provider: &CryptoProvider,
) -> Result<CertifiedKey, CertificateError> {
    let chain = certificates("certificate", certificate, text)?;
    let refused = |why: String| CertificateError::new("key", key, why);
    let is_encrypted = |mark: &[u8]| secret.windows(mark.len()).any(|it| it == mark);
    if is_encrypted(b"BEGIN ENCRYPTED PRIVATE KEY") || is_encrypted(b"Proc-Type: 4,ENCRYPTED") {
        return Err(refused(
            "it is encrypted, and nobody is asked for its password: `openssl pkey -in KEY -out \
             PLAIN` decrypts it"
                .into(),
        ));
    }
    let secret =
        PrivateKeyDer::from_pem_slice(secret).map_err(|error| of_pem("key", key, &error))?;
    let usable = provider.key_provider.load_private_key(secret).map_err(|_| {
        refused(
            "its kind is not supported, or it is damaged: ECDSA with P-256, P-384 or P-521, \
             Ed25519, and RSA of 2048 to 8192 bits are"
                .into(),
        )
    })?;
    let both = CertifiedKey::new(chain, usable);
    match both.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(both),
        Err(Error::InconsistentKeys(_)) => {
            let certificate = certificate.display();
            Err(refused(format!("it does not go with {certificate}: that is of another key")))
        }
        Err(error) => {
            let why = format!("it is no certificate that can be read: {error}");
            Err(CertificateError::new("certificate", certificate, why))
        }
    }
}

fn of_pem(what: &'static str, path: &Path, error: &pem::Error) -> CertificateError {
    let why = match error {
        pem::Error::NoItemsFound => "none is in it (PEM is expected)".to_owned(),
        pem::Error::MissingSectionEnd { end_marker } => {
            let marker = String::from_utf8_lossy(end_marker);
            format!("it is cut off: `-----END {}-----` is missing", marker.escape_debug())
        }
        pem::Error::IllegalSectionStart { line } => {
            let line = String::from_utf8_lossy(line);
            format!("no PEM begins with the line `{:.100}`", line.escape_debug().to_string())
        }
        pem::Error::Base64Decode(_) => "its PEM is damaged: it is not base64".to_owned(),
        error => error.to_string().escape_debug().to_string(),
    };
    CertificateError::new(what, path, why)
}

/// The text of a file of peers, if all that is in it may be a name.
pub(super) fn unlisted(path: &Path, bytes: Vec<u8>) -> Result<String, CertificateError> {
    let refused = |why: String| CertificateError::new("list of peers", path, why);
    let text = String::from_utf8(bytes).map_err(|_| refused("it is not UTF-8".into()))?;
    let is_odd = |it: char| it.is_whitespace() || it.is_control();
    match listed(&text).iter().find(|name| name.contains(is_odd)) {
        Some(name) => {
            let name = name.escape_debug().to_string();
            Err(refused(format!("`{name:.100}` is no name: one is expected on each line")))
        }
        None => Ok(text),
    }
}

/// The names in a file of peers: on its lines, or with commas between them, as in the variable.
/// What begins with `#` is none.
pub(super) fn listed(peers: &str) -> Vec<String> {
    let is_comment = |text: &&str| text.starts_with('#');
    let lines = peers.lines().map(str::trim).filter(|line| !is_comment(line));
    let names = lines.flat_map(|line| line.split(',')).map(str::trim);
    names.filter(|name| !name.is_empty() && !is_comment(name)).map(str::to_owned).collect()
}
