//! `tiers`: how much of a trace DRAM and NVMe of one node serve, simulated and through a running node.
//!
//! [`mod@simulate`] sends the trace through directory and policy with two inclusive tiers; [`sizes`] makes a node's tiers
//! hold the same numbers of blocks; [`live`] sends the trace through that node. Shares are of the input tokens, from a cold
//! start; the policy's clock is the trace's.

pub mod live;
pub mod simulate;
pub mod sizes;

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use kvkeep_client::{Client, ClientConfig, Lost};
use kvkeep_core::{PolicyKind, Tier};
use serde::Serialize;

use self::live::Live;
use self::simulate::Blocks;
use self::sizes::Sizes;
use crate::measure::{load_average, share};
use crate::node::{DataDir, Recipe};
use crate::policy::hints::{self, Hints};
use crate::policy::prepare;
use crate::policy::replay::Prepared;
use crate::replay::report::write_json;
use crate::trace::Source;
use crate::units::ByteSize;

/// Flags of `kvkeep-bench tiers`.
#[derive(Args, Clone, Debug)]
pub struct TiersCommand {
    /// Trace to replay: JSONL of Mooncake or Qwen-Bailian, plain or zstd
    #[arg(long)]
    pub trace: PathBuf,
    /// Blocks that DRAM holds, in % of the trace's unique blocks
    #[arg(long)]
    pub dram_pct: f64,
    /// Blocks that NVMe holds, in % of the trace's unique blocks
    #[arg(long)]
    pub nvme_pct: f64,
    /// Policies, separated by commas; each is replayed through a node of its own
    #[arg(long, value_delimiter = ',', default_value = "sage,lru")]
    pub policies: Vec<PolicyKind>,
    /// Bytes of one block
    #[arg(long, default_value = "16KiB")]
    pub block_bytes: ByteSize,
    /// Hints that requests carry, as of `policy`
    #[arg(long, default_value = "none")]
    pub hints: String,
    /// Seed of the hints' noise
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests replayed, from the first on [default: all]
    #[arg(long)]
    pub limit: Option<usize>,
    /// No node: the simulation alone
    #[arg(long)]
    pub simulate_only: bool,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    pub kvkeepd: Option<PathBuf>,
    /// Folder for the nodes' data, kept [default: a new one, removed at the end]
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// Tokens found, by the tier that each block was served from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// From DRAM.
    pub dram_tokens: u64,
    /// From NVMe.
    pub nvme_tokens: u64,
}

impl Found {
    /// Adds tokens of one block.
    pub fn add(&mut self, tokens: u64, tier: Tier) {
        match tier {
            Tier::Dram => self.dram_tokens += tokens,
            _ => self.nvme_tokens += tokens,
        }
    }

    /// All of them.
    pub fn tokens(&self) -> u64 {
        self.dram_tokens + self.nvme_tokens
    }
}

/// Shares of the input tokens, %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Shares {
    /// Found in either tier.
    pub total: f64,
    /// Found in DRAM.
    pub dram: f64,
    /// Found on NVMe.
    pub nvme: f64,
}

impl Shares {
    fn of(found: Found, input_tokens: u64) -> Self {
        let percent = |tokens| share(tokens, input_tokens) * 100.0;
        Self { total: percent(found.tokens()), dram: percent(found.dram_tokens), nvme: percent(found.nvme_tokens) }
    }

    fn minus(self, other: Self) -> Self {
        Self { total: self.total - other.total, dram: self.dram - other.dram, nvme: self.nvme - other.nvme }
    }
}

/// One policy.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// By name.
    pub policy: String,
    /// Without a node.
    pub simulated: Shares,
    /// Through a node; absent where only the simulation was asked for.
    pub live: Option<Shares>,
    /// Live less simulated, points.
    pub difference: Option<Shares>,
    /// The node and its clients.
    pub run: Option<Live>,
}

/// SAGE's shares over LRU's, where both were replayed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Over {
    /// DRAM's share.
    pub dram: f64,
    /// Of everything found, points more.
    pub total_points: f64,
}

/// The report: `kvkeep.bench.tiers` version 1.
#[derive(Debug, Serialize)]
pub struct TiersReport {
    schema: &'static str,
    version: u32,
    trace: Source,
    hints: String,
    requests: usize,
    unique_blocks: usize,
    largest_request_blocks: usize,
    dram_pct: f64,
    nvme_pct: f64,
    /// Blocks that each tier is to hold.
    pub dram_blocks: usize,
    /// The same of NVMe.
    pub nvme_blocks: usize,
    block_bytes: u64,
    sizes: Option<Sizes>,
    /// In the order of policies.
    pub rows: Vec<Row>,
    /// SAGE over LRU, simulated.
    pub simulated_over_lru: Option<Over>,
    /// SAGE over LRU, live.
    pub live_over_lru: Option<Over>,
    load_average: f64,
}

/// Runs `kvkeep-bench tiers`; answers whether every byte was right.
pub async fn command(command: TiersCommand) -> anyhow::Result<bool> {
    let report = measure(&command).await?;
    eprintln!("{}", report.table());
    write_json(&report, command.json.as_deref())?;
    Ok(report.rows.iter().all(|r| r.run.as_ref().is_none_or(|run| run.bytes_wrong == 0)))
}

/// The measurement itself.
///
/// # Errors
/// The trace cannot be read, a flag makes no sense, or a node failed.
pub async fn measure(command: &TiersCommand) -> anyhow::Result<TiersReport> {
    let hints: Hints = command.hints.parse().map_err(anyhow::Error::msg)?;
    for percent in [command.dram_pct, command.nvme_pct] {
        ensure!((0.0..=100.0).contains(&percent) && percent > 0.0, "a tier has above 0 and at most 100 %");
    }
    let (source, mut trace) = prepare(&command.trace, command.limit)?;
    if hints != Hints::default() {
        hints::give(&mut trace, hints, command.seed);
    }
    let trace = std::sync::Arc::new(trace);
    let room = Blocks { dram: trace.blocks(command.dram_pct), nvme: trace.blocks(command.nvme_pct) };
    let request = trace.turns.iter().map(|t| t.blocks.len()).max().unwrap_or(0);
    let sizes = match command.simulate_only {
        true => None,
        false => Some(Sizes::of(room, command.block_bytes.0, request)?),
    };
    let mut rows = Vec::new();
    for kind in &command.policies {
        eprintln!("tiers: {}: simulated", kind.word());
        let (trace_, kind_) = (std::sync::Arc::clone(&trace), *kind);
        let simulated = tokio::task::spawn_blocking(move || simulate::simulate(&trace_, kind_, room, &mut || {}));
        let simulated = Shares::of(simulated.await?.map_err(anyhow::Error::msg)?, trace.input_tokens);
        let run = match &sizes {
            Some(sizes) => Some(run_node(command, &trace, *kind, sizes).await?),
            None => None,
        };
        let live = run.as_ref().map(|run| Shares::of(run.found, trace.input_tokens));
        let difference = live.map(|live| live.minus(simulated));
        rows.push(Row { policy: kind.word().to_owned(), simulated, live, difference, run });
    }
    Ok(TiersReport {
        schema: "kvkeep.bench.tiers",
        version: 1,
        trace: source,
        hints: command.hints.clone(),
        requests: trace.turns.len(),
        unique_blocks: trace.unique,
        largest_request_blocks: request,
        dram_pct: command.dram_pct,
        nvme_pct: command.nvme_pct,
        dram_blocks: room.dram,
        nvme_blocks: room.nvme,
        block_bytes: command.block_bytes.0,
        sizes,
        simulated_over_lru: over_lru(&rows, |row| Some(row.simulated)),
        live_over_lru: over_lru(&rows, |row| row.live),
        rows,
        load_average: load_average(),
    })
}

fn over_lru(rows: &[Row], shares: impl Fn(&Row) -> Option<Shares>) -> Option<Over> {
    let of = |kind: PolicyKind| rows.iter().find(|row| row.policy == kind.word()).and_then(&shares);
    let (sage, lru) = (of(PolicyKind::Sage)?, of(PolicyKind::Lru)?);
    Some(Over { dram: sage.dram / lru.dram, total_points: sage.total - lru.total })
}

/// Starts a node of these sizes, replays the trace through it and stops it.
async fn run_node(command: &TiersCommand, trace: &Prepared, kind: PolicyKind, sizes: &Sizes) -> anyhow::Result<Live> {
    let folder = command.data_dir.as_ref().map(|folder| folder.join(kind.word()));
    let data = DataDir::open(folder.as_deref())?;
    let config = data.path().join("node.toml");
    std::fs::write(&config, sizes.toml()).with_context(|| format!("configuration {}", config.display()))?;
    let config = config.display().to_string();
    let flags = ["--config", &config, "--policy", kind.word(), "--policy-clock", "request"].map(str::to_owned);
    let node = Recipe::kvkeepd(command.kvkeepd.as_deref(), &data, &flags)?.start("127.0.0.1:0").await?;
    let client = Client::connect(ClientConfig { lost: Lost::Errors, ..ClientConfig::to(node.endpoint()) }).await?;
    let live = live::replay(trace, &client, sizes, command.block_bytes.0, kind.word()).await?;
    drop(client);
    node.stop().await?;
    Ok(live)
}

impl TiersReport {
    fn table(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{}: {} requests, {} unique blocks; DRAM {} % = {} blocks, NVMe {} % = {}, hints {}",
            self.trace.name,
            self.requests,
            self.unique_blocks,
            self.dram_pct,
            self.dram_blocks,
            self.nvme_pct,
            self.nvme_blocks,
            self.hints
        );
        let mut line = |name: &str, what: &str, s: &Shares| {
            let _ = writeln!(
                out,
                "{name:>6} {what:<10} total {:>6.2}  dram {:>6.2}  nvme {:>6.2}",
                s.total, s.dram, s.nvme
            );
        };
        for row in &self.rows {
            line(&row.policy, "simulated", &row.simulated);
            if let (Some(live), Some(difference)) = (&row.live, &row.difference) {
                line(&row.policy, "live", live);
                line(&row.policy, "difference", difference);
            }
        }
        for (what, over) in [("simulated", &self.simulated_over_lru), ("live", &self.live_over_lru)] {
            if let Some(over) = over {
                let _ = writeln!(
                    out,
                    "{what}: sage's DRAM share {:.2} times lru's, total {:+.2} points",
                    over.dram, over.total_points
                );
            }
        }
        for row in &self.rows {
            let Some(run) = &row.run else { continue };
            let r = &run.resident;
            let _ = writeln!(
                out,
                "{:>6} {:.0} s; resident DRAM {:.0} (at most {}), NVMe {:.0} (at most {}); {} bytes verified, {} wrong; \
                 lost {:?}, present {}, puts waited {}, unsettled {}, not written {}",
                row.policy,
                run.seconds,
                r.dram_mean,
                r.dram_max,
                r.nvme_mean,
                r.nvme_max,
                run.bytes_verified,
                run.bytes_wrong,
                run.parts_lost,
                run.parts_present,
                run.puts_waited,
                run.unsettled,
                run.node.not_written
            );
        }
        out
    }
}
