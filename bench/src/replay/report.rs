//! What a replay says: a table for people, JSON for scripts. The JSON's names are stable: others script against them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use super::Outcome;
use super::engine::Checked;
use super::plan::Plan;
use super::sessions::check::SessionCheck;
use super::tally::TIERS;
use crate::measure::{LatencySummary, gb_per_s, share};
use crate::trace::Source;

/// Share of a tier.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TierReport {
    /// Hit tokens whose slowest part came from here / all input tokens.
    pub token_share: f64,
    /// Hit tokens.
    pub tokens: u64,
}

/// Latencies of the three calls of a request, microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CallLatencies {
    /// One match of a whole chain.
    #[serde(rename = "match")]
    pub matching: LatencySummary,
    /// One get of up to `get_batch_bytes`.
    pub get: LatencySummary,
    /// One put of up to `put_batch_bytes`: reserve, write, commit, acknowledgement.
    pub put: LatencySummary,
}

/// Promises of class `durable`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DurableReport {
    /// Different blocks acknowledged.
    pub blocks_acknowledged: u64,
    /// What asking for each of them at the end gave.
    #[serde(flatten)]
    pub checked: Checked,
}

/// Conversations that were kept as durable sessions.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SessionsReport {
    /// Acknowledged appends.
    pub appends: u64,
    /// Turns that were not appended because they did not go on from what was acknowledged.
    pub turns_diverged: u64,
    /// What restoring each of them at the end gave.
    #[serde(flatten)]
    pub check: SessionCheck,
}

/// The report of a replay: `kvkeep.bench.replay` version 1.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayReport {
    schema: &'static str,
    version: u32,
    workload: Source,
    settings: Settings,
    /// Requests served.
    pub requests: u64,
    /// Tokens of their inputs.
    pub input_tokens: u64,
    /// Tokens whose blocks came back and were right.
    pub hit_tokens: u64,
    /// `hit_tokens / input_tokens`.
    pub token_hit_ratio: f64,
    tiers: BTreeMap<&'static str, TierReport>,
    /// Bytes compared, the final check included.
    pub bytes_verified: u64,
    /// Of these, different from what was put.
    pub bytes_wrong: u64,
    parts_wrong: u64,
    bytes_read: u64,
    bytes_written: u64,
    parts_stored: u64,
    parts_present: u64,
    parts_in_progress: u64,
    parts_lost: BTreeMap<String, u64>,
    acknowledged_degraded: u64,
    /// What was promised and what became of it.
    pub durable: DurableReport,
    /// Absent where no session was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<SessionsReport>,
    seconds: f64,
    gb_per_s: f64,
    read_gb_per_s: f64,
    write_gb_per_s: f64,
    client_cpu_s_per_gb: f64,
    latency_us: CallLatencies,
    errors: BTreeMap<String, u64>,
    load_average: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Settings {
    block_bytes: u64,
    groups: u16,
    shards: u16,
    engines: u32,
    class: String,
    durable_share: f64,
    session_share: f64,
    retention: String,
    policy_clock: String,
    pace: String,
    get_batch_bytes: u64,
    put_batch_bytes: u64,
    namespace: String,
}

impl ReplayReport {
    /// Of a finished replay.
    pub fn new(plan: &Plan, outcome: &Outcome) -> Self {
        let t = &outcome.tally;
        let args = &plan.args;
        let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let moved = t.bytes_read + t.bytes_written;
        // CPU time is counted to the end of the final check.
        let compared = t.bytes_verified + t.bytes_written;
        let tiers = TIERS
            .iter()
            .zip(t.tier_tokens)
            .map(|(tier, tokens)| (tier.word(), TierReport { token_share: share(tokens, t.input_tokens), tokens }));
        Self {
            schema: "kvkeep.bench.replay",
            version: 1,
            workload: outcome.source.clone(),
            settings: Settings {
                block_bytes: args.block_bytes.0,
                groups: args.groups,
                shards: args.shards,
                engines: args.engines,
                class: word(&args.class),
                durable_share: args.durable_share,
                session_share: args.session_share,
                retention: word(&args.retention),
                policy_clock: word(&args.policy_clock),
                pace: word(&args.pace),
                get_batch_bytes: args.get_batch_bytes.0,
                put_batch_bytes: args.put_batch_bytes.0,
                namespace: plan.namespace.clone(),
            },
            requests: t.requests,
            input_tokens: t.input_tokens,
            hit_tokens: t.hit_tokens,
            token_hit_ratio: share(t.hit_tokens, t.input_tokens),
            tiers: tiers.collect(),
            bytes_verified: t.bytes_verified,
            bytes_wrong: t.bytes_wrong,
            parts_wrong: t.parts_wrong,
            bytes_read: t.bytes_read,
            bytes_written: t.bytes_written,
            parts_stored: t.parts_stored,
            parts_present: t.parts_present,
            parts_in_progress: t.parts_in_progress,
            parts_lost: t.parts_lost.clone(),
            acknowledged_degraded: t.acknowledged_degraded,
            durable: DurableReport {
                blocks_acknowledged: outcome.acknowledged,
                checked: outcome.checked.unwrap_or_default(),
            },
            sessions: outcome.sessions.map(|check| SessionsReport {
                appends: outcome.appends.0,
                turns_diverged: outcome.appends.1,
                check,
            }),
            seconds: outcome.took.as_secs_f64(),
            gb_per_s: gb_per_s(moved, outcome.took),
            read_gb_per_s: gb_per_s(t.bytes_read, outcome.took),
            write_gb_per_s: gb_per_s(t.bytes_written, outcome.took),
            client_cpu_s_per_gb: if compared == 0 { 0.0 } else { outcome.cpu_seconds / (compared as f64 / 1e9) },
            latency_us: CallLatencies {
                matching: t.match_latency.summary(),
                get: t.get_latency.summary(),
                put: t.put_latency.summary(),
            },
            errors: t.errors.clone(),
            load_average: crate::measure::load_average(),
        }
    }

    /// Whether every byte was right and every promise was kept.
    pub fn is_right(&self) -> bool {
        self.bytes_wrong == 0
            && self.durable.checked.blocks_lost == 0
            && self.sessions.is_none_or(|sessions| sessions.check.is_right())
    }

    /// Payload bytes acknowledged as stored.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "  {name:<34} {value}");
        };
        row("workload", format!("{} ({})", self.workload.name, self.workload.format));
        row("requests, input tokens", format!("{}, {:.1} M", self.requests, self.input_tokens as f64 / 1e6));
        row("token hit ratio", format!("{:.1} %", self.token_hit_ratio * 100.0));
        for (tier, t) in &self.tiers {
            row(&format!("  from {tier}"), format!("{:.1} % of input tokens", t.token_share * 100.0));
        }
        row(
            "read, written",
            format!("{:.2} GB, {:.2} GB", self.bytes_read as f64 / 1e9, self.bytes_written as f64 / 1e9),
        );
        row(
            "GB/s (read, written)",
            format!(
                "{:.2} ({:.2}, {:.2}) over {:.1} s",
                self.gb_per_s, self.read_gb_per_s, self.write_gb_per_s, self.seconds
            ),
        );
        for (name, l) in [
            ("match p50, p99", &self.latency_us.matching),
            ("get p50, p99", &self.latency_us.get),
            ("put p50, p99", &self.latency_us.put),
        ] {
            row(name, format!("{:.2} ms, {:.2} ms ({} calls)", l.p50 as f64 / 1e3, l.p99 as f64 / 1e3, l.count));
        }
        row("bytes verified", format!("{}", self.bytes_verified));
        row("bytes wrong", format!("{}", self.bytes_wrong));
        row("blocks acknowledged durable", format!("{}", self.durable.blocks_acknowledged));
        row("blocks acknowledged durable, lost", format!("{}", self.durable.checked.blocks_lost));
        if let Some(SessionsReport { appends, check, .. }) = &self.sessions {
            row("sessions durable, restored whole", format!("{}, {}", check.sessions, check.whole));
            row("  appends, positions, token ids", format!("{appends}, {}, {}", check.positions, check.tokens));
            row("  bytes compared, wrong", format!("{}, {}", check.bytes_compared, check.bytes_wrong));
            row("  token ids equal", format!("in {} sessions", check.token_ids_equal));
            row(
                "  restored",
                format!(
                    "{:.2} GB at {:.2} GB/s, {} of the positions from NVMe",
                    check.restored_bytes as f64 / 1e9,
                    check.restore_gb_per_s,
                    check.positions_from_nvme
                ),
            );
        }
        if !self.parts_lost.is_empty() {
            row("matched, then not read", format!("{:?}", self.parts_lost));
        }
        if !self.errors.is_empty() {
            row("failed calls, tried again", format!("{:?}", self.errors));
        }
        out
    }
}

/// Writes a report as JSON: to a file, or to standard output for `-`.
pub fn write_json(report: &impl Serialize, path: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    if path == Path::new("-") {
        std::io::stdout().lock().write_all(text.as_bytes())?;
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| format!("report {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::tally::Tally;
    use crate::trace::synthetic::{Shape, workload};
    use clap::Parser;
    use kvkeep_core::Tier;
    use std::time::Duration;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        replay: crate::replay::plan::ReplayArgs,
    }

    /// Others script against these names.
    #[test]
    fn the_names_in_the_json_stay() {
        let plan = Flags::parse_from(["bench"]).replay.plan(512).unwrap();
        let mut tally = Tally { input_tokens: 100, ..Tally::default() };
        tally.hit(25, Some(Tier::Nvme));
        let shape = Shape { sessions: 1, turns_mean: 1.0, tokens_per_block: 512, seed: 1 };
        let outcome = Outcome {
            tally,
            took: Duration::from_secs(1),
            source: workload(shape).source,
            acknowledged: 3,
            checked: None,
            appends: (9, 0),
            sessions: Some(SessionCheck { sessions: 3, whole: 3, ..SessionCheck::default() }),
            cpu_seconds: 0.5,
        };
        let report = ReplayReport::new(&plan, &outcome);
        assert!(report.is_right());
        assert!(report.table().contains("25.0 %"));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], "kvkeep.bench.replay");
        assert_eq!(json["version"], 1);
        assert_eq!(json["token_hit_ratio"], 0.25);
        assert_eq!(json["tiers"]["nvme"]["token_share"], 0.25);
        for pointer in [
            "/bytes_verified",
            "/bytes_wrong",
            "/tiers/dram/token_share",
            "/tiers/remote/token_share",
            "/latency_us/match/p50",
            "/latency_us/match/p99",
            "/latency_us/get/p50",
            "/latency_us/get/p99",
            "/latency_us/put/p50",
            "/latency_us/put/p99",
            "/durable/blocks_acknowledged",
            "/durable/blocks_lost",
            "/sessions/sessions",
            "/sessions/whole",
            "/sessions/bytes_compared",
            "/sessions/bytes_wrong",
            "/sessions/token_ids_equal",
            "/sessions/restore_gb_per_s",
        ] {
            assert!(json.pointer(pointer).is_some_and(serde_json::Value::is_number), "{pointer}");
        }
        let lost =
            Outcome { sessions: Some(SessionCheck { sessions: 3, whole: 2, ..SessionCheck::default() }), ..outcome };
        assert!(!ReplayReport::new(&plan, &lost).is_right(), "one session that is not whole is wrong");
    }
}
