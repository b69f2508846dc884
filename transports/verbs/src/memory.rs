//! Memory that the devices may use: allocations of the communicator, memory that is borrowed for
//! one collective, and a link's own.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use unisum_link::{Registrar, Registration as Registered};

use crate::domain::{Access, Domain, Registration};
use crate::error::VerbsError;
use crate::profile::Profile;
use crate::wire::RAILS_MAX;

/// The keys of a piece of memory, one of each kind for each device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keys {
    /// For this rank's devices to read.
    pub(crate) local: [u32; RAILS_MAX],
    /// For peers to write.
    pub(crate) remote: [u32; RAILS_MAX],
}

/// Memory that is registered on all devices until it is dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    _registrations: Vec<Registration>,
    pub(crate) keys: Keys,
    /// What it is registered for.
    pub(crate) access: Access,
}

impl Pinned {
    /// # Errors
    /// The error of the first device that refuses.
    ///
    /// # Safety
    /// As [`Domain::register`].
    pub(crate) unsafe fn new(
        domains: &[Arc<Domain>],
        start: NonNull<u8>,
        bytes: usize,
        access: Access,
    ) -> Result<Self, VerbsError> {
        let mut registrations = Vec::with_capacity(domains.len());
        let mut keys = Keys::default();
        for (rail, domain) in domains.iter().enumerate() {
            // SAFETY: the caller promised it.
            let registration = unsafe { domain.register(start, bytes, access) }?;
            (keys.local[rail], keys.remote[rail]) = (registration.local, registration.remote);
            registrations.push(registration);
        }
        Ok(Self { _registrations: registrations, keys, access })
    }
}

/// Pages of this link, zeroed and registered.
#[derive(Debug)]
pub(crate) struct Pages {
    // Before the memory, so that it is dropped before.
    pinned: Pinned,
    memory: Memory,
}

#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned.
unsafe impl Send for Memory {}

impl Pages {
    /// At least `bytes` bytes.
    ///
    /// # Errors
    /// If there is no memory, or it cannot be registered.
    pub(crate) fn new(domains: &[Arc<Domain>], bytes: usize) -> Result<Self, VerbsError> {
        let out_of_memory = || VerbsError::Device(format!("no memory for {bytes} bytes"));
        let bytes = bytes.max(1).next_multiple_of(PAGE);
        let layout = Layout::from_size_align(bytes, PAGE).map_err(|_| out_of_memory())?;
        // SAFETY: the layout's size is at least a page.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        let memory = Memory { start, layout };
        // SAFETY: the memory lives until the registration is dropped, and peers get its keys only
        // for what is meant for them.
        let pinned = unsafe { Pinned::new(domains, start, bytes, Access::Write) }?;
        Ok(Self { pinned, memory })
    }

    pub(crate) const fn start(&self) -> *mut u8 {
        self.memory.start.as_ptr()
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.memory.layout.size()
    }

    pub(crate) const fn keys(&self) -> Keys {
        self.pinned.keys
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `Pages::new` with this layout, and not registered any more.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// The memory of a communicator that stays registered, from its allocation until it is freed.
///
/// Only memory whose owner reports when it is freed can be registered here. The kernel keeps
/// registered pages in place: if addresses were freed and reused, their registration would keep
/// naming the old pages. Memory that a program only lends is therefore registered for each
/// collective, or copied through slots, depending on what was measured when the devices were
/// opened.
#[derive(Debug)]
pub struct Registry {
    domains: Vec<Arc<Domain>>,
    profile: Profile,
    register_from: AtomicUsize,
    entries: Mutex<Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    start: usize,
    bytes: usize,
    pinned: Pinned,
}

/// A registration of allocated memory: drop it before the memory is freed.
#[derive(Debug)]
pub struct Adopted {
    registry: Arc<Registry>,
    start: usize,
}

impl Registry {
    pub(crate) fn new(domains: Vec<Arc<Domain>>) -> Arc<Self> {
        let profile = Profile::measure(&domains);
        let register_from = AtomicUsize::new(profile.register_from);
        Arc::new(Self { domains, profile, register_from, entries: Mutex::default() })
    }

    pub(crate) const fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The size from which borrowed memory is registered for a collective.
    pub(crate) fn register_from(&self) -> usize {
        // Relaxed: see `set_register_from`.
        self.register_from.load(Ordering::Relaxed)
    }

    /// Registers borrowed memory from `bytes` on, whatever was measured. For tests and
    /// measurements.
    pub fn set_register_from(&self, bytes: usize) {
        // Relaxed: any value is right at any time; who sets it between collectives of the same
        // thread finds it in the next.
        self.register_from.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn domains(&self) -> &[Arc<Domain>] {
        &self.domains
    }

    /// Registers memory until the returned value is dropped. From any thread.
    ///
    /// Cost: a system call for each device; the kernel pins every page.
    ///
    /// # Errors
    /// If the system refuses; the memory can still be used, like any other.
    ///
    /// # Safety
    /// The memory stays mapped, with the same pages, until the returned value is dropped.
    pub unsafe fn adopt(
        self: &Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<Adopted, VerbsError> {
        // What is allocated may become an input and an output.
        let access = Access::Write;
        // SAFETY: the caller promised it; keys of it leave this rank only for transfers that the
        // engine posts.
        let pinned = unsafe { Pinned::new(&self.domains, start, bytes, access) }?;
        let start = start.as_ptr() as usize;
        self.lock().push(Entry { start, bytes, pinned });
        Ok(Adopted { registry: self.clone(), start })
    }

    /// The keys of adopted memory that holds these bytes.
    pub(crate) fn find(&self, start: usize, bytes: usize) -> Option<Keys> {
        let holds =
            |entry: &&Entry| entry.start <= start && start + bytes <= entry.start + entry.bytes;
        self.lock().iter().find(holds).map(|entry| entry.pinned.keys)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        // No code that holds the lock can panic half-way through a change.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registrar for Registry {
    unsafe fn register(
        self: Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<Registered, String> {
        // SAFETY: the caller promised it.
        let adopted = unsafe { self.adopt(start, bytes) };
        let adopted = adopted.map_err(|error| error.to_string())?;
        Ok(Registered(Box::new(adopted)))
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        let mut entries = self.registry.lock();
        if let Some(at) = entries.iter().position(|entry| entry.start == self.start) {
            let entry = entries.swap_remove(at);
            // The kernel may take a while to let the pages go.
            drop(entries);
            drop(entry);
        }
    }
}

pub(crate) const PAGE: usize = 4096;
