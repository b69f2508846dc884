//! Why a dialer's handshake fails, and whether that is worth another attempt.

use std::io;

/// How often in a row a refusal has to come until it is final.
pub const STEADY: u32 = 3;

/// Why a dialer's handshake failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The connection broke, or nothing came within the stream's timeout.
    #[error("the connection failed during the handshake: {0}")]
    Io(#[from] io::Error),
    /// Something else than unisum listens there.
    #[error("what listens there is not unisum")]
    NotUnisum,
    /// The listener does not know the token.
    #[error("the listener could not prove that it knows the job's token")]
    Impostor,
    /// The listener said no, and why.
    #[error("refused: {0}")]
    Refused(String),
    /// The listener has no time for this dialer now, and why.
    #[error("turned away for now: {0}")]
    Later(String),
    /// One of the two does not accept the other's certificate, and why.
    #[error("{0}")]
    Certificate(String),
    /// The listener does not accept this end's certificate, and why.
    #[error("{0}")]
    OwnCertificate(String),
    /// The two do not speak the same TLS, or what they said of that was altered on its way.
    #[error("{0}")]
    Unlike(String),
    /// What was said is not TLS as it has to be: it may have been altered on its way.
    #[error("the TLS handshake failed: {0}")]
    Tls(String),
    /// The listener's answer to the proof was altered on its way. It may have admitted this end.
    #[error("the listener's answer to the proof was altered on its way")]
    Altered,
}

impl HandshakeError {
    /// Whether another attempt would end in the same way: whoever listens there has said what it
    /// is, or what it thinks of the dialer. A connection that broke says nothing: its listener may
    /// have had too many strangers.
    pub const fn is_answer(&self) -> bool {
        matches!(
            self,
            Self::NotUnisum
                | Self::Impostor
                | Self::Refused(_)
                | Self::Certificate(_)
                | Self::OwnCertificate(_)
                | Self::Unlike(_)
        )
    }

    /// Whether the listener has turned this end away. Nobody makes this out of another answer who
    /// alters bytes on their way, but who redirects connections, or takes them in the listener's
    /// place, may bring it about as well: what comes [`STEADY`] times in a row is final.
    pub const fn is_refusal(&self) -> bool {
        self.is_answer() && !matches!(self, Self::NotUnisum | Self::Unlike(_))
    }
}
