//! `events`: what is stored and removed, one line (or JSON object) per event.

use kvkeep_client::{Watch, wire};
use serde_json::json;

use crate::args::EventsArgs;
use crate::contact::Contact;
use crate::failure::Outcome;
use crate::output::Output;
use crate::{key, show, units};

/// `events`
pub async fn run(contact: &Contact, args: &EventsArgs, out: &Output) -> Outcome {
    let handle = match &args.namespace {
        Some(name) => Some(contact.blocks(Some(name)).await?.handle),
        None => None,
    };
    let watch =
        Watch { handle, snapshot: args.snapshot || !args.follow, after_sequence: args.after.unwrap_or_default() };
    let mut stream = contact.client.watch_events(&watch, &contact.call).await?;
    let mut left = args.limit.unwrap_or(u64::MAX);
    while left > 0
        && let Some(batch) = stream.next_batch().await
    {
        let batch = batch?;
        if batch.gap {
            let text = || "-- events were lost here; take a snapshot again --".to_owned();
            out.answer("events-gap", json!({ "sequence": batch.sequence }), text)?;
        }
        for event in batch.events.iter().take(usize::try_from(left).unwrap_or(usize::MAX)) {
            out.answer("event", event_json(event), || event_line(event))?;
            left -= 1;
        }
        if batch.snapshot_end {
            let text = || format!("-- that is what is here (event {}) --", batch.sequence);
            out.answer("events-snapshot-end", json!({ "sequence": batch.sequence }), text)?;
            if !args.follow {
                break;
            }
        }
    }
    Ok(())
}

fn what(event: &wire::Event) -> &'static str {
    use wire::event::What;
    match event.what() {
        What::Stored => "stored",
        What::Promoted => "promoted",
        What::Demoted => "demoted",
        What::Removed => "removed",
        What::Unspecified => "unknown",
    }
}

fn event_json(e: &wire::Event) -> serde_json::Value {
    let h = e.handle.unwrap_or_default();
    json!({
        "sequence": e.sequence,
        "what": what(e),
        "namespace_id": h.namespace_id,
        "revision": h.revision,
        "key": key::hex(&e.key),
        "parent_key": (!e.parent_key.is_empty()).then(|| key::hex(&e.parent_key)),
        "position": e.position,
        "token_ids": e.token_ids,
        "bytes": e.bytes,
        "tier": show::tier_json(e.tier),
        "groups": e.groups,
    })
}

fn event_line(e: &wire::Event) -> String {
    format!(
        "{:>8}  {:<8}  {:<5}  ns {}.{}  {}  position {}  {}",
        // Those of a snapshot have no place in the sequence.
        if e.sequence == 0 { "-".to_owned() } else { e.sequence.to_string() },
        what(e),
        show::tier(e.tier),
        e.handle.unwrap_or_default().namespace_id,
        e.handle.unwrap_or_default().revision,
        key::show(&e.key),
        e.position,
        units::bytes(e.bytes),
    )
}
