//! Blocks read in place, in the server's memory: nothing is copied.
//!
//! All parts of a match share one [`Hold`]: the mapping lives as long as any of them or a buffer of one, and the lease is given back
//! when none is left, or sooner when it is said so and nobody reads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use kvkeep_client as sdk;
use kvkeep_core::ids::LeaseId;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::args::{self, Call, Query};
use crate::namespace::{Namespace, alone, ask};
use crate::results::Match;

/// Every hold there is. Locked by threads that have the GIL only, and so is a hold's state, which is locked first.
static ALL: Mutex<All> = Mutex::new(All { holds: BTreeMap::new(), leases: BTreeMap::new() });

struct All {
    /// By number, for forks.
    holds: BTreeMap<u64, Weak<Hold>>,
    /// Holds that have this lease: two matches of one request have the same.
    leases: BTreeMap<LeaseId, usize>,
}

/// What the parts of one match share.
struct Hold {
    number: u64,
    namespace: Py<Namespace>,
    mapped: sdk::MappedMatch,
    state: Mutex<State>,
}

struct State {
    /// `None`: there was none, it was given back, or it is this process's parent's.
    lease: Option<LeaseId>,
    /// Buffers of its blocks.
    views: usize,
    /// No buffer is given any more; why.
    over: Option<&'static str>,
}

/// In a forked child, before anything else is done there: the lease is the parent's, and so is the mapping.
pub(crate) fn after_fork() {
    alone(&ALL).leases.clear();
    let holds: Vec<_> = alone(&ALL).holds.values().filter_map(Weak::upgrade).collect();
    for hold in holds {
        hold.mapped.after_fork();
        let mut state = hold.state();
        state.lease = None;
        state.over = Some("the server's memory is not mapped in a forked child: match again there");
    }
}

impl Hold {
    fn new(namespace: Py<Namespace>, mapped: sdk::MappedMatch) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lease = mapped.found.lease_id();
        let state = Mutex::new(State { lease, views: 0, over: None });
        let hold = Arc::new(Self { number, namespace, mapped, state });
        let mut all = alone(&ALL);
        all.holds.insert(number, Arc::downgrade(&hold));
        if let Some(lease) = lease {
            *all.leases.entry(lease).or_default() += 1;
        }
        hold
    }

    fn state(&self) -> MutexGuard<'_, State> {
        alone(&self.state)
    }

    fn part(&self, index: usize) -> &sdk::MappedPart {
        &self.mapped.parts[index]
    }

    fn release(&self) -> bool {
        let mut state = self.state();
        state.over.get_or_insert("it was released: match again");
        self.give_back(&mut state);
        state.views == 0
    }

    /// The lease, where nobody reads: to the server, where no other hold has it.
    fn give_back(&self, state: &mut State) {
        if state.views == 0
            && let Some(lease) = state.lease.take()
            && is_last(lease)
            && let Some(engine) = self.namespace.get().engine_if_open()
        {
            // Fails where this process can have no engine; the lease ends by itself, as it does when the namespace was closed.
            let _ = engine.release(vec![lease], Vec::new());
        }
    }
}

/// Takes a hold's share of a lease; whether it was the last one.
fn is_last(lease: LeaseId) -> bool {
    let mut all = alone(&ALL);
    match all.leases.get_mut(&lease) {
        Some(holds) if *holds > 1 => {
            *holds -= 1;
            false
        }
        _ => {
            all.leases.remove(&lease);
            true
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        alone(&ALL).holds.remove(&self.number);
        self.release();
    }
}

/// A match, and where its blocks lie.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct MappedMatch {
    hold: Arc<Hold>,
    parts: Py<PyTuple>,
}

#[pymethods]
impl MappedMatch {
    #[getter]
    fn found(&self) -> Match {
        Match(Ok(self.hold.mapped.found.clone()))
    }

    #[getter]
    fn parts(&self, py: Python<'_>) -> Py<PyTuple> {
        self.parts.clone_ref(py)
    }

    fn release(&self) -> bool {
        self.hold.release()
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, _args: &Bound<'_, PyTuple>) {
        self.hold.release();
    }

    fn __repr__(&self) -> String {
        format!("MappedMatch({} parts, {})", self.hold.mapped.parts.len(), self.found().__repr__())
    }
}

/// One part.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct MappedPart {
    hold: Arc<Hold>,
    index: usize,
}

impl MappedPart {
    fn part(&self) -> &sdk::MappedPart {
        self.hold.part(self.index)
    }
}

#[pymethods]
impl MappedPart {
    #[getter]
    fn item(&self) -> usize {
        self.part().item
    }

    #[getter]
    fn group(&self) -> u16 {
        self.part().group.0
    }

    #[getter]
    fn shard(&self) -> u16 {
        self.part().shard.0
    }

    #[getter]
    fn status(&self) -> u8 {
        self.part().status.code()
    }

    #[getter]
    fn reason(&self) -> Option<&'static str> {
        Some(self.part().reason?.word())
    }

    #[getter]
    fn block(&self) -> Option<MappedBlock> {
        self.part().block.as_ref()?;
        Some(MappedBlock { hold: Arc::clone(&self.hold), index: self.index })
    }

    fn __repr__(&self) -> String {
        let part = self.part();
        format!(
            "MappedPart(item={}, group={}, shard={}, {})",
            part.item,
            part.group.0,
            part.shard.0,
            part.status.word()
        )
    }
}

/// A block in the server's memory. Its buffer is made in `region`.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct MappedBlock {
    hold: Arc<Hold>,
    index: usize,
}

impl MappedBlock {
    fn block(&self) -> Option<&sdk::MappedBlock> {
        self.hold.part(self.index).block.as_ref()
    }

    /// The block, where a buffer of it may be had.
    pub(crate) fn readable(&self) -> PyResult<&sdk::MappedBlock> {
        let over = self.hold.state().over;
        match (self.block(), over) {
            (Some(block), None) => Ok(block),
            (_, why) => Err(PyBufferError::new_err(why.unwrap_or("the part is no hit"))),
        }
    }

    pub(crate) fn view_begins(&self) {
        self.hold.state().views += 1;
    }

    pub(crate) fn view_ends(&self) {
        let mut state = self.hold.state();
        state.views -= 1;
        if state.over.is_some() {
            self.hold.give_back(&mut state);
        }
    }
}

#[pymethods]
impl MappedBlock {
    fn __len__(&self) -> usize {
        self.block().map_or(0, sdk::MappedBlock::len)
    }

    #[getter]
    fn address(&self) -> usize {
        self.block().map_or(0, |block| block.as_ptr().addr())
    }

    #[getter]
    fn version(&self) -> u64 {
        self.block().map_or(0, |block| block.version.0)
    }

    fn is_still_there(&self) -> bool {
        self.block().is_some_and(sdk::MappedBlock::is_still_there)
    }

    fn __repr__(&self) -> String {
        let there = if self.is_still_there() { "there" } else { "gone" };
        format!("MappedBlock({} bytes, {there})", self.__len__())
    }
}

#[pymethods]
impl Namespace {
    #[pyo3(signature = (query, *, call = None))]
    fn match_mapped(slf: Bound<'_, Self>, query: &Query, call: Option<&Call>) -> PyResult<MappedMatch> {
        let (py, query, call) = (slf.py(), query.0.clone(), args::call(call));
        let mapped = ask(py, slf.get().engine()?, |engine| engine.match_mapped(query, &call))?;
        let hold = Hold::new(slf.unbind(), mapped);
        let parts =
            (0..hold.mapped.parts.len()).map(|index| Py::new(py, MappedPart { hold: Arc::clone(&hold), index }));
        let parts = PyTuple::new(py, parts.collect::<PyResult<Vec<_>>>()?)?.unbind();
        Ok(MappedMatch { hold, parts })
    }
}
