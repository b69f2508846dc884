//! Averages gradients on CUDA devices bucket by bucket, while later ones are still computed:
//! `cargo run --example device_gradients` starts a rank for each device, and two at least.

use std::error::Error;
use std::process::Command;

use unisum::{Communicator, DeviceBuffer, ReduceOp, Reduction, local};

/// The gradients of a few layers, which become ready together, are one bucket.
const BUCKETS: usize = 4;
const BUCKET_ELEMENTS: usize = 100_000;

fn main() -> Result<(), Box<dyn Error>> {
    let devices = unisum::cuda_devices()?;
    if !local::is_rank() {
        let program = std::env::current_exe()?;
        let mut ranks = local::spawn(devices.max(2), |_rank| Command::new(&program))?;
        return Ok(ranks.wait()?);
    }
    let communicator = Communicator::from_environment()?;
    if communicator.rank() == 0 {
        eprintln!("{}", communicator.describe().summary());
    }
    let device = communicator.on_device(communicator.local_rank() % devices)?;
    let (computing, reducing) = (device.stream()?, device.stream()?);
    let mut buckets = Vec::new();
    for _ in 0..BUCKETS {
        buckets.push(device.allocate::<f32>(BUCKET_ELEMENTS)?);
    }
    let average = Reduction::new(ReduceOp::Average).detect_nonfinite();
    for step in 0..3 {
        for (number, bucket) in buckets.iter_mut().enumerate() {
            backward(bucket, (communicator.rank(), step, number), &computing)?;
            // From here on, the next bucket is computed and this one is averaged, at the same time.
            reducing.follow(&computing)?;
            device.all_reduce(bucket, average, &reducing)?;
        }
        // The optimizer's kernels would come next in this stream.
        computing.follow(&reducing)?;
        let is_usable = !device.take_nonfinite(&computing, None)?;
        let mut gradient = [0.0];
        buckets[BUCKETS - 1].read(0, &mut gradient, &computing)?;
        if communicator.rank() == 0 {
            println!("step {step}: {}, usable: {is_usable}", gradient[0]);
        }
    }
    Ok(())
}

/// Stands for kernels that compute the gradients of some layers.
fn backward(
    bucket: &mut DeviceBuffer<f32>,
    (rank, step, number): (usize, usize, usize),
    stream: &unisum::DeviceStream,
) -> Result<(), unisum::Error> {
    // In the second step, one rank's gradients overflow.
    let odd = step == 1 && rank == 1;
    let value = if odd { f32::INFINITY } else { (rank + step + number) as f32 };
    bucket.write(0, &vec![value; BUCKET_ELEMENTS], stream)
}
