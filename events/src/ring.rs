//! The ring of one thread: it writes, observers read, nobody waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Events that a ring holds.
pub(crate) const CAPACITY: u64 = 1024;

/// An event with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) ticks: u64,
    pub(crate) words: [u64; 3],
}

/// Only the thread that it belongs to writes to it.
#[derive(Debug)]
pub(crate) struct Ring {
    thread: u64,
    /// Entries so far; the next goes to this place, modulo the capacity.
    written: AtomicU64,
    entries: Box<[[AtomicU64; 4]]>,
    is_over: AtomicBool,
}

static THREADS: AtomicU64 = AtomicU64::new(0);

impl Ring {
    pub(crate) fn new() -> Self {
        let entries = (0..CAPACITY).map(|_| Default::default()).collect();
        // Relaxed: only that numbers differ counts.
        let thread = THREADS.fetch_add(1, Ordering::Relaxed);
        Self { thread, written: AtomicU64::new(0), entries, is_over: AtomicBool::new(false) }
    }

    pub(crate) const fn thread(&self) -> u64 {
        self.thread
    }

    /// Appends an entry. For the owner.
    #[inline]
    pub(crate) fn push(&self, ticks: u64, words: [u64; 3]) {
        // Relaxed: only this thread writes it.
        let written = self.written.load(Ordering::Relaxed);
        // Pairs with the Acquire fence in `read`: who sees one of the stores below sees that
        // `written` has come to this place.
        fence(Ordering::Release);
        let place = &self.entries[(written % CAPACITY) as usize];
        let [first, second, third] = words;
        for (word, value) in place.iter().zip([ticks, first, second, third]) {
            // Relaxed: ordered by the fence above and the store below.
            word.store(value, Ordering::Relaxed);
        }
        // Release: pairs with the Acquire load in `read`, which then sees the entry.
        self.written.store(written + 1, Ordering::Release);
    }

    /// Entries so far.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed) // where to begin; `read` looks again
    }

    /// The entries from the `next` on, which moves past them; and how many were overwritten.
    pub(crate) fn read(&self, next: &mut u64) -> (Vec<Entry>, u64) {
        // Acquire: pairs with the Release store in `push`.
        let written = self.written.load(Ordering::Acquire);
        let first = written.saturating_sub(CAPACITY).max(*next);
        let mut entries: Vec<(u64, Entry)> = (first..written)
            .map(|at| {
                let place = &self.entries[(at % CAPACITY) as usize];
                // Relaxed: what was overwritten meanwhile is found out below.
                let [ticks, one, two, three] =
                    std::array::from_fn(|word| place[word].load(Ordering::Relaxed));
                (at, Entry { ticks, words: [one, two, three] })
            })
            .collect();
        // Pairs with the Release fence in `push`: if a place was written while it was read, the
        // load below sees that it had come to that.
        fence(Ordering::Acquire);
        let now = self.written.load(Ordering::Relaxed);
        // The place of the entry after the newest may be half-written.
        entries.retain(|&(at, _)| at + CAPACITY > now);
        let lost = written - *next - entries.len() as u64;
        *next = written;
        (entries.into_iter().map(|(_, entry)| entry).collect(), lost)
    }

    /// Nothing will be written any more.
    pub(crate) fn end(&self) {
        // Release: pairs with the Acquire load in `is_over`, after which all entries are seen.
        self.is_over.store(true, Ordering::Release);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire) // pairs with the store in `end`
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_was_written_or_counted_as_lost() {
        let ring = Ring::new();
        let (mut next, mut seen, mut lost) = (0, 0, 0);
        const COUNT: u64 = 300_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for at in 0..COUNT {
                    ring.push(at, [at + 1, at + 2, at + 3]);
                }
                ring.end();
            });
            let mut last = None;
            loop {
                let is_over = ring.is_over();
                let (entries, missed) = ring.read(&mut next);
                lost += missed;
                for Entry { ticks, words } in entries {
                    assert_eq!(words, [ticks + 1, ticks + 2, ticks + 3], "torn");
                    assert!(last.is_none_or(|last| last < ticks), "out of order");
                    last = Some(ticks);
                    seen += 1;
                }
                if is_over {
                    break;
                }
            }
            assert_eq!(last, Some(COUNT - 1));
        });
        assert_eq!(seen + lost, COUNT);
    }

    #[test]
    fn a_full_ring_keeps_the_newest() {
        let ring = Ring::new();
        let mut next = 0;
        (0..CAPACITY + 10).for_each(|at| ring.push(at, [at; 3]));
        let (entries, lost) = ring.read(&mut next);
        // One place less, as it might be half-written.
        assert_eq!((entries.len() as u64, lost), (CAPACITY - 1, 11));
        assert_eq!(entries.last().map(|entry| entry.ticks), Some(CAPACITY + 9));
        assert_eq!(ring.read(&mut next), (Vec::new(), 0));
    }
}
