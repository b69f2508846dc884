//! What keeps the others from finding rank 0.

use super::*;

const SECOND: &str = "rank 0 is taken: process 7 has joined with it, and process 8 would";

/// Each would wait for ranks that the other one has.
#[test]
fn a_second_rank_0_ends_a_start_at_once_and_nothing_later() {
    let from = "10.0.0.2:5".parse().unwrap();
    let mut job = Job::empty();
    // Who has not proven to be of the job ends nothing, and who is refused for another reason.
    job.coordinator.refused(0, from, SECOND, false);
    job.coordinator.refused(0, from, "world of 100", true);
    job.expect_nothing();
    job.coordinator.refused(0, from, SECOND, true);
    let text = job.coordinator.verdict.as_ref().unwrap().text.clone();
    assert!(text.starts_with(SECOND) && text.contains("is UNISUM_RANK the same"), "{text}");
    job.expect(VerdictKind::Failed, &[0]);
    let mut job = Job::new();
    job.coordinator.refused(0, from, SECOND, true);
    job.expect_nothing();
}

#[test]
fn an_address_of_another_host_is_told_to_who_waits_for_ranks_that_have_not_come() {
    let doubt = "10.0.0.9 is none of the addresses of rank 0's host".to_owned();
    let mut job = Job::empty();
    job.coordinator = job.coordinator.doubting(Some(doubt.clone()));
    job.say(0, blob(0));
    job.wait(CONNECT_TIMEOUT);
    let text = job.coordinator.verdict.as_ref().unwrap().text.clone();
    assert_eq!(text, format!("ranks 1, 2 and 3 did not join within 30 s\n  {doubt}"));
    let mut job = Job::new();
    job.coordinator = job.coordinator.doubting(Some(doubt));
    job.say(0, blob(0));
    job.wait(CONNECT_TIMEOUT);
    job.wait(CONNECT_TIMEOUT);
    let text = job.coordinator.verdict.as_ref().unwrap().text.clone();
    assert!(!text.contains("10.0.0.9"), "all have found it: {text}");
}
