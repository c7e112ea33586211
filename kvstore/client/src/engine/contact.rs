//! Whether the server is there, and our namespace on it.
//!
//! ```text
//! Unknown ── first call ──> the keeper asks; calls wait for it, together no longer than patience
//! Ready   ── the breaker opened, another life of the server, unknown namespace ──> the keeper asks
//! Lost    ── the keeper asks again and again; every call is a miss at once ──> Ready
//! Refused ── (another format, other weights, no credentials) the same, more rarely
//! ```
//! So one call per loss waits for a server that is gone, and none does while it stays away: finding it again is the keeper's
//! business, a task that lives only until the server is found.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvkeep_core::{Error as CoreError, ErrorKind as CoreKind, MissReason};
use kvkeep_proto::v1;
use tokio::sync::watch;

use super::config::EngineConfig;
use super::jobs::alone;
use crate::block::breaker::BreakerState;
use crate::call::Call;
use crate::client::Client;
use crate::connection::blocks;
use crate::error::{Error, ErrorKind, Result};
use crate::namespace::Namespace;

/// First pause of the keeper between two tries; doubles.
const PAUSE_FIRST: Duration = Duration::from_millis(25);
/// Longest such pause. With the breaker's own (500 ms) it bounds how long a server is back unnoticed.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// A server that refuses us is asked again so often: what is wrong is put right by people.
const REFUSED_PAUSE: Duration = Duration::from_secs(2);
/// Longest wait for a registration.
const REGISTER_MAX: Duration = Duration::from_secs(2);

/// How an engine stands with its server.
#[derive(Clone)]
pub(super) enum Standing {
    /// Nobody has asked yet.
    Unknown,
    /// The namespace is registered with this life of the server.
    Ready(Box<Namespace>, u64),
    /// It does not answer.
    Lost(Error),
    /// It answers, and will not have us.
    Refused(Error),
}

pub(super) struct Contact {
    standing: watch::Sender<Standing>,
    keeping: AtomicBool,
    /// When the keeper began.
    since: Mutex<Instant>,
    /// The revision that was advanced to, where that is not the configuration's any more.
    revision: Mutex<Option<String>>,
}

impl Default for Contact {
    fn default() -> Self {
        Self {
            standing: watch::Sender::new(Standing::Unknown),
            keeping: AtomicBool::new(false),
            since: Mutex::new(Instant::now()),
            revision: Mutex::default(),
        }
    }
}

/// On the I/O thread. What a call goes on with.
pub(super) struct Ready {
    pub(super) namespace: Namespace,
    /// Life of the server that it is registered with.
    pub(super) epoch: u64,
}

impl Contact {
    pub(super) fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// The namespace, waited for while it is being registered, until `until` and no longer than patience since that began.
    pub(super) async fn ready(
        self: &Arc<Self>,
        client: &Client,
        config: &Arc<EngineConfig>,
        until: Instant,
    ) -> Result<Ready, MissReason> {
        match self.settled(client) {
            Some(ready) => return Ok(ready),
            None if self.waits_in_vain(client) => {
                self.keep(client, config);
                return Err(MissReason::Unreachable);
            }
            None => self.keep(client, config),
        }
        let patience_ends = *alone(&self.since) + config.client.patience;
        let mut standing = self.standing.subscribe();
        while tokio::time::timeout_at(until.min(patience_ends).into(), standing.changed()).await.is_ok() {
            if let Some(ready) = self.settled(client) {
                return Ok(ready);
            }
            if self.waits_in_vain(client) {
                return Err(MissReason::Unreachable);
            }
        }
        Err(if until < patience_ends { MissReason::Late } else { MissReason::Unreachable })
    }

    /// What calls go on with, where nothing speaks against it.
    fn settled(&self, client: &Client) -> Option<Ready> {
        match &*self.standing.borrow() {
            Standing::Ready(namespace, epoch)
                if *epoch == client.server_epoch() && client.breaker() == BreakerState::Closed =>
            {
                Some(Ready { namespace: (**namespace).clone(), epoch: *epoch })
            }
            _ => None,
        }
    }

    fn waits_in_vain(&self, client: &Client) -> bool {
        match &*self.standing.borrow() {
            Standing::Unknown => false,
            Standing::Ready(..) => client.breaker() != BreakerState::Closed,
            Standing::Lost(_) | Standing::Refused(_) => true,
        }
    }

    /// The server does not know our namespace (any more).
    pub(super) fn forget(self: &Arc<Self>, client: &Client, config: &Arc<EngineConfig>) {
        self.standing.send_if_modified(|s| {
            let known = matches!(s, Standing::Ready(..));
            if known {
                *s = Standing::Unknown;
            }
            known
        });
        self.keep(client, config);
    }

    /// A call was late, or lost: is the server still there? Calls go on meanwhile.
    pub(super) fn keep(self: &Arc<Self>, client: &Client, config: &Arc<EngineConfig>) {
        if self.keeping.swap(true, Ordering::AcqRel) {
            return;
        }
        *alone(&self.since) = Instant::now();
        let keeper = Keeper { contact: Arc::clone(self), client: client.clone(), config: Arc::clone(config) };
        tokio::spawn(keeper.run());
    }

    fn revision(&self, config: &EngineConfig) -> String {
        alone(&self.revision).clone().unwrap_or_else(|| config.revision.clone())
    }

    /// Moves the namespace on to other weights, from whatever it holds.
    pub(super) async fn advance(
        self: &Arc<Self>,
        client: &Client,
        config: &Arc<EngineConfig>,
        revision: &str,
        call: &Call,
        until: Instant,
    ) -> Result<bool> {
        let advancing = async {
            let held = client.register_namespace(&config.namespace, &config.format, revision).await?;
            if held.revision_matches { Ok(held) } else { held.advance_revision(revision, call).await }
        };
        let namespace =
            tokio::time::timeout_at(until.into(), advancing).await.unwrap_or_else(|_| Err(Error::late("advance")))?;
        *alone(&self.revision) = Some(revision.to_owned());
        self.standing.send_replace(Standing::Ready(Box::new(namespace), client.server_epoch()));
        self.keep(client, config);
        Ok(true)
    }

    /// Waits until the namespace is registered; `Ok(false)`: not within this time.
    pub(super) async fn reached(
        self: &Arc<Self>,
        client: &Client,
        config: &Arc<EngineConfig>,
        within: Duration,
    ) -> Result<bool> {
        let until = tokio::time::Instant::now() + within;
        let mut standing = self.standing.subscribe();
        loop {
            if self.settled(client).is_some() {
                return Ok(true);
            }
            self.keep(client, config);
            if let Standing::Refused(e) = &*standing.borrow_and_update() {
                return Err(e.clone());
            }
            if tokio::time::timeout_at(until, standing.changed()).await.is_err() {
                return Ok(false);
            }
        }
    }
}

struct Keeper {
    contact: Arc<Contact>,
    client: Client,
    config: Arc<EngineConfig>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.contact.keeping.store(false, Ordering::Release);
    }
}

impl Keeper {
    async fn run(self) {
        let mut pause = PAUSE_FIRST;
        loop {
            let (standing, wait) = match self.ask().await {
                Ok((namespace, epoch)) => (Standing::Ready(Box::new(namespace), epoch), None),
                Err(e) if e.is_loss() || e.is_retryable() => (Standing::Lost(e), Some(pause)),
                Err(e) => (Standing::Refused(e), Some(REFUSED_PAUSE)),
            };
            if wait.is_none() {
                // Before it is told: whoever finds something amiss from now on needs a keeper of its own.
                self.contact.keeping.store(false, Ordering::Release);
            }
            self.contact.standing.send_if_modified(|known| {
                // That nobody was asked says less than how the server was lost.
                let says_more =
                    !matches!((&*known, &standing), (Standing::Lost(_), Standing::Lost(e)) if e.is_not_asked());
                if says_more {
                    *known = standing;
                }
                says_more
            });
            let Some(wait) = wait else { return };
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// One hot call, for the way and the breaker, and a registration where this life of the server knows none of ours.
    async fn ask(&self) -> Result<(Namespace, u64)> {
        let shared = &self.client.shared;
        let brief = Call::default().within(self.config.client.patience);
        shared
            .hot(
                "release",
                &brief,
                |ctx| v1::ReleaseRequest { ctx: Some(ctx), ..Default::default() },
                |wire, r| async move { blocks(wire).release(r).await },
            )
            .await?;
        let epoch = self.client.server_epoch();
        if let Standing::Ready(namespace, known) = self.contact.standing()
            && known == epoch
        {
            return Ok((*namespace, epoch));
        }
        let EngineConfig { namespace, format, .. } = &*self.config;
        let revision = self.contact.revision(&self.config);
        let registering = self.client.register_namespace(namespace, format, &revision);
        let namespace = tokio::time::timeout(REGISTER_MAX, registering)
            .await
            .unwrap_or_else(|_| Err(Error::late("register_namespace")))?;
        if self.client.server_epoch() != epoch {
            return Err(Error::new(ErrorKind::Unreachable, "the server was started again just now"));
        }
        if !namespace.revision_matches {
            let holds = &namespace.revision_digest;
            return Err(CoreError::new(
                CoreKind::StaleRevision,
                "the store holds KV of other weights: advance the revision, or use another namespace",
            )
            .with("ours", revision)
            .with("theirs", holds)
            .into());
        }
        Ok((namespace, epoch))
    }
}
