//! Sessions as JSON and as words.

use kvkeep_client::{SessionInfo, wire};
use kvkeep_core::Tier;
use serde_json::{Value, json};

use crate::output::pairs;
use crate::{show, units};

/// A session as JSON.
pub fn session_json(s: &SessionInfo) -> Value {
    let millis = |d: Option<std::time::Duration>| d.map(|d| d.as_millis() as u64);
    json!({
        "session_id": s.id,
        "namespace_id": s.handle.namespace.0,
        "revision": s.handle.revision.0,
        "revision_matches": s.revision_matches,
        "uid": show::id(s.uid),
        "state": s.state.word(),
        "class": s.class.word(),
        "positions": s.positions,
        "tokens": s.tokens,
        "appends": s.appends,
        "ttl_ms": millis(s.ttl),
        "expires_in_ms": millis(s.expires_in),
        "priority": s.priority,
        "attributes": s.attributes,
        "parent": s.parent.as_ref().map(|p| json!({ "session_id": p.id, "positions": p.positions })),
        "pinned": s.pinned.map(Tier::word),
        "finished": s.finished,
        "created_unix_ms": s.created_unix_ms,
        "changed_unix_ms": s.changed_unix_ms,
    })
}

/// A session as lines.
pub fn session_text(s: &SessionInfo, namespace: &wire::NamespaceInfo) -> String {
    let weights = if s.revision_matches { "" } else { ", of other weights: only its token ids are of use" };
    let expires = match (s.ttl, s.expires_in) {
        (Some(ttl), Some(left)) => format!("in {}, {} after the last change", millis(left), millis(ttl)),
        (Some(ttl), None) => format!("{} after the last change", millis(ttl)),
        (None, _) => "never".to_owned(),
    };
    let mut rows = vec![
        ("session", s.id.clone()),
        ("namespace", format!("{} ({})", label(namespace), namespace.namespace_id)),
        ("revision", format!("{}{weights}", s.handle.revision.0)),
        ("state", if s.finished { format!("{}, finished", s.state.word()) } else { s.state.word().to_owned() }),
        ("class", s.class.word().to_owned()),
        ("positions", s.positions.to_string()),
        ("tokens", s.tokens.to_string()),
        ("appends", s.appends.to_string()),
        ("priority", s.priority.to_string()),
        ("pinned", s.pinned.map_or("-", Tier::word).to_owned()),
        ("created", units::moment(s.created_unix_ms)),
        ("changed", units::moment(s.changed_unix_ms)),
        ("expires", expires),
    ];
    rows.extend(s.parent.iter().map(|p| ("forked from", format!("{} at position {}", p.id, p.positions))));
    rows.extend(s.attributes.iter().map(|(name, value)| ("attribute", format!("{name}={value}"))));
    pairs(rows)
}

/// Tenant and name.
pub fn label(namespace: &wire::NamespaceInfo) -> String {
    format!("{}/{}", namespace.tenant, namespace.name)
}

fn millis(d: std::time::Duration) -> String {
    units::millis(d.as_millis() as u64)
}
