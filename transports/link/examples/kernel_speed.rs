//! Measures the reduction kernels on one core, in gigabytes of result per second.
//!
//! `cargo run --release -p unisum-link --example kernel_speed [KiB] [sources]`, 256 KiB and 2
//! sources by default. The first source is the destination, as in a reduction in place.

use std::hint::black_box;
use std::time::{Duration, Instant};

use unisum_link::kernels::{Fold, Isa};
use unisum_link::{Dtype, ReduceOp};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|word| word.parse().expect("a number"));
    let bytes = arguments.next().unwrap_or(256_usize) << 10;
    let sources = arguments.next().unwrap_or(2_usize);
    let mut buffers = vec![vec![0_u8; bytes]; sources + 1];
    let (target, source) = buffers.split_at_mut(1);
    let copied = gigabytes_per_second(bytes, || {
        black_box(&mut target[0]).copy_from_slice(black_box(&source[0]));
    });
    println!("{sources} sources of {} KiB, GB/s; memcpy {copied:.1}", bytes >> 10);
    println!("dtype  isa         sum    prod     min     max     avg");
    for dtype in Dtype::ALL {
        for isa in Isa::available() {
            print!("{dtype:<6} {isa:<8}");
            for op in ReduceOp::ALL {
                print!("{:8.1}", speed(dtype, op, isa, &mut buffers[1..]));
            }
            println!();
        }
    }
}

fn speed(dtype: Dtype, op: ReduceOp, isa: Isa, buffers: &mut [Vec<u8>]) -> f64 {
    let divide_by = (op == ReduceOp::Average).then(|| 2.try_into().expect("not zero"));
    let fold = Fold { dtype, op, divide_by };
    let bytes = buffers[0].len();
    let dst = buffers[0].as_mut_ptr();
    let mut sources: Vec<*const u8> = buffers.iter().map(|buffer| buffer.as_ptr()).collect();
    sources[0] = dst;
    gigabytes_per_second(bytes, || {
        // SAFETY: the buffers have `bytes` bytes each; `dst` is the first source exactly.
        unsafe { fold.run_with(isa, dst, black_box(&sources), bytes / dtype.bytes()) };
    })
}

/// The best of many runs: what the code can do when nothing disturbs it.
fn gigabytes_per_second(bytes: usize, mut work: impl FnMut()) -> f64 {
    let end = Instant::now() + Duration::from_millis(40);
    let mut best = Duration::MAX;
    while Instant::now() < end {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed());
    }
    bytes as f64 / best.as_secs_f64() / 1e9
}
