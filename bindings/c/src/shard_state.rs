//! What ranks keep for their shards, which follows the elements when the view of an elastic job
//! changes.

use std::ffi::c_void;
use std::sync::{RwLock, RwLockWriteGuard};

use unisum::buckets::{Buckets, Resharded, ShardMove, ShardPiece, ShardState};
use unisum::{Element, Error};

use crate::buckets::{Layer, for_gradient, give_gradient, unisum_buckets};
use crate::handles::{self, Object};
use crate::memory::{check_place, put};
use crate::sharded::check_sharded;
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::dtype as dtype_of;

/// What a rank keeps for its shards from step to step: several vectors, for example the weights and
/// the optimiser's two moments, each with one element for each element of the shards.
#[derive(Debug)]
pub struct unisum_shard_state {
    _private: [u8; 0],
}

/// Elements that keep or change their rank when shards are laid out anew.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_shard_move {
    /// The parameter, by its number in the list.
    pub parameter: usize,
    /// The first of its elements.
    pub start: usize,
    /// How many.
    pub count: usize,
    /// The rank whose state they come from, often the same one; -1 if nobody has them any more.
    pub from: i64,
    /// The rank in whose shard they are now.
    pub to: u32,
}

/// State whose elements are of any type of gradients.
trait Vectors: Send + Sync {
    fn reshard(&mut self, buckets: &mut Buckets) -> Result<Resharded, Error>;
    fn copy(&mut self, buckets: &mut Buckets) -> Result<(), Error>;
    fn version(&self) -> u64;
    fn set_version(&mut self, version: u64);
    fn vector(&mut self, bucket: usize, vector: usize) -> (*mut c_void, usize);
    fn elements(&mut self, vector: usize, piece: &ShardPiece) -> *mut c_void;
}

impl<T: Element + Default> Vectors for ShardState<T> {
    fn reshard(&mut self, buckets: &mut Buckets) -> Result<Resharded, Error> {
        buckets.reshard(self)
    }

    fn copy(&mut self, buckets: &mut Buckets) -> Result<(), Error> {
        buckets.copy_shards(self)
    }

    fn version(&self) -> u64 {
        self.version()
    }

    fn set_version(&mut self, version: u64) {
        self.set_version(version);
    }

    fn vector(&mut self, bucket: usize, vector: usize) -> (*mut c_void, usize) {
        let elements = self.vector_mut(bucket, vector);
        (elements.as_mut_ptr().cast(), elements.len())
    }

    fn elements(&mut self, vector: usize, piece: &ShardPiece) -> *mut c_void {
        self.elements_mut(vector, piece.parameter, piece.elements.clone()).as_mut_ptr().cast()
    }
}

struct State {
    vectors: Box<dyn Vectors>,
    count: usize,
    /// By bucket, what this rank's shards consist of.
    pieces: Vec<Vec<ShardPiece>>,
    moves: Vec<ShardMove>,
}

struct Kept(RwLock<State>);

impl Object for Kept {
    const KIND: usize = 11;
    const NAME: &'static str = "state of shards";
}

impl Kept {
    fn alone(&self) -> Outcome<RwLockWriteGuard<'_, State>> {
        let busy = "another call of this state of shards is under way or panicked";
        self.0.try_write().or_else(|_| invalid(busy))
    }
}

impl State {
    fn check_vector(&self, vector: usize) -> Outcome {
        match vector < self.count {
            true => Ok(()),
            false => invalid(format!("there is no vector {vector} among {}", self.count)),
        }
    }
}

/// More is a count that went wrong, such as -1: optimizers have two or three.
const MOST_VECTORS: usize = 1024;

/// Makes state of so many vectors, at most 1024, of which this rank has nothing yet:
/// unisum_buckets_reshard lays it out. `dtype` is a type of gradients. Freed by
/// unisum_shard_state_free. Not collective.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_create(
    dtype: u32,
    vectors: usize,
    state: *mut *mut unisum_shard_state,
) -> unisum_status {
    guard(|| {
        check_place(state, "the state")?;
        if vectors > MOST_VECTORS {
            return invalid(format!("{vectors} vectors, of at most {MOST_VECTORS}"));
        }
        let made: Box<dyn Vectors> = for_gradient!(dtype_of(dtype)?, T => {
            Ok(Box::new(ShardState::<T>::new(vectors)) as Box<dyn Vectors>)
        })?;
        let (pieces, moves) = (Vec::new(), Vec::new());
        let kept = Kept(RwLock::new(State { vectors: made, count: vectors, pieces, moves }));
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(kept, state) };
        Ok(())
    })
}

/// Gives each rank what belongs to its shards now, from whoever has it: at the start, and after
/// each change of an elastic job's view, when the buckets have been made again. A newcomer, and
/// every rank at the start, gives a new state. unisum_shard_state_moves tells what moved and what
/// nobody has, which is zero: the program initialises it or takes it from its checkpoint, and then
/// calls unisum_shard_state_set_version. If copies of an earlier version are more complete
/// (unisum_buckets_copy_shards), all ranks go back to that.
///
/// Collective: every rank calls it, between two steps. Blocks. If it fails, the state is what it
/// was. Needs UNISUM_SHARDED. On all ranks: UNISUM_MISMATCH if numbers of vectors or types differ,
/// or state of other parameters was given; UNISUM_MEMORY if one has no memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_reshard(
    buckets: *const unisum_buckets,
    state: *const unisum_shard_state,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let kept = handles::get::<Kept, _>(state)?;
        let (mut layer, mut state) = (layer.alone()?, kept.alone()?);
        check_sharded(&layer)?;
        let buckets = layer.idle()?;
        let resharded = state.vectors.reshard(buckets)?;
        let count = buckets.layout().buckets().len();
        state.pieces = (0..count).map(|bucket| buckets.shard_pieces(bucket)).collect();
        state.moves = resharded.moves;
        Ok(())
    })
}

/// Copies each rank's state to the next rank, and keeps it as it is now: if the job then loses a
/// rank, or several of which no two are neighbours, unisum_buckets_reshard loses nothing, and goes
/// back to this version.
///
/// Collective: every rank calls it, between two steps, as often as is worth it: a loss costs the
/// steps since. Blocks. Memory for two more states, and for four during the call. On all ranks:
/// UNISUM_MISMATCH if versions differ; UNISUM_CONFIGURATION if state of other buckets, or with
/// missing elements, was given on any rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_copy_shards(
    buckets: *const unisum_buckets,
    state: *const unisum_shard_state,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let kept = handles::get::<Kept, _>(state)?;
        let (mut layer, mut state) = (layer.alone()?, kept.alone()?);
        check_sharded(&layer)?;
        Ok(state.vectors.copy(layer.idle()?)?)
    })
}

/// Where each element of each parameter was before the last unisum_buckets_reshard, and is: the
/// same on all ranks. `count` gets how many moves there are, of which `capacity` at most are
/// written to `moves`, which may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_moves(
    state: *const unisum_shard_state,
    moves: *mut unisum_shard_move,
    capacity: usize,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let kept = handles::get::<Kept, _>(state)?;
        check_place(count, "the count")?;
        let state = kept.alone()?;
        if !moves.is_null() {
            check_place(moves, "the moves")?;
            for (index, it) in state.moves.iter().enumerate().take(capacity) {
                let told = unisum_shard_move {
                    parameter: it.parameter,
                    start: it.elements.start,
                    count: it.elements.len(),
                    from: it.from.map_or(-1, |rank| rank as i64),
                    to: it.to as u32,
                };
                // SAFETY: C promises room for so many.
                let place = unsafe { moves.add(index) };
                // SAFETY: as above.
                unsafe { place.write(told) };
            }
        }
        // SAFETY: C promises that it may be written.
        unsafe { put(count, state.moves.len(), "the count") }
    })
}

/// A vector of this rank's shard of a bucket, to be read and updated: as many elements as
/// unisum_buckets_shard gives, with padding. It stays in place until unisum_buckets_reshard is
/// called or the state is freed. `count` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_vector(
    state: *const unisum_shard_state,
    bucket: usize,
    vector: usize,
    elements: *mut *mut c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let kept = handles::get::<Kept, _>(state)?;
        check_place(elements, "the elements")?;
        let mut state = kept.alone()?;
        state.check_vector(vector)?;
        let buckets = state.pieces.len();
        if bucket >= buckets {
            return invalid(format!("there is no bucket {bucket} among {buckets} laid out"));
        }
        let found = state.vectors.vector(bucket, vector);
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient(found, elements, count) }
    })
}

/// Some elements of a parameter in one of this rank's shards, to be restored or initialised: those
/// of a unisum_shard_move whose `to` is this rank. They stay in place as those of
/// unisum_shard_state_vector.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_elements(
    state: *const unisum_shard_state,
    vector: usize,
    parameter: usize,
    start: usize,
    count: usize,
    elements: *mut *mut c_void,
) -> unisum_status {
    guard(|| {
        let kept = handles::get::<Kept, _>(state)?;
        check_place(elements, "the elements")?;
        let mut state = kept.alone()?;
        state.check_vector(vector)?;
        let end = start.saturating_add(count);
        let is_in = |piece: &&ShardPiece| {
            let whole = &piece.elements;
            piece.parameter == parameter && whole.start <= start && end <= whole.end
        };
        if !state.pieces.iter().flatten().any(|piece| is_in(&piece)) {
            return invalid(format!(
                "elements {start} to {end} of parameter {parameter} are in no shard of this rank"
            ));
        }
        let piece = ShardPiece { parameter, elements: start..end, at: 0 };
        let found = state.vectors.elements(vector, &piece);
        // SAFETY: C promises that it may be written.
        unsafe { put(elements, found, "the elements") }
    })
}

/// After how many steps the state is: what unisum_shard_state_set_version was given, or the version
/// that all ranks have since unisum_buckets_reshard.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_version(
    state: *const unisum_shard_state,
    version: *mut u64,
) -> unisum_status {
    guard(|| {
        let now = handles::get::<Kept, _>(state)?.alone()?.vectors.version();
        // SAFETY: C promises that it may be written.
        unsafe { put(version, now, "the version") }
    })
}

/// Says that the state is complete, after so many steps: what was missing is restored. Ranks that
/// have different versions have different models, so this is called after each step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_set_version(
    state: *const unisum_shard_state,
    version: u64,
) -> unisum_status {
    guard(|| {
        handles::get::<Kept, _>(state)?.alone()?.vectors.set_version(version);
        Ok(())
    })
}

/// Frees state of shards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_shard_state_free(
    state: *const unisum_shard_state,
) -> unisum_status {
    guard(|| handles::remove::<Kept, _>(state).map(drop))
}
