//! A completion queue and the descriptor that tells of news in it.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use unisum_link::fork::ParentOnly;

use crate::domain::{Domain, descriptor, make_nonblocking, report};
use crate::error::VerbsError;
use crate::ffi;

/// One device's completion queue.
#[derive(Debug)]
pub(crate) struct Completions {
    // First, so that the descriptor leaves the set of what children don't get before the library
    // closes it.
    pub(crate) wakes: ParentOnly<BorrowedFd<'static>>,
    queue: Queue,
}

/// The library's objects for a queue. Dropping it destroys them.
#[derive(Debug)]
struct Queue {
    cq: NonNull<ffi::Cq>,
    channel: NonNull<ffi::Channel>,
    domain: Arc<Domain>,
}

/// Which completions wake a sleeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Notice {
    /// Messages of peers, and errors.
    Messages,
    /// All completions.
    All,
}

// SAFETY: libibverbs is thread-safe; the owner lets one thread at a time use it anyway.
unsafe impl Send for Completions {}
// SAFETY: as above.
unsafe impl Sync for Completions {}

impl Completions {
    /// A queue for `entries` completions.
    ///
    /// # Errors
    /// If the device has none of that size.
    pub(crate) fn new(domain: &Arc<Domain>, entries: usize) -> Result<Arc<Self>, VerbsError> {
        let (library, device) = (domain.library(), &domain.port.device);
        let count = i32::try_from(entries).ok().filter(|&count| count <= domain.limits.max_cqe);
        let count = count.ok_or_else(|| {
            let most = domain.limits.max_cqe;
            VerbsError::Device(format!(
                "{device} has completion queues of {most} entries, and so many ranks need {entries}"
            ))
        })?;
        // SAFETY: the context is open.
        let channel = unsafe { (library.create_comp_channel)(domain.context()) };
        let channel = NonNull::new(channel)
            .ok_or_else(|| VerbsError::os(format!("making an event channel on {device}")))?;
        let (context, none) = (domain.context(), ptr::null_mut());
        // SAFETY: the context is open and the channel is its.
        let cq = unsafe { (library.create_cq)(context, count, none, channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let error = VerbsError::os(format!("making a completion queue on {device}"));
            // SAFETY: nothing uses the channel.
            unsafe { (library.destroy_comp_channel)(channel.as_ptr()) };
            return Err(error);
        };
        // SAFETY: the library made it, and its head is as declared.
        let fd = unsafe { channel.as_ref() }.fd;
        let queue = Queue { cq, channel, domain: domain.clone() };
        let completions = Self { wakes: ParentOnly::new(descriptor(fd)), queue };
        make_nonblocking(*completions.wakes)
            .map_err(|error| VerbsError::Os("preparing for completion events".into(), error))?;
        Ok(Arc::new(completions))
    }

    pub(crate) const fn cq(&self) -> *mut ffi::Cq {
        self.queue.cq.as_ptr()
    }

    /// The device it belongs to.
    pub(crate) const fn domain(&self) -> &Arc<Domain> {
        &self.queue.domain
    }

    /// Moves completions to `found` and says how many.
    ///
    /// # Errors
    /// The library's code, if the queue is broken.
    pub(crate) fn poll(&self, found: &mut [ffi::Completion]) -> Result<usize, i32> {
        let most = i32::try_from(found.len()).unwrap_or(i32::MAX);
        // SAFETY: the queue is alive, so its context is.
        let context = unsafe { self.queue.cq.as_ref().context };
        // SAFETY: the driver has put its functions there when it opened the device.
        let poll = unsafe { (*context).ops.poll_cq };
        let poll = poll.expect("every driver polls");
        // SAFETY: `found` has room for `most` completions.
        let count = unsafe { poll(self.cq(), most, found.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| count)
    }

    /// Has the descriptor become readable at the next completion.
    pub(crate) fn ask(&self, notice: Notice) -> Result<(), i32> {
        // SAFETY: the queue is alive, so its context is.
        let context = unsafe { self.queue.cq.as_ref().context };
        // SAFETY: the driver has put its functions there when it opened the device.
        let ask = unsafe { (*context).ops.req_notify_cq };
        let ask = ask.expect("every driver notifies");
        // SAFETY: the queue is alive.
        let failed = unsafe { ask(self.cq(), i32::from(notice == Notice::Messages)) };
        if failed == 0 { Ok(()) } else { Err(failed) }
    }

    /// Takes the events that made the descriptor readable. `true` if there were any.
    pub(crate) fn take_events(&self) -> bool {
        let mut events = 0;
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        let (library, channel) = (self.domain().library(), self.queue.channel.as_ptr());
        // SAFETY: the channel is alive, and its descriptor does not block.
        while unsafe { (library.get_cq_event)(channel, &raw mut cq, &raw mut context) } == 0 {
            events += 1;
        }
        if events > 0 {
            // SAFETY: all of them were this queue's: the channel has no other.
            unsafe { (library.ack_cq_events)(self.cq(), events) };
        }
        events > 0
    }

    /// The library's words for a completion's status.
    pub(crate) fn describe(&self, status: u32) -> String {
        // SAFETY: takes any number.
        let text = unsafe { (self.domain().library().wc_status_str)(status) };
        // SAFETY: a constant string.
        let text = unsafe { CStr::from_ptr(text) };
        format!("{} (status {status})", text.to_string_lossy())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if !self.domain.is_ours() {
            return;
        }
        // SAFETY: queue pairs hold a reference to their queue: none is left.
        let failed = unsafe { (self.domain.library().destroy_cq)(self.cq.as_ptr()) };
        report("destroying a completion queue", failed);
        // SAFETY: its only queue is gone.
        let failed = unsafe { (self.domain.library().destroy_comp_channel)(self.channel.as_ptr()) };
        report("destroying an event channel", failed);
    }
}
