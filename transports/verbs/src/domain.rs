//! An opened device with its protection domain, and memory registered in it.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;
use unisum_link::fork::{self, ParentOnly};

use crate::device::{Gid, Port};
use crate::error::{VerbsError, locked_memory_hint};
use crate::ffi::{self, Library, library};

/// A device that is open for one of its ports.
#[derive(Debug)]
pub(crate) struct Domain {
    // Descriptors come first, so that they leave the set of what children don't get before the
    // library closes them.
    _commands: ParentOnly<BorrowedFd<'static>>,
    pub(crate) events: ParentOnly<BorrowedFd<'static>>,
    opened: Opened,
    /// What is used of the device.
    pub(crate) port: Port,
    pub(crate) gid: Gid,
    pub(crate) attributes: ffi::PortAttributes,
    pub(crate) limits: ffi::DeviceAttributes,
    /// What it reported that no connection over it survives.
    failure: OnceLock<String>,
    /// Whether queue pairs that fail are made anew by those that use it.
    renews: AtomicBool,
}

/// The library's objects for a device. Dropping it closes the device.
#[derive(Debug)]
struct Opened {
    library: &'static Library,
    context: NonNull<ffi::Context>,
    pd: NonNull<ffi::Pd>,
    fork_generation: u32,
}

// SAFETY: libibverbs is thread-safe: its objects may be used from all threads.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// Opens the device of `port`. May block for as long as its driver takes.
    ///
    /// # Errors
    /// What the library or the device refuses.
    pub(crate) fn open(port: Port, gid: Gid) -> Result<Arc<Self>, VerbsError> {
        let library = library().map_err(|error| VerbsError::Library(error.to_owned()))?;
        Self::open_with(library, port, gid)
    }

    /// The same with a library.
    ///
    /// # Errors
    /// As [`Domain::open`].
    pub(crate) fn open_with(
        library: &'static Library,
        port: Port,
        gid: Gid,
    ) -> Result<Arc<Self>, VerbsError> {
        let opened = Opened::new(library, &port.device)?;
        // SAFETY: the context is open, and its head is as declared.
        let head = unsafe { opened.context.as_ref() };
        let domain = Self {
            _commands: ParentOnly::new(descriptor(head.cmd_fd)),
            events: ParentOnly::new(descriptor(head.async_fd)),
            attributes: query_port(&opened, &port)?,
            limits: query_device(&opened, &port)?,
            opened,
            gid,
            port,
            failure: OnceLock::new(),
            renews: AtomicBool::new(false),
        };
        make_nonblocking(*domain.events)
            .map_err(|error| VerbsError::Os("preparing for its events".into(), error))?;
        Ok(Arc::new(domain))
    }

    /// The library that the device was opened with.
    pub(crate) const fn library(&self) -> &'static Library {
        self.opened.library
    }

    pub(crate) const fn context(&self) -> *mut ffi::Context {
        self.opened.context.as_ptr()
    }

    pub(crate) const fn pd(&self) -> *mut ffi::Pd {
        self.opened.pd.as_ptr()
    }

    /// Whether this process opened the device. A forked child has to leave what it inherited
    /// alone: the objects are the parent's.
    pub(crate) fn is_ours(&self) -> bool {
        self.opened.is_ours()
    }

    /// Registers memory for what `access` says.
    ///
    /// Cost: a system call, and the kernel pins every page.
    ///
    /// # Errors
    /// If the system refuses, with a hint if that is for too little locked memory.
    ///
    /// # Safety
    /// `bytes` bytes at `start` stay mapped while the registration lives, and whoever gets its
    /// keys honours who may use them when.
    pub(crate) unsafe fn register(
        self: &Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
        access: Access,
    ) -> Result<Registration, VerbsError> {
        let access = match access {
            // What is registered can always be read by its own device.
            Access::Read => 0,
            Access::Write => ffi::ACCESS_LOCAL_WRITE | ffi::ACCESS_REMOTE_WRITE,
        };
        let (pd, library) = (self.pd(), self.library());
        // SAFETY: the domain is open, and the caller vouches for the memory.
        let mr = unsafe { (library.reg_mr)(pd, start.as_ptr().cast(), bytes, access) };
        let mr = NonNull::new(mr).ok_or_else(|| {
            let error = io::Error::last_os_error();
            let hint = locked_memory_hint(&error);
            let what = format!("registering {bytes} bytes of memory on {}{hint}", self.port.device);
            VerbsError::Os(what, error)
        })?;
        // SAFETY: the library made it, and its head is as declared.
        let head = unsafe { mr.as_ref() };
        Ok(Registration { local: head.lkey, remote: head.rkey, mr, domain: self.clone() })
    }

    /// Takes note of what the device says of itself. Each event comes to one of the links over the
    /// device; all find a failure in [`Domain::failure`].
    pub(crate) fn take_events(&self) {
        let name = &self.port.device;
        while let Some(event) = self.next_event() {
            // A port's number is an `int` in a union with pointers.
            let port = event.element as u32;
            match event.event_type {
                ffi::EVENT_PORT_ERR => unisum_link::warning!("port {port} of {name} is down"),
                ffi::EVENT_PORT_ACTIVE => unisum_link::warning!("port {port} of {name} is up"),
                // The completions of the queue pair say so, too, to whom it concerns.
                // Relaxed: the flag says nothing of other memory.
                ffi::EVENT_QP_FATAL if self.renews.load(Ordering::Relaxed) => {
                    tracing::debug!("a queue pair of {name} has failed");
                }
                ffi::EVENT_DEVICE_FATAL
                | ffi::EVENT_QP_FATAL
                | ffi::EVENT_QP_REQ_ERR
                | ffi::EVENT_QP_ACCESS_ERR => {
                    let text = format!("{name} reported event {}", event.event_type);
                    // The first counts.
                    let _ = self.failure.set(text);
                }
                other => tracing::debug!("{name} reported event {other}"),
            }
        }
    }

    /// Says that queue pairs that fail are made anew.
    pub(crate) fn renews(&self) {
        // Relaxed: see `take_events`.
        self.renews.store(true, Ordering::Relaxed);
    }

    /// What the device reported that no connection over it survives.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// The next event of the device or its port, if there is one.
    fn next_event(&self) -> Option<ffi::AsyncEvent> {
        let mut event = MaybeUninit::<ffi::AsyncEvent>::uninit();
        let (context, library) = (self.context(), self.library());
        // SAFETY: the context is open and its descriptor does not block; the library fills the
        // event if it returns 0.
        let failed = unsafe { (library.get_async_event)(context, event.as_mut_ptr()) };
        if failed != 0 {
            return None;
        }
        // SAFETY: it was filled.
        let mut event = unsafe { event.assume_init() };
        // SAFETY: each event is acknowledged once.
        unsafe { (library.ack_async_event)(&raw mut event) };
        Some(event)
    }
}

impl Opened {
    fn new(library: &'static Library, device: &str) -> Result<Self, VerbsError> {
        let fork_generation = fork::generation();
        let context = open_device(library, device)?;
        // SAFETY: the context is open.
        let pd = unsafe { (library.alloc_pd)(context.as_ptr()) };
        let Some(pd) = NonNull::new(pd) else {
            let error = VerbsError::os(format!("making a protection domain on {device}"));
            // SAFETY: it is open and nothing else refers to it.
            unsafe { (library.close_device)(context.as_ptr()) };
            return Err(error);
        };
        Ok(Self { library, context, pd, fork_generation })
    }

    fn is_ours(&self) -> bool {
        self.fork_generation == fork::current()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        // SAFETY: whatever was made in the domain holds a reference to it, so nothing is left.
        let failed = unsafe { (self.library.dealloc_pd)(self.pd.as_ptr()) };
        report("freeing a protection domain", failed);
        // SAFETY: nothing uses the context any more.
        let failed = unsafe { (self.library.close_device)(self.context.as_ptr()) };
        report("closing a device", failed);
    }
}

/// What registered memory may be used for: no more than is needed, as no peer has to be trusted
/// with memory that it never writes, and as memory that can't be written can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    /// This rank's devices read it, to send it.
    Read,
    /// Peers that know its key write it, too.
    Write,
}

/// Memory that a device may use. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Registration {
    /// The key to read it by, for this device.
    pub(crate) local: u32,
    /// The key to write it by, for peers.
    pub(crate) remote: u32,
    mr: NonNull<ffi::Mr>,
    domain: Arc<Domain>,
}

// SAFETY: a handle that the library lets every thread use.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.domain.is_ours() {
            return;
        }
        // SAFETY: made by `register`, and dropped once.
        let failed = unsafe { (self.domain.library().dereg_mr)(self.mr.as_ptr()) };
        report("ending a registration", failed);
    }
}

/// Tells of a failure that nobody can do anything about.
pub(crate) fn report(what: &str, code: i32) {
    if code != 0 {
        unisum_link::fault!("{what} failed: {}", io::Error::from_raw_os_error(code.abs()));
    }
}

/// A descriptor of the library's, which closes it when what it belongs to is destroyed; whoever
/// holds this drops it before.
pub(crate) fn descriptor(number: i32) -> BorrowedFd<'static> {
    // SAFETY: open while the object lives that it belongs to, which the holder of this owns.
    unsafe { BorrowedFd::borrow_raw(number) }
}

pub(crate) fn make_nonblocking(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(descriptor)?;
    Ok(rustix::fs::fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?)
}

fn open_device(library: &Library, name: &str) -> Result<NonNull<ffi::Context>, VerbsError> {
    let mut count = 0;
    // SAFETY: gives a list of `count` devices, or null.
    let list = unsafe { (library.get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(VerbsError::os("listing RDMA devices".into()));
    }
    let mut opened = Err(VerbsError::Device(format!(
        "{name} is in the kernel, but libibverbs does not list it: has it the device's driver?"
    )));
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has that many entries.
        let device = unsafe { *list.wrapping_add(index) };
        // SAFETY: an entry of the list.
        let text = unsafe { (library.get_device_name)(device) };
        // SAFETY: a name is a string that lives as long as its device.
        let text = unsafe { CStr::from_ptr(text) };
        if text.to_bytes() == name.as_bytes() {
            // SAFETY: an entry of the list.
            let context = unsafe { (library.open_device)(device) };
            opened = NonNull::new(context).ok_or_else(|| VerbsError::os(format!("opening {name}")));
            break;
        }
    }
    // SAFETY: the list came from the library; an opened device holds its own reference.
    unsafe { (library.free_device_list)(list) };
    opened
}

fn query_port(opened: &Opened, port: &Port) -> Result<ffi::PortAttributes, VerbsError> {
    // Zeroed, as older libraries leave the last fields alone.
    let mut attributes = MaybeUninit::zeroed();
    let (query, context) = (opened.library.query_port, opened.context.as_ptr());
    // SAFETY: the context is open; the library writes at most what the struct holds.
    let failed = unsafe { query(context, port.number, attributes.as_mut_ptr()) };
    if failed != 0 {
        let what = format!("asking for port {} of {}", port.number, port.device);
        return Err(VerbsError::Os(what, io::Error::from_raw_os_error(failed.abs())));
    }
    // SAFETY: numbers, all of them set.
    Ok(unsafe { attributes.assume_init() })
}

fn query_device(opened: &Opened, port: &Port) -> Result<ffi::DeviceAttributes, VerbsError> {
    let mut attributes = MaybeUninit::zeroed();
    let (query, context) = (opened.library.query_device, opened.context.as_ptr());
    // SAFETY: the context is open; the library fills the struct.
    let failed = unsafe { query(context, attributes.as_mut_ptr()) };
    if failed != 0 {
        let what = format!("asking for the limits of {}", port.device);
        return Err(VerbsError::Os(what, io::Error::from_raw_os_error(failed.abs())));
    }
    // SAFETY: numbers, all of them set.
    Ok(unsafe { attributes.assume_init() })
}
