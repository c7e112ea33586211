//! `grpc`: stock clients on KVKeep against stock clients on a bare tonic service, in pairs, the order drawn for each pair.
//!
//! [`bare`] is the other side, [`stock`] the client of both. KVKeep's puts are whole puts (reserve, write, commit); the bare
//! service only takes the bytes: the ratio holds everything that a store adds.

pub mod bare;
pub mod stock;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::Args;
use kvkeep_client::convert::format_to_proto;
use rand::Rng as _;
use serde::Serialize;

use crate::block_bytes::{self, Seed};
use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::measure::{gb_per_s, load_average, median};
use crate::node::{DataDir, Node, Recipe};
use crate::replay::report::write_json;
use crate::units::ByteSize;
use stock::Stock;

/// Data of one message.
pub const CHUNK_BYTES: usize = 1 << 20;
/// HTTP/2 window of a stream, both ends, bytes.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 window of a connection, both ends, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// HTTP/2 frame, both ends, bytes.
pub const FRAME_BYTES: u32 = 1 << 20;
/// Largest message, both ends, bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Fewest pairs of a comparison.
const PAIRS_MIN: u32 = 5;
/// Blocks of the working set that gets read, in bytes.
const WORKING_SET_BYTES: u64 = 128 << 20;
/// Different payloads of puts.
const PAYLOADS: u64 = 32;

/// Flags of `kvkeep-bench grpc`.
#[derive(Args, Debug)]
pub struct GrpcCommand {
    /// Pairs of measurements per direction, at least 5
    #[arg(long, default_value_t = 9)]
    pairs: u32,
    /// Milliseconds of one measurement
    #[arg(long, default_value_t = 1500)]
    window_ms: u64,
    /// Bytes of a block
    #[arg(long, default_value = "1MiB")]
    block_bytes: ByteSize,
    /// Blocks of one call
    #[arg(long, default_value_t = 4)]
    batch: u64,
    /// Calls in flight
    #[arg(long, default_value_t = 4)]
    in_flight: u32,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// DRAM of the node
    #[arg(long, default_value = "1GiB")]
    arena_bytes: ByteSize,
    /// Let the node write behind to NVMe as well; the bare service has no disk
    #[arg(long)]
    with_nvme: bool,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Kvkeep,
    Bare,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Get,
    Put,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
struct Point {
    gb_per_s: f64,
    server_cpu_s_per_gb: f64,
}

/// Two measurements next to each other.
#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    kvkeep: Point,
    bare: Point,
    ratio: f64,
    kvkeep_first: bool,
    load_average: f64,
}

/// One direction.
#[derive(Clone, Debug, Serialize)]
struct WayReport {
    kvkeep_gb_per_s_median: f64,
    bare_gb_per_s_median: f64,
    ratio_median: f64,
    pairs: Vec<Pair>,
}

/// The report: `kvkeep.bench.grpc` version 1.
#[derive(Serialize)]
struct GrpcReport {
    schema: &'static str,
    version: u32,
    block_bytes: u64,
    batch: u64,
    in_flight: u32,
    window_ms: u64,
    with_nvme: bool,
    discard_rule: &'static str,
    get: WayReport,
    put: WayReport,
}

/// The two sides and what is sent to them.
struct Bench {
    command: GrpcCommand,
    kvkeep: (Node, Stock),
    bare: (Node, Stock),
    working_set: Vec<Bytes>,
    payloads: Vec<Bytes>,
    next: AtomicU64,
}

/// Runs `kvkeep-bench grpc`.
pub async fn command(command: GrpcCommand) -> anyhow::Result<bool> {
    ensure!(command.pairs >= PAIRS_MIN, "--pairs is at least {PAIRS_MIN}");
    ensure!(
        (1..=64).contains(&command.in_flight) && (1..=256).contains(&command.batch),
        "--in-flight 1 to 64, --batch 1 to 256"
    );
    ensure!((1024..=64 << 20).contains(&command.block_bytes.0), "--block-bytes is 1KiB to 64MiB");
    let data = DataDir::open(None)?;
    let bench = Arc::new(Bench::start(command, &data).await?);
    let get = bench.compare(Way::Get).await?;
    let put = bench.compare(Way::Put).await?;
    let report = GrpcReport {
        schema: "kvkeep.bench.grpc",
        version: 1,
        block_bytes: bench.command.block_bytes.0,
        batch: bench.command.batch,
        in_flight: bench.command.in_flight,
        window_ms: bench.command.window_ms,
        with_nvme: bench.command.with_nvme,
        discard_rule: "none: every pair counts; one unrecorded pair first",
        get,
        put,
    };
    for (name, way) in [("get", &report.get), ("put", &report.put)] {
        eprintln!(
            "  {name}  kvkeep {:.2} GB/s  bare {:.2} GB/s  ratio {:.3} (median of {} pairs, {} in flight, {} x {})",
            way.kvkeep_gb_per_s_median,
            way.bare_gb_per_s_median,
            way.ratio_median,
            way.pairs.len(),
            report.in_flight,
            report.batch,
            bench.command.block_bytes,
        );
    }
    write_json(&report, bench.command.json.as_deref())?;
    let bench = Arc::into_inner(bench).context("no call is running any more")?;
    bench.kvkeep.0.stop().await?;
    bench.bare.0.kill().await?;
    Ok(true)
}

impl Bench {
    async fn start(command: GrpcCommand, data: &DataDir) -> anyhow::Result<Self> {
        let mut more = vec!["--arena-bytes".to_owned(), command.arena_bytes.to_string()];
        if command.with_nvme {
            more.extend(["--nvme-bytes".to_owned(), "8GiB".to_owned()]);
        } else {
            more.push("--no-nvme".to_owned());
        }
        let node = Recipe::kvkeepd(command.kvkeepd.as_deref(), data, &more)?.start("127.0.0.1:0").await?;
        let own = Recipe {
            program: std::env::current_exe()?,
            args: ["bare-server", "--block-bytes", &command.block_bytes.0.to_string()].map(Into::into).to_vec(),
            log: data.path().join("bare.log"),
        };
        let bare = own.start("127.0.0.1:0").await?;
        let mut kvkeep_client = Stock::connect(&node.endpoint()).await?;
        kvkeep_client.greet("grpc", format_to_proto(&any_size_format(command.block_bytes.0))).await?;
        let bare_client = Stock::connect(&bare.endpoint()).await?;
        let block_bytes = command.block_bytes.0;
        let keys = (WORKING_SET_BYTES / block_bytes).max(command.batch);
        Ok(Self {
            kvkeep: (node, kvkeep_client),
            bare: (bare, bare_client),
            working_set: (0..keys).map(|n| Bytes::copy_from_slice(PrefixId(n).key().as_bytes())).collect(),
            payloads: (0..PAYLOADS).map(|n| block_bytes::block(Seed::nth(n), block_bytes as usize)).collect(),
            next: AtomicU64::new(1 << 32),
            command,
        })
    }

    async fn compare(self: &Arc<Self>, way: Way) -> anyhow::Result<WayReport> {
        // Both sides once, not recorded: memory is touched, connections are warm.
        for side in [Side::Kvkeep, Side::Bare] {
            self.measure(side, way).await?;
        }
        let mut pairs = Vec::new();
        for number in 0..self.command.pairs {
            let kvkeep_first = rand::rng().random();
            let order = if kvkeep_first { [Side::Kvkeep, Side::Bare] } else { [Side::Bare, Side::Kvkeep] };
            let first = self.measure(order[0], way).await?;
            let second = self.measure(order[1], way).await?;
            let (kvkeep, bare) = if kvkeep_first { (first, second) } else { (second, first) };
            let ratio = kvkeep.gb_per_s / bare.gb_per_s;
            eprintln!(
                "{way:?} pair {}: kvkeep {:.2}, bare {:.2} GB/s, ratio {ratio:.3}",
                number + 1,
                kvkeep.gb_per_s,
                bare.gb_per_s
            );
            pairs.push(Pair { kvkeep, bare, ratio, kvkeep_first, load_average: load_average() });
        }
        let of = |f: fn(&Pair) -> f64| median(&pairs.iter().map(f).collect::<Vec<_>>());
        Ok(WayReport {
            kvkeep_gb_per_s_median: of(|p| p.kvkeep.gb_per_s),
            bare_gb_per_s_median: of(|p| p.bare.gb_per_s),
            ratio_median: of(|p| p.ratio),
            pairs,
        })
    }

    async fn measure(self: &Arc<Self>, side: Side, way: Way) -> anyhow::Result<Point> {
        if (side, way) == (Side::Kvkeep, Way::Get) {
            self.store_working_set().await?;
        }
        let (node, client) = match side {
            Side::Kvkeep => &self.kvkeep,
            Side::Bare => &self.bare,
        };
        let cpu = node.cpu_seconds();
        let began = Instant::now();
        let ends = began + Duration::from_millis(self.command.window_ms);
        let mut loops = tokio::task::JoinSet::new();
        for _ in 0..self.command.in_flight {
            let (bench, client) = (Arc::clone(self), client.clone());
            loops.spawn(async move { bench.call_loop(client, side, way, ends).await });
        }
        let mut bytes = 0;
        while let Some(one) = loops.join_next().await {
            bytes += one.context("a client panicked")??;
        }
        let took = began.elapsed();
        let gb = (bytes as f64 / 1e9).max(1e-9);
        Ok(Point { gb_per_s: gb_per_s(bytes, took), server_cpu_s_per_gb: (node.cpu_seconds() - cpu) / gb })
    }

    /// One of the calls in flight: again and again until the time is up; answers the bytes moved.
    async fn call_loop(&self, mut client: Stock, side: Side, way: Way, ends: Instant) -> anyhow::Result<u64> {
        let mut bytes = 0;
        while Instant::now() < ends {
            bytes += match (way, side) {
                (Way::Get, _) => {
                    let keys: Vec<_> = {
                        let mut rng = rand::rng();
                        let pick = |_| self.working_set[rng.random_range(0..self.working_set.len())].clone();
                        (0..self.command.batch).map(pick).collect()
                    };
                    client.get(&keys, self.command.block_bytes.0 as usize).await?
                }
                (Way::Put, Side::Bare) => {
                    let blocks: Vec<_> = self.fresh().collect();
                    client.write(&blocks).await?
                }
                (Way::Put, Side::Kvkeep) => {
                    let blocks: Vec<_> = self
                        .fresh()
                        .map(|(n, data)| (Bytes::copy_from_slice(PrefixId(n).key().as_bytes()), data))
                        .collect();
                    client.put(&blocks).await?
                }
            };
        }
        Ok(bytes)
    }

    /// Blocks that nobody has put before.
    fn fresh(&self) -> impl Iterator<Item = (u64, Bytes)> + '_ {
        let first = self.next.fetch_add(self.command.batch, Ordering::Relaxed);
        (first..first + self.command.batch).map(|n| (n, self.payloads[(n % PAYLOADS) as usize].clone()))
    }

    /// Puts what of the working set is not there.
    async fn store_working_set(&self) -> anyhow::Result<()> {
        let mut client = self.kvkeep.1.clone();
        for (i, keys) in self.working_set.chunks(8).enumerate() {
            let blocks: Vec<_> =
                keys.iter().map(|key| (key.clone(), self.payloads[i % self.payloads.len()].clone())).collect();
            client.put(&blocks).await.context("working set")?;
        }
        Ok(())
    }
}
