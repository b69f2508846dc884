//! The threads of a block, one after another, and where they meet.

use super::WARP;
use super::code::Flow;
use super::fault::Fault;
use super::grid::Launch;
use super::thread::{Rendezvous, Shared, Storage, Thread};

/// What came of letting the threads of a block run.
pub(super) enum Outcome {
    Ended,
    /// Something has moved.
    Progress,
    /// All threads wait for memory that somebody else has to write.
    Waiting,
    Failed(String, Fault),
}

enum State<'l> {
    NotStarted,
    Live(Box<Thread<'l>>),
    Ended,
}

/// A block that is running.
pub(super) struct Block<'l> {
    launch: &'l Launch<'l>,
    coordinates: [u32; 3],
    threads: Vec<State<'l>>,
    live: usize,
    shared: Vec<u64>,
}

impl<'l> Block<'l> {
    pub(super) fn new(launch: &'l Launch<'l>, coordinates: [u32; 3]) -> Self {
        let count = launch.shape.threads() as usize;
        let bytes = launch.static_shared() + launch.shape.dynamic_shared as usize;
        // Shared memory is not initialized: garbage shows who relies on zeros.
        let shared = vec![0xA5A5_A5A5_A5A5_A5A5; bytes.div_ceil(8)];
        let threads = (0..count).map(|_| State::NotStarted).collect();
        Self { launch, coordinates, threads, live: count, shared }
    }

    /// Lets each thread run until it ends or waits.
    pub(super) fn run(&mut self, storage: &mut Vec<Storage>) -> Outcome {
        let mut progress = false;
        for index in 0..self.threads.len() {
            if matches!(self.threads[index], State::NotStarted) {
                let shared =
                    Shared { pointer: self.shared.as_mut_ptr(), bytes: self.shared.len() * 8 };
                let storage = storage.pop().unwrap_or_default();
                let number = u32::try_from(index).unwrap_or(u32::MAX);
                let thread = Thread::new(self.launch, shared, self.coordinates, number, storage);
                self.threads[index] = State::Live(Box::new(thread));
                progress = true;
            }
            let State::Live(thread) = &mut self.threads[index] else { continue };
            if thread.rendezvous.is_some() {
                continue;
            }
            match thread.run() {
                Flow::Yield => progress |= !thread.is_polling(),
                Flow::Fault => {
                    let fault = thread.fault.take();
                    let place = self.describe(index);
                    return fault.map_or(Outcome::Ended, |fault| Outcome::Failed(place, fault));
                }
                Flow::Exit => {
                    let ended = std::mem::replace(&mut self.threads[index], State::Ended);
                    if let State::Live(thread) = ended {
                        storage.push(thread.into_storage());
                    }
                    self.live -= 1;
                    progress = true;
                }
                _ => progress = true,
            }
        }
        progress |= self.open_barriers();
        progress |= self.open_warps();
        match self.live {
            0 => Outcome::Ended,
            _ if progress => Outcome::Progress,
            _ => Outcome::Waiting,
        }
    }

    /// Where a thread is, in words.
    fn describe(&self, index: usize) -> String {
        let State::Live(thread) = &self.threads[index] else { return String::new() };
        let module = self.launch.module;
        let name = &module.functions[self.launch.kernel].name;
        let line = thread.line();
        let text = module.line(line);
        let [x, y, z] = thread.coordinates();
        let [bx, by, bz] = self.coordinates;
        format!(
            "kernel {name}, block ({bx}, {by}, {bz}), thread ({x}, {y}, {z}), \
             `{text}` (line {line})"
        )
    }

    fn live(&self) -> impl Iterator<Item = (usize, &Thread<'l>)> {
        self.threads.iter().enumerate().filter_map(|(index, state)| match state {
            State::Live(thread) => Some((index, &**thread)),
            _ => None,
        })
    }

    /// Lets threads go on past a barrier that all of them have reached.
    fn open_barriers(&mut self) -> bool {
        let mut waiting = Vec::new();
        for (index, thread) in self.live() {
            if let Some(Rendezvous::Barrier { id, threads, value }) = thread.rendezvous {
                waiting.push((id, threads, value, index));
            }
        }
        let mut opened = false;
        waiting.sort_unstable();
        for group in waiting.chunk_by(|one, other| one.0 == other.0) {
            let expected = match group[0].1 {
                0 => self.live,
                count => usize::try_from(count).unwrap_or(usize::MAX),
            };
            if group.len() < expected {
                continue;
            }
            opened = true;
            let count = group.iter().filter(|(_, _, value, _)| value & 1 == 1).count() as u64;
            for (_, _, _, index) in group {
                self.release(*index, count, group.len() as u64);
            }
        }
        opened
    }

    /// Completes a barrier for a thread: `count` of `all` threads brought a true predicate.
    fn release(&mut self, index: usize, count: u64, all: u64) {
        if let State::Live(thread) = &mut self.threads[index] {
            thread.rendezvous = None;
            crate::ops::complete_barrier(thread, count, all);
        }
    }

    /// Lets lanes go on past an instruction of their warp that all lanes of its mask have reached.
    fn open_warps(&mut self) -> bool {
        let mut opened = false;
        for first in (0..self.threads.len()).step_by(WARP as usize) {
            let end = (first + WARP as usize).min(self.threads.len());
            let mut values = [None; WARP as usize];
            let mut live = 0_u32;
            for (lane, state) in self.threads[first..end].iter().enumerate() {
                let State::Live(thread) = state else { continue };
                live |= 1 << lane;
                if let Some(Rendezvous::Warp { mask, value }) = thread.rendezvous {
                    values[lane] = Some((mask, thread.counter, value));
                }
            }
            opened |= self.open_warp(first, &values, live);
        }
        opened
    }

    fn open_warp(
        &mut self,
        first: usize,
        values: &[Option<(u32, usize, u64)>; WARP as usize],
        live: u32,
    ) -> bool {
        let mut opened = false;
        for lane in 0..WARP as usize {
            let Some((mask, counter, _)) = values[lane] else { continue };
            let is_there = |other: usize| {
                let arrived = values[other].is_some_and(|(m, c, _)| (m, c) == (mask, counter));
                (mask & live) >> other & 1 == 0 || arrived
            };
            if !(0..WARP as usize).all(is_there) {
                continue;
            }
            let mut operands = [None; WARP as usize];
            for (operand, value) in operands.iter_mut().zip(values) {
                *operand = value.filter(|(m, c, _)| (*m, *c) == (mask, counter)).map(|v| v.2);
            }
            if let State::Live(thread) = &mut self.threads[first + lane] {
                thread.rendezvous = None;
                crate::ops::complete_warp(thread, mask, &operands);
                opened = true;
            }
        }
        opened
    }
}
