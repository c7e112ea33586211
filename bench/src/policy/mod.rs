//! `policy`: what eviction policies would keep of a trace, beside the best possible.
//!
//! [`replay`](mod@replay) sends the trace through the directory and the policy that a node runs; [`belady`] knows the
//! future; [`hints`] lets the requests say what clients could know of it. Token hit ratio = tokens of the longest resident
//! prefixes / input tokens, from a cold start. M = the mean over 1, 2, 5, 10 and 20 % of the trace's unique blocks of (a
//! policy's token hits / Belady's), as far as those capacities are asked for.

pub mod belady;
pub mod hints;
pub mod replay;

use std::collections::BTreeMap;
use std::fmt;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvkeep_core::{PolicyKind, RequestInfo};
use serde::Serialize;

use self::hints::Hints;
use self::replay::Prepared;
use crate::measure::load_average;
use crate::replay::report::write_json;
use crate::trace::{Source, reader};

/// The capacities that M is the mean over, % of unique blocks.
const SCORED: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
/// Between two looks of the progress bar, requests.
const STEP: u64 = 64;

/// Flags of `kvkeep-bench policy`.
#[derive(Args, Clone, Debug)]
pub struct PolicyCommand {
    /// Trace to replay: JSONL of Mooncake or Qwen-Bailian, plain or zstd
    #[arg(long)]
    pub trace: PathBuf,
    /// Policies, separated by commas: sage, lru, sage-cost (which is told what prefill costs), belady (which knows the future)
    #[arg(long, value_delimiter = ',', default_value = "sage,lru,belady")]
    pub policies: Vec<Contestant>,
    /// Capacities in % of the trace's unique blocks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,2,5,10,20,50")]
    pub capacities: Vec<f64>,
    /// Hints that requests carry, from the trace's own future: end; due:FACTOR (off by up to that factor, which the policy
    /// is not told); half (of the sessions); false-ends:N% (of the requests that are not the last say they are); unnamed
    /// (sessions are not named)
    #[arg(long, default_value = "none")]
    pub hints: String,
    /// Seed of the hints' noise
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests replayed, from the first on [default: all]
    #[arg(long)]
    pub limit: Option<usize>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// A policy that a node can run; `declared`: with a format that says what prefill costs.
    Policy {
        /// Which.
        kind: PolicyKind,
        /// Told the cost.
        declared: bool,
    },
    /// The best in hindsight.
    Belady,
}

impl FromStr for Contestant {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "belady" => Ok(Self::Belady),
            "sage-cost" => Ok(Self::Policy { kind: PolicyKind::Sage, declared: true }),
            _ => {
                let kind = word.parse().map_err(|e| format!("{e}, sage-cost and belady"))?;
                Ok(Self::Policy { kind, declared: false })
            }
        }
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy { kind, declared } => write!(f, "{kind}{}", if *declared { "-cost" } else { "" }),
            Self::Belady => f.write_str("belady"),
        }
    }
}

/// One policy at one capacity.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// By name.
    pub policy: String,
    /// % of the trace's unique blocks.
    pub capacity_pct: f64,
    /// The same in blocks.
    pub capacity_blocks: usize,
    /// % of the input tokens.
    pub token_hit: f64,
    /// % of Belady's token hits.
    pub share_of_belady: f64,
    /// % of the prefill time of all requests that the hits save, where a token costs twice as much behind 32,768 others
    /// (not known of Belady).
    pub prefill_saved: Option<f64>,
    /// What the replay took, seconds.
    pub seconds: f64,
}

/// The report: `kvkeep.bench.policy` version 1.
#[derive(Debug, Serialize)]
pub struct PolicyReport {
    schema: &'static str,
    version: u32,
    trace: Source,
    hints: String,
    seed: u64,
    requests: usize,
    unique_blocks: usize,
    block_references: usize,
    /// M in %, by policy.
    pub score: BTreeMap<String, f64>,
    /// In the order of policies, then of capacities.
    pub rows: Vec<Row>,
    load_average: f64,
}

/// Runs `kvkeep-bench policy`.
pub async fn command(command: PolicyCommand) -> anyhow::Result<bool> {
    let json = command.json.clone();
    let report = tokio::task::spawn_blocking(move || measure(&command)).await??;
    eprintln!(
        "{}: {} requests, {} unique blocks, {} references, hints {}",
        report.trace.name, report.requests, report.unique_blocks, report.block_references, report.hints
    );
    for row in &report.rows {
        eprintln!(
            "{:>9} {:>5} %  token hit {:>5.1} %  {:>5.1} % of belady  prefill saved {}  {:.1} s",
            row.policy,
            row.capacity_pct,
            row.token_hit,
            row.share_of_belady,
            row.prefill_saved.map_or_else(|| "    ? %".to_owned(), |saved| format!("{saved:>5.1} %")),
            row.seconds
        );
    }
    for (policy, m) in &report.score {
        eprintln!("{policy:>9} M {m:.2}");
    }
    write_json(&report, json.as_deref())?;
    Ok(true)
}

/// The measurement itself.
///
/// # Errors
/// The trace cannot be read, a flag makes no sense, or a replay failed.
pub fn measure(command: &PolicyCommand) -> anyhow::Result<PolicyReport> {
    let hints: Hints = command.hints.parse().map_err(anyhow::Error::msg)?;
    for capacity in &command.capacities {
        ensure!((0.0..=100.0).contains(capacity) && *capacity > 0.0, "a capacity is above 0 and at most 100 %");
    }
    let (source, mut trace) = prepare(&command.trace, command.limit)?;
    if hints != Hints::default() {
        hints::give(&mut trace, hints, command.seed);
    }
    let blocks = |percent| trace.blocks(percent);
    let progress = Progress::new(&command.policies, &command.capacities, trace.turns.len());
    // Everybody is measured by Belady, asked for or not.
    let best: Vec<(u64, Duration)> = command
        .capacities
        .iter()
        .map(|percent| {
            let begun = Instant::now();
            let hits = belady::replay(&trace, blocks(*percent), &mut progress.next("belady", *percent));
            (hits, begun.elapsed())
        })
        .collect();
    let prefill_us = replay::prefill_us(&trace);
    let mut rows = Vec::new();
    let mut score = BTreeMap::new();
    for contestant in &command.policies {
        let mut scored = Vec::new();
        for (percent, (best, best_took)) in command.capacities.iter().zip(&best) {
            let begun = Instant::now();
            let (hits, saved_us, took) = match contestant {
                Contestant::Belady => (*best, None, *best_took),
                Contestant::Policy { kind, declared } => {
                    let tick = &mut progress.next(&contestant.to_string(), *percent);
                    let hits = replay::replay(&trace, *kind, *declared, blocks(*percent), tick);
                    let hits = hits.map_err(anyhow::Error::msg)?;
                    (hits.tokens, Some(hits.saved_us), begun.elapsed())
                }
            };
            let share = if *best == 0 { 100.0 } else { hits as f64 / *best as f64 * 100.0 };
            if SCORED.contains(percent) {
                scored.push(share);
            }
            rows.push(Row {
                policy: contestant.to_string(),
                capacity_pct: *percent,
                capacity_blocks: blocks(*percent),
                token_hit: hits as f64 / trace.input_tokens.max(1) as f64 * 100.0,
                share_of_belady: share,
                prefill_saved: saved_us.map(|us| us as f64 / prefill_us.max(1) as f64 * 100.0),
                seconds: took.as_secs_f64(),
            });
        }
        if !scored.is_empty() {
            score.insert(contestant.to_string(), scored.iter().sum::<f64>() / scored.len() as f64);
        }
    }
    progress.end();
    Ok(PolicyReport {
        schema: "kvkeep.bench.policy",
        version: 1,
        trace: source,
        hints: command.hints.clone(),
        seed: command.seed,
        requests: trace.turns.len(),
        unique_blocks: trace.unique,
        block_references: trace.turns.iter().map(|t| t.blocks.len()).sum(),
        score,
        rows,
        load_average: load_average(),
    })
}

/// Reads a trace into memory: its first `limit` requests.
pub(crate) fn prepare(trace: &Path, limit: Option<usize>) -> anyhow::Result<(Source, Prepared)> {
    let workload = reader::open(trace)?;
    let requests = workload.requests.take(limit.unwrap_or(usize::MAX));
    let requests = requests.collect::<anyhow::Result<Vec<_>>>().context("the trace is read into memory")?;
    let said = requests.into_iter().map(|r| {
        let info = RequestInfo {
            kind: r.kind,
            input_tokens: r.input_tokens,
            output_tokens: r.output_tokens,
            ..RequestInfo::default()
        };
        (r.at_ms, r.session.0, info, r.blocks.into_iter().map(|b| b.0).collect())
    });
    let trace = Prepared::new(workload.source.tokens_per_block, said);
    Ok((workload.source, trace))
}

/// A bar where somebody looks, a line per replay where nobody does.
struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    fn new(policies: &[Contestant], capacities: &[f64], requests: usize) -> Self {
        let replays = 1 + policies.iter().filter(|p| **p != Contestant::Belady).count();
        let bar = std::io::stderr().is_terminal().then(|| {
            let total = (replays * capacities.len() * requests) as u64;
            let style = ProgressStyle::with_template("{bar:30} {percent} %  {elapsed}  {msg}");
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
                .with_style(style.expect("the template is well-formed"))
        });
        Self { bar }
    }

    /// What a replay calls after each request.
    fn next(&self, policy: &str, percent: f64) -> impl FnMut() + use<> {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{policy} at {percent} %")),
            None => eprintln!("policy: {policy} at {percent} %"),
        }
        let bar = self.bar.clone();
        let mut requests = 0;
        move || {
            requests += 1;
            if let Some(bar) = bar.as_ref().filter(|_| requests % STEP == 0) {
                bar.inc(STEP);
            }
        }
    }

    fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
