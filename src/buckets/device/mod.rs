//! Gradient buckets in the memory of a device: each is averaged in a stream of its own while the
//! program's streams compute the gradients of the next.

mod flight;
mod launcher;
mod place;
mod step;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use unisum_kernels::Element;
use unisum_link::fork;

pub use place::DevicePlace;
pub use step::DeviceStep;

use super::builder::{check_signature, refuse_any};
use super::layout::{Layout, Limits};
use super::parameter::{self, Parameter};
use crate::communicator::groups::Making;
use crate::{Communicator, DeviceCommunicator, DeviceStream, Error, ErrorKind};
use flight::Flight;
use launcher::{Core, Memory};

/// The gradients of a model in buckets in the memory of this rank's device, as
/// [`Buckets`](super::Buckets) has them in the memory of the host.
///
/// The program's kernels write gradients at [`DeviceBuckets::address`] and mark them ready in
/// their stream. A bucket is averaged over all ranks when the streams have come that far, in a
/// stream of the layer's own; no host thread waits for a device. Buckets are launched in the same
/// order on all ranks, whatever the order of readiness.
///
/// ```no_run
/// use unisum::Communicator;
/// use unisum::Dtype;
/// use unisum::buckets::{DeviceBuckets, Parameter};
///
/// fn train(communicator: &Communicator) -> Result<(), unisum::Error> {
///     let weight = Parameter::new("weight", &[128, 64], Dtype::F32);
///     let bias = Parameter::new("bias", &[64], Dtype::F32);
///     let device = communicator.local_rank();
///     let mut buckets = DeviceBuckets::builder(communicator).build(device, &[weight, bias])?;
///     let stream = buckets.device().stream()?;
///     for _ in 0..3 {
///         let step = buckets.begin()?;
///         for parameter in [1, 0] {
///             // The backward pass: kernels in `stream` write to `step.address(parameter)`.
///             step.ready(parameter, &stream)?;
///         }
///         step.wait(&stream)?;
///         // The optimizer's kernels, put into `stream` here, read the averages.
///     }
///     Ok(())
/// }
/// ```
///
/// The gradients' places never change. Accumulation needs no call: a backward pass outside of a
/// step adds to the gradients, and the last one is in a step. Gradients keep their averages after
/// a step; the program zeroes them where its kernels add.
///
/// Not there on devices: other hooks than the average, sharding, a layout by the observed order,
/// uneven inputs, and going on after a rank is lost.
pub struct DeviceBuckets {
    core: Arc<Core>,
    /// The last step.
    last: Option<Arc<Flight>>,
    /// Dropped before the thread is joined.
    orders: Option<Sender<Arc<Flight>>>,
    thread: Option<JoinHandle<()>>,
    fork_generation: u32,
}

/// Settings of [`DeviceBuckets`], the same on all ranks.
#[derive(Debug)]
pub struct DeviceBuilder<'c> {
    communicator: &'c Communicator,
    limits: Limits,
    detects_nonfinite: bool,
}

impl DeviceBuckets {
    /// A builder, with default settings, of a layer for the ranks of a communicator.
    pub const fn builder(communicator: &Communicator) -> DeviceBuilder<'_> {
        DeviceBuilder { communicator, limits: Limits::DEFAULT, detects_nonfinite: true }
    }

    /// The device, to make streams of.
    pub fn device(&self) -> &DeviceCommunicator {
        &self.core.device
    }

    /// The parameters, in the given order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.core.parameters
    }

    /// Which parameters are in which bucket.
    pub fn layout(&self) -> &Layout {
        &self.core.layout
    }

    /// Where a parameter's gradient begins on the device: as many elements of its type as it has,
    /// zero at first. It stays there as long as the layer lives.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn address(&self, parameter: usize) -> u64 {
        self.core.address(parameter)
    }

    /// The same, with the memory kept as long as the result.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn place(&self, parameter: usize) -> DevicePlace {
        self.core.memory(parameter)
    }

    /// Copies a gradient to the host, after what is in the stream. Blocks until that is done.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such parameter, or it has another type or
    /// length; [`ErrorKind::Device`] if something in the stream, or the copy, fails.
    pub fn read<T: Element>(
        &self,
        parameter: usize,
        elements: &mut [T],
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        let (bucket, start) = self.core.place(parameter, T::DTYPE, elements.len())?;
        bucket.read_elements(start, elements, stream)
    }

    /// Begins a step, whose gradients are averaged over all ranks. Waits until all ranks have
    /// handed in the step before.
    ///
    /// Collective: every rank begins the same number of steps.
    ///
    /// # Errors
    /// If the job, or this rank's device, has failed; in a forked child. [`ErrorKind::Timeout`], on
    /// this rank alone, if the device has not made the averages of a step that was dropped or has
    /// failed: the step can be begun again.
    pub fn begin(&mut self) -> Result<DeviceStep<'_>, Error> {
        let rank = self.core.device.rank();
        if fork::current() != self.fork_generation {
            return Err(Error::forked().on(rank));
        }
        self.settle();
        if let Some(error) = self.core.refusal() {
            return Err(error);
        }
        if self.last.as_ref().is_some_and(|last| !last.is_followed()) {
            // No stream of the program's waits for what is still made of it, in the memory that
            // this step writes.
            self.core.await_averages()?;
        }
        let flight = Arc::new(Flight::new(&self.core.parameters, &self.core.layout));
        let orders = self.orders.as_ref().expect("there until the drop");
        orders.send(flight.clone()).expect("the thread takes orders until the drop");
        self.last = Some(flight.clone());
        Ok(DeviceStep::new(flight, &self.core))
    }

    /// Whether an average since this was last asked is infinite or NaN: the same on all ranks that
    /// ask after the same steps. Waits for the averages and for the stream; see
    /// [`DeviceCommunicator::take_nonfinite`].
    ///
    /// # Errors
    /// As [`DeviceCommunicator::synchronize`]. [`ErrorKind::Configuration`] if the layer was built
    /// with [`DeviceBuilder::detect_nonfinite`] off.
    pub fn take_nonfinite(
        &mut self,
        stream: &DeviceStream,
        timeout: Option<Duration>,
    ) -> Result<bool, Error> {
        if !self.core.detects_nonfinite {
            let text = "these buckets were built with `detect_nonfinite(false)`";
            return Err(Error::new(ErrorKind::Configuration, text).on(self.core.device.rank()));
        }
        if fork::current() != self.fork_generation {
            return Err(Error::forked().on(self.core.device.rank()));
        }
        self.settle();
        self.core.device.take_nonfinite(stream, timeout)
    }

    /// Waits until the last step, which may have been dropped or forgotten, has ended.
    fn settle(&self) {
        if let Some(last) = &self.last {
            last.close(|| Some("the step was forgotten before it was waited for".into()));
            // Who waited for it was told.
            let _ = last.await_end();
        }
    }
}

impl Drop for DeviceBuckets {
    fn drop(&mut self) {
        if fork::current() != self.fork_generation {
            // The child has no such thread.
            std::mem::forget((self.thread.take(), self.orders.take()));
            return;
        }
        if let Some(last) = &self.last {
            last.close(|| Some("the step was forgotten before it was waited for".into()));
        }
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics but by a fault of this library, which its hook has told.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for DeviceBuckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuckets").field("layout", &self.core.layout).finish_non_exhaustive()
    }
}

impl DeviceBuilder<'_> {
    /// As [`super::Builder::bucket_bytes`].
    #[must_use]
    pub const fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.limits.bytes = bytes;
        self
    }

    /// As [`super::Builder::end_bucket_bytes`].
    #[must_use]
    pub const fn end_bucket_bytes(mut self, bytes: usize) -> Self {
        self.limits.end_bytes = bytes;
        self
    }

    /// Whether averages are looked at for infinite and NaN elements
    /// ([`DeviceBuckets::take_nonfinite`]), as they are made. Default: yes.
    #[must_use]
    pub const fn detect_nonfinite(mut self, detects: bool) -> Self {
        self.detects_nonfinite = detects;
        self
    }

    /// Builds the layer for a model's parameters on device number `ordinal` of this process, in the
    /// order in which they were registered: buckets hold them in reverse.
    ///
    /// Collective: every rank of the communicator calls it, with the same parameters and settings,
    /// and any device. Blocks. The layer has its own communicators, stream and thread, so that its
    /// reductions never mix with other collectives of the program.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`], on all ranks, if parameters or settings differ between ranks (the
    /// first difference is named) or are invalid, or if a device has no memory for the buckets; as
    /// [`Communicator::on_device`].
    pub fn build(self, ordinal: usize, parameters: &[Parameter]) -> Result<DeviceBuckets, Error> {
        let votes = self.communicator.duplicate_for(&Making::Buckets)?;
        let rank = votes.rank();
        let why = parameter::check(parameters).err().unwrap_or_default();
        refuse_any(&votes, &votes.exchange(why.into_bytes())?)?;
        check_signature(&votes, &parameter::signature(&self.told(), parameters))?;
        let order: Vec<usize> = (0..parameters.len()).rev().collect();
        let layout = Layout::new(0, parameters, &order, self.limits);
        let device = votes.on_device(ordinal)?;
        let (orders, flights) = mpsc::channel();
        let (give, given) = mpsc::channel::<Arc<Core>>();
        let launch = move || {
            if let Ok(core) = given.recv() {
                core.launch(&flights);
            }
        };
        let made = Memory::new(&device, &layout).and_then(|memory| {
            let thread = thread::Builder::new().name("unisum-buckets".into()).spawn(launch);
            let thread = thread.map_err(|error| {
                let text = format!("starting a thread for gradient buckets: {error}");
                Error::new(ErrorKind::Memory, text).on(rank)
            })?;
            Ok((memory, thread))
        });
        let why = made.as_ref().map_or_else(ToString::to_string, |_| String::new());
        refuse_any(&votes, &votes.exchange(why.into_bytes())?)?;
        let (memory, thread) = made?;
        let on_device = (layout, memory);
        let core = Core::new((device, votes), parameters.into(), on_device, self.detects_nonfinite);
        let core = Arc::new(core);
        // The thread waits for it.
        let _ = give.send(core.clone());
        let (orders, thread) = (Some(orders), Some(thread));
        let fork_generation = fork::generation();
        Ok(DeviceBuckets { core, last: None, orders, thread, fork_generation })
    }

    /// The settings by name, for ranks to compare.
    fn told(&self) -> String {
        let Limits { bytes, end_bytes, .. } = self.limits;
        [
            format!("bucket_bytes {bytes}"),
            format!("end_bucket_bytes {end_bytes}"),
            format!("detect_nonfinite {}", self.detects_nonfinite),
            "on devices".to_owned(),
        ]
        .join(parameter::SETTINGS_SEPARATOR)
    }
}
