//! The verbs on sessions.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::session::text::{Content, Tokens};
use kvkeep_core::session::{Change, Declared, Session, SessionId, SessionName};
use kvkeep_core::words::Hint;
use kvkeep_core::{Error, ErrorKind, Handle, Revision};
use kvkeep_proto::v1;
use tokio::sync::mpsc;

use super::{Answer, Call, Refusal, Verbs};
use crate::store::clock::Clock;
use crate::store::sessions::manifest::sentence;
use crate::store::sessions::restore::{Progress, RestoreWish, Restored};
use crate::store::sessions::{AppendWish, ListWish};

/// Sessions of one page.
const PAGE_MAX: u32 = 1000;
const PAGE_DEFAULT: u32 = 100;
/// Positions of one answer, unless asked otherwise.
const MANIFEST_DEFAULT: u32 = 1024;
/// A session that is paused is taken to be due in so long.
const PAUSED: Duration = Duration::from_secs(3600);

type Named = (Handle, SessionName);

fn named(name: Option<v1::SessionName>) -> Result<Named, Error> {
    let name =
        name.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "a field is missing").with("field", "name"))?;
    let handle = convert::handle_from_proto(name.handle)?;
    Ok((handle, SessionName { namespace: handle.namespace, id: SessionId::new(&name.session_id)? }))
}

impl Verbs {
    /// Makes a session, or finds it.
    pub async fn open_session(&self, call: &Call, wish: v1::OpenSessionRequest) -> Answer<v1::OpenSessionReply> {
        let (handle, name) = named(wish.name)?;
        let declared = Declared {
            class: convert::class_opt_from_proto(wish.class)?,
            ttl_ms: wish.ttl_ms,
            priority: wish.priority,
            attributes: wish.attributes.into_iter().collect(),
        };
        let from = match wish.parent_id.as_str() {
            "" => None,
            parent => Some((SessionId::new(parent)?, Some(wish.parent_positions))),
        };
        let (session, created) = self.store.open_session(call.caller, handle, name.id.clone(), declared, from).await?;
        Ok(v1::OpenSessionReply { session: Some(self.spell_session(&name, &session)), created })
    }

    /// Adds to the end.
    pub async fn append_session(&self, call: &Call, wish: v1::AppendSessionRequest) -> Answer<v1::AppendSessionReply> {
        let (handle, name) = named(wish.name)?;
        self.keys_within(wish.keys.len())?;
        super::check_keys(&wish.keys)?;
        let content = wish.content.into_iter().map(|c| Content {
            first: c.first_token,
            tokens: c.tokens,
            id: c.content_id.to_vec(),
        });
        let tokens = Tokens { first: wish.from_token, ids: wish.token_ids, content: content.collect() };
        tokens.check()?;
        let wish = AppendWish {
            name,
            handle,
            from_position: wish.from_position,
            keys: wish.keys,
            tokens: (!tokens.ids.is_empty()).then_some(tokens),
        };
        // Started work is finished even if the caller goes away: a half-known acknowledgement helps nobody.
        let (store, caller) = (Arc::clone(&self.store), call.caller);
        let appending = tokio::spawn(async move { store.append_session(caller, wish).await });
        let appended = tokio::time::timeout_at(call.deadline, appending)
            .await
            .map_err(|_| Refusal::Late("not appended before the deadline; it may still be"))?
            .map_err(|_| Refusal::Cut("the append was cut short"))??;
        Ok(v1::AppendSessionReply {
            positions: appended.positions,
            tokens: appended.tokens,
            repeated: appended.repeated,
        })
    }

    /// What a session is.
    pub fn get_session(&self, call: &Call, wish: v1::GetSessionRequest) -> Answer<v1::GetSessionReply> {
        let (_, name) = named(wish.name)?;
        let (_, session) = self.store.session(call.caller, &name)?;
        Ok(v1::GetSessionReply { session: Some(self.spell_session(&name, &session)) })
    }

    /// One page of sessions.
    pub fn list_sessions(&self, call: &Call, wish: v1::ListSessionsRequest) -> Answer<v1::ListSessionsReply> {
        let namespace = match wish.handle {
            Some(h) if h.namespace_id != 0 => {
                let handle = convert::handle_from_proto(wish.handle)?;
                self.store.namespace_of(call.caller, handle)?;
                Some(handle.namespace)
            }
            _ => None,
        };
        let open = match v1::SessionState::try_from(wish.state) {
            Ok(v1::SessionState::Unspecified) => None,
            Ok(v1::SessionState::Open) => Some(true),
            Ok(v1::SessionState::Closed) => Some(false),
            Err(_) => return Err(Error::new(ErrorKind::InvalidArgument, "no such state of a session").into()),
        };
        let most = if wish.page_size == 0 { PAGE_DEFAULT } else { wish.page_size.min(PAGE_MAX) };
        let listed = self.store.list_sessions(
            call.caller,
            &ListWish {
                namespace,
                id_prefix: wish.id_prefix,
                class: convert::class_opt_from_proto(wish.class)?,
                open,
                attributes: wish.attributes.into_iter().collect(),
                after: page_from_proto(&wish.page_token)?,
                most: most as usize,
            },
        );
        Ok(v1::ListSessionsReply {
            sessions: listed.sessions.iter().map(|(name, session)| self.spell_session(name, session)).collect(),
            next_page_token: listed.more_after.map_or_else(Bytes::new, |name| page_to_proto(&name)),
        })
    }

    /// Where the positions of a session are.
    pub async fn session_manifest(&self, call: &Call, wish: v1::ManifestRequest) -> Answer<v1::ManifestReply> {
        let (_, name) = named(wish.name)?;
        let (namespace, session) = self.store.session(call.caller, &name)?;
        let count = if wish.count == 0 { MANIFEST_DEFAULT } else { wish.count } as usize;
        let placings = self.store.placings(&namespace, &session, wish.first_position, count).await;
        let positions = placings.into_iter().map(|p| v1::ManifestPosition {
            digest: Bytes::copy_from_slice(p.digest.as_bytes()),
            key: p.key.map_or_else(Bytes::new, |key| Bytes::copy_from_slice(key.as_bytes())),
            status: convert::status_to_proto(p.status),
            tier: p.tier.map_or(0, convert::tier_to_proto),
            reason: convert::reason_opt_to_proto(p.reason),
            class: p.class.map_or(0, convert::class_to_proto),
            bytes: p.bytes,
            why: p.reason.map_or_else(String::new, |reason| sentence(reason).to_owned()),
        });
        Ok(v1::ManifestReply { positions: positions.collect(), total: session.positions() })
    }

    /// Token ids of a session.
    pub async fn session_tokens(&self, call: &Call, wish: v1::TokensRequest) -> Answer<v1::TokensReply> {
        let (_, name) = named(wish.name)?;
        let (_, session) = self.store.session(call.caller, &name)?;
        let read = self.store.session_tokens(call.caller, &session, wish.first_token, u64::from(wish.count)).await?;
        let content = read.tokens.content.into_iter().map(|c| v1::ContentPart {
            first_token: c.first,
            tokens: c.tokens,
            content_id: c.id.into(),
        });
        Ok(v1::TokensReply {
            content: content.collect(),
            token_ids: read.tokens.ids,
            total: session.tokens,
            damaged: read.damaged,
        })
    }

    /// A new session that begins with another's positions.
    pub async fn fork_session(&self, call: &Call, wish: v1::ForkSessionRequest) -> Answer<v1::ForkSessionReply> {
        let (handle, parent) = named(wish.from)?;
        let id = SessionId::new(&wish.session_id)?;
        let at = (!wish.whole).then_some(wish.at_position);
        let name = SessionName { namespace: handle.namespace, id: id.clone() };
        let (session, created) =
            self.store.open_session(call.caller, handle, id, Declared::default(), Some((parent.id, at))).await?;
        Ok(v1::ForkSessionReply { session: Some(self.spell_session(&name, &session)), created })
    }

    /// Drops what is behind a position.
    pub async fn truncate_session(
        &self,
        call: &Call,
        wish: v1::TruncateSessionRequest,
    ) -> Answer<v1::TruncateSessionReply> {
        let (handle, name) = named(wish.name)?;
        let session = self.store.truncate_session(call.caller, handle, &name, wish.positions, wish.keep_tokens).await?;
        Ok(v1::TruncateSessionReply { session: Some(self.spell_session(&name, &session)) })
    }

    /// Keeps it in a tier.
    pub async fn pin_session(&self, call: &Call, wish: v1::PinSessionRequest) -> Answer<v1::PinSessionReply> {
        let (_, name) = named(wish.name)?;
        let tier = convert::tier_from_proto(wish.tier)?;
        let session = self.store.pin_session(call.caller, &name, Some(tier)).await?;
        Ok(v1::PinSessionReply { session: Some(self.spell_session(&name, &session)) })
    }

    /// No longer.
    pub async fn unpin_session(&self, call: &Call, wish: v1::UnpinSessionRequest) -> Answer<v1::UnpinSessionReply> {
        let (_, name) = named(wish.name)?;
        let session = self.store.pin_session(call.caller, &name, None).await?;
        Ok(v1::UnpinSessionReply { session: Some(self.spell_session(&name, &session)) })
    }

    /// What the engine knows of its future.
    pub async fn hint_session(&self, call: &Call, wish: v1::HintSessionRequest) -> Answer<v1::HintSessionReply> {
        let (_, name) = named(wish.name)?;
        let mut positions = 0;
        for hint in wish.hints {
            use v1::hint::What;
            let ms = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
            let (future, expected) = match hint.what {
                Some(What::Finished(true)) => (Hint::Ends, None),
                Some(What::Paused(true)) => (Hint::DueIn(ms(PAUSED)), None),
                Some(What::DueMs(due)) => {
                    (Hint::DueIn(u32::try_from(due).unwrap_or(u32::MAX)), Some(Duration::from_millis(due)))
                }
                Some(What::Finished(false)) => {
                    self.store.set_session(call.caller, &name, Change::Finished(false)).await?;
                    continue;
                }
                Some(What::Priority(priority)) => {
                    positions = self.store.prioritize_session(call.caller, &name, priority).await?;
                    continue;
                }
                Some(What::Paused(false)) | None => continue,
            };
            positions = self.store.hint_session(call.caller, &name, future, expected, &call.context.info).await?;
        }
        Ok(v1::HintSessionReply { positions })
    }

    /// Brings it up to DRAM; how far it is goes to `tell`.
    pub async fn restore_session(
        &self,
        call: &Call,
        wish: v1::RestoreSessionRequest,
        tell: mpsc::Sender<Progress>,
    ) -> Answer<v1::RestoreProgress> {
        let (_, name) = named(wish.name)?;
        if !matches!(wish.tier, 0 | 2) {
            return Err(Error::new(ErrorKind::InvalidArgument, "a node restores to dram").into());
        }
        let (namespace, session) = self.store.session(call.caller, &name)?;
        let wish = RestoreWish {
            request: call.context.request_id.clone(),
            lease: wish.lease.map(|l| self.lease_term(l.ttl_ms)),
            info: call.context.info,
            deadline: call.deadline,
        };
        if session.priority != 0 {
            self.store.tell_priority(&name, &session, 0).await;
        }
        let restored = self.store.restore_session(call.caller, &namespace, &session, wish, tell).await?;
        Ok(spell_restored(restored, &session))
    }

    /// Nothing is appended any more.
    pub async fn close_session(&self, call: &Call, wish: v1::CloseSessionRequest) -> Answer<v1::CloseSessionReply> {
        let (_, name) = named(wish.name)?;
        let session = self.store.set_session(call.caller, &name, Change::Open(false)).await?;
        Ok(v1::CloseSessionReply { session: Some(self.spell_session(&name, &session)) })
    }

    /// It is gone.
    pub async fn delete_session(&self, call: &Call, wish: v1::DeleteSessionRequest) -> Answer<v1::DeleteSessionReply> {
        let (_, name) = named(wish.name)?;
        Ok(v1::DeleteSessionReply { deleted: self.store.delete_session(call.caller, &name).await? })
    }

    fn spell_session(&self, name: &SessionName, s: &Session) -> v1::SessionInfo {
        let now_ms = Clock::unix_ms();
        v1::SessionInfo {
            name: Some(v1::SessionName {
                handle: Some(convert::handle_to_proto(s.handle(name.namespace))),
                session_id: name.id.as_str().to_owned(),
            }),
            state: if s.open { v1::SessionState::Open } else { v1::SessionState::Closed }.into(),
            class: convert::class_to_proto(s.class),
            positions: s.positions(),
            tokens: s.tokens,
            ttl_ms: s.ttl_ms,
            expires_in_ms: s.expires_ms().map_or(0, |at| at.saturating_sub(now_ms).max(1)),
            priority: s.priority,
            attributes: s.attributes.clone().into_iter().collect(),
            parent_id: s.parent.as_ref().map_or_else(String::new, |(id, _)| id.as_str().to_owned()),
            parent_positions: s.parent.as_ref().map_or(0, |(_, at)| *at),
            pinned: s.pinned.map_or(0, convert::tier_to_proto),
            finished: s.finished,
            created_unix_ms: s.created_ms,
            changed_unix_ms: s.changed_ms,
            appends: s.appends,
            revision_matches: self.store.views.is_current(s.handle(name.namespace)),
            uid: s.uid,
        }
    }
}

/// How far a restore is, as it travels.
pub fn spell_progress(p: Progress) -> v1::RestoreProgress {
    v1::RestoreProgress {
        positions: p.positions,
        total_positions: p.total_positions,
        bytes: p.bytes,
        total_bytes: p.total_bytes,
        ..v1::RestoreProgress::default()
    }
}

fn spell_restored(r: Restored, session: &Session) -> v1::RestoreProgress {
    let missing = r.missing.iter().map(|run| v1::MissingRun {
        first_position: run.first,
        count: run.count,
        reason: convert::reason_to_proto(run.reason),
        why: run.why.to_owned(),
    });
    v1::RestoreProgress {
        done: true,
        usable_positions: r.usable_positions,
        compute_from_token: r.compute_from_token,
        tokens: session.tokens,
        missing: missing.collect(),
        revision_matches: r.revision_matches,
        late: r.late,
        lease_id: convert::lease_to_proto(r.lease),
        ..spell_progress(r.progress)
    }
}

/// The last session of a page: namespace 4, its id.
fn page_to_proto(name: &SessionName) -> Bytes {
    let mut token = name.namespace.0.to_le_bytes().to_vec();
    token.extend(name.id.as_str().as_bytes());
    token.into()
}

fn page_from_proto(token: &[u8]) -> Result<Option<SessionName>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let bad = || Error::new(ErrorKind::InvalidArgument, "the page token is not one of this server's");
    let (namespace, id) = token.split_first_chunk().ok_or_else(bad)?;
    let id = std::str::from_utf8(id).ok().and_then(|id| SessionId::new(id).ok()).ok_or_else(bad)?;
    let handle = Handle { namespace: kvkeep_core::NamespaceId(u32::from_le_bytes(*namespace)), revision: Revision(0) };
    Ok(Some(SessionName { namespace: handle.namespace, id }))
}
