//! `session explain`: runs of positions that fare alike.

use kvkeep_client::sessions::ManifestPosition;
use kvkeep_core::{Class, MissReason, PartStatus, Tier};
use serde_json::json;

use crate::contact::Contact;
use crate::failure::Outcome;
use crate::output::{Output, table};
use crate::sessions::args::SessionArg;
use crate::units;

/// Most runs that are shown; the rest is counted.
const RUNS_MAX: usize = 1000;

/// Positions in a row of which the same is said.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    count: u64,
    bytes: u64,
    status: PartStatus,
    tier: Option<Tier>,
    reason: Option<MissReason>,
    class: Class,
    /// Of the first.
    why: String,
}

/// A manifest as runs.
#[derive(Debug, Default)]
struct Runs {
    runs: Vec<Run>,
    positions: u64,
    /// Positions behind the last run that is kept.
    left_out: u64,
}

impl Runs {
    fn add(&mut self, p: ManifestPosition) {
        let at = self.positions;
        self.positions += 1;
        if self.left_out > 0 {
            self.left_out += 1;
            return;
        }
        if let Some(run) = self.runs.last_mut()
            && (run.status, run.tier, run.reason, run.class) == (p.status, p.tier, p.reason, p.class)
        {
            run.count += 1;
            run.bytes += p.bytes;
        } else if self.runs.len() == RUNS_MAX {
            self.left_out = 1;
        } else {
            self.runs.push(Run {
                first: at,
                count: 1,
                bytes: p.bytes,
                status: p.status,
                tier: p.tier,
                reason: p.reason,
                class: p.class,
                why: p.why,
            });
        }
    }
}

/// `session explain`
pub async fn run(contact: &Contact, session: &SessionArg, out: &Output) -> Outcome {
    let (_, sessions) = contact.sessions(session.namespace.name()).await?;
    let mut all = Runs::default();
    let mut walk = sessions.walk_manifest(&session.id, 0, &contact.call);
    while let Some(page) = walk.next_page().await? {
        page.into_iter().for_each(|position| all.add(position));
    }
    let fields = json!({
        "session_id": session.id,
        "positions": all.positions,
        "left_out_positions": all.left_out,
        "runs": all.runs.iter().map(|r| json!({
            "first_position": r.first,
            "positions": r.count,
            "bytes": r.bytes,
            "status": r.status.word(),
            "tier": r.tier.map(Tier::word),
            "reason": r.reason.map(MissReason::word),
            "class": r.class.word(),
            "why": r.why,
        })).collect::<Vec<_>>(),
    });
    out.answer("session_explain", fields, || {
        if all.positions == 0 {
            return "the session has no positions".to_owned();
        }
        let rows = all.runs.iter().map(|r| {
            vec![
                span(r.first, r.count),
                units::bytes(r.bytes),
                r.class.word().to_owned(),
                r.status.word().to_owned(),
                r.tier.map_or("-", Tier::word).to_owned(),
                r.reason.map_or("-", MissReason::word).to_owned(),
                r.why.clone(),
            ]
        });
        let mut text = table(&["positions", "bytes", "class", "status", "tier", "reason", "why"], rows, &[1]);
        if all.left_out > 0 {
            text.push_str(&format!("and {} positions in more runs than are shown\n", all.left_out));
        }
        text
    })?;
    Ok(())
}

/// `7`, or `7..9` with both ends.
pub fn span(first: u64, count: u64) -> String {
    match count {
        0 | 1 => first.to_string(),
        n => format!("{first}..{}", first + n - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvkeep_core::Digest;

    fn position(status: PartStatus, tier: Option<Tier>) -> ManifestPosition {
        ManifestPosition {
            digest: Digest::from_slice(&[0; 16]).unwrap(),
            key: None,
            status,
            tier,
            reason: (status == PartStatus::Miss).then_some(MissReason::Evicted),
            class: Class::Cache,
            bytes: 10,
            why: String::new(),
        }
    }

    #[test]
    fn positions_that_fare_alike_are_one_run() {
        let mut runs = Runs::default();
        for (status, tier, n) in [
            (PartStatus::Hit, Some(Tier::Dram), 3),
            (PartStatus::Miss, None, 1),
            (PartStatus::Hit, Some(Tier::Dram), 2),
        ] {
            (0..n).for_each(|_| runs.add(position(status, tier)));
        }
        let spans: Vec<_> = runs.runs.iter().map(|r| (span(r.first, r.count), r.bytes)).collect();
        assert_eq!(spans, [("0..2".to_owned(), 30), ("3".to_owned(), 10), ("4..5".to_owned(), 20)]);
    }

    #[test]
    fn runs_are_bounded_and_what_is_left_out_is_counted() {
        let mut runs = Runs::default();
        for i in 0..RUNS_MAX + 5 {
            runs.add(position(if i % 2 == 0 { PartStatus::Hit } else { PartStatus::Miss }, None));
        }
        assert_eq!((runs.runs.len(), runs.left_out, runs.positions), (RUNS_MAX, 5, RUNS_MAX as u64 + 5));
    }
}
