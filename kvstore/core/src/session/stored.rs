//! Keys and values of the state machine.
//!
//! Key, big-endian, so that a slot and a session are one range each and a session's head comes first:
//!
//! | slot 2 | namespace 4 | uid 8 | tag 1: 0 head, 1 run, 2 text | number 4: of the run or the text; of a head 0 |
//!
//! Value of a head: version 1, then [`Head`] in [postcard](https://postcard.jamesmunns.com/wire-format). Of a run: 16 bytes for
//! each digest, at most 32. Of a text: version 1, then [`Text`] in postcard.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Manifest, RUN_POSITIONS, Session, SessionId, SessionName, Text};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Digest, NamespaceId, Revision, TenantId};
use crate::words::{Class, Tier};

const VERSION: u8 = 1;
pub(super) const KEY_BYTES: usize = 19;

/// What a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Head,
    Run(u32),
    Text(u32),
}

/// Everything of a session but its lists.
#[derive(Serialize, Deserialize)]
pub(super) struct Head {
    id: SessionId,
    tenant: TenantId,
    revision: Revision,
    open: bool,
    class: Class,
    ttl_ms: u64,
    priority: i32,
    attributes: BTreeMap<String, String>,
    parent: Option<(SessionId, u64)>,
    pinned: Option<Tier>,
    finished: bool,
    created_ms: u64,
    changed_ms: u64,
    appends: u64,
    /// Lengths of the lists: a state that has lost one of them is not taken for a shorter session.
    positions: u64,
    texts: u32,
    tokens: u64,
}

/// The key of a piece.
pub(super) fn key(name: &SessionName, uid: u64, piece: Piece) -> Vec<u8> {
    let (tag, number) = match piece {
        Piece::Head => (0, 0),
        Piece::Run(n) => (1, n),
        Piece::Text(n) => (2, n),
    };
    let mut key = Vec::with_capacity(KEY_BYTES);
    key.extend(name.slot().to_be_bytes());
    key.extend(name.namespace.0.to_be_bytes());
    key.extend(uid.to_be_bytes());
    key.push(tag);
    key.extend(u32::to_be_bytes(number));
    key
}

/// Slot, namespace, uid and piece of a key.
pub(super) fn parse(key: &[u8]) -> Result<(u16, NamespaceId, u64, Piece)> {
    let bad = || corrupt("a key of sessions is none");
    let key: &[u8; KEY_BYTES] = key.try_into().map_err(|_| bad())?;
    let [s0, s1, n0, n1, n2, n3, u0, u1, u2, u3, u4, u5, u6, u7, tag, m0, m1, m2, m3] = *key;
    let number = u32::from_be_bytes([m0, m1, m2, m3]);
    let piece = match (tag, number) {
        (0, 0) => Piece::Head,
        (1, n) => Piece::Run(n),
        (2, n) => Piece::Text(n),
        _ => return Err(bad()),
    };
    let namespace = NamespaceId(u32::from_be_bytes([n0, n1, n2, n3]));
    Ok((u16::from_be_bytes([s0, s1]), namespace, u64::from_be_bytes([u0, u1, u2, u3, u4, u5, u6, u7]), piece))
}

/// The value of a head.
pub(super) fn head(id: &SessionId, s: &Session) -> Vec<u8> {
    let head = Head {
        id: id.clone(),
        tenant: s.tenant,
        revision: s.revision,
        open: s.open,
        class: s.class,
        ttl_ms: s.ttl_ms,
        priority: s.priority,
        attributes: s.attributes.clone(),
        parent: s.parent.clone(),
        pinned: s.pinned,
        finished: s.finished,
        created_ms: s.created_ms,
        changed_ms: s.changed_ms,
        appends: s.appends,
        positions: s.manifest.len(),
        texts: s.texts.len() as u32,
        tokens: s.tokens,
    };
    encode(&head)
}

/// A session from its head, without its lists, and how long those must become.
pub(super) fn read_head(uid: u64, value: &[u8]) -> Result<(SessionId, Session, Lengths)> {
    let h: Head = decode(value)?;
    let lengths = Lengths { positions: h.positions, texts: h.texts };
    let id = SessionId::new(h.id.as_str()).map_err(|_| corrupt("a session has no id"))?;
    let session = Session {
        uid,
        tenant: h.tenant,
        revision: h.revision,
        open: h.open,
        class: h.class,
        ttl_ms: h.ttl_ms,
        priority: h.priority,
        attributes: h.attributes,
        parent: h.parent,
        pinned: h.pinned,
        finished: h.finished,
        created_ms: h.created_ms,
        changed_ms: h.changed_ms,
        appends: h.appends,
        tokens: h.tokens,
        texts: Vec::new(),
        manifest: Manifest::default(),
    };
    Ok((id, session, lengths))
}

/// How long the lists of a session are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    pub positions: u64,
    pub texts: u32,
}

/// The value of a run.
pub(super) fn run(digests: &[Digest]) -> Vec<u8> {
    digests.iter().flat_map(|d| d.as_bytes().iter().copied()).collect()
}

/// Digests of a run.
pub(super) fn read_run(value: &[u8]) -> Result<Vec<Digest>> {
    let (digests, rest) = value.as_chunks::<16>();
    if !rest.is_empty() || digests.is_empty() || digests.len() > RUN_POSITIONS {
        return Err(corrupt("a run of a manifest has no whole digests, or too many"));
    }
    digests.iter().map(|d| Digest::from_slice(d)).collect()
}

/// The value of a text.
pub(super) fn text(text: &Text) -> Vec<u8> {
    encode(text)
}

/// A text.
pub(super) fn read_text(value: &[u8]) -> Result<Text> {
    decode(value)
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Only a type that cannot be spelled fails, and these can.
    postcard::to_extend(value, vec![VERSION]).unwrap_or_default()
}

fn decode<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T> {
    match value.split_first() {
        Some((&VERSION, rest)) => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            _ => Err(corrupt("a value cannot be read")),
        },
        _ => Err(corrupt("a value is of a newer version")),
    }
}

pub(super) fn corrupt(why: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, "the stored sessions are damaged").with("why", why)
}
