//! `match`: what looking up a long chain costs, and whether foreground calls feel it when others look up longer ones.
//!
//! The server's own share is its CPU time per call less the decoding of the request, which is measured here on the same
//! bytes. Floor: one hash and one table look-up per key, about 100 ns with a cold cache.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::Args;
use kvkeep_client::convert::format_to_proto;
use kvkeep_client::{
    Call, Client, ClientConfig, Lost, MatchQuery, Namespace, PartOutcome, Put, PutPosition, WayWish, Wire, wire,
};
use kvkeep_core::{GroupId, ShardId};
use rand::Rng as _;
use serde::Serialize;

use crate::block_bytes::{self, Seed};
use crate::grpc::stock::Stock;
use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::measure::{Latencies, LatencySummary, load_average, median};
use crate::node::{DataDir, Node, Recipe};
use crate::replay::report::write_json;

/// Bytes of the blocks that are matched: the smallest.
const BLOCK_BYTES: usize = 1024;
/// Bytes of the blocks that the foreground gets.
const FOREGROUND_BYTES: usize = 64 << 10;
/// Blocks that the foreground chooses from.
const FOREGROUND_BLOCKS: u64 = 64;
/// Positions put by one call.
const PUT_POSITIONS: usize = 1024;
/// Keys of the measured match.
const KEYS: usize = 4096;
/// Keys of a background match: the largest batch.
const BACKGROUND_KEYS: usize = 8192;
/// Chains that are matched in turn, so that the directory is not one hot chain.
const CHAINS: usize = 8;
/// Decodings timed.
const DECODINGS: u32 = 200;

/// Flags of `kvkeep-bench match`.
#[derive(Args, Debug)]
pub struct MatchCommand {
    /// Match calls measured
    #[arg(long, default_value_t = 500)]
    calls: u32,
    /// Pairs of foreground measurements, without and with background batches; at least 5
    #[arg(long, default_value_t = 9)]
    pairs: u32,
    /// Milliseconds of one foreground measurement
    #[arg(long, default_value_t = 2000)]
    window_ms: u64,
    /// Background batches per second
    #[arg(long, default_value_t = 20.0)]
    background_rate: f64,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A foreground measurement without background and one with, next to each other.
#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    alone_p99_us: u64,
    with_batches_p99_us: u64,
    ratio: f64,
    batches: u64,
    load_average: f64,
}

/// The report: `kvkeep.bench.match` version 1.
#[derive(Serialize)]
struct MatchReport {
    schema: &'static str,
    version: u32,
    keys: usize,
    positions_stored: usize,
    /// Over gRPC, client to client.
    round_trip_us: LatencySummary,
    /// The same with one key: what a call costs before it has any work.
    one_key_round_trip_us: LatencySummary,
    /// CPU time of the server per call, everything included.
    server_cpu_us_per_call: f64,
    one_key_server_cpu_us_per_call: f64,
    /// Decoding the request, measured in this process.
    decode_us: f64,
    /// What is left for the look-up itself.
    server_us_without_decoding: f64,
    foreground: Foreground,
    load_average: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Foreground {
    what: &'static str,
    background: String,
    ratio_median: f64,
    pairs: Vec<Pair>,
}

struct Bench {
    command: MatchCommand,
    node: Node,
    namespace: Namespace,
    /// Clients of their own, so that foreground and background do not share a connection.
    foreground: Stock,
    background: Namespace,
    chains: Vec<Vec<Bytes>>,
}

/// Runs `kvkeep-bench match`.
pub async fn command(command: MatchCommand) -> anyhow::Result<bool> {
    ensure!(command.pairs >= 5 && command.calls > 0, "--pairs is at least 5, --calls at least 1");
    ensure!(command.background_rate > 0.0 && command.background_rate <= 1e4, "--background-rate is 0 to 10000");
    let data = DataDir::open(None)?;
    let bench = Arc::new(Bench::start(command, &data).await?);
    let (round_trip, cpu) = bench.matches(KEYS).await?;
    let (one_key, one_key_cpu) = bench.matches(1).await?;
    let decode_us = bench.decode_us();
    let foreground = bench.foreground().await?;
    let report = MatchReport {
        schema: "kvkeep.bench.match",
        version: 1,
        keys: KEYS,
        positions_stored: CHAINS * BACKGROUND_KEYS,
        round_trip_us: round_trip,
        one_key_round_trip_us: one_key,
        server_cpu_us_per_call: cpu,
        one_key_server_cpu_us_per_call: one_key_cpu,
        decode_us,
        server_us_without_decoding: cpu - one_key_cpu - decode_us,
        foreground,
        load_average: load_average(),
    };
    eprintln!(
        "  match of {KEYS} keys: round trip p50 {} us, p99 {} us; server CPU {:.0} us per call, of it decoding {:.0} us, a call of one key {:.0} us; look-up {:.0} us",
        report.round_trip_us.p50,
        report.round_trip_us.p99,
        report.server_cpu_us_per_call,
        report.decode_us,
        report.one_key_server_cpu_us_per_call,
        report.server_us_without_decoding,
    );
    eprintln!(
        "  foreground p99 with {} over alone: {:.2} (median of {} pairs)",
        report.foreground.background,
        report.foreground.ratio_median,
        report.foreground.pairs.len()
    );
    write_json(&report, bench.command.json.as_deref())?;
    let bench = Arc::into_inner(bench).context("no call is running any more")?;
    bench.node.stop().await?;
    Ok(true)
}

fn key(id: u64) -> Bytes {
    Bytes::copy_from_slice(PrefixId(id).key().as_bytes())
}

fn position(id: u64, bytes: usize) -> PutPosition {
    let seed = Seed::of(&PrefixId(id).key(), GroupId(0), ShardId(0));
    PutPosition::of(key(id), block_bytes::block(seed, bytes))
}

impl Bench {
    async fn start(command: MatchCommand, data: &DataDir) -> anyhow::Result<Self> {
        let more = ["--arena-bytes", "1GiB", "--no-nvme"].map(str::to_owned);
        let node = Recipe::kvkeepd(command.kvkeepd.as_deref(), data, &more)?.start("127.0.0.1:0").await?;
        let format = any_size_format(FOREGROUND_BYTES as u64);
        let open = async || -> anyhow::Result<Namespace> {
            let client = Client::connect(ClientConfig {
                way: WayWish::Only(Wire::Grpc),
                lost: Lost::Errors,
                ..ClientConfig::to(node.endpoint())
            })
            .await?;
            Ok(client.register_namespace("match", &format, "generated").await?)
        };
        let (namespace, background) = (open().await?, open().await?);
        let ids = |chain: usize| (chain * BACKGROUND_KEYS) as u64..((chain + 1) * BACKGROUND_KEYS) as u64;
        let chains: Vec<Vec<Bytes>> = (0..CHAINS).map(|chain| ids(chain).map(key).collect()).collect();
        for (number, chain) in chains.iter().enumerate() {
            let all: Vec<_> = ids(number).collect();
            for (i, some) in all.chunks(PUT_POSITIONS).enumerate() {
                let first = i * PUT_POSITIONS;
                let put = Put {
                    parent: first.checked_sub(1).map(|p| chain[p].clone()),
                    first_position: first as u32,
                    positions: some.iter().map(|id| position(*id, BLOCK_BYTES)).collect(),
                    ..Put::default()
                };
                store(&namespace, &put).await?;
            }
        }
        let foreground = Put {
            positions: (0..FOREGROUND_BLOCKS).map(|n| position(u64::MAX - n, FOREGROUND_BYTES)).collect(),
            unordered: true,
            ..Put::default()
        };
        store(&namespace, &foreground).await?;
        let mut stock = Stock::connect(&node.endpoint()).await?;
        stock.greet("match", format_to_proto(&format)).await?;
        Ok(Self { command, node, namespace, foreground: stock, background, chains })
    }

    /// Latency of matches of so many keys, one after the other, and the server's CPU microseconds per call.
    async fn matches(&self, keys: usize) -> anyhow::Result<(LatencySummary, f64)> {
        let mut latency = Latencies::default();
        let calls = self.command.calls;
        let mut cpu = 0.0;
        // The first tenth warms up and is not counted.
        for number in 0..calls + calls / 10 {
            if number == calls / 10 {
                cpu = self.node.cpu_seconds();
            }
            let chain = &self.chains[number as usize % CHAINS];
            let query = MatchQuery::of(chain[..keys].to_vec());
            let began = Instant::now();
            let found = self.namespace.match_chain(&query, &Call::default()).await?;
            if number >= calls / 10 {
                latency.note(began.elapsed());
            }
            ensure!(found.boundary_positions as usize == keys, "{} of {keys} keys matched", found.boundary_positions);
        }
        Ok((latency.summary(), (self.node.cpu_seconds() - cpu) * 1e6 / f64::from(calls)))
    }

    /// Microseconds that decoding a match of [`KEYS`] keys takes, as tonic does it: keys are slices of the frame.
    fn decode_us(&self) -> f64 {
        use kvkeep_client::wire::MatchRequest;
        use prost::Message as _;
        let request = MatchRequest {
            ctx: Some(wire::CallContext::default()),
            queries: vec![wire::MatchQuery { keys: self.chains[0][..KEYS].to_vec(), ..wire::MatchQuery::default() }],
        };
        let bytes = Bytes::from(request.encode_to_vec());
        let began = Instant::now();
        for _ in 0..DECODINGS {
            let decoded = MatchRequest::decode(bytes.clone()).expect("it was encoded a line above");
            std::hint::black_box(&decoded);
        }
        began.elapsed().as_secs_f64() * 1e6 / f64::from(DECODINGS)
    }

    async fn foreground(self: &Arc<Self>) -> anyhow::Result<Foreground> {
        let mut pairs = Vec::new();
        for number in 0..self.command.pairs {
            let alone_first: bool = rand::rng().random();
            let first = self.window(!alone_first).await?;
            let second = self.window(alone_first).await?;
            let ((alone, _), (with, batches)) = if alone_first { (first, second) } else { (second, first) };
            let ratio = with.p99 as f64 / alone.p99.max(1) as f64;
            eprintln!(
                "foreground pair {}: p99 {} us alone, {} us with {batches} batches",
                number + 1,
                alone.p99,
                with.p99
            );
            pairs.push(Pair {
                alone_p99_us: alone.p99,
                with_batches_p99_us: with.p99,
                ratio,
                batches,
                load_average: load_average(),
            });
        }
        Ok(Foreground {
            what: "get of one 64 KiB block by a stock client, one in flight",
            background: format!("{:.0} matches of {BACKGROUND_KEYS} keys per second", self.command.background_rate),
            ratio_median: median(&pairs.iter().map(|p| p.ratio).collect::<Vec<_>>()),
            pairs,
        })
    }

    /// One foreground window; answers its latencies and how many background batches ran meanwhile.
    async fn window(self: &Arc<Self>, background: bool) -> anyhow::Result<(LatencySummary, u64)> {
        let over = Arc::new(AtomicBool::new(false));
        let batches = Arc::new(AtomicU64::new(0));
        let running = background.then(|| {
            let (bench, over, batches) = (Arc::clone(self), Arc::clone(&over), Arc::clone(&batches));
            tokio::spawn(async move { bench.batches(&over, &batches).await })
        });
        let ends = Instant::now() + Duration::from_millis(self.command.window_ms);
        let mut latency = Latencies::default();
        let mut client = self.foreground.clone();
        while Instant::now() < ends {
            let id = u64::MAX - rand::rng().random_range(0..FOREGROUND_BLOCKS);
            let began = Instant::now();
            client.get(&[key(id)], FOREGROUND_BYTES).await?;
            latency.note(began.elapsed());
        }
        over.store(true, Ordering::Release);
        if let Some(running) = running {
            running.await.context("the background panicked")??;
        }
        Ok((latency.summary(), batches.load(Ordering::Acquire)))
    }

    async fn batches(&self, over: &AtomicBool, batches: &AtomicU64) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / self.command.background_rate));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        while !over.load(Ordering::Acquire) {
            tick.tick().await;
            let chain = &self.chains[batches.fetch_add(1, Ordering::AcqRel) as usize % CHAINS];
            self.background.match_chain(&MatchQuery::of(chain.clone()), &Call::default()).await?;
        }
        Ok(())
    }
}

async fn store(namespace: &Namespace, put: &Put) -> anyhow::Result<()> {
    for outcome in namespace.put(put, &Call::default()).await.context("put")? {
        match outcome {
            PartOutcome::Refused(e) => return Err(anyhow::Error::new(e).context("put")),
            PartOutcome::InProgressElsewhere { .. } => anyhow::bail!("nobody else writes here"),
            PartOutcome::Stored { .. } | PartOutcome::AlreadyPresent { .. } => {}
        }
    }
    Ok(())
}
