//! What is said of sessions, in the words of core.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use kvkeep_core::{Class, Digest, Handle, MissReason, PartStatus, Tier};
use kvkeep_proto::v1;

use crate::convert::{self, SessionState};
use crate::error::{Error, Result};

/// How a session is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenSession {
    /// Of its blocks: an append is answered when they have it. `None`: cache, or as it is.
    pub class: Option<Class>,
    /// Without a change for so long it is deleted; `None`: never, or as it is.
    pub ttl: Option<Duration>,
    /// Kept and shown; eviction does not look at it yet. 0: as it is.
    pub priority: i32,
    /// What the caller wants to find it by; 1 KiB at most, names and values together.
    pub attributes: BTreeMap<String, String>,
    /// A new session begins with the first positions of this one.
    pub parent: Option<Parent>,
}

/// What is known of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    /// Its name in its namespace.
    pub id: String,
    /// Its namespace, at the revision of its manifest.
    pub handle: Handle,
    /// Whether it takes appends.
    pub state: SessionState,
    /// Of its blocks.
    pub class: Class,
    /// Of its manifest.
    pub positions: u64,
    /// Whose ids are kept.
    pub tokens: u64,
    /// Without a change for so long it is deleted.
    pub ttl: Option<Duration>,
    /// When that will be, if nothing changes.
    pub expires_in: Option<Duration>,
    /// Higher stays longer.
    pub priority: i32,
    /// As they were given when it was opened.
    pub attributes: BTreeMap<String, String>,
    /// It was forked from this session.
    pub parent: Option<Parent>,
    /// It stays in this tier.
    pub pinned: Option<Tier>,
    /// Somebody said that it will not come back.
    pub finished: bool,
    /// Wall clock of the leader.
    pub created_unix_ms: u64,
    /// Wall clock of the leader.
    pub changed_unix_ms: u64,
    /// How often something was appended.
    pub appends: u64,
    /// `false`: of other weights. Its blocks are of no use; its token ids are.
    pub revision_matches: bool,
    /// Drawn when it was made: one that was deleted and made anew has another.
    pub uid: u64,
}

/// Where a fork comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Of that session.
    pub id: String,
    /// The first positions that both have.
    pub positions: u64,
}

impl SessionInfo {
    pub(crate) fn from_proto(info: Option<v1::SessionInfo>) -> Result<Self> {
        let nothing = || Error::protocol("an answer about a session without the session");
        let info = info.ok_or_else(nothing)?;
        let name = info.name.ok_or_else(nothing)?;
        let parent = Parent { id: info.parent_id, positions: info.parent_positions };
        Ok(Self {
            parent: (!parent.id.is_empty()).then_some(parent),
            id: name.session_id,
            handle: convert::handle_from_proto(name.handle)?,
            state: convert::session_state_opt_from_proto(info.state)?.ok_or_else(nothing)?,
            class: convert::class_from_proto(info.class)?,
            positions: info.positions,
            tokens: info.tokens,
            ttl: convert::long_millis_from_proto(info.ttl_ms),
            expires_in: convert::long_millis_from_proto(info.expires_in_ms),
            priority: info.priority,
            attributes: info.attributes.into_iter().collect(),
            pinned: convert::tier_opt_from_proto(info.pinned),
            finished: info.finished,
            created_unix_ms: info.created_unix_ms,
            changed_unix_ms: info.changed_unix_ms,
            appends: info.appends,
            revision_matches: info.revision_matches,
            uid: info.uid,
        })
    }
}

/// Content that has no token ids of its own (an image, audio): it stands for some tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentPart {
    /// First of its tokens, counted from the start of the session.
    pub first_token: u64,
    /// How many.
    pub tokens: u32,
    /// What it is, 1..128 bytes.
    pub content_id: Bytes,
}

impl ContentPart {
    /// The token behind its last.
    pub fn end_token(&self) -> u64 {
        self.first_token.saturating_add(u64::from(self.tokens))
    }

    pub(crate) fn to_proto(&self) -> v1::ContentPart {
        v1::ContentPart { first_token: self.first_token, tokens: self.tokens, content_id: self.content_id.clone() }
    }

    fn from_proto(part: v1::ContentPart) -> Self {
        Self { first_token: part.first_token, tokens: part.tokens, content_id: part.content_id }
    }
}

/// One position of a manifest, and where it is or why it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestPosition {
    /// What the manifest names.
    pub digest: Digest,
    /// `None` where no copy is here to tell it.
    pub key: Option<Bytes>,
    /// Of all its parts.
    pub status: PartStatus,
    /// The slowest of its parts.
    pub tier: Option<Tier>,
    /// Why it is not here.
    pub reason: Option<MissReason>,
    /// Of its blocks.
    pub class: Class,
    /// Of all its parts.
    pub bytes: u64,
    /// One sentence, where it is not here.
    pub why: String,
}

impl ManifestPosition {
    /// Whether it can be read, from whatever tier.
    pub fn is_here(&self) -> bool {
        matches!(self.status, PartStatus::Hit | PartStatus::Loading)
    }

    fn from_proto(position: v1::ManifestPosition) -> Result<Self> {
        Ok(Self {
            digest: Digest::from_slice(&position.digest)?,
            key: (!position.key.is_empty()).then_some(position.key),
            // A status that this version does not know is no hit.
            status: convert::status_from_proto(position.status).unwrap_or(PartStatus::Miss),
            tier: convert::tier_opt_from_proto(position.tier),
            reason: convert::reason_opt_from_proto(position.reason),
            class: convert::class_from_proto(position.class)?,
            bytes: position.bytes,
            why: position.why,
        })
    }
}

/// Some positions of a manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ManifestPage {
    /// In order.
    pub positions: Vec<ManifestPosition>,
    /// That the session has.
    pub total: u64,
}

impl ManifestPage {
    pub(crate) fn from_proto(reply: v1::ManifestReply) -> Result<Self> {
        let positions = reply.positions.into_iter().map(ManifestPosition::from_proto).collect::<Result<_>>()?;
        Ok(Self { positions, total: reply.total })
    }
}

/// Token ids of a session, or some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// In order.
    pub ids: Vec<u32>,
    /// Content that begins among them.
    pub content: Vec<ContentPart>,
    /// A block of token ids is lost: what is behind it is not here.
    pub damaged: bool,
    /// That the session has.
    pub total: u64,
}

impl Tokens {
    pub(crate) fn from_proto(reply: v1::TokensReply) -> Self {
        Self {
            ids: reply.token_ids,
            content: reply.content.into_iter().map(ContentPart::from_proto).collect(),
            damaged: reply.damaged,
            total: reply.total,
        }
    }
}

/// Which sessions to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListSessions {
    /// Not only of this namespace: all of the tenant's.
    pub all_namespaces: bool,
    /// Whose id begins with this.
    pub id_prefix: String,
    /// Of this class.
    pub class: Option<Class>,
    /// In this state.
    pub state: Option<SessionState>,
    /// That have all of these.
    pub attributes: BTreeMap<String, String>,
}

/// Some sessions, by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionPage {
    /// In order.
    pub sessions: Vec<SessionInfo>,
    /// Where the next page begins; empty at the end.
    pub next_page_token: Bytes,
}

impl SessionPage {
    pub(crate) fn from_proto(reply: v1::ListSessionsReply) -> Result<Self> {
        let sessions = reply.sessions.into_iter().map(|s| SessionInfo::from_proto(Some(s))).collect::<Result<_>>()?;
        Ok(Self { sessions, next_page_token: reply.next_page_token })
    }
}
