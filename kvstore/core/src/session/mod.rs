//! Sessions: conversations, documents and agents as objects. What one is, and every change of it.
//!
//! ```text
//! mod.rs       words and bounds: SessionId, Declared, Session
//!  ├ manifest.rs  its chain, in runs that forks share
//!  ├ command.rs   what changes sessions, and what that answers
//!  ├ text.rs      what a block of token ids holds
//!  ├ stored.rs    keys and values of a state machine, byte by byte
//!  ├ table.rs     Sessions: the state
//!  └ apply.rs     what commands do to it
//! ```
//! Deterministic, like all that a replicated log drives: no clock is read and nothing is drawn here; commands bring the time
//! of their leader and random numbers with them.
//!
//! **A manifest is the only truth** of what a session keeps. It names positions by digest, once each, and nothing counts
//! references: what no manifest names is found by marking all that are (`docs/ARCHITECTURE.md`).

mod apply;
pub mod command;
pub mod manifest;
mod stored;
pub mod table;
#[cfg(test)]
mod tests;
pub mod text;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Digest, Handle, NamespaceId, Revision, TenantId};
use crate::words::{Class, Tier};

pub use command::{Change, Command, Cut, Outcome};
pub use manifest::{Manifest, RUN_POSITIONS};
pub use table::{Sessions, Write};

/// Longest id of a session, in bytes.
pub const SESSION_ID_BYTES_MAX: usize = 256;
/// Attributes of one session, keys and values together, in bytes.
pub const ATTRIBUTES_BYTES_MAX: usize = 1024;
/// Positions of one session: 16 million tokens where a key stands for 16.
pub const POSITIONS_MAX: u64 = 1 << 20;
/// Blocks of token ids of one session: one an append that brings any.
pub const TEXTS_MAX: usize = 1 << 16;
/// Sessions of one store. Beyond its manifest one takes about 400 bytes of memory.
pub const SESSIONS_MAX: usize = 1 << 20;
/// Positions in all manifests of a store, 16 bytes of memory each; those that a fork shares count again.
pub const MANIFESTS_POSITIONS_MAX: u64 = 1 << 28;
/// Sessions are dealt to so many slots by their names, and slots to groups.
pub const SLOTS: u16 = 1024;

/// A caller's name for a session: 1 to [`SESSION_ID_BYTES_MAX`] bytes of text without control characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionId(Box<str>);

impl SessionId {
    /// The only way in.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that is empty, too long or has control characters.
    pub fn new(id: &str) -> Result<Self> {
        if id.is_empty() || id.len() > SESSION_ID_BYTES_MAX || id.chars().any(char::is_control) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "the id of a session has 1 to 256 bytes and no control characters",
            )
            .with("session_id_bytes", id.len()));
        }
        Ok(Self(id.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({:?})", self.0)
    }
}

/// Which session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionName {
    /// Where its blocks are.
    pub namespace: NamespaceId,
    /// Unique in its namespace.
    pub id: SessionId,
}

impl SessionName {
    /// The slot that it is dealt to: FNV-1a of the namespace's number and the id.
    pub fn slot(&self) -> u16 {
        let bytes = self.namespace.0.to_le_bytes();
        let sum = bytes
            .iter()
            .chain(self.id.0.as_bytes())
            .fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01B3));
        // The upper bits depend on all bytes.
        (sum >> 32) as u16 % SLOTS
    }
}

/// What a caller says of a session. What is left out stays as it is, and is the default of a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declared {
    /// Of its blocks; of a new session `cache`.
    pub class: Option<Class>,
    /// Without a change for so many milliseconds it is deleted; 0: left out.
    pub ttl_ms: u64,
    /// 0: left out.
    pub priority: i32,
    /// Empty: left out.
    pub attributes: BTreeMap<String, String>,
}

impl Declared {
    /// # Errors
    /// `TooLarge` for more attributes than there may be.
    pub fn check(&self) -> Result<()> {
        let bytes: usize = self.attributes.iter().map(|(k, v)| k.len() + v.len()).sum();
        if bytes > ATTRIBUTES_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "the attributes of a session are larger than they may be; put bulk into blocks",
            )
            .with("bytes", bytes)
            .with("attributes_bytes_max", ATTRIBUTES_BYTES_MAX));
        }
        Ok(())
    }
}

/// A block of token ids: `count` of them from `first` on. Its bytes are a durable block of a system namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// Of the block, whose key is made of what is in it.
    pub digest: Digest,
    /// Index of the first token in its session.
    pub first: u64,
    /// Tokens in the block.
    pub in_block: u32,
    /// Of them, so many are the session's: a truncation may cut a block short.
    pub count: u32,
}

/// One session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Drawn when it was made. One of the same name that comes later has another.
    pub uid: u64,
    /// Whose it is.
    pub tenant: TenantId,
    /// Of the weights behind the manifest.
    pub revision: Revision,
    /// Takes appends.
    pub open: bool,
    /// Of its blocks.
    pub class: Class,
    /// Without a change for so long it is deleted; 0: never.
    pub ttl_ms: u64,
    /// As declared or hinted.
    pub priority: i32,
    /// As declared.
    pub attributes: BTreeMap<String, String>,
    /// Forked from, and at which position.
    pub parent: Option<(SessionId, u64)>,
    /// Not evicted from this tier.
    pub pinned: Option<Tier>,
    /// Hinted to have ended.
    pub finished: bool,
    /// On the leaders' clock, milliseconds since 1970.
    pub created_ms: u64,
    /// The last change, on the same clock.
    pub changed_ms: u64,
    /// Appends that changed it.
    pub appends: u64,
    /// Whose ids are kept.
    pub tokens: u64,
    /// Where those ids are, in order and without gaps.
    pub texts: Vec<Text>,
    /// Its positions.
    pub manifest: Manifest,
}

impl Session {
    /// Positions.
    pub fn positions(&self) -> u64 {
        self.manifest.len()
    }

    /// When it is deleted unless it changes before; `None`: never.
    pub fn expires_ms(&self) -> Option<u64> {
        (self.ttl_ms != 0).then(|| self.changed_ms.saturating_add(self.ttl_ms))
    }

    /// What names the positions of its manifest.
    pub fn handle(&self, namespace: NamespaceId) -> Handle {
        Handle { namespace, revision: self.revision }
    }
}
