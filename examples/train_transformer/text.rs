//! The text: see examples/data/README.md for where it comes from.

use std::ops::Range;

use crate::random::Random;

const NOVEL: &str = include_str!("../data/persuasion.txt");
/// From here on the text is held out: the last two chapters.
const HELD_OUT_FROM: &str = "\nChapter 23\n";

/// The text as tokens: each byte value that occurs in it has a number.
#[derive(Debug)]
pub(crate) struct Text {
    /// How many tokens there are.
    pub(crate) vocabulary: usize,
    /// What the model learns from.
    pub(crate) training: Vec<u8>,
    /// What it never trains on.
    pub(crate) held_out: Vec<u8>,
}

impl Text {
    /// Reads the text, which is part of the program.
    pub(crate) fn load() -> Result<Self, String> {
        let split = NOVEL.find(HELD_OUT_FROM).ok_or("persuasion.txt has no chapter 23")?;
        let mut used = [false; 256];
        NOVEL.bytes().for_each(|byte| used[usize::from(byte)] = true);
        let mut numbers = [0; 256];
        let mut vocabulary = 0;
        for (number, _) in numbers.iter_mut().zip(used).filter(|(_, used)| *used) {
            *number = vocabulary;
            vocabulary += 1;
        }
        let tokens = |text: &str| text.bytes().map(|byte| numbers[usize::from(byte)]).collect();
        let (training, held_out) = NOVEL.split_at(split);
        Ok(Self {
            vocabulary: usize::from(vocabulary),
            training: tokens(training),
            held_out: tokens(held_out),
        })
    }

    /// The loss on the held-out text, in nats per token, of a model that knows nothing but how
    /// often each token occurs in the training text.
    pub(crate) fn unigram_loss(&self) -> f64 {
        // One is added to each count: a token may occur in the held-out text only.
        let mut counts = vec![1.0; self.vocabulary];
        self.training.iter().for_each(|token| counts[usize::from(*token)] += 1.0);
        let all: f64 = counts.iter().sum();
        let losses = self.held_out.iter().map(|token| -(counts[usize::from(*token)] / all).ln());
        losses.sum::<f64>() / self.held_out.len() as f64
    }

    /// A number that differs, most likely, if the text does.
    pub(crate) fn checksum(&self) -> u32 {
        crc32c::crc32c(NOVEL.as_bytes())
    }

    /// How many full batches of sequences an epoch has, whatever its order.
    pub(crate) fn batches(&self, context: usize, batch: usize) -> usize {
        // A window begins anywhere in the first `context` bytes, and the last one has a successor.
        (self.training.len() - context) / context / batch
    }
}

/// The order of an epoch: the training text from a random place on, cut into windows of `context`
/// tokens, shuffled. It depends on seed and epoch only, so all ranks know it.
#[derive(Debug)]
pub(crate) struct Order {
    starts: Vec<usize>,
    context: usize,
}

impl Order {
    /// The order of the epoch of that number.
    pub(crate) fn new(text: &Text, context: usize, seed: u64, epoch: usize) -> Self {
        let mut random = Random::new(crate::random::mix(seed) ^ epoch as u64);
        let first = random.below(context);
        let last = text.training.len() - context;
        let mut starts: Vec<usize> = (first..last).step_by(context).collect();
        random.shuffle(&mut starts);
        Self { starts, context }
    }

    /// A share of the epoch's batch of that number, in which there are `batch` windows: the share's
    /// windows, one after the other, and for each token its successor.
    pub(crate) fn sequences(
        &self,
        text: &Text,
        (number, batch): (usize, usize),
        share: Range<usize>,
    ) -> (Vec<u8>, Vec<u8>) {
        let starts = &self.starts[number * batch..][share];
        let windows = |ahead| {
            let starts = starts.iter().map(move |start| start + ahead);
            starts.flat_map(|start| &text.training[start..start + self.context]).copied().collect()
        };
        (windows(0), windows(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_takes_every_part_of_the_text_once_and_in_another_order() {
        let text = Text::load().unwrap();
        let mut firsts = Vec::new();
        for epoch in 0..3 {
            let order = Order::new(&text, 128, 7, epoch);
            assert!(order.starts.len() >= text.batches(128, 16) * 16);
            firsts.push(order.starts[0]);
            let mut starts = order.starts;
            starts.sort_unstable();
            assert!(starts[0] < 128 && starts.windows(2).all(|pair| pair[0] + 128 == pair[1]));
        }
        assert!(firsts[0] != firsts[1] && firsts[1] != firsts[2], "{firsts:?}");
    }

    #[test]
    fn the_shares_of_all_batches_are_the_windows_of_the_epoch() {
        let text = Text { vocabulary: 200, training: (0..200).collect(), held_out: Vec::new() };
        let order = Order::new(&text, 8, 1, 0);
        let mut seen = Vec::new();
        for batch in 0..text.batches(8, 5) {
            for share in [0..2, 2..3, 3..5] {
                let count = share.len() * 8;
                let (inputs, targets) = order.sequences(&text, (batch, 5), share);
                assert_eq!(inputs.len(), count);
                assert!(inputs.iter().zip(targets).all(|(input, target)| input + 1 == target));
                seen.extend(inputs);
            }
        }
        // The tokens number the text, so none may come twice.
        let windows = seen.len() / 8;
        assert_eq!((windows, windows % 5), (20, 0));
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), windows * 8);
    }

    #[test]
    fn held_out_text_is_a_tenth_and_no_part_of_the_training_text() {
        let text = Text::load().unwrap();
        let share = text.held_out.len() as f64 / (text.training.len() + text.held_out.len()) as f64;
        assert!((0.08..0.12).contains(&share), "{share}");
        assert!((2.9..3.3).contains(&text.unigram_loss()), "{}", text.unigram_loss());
    }
}
