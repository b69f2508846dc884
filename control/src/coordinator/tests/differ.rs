//! Ranks whose calls differ, or may.

use unisum_link::Call;

use super::*;
use crate::status::Told;

fn told(number: u64, history: u64, text: &str) -> Told {
    Told { call: Call { history, ..call(number) }, text: text.into() }
}

#[test]
fn ranks_whose_calls_differ_are_asked_and_quoted() {
    let mut job = Job::new();
    let (finding, text) = (Finding::Mismatch, "they differ");
    job.say(1, Message::Accuse(Report::new(7, 3, finding, text)));
    let asked: Vec<_> = job.outputs().into_iter().map(|output| output.audience).collect();
    assert_eq!(asked, [Audience::One(1), Audience::One(3)]);
    job.say(1, Message::Recounted { communicator: 7, calls: vec![told(4, 1, "a")] });
    job.expect_nothing();
    job.say(3, Message::Recounted { communicator: 7, calls: vec![told(4, 2, "b")] });
    let verdict = job.coordinator.verdict.clone().unwrap();
    assert_eq!(verdict.text, "rank 3 called b, rank 1 called a");
    job.expect(VerdictKind::Mismatch, &[1, 3]);
}

#[test]
fn calls_that_differ_come_before_what_follows_from_them() {
    let differ = || {
        let mut job = Job::new();
        job.accuse(1, 3, Finding::Mismatch);
        job.outputs();
        job
    };
    let mut job = differ();
    job.lose(3);
    job.expect(VerdictKind::Mismatch, &[1, 3]);
    let mut job = differ();
    job.say(3, Message::Bye(Snapshot::default()));
    for rank in [0, 1, 2] {
        job.say(rank, Message::Recounted { communicator: 0, calls: vec![] });
    }
    job.expect(VerdictKind::Mismatch, &[1, 3]);
    let mut job = differ();
    job.wait(ANSWER_TIMEOUT);
    job.expect(VerdictKind::Mismatch, &[1, 3]);
}

/// Two that meet can't know which of them is wrong; if most others called what one of them did, it
/// is the other.
#[test]
fn of_two_that_differ_the_one_is_to_blame_that_differs_from_most() {
    for (histories, failed_ranks) in
        [([1, 1, 1, 2], &[3][..]), ([2, 1, 1, 2], &[1, 3]), ([2, 1, 2, 2], &[1])]
    {
        let mut job = Job::new();
        job.accuse(1, 3, Finding::Mismatch);
        for (rank, history) in histories.into_iter().enumerate() {
            let calls = vec![told(4, history, "a call")];
            job.say(rank, Message::Recounted { communicator: 0, calls });
        }
        job.expect(VerdictKind::Mismatch, failed_ranks);
    }
}

#[test]
fn a_late_call_ends_the_job_only_if_an_earlier_one_differed() {
    let late = |history: u64| {
        let mut job = Job::new();
        job.say(2, Message::Stalled(call(7).into()));
        (0..WORLD).for_each(|rank| job.answer(rank, 7 + rank as u64 % 2, true));
        job.outputs();
        for rank in 0..WORLD {
            let history = if rank == 1 { history } else { 5 };
            let calls = vec![told(6, history, "a call")];
            job.say(rank, Message::Recounted { communicator: 0, calls });
        }
        job
    };
    late(5).expect_nothing();
    late(4).expect(VerdictKind::OtherCall, &[1]);
}
