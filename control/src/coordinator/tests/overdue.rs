//! Calls that are overdue: all ranks are asked what they are doing.

use super::*;

#[test]
fn an_overdue_call_is_decided_when_the_last_rank_answers() {
    let mut job = Job::new();
    job.say(1, Message::Overdue(call(5).into()));
    let question = Message::StatusRequest { query: 1, communicator: 0, is_overdue: true };
    assert_eq!(job.outputs()[0].messages, [question]);
    for rank in [0, 1, 3] {
        job.answer(rank, 5, true);
    }
    job.expect_nothing();
    job.answer(2, 4, false);
    job.expect(VerdictKind::NotEntered, &[2]);
}

#[test]
fn what_was_asked_out_of_patience_is_asked_again_when_the_call_is_overdue() {
    let mut job = Job::new();
    job.say(2, Message::Stalled(call(5).into()));
    let question =
        |query, is_overdue| Message::StatusRequest { query, communicator: 0, is_overdue };
    assert_eq!(job.outputs()[0].messages, [question(1, false)]);
    job.say(1, Message::Overdue(call(5).into()));
    assert_eq!(job.outputs()[0].messages, [question(2, true)]);
    for rank in [0, 1, 2] {
        job.answer(rank, 5, true);
    }
    job.expect_nothing();
    job.answer(3, 4, false);
    job.expect(VerdictKind::NotEntered, &[3]);
}

#[test]
fn a_rank_that_does_not_answer_is_unresponsive() {
    let mut job = Job::new();
    job.say(1, Message::Overdue(call(5).into()));
    for rank in [0, 1, 2] {
        job.answer(rank, 5, true);
    }
    job.wait(ANSWER_TIMEOUT);
    job.expect(VerdictKind::Unresponsive, &[3]);
}

#[test]
fn a_death_during_the_question_is_the_answer() {
    let mut job = Job::new();
    job.say(1, Message::Overdue(call(5).into()));
    job.lose(3);
    job.expect(VerdictKind::Died, &[3]);
}

#[test]
fn who_leaves_during_the_question_has_answered() {
    let mut job = Job::new();
    job.say(1, Message::Overdue(call(5).into()));
    for rank in [0, 1, 2] {
        job.answer(rank, 5, true);
    }
    job.say(3, Message::Bye(Snapshot::default()));
    job.expect(VerdictKind::Left, &[3]);
}
