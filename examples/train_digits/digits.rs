//! The images: see examples/data/README.md for where they come from.

/// One handwritten digit.
#[derive(Debug)]
pub(crate) struct Image {
    /// 8×8, row by row, from 0 to 1.
    pub(crate) pixels: [f32; 64],
    /// What it shows.
    pub(crate) digit: usize,
}

/// The data set: every fifth image is held out to judge the network by.
#[derive(Debug)]
pub(crate) struct Digits {
    training: Vec<Image>,
    /// Images the network never trains on.
    pub(crate) held_out: Vec<Image>,
}

impl Digits {
    /// Reads the data, which are part of the program.
    pub(crate) fn load() -> Result<Self, String> {
        let lines = include_str!("../data/digits.csv").lines();
        let (mut training, mut held_out) = (Vec::new(), Vec::new());
        for (number, line) in lines.enumerate() {
            let image =
                parse(line).ok_or_else(|| format!("digits.csv: bad line {}", number + 1))?;
            if number % 5 == 4 { held_out.push(image) } else { training.push(image) }
        }
        Ok(Self { training, held_out })
    }

    /// The training images in an order that depends on seed and epoch only: the same on all ranks.
    pub(crate) fn shuffled(&self, mut seed: u64, epoch: usize) -> Vec<&Image> {
        let mut images: Vec<&Image> = self.training.iter().collect();
        let mut random = next_random(&mut seed) ^ epoch as u64;
        for last in (1..images.len()).rev() {
            images.swap(last, (next_random(&mut random) % (last as u64 + 1)) as usize);
        }
        images
    }
}

/// The next number of a fixed sequence (SplitMix64).
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn parse(line: &str) -> Option<Image> {
    let numbers: Vec<u8> = line.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
    let (digit, grey) = numbers.split_last()?;
    let grey: [u8; 64] = grey.try_into().ok()?;
    let digit = usize::from(*digit);
    (digit < 10).then(|| Image { pixels: grey.map(|level| f32::from(level) / 16.0), digit })
}
