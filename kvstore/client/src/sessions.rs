//! Sessions: conversations, documents and agents as objects. What they keep is put before it is appended; block traffic never
//! waits for them.
//!
//! ```no_run
//! # async fn f(ns: kvkeep_client::Namespace, keys: Vec<bytes::Bytes>, tokens: Vec<u32>) -> kvkeep_client::Result<()> {
//! use kvkeep_client::sessions::{Append, OpenSession, Restore};
//! use kvkeep_client::Call;
//! let (sessions, call) = (ns.sessions(), Call::default());
//! let open = OpenSession { class: Some(kvkeep_core::Class::Durable), ..OpenSession::default() };
//! let (session, _) = sessions.open("conversation-7", &open, &call).await?;
//! let append = Append {
//!     from_position: session.positions,
//!     keys,
//!     from_token: session.tokens,
//!     token_ids: tokens,
//!     content: Vec::new(),
//! };
//! sessions.append("conversation-7", &append, &call).await?;
//! // Weeks later, perhaps elsewhere:
//! let restored = sessions.restore("conversation-7", &Restore::default(), &call).await?.finish().await?;
//! println!("compute from token {}", restored.compute_from_token);
//! # Ok(()) }
//! ```
//!
//! None of these verbs is a hot one: where the server is lost they fail, whatever [`crate::config::Lost`] says, and an engine
//! that gets such an error goes on without the session.

mod append;
mod info;
mod restore;
mod walk;

use bytes::Bytes;
use kvkeep_core::Tier;
use kvkeep_proto::v1;

use crate::call::Call;
use crate::client::Safety;
use crate::connection::sessions;
use crate::convert;
use crate::error::Result;
use crate::namespace::Namespace;

pub use append::{Append, Appended};
pub use info::{
    ContentPart, ListSessions, ManifestPage, ManifestPosition, OpenSession, Parent, SessionInfo, SessionPage, Tokens,
};
pub use restore::{MissingRun, Progress, Restore, Restored, Restoring};
pub use walk::ManifestWalk;

pub use crate::convert::{SessionHint, SessionState};

/// The sessions of a namespace. Cheap to clone.
#[derive(Clone)]
pub struct Sessions {
    pub(crate) ns: Namespace,
}

impl Sessions {
    /// The namespace they are in.
    pub fn namespace(&self) -> &Namespace {
        &self.ns
    }

    fn name(&self, id: &str) -> Option<v1::SessionName> {
        Some(v1::SessionName { handle: self.ns.wire_handle(), session_id: id.to_owned() })
    }

    /// Makes a session, or finds it; answers it and whether it was made. Fails with `conflict` where it was declared otherwise.
    /// One that was closed is open again.
    pub async fn open(&self, id: &str, open: &OpenSession, call: &Call) -> Result<(SessionInfo, bool)> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "open_session",
                call,
                Safety::Repeatable,
                |ctx| v1::OpenSessionRequest {
                    ctx: Some(ctx),
                    name: self.name(id),
                    class: open.class.map_or(0, convert::class_to_proto),
                    ttl_ms: open.ttl.map_or(0, convert::long_millis_to_proto),
                    priority: open.priority,
                    attributes: open.attributes.clone().into_iter().collect(),
                    parent_id: open.parent.as_ref().map_or_else(String::new, |p| p.id.clone()),
                    parent_positions: open.parent.as_ref().map_or(0, |p| p.positions),
                },
                |wire, r| async move { sessions(wire).open(r).await },
            )
            .await?;
        Ok((SessionInfo::from_proto(reply.session)?, reply.created))
    }

    /// Adds to the end of a session, if it is as long as the caller believes; answers when the blocks have the session's class.
    /// Fails with `conflict` where it has another length. One that is too large for a call is appended in several, token ids
    /// first; what an error left is appended already, and the same append again goes on behind it.
    pub async fn append(&self, id: &str, append: &Append, call: &Call) -> Result<Appended> {
        let mut all = Appended { repeated: true, ..Appended::default() };
        for step in append.steps(self.ns.batch())? {
            let reply = self
                .ns
                .client
                .shared
                .unary(
                    "append_session",
                    call,
                    Safety::Repeatable,
                    |ctx| v1::AppendSessionRequest {
                        ctx: Some(ctx),
                        name: self.name(id),
                        from_position: append.from_position + step.keys.start as u64,
                        keys: append.keys[step.keys.clone()].to_vec(),
                        from_token: append.from_token + step.tokens.start as u64,
                        token_ids: append.token_ids[step.tokens.clone()].to_vec(),
                        content: append.content[step.content.clone()].iter().map(ContentPart::to_proto).collect(),
                    },
                    |wire, r| async move { sessions(wire).append(r).await },
                )
                .await?;
            let repeated = all.repeated && reply.repeated;
            all = Appended { positions: reply.positions, tokens: reply.tokens, repeated };
        }
        Ok(all)
    }

    /// One session. Fails with `unknown_session` where there is none.
    pub async fn get(&self, id: &str, call: &Call) -> Result<SessionInfo> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "get_session",
                call,
                Safety::Repeatable,
                |ctx| v1::GetSessionRequest { ctx: Some(ctx), name: self.name(id) },
                |wire, r| async move { sessions(wire).get(r).await },
            )
            .await?;
        SessionInfo::from_proto(reply.session)
    }

    /// One page of sessions, by id. `page_token`: empty at first, then the last page's until that is empty. `page_size` 0: the
    /// server's default.
    pub async fn list_page(
        &self,
        which: &ListSessions,
        page_token: &Bytes,
        page_size: u32,
        call: &Call,
    ) -> Result<SessionPage> {
        let all = || v1::Handle { namespace_id: 0, revision: 0 };
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "list_sessions",
                call,
                Safety::Repeatable,
                |ctx| v1::ListSessionsRequest {
                    ctx: Some(ctx),
                    handle: if which.all_namespaces { Some(all()) } else { self.ns.wire_handle() },
                    id_prefix: which.id_prefix.clone(),
                    class: which.class.map_or(0, convert::class_to_proto),
                    state: which.state.map_or(0, convert::session_state_to_proto),
                    attributes: which.attributes.clone().into_iter().collect(),
                    page_token: page_token.clone(),
                    page_size,
                },
                |wire, r| async move { sessions(wire).list(r).await },
            )
            .await?;
        SessionPage::from_proto(reply)
    }

    /// Positions of a manifest from `first` on, at most `count`, and where each is. `count` 0: as many as the server gives in
    /// one answer; [`Self::walk_manifest`] has them all.
    pub async fn manifest(&self, id: &str, first: u64, count: u32, call: &Call) -> Result<ManifestPage> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "session_manifest",
                call,
                Safety::Repeatable,
                |ctx| v1::ManifestRequest { ctx: Some(ctx), name: self.name(id), first_position: first, count },
                |wire, r| async move { sessions(wire).manifest(r).await },
            )
            .await?;
        ManifestPage::from_proto(reply)
    }

    /// Token ids from `first` on, at most `count`, and the content that begins among them. `count` 0: as many as one answer
    /// takes; [`Self::tokens_all`] has them all.
    pub async fn tokens(&self, id: &str, first: u64, count: u32, call: &Call) -> Result<Tokens> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "session_tokens",
                call,
                Safety::Repeatable,
                |ctx| v1::TokensRequest { ctx: Some(ctx), name: self.name(id), first_token: first, count },
                |wire, r| async move { sessions(wire).tokens(r).await },
            )
            .await?;
        Ok(Tokens::from_proto(reply))
    }

    /// A new session `to` that begins with the first `at_position` positions of `id` (`None`: with all of it); answers it and
    /// whether it was made.
    pub async fn fork(&self, id: &str, to: &str, at_position: Option<u64>, call: &Call) -> Result<(SessionInfo, bool)> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "fork_session",
                call,
                Safety::Repeatable,
                |ctx| v1::ForkSessionRequest {
                    ctx: Some(ctx),
                    from: self.name(id),
                    session_id: to.to_owned(),
                    at_position: at_position.unwrap_or(0),
                    whole: at_position.is_none(),
                },
                |wire, r| async move { sessions(wire).fork(r).await },
            )
            .await?;
        Ok((SessionInfo::from_proto(reply.session)?, reply.created))
    }

    /// Drops what is behind the first `positions`; with `keep_tokens` the token ids stay whole. On a namespace of a newer
    /// revision, 0 positions begin anew under the new weights. Not tried again where it may have been done: somebody may have
    /// appended since.
    pub async fn truncate(&self, id: &str, positions: u64, keep_tokens: bool, call: &Call) -> Result<SessionInfo> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "truncate_session",
                call,
                Safety::Once,
                |ctx| v1::TruncateSessionRequest { ctx: Some(ctx), name: self.name(id), positions, keep_tokens },
                |wire, r| async move { sessions(wire).truncate(r).await },
            )
            .await?;
        SessionInfo::from_proto(reply.session)
    }

    /// Keeps what it has, and what will be appended, from being evicted from a tier (DRAM or NVMe).
    pub async fn pin(&self, id: &str, tier: Tier, call: &Call) -> Result<SessionInfo> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "pin_session",
                call,
                Safety::Repeatable,
                |ctx| v1::PinSessionRequest { ctx: Some(ctx), name: self.name(id), tier: convert::tier_to_proto(tier) },
                |wire, r| async move { sessions(wire).pin(r).await },
            )
            .await?;
        SessionInfo::from_proto(reply.session)
    }

    /// Ends [`Self::pin`].
    pub async fn unpin(&self, id: &str, call: &Call) -> Result<SessionInfo> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "unpin_session",
                call,
                Safety::Repeatable,
                |ctx| v1::UnpinSessionRequest { ctx: Some(ctx), name: self.name(id) },
                |wire, r| async move { sessions(wire).unpin(r).await },
            )
            .await?;
        SessionInfo::from_proto(reply.session)
    }

    /// Says what is known of its future; answers how many positions the policy was told of.
    pub async fn hint(&self, id: &str, hints: &[SessionHint], call: &Call) -> Result<u64> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "hint_session",
                call,
                Safety::Repeatable,
                |ctx| v1::HintSessionRequest {
                    ctx: Some(ctx),
                    name: self.name(id),
                    hints: hints.iter().copied().map(convert::session_hint_to_proto).collect(),
                },
                |wire, r| async move { sessions(wire).hint(r).await },
            )
            .await?;
        Ok(reply.positions)
    }

    /// It takes no appends until it is opened again.
    pub async fn close(&self, id: &str, call: &Call) -> Result<SessionInfo> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "close_session",
                call,
                Safety::Repeatable,
                |ctx| v1::CloseSessionRequest { ctx: Some(ctx), name: self.name(id) },
                |wire, r| async move { sessions(wire).close(r).await },
            )
            .await?;
        SessionInfo::from_proto(reply.session)
    }

    /// The session is gone, and with it what only it kept. Answers whether there was one; of a call that was tried twice, the
    /// second try finds none.
    pub async fn delete(&self, id: &str, call: &Call) -> Result<bool> {
        let reply = self
            .ns
            .client
            .shared
            .unary(
                "delete_session",
                call,
                Safety::Repeatable,
                |ctx| v1::DeleteSessionRequest { ctx: Some(ctx), name: self.name(id) },
                |wire, r| async move { sessions(wire).delete(r).await },
            )
            .await?;
        Ok(reply.deleted)
    }
}
