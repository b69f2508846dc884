//! Flags by which the devices' streams wait for each other.
//!
//! Every rank has a page in device memory that all peers have open (`page`), with two flags for
//! each peer: one of each kind. Only that peer writes them. They count on from call to call, so
//! that nothing is ever reset, and are compared modulo 2³².

use std::sync::Arc;

use unisum_cuda_ipc::{CudaError, Device, Kernels, Stream};
use unisum_engine::device::{DeviceProgram, Flag, Note, STAGING_MEMORIES};
use unisum_kernels::cuda::{
    DIVIDES, FLAGS_MAX, FoldTask, MultimemTask, RANKS_MAX, SCALES, SOURCES_MAX, SignalTask,
    StagedTask, WATCHES, WaitTask,
};
use unisum_kernels::{Dtype, Fold, ReduceOp};
use unisum_link::Rank;

use super::multimem::Multimem;
use super::page::{AbortWord, Page, Places};

/// How far the flags are, here and at the peers.
#[derive(Debug)]
pub(super) struct Flags {
    rank: Rank,
    page: Page,
    /// The page of each rank, as it lies in this process.
    peers: Vec<Places>,
    /// The flags set so far in each peer's page, by kind.
    sent: Vec<[u32; 2]>,
    received: Vec<[u32; 2]>,
    /// How many all-reduces were done in one launch.
    launches: u64,
    abort: Arc<AbortWord>,
}

/// An all-reduce in one launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct OneLaunch {
    pub(super) to: u64,
    pub(super) from: u64,
    pub(super) count: usize,
    /// As many on all ranks.
    pub(super) blocks: u32,
}

/// What a task says of a fold.
fn flags_of(how: &Fold) -> u32 {
    let flags =
        [(DIVIDES, how.divide_by.is_some()), (SCALES, how.factor.is_some()), (WATCHES, how.watch)];
    flags.iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag).sum()
}

/// Addresses and values of notes, which `each` gives, as kernels take them.
fn filled(
    notes: &[Note],
    each: impl Fn(&Note) -> (u64, u32),
) -> ([u64; FLAGS_MAX], [u32; FLAGS_MAX]) {
    let (mut flags, mut values) = ([0; FLAGS_MAX], [0; FLAGS_MAX]);
    for ((note, flag), value) in notes.iter().zip(&mut flags).zip(&mut values) {
        (*flag, *value) = each(note);
    }
    (flags, values)
}

impl Flags {
    pub(super) fn new(rank: Rank, page: Page, pages: &[u64], abort: Arc<AbortWord>) -> Self {
        let world = pages.len();
        let peers = pages.iter().map(|&base| Places::new(base, world)).collect();
        let [sent, received] = [(); 2].map(|()| vec![[0; 2]; world]);
        Self { rank, page, peers, sent, received, launches: 0, abort }
    }

    pub(super) const fn page(&self) -> &Page {
        &self.page
    }

    const fn own(&self) -> Places {
        self.page.places()
    }

    /// Where this rank's folds tell that they have found an infinite or NaN result.
    pub(super) const fn found(&self) -> u64 {
        self.own().found()
    }

    /// Enqueues a signal.
    pub(super) fn signal(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        notes: &[Note],
    ) -> Result<(), CudaError> {
        for notes in notes.chunks(FLAGS_MAX) {
            let (flag, value) = filled(notes, |&Note { peer, flag, count }| {
                let set = self.sent[peer][flag as usize].wrapping_add(count);
                (self.peers[peer].flag(flag, self.rank), set)
            });
            let (count, stopped) = (notes.len() as u32, self.own().stopped());
            // SAFETY: the peers' pages are open as long as this rank uses streams.
            unsafe { kernels.signal(stream, &SignalTask { flag, value, count, stopped }) }?;
        }
        Ok(())
    }

    /// Enqueues a wait.
    pub(super) fn wait(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        notes: &[Note],
    ) -> Result<(), CudaError> {
        for notes in notes.chunks(FLAGS_MAX) {
            let (flag, value) = filled(notes, |&Note { peer, flag, count }| {
                let needed = self.received[peer][flag as usize].wrapping_add(count);
                (self.own().flag(flag, peer), needed)
            });
            let (abort, stopped) = (self.abort.address(), self.own().stopped());
            let wait = WaitTask { flag, value, count: notes.len() as u32, abort, stopped };
            // SAFETY: page and abort word are there as long as this rank uses streams.
            unsafe { kernels.wait(stream, &wait) }?;
        }
        Ok(())
    }

    /// All of a program has been enqueued: the next one counts on.
    pub(super) fn advance(&mut self, program: &DeviceProgram) {
        let each = [(&mut self.sent, &program.sent), (&mut self.received, &program.received)];
        for (counts, totals) in each {
            for (count, total) in counts.iter_mut().zip(totals) {
                for flag in [Flag::Ready, Flag::Taken] {
                    let count = &mut count[flag as usize];
                    *count = count.wrapping_add(total.of(flag));
                }
            }
        }
    }

    /// Enqueues one flag to each of the ranks `to`, and a wait for one from each of those in
    /// `from`; this rank itself is passed over.
    pub(super) fn meet(
        &mut self,
        (kernels, stream): (&Kernels, &Stream),
        flag: Flag,
        to: &[Rank],
        from: &[Rank],
    ) -> Result<(), CudaError> {
        let notes = |peers: &[Rank]| -> Vec<Note> {
            let peers = peers.iter().filter(|&&peer| peer != self.rank);
            peers.map(|&peer| Note { peer, flag, count: 1 }).collect()
        };
        let (signals, waits) = (notes(to), notes(from));
        self.signal(kernels, stream, &signals)?;
        self.wait(kernels, stream, &waits)?;
        for (counts, notes) in [(&mut self.sent, signals), (&mut self.received, waits)] {
            for note in notes {
                let count = &mut counts[note.peer][flag as usize];
                *count = count.wrapping_add(1);
            }
        }
        Ok(())
    }

    /// Enqueues that nothing has been found in the results of the call that begins.
    pub(super) fn forget(&self, kernels: &Kernels, stream: &Stream) -> Result<(), CudaError> {
        let (to, from) = (self.own().found(), self.own().zero());
        // SAFETY: both are words of the own page.
        unsafe { kernels.copy(stream, &[unisum_kernels::cuda::CopyTask { to, from, bytes: 4 }]) }
    }

    /// Enqueues that this rank learns what the folds of `watchers` have found, after its program.
    pub(super) fn learn(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        watchers: &[Rank],
    ) -> Result<(), CudaError> {
        for watchers in watchers.chunks(SOURCES_MAX - 1) {
            let to = self.own().total();
            let mut from = [0; SOURCES_MAX];
            from[0] = to;
            for (slot, &rank) in from[1..].iter_mut().zip(watchers) {
                *slot = self.peers[rank].found();
            }
            let task = FoldTask {
                to,
                from,
                count: 0,
                divisor: 1.0,
                factor: 1.0,
                nonfinite: 0,
                sources: watchers.len() as u32 + 1,
                flags: 0,
            };
            // SAFETY: all are words of pages that are open.
            unsafe { kernels.fold(stream, (ReduceOp::BitOr, Dtype::U8), 4, &task) }?;
        }
        Ok(())
    }

    /// Enqueues an all-reduce in one launch.
    ///
    /// # Safety
    /// Input and output have so many elements, until it has ended in the stream, and no more than
    /// a staging memory holds.
    pub(super) unsafe fn launch(
        &mut self,
        (kernels, stream): (&Kernels, &Stream),
        how: &Fold,
        OneLaunch { to, from, count, blocks }: OneLaunch,
    ) -> Result<(), CudaError> {
        let half = (self.launches % STAGING_MEMORIES as u64) as usize;
        let task = StagedTask {
            to,
            from,
            staging: self.by_rank(|rank| self.peers[rank].staging(half)),
            theirs: self.by_rank(|rank| self.peers[rank].block_flags(self.rank)),
            mine: self.by_rank(|rank| self.own().block_flags(rank)),
            count: count as u64,
            call: self.launches + 1,
            divisor: how.divide_by.map_or(1.0, |it| f64::from(it.get())),
            factor: how.factor.unwrap_or(1.0),
            nonfinite: self.own().total(),
            abort: self.abort.address(),
            stopped: self.own().stopped(),
            flags: flags_of(how),
            rank: self.rank as u32,
            ranks: self.peers.len() as u32,
        };
        // SAFETY: the caller promised the memory; the pages are open as long as this rank uses
        // streams, and all ranks launch the same, with the same numbers, in the same order.
        unsafe { kernels.all_reduce(stream, (how.op, how.dtype), blocks, &task) }?;
        self.launches += 1;
        Ok(())
    }

    /// Enqueues an all-reduce in the switch.
    ///
    /// # Safety
    /// Input and output have so many elements, until it has ended in the stream, and no more than
    /// the bound memory holds.
    pub(super) unsafe fn multimem(
        &self,
        (device, stream): (&Device, &Stream),
        how: &Fold,
        OneLaunch { to, from, count, blocks }: OneLaunch,
        multimem: &mut Multimem,
    ) -> Result<(), CudaError> {
        let task = MultimemTask {
            to,
            from,
            own: multimem.bound.own(),
            all: multimem.bound.all(),
            theirs: self.by_rank(|rank| self.peers[rank].multimem_flags(self.rank)),
            mine: self.by_rank(|rank| self.own().multimem_flags(rank)),
            count: count as u64,
            call: multimem.launches + 1,
            divisor: how.divide_by.map_or(1.0, |it| f64::from(it.get())),
            factor: how.factor.unwrap_or(1.0),
            nonfinite: self.own().total(),
            abort: self.abort.address(),
            stopped: self.own().stopped(),
            flags: flags_of(how),
            rank: self.rank as u32,
            ranks: self.peers.len() as u32,
        };
        // SAFETY: the caller promised the memory; the pages are open, and all memories bound, as
        // long as this rank uses streams, and all ranks launch the same in the same order.
        unsafe { device.multimem_kernels()?.multimem(stream, (how.op, how.dtype), blocks, &task) }?;
        multimem.launches += 1;
        Ok(())
    }

    fn by_rank(&self, of: impl Fn(Rank) -> u64) -> [u64; RANKS_MAX] {
        let mut all = [0; RANKS_MAX];
        all.iter_mut().zip(0..self.peers.len()).for_each(|(slot, rank)| *slot = of(rank));
        all
    }

    /// Tells all peers that the streams of this rank have ended and use nothing of theirs.
    pub(super) fn say_quiet(&self, device: &Arc<Device>) -> Result<(), CudaError> {
        let (stream, yes) = (Stream::new(device)?, 1_u32);
        for (_, peer) in self.peers.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
            let (to, from) = (peer.quiet(self.rank), (&raw const yes).cast());
            // SAFETY: the peer's page is open, and stays until the peer has seen this word; the
            // host's stays until it is copied, below.
            unsafe { stream.copy_to_device(to, from, size_of_val(&yes)) }?;
        }
        stream.synchronize()
    }

    /// Whether all peers have said so, but for those that are gone.
    pub(super) fn are_quiet(&self, is_gone: impl Fn(Rank) -> bool) -> Result<bool, CudaError> {
        for peer in (0..self.peers.len()).filter(|&peer| peer != self.rank && !is_gone(peer)) {
            if !self.page.is_quiet(peer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The peers whose flags are not as far as everything that was enqueued here needs, so many
    /// all-reduces in the switch included.
    pub(super) fn behind(&self, in_switch: u64) -> Result<Vec<Rank>, CudaError> {
        let mut behind = Vec::new();
        for (peer, counts) in self.received.iter().enumerate() {
            let mut is_behind = peer != self.rank && self.is_behind_in_launches(peer, in_switch)?;
            for flag in [Flag::Ready, Flag::Taken] {
                let word = self.page.flag(flag, peer)?;
                is_behind |= (word.wrapping_sub(counts[flag as usize]) as i32) < 0;
            }
            if is_behind {
                behind.push(peer);
            }
        }
        Ok(behind)
    }

    /// Whether a peer's first block has not come to the last all-reduce in one launch, or to the
    /// last meeting of those in the switch.
    fn is_behind_in_launches(&self, peer: Rank, in_switch: u64) -> Result<bool, CudaError> {
        let is_in_switch = self.page.multimem_flag(peer)? < 2 * in_switch;
        Ok(is_in_switch || self.page.block_flag(peer)? < self.launches)
    }
}
