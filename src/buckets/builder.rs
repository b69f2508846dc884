//! Building a layer of buckets: settings, agreement, memory.

use std::any::TypeId;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use unisum_kernels::Panic;
use unisum_link::handshake::job_hash;

use super::elastic::Continuity;
use super::hook::{AllReduce, Hook, panicked_in};
use super::layout::{Layout, Limits};
use super::parameter::{self, Parameter};
use super::plan::Plan;
use super::shard::ReduceScatter;
use super::worker::{Core, Settings};
use super::{Buckets, Compressed, LowRank};
use crate::communicator::groups::Making;
use crate::{Communicator, Error, ErrorKind, ReduceOp};

/// Settings of [`Buckets`], the same on all ranks.
#[derive(Debug)]
pub struct Builder<'c> {
    communicator: &'c Communicator,
    limits: Limits,
    settings: Settings,
    layout: Option<Vec<u8>>,
    hook: Box<dyn Hook>,
    /// Whether the hook sends less than there is.
    compresses: bool,
}

impl<'c> Builder<'c> {
    pub(super) fn new(communicator: &'c Communicator) -> Self {
        let settings = Settings {
            unused_parameters: false,
            static_graph: false,
            uneven_inputs: false,
            relayout: true,
            acknowledges: false,
            is_sharded: false,
        };
        Self {
            communicator,
            limits: Limits::DEFAULT,
            settings,
            layout: None,
            hook: Box::new(AllReduce),
            compresses: false,
        }
    }

    /// The maximum size of a bucket, in bytes; 25 MiB by default. A larger parameter has a bucket
    /// of its own. Towards the end of the model, each bucket holds at most a quarter of what is
    /// left, so that little remains to be reduced when the last gradient is ready.
    #[must_use]
    pub const fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.limits.bytes = bytes;
        self
    }

    /// The maximum size of the first bucket, so that communication begins early, and of the last,
    /// which no computation hides; 1 MiB by default.
    #[must_use]
    pub const fn end_bucket_bytes(mut self, bytes: usize) -> Self {
        self.limits.end_bytes = bytes;
        self
    }

    /// Whether a rank may end a step without a gradient for some parameters, which then contributes
    /// zeros. Otherwise that is an error, since it is usually a mistake. Default: no.
    #[must_use]
    pub const fn unused_parameters(mut self, allowed: bool) -> Self {
        self.settings.unused_parameters = allowed;
        self
    }

    /// Declares that a parameter that a rank does not use in its first step is never used: buckets
    /// do not wait for it. Implies [`Builder::unused_parameters`]. Default: no.
    #[must_use]
    pub const fn static_graph(mut self, is_static: bool) -> Self {
        self.settings.static_graph = is_static;
        self
    }

    /// Allows ranks to run out of data at different times ([`Buckets::join`]): each step then
    /// begins with an all-reduce of one number. Default: no.
    #[must_use]
    pub const fn uneven_inputs(mut self, uneven: bool) -> Self {
        self.settings.uneven_inputs = uneven;
        self
    }

    /// Whether buckets are laid out once more after the first step, in the order in which rank 0's
    /// gradients became ready. Default: yes, unless a layout is given.
    #[must_use]
    pub const fn relayout(mut self, relayout: bool) -> Self {
        self.settings.relayout = relayout;
        self
    }

    /// Uses a saved layout ([`Layout::to_bytes`]), and keeps it.
    #[must_use]
    pub fn layout(mut self, saved: &[u8]) -> Self {
        self.layout = Some(saved.to_vec());
        self.settings.relayout = false;
        self
    }

    /// The hook that reduces each bucket when it is ready; [`AllReduce`] by default. A hook that is
    /// not part of this library costs one more all-reduce of a byte in each step, by which all
    /// ranks learn whether it panicked in [`Hook::settle`].
    #[must_use]
    pub fn hook(mut self, hook: impl Hook + 'static) -> Self {
        self.settings.acknowledges = !is_own(&hook);
        self.compresses = compresses(&hook);
        self.hook = Box::new(hook);
        self
    }

    /// Gives each rank only the averages of its share of each bucket ([`Buckets::shard`]), as in
    /// ZeRO-2 and FSDP; the rest of the gradients is unspecified after a step. Replaces the hook,
    /// and keeps the layout, so that what a rank stores for its shards stays in place.
    #[must_use]
    pub fn sharded(mut self) -> Self {
        self.limits.pieces = self.communicator.world();
        self.settings.is_sharded = true;
        self.settings.acknowledges = false;
        self.compresses = false;
        self.hook = Box::new(ReduceScatter);
        self.settings.relayout = false;
        self
    }

    /// Builds the layer for a model's parameters, in the order in which they were registered:
    /// buckets hold them in reverse.
    ///
    /// Collective: every rank of the communicator calls it, with the same parameters and settings.
    /// The layer has its own communicator and thread, so that its reductions never mix with other
    /// collectives of the program.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`], on all ranks, if parameters or settings differ between ranks (the
    /// first difference is named) or are invalid; [`ErrorKind::Panicked`] if the hook panicked on a
    /// rank; [`ErrorKind::Configuration`] for sharded buckets in a job that repeats another one
    /// ([`crate::Builder::replay`]); as [`Communicator::split`].
    pub fn build(mut self, parameters: &[Parameter]) -> Result<Buckets, Error> {
        let epoch = self.communicator.epoch();
        if self.settings.is_sharded && epoch.is_some_and(|epoch| epoch.repeats()) {
            let text = "a job has sharded buckets, whose steps can't be repeated (UNISUM_REPLAY)";
            return Err(Error::new(ErrorKind::Configuration, text).on(self.communicator.rank()));
        }
        let lineage = epoch.map(|epoch| epoch.lineage.clone());
        let (is_elastic, is_sharded) = (epoch.is_some(), self.settings.is_sharded);
        let mut continuity = epoch.and_then(|epoch| Continuity::new(epoch, is_sharded));
        let communicator = self.communicator.duplicate_for(&Making::Buckets)?;
        let rank = communicator.rank();
        if self.compresses && rank == 0 {
            warn_of_compression(&communicator);
        }
        let name = Panic::catch(|| self.hook.name());
        let name = name.map_err(|panic| communicator.panicked(&panicked_in("name", &panic)))?;
        let (layout, signature) = self.agree(&communicator, parameters, &name)?;
        let plan = Plan::new(parameters.into(), layout, &communicator);
        let plan = plan.and_then(|plan| {
            continuity.as_ref().map_or(Ok(()), |it| it.reserve(&plan)).map(|()| plan)
        });
        let why = plan.as_ref().map_or_else(ToString::to_string, |_| String::new());
        refuse_any(&communicator, &communicator.exchange(why.into_bytes())?)?;
        let mut steps = 0;
        if is_elastic {
            let (all, is_further) = count_steps(&communicator, 0, continuity.is_none())?;
            if is_further {
                // On all ranks or none: the layer before it may live on some only.
                if continuity.take().is_some() {
                    unisum_link::warning!(
                        "these gradient buckets end when the view changes: another rank has not \
                         closed earlier ones of the job yet"
                    );
                }
            } else {
                self.settings.relayout = false;
                steps = all;
                self.enter(&communicator, steps)?;
            }
        }
        let continuity = continuity.map(|it| it.with_signature(signature));
        let job = (continuity, lineage);
        let core = Arc::new(Core::new(communicator, job, self.settings, self.hook));
        core.set_steps(steps);
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

    /// The hook goes on as that of the ranks that were there before this one.
    fn enter(&mut self, communicator: &Communicator, steps: u64) -> Result<(), Error> {
        if steps == 0 {
            return Ok(());
        }
        let told = communicator.share_state(None)?.unwrap_or_default();
        let hook = &mut self.hook;
        let restore = || if told.is_empty() { Ok(()) } else { hook.restore(&told) };
        let restored = Panic::catch(restore);
        let restored =
            restored.map_err(|panic| communicator.panicked(&panicked_in("restore", &panic)))?;
        let why = restored.err().unwrap_or_default();
        refuse_any(communicator, &communicator.exchange(why.into_bytes())?)
    }

    /// The settings by name, for ranks to compare, separated as
    /// [`parameter::first_difference`] expects.
    fn told(&self, hook: &str, layout: &Layout) -> String {
        let Limits { bytes, end_bytes, pieces } = self.limits;
        let Settings { unused_parameters, static_graph, uneven_inputs, relayout, .. } =
            self.settings;
        let Settings { acknowledges, is_sharded, .. } = self.settings;
        let layout = match &self.layout {
            Some(_) => {
                let hash = u128::from_le_bytes(job_hash(&format!("{layout:?}")));
                format!("layout saved ({hash:032x})")
            }
            None => "layout none saved".to_owned(),
        };
        let hook = hook.replace(parameter::SETTINGS_SEPARATOR, ", ");
        [
            format!("bucket_bytes {bytes}"),
            format!("end_bucket_bytes {end_bytes}"),
            if is_sharded { format!("sharded by {pieces}") } else { "not sharded".to_owned() },
            format!("unused_parameters {unused_parameters}"),
            format!("static_graph {static_graph}"),
            format!("uneven_inputs {uneven_inputs}"),
            format!("relayout {relayout}"),
            layout,
            format!("hook {hook}"),
            format!("a hook of {}", if acknowledges { "the program's" } else { "unisum's" }),
        ]
        .join(parameter::SETTINGS_SEPARATOR)
    }

    /// The layout, if all ranks have the same parameters and settings, and these in words.
    fn agree(
        &self,
        communicator: &Communicator,
        parameters: &[Parameter],
        hook: &str,
    ) -> Result<(Layout, String), Error> {
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
        let settings = self.told(hook, &layout);
        let signature = parameter::signature(&settings, parameters);
        check_signature(communicator, &signature)?;
        Ok((layout, signature))
    }
}

/// Checks that all ranks have the same parameters and settings.
pub(super) fn check_signature(communicator: &Communicator, signature: &str) -> Result<(), Error> {
    let hashes = communicator.exchange(job_hash(signature).to_vec())?;
    let Some(other) = hashes.iter().position(|hash| *hash != hashes[0]) else { return Ok(()) };
    let signatures = communicator.exchange(signature.as_bytes().to_vec())?;
    let [first, second] = [0, other].map(|rank| String::from_utf8_lossy(&signatures[rank]));
    let text = parameter::first_difference((0, &first), (other, &second));
    let error = Error::new(ErrorKind::Mismatch, text).on(communicator.rank());
    Err(error.caused_by(vec![0, other]))
}

/// How many steps the job has made, as the rank says that has made most, and whether any rank has
/// another layer of the job besides this one.
fn count_steps(
    communicator: &Communicator,
    own: u64,
    is_further: bool,
) -> Result<(u64, bool), Error> {
    let mut told = [own, u64::from(is_further)];
    communicator.all_reduce(&mut told, ReduceOp::Max)?;
    Ok((told[0], told[1] != 0))
}

/// The part of those that are there already while newcomers build their layers: takes part in the
/// same calls. `steps` were made, and `common` is what newcomers' hooks need. How many steps the
/// job has made.
pub(super) fn welcome(
    communicator: &Communicator,
    signature: &str,
    (steps, common): (u64, &[u8]),
) -> Result<u64, Error> {
    refuse_any(communicator, &communicator.exchange(Vec::new())?)?;
    check_signature(communicator, signature)?;
    refuse_any(communicator, &communicator.exchange(Vec::new())?)?;
    // A newcomer has no other layer.
    let (all, _) = count_steps(communicator, steps, false)?;
    if all > 0 {
        communicator.share_state((steps > 0).then_some(common))?;
        refuse_any(communicator, &communicator.exchange(Vec::new())?)?;
    }
    Ok(all)
}

/// Warns if nothing travels that could be smaller.
fn warn_of_compression(communicator: &Communicator) {
    let world = communicator.world();
    if world > 1 && communicator.local_size() == world {
        unisum_link::warning!(
            "gradients are compressed, and all ranks are on one host, where that takes longer than \
             it saves: it is for links between hosts of some Gbit/s and less"
        );
    }
}

/// Whether a hook sends less than there is.
fn compresses<H: Hook + 'static>(_: &H) -> bool {
    [TypeId::of::<Compressed>(), TypeId::of::<LowRank>()].contains(&TypeId::of::<H>())
}

/// Whether a hook is of this library, whose hooks do not panic.
fn is_own<H: Hook + 'static>(_: &H) -> bool {
    let own = [TypeId::of::<AllReduce>(), TypeId::of::<Compressed>(), TypeId::of::<LowRank>()];
    own.contains(&TypeId::of::<H>())
}

/// The error of all ranks if one gave a reason.
pub(super) fn refuse_any(communicator: &Communicator, reasons: &[Vec<u8>]) -> Result<(), Error> {
    let Some(failed_rank) = reasons.iter().position(|reason| !reason.is_empty()) else {
        return Ok(());
    };
    let why = String::from_utf8_lossy(&reasons[failed_rank]);
    let text = format!("rank {failed_rank} can't make gradient buckets: {why}");
    let error = Error::new(ErrorKind::Mismatch, text).on(communicator.rank());
    Err(error.caused_by(vec![failed_rank]))
}
