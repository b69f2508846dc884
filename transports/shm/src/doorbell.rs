//! Doorbells: how a rank sleeps until enough has happened for it.
//!
//! Each rank has three words. `events` counts what happened for the rank; `wake_at` is the count at
//! which it wants to be woken, so that each of many peers does not wake it; `mode` says whether it
//! sleeps at all, and is the futex word.
//!
//! Going to sleep and ringing race like this (Dekker): the sleeper stores `mode` and then loads
//! `events`; the ringer adds to `events` and then loads `mode`. All four are `SeqCst`, so in their
//! single order one of the two sees what the other did: either the sleeper finds the event and
//! stays awake, or the ringer finds the sleeper and wakes it. Whoever changes `mode` to awake is
//! the one that makes the system call, so a sleep costs one wake-up, however many ring. Since the
//! futex word itself changes, a wake-up between the sleeper's last look and its sleep isn't lost.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::futex;
use unisum_link::Wake;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::random;

use crate::ShmError;
use crate::layout::WAKES;
use crate::mapping::Mapping;

/// Weight of an event that obliges its receiver to act (a peer waits for it): more than any
/// number of plain events that a sleeper may sleep through.
pub(crate) const URGENT: u32 = 1 << 12;

const AWAKE: u32 = 0;
/// Sleeps on the futex word.
const ASLEEP: u32 = 1;
/// Sleeps on the descriptor, together with other links.
const ARMED: u32 = 2;

/// A sleep checks this often, in case a peer dies between changing a word and waking its sleeper.
const SLICE: Duration = Duration::from_millis(250);

/// This rank's doorbell, which also rings those of others.
#[derive(Debug)]
pub(crate) struct Doorbell {
    mapping: Arc<Mapping>,
    local_index: u64,
    socket: ParentOnly<UnixDatagram>,
    /// A wake that no park has answered yet.
    poked: AtomicBool,
    /// Whether this rank's thread parks in the group.
    grouped: AtomicBool,
}

impl Doorbell {
    /// Binds the doorbell's socket and publishes its name at `local_index`.
    pub(crate) fn new(mapping: Arc<Mapping>, local_index: u64) -> Result<Self, ShmError> {
        let name: [u8; 32] = random().map_err(ShmError::os("drawing a name"))?;
        let socket = UnixDatagram::bind_addr(&address(&name)?)
            .map(ParentOnly::new)
            .map_err(ShmError::os("binding a doorbell socket"))?;
        socket.set_nonblocking(true).map_err(ShmError::os("setting up a doorbell socket"))?;
        let control = mapping.layout().control(local_index);
        for (index, chunk) in name.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(chunk.try_into().expect("chunks of 8"));
            // Ordered by the join protocol: peers look only after all ranks have joined.
            mapping.wide(control.socket() + 8 * index as u64).store(word, Ordering::Relaxed);
        }
        let (poked, grouped) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { mapping, local_index, socket, poked, grouped })
    }

    /// Counts `weight` events for the rank at `local_index`, and wakes it if that is enough.
    pub(crate) fn ring(&self, local_index: u64, weight: u32) {
        let control = self.mapping.layout().control(local_index);
        // SeqCst: see the head of this file; pairs with the load in `sleep` and `arm`.
        let before = self.mapping.word(control.events()).fetch_add(weight, Ordering::SeqCst);
        // SeqCst: pairs with the store in `fall_asleep`.
        let mode = self.mapping.word(control.mode()).load(Ordering::SeqCst);
        if mode == AWAKE {
            return;
        }
        // Relaxed: stored before the mode that was just seen. If it is that of a later sleep, its
        // sleeper has yet to store its mode, and will see our event after that.
        let wake_at = self.mapping.word(control.wake_at()).load(Ordering::Relaxed);
        if reached(before.wrapping_add(weight), wake_at) {
            self.rouse(local_index, mode);
        }
    }

    /// Wakes the rank at `local_index` from a sleep of kind `mode`, unless another rank does.
    fn rouse(&self, local_index: u64, mode: u32) {
        let control = self.mapping.layout().control(local_index);
        let word = self.mapping.word(control.mode());
        // SeqCst: part of the order described above; only one wins and makes the system call.
        if word.compare_exchange(mode, AWAKE, Ordering::SeqCst, Ordering::Relaxed).is_err() {
            return;
        }
        if mode == ASLEEP {
            wake(word, 1);
        } else {
            self.signal(local_index);
        }
    }

    /// Makes the descriptor of `local_index` readable. Fails only if it already is (a full socket),
    /// or if that rank is gone: neither needs a signal.
    fn signal(&self, local_index: u64) {
        let control = self.mapping.layout().control(local_index);
        let mut name = [0; 32];
        for (index, chunk) in name.chunks_exact_mut(8).enumerate() {
            let word = self.mapping.wide(control.socket() + 8 * index as u64);
            chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        if let Ok(address) = address(&name) {
            let _ = self.socket.send_to_addr(&[1], &address);
        }
    }

    /// How many events there were; taken before looking at what they are about, so that one that
    /// comes while looking is counted later.
    pub(crate) fn events(&self) -> u32 {
        let control = self.mapping.layout().control(self.local_index);
        // Acquire: pairs with the addition in `ring`: what was published before it is visible.
        self.mapping.word(control.events()).load(Ordering::Acquire)
    }

    /// Sleeps until `wanted` events after the first `seen`, a wake, or `until`.
    pub(crate) fn park(&self, seen: u32, wanted: u32, until: Instant) -> io::Result<()> {
        let (events, mode) = self.fall_asleep(seen.wrapping_add(wanted), ASLEEP);
        let outcome = loop {
            // SeqCst, all three: see the head of this file.
            if reached(events.load(Ordering::SeqCst), seen.wrapping_add(wanted))
                || mode.load(Ordering::SeqCst) != ASLEEP
                || self.poked.load(Ordering::SeqCst)
            {
                break Ok(());
            }
            match wait(mode, ASLEEP, until) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        mode.store(AWAKE, Ordering::SeqCst);
        self.take_poke();
        outcome
    }

    /// Announces a sleep on the descriptor; `false` if something happened after the first `seen`
    /// events, or a wake.
    pub(crate) fn arm(&self, seen: u32) -> bool {
        let (events, _) = self.fall_asleep(seen.wrapping_add(1), ARMED);
        // SeqCst, both: see the head of this file.
        let quiet = events.load(Ordering::SeqCst) == seen && !self.poked.load(Ordering::SeqCst);
        if !quiet {
            self.disarm();
        }
        quiet
    }

    /// Ends what `arm` began.
    pub(crate) fn disarm(&self) {
        let control = self.mapping.layout().control(self.local_index);
        self.mapping.word(control.mode()).store(AWAKE, Ordering::SeqCst);
        let mut byte = [0; 1];
        // Whoever rings meanwhile finds us awake and sends nothing, so this ends; strangers could
        // keep it going, hence the bound.
        for _ in 0..64 {
            if self.socket.recv(&mut byte).is_err() {
                break;
            }
        }
        self.take_poke();
    }

    /// Answers a wake; whether there was one.
    pub(crate) fn take_poke(&self) -> bool {
        // A plain load first: this runs before every sleep, and a poke is rare.
        self.poked.load(Ordering::SeqCst) && self.poked.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until `over`, a wake of the group after that was last asked, a wake of this rank,
    /// or `until`.
    pub(crate) fn park_grouped(&self, over: impl Fn() -> bool, until: Instant) -> io::Result<()> {
        let wakes = self.mapping.word(WAKES);
        // SeqCst: `wake` stores `poked` and then loads this; here it is the other way round.
        self.grouped.store(true, Ordering::SeqCst);
        let outcome = loop {
            // SeqCst: pairs with the additions in `wake_group`. Before asking: what changes after
            // that ends the sleep.
            let seen = wakes.load(Ordering::SeqCst);
            if over() || self.poked.load(Ordering::SeqCst) {
                break Ok(());
            }
            match wait(wakes, seen, until) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.grouped.store(false, Ordering::SeqCst);
        self.take_poke();
        outcome
    }

    /// Wakes every member that sleeps in the group.
    pub(crate) fn wake_group(&self) {
        let wakes = self.mapping.word(WAKES);
        // SeqCst: pairs with the load in `park_grouped`.
        wakes.fetch_add(1, Ordering::SeqCst);
        wake(wakes, u32::MAX >> 1);
    }

    /// The descriptor that `arm` is about.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn fall_asleep(&self, wake_at: u32, mode: u32) -> (&AtomicU32, &AtomicU32) {
        let control = self.mapping.layout().control(self.local_index);
        // Relaxed: published by the store of the mode.
        self.mapping.word(control.wake_at()).store(wake_at, Ordering::Relaxed);
        let word = self.mapping.word(control.mode());
        // SeqCst: pairs with the load in `ring`.
        word.store(mode, Ordering::SeqCst);
        (self.mapping.word(control.events()), word)
    }
}

impl Wake for Doorbell {
    fn wake(&self) {
        if !self.mapping.is_mapped_here() {
            return;
        }
        // SeqCst throughout: the sleepers store their mode (or `grouped`) first and load `poked`
        // then, so one of the two sees the other.
        self.poked.store(true, Ordering::SeqCst);
        let control = self.mapping.layout().control(self.local_index);
        let mode = self.mapping.word(control.mode()).load(Ordering::SeqCst);
        if mode != AWAKE {
            self.rouse(self.local_index, mode);
        }
        if self.grouped.load(Ordering::SeqCst) {
            // The others wake up for nothing, which is rare and harmless.
            self.wake_group();
        }
    }
}

/// Whether a wrapping count has come to `goal`.
const fn reached(count: u32, goal: u32) -> bool {
    count.wrapping_sub(goal) < 1 << 31
}

/// Sleeps while `word` is `value`, but only a slice; `false` once it is `until`.
fn wait(word: &AtomicU32, value: u32, until: Instant) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now()).min(SLICE);
    if left.is_zero() {
        return Ok(false);
    }
    let left = left.try_into().expect("a quarter of a second is a time");
    // Not private: the sleeper and its waker are different processes.
    match futex::wait(word, futex::Flags::empty(), value, Some(&left)) {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Wakes up to `sleepers` threads of any process that sleep on `word`.
fn wake(word: &AtomicU32, sleepers: u32) {
    let woken = futex::wake(word, futex::Flags::empty(), sleepers);
    debug_assert!(woken.is_ok(), "a mapped word can be woken: {woken:?}");
}

/// The address of a random name: 32 arbitrary bytes in the abstract namespace.
fn address(name: &[u8; 32]) -> Result<SocketAddr, ShmError> {
    SocketAddr::from_abstract_name(name).map_err(ShmError::os("naming a doorbell socket"))
}
