//! Ways to average a model's gradients: the one that is measured, and those it is compared with.

use std::time::{Duration, Instant};

use unisum::buckets::{Buckets, Compressed, Parameter};
use unisum::{Buffer, Communicator, Dtype, ReduceOp, Work};

use super::backward::Backward;
use super::gradients::Gradients;
use super::options::{Options, Wire};
use crate::Result;
use crate::models;

/// A way to average all gradients of a model in a training step.
pub(crate) trait Way {
    /// What it is called in reports.
    fn name(&self) -> &'static str;

    /// What gradients travel as.
    fn wire(&self) -> Wire {
        Wire::F32
    }

    /// How many reductions there are in a step.
    fn launches(&self) -> usize;

    /// One step: a backward pass of a length, which writes gradients if any are given, and the
    /// average of all.
    ///
    /// # Errors
    /// If a reduction fails.
    fn step(&mut self, pass: &Pass<'_>) -> Result<()>;

    /// The average of a parameter's gradients, after a step.
    fn average(&self, parameter: usize) -> &[f32];
}

/// A backward pass to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) backward: &'a Backward,
    pub(crate) length: Duration,
    /// What is written; nothing if only time counts, as a GPU would write it.
    pub(crate) gradients: Option<Gradients>,
}

impl Pass<'_> {
    fn run(&self, ready: impl FnMut(usize) -> Result<()>) -> Result<()> {
        self.backward.run(Instant::now(), self.length, ready)
    }

    fn fill(&self, parameter: usize, gradient: &mut [f32]) {
        if let Some(gradients) = &self.gradients {
            gradients.fill(parameter, gradient);
        }
    }
}

/// The layer of gradient buckets.
#[derive(Debug)]
pub(crate) struct InBuckets {
    buckets: Buckets,
    wire: Wire,
}

impl InBuckets {
    /// # Errors
    /// As [`unisum::buckets::Builder::build`].
    pub(crate) fn new(
        comm: &Communicator,
        model: &[models::Parameter],
        options: &Options,
        wire: Wire,
    ) -> Result<Self> {
        // Gradients become ready in the order of the first layout: another would be the same.
        let mut builder = Buckets::builder(comm).relayout(false);
        if let Some(bytes) = options.bucket_bytes {
            builder = builder.bucket_bytes(bytes);
        }
        if let Some(bytes) = options.end_bucket_bytes {
            builder = builder.end_bucket_bytes(bytes);
        }
        if let Some(encoding) = wire.0 {
            builder = builder.hook(Compressed::new(encoding));
        }
        let new = |it: &models::Parameter| Parameter::new(&it.name, &it.shape, Dtype::F32);
        let parameters: Vec<_> = model.iter().map(new).collect();
        Ok(Self { buckets: builder.build(&parameters)?, wire })
    }
}

impl Way for InBuckets {
    fn name(&self) -> &'static str {
        "buckets"
    }

    fn wire(&self) -> Wire {
        self.wire
    }

    fn launches(&self) -> usize {
        self.buckets.layout().buckets().len()
    }

    fn step(&mut self, pass: &Pass<'_>) -> Result<()> {
        let step = self.buckets.begin()?;
        pass.run(|parameter| {
            let mut gradient = step.view_to_overwrite(parameter)?;
            pass.fill(parameter, &mut gradient);
            gradient.ready();
            Ok(())
        })?;
        step.wait()?;
        Ok(())
    }

    fn average(&self, parameter: usize) -> &[f32] {
        self.buckets.gradient(parameter)
    }
}

/// One all-reduce of all gradients, after the backward pass.
#[derive(Debug)]
pub(crate) struct AtEnd<'a> {
    comm: &'a Communicator,
    all: Buffer<f32>,
    /// Where each parameter begins, and where the last ends.
    bounds: Vec<usize>,
}

impl<'a> AtEnd<'a> {
    /// # Errors
    /// If there is no memory.
    pub(crate) fn new(comm: &'a Communicator, model: &[models::Parameter]) -> Result<Self> {
        let mut bounds = vec![0];
        bounds.extend(model.iter().scan(0, |end, parameter| {
            *end += parameter.count();
            Some(*end)
        }));
        let all = comm.allocate(bounds[model.len()])?;
        Ok(Self { comm, all, bounds })
    }
}

impl Way for AtEnd<'_> {
    fn name(&self) -> &'static str {
        "at_end"
    }

    fn launches(&self) -> usize {
        1
    }

    fn step(&mut self, pass: &Pass<'_>) -> Result<()> {
        pass.run(|parameter| {
            let range = self.bounds[parameter]..self.bounds[parameter + 1];
            pass.fill(parameter, &mut self.all[range]);
            Ok(())
        })?;
        Ok(self.comm.all_reduce(&mut self.all, ReduceOp::Average)?)
    }

    fn average(&self, parameter: usize) -> &[f32] {
        &self.all[self.bounds[parameter]..self.bounds[parameter + 1]]
    }
}

/// An asynchronous all-reduce of each gradient, when it is ready.
#[derive(Debug)]
pub(crate) struct EachTensor<'a> {
    comm: &'a Communicator,
    /// Emptied while they are reduced.
    gradients: Vec<Option<Buffer<f32>>>,
}

impl<'a> EachTensor<'a> {
    /// # Errors
    /// If there is no memory.
    pub(crate) fn new(comm: &'a Communicator, model: &[models::Parameter]) -> Result<Self> {
        let allocate = |it: &models::Parameter| comm.allocate(it.count()).map(Some);
        let gradients = model.iter().map(allocate).collect::<std::result::Result<_, _>>()?;
        Ok(Self { comm, gradients })
    }
}

impl Way for EachTensor<'_> {
    fn name(&self) -> &'static str {
        "each_tensor"
    }

    fn launches(&self) -> usize {
        self.gradients.len()
    }

    fn step(&mut self, pass: &Pass<'_>) -> Result<()> {
        let mut under_way: Vec<(usize, Work<Buffer<f32>>)> = Vec::new();
        pass.run(|parameter| {
            let mut gradient = self.gradients[parameter].take().ok_or("an earlier step failed")?;
            pass.fill(parameter, &mut gradient);
            let work = self.comm.all_reduce_async(gradient, ReduceOp::Average);
            under_way.push((parameter, work));
            Ok(())
        })?;
        for (parameter, work) in under_way {
            self.gradients[parameter] = Some(work.wait()?);
        }
        Ok(())
    }

    fn average(&self, parameter: usize) -> &[f32] {
        self.gradients[parameter].as_deref().unwrap_or_default()
    }
}
