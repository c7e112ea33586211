//! A namespace: what it says of itself.

use kvkeep_client::engine::{Description, EngineCounters};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::namespace::{Namespace, ask};

fn counters<'py>(py: Python<'py>, c: &EngineCounters) -> PyResult<Bound<'py, PyDict>> {
    let said = PyDict::new(py);
    let all = [
        ("submitted", c.submitted),
        ("completed", c.completed),
        ("busy_refused", c.busy_refused),
        ("cancelled", c.cancelled),
        ("lost", c.lost),
        ("in_doubt", c.in_doubt),
        ("restarts", c.restarts),
        ("forks", c.forks),
        ("releases_dropped", c.releases_dropped),
    ];
    all.into_iter().try_for_each(|(name, n)| said.set_item(name, n))?;
    Ok(said)
}

fn client_counters<'py>(py: Python<'py>, c: &kvkeep_client::Counters) -> PyResult<Bound<'py, PyDict>> {
    let said = PyDict::new(py);
    let all = [
        ("calls", c.calls),
        ("retries", c.retries),
        ("retries_denied", c.retries_denied),
        ("hellos", c.hellos),
        ("restarts", c.restarts),
        ("bad_sums", c.bad_sums),
        ("violations", c.violations),
        ("late_parts", c.late_parts),
        ("lost_calls", c.lost_calls),
        ("breaker_opened", c.breaker_opened),
        ("breaker_refused", c.breaker_refused),
        ("doubtful_parts", c.doubtful_parts),
    ];
    all.into_iter().try_for_each(|(name, n)| said.set_item(name, n))?;
    Ok(said)
}

fn describe<'py>(py: Python<'py>, d: &Description) -> PyResult<Bound<'py, PyDict>> {
    let said = PyDict::new(py);
    said.set_item("process", d.process)?;
    said.set_item("instance", d.instance.0.map(|b| format!("{b:02x}")).concat())?;
    said.set_item("endpoint", &d.endpoint)?;
    said.set_item("namespace", &d.namespace)?;
    said.set_item("handle", d.handle.map(|h| (h.namespace.0, h.revision.0)))?;
    said.set_item("standing", d.standing)?;
    said.set_item("why", &d.why)?;
    let way = d.way.as_ref().map(|way| {
        let dict = PyDict::new(py);
        dict.set_item("wire", way.wire.word())?;
        dict.set_item("to", &way.to)?;
        dict.set_item("regions", way.regions)?;
        dict.set_item("mapped", way.mapped)?;
        dict.set_item("why", &way.why)?;
        PyResult::Ok(dict)
    });
    said.set_item("way", way.transpose()?)?;
    said.set_item("breaker", d.breaker.map(|b| format!("{b:?}").to_lowercase()))?;
    said.set_item("server", d.server.as_ref().map(|(name, _)| name))?;
    said.set_item("server_epoch", d.server.as_ref().map(|(_, epoch)| epoch))?;
    said.set_item("counters", counters(py, &d.counters)?)?;
    said.set_item("client", client_counters(py, &d.client)?)?;
    said.set_item("queues", d.queues.iter().map(|q| (q.in_flight, q.waiting)).collect::<Vec<_>>())?;
    said.set_item("regions", d.regions.iter().map(|r| (r.bytes, r.registered.is_some())).collect::<Vec<_>>())?;
    said.set_item("text", d.to_string())?;
    Ok(said)
}

#[pymethods]
impl Namespace {
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        describe(py, &ask(py, self.engine()?, |engine| engine.describe())?)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        counters(py, &ask(py, self.engine()?, |engine| engine.counters())?)
    }

    fn __repr__(&self) -> String {
        self.engine().map_or_else(
            |_| "Namespace(closed)".to_owned(),
            |engine| format!("Namespace({:?} at {:?})", engine.config().namespace, engine.config().client.endpoint),
        )
    }
}
