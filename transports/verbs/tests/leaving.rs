//! A rank that leaves in order: what it sent is there, and for the others nothing ends.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use std::thread;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::{Call, CollectiveKind, Landing, Link, LinkError, Rank, Region, Regions, Ticket};
use unisum_verbs::{VerbsConfig, VerbsLink};

const LIMIT: Duration = Duration::from_secs(30);
/// More than the devices take to give a packet up that nobody acknowledges: 7 times 67 ms.
const LONG: Duration = Duration::from_secs(2);
/// Less than is waited for those who have not said goodbye.
const NONE: Duration = Duration::from_millis(900);
/// More small messages than half of what may be under way: the receiver gives credit for them.
const MESSAGES: usize = 30;

/// The region of some bytes that outlive all transfers of a test.
fn region(bytes: &mut [u8]) -> Region {
    // SAFETY: the tests keep the memory, and touch it only between transfers.
    unsafe { Region::new(std::ptr::NonNull::from(&mut *bytes).cast(), bytes.len(), None) }
}

fn begin(link: &mut VerbsLink) {
    let call = Call { collective: CollectiveKind::Message, ..Call::all_reduce(0, Dtype::U8, 0) };
    link.begin(&call, &Regions::in_place(region(&mut [])));
}

/// Waits for so many tickets.
fn wait(link: &mut VerbsLink, tickets: usize) -> Result<(), LinkError> {
    let (mut done, until) = (Vec::new(), Instant::now() + LIMIT);
    while done.len() < tickets {
        link.progress(&mut done)?;
        assert!(Instant::now() < until, "{} of {tickets} are done", done.len());
        if done.len() < tickets {
            link.park(Instant::now() + Duration::from_millis(50), 1)?;
        }
    }
    Ok(())
}

fn receive(link: &mut VerbsLink, from: Rank, bytes: &mut [u8]) -> Result<(), LinkError> {
    link.receive(from, region(bytes), Landing::Place, Ticket(0))?;
    wait(link, 1)
}

fn send(link: &mut VerbsLink, to: Rank, bytes: &mut [u8]) -> Result<(), LinkError> {
    link.send(to, region(bytes), Ticket(0))?;
    wait(link, 1)
}

/// Others may have the processors once or twice.
#[test]
fn a_rank_that_has_left_is_missed_only_by_those_who_want_something_of_it() {
    let waits: Vec<_> = (0..5).map_while(|_| leave_rank_0()).take_while(|it| *it >= NONE).collect();
    assert!(waits.len() < 5, "rank 0 waited for somebody: {waits:?}");
}

/// Rank 1 sends and leaves, rank 2 goes on with rank 0. How long that takes to leave in the end;
/// nothing without devices.
fn leave_rank_0() -> Option<Duration> {
    let config = VerbsConfig { retries: 6, ..common::config() };
    let mut links = common::links(3, &config).into_iter();
    let (Some(mut first), Some(mut leaver), Some(mut other)) =
        (links.next(), links.next(), links.next())
    else {
        return None;
    };
    [&mut first, &mut leaver, &mut other].into_iter().for_each(begin);
    for number in 0..MESSAGES {
        send(&mut leaver, 0, &mut [number as u8; 100]).unwrap();
    }
    drop(leaver);
    let start = Instant::now();
    for number in 0..MESSAGES {
        let mut bytes = [0; 100];
        receive(&mut first, 1, &mut bytes).unwrap();
        assert_eq!(bytes, [number as u8; 100]);
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            // Until rank 0 says that it is enough.
            let mut more = [1];
            while more == [1] {
                send(&mut other, 0, &mut [7; 10_000]).unwrap();
                receive(&mut other, 0, &mut more).unwrap();
            }
        });
        let mut more = [1];
        while more == [1] {
            let mut bytes = [0; 10_000];
            receive(&mut first, 2, &mut bytes).unwrap();
            assert_eq!(bytes, [7; 10_000]);
            more = [u8::from(start.elapsed() < LONG)];
            send(&mut first, 2, &mut more.clone()).unwrap();
        }
    });
    assert_eq!(send(&mut first, 1, &mut [0]), Err(LinkError::closed(1)));
    let mut byte = [0];
    assert_eq!(receive(&mut first, 1, &mut byte), Err(LinkError::closed(1)));
    assert!(first.retract(1, Ticket(0)) && first.progress(&mut Vec::new()).is_ok());
    // Rank 2 has said goodbye too, when its link was dropped: rank 0 waits for nobody.
    drop(other);
    let start = Instant::now();
    drop(first);
    Some(start.elapsed())
}
