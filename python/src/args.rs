//! What callers say: keys, parts, requests, words.

use std::time::Duration;

use bytes::Bytes;
use kvkeep_client as sdk;
use kvkeep_core::ids::{GroupId, LeaseId, ShardId};
use kvkeep_core::{Hint, RequestId, RequestKind, Tier};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::error::{raise_core, wrong, wrong_with};

/// Seconds as a duration.
pub(crate) fn seconds(said: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(said).map_err(|_| PyValueError::new_err("a time is a number of seconds, 0 or more"))
}

pub(crate) fn opt_seconds(said: Option<f64>) -> PyResult<Option<Duration>> {
    said.map(seconds).transpose()
}

/// The value that has this word among all of its kind.
pub(crate) fn word<T: Copy>(said: &str, all: &[T], word: fn(T) -> &'static str) -> PyResult<T> {
    all.iter().copied().find(|value| word(*value) == said).ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|value| word(*value)).collect();
        PyValueError::new_err(format!("{said:?} is none of {}", known.join(", ")))
    })
}

pub(crate) fn class(said: Option<&str>) -> PyResult<Option<kvkeep_core::Class>> {
    said.map(|said| word(said, kvkeep_core::Class::ALL, kvkeep_core::Class::word)).transpose()
}

pub(crate) fn tier(said: &str) -> PyResult<Tier> {
    word(said, Tier::ALL, Tier::word)
}

/// A request id: bytes, or text.
pub(crate) fn request_id(said: &Bound<'_, PyAny>) -> PyResult<RequestId> {
    let id = match said.cast::<PyString>() {
        Ok(text) => RequestId::new(text.to_str()?.as_bytes()),
        Err(_) => RequestId::new(said.extract::<&[u8]>()?),
    };
    id.map_err(raise_core)
}

/// The bytes of an object with a contiguous buffer, copied.
pub(crate) fn copied(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(Bytes::copy_from_slice(bytes.as_bytes()));
    }
    let buffer = PyUntypedBuffer::get(object)?;
    let bytes = object.py().import("builtins")?.getattr("bytes")?.call1((object,))?;
    buffer.release(object.py());
    Ok(Bytes::copy_from_slice(bytes.cast::<PyBytes>()?.as_bytes()))
}

/// Keys: a sequence of bytes-like objects, or one in which keys of `key_len` bytes lie one behind the other.
pub(crate) fn keys(said: &Bound<'_, PyAny>, key_len: Option<usize>) -> PyResult<Vec<Bytes>> {
    if let Some(len) = key_len {
        let all = copied(said)?;
        if len == 0 || all.len() % len != 0 {
            return Err(wrong_with("joined keys are a multiple of key_len bytes", "bytes", all.len()));
        }
        return Ok((0..all.len()).step_by(len).map(|at| all.slice(at..at + len)).collect());
    }
    if said.is_instance_of::<PyBytes>() || said.is_instance_of::<PyString>() {
        return Err(wrong("keys are a sequence of bytes; keys that lie in one buffer need key_len"));
    }
    let mut keys = Vec::with_capacity(said.len().unwrap_or_default());
    for key in said.try_iter()? {
        keys.push(copied(&key?)?);
    }
    Ok(keys)
}

/// Per key, the (group, shard) of its items.
pub(crate) enum Parts {
    /// The same for each.
    Same(Vec<(GroupId, ShardId)>),
    /// One list per key.
    Each(Vec<Vec<(GroupId, ShardId)>>),
}

impl Parts {
    pub(crate) fn of(said: Option<&Bound<'_, PyAny>>, keys: usize) -> PyResult<Self> {
        let list = |said: Vec<(u16, u16)>| said.into_iter().map(|(g, s)| (GroupId(g), ShardId(s))).collect();
        let Some(said) = said else { return Ok(Self::Same(vec![(GroupId(0), ShardId(0))])) };
        if let Ok(same) = said.extract::<Vec<(u16, u16)>>() {
            return Ok(Self::Same(list(same)));
        }
        let each = said
            .extract::<Vec<Vec<(u16, u16)>>>()
            .map_err(|_| PyTypeError::new_err("parts are a list of (group, shard), or one such list per key"))?;
        if each.len() != keys {
            return Err(wrong_with("there is one list of parts per key", "lists", each.len()));
        }
        Ok(Self::Each(each.into_iter().map(list).collect()))
    }

    /// Of one key.
    pub(crate) fn at(&self, key: usize) -> &[(GroupId, ShardId)] {
        match self {
            Self::Same(parts) => parts,
            Self::Each(parts) => &parts[key],
        }
    }

    /// Items of a call on so many keys.
    pub(crate) fn items(&self, keys: usize) -> usize {
        match self {
            Self::Same(parts) => parts.len() * keys,
            Self::Each(parts) => parts.iter().map(Vec::len).sum(),
        }
    }
}

/// What the policy learns from.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct RequestInfo(kvkeep_core::RequestInfo);

#[pymethods]
impl RequestInfo {
    #[new]
    #[pyo3(signature = (kind = "unspecified", *, input_tokens = 0, output_tokens = 0, session = 0, client = 0, hint = None, priority = None))]
    fn new(
        kind: &str,
        input_tokens: u32,
        output_tokens: u32,
        session: u64,
        client: u64,
        hint: Option<&Bound<'_, PyAny>>,
        priority: Option<i32>,
    ) -> PyResult<Self> {
        let priority = priority.map(kvkeep_core::Priority::of_number);
        let hint = match hint {
            None => None,
            Some(said) if said.extract::<&str>().is_ok_and(|said| said == "ends") => Some(Hint::Ends),
            Some(said) => {
                let due = seconds(said.extract()?)?;
                Some(Hint::DueIn(u32::try_from(due.as_millis()).unwrap_or(u32::MAX)))
            }
        };
        let kind = word(kind, RequestKind::ALL, RequestKind::word)?;
        Ok(Self(kvkeep_core::RequestInfo { kind, input_tokens, output_tokens, session, client, hint, priority }))
    }
}

/// What a call says beside its arguments.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Call(sdk::Call);

#[pymethods]
impl Call {
    #[new]
    #[pyo3(signature = (request_id = None, *, deadline = None, info = None, label = String::new()))]
    fn new(
        request_id: Option<&Bound<'_, PyAny>>,
        deadline: Option<f64>,
        info: Option<&RequestInfo>,
        label: String,
    ) -> PyResult<Self> {
        Ok(Self(sdk::Call {
            request_id: request_id.map(self::request_id).transpose()?.unwrap_or_default(),
            deadline: opt_seconds(deadline)?,
            info: info.map(|i| i.0).unwrap_or_default(),
            policy_clock: None,
            label,
        }))
    }

    #[getter]
    fn request_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.request_id.as_bytes())
    }

    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.0.deadline.map(|d| d.as_secs_f64())
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// The SDK's call.
pub(crate) fn call(said: Option<&Call>) -> sdk::Call {
    said.map(|call| call.0.clone()).unwrap_or_default()
}

/// One chain to look up.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Query(pub(crate) sdk::MatchQuery);

#[pymethods]
impl Query {
    #[new]
    #[pyo3(signature = (keys, *, key_len = None, lease = None, request_id = None, promote = false, statuses = false, release = None))]
    fn new(
        keys: &Bound<'_, PyAny>,
        key_len: Option<usize>,
        lease: Option<f64>,
        request_id: Option<&Bound<'_, PyAny>>,
        promote: bool,
        statuses: bool,
        release: Option<u64>,
    ) -> PyResult<Self> {
        Ok(Self(sdk::MatchQuery {
            keys: self::keys(keys, key_len)?,
            request_id: request_id.map(self::request_id).transpose()?.unwrap_or_default(),
            lease: opt_seconds(lease)?,
            promote,
            statuses,
            release: release.map(LeaseId),
        }))
    }
}
