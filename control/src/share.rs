//! What a rank has for the others in an exchange.

use unisum_link::Rank;

use super::message::{BLOB_BYTES_MAX, blobs_bytes_max};

/// A rank's part of an exchange: every rank gets one blob from every rank.
#[derive(Clone, Debug)]
pub enum Share {
    /// The same blob for all ranks.
    Same(Vec<u8>),
    /// A blob for each rank.
    Each(Vec<Vec<u8>>),
}

impl From<Vec<u8>> for Share {
    fn from(blob: Vec<u8>) -> Self {
        Self::Same(blob)
    }
}

impl Share {
    /// Whether the control plane carries it in a world of so many ranks; if not, how many bytes
    /// are too many.
    pub(super) fn check(&self, world: usize) -> Result<(), usize> {
        let (blobs, all) = match self {
            Self::Same(blob) => (std::slice::from_ref(blob), 0),
            Self::Each(blobs) => {
                assert_eq!(blobs.len(), world, "a blob for each rank");
                (&blobs[..], blobs.iter().map(Vec::len).sum())
            }
        };
        let longest = blobs.iter().map(Vec::len).max().unwrap_or(0);
        match longest {
            _ if longest > BLOB_BYTES_MAX => Err(longest),
            _ if all > blobs_bytes_max(world) => Err(all),
            _ => Ok(()),
        }
    }

    /// The blobs, with the ranks that they are for; none stands for all.
    pub(super) fn blobs(self) -> impl Iterator<Item = (Option<Rank>, Vec<u8>)> {
        let (same, each) = match self {
            Self::Same(blob) => (Some((None, blob)), Vec::new()),
            Self::Each(blobs) => (None, blobs),
        };
        let each = each.into_iter().enumerate().map(|(to, blob)| (Some(to), blob));
        same.into_iter().chain(each)
    }

    /// What the only rank of a world of one gets: its own.
    pub(super) fn into_own(self) -> Vec<Vec<u8>> {
        match self {
            Self::Same(blob) => vec![blob],
            Self::Each(blobs) => blobs,
        }
    }
}
