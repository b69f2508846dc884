//! Ranks that are no longer in a communicator, or late.

use super::*;

#[test]
fn who_left_a_group_is_not_one_whose_link_failed() {
    let report = || {
        let text = "link to rank 3: closed by the peer".to_owned();
        Message::Accuse(Report::new(5, 3, Finding::LinkFailed, text))
    };
    let part = |communicator| Message::LeftGroup { communicator, last: Snapshot::default() };
    for accused_first in [false, true] {
        let mut job = Job::new();
        job.say(3, part(4));
        if accused_first {
            job.say(1, report());
            job.expect_nothing();
            job.say(3, part(5));
        } else {
            job.say(3, part(5));
            job.expect_nothing();
            job.say(1, report());
        }
        let text = &job.coordinator.verdict.as_ref().unwrap().text;
        assert!(
            text.contains("rank 3: left; at that time has called nothing in this communicator yet"),
            "{text}"
        );
        job.expect(VerdictKind::Left, &[3]);
    }
}

/// It goes on while the question is open: what it does then says nothing of what others waited for.
#[test]
fn who_was_stopped_and_goes_on_is_named_and_not_those_who_waited() {
    for (number, inside) in [(5, true), (6, true), (6, false)] {
        let mut job = Job::new();
        job.say(1, Message::Overdue(call(5).into()));
        for rank in [0, 1, 3] {
            job.answer(rank, 5, true);
        }
        job.wait(LATE_ANSWER);
        job.answer(2, number, inside);
        job.expect(VerdictKind::Unresponsive, &[2]);
    }
    // Its answer comes late, and another rank is not in the call.
    let mut job = Job::new();
    job.say(1, Message::Overdue(call(5).into()));
    job.answer(0, 4, false);
    job.answer(1, 5, true);
    job.answer(3, 5, true);
    job.wait(LATE_ANSWER);
    job.answer(2, 5, true);
    job.expect(VerdictKind::NotEntered, &[0]);
}

#[test]
fn who_waits_in_a_message_is_told_if_the_other_end_has_left_group() {
    let mut job = Job::new();
    let call = unisum_link::Call { communicator: 5, root: 3, ..call(0) };
    let call = unisum_link::Call { collective: unisum_link::CollectiveKind::Message, ..call };
    let stalled = || Message::Stalled(StalledCall { call, uncounted: 0, ranks: vec![0, 3] });
    // Whoever waits makes all say what they do.
    let is_question = |it: &Output| matches!(it.messages[..], [Message::StatusRequest { .. }]);
    let told = |job: &mut Job| -> Vec<Output> {
        job.outputs().into_iter().filter(|it| !is_question(it)).collect()
    };
    job.say(0, stalled());
    assert_eq!(told(&mut job), []);
    job.say(3, Message::LeftGroup { communicator: 4, last: Snapshot::default() });
    job.say(0, stalled());
    assert_eq!(told(&mut job), []);
    job.say(3, Message::LeftGroup { communicator: 5, last: Snapshot::default() });
    job.say(0, stalled());
    let messages = vec![Message::HasParted { communicator: 5, rank: 3 }];
    assert_eq!(told(&mut job), [Output { audience: Audience::One(0), messages }]);
    job.expect_nothing();
}

/// What a rank did last in a group nobody but it can tell, and it is gone.
#[test]
fn an_heir_knows_what_who_left_did_last_in_its_groups() {
    let stalled = |number| {
        let call = unisum_link::Call { communicator: 7, ..call(number) };
        Message::Stalled(StalledCall { call, uncounted: 0, ranks: vec![0, 1, 3] })
    };
    let mut job = heir();
    job.say(3, stalled(3));
    job.expect_nothing();
    job.say(3, stalled(4));
    job.expect(VerdictKind::Left, &[0]);
    // And so does the heir's heir.
    let mut job = Job::new();
    job.say(3, Message::LeftGroup { communicator: 7, last: Snapshot::default() });
    job.say(3, Message::Bye(Snapshot::default()));
    let told = job.outputs().remove(0).messages;
    assert!(
        matches!(&told[..], [Message::Left { rank: 3, left_group, .. }] if left_group.len() == 1)
    );
}
