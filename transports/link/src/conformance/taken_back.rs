//! Memory that a rank takes back by an abort while others may still read or write it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Mesh;
use super::memory::{copy, pattern};
use super::port::{Kind, PATIENCE, Port, call, run, run_on};
use crate::{Landing, LinkError, Part, Regions, Ticket};

/// Where inputs and outputs lie: apart, so that what is done about the pages of an output on an
/// abort does nothing for an input.
const OUTPUT: usize = 256 << 10;
const MEMORY: usize = 2 * OUTPUT;
/// What nobody sends.
static OTHER: [u8; MEMORY] = [0xee; MEMORY];

fn begin(port: &mut Port<'_>, bytes: usize) {
    let region = port.memory.region();
    let (input, output) = (region.part(&(0..bytes)), region.part(&(OUTPUT..OUTPUT + bytes)));
    port.link.begin(&call(0, bytes), &Regions { input, output });
}

/// Aborts, and does with the memory what its owner may do then.
fn take_back(port: &mut Port<'_>) {
    port.link.abort();
    port.memory.write(0, &OTHER);
}

fn check_unchanged(port: &Port<'_>) {
    assert!(port.memory.read(0, MEMORY) == OTHER, "memory changed after an abort");
}

/// When the sender takes its memory back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Before the receiver looks.
    Sent,
    /// When the message lies in its slot.
    Landed,
    /// Then, and the receiver sleeps before it reads.
    Parked,
}

/// A sender that aborts writes something else to its memory at once: the receiver gets an error, or
/// what was sent, whenever that happens.
pub fn nothing_taken_back_is_received(mesh: &Mesh) {
    let ways = [
        (Landing::Place, Moment::Sent),
        (Landing::Slot, Moment::Sent),
        (Landing::Slot, Moment::Landed),
        (Landing::Slot, Moment::Parked),
    ];
    for bytes in [100, 100_000] {
        for (landing, moment) in ways {
            let has_landed = AtomicBool::new(false);
            run(mesh, 2, MEMORY, |port| {
                begin(port, bytes);
                if port.rank == 0 {
                    send_and_take_back(port, bytes, moment, &has_landed);
                } else {
                    let taken = take(port, bytes, landing, moment, &has_landed);
                    let is_right = |taken: Vec<u8>| taken == pattern(7, bytes);
                    let way = format!("{bytes} bytes, {landing:?}, {moment:?}");
                    assert!(taken.is_none_or(is_right), "{way}: something else was received");
                }
                port.link.abort();
            });
        }
    }
}

fn send_and_take_back(port: &mut Port<'_>, bytes: usize, moment: Moment, has_landed: &AtomicBool) {
    port.memory.write(0, &pattern(7, bytes));
    port.send(1, 0..bytes);
    port.look().expect("nothing fails");
    if moment != Moment::Sent {
        let until = Instant::now() + PATIENCE;
        while !has_landed.load(Ordering::SeqCst) {
            port.look().expect("nothing fails");
            assert!(Instant::now() < until, "the message did not land");
            std::thread::yield_now();
        }
    }
    take_back(port);
    port.meet();
    port.meet();
    check_unchanged(port);
}

/// What was received; nothing if the link says that it does not count.
fn take(
    port: &mut Port<'_>,
    bytes: usize,
    landing: Landing,
    moment: Moment,
    has_landed: &AtomicBool,
) -> Option<Vec<u8>> {
    if moment == Moment::Sent {
        port.meet();
    }
    let received = port.receive(0, OUTPUT..OUTPUT + bytes, landing);
    let landed = wait(port, received, moment);
    has_landed.store(true, Ordering::SeqCst);
    if moment != Moment::Sent {
        port.meet();
    }
    port.meet();
    has_landed.store(false, Ordering::SeqCst);
    landed.ok().filter(|landed| *landed)?;
    if moment == Moment::Parked {
        port.link.park(Instant::now() + Duration::from_millis(1), 1).ok()?;
        port.look().ok()?;
    }
    match landing {
        Landing::Place => Some(port.memory.read(OUTPUT, bytes)),
        Landing::Slot => {
            let taken = copy(port.link.arrived(received), bytes);
            port.link.release(received).ok().map(|()| taken)
        }
    }
}

/// Waits for the receive, where the sender is there for as long as it takes; whether it is done.
fn wait(port: &mut Port<'_>, received: Ticket, moment: Moment) -> Result<bool, LinkError> {
    let limit = if moment == Moment::Sent { Duration::from_millis(100) } else { PATIENCE };
    let until = Instant::now() + limit;
    while !port.is_done(received) && Instant::now() < until {
        port.look()?;
        std::thread::yield_now();
    }
    Ok(port.is_done(received))
}

/// A member that aborts writes something else to its regions at once: the others, who have all
/// entered, find what it put in or an error, and what they write is not seen in its memory.
pub fn nothing_taken_back_is_an_input(mesh: &Mesh) {
    const BYTES: usize = 100_000;
    for world in [2, 4] {
        run_on(mesh, world, MEMORY, Kind::Registered, &|port: &mut Port<'_>| {
            if port.link.group().is_none() {
                return;
            }
            begin(port, BYTES);
            port.memory.write(0, &pattern(port.rank as u64, BYTES));
            let entered = port.group().enter(false);
            port.complete(entered).expect("all enter");
            assert_eq!(port.group().confirm(), Ok(()), "nobody has aborted");
            port.meet();
            if port.rank == 0 {
                take_back(port);
                port.meet();
                port.meet();
                return check_unchanged(port);
            }
            port.meet();
            let source = port.group().source(0, Part::Input, 0..BYTES);
            let source = source.expect("it is where it says").expect("registered");
            let (read, confirmed) = (copy(source, BYTES), port.group().confirm());
            match confirmed {
                Ok(()) => assert!(read == pattern(0, BYTES), "something else was read"),
                Err(error) => assert_eq!(error, LinkError::closed(0)),
            }
            let target = port.group().target(0, 0..BYTES).expect("its output is registered");
            // SAFETY: the group gave the address of that many writable bytes.
            unsafe { target.write_bytes(0xdd, BYTES) };
            port.meet();
            port.link.abort();
        });
    }
}
