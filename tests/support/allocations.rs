//! An allocator that counts, for tests which claim that something allocates nothing.
//!
//! A test binary makes it its own with `#[global_allocator]`. It counts on all threads of the
//! process, and remembers where the first allocations came from.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The system's allocator, watched.
pub(crate) struct Counting;

/// What was allocated while [`watch`] ran.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) count: usize,
    /// Where the first ones came from, each place once.
    pub(crate) origins: Vec<String>,
}

static WATCHING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static ORIGINS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// Capturing a backtrace allocates: that is not to be counted, nor to begin another capture.
    static CAPTURING: Cell<bool> = const { Cell::new(false) };
}

/// How many allocations are looked at for their origin.
const TRACED: usize = 50;

/// Counts what any thread of the process allocates while `work` runs.
pub(crate) fn watch(work: impl FnOnce()) -> Seen {
    // Relaxed, here and below: the threads that matter are ordered by what they do for each other,
    // and a count has no other memory to publish.
    COUNT.store(0, Ordering::Relaxed);
    WATCHING.store(true, Ordering::Relaxed);
    work();
    WATCHING.store(false, Ordering::Relaxed);
    Seen {
        count: COUNT.load(Ordering::Relaxed),
        origins: std::mem::take(&mut *ORIGINS.lock().unwrap()),
    }
}

fn count() {
    // A thread that is ending has no thread-local values any more; nor will it reduce anything.
    let capturing = CAPTURING.try_with(Cell::get).unwrap_or(true);
    if !WATCHING.load(Ordering::Relaxed) || capturing {
        return;
    }
    if COUNT.fetch_add(1, Ordering::Relaxed) < TRACED {
        CAPTURING.set(true);
        let name = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let origin = format!("thread {name}:\n{}", Backtrace::force_capture());
        let mut origins = ORIGINS.lock().unwrap();
        if !origins.contains(&origin) {
            origins.push(origin);
        }
        drop(origins);
        CAPTURING.set(false);
    }
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the same contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the same contract.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the same contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}
