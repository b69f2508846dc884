//! Four processes add up their ranks: `cargo run --example all_reduce`.

use std::error::Error;
use std::process::Command;

use unisum::{Communicator, ReduceOp};

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).is_none() {
        // Start this program four times; under mpirun, srun or torchrun only `join` is needed.
        let program = std::env::current_exe()?;
        let mut ranks = unisum::local::spawn(4, |_rank| {
            let mut command = Command::new(&program);
            command.arg("join");
            command
        })?;
        return Ok(ranks.wait()?);
    }
    let communicator = Communicator::from_environment()?;
    let mut data = communicator.allocate::<f32>(1000)?;
    data.fill(communicator.rank() as f32);
    communicator.all_reduce(&mut data, ReduceOp::Sum)?;
    println!("rank {} of {}: {}", communicator.rank(), communicator.world(), data[0]);
    Ok(())
}
