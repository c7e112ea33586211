//! Verbs that are no engine's hot path: whatever the async SDK has, run by the I/O thread and waited for.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::MissReason;

use super::contact::Standing;
use super::io::Io;
use super::{Engine, WAIT_MAX};
use crate::call::Call;
use crate::client::count;
use crate::error::{Error, ErrorKind, Result};
use crate::namespace::Namespace;
use crate::region::Region;

/// The verbs keep to their deadlines; some (a restore) answer so long after them. One that does not is dropped then.
const ENDED_AFTER: Duration = Duration::from_secs(3);

impl Engine {
    /// Runs verbs of the async SDK on this engine's namespace: sessions, removals, lists. The call that `verbs` is handed has what
    /// is left of the deadline.
    ///
    /// # Errors
    /// What the verb fails with. No hot verb: where the server is lost this fails (`unreachable`, `late`) rather than misses.
    ///
    /// ```no_run
    /// # fn f(engine: kvkeep_client::Engine, call: kvkeep_client::Call) -> kvkeep_client::Result<()> {
    /// let info = engine.with_namespace(&call, |ns, call| async move { ns.sessions().get("conversation-7", &call).await })?;
    /// # Ok(()) }
    /// ```
    pub fn with_namespace<T, F>(
        &self,
        call: &Call,
        verbs: impl FnOnce(Namespace, Call) -> F + Send + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (life, until, call) = (self.life()?, self.until(call), call.clone());
        let patience = self.within(&call) + ENDED_AFTER * 2;
        let answer = life.ask(patience, move |io| async move { io.with_namespace(call, until, verbs).await });
        answer.unwrap_or_else(|| {
            count(&life.io.counts.lost, 1);
            Err(Error::late("engine"))
        })
    }

    /// Tells the server of a region now, at most so long, so that the first call that names it need not. `false`: the server is
    /// lost, or the way that calls go takes no regions; calls work all the same.
    ///
    /// # Errors
    /// `config` where this process can have no engine.
    pub fn register(&self, region: &Region, within: Duration) -> Result<bool> {
        let life = self.life()?;
        life.note(std::iter::once(region));
        let (within, region) = (within.min(WAIT_MAX), region.clone());
        let registering = move |io: Arc<Io>| async move {
            let registered = async {
                io.contact.reached(&io.client, &io.config, within).await?;
                io.client.register(&region).await
            };
            tokio::time::timeout(within, registered).await
        };
        Ok(matches!(life.ask(within + ENDED_AFTER, registering), Some(Ok(Ok(true)))))
    }
}

impl Io {
    async fn with_namespace<T, F>(
        self: Arc<Self>,
        call: Call,
        until: Instant,
        verbs: impl FnOnce(Namespace, Call) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let left = || until.saturating_duration_since(Instant::now());
        // Who asks for these can wait for a server that is being started.
        if !self.contact.reached(&self.client, &self.config, left()).await? {
            return Err(match self.contact.standing() {
                Standing::Lost(e) | Standing::Refused(e) => e,
                _ => Error::new(ErrorKind::Unreachable, "the server did not answer in time"),
            });
        }
        let ready = self.contact.ready(&self.client, &self.config, until).await.map_err(|reason| {
            Error::new(ErrorKind::Unreachable, "the server was lost").with("reason", MissReason::word(reason))
        })?;
        let verbs = verbs(ready.namespace, call.within(left()));
        tokio::time::timeout_at((until + ENDED_AFTER).into(), verbs)
            .await
            .unwrap_or_else(|_| Err(Error::late("engine")))
    }
}
