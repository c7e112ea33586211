//! What calls answer: codes and numbers, and no object per part.

use kvkeep_client as sdk;
use kvkeep_client::PartOutcome;
use kvkeep_client::engine::{self, Outcome};
use kvkeep_core::{PartStatus, Tier};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{as_object, raise};

/// Codes of what became of a part of a put.
pub(crate) const STORED: u8 = 1;
pub(crate) const ALREADY_PRESENT: u8 = 2;
pub(crate) const IN_PROGRESS: u8 = 3;
pub(crate) const REFUSED: u8 = 4;

/// Bytes of codes.
pub(crate) fn codes<'py>(py: Python<'py>, codes: impl Iterator<Item = u8>) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &codes.collect::<Vec<_>>())
}

fn micros(us: u64) -> Option<f64> {
    (us > 0).then(|| us as f64 / 1e6)
}

fn tier_code(tier: Option<Tier>) -> u8 {
    tier.map_or(0, Tier::code)
}

/// A lease that was granted.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Lease(pub(crate) sdk::namespace::Lease);

#[pymethods]
impl Lease {
    #[getter]
    fn id(&self) -> u64 {
        self.0.id.0
    }

    #[getter]
    fn ttl(&self) -> f64 {
        self.0.ttl.as_secs_f64()
    }

    #[getter]
    fn positions(&self) -> u32 {
        self.0.positions
    }

    fn __repr__(&self) -> String {
        format!("Lease(id={}, ttl={}, positions={})", self.id(), self.ttl(), self.positions())
    }
}

/// How much of a chain is here, or why the query is wrong.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Match(pub(crate) Result<sdk::Match, sdk::Error>);

impl Match {
    fn found(&self) -> Option<&sdk::Match> {
        self.0.as_ref().ok()
    }
}

#[pymethods]
impl Match {
    #[getter]
    fn boundary_positions(&self) -> u32 {
        self.found().map_or(0, |m| m.boundary_positions)
    }

    #[getter]
    fn boundary_tokens(&self) -> u64 {
        self.found().map_or(0, |m| m.boundary_tokens)
    }

    #[getter]
    fn lease(&self) -> Option<Lease> {
        self.found().and_then(|m| m.lease).map(Lease)
    }

    #[getter]
    fn lease_id(&self) -> Option<u64> {
        self.found().and_then(sdk::Match::lease_id).map(|id| id.0)
    }

    #[getter]
    fn statuses<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        codes(py, self.found().into_iter().flat_map(|m| &m.statuses).map(|s| s.code()))
    }

    #[getter]
    fn tiers<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        codes(py, self.found().into_iter().flat_map(|m| &m.tiers).map(|t| tier_code(*t)))
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.found().map_or(0, |m| m.estimate.bytes)
    }

    #[getter]
    fn load_seconds(&self) -> Option<f64> {
        self.found().and_then(|m| micros(m.estimate.load_us))
    }

    #[getter]
    fn recompute_seconds(&self) -> Option<f64> {
        self.found().and_then(|m| micros(m.estimate.recompute_us))
    }

    #[getter]
    fn verdict(&self) -> Option<&'static str> {
        match self.found()?.verdict()? {
            sdk::Verdict::Load => Some("load"),
            sdk::Verdict::Recompute => Some("recompute"),
        }
    }

    #[getter]
    fn reason(&self) -> Option<&'static str> {
        Some(self.found()?.reason?.word())
    }

    #[getter]
    fn error(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.as_ref().err().map(|e| as_object(py, e))
    }

    pub(crate) fn __repr__(&self) -> String {
        match &self.0 {
            Ok(m) => format!(
                "Match(boundary_positions={}, boundary_tokens={}, reason={})",
                m.boundary_positions,
                m.boundary_tokens,
                self.reason().unwrap_or("None")
            ),
            Err(e) => format!("Match(error={e})"),
        }
    }
}

/// What came of a get.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Got(pub(crate) Vec<sdk::GotInto>);

#[pymethods]
impl Got {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn hits(&self) -> usize {
        self.0.iter().take_while(|g| g.is_hit()).count()
    }

    #[getter]
    fn all_hit(&self) -> bool {
        self.0.iter().all(sdk::GotInto::is_hit)
    }

    #[getter]
    fn statuses<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        codes(py, self.0.iter().map(|g| g.status.code()))
    }

    #[getter]
    fn reasons<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        codes(py, self.0.iter().map(|g| g.reason.map_or(0, |r| r.code())))
    }

    #[getter]
    fn reason(&self) -> Option<&'static str> {
        let missed = self.0.iter().find(|g| !g.is_hit())?;
        Some(missed.reason.map_or(missed.status.word(), |r| r.word()))
    }

    #[getter]
    fn lengths(&self) -> Vec<usize> {
        self.0.iter().map(|g| g.len).collect()
    }

    #[getter]
    fn in_doubt(&self) -> Vec<usize> {
        self.0.iter().enumerate().filter(|(_, g)| g.in_doubt).map(|(n, _)| n).collect()
    }

    #[getter]
    fn retry_after(&self) -> Option<f64> {
        self.0.iter().find_map(|g| g.retry_after).map(|t| t.as_secs_f64())
    }

    #[getter]
    fn tiers<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        codes(py, self.0.iter().map(|g| tier_code(g.tier)))
    }

    fn __repr__(&self) -> String {
        format!("Got({} of {} hits, reason={})", self.hits(), self.0.len(), self.reason().unwrap_or("None"))
    }
}

/// What came of a put.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Stored(pub(crate) Vec<PartOutcome>);

fn outcome_code(outcome: &PartOutcome) -> u8 {
    match outcome {
        PartOutcome::Stored { .. } => STORED,
        PartOutcome::AlreadyPresent { .. } => ALREADY_PRESENT,
        PartOutcome::InProgressElsewhere { .. } => IN_PROGRESS,
        PartOutcome::Refused(_) => REFUSED,
    }
}

#[pymethods]
impl Stored {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn kept(&self) -> usize {
        self.0.iter().take_while(|o| o.is_kept()).count()
    }

    #[getter]
    fn all_kept(&self) -> bool {
        self.0.iter().all(PartOutcome::is_kept)
    }

    #[getter]
    fn outcomes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        codes(py, self.0.iter().map(outcome_code))
    }

    #[getter]
    fn error(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.iter().find_map(|o| match o {
            PartOutcome::Refused(e) => Some(as_object(py, e)),
            _ => None,
        })
    }

    #[getter]
    fn retry_after(&self) -> Option<f64> {
        let after = self.0.iter().find_map(|o| match o {
            PartOutcome::InProgressElsewhere { retry_after } => Some(*retry_after),
            PartOutcome::Refused(e) => e.retry_after(),
            _ => None,
        });
        after.map(|t| t.as_secs_f64())
    }

    #[getter]
    fn copies(&self) -> u32 {
        let copies = |o: &PartOutcome| match o {
            PartOutcome::Stored { copies, .. } => Some(*copies),
            _ => None,
        };
        self.0.iter().filter_map(copies).min().unwrap_or(0)
    }

    #[getter]
    fn degraded(&self) -> bool {
        self.0.iter().any(|o| matches!(o, PartOutcome::Stored { degraded: true, .. }))
    }

    fn __repr__(&self) -> String {
        format!("Stored({} of {} kept)", self.kept(), self.0.len())
    }
}

/// A submitted call that has ended.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Completion {
    ticket: u64,
    request_id: Vec<u8>,
    #[pyo3(get)]
    cancelled: bool,
    #[pyo3(get)]
    kind: &'static str,
    #[pyo3(get)]
    got: Option<Py<Got>>,
    #[pyo3(get)]
    stored: Option<Py<Stored>>,
    #[pyo3(get)]
    matched: Option<Vec<Py<Match>>>,
    #[pyo3(get)]
    error: Option<Py<PyAny>>,
}

impl Completion {
    pub(crate) fn of(py: Python<'_>, done: engine::Completion) -> PyResult<Self> {
        let mut completion = Self {
            ticket: done.ticket.to_bits(),
            request_id: done.request_id.as_bytes().to_vec(),
            cancelled: done.cancelled,
            kind: "wrong",
            got: None,
            stored: None,
            matched: None,
            error: None,
        };
        match done.outcome {
            Outcome::Got(got) => (completion.kind, completion.got) = ("get", Some(Py::new(py, Got(got))?)),
            Outcome::Put(put) => (completion.kind, completion.stored) = ("put", Some(Py::new(py, Stored(put))?)),
            Outcome::Matched(found) => {
                let found = found.into_iter().map(|m| Py::new(py, Match(m))).collect::<PyResult<_>>()?;
                (completion.kind, completion.matched) = ("match", Some(found));
            }
            Outcome::Wrong(e) => completion.error = Some(raise(&e).into_value(py).into_any()),
        }
        Ok(completion)
    }
}

#[pymethods]
impl Completion {
    #[getter]
    fn ticket(&self) -> u64 {
        self.ticket
    }

    #[getter]
    fn request_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.request_id)
    }

    fn __repr__(&self) -> String {
        format!("Completion(ticket={}, kind={:?}, cancelled={})", self.ticket, self.kind, self.cancelled)
    }
}

/// The codes of some statuses.
pub(crate) fn statuses<'py>(py: Python<'py>, of: &[PartStatus]) -> Bound<'py, PyBytes> {
    codes(py, of.iter().map(|s| s.code()))
}
