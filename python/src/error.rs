//! The one exception of the package: what, may I retry, when, and what to do.

use kvkeep_client as sdk;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyDict;

pyo3::create_exception!(kvkeep, Error, PyException, "A call that is itself wrong, or that the server refused.");

/// An error of the SDK as the exception.
pub(crate) fn raise(error: &sdk::Error) -> PyErr {
    Python::attach(|py| {
        let exception = Error::new_err(error.to_string());
        // Attributes of an object just made, which has a dictionary: setting them does not fail but for lack of memory.
        let value = exception.value(py);
        let context = PyDict::new(py);
        let set = || -> PyResult<()> {
            for (name, said) in error.context() {
                context.set_item(name, said)?;
            }
            value.setattr("kind", error.kind().word())?;
            value.setattr("message", error.message())?;
            value.setattr("retryable", error.is_retryable())?;
            value.setattr("retry_after", error.retry_after().map(|t| t.as_secs_f64()))?;
            value.setattr("context", &context)
        };
        match set() {
            Ok(()) => exception,
            Err(e) => e,
        }
    })
}

/// An error of core as the exception.
pub(crate) fn raise_core(error: kvkeep_core::Error) -> PyErr {
    raise(&sdk::Error::from(error))
}

/// The caller's arguments contradict each other.
pub(crate) fn wrong(message: &'static str) -> PyErr {
    raise_core(kvkeep_core::Error::new(kvkeep_core::ErrorKind::InvalidArgument, message))
}

/// The same with what was found.
pub(crate) fn wrong_with(message: &'static str, name: &'static str, value: impl std::fmt::Display) -> PyErr {
    raise_core(kvkeep_core::Error::new(kvkeep_core::ErrorKind::InvalidArgument, message).with(name, value))
}

/// The error as an object, for results that carry one.
pub(crate) fn as_object(py: Python<'_>, error: &sdk::Error) -> Py<PyAny> {
    raise(error).into_value(py).into_any()
}
