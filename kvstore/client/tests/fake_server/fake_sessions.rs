//! The sessions of the fake server: lists in memory, compare-and-set, pages of a few.

#![expect(clippy::unwrap_used, reason = "the support of tests: an unwrap is an assertion")]

use std::pin::Pin;

use bytes::Bytes;
use kvkeep_client::convert;
use kvkeep_core::{DigestKey, Error, ErrorKind, KeyDomain};
use kvkeep_proto::v1;
use kvkeep_proto::v1::sessions_server::Sessions;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::support::{Fake, State};

/// Positions of one page of a manifest.
pub const MANIFEST_PAGE: usize = 3;
/// Token ids of one page.
pub const TOKENS_PAGE: usize = 50;

#[derive(Clone, Default)]
pub struct FakeSession {
    pub open: v1::OpenSessionRequest,
    pub keys: Vec<Bytes>,
    pub tokens: Vec<u32>,
    pub content: Vec<v1::ContentPart>,
    pub closed: bool,
    pub pinned: i32,
    pub hints: Vec<v1::Hint>,
    pub appends: u64,
}

fn refuse(kind: ErrorKind) -> Status {
    convert::status_from_error(&Error::new(kind, "the fake says no"))
}

fn digest(key: &[u8]) -> Bytes {
    let handle = convert::handle_from_proto(Some(v1::Handle { namespace_id: 1, revision: 1 })).unwrap();
    Bytes::copy_from_slice(DigestKey::from_bytes([7; 16]).digest(KeyDomain(1), handle, key).as_bytes())
}

fn find<'a>(state: &'a mut State, name: &Option<v1::SessionName>) -> Result<&'a mut FakeSession, Status> {
    let id = &name.as_ref().unwrap().session_id;
    state.sessions.get_mut(id).ok_or_else(|| refuse(ErrorKind::UnknownSession))
}

impl FakeSession {
    fn info(&self, id: &str) -> Option<v1::SessionInfo> {
        Some(v1::SessionInfo {
            name: Some(v1::SessionName {
                handle: Some(v1::Handle { namespace_id: 1, revision: 1 }),
                session_id: id.to_owned(),
            }),
            state: if self.closed { v1::SessionState::Closed } else { v1::SessionState::Open } as i32,
            class: self.open.class,
            positions: self.keys.len() as u64,
            tokens: self.tokens.len() as u64,
            ttl_ms: self.open.ttl_ms,
            priority: self.open.priority,
            attributes: self.open.attributes.clone(),
            pinned: self.pinned,
            appends: self.appends,
            revision_matches: true,
            uid: 7,
            ..Default::default()
        })
    }

    fn append(&mut self, r: v1::AppendSessionRequest) -> Result<v1::AppendSessionReply, Status> {
        if self.closed {
            return Err(refuse(ErrorKind::Conflict));
        }
        let (position, token) = (r.from_position as usize, r.from_token as usize);
        let repeated = self.keys.get(position..).is_some_and(|k| k.starts_with(&r.keys))
            && self.tokens.get(token..).is_some_and(|t| t.starts_with(&r.token_ids));
        if !repeated {
            if position != self.keys.len() || (!r.token_ids.is_empty() && token != self.tokens.len()) {
                return Err(refuse(ErrorKind::Conflict));
            }
            self.keys.extend(r.keys);
            self.tokens.extend(r.token_ids);
            self.content.extend(r.content);
            self.appends += 1;
        }
        Ok(v1::AppendSessionReply { positions: self.keys.len() as u64, tokens: self.tokens.len() as u64, repeated })
    }
}

type Steps = Pin<Box<dyn Stream<Item = Result<v1::RestoreProgress, Status>> + Send>>;

#[tonic::async_trait]
impl Sessions for Fake {
    async fn open(&self, r: Request<v1::OpenSessionRequest>) -> Result<Response<v1::OpenSessionReply>, Status> {
        self.answer("open_session", r, |state, request| {
            let id = request.name.clone().unwrap().session_id;
            let created = !state.sessions.contains_key(&id);
            let session = state.sessions.entry(id.clone()).or_default();
            if created {
                session.open = request;
            }
            session.closed = false;
            Ok(v1::OpenSessionReply { session: session.info(&id), created })
        })
        .await
    }

    async fn append(&self, r: Request<v1::AppendSessionRequest>) -> Result<Response<v1::AppendSessionReply>, Status> {
        self.answer("append_session", r, |state, request| {
            if request.keys.iter().any(|k| !state.blocks.keys().any(|(key, _, _)| key == k)) {
                return Err(refuse(ErrorKind::Conflict));
            }
            find(state, &request.name)?.append(request)
        })
        .await
    }

    async fn get(&self, r: Request<v1::GetSessionRequest>) -> Result<Response<v1::GetSessionReply>, Status> {
        self.answer("get_session", r, |state, request| {
            let id = request.name.clone().unwrap().session_id;
            Ok(v1::GetSessionReply { session: find(state, &request.name)?.info(&id) })
        })
        .await
    }

    /// One a page; the token is the id before it.
    async fn list(&self, r: Request<v1::ListSessionsRequest>) -> Result<Response<v1::ListSessionsReply>, Status> {
        self.answer("list_sessions", r, |state, request| {
            let mut ids: Vec<_> = state.sessions.keys().filter(|id| id.starts_with(&request.id_prefix)).collect();
            ids.sort();
            ids.retain(|id| id.as_bytes() > &request.page_token[..]);
            let sessions: Vec<_> = ids.first().and_then(|id| state.sessions[*id].info(id)).into_iter().collect();
            let next_page_token = if ids.len() > 1 { Bytes::from(ids[0].clone()) } else { Bytes::new() };
            Ok(v1::ListSessionsReply { sessions, next_page_token })
        })
        .await
    }

    async fn manifest(&self, r: Request<v1::ManifestRequest>) -> Result<Response<v1::ManifestReply>, Status> {
        self.answer("session_manifest", r, |state, request| {
            let keys = find(state, &request.name)?.keys.clone();
            let first = (request.first_position as usize).min(keys.len());
            let count = if request.count == 0 { MANIFEST_PAGE } else { request.count as usize };
            let position = |key: &Bytes| {
                let bytes: usize = state.blocks.iter().filter(|(id, _)| id.0 == *key).map(|(_, b)| b.len()).sum();
                let here = bytes > 0;
                v1::ManifestPosition {
                    digest: digest(key),
                    key: if here { key.clone() } else { Bytes::new() },
                    status: if here { v1::PartStatus::Hit } else { v1::PartStatus::Miss } as i32,
                    tier: if here { v1::Tier::Dram as i32 } else { 0 },
                    reason: if here { 0 } else { v1::MissReason::Evicted as i32 },
                    class: v1::Class::Cache as i32,
                    bytes: bytes as u64,
                    why: if here { String::new() } else { "evicted".to_owned() },
                }
            };
            let positions = keys[first..].iter().take(count).map(position).collect();
            Ok(v1::ManifestReply { positions, total: keys.len() as u64 })
        })
        .await
    }

    async fn tokens(&self, r: Request<v1::TokensRequest>) -> Result<Response<v1::TokensReply>, Status> {
        self.answer("session_tokens", r, |state, request| {
            let session = find(state, &request.name)?;
            let first = (request.first_token as usize).min(session.tokens.len());
            let count = if request.count == 0 { TOKENS_PAGE } else { request.count as usize };
            let last = session.tokens.len().min(first + count);
            let among = |c: &&v1::ContentPart| (first..last).contains(&(c.first_token as usize));
            Ok(v1::TokensReply {
                token_ids: session.tokens[first..last].to_vec(),
                content: session.content.iter().filter(among).cloned().collect(),
                total: session.tokens.len() as u64,
                damaged: false,
            })
        })
        .await
    }

    async fn fork(&self, r: Request<v1::ForkSessionRequest>) -> Result<Response<v1::ForkSessionReply>, Status> {
        self.answer("fork_session", r, |state, request| {
            let mut fork = find(state, &request.from)?.clone();
            if !request.whole {
                fork.keys.truncate(request.at_position as usize);
            }
            let parent_positions = fork.keys.len() as u64;
            let info = fork.info(&request.session_id).map(|info| v1::SessionInfo {
                parent_id: request.from.unwrap().session_id,
                parent_positions,
                ..info
            });
            let created = state.sessions.insert(request.session_id, fork).is_none();
            Ok(v1::ForkSessionReply { session: info, created })
        })
        .await
    }

    async fn truncate(
        &self,
        r: Request<v1::TruncateSessionRequest>,
    ) -> Result<Response<v1::TruncateSessionReply>, Status> {
        self.answer("truncate_session", r, |state, request| {
            let session = find(state, &request.name)?;
            session.keys.truncate(request.positions as usize);
            if !request.keep_tokens {
                session.tokens.truncate(request.positions as usize * 16);
            }
            Ok(v1::TruncateSessionReply { session: session.info(&request.name.unwrap().session_id) })
        })
        .await
    }

    async fn pin(&self, r: Request<v1::PinSessionRequest>) -> Result<Response<v1::PinSessionReply>, Status> {
        self.answer("pin_session", r, |state, request| {
            let session = find(state, &request.name)?;
            session.pinned = request.tier;
            Ok(v1::PinSessionReply { session: session.info(&request.name.unwrap().session_id) })
        })
        .await
    }

    async fn unpin(&self, r: Request<v1::UnpinSessionRequest>) -> Result<Response<v1::UnpinSessionReply>, Status> {
        self.answer("unpin_session", r, |state, request| {
            let session = find(state, &request.name)?;
            session.pinned = 0;
            Ok(v1::UnpinSessionReply { session: session.info(&request.name.unwrap().session_id) })
        })
        .await
    }

    async fn hint(&self, r: Request<v1::HintSessionRequest>) -> Result<Response<v1::HintSessionReply>, Status> {
        self.answer("hint_session", r, |state, request| {
            let session = find(state, &request.name)?;
            session.hints.extend(request.hints);
            Ok(v1::HintSessionReply { positions: session.keys.len() as u64 })
        })
        .await
    }

    type RestoreStream = Steps;
    async fn restore(&self, r: Request<v1::RestoreSessionRequest>) -> Result<Response<Self::RestoreStream>, Status> {
        let steps = self
            .answer("restore_session", r, |state, request| {
                let total = find(state, &request.name)?.keys.len() as u64;
                let at = |positions| v1::RestoreProgress {
                    positions,
                    total_positions: total,
                    bytes: positions * 10,
                    total_bytes: total * 10,
                    ..Default::default()
                };
                let mut steps: Vec<_> = (0..total).map(at).collect();
                steps.push(v1::RestoreProgress {
                    done: true,
                    usable_positions: total,
                    compute_from_token: total * 16,
                    revision_matches: true,
                    lease_id: request.lease.map_or(0, |l| u64::from(l.ttl_ms)),
                    ..at(total)
                });
                Ok(steps)
            })
            .await?
            .into_inner();
        Ok(Response::new(Box::pin(tokio_stream::iter(steps.into_iter().map(Ok)))))
    }

    async fn close(&self, r: Request<v1::CloseSessionRequest>) -> Result<Response<v1::CloseSessionReply>, Status> {
        self.answer("close_session", r, |state, request| {
            let session = find(state, &request.name)?;
            session.closed = true;
            Ok(v1::CloseSessionReply { session: session.info(&request.name.unwrap().session_id) })
        })
        .await
    }

    async fn delete(&self, r: Request<v1::DeleteSessionRequest>) -> Result<Response<v1::DeleteSessionReply>, Status> {
        self.answer("delete_session", r, |state, request| {
            let deleted = state.sessions.remove(&request.name.unwrap().session_id).is_some();
            Ok(v1::DeleteSessionReply { deleted })
        })
        .await
    }
}
