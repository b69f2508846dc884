//! This rank's place in the world, and what the ranks tell each other beside the measured
//! operations (by all-reduces as well).

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

use unisum::{Collective, Communicator, ReduceOp};

use crate::Result;
use crate::args::Args;
use crate::check::Pattern;
use crate::device::Device;
use crate::operation::Operation;
use crate::value::Value;

/// A connected rank.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) comm: Communicator,
    /// With `-t cuda`.
    pub(crate) device: Option<Device>,
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
        if let Some(transport) = args.transport.as_ref().filter(|_| !args.is_on_device()) {
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
        let comm = builder.connect()?;
        let device = args.is_on_device().then(|| Device::open(&comm)).transpose()?;
        Ok(Self { comm, device, checks: Cell::new(0) })
    }

    /// What carries the data.
    pub(crate) fn transport(&self) -> String {
        let on_device = self.device.as_ref().map(Device::transport);
        on_device.unwrap_or_else(|| self.comm.transport()).to_owned()
    }

    /// Fixes the algorithm of the measured operations.
    ///
    /// # Errors
    /// If there is none of that name.
    pub(crate) fn set_algorithm(&self, name: Option<&str>) -> Result<()> {
        match &self.device {
            Some(device) => Ok(device.comm.set_algorithm(name)?),
            None => Ok(self.comm.set_algorithm(name)?),
        }
    }

    /// The algorithm of an operation.
    pub(crate) fn choice<T: Value>(&self, call: &Collective, count: usize) -> &'static str {
        match &self.device {
            Some(device) => device.comm.choice::<T>(call, count),
            None => self.comm.choice::<T>(call, count),
        }
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

    /// One operation on known data: how much came out wrong, over all ranks. The expectation is
    /// exact, so that ranks whose results differ are wrong.
    ///
    /// # Errors
    /// If an operation fails.
    pub(crate) fn checked<T: Value>(&self, operation: &mut Operation<'_, T>) -> Result<u64> {
        let seed = self.checks.replace(self.checks.get() + 1);
        let wrong = if operation.case.kind.moves_elements() {
            let pattern = Pattern::new(operation.op, operation.case.ranks, seed);
            operation.fill(&pattern)?;
            operation.run(&self.comm)?;
            operation.fetch()?;
            operation.wrong(&pattern)
        } else {
            self.early(operation)?
        };
        let mut wrong = [wrong as f64];
        self.sum(&mut wrong)?;
        Ok(wrong[0] as u64)
    }

    /// How often this rank went on from a barrier too early. Each rank comes late to one, by a
    /// time that starts when all others' clocks already run: nobody measures less.
    fn early<T: Value>(&self, barrier: &mut Operation<'_, T>) -> Result<u64> {
        const LATE_BY: Duration = Duration::from_millis(1);
        let mut early = 0;
        for late in 0..self.comm.world() {
            let start = Instant::now();
            self.align()?;
            if late == self.comm.rank() {
                thread::sleep(LATE_BY);
            }
            barrier.run(&self.comm)?;
            early += u64::from(start.elapsed() < LATE_BY);
        }
        Ok(early)
    }
}

/// Runs a body with `$T` standing for the Rust type of a dtype.
macro_rules! with_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        $crate::world::with_dtype!(@arms $dtype, $T, $body,
            F16 half::f16, Bf16 half::bf16, F32 f32, F64 f64, I8 i8, U8 u8, I16 i16, U16 u16,
            I32 i32, U32 u32, I64 i64, U64 u64, F8E4M3 unisum::f8e4m3, F8E5M2 unisum::f8e5m2,
            Bool unisum::Bool)
    };
    (@arms $dtype:expr, $T:ident, $body:expr, $($variant:ident $t:ty),*) => {
        match $dtype {
            $(unisum::Dtype::$variant => { type $T = $t; $body })*
            other => Err(format!("{other} is a type that this program does not know").into()),
        }
    };
}
pub(crate) use with_dtype;
