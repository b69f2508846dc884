//! This rank's place in the world, and what the ranks tell each other beside the measured
//! operations (by all-reduces as well).

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use unisum::{Buffer, Communicator, Dtype, ReduceOp};

use crate::Result;
use crate::args::{Args, Memory};
use crate::check::{Pattern, hash};
use crate::value::Value;

/// A connected rank.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) comm: Communicator,
    /// Checks so far: each uses data of its own, so that left-over results can't pass.
    checks: Cell<u64>,
}

impl World {
    /// Joins the world of the environment.
    ///
    /// # Errors
    /// If the ranks do not find each other.
    pub(crate) fn connect(args: &Args) -> Result<Self> {
        let mut builder = Communicator::builder();
        if let Some(transport) = &args.transport {
            builder = builder.transport(transport);
        }
        if let Some(ports) = &args.port_range {
            builder = builder.port_range(ports);
        }
        if let Some(names) = &args.interface {
            builder = builder.interface(names);
        }
        if let Some(timeout) = args.timeout {
            builder = builder.timeout(timeout);
        }
        Ok(Self { comm: builder.connect()?, checks: Cell::new(0) })
    }

    /// Whether this rank prints.
    pub(crate) fn is_first(&self) -> bool {
        self.comm.rank() == 0
    }

    /// Whether there is nobody to reduce with.
    pub(crate) fn is_alone(&self) -> bool {
        self.comm.world() == 1
    }

    /// The largest of all ranks' values, one by one.
    ///
    /// # Errors
    /// If the all-reduce fails.
    pub(crate) fn max(&self, values: &mut [f64]) -> Result<()> {
        Ok(self.comm.all_reduce(values, ReduceOp::Max)?)
    }

    /// The sums of all ranks' values, one by one.
    ///
    /// # Errors
    /// If the all-reduce fails.
    pub(crate) fn sum(&self, values: &mut [f64]) -> Result<()> {
        Ok(self.comm.all_reduce(values, ReduceOp::Sum)?)
    }

    /// Returns once all ranks have called.
    ///
    /// # Errors
    /// If the all-reduce fails.
    pub(crate) fn align(&self) -> Result<()> {
        self.max(&mut [0.0])
    }

    /// One all-reduce on known data: how many elements came out wrong, over all ranks. At least 1
    /// if the ranks' results are not bitwise equal.
    ///
    /// # Errors
    /// If an all-reduce fails.
    pub(crate) fn checked<T: Value>(&self, data: &mut [T], op: ReduceOp) -> Result<u64> {
        let seed = self.checks.replace(self.checks.get() + 1);
        let (world, rank) = (self.comm.world(), self.comm.rank());
        let pattern = Pattern::new(op, world, rank, seed, data.len());
        pattern.fill(data);
        self.comm.all_reduce(data, op)?;
        let mut wrong = [pattern.wrong(data) as f64];
        self.sum(&mut wrong)?;
        let differ = self.differ(hash(data))?;
        Ok((wrong[0] as u64).max(u64::from(differ)))
    }

    /// Whether the ranks' words differ: the smallest word is the largest on equal ones only.
    fn differ(&self, word: u64) -> Result<bool> {
        let mut bounds = [word, !word];
        self.comm.all_reduce(&mut bounds, ReduceOp::Min)?;
        Ok(bounds[0] != !bounds[1])
    }
}

/// A buffer in the memory that was asked for.
pub(crate) enum Data<T> {
    Registered(Buffer<T>),
    Private(Vec<T>),
}

impl<T: Value> Data<T> {
    /// Room for `count` elements.
    ///
    /// # Errors
    /// If there is no memory.
    pub(crate) fn allocate(comm: &Communicator, memory: Memory, count: usize) -> Result<Self> {
        Ok(match memory {
            Memory::Registered => Self::Registered(comm.allocate(count)?),
            Memory::Private => {
                let mut data = Vec::new();
                data.try_reserve_exact(count)?;
                data.resize(count, T::fixed_point(ReduceOp::Sum));
                Self::Private(data)
            }
        })
    }
}

impl<T> Deref for Data<T>
where
    Buffer<T>: Deref<Target = [T]>,
{
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Registered(buffer) => buffer,
            Self::Private(data) => data,
        }
    }
}

impl<T> DerefMut for Data<T>
where
    Buffer<T>: DerefMut<Target = [T]>,
{
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Registered(buffer) => buffer,
            Self::Private(data) => data,
        }
    }
}

/// Runs a body with `$T` standing for the Rust type of a dtype.
macro_rules! with_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        $crate::world::with_dtype!(@arms $dtype, $T, $body,
            F16 half::f16, Bf16 half::bf16, F32 f32, F64 f64, I8 i8, U8 u8, I16 i16, U16 u16,
            I32 i32, U32 u32, I64 i64, U64 u64)
    };
    (@arms $dtype:expr, $T:ident, $body:expr, $($variant:ident $t:ty),*) => {
        match $dtype {
            $(unisum::Dtype::$variant => { type $T = $t; $body })*
            other => Err(format!("{other} is a type that this program does not know").into()),
        }
    };
}
pub(crate) use with_dtype;

/// How many elements fit, and a word if that is not all of the bytes.
pub(crate) fn elements(bytes: u64, dtype: Dtype) -> (usize, Option<String>) {
    let size = dtype.bytes() as u64;
    let count = bytes / size;
    let note = (count * size != bytes).then(|| {
        format!(
            "note: {bytes} B is no whole number of {dtype} ({size} B); using {} B",
            count * size
        )
    });
    (count as usize, note)
}
