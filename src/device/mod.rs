//! Collectives on the memory of CUDA devices.
//!
//! A call on device memory moves nothing by itself. The ranks exchange *cards* on the host
//! (`card`): what each of them called, and where its memory lies (`areas`). Every rank then puts
//! its part of the plan into its stream (`queue`), as copies, folds, signals and waits of
//! `unisum_engine::device`, and the call returns (`call`). On the devices, streams wait for each
//! other by flags in device memory (`flags`), which lie in a page that all ranks have open
//! (`page`); so does the staging memory of small all-reduces, which are a single launch. Others are
//! done in the switch between the devices, if that is asked for (`multimem`). What ranks
//! have open of each other's memory, and when it may be freed, is in `memories`. Where devices do
//! not reach each other, `staged` goes through the hosts; if those of each host do, some go both
//! ways, by `hierarchy`.

mod areas;
mod buffer;
mod call;
mod card;
mod choosing;
mod flags;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hierarchy;
mod joining;
mod memories;
mod moment;
mod multimem;
mod page;
mod post;
mod program;
mod queue;
mod staged;
mod typed;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use unisum_cuda_ipc::{CudaError, Device, Event, Stream};
use unisum_kernels::Element;
use unisum_link::{Rank, warning};

pub use buffer::{DeviceBuffer, DeviceEvent, DeviceStream, RawDeviceBuffers};
pub use joining::DeviceRoute;
pub(crate) use moment::Moment;

use crate::autotuning::selector::index_of;
use crate::collective::Collective;
use crate::communicator::groups::Making;
use crate::{Communicator, Error, ErrorKind};
use hierarchy::Hierarchy;
use joining::Direct;
use memories::{Exports, Imports, Owned};
use page::AbortWord;
use program::Programs;
use staged::Staging;

/// This rank's device in a job: collectives on its memory, ordered in streams.
///
/// Made by [`Communicator::on_device`]. All ranks call the same collectives in the same order, as
/// they do on a [`Communicator`]. Calls return when the collective is in the stream: it begins when
/// what was put into the stream before has ended, and what is put there afterwards waits for it.
/// [`DeviceCommunicator::synchronize`] waits for the end and says whether it is one.
///
/// After a failure that is not refused beforehand, the communicator and all others of the job are
/// aborted. Streams do not hang then: waits of the device end, and buffers have unspecified
/// contents.
///
/// Dropping it blocks until its collectives have ended on the device, and the other ranks have
/// dropped theirs, for 2 s at most: memory that others still have open then stays allocated until
/// the process ends.
#[derive(Debug)]
pub struct DeviceCommunicator {
    device: Arc<Device>,
    /// A duplicate, for the cards; there until the drop.
    host: Option<Communicator>,
    route: DeviceRoute,
    /// Set by the verdict, so that no wait of the device lasts longer than the job.
    abort: Arc<AbortWord>,
    /// Whether this process is the one that made it.
    fork_generation: u32,
    failed: OnceLock<Error>,
    state: Mutex<State>,
}

/// How long a communicator that is dropped waits for the others to let go of its memory.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the call that is made has to itself.
#[derive(Debug)]
struct State {
    /// Of the last call, from 1.
    number: u64,
    has_called: bool,
    /// When the last call has ended in its stream.
    ended: Event,
    exports: Exports,
    /// Unless calls are staged.
    direct: Option<Direct>,
    staging: Option<Staging>,
    /// The devices of this host, if those of each host reach each other, and not all do.
    hierarchy: Option<Box<Hierarchy>>,
    programs: Programs,
    /// Whether a staged result was infinite or NaN since the last time that somebody asked.
    found: bool,
    scratch: Option<Owned>,
    /// For memory that peers can't open.
    bounce: Option<Owned>,
    /// What all ranks have carried out.
    cards: Vec<u8>,
}

impl Communicator {
    /// The same ranks, with one device each: this rank's is the device number `ordinal` of this
    /// process (as `CUDA_VISIBLE_DEVICES` numbers them; [`Communicator::local_rank`] often is a
    /// good choice). Two ranks may have the same device.
    ///
    /// If all ranks are on one host and their devices have access to each other's memory,
    /// collectives run on the devices alone. Otherwise they go through the hosts' memory, and a
    /// warning says why; but all-reduces, all-gathers and reduce-scatters still use the devices
    /// within each host, if hosts have equally many ranks ([`DeviceCommunicator::route`]).
    ///
    /// Collective: every rank calls it. Blocks. Cost: about that of [`Communicator::duplicate`],
    /// and loading the kernels, once for each device.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] on all ranks if one of them has no driver, no such device or
    /// one that is too old; the communicator stays as it was. Otherwise as
    /// [`Communicator::duplicate`].
    pub fn on_device(&self, ordinal: usize) -> Result<DeviceCommunicator, Error> {
        let host = self.duplicate_for(&Making::Device)?;
        let device = Device::open(ordinal).map_err(|error| error.to_string());
        let joined = joining::join(&host, device)?;
        let (rank, device) = (host.rank(), joined.device);
        let hierarchy = match joined.direct {
            None => Hierarchy::join(&host, ordinal)?.map(Box::new),
            Some(_) => None,
        };
        let route = joined.route.with(hierarchy.as_deref().map(Hierarchy::extent));
        if let DeviceRoute::Staged { reason } = &route
            && rank == 0
        {
            warning!("collectives on device memory go through the hosts' memory: {reason}");
        }
        let staging = match joined.direct {
            None => Some(Staging::new(host.duplicate_for(&Making::Device)?)),
            Some(_) => None,
        };
        let ended = Event::new(&device, false).map_err(|it| buffer::device_error(it).on(rank))?;
        // Cards are small and alike: nothing is to be tried out for them.
        let fixed = host.fix_for_cards(card::CARD_BYTES)?;
        if let Some(member) = &host.member {
            member.core.runner.membership.add_waker(joined.abort.clone());
        }
        let state = State {
            number: 0,
            has_called: false,
            ended,
            exports: Exports::default(),
            direct: joined.direct,
            staging,
            hierarchy,
            programs: Programs::new(fixed),
            found: false,
            scratch: None,
            bounce: None,
            cards: vec![0; host.world() * card::CARD_BYTES],
        };
        Ok(DeviceCommunicator {
            device,
            host: Some(host),
            route,
            abort: joined.abort,
            fork_generation: unisum_link::fork::generation(),
            failed: OnceLock::new(),
            state: state.into(),
        })
    }
}

impl DeviceCommunicator {
    /// This process's rank, from 0.
    pub fn rank(&self) -> Rank {
        self.host().rank()
    }

    /// The number of ranks.
    #[doc(alias = "size")]
    pub fn world(&self) -> usize {
        self.host().world()
    }

    /// How collectives move data: the same on all ranks.
    pub const fn route(&self) -> &DeviceRoute {
        &self.route
    }

    /// The number of this rank's device in this process.
    pub fn ordinal(&self) -> usize {
        self.device.ordinal()
    }

    /// Describes the device and the route for people.
    pub fn describe(&self) -> String {
        let (major, minor) = self.device.capability();
        let (name, world) = (self.device.name(), self.world());
        let has_multimem = self.lock().direct.as_ref().is_some_and(|it| it.multimem.is_some());
        format!(
            "rank {} of {world} on device {} ({name}, compute capability {major}.{minor}): {}{}\n",
            self.rank(),
            self.ordinal(),
            self.route,
            if has_multimem { ", and the switch adds (multimem)" } else { "" }
        )
    }

    /// Allocates `count` elements, all zero, on the device, which the other ranks' devices can
    /// read. Not collective. Blocks for the driver, which may wait for what is in streams.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if the device has no more, [`ErrorKind::Device`] if it fails.
    pub fn allocate<T: Element>(&self, count: usize) -> Result<DeviceBuffer<T>, Error> {
        self.check()?;
        let refuse = |kind, why: &dyn std::fmt::Display| {
            let text = format!("allocating {count} elements of {}: {why}", T::DTYPE);
            Error::new(kind, text).on(self.rank())
        };
        let bytes = count.checked_mul(size_of::<T>());
        let bytes = bytes
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| refuse(ErrorKind::Memory, &"more bytes than an address space has"))?;
        let owned = Owned::zeroed(&self.device, bytes).map_err(|error| {
            let is_full = error.is_out_of_memory();
            refuse(if is_full { ErrorKind::Memory } else { ErrorKind::Device }, &error)
        })?;
        Ok(DeviceBuffer::new(owned, count))
    }

    /// A new stream of the device, which waits for no other stream. Not collective.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the driver fails.
    pub fn stream(&self) -> Result<DeviceStream, Error> {
        self.check()?;
        let stream = Stream::new(&self.device);
        stream.map(DeviceStream::new).map_err(|it| buffer::device_error(it).on(self.rank()))
    }

    /// An event, which takes times. Not collective.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the driver fails.
    pub fn event(&self) -> Result<DeviceEvent, Error> {
        self.check()?;
        let event = Event::new(&self.device, true);
        event.map(DeviceEvent).map_err(|it| buffer::device_error(it).on(self.rank()))
    }

    /// Fixes the algorithm of all later calls, or, with `None`, has it chosen for each call by a
    /// model of the devices. All ranks make the same call, between collectives.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if no algorithm has that name.
    pub fn set_algorithm(&self, name: Option<&str>) -> Result<(), Error> {
        let index = name.map(index_of).transpose()?;
        let mut state = self.lock();
        state.programs.fix(index);
        match &state.staging {
            Some(staging) => staging.set_algorithm(name),
            None => Ok(()),
        }
    }

    /// Runs a collective in a stream, on any memory of this rank's device, in place or out of
    /// place.
    ///
    /// Collective: every rank calls it, in the same order, with the same collective and element
    /// type, and with buffers of the lengths it needs ([`Collective`], [`crate::Buffers`]). Blocks
    /// until all ranks have called it, not until it has ended; see [`DeviceCommunicator`]. If calls
    /// use several streams, each waits for the call before. The result has the same bits as that of
    /// the hosts' collective by the same algorithm, but averages of 16-bit and 8-bit floats may be
    /// rounded once less. Memory that other processes can't open (of a pool, say) is copied through
    /// memory that they can. All-to-alls in place copy their input first.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the arguments are wrong in the same way on every rank, and
    /// on all ranks if one passes memory that is not on its device, or a stream that is being
    /// captured into a graph, which is not supported. [`ErrorKind::Mismatch`] on all ranks if one
    /// made a different call, or passed buffers that do not fit. [`ErrorKind::Device`] on all ranks
    /// if the device of one has no memory for what the call needs beside its buffers. In these
    /// cases nothing has been put into a stream, and the communicator stays usable.
    ///
    /// [`ErrorKind::Device`] on all ranks if the device of one failed, [`ErrorKind::RankLost`] if a
    /// rank is gone, [`ErrorKind::Timeout`] if one did not call in time.
    pub fn run_raw(
        &self,
        collective: &Collective,
        buffers: RawDeviceBuffers,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.call(collective, buffers, &[], &stream.0)
    }

    /// Waits until everything in the stream has ended, for at most `timeout` (`None`: as long as a
    /// call may take, `UNISUM_TIMEOUT`). Not collective. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] on all ranks if something in the stream failed; [`ErrorKind::Timeout`]
    /// on all ranks if a collective has not ended in time, with the ranks whose devices are behind;
    /// the error of all ranks if the job was aborted before the collectives ended.
    /// [`ErrorKind::Configuration`], on this rank alone, if the stream is being captured into a
    /// graph: nothing has failed, and the capture goes on.
    pub fn synchronize(
        &self,
        stream: &DeviceStream,
        timeout: Option<Duration>,
    ) -> Result<(), Error> {
        self.check()?;
        self.refuse_capture(stream, buffer::NO_WAITS)?;
        self.await_end(|| stream.0.is_done(), timeout)
    }

    /// Waits for what the devices of all ranks do, up to a moment in a stream.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::synchronize`].
    fn await_event(&self, event: &Event) -> Result<(), Error> {
        self.await_end(|| event.is_done(), None)
    }

    fn await_end(
        &self,
        is_done: impl Fn() -> Result<bool, CudaError>,
        timeout: Option<Duration>,
    ) -> Result<(), Error> {
        let limit = timeout
            .or_else(|| self.host().member.as_ref().map(|member| member.core.job.settings.timeout));
        let begin = Instant::now();
        let mut nap = Duration::ZERO;
        loop {
            match is_done() {
                Ok(true) => return self.check_end(),
                Ok(false) => {}
                Err(error) => return Err(self.fail(&error)),
            }
            if limit.is_some_and(|limit| begin.elapsed() >= limit) {
                return Err(self.overdue(begin.elapsed()));
            }
            std::thread::sleep(nap);
            nap = (nap + Duration::from_micros(1)).min(Duration::from_micros(200));
        }
    }

    /// Whether a result of the calls with [`Reduction::detect_nonfinite`] since this was last asked
    /// has an infinite or NaN element: of an all-reduce, the same on all ranks; of a
    /// reduce-scatter, in this rank's block. Waits for the stream, as
    /// [`DeviceCommunicator::synchronize`] does, and for the last call. Not collective, but ranks
    /// that want the same answer ask after the same calls.
    ///
    /// [`Reduction::detect_nonfinite`]: crate::Reduction::detect_nonfinite
    ///
    /// # Errors
    /// As [`DeviceCommunicator::synchronize`].
    pub fn take_nonfinite(
        &self,
        stream: &DeviceStream,
        timeout: Option<Duration>,
    ) -> Result<bool, Error> {
        self.check()?;
        self.refuse_capture(stream, buffer::NO_WAITS)?;
        {
            // The last call may be in another stream.
            let state = self.lock();
            let followed = if state.has_called { stream.0.wait(&state.ended) } else { Ok(()) };
            followed.map_err(|error| self.fail(&error))?;
        }
        self.synchronize(stream, timeout)?;
        let mut state = self.lock();
        let staged = std::mem::take(&mut state.found);
        let Some(direct) = &state.direct else { return Ok(staged) };
        let found = direct.flags.page().take_total().map_err(|error| self.fail(&error))?;
        Ok(found || staged)
    }

    /// Refuses a stream that is being captured; `what` says what can't be.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] for that; [`ErrorKind::Device`], which ends the job, if the
    /// driver fails.
    fn refuse_capture(&self, stream: &DeviceStream, what: &str) -> Result<(), Error> {
        let refused = buffer::capture(stream, what).map_err(|error| self.fail(&error))?;
        refused.map_or(Ok(()), |error| Err(error.on(self.rank())))
    }

    /// What is in the stream has ended: in order, or because the job has.
    fn check_end(&self) -> Result<(), Error> {
        let Some(verdict) = self.host().verdict() else { return Ok(()) };
        let state = self.lock();
        if let Some(hierarchy) = &state.hierarchy {
            return hierarchy.node().check_end().map_err(|error| self.remember(error));
        }
        let stopped = state.direct.as_ref().map(|direct| direct.flags.page().has_stopped());
        match stopped {
            // It ended before the job did.
            None | Some(Ok(false)) => Ok(()),
            Some(_) => Err(self.remember(verdict)),
        }
    }

    /// The stream has not ended in time.
    fn overdue(&self, after: Duration) -> Error {
        if let Some(hierarchy) = &self.lock().hierarchy {
            return hierarchy.node().overdue(after);
        }
        let behind = self.lock().direct.as_ref().map(|direct| {
            direct.flags.behind(direct.multimem.as_ref().map_or(0, |it| it.launches))
        });
        let own = self.rank();
        let seconds = after.as_secs_f64();
        let waits = format!("device {} of rank {own} has waited {seconds:.1} s", self.ordinal());
        let Some(member) = &self.host().member else {
            let text = format!("{waits} for its stream");
            return Error::new(ErrorKind::Timeout, text).on(own);
        };
        let error = match behind {
            Some(Ok(ranks)) if !ranks.is_empty() => {
                let text = format!("{waits} for the devices of ranks {ranks:?}");
                member.core.runner.membership.device_behind(ranks[0], text)
            }
            // Its own stream has other work: nobody else is to blame, and nothing has failed.
            _ => {
                let text = format!("{waits} for its own stream, in which something has not ended");
                return Error::new(ErrorKind::Timeout, text).on(own);
            }
        };
        self.remember(error.on(own))
    }

    /// Refuses calls that can't succeed: in a forked child, or after a failure.
    fn check(&self) -> Result<(), Error> {
        if unisum_link::fork::current() != self.fork_generation {
            return Err(Error::forked().on(self.rank()));
        }
        self.failed.get().map_or(Ok(()), |failed| Err(failed.repeated()))
    }

    /// Tells all ranks that this one's device failed; the error for the caller.
    fn fail(&self, error: &impl std::fmt::Display) -> Error {
        let rank = self.rank();
        let text = format!("rank {rank}: {error}");
        let error = match &self.host().member {
            Some(member) => {
                let job_rank = member.core.runner.membership.job_rank();
                let text = format!("rank {job_rank}: {error}");
                member.core.runner.membership.device_failed(text)
            }
            None => Error::new(ErrorKind::Device, text).caused_by(vec![rank]),
        };
        self.remember(error.on(rank))
    }

    /// Tells all ranks that a call failed half-way on this one; the error for the caller.
    fn give_up(&self, error: Error) -> Error {
        match &self.host().member {
            Some(member) if self.host().verdict().is_none() => {
                let membership = &member.core.runner.membership;
                let text = format!("rank {}: {error}", membership.job_rank());
                self.remember(membership.device_failed(text).on(self.rank()))
            }
            _ => self.remember(error),
        }
    }

    /// The error for this call and, repeated, for all later ones.
    fn remember(&self, error: Error) -> Error {
        self.abort.set();
        // The first one holds.
        let _ = self.failed.set(error.clone());
        error
    }

    /// After the job has failed, nobody hears who leaves: ranks tell each other through their
    /// devices that their streams have ended. Whether all did that are not gone.
    fn await_quiet(&self, host: &Communicator) -> bool {
        let state = self.lock();
        let Some(direct) = &state.direct else { return true };
        if let Err(error) = direct.flags.say_quiet(&self.device) {
            tracing::debug!("{error}");
            return false;
        }
        let lost = host.verdict().filter(|verdict| verdict.kind() == ErrorKind::RankLost);
        let lost = lost.map_or(Vec::new(), |verdict| verdict.failed_ranks().to_vec());
        let of_job = host.member.as_ref().map(|it| it.core.runner.membership.ranks().to_vec());
        let is_gone = |rank: Rank| of_job.as_ref().is_some_and(|ranks| lost.contains(&ranks[rank]));
        let until = Instant::now() + PATIENCE;
        loop {
            match direct.flags.are_quiet(is_gone) {
                Ok(true) => return true,
                Ok(false) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(false) | Err(_) => return false,
            }
        }
    }

    fn host(&self) -> &Communicator {
        self.host.as_ref().expect("there until the drop")
    }

    const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DeviceCommunicator {
    fn drop(&mut self) {
        let host = self.host.take();
        let rank = host.as_ref().map_or(0, Communicator::rank);
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if unisum_link::fork::current() != self.fork_generation {
            // The driver does not work in a child: nothing may be given back to it.
            std::mem::forget((host, state.direct.take(), std::mem::take(&mut state.exports)));
            std::mem::forget((state.scratch.take(), state.bounce.take(), state.staging.take()));
            std::mem::forget(state.hierarchy.take());
            return;
        }
        // What the device still does reads memory of the others.
        let limit = host.as_ref().and_then(|host| host.member.as_ref());
        let limit = limit.map(|member| member.core.job.settings.timeout);
        let begin = Instant::now();
        while state.has_called && state.ended.is_done() == Ok(false) {
            if limit.is_some_and(|limit| begin.elapsed() > limit) {
                self.abort.set();
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let is_over = host.as_ref().is_some_and(|host| host.verdict().is_some());
        let are_quiet = is_over && host.as_ref().is_some_and(|host| self.await_quiet(host));
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let member = host.as_ref().and_then(|host| host.member.as_ref());
        let farewell = member.map(|member| member.core.runner.membership.farewell());
        if let Some(direct) = &mut state.direct {
            direct.imports = Imports::default();
        }
        // Tells the others that this rank has nothing of theirs open any more.
        drop(host);
        let all_left = match is_over {
            true => are_quiet,
            false => farewell.is_none_or(|it| it.await_others(Instant::now() + PATIENCE)),
        };
        if !all_left && state.direct.is_some() {
            tracing::debug!("memory stays allocated that other ranks have open");
            std::mem::forget((state.direct.take(), std::mem::take(&mut state.exports)));
        }
        drop((std::mem::take(&mut state.exports), state.direct.take()));
        warn_of_unclosed(rank);
    }
}

/// Says that the driver has failed to let go of memory, if it was not said before.
fn warn_of_unclosed(rank: Rank) {
    static TOLD: AtomicUsize = AtomicUsize::new(0);
    let calls = unisum_cuda_ipc::unclosed();
    // Relaxed: a number alone.
    if TOLD.fetch_max(calls, Ordering::Relaxed) < calls {
        warning!(
            "rank {rank}: {calls} calls of the driver have failed that let go of memory which \
             processes share: it may stay allocated until they end"
        );
    }
}
