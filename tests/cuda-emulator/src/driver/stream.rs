//! Streams: operations that run one after another, each stream on a thread of its own.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::codes::{Code, Done};
use super::device::{self, Device};
use super::memory::Running;
use super::registry::lock;
use super::{driver, is_exiting};
use crate::backoff::Backoff;

/// Why an operation failed.
pub(crate) struct Failure {
    pub code: Code,
    pub reason: String,
}

type Work = Box<dyn FnOnce(&'static Device, Chance) -> Result<(), Failure> + Send>;

/// An operation, and how far other streams have to be before it begins.
struct Operation {
    after: Vec<(Arc<Stream>, u64)>,
    work: Work,
}

#[derive(Default)]
struct Queue {
    operations: VecDeque<Operation>,
    submitted: u64,
    completed: u64,
    is_closed: bool,
}

/// Whether a stream records its operations instead of executing them. No graph is made: what is
/// shown is whether a library notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capture {
    None,
    Active,
    Invalidated,
}

/// A stream.
pub(crate) struct Stream {
    pub device: &'static Device,
    pub flags: u32,
    pub priority: i32,
    pub number: u64,
    queue: Mutex<Queue>,
    changed: Condvar,
    capture: AtomicU32,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stream {} of device {}", self.number, self.device.ordinal)
    }
}

/// `CU_STREAM_NON_BLOCKING`: does not wait for the legacy default stream, nor it for the stream.
const NON_BLOCKING: u32 = 1;

/// Handles that stand for default streams.
const LEGACY: u64 = 1;
const PER_THREAD: u64 = 2;

thread_local! {
    static OF_THREAD: RefCell<HashMap<usize, Arc<Stream>>> = RefCell::new(HashMap::new());
}

/// The stream that a handle stands for, on a device that has not failed.
pub(crate) fn find(handle: u64) -> Done<Arc<Stream>> {
    let stream = find_or_failed(handle)?;
    stream.device.check()?;
    Ok(stream)
}

/// The stream that a handle stands for.
pub(crate) fn find_or_failed(handle: u64) -> Done<Arc<Stream>> {
    match handle {
        0 | LEGACY => Ok(device::current_or_failed()?.null_stream()),
        PER_THREAD => {
            let device = device::current_or_failed()?;
            Ok(OF_THREAD.with_borrow_mut(|streams| {
                let start = || Stream::start(device, 0, 0, 2);
                streams.entry(device.ordinal).or_insert_with(start).clone()
            }))
        }
        handle => driver()?.streams.find(handle),
    }
}

impl Stream {
    /// A stream and its thread, which ends when the stream is closed.
    pub(crate) fn start(
        device: &'static Device,
        flags: u32,
        priority: i32,
        number: u64,
    ) -> Arc<Self> {
        let stream = Arc::new(Self {
            device,
            flags,
            priority,
            number,
            queue: Mutex::default(),
            changed: Condvar::new(),
            // No capture: 0.
            capture: AtomicU32::new(0),
        });
        let worker = Arc::clone(&stream);
        let name = format!("stream {number}");
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.execute());
        assert!(thread.is_ok(), "a thread for the stream");
        stream
    }

    pub(crate) fn close(&self) {
        lock(&self.queue).is_closed = true;
        self.changed.notify_all();
    }

    /// Enqueues an operation. A host that captures learns that this can't be recorded.
    pub(crate) fn push(
        self: &Arc<Self>,
        work: impl FnOnce(&'static Device) -> Result<(), Failure> + Send + 'static,
    ) -> Done {
        self.push_by_chance(move |device, _| work(device))
    }

    /// Enqueues an operation that may go one way or another.
    pub(crate) fn push_by_chance(
        self: &Arc<Self>,
        work: impl FnOnce(&'static Device, Chance) -> Result<(), Failure> + Send + 'static,
    ) -> Done {
        if self.capture() != Capture::None {
            self.set_capture(Capture::Invalidated);
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        let after = self.predecessors()?;
        let mut queue = lock(&self.queue);
        queue.submitted += 1;
        queue.operations.push_back(Operation { after, work: Box::new(work) });
        drop(queue);
        self.changed.notify_all();
        Ok(())
    }

    fn is_null(&self) -> bool {
        self.number == 0
    }

    /// What the rules of the legacy default stream make an operation wait for.
    fn predecessors(&self) -> Done<Vec<(Arc<Self>, u64)>> {
        if self.is_null() {
            let same = |stream: &Arc<Self>| {
                std::ptr::eq(stream.device, self.device) && stream.flags & NON_BLOCKING == 0
            };
            let streams = driver()?.streams.all().into_iter().filter(same);
            return Ok(streams.filter_map(|stream| stream.pending()).collect());
        }
        if self.flags & NON_BLOCKING != 0 {
            return Ok(Vec::new());
        }
        let null = self.device.existing_null_stream();
        Ok(null.and_then(|stream| stream.pending()).into_iter().collect())
    }

    /// The stream with the number of its last operation, unless it has completed all.
    fn pending(self: Arc<Self>) -> Option<(Arc<Self>, u64)> {
        let queue = lock(&self.queue);
        let submitted = (queue.completed < queue.submitted).then_some(queue.submitted);
        drop(queue);
        submitted.map(|submitted| (self, submitted))
    }

    pub(crate) fn is_idle(&self) -> bool {
        let queue = lock(&self.queue);
        queue.completed == queue.submitted
    }

    /// Waits until all that is enqueued now has completed.
    pub(crate) fn synchronize(&self) {
        let last = lock(&self.queue).submitted;
        self.wait_for(last);
    }

    fn wait_for(&self, number: u64) {
        let mut queue = lock(&self.queue);
        while queue.completed < number && !is_exiting() {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What the stream's thread does.
    fn execute(&self) {
        let seed = driver().map_or(0, |driver| driver.settings.seed);
        let delay = driver().map_or(0, |driver| driver.settings.delay_us);
        let identity = self.number << 8 | u64::from(self.device.physical);
        let mut random = Random(seed ^ identity.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        while let Some(operation) = self.next() {
            let chance = random.delay(delay);
            for (stream, number) in operation.after {
                stream.wait_for(number);
            }
            // After a failure, nothing of the context runs any more.
            if self.device.check().is_ok() && !is_exiting() {
                let running = Running::begin();
                let result = (operation.work)(self.device, chance);
                drop(running);
                if let Err(Failure { code, reason }) = result {
                    self.device.fail(code, &reason);
                }
            }
            lock(&self.queue).completed += 1;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Operation> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(operation) = queue.operations.pop_front() {
                return Some(operation);
            }
            if queue.is_closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn capture(&self) -> Capture {
        // Relaxed: whoever captures orders its own calls.
        match self.capture.load(Ordering::Relaxed) {
            0 => Capture::None,
            1 => Capture::Active,
            _ => Capture::Invalidated,
        }
    }

    pub(crate) fn set_capture(&self, capture: Capture) {
        // Relaxed: as above.
        self.capture.store(capture as u32, Ordering::Relaxed);
    }
}

/// Waits until `is_done`, the device fails or the process exits.
pub(crate) fn wait_until(device: &Device, mut is_done: impl FnMut() -> bool) {
    let mut backoff = Backoff::new();
    while !is_done() && device.check().is_ok() && !is_exiting() {
        backoff.wait();
    }
}

/// A random number for an operation; 0 if there are no delays, so that all goes in order.
pub(crate) type Chance = u64;

/// A random number generator (xorshift).
struct Random(u64);

impl Random {
    /// Sleeps for up to so many microseconds, every other time not at all.
    fn delay(&mut self, longest_us: u64) -> Chance {
        if longest_us == 0 {
            return 0;
        }
        self.0 |= 1;
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        if self.0 >> 40 & 1 == 1 {
            std::thread::sleep(Duration::from_micros((self.0 >> 8) % longest_us));
        }
        self.0
    }
}

/// The number of the next stream. 0, 1 and 2 are those of default streams.
pub(crate) fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(3);
    // Relaxed: only the uniqueness of the number matters.
    NEXT.fetch_add(1, Ordering::Relaxed)
}
