//! The native module of the Python package `kvkeep`: the face of the Rust SDK for engines ([`kvkeep_client::engine`]), in
//! Python's words. What the package promises is written in `kvkeep/_native.pyi`; nothing is decided here.
//!
//! The map: `error` (the one exception) -> `held` (objects whose buffers a call uses) -> `args` (keys, parts, calls) and `format`
//! -> `region`, `place` (memory, and where blocks lie in it) -> `client`, `namespace` (what waits), `submit` (what does not),
//! `sessions`, with `items` (what a get or a put names) -> `results` (codes instead of objects), `mapped` (blocks in the
//! server's memory), `events`, `session_info`, `describe`.
//!
//! The rules: the GIL is released wherever something may be waited for; a lock of this crate is only taken by who has the
//! GIL, so that none is held by another thread when Python forks; and nothing of Python's is touched by the SDK's own thread.

mod args;
mod client;
mod describe;
mod error;
mod events;
mod format;
mod held;
mod items;
mod mapped;
mod namespace;
mod place;
mod region;
mod results;
mod session_info;
mod sessions;
mod submit;

use kvkeep_core::{MissReason, PartStatus, Tier};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// The words of codes: code n is at index n, 0 says nothing.
fn words<'py>(py: Python<'py>, words: &[&str]) -> PyResult<Bound<'py, PyTuple>> {
    PyTuple::new(py, std::iter::once(None).chain(words.iter().map(|w| Some(*w))).collect::<Vec<_>>())
}

#[pymodule(gil_used = true)]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("Error", py.get_type::<error::Error>())?;
    m.add("HIT", PartStatus::Hit.code())?;
    m.add("PENDING", PartStatus::Pending.code())?;
    m.add("LOADING", PartStatus::Loading.code())?;
    m.add("MISS", PartStatus::Miss.code())?;
    m.add("THROTTLED", PartStatus::Throttled.code())?;
    m.add("STORED", results::STORED)?;
    m.add("ALREADY_PRESENT", results::ALREADY_PRESENT)?;
    m.add("IN_PROGRESS", results::IN_PROGRESS)?;
    m.add("REFUSED", results::REFUSED)?;
    // `code` counts from 1 in both.
    m.add("REASONS", words(py, &MissReason::ALL.iter().map(|r| r.word()).collect::<Vec<_>>())?)?;
    m.add("TIERS", words(py, &Tier::ALL.iter().map(|t| t.word()).collect::<Vec<_>>())?)?;
    m.add_class::<format::Group>()?;
    m.add_class::<format::Format>()?;
    m.add_class::<args::RequestInfo>()?;
    m.add_class::<args::Call>()?;
    m.add_class::<region::Region>()?;
    m.add_class::<place::Place>()?;
    m.add_class::<place::Geometry>()?;
    m.add_class::<results::Lease>()?;
    m.add_class::<results::Match>()?;
    m.add_class::<args::Query>()?;
    m.add_class::<results::Got>()?;
    m.add_class::<results::Stored>()?;
    m.add_class::<results::Completion>()?;
    m.add_class::<mapped::MappedMatch>()?;
    m.add_class::<mapped::MappedPart>()?;
    m.add_class::<mapped::MappedBlock>()?;
    m.add_class::<events::Events>()?;
    m.add_class::<events::EventBatch>()?;
    m.add_class::<events::Event>()?;
    m.add_class::<client::Client>()?;
    m.add_class::<namespace::Namespace>()?;
    m.add_class::<sessions::Sessions>()?;
    m.add_class::<session_info::SessionInfo>()?;
    m.add_class::<session_info::Restored>()?;
    m.add_class::<session_info::Tokens>()?;
    m.add_function(wrap_pyfunction!(namespace::_after_fork, m)?)?;
    m.add_function(wrap_pyfunction!(namespace::_close_all, m)?)?;
    Ok(())
}
