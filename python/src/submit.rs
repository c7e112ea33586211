//! A namespace: the calls that do not wait, and their completions.

use std::os::fd::AsRawFd as _;

use kvkeep_client::engine::{Engine, Submission, Ticket};
use kvkeep_core::ids::LeaseId;
use pyo3::prelude::*;

use crate::args::{self, Call, Query, seconds};
use crate::error::raise;
use crate::held::sweep;
use crate::items::{How, gets, puts};
use crate::namespace::{Namespace, ask_in_steps};
use crate::results::Completion;

fn ticket(submission: kvkeep_client::Result<Submission>) -> PyResult<Option<u64>> {
    Ok(submission.map_err(|e| raise(&e))?.ticket().map(Ticket::to_bits))
}

#[pymethods]
impl Namespace {
    #[pyo3(signature = (leases = None, *, requests = Vec::new()))]
    fn release(&self, leases: Option<&Bound<'_, PyAny>>, requests: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let leases: Vec<u64> = match leases {
            None => Vec::new(),
            Some(said) => said.extract::<u64>().map(|one| vec![one]).or_else(|_| said.extract())?,
        };
        let requests = requests.iter().map(args::request_id).collect::<PyResult<_>>()?;
        self.engine()?.release(leases.into_iter().map(LeaseId).collect(), requests).map_err(|e| raise(&e))
    }

    #[pyo3(signature = (
        keys, places, blocks = None, *, queue = 0, key_len = None, parts = None, lease = None, call = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn submit_get(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        places: &Bound<'_, PyAny>,
        blocks: Option<&Bound<'_, PyAny>>,
        queue: usize,
        key_len: Option<usize>,
        parts: Option<&Bound<'_, PyAny>>,
        lease: Option<u64>,
        call: Option<&Call>,
    ) -> PyResult<Option<u64>> {
        let engine = self.engine()?;
        let (items, places) = gets(keys, key_len, parts, places, blocks)?;
        let submitted = engine.submit_get(queue, items, places, lease.map(LeaseId), args::call(call));
        sweep(py); // of a busy queue
        ticket(submitted)
    }

    #[pyo3(signature = (
        keys, places, blocks = None, *, queue = 0, key_len = None, parts = None, parent = None, first_position = 0,
        cls = None, keep = false, unordered = false, ttl = None, priority = 0, token_ids = None, call = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn submit_put(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        places: &Bound<'_, PyAny>,
        blocks: Option<&Bound<'_, PyAny>>,
        queue: usize,
        key_len: Option<usize>,
        parts: Option<&Bound<'_, PyAny>>,
        parent: Option<&Bound<'_, PyAny>>,
        first_position: u32,
        cls: Option<&str>,
        keep: bool,
        unordered: bool,
        ttl: Option<f64>,
        priority: i32,
        token_ids: Option<Vec<Vec<u32>>>,
        call: Option<&Call>,
    ) -> PyResult<Option<u64>> {
        let engine = self.engine()?;
        let how = How { parent, first_position, cls, keep, unordered, ttl, priority, token_ids };
        let put = puts(keys, key_len, parts, places, blocks, how)?;
        let submitted = engine.submit_put(queue, put, args::call(call));
        sweep(py);
        ticket(submitted)
    }

    #[pyo3(signature = (queries, *, queue = 0, call = None))]
    fn submit_match(&self, queries: &Bound<'_, PyAny>, queue: usize, call: Option<&Call>) -> PyResult<Option<u64>> {
        let queries = match queries.cast::<Query>() {
            Ok(one) => vec![one.get().0.clone()],
            Err(_) => queries.extract::<Vec<PyRef<'_, Query>>>()?.iter().map(|q| q.0.clone()).collect(),
        };
        ticket(self.engine()?.submit_match(queue, queries, args::call(call)))
    }

    #[pyo3(signature = (queue = 0, max = 64))]
    fn poll(&self, py: Python<'_>, queue: usize, max: usize) -> PyResult<Vec<Completion>> {
        let done = self.engine()?.poll(queue, max).map_err(|e| raise(&e))?;
        sweep(py);
        done.into_iter().map(|done| Completion::of(py, done)).collect()
    }

    #[pyo3(signature = (queue = 0, max = 64, timeout = 1.0))]
    fn wait(&self, py: Python<'_>, queue: usize, max: usize, timeout: f64) -> PyResult<Vec<Completion>> {
        let step = |engine: &Engine, within| engine.wait(queue, max, within).map(|d| (!d.is_empty()).then_some(d));
        let done = ask_in_steps(py, &self.engine()?, seconds(timeout)?, step)?;
        done.unwrap_or_default().into_iter().map(|done| Completion::of(py, done)).collect()
    }

    #[pyo3(signature = (queue = 0))]
    fn event_fd(&self, queue: usize) -> PyResult<i32> {
        Ok(self.engine()?.event_fd(queue).map_err(|e| raise(&e))?.as_raw_fd())
    }

    fn cancel(&self, ticket: u64) -> PyResult<bool> {
        self.engine()?.cancel(Ticket::from_bits(ticket)).map_err(|e| raise(&e))
    }

    fn cancel_request(&self, request_id: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.engine()?.cancel_request(&args::request_id(request_id)?).map_err(|e| raise(&e))
    }
}
