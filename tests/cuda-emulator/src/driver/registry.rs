//! Handles of objects: numbers that are never used twice, so that stale ones are noticed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::codes::{Code, Done};

/// The objects of one kind.
#[derive(Debug)]
pub(crate) struct Registry<T> {
    /// The upper bits of each handle, which tell kinds apart.
    kind: u64,
    next: AtomicU64,
    objects: Mutex<HashMap<u64, Arc<T>>>,
}

/// Locks a mutex whose data is sound even if a thread has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Registry<T> {
    pub(crate) fn new(kind: u64) -> Self {
        Self { kind: kind << 48, next: AtomicU64::new(1), objects: Mutex::default() }
    }

    /// The handle that the next object gets.
    pub(crate) fn reserve(&self) -> u64 {
        // Relaxed: only the uniqueness of the number matters.
        self.kind | self.next.fetch_add(1, Ordering::Relaxed) << 4
    }

    pub(crate) fn insert(&self, handle: u64, object: Arc<T>) {
        lock(&self.objects).insert(handle, object);
    }

    pub(crate) fn add(&self, object: T) -> u64 {
        let handle = self.reserve();
        self.insert(handle, Arc::new(object));
        handle
    }

    pub(crate) fn find(&self, handle: u64) -> Done<Arc<T>> {
        lock(&self.objects).get(&handle).cloned().ok_or(Code::INVALID_HANDLE)
    }

    pub(crate) fn remove(&self, handle: u64) -> Done<Arc<T>> {
        lock(&self.objects).remove(&handle).ok_or(Code::INVALID_HANDLE)
    }

    pub(crate) fn remove_if(&self, mut condition: impl FnMut(&T) -> bool) {
        lock(&self.objects).retain(|_, object| !condition(object));
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        lock(&self.objects).values().cloned().collect()
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.objects).len()
    }
}
