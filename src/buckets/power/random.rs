//! The directions that a factor starts with: the same on all ranks, in every layout.
//!
//! Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

/// Numbers that follow from what they are for.
pub(super) struct Random(u64);

impl Random {
    /// The numbers for one column of one parameter's factor in one step.
    pub(super) fn of(seed: u64, parameter: &str, step: u64, column: u64) -> Self {
        let mut random = Self(seed);
        for word in parameter.bytes().map(u64::from).chain([u64::MAX, step, column]) {
            random.0 = random.next() ^ word;
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number around 0, nearly normally distributed: a sum of four, exact on every machine.
    pub(super) fn normal(&mut self) -> f32 {
        let word = self.next();
        let parts = [0, 16, 32, 48].map(|shift| (word >> shift & 0xffff) as f32 - 32767.5);
        parts.iter().sum::<f32>() / 37837.0
    }
}
