//! Why a collective is overdue, decided from what every rank says it is doing (pure).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use unisum_link::{Call, CollectiveKind, Rank};

use super::message::StalledCall;
use super::status::{Snapshot, describe};
use super::verdict::{Calls, Verdict, VerdictKind, name};

/// Most lines of a verdict that tell what a rank was doing.
pub(super) const LINES_MAX: usize = 32;

/// What is known of a rank when time is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RankReport {
    /// It did not answer.
    Silent,
    /// It left in order, doing this last.
    Left(Snapshot),
    /// It is no longer there, and what it did last is not known.
    Gone,
    /// It answered.
    Here(Snapshot),
    /// It answered, but long after the others: it does this since.
    Late(Snapshot),
    /// It is not in the communicator.
    Apart,
}

/// Finds the ranks that `call`, in which rank `by` ran out of time, waits for.
///
/// Who left without taking part comes first, for that is certain; then who does not answer; then
/// who is in an earlier call or in none, for everybody else waits for those; then who is in
/// another call; then who got least far.
pub(super) fn decide(stalled: &StalledCall, by: Rank, reports: &[RankReport]) -> Verdict {
    let call = &stalled.call;
    let left = |report: &RankReport| matches!(report, RankReport::Left(last) if misses(last, call));
    let (kind, failed_ranks, what) = if let Some(failed_ranks) = which(reports, left) {
        (VerdictKind::Left, failed_ranks, LEFT.to_owned())
    } else if let Some(failed_ranks) = which(reports, |report| *report == RankReport::Silent) {
        (VerdictKind::Unresponsive, failed_ranks, SILENT.to_owned())
    } else if let Some(late) = late(reports, call) {
        (VerdictKind::Unresponsive, late, LATE.to_owned())
    } else {
        slowest(reports)
    };
    let told = describe(call, stalled.uncounted);
    let mut text = format!("{told} is overdue on rank {by}: {} {what}", name(&failed_ranks));
    list(&mut text, reports, &failed_ranks);
    let calls = (kind == VerdictKind::OtherCall).then(|| differing(reports, &failed_ranks, by));
    Verdict::new(kind, failed_ranks, text).with_calls(calls.flatten())
}

/// The call of the first of the ranks that failed, and that of `by`.
fn differing(reports: &[RankReport], failed_ranks: &[Rank], by: Rank) -> Option<Calls> {
    let call_of = |rank: Rank| match reports.get(rank)? {
        RankReport::Here(doing) | RankReport::Late(doing) => doing.call.map(|call| (rank, call)),
        _ => None,
    };
    let other = (!failed_ranks.contains(&by)).then(|| call_of(by));
    Some([call_of(*failed_ranks.first()?)?, other??])
}

/// Finds the rank because of which the message does not end that rank `by` waits in: who waits for
/// a message waits for one rank, which may wait for another. At the end of that chain is one that
/// does not answer, has left, or waits in no message; or ranks that wait for each other.
pub(super) fn decide_message(stalled: &StalledCall, by: Rank, reports: &[RankReport]) -> Verdict {
    let first = stalled.call.root as Rank;
    let mut chain = vec![by];
    let end = loop {
        let at = chain[chain.len() - 1];
        let next = match reports.get(at) {
            Some(RankReport::Here(doing) | RankReport::Late(doing)) => doing.peer(),
            _ => None,
        };
        // The first of them has said what it waits for: it may have gone on since.
        let first = Some(first).filter(|_| at == by);
        let Some(next) = next.or(first) else { break at };
        chain.push(next);
        if chain[..chain.len() - 1].contains(&next) {
            break next;
        }
    };
    let start = chain.iter().position(|&rank| rank == end).unwrap_or(0);
    let mut ring = chain[start..chain.len() - usize::from(start + 1 < chain.len())].to_vec();
    ring.sort_unstable();
    let silent = || which(reports, |report| *report == RankReport::Silent);
    let (kind, failed_ranks, what) = match reports.get(end) {
        Some(RankReport::Left(_) | RankReport::Gone) => (VerdictKind::Left, vec![end], LEFT),
        Some(RankReport::Silent) => (VerdictKind::Unresponsive, vec![end], SILENT),
        _ if ring.len() > 1 => match silent() {
            // They may wait for more than they say.
            Some(silent) => (VerdictKind::Unresponsive, silent, SILENT),
            None => (VerdictKind::Behind, ring, "wait for each other"),
        },
        Some(RankReport::Here(doing)) if doing.peer() == Some(end) => {
            (VerdictKind::NotEntered, vec![end], "waits for itself")
        }
        _ => (VerdictKind::NotEntered, vec![end], "waits in no message"),
    };
    let message = match reports.get(by) {
        Some(RankReport::Here(doing)) => doing.message(),
        _ => None,
    };
    let message = message.unwrap_or_else(|| "a message".into());
    let mut text = format!("{message} is overdue on rank {by}: {} {what}", name(&failed_ranks));
    list(&mut text, reports, &failed_ranks);
    Verdict::new(kind, failed_ranks, text)
}

/// Those who answered late, if all others are in the call or past it: they waited for those.
fn late(reports: &[RankReport], call: &Call) -> Option<Vec<Rank>> {
    let is_waiting = |report: &RankReport| match report {
        RankReport::Here(doing) => doing.position() > call.number.saturating_mul(2),
        _ => true,
    };
    let late = which(reports, |report| matches!(report, RankReport::Late(_)))?;
    reports.iter().all(is_waiting).then_some(late)
}

const LATE: &str = "answered late: the process was stopped, or its host is overloaded";
const LEFT: &str = "left the communicator without it";
const SILENT: &str = "not answering: the process is stopped, or its host or network is lost";

/// Finds the ranks that called something else than others under the same number, where rank `by`
/// has waited for a while: in one of those calls or in another, as ranks whose calls differ may
/// finish them and wait in the next. What a rank calls under a number never changes, so this is
/// certain, whoever has answered.
pub(super) fn contradiction(by: Rank, reports: &[RankReport]) -> Option<Verdict> {
    let mut by_number = BTreeMap::<u64, Vec<(Rank, Snapshot)>>::new();
    for (rank, report) in reports.iter().enumerate() {
        if let RankReport::Here(doing) | RankReport::Late(doing) = report
            && let Some(call) = doing.call
        {
            by_number.entry(call.number).or_default().push((rank, *doing));
        }
    }
    let differ =
        |inside: Vec<_>| in_another_call(&inside).map(|failed_ranks| (inside, failed_ranks));
    let (inside, failed_ranks) = by_number.into_values().find_map(differ)?;
    let called = |is_failed: bool| {
        let is = |(rank, _): &&(Rank, Snapshot)| failed_ranks.contains(rank) == is_failed;
        let (rank, doing) = inside.iter().find(is)?;
        let call = doing.call?;
        Some(((*rank, call), describe(&call, doing.uncounted)))
    };
    let ((failed, theirs), (other, usual)) = (called(true)?, called(false)?);
    let who = name(&failed_ranks);
    let mut text = format!("rank {by} waits: {who} called {theirs}, others {usual}");
    list(&mut text, reports, &failed_ranks);
    let verdict = Verdict::new(VerdictKind::OtherCall, failed_ranks, text);
    Some(verdict.with_calls(Some([failed, other])))
}

/// Whether a rank that did `last` before it left took no part in `call`, or not to its end.
fn misses(last: &Snapshot, call: &Call) -> bool {
    last.position() <= call.number.saturating_mul(2).saturating_add(1)
}

/// Whether a rank is in a collective that one which did `last` before it left took no part in, or
/// not to its end.
pub(super) fn is_missed(last: &Snapshot, doing: &Snapshot) -> bool {
    let is_collective = |call: &Call| call.collective != CollectiveKind::Message;
    doing.inside && doing.call.filter(is_collective).is_some_and(|call| misses(last, &call))
}

/// Finds the ranks that are gone for good without having taken part in `call`, in which rank `by`
/// waits: no need to wait for the deadline.
pub(super) fn gone(
    stalled: &StalledCall,
    by: Rank,
    left_group: impl Iterator<Item = (Rank, Snapshot)>,
) -> Option<Verdict> {
    let call = &stalled.call;
    let gone: Vec<_> = left_group.filter(|(_, last)| misses(last, call)).collect();
    let failed_ranks: Vec<Rank> = gone.iter().map(|(rank, _)| *rank).collect();
    let who = (!failed_ranks.is_empty()).then(|| name(&failed_ranks))?;
    let told = describe(call, stalled.uncounted);
    let mut text = format!("rank {by} waits in {told}: {who} left the communicator without it");
    for (rank, last) in gone.iter().take(LINES_MAX) {
        write!(text, "\n  rank {rank}: left; at that time {last}")
            .expect("writing to a string cannot fail");
    }
    Some(Verdict::new(VerdictKind::Left, failed_ranks, text))
}

fn which(reports: &[RankReport], is: impl Fn(&RankReport) -> bool) -> Option<Vec<Rank>> {
    let found = |(rank, report): (Rank, &RankReport)| is(report).then_some(rank);
    let ranks: Vec<Rank> = reports.iter().enumerate().filter_map(found).collect();
    (!ranks.is_empty()).then_some(ranks)
}

fn slowest(reports: &[RankReport]) -> (VerdictKind, Vec<Rank>, String) {
    let here = |(rank, report): (Rank, &RankReport)| match report {
        RankReport::Here(snapshot) => Some((rank, *snapshot)),
        _ => None,
    };
    // Who answered late says nothing of the moment of the question.
    let present: Vec<_> = reports.iter().enumerate().filter_map(here).collect();
    let earliest = present.iter().map(|(_, doing)| doing.position()).min().unwrap_or(0);
    let last: Vec<_> =
        present.into_iter().filter(|(_, doing)| doing.position() == earliest).collect();
    let ranks = || last.iter().map(|(rank, _)| *rank).collect();
    if earliest % 2 == 0 {
        let has = if last.len() == 1 { "has" } else { "have" };
        let uncounted = last.first().map_or(0, |(_, doing)| doing.uncounted);
        let what = format!("{has} not entered call #{}", (earliest / 2).saturating_sub(uncounted));
        return (VerdictKind::NotEntered, ranks(), what);
    }
    if let Some(others) = in_another_call(&last) {
        let is = if others.len() == 1 { "is" } else { "are" };
        let what = format!("{is} in another call than the others");
        return (VerdictKind::OtherCall, others, what);
    }
    // All who are there are in the call: somebody who is not may be what it waits for.
    if let Some(gone) = which(reports, |report| *report == RankReport::Gone) {
        return (VerdictKind::Left, gone, "gone, perhaps without it".to_owned());
    }
    let least = last
        .iter()
        .map(|(_, doing)| doing)
        .reduce(|least, doing| if doing.is_behind(least) { doing } else { least });
    let is_least = |doing: &Snapshot| least.is_some_and(|least| !least.is_behind(doing));
    let ranks = last.iter().filter(|(_, doing)| is_least(doing)).map(|(rank, _)| *rank).collect();
    (VerdictKind::Behind, ranks, "got least far".to_owned())
}

/// The ranks whose call is not the one that most ranks are in (of equally many, the one that the
/// lowest rank is in).
fn in_another_call(inside: &[(Rank, Snapshot)]) -> Option<Vec<Rank>> {
    let votes = |call| inside.iter().filter(|(_, other)| other.call == call).count();
    // The first of the maxima: `max_by_key` takes the last.
    let (_, usual) = inside.iter().rev().max_by_key(|(_, doing)| votes(doing.call))?;
    let others: Vec<Rank> = inside
        .iter()
        .filter(|(_, doing)| doing.call != usual.call)
        .map(|(rank, _)| *rank)
        .collect();
    (!others.is_empty()).then_some(others)
}

/// Appends a line a rank, the failed ranks first.
fn list(text: &mut String, reports: &[RankReport], failed_ranks: &[Rank]) {
    let is_other = |rank: &Rank| {
        failed_ranks.binary_search(rank).is_err() && reports[*rank] != RankReport::Apart
    };
    let others = (0..reports.len()).filter(is_other);
    for rank in failed_ranks.iter().copied().chain(others).take(LINES_MAX) {
        let line = match &reports[rank] {
            RankReport::Silent => "no answer".to_owned(),
            RankReport::Gone => "gone".to_owned(),
            RankReport::Apart => "not in the group".to_owned(),
            RankReport::Left(last) => format!("left; at that time {last}"),
            RankReport::Here(doing) => doing.to_string(),
            RankReport::Late(doing) => format!("answered late; {doing}"),
        };
        write!(text, "\n  rank {rank}: {line}").expect("writing to a string cannot fail");
    }
    if reports.len() > LINES_MAX {
        let more = reports.len() - LINES_MAX;
        write!(text, "\n  … and {more} more ranks").expect("writing to a string cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisum_kernels::Dtype;

    use crate::status::{Status, Waiting};
    use crate::tests::call;

    fn inside(number: u64, step: u32) -> RankReport {
        let call = Some(call(number));
        RankReport::Here(Snapshot { call, inside: true, step, steps: 10, ..Snapshot::default() })
    }

    fn after(number: u64) -> Snapshot {
        Snapshot { call: Some(call(number)), inside: false, ..Snapshot::default() }
    }

    #[track_caller]
    fn check(reports: &[RankReport], kind: VerdictKind, failed_ranks: &[Rank]) -> Verdict {
        let verdict = decide(&call(7).into(), 0, reports);
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (kind, failed_ranks), "{verdict}");
        verdict
    }

    #[test]
    fn only_different_calls_of_the_same_number_contradict() {
        let other = RankReport::Here(Snapshot {
            call: Some(Call { count: 99, ..call(7) }),
            inside: true,
            ..Snapshot::default()
        });
        let late = [inside(7, 1), RankReport::Here(after(6)), RankReport::Silent, inside(7, 3)];
        assert_eq!(contradiction(0, &late), None);
        let contradicting = [inside(7, 1), inside(7, 1), RankReport::Silent, other];
        let verdict = contradiction(0, &contradicting).unwrap();
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::OtherCall, &[3][..]));
        let first = verdict.text.lines().next().unwrap();
        assert!(first.contains(&describe(&call(7), 0)) && first.contains("x 99"), "{first}");
        // Rank 0 has what it waited for in call 7.
        let next = [inside(8, 1), inside(7, 1), inside(7, 1), other];
        assert_eq!(contradiction(0, &next).unwrap().failed_ranks, [3]);
    }

    fn in_message(peer: Rank) -> RankReport {
        let waiting =
            Waiting { communicator: 3, peer, receives: true, dtype: Dtype::F32, bytes: 64, tag: 7 };
        let status = Status::new((0..8).collect(), 0);
        status.wait_for_message(&waiting);
        RankReport::Here(status.snapshot())
    }

    #[track_caller]
    fn check_message(reports: &[RankReport], kind: VerdictKind, failed_ranks: &[Rank]) {
        let RankReport::Here(Snapshot { call: Some(call), .. }) = reports[0] else { panic!() };
        let verdict = decide_message(&call.into(), 0, reports);
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (kind, failed_ranks), "{verdict}");
    }

    #[test]
    fn a_message_waits_for_the_end_of_the_chain_and_not_for_its_neighbour() {
        let idle = RankReport::Here(Snapshot::default());
        let left = RankReport::Left(Snapshot::default());
        let chain = [in_message(4), idle, in_message(3), RankReport::Silent, in_message(2)];
        check_message(&chain, VerdictKind::Unresponsive, &[3]);
        let chain = [in_message(4), idle, in_message(1), idle, in_message(2)];
        check_message(&chain, VerdictKind::NotEntered, &[1]);
        let chain = [in_message(1), in_message(2), left, RankReport::Silent, idle];
        check_message(&chain, VerdictKind::Left, &[2]);
        let direct = [in_message(1), idle];
        check_message(&direct, VerdictKind::NotEntered, &[1]);
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_named_all_and_those_that_wait_for_them_are_not() {
        let ring = [in_message(3), in_message(2), in_message(1), in_message(2)];
        check_message(&ring, VerdictKind::Behind, &[1, 2]);
        let itself = [in_message(0), in_message(0)];
        check_message(&itself, VerdictKind::NotEntered, &[0]);
        // A rank waits in more than one message at a time.
        let with_silent = [in_message(1), in_message(0), RankReport::Silent];
        check_message(&with_silent, VerdictKind::Unresponsive, &[2]);
    }

    #[test]
    fn who_has_not_entered_is_named_with_what_it_did_last() {
        let reports = [inside(7, 1), RankReport::Here(after(6)), inside(7, 9)];
        let verdict = check(&reports, VerdictKind::NotEntered, &[1]);
        assert!(verdict.text.contains("rank 1: outside; its last call was"), "{verdict}");
        assert!(verdict.text.contains("rank 2: in "), "{verdict}");
    }

    #[test]
    fn the_rank_that_is_furthest_back_is_to_blame_and_not_those_that_wait_for_it() {
        let reports = [inside(7, 1), inside(6, 1), RankReport::Here(after(4)), inside(7, 0)];
        check(&reports, VerdictKind::NotEntered, &[2]);
    }

    #[test]
    fn silence_outweighs_slowness_and_leaving_outweighs_silence() {
        let silent = [inside(7, 1), RankReport::Silent, RankReport::Here(after(3))];
        check(&silent, VerdictKind::Unresponsive, &[1]);
        let left = [inside(7, 1), RankReport::Silent, RankReport::Left(after(3))];
        check(&left, VerdictKind::Left, &[2]);
    }

    #[test]
    fn who_left_after_the_call_is_not_to_blame() {
        let reports = [inside(7, 5), inside(7, 2), RankReport::Left(after(7))];
        check(&reports, VerdictKind::Behind, &[1]);
    }

    #[test]
    fn the_minority_is_in_another_call() {
        let other = Call { count: 5, ..call(7) };
        let other = Snapshot { call: Some(other), inside: true, ..Snapshot::default() };
        let reports = [inside(7, 5), RankReport::Here(other), inside(7, 2)];
        check(&reports, VerdictKind::OtherCall, &[1]);
        check(&[inside(7, 5), RankReport::Here(other)], VerdictKind::OtherCall, &[1]);
    }

    #[test]
    fn who_is_gone_is_to_blame_if_all_others_are_in_the_call_and_only_then() {
        check(&[inside(7, 5), RankReport::Gone, inside(7, 2)], VerdictKind::Left, &[1]);
        let late = RankReport::Here(after(6));
        check(&[inside(7, 5), RankReport::Gone, late], VerdictKind::NotEntered, &[2]);
        let silent = [inside(7, 5), RankReport::Gone, RankReport::Silent];
        check(&silent, VerdictKind::Unresponsive, &[2]);
    }

    #[test]
    fn all_who_got_least_far_are_named() {
        let reports = [inside(7, 5), inside(7, 2), inside(7, 3), inside(7, 2)];
        check(&reports, VerdictKind::Behind, &[1, 3]);
    }

    #[test]
    fn a_large_world_gives_a_text_of_bounded_length() {
        let mut reports = vec![inside(7, 5); 1000];
        reports[999] = RankReport::Silent;
        let verdict = check(&reports, VerdictKind::Unresponsive, &[999]);
        assert_eq!(verdict.text.lines().count(), LINES_MAX + 2);
        assert!(verdict.text.contains("rank 999: no answer"));
    }
}
