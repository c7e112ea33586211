//! Sessions, as in the SDK. They fail where the server is lost.

use std::collections::BTreeMap;

use kvkeep_client::sessions::{Append, ContentPart, ListSessions, OpenSession, Parent, Restore};
use kvkeep_client::{self as sdk, SessionHint, SessionState};
use kvkeep_core::Tier;
use kvkeep_core::ids::LeaseId;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::args::{self, Call, opt_seconds, seconds};
use crate::namespace::{Namespace, ask};
use crate::place::ids;

/// The sessions of a namespace.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Sessions(pub(crate) Py<Namespace>);

impl Sessions {
    fn run<T, F>(
        &self,
        py: Python<'_>,
        call: Option<&Call>,
        verb: impl FnOnce(sdk::Sessions, sdk::Call) -> F + Send + 'static,
    ) -> PyResult<T>
    where
        T: Send + 'static,
        F: Future<Output = sdk::Result<T>> + Send + 'static,
    {
        let call = args::call(call);
        ask(py, self.0.get().engine()?, move |engine| {
            engine.with_namespace(&call, move |ns, call| verb(ns.sessions(), call))
        })
    }
}

fn state(said: &str) -> PyResult<SessionState> {
    args::word(said, &[SessionState::Open, SessionState::Closed], SessionState::word)
}

#[pymethods]
impl Sessions {
    #[pyo3(signature = (id, *, cls = None, ttl = None, priority = 0, attributes = None, parent = None, call = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn open(
        &self,
        py: Python<'_>,
        id: String,
        cls: Option<&str>,
        ttl: Option<f64>,
        priority: i32,
        attributes: Option<BTreeMap<String, String>>,
        parent: Option<(String, u64)>,
        call: Option<&Call>,
    ) -> PyResult<(SessionInfo, bool)> {
        let open = OpenSession {
            class: args::class(cls)?,
            ttl: opt_seconds(ttl)?,
            priority,
            attributes: attributes.unwrap_or_default(),
            parent: parent.map(|(id, positions)| Parent { id, positions }),
        };
        let (info, made) = self.run(py, call, |s, call| async move { s.open(&id, &open, &call).await })?;
        Ok((SessionInfo(info), made))
    }

    #[pyo3(signature = (
        id, keys = None, *, key_len = None, from_position, token_ids = None, from_token = 0, content = Vec::new(), call = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn append(
        &self,
        py: Python<'_>,
        id: String,
        keys: Option<&Bound<'_, PyAny>>,
        key_len: Option<usize>,
        from_position: u64,
        token_ids: Option<&Bound<'_, PyAny>>,
        from_token: u64,
        content: Vec<(u64, u32, Vec<u8>)>,
        call: Option<&Call>,
    ) -> PyResult<(u64, u64, bool)> {
        let content = content.into_iter().map(|(first_token, tokens, content_id)| ContentPart {
            first_token,
            tokens,
            content_id: content_id.into(),
        });
        let append = Append {
            from_position,
            keys: keys.map_or_else(|| Ok(Vec::new()), |keys| args::keys(keys, key_len))?,
            from_token,
            token_ids: token_ids.map(ids).transpose()?.unwrap_or_default(),
            content: content.collect(),
        };
        let all = self.run(py, call, |s, call| async move { s.append(&id, &append, &call).await })?;
        Ok((all.positions, all.tokens, all.repeated))
    }

    #[pyo3(signature = (id, *, call = None))]
    fn get(&self, py: Python<'_>, id: String, call: Option<&Call>) -> PyResult<SessionInfo> {
        self.run(py, call, |s, call| async move { s.get(&id, &call).await }).map(SessionInfo)
    }

    #[pyo3(signature = (
        prefix = String::new(), *, cls = None, state = None, attributes = None, all_namespaces = false, limit = 1000,
        call = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn list(
        &self,
        py: Python<'_>,
        prefix: String,
        cls: Option<&str>,
        state: Option<&str>,
        attributes: Option<BTreeMap<String, String>>,
        all_namespaces: bool,
        limit: usize,
        call: Option<&Call>,
    ) -> PyResult<Vec<SessionInfo>> {
        let which = ListSessions {
            all_namespaces,
            id_prefix: prefix,
            class: args::class(cls)?,
            state: state.map(self::state).transpose()?,
            attributes: attributes.unwrap_or_default(),
        };
        let (found, _) = self.run(py, call, move |s, call| async move { s.list(&which, limit, &call).await })?;
        Ok(found.into_iter().map(SessionInfo).collect())
    }

    #[pyo3(signature = (id, *, call = None))]
    fn keys<'py>(
        &self,
        py: Python<'py>,
        id: String,
        call: Option<&Call>,
    ) -> PyResult<Vec<Option<Bound<'py, PyBytes>>>> {
        let all = self.run(py, call, |s, call| async move { s.manifest_all(&id, &call).await })?;
        Ok(all.into_iter().map(|position| position.key.map(|key| PyBytes::new(py, &key))).collect())
    }

    #[pyo3(signature = (id, *, tier = "dram", lease = None, call = None))]
    fn restore(
        &self,
        py: Python<'_>,
        id: String,
        tier: &str,
        lease: Option<f64>,
        call: Option<&Call>,
    ) -> PyResult<Restored> {
        let restore = Restore { tier: args::tier(tier)?, lease: opt_seconds(lease)? };
        let ended =
            self.run(py, call, move |s, call| async move { s.restore(&id, &restore, &call).await?.finish().await });
        ended.map(Restored)
    }

    #[pyo3(signature = (id, first = 0, count = None, *, call = None))]
    fn tokens(
        &self,
        py: Python<'_>,
        id: String,
        first: u64,
        count: Option<u32>,
        call: Option<&Call>,
    ) -> PyResult<Tokens> {
        let tokens = self.run(py, call, move |s, call| async move {
            match (first, count) {
                (first, None) => s.tokens_from(&id, first, &call).await,
                (first, Some(count)) => s.tokens(&id, first, count, &call).await,
            }
        });
        tokens.map(Tokens)
    }

    #[pyo3(signature = (id, to, at_position = None, *, call = None))]
    fn fork(
        &self,
        py: Python<'_>,
        id: String,
        to: String,
        at_position: Option<u64>,
        call: Option<&Call>,
    ) -> PyResult<(SessionInfo, bool)> {
        let (info, made) =
            self.run(py, call, move |s, call| async move { s.fork(&id, &to, at_position, &call).await })?;
        Ok((SessionInfo(info), made))
    }

    #[pyo3(signature = (id, positions, *, keep_tokens = false, call = None))]
    fn truncate(
        &self,
        py: Python<'_>,
        id: String,
        positions: u64,
        keep_tokens: bool,
        call: Option<&Call>,
    ) -> PyResult<SessionInfo> {
        let cut = move |s: sdk::Sessions, call| async move { s.truncate(&id, positions, keep_tokens, &call).await };
        self.run(py, call, cut).map(SessionInfo)
    }

    #[pyo3(signature = (id, tier = "dram", *, call = None))]
    fn pin(&self, py: Python<'_>, id: String, tier: &str, call: Option<&Call>) -> PyResult<SessionInfo> {
        let tier = args::tier(tier)?;
        self.run(py, call, move |s, call| async move { s.pin(&id, tier, &call).await }).map(SessionInfo)
    }

    #[pyo3(signature = (id, *, call = None))]
    fn unpin(&self, py: Python<'_>, id: String, call: Option<&Call>) -> PyResult<SessionInfo> {
        self.run(py, call, |s, call| async move { s.unpin(&id, &call).await }).map(SessionInfo)
    }

    #[pyo3(signature = (id, *, finished = false, paused = false, due_in = None, priority = None, call = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn hint(
        &self,
        py: Python<'_>,
        id: String,
        finished: bool,
        paused: bool,
        due_in: Option<f64>,
        priority: Option<i32>,
        call: Option<&Call>,
    ) -> PyResult<u64> {
        let due = due_in.map(seconds).transpose()?.map(SessionHint::DueIn);
        let said = [
            finished.then_some(SessionHint::Finished),
            paused.then_some(SessionHint::Paused),
            due,
            priority.map(SessionHint::Priority),
        ];
        let hints: Vec<_> = said.into_iter().flatten().collect();
        if hints.is_empty() {
            return Err(PyValueError::new_err("a hint says finished, paused, due_in or priority"));
        }
        self.run(py, call, move |s, call| async move { s.hint(&id, &hints, &call).await })
    }

    #[pyo3(signature = (id, *, call = None))]
    fn close(&self, py: Python<'_>, id: String, call: Option<&Call>) -> PyResult<SessionInfo> {
        self.run(py, call, |s, call| async move { s.close(&id, &call).await }).map(SessionInfo)
    }

    #[pyo3(signature = (id, *, call = None))]
    fn delete(&self, py: Python<'_>, id: String, call: Option<&Call>) -> PyResult<bool> {
        self.run(py, call, |s, call| async move { s.delete(&id, &call).await })
    }
}

/// What is known of a session.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct SessionInfo(sdk::SessionInfo);

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
pub(crate) struct Restored(sdk::sessions::Restored);

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
pub(crate) struct Tokens(sdk::sessions::Tokens);

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
