//! `background`: what gets of blocks in DRAM feel of the node's work behind the calls.
//!
//! One client gets single parts that DRAM has, one after the other, while beside it nothing happens (idle), both tiers are
//! scrubbed as fast as the node can (scrub), another client puts at a set rate (write-behind), or both. Puts are calls of
//! their own and take their share of the processors: the same puts to a node without NVMe (puts) tell what of it is theirs.
//! Every round measures all, in an order that turns; the figures are medians over rounds.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::Args;
use kvkeep_client::{
    Call, Client, ClientConfig, GetItem, Lost, MatchQuery, Namespace, PartOutcome, Put, PutPart, PutPosition, Retention,
};
use kvkeep_core::{GroupId, Key, RequestId, ShardId, Tier};
use serde::Serialize;

use crate::block_bytes::{self, Seed};
use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::measure::{Latencies, load_average, median};
use crate::node::{DataDir, Node, Recipe};
use crate::replay::report::write_json;
use crate::units::ByteSize;

/// Parts that the foreground gets.
const PARTS: u64 = 64;
/// Positions of one background put.
const PUT_POSITIONS: u64 = 8;
/// Where the ids of background blocks begin.
const BACKGROUND_IDS: u64 = 1 << 32;
/// Longest wait for a scrub.
const SCRUB_WAIT: Duration = Duration::from_secs(60);
/// What runs beside the gets.
struct Kind {
    name: &'static str,
    scrubs: bool,
    puts: bool,
    /// Whether what is put is written behind.
    nvme: bool,
}

const KINDS: [Kind; 5] = [
    Kind { name: "idle", scrubs: false, puts: false, nvme: true },
    Kind { name: "scrub", scrubs: true, puts: false, nvme: true },
    Kind { name: "puts", scrubs: false, puts: true, nvme: false },
    Kind { name: "write-behind", scrubs: false, puts: true, nvme: true },
    Kind { name: "both", scrubs: true, puts: true, nvme: true },
];

/// Flags of `kvkeep-bench background`.
#[derive(Args, Debug)]
pub struct BackgroundCommand {
    /// Bytes of one part
    #[arg(long, default_value = "1MiB")]
    block_bytes: ByteSize,
    /// Rounds; at least 5
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Bytes per second that the other client puts
    #[arg(long, default_value = "384MiB")]
    put_bytes_per_s: ByteSize,
    /// Milliseconds of one measurement
    #[arg(long, default_value_t = 3000)]
    window_ms: u64,
    /// DRAM of the node
    #[arg(long, default_value = "512MiB")]
    arena_bytes: ByteSize,
    /// NVMe of the node
    #[arg(long, default_value = "1GiB")]
    nvme_bytes: ByteSize,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// The node's data, kept [default: a new folder, removed at the end]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One kind of company, medians over rounds.
#[derive(Clone, Debug, Serialize)]
struct Row {
    beside: &'static str,
    p50_us: f64,
    p99_us: f64,
    /// p50 and p99 over those of idle.
    p50_over_idle: f64,
    p99_over_idle: f64,
    gets: u64,
    /// Gets that DRAM did not answer.
    not_from_dram: u64,
    /// Bytes that scrubs checked and that background puts stored, MB (10^6) per second.
    scrubbed_mb_per_s: f64,
    put_mb_per_s: f64,
}

/// The report: `kvkeep.bench.background` version 1.
#[derive(Debug, Serialize)]
struct BackgroundReport {
    schema: &'static str,
    version: u32,
    block_bytes: u64,
    rounds: u32,
    window_ms: u64,
    rows: Vec<Row>,
    load_average: f64,
}

/// One measurement.
struct Window {
    kind: usize,
    p50: f64,
    p99: f64,
    gets: u64,
    elsewhere: u64,
    scrubbed: f64,
    put: f64,
}

/// Runs `kvkeep-bench background`.
pub async fn command(command: BackgroundCommand) -> anyhow::Result<bool> {
    ensure!(command.rounds >= 5, "--rounds is at least 5");
    let data = DataDir::open(command.data_dir.as_deref())?;
    let config = data.path().join("node.toml");
    let text = "[arena]\nscrub_bytes_per_s = 0\n\n[nvme]\nscrub_bytes_per_s = 0\n";
    std::fs::write(&config, text).with_context(|| format!("configuration {}", config.display()))?;
    let common = ["--config", &config.display().to_string(), "--arena-bytes", &command.arena_bytes.to_string()];
    let nvme = ["--nvme-bytes", &command.nvme_bytes.to_string()];
    let with = Host::start(&command, &data, &[&common[..], &nvme].concat()).await?;
    let memory_only = DataDir::open(None)?;
    let without = Host::start(&command, &memory_only, &[&common[..], &["--no-nvme"]].concat()).await?;
    let mut windows = Vec::new();
    for round in 0..command.rounds {
        for step in 0..KINDS.len() {
            let kind = (step + round as usize) % KINDS.len();
            let host = if KINDS[kind].nvme { &with } else { &without };
            let window = measure(&command, host, round, kind).await?;
            eprintln!(
                "background: round {} {}: p50 {:.0} us, p99 {:.0} us, {} gets",
                round + 1,
                KINDS[kind].name,
                window.p50,
                window.p99,
                window.gets
            );
            windows.push(window);
        }
    }
    with.stop().await?;
    without.stop().await?;
    let report = BackgroundReport {
        schema: "kvkeep.bench.background",
        version: 1,
        block_bytes: command.block_bytes.0,
        rounds: command.rounds,
        window_ms: command.window_ms,
        rows: rows(&windows),
        load_average: load_average(),
    };
    for row in &report.rows {
        eprintln!(
            "{:>12}  p50 {:>6.0} us ({:.2}x)  p99 {:>6.0} us ({:.2}x)  {} gets, {} not from DRAM; scrubbed {:.0} MB/s, put \
             {:.0} MB/s",
            row.beside,
            row.p50_us,
            row.p50_over_idle,
            row.p99_us,
            row.p99_over_idle,
            row.gets,
            row.not_from_dram,
            row.scrubbed_mb_per_s,
            row.put_mb_per_s
        );
    }
    write_json(&report, command.json.as_deref())?;
    Ok(true)
}

fn rows(windows: &[Window]) -> Vec<Row> {
    let of = |kind: usize, value: fn(&Window) -> f64| {
        median(&windows.iter().filter(|w| w.kind == kind).map(value).collect::<Vec<_>>())
    };
    let sum = |kind: usize, value: fn(&Window) -> u64| windows.iter().filter(|w| w.kind == kind).map(value).sum();
    let (idle50, idle99) = (of(0, |w| w.p50), of(0, |w| w.p99));
    let row = |(kind, Kind { name: beside, .. }): (usize, &Kind)| {
        let (p50_us, p99_us) = (of(kind, |w| w.p50), of(kind, |w| w.p99));
        Row {
            beside,
            p50_us,
            p99_us,
            p50_over_idle: p50_us / idle50,
            p99_over_idle: p99_us / idle99,
            gets: sum(kind, |w| w.gets),
            not_from_dram: sum(kind, |w| w.elsewhere),
            scrubbed_mb_per_s: of(kind, |w| w.scrubbed),
            put_mb_per_s: of(kind, |w| w.put),
        }
    };
    KINDS.iter().enumerate().map(row).collect()
}

/// Gets parts one after the other beside one kind of company.
async fn measure(
    command: &BackgroundCommand,
    Host { front, company, .. }: &Host,
    round: u32,
    kind: usize,
) -> anyhow::Result<Window> {
    // What is leased stays in DRAM while anything else can leave.
    let name = u64::from(round) * KINDS.len() as u64 + kind as u64;
    let call = Call::of(RequestId::new(&name.to_be_bytes()).context("a request id")?);
    let term = Duration::from_millis(command.window_ms) + Duration::from_secs(20);
    let found = front.match_chain(&MatchQuery::of((0..PARTS).map(key_of).collect()).leased(term), &call).await?;
    let lease = found.lease_id();
    ensure!(u64::from(found.boundary_positions) == PARTS, "the foreground's parts have left");
    let items: Vec<_> = (0..PARTS).map(|n| GetItem::of(key_of(n))).collect();
    for item in &items {
        front.get(std::slice::from_ref(item), lease, &call).await.context("get")?;
    }
    let running = company.start(&KINDS[kind]);
    let mut latencies = Latencies::default();
    let mut elsewhere = 0;
    let began = Instant::now();
    for item in items.iter().cycle() {
        if began.elapsed() >= Duration::from_millis(command.window_ms) {
            break;
        }
        let asked = Instant::now();
        let got = front.get(std::slice::from_ref(item), lease, &call).await.context("get")?;
        latencies.note(asked.elapsed());
        elsewhere += u64::from(!got.iter().all(|part| part.is_hit() && part.tier == Some(Tier::Dram)));
        // Each size is whole: what came is compared by the client, see `GotPart::sums_ok`.
        ensure!(got.iter().all(|part| !part.is_hit() || part.sums_ok), "a part with other bytes than were put");
    }
    let took = began.elapsed().as_secs_f64();
    let (scrubbed, put) = running.stop().await?;
    front.release(&[], std::slice::from_ref(&call.request_id), &call).await?;
    let summary = latencies.summary();
    Ok(Window {
        kind,
        p50: summary.p50 as f64,
        p99: summary.p99 as f64,
        gets: summary.count,
        elsewhere,
        scrubbed: scrubbed as f64 / 1e6 / took,
        put: put as f64 / 1e6 / took,
    })
}

/// A node, the foreground's namespace on it, and its company.
struct Host {
    node: Node,
    _foreground: Client,
    front: Namespace,
    company: Company,
}

impl Host {
    /// Starts a node and puts the foreground's parts.
    async fn start(command: &BackgroundCommand, data: &DataDir, flags: &[&str]) -> anyhow::Result<Self> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let node = Recipe::kvkeepd(command.kvkeepd.as_deref(), data, &flags)?.start("127.0.0.1:0").await?;
        let format = any_size_format(command.block_bytes.0);
        let open = async || {
            let config = ClientConfig { lost: Lost::Errors, ..ClientConfig::to(node.endpoint()) };
            let client = Client::connect(config).await?;
            let namespace = client.register_namespace("background", &format, "generated").await?;
            anyhow::Ok((client, namespace))
        };
        let (foreground, front) = open().await?;
        let (client, namespace) = open().await?;
        let len = usize::try_from(command.block_bytes.0)?;
        put(&front, 0..PARTS, len).await?;
        let pause =
            Duration::from_secs_f64((PUT_POSITIONS * command.block_bytes.0) as f64 / command.put_bytes_per_s.0 as f64);
        let company = Company { client, namespace, len, pause, next: Arc::new(AtomicU64::new(BACKGROUND_IDS)) };
        Ok(Self { node, _foreground: foreground, front, company })
    }

    async fn stop(self) -> anyhow::Result<()> {
        let Self { node, .. } = self;
        node.stop().await?;
        Ok(())
    }
}

/// What runs beside the gets.
struct Company {
    client: Client,
    namespace: Namespace,
    len: usize,
    /// From one put to the next.
    pause: Duration,
    next: Arc<AtomicU64>,
}

/// Company that has begun. Answers the bytes it has moved.
struct Running {
    stop: Arc<AtomicBool>,
    scrubs: Vec<tokio::task::JoinHandle<anyhow::Result<u64>>>,
    puts: Option<tokio::task::JoinHandle<anyhow::Result<u64>>>,
}

impl Company {
    fn start(&self, kind: &Kind) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let scrub = |tier| {
            let (client, stop) = (self.client.clone(), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut bytes = 0;
                while !stop.load(Ordering::Relaxed) {
                    let scrubbed = client.admin().scrub(tier, SCRUB_WAIT, &Call::default()).await.context("scrub")?;
                    ensure!(scrubbed.bad_blocks == 0, "a scrub found {} bad blocks", scrubbed.bad_blocks);
                    bytes += scrubbed.checked_bytes;
                }
                Ok(bytes)
            })
        };
        let scrubs = if kind.scrubs { [Tier::Dram, Tier::Nvme].map(scrub).into_iter().collect() } else { Vec::new() };
        let puts = kind.puts.then(|| {
            let (namespace, next, len) = (self.namespace.clone(), Arc::clone(&self.next), self.len);
            let stop = Arc::clone(&stop);
            let mut turn = tokio::time::interval(self.pause);
            turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            tokio::spawn(async move {
                let mut bytes = 0;
                while !stop.load(Ordering::Relaxed) {
                    turn.tick().await;
                    let first = next.fetch_add(PUT_POSITIONS, Ordering::Relaxed);
                    bytes += put(&namespace, first..first + PUT_POSITIONS, len).await? * len as u64;
                }
                Ok(bytes)
            })
        });
        Running { stop, scrubs, puts }
    }
}

impl Running {
    /// Ends it; the bytes scrubbed and put.
    async fn stop(self) -> anyhow::Result<(u64, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut scrubbed = 0;
        for scrub in self.scrubs {
            scrubbed += scrub.await.context("a scrub panicked")??;
        }
        let put = match self.puts {
            Some(puts) => puts.await.context("the writer panicked")??,
            None => 0,
        };
        Ok((scrubbed, put))
    }
}

fn key_of(id: u64) -> Bytes {
    Bytes::copy_from_slice(PrefixId(id).key().as_bytes())
}

/// Puts the chain of these ids; how many the node has stored.
async fn put(namespace: &Namespace, ids: std::ops::Range<u64>, len: usize) -> anyhow::Result<u64> {
    let position = |id: u64| {
        let name: Key = PrefixId(id).key();
        let data = block_bytes::block(Seed::of(&name, GroupId(0), ShardId(0)), len);
        let part = PutPart { group: GroupId(0), shard: ShardId(0), data };
        PutPosition { key: key_of(id), parts: vec![part], token_ids: Vec::new() }
    };
    let put = Put { positions: ids.map(position).collect(), retention: Retention::Keep, ..Put::default() };
    let outcomes = namespace.put(&put, &Call::default()).await.context("put")?;
    Ok(outcomes.iter().filter(|outcome| matches!(outcome, PartOutcome::Stored { .. })).count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_medians_of_their_kind_over_those_of_idle() {
        let window =
            |kind, p50: f64| Window { kind, p50, p99: p50 * 2.0, gets: 10, elsewhere: 1, scrubbed: 3.0, put: 4.0 };
        let windows =
            [(0, 100.0), (1, 150.0), (0, 120.0), (1, 130.0), (0, 900.0), (1, 140.0), (2, 120.0), (3, 240.0), (4, 1.0)];
        let rows = rows(&windows.map(|(kind, p50)| window(kind, p50)));
        assert_eq!((rows[0].p50_us, rows[1].p50_us, rows[3].p50_us), (120.0, 140.0, 240.0));
        assert_eq!((rows[3].p50_over_idle, rows[3].p99_over_idle), (2.0, 2.0));
        assert_eq!((rows[0].gets, rows[0].not_from_dram, rows[0].beside), (30, 3, "idle"));
    }
}
