//! Averages the gradients of all ranks, in buckets that travel while backward goes on.

use std::ops::AddAssign;
use std::time::Duration;

use unisum::buckets::{Buckets, Step, StepReport, View};
use unisum::{Communicator, Dtype, Error};

use crate::gradients::Gradients;
use crate::model::Parameter;
use crate::wire::Wire;

/// The gradient buckets of a model.
#[derive(Debug)]
pub(crate) struct Exchange {
    buckets: Buckets,
}

/// What the communication of some steps took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// How many steps.
    pub(crate) steps: usize,
    /// Time in which the rank waited for communication after it had computed.
    pub(crate) exposed: Duration,
    /// Time in which buckets were reduced, with waiting for ranks that were late.
    communicated: Duration,
    /// Bytes of gradients, as they are in memory.
    bytes: usize,
}

impl Exchange {
    /// Memory for the gradients of these parameters, in buckets of `bucket_bytes`; the first and
    /// the last are a quarter of that. `layout` is what [`Exchange::layout`] gave. Collective, as
    /// is every step.
    pub(crate) fn new(
        communicator: &Communicator,
        parameters: &[Parameter],
        (wire, bucket_bytes): (Wire, usize),
        layout: Option<&[u8]>,
    ) -> Result<Self, Error> {
        // The shared embedding counts as used once: the thread that runs backward adds both
        // gradients, and marks it when the second is in.
        let parameter = |it: &Parameter| {
            unisum::buckets::Parameter::new(it.name.clone(), &it.shape, Dtype::F32)
        };
        let parameters: Vec<_> = parameters.iter().map(parameter).collect();
        let builder = Buckets::builder(communicator)
            .bucket_bytes(bucket_bytes)
            .end_bucket_bytes(bucket_bytes / 4)
            .hook(wire.hook());
        let builder = layout.into_iter().fold(builder, |builder, layout| builder.layout(layout));
        Ok(Self { buckets: builder.build(&parameters)? })
    }

    /// A step: `backward` makes the gradients of this rank, [`Exchange::gradient`] is then the
    /// average over all, if the report says that it is finite.
    pub(crate) fn step<T>(
        &mut self,
        backward: impl FnOnce(&mut dyn Gradients) -> T,
    ) -> Result<(T, StepReport), Error> {
        let parameters = self.buckets.parameters().len();
        let step = self.buckets.begin()?;
        let mut views = Views { step: &step, open: (0..parameters).map(|_| None).collect() };
        let outcome = backward(&mut views);
        drop(views);
        Ok((outcome, step.wait()?))
    }

    /// The communicator of the view that steps have led into, if they have.
    pub(crate) fn take_communicator(&mut self) -> Option<Communicator> {
        self.buckets.take_communicator()
    }

    /// The average over all ranks.
    pub(crate) fn gradient(&self, parameter: usize) -> &[f32] {
        self.buckets.gradient(parameter)
    }

    /// From the next step on the loss is `factor` times as large.
    pub(crate) fn rescale(&mut self, factor: f32) {
        self.buckets.rescale_hook(factor);
    }

    /// Which gradient lies in which bucket: the same on all ranks.
    pub(crate) fn layout(&self) -> Vec<u8> {
        self.buckets.layout().to_bytes()
    }

    /// What this rank has to remember so that a later step gives the same bits: what compression
    /// has lost so far.
    pub(crate) fn state(&self) -> Vec<u8> {
        self.buckets.save_hook()
    }

    /// Takes up what [`Exchange::state`] gave.
    pub(crate) fn restore(&mut self, state: &[u8]) -> Result<(), Error> {
        self.buckets.restore_hook(state)
    }
}

/// The gradients of a step that backward works on.
struct Views<'s> {
    step: &'s Step<'s>,
    /// By parameter: its gradient from the first time that backward asks for it until it is ready.
    open: Vec<Option<View<'s, f32>>>,
}

impl Gradients for Views<'_> {
    fn accumulate(&mut self, parameter: usize) -> &mut [f32] {
        self.open[parameter].get_or_insert_with(|| {
            let view = self.step.view(parameter);
            view.expect("it is an f32 gradient of the model and not ready")
        })
    }

    fn ready(&mut self, parameter: usize) {
        let view = self.open[parameter].take();
        view.expect("backward has asked for it and it was not ready").ready();
    }
}

impl Cost {
    /// What a step took on this rank.
    pub(crate) fn of(report: &StepReport) -> Self {
        Self {
            steps: 1,
            exposed: report.exposed(),
            communicated: report.communicated(),
            bytes: report.buckets.iter().map(|bucket| bucket.bytes).sum(),
        }
    }

    /// The mean exposed time of a step.
    pub(crate) fn exposed_s_per_step(self) -> f64 {
        self.exposed.as_secs_f64() / self.steps.max(1) as f64
    }

    /// Gradient bytes a second of communication, whatever they were on the wire: the algorithm
    /// bandwidth, in GB/s.
    pub(crate) fn gigabytes_per_s(self) -> f64 {
        self.bytes as f64 / self.communicated.as_secs_f64() / 1e9
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.exposed += other.exposed;
        self.communicated += other.communicated;
        self.bytes += other.bytes;
    }
}
