//! What all ranks have to give alike for a call, and how they find out that they did not.
//!
//! A [`Call`] says most of it. The rest are its [`Terms`]: they, and the call itself, are mixed
//! into the fingerprint of all calls so far that every message and every arrival of a group carries
//! ([`Call::history`]). What they were in words is kept for the last calls, for the error.

use std::fmt;
use std::sync::Arc;

use unisum_kernels::Fold;
use unisum_link::Call;

use crate::collective::Blocks;

/// Who makes a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The program.
    #[default]
    User,
    /// Ranks that agree on groups, messengers or buckets.
    Exchange,
}

/// What a call agrees on beside what it says itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Terms {
    factor: Option<f64>,
    /// Whether a function of the program folds, and whether it commutes.
    commutes: Option<bool>,
    lengths: Lengths,
    batch: Option<Batch>,
    purpose: Purpose,
}

/// How the blocks' lengths were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Lengths {
    #[default]
    Even,
    ByRank(Arc<[usize]>),
    /// Compared by each two ranks.
    ByPair,
}

/// One launch of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// All elements of each tensor.
    pub(crate) tensors: Arc<[usize]>,
    /// How many launches came before.
    pub(crate) launch: usize,
}

impl Terms {
    pub(crate) fn new(fold: &Fold, blocks: &Blocks, purpose: Purpose) -> Self {
        let lengths = match blocks {
            Blocks::Even(_) => Lengths::Even,
            Blocks::Given(counts) => Lengths::ByRank(counts.clone()),
            Blocks::Pairs(..) => Lengths::ByPair,
        };
        // Which function it is can't be compared between processes; that it is one, can.
        let commutes = fold.custom.map(|custom| custom.is_commutative());
        Self { factor: fold.factor, commutes, lengths, batch: None, purpose }
    }

    /// The same of one launch of a batch.
    pub(crate) fn of_batch(self, batch: Option<Batch>) -> Self {
        Self { batch, ..self }
    }

    /// Whether the call says everything.
    pub(crate) fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// A fingerprint of `call`, its number and what came before apart, on these terms.
    pub(crate) fn fingerprint(&self, call: &Call) -> u64 {
        let call = Call { number: 0, algorithm: 0, history: 0, ..*call };
        let mut all = call.words().into_iter().fold(0, mix);
        // Each term begins with a word that tells it from the others.
        if let Some(factor) = self.factor {
            all = mix(mix(all, 1), factor.to_bits());
        }
        if let Some(commutes) = self.commutes {
            all = mix(mix(all, 2), u64::from(commutes));
        }
        let list = |all, numbers: &[usize]| {
            numbers.iter().fold(mix(all, numbers.len() as u64), |all, &it| mix(all, it as u64))
        };
        match &self.lengths {
            Lengths::Even => {}
            Lengths::ByRank(counts) => all = list(mix(all, 3), counts),
            Lengths::ByPair => all = mix(all, 4),
        }
        if let Some(Batch { tensors, launch }) = &self.batch {
            all = mix(list(mix(all, 5), tensors), *launch as u64);
        }
        if self.purpose != Purpose::User {
            all = mix(all, 6);
        }
        all
    }
}

/// The fingerprint of a call after others.
pub(crate) const fn after(history: u64, call: u64) -> u64 {
    mix(history, call)
}

/// One more word in a fingerprint.
///
/// Source: the multiplication and shift of Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", OOPSLA 2014 (SplitMix64).
const fn mix(all: u64, word: u64) -> u64 {
    let mixed = (all.rotate_left(23) ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ mixed >> 29
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(factor) = self.factor {
            write!(f, ", factor {factor}")?;
        }
        match self.commutes {
            Some(true) => f.write_str(", a function that commutes")?,
            Some(false) => f.write_str(", a function with an order")?,
            None => {}
        }
        match &self.lengths {
            Lengths::Even => {}
            Lengths::ByRank(counts) => write!(f, ", counts {}", Few(counts))?,
            Lengths::ByPair => f.write_str(", counts by pair")?,
        }
        if let Some(Batch { tensors, launch }) = &self.batch {
            let (count, launch) = (tensors.len(), launch + 1);
            write!(f, ", launch {launch} of a batch of {count} tensors of {}", Few(tensors))?;
        }
        match self.purpose {
            Purpose::User => Ok(()),
            Purpose::Exchange => f.write_str(", to make a group"),
        }
    }
}

/// A list, of which only the first entries are shown if it is long.
struct Few<'a>(&'a [usize]);

impl fmt::Display for Few<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 32;
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(ToString::to_string).collect();
        let more = if self.0.len() > SHOWN { ", …" } else { "" };
        write!(f, "[{}{more}]", shown.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use unisum_kernels::{CustomOp, Dtype, ReduceOp};

    use super::*;

    /// What differs in one thing each, whatever is 0.
    #[test]
    fn any_two_calls_that_differ_have_different_fingerprints() {
        let fold = Fold::new(Dtype::F32, ReduceOp::Sum);
        let scaled = |factor| Fold { factor: Some(factor), ..fold };
        let function = |commutes: bool| {
            let fold_in = |acc: &mut [f32], other: &[f32]| acc.copy_from_slice(other);
            let op = match commutes {
                true => CustomOp::commutative(fold_in),
                false => CustomOp::ordered(fold_in),
            };
            Fold { custom: Some(op.erased()), ..fold }
        };
        let (even, user) = (Blocks::Even(3), Purpose::User);
        let given = |counts: &[usize]| Blocks::Given(counts.into());
        let plain = Terms::new(&fold, &even, user);
        let batch = |tensors: &[usize], launch| {
            plain.clone().of_batch(Some(Batch { tensors: tensors.into(), launch }))
        };
        let terms = [
            plain.clone(),
            Terms::new(&scaled(0.0), &even, user),
            Terms::new(&scaled(-0.0), &even, user),
            Terms::new(&scaled(1.0), &even, user),
            Terms::new(&scaled(f64::from_bits(1)), &even, user),
            Terms::new(&function(true), &even, user),
            Terms::new(&function(false), &even, user),
            Terms::new(&fold, &given(&[]), user),
            Terms::new(&fold, &given(&[3]), user),
            Terms::new(&fold, &given(&[0, 3]), user),
            Terms::new(&fold, &given(&[3, 0]), user),
            Terms::new(&fold, &Blocks::Pairs([3].into(), [3].into()), user),
            Terms::new(&fold, &even, Purpose::Exchange),
            batch(&[], 0),
            batch(&[3], 0),
            batch(&[3], 1),
            batch(&[0, 3], 0),
        ];
        let call = Call::all_reduce(0, Dtype::F32, 3);
        let fingerprints = terms.each_ref().map(|terms| terms.fingerprint(&call));
        for (at, fingerprint) in fingerprints.iter().enumerate() {
            assert!(!fingerprints[..at].contains(fingerprint), "{at}: {:?}", terms[at]);
        }
        let other = Call { root: 1, ..call };
        assert!(!fingerprints.contains(&plain.fingerprint(&other)));
        let later = Call { number: 9, algorithm: 2, history: 5, ..call };
        assert_eq!(plain.fingerprint(&later), fingerprints[0], "it is the same call");
    }

    #[test]
    fn histories_depend_on_every_call_and_their_order() {
        let history = |calls: &[u64]| calls.iter().fold(0, |history, &call| after(history, call));
        let histories =
            [history(&[]), history(&[1]), history(&[2]), history(&[1, 2]), history(&[2, 1])];
        for (at, one) in histories.iter().enumerate() {
            assert!(!histories[..at].contains(one), "{at}");
        }
    }
}
