//! What two ranks called that differ, in words (pure): both are asked what they called last.
//!
//! Who finds a difference knows its own call and what a message said of the other's. That may say
//! only that something differed, or differed earlier, when nobody had to wait for anybody.

use std::collections::BTreeMap;
use std::time::Instant;

use unisum_link::Rank;

use super::status::Told;
use super::verdict::{Verdict, VerdictKind, name};

/// A question to some ranks what they called last in a communicator.
#[derive(Debug)]
pub(super) struct Comparison {
    communicator: u32,
    /// What is concluded if nobody's words say more; without it nothing is.
    verdict: Option<Verdict>,
    pub(super) until: Instant,
    /// By rank; nothing until it has answered.
    told: BTreeMap<Rank, Option<Vec<Told>>>,
}

impl Comparison {
    pub(super) fn new(
        communicator: u32,
        ranks: impl IntoIterator<Item = Rank>,
        verdict: Option<Verdict>,
        until: Instant,
    ) -> Self {
        let told = ranks.into_iter().map(|rank| (rank, None)).collect();
        Self { communicator, verdict, until, told }
    }

    /// Who is asked.
    pub(super) fn ranks(&self) -> Vec<Rank> {
        self.told.keys().copied().collect()
    }

    /// Whether it ends in a verdict, whatever is said.
    pub(super) const fn is_certain(&self) -> bool {
        self.verdict.is_some()
    }

    /// A rank has answered.
    pub(super) fn heard(&mut self, from: Rank, communicator: u32, calls: Vec<Told>) {
        if communicator == self.communicator
            && let Some(told) = self.told.get_mut(&from)
        {
            told.get_or_insert(calls);
        }
    }

    /// A rank will not answer any more.
    pub(super) fn gone(&mut self, rank: Rank) {
        self.heard(rank, self.communicator, Vec::new());
    }

    pub(super) fn is_whole(&self) -> bool {
        self.told.values().all(Option::is_some)
    }

    /// What follows from the answers: the first call that two ranks had other calls under, in the
    /// words of both.
    pub(super) fn verdict(self) -> Option<Verdict> {
        let mut by_number = BTreeMap::<u64, Vec<(Rank, &Told)>>::new();
        for (rank, calls) in &self.told {
            for call in calls.iter().flatten() {
                by_number.entry(call.call.number).or_default().push((*rank, call));
            }
        }
        let Some((ours, theirs)) = by_number.into_values().find_map(apart) else {
            return self.verdict;
        };
        let (who, others) = (ranks(&theirs), ranks(&ours));
        let (first, second) = (&ours[0].1.text, &theirs[0].1.text);
        let hidden = if first == second { ", which differ in what was called before" } else { "" };
        let mut text =
            format!("{} called {second}, {} called {first}{hidden}", name(&who), name(&others));
        let calls = Some([&theirs[0], &ours[0]].map(|(rank, told)| (*rank, told.call)));
        let Some(found) = self.verdict else {
            return Some(Verdict::new(VerdictKind::OtherCall, who, text).with_calls(calls));
        };
        // What each rank does now, if it says that.
        found.text.lines().skip(1).for_each(|line| text.extend(["\n", line]));
        // Of two that differ either may be wrong; of more it is who differs from most.
        let is_even = found.kind == VerdictKind::Mismatch && ours.len() <= theirs.len();
        let failed_ranks = if is_even { found.failed_ranks } else { who };
        Some(Verdict::new(found.kind, failed_ranks, text).with_calls(calls))
    }
}

type Callers<'a> = Vec<(Rank, &'a Told)>;

/// Those who called what most did (of equally many, what the lowest rank did), and those who called
/// the first other thing; nothing if all are of one mind.
fn apart(callers: Callers<'_>) -> Option<(Callers<'_>, Callers<'_>)> {
    let alike =
        |told: &Told| callers.iter().filter(|(_, it)| it.call.history == told.call.history).count();
    // The first of the maxima: `max_by_key` takes the last.
    let usual = callers.iter().rev().max_by_key(|(_, told)| alike(told))?.1.call.history;
    let other = callers.iter().find(|(_, told)| told.call.history != usual)?.1.call.history;
    let of = |history: u64| {
        callers.iter().filter(|(_, told)| told.call.history == history).copied().collect()
    };
    Some((of(usual), of(other)))
}

fn ranks(callers: &Callers<'_>) -> Vec<Rank> {
    callers.iter().map(|(rank, _)| *rank).collect()
}

#[cfg(test)]
mod tests {
    use unisum_link::Call;

    use super::*;
    use crate::tests::call;

    fn told(number: u64, history: u64, text: &str) -> Told {
        Told { call: Call { history, ..call(number) }, text: text.into() }
    }

    fn comparison(verdict: Option<Verdict>) -> Comparison {
        Comparison::new(3, [0, 1, 2], verdict, Instant::now())
    }

    #[test]
    fn the_first_call_that_differed_is_told_in_the_words_of_both() {
        let mut comparison = comparison(None);
        comparison.heard(0, 3, vec![told(5, 1, "a"), told(6, 2, "b"), told(7, 3, "c")]);
        comparison.heard(1, 3, vec![told(6, 4, "x"), told(7, 5, "c")]);
        comparison.heard(9, 3, vec![]);
        comparison.heard(2, 4, vec![told(6, 9, "of another group")]);
        assert!(!comparison.is_whole());
        comparison.heard(2, 3, vec![told(5, 1, "a"), told(6, 2, "b")]);
        assert!(comparison.is_whole());
        let verdict = comparison.verdict().unwrap();
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::OtherCall, &[1][..]));
        assert_eq!(verdict.text, "rank 1 called x, ranks 0 and 2 called b");
        let calls = verdict.calls.unwrap().map(|(rank, call)| (rank, call.number, call.history));
        assert_eq!(calls, [(1, 6, 4), (0, 6, 2)]);
    }

    /// Who is in a later call has no vote on the one that was found to differ.
    #[test]
    fn of_all_ranks_those_are_to_blame_that_differ_from_most_in_what_they_called() {
        let found = Verdict::new(VerdictKind::OtherCall, vec![2], "found");
        let mut all = comparison(Some(found));
        all.heard(0, 3, vec![told(5, 1, "a"), told(6, 2, "b")]);
        all.heard(1, 3, vec![told(5, 9, "x")]);
        all.heard(2, 3, vec![told(5, 1, "a")]);
        let verdict = all.verdict().unwrap();
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::OtherCall, &[1][..]));
        assert_eq!(verdict.text, "rank 1 called x, ranks 0 and 2 called a");
    }

    #[test]
    fn without_a_difference_what_was_found_stands() {
        let found = Verdict::new(VerdictKind::Mismatch, vec![0, 2], "found\n  rank 0: waits");
        let mut same = comparison(Some(found.clone()));
        same.heard(0, 3, vec![told(5, 1, "a")]);
        same.heard(1, 3, vec![told(5, 1, "a"), told(6, 2, "b")]);
        same.gone(2);
        assert!(same.is_whole());
        assert_eq!(same.verdict(), Some(found.clone()));
        let mut other = comparison(Some(found));
        other.heard(0, 3, vec![told(5, 1, "a")]);
        other.heard(2, 3, vec![told(5, 2, "b")]);
        assert_eq!(
            other.verdict().unwrap().text,
            "rank 2 called b, rank 0 called a\n  rank 0: waits"
        );
        assert_eq!(comparison(None).verdict(), None);
    }
}
