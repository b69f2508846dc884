//! A key-value store that is a Python object: PyTorch's, or anything with `set` and `get`.

use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use unisum::Store;

/// The object.
#[derive(Debug)]
pub(crate) struct PythonStore(Py<PyAny>);

impl PythonStore {
    pub(crate) const fn new(object: Py<PyAny>) -> Self {
        Self(object)
    }

    /// The value, if there is one. Where an object can say so it is asked before, because PyTorch's
    /// stores wait in `get`.
    fn look(&self, py: Python<'_>, key: &str) -> PyResult<Option<Vec<u8>>> {
        let object = self.0.bind(py);
        if object.hasattr("check")? && !object.call_method1("check", (vec![key],))?.is_truthy()? {
            return Ok(None);
        }
        let value = match object.call_method1("get", (key,)) {
            Err(error) if error.is_instance_of::<PyKeyError>(py) => return Ok(None),
            value => value?,
        };
        if value.is_none() {
            return Ok(None);
        }
        if let Ok(bytes) = value.cast::<PyBytes>() {
            return Ok(Some(bytes.as_bytes().to_vec()));
        }
        let not_text = |_| PyTypeError::new_err("the store's values must be bytes or text");
        value.extract::<String>().map(|text| Some(text.into_bytes())).map_err(not_text)
    }
}

impl Store for PythonStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        let value = String::from_utf8_lossy(value);
        with_interpreter(|py| self.0.call_method1(py, "set", (key, value)).map(drop))
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        let begun = Instant::now();
        loop {
            if let Some(value) = with_interpreter(|py| self.look(py, key))? {
                return Ok(value);
            }
            let waited = begun.elapsed();
            if waited >= timeout {
                return Err(format!("nobody wrote `{key}`"));
            }
            // Rank 0 may be about to write it; who has waited long finds it a little later.
            let pause = (waited / 8).clamp(SHORTEST, LONGEST);
            thread::sleep(pause.min(timeout - waited));
        }
    }
}

/// Between two looks. Looks are short: PyTorch's waits write warnings when they end, and the
/// process cannot end while one goes on.
const SHORTEST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_millis(200);

/// Calls Python, unless the process ends.
fn with_interpreter<T>(call: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, String> {
    let called = Python::try_attach(|py| {
        let ending = py.import("unisum._ending")?;
        if !ending.call_method0("begin")?.is_truthy()? {
            return Ok(None);
        }
        let called = call(py);
        ending.call_method0("end")?;
        called.map(Some)
    });
    let called = called.unwrap_or(Ok(None)).map_err(|error| error.to_string())?;
    called.ok_or_else(|| "the process ends".into())
}
