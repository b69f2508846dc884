//! The event stream: what the threads of this rank are doing, for whoever observes it.
//!
//! Everything may use this crate; it depends on nothing. Start at [`record`], which the runner and
//! the engine call, and [`Observer`], which reads what was recorded.
//!
//! Each thread writes to a ring of its own, so that recording takes no lock and no thread waits for
//! another. While there is no observer, recording is one load and a branch that is not taken. An
//! observer that reads too seldom loses the oldest events and is told how many.

mod clock;
mod event;
mod ring;

use std::cell::OnceCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use event::Event;
use ring::{Entry, Ring};

/// How many observers there are.
static OBSERVERS: AtomicUsize = AtomicUsize::new(0);

/// Rings of ended threads that are kept for observers that have not read them yet.
const ENDED_MAX: usize = 64;

/// The rings of all threads that have recorded anything, and of the last that ended.
static RINGS: Mutex<Vec<Arc<Ring>>> = Mutex::new(Vec::new());

thread_local! {
    static RING: OnceCell<Own> = const { OnceCell::new() };
}

/// A thread's ring.
struct Own(Arc<Ring>);

impl Own {
    fn new() -> Self {
        let ring = Arc::new(Ring::new());
        let mut rings = rings();
        // Threads come and go.
        let ended = rings.iter().filter(|ring| ring.is_over()).count();
        let mut spare = ended.saturating_sub(ENDED_MAX);
        rings.retain(|ring| {
            let goes = spare > 0 && ring.is_over();
            spare -= usize::from(goes);
            !goes
        });
        rings.push(ring.clone());
        Self(ring)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn rings() -> MutexGuard<'static, Vec<Arc<Ring>>> {
    // A panic elsewhere leaves the list whole.
    RINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records an event of this thread, if anybody observes. Never blocks but for a thread's first
/// event, which allocates its ring (40 KiB).
#[inline]
pub fn record(event: impl FnOnce() -> Event) {
    // Relaxed: an event more or less when an observer comes or goes is nobody's business.
    if OBSERVERS.load(Ordering::Relaxed) > 0 {
        record_now(event());
    }
}

#[inline(never)]
fn record_now(event: Event) {
    // A thread that is ending has no ring any more: what it does then is not told.
    let _ = RING.try_with(|ring| ring.get_or_init(Own::new).0.push(clock::now(), event.words()));
}

/// Reads the events of this process from when it was made until it is dropped. There may be
/// several; each sees everything.
#[derive(Debug)]
pub struct Observer {
    start: (Instant, u64),
    /// What was read of which ring.
    read: Vec<(Arc<Ring>, u64)>,
}

/// An event, with the thread that recorded it and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The thread, by a number that is its own in this process.
    pub thread: u64,
    /// When it was recorded, to a microsecond or so.
    pub at: Instant,
    /// What it did.
    pub event: Event,
}

/// What an observer read.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The events, in the order of time; those of one thread in the order in which it did them.
    pub events: Vec<Recorded>,
    /// How many events were overwritten before they could be read.
    pub lost: u64,
}

impl Observer {
    /// Begins to observe.
    pub fn new() -> Self {
        let read = rings().iter().map(|ring| (ring.clone(), ring.written())).collect();
        // Relaxed: as in `record`.
        OBSERVERS.fetch_add(1, Ordering::Relaxed);
        Self { start: (Instant::now(), clock::now()), read }
    }

    /// What was recorded since the last time. Never makes a recording thread wait.
    pub fn read(&mut self) -> Batch {
        let all = rings().clone();
        for ring in &all {
            if !self.read.iter().any(|(known, _)| Arc::ptr_eq(known, ring)) {
                self.read.push((ring.clone(), 0));
            }
        }
        let rate = clock::Rate::since(self.start);
        let mut batch = Batch::default();
        for (ring, next) in &mut self.read {
            let (entries, lost) = ring.read(next);
            batch.lost += lost;
            batch.events.extend(entries.into_iter().filter_map(|Entry { ticks, words }| {
                let event = Event::from_words(words)?;
                Some(Recorded { thread: ring.thread(), at: rate.instant(ticks), event })
            }));
        }
        // What a thread that has ended did is read now; while its ring is listed it stays known.
        self.read.retain(|(ring, _)| {
            !ring.is_over() || all.iter().any(|other| Arc::ptr_eq(other, ring))
        });
        batch.events.sort_by_key(|recorded| recorded.at);
        batch
    }
}

impl Default for Observer {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        // Relaxed: as in `record`.
        if OBSERVERS.fetch_sub(1, Ordering::Relaxed) == 1 {
            rings().retain(|ring| !ring.is_over());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What threads do while there is an observer is read once, by thread in its order; also what a
    /// thread did that has ended.
    #[test]
    fn observers_read_what_threads_do() {
        record(|| unreachable!("nobody observes"));
        let mut observer = Observer::new();
        let mut other = Observer::new();
        let work = |from: u32| {
            move || (from..from + 100).for_each(|action| record(|| Event::StepBegun { action }))
        };
        std::thread::spawn(work(0)).join().expect("it only records");
        work(100)();
        let first = observer.read();
        assert_eq!((first.events.len(), first.lost), (200, 0));
        work(200)();
        std::thread::spawn(work(300)).join().expect("it only records");
        let second = observer.read();
        assert_eq!((second.events.len(), second.lost), (200, 0));
        assert_eq!(observer.read().events, []);
        let all = other.read();
        let threads: std::collections::BTreeSet<u64> =
            all.events.iter().map(|recorded| recorded.thread).collect();
        assert_eq!((all.events.len(), threads.len()), (400, 3));
        for thread in threads {
            let actions: Vec<Event> =
                all.events.iter().filter(|it| it.thread == thread).map(|it| it.event).collect();
            assert!(actions.is_sorted_by_key(|event| match event {
                Event::StepBegun { action } => *action,
                _ => unreachable!("nothing else was recorded"),
            }));
        }
        assert!(all.events.is_sorted_by_key(|recorded| recorded.at));
        drop((observer, other));
        record(|| unreachable!("nobody observes any more"));
    }
}
