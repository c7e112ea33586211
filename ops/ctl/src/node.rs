//! `status`, `tier`, `lease`, `scrub`: the node as a whole.

use std::time::{Duration, Instant};

use kvkeep_core::Tier;
use serde_json::json;

use crate::args::TierArg;
use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, pairs, table};
use crate::{key, show, units};
use kvkeep_client::wire;

/// How long one question about a running scrub waits.
const SCRUB_STEP: Duration = Duration::from_secs(2);

/// `status`
pub async fn status(contact: &Contact, out: &Output) -> Outcome {
    let s = contact.client.admin().status(&contact.call).await?;
    let stats = s.stats.clone().unwrap_or_default();
    let fields = json!({
        "node": s.node,
        "server_version": s.version,
        "state": s.state,
        "uptime_ms": s.uptime_ms,
        "data_dir": s.data_dir,
        "server_epoch": show::id(s.server_epoch),
        "warnings": s.warnings,
        "start_to_first_hit_ms": (s.start_to_first_hit_ms != 0).then_some(s.start_to_first_hit_ms),
        "arena_page_bytes": s.arena_page_bytes,
        "io_engine": s.io_engine,
        "adopted_slots": s.adopted_slots,
        "index_entries_at_open": s.index_entries_at_open,
        "index_open_ms": s.index_open_ms,
        "positions": stats.positions,
        "blocks": stats.blocks,
        "leases": stats.leases,
        "leased_positions": stats.leased_positions,
        "reservations": stats.reservations,
        "reserved_bytes": stats.reserved_bytes,
        "tiers": stats.tiers.iter().map(show::tier_stats_json).collect::<Vec<_>>(),
        "counters": stats.counters,
    });
    out.answer("status", fields, || {
        let first_hit = match s.start_to_first_hit_ms {
            0 => "none yet".to_owned(),
            ms => format!("{} after the start", units::millis(ms)),
        };
        let mut text = pairs([
            ("node", s.node.clone()),
            ("version", s.version.clone()),
            ("state", s.state.clone()),
            ("up", units::millis(s.uptime_ms)),
            ("data", s.data_dir.clone()),
            ("disk", s.io_engine.clone()),
            ("arena pages", units::bytes(s.arena_page_bytes)),
            ("first hit", first_hit),
            (
                "at start",
                format!(
                    "{} slots adopted, {} index entries opened in {}",
                    s.adopted_slots,
                    s.index_entries_at_open,
                    units::millis(s.index_open_ms)
                ),
            ),
            ("stored", format!("{} positions, {} blocks", stats.positions, stats.blocks)),
            ("leases", format!("{} over {} positions", stats.leases, stats.leased_positions)),
            ("being put", format!("{} reservations, {}", stats.reservations, units::bytes(stats.reserved_bytes))),
        ]);
        text.push('\n');
        text.push_str(&tier_table(&stats.tiers));
        for warning in &s.warnings {
            text.push_str(&format!("\nwarning: {warning}"));
        }
        text
    })?;
    Ok(())
}

/// `tier list` and `tier show`
pub async fn tiers(contact: &Contact, only: Option<TierArg>, out: &Output) -> Outcome {
    let stats = contact.client.stats(&contact.call).await?;
    let Some(only) = only else {
        let fields = json!({ "tiers": stats.tiers.iter().map(show::tier_stats_json).collect::<Vec<_>>() });
        out.answer("tiers", fields, || tier_table(&stats.tiers))?;
        return Ok(());
    };
    let word = Tier::from(only).word();
    let Some(t) = stats.tiers.iter().find(|t| show::tier(t.tier) == word) else {
        return Err(Failure::failed(format!("the node has no tier {word}")));
    };
    // Counters carry the name of what they count: those of this tier begin with it.
    let counters: std::collections::BTreeMap<_, _> =
        stats.counters.iter().filter(|(name, _)| name.split('_').any(|w| w == word)).collect();
    let mut fields = show::tier_stats_json(t);
    fields["counters"] = json!(counters);
    out.answer("tier", fields, || {
        let mut text = pairs([
            ("tier", word.to_owned()),
            ("state", t.state.clone()),
            ("capacity", units::bytes(t.capacity_bytes)),
            ("used", format!("{} ({})", units::bytes(t.used_bytes), units::percent(t.used_bytes, t.capacity_bytes))),
            ("free", units::bytes(t.free_bytes)),
            (
                "stranded",
                format!("{} ({})", units::bytes(t.stranded_bytes), units::percent(t.stranded_bytes, t.capacity_bytes)),
            ),
            ("positions", t.positions.to_string()),
            ("read", units::rate(t.read_bytes_per_s)),
            ("write", units::rate(t.write_bytes_per_s)),
        ]);
        for (name, n) in &counters {
            text.push_str(&format!("{name} {n}\n"));
        }
        text
    })?;
    Ok(())
}

fn tier_table(tiers: &[wire::TierStats]) -> String {
    let rows = tiers.iter().map(|t| {
        vec![
            show::tier(t.tier).to_owned(),
            t.state.clone(),
            units::bytes(t.capacity_bytes),
            units::bytes(t.used_bytes),
            units::percent(t.used_bytes, t.capacity_bytes),
            units::bytes(t.stranded_bytes),
            t.positions.to_string(),
            units::rate(t.read_bytes_per_s),
            units::rate(t.write_bytes_per_s),
        ]
    });
    let head = ["tier", "state", "capacity", "used", "use", "stranded", "positions", "read", "write"];
    table(&head, rows, &[2, 3, 4, 5, 6, 7, 8])
}

/// `lease list`
pub async fn leases(contact: &Contact, limit: u32, out: &Output) -> Outcome {
    let reply = contact.client.admin().leases(limit, &contact.call).await?;
    let fields = json!({
        "total": reply.total,
        "leases": reply.leases.iter().map(|l| {
            let h = l.handle.unwrap_or_default();
            json!({
                "lease_id": show::id(l.lease_id),
                "instance_id": key::hex(&l.instance_id),
                "request_id": key::hex(&l.request_id),
                "namespace_id": h.namespace_id,
                "revision": h.revision,
                "positions": l.positions,
                "ttl_ms": l.ttl_ms,
                "age_ms": l.age_ms,
            })
        }).collect::<Vec<_>>(),
    });
    out.answer("leases", fields, || {
        let rows = reply.leases.iter().map(|l| {
            vec![
                show::id(l.lease_id),
                key::hex(&l.instance_id),
                if l.request_id.is_empty() { "-".to_owned() } else { key::show(&l.request_id) },
                l.handle.unwrap_or_default().namespace_id.to_string(),
                l.positions.to_string(),
                units::millis(u64::from(l.ttl_ms)),
                units::millis(l.age_ms),
            ]
        });
        let head = ["lease", "instance", "request", "namespace", "positions", "ends in", "age"];
        let mut text = table(&head, rows, &[3, 4, 5, 6]);
        if reply.total as usize > reply.leases.len() {
            text.push_str(&format!("{} of {} leases; see more with --limit\n", reply.leases.len(), reply.total));
        }
        text
    })?;
    Ok(())
}

/// `scrub`
pub async fn scrub(contact: &Contact, only: Option<TierArg>, wait_s: u32, out: &Output) -> Outcome {
    let until = Instant::now() + Duration::from_secs(u64::from(wait_s));
    let tiers = only.map_or(vec![Tier::Dram, Tier::Nvme], |t| vec![t.into()]);
    let mut results = Vec::new();
    for tier in tiers {
        loop {
            let step = SCRUB_STEP.min(until.saturating_duration_since(Instant::now())).max(Duration::from_millis(1));
            let call = contact.call.clone().within(step + contact.client.config().deadline);
            let reply = contact.client.admin().scrub(tier, step, &call).await?;
            if reply.done || Instant::now() >= until {
                results.push((tier, reply));
                break;
            }
            out.say(&format!(
                "{tier}: {} blocks, {} so far, {} bad",
                reply.checked_blocks,
                units::bytes(reply.checked_bytes),
                reply.bad_blocks
            ))?;
        }
    }
    let bad: u64 = results.iter().map(|(_, r)| r.bad_blocks).sum();
    let fields = json!({
        "bad_blocks": bad,
        "tiers": results.iter().map(|(tier, r)| json!({
            "tier": tier.word(),
            "checked_blocks": r.checked_blocks,
            "checked_bytes": r.checked_bytes,
            "bad_blocks": r.bad_blocks,
            "done": r.done,
        })).collect::<Vec<_>>(),
    });
    out.answer("scrub", fields, || {
        let rows = results.iter().map(|(tier, r)| {
            vec![
                tier.to_string(),
                r.checked_blocks.to_string(),
                units::bytes(r.checked_bytes),
                r.bad_blocks.to_string(),
                if r.done { "done" } else { "goes on in the background" }.to_owned(),
            ]
        });
        table(&["tier", "blocks", "bytes", "bad", "state"], rows, &[1, 2, 3])
    })?;
    if bad > 0 {
        return Err(Failure::failed(format!("{bad} blocks do not match their checksums and were quarantined"))
            .advise("they are misses from now on; look at the device (kernel log, SMART)"));
    }
    Ok(())
}
