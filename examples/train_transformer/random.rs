//! Random numbers that are the same in every run: the ranks start from the same weights and go
//! through the text in the same order.

/// A sequence of numbers that follows from its seed (SplitMix64).
#[derive(Debug)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// The sequence of a seed.
    pub(crate) const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    pub(crate) const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `limit`, which is above 0 and far below 2⁶⁴.
    pub(crate) const fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A number of a uniform distribution with mean 0 and this standard deviation.
    pub(crate) fn spread(&mut self, deviation: f32) -> f32 {
        let uniform = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        uniform * deviation * 3_f32.sqrt()
    }

    /// Brings the items into a random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// A bijection of 64 bits in which each output bit depends on all input bits.
pub(crate) const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
