//! The TLS handshake: configurations, and what both ends take from a handshake that is done.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs as provider,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer,
    UnixTime,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ConnectionCommon, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
};
use zeroize::Zeroizing;

use super::certified::{Certified, Files};
use super::files::CertificateError;
use super::records::{Opener, Sealer};
use super::{SECRET_BYTES, Session};

/// The label of RFC 9266.
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";
const RECORDS_LABEL: &[u8] = b"EXPORTER-unisum-records";

/// What handshakes are made with.
#[derive(Debug)]
pub(super) enum Tls {
    /// By the token alone.
    Token(Configs),
    /// With the user's certificates.
    Certified(Box<Mutex<Certified>>),
}

/// The two ends' configurations.
#[derive(Clone, Debug)]
pub(super) struct Configs {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    /// Whom this end's certificate names, if it has one.
    pub(super) own: Option<Arc<str>>,
}

impl Tls {
    pub(super) fn token() -> Result<Self, Error> {
        let provider = provider();
        let supported = provider.signature_verification_algorithms;
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyKey(supported)))
            .with_no_client_auth();
        let resolver = AlwaysResolvesServerRawPublicKeys::new(Arc::new(drawn_key(&provider)?));
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(resolver));
        Ok(Self::Token(Configs::new(client, server)))
    }

    pub(super) fn certified(files: Files) -> Result<Self, CertificateError> {
        Ok(Self::Certified(Box::new(Mutex::new(Certified::new(files)?))))
    }

    /// The configurations for a connection that is made now.
    pub(super) fn configs(&self) -> Configs {
        match self {
            Self::Token(configs) => configs.clone(),
            // It is whole at any time: a panic leaves the last configurations.
            Self::Certified(certified) => {
                certified.lock().unwrap_or_else(PoisonError::into_inner).configs()
            }
        }
    }
}

impl Configs {
    pub(super) fn new(mut client: ClientConfig, mut server: ServerConfig) -> Self {
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Self { client: Arc::new(client), server: Arc::new(server), own: None }
    }

    /// The same, with a certificate that names somebody, if it does.
    pub(super) fn naming(self, own: Option<String>) -> Self {
        Self { own: own.map(Into::into), ..self }
    }
}

/// AWS-LC, with what unisum needs of it.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = provider::default_provider();
    provider.cipher_suites.truncate(0);
    provider.cipher_suites.push(provider::cipher_suite::TLS13_AES_256_GCM_SHA384);
    provider.kx_groups = vec![provider::kx_group::X25519, provider::kx_group::SECP256R1];
    Arc::new(provider)
}

/// A key that lasts as long as the process, and that nobody knows before.
pub(super) fn drawn_key(provider: &CryptoProvider) -> Result<CertifiedKey, Error> {
    let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
    let drawn = EcdsaKeyPair::generate_pkcs8(algorithm, &SystemRandom::new());
    let drawn = drawn.map_err(|_| Error::FailedToGetRandomBytes)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(drawn.as_ref().to_vec()));
    let key = provider.key_provider.load_private_key(key)?;
    let public = key.public_key().ok_or(Error::General("the key has no public half".into()))?;
    let public = CertificateDer::from(public.as_ref().to_vec());
    Ok(CertifiedKey::new(vec![public], key))
}

/// Takes any key, if the listener signs with it: the token's proof says whose it is.
#[derive(Debug)]
struct AnyKey(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
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
        let key = SubjectPublicKeyInfoDer::from(cert.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// What is the same at both ends of this connection, and nowhere else.
pub(super) fn binding<Data>(connection: &ConnectionCommon<Data>) -> Result<[u8; 32], Error> {
    connection.export_keying_material([0; 32], BINDING_LABEL, None)
}

/// The keys of the records that follow the handshake.
pub(super) fn session<Data>(
    connection: &ConnectionCommon<Data>,
    is_dialer: bool,
) -> Result<Session, Error> {
    let secret = |of: &[u8]| -> Result<Zeroizing<[u8; SECRET_BYTES]>, Error> {
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        connection.export_keying_material(&mut *secret, RECORDS_LABEL, Some(of))?;
        Ok(secret)
    };
    let (dialer, listener) = (secret(b"dialer")?, secret(b"listener")?);
    let (own, other) = if is_dialer { (dialer, listener) } else { (listener, dialer) };
    Ok(Session { sealer: Sealer::new(own), opener: Opener::new(other) })
}
