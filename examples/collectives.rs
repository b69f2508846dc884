//! Every collective once, between four processes: `cargo run --example collectives`.

use std::error::Error;
use std::process::Command;

use unisum::{
    Buffers, Collective, Communicator, CustomOp, Mesh, OutOfPlace, ReduceOp, Reduction, local,
};

fn main() -> Result<(), Box<dyn Error>> {
    if !local::is_rank() {
        let program = std::env::current_exe()?;
        let mut ranks = local::spawn(4, |_rank| Command::new(&program))?;
        return Ok(ranks.wait()?);
    }
    let comm = Communicator::from_environment()?;
    if comm.rank() == 0 {
        eprintln!("{}", comm.describe().summary());
    }
    let (rank, world, root) = (comm.rank() as f32, comm.world(), 0);
    let (block, blocks) = (vec![rank; 2], vec![rank; 2 * world]);
    let (mut out, mut all, mut data) = (vec![0.0; 2], vec![0.0; 2 * world], vec![rank; 3]);
    comm.all_reduce(&mut data, ReduceOp::Sum)?;
    assert_eq!(data, [6.0; 3]);
    comm.reduce(&mut data, ReduceOp::Max, root)?;
    comm.broadcast(&mut data, 3)?;
    comm.all_gather(&block, &mut all)?;
    assert_eq!(all, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
    comm.reduce_scatter(&blocks, &mut out, ReduceOp::Sum)?;
    assert_eq!(out, [6.0; 2]);
    comm.all_to_all(&blocks, &mut all)?;
    comm.gather(&block, &mut all, root)?;
    comm.scatter(&blocks, &mut out, root)?;
    comm.barrier()?;
    // Blocks of different lengths: rank r has r elements.
    let (mine, mut uneven) = (vec![rank; comm.rank()], vec![0.0; 6]);
    let collective = Collective::all_gather().with_counts(&[0, 1, 2, 3]);
    comm.run(&collective, Buffers::OutOfPlace(&mine, &mut uneven))?;
    assert_eq!(uneven, [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]);
    // In place, asynchronously, with a factor, and by a function of our own.
    comm.run(&Collective::reduce_scatter(ReduceOp::Sum), Buffers::InPlace(&mut all))?;
    let (work, told) = comm.start(Collective::all_gather(), OutOfPlace(block, all)).wait()?;
    assert!(work.1.len() == 8 && !told.nonfinite);
    comm.all_reduce(&mut data, Reduction::sum_scaled_by(0.25).detect_nonfinite())?;
    let longest = |most: &mut [f32], other: &[f32]| {
        most.iter_mut().zip(other).for_each(|(most, other)| *most = most.max(*other));
    };
    comm.all_reduce(&mut data, CustomOp::commutative(longest))?;
    // Groups: even and odd ranks; and two copies of a model in two parts each.
    let group = comm.split(Some(comm.rank() as u32 % 2), 0)?;
    let mesh = Mesh::new(&comm, 2, 2)?;
    println!(
        "rank {rank}: group of {}, row of {}",
        group.map_or(0, |it| it.world()),
        mesh.row.world()
    );
    Ok(())
}
