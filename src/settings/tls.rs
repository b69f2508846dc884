//! What a user can set about encryption.

use std::path::PathBuf;
use std::str::FromStr;

#[cfg(feature = "tls")]
use unisum_link::secure::{Files, Peers, Sealing};

use super::{Reader, SettingsError};
use crate::wiring::builtin;

/// Without encryption nobody knows more of names than their text.
#[cfg(not(feature = "tls"))]
type Peers = String;

/// How connections are protected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Level {
    /// Control connections are encrypted, and data between hosts; nothing if the build can't.
    #[default]
    Auto,
    /// Nothing is encrypted.
    Off,
    /// All connections are encrypted, and the token says who may come.
    Token,
    /// All connections are encrypted, and both ends need certificates beside the token.
    Mtls,
}

/// Settings of encryption.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct TlsSettings {
    pub(crate) level: Level,
    /// A certificate, its key, and the CAs of the others' certificates.
    files: [Option<PathBuf>; 3],
    /// Whose certificates are accepted; `None` takes any that a CA has signed.
    peers: Option<Peers>,
    /// Whether nobody else is on the RDMA fabric.
    fabric_is_isolated: bool,
}

/// The variables of the files, in their order.
const FILES: [&str; 3] = ["UNISUM_TLS_CERT", "UNISUM_TLS_KEY", "UNISUM_TLS_CA"];

impl TlsSettings {
    pub(super) fn read(read: &Reader<'_>) -> Result<Self, SettingsError> {
        let level: Level = read.parsed("UNISUM_TLS")?.unwrap_or_default();
        let [certificate, key, authorities] =
            FILES.map(|variable| read.read(variable, |path| Ok(PathBuf::from(path))));
        let settings = Self {
            level,
            files: [certificate?, key?, authorities?],
            peers: read.read("UNISUM_TLS_PEERS", parse_peers)?,
            fabric_is_isolated: read.switch("UNISUM_VERBS_ISOLATED")?.unwrap_or(false),
        };
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), SettingsError> {
        let refused = |accepted: String| SettingsError {
            variable: "UNISUM_TLS",
            value: self.level.to_string(),
            accepted,
        };
        if matches!(self.level, Level::Token | Level::Mtls) && cfg!(not(feature = "tls")) {
            return Err(refused(
                "auto or off: this build has no encryption (feature `tls`)".into(),
            ));
        }
        let is_mtls = self.level == Level::Mtls;
        for (variable, file) in FILES.iter().zip(&self.files) {
            if is_mtls && file.is_none() {
                return Err(refused(format!("{variable} beside it")));
            }
            if !is_mtls && file.is_some() {
                return Err(refused(format!("mtls, as {variable} is set")));
            }
        }
        match is_mtls || self.peers.is_none() {
            true => Ok(()),
            false => Err(refused("mtls, as UNISUM_TLS_PEERS is set".into())),
        }
    }

    /// Where the user's certificates are, with `mtls`.
    #[cfg(feature = "tls")]
    pub(crate) fn files(&self) -> Option<Files> {
        let [Some(certificate), Some(key), Some(authorities)] = self.files.clone() else {
            return None;
        };
        let peers = self.peers.clone().unwrap_or(Peers::Any);
        Some(Files { certificate, key, authorities, peers })
    }

    /// Which data connections are encrypted, if any connection is.
    #[cfg(feature = "tls")]
    pub(crate) const fn sealing(&self) -> Option<Sealing> {
        match self.level {
            Level::Off => None,
            Level::Auto => Some(Sealing::BetweenHosts),
            Level::Token | Level::Mtls => Some(Sealing::Everywhere),
        }
    }

    /// Why RDMA, which is not encrypted, may not be used, if so.
    pub(crate) const fn refuses_rdma(&self) -> Option<&'static str> {
        match self.level {
            Level::Mtls if !self.fabric_is_isolated => Some(
                "UNISUM_TLS=mtls uses RDMA, which is not encrypted, only on a fabric that \
                 nobody else is on (UNISUM_VERBS_ISOLATED=1)",
            ),
            _ => None,
        }
    }

    /// What is encrypted of a communicator over these transports, and what is not, in one line.
    pub(crate) fn in_words(&self, transport: &str) -> String {
        if self.level == Level::Off {
            return "nothing is encrypted (UNISUM_TLS=off)".into();
        }
        if cfg!(not(feature = "tls")) {
            return "nothing is encrypted: this build has no feature `tls`".into();
        }
        let by = match self.level {
            Level::Mtls => "TLS 1.3 by certificates and token",
            _ => "TLS 1.3 by the token",
        };
        let has = |name: &str| transport.split('+').any(|known| known == name);
        let mut parts = vec!["control"];
        if has("tcp") {
            parts.push(match self.level {
                Level::Auto => "TCP data to other hosts (inside a host in clear)",
                _ => "TCP data",
            });
        }
        let mut text = format!("encrypted ({by}): {}", parts.join(", "));
        for (name, called) in [("verbs", "RDMA"), ("shm", "shared memory")] {
            if has(name) {
                text += &format!("; {called} in clear");
            }
        }
        let known = |name: &str| builtin::names().any(|it| it == name);
        for name in transport.split('+').filter(|name| !known(name)) {
            text += &format!("; {name} as it does by itself");
        }
        text
    }
}

#[cfg(feature = "tls")]
fn parse_peers(text: &str) -> Result<Peers, String> {
    text.parse()
}

#[cfg(not(feature = "tls"))]
fn parse_peers(text: &str) -> Result<Peers, String> {
    Ok(text.to_owned())
}

impl FromStr for Level {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "token" => Ok(Self::Token),
            "mtls" => Ok(Self::Mtls),
            _ => Err("auto, off, token or mtls"),
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Token => "token",
            Self::Mtls => "mtls",
        })
    }
}
