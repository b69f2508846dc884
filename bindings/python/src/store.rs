//! A key-value store that is a Python object: PyTorch's, or anything with `set` and `get`.

use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDelta};
use unisum::Store;

/// The object.
#[derive(Debug)]
pub(crate) struct PythonStore(Py<PyAny>);

impl PythonStore {
    pub(crate) const fn new(object: Py<PyAny>) -> Self {
        Self(object)
    }

    /// The value, if there is one; waits for it where the object can.
    fn look(&self, py: Python<'_>, key: &str, timeout: Duration) -> PyResult<Option<Vec<u8>>> {
        let object = self.0.bind(py);
        if object.hasattr("wait")? {
            let seconds = i32::try_from(timeout.as_secs()).unwrap_or(i32::MAX);
            let (days, seconds) = (seconds / 86_400, seconds % 86_400);
            let limit = PyDelta::new(py, days, seconds, 1 + timeout.subsec_micros() as i32, true)?;
            object.call_method1("wait", (vec![key], limit))?;
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
        let set = Python::try_attach(|py| self.0.call_method1(py, "set", (key, value)).map(drop));
        ended(set)
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        let until = Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if let Some(value) = ended(Python::try_attach(|py| self.look(py, key, left)))? {
                return Ok(value);
            }
            if left.is_zero() {
                return Err(format!("nobody wrote `{key}` within {} s", timeout.as_secs_f64()));
            }
            thread::sleep(PAUSE.min(left));
        }
    }
}

/// Between two looks at a store that does not wait.
const PAUSE: Duration = Duration::from_millis(20);

fn ended<T>(called: Option<PyResult<T>>) -> Result<T, String> {
    let called = called.ok_or("the interpreter is ending")?;
    called.map_err(|error| error.to_string())
}
