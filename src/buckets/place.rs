//! Where elements lie, for who can't be held to a borrow: bindings to other languages.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum_kernels::Dtype;

use super::plan::Plan;

/// The memory of a parameter's gradient ([`Step::place`](super::Step::place),
/// [`Buckets::place`](super::Buckets::place)), of a shard
/// ([`Buckets::shard_place`](super::Buckets::shard_place)), of weights, or of what a rank keeps for
/// its shards ([`ShardState::place`](super::ShardState::place)). It stays where it is while this
/// lives, also when buckets or shards were laid out anew or are gone.
///
/// When it may be touched is up to the program: a gradient's from the beginning of a step until it
/// is marked ready, and once the step has ended; all else while no call that was given its owner
/// runs.
#[derive(Clone)]
pub struct Place {
    /// Owns what `start` points to, and is not looked at.
    _owner: Arc<dyn Any + Send + Sync>,
    start: NonNull<u8>,
    count: usize,
    dtype: Dtype,
}

// SAFETY: it gives an address only; who may touch what lies there when is up to its users. The
// owner may be dropped by any thread.
unsafe impl Send for Place {}
// SAFETY: as for `Send`.
unsafe impl Sync for Place {}

impl Place {
    /// Of so many elements, back to back, which the owner keeps where they are.
    pub(super) const fn new(
        owner: Arc<dyn Any + Send + Sync>,
        start: NonNull<u8>,
        count: usize,
        dtype: Dtype,
    ) -> Self {
        Self { _owner: owner, start, count, dtype }
    }

    /// # Panics
    /// If there is no such parameter.
    pub(super) fn of_parameter(plan: Arc<Plan>, parameter: usize) -> Self {
        assert!(parameter < plan.parameters.len(), "there is no parameter {parameter}");
        let known = &plan.parameters[parameter];
        let (start, count, dtype) = (plan.gradient(parameter).0, known.count(), known.dtype());
        Self::new(plan, start, count, dtype)
    }

    /// All of a bucket, with what pads it.
    ///
    /// # Panics
    /// If there is no such bucket.
    pub(super) fn of_bucket(plan: Arc<Plan>, bucket: usize) -> Self {
        let (start, count, dtype) =
            (plan.start(bucket), plan.layout.plans()[bucket].len, plan.dtype(bucket));
        Self::new(plan, start, count, dtype)
    }

    /// Some of the elements.
    ///
    /// # Panics
    /// If there are not as many.
    #[must_use]
    pub fn part(&self, elements: Range<usize>) -> Self {
        let Range { start, end } = elements;
        assert!(start <= end && end <= self.count, "elements {start} to {end} of {}", self.count);
        // SAFETY: inside the owner's memory, as just checked.
        let first = unsafe { self.start.add(start * self.dtype.bytes()) };
        Self { start: first, count: end - start, ..self.clone() }
    }

    /// The address of the first element.
    pub const fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// How many elements there are, back to back.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// The type of the elements.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Place");
        debug.field("count", &self.count).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}
