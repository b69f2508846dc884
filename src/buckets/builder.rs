//! How a layer of buckets is made: settings, agreement, memory.

use std::any::TypeId;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use unisum_kernels::Panic;
use unisum_link::handshake::job_hash;

use super::hook::{AllReduce, Hook, panicked_in};
use super::layout::{Layout, Limits};
use super::parameter::{self, Parameter};
use super::plan::Plan;
use super::shard::ReduceScatter;
use super::worker::{Core, Settings};
use super::{Buckets, Compressed, LowRank};
use crate::groups::Making;
use crate::{Communicator, Error, ErrorKind};

/// Settings of [`Buckets`], the same on all ranks.
#[derive(Debug)]
pub struct Builder<'c> {
    communicator: &'c Communicator,
    limits: Limits,
    settings: Settings,
    layout: Option<Vec<u8>>,
    hook: Box<dyn Hook>,
}

impl<'c> Builder<'c> {
    pub(super) fn new(communicator: &'c Communicator) -> Self {
        let settings = Settings {
            unused_parameters: false,
            static_graph: false,
            uneven_inputs: false,
            relayout: true,
            acknowledges: false,
        };
        let limits = Limits { bytes: 25 << 20, end_bytes: 1 << 20, pieces: 1 };
        Self { communicator, limits, settings, layout: None, hook: Box::new(AllReduce) }
    }

    /// How large buckets get, in bytes; 25 MiB if nothing is said. A larger parameter has a bucket
    /// of its own. Towards the end of the model each holds at most a quarter of what is left, so
    /// that little remains to be reduced when the last gradient is ready.
    #[must_use]
    pub const fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.limits.bytes = bytes;
        self
    }

    /// How large the first bucket gets, so that communication begins early, and the last, which no
    /// computation hides; 1 MiB if nothing is said.
    #[must_use]
    pub const fn end_bucket_bytes(mut self, bytes: usize) -> Self {
        self.limits.end_bytes = bytes;
        self
    }

    /// Whether a rank may end a step without a gradient for some parameters: it then puts in
    /// zeros. Without it that is an error, since it is mostly a mistake. Default: no.
    #[must_use]
    pub const fn unused_parameters(mut self, allowed: bool) -> Self {
        self.settings.unused_parameters = allowed;
        self
    }

    /// What a rank does not use in its first step it never uses: buckets do not wait for it.
    /// Implies [`Builder::unused_parameters`]. Default: no.
    #[must_use]
    pub const fn static_graph(mut self, is_static: bool) -> Self {
        self.settings.static_graph = is_static;
        self
    }

    /// Ranks may run out of data at different times ([`Buckets::join`]): each step then begins with
    /// an all-reduce of one number. Default: no.
    #[must_use]
    pub const fn uneven_inputs(mut self, uneven: bool) -> Self {
        self.settings.uneven_inputs = uneven;
        self
    }

    /// Whether buckets are laid out anew, once, in the order in which rank 0's gradients became
    /// ready in the first step. Default: yes, unless a layout is given.
    #[must_use]
    pub const fn relayout(mut self, relayout: bool) -> Self {
        self.settings.relayout = relayout;
        self
    }

    /// Takes a layout that was saved ([`Layout::to_bytes`]), and keeps it.
    #[must_use]
    pub fn layout(mut self, saved: &[u8]) -> Self {
        self.layout = Some(saved.to_vec());
        self.settings.relayout = false;
        self
    }

    /// What is done with a bucket when it is ready; [`AllReduce`] if nothing is said. A hook that
    /// is not of this library costs one more all-reduce of a byte in each step, by which all ranks
    /// learn whether it panicked in [`Hook::settle`].
    #[must_use]
    pub fn hook(mut self, hook: impl Hook + 'static) -> Self {
        self.settings.acknowledges = !is_own(&hook);
        self.hook = Box::new(hook);
        self
    }

    /// Each rank gets the averages of its share of each bucket only ([`Buckets::shard`]), as in
    /// ZeRO-2 and FSDP; the rest of the gradients is unspecified after a step. Takes the place of a
    /// hook, and keeps the layout, so that what a rank keeps for its shards stays where it is.
    #[must_use]
    pub fn sharded(mut self) -> Self {
        self.limits.pieces = self.communicator.world();
        self.settings.acknowledges = false;
        self.hook = Box::new(ReduceScatter);
        self.settings.relayout = false;
        self
    }

    /// Makes the layer for a model's parameters, in the order in which they were registered:
    /// buckets hold them backwards.
    ///
    /// Collective: every rank of the communicator calls it, with the same parameters and settings.
    /// The layer has a communicator and a thread of its own, so that its reductions never mix with
    /// other collectives of the program.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`], on all ranks alike, if parameters or settings differ between ranks
    /// (the first difference is named) or can't be; [`ErrorKind::Panicked`] if the hook did on a
    /// rank; as [`Communicator::split`].
    pub fn build(self, parameters: &[Parameter]) -> Result<Buckets, Error> {
        let communicator = self.communicator.duplicate_for(&Making::Buckets)?;
        let rank = communicator.rank();
        let name = Panic::catch(|| self.hook.name());
        let name = name.map_err(|panic| communicator.panicked(&panicked_in("name", &panic)))?;
        let layout = self.agree(&communicator, parameters, &name)?;
        let plan = Plan::new(parameters.into(), layout, &communicator);
        let why = plan.as_ref().map_or_else(ToString::to_string, |_| String::new());
        refuse_any(&communicator, &communicator.exchange(why.into_bytes())?)?;
        let core = Arc::new(Core::new(communicator, self.settings, self.hook));
        let (sender, flights) = mpsc::channel();
        let worker = core.clone();
        let thread = thread::Builder::new()
            .name("unisum-buckets".into())
            .spawn(move || worker.work(&flights))
            .map_err(|error| {
                let text = format!("starting a thread for gradient buckets: {error}");
                Error::new(ErrorKind::Memory, text).on(rank)
            })?;
        Ok(Buckets::new(core, plan?.into(), self.limits, (sender, thread)))
    }

    /// The layout, if all ranks have the same parameters and settings.
    fn agree(
        &self,
        communicator: &Communicator,
        parameters: &[Parameter],
        hook: &str,
    ) -> Result<Layout, Error> {
        let layout = parameter::check(parameters).and_then(|()| match &self.layout {
            Some(saved) => Layout::from_bytes(saved, parameters, self.limits.pieces),
            None => {
                let order: Vec<usize> = (0..parameters.len()).rev().collect();
                Ok(Layout::new(0, parameters, &order, self.limits))
            }
        });
        let why = layout.as_ref().err().cloned().unwrap_or_default();
        refuse_any(communicator, &communicator.exchange(why.into_bytes())?)?;
        let layout = layout.map_err(|text| Error::new(ErrorKind::Mismatch, text))?;
        let settings = format!(
            "{:?} {:?} {hook}, saved layout {:x?}",
            self.limits,
            self.settings,
            self.layout.as_ref().map(|_| job_hash(&format!("{layout:?}")))
        );
        let signature = parameter::signature(&settings, parameters);
        let hashes = communicator.exchange(job_hash(&signature).to_vec())?;
        let Some(other) = hashes.iter().position(|hash| *hash != hashes[0]) else {
            return Ok(layout);
        };
        let signatures = communicator.exchange(signature.into_bytes())?;
        let [first, second] = [0, other].map(|rank| String::from_utf8_lossy(&signatures[rank]));
        let text = parameter::first_difference((0, &first), (other, &second));
        let error = Error::new(ErrorKind::Mismatch, text).on(communicator.rank());
        Err(error.caused_by(vec![0, other]))
    }
}

/// Whether a hook is of this library, whose hooks do not panic.
fn is_own<H: Hook + 'static>(_: &H) -> bool {
    let own = [TypeId::of::<AllReduce>(), TypeId::of::<Compressed>(), TypeId::of::<LowRank>()];
    own.contains(&TypeId::of::<H>())
}

/// The error of all ranks if one gave a reason.
pub(super) fn refuse_any(communicator: &Communicator, reasons: &[Vec<u8>]) -> Result<(), Error> {
    let Some(culprit) = reasons.iter().position(|reason| !reason.is_empty()) else {
        return Ok(());
    };
    let why = String::from_utf8_lossy(&reasons[culprit]);
    let text = format!("rank {culprit} can't make gradient buckets: {why}");
    let error = Error::new(ErrorKind::Mismatch, text).on(communicator.rank());
    Err(error.caused_by(vec![culprit]))
}
