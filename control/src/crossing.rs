//! Ranks that wait for each other in calls of different communicators (pure): each has to end its
//! call before it comes to the one that another waits in, so that none ever does.
//!
//! That is certain only of a rank whose process begins no other call meanwhile ([`Hold`]). What
//! was seen of such ranks at different moments fits together: the first of them to go on would
//! need another one to have gone on before.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use unisum_link::{CollectiveKind, Rank};

use super::callers::Hold;
use super::doing::{Doing, Needs, Part};
use super::stall_diagnosis::LINES_MAX;
use super::status::describe;
use super::verdict::{Verdict, VerdictKind, name};

/// By rank, what it is doing, if it has said so.
pub(super) type Doings = [Option<Doing>];

/// A rank's call, and a rank that it waits for there.
type Wait<'a> = (Rank, &'a Part, Rank);

/// Ranks that wait for each other, each for the next one, and the last for the first.
#[derive(Debug)]
pub(super) struct Crossing<'a>(Vec<Wait<'a>>);

/// Finds ranks that wait for each other in more than one communicator. They do so for ever if the
/// processes of all are held that much: [`Hold::Process`].
pub(super) fn find(doings: &Doings, hold: Hold) -> Option<Crossing<'_>> {
    let is_held = |doing: &Doing| doing.hold >= hold && doing.parts.iter().any(Part::is_inside);
    let held =
        |(rank, doing): (Rank, &Option<Doing>)| doing.as_ref().is_some_and(is_held).then_some(rank);
    let mut stuck: BTreeSet<Rank> = doings.iter().enumerate().filter_map(held).collect();
    // Who can't go on without another one that can't either, in each of its calls.
    loop {
        let is_stuck = |rank: &Rank| {
            let mut inside = inside(doings, *rank);
            inside.all(|part| awaited(doings, *rank, part, true).any(|it| stuck.contains(&it)))
        };
        let next: BTreeSet<Rank> = stuck.iter().copied().filter(is_stuck).collect();
        if next.len() == stuck.len() {
            break;
        }
        stuck = next;
    }
    let first = *stuck.first()?;
    let next = |rank: Rank| {
        let waits = inside(doings, rank).flat_map(|part| {
            awaited(doings, rank, part, true).map(move |awaited| (rank, part, awaited))
        });
        waits.into_iter().find(|(_, _, awaited)| stuck.contains(awaited))
    };
    let circle = walk(first, next).ok()?;
    let is_crossing = circle.iter().any(|(_, part, _)| !part.is_of(circle[0].1));
    is_crossing.then_some(Crossing(circle))
}

/// Goes from a rank to the one that it waits for, and so on, to the first that waits for nobody; or
/// finds a circle.
fn walk<'a>(
    first: Rank,
    next: impl Fn(Rank) -> Option<Wait<'a>>,
) -> Result<Vec<Wait<'a>>, Vec<Wait<'a>>> {
    let mut path = Vec::<Wait<'_>>::new();
    let mut at = first;
    while let Some(wait) = next(at) {
        path.push(wait);
        at = wait.2;
        if let Some(start) = path.iter().position(|(rank, _, _)| *rank == at) {
            return Ok(path.split_off(start));
        }
    }
    Err(path)
}

/// The calls that a rank is in.
fn inside(doings: &Doings, rank: Rank) -> impl Iterator<Item = &Part> {
    let parts = doings.get(rank).and_then(Option::as_ref).map_or(&[][..], |doing| &doing.parts);
    parts.iter().filter(|part| part.is_inside())
}

/// The ranks that `rank` needs in a call that they have not come to; certainly, or as it seems.
fn awaited(
    doings: &Doings,
    rank: Rank,
    part: &Part,
    certainly: bool,
) -> impl Iterator<Item = Rank> {
    let is_missing = move |other: Rank| {
        let parts = doings.get(other)?.as_ref()?.parts.iter();
        let theirs = parts.into_iter().find(|theirs| theirs.is_of(part))?;
        let call = part.doing.call?;
        let is_missing = match call.collective {
            CollectiveKind::Message => {
                !certainly || nothing_is_under_way((rank, part), (other, theirs))
            }
            _ => theirs.doing.position() <= call.number.saturating_mul(2),
        };
        is_missing.then_some(other)
    };
    let candidates = match part.needs {
        Needs::Unknown => 0..0,
        Needs::All => 0..doings.len(),
        Needs::One(other) => other..other + 1,
    };
    candidates.filter(move |other| *other != rank).filter_map(is_missing)
}

/// Whether two ranks of a messenger, of which the first waits, have had all that the other sent
/// them: the second may be elsewhere, and then what it has not had does not matter.
fn nothing_is_under_way((rank, part): (Rank, &Part), (other, theirs): (Rank, &Part)) -> bool {
    let (Some(ours), Some(theirs_of_us)) = (part.with(other), theirs.with(rank)) else {
        return false;
    };
    let is_heard = theirs_of_us.said == ours.heard;
    is_heard && (!theirs.is_inside() || ours.said == theirs_of_us.heard)
}

impl Crossing<'_> {
    fn ranks(&self) -> Vec<Rank> {
        let mut ranks: Vec<Rank> = self.0.iter().map(|(rank, _, _)| *rank).collect();
        ranks.sort_unstable();
        ranks
    }

    /// In words.
    pub(super) fn text(&self) -> String {
        let who = name(&self.ranks());
        let mut text = format!("{who} wait for each other in calls of different communicators");
        for (rank, part, awaited) in self.0.iter().take(LINES_MAX) {
            let call = told(part);
            write!(text, "\n  rank {rank}: in {call}, waits for rank {awaited}")
                .expect("writing to a string cannot fail");
        }
        text
    }

    /// The verdict, where it is certain.
    pub(super) fn verdict(&self) -> Verdict {
        Verdict::new(VerdictKind::Crossed, self.ranks(), self.text())
    }
}

/// A rank's call in words, with the communicator that it is of.
fn told(part: &Part) -> String {
    let Some(call) = part.doing.call else { return String::new() };
    match (part.doing.message(), call.communicator) {
        (Some(message), messenger) => format!("{message} of messenger {messenger}"),
        (None, 0) => format!("{} of the job", describe(&call, part.doing.uncounted)),
        (None, _) => describe(&call, part.doing.uncounted),
    }
}

/// What a verdict at a deadline has to say beside what the ranks do in the communicator that is
/// overdue: who has not come may wait for others elsewhere.
pub(super) fn explain(verdict: Verdict, communicator: u32, doings: &Doings) -> Verdict {
    let verdict = match verdict.kind {
        VerdictKind::NotEntered => follow(verdict, doings),
        _ => verdict,
    };
    let elsewhere = |rank: Rank| {
        let inside = inside(doings, rank).find(|part| part.communicator != communicator)?;
        Some(format!("\n  rank {rank} meanwhile: in {}", told(inside)))
    };
    let lines: Vec<String> = (0..doings.len()).filter_map(elsewhere).take(LINES_MAX).collect();
    Verdict { text: verdict.text + &lines.concat(), ..verdict }
}

/// Goes from those who have not come to those for whom they wait.
fn follow(verdict: Verdict, doings: &Doings) -> Verdict {
    let is_held = |rank: Rank| {
        doings.get(rank).and_then(Option::as_ref).is_some_and(|it| it.hold >= Hold::Callers)
    };
    let next = |rank: Rank| {
        let mut inside = inside(doings, rank).filter(|_| is_held(rank));
        inside.find_map(|part| {
            awaited(doings, rank, part, false).next().map(|awaited| (rank, part, awaited))
        })
    };
    let mut ends = BTreeSet::new();
    let mut lines = String::new();
    for &culprit in &verdict.failed_ranks {
        let path = match walk(culprit, next) {
            Ok(circle) => {
                let crossing = Crossing(circle);
                let text = format!("{}\n{}", crossing.text(), verdict.text);
                return Verdict::new(VerdictKind::Behind, crossing.ranks(), text);
            }
            Err(path) => path,
        };
        ends.insert(path.last().map_or(culprit, |(_, _, last)| *last));
        for (rank, part, awaited) in path {
            let call = told(part);
            write!(lines, "\n  rank {rank} waits in {call} for rank {awaited}")
                .expect("writing to a string cannot fail");
        }
    }
    let failed_ranks = ends.into_iter().collect();
    Verdict { failed_ranks, text: verdict.text + &lines, ..verdict }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisum_kernels::Dtype;
    use unisum_link::Call;

    use crate::doing::Traffic;
    use crate::status::{Snapshot, Waiting};
    use crate::tests::call;

    /// A rank in call `number` of a communicator, or outside before it.
    fn part(communicator: u32, number: u64, inside: bool) -> Part {
        let before = number.checked_sub(u64::from(!inside));
        let call = before.map(|number| Call { communicator, ..call(number) });
        let doing = Snapshot { call, inside, ..Snapshot::default() };
        let needs = if inside { Needs::All } else { Needs::Unknown };
        Part { communicator, doing, needs, ..Part::default() }
    }

    fn doing(hold: Hold, parts: Vec<Part>) -> Option<Doing> {
        Some(Doing { here: Snapshot::default(), hold, parts })
    }

    fn held(parts: Vec<Part>) -> Option<Doing> {
        doing(Hold::Process, parts)
    }

    fn waits(communicator: u32, peer: Rank, said: u64, heard: u64) -> Part {
        let waiting =
            Waiting { communicator, peer, receives: true, dtype: Dtype::F32, bytes: 64, tag: 7 };
        let call = Some(waiting.call());
        let doing = Snapshot { call, inside: true, step: 1, bytes: 7, ..Snapshot::default() };
        let traffic = vec![Traffic { peer, said, heard }];
        Part { communicator, doing, needs: Needs::One(peer), traffic, ..Part::default() }
    }

    fn idle(communicator: u32, peer: Rank, said: u64, heard: u64) -> Part {
        let traffic = vec![Traffic { peer, said, heard }];
        Part { communicator, traffic, ..Part::default() }
    }

    #[track_caller]
    fn check(doings: &Doings, ranks: &[Rank]) -> String {
        let crossing = find(doings, Hold::Process).expect("a crossing");
        let verdict = crossing.verdict();
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::Crossed, ranks));
        verdict.text
    }

    #[test]
    fn two_ranks_in_calls_of_two_communicators_cross() {
        let crossed = [
            held(vec![part(0, 5, true), part(3, 2, false)]),
            held(vec![part(0, 5, false), part(3, 2, true)]),
        ];
        let text = check(&crossed, &[0, 1]);
        assert!(text.contains("rank 0: in all_reduce #5 (f32 x 1000, sum, "), "{text}");
        assert!(text.contains("of the job, waits for rank 1"), "{text}");
        assert!(text.contains("rank 1: in all_reduce #2 of group 3 ("), "{text}");
    }

    #[test]
    fn three_ranks_in_a_circle_cross_and_who_waits_for_them_is_not_named() {
        // Groups of ranks 0 and 1, 1 and 2, 2 and 0; rank 3 waits in the job's call.
        let circle = [
            held(vec![part(1, 0, true), part(3, 0, false), part(0, 0, false)]),
            held(vec![part(2, 0, true), part(1, 0, false), part(0, 0, false)]),
            held(vec![part(3, 0, true), part(2, 0, false), part(0, 0, false)]),
            held(vec![part(0, 0, true)]),
        ];
        check(&circle, &[0, 1, 2]);
    }

    #[test]
    fn a_rank_that_may_yet_come_crosses_nobody() {
        let first = held(vec![part(0, 5, true), part(3, 2, false)]);
        let parts = || vec![part(0, 5, false), part(3, 2, true)];
        for hold in [Hold::Free, Hold::Callers] {
            let doings = [first.clone(), doing(hold, parts())];
            assert!(find(&doings, Hold::Process).is_none(), "{hold:?}");
        }
        // A computing rank, and one that has had the call that others wait in.
        let computing = [first.clone(), held(vec![part(0, 5, false), part(3, 3, false)])];
        assert!(find(&computing, Hold::Process).is_none());
        let past = [first.clone(), held(vec![part(0, 6, false), part(3, 2, true)])];
        assert!(find(&past, Hold::Process).is_none());
        // One that did not answer, and one that is in another group of the same number.
        assert!(find(&[first.clone(), None], Hold::Process).is_none());
        let mut other = part(3, 2, true);
        other.lowest = 1;
        let apart = [first, held(vec![part(0, 5, false), other])];
        assert!(find(&apart, Hold::Process).is_none());
    }

    #[test]
    fn a_rank_with_one_call_that_may_end_crosses_nobody() {
        let free = [
            held(vec![part(0, 5, true), part(3, 2, false)]),
            held(vec![part(0, 5, false), part(3, 2, true), part(4, 1, true)]),
        ];
        assert!(find(&free, Hold::Process).is_none());
    }

    #[test]
    fn calls_whose_needs_are_not_known_cross_nobody() {
        let mut unknown = part(0, 5, true);
        unknown.needs = Needs::Unknown;
        let doings = [
            held(vec![unknown, part(3, 2, false)]),
            held(vec![part(0, 5, false), part(3, 2, true)]),
        ];
        assert!(find(&doings, Hold::Process).is_none());
        let call = Call { collective: CollectiveKind::Broadcast, root: 1, ..call(5) };
        assert_eq!(Needs::of(&call, 0, &[0, 4]), Needs::One(4));
        assert_eq!(Needs::of(&call, 4, &[0, 4]), Needs::Unknown);
        let call = Call { collective: CollectiveKind::Gather, ..call };
        assert_eq!(Needs::of(&call, 0, &[0, 4]), Needs::Unknown);
        assert_eq!(Needs::of(&call, 4, &[0, 4]), Needs::All);
        assert_eq!(Needs::of(&Call { count: 0, ..call }, 0, &[0, 4]), Needs::All);
    }

    #[test]
    fn a_message_and_a_collective_cross_unless_the_message_is_on_its_way() {
        let collective = |messenger| held(vec![part(0, 5, true), messenger]);
        let message = |heard| held(vec![waits(7, 0, 0, heard), part(0, 5, false)]);
        check(&[collective(idle(7, 1, 3, 0)), message(3)], &[0, 1]);
        let on_its_way = [collective(idle(7, 1, 3, 0)), message(2)];
        assert!(find(&on_its_way, Hold::Process).is_none());
        // Of messages alone it is told at the deadline.
        let messages = [held(vec![waits(7, 1, 0, 0)]), held(vec![waits(7, 0, 0, 0)])];
        assert!(find(&messages, Hold::Process).is_none());
    }

    #[test]
    fn at_a_deadline_those_are_named_for_whom_the_late_wait() {
        let late = |failed_ranks: &[Rank]| {
            Verdict::new(VerdictKind::NotEntered, failed_ranks.to_vec(), "call is overdue")
        };
        // Rank 1 waits in a group for rank 2, which computes.
        let chain = [
            held(vec![part(0, 5, true)]),
            doing(Hold::Callers, vec![part(0, 5, false), part(3, 2, true)]),
            doing(Hold::Free, vec![part(0, 5, false), part(3, 2, false)]),
        ];
        let verdict = explain(late(&[1, 2]), 0, &chain);
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::NotEntered, &[2][..]));
        assert!(verdict.text.contains("rank 1 waits in all_reduce #2 of group 3"), "{verdict}");
        // They wait for each other, unless other threads come: those had time enough.
        let crossed = [
            doing(Hold::Callers, vec![part(0, 5, true), part(3, 2, false)]),
            doing(Hold::Callers, vec![part(0, 5, false), part(3, 2, true)]),
        ];
        let verdict = explain(late(&[1]), 0, &crossed);
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::Behind, &[0, 1][..]));
        // Another thread of rank 1 would have had to come.
        let free = [
            held(vec![part(0, 5, true), part(3, 2, false)]),
            doing(Hold::Free, vec![part(0, 5, false), part(3, 2, true)]),
        ];
        let verdict = explain(late(&[1]), 0, &free);
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::NotEntered, &[1][..]));
        assert!(verdict.text.contains("rank 1 meanwhile: in all_reduce #2 of group 3"));
    }
}
