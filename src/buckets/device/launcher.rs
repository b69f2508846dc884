//! The layer's thread: puts the average of each bucket into the layer's stream, in order, and votes
//! at the end of each step.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use unisum_kernels::{Dtype, Panic};

use super::flight::Flight;
use super::place::DevicePlace;
use crate::buckets::layout::Layout;
use crate::buckets::parameter::Parameter;
use crate::buckets::worker::explain;
use crate::device::Moment;
use crate::{
    Collective, Communicator, DeviceBuffer, DeviceCommunicator, DeviceStream, Error, ErrorKind,
    ReduceOp, Reduction,
};

pub(super) struct Core {
    pub(super) parameters: Arc<[Parameter]>,
    pub(super) layout: Layout,
    pub(super) detects_nonfinite: bool,
    memory: Memory,
    /// Moments that are not in use.
    spare: Mutex<Vec<Moment>>,
    pub(super) device: DeviceCommunicator,
    pub(super) votes: Communicator,
    /// After which there are no more steps.
    failed: OnceLock<Error>,
}

/// What the layer has on the device.
pub(super) struct Memory {
    buckets: Vec<Arc<DeviceBuffer<u8>>>,
    /// In which buckets are averaged.
    averaging: DeviceStream,
    /// When the averages of the last step have ended.
    averaged: Moment,
}

impl Memory {
    /// # Errors
    /// If the device has no memory for the buckets, or fails.
    pub(super) fn new(device: &DeviceCommunicator, layout: &Layout) -> Result<Self, Error> {
        let sizes = layout.plans().iter().map(|bucket| bucket.len * bucket.dtype.bytes());
        let buckets = sizes.map(|bytes| device.allocate(bytes).map(Arc::new));
        let buckets = buckets.collect::<Result<_, Error>>()?;
        let averaging = device.stream()?;
        // In order before the first step.
        let averaged = device.moment(&averaging, None)?;
        Ok(Self { buckets, averaging, averaged })
    }
}

impl Core {
    pub(super) fn new(
        (device, votes): (DeviceCommunicator, Communicator),
        parameters: Arc<[Parameter]>,
        (layout, memory): (Layout, Memory),
        detects_nonfinite: bool,
    ) -> Self {
        Self {
            parameters,
            layout,
            detects_nonfinite,
            memory,
            spare: Mutex::default(),
            device,
            votes,
            failed: OnceLock::new(),
        }
    }

    pub(super) fn address(&self, parameter: usize) -> u64 {
        let home = self.layout.home(parameter);
        let start = home.elements.start * self.parameters[parameter].dtype().bytes();
        self.memory.buckets[home.bucket].address() + start as u64
    }

    /// # Panics
    /// If there is no such parameter.
    pub(super) fn memory(&self, parameter: usize) -> DevicePlace {
        let (home, known) = (self.layout.home(parameter), &self.parameters[parameter]);
        let (count, dtype) = (known.count(), known.dtype());
        let start = home.elements.start * dtype.bytes();
        let (bucket, ordinal) = (self.memory.buckets[home.bucket].clone(), self.device.ordinal());
        DevicePlace { bucket, start, count, dtype, ordinal }
    }

    /// The bucket of a gradient of this type and length, and the byte at which it begins.
    ///
    /// # Errors
    /// If there is no such gradient.
    pub(super) fn place(
        &self,
        parameter: usize,
        dtype: Dtype,
        count: usize,
    ) -> Result<(&DeviceBuffer<u8>, usize), Error> {
        let refuse =
            |text: String| Err(Error::new(ErrorKind::Configuration, text).on(self.device.rank()));
        let Some(known) = self.parameters.get(parameter) else {
            let all = self.parameters.len();
            return refuse(format!("there is no parameter {parameter} among {all}"));
        };
        if (known.dtype(), known.count()) != (dtype, count) {
            return refuse(format!("{known} was given {count} elements of {dtype}"));
        }
        let home = self.layout.home(parameter);
        Ok((&self.memory.buckets[home.bucket], home.elements.start * dtype.bytes()))
    }

    /// Now, in a stream of the program's.
    pub(super) fn moment(&self, stream: &DeviceStream) -> Result<Moment, Error> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        self.device.moment(stream, spare)
    }

    /// What is put into the stream from now on comes after the averages of the last step.
    pub(super) fn follow_averages(&self, stream: &DeviceStream) -> Result<(), Error> {
        self.device.usable(stream)?;
        self.device.follow(stream, &self.memory.averaged)
    }

    /// Waits until the device has made the averages of the last step.
    pub(super) fn await_averages(&self) -> Result<(), Error> {
        self.device.synchronize(&self.memory.averaging, None)
    }

    /// Why no step can begin any more.
    pub(super) fn refusal(&self) -> Option<Error> {
        self.failed.get().map(Error::repeated)
    }

    /// Reduces step after step until there are no more orders.
    pub(super) fn launch(&self, flights: &Receiver<Arc<Flight>>) {
        while let Ok(flight) = flights.recv() {
            let end = Panic::catch(|| self.reduce(&flight)).unwrap_or_else(|panic| {
                let what = format!("the gradient buckets panicked: {}", panic.text());
                Err(self.votes.panicked_between_calls(&what))
            });
            if let Err(error) = &end
                && error.kind() != ErrorKind::StepFailed
            {
                // The first one holds.
                let _ = self.failed.set(error.clone());
            }
            flight.end(end);
        }
    }

    /// All buckets of a step, also of one that has failed: the others wait for this rank's.
    fn reduce(&self, flight: &Flight) -> Result<(), Error> {
        let average = Reduction::new(ReduceOp::Average);
        let average = if self.detects_nonfinite { average.detect_nonfinite() } else { average };
        let collective = Collective::all_reduce(average);
        for (number, (bucket, plan)) in
            self.memory.buckets.iter().zip(self.layout.plans()).enumerate()
        {
            let mut moments = flight.await_bucket(number);
            for moment in &moments {
                self.device.follow(&self.memory.averaging, moment)?;
            }
            self.spare.lock().unwrap_or_else(PoisonError::into_inner).append(&mut moments);
            self.device.run_as(&collective, plan.dtype, bucket, &self.memory.averaging)?;
        }
        self.device.again(&self.memory.averaged, &self.memory.averaging)?;
        self.vote(flight.await_close())
    }

    /// Whether all ranks have handed in the step without a fault.
    fn vote(&self, fault: Option<String>) -> Result<(), Error> {
        let mut faults = [u32::from(fault.is_some())];
        self.votes.all_reduce(&mut faults, ReduceOp::Max)?;
        match faults[0] {
            0 => Ok(()),
            _ => Err(explain(&self.votes, ErrorKind::StepFailed, fault.unwrap_or_default())?),
        }
    }
}
