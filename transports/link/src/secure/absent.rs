//! A build without the feature `tls`: no connection is ever encrypted, and what would do so can't
//! exist.

use super::Altered;

/// Seals what a rank sends on one connection; there is none.
#[derive(Debug)]
pub enum Sealer {}

/// Opens what the other one sends; there is none.
#[derive(Debug)]
pub enum Opener {}

impl Sealer {
    /// Never called.
    pub fn seal(&mut self, _head: &[u8], _body: &[u8], _record: &mut [u8]) {
        match *self {}
    }
}

impl Opener {
    /// Never called.
    pub const fn opened(&self) -> u64 {
        match *self {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn length(&mut self, _buffer: &[u8]) -> Result<Option<usize>, Altered> {
        match *self {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn open(&mut self, _record: &[u8], _text: &mut [u8]) -> Result<(), Altered> {
        match *self {}
    }
}
