//! Certificates for tests: CAs, and folders with what one process has.

// Each test binary uses its part of this module.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use tempfile::TempDir;

pub type Authority = CertifiedIssuer<'static, KeyPair>;

pub fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// What a certificate says.
#[derive(Clone, Debug)]
pub struct Says {
    pub name: String,
    pub from: i32,
    pub until: i32,
}

impl Says {
    /// For `name`, at any time.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), from: 2020, until: 4000 }
    }
}

/// A certificate and its key, PEM, and the certificate as it is sent.
pub struct Issued {
    pub certificate: String,
    pub key: String,
    pub der: Vec<u8>,
}

pub fn issue(signer: &Authority, says: &Says) -> Issued {
    let mut params = CertificateParams::new(vec![says.name.clone()]).unwrap();
    params.not_before = date_time_ymd(says.from, 1, 1);
    params.not_after = date_time_ymd(says.until, 1, 1);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, signer).unwrap();
    let (der, pem) = (certificate.der().to_vec(), certificate.pem());
    Issued { certificate: pem, key: key.serialize_pem(), der }
}

/// What one process has, as Kubernetes mounts a secret: links to files in a folder to which a link
/// leads that is replaced at once.
pub struct Mounted {
    folder: TempDir,
    version: usize,
}

impl Mounted {
    pub fn new(issued: &Issued, trusted: &str) -> Self {
        let mut mounted = Self { folder: tempfile::tempdir().unwrap(), version: 0 };
        mounted.replace(issued, trusted);
        for name in ["tls.crt", "tls.key", "ca.crt"] {
            let to = Path::new("..data").join(name);
            std::os::unix::fs::symlink(to, mounted.at(name)).unwrap();
        }
        mounted
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Replaces all three files at once, and the last ones vanish.
    pub fn replace(&mut self, issued: &Issued, trusted: &str) {
        self.version += 1;
        let version = format!("..version-{}", self.version);
        let folder = self.at(&version);
        fs::create_dir(&folder).unwrap();
        let texts = [
            ("tls.crt", &issued.certificate[..]),
            ("tls.key", &issued.key[..]),
            ("ca.crt", trusted),
        ];
        for (name, text) in texts {
            fs::write(folder.join(name), text).unwrap();
        }
        std::os::unix::fs::symlink(&version, self.at("..new")).unwrap();
        fs::rename(self.at("..new"), self.at("..data")).unwrap();
        // There is none before the first.
        let _ = fs::remove_dir_all(self.at(&format!("..version-{}", self.version - 1)));
    }

    /// The words that run a command with these files: `env NAME=VALUE…`.
    pub fn environment(&self) -> Vec<String> {
        let of = |variable: &str, name: &str| format!("{variable}={}", self.at(name).display());
        vec![
            "env".into(),
            "UNISUM_TLS=mtls".into(),
            of("UNISUM_TLS_CERT", "tls.crt"),
            of("UNISUM_TLS_KEY", "tls.key"),
            of("UNISUM_TLS_CA", "ca.crt"),
        ]
    }
}
