//! Messages between two ranks.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use unisum::{Error, Message, Outcome};

use crate::communicator::rank_number;
use crate::elements::with_element;
use crate::errors::block;
use crate::operands::Operands;
use crate::tensor::Layout;
use crate::work::Work;

/// Sends and receives messages; `unisum.Messenger` is built on it.
#[pyclass(frozen, subclass, name = "Messenger", module = "unisum._unisum")]
pub(crate) struct Messenger {
    inner: RwLock<Option<Arc<Post>>>,
}

/// The messenger with what waits to be sent and received by it.
struct Post {
    messenger: unisum::Messenger,
    queues: Mutex<HashMap<Way, Queue>>,
}

/// Messages of one way come one after the other: whether it is received, the other rank, the tag.
type Way = (bool, usize, u64);
type Queue = VecDeque<Job>;
type Job = Box<dyn FnOnce(&unisum::Messenger) + Send>;

impl Post {
    fn lock(&self) -> MutexGuard<'_, HashMap<Way, Queue>> {
        // Jobs run outside the lock: the queues are whole.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message. Its thread runs while there are some of its way.
    fn submit(self: &Arc<Self>, way: Way, job: Job) -> std::io::Result<()> {
        let mut queues = self.lock();
        if let Some(queue) = queues.get_mut(&way) {
            queue.push_back(job);
            return Ok(());
        }
        queues.insert(way, VecDeque::from([job]));
        drop(queues);
        let post = self.clone();
        let spawned =
            thread::Builder::new().name("unisum-message".into()).spawn(move || post.run(way));
        spawned.map(drop).inspect_err(|_| drop(self.lock().remove(&way)))
    }

    fn run(&self, way: Way) {
        loop {
            let mut queues = self.lock();
            let Some(job) = queues.get_mut(&way).and_then(VecDeque::pop_front) else {
                queues.remove(&way);
                return;
            };
            drop(queues);
            job(&self.messenger);
        }
    }
}

impl Messenger {
    pub(crate) fn new(messenger: unisum::Messenger) -> Self {
        let post = Post { messenger, queues: Mutex::default() };
        Self { inner: RwLock::new(Some(Arc::new(post))) }
    }

    fn get(&self) -> PyResult<Arc<Post>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let closed = || PyRuntimeError::new_err("the messenger was closed");
        inner.clone().ok_or_else(closed)
    }

    fn take(&self) -> Option<Arc<Post>> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Sends or receives one message.
fn transfer<T: unisum::Element>(
    messenger: &unisum::Messenger,
    operands: &mut Operands,
    (receives, peer, tag): Way,
) -> Result<(), Error> {
    let moved = match (operands.lend::<T>(), receives) {
        (unisum::Buffers::OutOfPlace(data, _), _) => {
            messenger.exchange(&mut [Message::Send { data, to: peer, tag }])
        }
        (unisum::Buffers::InPlace(data), true) => {
            messenger.exchange(&mut [Message::Receive { data, from: peer, tag }])
        }
        (unisum::Buffers::InPlace(data), false) => messenger.send(data, peer, tag),
    };
    moved?;
    operands.settle();
    Ok(())
}

#[pymethods]
impl Messenger {
    #[getter]
    fn rank(&self) -> PyResult<usize> {
        Ok(self.get()?.messenger.rank())
    }

    #[getter]
    fn world(&self) -> PyResult<usize> {
        Ok(self.get()?.messenger.world())
    }

    /// Sends (or receives) a tensor and waits.
    fn _transfer(
        &self,
        py: Python<'_>,
        receives: bool,
        tensor: &Bound<'_, PyAny>,
        peer: i64,
        tag: u64,
    ) -> PyResult<()> {
        let (post, mut operands) = (self.get()?, operands(tensor, receives)?);
        let element = operands.element()?;
        let way = (receives, rank_number(peer)?, tag);
        with_element!(element.dtype, T => {
            block(py, || transfer::<T>(&post.messenger, &mut operands, way))
        })
    }

    /// Starts to send (or receive) a tensor.
    fn _start(
        &self,
        receives: bool,
        tensor: &Bound<'_, PyAny>,
        peer: i64,
        tag: u64,
    ) -> PyResult<Work> {
        let (post, mut operands) = (self.get()?, operands(tensor, receives)?);
        let element = operands.element()?;
        let way = (receives, rank_number(peer)?, tag);
        let (work, shared) = Work::open();
        let job: Job = with_element!(element.dtype, T => Box::new(move |messenger| {
            let moved = transfer::<T>(messenger, &mut operands, way);
            shared.end(moved.map(|()| (vec![operands], Outcome::default())));
        }));
        post.submit(way, job)?;
        Ok(work)
    }

    /// Starts to receive the next message with this tag, of any rank.
    fn _start_any(&self, tensor: &Bound<'_, PyAny>, tag: u64) -> PyResult<Work> {
        let (post, mut operands) = (self.get()?, operands(tensor, true)?);
        let element = operands.element()?;
        let (work, shared) = Work::open();
        let job: Job = with_element!(element.dtype, T => Box::new(move |messenger| {
            let moved = messenger.probe(tag).and_then(|source| {
                shared.comes_from(source);
                transfer::<T>(messenger, &mut operands, (true, source, tag))
            });
            shared.end(moved.map(|()| (vec![operands], Outcome::default())));
        }));
        // One after the other, so that no two are told of the same message.
        post.submit((true, usize::MAX, tag), job)?;
        Ok(work)
    }

    /// Ends it on this rank. Messages under way are not waited for.
    fn close(&self, py: Python<'_>) {
        let inner = self.take();
        py.detach(|| drop(inner));
    }
}

fn operands(tensor: &Bound<'_, PyAny>, receives: bool) -> PyResult<Operands> {
    if receives {
        return Operands::new(Some(tensor), None, Layout::Dense, None, None);
    }
    Operands::only_read(tensor, Layout::Dense)
}
