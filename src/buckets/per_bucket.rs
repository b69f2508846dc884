//! What a hook keeps for each bucket of a layout.

use super::hook::Bucket;
use crate::Error;

/// By bucket, made when the bucket comes for the first time.
#[derive(Debug)]
pub(super) struct PerBucket<R> {
    /// The layout that they belong to.
    version: Option<u32>,
    states: Vec<Option<R>>,
}

impl<R> PerBucket<R> {
    pub(super) const fn new() -> Self {
        Self { version: None, states: Vec::new() }
    }

    /// Whether the bucket is of another layout.
    pub(super) fn are_stale(&self, bucket: &Bucket<'_>) -> bool {
        self.version != Some(bucket.layout_version())
    }

    /// Forgets all, and is of the bucket's layout from here on.
    pub(super) fn move_to(&mut self, bucket: &Bucket<'_>) {
        self.clear();
        self.version = Some(bucket.layout_version());
    }

    pub(super) fn clear(&mut self) {
        self.states.clear();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &R> {
        self.states.iter().flatten()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut R> {
        self.states.iter_mut().flatten()
    }

    /// The bucket's, which `make` makes if it is not there yet.
    ///
    /// # Errors
    /// Those of `make`.
    pub(super) fn of(
        &mut self,
        bucket: &Bucket<'_>,
        make: impl FnOnce() -> Result<R, Error>,
    ) -> Result<&mut R, Error> {
        let index = bucket.index();
        if self.states.len() <= index {
            self.states.resize_with(index + 1, || None);
        }
        let state = &mut self.states[index];
        match state {
            Some(state) => Ok(state),
            None => Ok(state.insert(make()?)),
        }
    }
}
