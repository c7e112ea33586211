//! `block list`, `block show`, `explain` of a position and of a request.

use bytes::Bytes;
use kvkeep_client::wire;
use kvkeep_core::RequestId;
use serde_json::json;

use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::key::KeyArg;
use crate::output::{Output, pairs, table};
use crate::{key, show, units};

/// `block list`
pub async fn list(
    contact: &Contact,
    namespace: Option<&str>,
    prefix: Option<&KeyArg>,
    limit: u32,
    out: &Output,
) -> Outcome {
    let ns = contact.blocks(namespace).await?;
    let prefix = prefix.map_or_else(Bytes::new, |p| p.0.clone());
    let (positions, more) = ns.list(&prefix, limit as usize, &contact.call).await?;
    let fields = json!({ "positions": positions.iter().map(show::position_json).collect::<Vec<_>>(), "more": more });
    out.answer("blocks", fields, || {
        let rows = positions.iter().map(|p| {
            vec![
                key::show(&p.key),
                p.position.to_string(),
                p.parts.len().to_string(),
                units::bytes(show::bytes_of(p)),
                show::class(p.class).to_owned(),
                show::tiers_of(p),
                p.leases.to_string(),
                p.accesses.to_string(),
                units::millis(p.idle_ms),
            ]
        });
        let head = ["key", "position", "parts", "bytes", "class", "tiers", "leases", "accesses", "idle"];
        let mut text = table(&head, rows, &[1, 2, 3, 6, 7, 8]);
        if more {
            text.push_str(&format!("the first {limit}; see more with --limit\n"));
        }
        text
    })?;
    Ok(())
}

/// `block show`
pub async fn show(contact: &Contact, namespace: Option<&str>, key: &KeyArg, out: &Output) -> Outcome {
    let reply = contact.blocks(namespace).await?.explain(&key.0, &contact.call).await?;
    let Some(p) = &reply.position else {
        return Err(
            Failure::failed(format!("not here: {}", sentence(&reply))).advise("`kvkeepctl explain` has its history")
        );
    };
    out.answer("block", show::position_json(p), || position_text(p))?;
    Ok(())
}

/// `explain`
pub async fn explain(contact: &Contact, namespace: Option<&str>, key: &KeyArg, out: &Output) -> Outcome {
    let reply = contact.blocks(namespace).await?.explain(&key.0, &contact.call).await?;
    let fields = json!({
        "key": key::hex(&key.0),
        "status": show::status(reply.status),
        "reason": show::reason_json(reply.reason),
        "summary": reply.summary,
        "position": reply.position.as_ref().map(show::position_json),
        "history": reply.history.iter().map(|h| json!({
            "unix_ms": h.unix_ms, "what": h.what, "tier": show::tier_json(h.tier), "why": h.why,
            "index_value": h.index_value,
        })).collect::<Vec<_>>(),
    });
    out.answer("explain", fields, || {
        let mut text = sentence(&reply);
        text.push_str("\n\n");
        if let Some(p) = &reply.position {
            text.push_str(&position_text(p));
        }
        if !reply.history.is_empty() {
            let rows = reply.history.iter().map(|h| {
                let worth = h.index_value.map_or_else(String::new, show::index_value);
                vec![units::moment(h.unix_ms), h.what.clone(), show::tier(h.tier).to_owned(), h.why.clone(), worth]
            });
            text.push('\n');
            text.push_str(&table(&["when", "what", "tier", "why", "index value"], rows, &[]));
        }
        text
    })?;
    Ok(())
}

/// `explain --request`
pub async fn explain_request(contact: &Contact, id: &KeyArg, out: &Output) -> Outcome {
    let request = RequestId::new(&id.0).map_err(|e| Failure::usage(e.to_string()))?;
    let reply = contact.client.explain_request(&request, &contact.call).await?;
    let fields = json!({
        "request": key::hex(&id.0),
        "summary": reply.summary,
        "misses": reply.misses.iter().map(|m| json!({
            "unix_ms": m.unix_ms, "verb": m.verb, "namespace": m.handle.map(|h| h.namespace_id), "keys": m.keys, "hits": m.hits,
            "key": key::hex(&m.key), "reason": show::reason_json(m.reason), "why": m.why,
        })).collect::<Vec<_>>(),
    });
    out.answer("explain_request", fields, || {
        let rows = reply.misses.iter().map(|m| {
            let hits = format!("{} of {}", m.hits, m.keys);
            vec![
                units::moment(m.unix_ms),
                m.verb.clone(),
                hits,
                key::show(&m.key),
                show::reason(m.reason).to_owned(),
                m.why.clone(),
            ]
        });
        let head = ["when", "verb", "hits", "first missing", "reason", "why"];
        if reply.misses.is_empty() { reply.summary.clone() } else { table(&head, rows, &[]) }
    })?;
    Ok(())
}

/// The server's sentence, or one made of its words.
fn sentence(reply: &wire::ExplainReply) -> String {
    match (reply.summary.as_str(), show::reason(reply.reason)) {
        ("", "-") => show::status(reply.status).to_owned(),
        ("", reason) => format!("{}: {reason}", show::status(reply.status)),
        (summary, _) => summary.to_owned(),
    }
}

fn position_text(p: &wire::PositionInfo) -> String {
    let mut text = pairs([
        ("key", key::show(&p.key)),
        ("digest", key::hex(&p.digest)),
        ("position", p.position.to_string()),
        ("class", show::class(p.class).to_owned()),
        ("leases", p.leases.to_string()),
        ("accesses", format!("{}, the last {} ago", p.accesses, units::millis(p.idle_ms))),
        ("index value", p.index_value.map_or_else(|| "none".to_owned(), show::index_value)),
    ]);
    let rows = p.parts.iter().map(|part| {
        vec![
            part.group.to_string(),
            part.shard.to_string(),
            units::bytes(part.bytes),
            show::id(part.version),
            part.tiers.iter().map(|t| show::tier(*t)).collect::<Vec<_>>().join("+"),
        ]
    });
    text.push('\n');
    text.push_str(&table(&["group", "shard", "bytes", "version", "tiers"], rows, &[0, 1, 2]));
    text
}
