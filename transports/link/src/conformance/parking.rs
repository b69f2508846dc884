//! Waiting: parks end when they should and cost nothing meanwhile.

use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

use super::Mesh;
use super::port::{Kind, PATIENCE, Port, call, run_on};
use crate::Landing;

/// How long the suite's idle waits last.
pub(super) const IDLE: Duration = Duration::from_millis(300);
const MOST_CPU: Duration = Duration::from_millis(20);
/// How late a park may end.
const LATE: Duration = Duration::from_millis(500);
/// Others may have the processors during some of so many waits.
const WAITS: usize = 20;

/// CPU time of this thread so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("CPU time is not negative")
}

/// Runs `park` (with the time it may last) until `IDLE` is over; checks that it isn't left
/// much later and burns no CPU, and waits again while it is and does.
pub(super) fn idle(mut park: impl FnMut(Instant)) {
    let wait = |_| {
        let (start, cpu) = (Instant::now(), cpu_time());
        let until = start + IDLE;
        while Instant::now() < until {
            park(until);
        }
        (until.elapsed(), cpu_time() - cpu)
    };
    let is_bad = |(late, burnt): &(Duration, Duration)| *late >= LATE || *burnt >= MOST_CPU;
    // Collected up to the first good one.
    let bad: Vec<_> = (0..WAITS).map(wait).take_while(is_bad).collect();
    assert!(bad.len() < WAITS, "after the deadline, and CPU time for {IDLE:?}: {bad:?}");
}

/// A park with nothing to do lasts until its deadline and burns no CPU.
pub fn parks_end_by_deadline(mesh: &Mesh) {
    run_on(mesh, 2, 4096, Kind::Private, &|port: &mut Port<'_>| {
        port.begin(call(0, 100));
        let received = port.receive(1 - port.rank, 0..100, Landing::Place);
        port.look().expect("nothing fails");
        idle(|until| {
            port.link.park(until, 1).expect("parking works");
            port.look().expect("nothing fails");
        });
        port.meet();
        let sent = port.send(1 - port.rank, 200..300);
        port.wait(&[received, sent]);
    });
}

/// A wake ends a park from another thread, and one that came before the park ends it at once.
pub fn parks_end_by_wake(mesh: &Mesh) {
    run_on(mesh, 2, 4096, Kind::Private, &|port: &mut Port<'_>| {
        port.begin(call(0, 100));
        let start = Instant::now();
        let waker = port.link.waker();
        waker.wake();
        port.link.park(start + PATIENCE, 1).expect("parking works");
        thread::scope(|scope| {
            let parked = Instant::now();
            scope.spawn(|| {
                // Only makes it likely that the park has begun; right either way.
                thread::sleep(Duration::from_millis(20));
                waker.wake();
            });
            while parked.elapsed() < Duration::from_millis(20) {
                port.link.park(start + PATIENCE, 5).expect("parking works");
            }
        });
        assert!(start.elapsed() < PATIENCE / 2, "a wake was lost");
    });
}

/// Data ends a park; and the last of several events does, if several are wanted.
pub fn parks_end_by_data(mesh: &Mesh) {
    run_on(mesh, 3, 1 << 20, Kind::Private, &|port: &mut Port<'_>| {
        for (number, bytes) in [8, 100, 5000, 200_000].into_iter().enumerate() {
            port.begin(call(number as u64, bytes));
            port.meet();
            if port.rank == 0 {
                let one = port.receive(1, 0..bytes, Landing::Slot);
                let two = port.receive(2, bytes..2 * bytes, Landing::Place);
                port.look().expect("nothing fails");
                let start = Instant::now();
                while !(port.is_done(one) && port.is_done(two)) {
                    let wanted = 2 - usize::from(port.is_done(one) || port.is_done(two));
                    port.link.park(start + PATIENCE, wanted).expect("parking works");
                    port.look().expect("nothing fails");
                }
                assert!(start.elapsed() < PATIENCE / 2, "the arrival did not end the park");
                port.link.release(one).expect("the peer is there");
            } else {
                let sent = port.send(0, 0..bytes);
                port.wait(&[sent]);
            }
        }
    });
}

/// An armed link's descriptor becomes readable by data and by a wake, and is quiet otherwise.
pub fn armed_links_signal_their_descriptor(mesh: &Mesh) {
    run_on(mesh, 2, 4096, Kind::Private, &|port: &mut Port<'_>| {
        port.begin(call(0, 100));
        port.meet();
        if port.rank == 1 {
            port.meet();
            let sent = port.send(0, 0..100);
            port.wait(&[sent]);
            return;
        }
        let received = port.receive(1, 0..100, Landing::Place);
        port.look().expect("nothing fails");
        settle(port);
        assert!(!readable(port, Duration::from_millis(50)), "nothing happened yet");
        port.link.waker().wake();
        assert!(readable(port, PATIENCE), "a wake signals an armed link");
        port.link.disarm();
        settle(port);
        port.meet();
        let start = Instant::now();
        while !port.is_done(received) {
            if port.link.arm() {
                assert!(readable(port, PATIENCE), "data signals an armed link");
                port.link.disarm();
            }
            port.look().expect("nothing fails");
            assert!(start.elapsed() < PATIENCE, "the message never arrived");
        }
    });
}

/// Looks until there is nothing left to see, and leaves the link armed.
fn settle(port: &mut Port<'_>) {
    let until = Instant::now() + PATIENCE;
    while !port.link.arm() {
        port.look().expect("nothing fails");
        assert!(Instant::now() < until, "the link never comes to rest");
    }
    if readable(port, Duration::ZERO) {
        port.link.disarm();
        settle(port);
    }
}

fn readable(port: &Port<'_>, within: Duration) -> bool {
    let descriptor = port.link.wake_fd();
    let mut fds = [PollFd::new(&descriptor, PollFlags::IN)];
    let within = Timespec::try_from(within).expect("a short time");
    poll(&mut fds, Some(&within)).expect("polling works") > 0
}
