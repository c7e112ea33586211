//! What is stored and removed, as it happens.

use std::time::Instant;

use kvkeep_client::convert::tier_opt_from_proto;
use kvkeep_client::engine::{self, Told, WAIT_MAX};
use kvkeep_client::wire;
use kvkeep_core::Tier;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::args::{self, Call, seconds};
use crate::error::raise;
use crate::namespace::{Namespace, STEP, ask};

/// A stream of events. Keeps its namespace.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Events {
    events: engine::Events,
    _namespace: Py<Namespace>,
}

impl Events {
    /// The next batch; `None`: none until then, or never. Signals are looked for meanwhile.
    fn wait(&self, py: Python<'_>, until: Option<Instant>) -> PyResult<Option<EventBatch>> {
        loop {
            let left = until.map_or(STEP, |until| until.saturating_duration_since(Instant::now()));
            match py.detach(|| self.events.next_batch(left.min(STEP))).map_err(|e| raise(&e))? {
                Told::Batch(batch) => return EventBatch::of(py, batch).map(Some),
                Told::End => return Ok(None),
                Told::Nothing if until.is_some() && left <= STEP => return Ok(None),
                Told::Nothing => py.check_signals()?,
            }
        }
    }
}

#[pymethods]
impl Events {
    #[pyo3(signature = (timeout = 1.0))]
    fn next_batch(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<EventBatch>> {
        self.wait(py, Some(Instant::now() + seconds(timeout)?.min(WAIT_MAX)))
    }

    #[getter]
    fn ended(&self) -> bool {
        self.events.is_ended()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.events.close());
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<EventBatch>> {
        self.wait(py, None)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyTuple>) {
        self.close(py);
    }

    fn __repr__(&self) -> &'static str {
        if self.ended() { "Events(ended)" } else { "Events(open)" }
    }
}

/// Some events, or that some were lost.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct EventBatch {
    events: Py<PyTuple>,
    #[pyo3(get)]
    sequence: u64,
    #[pyo3(get)]
    gap: bool,
    #[pyo3(get)]
    snapshot_end: bool,
}

impl EventBatch {
    fn of(py: Python<'_>, batch: wire::EventBatch) -> PyResult<Self> {
        let wire::EventBatch { events, sequence, gap, snapshot_end } = batch;
        let events = events.into_iter().map(|event| Py::new(py, Event(event))).collect::<PyResult<Vec<_>>>()?;
        Ok(Self { events: PyTuple::new(py, events)?.unbind(), sequence, gap, snapshot_end })
    }
}

#[pymethods]
impl EventBatch {
    #[getter]
    fn events(&self, py: Python<'_>) -> Py<PyTuple> {
        self.events.clone_ref(py)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let gap = if self.gap { ", gap" } else { "" };
        let end = if self.snapshot_end { ", snapshot_end" } else { "" };
        format!("EventBatch({} events, sequence={}{gap}{end})", self.events.bind(py).len(), self.sequence)
    }
}

/// What happened to one position.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Event(wire::Event);

#[pymethods]
impl Event {
    #[getter]
    fn sequence(&self) -> u64 {
        self.0.sequence
    }

    #[getter]
    fn what(&self) -> &'static str {
        use wire::event::What;
        match self.0.what() {
            What::Stored => "stored",
            What::Promoted => "promoted",
            What::Demoted => "demoted",
            What::Removed => "removed",
            What::Unspecified => "unknown",
        }
    }

    #[getter]
    fn handle(&self) -> (u64, u64) {
        let handle = self.0.handle.unwrap_or_default();
        (handle.namespace_id.into(), handle.revision.into())
    }

    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.key)
    }

    #[getter]
    fn parent_key<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        (!self.0.parent_key.is_empty()).then(|| PyBytes::new(py, &self.0.parent_key))
    }

    #[getter]
    fn position(&self) -> u32 {
        self.0.position
    }

    #[getter]
    fn token_ids(&self) -> Vec<u32> {
        self.0.token_ids.clone()
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.0.bytes
    }

    #[getter]
    fn tier(&self) -> Option<&'static str> {
        tier_opt_from_proto(self.0.tier).map(Tier::word)
    }

    #[getter]
    fn groups(&self) -> Vec<u32> {
        self.0.groups.clone()
    }

    fn __repr__(&self) -> String {
        let (what, position, tier) = (self.what(), self.position(), self.tier().unwrap_or("None"));
        format!("Event({what}, position={position}, tier={tier}, sequence={})", self.sequence())
    }
}

#[pymethods]
impl Namespace {
    #[pyo3(signature = (*, all_namespaces = false, snapshot = false, after_sequence = 0, call = None))]
    fn watch_events(
        slf: Bound<'_, Self>,
        all_namespaces: bool,
        snapshot: bool,
        after_sequence: u64,
        call: Option<&Call>,
    ) -> PyResult<Events> {
        let call = args::call(call);
        let opening = |engine: &engine::Engine| engine.watch_events(all_namespaces, snapshot, after_sequence, &call);
        let events = ask(slf.py(), slf.get().engine()?, opening)?;
        Ok(Events { events, _namespace: slf.unbind() })
    }
}
