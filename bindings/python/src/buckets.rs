//! Gradient buckets; `unisum.Buckets` is built on this.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use unisum::buckets::{
    Builder, Compressed, Encoding, LowRank, Parameter, Place, Step, StepReport, StepWork,
};
use unisum::{Dtype, Outcome};

use crate::array::Array;
use crate::communicator::Communicator;
use crate::elements::by_name;
use crate::errors::{block, exception};
use crate::tensor::{Layout, Tensor};
use crate::work::{Pending, Work};

/// The gradients of a model in buckets.
#[pyclass(frozen, name = "Buckets", module = "unisum._unisum")]
pub(crate) struct Buckets {
    state: RwLock<State>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) is_sharded: bool,
}

pub(crate) struct State {
    /// The step under way, which borrows the buckets. Before them: it is dropped first.
    step: Option<Step<'static>>,
    /// None once they are closed.
    buckets: Option<Box<unisum::buckets::Buckets>>,
}

/// How a step ended; `unisum.StepReport` is made of it.
#[pyclass(frozen, name = "Report", module = "unisum._unisum")]
pub(crate) struct Report(Arc<Mutex<Option<StepReport>>>);

/// By bucket: bytes, and when it was ready, was begun and had ended, in seconds.
type BucketTimes = Vec<(usize, f64, f64, f64)>;
/// The fields of `unisum.StepChange`, in their order: epoch, processes, lost, redone, took.
type Change = (u64, Vec<u64>, Vec<usize>, bool, f64);
/// The fields of `unisum.StepReport`, in their order.
type Told = (bool, usize, Vec<usize>, f64, f64, f64, f64, BucketTimes, Option<Change>, bool);

/// Evaluates an expression with `$T` standing for the Rust type of a gradient's elements.
macro_rules! with_gradient {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            Dtype::Bf16 => {
                type $T = half::bf16;
                $body
            }
            Dtype::F64 => {
                type $T = f64;
                $body
            }
            // No other was taken when the buckets were made.
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}
pub(crate) use with_gradient;

impl State {
    fn step(&self) -> PyResult<&Step<'static>> {
        self.step.as_ref().ok_or_else(no_step)
    }

    fn buckets(&self) -> PyResult<&unisum::buckets::Buckets> {
        self.buckets.as_deref().ok_or_else(closed)
    }

    /// The buckets between two steps.
    pub(crate) fn idle(&mut self) -> PyResult<&mut unisum::buckets::Buckets> {
        match self.step {
            Some(_) => Err(step_open()),
            None => self.buckets.as_deref_mut().ok_or_else(closed),
        }
    }
}

pub(crate) fn closed() -> PyErr {
    PyRuntimeError::new_err("the buckets were closed")
}

pub(crate) fn no_step() -> PyErr {
    PyRuntimeError::new_err("no step is under way: `begin` begins one")
}

pub(crate) fn step_open() -> PyErr {
    PyRuntimeError::new_err("a step is under way: wait for it first")
}

/// # Errors
/// `ValueError` if there is no such parameter.
pub(crate) fn parameter_of(parameters: &[Parameter], place: usize) -> PyResult<&Parameter> {
    parameters.get(place).ok_or_else(|| {
        let count = parameters.len();
        PyValueError::new_err(format!("there is no parameter {place} among {count}"))
    })
}

/// Parameters from what Python gave: name, shape, type, uses of each.
pub(crate) fn parameters_of(
    given: Vec<(String, Vec<usize>, String, usize)>,
) -> PyResult<Vec<Parameter>> {
    let parameter = |(name, shape, dtype, uses): (String, Vec<usize>, String, usize)| {
        Ok(Parameter::new(name, &shape, by_name(&dtype)?).used(uses))
    };
    given.into_iter().map(parameter).collect()
}

pub(crate) fn busy() -> PyErr {
    PyRuntimeError::new_err("another call of these buckets, which needs them alone, is under way")
}

impl Buckets {
    // Nobody waits for these locks: who did so with the interpreter would keep it from whoever
    // has the lock.

    pub(crate) fn alone(&self) -> PyResult<RwLockWriteGuard<'_, State>> {
        self.state.try_write().map_err(|_| busy())
    }

    fn shared(&self) -> PyResult<RwLockReadGuard<'_, State>> {
        self.state.try_read().map_err(|_| busy())
    }

    fn dtype(&self, parameter: usize) -> PyResult<Dtype> {
        parameter_of(&self.parameters, parameter).map(Parameter::dtype)
    }

    fn array(&self, place: Place, parameter: usize) -> Array {
        let parameter = &self.parameters[parameter];
        Array::of_place(place, parameter.shape().to_vec(), parameter.dtype())
    }
}

#[pymethods]
impl Buckets {
    /// Begins a step.
    fn _begin(&self, py: Python<'_>, accumulates: bool) -> PyResult<()> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        let step = block(py, || match accumulates {
            true => buckets.begin_accumulating(),
            false => buckets.begin(),
        })?;
        // SAFETY: the step is dropped before the buckets, which stay where they are in their box,
        // and which nobody uses while there is a step: `idle` sees to it.
        let step = unsafe { std::mem::transmute::<Step<'_>, Step<'static>>(step) };
        state.step = Some(step);
        Ok(())
    }

    /// The gradient of a parameter, in the memory that is reduced: zeroed if it is the first view
    /// since the last reduction.
    fn _view(&self, py: Python<'_>, parameter: usize) -> PyResult<Array> {
        let (state, dtype) = (self.shared()?, self.dtype(parameter)?);
        let step = state.step()?;
        let viewed = with_gradient!(dtype, T => step.view::<T>(parameter).map(drop));
        viewed.map_err(|error| exception(py, &error))?;
        Ok(self.array(step.place(parameter), parameter))
    }

    /// Marks a gradient ready that the program has written as a whole to its place.
    fn _ready(&self, py: Python<'_>, parameter: usize, is_whole: bool) -> PyResult<()> {
        let (state, dtype) = (self.shared()?, self.dtype(parameter)?);
        let step = state.step()?;
        let marked = match is_whole {
            true => with_gradient!(dtype, T => {
                step.view_to_overwrite::<T>(parameter).map(unisum::buckets::View::ready)
            }),
            false => step.ready(parameter),
        };
        marked.map_err(|error| exception(py, &error))
    }

    /// Copies (or adds) a gradient that lies elsewhere, and marks it ready.
    fn _put(&self, py: Python<'_>, parameter: usize, gradient: &Bound<'_, PyAny>) -> PyResult<()> {
        let dtype = self.dtype(parameter)?;
        let tensor = Tensor::of(gradient, Layout::Contiguous)?;
        if tensor.element.dtype != dtype {
            let (known, given) = (&self.parameters[parameter], tensor.element.dtype);
            return Err(PyTypeError::new_err(format!("{known} was given elements of {given}")));
        }
        let state = self.shared()?;
        let step = state.step()?;
        with_gradient!(dtype, T => {
            let elements = tensor.as_slice::<T>();
            py.detach(|| step.put::<T>(parameter, elements))
        })
        .map_err(|error| exception(py, &error))
    }

    /// Ends the program's part of the step.
    fn _finish(&self) -> PyResult<(Work, Report)> {
        let mut state = self.alone()?;
        state.step()?;
        let step = state.step.take().unwrap_or_else(|| unreachable!("it was looked at"));
        let (work, slot) = (step.finish(), Arc::new(Mutex::new(None)));
        // SAFETY: a work only remembers that it borrows the buckets; it has a share of the step.
        let work = unsafe { std::mem::transmute::<StepWork<'_>, StepWork<'static>>(work) };
        let report = slot.clone();
        let pending: Pending = Box::pin(async move {
            let told = work.await?;
            let mut outcome = Outcome::default();
            outcome.nonfinite = told.nonfinite;
            *report.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
            Ok((Vec::new(), outcome))
        });
        drop(state);
        Ok((Work::new(pending), Report(slot)))
    }

    /// Fails the step under way on all ranks, if there is one.
    fn _drop_step(&self, py: Python<'_>, why: &str) -> PyResult<()> {
        let step = self.alone()?.step.take();
        if let Some(step) = step {
            py.detach(|| step.abandon(why));
        }
        Ok(())
    }

    /// Takes part in the steps of the others, until all have called this.
    fn _join(&self, py: Python<'_>, update: Py<PyAny>) -> PyResult<()> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        let mut raised = Ok(());
        let joined = block(py, || {
            buckets.join(|buckets, report| {
                let updated = Python::attach(|py| {
                    let all = 0..self.parameters.len();
                    let all = all.map(|parameter| {
                        Py::new(py, self.array(buckets.place(parameter), parameter))
                    });
                    let gradients = PyList::new(py, all.collect::<PyResult<Vec<_>>>()?)?;
                    update.call1(py, (told(report), gradients)).map(drop)
                });
                updated.map_err(|error| {
                    // The facade takes errors of its own only: one is made, and not shown.
                    raised = Err(error);
                    let nothing = unisum::Communicator::builder().variable("", "");
                    nothing.expect_err("there is no variable without a name")
                })
            })
        });
        raised.and(joined)
    }

    /// A parameter's gradient as it lies now.
    fn _gradient(&self, py: Python<'_>, parameter: usize) -> PyResult<Array> {
        self.dtype(parameter)?;
        let state = self.shared()?;
        let place = match &state.step {
            Some(step) => step.place(parameter),
            None => {
                let buckets = state.buckets()?;
                py.detach(|| buckets.place(parameter))
            }
        };
        Ok(self.array(place, parameter))
    }

    /// The layout as bytes, and the parameters of each bucket.
    fn _layout(&self) -> PyResult<(Vec<u8>, u32, Vec<Vec<usize>>)> {
        let state = self.shared()?;
        let layout = match &state.step {
            Some(step) => step.layout(),
            None => state.buckets()?.layout(),
        };
        let members = layout.buckets().map(<[usize]>::to_vec).collect();
        Ok((layout.to_bytes(), layout.version(), members))
    }

    /// The epoch and the processes of the view of the last step, if the job is elastic.
    fn _view_of_job(&self, py: Python<'_>) -> PyResult<Option<(u64, Vec<u64>)>> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        let view = py.detach(|| buckets.view());
        Ok(view.map(|view| (view.epoch, view.processes)))
    }

    /// The communicator of the job's view, if steps have changed it since the last call of this.
    fn _take_communicator(&self) -> PyResult<Option<Communicator>> {
        Ok(self.alone()?.idle()?.take_communicator().map(Communicator::new))
    }

    /// Lets newcomers into the job, and goes on with them.
    fn _admit(&self, py: Python<'_>) -> PyResult<Communicator> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        Ok(Communicator::new(block(py, || buckets.admit())?))
    }

    fn _rescale(&self, py: Python<'_>, factor: f32) -> PyResult<()> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        py.detach(|| buckets.rescale_hook(factor));
        Ok(())
    }

    fn _save(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        Ok(py.detach(|| buckets.save_hook()))
    }

    fn _restore(&self, py: Python<'_>, saved: &[u8]) -> PyResult<()> {
        let mut state = self.alone()?;
        let buckets = state.idle()?;
        let restored = py.detach(|| buckets.restore_hook(saved));
        restored.map_err(|error| exception(py, &error))
    }

    /// Ends them. A step under way fails on all ranks.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut state = self.alone()?;
        let ended = (state.step.take(), state.buckets.take());
        drop(state);
        py.detach(|| drop(ended));
        Ok(())
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut ended = Some((state.step.take(), state.buckets.take()));
        // Their end may wait for other ranks: other threads of the program go on meanwhile. Without
        // the interpreter, at its end, they are dropped all the same.
        Python::try_attach(|py| {
            let ended = ended.take();
            py.detach(|| drop(ended));
        });
    }
}

#[pymethods]
impl Report {
    /// The fields, if the step has ended well.
    fn _told(&self) -> Option<Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(told)
    }
}

fn told(report: &StepReport) -> Told {
    let bucket = |it: &unisum::buckets::BucketReport| {
        let [ready, started, finished] =
            [it.ready, it.started, it.finished].map(|time| time.as_secs_f64());
        (it.bytes, ready, started, finished)
    };
    (
        report.nonfinite,
        report.participants,
        report.unused.clone(),
        report.computed.as_secs_f64(),
        report.ended.as_secs_f64(),
        report.exposed().as_secs_f64(),
        report.communicated().as_secs_f64(),
        report.buckets.iter().map(bucket).collect(),
        report.change.as_ref().map(|it| {
            (
                it.view.epoch,
                it.view.processes.clone(),
                it.lost.clone(),
                it.redone,
                it.took.as_secs_f64(),
            )
        }),
        report.newcomers,
    )
}

/// Makes buckets for a model's parameters: name, shape, type, uses of each.
#[pyfunction]
pub(crate) fn make_buckets(
    py: Python<'_>,
    communicator: &Communicator,
    parameters: Vec<(String, Vec<usize>, String, usize)>,
    options: &Bound<'_, PyDict>,
) -> PyResult<Buckets> {
    let inner = communicator.get()?;
    let parameters = parameters_of(parameters)?;
    let is_sharded = options.get_item("sharded")?.is_some_and(|it| it.is_truthy().unwrap_or(true));
    let builder = configured(unisum::buckets::Buckets::builder(&inner), options)?;
    let builder = if is_sharded { sharded(builder, options)? } else { builder };
    let made = block(py, || builder.build(&parameters))?;
    let state = RwLock::new(State { step: None, buckets: Some(Box::new(made)) });
    Ok(Buckets { state, parameters, is_sharded })
}

/// # Errors
/// `ValueError` if another option does not go with it.
fn sharded<'c>(builder: Builder<'c>, options: &Bound<'_, PyDict>) -> PyResult<Builder<'c>> {
    for name in ["wire", "uneven_inputs"] {
        if options.get_item(name)?.is_some_and(|it| it.is_truthy().unwrap_or(true)) {
            return Err(PyValueError::new_err(format!("sharded buckets take no `{name}`")));
        }
    }
    Ok(builder.sharded())
}

fn configured<'c>(mut builder: Builder<'c>, options: &Bound<'_, PyDict>) -> PyResult<Builder<'c>> {
    let mut wire = Wire::default();
    for (name, value) in options {
        let name: String = name.extract()?;
        if value.is_none() {
            continue;
        }
        builder = match name.as_str() {
            "bucket_bytes" => builder.bucket_bytes(value.extract()?),
            "end_bucket_bytes" => builder.end_bucket_bytes(value.extract()?),
            "unused_parameters" => builder.unused_parameters(value.extract()?),
            "static_graph" => builder.static_graph(value.extract()?),
            "uneven_inputs" => builder.uneven_inputs(value.extract()?),
            "relayout" => builder.relayout(value.extract()?),
            "layout" => builder.layout(value.extract()?),
            // Comes last: it replaces the hook.
            "sharded" => builder,
            _ => {
                wire.take(&name, &value)?;
                builder
            }
        };
    }
    wire.hook(builder)
}

/// What is said of how gradients travel.
#[derive(Default)]
struct Wire {
    name: Option<String>,
    feedback: Option<bool>,
    start_step: Option<u64>,
    at_least: Option<f64>,
}

impl Wire {
    fn take(&mut self, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        match name {
            "wire" => self.name = Some(value.extract()?),
            "feedback" => self.feedback = Some(value.extract()?),
            "start_step" => self.start_step = Some(value.extract()?),
            "at_least" => self.at_least = Some(value.extract()?),
            _ => return Err(PyTypeError::new_err(format!("there is no option `{name}`"))),
        }
        Ok(())
    }

    fn hook(self, builder: Builder<'_>) -> PyResult<Builder<'_>> {
        let Some(name) = self.name else { return Ok(builder) };
        if let Some(rank) = name.strip_prefix("powersgd") {
            let rank = rank.strip_prefix(':').unwrap_or(if rank.is_empty() { "1" } else { "" });
            let rank: usize = rank.parse().map_err(|_| unknown(&name))?;
            if rank == 0 {
                return Err(unknown(&name));
            }
            let mut hook = LowRank::new(rank);
            if let Some(step) = self.start_step {
                hook = hook.starting_at(step);
            }
            if let Some(times) = self.at_least {
                hook = hook.at_least(times);
            }
            return Ok(builder.hook(hook));
        }
        let encoding = match name.as_str() {
            "bf16" => Encoding::Bf16,
            "f16" => Encoding::F16,
            "f8e4m3" => Encoding::F8E4M3,
            "f8e5m2" => Encoding::F8E5M2,
            "int8" => Encoding::Int8,
            _ => return Err(unknown(&name)),
        };
        let hook = Compressed::new(encoding);
        Ok(builder.hook(if self.feedback == Some(false) { hook.without_feedback() } else { hook }))
    }
}

fn unknown(name: &str) -> PyErr {
    PyValueError::new_err(format!(
        "gradients can't travel as `{name}`: there are bf16, f16, f8e4m3, f8e5m2, int8, and \
         powersgd:RANK"
    ))
}
