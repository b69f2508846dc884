//! The candidates' times, and who is fastest by them: the same on all ranks, as the times are.

/// How a race goes after its first, second, third and later rounds.
const STANDINGS: [Standing; 3] = [
    Standing { behind: 1.6, gain: 0.8 },
    Standing { behind: 1.4, gain: 0.88 },
    Standing { behind: 1.25, gain: 0.98 },
];
/// By how much another has to be faster than the first if each ran once only.
const GAIN_AT_ONCE: f32 = 0.7;
const ROUNDS_MAX: usize = 9;
/// Several calls follow each other, as they do later: for about so long, in seconds, but at least
/// and at most so many; fewer only where the first round would take all the time there is. The
/// first, after another algorithm's, does not count.
const BLOCK_S: f32 = 2e-3;
const CALLS_MIN: usize = 4;
const CALLS_MAX: usize = 64;

/// What the times are worth by now.
struct Standing {
    /// Who takes so much longer than the fastest is out of the race.
    behind: f32,
    /// By how much another has to be faster than the modelled best: less is noise.
    gain: f32,
}

/// The candidates' times so far, and who still runs.
#[derive(Debug)]
pub(super) struct Tournament {
    /// By candidate, the times of its calls, in seconds.
    times: Vec<Vec<f32>>,
    /// Ascending.
    pub(super) running: Vec<usize>,
    pub(super) rounds: usize,
    /// What another round would take.
    round_s: f32,
}

impl Tournament {
    /// Of all that ran once: in so many seconds, which do not count, or infinite if it did not.
    pub(super) fn new(once: &[f32]) -> Self {
        let running = (0..once.len()).filter(|&at| once[at].is_finite()).collect();
        Self { times: vec![Vec::new(); once.len()], running, rounds: 0, round_s: 0.0 }
    }

    /// Takes in a round: as many calls of each that runs.
    pub(super) fn add(&mut self, round: &[f32]) {
        let calls = round.len() / self.running.len();
        for (&at, block) in self.running.iter().zip(round.chunks_exact(calls)) {
            self.times[at].extend(&block[1..]);
        }
        self.rounds += 1;
        let medians = self.medians();
        let fastest = medians.iter().copied().fold(f32::INFINITY, f32::min);
        let behind = self.standing().behind;
        self.running.retain(|&at| medians[at] <= behind * fastest);
        let sum_s: f32 = self.running.iter().map(|&at| medians[at]).sum();
        self.round_s = sum_s * calls as f32;
    }

    /// With so many seconds left.
    pub(super) fn is_over(&self, left_s: f32) -> bool {
        let is_late = self.round_s > left_s;
        self.rounds > 0 && (self.running.len() < 2 || self.rounds == ROUNDS_MAX || is_late)
    }

    /// By candidate, infinite without times.
    pub(super) fn medians(&self) -> Vec<f32> {
        self.times.iter().cloned().map(median).collect()
    }

    /// The fastest, if it is so much faster than the first.
    pub(super) fn winner(&self) -> usize {
        fastest(&self.medians(), self.standing().gain)
    }

    /// After at least a round.
    fn standing(&self) -> &Standing {
        &STANDINGS[self.rounds.clamp(1, STANDINGS.len()) - 1]
    }
}

/// Who is fastest by one run of each, if that is so much faster than the first.
pub(super) fn fastest_at_once(once: &[f32]) -> usize {
    fastest(once, GAIN_AT_ONCE)
}

/// The first, unless the fastest takes less than so much of its time.
fn fastest(times: &[f32], gain: f32) -> usize {
    let best = (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b]));
    best.filter(|&best| times[best] < gain * times[0]).unwrap_or(0)
}

/// How many calls follow each other, by what one of each candidate takes, infinite if it does not
/// run, with so much time left, all in seconds. `None` if there is no time for two of each.
pub(super) fn calls_in_a_row(once: &[f32], left_s: f32) -> Option<usize> {
    let once: Vec<f32> = once.iter().copied().filter(|once| once.is_finite()).collect();
    let affordable = (left_s / once.iter().sum::<f32>()) as usize;
    let calls = ((BLOCK_S / median(once)) as usize).clamp(CALLS_MIN, CALLS_MAX);
    (affordable >= 2).then(|| calls.min(affordable))
}

fn median(mut times: Vec<f32>) -> f32 {
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f32::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_falls_behind_is_out_and_the_fastest_wins() {
        let mut race = Tournament::new(&[1e-3; 4]);
        // Two calls each, of which the first does not count.
        race.add(&[9e-3, 1.1e-3, 9e-3, 1.3e-3, 0.0, 1e-3, 0.0, 2e-3]);
        assert_eq!(race.running, [0, 1, 2], "whoever takes twice as long");
        race.add(&[9e-3, 1.1e-3, 9e-3, 1.3e-3, 0.0, 1e-3]);
        race.add(&[9e-3, 1.1e-3, 9e-3, 1.3e-3, 0.0, 1e-3]);
        assert_eq!(race.running, [0, 2]);
        assert!((race.round_s / 4.2e-3 - 1.0).abs() < 1e-3, "two calls of each: {race:?}");
        assert!(!race.is_over(1.0));
        while !race.is_over(1.0) {
            race.add(&[0.0, 0.9e-3, 0.0, 0.8e-3]);
        }
        assert_eq!((race.rounds, race.winner()), (ROUNDS_MAX, 2));
    }

    #[test]
    fn rows_are_long_for_short_calls_and_short_where_time_is() {
        assert_eq!(calls_in_a_row(&[1e-6; 4], 0.5), Some(CALLS_MAX));
        assert_eq!(calls_in_a_row(&[0.2e-3; 4], 0.5), Some(10));
        assert_eq!(calls_in_a_row(&[5e-3; 6], 0.5), Some(CALLS_MIN));
        assert_eq!(calls_in_a_row(&[40e-3, f32::INFINITY, 40e-3], 0.5), Some(CALLS_MIN));
        assert_eq!(calls_in_a_row(&[40e-3; 6], 0.5), Some(2));
        // A host so busy, or a link so slow, that not even that fits.
        assert_eq!(calls_in_a_row(&[50e-3; 6], 0.5), None);
        assert_eq!(calls_in_a_row(&[1e-6; 6], -0.1), None, "it is over");
    }

    #[test]
    fn the_first_wins_by_default() {
        let mut race = Tournament::new(&[1.0; 3]);
        race.add(&[0.0, 0.1, 0.0, 0.09, 0.0, 0.15]);
        assert!(race.is_over(0.3), "another round would take too long");
        assert_eq!(race.winner(), 0, "by one round that much may be noise");
        let mut race = Tournament::new(&[1.0; 2]);
        (0..3).for_each(|_| race.add(&[0.0, 1e-3, 0.0, 1.3e-3]));
        assert!(race.is_over(0.5) && race.winner() == 0, "the other is out");
        let mut race = Tournament::new(&[1.0; 2]);
        (0..3).for_each(|_| race.add(&[0.0, 1e-3, 0.0, 0.99e-3]));
        assert_eq!(race.winner(), 0, "that little is noise");
    }

    #[test]
    fn who_did_not_run_neither_races_nor_wins() {
        let mut race = Tournament::new(&[2e-3, f32::INFINITY, 1e-3]);
        assert_eq!(race.running, [0, 2]);
        race.add(&[0.0, 2e-3, 0.0, 1e-3]);
        assert_eq!(race.winner(), 2);
        assert_eq!(fastest_at_once(&[0.2, f32::INFINITY, 0.1]), 2);
        assert_eq!(fastest_at_once(&[0.2, f32::INFINITY, 0.15]), 0, "that much may be noise");
    }
}
