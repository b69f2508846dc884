//! Gradient buckets.

use std::ffi::{c_char, c_int, c_void};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use unisum::buckets::{
    Buckets, Builder, Compressed, Encoding, Layout, LowRank, Parameter, Step, StepReport,
};
use unisum::{Dtype, Element};

use crate::communicator::{Comm, unisum_comm};
use crate::elastic::{Change, unisum_step_change};
use crate::handles::{self, Object};
use crate::memory::{check, check_place, elements, list, put, text};
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::dtype;

/// Gradient buckets: the layer that training calls during the backward pass.
#[derive(Debug)]
pub struct unisum_buckets {
    _private: [u8; 0],
}

/// A parameter of a model.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_parameter {
    /// Its name, which no other has.
    pub name: *const c_char,
    /// Its shape.
    pub shape: *const usize,
    /// How many numbers the shape has.
    pub dimensions: usize,
    /// The type of its gradient: UNISUM_F16, UNISUM_BF16, UNISUM_F32 or UNISUM_F64.
    pub dtype: u32,
    /// How often the model uses it: its gradient is final when it was marked ready so often. 0 is
    /// 1.
    pub uses: u32,
}

/// Settings of buckets, the same on all ranks; a structure of zeros has the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_bucket_options {
    /// How large buckets get; 0 is 25 MiB.
    pub bucket_bytes: usize,
    /// How large the first and the last get; 0 is 1 MiB.
    pub end_bucket_bytes: usize,
    /// unisum_bucket_flags, added.
    pub flags: u32,
    /// As what f32 gradients travel: 0 as they are, or UNISUM_BF16, UNISUM_F16, UNISUM_F8E4M3,
    /// UNISUM_F8E5M2 or UNISUM_I8, with error feedback.
    pub encoding: u32,
    /// The rank of PowerSGD's approximation; 0 for none. Not with an encoding.
    pub low_rank: u32,
    /// A layout that unisum_buckets_layout gave, to be used and kept; else NULL.
    pub layout: *const c_void,
    /// How many bytes it has.
    pub layout_bytes: usize,
}

/// Whether a model does not use all parameters, and the like.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum unisum_bucket_flags {
    /// A rank may end a step without a gradient for some parameters: it then puts in zeros.
    UNISUM_UNUSED_PARAMETERS = 1,
    /// What a rank does not use in its first step it never uses.
    UNISUM_STATIC_GRAPH = 2,
    /// Ranks may run out of data at different times: unisum_buckets_join.
    UNISUM_UNEVEN_INPUTS = 4,
    /// Buckets are not laid out anew after the first step.
    UNISUM_KEEP_LAYOUT = 8,
    /// A rank gets the averages of its shard of each bucket only, as in ZeRO-2 and FSDP:
    /// unisum_buckets_shard. Keeps the layout; not with an encoding or a low rank.
    UNISUM_SHARDED = 16,
    /// Averages are not looked at for what is infinite or NaN. Of unisum_device_buckets only.
    UNISUM_IGNORE_NONFINITE = 32,
}

/// What a step tells. Fields may be added at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_step_report {
    /// Whether some averaged gradient is infinite or NaN: the same on all ranks.
    pub nonfinite: bool,
    /// How many ranks had gradients; the average is over these.
    pub participants: u32,
    /// What the program waited for communication after it had computed, in seconds.
    pub exposed_s: f64,
    /// How long buckets were being reduced, in seconds.
    pub communicated_s: f64,
    /// How the view of an elastic job changed meanwhile; NULL if it did not. Valid until the next
    /// step of these buckets ends, or they are freed; in a join, until the update returns.
    pub change: *const unisum_step_change,
    /// Whether processes ask to be let into an elastic job, and all ranks know: the same on all
    /// ranks, so that all can call unisum_buckets_admit.
    pub newcomers: bool,
}

/// What unisum_buckets_join calls after each step of the others, whose averages all ranks get: the
/// optimiser's step. `gradients` and `counts` have one entry for each parameter. Gives 0 to go on;
/// anything else ends unisum_buckets_join with UNISUM_CALLBACK_FAILED. It calls nothing of these
/// buckets.
pub type unisum_update = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        report: *const unisum_step_report,
        gradients: *const *mut c_void,
        counts: *const usize,
        parameters: usize,
    ) -> c_int,
>;

pub(crate) struct Layer(RwLock<State>);

pub(crate) struct State {
    /// The step under way, which borrows the buckets. Before them: it is dropped first.
    step: Option<Step<'static>>,
    buckets: Box<Buckets>,
    is_sharded: bool,
    /// What the last report points to.
    change: Option<Box<Change>>,
}

impl Object for Layer {
    const KIND: usize = 5;
    const NAME: &'static str = "buckets";
}

impl Layer {
    /// The layer for itself alone. Nobody waits: in the update of a join that would be for ever.
    pub(crate) fn alone(&self) -> Outcome<RwLockWriteGuard<'_, State>> {
        self.0.try_write().or_else(|_| invalid(BUSY))
    }

    pub(crate) fn shared(&self) -> Outcome<RwLockReadGuard<'_, State>> {
        self.0.try_read().or_else(|_| invalid(BUSY))
    }
}

pub(crate) const BUSY: &str =
    "another call of these buckets, which needs them alone, is under way or panicked";

impl State {
    fn step(&self) -> Outcome<&Step<'static>> {
        let none = "no step is under way: unisum_buckets_begin begins one";
        self.step.as_ref().map_or_else(|| invalid(none), Ok)
    }

    /// The type of each parameter's elements.
    pub(crate) fn dtypes(&self) -> Vec<Dtype> {
        self.buckets.parameters().iter().map(Parameter::dtype).collect()
    }

    pub(crate) const fn is_sharded(&self) -> bool {
        self.is_sharded
    }

    /// The layout of the buckets.
    pub(crate) fn layout(&self) -> &Layout {
        self.step.as_ref().map_or_else(|| self.buckets.layout(), Step::layout)
    }

    /// The type of a bucket's elements, and whether there is such a bucket.
    pub(crate) fn dtype_of_bucket(&self, bucket: usize) -> Outcome<Dtype> {
        let mut buckets = self.layout().buckets();
        let count = buckets.len();
        match buckets.nth(bucket).and_then(|parameters| parameters.first()) {
            Some(&parameter) => self.dtype(parameter),
            None => invalid(format!("there is no bucket {bucket} among {count}")),
        }
    }

    /// The buckets between two steps.
    pub(crate) fn idle(&mut self) -> Outcome<&mut Buckets> {
        match self.step {
            Some(_) => invalid("a step is under way: unisum_buckets_wait ends it"),
            None => Ok(&mut self.buckets),
        }
    }

    pub(crate) fn dtype(&self, parameter: usize) -> Outcome<Dtype> {
        let parameters = self.buckets.parameters();
        let known = parameters.get(parameter).map(Parameter::dtype);
        known.map_or_else(
            || invalid(format!("there is no parameter {parameter} among {}", parameters.len())),
            Ok,
        )
    }
}

/// Evaluates an expression in which `$element` is the Rust type of a gradient's elements.
macro_rules! for_gradient {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            unisum::Dtype::F16 => {
                type $element = half::f16;
                $body
            }
            unisum::Dtype::Bf16 => {
                type $element = half::bf16;
                $body
            }
            unisum::Dtype::F32 => {
                type $element = f32;
                $body
            }
            unisum::Dtype::F64 => {
                type $element = f64;
                $body
            }
            other => $crate::status::invalid(format!("gradients are no {other}")),
        }
    };
}
pub(crate) use for_gradient;

/// Makes buckets for a model's parameters, in the order in which they were registered. NULL options
/// are the defaults. Freed by unisum_buckets_free. Collective: every rank of the communicator,
/// which they may outlive, calls it with the same parameters and settings. Blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_create(
    comm: *const unisum_comm,
    parameters: *const unisum_parameter,
    count: usize,
    options: *const unisum_bucket_options,
    buckets: *mut *mut unisum_buckets,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(buckets, "the buckets")?;
        // SAFETY: C promises so many.
        let parameters = unsafe { list(parameters, count, "the parameters") }?;
        // SAFETY: C promises names and shapes.
        let parameters = parameters.iter().map(|it| unsafe { parameter(it) });
        let parameters = parameters.collect::<Outcome<Vec<_>>>()?;
        let mut builder = Buckets::builder(&comm.communicator);
        let mut is_sharded = false;
        if !options.is_null() {
            // SAFETY: C promises one.
            let options = unsafe { list(options, 1, "the options") }?;
            is_sharded = options[0].flags & unisum_bucket_flags::UNISUM_SHARDED as u32 != 0;
            // SAFETY: C promises a layout.
            builder = unsafe { configured(builder, &options[0]) }?;
        }
        let made = Box::new(builder.build(&parameters)?);
        let layer =
            Layer(RwLock::new(State { step: None, buckets: made, is_sharded, change: None }));
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(layer, buckets) };
        Ok(())
    })
}

/// # Safety
/// C promises its name and its shape.
pub(crate) unsafe fn parameter(asked: &unisum_parameter) -> Outcome<Parameter> {
    // SAFETY: the caller vouches for it.
    let name = unsafe { text(asked.name, "the name of a parameter") }?;
    // SAFETY: as above.
    let shape = unsafe { list(asked.shape, asked.dimensions, "the shape of a parameter") }?;
    Ok(Parameter::new(name, shape, dtype(asked.dtype)?).used(asked.uses.max(1) as usize))
}

/// # Safety
/// C promises a layout.
unsafe fn configured<'c>(
    mut builder: Builder<'c>,
    options: &unisum_bucket_options,
) -> Outcome<Builder<'c>> {
    use unisum_bucket_flags::*;
    let all = [
        UNISUM_UNUSED_PARAMETERS,
        UNISUM_STATIC_GRAPH,
        UNISUM_UNEVEN_INPUTS,
        UNISUM_KEEP_LAYOUT,
        UNISUM_SHARDED,
    ];
    let known: u32 = all.into_iter().map(|flag| flag as u32).sum();
    if options.flags & !known != 0 {
        return invalid(format!("there are flags that do not exist among {:#x}", options.flags));
    }
    let is_set = |flag: unisum_bucket_flags| options.flags & flag as u32 != 0;
    if options.bucket_bytes > 0 {
        builder = builder.bucket_bytes(options.bucket_bytes);
    }
    if options.end_bucket_bytes > 0 {
        builder = builder.end_bucket_bytes(options.end_bucket_bytes);
    }
    builder = builder
        .unused_parameters(is_set(UNISUM_UNUSED_PARAMETERS))
        .static_graph(is_set(UNISUM_STATIC_GRAPH))
        .uneven_inputs(is_set(UNISUM_UNEVEN_INPUTS))
        .relayout(!is_set(UNISUM_KEEP_LAYOUT));
    if !options.layout.is_null() {
        let layout = options.layout.cast::<u8>();
        // SAFETY: the caller vouches for it.
        builder = builder.layout(unsafe { list(layout, options.layout_bytes, "the layout") }?);
    }
    match (options.encoding, options.low_rank) {
        (0, 0) if is_set(UNISUM_SHARDED) => Ok(builder.sharded()),
        (0, 0) => Ok(builder),
        _ if is_set(UNISUM_SHARDED) => invalid("sharded buckets take no encoding and no low rank"),
        (0, rank) => Ok(builder.hook(LowRank::new(rank as usize))),
        (code, 0) => {
            let encoding = match dtype(code)? {
                Dtype::Bf16 => Encoding::Bf16,
                Dtype::F16 => Encoding::F16,
                Dtype::F8E4M3 => Encoding::F8E4M3,
                Dtype::F8E5M2 => Encoding::F8E5M2,
                Dtype::I8 => Encoding::Int8,
                other => return invalid(format!("gradients can't travel as {other}")),
            };
            Ok(builder.hook(Compressed::new(encoding)))
        }
        _ => invalid("an encoding and a low rank at once"),
    }
}

/// Begins a step whose gradients, with those that were accumulated before, are averaged over all
/// ranks. Collective: every rank begins its steps in the same order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_begin(buckets: *const unisum_buckets) -> unisum_status {
    guard(|| begin(buckets, |buckets| buckets.begin()))
}

/// Begins a step whose gradients stay on this rank and add to those of the next steps.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_begin_accumulating(
    buckets: *const unisum_buckets,
) -> unisum_status {
    guard(|| begin(buckets, |buckets| buckets.begin_accumulating()))
}

fn begin(
    buckets: *const unisum_buckets,
    begin: impl for<'b> FnOnce(&'b mut Buckets) -> Result<Step<'b>, unisum::Error>,
) -> Outcome {
    let layer = handles::get::<Layer, _>(buckets)?;
    let mut state = layer.alone()?;
    let step = begin(state.idle()?)?;
    // SAFETY: the step is dropped before the buckets, which stay where they are in their box, and
    // which nobody uses while there is a step: `idle` sees to it.
    let step = unsafe { std::mem::transmute::<Step<'_>, Step<'static>>(step) };
    state.step = Some(step);
    Ok(())
}

/// The gradient of a parameter, in the memory that is reduced: zero if it is the first view since
/// the last reduction. It is the program's until it is marked ready. Threads may view different
/// parameters at once. `count`, which may be NULL, gets how many elements it has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_view(
    buckets: *const unisum_buckets,
    parameter: usize,
    gradient: *mut *mut c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(gradient, "the gradient")?;
        let state = layer.shared()?;
        let step = state.step()?;
        let (start, len) = for_gradient!(state.dtype(parameter)?, T => {
            let mut view = step.view::<T>(parameter)?;
            // The view is given back, the memory stays in place until the step has ended.
            Ok((view.as_mut_ptr().cast::<c_void>(), view.len()))
        })?;
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient((start, len), gradient, count) }
    })
}

/// # Safety
/// C promises that both may be written.
pub(crate) unsafe fn give_gradient(
    (start, len): (*mut c_void, usize),
    gradient: *mut *mut c_void,
    count: *mut usize,
) -> Outcome {
    if !count.is_null() {
        // SAFETY: the caller vouches for it.
        unsafe { put(count, len, "the count") }?;
    }
    // SAFETY: as above.
    unsafe { put(gradient, start, "the gradient") }
}

/// Marks a gradient ready, as what was written to its view. It is reduced once the bucket's others
/// are, and not the program's any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_ready(
    buckets: *const unisum_buckets,
    parameter: usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let state = layer.shared()?;
        Ok(state.step()?.ready(parameter)?)
    })
}

/// Copies a gradient that lies elsewhere, adds it if the parameter has one already, and marks it
/// ready.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_put(
    buckets: *const unisum_buckets,
    parameter: usize,
    gradient: *const c_void,
    count: usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let state = layer.shared()?;
        let step = state.step()?;
        for_gradient!(state.dtype(parameter)?, T => {
            check(T::DTYPE, gradient, count, false, "the gradient")?;
            // SAFETY: C promises the memory; it was checked.
            Ok(step.put::<T>(parameter, unsafe { elements(gradient, count) })?)
        })
    })
}

/// Ends the step: what was not marked ready is from here on. Blocks until all buckets are reduced
/// and all ranks commit to the step, or none: then UNISUM_STEP_FAILED, on all alike, and the next
/// one can be begun. `report` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_wait(
    buckets: *const unisum_buckets,
    report: *mut unisum_step_report,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let mut state = layer.alone()?;
        state.step()?;
        let step = state.step.take().expect("it was looked at");
        let ended = step.wait()?;
        state.change = Change::of(&ended).map(Box::new);
        let told = told(&ended, state.change.as_deref());
        if report.is_null() {
            return Ok(());
        }
        // SAFETY: C promises that it may be written.
        unsafe { put(report, told, "the report") }
    })
}

fn told(report: &StepReport, change: Option<&Change>) -> unisum_step_report {
    unisum_step_report {
        nonfinite: report.nonfinite,
        participants: u32::try_from(report.participants).unwrap_or(u32::MAX),
        exposed_s: report.exposed().as_secs_f64(),
        communicated_s: report.communicated().as_secs_f64(),
        change: Change::place(change),
        newcomers: report.newcomers,
    }
}

/// A parameter's gradient after a step: the average over the ranks that took part, or, after an
/// accumulating step, what this rank has. The program may change it, until the next step begins.
/// `count` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_gradient(
    buckets: *const unisum_buckets,
    parameter: usize,
    gradient: *mut *mut c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(gradient, "the gradient")?;
        let mut state = layer.alone()?;
        let dtype = state.dtype(parameter)?;
        let found = averaged(state.idle()?, parameter, dtype)?;
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient(found, gradient, count) }
    })
}

fn averaged(
    buckets: &mut Buckets,
    parameter: usize,
    dtype: Dtype,
) -> Outcome<(*mut c_void, usize)> {
    fn of<T: Element>(gradient: &mut [T]) -> (*mut c_void, usize) {
        (gradient.as_mut_ptr().cast(), gradient.len())
    }
    for_gradient!(dtype, T => Ok(of(buckets.gradient_mut::<T>(parameter))))
}

/// Takes part in the steps of the ranks that have data still, with nothing of its own, until all
/// have called this. Needs UNISUM_UNEVEN_INPUTS. Collective: every rank calls it when it has no
/// more data. Blocks until all have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_join(
    buckets: *const unisum_buckets,
    update: unisum_update,
    user: *mut c_void,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let Some(update) = update else { return invalid("the update is NULL") };
        let mut state = layer.alone()?;
        let mut failed = None;
        let joined = state.idle()?.join(|buckets, report| {
            match call_update(update, user, buckets, report) {
                Ok(()) => Ok(()),
                Err(text) => {
                    // The facade takes errors of its own only: one is made, and not shown.
                    failed = Some(text);
                    Err(unshown())
                }
            }
        });
        match (joined, failed) {
            (_, Some(text)) => {
                let status = unisum_status::UNISUM_CALLBACK_FAILED;
                Err(crate::status::Failure::Here(status, text))
            }
            (joined, None) => Ok(joined?),
        }
    })
}

type Update = unsafe extern "C" fn(
    *mut c_void,
    *const unisum_step_report,
    *const *mut c_void,
    *const usize,
    usize,
) -> c_int;

fn call_update(
    update: Update,
    user: *mut c_void,
    buckets: &mut Buckets,
    report: &StepReport,
) -> Result<(), String> {
    let dtypes: Vec<_> = buckets.parameters().iter().map(Parameter::dtype).collect();
    let all = dtypes.into_iter().enumerate();
    let all = all.map(|(parameter, dtype)| averaged(buckets, parameter, dtype));
    let all = all.collect::<Outcome<Vec<_>>>().map_err(|_| "a gradient of no type".to_owned())?;
    let (gradients, counts): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    let change = Change::of(report);
    let told = told(report, change.as_ref());
    // SAFETY: C promises a function that takes these; they live until it returns.
    let failed =
        unsafe { update(user, &raw const told, gradients.as_ptr(), counts.as_ptr(), counts.len()) };
    if failed == 0 { Ok(()) } else { Err(format!("the update of a join gave {failed}")) }
}

fn unshown() -> unisum::Error {
    let nothing = unisum::Communicator::builder().variable("", "");
    nothing.expect_err("there is no variable without a name")
}

/// Frees buckets. A step under way is dropped, and fails on all ranks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_free(buckets: *const unisum_buckets) -> unisum_status {
    guard(|| {
        let layer: Arc<Layer> = handles::remove(buckets)?;
        drop(layer);
        Ok(())
    })
}
