//! `session restore`: a bar on the way, a verdict at the end.

use std::time::{Duration, Instant};

use kvkeep_client::sessions::{Restore, Restored};
use kvkeep_core::{MissReason, Tier};
use serde_json::json;

use crate::contact::Contact;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, pairs, table};
use crate::sessions::args::RestoreArgs;
use crate::sessions::bar::Bar;
use crate::sessions::explain::span;
use crate::units;

/// Between two calls of a long restore.
const PAUSE: Duration = Duration::from_millis(100);

/// `session restore`
pub async fn run(contact: &Contact, args: &RestoreArgs, out: &Output) -> Outcome {
    let (_, sessions) = contact.sessions(args.session.namespace.name()).await?;
    let (id, tier) = (&args.session.id, Tier::from(args.tier));
    let began = Instant::now();
    let until = began + Duration::from_secs(u64::from(args.wait_s));
    let bar = Bar::new(out);
    let restored = loop {
        // A server ends a call by its own limit; what is not up by then is asked for again.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let call = contact.call.clone().within(left);
        let mut restoring = sessions.restore(id, &Restore { tier, lease: None }, &call).await?;
        while let Some(p) = restoring.progress().await? {
            bar.at("restore", p.positions, p.total_positions, p.bytes);
        }
        let restored = restoring.finish().await?;
        if !restored.late || Instant::now() + PAUSE >= until {
            break restored;
        }
        tokio::time::sleep(PAUSE).await;
    };
    drop(bar);
    let took = began.elapsed();
    let p = restored.progress;
    let fields = json!({
        "session_id": id,
        "tier": tier.word(),
        "positions": p.positions,
        "total_positions": p.total_positions,
        "bytes": p.bytes,
        "total_bytes": p.total_bytes,
        "usable_positions": restored.usable_positions,
        "compute_from_token": restored.compute_from_token,
        "tokens": restored.tokens,
        "revision_matches": restored.revision_matches,
        "late": restored.late,
        "whole": restored.is_whole(),
        "missing": restored.missing.iter().map(|run| json!({
            "first_position": run.first_position,
            "positions": run.count,
            "reason": run.reason.map(MissReason::word),
            "why": run.why,
        })).collect::<Vec<_>>(),
        "ms": took.as_millis() as u64,
    });
    out.answer("session_restore", fields, || text(&restored, tier, took))?;
    match verdict(&restored) {
        None => Ok(()),
        Some(why) => Err(Failure::failed(why).advise("`kvkeepctl session explain` says more")),
    }
}

fn text(r: &Restored, tier: Tier, took: Duration) -> String {
    let p = r.progress;
    let mut text = pairs([
        ("in", format!("{} {} of {} positions", tier.word(), p.positions, p.total_positions)),
        ("bytes", format!("{} of {}", units::bytes(p.bytes), units::bytes(p.total_bytes))),
        ("usable", format!("the first {} positions: compute from token {}", r.usable_positions, r.compute_from_token)),
        ("token ids", r.tokens.to_string()),
        ("took", units::millis(took.as_millis() as u64)),
    ]);
    if !r.missing.is_empty() {
        let rows = r.missing.iter().map(|run| {
            let reason = run.reason.map_or("-", MissReason::word).to_owned();
            vec![span(run.first_position, run.count), reason, run.why.clone()]
        });
        text.push('\n');
        text.push_str(&table(&["missing", "reason", "why"], rows, &[]));
    }
    text
}

/// What stands in the way of a whole session.
fn verdict(r: &Restored) -> Option<String> {
    let p = r.progress;
    let missing: u64 = r.missing.iter().map(|run| run.count).sum();
    if r.is_whole() {
        None
    } else if !r.revision_matches {
        Some("the session is of other weights: its blocks are of no use, its token ids are".to_owned())
    } else if missing > 0 {
        Some(format!("{missing} positions are missing: compute from token {}", r.compute_from_token))
    } else if r.late {
        let (up, all) = (p.positions, p.total_positions);
        Some(format!("{up} of {all} positions came up in time; see --wait-s"))
    } else {
        Some(format!("{} of {} positions came up", p.positions, p.total_positions))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvkeep_client::sessions::{MissingRun, Progress};

    #[test]
    fn the_verdict_names_what_stands_in_the_way() {
        let whole = Restored {
            progress: Progress { positions: 4, total_positions: 4, bytes: 40, total_bytes: 40 },
            usable_positions: 4,
            compute_from_token: 64,
            tokens: 64,
            missing: Vec::new(),
            revision_matches: true,
            late: false,
            lease: None,
        };
        assert_eq!(verdict(&whole), None);
        let run = MissingRun { first_position: 2, count: 2, reason: Some(MissReason::Evicted), why: "evicted".into() };
        let progress = Progress { positions: 2, ..whole.progress };
        let holed = Restored { missing: vec![run], compute_from_token: 32, progress, ..whole.clone() };
        assert_eq!(verdict(&holed).as_deref(), Some("2 positions are missing: compute from token 32"));
        assert!(text(&holed, Tier::Dram, Duration::ZERO).contains("2..3"));
        let late = Restored { late: true, progress, ..whole.clone() };
        assert!(verdict(&late).is_some_and(|v| v.starts_with("2 of 4 positions came up in time")));
        let stale = Restored { revision_matches: false, ..whole };
        assert!(verdict(&stale).is_some_and(|v| v.contains("other weights")));
    }
}
