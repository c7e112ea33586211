//! Wire messages as JSON and as words.

use kvkeep_client::{convert, wire};
use kvkeep_core::Tier;
use serde_json::{Value, json};

use crate::key;

/// A tier's word; `-` for none.
pub fn tier(number: i32) -> &'static str {
    convert::tier_opt_from_proto(number).map_or("-", Tier::word)
}

/// A class's word.
pub fn class(number: i32) -> &'static str {
    convert::class_from_proto(number).map_or("unknown", kvkeep_core::Class::word)
}

/// A status's word.
pub fn status(number: i32) -> &'static str {
    convert::status_from_proto(number).map_or("unknown", kvkeep_core::PartStatus::word)
}

/// A reason's word; `-` for none.
pub fn reason(number: i32) -> &'static str {
    convert::reason_opt_from_proto(number).map_or("-", kvkeep_core::MissReason::word)
}

/// The word, or null.
fn or_null(word: &'static str) -> Value {
    if word == "-" { Value::Null } else { json!(word) }
}

/// A tier as JSON.
pub fn tier_json(number: i32) -> Value {
    or_null(tier(number))
}

/// A reason as JSON.
pub fn reason_json(number: i32) -> Value {
    or_null(reason(number))
}

/// Versions and ids are 64-bit and random: as hexadecimal text, since JSON readers round such numbers.
pub fn id(n: u64) -> String {
    format!("{n:016x}")
}

/// The tiers that hold any part of a position, fastest first.
pub fn tiers_of(position: &wire::PositionInfo) -> String {
    let mut tiers: Vec<i32> = position.parts.iter().flat_map(|p| p.tiers.iter().copied()).collect();
    tiers.sort_unstable();
    tiers.dedup();
    if tiers.is_empty() { "-".to_owned() } else { tiers.into_iter().map(tier).collect::<Vec<_>>().join("+") }
}

/// Bytes of a position, all parts.
pub fn bytes_of(position: &wire::PositionInfo) -> u64 {
    position.parts.iter().map(|p| p.bytes).sum()
}

/// A position as JSON.
pub fn position_json(p: &wire::PositionInfo) -> Value {
    json!({
        "key": key::hex(&p.key),
        "digest": key::hex(&p.digest),
        "position": p.position,
        "class": class(p.class),
        "bytes": bytes_of(p),
        "leases": p.leases,
        "accesses": p.accesses,
        "idle_ms": p.idle_ms,
        "index_value": p.index_value,
        "parts": p.parts.iter().map(|part| json!({
            "group": part.group,
            "shard": part.shard,
            "bytes": part.bytes,
            "block_version": id(part.version),
            "tiers": part.tiers.iter().map(|t| tier(*t)).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
    })
}

/// What keeping a position is worth to the policy.
pub fn index_value(hits_per_s: f32) -> String {
    format!("{hits_per_s:.2e} hits/s")
}

/// A tier's numbers as JSON.
pub fn tier_stats_json(t: &wire::TierStats) -> Value {
    json!({
        "tier": tier(t.tier),
        "state": t.state,
        "capacity_bytes": t.capacity_bytes,
        "used_bytes": t.used_bytes,
        "free_bytes": t.free_bytes,
        "stranded_bytes": t.stranded_bytes,
        "positions": t.positions,
        "read_bytes_per_s": t.read_bytes_per_s,
        "write_bytes_per_s": t.write_bytes_per_s,
    })
}

/// A group's rule in words.
pub fn rule(group: &wire::Group) -> String {
    match &group.rule {
        Some(wire::group::Rule::All(_)) => "all".to_owned(),
        Some(wire::group::Rule::Window(w)) => format!("window({})", w.tokens),
        Some(wire::group::Rule::State(_)) => "state".to_owned(),
        None => "-".to_owned(),
    }
}

/// A group's sizes in words.
pub fn size(group: &wire::Group) -> String {
    match group.size.as_ref().and_then(|s| s.rule.as_ref()) {
        Some(wire::size_rule::Rule::Exact(n)) => format!("exactly {n} bytes"),
        Some(wire::size_rule::Rule::MultipleOf(m)) => format!("a multiple of {} up to {} bytes", m.step, m.max),
        Some(wire::size_rule::Rule::UpTo(n)) => format!("up to {n} bytes"),
        None => "-".to_owned(),
    }
}

/// A namespace as JSON.
pub fn namespace_json(n: &wire::NamespaceInfo) -> Value {
    json!({
        "namespace_id": n.namespace_id,
        "tenant": n.tenant,
        "name": n.name,
        "revision": n.revision,
        "revision_digest": n.revision_digest,
        "fingerprint": key::hex(&n.fingerprint),
        "positions": n.positions,
        "dram_bytes": n.dram_bytes,
        "nvme_bytes": n.nvme_bytes,
        "format": n.format.as_ref().map(format_json),
    })
}

fn format_json(f: &wire::Format) -> Value {
    let t = f.topology.unwrap_or_default();
    json!({
        "model": f.model,
        "dtype": f.dtype,
        "layout": f.layout,
        "hash_algorithm": f.hash_algorithm,
        "hash_seed": f.hash_seed,
        "tokens_per_key": f.tokens_per_key,
        "topology": { "canonical": t.canonical, "tp": t.tp, "pp": t.pp, "cp": t.cp },
        "prefill_us_per_token": f.prefill_us_per_token,
        "prefill_doubles_at_tokens": f.prefill_doubles_at_tokens,
        "groups": f.groups.iter().map(|g| json!({
            "rule": rule(g),
            "tokens_per_block": g.tokens_per_block,
            "shards": g.shards,
            "replicated": g.replicated,
            "size": size(g),
        })).collect::<Vec<_>>(),
    })
}
