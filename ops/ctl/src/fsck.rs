//! `fsck`: does the store have what its sessions name, and does it keep what none does?

use std::time::Duration;

use kvkeep_client::wire;
use serde_json::json;

use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, pairs, table};
use crate::sessions::words;
use crate::{show, units};

/// `fsck`
pub async fn run(contact: &Contact, sweep: bool, wait_s: u32, out: &Output) -> Outcome {
    let call = contact.call.clone().within(Duration::from_secs(u64::from(wait_s)));
    let reply = contact.client.admin().fsck(sweep, &call).await?;
    let namespaces = contact.namespaces().await?;
    let fields = json!({
        "sessions": reply.sessions,
        "positions": reply.positions,
        "missing_positions": reply.missing_positions,
        "missing_token_blocks": reply.missing_token_blocks,
        "missing": reply.missing.iter().map(|m| json!({
            "namespace_id": m.namespace_id,
            "session_id": m.session_id,
            "position": m.position,
            "reason": show::reason_json(m.reason),
        })).collect::<Vec<_>>(),
        "durable_blocks": reply.durable_blocks,
        "unreferenced_blocks": reply.unreferenced_blocks,
        "unreferenced_bytes": reply.unreferenced_bytes,
        "overdue_blocks": reply.overdue_blocks,
        "swept_blocks": reply.swept_blocks,
        "sweeps": reply.sweeps,
    });
    out.answer("fsck", fields, || text(&reply, &namespaces))?;
    match verdict(&reply) {
        None => Ok(()),
        Some(why) => Err(Failure::failed(why).advise("`kvkeepctl session explain` says why")),
    }
}

fn text(reply: &wire::FsckReply, namespaces: &[wire::NamespaceInfo]) -> String {
    let mut text = pairs([
        ("sessions", format!("{} over {} positions", reply.sessions, reply.positions)),
        (
            "missing",
            format!("{} positions, {} blocks of token ids", reply.missing_positions, reply.missing_token_blocks),
        ),
        ("durable", format!("{} blocks", reply.durable_blocks)),
        (
            "unreferenced",
            format!(
                "{} blocks of them, {}; {} are overdue",
                reply.unreferenced_blocks,
                units::bytes(reply.unreferenced_bytes),
                reply.overdue_blocks
            ),
        ),
        ("swept", format!("{} blocks in {} sweeps since the start", reply.swept_blocks, reply.sweeps)),
    ]);
    if !reply.missing.is_empty() {
        let rows = reply.missing.iter().map(|m| {
            let namespace = namespaces.iter().find(|n| n.namespace_id == m.namespace_id);
            vec![
                namespace.map_or_else(|| m.namespace_id.to_string(), words::label),
                m.session_id.clone(),
                m.position.to_string(),
                show::reason(m.reason).to_owned(),
            ]
        });
        text.push('\n');
        text.push_str(&table(&["namespace", "session", "position", "reason"], rows, &[2]));
        let shown = reply.missing.len() as u64;
        if shown < reply.missing_positions {
            text.push_str(&format!("{shown} of {} missing positions\n", reply.missing_positions));
        }
    }
    text
}

/// What is bad.
fn verdict(reply: &wire::FsckReply) -> Option<String> {
    match (reply.missing_positions, reply.missing_token_blocks) {
        (0, 0) => None,
        (positions, tokens) => {
            Some(format!("durable sessions lack {positions} positions and {tokens} blocks of token ids"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_bad_and_what_is_unreferenced_is_not() {
        let mut reply = wire::FsckReply { unreferenced_blocks: 3, overdue_blocks: 1, ..Default::default() };
        assert_eq!(verdict(&reply), None);
        reply.missing_positions = 2;
        reply.missing.push(wire::MissingPosition { namespace_id: 9, session_id: "a".into(), ..Default::default() });
        assert!(verdict(&reply).is_some());
        assert!(text(&reply, &[]).contains("1 of 2 missing positions"));
    }
}
