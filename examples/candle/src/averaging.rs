//! Data parallelism for candle: weights that are the same on all ranks, and gradients averaged over
//! them.
//!
//! candle owns its gradients: `backward` allocates them, and returns them all at its end. So each
//! is copied into its bucket, and its average is copied into a tensor that takes its place. The
//! copies of later buckets hide the communication of earlier ones; the backward pass hides none.

use std::error::Error;
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{Storage, Tensor, Var};
use candle_nn::VarMap;
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, Dtype};

use crate::frameworks::Times;

/// The variables in an order that is the same on all ranks: the map has none.
pub(crate) fn sorted(variables: &VarMap) -> Vec<(String, Var)> {
    let map = variables.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut sorted: Vec<_> = map.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    sorted.sort_by(|(one, _), (other, _)| one.cmp(other));
    sorted
}

/// Gives all ranks the weights of rank 0. Every rank calls it.
pub(crate) fn broadcast(
    communicator: &Communicator,
    variables: &VarMap,
) -> Result<(), Box<dyn Error>> {
    for (_, variable) in sorted(variables) {
        let mut values = variable.flatten_all()?.to_vec1::<f32>()?;
        communicator.broadcast(&mut values, 0)?;
        variable.set(&Tensor::from_vec(values, variable.shape(), variable.device())?)?;
    }
    Ok(())
}

/// Averages the gradients of variables over all ranks.
pub(crate) struct Averaging {
    variables: Vec<(String, Var)>,
    buckets: Buckets,
}

impl Averaging {
    /// For variables in f32 on the CPU. Every rank calls it, with the same variables.
    pub(crate) fn new(
        communicator: &Communicator,
        variables: &VarMap,
    ) -> Result<Self, unisum::Error> {
        let variables = sorted(variables);
        let parameter =
            |(name, var): &(String, Var)| Parameter::new(name.as_str(), var.dims(), Dtype::F32);
        let parameters: Vec<_> = variables.iter().map(parameter).collect();
        let buckets = Buckets::builder(communicator).build(&parameters)?;
        Ok(Self { variables, buckets })
    }

    /// Replaces each gradient by the average of all ranks'. Every rank calls it after its backward
    /// pass.
    pub(crate) fn average(
        &mut self,
        gradients: &mut GradStore,
        times: &mut Times,
    ) -> Result<(), Box<dyn Error>> {
        let start = Instant::now();
        let step = self.buckets.begin()?;
        for (at, (name, variable)) in self.variables.iter().enumerate().rev() {
            let gradient = gradients.get(variable).ok_or_else(|| format!("{name}: no gradient"))?;
            let gradient = gradient.contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let (Storage::Cpu(storage), Some((from, to))) =
                (&*storage, layout.contiguous_offsets())
            else {
                return Err(format!("{name}: a gradient that is not on the CPU").into());
            };
            step.put(at, &storage.as_slice::<f32>()?[from..to])?;
        }
        let copied = times.copy_in.end(start);
        step.wait()?;
        let averaged = times.wait.end(copied);
        for (at, (_, variable)) in self.variables.iter().enumerate() {
            let average = self.buckets.gradient::<f32>(at);
            let average = Tensor::from_slice(average, variable.shape(), variable.device())?;
            gradients.insert(variable, average);
        }
        times.copy_out.end(averaged);
        Ok(())
    }
}
