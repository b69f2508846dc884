//! What the trainings with candle and burn share: their options, who works on which images, where
//! the time goes, and what has to hold in the end.

use std::error::Error;
use std::time::{Duration, Instant};

use unisum::{Communicator, ReduceOp};

/// Images in a batch, over all ranks.
pub(crate) const BATCH: usize = 64;

/// What the user may set.
#[derive(Debug)]
pub(crate) struct Options {
    /// How many ranks to start, unless a launcher has.
    pub(crate) ranks: usize,
    /// How often to go through the images.
    pub(crate) epochs: usize,
    /// What the order of the images follows from.
    pub(crate) seed: u64,
}

impl Options {
    /// Reads the arguments, `-n RANKS --epochs N --seed N`.
    pub(crate) fn parse() -> Result<Self, Box<dyn Error>> {
        let mut options = Self { ranks: 2, epochs: 10, seed: 1 };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let value = words.next().ok_or_else(|| format!("{word} without a value"))?;
            match word.as_str() {
                "-n" | "--ranks" => options.ranks = value.parse()?,
                "--epochs" => options.epochs = value.parse()?,
                "--seed" => options.seed = value.parse()?,
                _ => return Err(format!("unknown option {word}").into()),
            }
        }
        Ok(options)
    }
}

/// The rank's part of a batch.
pub(crate) fn share<T>(batch: &[T], rank: usize, world: usize) -> &[T] {
    &batch[batch.len() * rank / world..batch.len() * (rank + 1) / world]
}

/// What the mean loss of the rank's part is multiplied by, so that the average over the ranks is
/// that of the whole batch, although parts may differ by an image.
pub(crate) fn weight(batch: usize, share: usize, world: usize) -> f64 {
    (share * world) as f64 / batch as f64
}

/// Where the time of the steps goes.
#[derive(Debug, Default)]
pub(crate) struct Times {
    /// Whole steps: forward, backward, averaging, optimiser.
    pub(crate) step: Phase,
    /// Copies of gradients into the buckets, which are on their way once they are full.
    pub(crate) copy_in: Phase,
    /// Waiting for the averages.
    pub(crate) wait: Phase,
    /// Copies of averages into tensors.
    pub(crate) copy_out: Phase,
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.0} µs per step, of which {:.0} µs copying gradients in, {:.0} µs waiting, \
             {:.0} µs copying averages out (medians)",
            self.step.median_us(),
            self.copy_in.median_us(),
            self.wait.median_us(),
            self.copy_out.median_us()
        )
    }
}

/// The times of a part of all steps.
#[derive(Debug, Default)]
pub(crate) struct Phase(Vec<Duration>);

impl Phase {
    /// Adds the time since `start`, and gives the time at which it ended.
    pub(crate) fn end(&mut self, start: Instant) -> Instant {
        let now = Instant::now();
        self.0.push(now - start);
        now
    }

    fn median_us(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    }
}

/// Fails if a bit of a weight differs between ranks: each must be its own minimum and maximum over
/// the ranks. Every rank calls it.
pub(crate) fn same_on_all_ranks(
    communicator: &Communicator,
    weights: &[f32],
) -> Result<(), Box<dyn Error>> {
    let mut least: Vec<u32> = weights.iter().map(|weight| weight.to_bits()).collect();
    let mut most = least.clone();
    communicator.all_reduce(&mut least, ReduceOp::Min)?;
    communicator.all_reduce(&mut most, ReduceOp::Max)?;
    if least == most { Ok(()) } else { Err("weights differ between ranks".into()) }
}

/// Fails if the ranks together recognise another share of the images than one process that trained
/// on whole batches: by more than the standard error of such a share, or if both learnt nothing.
pub(crate) fn as_accurate_as_one_process(
    (together, alone): (usize, usize),
    images: usize,
) -> Result<(), Box<dyn Error>> {
    let share = |right: usize| right as f64 / images as f64;
    let noise = (share(alone) * (1.0 - share(alone)) / images as f64).sqrt();
    println!(
        "Accuracy {:.1}%, of one process with whole batches {:.1}% (standard error {:.1}%)",
        share(together) * 100.0,
        share(alone) * 100.0,
        noise * 100.0
    );
    if share(alone) < 0.9 {
        return Err("one process has not learnt".into());
    }
    let difference = (share(together) - share(alone)).abs();
    // Two shares, each with its error.
    let allowed = 2.0 * noise;
    if difference > allowed {
        return Err("the accuracy is not that of one process".into());
    }
    Ok(())
}
