//! Measures the reduction kernels on one core, in gigabytes of result per second.
//!
//! `cargo run --release -p unisum-link --example kernel_speed [KiB] [sources]`, 256 KiB and 2
//! sources by default. The first source is the destination, as in a reduction in place. Averages
//! are over 2, where floats are multiplied, and over 3. A watched sum looks for infinity and NaN.

use std::hint::black_box;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Folded, Isa};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|word| word.parse().expect("a number"));
    let bytes = arguments.next().unwrap_or(256_usize) << 10;
    let sources = arguments.next().unwrap_or(2_usize);
    let mut buffers = vec![vec![Line([0_u8; 64]); bytes / 64]; sources + 1];
    let (target, source) = buffers.split_at_mut(1);
    let copied = gigabytes_per_second(bytes, || {
        black_box(&mut target[0]).copy_from_slice(black_box(&source[0]));
    });
    println!("{sources} sources of {} KiB, GB/s; memcpy {copied:.1}", bytes >> 10);
    let columns = columns();
    let names: String = columns.iter().map(|(name, _)| format!("{name:>8}")).collect();
    println!("dtype  isa     {names}");
    for dtype in Dtype::ALL {
        for isa in Isa::available() {
            print!("{dtype:<6} {isa:<8}");
            for (_, fold) in &columns {
                let fold = Fold { dtype, ..*fold };
                match fold.check_defined() {
                    Ok(()) => print!("{:8.1}", speed(fold, isa, &mut buffers[1..])),
                    Err(_) => print!("{:>8}", "–"),
                }
            }
            println!();
        }
    }
}

/// What is measured of each type, and what it is called.
fn columns() -> Vec<(&'static str, Fold)> {
    let fold = |op| Fold::new(Dtype::F32, op);
    let average = |by| Fold { divide_by: NonZeroU32::new(by), ..fold(ReduceOp::Average) };
    let sum = fold(ReduceOp::Sum);
    vec![
        ("sum", sum),
        ("watched", Fold { watch: true, ..sum }),
        ("factor", Fold { factor: Some(0.1), ..sum }),
        ("avg/2", average(2)),
        ("avg/3", average(3)),
        ("prod", fold(ReduceOp::Product)),
        ("min", fold(ReduceOp::Min)),
        ("max", fold(ReduceOp::Max)),
        ("and", fold(ReduceOp::BitAnd)),
        ("or", fold(ReduceOp::BitOr)),
        ("xor", fold(ReduceOp::BitXor)),
    ]
}

/// Buffers start at a cache line, as the large ones of programs do.
#[derive(Clone, Copy)]
#[repr(align(64))]
#[expect(dead_code, reason = "read by the kernels")]
struct Line([u8; 64]);

fn speed(fold: Fold, isa: Isa, buffers: &mut [Vec<Line>]) -> f64 {
    let bytes = size_of_val(&buffers[0][..]);
    let dst = buffers[0].as_mut_ptr().cast();
    let mut sources: Vec<*const u8> = buffers.iter().map(|buffer| buffer.as_ptr().cast()).collect();
    sources[0] = dst;
    gigabytes_per_second(bytes, || {
        // SAFETY: the buffers have `bytes` bytes each; `dst` is the first source exactly.
        let outcome =
            unsafe { fold.run_with(isa, dst, black_box(&sources), bytes / fold.dtype.bytes()) };
        assert_ne!(outcome, Folded::Panicked);
    })
}

/// The best of many batches, each long enough for the clock: what the code can do when nothing
/// disturbs it.
fn gigabytes_per_second(bytes: usize, mut work: impl FnMut()) -> f64 {
    let batch = (256_usize << 10).div_ceil(bytes);
    let end = Instant::now() + Duration::from_millis(20);
    let mut best = Duration::MAX;
    while Instant::now() < end {
        let start = Instant::now();
        for _ in 0..batch {
            work();
        }
        best = best.min(start.elapsed());
    }
    (bytes * batch) as f64 / best.as_secs_f64() / 1e9
}
