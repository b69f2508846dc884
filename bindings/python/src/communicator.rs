//! The communicator: connecting, collectives, groups.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use unisum::{Buffers, Builder, Collective, Outcome, ReduceOp, Reduction};

use crate::array::Array;
use crate::device::Device;
use crate::elements::{Element, by_name, with_element};
use crate::errors::{block, exception};
use crate::messenger::Messenger;
use crate::observing;
use crate::operands::{self, Lent, Operands};
use crate::staging::Staging;
use crate::store::PythonStore;
use crate::tensor::{Layout, check_reducible};
use crate::work::{Pending, Work};

/// A membership in a job; `unisum.Communicator` is built on it.
#[pyclass(frozen, subclass, name = "Communicator", module = "unisum._unisum")]
pub(crate) struct Communicator {
    inner: RwLock<Option<Arc<unisum::Communicator>>>,
    rank: usize,
    world: usize,
    staging: Arc<Staging>,
}

/// What is asked for, as Python passes it.
#[derive(FromPyObject)]
pub(crate) struct Request<'py>(
    /// The collective's number.
    u8,
    /// The operation's, 0 if there is none.
    u8,
    /// The root.
    i64,
    /// A factor for inputs.
    Option<f64>,
    /// Whether infinities and NaNs are looked for.
    bool,
    /// Counts by rank, and what is received of each.
    Option<Vec<usize>>,
    Option<Vec<usize>>,
    /// Input and output.
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
);

/// A rank of which Python has given the number.
///
/// # Errors
/// `ValueError` if it is negative.
pub(crate) fn rank_number(given: i64) -> PyResult<usize> {
    usize::try_from(given).map_err(|_| PyValueError::new_err(format!("there is no rank {given}")))
}

const ALL_REDUCE: u8 = 0;
const REDUCE: u8 = 1;
const BROADCAST: u8 = 2;
const ALL_GATHER: u8 = 3;
const REDUCE_SCATTER: u8 = 4;
const ALL_TO_ALL: u8 = 5;
const GATHER: u8 = 6;
const SCATTER: u8 = 7;
const BARRIER: u8 = 8;

impl<'py> Request<'py> {
    pub(crate) fn reduces(&self) -> bool {
        matches!(self.0, ALL_REDUCE | REDUCE | REDUCE_SCATTER)
    }

    /// The operation's number.
    pub(crate) const fn op(&self) -> u8 {
        self.1
    }

    /// Input and output as Python passes them.
    pub(crate) const fn given(&self) -> [Option<&Bound<'py, PyAny>>; 2] {
        [self.7.as_ref(), self.8.as_ref()]
    }

    /// How elements have to lie, and which block of the longer buffer the shorter one may be.
    pub(crate) fn layout(&self, rank: usize) -> (Layout, Option<usize>) {
        match self.0 {
            ALL_REDUCE | REDUCE | BROADCAST => (Layout::Dense, None),
            ALL_GATHER | REDUCE_SCATTER if self.5.is_none() => (Layout::Contiguous, Some(rank)),
            // Any overlap is staged.
            _ => (Layout::Contiguous, Some(usize::MAX >> 48)),
        }
    }

    fn operands(&self, rank: usize, staging: &Arc<Staging>) -> PyResult<Operands> {
        let (layout, own_block) = self.layout(rank);
        Operands::new(self.7.as_ref(), self.8.as_ref(), layout, own_block, Some(staging))
    }

    fn reduction(&self, element: Element) -> PyResult<Reduction> {
        check_reducible(element, self.1)?;
        let op = ReduceOp::ALL.get(usize::from(self.1).wrapping_sub(1));
        let op = *op.ok_or_else(|| PyValueError::new_err("there is no such operation"))?;
        let reduction = match self.3 {
            None => Reduction::new(op),
            Some(factor) if op == ReduceOp::Sum && operands::is_float(element.dtype) => {
                Reduction::sum_scaled_by(factor)
            }
            Some(_) => return Err(PyValueError::new_err("only sums of floats can be scaled")),
        };
        Ok(if self.4 { reduction.detect_nonfinite() } else { reduction })
    }

    pub(crate) fn collective(&self, element: Element) -> PyResult<Collective> {
        let root = rank_number(self.2)?;
        let collective = match self.0 {
            ALL_REDUCE => Collective::all_reduce(self.reduction(element)?),
            REDUCE => Collective::reduce(self.reduction(element)?, root),
            BROADCAST => Collective::broadcast(root),
            ALL_GATHER => Collective::all_gather(),
            REDUCE_SCATTER => Collective::reduce_scatter(self.reduction(element)?),
            ALL_TO_ALL => match (&self.5, &self.6) {
                (Some(sends), Some(receives)) => {
                    let sends = operands::counts(sends.clone(), element)?;
                    let receives = operands::counts(receives.clone(), element)?;
                    return Ok(Collective::all_to_all_v(&sends, &receives));
                }
                _ => Collective::all_to_all(),
            },
            GATHER => Collective::gather(root),
            SCATTER => Collective::scatter(root),
            BARRIER => Collective::barrier(),
            _ => return Err(PyValueError::new_err("there is no such collective")),
        };
        match &self.5 {
            None => Ok(collective),
            Some(counts) => {
                let counts = operands::counts(counts.clone(), element)?;
                Ok(collective.with_counts(&counts))
            }
        }
    }

    /// The number of the element type that must be the same in one batch.
    fn prepare(&self, communicator: &Communicator) -> PyResult<(Operands, Element)> {
        let operands = self.operands(communicator.rank, &communicator.staging)?;
        let element = operands.element()?;
        if self.reduces() {
            check_reducible(element, self.1)?;
        }
        Ok((operands, element))
    }
}

impl Communicator {
    pub(crate) fn new(inner: unisum::Communicator) -> Self {
        let (rank, world) = (inner.rank(), inner.world());
        let inner = Arc::new(inner);
        let staging = Staging::new(&inner);
        Self { inner: RwLock::new(Some(inner)), rank, world, staging }
    }

    pub(crate) fn get(&self) -> PyResult<Arc<unisum::Communicator>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let closed = || PyRuntimeError::new_err("the communicator was closed");
        inner.clone().ok_or_else(closed)
    }

    fn take(&self) -> Option<Arc<unisum::Communicator>> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn begin(&self, request: &Request<'_>) -> PyResult<Work> {
        let inner = self.get()?;
        let (operands, element) = request.prepare(self)?;
        let collective = request.collective(element)?;
        let pending: Pending = with_element!(element.dtype, T => {
            let work = inner.start::<T, _>(collective, Lent::<T>::new(operands));
            Box::pin(async move { work.await.map(|(lent, outcome)| (vec![lent.0], outcome)) })
        });
        Ok(Work::new(pending))
    }
}

#[pymethods]
impl Communicator {
    #[getter]
    fn rank(&self) -> usize {
        self.rank
    }

    #[getter]
    fn world(&self) -> usize {
        self.world
    }

    #[getter]
    fn local_rank(&self) -> PyResult<usize> {
        Ok(self.get()?.local_rank())
    }

    #[getter]
    fn local_size(&self) -> PyResult<usize> {
        Ok(self.get()?.local_size())
    }

    /// What carries the data, as "shm" or "shm+tcp".
    #[getter]
    fn transport(&self) -> PyResult<String> {
        Ok(self.get()?.transport().to_owned())
    }

    /// Where the ranks are, what links cost, which algorithm is chosen from which size on.
    fn _describe(&self) -> PyResult<observing::Description> {
        Ok(observing::description(self.get()?.describe()))
    }

    /// What was done so far, and what is under way.
    fn _stats(&self) -> PyResult<observing::Stats> {
        Ok(observing::stats(self.get()?.stats()))
    }

    /// Fixes the algorithm of later calls, or has it chosen (None). All ranks call it alike.
    #[pyo3(signature = (name))]
    fn set_algorithm(&self, py: Python<'_>, name: Option<String>) -> PyResult<()> {
        let set = self.get()?.set_algorithm(name.as_deref());
        set.map_err(|error| exception(py, &error))
    }

    /// Runs a collective; whether an infinity or NaN was found.
    fn _run(&self, py: Python<'_>, request: Request<'_>) -> PyResult<bool> {
        let inner = self.get()?;
        let (mut operands, element) = request.prepare(self)?;
        let collective = request.collective(element)?;
        let outcome: Outcome = with_element!(element.dtype, T => block(py, || {
            let outcome = inner.run::<T>(&collective, operands.lend())?;
            operands.settle();
            Ok(outcome)
        }))?;
        Ok(outcome.nonfinite)
    }

    /// Starts a collective.
    fn _start(&self, request: Request<'_>) -> PyResult<Work> {
        self.begin(&request)
    }

    /// Starts the same collective on several tensors, in few launches.
    fn _start_batch(&self, requests: Vec<Request<'_>>) -> PyResult<Work> {
        let inner = self.get()?;
        let mut batch = Vec::with_capacity(requests.len());
        let mut known: Option<Element> = None;
        for request in &requests {
            let (operands, element) = request.prepare(self)?;
            if known.is_some_and(|known| known != element) {
                let text = "the tensors of a batch must have the same type";
                return Err(PyTypeError::new_err(text));
            }
            known = Some(element);
            batch.push(operands);
        }
        let (Some(first), Some(element)) = (requests.first(), known) else {
            return Err(PyValueError::new_err("a batch needs a tensor"));
        };
        let collective = first.collective(element)?;
        let pending: Pending = with_element!(element.dtype, T => {
            let tensors: Vec<Lent<T>> = batch.into_iter().map(Lent::new).collect();
            let work = inner.start_batch::<T, _>(collective, tensors);
            Box::pin(async move {
                let (tensors, outcome) = work.await?;
                Ok((tensors.into_iter().map(|lent| lent.0).collect(), outcome))
            })
        });
        Ok(Work::new(pending))
    }

    /// The epoch and the processes of the job's view, if the job is elastic.
    fn _view(&self) -> PyResult<Option<(u64, Vec<u64>)>> {
        Ok(self.get()?.view().map(|view| (view.epoch, view.processes)))
    }

    fn _rebuild(&self, py: Python<'_>) -> PyResult<Self> {
        let inner = self.get()?;
        in_background(py, "unisum-rebuild", move || inner.rebuild())
    }

    /// How many processes ask to be let into the job.
    fn _newcomers(&self) -> PyResult<usize> {
        Ok(self.get()?.newcomers())
    }

    fn _admit(&self, py: Python<'_>) -> PyResult<Self> {
        let inner = self.get()?;
        in_background(py, "unisum-admit", move || inner.admit())
    }

    fn _share_state(
        &self,
        py: Python<'_>,
        state: Option<Vec<u8>>,
    ) -> PyResult<Option<Py<PyBytes>>> {
        let inner = self.get()?;
        let received = block(py, || inner.share_state(state.as_deref()))?;
        Ok(received.map(|bytes| PyBytes::new(py, &bytes).unbind()))
    }

    fn _shrink(&self, py: Python<'_>, exclude: Vec<usize>) -> PyResult<Self> {
        let inner = self.get()?;
        in_background(py, "unisum-shrink", move || inner.shrink(&exclude))
    }

    /// Ends the calls of all ranks on it.
    fn revoke(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.get()?;
        py.detach(|| inner.revoke()).map_err(|error| exception(py, &error))
    }

    fn _barrier(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.get()?;
        let barrier = Collective::barrier();
        block(py, || inner.run::<u8>(&barrier, Buffers::InPlace(&mut [])).map(drop))
    }

    fn _split(&self, py: Python<'_>, color: Option<u32>, key: i64) -> PyResult<Option<Self>> {
        let inner = self.get()?;
        Ok(block(py, || inner.split(color, key))?.map(Self::new))
    }

    fn _subset(&self, py: Python<'_>, ranks: Vec<usize>) -> PyResult<Option<Self>> {
        let inner = self.get()?;
        Ok(block(py, || inner.subset(&ranks))?.map(Self::new))
    }

    fn _duplicate(&self, py: Python<'_>) -> PyResult<Self> {
        let inner = self.get()?;
        block(py, || inner.duplicate()).map(Self::new)
    }

    fn _on_device(&self, py: Python<'_>, ordinal: usize) -> PyResult<Device> {
        let inner = self.get()?;
        block(py, || inner.on_device(ordinal)).map(Device::new)
    }

    fn _messenger(&self, py: Python<'_>) -> PyResult<Messenger> {
        let inner = self.get()?;
        block(py, || unisum::Messenger::new(&inner)).map(Messenger::new)
    }

    fn _empty(&self, py: Python<'_>, shape: Vec<usize>, dtype: &str) -> PyResult<Array> {
        let (inner, dtype) = (self.get()?, by_name(dtype)?);
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, &axis| bytes.checked_mul(axis));
        let bytes = bytes.ok_or_else(|| PyValueError::new_err("the shape is beyond all memory"))?;
        let memory = py.detach(|| inner.allocate::<u8>(bytes));
        Ok(Array::new(memory.map_err(|error| exception(py, &error))?, shape, dtype))
    }

    /// Ends the job on all ranks, for a reason. The exception that calls under way get.
    fn _abort(&self, py: Python<'_>, why: &str) -> PyResult<PyErr> {
        let inner = self.get()?;
        let error = py.detach(|| inner.abort(why));
        Ok(exception(py, &error))
    }

    /// Leaves the job: waits for asynchronous calls under way. Does nothing the second time.
    fn close(&self, py: Python<'_>) {
        let inner = self.take();
        py.detach(|| drop(inner));
    }

    #[getter]
    fn closed(&self) -> bool {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let inner = self.take();
        // Leaving may wait for other ranks: other threads of the program go on meanwhile.
        if let Some(inner) = inner
            && let Err(inner) = detached(inner)
        {
            drop(inner);
        }
    }
}

/// Drops without the interpreter; gives back what could not be dropped so, at its end.
fn detached(inner: Arc<unisum::Communicator>) -> Result<(), Arc<unisum::Communicator>> {
    let mut inner = Some(inner);
    Python::try_attach(|py| {
        let taken = inner.take();
        py.detach(|| drop(taken));
    });
    inner.map_or(Ok(()), Err)
}

/// Joins a job: the environment, with `options` on top, and a store to meet by. The job may run
/// already: then `is_newcomer`.
#[pyfunction]
#[pyo3(signature = (options, store=None, is_newcomer=false))]
pub(crate) fn connect(
    py: Python<'_>,
    options: &Bound<'_, PyDict>,
    store: Option<Py<PyAny>>,
    is_newcomer: bool,
) -> PyResult<Communicator> {
    let mut builder = builder(options)?;
    if let Some(store) = store {
        builder = builder.store(PythonStore::new(store));
    }
    in_background(py, "unisum-connect", move || match is_newcomer {
        true => builder.join(),
        false => builder.connect(),
    })
}

/// Has a thread make a communicator, and hears signals meanwhile.
fn in_background(
    py: Python<'_>,
    name: &str,
    make: impl FnOnce() -> Result<unisum::Communicator, unisum::Error> + Send + 'static,
) -> PyResult<Communicator> {
    let (sender, receiver) = channel();
    let join = move || {
        // Nobody waits any more if a signal handler has raised: then the job is left again.
        let _ = sender.send(make());
    };
    thread::Builder::new().name(name.into()).spawn(join)?;
    let (nap, receiver) = (Duration::from_millis(50), Mutex::new(receiver));
    loop {
        let received =
            py.detach(|| receiver.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(nap));
        match received {
            Ok(Ok(inner)) => return Ok(Communicator::new(inner)),
            Ok(Err(error)) => return Err(exception(py, &error)),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(PyRuntimeError::new_err("connecting panicked"));
            }
        }
    }
}

fn builder(options: &Bound<'_, PyDict>) -> PyResult<Builder> {
    let mut builder = unisum::Communicator::builder();
    for (name, value) in options {
        if value.is_none() {
            continue;
        }
        let name: String = name.extract()?;
        let seconds = || {
            let seconds: f64 = value.extract()?;
            Duration::try_from_secs_f64(seconds).map_err(|error| {
                PyValueError::new_err(format!("{name} of {seconds} seconds: {error}"))
            })
        };
        let text = || value.extract::<String>();
        builder = match name.as_str() {
            "rank" => builder.rank(value.extract()?),
            "world" => builder.world(value.extract()?),
            "rendezvous" => builder.rendezvous(&text()?),
            "token" => builder.token(&text()?),
            "job" => builder.job(&text()?),
            "transport" => builder.transport(&text()?),
            "algorithm" => builder.algorithm(&text()?),
            "reproducible" => builder.reproducible(value.extract()?),
            "tuning" => builder.tuning(&text()?),
            "port_range" => builder.port_range(&text()?),
            "interface" => builder.interface(&text()?),
            "elastic" => {
                let minimum: usize = value.extract()?;
                let set = builder.variable("UNISUM_ELASTIC", &minimum.to_string());
                set.map_err(|error| exception(value.py(), &error))?
            }
            "timeout" => builder.timeout(seconds()?),
            "connect_timeout" => builder.connect_timeout(seconds()?),
            "heartbeat_timeout" => builder.heartbeat_timeout(seconds()?),
            "reconnect_timeout" => builder.reconnect_timeout(seconds()?),
            _ => return Err(PyTypeError::new_err(format!("there is no option `{name}`"))),
        };
    }
    Ok(builder)
}
