//! Measures the encodings on one core, in gigabytes of `f32` per second.
//!
//! `cargo run --release -p unisum-link --example encoding_speed [KiB]`, 256 KiB of `f32` by
//! default.

use std::hint::black_box;
use std::time::{Duration, Instant};

use unisum_kernels::{Encoding, Isa};

fn main() {
    let kib = std::env::args().nth(1).map_or(256, |word| word.parse().expect("a number"));
    let count = (kib << 10) / size_of::<f32>();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin() * 1e-3).collect();
    let mut decoded = vec![0.0_f32; count];
    println!("{kib} KiB of f32, GB/s; bytes are of f32 for each that travels");
    println!("encoding isa      bytes  encode  decode     add");
    for encoding in Encoding::ALL {
        let mut encoded = vec![0; encoding.bytes(count)];
        let ratio = size_of_val(&values[..]) as f64 / encoded.len() as f64;
        for isa in Isa::available() {
            let speeds = [
                gigabytes_per_second(count, || {
                    encoding.encode_with(isa, black_box(&values), black_box(&mut encoded))
                }),
                gigabytes_per_second(count, || {
                    encoding.decode_with(isa, black_box(&encoded), black_box(&mut decoded))
                }),
                gigabytes_per_second(count, || {
                    encoding.add_with(isa, black_box(&encoded), black_box(&mut decoded))
                }),
            ];
            let [encode, decode, add] = speeds;
            println!(
                "{:<8} {isa:<8} {ratio:5.2} {encode:7.1} {decode:7.1} {add:7.1}",
                format!("{encoding:?}")
            );
        }
    }
}

/// The best of many batches, each long enough for the clock: what the code can do when nothing
/// disturbs it.
fn gigabytes_per_second(count: usize, mut work: impl FnMut() -> bool) -> f64 {
    let bytes = count * size_of::<f32>();
    let batch = (1_usize << 20).div_ceil(bytes);
    let end = Instant::now() + Duration::from_millis(50);
    let mut best = Duration::MAX;
    while Instant::now() < end {
        let start = Instant::now();
        for _ in 0..batch {
            assert!(!work(), "all values are finite");
        }
        best = best.min(start.elapsed());
    }
    (bytes * batch) as f64 / best.as_secs_f64() / 1e9
}
