//! Certificates of the user: read from files, read again when they change, and whom they name.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
};
use zeroize::Zeroizing;

use super::faults::{names_in, see};
use super::files::{
    CertificateError, certificates, certified_key, listed, read, unlisted, warn_of_access,
};
use super::tls::{Configs, provider};

/// How often files are read that are replaced meanwhile.
const ATTEMPTS: usize = 5;

/// Where a process's certificate is, and whose it accepts. All files are PEM.
#[derive(Clone, Debug)]
pub struct Files {
    /// Its own certificate, then those by which its CA is found, if any.
    pub certificate: PathBuf,
    /// The key of its own certificate.
    pub key: PathBuf,
    /// The CAs that sign the others' certificates.
    pub authorities: PathBuf,
    /// Whose certificates are accepted of those.
    pub peers: Peers,
}

/// Which names a certificate may have: DNS names or URIs (SPIFFE IDs) among its alternative names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Any.
    Any,
    /// One of these.
    Names(Vec<String>),
    /// One of the lines of this file, which is read again when it changes.
    File(PathBuf),
}

impl FromStr for Peers {
    type Err = String;

    /// Names with commas between them, or `@` and the path of a file with a name on each line.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        match text.strip_prefix('@') {
            Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
            None if names.iter().all(|name| !name.is_empty()) => Ok(Self::Names(names)),
            _ => Err("names with commas between them, or @FILE".to_owned()),
        }
    }
}

/// Whose certificate is not accepted, as the alternative names in it say.
#[derive(Debug, thiserror::Error)]
enum NotAccepted {
    #[error("its certificate names {0}, which this rank does not accept (UNISUM_TLS_PEERS)")]
    Names(String),
    #[error(
        "its certificate names nobody: this rank accepts names (UNISUM_TLS_PEERS), and no DNS name \
         or URI is among its alternative names (addresses and common names do not count)"
    )]
    Nobody,
}

/// What the files said last, and when.
#[derive(Debug)]
pub(super) struct Certified {
    files: Files,
    seen: Vec<Option<Stamp>>,
    configs: Configs,
}

/// By what a file is known to be the one that was read.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Certified {
    pub(super) fn new(files: Files) -> Result<Self, CertificateError> {
        let (seen, configs) = files.read_whole();
        let configs = configs?;
        warn_of_access(&files.key);
        Ok(Self { files, seen, configs })
    }

    /// What the files say now. If they make no sense, perhaps because not all are replaced yet,
    /// what they said before holds, and there is a warning.
    pub(super) fn configs(&mut self) -> Configs {
        if stamps(&self.files) != self.seen {
            let (seen, read) = self.files.read_whole();
            match read {
                Ok(configs) => {
                    self.configs = configs;
                    tracing::info!("certificates were read again");
                }
                Err(error) => crate::warning!(%error, "the certificates read before are kept"),
            }
            self.seen = seen;
        }
        self.configs.clone()
    }
}

fn stamps(files: &Files) -> Vec<Option<Stamp>> {
    use std::os::unix::fs::MetadataExt as _;
    let stamp = |path: &Path| {
        let file = fs::metadata(path).ok()?;
        Some(Stamp { modified: file.modified().ok(), bytes: file.len(), inode: file.ino() })
    };
    let peers = match &files.peers {
        Peers::File(path) => Some(path),
        Peers::Any | Peers::Names(_) => None,
    };
    let all = [&files.certificate, &files.key, &files.authorities];
    all.into_iter().chain(peers).map(|path| stamp(path)).collect()
}

impl Files {
    /// What the files say, and when they were as they were read. If they are being replaced at this
    /// moment, half of what was read may be of each generation: then they are read once more.
    fn read_whole(&self) -> (Vec<Option<Stamp>>, Result<Configs, CertificateError>) {
        let mut attempts = 1;
        loop {
            let (seen, read) = (stamps(self), self.read());
            if attempts == ATTEMPTS || stamps(self) == seen {
                return (seen, read);
            }
            attempts += 1;
        }
    }

    fn read(&self) -> Result<Configs, CertificateError> {
        let peers = match &self.peers {
            Peers::Any | Peers::Names(_) => None,
            Peers::File(path) => Some(unlisted(path, read("list of peers", path)?)?),
        };
        self.configs(&Texts {
            certificate: read("certificate", &self.certificate)?,
            key: Zeroizing::new(read("key", &self.key)?),
            authorities: read("CA certificates", &self.authorities)?,
            peers,
        })
    }

    fn configs(&self, texts: &Texts) -> Result<Configs, CertificateError> {
        let provider = provider();
        let verifier = Arc::new(self.verifier(texts, &provider)?);
        let own = certified_key(
            (&self.certificate, &texts.certificate),
            (&self.key, &texts.key),
            &provider,
        )?;
        let names = own.end_entity_cert().ok().and_then(|it| names_in(it));
        let own = Arc::new(SingleCertAndKey::from(own));
        let versions = "this provider has TLS 1.3";
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect(versions)
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(own.clone());
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect(versions)
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(own);
        Ok(Configs::new(client, server).naming(names))
    }

    fn verifier(
        &self,
        texts: &Texts,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Verifier, CertificateError> {
        let mut roots = RootCertStore::empty();
        let refused = |why| CertificateError::new("CA certificates", &self.authorities, why);
        for authority in certificates("CA certificates", &self.authorities, &texts.authorities)? {
            roots.add(authority).map_err(|error| refused(error.to_string()))?;
        }
        let accepted = match &self.peers {
            Peers::Any => None,
            Peers::Names(names) => Some(names.clone()),
            // A file that says nothing names nobody.
            Peers::File(_) => Some(listed(texts.peers.as_deref().unwrap_or_default())),
        };
        Verifier::new(roots, accepted, provider).map_err(|error| refused(error.to_string()))
    }
}

/// What is in the files.
struct Texts {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    authorities: Vec<u8>,
    /// With a file of peers.
    peers: Option<String>,
}

fn is_accepted(accepted: &[String], name: &str) -> bool {
    accepted.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// Looks at the other end's certificate: who has signed it, and whom it names. The address at which
/// it was reached does not matter.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    of_dialers: Arc<dyn ClientCertVerifier>,
    accepted: Option<Vec<String>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(
        roots: RootCertStore,
        accepted: Option<Vec<String>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        let (roots, provider) = (Arc::new(roots), provider.clone());
        let of_dialers =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        Ok(Self { roots, of_dialers, accepted, provider })
    }

    /// Whether a certificate is good for both uses, whichever end this is: each rank dials some
    /// and listens to others, perhaps only in a group or a view that comes later.
    fn check_uses(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|_| rustls::CertificateError::BadEncoding)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        for usage in [webpki::KeyUsage::server_auth(), webpki::KeyUsage::client_auth()] {
            // Without a CA nothing is verified but what the certificate says of itself.
            let said = parsed.verify_for_usage(algorithms, &[], &[], now, usage, None, None);
            if let Err(webpki::Error::RequiredEkuNotFoundContext(_)) = said {
                return Err(rustls::CertificateError::InvalidPurpose.into());
            }
        }
        Ok(())
    }

    /// Whether one of the names in a certificate is accepted.
    fn check_names(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let Some(accepted) = &self.accepted else { return Ok(()) };
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|_| rustls::CertificateError::BadEncoding)?;
        let mut names = parsed.valid_dns_names().chain(parsed.valid_uri_names());
        if names.any(|name| is_accepted(accepted, name)) {
            return Ok(());
        }
        let error = OtherError(Arc::new(match names_in(certificate) {
            Some(names) => NotAccepted::Names(names),
            None => NotAccepted::Nobody,
        }));
        Err(rustls::CertificateError::Other(error).into())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        see(end_entity);
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let (roots, between) = (&self.roots, intermediates);
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, between, now, algorithms)
            .map_err(of_authorities)?;
        self.check_uses(end_entity, now)?;
        self.check_names(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A hint would tell strangers who the CAs are.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        see(end_entity);
        let verified = self.of_dialers.verify_client_cert(end_entity, intermediates, now);
        let verified = verified.map_err(of_authorities)?;
        self.check_uses(end_entity, now)?;
        self.check_names(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.of_dialers.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.of_dialers.supported_verify_schemes()
    }
}

/// A certificate of a CA in the place of a rank's, or the other way round, is one for another use:
/// both ends have words for that.
fn of_authorities(error: Error) -> Error {
    use rustls::CertificateError::Other;
    use webpki::Error as Fault;
    let Error::InvalidCertificate(Other(OtherError(fault))) = &error else { return error };
    match fault.downcast_ref() {
        Some(Fault::CaUsedAsEndEntity | Fault::EndEntityUsedAsCa) => {
            rustls::CertificateError::InvalidPurpose.into()
        }
        _ => error,
    }
}

/// For the fuzz targets: the certificate of somebody whom no CA knows is refused at both ends, with
/// words that no terminal obeys.
#[cfg(any(test, fuzzing))]
pub(crate) fn check_stranger(authority: &'static [u8], certificate: &[u8]) {
    static VERIFIER: std::sync::OnceLock<Verifier> = std::sync::OnceLock::new();
    let verifier = VERIFIER.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add(authority.into()).expect("it is a CA");
        Verifier::new(roots, Some(vec!["worker".into()]), &provider()).expect("it has a CA")
    });
    let (certificate, now) = (CertificateDer::from(certificate), UnixTime::now());
    let name = ServerName::try_from("unisum").expect("it is a name");
    let errors = [
        verifier.verify_server_cert(&certificate, &[], &name, &[], now).err(),
        verifier.verify_client_cert(&certificate, &[], now).err(),
        // It comes last there, and only if the CA has signed it.
        Some(verifier.check_names(&certificate).err().unwrap_or(Error::DecryptError)),
    ];
    for error in errors {
        let said = super::faults::why(&error.expect("a stranger's certificate was accepted"), None);
        assert!(!said.contains(char::is_control), "{said}");
    }
}

/// For the fuzz targets: files of these contents are used, or refused by a sentence that names one
/// of them, and that no terminal obeys. Whether they are used.
#[cfg(any(test, fuzzing))]
pub(crate) fn check_files([certificate, key, authorities]: [&[u8]; 3], peers: &str) -> bool {
    let (peers_in, key) = (Peers::File("peers".into()), Zeroizing::new(key.to_vec()));
    let [crt, pem, ca] = ["tls.crt", "tls.key", "ca.crt"].map(PathBuf::from);
    let files = Files { certificate: crt, key: pem, authorities: ca, peers: peers_in };
    let (certificate, authorities) = (certificate.to_vec(), authorities.to_vec());
    let texts = Texts { certificate, key, authorities, peers: Some(peers.to_owned()) };
    let Err(error) = files.configs(&texts) else { return true };
    let said = error.to_string();
    let names_one = ["tls.crt", "tls.key", "ca.crt"].iter().any(|name| said.contains(name));
    assert!(names_one && !said.contains(char::is_control), "{said}");
    false
}

/// For the fuzz targets: a list of peers, in a variable or a file, accepts the names in it, and no
/// others; read again as it is written, it is the same.
#[cfg(any(test, fuzzing))]
pub(crate) fn check_peers(text: &str) {
    let in_variable = match text.parse() {
        Ok(Peers::Names(names)) => {
            assert!(!names.is_empty() && names.iter().all(|name| !name.contains(',')));
            assert_eq!(names.join(",").parse(), Ok(Peers::Names(names.clone())));
            names
        }
        Ok(Peers::File(path)) => {
            assert!(!path.as_os_str().is_empty());
            Vec::new()
        }
        Ok(Peers::Any) => panic!("a list accepts anybody"),
        Err(_) => Vec::new(),
    };
    let in_file = listed(text);
    assert_eq!(listed(&in_file.join("\n")), in_file);
    for names in [in_variable, in_file] {
        for name in &names {
            assert!(!name.is_empty() && name.trim() == name && text.contains(name.as_str()));
            assert!(is_accepted(&names, name) && is_accepted(&names, &name.to_ascii_uppercase()));
        }
        let longer = names.iter().map(String::len).max().unwrap_or(0) + 1;
        assert!(!is_accepted(&names, "") && !is_accepted(&names, &"x".repeat(longer)));
    }
}
