//! What a link counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a link has counted: added to by the thread that drives the link, read by any, without a
/// lock. What is worth counting is the link's choice.
#[derive(Debug)]
pub struct LinkCounters {
    transport: &'static str,
    names: &'static [&'static str],
    values: Box<[AtomicU64]>,
}

impl LinkCounters {
    /// Counters of these names, for a link of the transport, all 0.
    pub fn new(transport: &'static str, names: &'static [&'static str]) -> Self {
        let values = names.iter().map(|_| AtomicU64::new(0)).collect();
        Self { transport, names, values }
    }

    /// The transport's name.
    pub const fn transport(&self) -> &'static str {
        self.transport
    }

    /// Adds to the counter at an index of the names. Only the thread that drives the link calls it.
    ///
    /// # Panics
    /// If there is no such counter.
    pub fn add(&self, index: usize, more: u64) {
        // Relaxed, twice: only one thread adds; others read figures for people.
        let value = &self.values[index];
        value.store(value.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }

    /// The counter at an index of the names.
    ///
    /// # Panics
    /// If there is no such counter.
    pub fn get(&self, index: usize) -> u64 {
        self.values[index].load(Ordering::Relaxed) // as in `add`
    }

    /// All counters, by name.
    pub fn read(&self) -> Vec<(&'static str, u64)> {
        self.names.iter().enumerate().map(|(index, &name)| (name, self.get(index))).collect()
    }
}
