//! Many small tensors: a collective for each, and one batch of all.
//!
//! `cargo run --release --example batch`, with 8 processes; `-- 4` takes 4.

use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};

use unisum::{Buffers, Collective, Communicator, ReduceOp, local};

/// Tensors of these lengths, so many of each: about those of a ResNet-50's normalisation layers.
const TENSORS: [(usize, usize); 6] =
    [(64, 14), (128, 16), (256, 34), (512, 22), (1024, 14), (2048, 6)];
const ROUNDS: usize = 50;

fn main() -> Result<(), Box<dyn Error>> {
    if !local::is_rank() {
        let ranks = std::env::args().nth(1).map_or(Ok(8), |ranks| ranks.parse())?;
        let program = std::env::current_exe()?;
        let mut ranks = local::spawn(ranks, |_rank| Command::new(&program))?;
        return Ok(ranks.wait()?);
    }
    let comm = Communicator::from_environment()?;
    if comm.rank() == 0 {
        eprintln!("{}", comm.describe().summary());
    }
    Ok(run(&comm)?)
}

fn run(communicator: &Communicator) -> Result<(), unisum::Error> {
    let lengths = TENSORS.iter().flat_map(|&(length, times)| vec![length; times]);
    let mut tensors: Vec<Vec<f32>> = lengths.map(|length| vec![1.0; length]).collect();
    let collective = Collective::all_reduce(ReduceOp::Max);
    let (mut singly, mut batched) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        singly.push(time(communicator, || {
            tensors.iter_mut().try_for_each(|tensor| {
                communicator.run(&collective, Buffers::InPlace(tensor)).map(drop)
            })
        })?);
        batched.push(time(communicator, || {
            let mut all: Vec<_> =
                tensors.iter_mut().map(|tensor| Buffers::InPlace(&mut tensor[..])).collect();
            communicator.run_batch(&collective, &mut all).map(drop)
        })?);
    }
    assert!(tensors.iter().flatten().all(|&element| element == 1.0));
    if communicator.rank() == 0 {
        let [singly, batched] = [singly, batched].map(median);
        let ratio = singly.as_secs_f64() / batched.as_secs_f64();
        println!(
            "{} tensors over {}: {singly:?} one by one, {batched:?} as a batch, {ratio:.1} times",
            tensors.len(),
            communicator.transport()
        );
    }
    Ok(())
}

fn time(
    communicator: &Communicator,
    run: impl FnOnce() -> Result<(), unisum::Error>,
) -> Result<Duration, unisum::Error> {
    communicator.barrier()?;
    let start = Instant::now();
    run()?;
    Ok(start.elapsed())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
