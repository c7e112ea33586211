//! Sessions, as in the SDK. They fail where the server is lost.

use std::collections::BTreeMap;

use kvkeep_client::sessions::{Append, ContentPart, ListSessions, OpenSession, Parent, Restore};
use kvkeep_client::{self as sdk, SessionHint, SessionState};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::args::{self, Call, opt_seconds, seconds};
use crate::namespace::{Namespace, ask};
use crate::place::ids;
use crate::session_info::{Restored, SessionInfo, Tokens};

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
