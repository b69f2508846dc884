//! Sums the gradients of all ranks: an all-reduce for each parameter, when it is ready.

use std::time::{Duration, Instant};

use unisum::{Buffer, Communicator, Error, ReduceOp};

use crate::gradients::Gradients;
use crate::model::Parameter;

/// The gradients of this rank while backward runs, of all ranks afterwards.
#[derive(Debug)]
pub(crate) struct Exchange<'a> {
    communicator: &'a Communicator,
    /// Registered memory: the other ranks of this host read the gradients where they are.
    gradients: Vec<Buffer<f32>>,
    spent: Duration,
    failure: Option<Error>,
}

/// What a step's communication took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Time in which the rank did nothing but communicate, and wait for ranks that were late.
    pub(crate) exposed: Duration,
    /// Bytes of gradients.
    pub(crate) bytes: usize,
}

impl Cost {
    /// Gradient bytes a second: the algorithm bandwidth, in GB/s. It counts waiting for late ranks.
    pub(crate) fn gigabytes_per_s(self) -> f64 {
        self.bytes as f64 / self.exposed.as_secs_f64() / 1e9
    }
}

impl<'a> Exchange<'a> {
    /// Memory for the gradients of these parameters. Collective, as is every step.
    pub(crate) fn new(
        communicator: &'a Communicator,
        parameters: &[Parameter],
    ) -> Result<Self, Error> {
        let memory = |parameter: &Parameter| communicator.allocate(parameter.count());
        let gradients = parameters.iter().map(memory).collect::<Result<_, _>>()?;
        Ok(Self { communicator, gradients, spent: Duration::ZERO, failure: None })
    }

    /// Starts a step from zeros.
    pub(crate) fn begin(&mut self) {
        self.spent = Duration::ZERO;
        self.gradients.iter_mut().for_each(|gradient| gradient.fill(0.0));
    }

    /// Ends a step: [`Exchange::gradient`] is then the same on all ranks.
    pub(crate) fn finish(&mut self) -> Result<Cost, Error> {
        let count: usize = self.gradients.iter().map(|gradient| gradient.len()).sum();
        let cost = Cost { exposed: self.spent, bytes: count * size_of::<f32>() };
        self.failure.take().map_or(Ok(cost), Err)
    }

    /// The sum over all ranks.
    pub(crate) fn gradient(&self, parameter: usize) -> &[f32] {
        &self.gradients[parameter]
    }

    /// What this rank has to remember so that a later step gives the same bits: nothing here.
    pub(crate) const fn state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes up what [`Exchange::state`] gave.
    pub(crate) fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        if state.is_empty() { Ok(()) } else { Err("it is of another kind of exchange".into()) }
    }
}

impl Gradients for Exchange<'_> {
    fn accumulate(&mut self, parameter: usize) -> &mut [f32] {
        &mut self.gradients[parameter]
    }

    fn ready(&mut self, parameter: usize) {
        if self.failure.is_none() {
            let start = Instant::now();
            let gradient = &mut self.gradients[parameter][..];
            self.failure = self.communicator.all_reduce(gradient, ReduceOp::Sum).err();
            self.spent += start.elapsed();
        }
    }
}
