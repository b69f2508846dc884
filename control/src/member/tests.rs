//! Tests of a rank's half of the control plane.

use std::thread;

use unisum_link::Call;

use super::*;
use crate::coordinator::Coordinator;
use crate::status::Snapshot;
use crate::tests::call;
use crate::verdict::Finding;

fn member() -> Member {
    Member::new(Arc::new(Shared::new(1, 3)))
}

#[track_caller]
fn expect(member: &Member, kind: VerdictKind, failed_rank: usize) {
    let verdict = member.shared.verdict().expect("a verdict");
    assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (kind, &[failed_rank][..]));
    assert_eq!(member.deadline(), None);
}

fn report() -> Report {
    let text = "link to rank 2: closed";
    Report::new(0, 2, Finding::LinkFailed, text)
}

#[test]
fn a_coordinator_that_vanishes_is_dead() {
    let mut member = member();
    member.lost("its connection ended");
    expect(&member, VerdictKind::Died, 0);
}

#[test]
fn a_coordinator_that_is_silent_is_unresponsive() {
    let (mut member, now) = (member(), Instant::now());
    let asked = member.command(Command::Overdue(call(1).into()), now);
    assert_eq!(asked, [Message::Overdue(call(1).into())]);
    member.tick(now + VERDICT_TIMEOUT / 2);
    assert!(member.shared.verdict().is_none());
    member.tick(now + VERDICT_TIMEOUT);
    expect(&member, VerdictKind::Unresponsive, 0);
}

#[test]
fn who_is_asked_why_a_call_is_overdue_waits_for_the_verdict_before_it_goes_on() {
    let mut member = member();
    let question = |is_overdue| Message::StatusRequest { query: 1, communicator: 0, is_overdue };
    assert!(member.heard(question(false)).unwrap().is_some());
    assert_eq!(member.shared.await_verdict_that_comes(), None, "nobody gives up");
    assert!(member.heard(question(true)).unwrap().is_some());
    // Far beyond what the test takes.
    member.shared.is_judged(Instant::now() + Duration::from_secs(600));
    // Each of them waits, whoever looks first.
    let waiting = [0, 1].map(|_| {
        let shared = member.shared.clone();
        thread::spawn(move || shared.await_verdict_that_comes().cloned())
    });
    let verdict = Verdict::new(VerdictKind::NotEntered, vec![1], "too late");
    member.heard(Message::Verdict(verdict.clone())).unwrap();
    for waits in waiting {
        assert_eq!(waits.join().unwrap(), Some(verdict.clone()));
    }
}

#[test]
fn a_verdict_that_does_not_come_is_awaited_for_so_long_after_the_question() {
    let mut member = member();
    let question = Message::StatusRequest { query: 1, communicator: 0, is_overdue: true };
    let asked = Instant::now();
    member.heard(question).unwrap();
    for _ in 0..2 {
        assert_eq!(member.shared.await_verdict_that_comes(), None);
        assert!(asked.elapsed() >= VERDICT_TIMEOUT);
    }
}

#[test]
fn a_coordinator_that_was_cut_off_is_not_silent() {
    let (mut member, now) = (member(), Instant::now());
    member.command(Command::Overdue(call(1).into()), now);
    member.cut();
    member.tick(now + VERDICT_TIMEOUT * 9);
    assert!(member.deadline().is_none() && member.shared.verdict().is_none());
    member.goes_on(now + VERDICT_TIMEOUT * 9);
    assert_eq!(member.deadline(), Some(now + VERDICT_TIMEOUT * 10));
    member.tick(now + VERDICT_TIMEOUT * 10);
    expect(&member, VerdictKind::Unresponsive, 0);
}

#[test]
fn a_coordinator_that_is_silent_after_its_pulse_ended_is_lost() {
    let (mut member, now) = (member(), Instant::now());
    member.command(Command::Overdue(call(1).into()), now);
    member.pulse_ended();
    member.tick(now + VERDICT_TIMEOUT / 2);
    assert!(member.shared.verdict().is_none());
    member.tick(now + VERDICT_TIMEOUT);
    expect(&member, VerdictKind::Unreachable, 0);
}

fn left(rank: Rank) -> Message {
    Message::Left { rank, last: Snapshot::default(), left_group: Vec::new() }
}

fn leave(member: &mut Member, rank: Rank) {
    assert_eq!(member.heard(left(rank)), Ok(None));
}

#[test]
fn an_heir_that_is_silent_is_unresponsive() {
    let (mut member, now) = (Member::new(Arc::new(Shared::new(2, 3))), Instant::now());
    leave(&mut member, 0);
    assert!(member.lost("its connection ended"), "another one is sought");
    member.command(Command::Overdue(call(1).into()), now);
    member.tick(now + VERDICT_TIMEOUT);
    expect(&member, VerdictKind::Unresponsive, 1);
}

#[test]
fn without_any_coordinator_a_rank_concludes_on_its_own() {
    let alone = || {
        let mut member = member();
        leave(&mut member, 0);
        assert!(member.lost("its connection ended"), "another one is sought");
        member.is_alone();
        assert!(member.shared.verdict().is_none());
        member
    };
    let now = Instant::now();
    let mut member = alone();
    assert_eq!(member.command(Command::Overdue(call(1).into()), now), []);
    expect(&member, VerdictKind::Left, 0);
    let mut member = alone();
    assert_eq!(member.command(Command::Accuse(report()), now), []);
    expect(&member, VerdictKind::LinkFailed, 2);
    let mut member = alone();
    leave(&mut member, 2);
    assert_eq!(member.command(Command::Accuse(report()), now), []);
    expect(&member, VerdictKind::Left, 2);
    // Its last message had another length: that is what went wrong, and not that it left.
    let mut member = alone();
    let text = "rank 1 receives 8 bytes, rank 0 sent 4";
    let finding = Finding::Mismatch;
    let differs = Report::new(0, 0, finding, text);
    member.command(Command::Accuse(differs), now);
    let verdict = member.shared.verdict().unwrap();
    assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::Mismatch, &[0, 1][..]));
}

/// Rank 1 heard of it first, reported it, and ended: this rank sees the link to it end.
#[test]
fn who_ended_because_another_rank_left_is_not_blamed_for_a_link() {
    let last = |number| Snapshot { call: Some(call(number)), ..Snapshot::default() };
    for (group_last, names) in [(Some(last(3)), 0), (Some(last(4)), 1), (None, 1)] {
        let mut member = Member::new(Arc::new(Shared::new(2, 4)));
        let status = member.shared.enroll(7, [0, 1, 2].into(), 2);
        status.begin(&Call { communicator: 7, ..call(4) });
        let (now, link) = (Instant::now(), "link to rank 1: closed");
        let report = Report::new(7, 1, Finding::LinkFailed, link);
        // Before it has heard that rank 0 left.
        let said = member.command(Command::Accuse(report.clone()), now);
        assert_eq!(said, [Message::Accuse(report.clone())]);
        leave(&mut member, 3);
        let left_group = group_last.map(|last| (7, last)).into_iter().collect();
        member.heard(Message::Left { rank: 0, last: last(9), left_group }).unwrap();
        assert!(member.lost("its connection ended"));
        member.is_unreachable(1);
        assert_eq!(member.heir(), Some(2), "itself");
        let mut heir = Coordinator::heir([7; 16], 2, member.gone(), now);
        for message in member.coordinated_by(2, now) {
            heir.heard(2, message, now);
        }
        heir.tick(now + Duration::from_secs(1));
        while let Some(output) = heir.poll() {
            output.messages.into_iter().for_each(|it| drop(member.heard(it).unwrap()));
        }
        let verdict = member.shared.verdict().expect("a verdict");
        assert_eq!(verdict.failed_ranks, [names], "{group_last:?}: {verdict}");
        let is_left = verdict.kind == VerdictKind::Left;
        assert_eq!(is_left, names == 0, "{verdict}");
    }
}

#[test]
fn the_lowest_rank_that_is_left_is_the_heir() {
    let mut member = member();
    leave(&mut member, 0);
    assert_eq!(member.heir(), Some(1));
    let mut member = Member::new(Arc::new(Shared::new(2, 4)));
    leave(&mut member, 0);
    leave(&mut member, 3);
    assert_eq!(member.heir(), Some(1));
    member.is_unreachable(1);
    assert_eq!(member.heir(), Some(2), "itself");
    assert_eq!(member.gone()[1], Some(None));
}

#[test]
fn what_was_asked_while_the_coordinator_left_is_asked_of_the_heir() {
    let now = Instant::now();
    for asks_later in [false, true] {
        let mut member = member();
        let part = Command::Part(3, Snapshot::default());
        member.command(part, now);
        let report = report();
        if !asks_later {
            member.command(Command::Accuse(report.clone()), now);
        }
        leave(&mut member, 0);
        assert!(member.lost("its connection ended"));
        if asks_later {
            member.command(Command::Accuse(report.clone()), now);
        }
        let later = now + LINK_VERDICT_TIMEOUT / 2;
        let said = member.coordinated_by(2, later);
        let left_group = Message::LeftGroup { communicator: 3, last: Snapshot::default() };
        assert_eq!(said, [left_group, Message::Accuse(report)]);
        member.tick(now + LINK_VERDICT_TIMEOUT);
        assert!(member.shared.verdict().is_none(), "the heir has as much time");
        member.tick(later + LINK_VERDICT_TIMEOUT);
        expect(&member, VerdictKind::Unresponsive, 2);
    }
}

#[test]
fn a_verdict_of_its_own_is_told_once_and_before_the_goodbye() {
    let now = Instant::now();
    let asking = || {
        let mut member = member();
        member.command(Command::Overdue(call(1).into()), now);
        member.tick(now + VERDICT_TIMEOUT);
        member
    };
    let mut telling = asking();
    let told = telling.news();
    assert!(matches!(&told, Some(Message::Concluded(it)) if it.failed_ranks == [0]), "{told:?}");
    assert_eq!(telling.news(), None);
    let said = asking().command(Command::Leave, now);
    assert!(matches!(said[..], [Message::Concluded(_), Message::Bye(_)]), "{said:?}");
    let mut told = member();
    told.heard(Message::Verdict(Verdict::died(2, "killed"))).unwrap();
    assert_eq!(told.news(), None);
}

#[test]
fn a_coordinator_that_is_stopped_for_a_moment_is_not_to_blame_for_a_failed_link() {
    let (mut asking, now) = (member(), Instant::now());
    asking.command(Command::Accuse(report()), now);
    asking.tick(now + LINK_VERDICT_TIMEOUT - Duration::from_secs(1));
    asking.heard(Message::Verdict(Verdict::died(2, "killed"))).unwrap();
    expect(&asking, VerdictKind::Died, 2);
}

#[test]
fn blobs_out_of_order_are_refused() {
    let gathered = |rank| Message::Gathered { round: 0, rank, blob: Bytes::new() };
    assert!(member().heard(gathered(1)).is_err());
    let mut member = member();
    for rank in 0..3 {
        assert_eq!(member.heard(gathered(rank)), Ok(None));
    }
    assert!(member.heard(gathered(0)).is_err(), "that exchange is over");
}

#[test]
fn what_only_ranks_say_is_refused() {
    assert!(member().heard(Message::Joined).is_err());
    assert!(member().heard(left(3)).is_err());
}
