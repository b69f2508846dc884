//! What a program can request: a collective, how it reduces, and the buffers it works on.

pub(crate) mod agreement;
pub(crate) mod key;
pub(crate) mod raw;
pub(crate) mod reduction;

use std::ops::Range;
use std::sync::Arc;

use unisum_kernels::Fold;
use unisum_kernels::{Dtype, Element, ReduceOp};
use unisum_link::{Call, CollectiveKind as Kind, Rank};

use crate::collective::agreement::Purpose;
use crate::collective::key::Key;
use crate::collective::raw::RawBuffers;
use crate::collective::reduction::Reduction;
use crate::{Error, ErrorKind};

/// A collective operation with its arguments, which are the same on all ranks unless stated
/// otherwise.
///
/// | constructor | each rank contributes | each rank gets |
/// |---|---|---|
/// | [`all_reduce`](Self::all_reduce) | `count` elements | their reduction |
/// | [`reduce`](Self::reduce) | `count` elements | the root: their reduction |
/// | [`broadcast`](Self::broadcast) | the root: `count` elements | the root's elements |
/// | [`all_gather`](Self::all_gather) | a block | all blocks, in rank order |
/// | [`reduce_scatter`](Self::reduce_scatter) | a block for each rank | its block, reduced |
/// | [`all_to_all`](Self::all_to_all) | a block for each rank | a block from each rank |
/// | [`gather`](Self::gather) | a block | the root: all blocks |
/// | [`scatter`](Self::scatter) | the root: a block for each rank | its block |
/// | [`barrier`](Self::barrier) | nothing | nothing, once all have arrived |
///
/// Blocks have equal lengths, unless [`with_counts`](Self::with_counts) gives the length of each. A
/// collective is cheap to clone.
#[derive(Clone, Debug)]
pub struct Collective {
    kind: Kind,
    reduction: Reduction,
    root: Rank,
    counts: Counts,
    purpose: Purpose,
}

/// How long the blocks are, in elements.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Counts {
    /// All equal; given by the lengths of the buffers.
    #[default]
    Even,
    /// By rank.
    Blocks(Arc<[usize]>),
    /// To each rank and from each rank.
    Pairs(Arc<[usize]>, Arc<[usize]>),
}

impl Collective {
    const fn new(kind: Kind) -> Self {
        let reduction = Reduction::new(ReduceOp::Sum);
        Self { kind, reduction, root: 0, counts: Counts::Even, purpose: Purpose::User }
    }

    /// Reduces all ranks' elements and gives every rank the result.
    pub fn all_reduce(how: impl Into<Reduction>) -> Self {
        Self { reduction: how.into(), ..Self::new(Kind::AllReduce) }
    }

    /// Reduces all ranks' elements and gives `root` the result. The other ranks' elements stay
    /// unchanged.
    pub fn reduce(how: impl Into<Reduction>, root: Rank) -> Self {
        Self { reduction: how.into(), root, ..Self::new(Kind::Reduce) }
    }

    /// Gives every rank the elements of `root`.
    pub fn broadcast(root: Rank) -> Self {
        Self { root, ..Self::new(Kind::Broadcast) }
    }

    /// Gives every rank the blocks of all ranks.
    pub const fn all_gather() -> Self {
        Self::new(Kind::AllGather)
    }

    /// Reduces all ranks' blocks and gives each rank its own.
    pub fn reduce_scatter(how: impl Into<Reduction>) -> Self {
        Self { reduction: how.into(), ..Self::new(Kind::ReduceScatter) }
    }

    /// Gives each rank the blocks that all ranks have for it.
    pub const fn all_to_all() -> Self {
        Self::new(Kind::AllToAll)
    }

    /// An all-to-all of blocks of these lengths, in elements: to each rank and from each rank. What
    /// a rank sends to another must be what that rank expects from it.
    pub fn all_to_all_v(sends: &[usize], receives: &[usize]) -> Self {
        let counts = Counts::Pairs(sends.into(), receives.into());
        Self { counts, ..Self::new(Kind::AllToAll) }
    }

    /// Gives `root` the blocks of all ranks.
    pub fn gather(root: Rank) -> Self {
        Self { root, ..Self::new(Kind::Gather) }
    }

    /// Gives each rank its block of the `root`'s elements.
    pub fn scatter(root: Rank) -> Self {
        Self { root, ..Self::new(Kind::Scatter) }
    }

    /// The same collective with blocks of these lengths, in elements, by rank; 0 is allowed. For
    /// all-gather, reduce-scatter, gather and scatter; with any other, the call returns an error.
    #[must_use]
    pub fn with_counts(self, counts: &[usize]) -> Self {
        Self { counts: Counts::Blocks(counts.into()), ..self }
    }

    /// No rank continues before all ranks have arrived. Its buffers are empty.
    pub const fn barrier() -> Self {
        Self::new(Kind::Barrier)
    }

    /// The same, not called by the program.
    pub(crate) fn with_purpose(self, purpose: Purpose) -> Self {
        Self { purpose, ..self }
    }

    /// The names of its algorithms, as [`set_algorithm`](crate::Communicator::set_algorithm) takes
    /// them.
    pub fn algorithms(&self) -> Vec<&'static str> {
        crate::algorithms_of(self.kind)
    }

    pub(crate) const fn root(&self) -> Rank {
        self.root
    }

    pub(crate) const fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) const fn reduction(&self) -> &Reduction {
        &self.reduction
    }

    pub(crate) const fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// Whether the lengths of the buffers say how long the blocks are.
    pub(crate) const fn has_even_counts(&self) -> bool {
        matches!(self.counts, Counts::Even)
    }
}

/// The buffers that a blocking collective borrows.
///
/// In place, one buffer is both input and output. On ranks that have or get all blocks, it holds
/// all blocks, with the rank's own at its place; on other ranks, it holds one block. A rank that
/// contributes nothing or gets nothing may pass an empty slice for it.
#[derive(Debug)]
pub enum Buffers<'a, T> {
    /// One buffer for both.
    InPlace(&'a mut [T]),
    /// Separate input and output.
    OutOfPlace(&'a [T], &'a mut [T]),
}

impl<T> Buffers<'_, T> {
    /// The same buffers, for a while.
    pub(crate) const fn reborrow(&mut self) -> Buffers<'_, T> {
        match self {
            Self::InPlace(data) => Buffers::InPlace(data),
            Self::OutOfPlace(input, output) => Buffers::OutOfPlace(input, output),
        }
    }
}

/// Buffers that an asynchronous collective owns until it has ended.
pub trait Owned<T>: Send + 'static {
    /// The buffers as slices.
    fn lend(&mut self) -> Buffers<'_, T>;
}

/// Buffers without a static element type that an asynchronous collective owns until it has ended.
///
/// # Safety
/// What it lends is of the type that [`OwnedRaw::dtype`] says, and stays where it is until the
/// collective has ended, wherever this is moved to.
pub unsafe trait OwnedRaw: Send + 'static {
    /// The element type, the same at all times.
    fn dtype(&self) -> Dtype;

    /// The buffers, of that type.
    fn lend(&mut self) -> RawBuffers<'_>;
}

/// One buffer for input and output: a `Vec<T>`, a [`Buffer<T>`](crate::Buffer), …
#[derive(Clone, Debug)]
pub struct InPlace<B>(pub B);

/// Separate input and output.
#[derive(Clone, Debug)]
pub struct OutOfPlace<I, O>(pub I, pub O);

impl<T: Element, B: AsMut<[T]> + Send + 'static> Owned<T> for InPlace<B> {
    fn lend(&mut self) -> Buffers<'_, T> {
        Buffers::InPlace(self.0.as_mut())
    }
}

impl<T, I, O> Owned<T> for OutOfPlace<I, O>
where
    T: Element,
    I: AsRef<[T]> + Send + 'static,
    O: AsMut<[T]> + Send + 'static,
{
    fn lend(&mut self) -> Buffers<'_, T> {
        Buffers::OutOfPlace(self.0.as_ref(), self.1.as_mut())
    }
}

/// The lengths of the buffers, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lengths {
    InPlace(usize),
    OutOfPlace { input: usize, output: usize },
}

/// What the lengths of the buffers make of a collective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extents {
    pub(crate) blocks: Blocks,
    /// Which elements of the first buffer are put in, and of the last are got.
    pub(crate) input: Range<usize>,
    pub(crate) output: Range<usize>,
}

impl Extents {
    /// The same in bytes: of the input, and of the output.
    pub(crate) fn bytes(&self, dtype: Dtype) -> (Range<usize>, Range<usize>) {
        let bytes = |range: &Range<usize>| range.start * dtype.bytes()..range.end * dtype.bytes();
        (bytes(&self.input), bytes(&self.output))
    }
}

/// How long the blocks are: what all ranks agree on, a2a-v's rows and columns excepted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Blocks {
    /// A block, or all elements where there are no blocks.
    Even(usize),
    Given(Arc<[usize]>),
    Pairs(Arc<[usize]>, Arc<[usize]>),
}

impl Blocks {
    /// The elements that all ranks agree on: of a block, or of all blocks that were given.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Even(each) => *each,
            Self::Given(counts) => counts.iter().sum(),
            Self::Pairs(..) => 0,
        }
    }

    /// What a call says of it.
    pub(crate) fn told(&self) -> u64 {
        match self {
            Self::Pairs(..) => Call::COUNT_BY_PAIR,
            _ => self.count() as u64,
        }
    }

    /// Whether all ranks know that there are no elements.
    pub(crate) fn is_empty(&self) -> bool {
        !matches!(self, Self::Pairs(..)) && self.count() == 0
    }
}

/// How much of the elements a rank puts in, or gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    Nothing,
    /// Its own block.
    Block,
    /// All elements; of an all-to-all, all blocks it has or gets.
    Whole,
}

impl Collective {
    /// How elements of type `dtype` are folded.
    pub(crate) fn fold(&self, dtype: Dtype) -> Fold {
        let fold = self.reduction.fold(dtype);
        // What passes through others to a root is folded where nobody tells the root of it.
        Fold { watch: fold.watch && self.kind != Kind::Reduce, ..fold }
    }

    /// Checks what all ranks give alike.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`].
    pub(crate) fn checked(&self, dtype: Dtype, (rank, world): (Rank, usize)) -> Result<(), Error> {
        let refuse = |text| Error::new(ErrorKind::Configuration, text).on(rank);
        self.check(dtype, world).map_err(refuse)
    }

    /// # Errors
    /// Says what is wrong.
    fn check(&self, dtype: Dtype, world: usize) -> Result<(), String> {
        let (kind, root) = (self.kind, self.root);
        let refuse = |text: String| Err(format!("{kind} on {world} ranks: {text}"));
        if kind.has_root() && root >= world {
            return refuse(format!("there is no rank {root} to be the root"));
        }
        if let Err(text) = self.reduction.check(dtype)
            && kind.reduces()
        {
            return refuse(text);
        }
        match &self.counts {
            Counts::Blocks(_) if !self.has_blocks() || kind == Kind::AllToAll => {
                refuse("it takes no counts by rank".into())
            }
            Counts::Blocks(counts) if counts.len() != world => {
                refuse(format!("{} counts were given", counts.len()))
            }
            Counts::Pairs(sends, receives) if (sends.len(), receives.len()) != (world, world) => {
                refuse(format!("{} and {} counts were given", sends.len(), receives.len()))
            }
            Counts::Blocks(counts) if !fit_memory(counts, dtype) => {
                refuse("the counts are more elements than memory can hold".into())
            }
            Counts::Pairs(sends, receives)
                if !fit_memory(sends, dtype) || !fit_memory(receives, dtype) =>
            {
                refuse("the counts are more elements than memory can hold".into())
            }
            _ => Ok(()),
        }
    }

    /// A key for asking which algorithm is chosen for buffers of `count` elements.
    pub(crate) fn typical_key(&self, world: usize, dtype: Dtype, count: usize) -> Key {
        let blocks = match &self.counts {
            Counts::Even if self.has_blocks() => Blocks::Even(count.div_ceil(world)),
            Counts::Even => Blocks::Even(count),
            Counts::Blocks(counts) => Blocks::Given(counts.clone()),
            Counts::Pairs(sends, receives) => Blocks::Pairs(sends.clone(), receives.clone()),
        };
        let (kind, root, ordered) = (self.kind, self.root, self.reduction.is_ordered());
        Key { kind, root, blocks, ordered, ..Key::all_reduce(count, dtype.bytes()) }
    }

    /// What the buffers' lengths make of a checked collective.
    ///
    /// # Errors
    /// Says which buffer does not fit.
    pub(crate) fn size(
        &self,
        dtype: Dtype,
        (rank, world): (Rank, usize),
        lengths: Lengths,
    ) -> Result<Extents, String> {
        let (puts, gets) = self.extents(rank);
        let named = |text| format!("{} of {dtype} on {world} ranks: {text}", self.kind);
        let blocks = self.blocks(world, lengths, puts, gets).map_err(named)?;
        if let Blocks::Pairs(sends, receives) = &blocks
            && sends[rank] != receives[rank]
        {
            let (sent, received) = (sends[rank], receives[rank]);
            return Err(named(format!(
                "it sends itself {sent} elements and receives {received} from itself"
            )));
        }
        let own = blocks.range(rank);
        let len = |extent, receives| match extent {
            Extent::Nothing => 0,
            Extent::Block => own.len(),
            Extent::Whole => blocks.whole(self.has_blocks().then_some(world), receives),
        };
        let (input, output) = (len(puts, false), len(gets, true));
        check_lengths(lengths, (puts, input), (gets, output)).map_err(named)?;
        let (input, output) = match (lengths, puts, gets) {
            (Lengths::InPlace(_), Extent::Block, Extent::Whole) => (own, 0..output),
            (Lengths::InPlace(_), Extent::Whole, Extent::Block) => (0..input, own),
            _ => (0..input, 0..output),
        };
        Ok(Extents { blocks, input, output })
    }

    pub(crate) const fn extents(&self, rank: Rank) -> (Extent, Extent) {
        use Extent::{Block, Nothing, Whole};
        let at_root = if rank == self.root { Whole } else { Nothing };
        match self.kind {
            Kind::Reduce => (Whole, at_root),
            Kind::Broadcast => (at_root, Whole),
            Kind::AllGather => (Block, Whole),
            Kind::ReduceScatter => (Whole, Block),
            Kind::Gather => (Block, at_root),
            Kind::Scatter => (at_root, Block),
            _ => (Whole, Whole),
        }
    }

    pub(crate) const fn has_blocks(&self) -> bool {
        !matches!(self.kind, Kind::AllReduce | Kind::Reduce | Kind::Broadcast)
    }

    fn blocks(
        &self,
        world: usize,
        lengths: Lengths,
        puts: Extent,
        gets: Extent,
    ) -> Result<Blocks, String> {
        match &self.counts {
            Counts::Even => self.even_blocks(world, lengths, puts, gets).map(Blocks::Even),
            Counts::Blocks(counts) => Ok(Blocks::Given(counts.clone())),
            Counts::Pairs(sends, receives) => Ok(Blocks::Pairs(sends.clone(), receives.clone())),
        }
    }

    /// The length of a block, or of everything where there are no blocks.
    fn even_blocks(
        &self,
        world: usize,
        lengths: Lengths,
        puts: Extent,
        gets: Extent,
    ) -> Result<usize, String> {
        let (len, extent) = match lengths {
            Lengths::InPlace(len) if puts == Extent::Whole => (len, puts),
            Lengths::InPlace(len) if gets == Extent::Nothing => (len, puts),
            Lengths::InPlace(len) => (len, gets),
            Lengths::OutOfPlace { output, .. } if gets == Extent::Block => (output, gets),
            Lengths::OutOfPlace { output, .. } if puts == Extent::Nothing => (output, gets),
            Lengths::OutOfPlace { input, .. } => (input, puts),
        };
        if extent != Extent::Whole || !self.has_blocks() {
            return Ok(len);
        }
        match len.is_multiple_of(world) {
            true => Ok(len / world),
            false => Err(format!("{len} elements can't be divided into {world} blocks")),
        }
    }
}

/// Whether a buffer could hold so many elements in all.
fn fit_memory(counts: &[usize], dtype: Dtype) -> bool {
    let total = counts.iter().try_fold(0_usize, |total, &count| total.checked_add(count));
    let bytes = total.and_then(|total| total.checked_mul(dtype.bytes()));
    bytes.is_some_and(|bytes| isize::try_from(bytes).is_ok())
}

fn check_lengths(
    lengths: Lengths,
    (puts, input): (Extent, usize),
    (gets, output): (Extent, usize),
) -> Result<(), String> {
    let expect = |what: &str, extent, expected: usize, len: usize| match extent {
        Extent::Nothing => Ok(()),
        _ if len == expected => Ok(()),
        _ => Err(format!("the {what} has {len} elements where {expected} are needed")),
    };
    match lengths {
        Lengths::InPlace(len) => {
            let needed =
                if puts == Extent::Whole || gets == Extent::Nothing { input } else { output };
            expect("buffer", Extent::Whole, needed, len)
        }
        Lengths::OutOfPlace { input: given_input, output: given_output } => {
            expect("input", puts, input, given_input)?;
            expect("output", gets, output, given_output)
        }
    }
}

impl Blocks {
    /// The elements of a rank's block among all.
    pub(crate) fn range(&self, rank: Rank) -> Range<usize> {
        match self {
            Self::Even(each) => rank * each..(rank + 1) * each,
            Self::Given(counts) => {
                let start: usize = counts[..rank].iter().sum();
                start..start + counts[rank]
            }
            Self::Pairs(..) => 0..0,
        }
    }

    /// All elements: of `blocks` blocks, if there are blocks; what is received or sent of pairs.
    pub(crate) fn whole(&self, blocks: Option<usize>, receives: bool) -> usize {
        match self {
            Self::Even(each) => each * blocks.unwrap_or(1),
            Self::Given(counts) => counts.iter().sum(),
            Self::Pairs(sends, received) => {
                if receives {
                    received.iter().sum()
                } else {
                    sends.iter().sum()
                }
            }
        }
    }
}
