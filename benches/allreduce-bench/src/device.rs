//! Operations on the memory of this rank's CUDA device (`-t cuda`), timed by events.

use std::time::Instant;

use unisum::{
    Collective, Communicator, DeviceBuffer, DeviceCommunicator, DeviceRoute, DeviceStream,
};

use crate::Result;
use crate::value::Value;

/// This rank's device, and the stream in which all operations are.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) comm: DeviceCommunicator,
    stream: DeviceStream,
}

/// What operations one after the other took.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    /// By the device's clock, from the end of the operation before to the end of each, in seconds.
    pub(crate) by_events_s: Vec<f64>,
    /// By the host's clock, until all have ended, for each operation, in seconds.
    pub(crate) wall_s: f64,
}

impl Device {
    /// The device for this rank: by its number on the host, as if there were enough of them.
    ///
    /// # Errors
    /// On all ranks, if one has no driver or no device.
    pub(crate) fn open(comm: &Communicator) -> Result<Self> {
        // Without one, the call below says so on all ranks.
        let devices = unisum::cuda_devices().unwrap_or(1);
        let comm = comm.on_device(comm.local_rank() % devices)?;
        let stream = comm.stream()?;
        Ok(Self { comm, stream })
    }

    /// How data moves, as a transport's name.
    pub(crate) fn transport(&self) -> &'static str {
        match self.comm.route() {
            DeviceRoute::CudaIpc => "cuda-ipc",
            DeviceRoute::Hierarchical { .. } => "cuda-hierarchical",
            DeviceRoute::Staged { .. } => "cuda-staged",
        }
    }

    /// Has operations enqueued one after the other, and waits for all.
    ///
    /// # Errors
    /// If one fails.
    pub(crate) fn timed(
        &self,
        repetitions: usize,
        mut enqueue: impl FnMut() -> Result<()>,
    ) -> Result<Times> {
        let mut events = Vec::with_capacity(repetitions + 1);
        for _ in 0..=repetitions {
            events.push(self.comm.event()?);
        }
        let start = Instant::now();
        events[0].record(&self.stream)?;
        for event in &events[1..] {
            enqueue()?;
            event.record(&self.stream)?;
        }
        self.comm.synchronize(&self.stream, None)?;
        let wall_s = start.elapsed().as_secs_f64() / repetitions as f64;
        let mut by_events_s = Vec::with_capacity(repetitions);
        for pair in events.windows(2) {
            by_events_s.push(pair[1].seconds_since(&pair[0])?);
        }
        Ok(Times { by_events_s, wall_s })
    }
}

/// The device's buffers of an operation; the host's hold what goes there and what comes back.
#[derive(Debug)]
pub(crate) struct OnDevice<'a, T> {
    pub(crate) device: &'a Device,
    /// The input, if it lies apart.
    apart: Option<DeviceBuffer<T>>,
    data: DeviceBuffer<T>,
}

impl<'a, T: Value> OnDevice<'a, T> {
    /// Buffers of so many elements.
    ///
    /// # Errors
    /// If the device has no memory.
    pub(crate) fn allocate(device: &'a Device, apart: Option<usize>, data: usize) -> Result<Self> {
        let apart = apart.map(|count| device.comm.allocate(count)).transpose()?;
        Ok(Self { device, apart, data: device.comm.allocate(data)? })
    }

    /// Copies the host's buffers to the device.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn send(&mut self, apart: Option<&[T]>, data: &[T]) -> Result<()> {
        let stream = &self.device.stream;
        if let (Some(to), Some(from)) = (&mut self.apart, apart) {
            to.write(0, from, stream)?;
        }
        Ok(self.data.write(0, data, stream)?)
    }

    /// Copies the device's buffers to the host, when everything in the stream has ended.
    ///
    /// # Errors
    /// If the device or an operation has failed.
    pub(crate) fn fetch(&self, apart: Option<&mut [T]>, data: &mut [T]) -> Result<()> {
        let Device { comm, stream } = self.device;
        comm.synchronize(stream, None)?;
        if let (Some(from), Some(to)) = (&self.apart, apart) {
            from.read(0, to, stream)?;
        }
        Ok(self.data.read(0, data, stream)?)
    }

    /// Enqueues the operation.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) fn run(&mut self, call: &Collective) -> Result<()> {
        let Device { comm, stream } = self.device;
        Ok(comm.run(call, self.apart.as_ref(), &mut self.data, stream)?)
    }
}
