//! Commands: what each does to the table, and what it stores.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::{Change, Command, Cut, Outcome};
use super::stored::{self, Piece};
use super::table::{Sessions, Write};
use super::{
    Declared, MANIFESTS_POSITIONS_MAX, Manifest, POSITIONS_MAX, SESSIONS_MAX, Session, SessionId, SessionName,
    TEXTS_MAX, Text,
};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Digest, Revision, TenantId};
use crate::words::Class;

impl Sessions {
    /// Applies a command at a time of the leaders' clock. What is to be stored is added to `writes`. A command that the
    /// state refuses changes nothing, and its error is as deterministic as an outcome.
    ///
    /// # Errors
    /// As documented with the commands: `UnknownSession`, `Conflict`, `StaleRevision`, `TooLarge`, `Full`, `Throttled`.
    pub fn apply(&mut self, command: Command, now_ms: u64, writes: &mut Vec<Write>) -> Result<Outcome> {
        match command {
            Command::Open { name, tenant, revision, uid, declared, from } => {
                self.open(name, tenant, revision, uid, declared, from, now_ms, writes)
            }
            Command::Append { name, uid, revision, from_position, digests, text } => {
                self.append(&name, uid, revision, from_position, &digests, text, now_ms, writes)
            }
            Command::Truncate { name, revision, cut } => self.truncate(&name, revision, cut, now_ms, writes),
            Command::Set { name, change } => self.set(&name, change, now_ms, writes),
            Command::Delete { name } => Ok(Outcome::Deleted(self.delete(&name, writes))),
            Command::Expire { most } => {
                let due = self.ends.iter().take_while(|(at, _)| *at <= now_ms).take(most as usize);
                let due: Vec<SessionName> = due.map(|(_, name)| name.clone()).collect();
                due.iter().for_each(|name| {
                    self.delete(name, writes);
                });
                Ok(Outcome::Expired(due))
            }
        }
    }

    fn known(&self, name: &SessionName) -> Result<&Arc<Session>> {
        self.all.get(name).ok_or_else(|| unknown(&name.id))
    }

    /// Changes a session in place and stores its head.
    fn change<T>(
        &mut self,
        name: &SessionName,
        now_ms: u64,
        writes: &mut Vec<Write>,
        change: impl FnOnce(&mut Session, &mut Vec<Write>) -> T,
    ) -> Result<T> {
        let mut session = self.all.remove(name).ok_or_else(|| unknown(&name.id))?;
        self.count(name, &session, false);
        let s = Arc::make_mut(&mut session);
        let out = change(s, writes);
        s.changed_ms = s.changed_ms.max(now_ms);
        writes.push(Write::Put(stored::key(name, s.uid, Piece::Head), stored::head(&name.id, s)));
        self.count(name, &session, true);
        self.all.insert(name.clone(), session);
        Ok(out)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    fn open(
        &mut self,
        name: SessionName,
        tenant: TenantId,
        revision: Revision,
        uid: u64,
        declared: Declared,
        from: Option<(SessionId, Cut)>,
        now_ms: u64,
        writes: &mut Vec<Write>,
    ) -> Result<Outcome> {
        declared.check()?;
        if let Some(there) = self.all.get(&name) {
            if let Some(class) = declared.class.filter(|class| *class != there.class) {
                return Err(Error::new(ErrorKind::Conflict, "the session is there with another class")
                    .with("session", &name.id)
                    .with("class", there.class)
                    .with("asked", class));
            }
            // Another parent is another session of the same name.
            let other = |parent: &SessionId, cut: &Cut| {
                there.parent.as_ref().is_none_or(|(id, at)| id != parent || cut.positions.is_some_and(|n| n != *at))
            };
            if let Some((parent, _)) = from.as_ref().filter(|(parent, cut)| other(parent, cut)) {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "the session is there, and not forked from this one there",
                )
                .with("session", &name.id)
                .with("parent", parent));
            }
            let mut next = (**there).clone();
            next.open = true;
            next.declare(&declared);
            if next != **there {
                self.change(&name, now_ms, writes, |s, _| {
                    s.open = true;
                    s.declare(&declared);
                })?;
            }
            return Ok(Outcome::Opened { created: false });
        }
        if self.all.len() >= SESSIONS_MAX {
            return Err(Error::new(
                ErrorKind::Full,
                "as many sessions as a store may have; delete some, or give them a ttl",
            )
            .with("sessions_max", SESSIONS_MAX));
        }
        if uid == 0 || self.uids.contains(&uid) {
            return Err(Error::new(ErrorKind::Conflict, "the number drawn for the session is taken; try again")
                .retry_after(std::time::Duration::ZERO));
        }
        let mut session = Session {
            uid,
            tenant,
            revision,
            open: true,
            class: Class::Cache,
            ttl_ms: 0,
            priority: 0,
            attributes: BTreeMap::new(),
            parent: None,
            pinned: None,
            finished: false,
            created_ms: now_ms,
            changed_ms: now_ms,
            appends: 0,
            tokens: 0,
            texts: Vec::new(),
            manifest: Manifest::default(),
        };
        if let Some((parent_id, cut)) = from {
            let parent = self.known(&SessionName { namespace: name.namespace, id: parent_id.clone() })?;
            let at = cut.positions.unwrap_or(parent.positions());
            if at > parent.positions() {
                return Err(Error::new(ErrorKind::InvalidArgument, "the fork begins behind the end of its parent")
                    .with("at_position", at)
                    .with("positions", parent.positions()));
            }
            // Nobody has raised what it would name.
            if let Some(class) = declared.class.filter(|class| *class > parent.class) {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "a fork has the class of its parent, or a weaker one; open a session of that class and append",
                )
                .with("class", parent.class)
                .with("asked", class));
            }
            // A fork is of its parent's weights, whatever the caller computes with.
            session.revision = parent.revision;
            session.class = parent.class;
            (session.ttl_ms, session.priority) = (parent.ttl_ms, parent.priority);
            session.attributes.clone_from(&parent.attributes);
            session.manifest = parent.manifest.first(at);
            session.tokens = parent.tokens.min(cut.tokens);
            session.texts = texts_of(&parent.texts, session.tokens);
            session.parent = Some((parent_id, at));
        }
        if let Some(class) = declared.class {
            session.class = class;
        }
        session.declare(&declared);
        self.room(session.positions())?;
        store_runs(&name, &session, 0, writes);
        for (n, text) in session.texts.iter().enumerate() {
            writes.push(Write::Put(stored::key(&name, uid, Piece::Text(n as u32)), stored::text(text)));
        }
        writes.push(Write::Put(stored::key(&name, uid, Piece::Head), stored::head(&name.id, &session)));
        self.uids.insert(uid);
        self.enter(name, session);
        Ok(Outcome::Opened { created: true })
    }

    fn room(&self, positions: u64) -> Result<()> {
        if self.positions + positions > MANIFESTS_POSITIONS_MAX {
            return Err(Error::new(ErrorKind::Full, "the manifests of all sessions are as long as they may be")
                .with("manifests_positions_max", MANIFESTS_POSITIONS_MAX));
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    fn append(
        &mut self,
        name: &SessionName,
        uid: u64,
        revision: Revision,
        from_position: u64,
        digests: &[Digest],
        text: Option<Text>,
        now_ms: u64,
        writes: &mut Vec<Write>,
    ) -> Result<Outcome> {
        let s = self.known(name)?;
        if s.uid != uid {
            return Err(Error::new(ErrorKind::Conflict, "the session was deleted and made anew during the append")
                .with("session", &name.id));
        }
        if s.revision != revision {
            return Err(stale(s, revision));
        }
        let end = from_position.saturating_add(digests.len() as u64);
        if s.has(from_position, digests, text.as_ref()) {
            return Ok(Outcome::Appended { positions: s.positions(), tokens: s.tokens, repeated: true });
        }
        if !s.open {
            return Err(Error::new(ErrorKind::Conflict, "the session is closed; open it again to append")
                .with("session", &name.id));
        }
        let token = text.as_ref().map_or(s.tokens, |t| t.first);
        if from_position != s.positions() || token != s.tokens {
            return Err(Error::new(ErrorKind::Conflict, "the session is not as long as the caller believes")
                .with("positions", s.positions())
                .with("from_position", from_position)
                .with("tokens", s.tokens)
                .with("from_token", token));
        }
        if end > POSITIONS_MAX || s.texts.len() + usize::from(text.is_some()) > TEXTS_MAX {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "the session is as long as one may be; fork, or begin another",
            )
            .with("positions_max", POSITIONS_MAX)
            .with("appends_with_tokens_max", TEXTS_MAX));
        }
        self.room(digests.len() as u64)?;
        self.change(name, now_ms, writes, |s, writes| {
            let run = s.manifest.push(digests);
            if !digests.is_empty() {
                store_runs(name, s, run, writes);
            }
            if let Some(text) = text {
                let n = s.texts.len() as u32;
                writes.push(Write::Put(stored::key(name, s.uid, Piece::Text(n)), stored::text(&text)));
                s.tokens += u64::from(text.count);
                s.texts.push(text);
            }
            s.appends += 1;
            s.finished = false;
            Outcome::Appended { positions: s.positions(), tokens: s.tokens, repeated: false }
        })
    }

    fn truncate(
        &mut self,
        name: &SessionName,
        revision: Revision,
        cut: Cut,
        now_ms: u64,
        writes: &mut Vec<Write>,
    ) -> Result<Outcome> {
        let s = self.known(name)?;
        let positions = cut.positions.unwrap_or(s.positions());
        if s.revision != revision && positions > 0 {
            return Err(stale(s, revision));
        }
        if positions > s.positions() {
            return Err(Error::new(ErrorKind::InvalidArgument, "the session is shorter than that")
                .with("positions", s.positions())
                .with("asked", positions));
        }
        self.change(name, now_ms, writes, |s, writes| {
            let (runs, texts) = (s.manifest.runs(), s.texts.len());
            s.revision = revision;
            s.manifest.truncate(positions);
            s.tokens = s.tokens.min(cut.tokens);
            s.texts = texts_of(&s.texts, s.tokens);
            for n in s.manifest.runs()..runs {
                writes.push(Write::Delete(stored::key(name, s.uid, Piece::Run(n as u32))));
            }
            for n in s.texts.len()..texts {
                writes.push(Write::Delete(stored::key(name, s.uid, Piece::Text(n as u32))));
            }
            // The last of each may be shorter than it was.
            store_runs(name, s, s.manifest.runs().saturating_sub(1), writes);
            if let Some((n, text)) = s.texts.iter().enumerate().next_back() {
                writes.push(Write::Put(stored::key(name, s.uid, Piece::Text(n as u32)), stored::text(text)));
            }
            Outcome::Changed
        })
    }

    fn set(&mut self, name: &SessionName, change: Change, now_ms: u64, writes: &mut Vec<Write>) -> Result<Outcome> {
        let s = self.known(name)?;
        if let Change::Pinned { tier: Some(_), positions_max } = change {
            let others = self.pinned_positions(s.tenant) - if s.pinned.is_some() { s.positions() } else { 0 };
            if others + s.positions() > positions_max {
                return Err(Error::new(ErrorKind::TooLarge, "the tenant would have more positions pinned than it may")
                    .with("limits.pinned_positions_max", positions_max)
                    .with("pinned", others)
                    .with("asked", s.positions()));
            }
        }
        self.change(name, now_ms, writes, |s, _| {
            match change {
                Change::Open(open) => s.open = open,
                Change::Pinned { tier, .. } => s.pinned = tier,
                Change::Finished(finished) => s.finished = finished,
                Change::Priority(priority) => s.priority = priority,
            }
            Outcome::Changed
        })
    }

    fn delete(&mut self, name: &SessionName, writes: &mut Vec<Write>) -> bool {
        let Some(s) = self.all.remove(name) else { return false };
        self.count(name, &s, false);
        self.uids.remove(&s.uid);
        let runs = (0..s.manifest.runs() as u32).map(Piece::Run);
        let texts = (0..s.texts.len() as u32).map(Piece::Text);
        let pieces = std::iter::once(Piece::Head).chain(runs).chain(texts);
        writes.extend(pieces.map(|piece| Write::Delete(stored::key(name, s.uid, piece))));
        true
    }
}

impl Session {
    fn declare(&mut self, declared: &Declared) {
        if declared.ttl_ms != 0 {
            self.ttl_ms = declared.ttl_ms;
        }
        if declared.priority != 0 {
            self.priority = declared.priority;
        }
        if !declared.attributes.is_empty() {
            self.attributes.clone_from(&declared.attributes);
        }
    }

    /// Whether an append is there already, word for word.
    fn has(&self, from: u64, digests: &[Digest], text: Option<&Text>) -> bool {
        let text_is_there = || {
            text.is_none_or(|t| {
                let at = self.texts.partition_point(|have| have.first < t.first);
                self.texts.get(at).is_some_and(|have| have == t)
            })
        };
        (!digests.is_empty() || text.is_some()) && text_is_there() && self.names(from, digests)
    }

    /// Whether these positions, and none of them behind its end, are there already.
    pub fn names(&self, from: u64, digests: &[Digest]) -> bool {
        from.saturating_add(digests.len() as u64) <= self.positions()
            && self.manifest.from(from).zip(digests).all(|(have, d)| have == *d)
    }
}

/// The texts of the first tokens.
fn texts_of(texts: &[Text], tokens: u64) -> Vec<Text> {
    let kept = texts.iter().take_while(|t| t.first < tokens);
    kept.map(|t| Text { count: u32::try_from(tokens - t.first).unwrap_or(u32::MAX).min(t.count), ..*t }).collect()
}

fn store_runs(name: &SessionName, session: &Session, from: usize, writes: &mut Vec<Write>) {
    for n in from..session.manifest.runs() {
        if let Some(run) = session.manifest.run(n) {
            writes.push(Write::Put(stored::key(name, session.uid, Piece::Run(n as u32)), stored::run(run)));
        }
    }
}

fn unknown(id: &SessionId) -> Error {
    Error::new(ErrorKind::UnknownSession, "no such session; open it first").with("session", id)
}

fn stale(s: &Session, revision: Revision) -> Error {
    Error::new(
        ErrorKind::StaleRevision,
        "the session is of other weights; its token ids are good, its blocks are not: truncate it to 0 positions to begin anew",
    )
    .with("session_revision", s.revision)
    .with("revision", revision)
}
