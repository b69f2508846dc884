//! What is wrong with a certificate, in words, and whom it names.

use std::cell::RefCell;

use rustls::pki_types::CertificateDer;
use rustls::{Error, OtherError};

/// Most characters of the names in a certificate that are told: anybody can write one.
const NAMES_CHARS_MAX: usize = 120;

/// Whom a certificate names, for people; none if that is nobody who counts.
pub(super) fn names_in(certificate: &CertificateDer<'_>) -> Option<String> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    let names = parsed.valid_dns_names().chain(parsed.valid_uri_names());
    // They are somebody else's words, on their way to a terminal.
    let names: Vec<String> = names.map(|it| it.escape_debug().to_string()).collect();
    let is_nobody = names.is_empty();
    (!is_nobody).then(|| names.join(", ").chars().take(NAMES_CHARS_MAX).collect())
}

thread_local! {
    /// Whom the certificate names that this thread has looked at last: rustls says why a
    /// certificate is refused, and not which.
    static SEEN: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps whom a certificate names until [`why`] is asked on this thread.
pub(super) fn see(certificate: &CertificateDer<'_>) {
    SEEN.set(names_in(certificate));
}

/// For which use a certificate is.
const USES: &str = "ranks need one for `server auth` and `client auth` that is no CA's and that a \
                    CA has signed";

/// What was wrong with the other end's certificate, or with this one's, which names `own`, in
/// words. On the thread that looked at the certificate.
pub(super) fn why(error: &Error, own: Option<&str>) -> String {
    let said = fault_of(error);
    let named = match error {
        Error::InvalidCertificate(rustls::CertificateError::Other(_)) => None,
        Error::InvalidCertificate(_) => SEEN.take(),
        Error::AlertReceived(_) if is_own(error) => own.map(str::to_owned),
        _ => None,
    };
    match named {
        Some(names) => format!("{said} (it names {names})"),
        None => said,
    }
}

/// Whether an error says that the other end does not accept this one's certificate.
pub(super) const fn is_own(error: &Error) -> bool {
    use rustls::AlertDescription as Alert;
    matches!(
        error,
        Error::AlertReceived(
            Alert::CertificateExpired
                | Alert::UnknownCA
                | Alert::DecryptError
                | Alert::CertificateUnknown
                | Alert::UnsupportedCertificate
                | Alert::CertificateRequired
        )
    )
}

/// What the two differ in where one has certificates and the other has not.
const DIFFERS: &str = "they do not speak the same TLS: UNISUM_TLS must be the same on all ranks";

fn fault_of(error: &Error) -> String {
    use rustls::AlertDescription as Alert;
    use rustls::CertificateError as Fault;
    match error {
        Error::InvalidCertificate(fault) => match fault {
            Fault::Expired | Fault::ExpiredContext { .. } => "its certificate has expired".into(),
            Fault::NotValidYet | Fault::NotValidYetContext { .. } => {
                "its certificate is not valid yet".into()
            }
            Fault::UnknownIssuer | Fault::BadSignature => {
                "its certificate is not signed by a CA of UNISUM_TLS_CA".into()
            }
            Fault::InvalidPurpose | Fault::InvalidPurposeContext { .. } => {
                format!("its certificate is not for this use: {USES}")
            }
            Fault::Other(OtherError(why)) => why.to_string(),
            fault => format!("its certificate: {fault}"),
        },
        Error::NoCertificatesPresented => "it has no certificate".into(),
        Error::PeerIncompatible(_) => DIFFERS.into(),
        Error::AlertReceived(alert) => match alert {
            Alert::CertificateExpired => {
                "it says that this rank's certificate has expired, or is not valid yet".into()
            }
            Alert::UnknownCA | Alert::DecryptError => {
                "it says that this rank's certificate is not signed by a CA that it knows".into()
            }
            Alert::CertificateUnknown => {
                "it does not accept the names in this rank's certificate (UNISUM_TLS_PEERS there)"
                    .into()
            }
            Alert::UnsupportedCertificate => {
                format!("it says that this rank's certificate is not for this use: {USES}")
            }
            Alert::CertificateRequired => "it wants a certificate of this rank".into(),
            Alert::HandshakeFailure => {
                format!("it broke the TLS handshake off, as if {DIFFERS}")
            }
            alert => {
                format!(
                    "it broke off ({alert:?}), as if what this rank said was altered on its way"
                )
            }
        },
        error => error.to_string(),
    }
}
