//! A namespace: the calls that wait. Each releases the GIL while it does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvkeep_client as sdk;
use kvkeep_client::engine::{Engine, EngineConfig, WAIT_MAX};
use kvkeep_client::{Fault, MatchQuery};
use kvkeep_core::ids::LeaseId;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::args::{self, Call, Query, opt_seconds, seconds};
use crate::error::{raise, wrong};
use crate::format::Format;
use crate::held::sweep;
use crate::items::{How, gets, puts};
use crate::region::Region;
use crate::results::{Got, Lease, Match, Stored, statuses};
use crate::sessions::Sessions;

/// Longest step of a wait between two looks for signals.
pub(crate) const STEP: Duration = Duration::from_millis(200);

/// An engine; `None`: closed. Locked by threads that have the GIL only, and never while one waits.
type Slot = Mutex<Option<Arc<Engine>>>;

/// Every namespace there is, for forks and for the end of the interpreter. Locked as a slot is.
static ALL: Mutex<Vec<Weak<Slot>>> = Mutex::new(Vec::new());

/// Nothing that is locked here is left half done by a panic.
pub(crate) fn alone<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn all() -> Vec<Arc<Slot>> {
    alone(&ALL).iter().filter_map(Weak::upgrade).collect()
}

/// In a forked child: see [`Engine::after_fork`] and `mapped`.
#[pyfunction]
pub(crate) fn _after_fork() {
    for slot in all() {
        if let Some(engine) = &*alone(&slot) {
            engine.after_fork();
        }
    }
    crate::mapped::after_fork();
}

/// At the end of the interpreter: no call may use the memory of objects that are taken down.
#[pyfunction]
pub(crate) fn _close_all(py: Python<'_>) {
    let engines: Vec<_> = all().iter().filter_map(|slot| alone(slot).take()).collect();
    py.detach(|| drop(engines));
    sweep(py);
}

/// What this process has of a namespace: connections, the I/O thread, queues.
#[pyclass(frozen, weakref, module = "kvkeep")]
pub(crate) struct Namespace {
    slot: Arc<Slot>,
    format: Py<Format>,
}

impl Namespace {
    pub(crate) fn open(config: EngineConfig, format: Py<Format>) -> PyResult<Self> {
        let engine = Engine::open(config).map_err(|e| raise(&e))?;
        let slot = Arc::new(Mutex::new(Some(Arc::new(engine))));
        let mut all = alone(&ALL);
        all.retain(|slot| slot.strong_count() > 0);
        all.push(Arc::downgrade(&slot));
        Ok(Self { slot, format })
    }

    /// # Errors
    /// Where it was closed.
    pub(crate) fn engine(&self) -> PyResult<Arc<Engine>> {
        self.engine_if_open().ok_or_else(|| wrong("the namespace was closed: open another one"))
    }

    /// Asks nothing of Python, which may be at its end.
    pub(crate) fn engine_if_open(&self) -> Option<Arc<Engine>> {
        alone(&self.slot).as_ref().map(Arc::clone)
    }

    fn take(&self) -> Option<Arc<Engine>> {
        alone(&self.slot).take()
    }

    /// A call that may wait.
    fn ask<T: Send>(&self, py: Python<'_>, verb: impl FnOnce(&Engine) -> sdk::Result<T> + Send) -> PyResult<T> {
        ask(py, self.engine()?, verb)
    }
}

/// A call that may wait, without the GIL.
pub(crate) fn ask<T: Send>(
    py: Python<'_>,
    engine: Arc<Engine>,
    verb: impl FnOnce(&Engine) -> sdk::Result<T> + Send,
) -> PyResult<T> {
    let answer = py.detach(move || {
        let answer = verb(&engine);
        // Where the namespace was closed meanwhile this is its end, and waits.
        drop(engine);
        answer
    });
    sweep(py);
    answer.map_err(|e| raise(&e))
}

/// The same for a wait that may be long: in steps, between which signals (Ctrl-C) are looked for. `verb` answers `None` where its
/// step was not enough.
pub(crate) fn ask_in_steps<T: Send>(
    py: Python<'_>,
    engine: &Arc<Engine>,
    within: Duration,
    verb: impl Fn(&Engine, Duration) -> sdk::Result<Option<T>> + Send + Sync,
) -> PyResult<Option<T>> {
    let until = Instant::now() + within.min(WAIT_MAX);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let answer = ask(py, Arc::clone(engine), |engine| verb(engine, left.min(STEP)))?;
        if answer.is_some() || left <= STEP {
            return Ok(answer);
        }
        py.check_signals()?;
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(engine) = self.take() {
            Python::attach(|py| py.detach(|| drop(engine)));
        }
    }
}

#[pymethods]
impl Namespace {
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.engine()?.config().namespace.clone())
    }

    #[getter]
    fn format(&self, py: Python<'_>) -> Py<Format> {
        self.format.clone_ref(py)
    }

    #[getter]
    fn instance<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let instance = self.engine()?.instance().map_err(|e| raise(&e))?;
        Ok(PyBytes::new(py, &instance.0))
    }

    #[getter]
    fn sessions(slf: PyRef<'_, Self>) -> Sessions {
        Sessions(slf.into())
    }

    #[pyo3(signature = (keys, *, key_len = None, lease = None, promote = false, statuses = false, release = None, call = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn r#match(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        key_len: Option<usize>,
        lease: Option<f64>,
        promote: bool,
        statuses: bool,
        release: Option<u64>,
        call: Option<&Call>,
    ) -> PyResult<Match> {
        let query = MatchQuery {
            keys: args::keys(keys, key_len)?,
            lease: opt_seconds(lease)?,
            promote,
            statuses,
            release: release.map(LeaseId),
            ..MatchQuery::default()
        };
        let call = args::call(call);
        Ok(Match(Ok(self.ask(py, |engine| engine.match_chain(query, &call))?)))
    }

    #[pyo3(signature = (queries, *, call = None))]
    fn match_many(&self, py: Python<'_>, queries: Vec<PyRef<'_, Query>>, call: Option<&Call>) -> PyResult<Vec<Match>> {
        let (queries, call) = (queries.iter().map(|q| q.0.clone()).collect(), args::call(call));
        let found = self.ask(py, |engine| engine.match_many(queries, &call))?;
        Ok(found.into_iter().map(Match).collect())
    }

    #[pyo3(signature = (keys, *, key_len = None, ttl = None, call = None))]
    fn lease<'py>(
        &self,
        py: Python<'py>,
        keys: &Bound<'_, PyAny>,
        key_len: Option<usize>,
        ttl: Option<f64>,
        call: Option<&Call>,
    ) -> PyResult<(Option<Lease>, Bound<'py, PyBytes>)> {
        let (keys, ttl, call) = (args::keys(keys, key_len)?, opt_seconds(ttl)?, args::call(call));
        let (lease, said) = self.ask(py, |engine| engine.lease(keys, ttl, &call))?;
        Ok((lease.map(Lease), statuses(py, &said)))
    }

    #[pyo3(signature = (lease, *, ttl = None, call = None))]
    fn renew(&self, py: Python<'_>, lease: u64, ttl: Option<f64>, call: Option<&Call>) -> PyResult<Option<Lease>> {
        let (ttl, call) = (opt_seconds(ttl)?, args::call(call));
        Ok(self.ask(py, |engine| engine.renew(LeaseId(lease), ttl, &call))?.map(Lease))
    }

    #[pyo3(signature = (keys, *, key_len = None, call = None))]
    fn touch(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        key_len: Option<usize>,
        call: Option<&Call>,
    ) -> PyResult<u32> {
        let (keys, call) = (args::keys(keys, key_len)?, args::call(call));
        self.ask(py, |engine| engine.touch(keys, &call))
    }

    #[pyo3(signature = (keys, places, blocks = None, *, key_len = None, parts = None, lease = None, call = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn get_into(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        places: &Bound<'_, PyAny>,
        blocks: Option<&Bound<'_, PyAny>>,
        key_len: Option<usize>,
        parts: Option<&Bound<'_, PyAny>>,
        lease: Option<u64>,
        call: Option<&Call>,
    ) -> PyResult<Got> {
        let (items, places) = gets(keys, key_len, parts, places, blocks)?;
        let call = args::call(call);
        Ok(Got(self.ask(py, |engine| engine.get(items, places, lease.map(LeaseId), &call))?))
    }

    #[pyo3(signature = (
        keys, places, blocks = None, *, key_len = None, parts = None, parent = None, first_position = 0, cls = None,
        keep = false, unordered = false, ttl = None, priority = 0, token_ids = None, call = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn put_from(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        places: &Bound<'_, PyAny>,
        blocks: Option<&Bound<'_, PyAny>>,
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
    ) -> PyResult<Stored> {
        let how = How { parent, first_position, cls, keep, unordered, ttl, priority, token_ids };
        let put = puts(keys, key_len, parts, places, blocks, how)?;
        let call = args::call(call);
        Ok(Stored(self.ask(py, |engine| engine.put(put, &call))?))
    }

    #[pyo3(signature = (region, *, timeout = 10.0))]
    fn register_region(&self, py: Python<'_>, region: &Region, timeout: f64) -> PyResult<bool> {
        let (region, timeout) = (region.region.clone(), seconds(timeout)?);
        self.ask(py, |engine| engine.register(&region, timeout))
    }

    #[pyo3(signature = (timeout = 1.0))]
    fn settle(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        self.ask(py, |engine| engine.settle(timeout))
    }

    #[pyo3(signature = (timeout = 10.0))]
    fn ready(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let step = |engine: &Engine, within| engine.ready(within).map(|ready| ready.then_some(()));
        Ok(ask_in_steps(py, &self.engine()?, seconds(timeout)?, step)?.is_some())
    }

    #[pyo3(signature = (revision, *, call = None))]
    fn advance_revision(&self, py: Python<'_>, revision: &str, call: Option<&Call>) -> PyResult<bool> {
        let call = args::call(call);
        self.ask(py, |engine| engine.advance_revision(revision, &call))
    }

    #[pyo3(signature = (keys, *, key_len = None, call = None))]
    fn remove(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        key_len: Option<usize>,
        call: Option<&Call>,
    ) -> PyResult<(u32, u32, u32)> {
        let (keys, call) = (args::keys(keys, key_len)?, args::call(call));
        let removing = |engine: &Engine| {
            engine.with_namespace(&call, move |ns, call| async move { ns.remove(&keys, &call).await })
        };
        self.ask(py, removing).map(|sum| (sum.removed, sum.absent, sum.held))
    }

    #[pyo3(signature = (keys, *, key_len = None, tier = "dram", call = None))]
    fn prefetch(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        key_len: Option<usize>,
        tier: &str,
        call: Option<&Call>,
    ) -> PyResult<(u32, u32, u32)> {
        let (keys, tier, call) = (args::keys(keys, key_len)?, args::tier(tier)?, args::call(call));
        let bringing = |engine: &Engine| {
            engine.with_namespace(&call, move |ns, call| async move { ns.prefetch(&keys, tier, &call).await })
        };
        self.ask(py, bringing).map(|sum| (sum.started, sum.already, sum.refused))
    }

    fn inject(&self, fault: &str) -> PyResult<()> {
        let fault = match fault {
            "none" => Fault::None,
            "refused" => Fault::Refused,
            "silent" => Fault::Silent,
            "miss" => Fault::Miss,
            _ => return Err(pyo3::exceptions::PyValueError::new_err("a fault is none, refused, silent or miss")),
        };
        self.engine()?.inject(fault).map_err(|e| raise(&e))
    }

    fn after_fork(&self) {
        // A closed one has no sockets.
        if let Ok(engine) = self.engine() {
            engine.after_fork();
        }
    }

    fn close(&self, py: Python<'_>) {
        let engine = self.take();
        py.detach(|| drop(engine));
        sweep(py);
    }

    #[getter]
    fn closed(&self) -> bool {
        self.engine().is_err()
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, pyo3::types::PyTuple>) {
        self.close(py);
    }
}
