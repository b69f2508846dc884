//! Data parallelism for burn: weights that are the same on all ranks, and gradients averaged over
//! them.
//!
//! burn owns its gradients: `backward` allocates them, and returns them all at its end. So each
//! is copied into its bucket, and its average is copied into a tensor that takes its place. The
//! copies of later buckets hide the communication of earlier ones; the backward pass hides none.

use std::error::Error;
use std::time::Instant;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, Dtype};

use crate::frameworks::Times;

/// Gives all ranks the weights of rank 0. Every rank calls it.
pub(crate) fn broadcast<M: Module>(
    communicator: &Communicator,
    module: M,
) -> Result<M, Box<dyn Error>> {
    let mut broadcast = Broadcast { communicator, outcome: Ok(()) };
    let module = module.map(&mut broadcast);
    broadcast.outcome.map(|()| module)
}

struct Broadcast<'a> {
    communicator: &'a Communicator,
    outcome: Result<(), Box<dyn Error>>,
}

impl Broadcast<'_> {
    fn of_rank_0<const D: usize>(&self, weights: &Tensor<D>) -> Result<Tensor<D>, Box<dyn Error>> {
        let mut data = weights.try_to_data()?;
        self.communicator.broadcast(data.as_mut_slice::<f32>()?, 0)?;
        let received = Tensor::from_data(data, &weights.device());
        // Another tensor, which has to have its gradient kept as this one has.
        Ok(received.set_require_grad(weights.is_require_grad()))
    }
}

impl ModuleMapper for Broadcast<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.outcome.is_err() {
            return param;
        }
        param.map(|weights| {
            self.of_rank_0(&weights).unwrap_or_else(|error| {
                self.outcome = Err(error);
                weights
            })
        })
    }
}

/// Averages the gradients of a module over all ranks.
#[derive(Debug)]
pub(crate) struct Averaging {
    buckets: Buckets,
}

impl Averaging {
    /// For a module in f32 on the CPU, all of whose parameters are trained. Every rank calls it,
    /// with the same module.
    pub(crate) fn new(
        communicator: &Communicator,
        module: &impl Module,
    ) -> Result<Self, unisum::Error> {
        let mut found = Parameters::default();
        module.visit(&mut found);
        Ok(Self { buckets: Buckets::builder(communicator).build(&found.parameters)? })
    }

    /// Replaces each gradient by the average of all ranks'. Every rank calls it after its backward
    /// pass.
    pub(crate) fn average(
        &mut self,
        module: &impl Module,
        gradients: GradientsParams,
        times: &mut Times,
    ) -> Result<GradientsParams, Box<dyn Error>> {
        let start = Instant::now();
        let step = self.buckets.begin()?;
        let mut taken = Taken { gradients, data: Vec::new() };
        module.visit(&mut taken);
        for (at, data) in taken.data.iter().enumerate().rev() {
            let data = data.as_ref().ok_or_else(|| format!("parameter {at}: no gradient"))?;
            step.put(at, data.as_slice::<f32>()?)?;
        }
        let copied = times.copy_in.end(start);
        step.wait()?;
        let averaged = times.wait.end(copied);
        let mut averages =
            Averages { buckets: &self.buckets, next: 0, gradients: GradientsParams::new() };
        module.visit(&mut averages);
        let gradients = averages.gradients;
        times.copy_out.end(averaged);
        Ok(gradients)
    }
}

/// Names and shapes of a module's parameters, in the order in which it visits them.
#[derive(Default)]
struct Parameters {
    path: Vec<String>,
    parameters: Vec<Parameter>,
}

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let parameter = Parameter::new(self.path.join("."), &param.dims(), Dtype::F32);
        self.parameters.push(parameter);
    }
}

/// The gradients, out of burn's tensors: parameters have different ranks, and buckets are filled
/// from the last one on.
struct Taken {
    gradients: GradientsParams,
    data: Vec<Option<TensorData>>,
}

impl ModuleVisitor for Taken {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.data.push(self.gradients.remove::<D>(param.id).map(Tensor::into_data));
    }
}

/// The averages, in tensors of burn's.
struct Averages<'a> {
    buckets: &'a Buckets,
    next: usize,
    gradients: GradientsParams,
}

impl ModuleVisitor for Averages<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let average = self.buckets.gradient::<f32>(self.next).to_vec();
        let average = TensorData::new(average, param.shape());
        let device = param.device().without_autodiff();
        self.gradients.register(param.id, Tensor::<D>::from_data(average, &device));
        self.next += 1;
    }
}
