//! Sessions on a node: raft group 1, and what it takes to keep its promises.
//!
//! ```text
//! append:  keys -> digests -> held -> here and whole? -> class durable: raised -> token ids put -> proposed -> answered
//! restore: manifest -> match (and lease) -> what is on NVMe read up, many at a time -> what is missing, and from which token
//! sweep:   marks of all manifests; a durable block that only sessions keep and that two sweeps found in none is removed
//! ```
//! Here: the state and who may see it. Then `machine` (the state machine) -> `append` -> `texts` (token ids) ->
//! [`manifest`] (what is where) -> [`restore`] -> `pins` -> `priority` -> `due` -> `sweep` (and fsck).
//!
//! Block put and get never come here. With one voter what is applied here is all that was ever acknowledged, so reads look
//! at the state.

mod append;
mod due;
mod machine;
pub mod manifest;
mod pins;
mod priority;
pub mod restore;
mod sweep;
mod texts;

use std::ops::Bound;
use std::sync::Arc;

use kvkeep_core::catalogue::Namespace;
use kvkeep_core::session::{Change, Command, Cut, Declared, Outcome, Session, SessionId, SessionName, Sessions};
use kvkeep_core::words::Hint;
use kvkeep_core::{Class, Error, ErrorKind, Handle, RequestInfo, Result, Tier};
use kvkeep_raft::GroupId;
use parking_lot::RwLock;

use super::put::Caller;
use super::{SLICE_KEYS, Store};
use crate::consensus::{Consensus, FirstState, Group, raft_error};
use machine::{Machine, Shared};

pub use append::{AppendWish, Appended};
pub use texts::{SYSTEM_PREFIX, TokensRead};

/// Sessions that one look at the table passes over.
const LIST_LOOKS_MAX: usize = 4096;

/// The sessions of a node.
pub(super) struct SessionStore {
    group: Group,
    shared: Arc<Shared>,
    /// Digests that appends under way have looked at: a sweep lets them be.
    holding: append::Holding,
    pins: pins::Pins,
    due: due::Due,
    sweep: sweep::Sweeper,
}

impl SessionStore {
    /// Opens the group. Blocks.
    pub(super) fn open(consensus: &Consensus) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        // All slots are in group 1 until a cluster deals them to more.
        let id = GroupId::new(1).map_err(|e| raft_error(&e))?;
        let group = consensus.group(id, Box::new(Machine::new(Arc::clone(&shared))), FirstState::new)?;
        Ok(Self {
            group,
            shared,
            holding: append::Holding::default(),
            pins: pins::Pins::default(),
            due: due::Due::default(),
            sweep: sweep::Sweeper::default(),
        })
    }

    fn state(&self) -> &RwLock<Sessions> {
        &self.shared.state
    }

    /// A change; what the rules of the state say is the inner result.
    async fn change(&self, command: &Command) -> Result<Outcome> {
        self.group.propose::<Result<Outcome>>(command.encode()).await?
    }

    /// Why it takes no changes any more, if that is so.
    pub(super) fn failure(&self) -> Option<Error> {
        self.group.failure()
    }
}

/// One page of sessions.
#[derive(Debug, Default)]
pub struct Listed {
    /// In order of their names.
    pub sessions: Vec<(SessionName, Arc<Session>)>,
    /// The last one that was looked at, if there may be more.
    pub more_after: Option<SessionName>,
}

/// What a list is asked for.
#[derive(Clone, Debug, Default)]
pub struct ListWish {
    /// Only of this namespace.
    pub namespace: Option<kvkeep_core::NamespaceId>,
    /// Ids that begin with this.
    pub id_prefix: String,
    /// Only of this class.
    pub class: Option<Class>,
    /// Only open ones, only closed ones.
    pub open: Option<bool>,
    /// Only those that have all of these.
    pub attributes: std::collections::BTreeMap<String, String>,
    /// Behind this one.
    pub after: Option<SessionName>,
    /// At most so many.
    pub most: usize,
}

impl Store {
    /// The session of that name, if its namespace is the caller's.
    ///
    /// # Errors
    /// `UnknownNamespace`, `UnknownSession`.
    pub fn session(&self, caller: Caller, name: &SessionName) -> Result<(Arc<Namespace>, Arc<Session>)> {
        let namespace = self.views.get(caller.tenant, name.namespace)?;
        let session = self.sessions.state().read().get(name).cloned();
        let session = session
            .ok_or_else(|| Error::new(ErrorKind::UnknownSession, "no such session").with("session", &name.id))?;
        Ok((namespace, session))
    }

    /// Makes a session, or finds it. A fork begins with the first positions of another.
    ///
    /// # Errors
    /// `Conflict` where it is there under another declaration, `StaleRevision`, and what [`Sessions::apply`] says.
    pub async fn open_session(
        self: &Arc<Self>,
        caller: Caller,
        handle: Handle,
        id: SessionId,
        declared: Declared,
        from: Option<(SessionId, Option<u64>)>,
    ) -> Result<(Arc<Session>, bool)> {
        let (namespace, current) = self.namespace_of(caller, handle)?;
        if !current {
            return Err(Error::new(
                ErrorKind::StaleRevision,
                "the weights of this namespace have changed; register again",
            )
            .with("revision", handle.revision)
            .with("current", namespace.revision));
        }
        if declared.class == Some(Class::Durable) && self.nvme.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "this node has no NVMe tier: a durable session cannot be promised",
            ));
        }
        if let Some(class) = declared.class.filter(|class| namespace.require_full && self.copies_wanted(*class) > 1) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "the namespace requires every copy and this cluster has one node; use class cache, or register without require_full",
            )
            .with("class", class));
        }
        let per_key = u64::from(namespace.format.tokens_per_key);
        let from = from.map(|(id, at)| {
            let tokens = at.map_or(u64::MAX, |at| at.saturating_mul(per_key));
            (id, Cut { positions: at, tokens })
        });
        let name = SessionName { namespace: handle.namespace, id };
        let command = Command::Open {
            name: name.clone(),
            tenant: caller.tenant,
            revision: handle.revision,
            uid: rand::random::<u64>().max(1),
            declared,
            from,
        };
        let Outcome::Opened { created } = self.sessions.change(&command).await? else { return Err(odd()) };
        Ok((self.session(caller, &name)?.1, created))
    }

    /// Keeps the first positions. With a newer revision than the session's and none of them, it begins anew.
    ///
    /// # Errors
    /// `StaleRevision`, and what [`Sessions::apply`] says.
    pub async fn truncate_session(
        self: &Arc<Self>,
        caller: Caller,
        handle: Handle,
        name: &SessionName,
        positions: u64,
        keep_tokens: bool,
    ) -> Result<Arc<Session>> {
        let (namespace, current) = self.namespace_of(caller, handle)?;
        if !current {
            return Err(Error::new(
                ErrorKind::StaleRevision,
                "the weights of this namespace have changed; register again",
            )
            .with("revision", handle.revision));
        }
        let per_key = u64::from(namespace.format.tokens_per_key);
        let tokens = if keep_tokens { u64::MAX } else { positions.saturating_mul(per_key) };
        let cut = Cut { positions: Some(positions), tokens };
        self.sessions.change(&Command::Truncate { name: name.clone(), revision: handle.revision, cut }).await?;
        self.settle_pins(name).await;
        Ok(self.session(caller, name)?.1)
    }

    /// Changes what is said of a session.
    ///
    /// # Errors
    /// `UnknownSession`, `TooLarge` for more pins than a tenant may have.
    pub async fn set_session(
        self: &Arc<Self>,
        caller: Caller,
        name: &SessionName,
        change: Change,
    ) -> Result<Arc<Session>> {
        self.session(caller, name)?;
        self.sessions.change(&Command::Set { name: name.clone(), change }).await?;
        if matches!(change, Change::Pinned { .. }) {
            self.settle_pins(name).await;
        }
        Ok(self.session(caller, name)?.1)
    }

    /// Says how much a session counts to the policy; how many of its positions are here to be told of.
    ///
    /// # Errors
    /// `UnknownSession`.
    pub async fn prioritize_session(
        self: &Arc<Self>,
        caller: Caller,
        name: &SessionName,
        priority: i32,
    ) -> Result<u64> {
        let session = self.set_session(caller, name, Change::Priority(priority)).await?;
        Ok(self.tell_priority(name, &session, 0).await)
    }

    /// Keeps a session in a tier, or no longer.
    ///
    /// # Errors
    /// `TooLarge` for more than `limits.pinned_positions_max` of a tenant; `InvalidArgument` for a tier that is none of a node.
    pub async fn pin_session(
        self: &Arc<Self>,
        caller: Caller,
        name: &SessionName,
        tier: Option<Tier>,
    ) -> Result<Arc<Session>> {
        if tier.is_some_and(|tier| !matches!(tier, Tier::Dram | Tier::Nvme))
            || tier == Some(Tier::Nvme) && self.nvme.is_none()
        {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "sessions are pinned to dram or to nvme, where the node has it",
            ));
        }
        let positions_max = u64::from(self.config.limits.pinned_positions_max);
        self.set_session(caller, name, Change::Pinned { tier, positions_max }).await
    }

    /// Takes a session away; whether there was one. What only it kept is reclaimed by the next sweeps.
    ///
    /// # Errors
    /// `UnknownNamespace`.
    pub async fn delete_session(self: &Arc<Self>, caller: Caller, name: &SessionName) -> Result<bool> {
        self.views.get(caller.tenant, name.namespace)?;
        let before = self.sessions.state().read().get(name).cloned();
        let Outcome::Deleted(deleted) = self.sessions.change(&Command::Delete { name: name.clone() }).await? else {
            return Err(odd());
        };
        self.settle_pins(name).await;
        if let Some(before) = before.filter(|s| s.priority != 0) {
            self.tell_priority(name, &Session { priority: 0, ..Session::clone(&before) }, 0).await;
        }
        Ok(deleted)
    }

    /// Tells the policy what is known of a session's future; how many of its positions are here to be told of. One that is
    /// `expected` in so long is brought up before it comes.
    ///
    /// # Errors
    /// `UnknownSession`.
    pub async fn hint_session(
        self: &Arc<Self>,
        caller: Caller,
        name: &SessionName,
        hint: Hint,
        expected: Option<std::time::Duration>,
        info: &RequestInfo,
    ) -> Result<u64> {
        let (_, session) = self.session(caller, name)?;
        let info = RequestInfo {
            session: kvkeep_client::convert::session_number(name.id.as_str()),
            hint: Some(hint),
            ..*info
        };
        let now = self.clock.policy();
        let digests: Vec<_> = session.manifest.iter().collect();
        let mut told = 0;
        for slice in digests.chunks(SLICE_KEYS) {
            {
                let mut directory = self.directory.lock();
                told += slice.iter().filter(|d| directory.hint(d, &info, now)).count() as u64;
            }
            tokio::task::yield_now().await;
        }
        self.expect_session(name, expected);
        if hint == Hint::Ends {
            self.sessions.change(&Command::Set { name: name.clone(), change: Change::Finished(true) }).await?;
        }
        Ok(told)
    }

    /// Sessions, positions in their manifests, and positions that are pinned.
    pub(super) fn session_usage(&self) -> (usize, u64, usize) {
        let (sessions, positions) = {
            let state = self.sessions.state().read();
            (state.len(), state.positions())
        };
        (sessions, positions, self.directory.lock().pinned())
    }

    /// One page of the caller's sessions. Looks at so many at a time: a page may be shorter than asked and not the last.
    #[must_use]
    pub fn list_sessions(&self, caller: Caller, wish: &ListWish) -> Listed {
        // Only namespaces of the caller are walked: a page's end tells nothing of other tenants.
        let mine = |n: &Arc<Namespace>| n.tenant == caller.tenant && wish.namespace.is_none_or(|asked| asked == n.id);
        let namespaces: Vec<_> = self.views.all().iter().filter(|n| mine(n)).map(|n| n.id).collect();
        let state = self.sessions.state().read();
        let asked = |session: &Session| {
            wish.class.is_none_or(|class| class == session.class)
                && wish.open.is_none_or(|open| open == session.open)
                && wish.attributes.iter().all(|(k, v)| session.attributes.get(k) == Some(v))
        };
        let all = namespaces.into_iter().flat_map(|namespace| {
            let from = match &wish.after {
                Some(after) if after.namespace > namespace => return None,
                Some(after) if after.namespace == namespace => Bound::Excluded(after.clone()),
                _ => Sessions::first_name(namespace, &wish.id_prefix),
            };
            let here =
                move |name: &SessionName| name.namespace == namespace && name.id.as_str().starts_with(&wish.id_prefix);
            Some(state.from(from).take_while(move |(name, _)| here(name)))
        });
        let mut listed = Listed::default();
        let mut last = None;
        for (looked, (name, session)) in all.flatten().enumerate() {
            if looked == LIST_LOOKS_MAX || listed.sessions.len() == wish.most.max(1) {
                listed.more_after = last;
                break;
            }
            last = Some(name.clone());
            if asked(session) {
                listed.sessions.push((name.clone(), Arc::clone(session)));
            }
        }
        listed
    }
}

fn odd() -> Error {
    Error::new(ErrorKind::Conflict, "the sessions answered something else")
}
