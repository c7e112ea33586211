//! `sessions`: what long-term memory costs. `appends` (how many a second, alone and beside durable puts) and `restore` (a
//! session from NVMe into DRAM, beside fio on the same files). Each part has a node of its own.

mod appends;
mod restore;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use kvkeep_client::{Call, Client, ClientConfig, Lost, Namespace, PartOutcome, Put, PutPosition, Retention};
use kvkeep_core::{Class, Format, GroupId, ShardId};
use serde::Serialize;

use crate::block_bytes::{self, Seed};
use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::measure::load_average;
use crate::node::{DataDir, Node, Recipe};
use crate::replay::report::write_json;
use crate::units::ByteSize;

/// Tokens that one position covers.
const TOKENS_PER_POSITION: u64 = 16;
/// Bytes of one put.
const PUT_BYTES: u64 = 16 << 20;

/// Flags of `kvkeep-bench sessions`.
#[derive(Args, Debug)]
pub struct SessionsCommand {
    /// Only this part
    #[arg(long, value_enum)]
    only: Option<PartArg>,
    /// Appends: sessions, each with one append in flight
    #[arg(long, default_value_t = 256)]
    sessions: u32,
    /// Appends: of each session in one round
    #[arg(long, default_value_t = 20)]
    appends: u32,
    /// Appends: bytes of a position
    #[arg(long, default_value = "16KiB")]
    block_bytes: ByteSize,
    /// Appends: rounds of each kind; figures want at least 5
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Appends: clients that put 8 x 1 MiB durable at a time, where there are any beside them
    #[arg(long, default_value_t = 4)]
    writers: u32,
    /// Restore: into memory that the kernel clears as the blocks come, as in a node that has just been started with the default of
    /// `arena.ready_bytes`
    #[arg(long)]
    cold_memory: bool,
    /// Restore: positions of the session, 16 tokens each; the bar is for 2048 of 2 MiB
    #[arg(long, default_value_t = 256)]
    positions: u32,
    /// Restore: bytes of a position
    #[arg(long, default_value = "2MiB")]
    position_bytes: ByteSize,
    /// Restore: pairs, a restore and a run of fio in random order; figures want at least 5
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// What the orders are drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// Folder on the device to measure; the nodes' data in it is kept [default: new ones beside this program, removed]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PartArg {
    /// How many appends a second.
    Appends,
    /// A session from NVMe into DRAM.
    Restore,
}

/// The report: `kvkeep.bench.sessions` version 1.
#[derive(Serialize)]
struct SessionsReport {
    schema: &'static str,
    version: u32,
    seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    appends: Option<appends::AppendsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restore: Option<restore::RestoreReport>,
    load_average: f64,
}

/// Runs `kvkeep-bench sessions`; answers whether everything came back right.
pub async fn command(command: SessionsCommand) -> anyhow::Result<bool> {
    ensure!((1..=4096).contains(&command.sessions), "--sessions is 1 to 4096");
    ensure!((1..=10_000).contains(&command.appends), "--appends is 1 to 10000");
    ensure!((1..=1 << 16).contains(&command.positions), "--positions is 1 to 65536");
    ensure!(command.rounds >= 1 && command.pairs >= 1, "--rounds and --pairs are at least 1");
    ensure!((1..=256).contains(&command.writers), "--writers is 1 to 256");
    let wanted = |part| command.only.is_none_or(|only| only == part);
    let appends = match wanted(PartArg::Appends) {
        true => Some(appends::measure(&command).await.context("appends")?),
        false => None,
    };
    let restore = match wanted(PartArg::Restore) {
        true => Some(restore::measure(&command).await.context("restore")?),
        false => None,
    };
    let report = SessionsReport {
        schema: "kvkeep.bench.sessions",
        version: 1,
        seed: command.seed,
        appends,
        restore,
        load_average: load_average(),
    };
    let tables = report.appends.iter().map(|a| a.table()).chain(report.restore.iter().map(|r| r.table()));
    eprintln!("{}", tables.collect::<String>());
    write_json(&report, command.json.as_deref())?;
    Ok(report.restore.is_none_or(|restore| restore.is_right()))
}

/// A node for one part, and how to start it again.
struct Lab {
    data: DataDir,
    recipe: Recipe,
    /// None only while it is started anew.
    node: Option<Node>,
}

impl Lab {
    /// Starts a node with these sizes. What it does by itself in the background is off: nothing comes up from NVMe unasked.
    /// `ready`: bytes of memory that it keeps populated.
    async fn start(
        command: &SessionsCommand,
        part: &str,
        nvme: &str,
        arena: u64,
        ready: u64,
        room: u64,
    ) -> anyhow::Result<Self> {
        let named = command.data_dir.as_ref().map(|folder| folder.join(part));
        let data = DataDir::open(named.as_deref())?;
        let config = data.path().join("bench.toml");
        let text = format!(
            "[arena]\nscrub_bytes_per_s = 0\nready_bytes = {ready}\n\n[nvme]\nwarm_bytes_per_s = 0\nscrub_bytes_per_s = 0\n{nvme}"
        );
        std::fs::write(&config, text).with_context(|| format!("settings {}", config.display()))?;
        let config = config.display().to_string();
        let more = ["--config", &config, "--arena-bytes", &arena.to_string(), "--nvme-bytes", &room.to_string()];
        let recipe = Recipe::kvkeepd(command.kvkeepd.as_deref(), &data, &more.map(str::to_owned))?;
        let node = recipe.start("127.0.0.1:0").await?;
        Ok(Self { data, recipe, node: Some(node) })
    }

    /// Stops the node and starts it again at its address.
    async fn restart(&mut self) -> anyhow::Result<()> {
        let old = self.node.take().context("the node is gone")?;
        let listen = old.listen.clone();
        old.stop().await?;
        self.node = Some(self.recipe.start(&listen).await?);
        Ok(())
    }

    /// Stops the node.
    async fn stop(self) -> anyhow::Result<()> {
        self.node.context("the node is gone")?.stop().await
    }

    /// A client of its own.
    async fn open(&self, format: &Format, connections: usize) -> anyhow::Result<Namespace> {
        let config = ClientConfig {
            connections,
            lost: Lost::Errors,
            patience: Duration::from_secs(10),
            deadline: Duration::from_secs(60),
            ..ClientConfig::to(self.node.as_ref().context("the node is gone")?.endpoint())
        };
        Ok(Client::connect(config).await?.register_namespace("sessions", format, "generated").await?)
    }
}

fn format_of(bytes: u64) -> Format {
    any_size_format(bytes)
}

fn key(id: u64) -> Bytes {
    Bytes::copy_from_slice(PrefixId(id).key().as_bytes())
}

fn seed(id: u64) -> Seed {
    Seed::of(&PrefixId(id).key(), GroupId(0), ShardId(0))
}

fn position(id: u64, bytes: u64) -> PutPosition {
    PutPosition::of(key(id), block_bytes::block(seed(id), bytes as usize))
}

/// Puts the chain of these ids; each of them has to be taken.
async fn put_chain(namespace: &Namespace, ids: std::ops::Range<u64>, bytes: u64, class: Class) -> anyhow::Result<()> {
    let step = (PUT_BYTES / bytes).max(1);
    let mut first = ids.start;
    while first < ids.end {
        let end = ids.end.min(first + step);
        let put = Put {
            parent: (first > ids.start).then(|| key(first - 1)),
            first_position: (first - ids.start) as u32,
            positions: (first..end).map(|id| position(id, bytes)).collect(),
            class: Some(class),
            retention: Retention::Keep,
            ..Put::default()
        };
        let outcomes = namespace.put(&put, &Call::default()).await.context("put")?;
        ensure!(outcomes.iter().all(PartOutcome::is_kept), "a block was refused: {outcomes:?}");
        first = end;
    }
    Ok(())
}
