mod differ;
mod left_group;
mod opening;
mod overdue;

use super::questions::LATE_ANSWER;
use super::*;
use crate::status::{Status, Waiting};
use crate::tests::call;
use crate::verdict::VerdictKind;

const WORLD: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A coordinator whose ranks have all joined, and a clock that only the test moves.
struct Job {
    coordinator: Coordinator,
    now: Instant,
}

impl Job {
    fn new() -> Self {
        let mut job = Self::empty();
        for rank in 1..WORLD {
            job.coordinator.connected(rank);
            job.say(rank, Message::Joined);
        }
        job.outputs();
        job
    }

    fn empty() -> Self {
        let coordinator = Coordinator::new([7; 16], WORLD, CONNECT_TIMEOUT);
        Self { coordinator, now: Instant::now() }
    }

    fn say(&mut self, from: Rank, message: Message) {
        self.coordinator.heard(from, message, self.now);
    }

    fn accuse(&mut self, from: Rank, against: Rank, finding: Finding) {
        let text = format!("link to rank {against}: closed by the peer");
        self.say(from, Message::Accuse(Report::new(0, against, finding, text)));
    }

    fn answer(&mut self, from: Rank, number: u64, inside: bool) {
        let query = self.coordinator.query.number;
        let call = Some(call(number));
        let snapshot =
            Snapshot { call, inside, step: 1, steps: 2, bytes: 3, ..Snapshot::default() };
        self.say(from, Message::Status { query, doing: snapshot.into() });
    }

    /// The rank's connection ends.
    fn lose(&mut self, rank: Rank) {
        self.coordinator.lost(rank, "its connection ended");
        self.wait(Duration::ZERO);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.coordinator.tick(self.now);
    }

    fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.coordinator.poll()).collect()
    }

    #[track_caller]
    fn expect(&mut self, kind: VerdictKind, failed_ranks: &[Rank]) {
        let verdicts: Vec<_> = self
            .outputs()
            .into_iter()
            .filter(|output| output.audience == Audience::All)
            .flat_map(|output| output.messages)
            .filter_map(|message| match message {
                Message::Verdict(verdict) => Some((verdict.kind, verdict.failed_ranks)),
                _ => None,
            })
            .collect();
        assert_eq!(verdicts, [(kind, failed_ranks.to_vec())]);
        // Nothing is awaited after a verdict but those who are to be told.
        assert!(self.coordinator.deadline().is_none() || self.coordinator.awaits_ranks());
    }

    #[track_caller]
    fn expect_nothing(&self) {
        assert_eq!(self.coordinator.verdict, None);
    }
}

fn blob(round: u32) -> Message {
    Message::Blob { round, to: None, blob: Bytes::from_static(b"blob") }
}

#[test]
fn a_connection_that_ends_without_goodbye_is_a_death() {
    let mut job = Job::new();
    job.lose(2);
    job.expect(VerdictKind::Died, &[2]);
}

#[test]
fn the_first_verdict_wins() {
    let mut job = Job::new();
    job.lose(2);
    job.lose(3);
    job.accuse(0, 1, Finding::Mismatch);
    job.wait(CONNECT_TIMEOUT);
    job.expect(VerdictKind::Died, &[2]);
}

#[test]
fn a_dialer_that_gave_up_may_come_again() {
    let mut job = Job::empty();
    job.coordinator.connected(1);
    assert!(!job.coordinator.is_vacant(1));
    job.coordinator.lost(1, "its connection ended");
    job.expect_nothing();
    assert!(job.coordinator.is_vacant(1));
    assert!(!job.coordinator.is_vacant(0) && !job.coordinator.is_vacant(WORLD));
}

#[test]
fn ranks_that_come_just_after_the_start_has_failed_hear_why() {
    let mut job = Job::empty();
    job.coordinator.connected(1);
    job.say(1, Message::Joined);
    job.lose(1);
    job.wait(LATECOMER_TIMEOUT / 2);
    assert!(job.coordinator.is_needed() && job.coordinator.is_vacant(2));
    job.outputs();
    job.coordinator.connected(2);
    let told = job.outputs();
    assert!(
        matches!(&told[0].messages[1], Message::Verdict(verdict) if verdict.failed_ranks == [1])
    );
    job.wait(LATECOMER_TIMEOUT / 2);
    assert!(!job.coordinator.is_needed() && job.coordinator.deadline().is_none());
}

#[test]
fn a_failed_link_to_a_rank_that_dies_is_a_death() {
    let mut job = Job::new();
    job.accuse(1, 3, Finding::LinkFailed);
    job.wait(GRACE / 2);
    job.expect_nothing();
    job.lose(3);
    job.expect(VerdictKind::Died, &[3]);
}

#[test]
fn a_failed_link_to_a_living_rank_is_told_after_the_grace() {
    let mut job = Job::new();
    job.accuse(1, 3, Finding::LinkFailed);
    job.wait(GRACE / 2);
    job.accuse(2, 1, Finding::LinkFailed);
    job.wait(GRACE / 2);
    job.expect(VerdictKind::LinkFailed, &[3]);
}

/// Who is silent is lost if its pulse stops as well, and else does not reach the one that says so.
#[test]
fn a_silent_link_is_the_other_hosts_end_or_a_cut_between_the_two() {
    let mut job = Job::new();
    job.accuse(3, 1, Finding::Cut);
    job.wait(CUT_GRACE - Duration::from_millis(1));
    job.expect_nothing();
    job.wait(Duration::from_millis(1));
    job.expect(VerdictKind::Cut, &[1, 3]);
    let mut job = Job::new();
    job.accuse(3, 1, Finding::Cut);
    job.wait(GRACE);
    job.coordinator.unreachable(&[(1, IpAddr::from([10, 0, 0, 1]))], CONNECT_TIMEOUT);
    job.expect(VerdictKind::Unreachable, &[1]);
    let mut job = Job::new();
    job.accuse(3, 1, Finding::Cut);
    job.lose(1);
    job.expect(VerdictKind::Died, &[1]);
}

#[test]
fn a_failed_link_to_a_rank_that_leaves_or_left_is_its_leaving() {
    let mut job = Job::new();
    job.accuse(1, 3, Finding::LinkFailed);
    job.say(3, Message::Bye(Snapshot::default()));
    job.expect(VerdictKind::Left, &[3]);
    let mut job = Job::new();
    job.say(3, Message::Bye(Snapshot::default()));
    job.expect_nothing();
    job.accuse(1, 3, Finding::LinkFailed);
    job.expect(VerdictKind::Left, &[3]);
}

#[test]
fn a_mismatch_counts_once_all_were_asked_and_names_both() {
    let mut job = Job::new();
    job.accuse(3, 1, Finding::Mismatch);
    for rank in [3, 1, 0, 2] {
        job.expect_nothing();
        job.say(rank, Message::Recounted { communicator: 0, calls: Vec::new() });
    }
    job.expect(VerdictKind::Mismatch, &[1, 3]);
}

#[test]
fn a_panic_counts_at_once_and_names_who_panicked() {
    let mut job = Job::new();
    job.accuse(3, 3, Finding::Panicked);
    job.expect(VerdictKind::Panicked, &[3]);
}

#[test]
fn an_exchange_is_told_to_all_in_rank_order() {
    let mut job = Job::new();
    for round in 0..3 {
        for rank in [2, 0, 3, 1] {
            job.say(rank, blob(round));
        }
        let outputs = job.outputs();
        assert_eq!(outputs.len(), 1);
        let ranks = outputs[0].messages.iter().map(|message| match message {
            Message::Gathered { round: told, rank, .. } if *told == round => *rank,
            other => panic!("{other:?}"),
        });
        assert!(ranks.eq(0..WORLD));
    }
}

#[test]
fn blobs_for_each_rank_are_told_to_it_alone() {
    let mut job = Job::new();
    for to in 0..WORLD {
        job.say(1, Message::Blob { round: 0, to: Some(to), blob: Bytes::from(vec![to as u8]) });
    }
    for rank in [2, 0, 3] {
        job.say(rank, blob(0));
    }
    for (rank, output) in job.outputs().iter().enumerate() {
        assert_eq!(output.audience, Audience::One(rank));
        let told = output.messages.iter().map(|message| match message {
            Message::Gathered { round: 0, blob, .. } => &blob[..],
            other => panic!("{other:?}"),
        });
        assert_eq!(told.collect::<Vec<_>>(), [b"blob", &[rank as u8][..], b"blob", b"blob"]);
    }
    job.expect_nothing();
}

#[test]
fn a_rank_with_blobs_for_some_only_is_named() {
    let mut job = Job::new();
    for rank in 0..3 {
        job.say(rank, blob(0));
    }
    job.say(3, Message::Blob { round: 0, to: Some(0), blob: Bytes::new() });
    job.wait(CONNECT_TIMEOUT);
    job.answer(3, 0, false);
    job.wait(ANSWER_TIMEOUT);
    job.expect(VerdictKind::NotEntered, &[3]);
}

#[test]
fn ranks_that_never_came_are_named() {
    let mut job = Job::empty();
    job.coordinator.connected(1);
    job.say(1, Message::Joined);
    job.coordinator.connected(2);
    job.say(0, blob(0));
    job.say(1, blob(0));
    job.wait(CONNECT_TIMEOUT);
    job.expect(VerdictKind::Absent, &[2, 3]);
    job.coordinator.connected(3);
    assert!(matches!(job.outputs()[0].messages[..], [_, Message::Verdict(_)]));
}

#[test]
fn a_rank_that_joins_and_sets_nothing_up_is_named() {
    let mut job = Job::new();
    for rank in 0..3 {
        job.say(rank, blob(0));
    }
    job.wait(CONNECT_TIMEOUT);
    job.answer(3, 0, false);
    job.wait(ANSWER_TIMEOUT);
    job.expect(VerdictKind::NotEntered, &[3]);
}

#[test]
fn an_exchange_with_a_rank_that_left_ends() {
    let mut job = Job::new();
    job.say(2, Message::Bye(Snapshot::default()));
    job.say(1, blob(0));
    job.expect(VerdictKind::Left, &[2]);
}

#[test]
fn leaving_in_order_is_no_verdict_and_the_end_of_the_connection_neither() {
    let mut job = Job::new();
    for rank in [2, 1, 3, 0] {
        job.say(rank, Message::Bye(Snapshot::default()));
        job.coordinator.lost(rank, "its connection ended");
    }
    job.expect_nothing();
}

#[test]
fn nonsense_ends_the_job_with_its_author_named() {
    let nonsense = [
        Message::Verdict(Verdict::died(1, "")),
        Message::Joined,
        blob(1),
        Message::Blob { round: 0, to: Some(1), blob: Bytes::new() },
        Message::Accuse(Report::new(0, WORLD, Finding::LinkFailed, "")),
    ];
    for message in nonsense {
        let mut job = Job::new();
        job.say(2, message);
        job.expect(VerdictKind::Protocol, &[2]);
    }
}

/// Ranks that have given up close their links; the question, not these, tells who is late.
#[test]
fn links_that_end_while_ranks_are_asked_are_nobodys_fault() {
    let mut job = Job::new();
    job.say(1, Message::Overdue(call(5).into()));
    job.accuse(2, 1, Finding::LinkFailed);
    job.wait(GRACE);
    job.expect_nothing();
    for rank in [0, 1, 2] {
        job.answer(rank, 5, true);
    }
    job.wait(ANSWER_TIMEOUT);
    job.expect(VerdictKind::Unresponsive, &[3]);
}

/// While this process was stopped the others came to a verdict without it.
#[test]
fn a_verdict_of_the_ranks_own_counts_before_deaths_seen_in_the_same_moment() {
    let mut job = Job::new();
    job.coordinator.lost(2, "its connection ended");
    job.say(1, Message::Concluded(Verdict::coordinator_silent(0, "stopped")));
    job.say(3, Message::Bye(Snapshot::default()));
    job.wait(Duration::ZERO);
    job.expect(VerdictKind::Unresponsive, &[0]);
}

#[test]
fn a_message_that_is_overdue_is_asked_about_along_the_chain() {
    let mut job = Job::new();
    let waiting = |peer| {
        let (communicator, receives, dtype) = (5, true, unisum_kernels::Dtype::U8);
        let waiting = Waiting { communicator, peer, receives, dtype, bytes: 9, tag: 1 };
        let status = Status::new((0..8).collect(), 0);
        status.wait_for_message(&waiting);
        (waiting.call(), status.snapshot())
    };
    let stalled = StalledCall { call: waiting(2).0, uncounted: 0, ranks: vec![0, 2, 3] };
    job.say(0, Message::Overdue(stalled));
    let query = job.coordinator.query.number;
    for (rank, snapshot) in [(0, waiting(2).1), (2, waiting(3).1), (3, Snapshot::default())] {
        job.say(rank, Message::Status { query, doing: snapshot.into() });
    }
    job.wait(ANSWER_TIMEOUT);
    // Rank 1 did not answer either, but is not in the communicator.
    job.expect(VerdictKind::NotEntered, &[3]);
}

/// Who has accused it before the cut was seen, and who does so after it, waits for the same.
#[test]
fn a_link_to_a_rank_that_was_cut_off_waits_whether_it_has_died() {
    for is_accused_before in [true, false] {
        let mut job = Job::new();
        if is_accused_before {
            job.accuse(3, 2, Finding::LinkFailed);
        }
        job.coordinator.cut(2, job.now);
        if !is_accused_before {
            job.accuse(3, 2, Finding::LinkFailed);
        }
        job.wait(FLAP_GRACE - Duration::from_millis(1));
        job.expect_nothing();
        job.lose(2);
        job.expect(VerdictKind::Died, &[2]);
    }
}

/// Rank 1 coordinates after rank 0 has left and its process has ended.
fn heir() -> Job {
    let now = Instant::now();
    let last = Snapshot { call: Some(call(9)), ..Snapshot::default() };
    let in_group = Snapshot { call: Some(call(3)), ..Snapshot::default() };
    let gone = vec![Some(Some([(0, last), (7, in_group)].into())), None, None, None];
    let mut job = Job { coordinator: Coordinator::heir([7; 16], 1, gone, now), now };
    assert!(!job.coordinator.is_vacant(0) && !job.coordinator.is_vacant(1));
    job.coordinator.connected(3);
    job.say(3, Message::Joined);
    job
}

#[test]
fn an_heir_notices_deaths_of_those_who_came_to_it() {
    let mut job = heir();
    job.outputs();
    job.lose(3);
    job.expect(VerdictKind::Died, &[3]);
}

#[test]
fn who_comes_to_an_heir_while_ranks_are_asked_is_asked_too() {
    let mut job = heir();
    job.say(1, Message::Overdue(call(5).into()));
    job.outputs();
    job.coordinator.connected(2);
    let told = job.outputs().remove(0).messages;
    assert!(matches!(told[..], [Message::Welcome { .. }, Message::StatusRequest { .. }]));
    job.say(2, Message::Joined);
    job.answer(1, 5, true);
    job.answer(2, 4, false);
    job.answer(3, 5, true);
    job.expect(VerdictKind::NotEntered, &[2]);
}

#[test]
fn who_never_comes_to_an_heir_is_no_death_but_blamed_if_it_is_waited_for() {
    let mut job = heir();
    assert!(!job.coordinator.all_came());
    job.wait(HEIR_TIMEOUT);
    job.expect_nothing();
    assert!(job.coordinator.all_came() && !job.coordinator.is_vacant(2));
    job.outputs();
    job.say(1, Message::Overdue(call(5).into()));
    job.answer(1, 5, true);
    job.answer(3, 5, true);
    job.expect(VerdictKind::Left, &[2]);
}

#[test]
fn a_coordinator_is_needed_until_all_others_are_gone() {
    let mut job = heir();
    job.say(1, Message::Bye(Snapshot::default()));
    assert!(job.coordinator.is_needed());
    job.say(3, Message::Bye(Snapshot::default()));
    assert!(job.coordinator.is_needed(), "rank 2 may come");
    job.wait(HEIR_TIMEOUT);
    assert!(!job.coordinator.is_needed());
    let mut ended = heir();
    ended.lose(3);
    assert!(ended.coordinator.is_needed(), "rank 2 is to be told the verdict");
    ended.coordinator.connected(2);
    let told = ended.outputs().pop().unwrap().messages;
    assert!(matches!(told[..], [Message::Welcome { .. }, Message::Verdict(_)]), "{told:?}");
    ended.say(2, Message::Joined);
    assert!(!ended.coordinator.is_needed(), "all have been told");
}

#[test]
fn of_those_who_do_not_go_on_the_one_that_is_stopped_is_named() {
    let mut job = Job::new();
    job.say(0, blob(0));
    job.wait(CONNECT_TIMEOUT);
    job.expect_nothing();
    // Ranks 1 and 3 wait for 2 themselves, to share memory.
    job.answer(1, 0, false);
    job.answer(3, 0, false);
    job.wait(ANSWER_TIMEOUT);
    job.expect(VerdictKind::Unresponsive, &[2]);
}

#[test]
fn who_goes_on_at_the_last_moment_is_not_asked_in_the_next_exchange() {
    let mut job = Job::new();
    (0..3).for_each(|rank| job.say(rank, blob(0)));
    job.wait(CONNECT_TIMEOUT);
    job.say(3, blob(0));
    job.say(0, blob(1));
    job.wait(ANSWER_TIMEOUT);
    job.expect_nothing();
    (1..4).for_each(|rank| job.say(rank, blob(1)));
    job.wait(CONNECT_TIMEOUT);
    job.expect_nothing();
}

#[test]
fn a_rank_whose_time_is_up_ends_the_wait_of_all_by_naming_who_is_missing() {
    let mut job = Job::empty();
    for rank in [1, 2] {
        job.coordinator.connected(rank);
        job.say(rank, Message::Joined);
        job.say(rank, blob(0));
    }
    job.say(0, blob(0));
    job.outputs();
    job.wait(CONNECT_TIMEOUT / 10);
    // Of an exchange that is over nobody is missing.
    job.say(1, Message::Missing { round: 7, millis: 3000 });
    job.expect_nothing();
    job.say(1, Message::Missing { round: 0, millis: 3000 });
    assert_eq!(job.coordinator.verdict.as_ref().unwrap().text, "rank 3 did not join within 3 s");
    job.expect(VerdictKind::Absent, &[3]);
}

#[test]
fn what_is_known_of_a_rank_that_does_not_join_is_told() {
    let mut job = Job::empty();
    job.say(0, blob(0));
    let from = "10.0.0.2:5".parse().unwrap();
    (0..14).for_each(|_| job.coordinator.refused(1, from, "wrong token", false));
    // Its address may be anybody's, and its number somebody's who is there.
    job.coordinator.refused(0, from, "wrong token", false);
    job.coordinator.refused(99, from, "wrong token", false);
    // Unless it has proven to be of the job.
    job.coordinator.refused(99, from, "world of 100", true);
    job.coordinator.connected(2);
    job.coordinator.lost(2, "its connection ended");
    job.outputs();
    job.wait(CONNECT_TIMEOUT);
    let text = job.coordinator.verdict.as_ref().unwrap().text.clone();
    let expected = "ranks 1, 2 and 3 did not join within 30 s\n  rank 1: 10.0.0.2 said it was this \
                    rank and was refused: wrong token (14 times)\n  rank 2: connected, but did not \
                    join: its connection ended\n  10.0.0.2 said it was rank 99 and was refused: \
                    world of 100";
    assert_eq!(text, expected);
    job.expect(VerdictKind::Absent, &[1, 2, 3]);
}

#[test]
fn who_is_waited_for_is_said_after_a_while_and_ever_more_seldom() {
    let mut job = Job::empty();
    job.say(0, blob(0));
    let start = job.now;
    let mut due = Vec::new();
    while job.coordinator.verdict.is_none() {
        job.now = job.coordinator.deadline().unwrap();
        due.push((job.now - start).as_secs());
        job.coordinator.tick(job.now);
    }
    assert_eq!(due, [10, 20, 30]);
}

#[test]
fn a_rank_that_can_not_join_is_named_at_once() {
    let mut job = Job::new();
    job.say(0, blob(0));
    job.accuse(2, 2, Finding::CannotJoin);
    let text = job.coordinator.verdict.as_ref().unwrap().text.clone();
    assert!(text.starts_with("rank 2 can't join: "), "{text}");
    job.expect(VerdictKind::Failed, &[2]);
}
