//! Four processes add up their ranks: `cargo run --example all_reduce`.

use std::error::Error;
use std::process::Command;

use unisum::{Communicator, ReduceOp, local};

fn main() -> Result<(), Box<dyn Error>> {
    if !local::is_rank() {
        // Started by hand: start four ranks. Under mpirun, srun or torchrun this is one already.
        let program = std::env::current_exe()?;
        let mut ranks = local::spawn(4, |_rank| Command::new(&program))?;
        return Ok(ranks.wait()?);
    }
    let communicator = Communicator::from_environment()?;
    if communicator.rank() == 0 {
        eprintln!("{}", communicator.describe().summary());
    }
    let mut data = communicator.allocate::<f32>(1000)?;
    data.fill(communicator.rank() as f32);
    communicator.all_reduce(&mut data, ReduceOp::Sum)?;
    println!("rank {} of {}: {}", communicator.rank(), communicator.world(), data[0]);
    Ok(())
}
