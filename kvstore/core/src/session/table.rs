//! [`Sessions`]: the state. How it is read, counted and loaded; what changes it is in `apply`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use super::stored::{self, Lengths, Piece, corrupt};
use super::{RUN_POSITIONS, Session, SessionId, SessionName};
use crate::error::Result;
use crate::ids::{NamespaceId, TenantId};

/// A change of the stored state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Sets a value.
    Put(Vec<u8>, Vec<u8>),
    /// Removes a key.
    Delete(Vec<u8>),
}

/// Every session of a group. See the module.
#[derive(Debug, Default)]
pub struct Sessions {
    pub(super) all: BTreeMap<SessionName, Arc<Session>>,
    pub(super) uids: HashSet<u64>,
    /// When those with a time to live end.
    pub(super) ends: BTreeSet<(u64, SessionName)>,
    /// Positions in all manifests.
    pub(super) positions: u64,
    /// Of them, in pinned sessions, by tenant.
    pub(super) pinned: HashMap<TenantId, u64>,
    /// A session that is being loaded: its head has come, its lists are coming.
    loading: Option<(SessionName, Session, Lengths)>,
}

impl Sessions {
    /// A session.
    pub fn get(&self, name: &SessionName) -> Option<&Arc<Session>> {
        self.all.get(name)
    }

    /// Sessions by name.
    pub fn from(&self, from: Bound<SessionName>) -> impl Iterator<Item = (&SessionName, &Arc<Session>)> {
        self.all.range((from, Bound::Unbounded))
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&SessionName, &Arc<Session>)> {
        self.all.iter()
    }

    /// Sessions.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// No sessions.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Positions in all manifests.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// Positions in pinned sessions of a tenant.
    pub fn pinned_positions(&self, tenant: TenantId) -> u64 {
        self.pinned.get(&tenant).copied().unwrap_or(0)
    }

    /// Whether [`Command::Expire`](super::Command::Expire) would find something at this time.
    pub fn any_due(&self, now_ms: u64) -> bool {
        self.ends.first().is_some_and(|(at, _)| *at <= now_ms)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// One stored value, in order of the keys; behind the last one comes [`Self::loaded`].
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn load(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let (slot, namespace, uid, piece) = stored::parse(key)?;
        if piece == Piece::Head {
            self.end_loading()?;
            let (id, session, lengths) = stored::read_head(uid, value)?;
            let name = SessionName { namespace, id };
            if name.slot() != slot {
                return Err(corrupt("a session stands in another slot than its own"));
            }
            self.loading = Some((name, session, lengths));
            return Ok(());
        }
        let Some((name, session, _)) = &mut self.loading else { return Err(corrupt("a list without its session")) };
        if (name.namespace, session.uid) != (namespace, uid) {
            return Err(corrupt("a list without its session"));
        }
        match piece {
            Piece::Run(n) if n as usize == session.manifest.runs() => {
                let fits = session.manifest.load_run(stored::read_run(value)?);
                if fits { Ok(()) } else { Err(corrupt("a manifest has a gap")) }
            }
            Piece::Text(n) if n as usize == session.texts.len() => {
                session.texts.push(stored::read_text(value)?);
                Ok(())
            }
            _ => Err(corrupt("a list has a gap")),
        }
    }

    /// That was all of it.
    ///
    /// # Errors
    /// `Corrupt` where a session is not whole.
    pub fn loaded(&mut self) -> Result<()> {
        self.end_loading()
    }

    fn end_loading(&mut self) -> Result<()> {
        let Some((name, session, lengths)) = self.loading.take() else { return Ok(()) };
        let found = Lengths { positions: session.manifest.len(), texts: session.texts.len() as u32 };
        let tokens = session.texts.iter().try_fold(0, |at, t| (t.first == at).then_some(at + u64::from(t.count)));
        if found != lengths || tokens != Some(session.tokens) {
            return Err(corrupt("a session has lost a part of its lists"));
        }
        if self.all.contains_key(&name) || !self.uids.insert(session.uid) {
            return Err(corrupt("two sessions of one name"));
        }
        self.enter(name, session);
        Ok(())
    }

    /// Counts and keeps a session that is whole.
    pub(super) fn enter(&mut self, name: SessionName, session: Session) {
        self.count(&name, &session, true);
        self.all.insert(name, Arc::new(session));
    }

    /// Brings the sums in line: a session, as it is, comes or goes.
    pub(super) fn count(&mut self, name: &SessionName, session: &Session, comes: bool) {
        let positions = session.positions();
        let pinned = if session.pinned.is_some() { positions } else { 0 };
        let of_tenant = self.pinned.entry(session.tenant).or_default();
        if comes {
            self.positions += positions;
            *of_tenant += pinned;
        } else {
            self.positions -= positions;
            *of_tenant -= pinned;
        }
        if let Some(at) = session.expires_ms() {
            let entry = (at, name.clone());
            let _ = if comes { self.ends.insert(entry) } else { self.ends.remove(&entry) };
        }
    }

    /// The name before all others of a namespace whose ids begin with a prefix.
    pub fn first_name(namespace: NamespaceId, prefix: &str) -> Bound<SessionName> {
        Bound::Included(SessionName { namespace, id: SessionId(prefix.into()) })
    }
}

const _: () = assert!(RUN_POSITIONS * 16 <= 1024, "a run stays a small value");
