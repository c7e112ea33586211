//! What sessions answer.

use std::collections::BTreeMap;

use kvkeep_client as sdk;
use kvkeep_core::Tier;
use kvkeep_core::ids::LeaseId;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// What is known of a session.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct SessionInfo(pub(crate) sdk::SessionInfo);

#[pymethods]
impl SessionInfo {
    #[getter]
    fn id(&self) -> &str {
        &self.0.id
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.0.state.word()
    }

    #[getter]
    fn cls(&self) -> &'static str {
        self.0.class.word()
    }

    #[getter]
    fn positions(&self) -> u64 {
        self.0.positions
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens
    }

    #[getter]
    fn ttl(&self) -> Option<f64> {
        self.0.ttl.map(|t| t.as_secs_f64())
    }

    #[getter]
    fn expires_in(&self) -> Option<f64> {
        self.0.expires_in.map(|t| t.as_secs_f64())
    }

    #[getter]
    fn priority(&self) -> i32 {
        self.0.priority
    }

    #[getter]
    fn attributes(&self) -> BTreeMap<String, String> {
        self.0.attributes.clone()
    }

    #[getter]
    fn parent(&self) -> Option<(String, u64)> {
        self.0.parent.as_ref().map(|p| (p.id.clone(), p.positions))
    }

    #[getter]
    fn pinned(&self) -> Option<&'static str> {
        self.0.pinned.map(Tier::word)
    }

    #[getter]
    fn finished(&self) -> bool {
        self.0.finished
    }

    #[getter]
    fn created_unix_ms(&self) -> u64 {
        self.0.created_unix_ms
    }

    #[getter]
    fn changed_unix_ms(&self) -> u64 {
        self.0.changed_unix_ms
    }

    #[getter]
    fn appends(&self) -> u64 {
        self.0.appends
    }

    #[getter]
    fn revision_matches(&self) -> bool {
        self.0.revision_matches
    }

    #[getter]
    fn uid(&self) -> u64 {
        self.0.uid
    }

    fn __repr__(&self) -> String {
        format!("SessionInfo(id={:?}, positions={}, tokens={})", self.0.id, self.0.positions, self.0.tokens)
    }
}

/// How a restore ended.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Restored(pub(crate) sdk::sessions::Restored);

#[pymethods]
impl Restored {
    #[getter]
    fn positions(&self) -> u64 {
        self.0.progress.positions
    }

    #[getter]
    fn total_positions(&self) -> u64 {
        self.0.progress.total_positions
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.0.progress.bytes
    }

    #[getter]
    fn total_bytes(&self) -> u64 {
        self.0.progress.total_bytes
    }

    #[getter]
    fn usable_positions(&self) -> u64 {
        self.0.usable_positions
    }

    #[getter]
    fn compute_from_token(&self) -> u64 {
        self.0.compute_from_token
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens
    }

    #[getter]
    fn missing(&self) -> Vec<(u64, u64, &str)> {
        self.0.missing.iter().map(|run| (run.first_position, run.count, run.why.as_str())).collect()
    }

    #[getter]
    fn revision_matches(&self) -> bool {
        self.0.revision_matches
    }

    #[getter]
    fn late(&self) -> bool {
        self.0.late
    }

    #[getter]
    fn lease_id(&self) -> Option<u64> {
        self.0.lease.map(|LeaseId(id)| id)
    }

    #[getter]
    fn is_whole(&self) -> bool {
        self.0.is_whole()
    }

    fn __repr__(&self) -> String {
        format!("Restored({} of {} positions)", self.positions(), self.total_positions())
    }
}

/// Token ids of a session.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Tokens(pub(crate) sdk::sessions::Tokens);

#[pymethods]
impl Tokens {
    #[getter]
    fn ids(&self) -> Vec<u32> {
        self.0.ids.clone()
    }

    #[getter]
    fn content<'py>(&self, py: Python<'py>) -> Vec<(u64, u32, Bound<'py, PyBytes>)> {
        self.0.content.iter().map(|c| (c.first_token, c.tokens, PyBytes::new(py, &c.content_id))).collect()
    }

    #[getter]
    fn damaged(&self) -> bool {
        self.0.damaged
    }

    #[getter]
    fn total(&self) -> u64 {
        self.0.total
    }
}
