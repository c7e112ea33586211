//! `device`: blocks from NVMe into a client's region, beside fio on the very same files.
//!
//! A node with a small arena stores more than DRAM holds; the client gets blocks that are on NVMe only, 64 a call and two calls
//! at a time, in random order, straight into its regions. fio reads the node's segment files while the node rests, with as
//! many reads in flight. Only segments that were written whole: the filesystem answers for the others without the device.
//! Floor: the bytes over the device once, by DMA into the region, and a pass for the sums.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use kvkeep_client::{Call, Client, ClientConfig, GetItem, Lost, Namespace, Put, PutPosition, Region, WayWish, Wire};
use kvkeep_core::{Class, GroupId, ShardId, Tier};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use serde::Serialize;

use crate::block_bytes::{self, Seed};
use crate::fio;
use crate::keys::PrefixId;
use crate::load::any_size_format;
use crate::measure::{gb_per_s, load_average, median};
use crate::node::{DataDir, Node, Recipe};
use crate::peers::path::BLOCK_BYTES;
use crate::replay::report::write_json;

/// Blocks of one call.
const BATCH: usize = 64;
/// Calls at a time: the device has work while an answer travels.
const CALLS: usize = 2;
/// Blocks of one call that fills the store.
const FILL_BATCH: usize = 8;
/// Reads that the node keeps in flight for blocks of 1 MiB: `limits.get_read_ahead_bytes` has room for so many.
const READS_IN_FLIGHT: usize = 32;
/// Arena of the node: what is read is not in it.
const ARENA_MIB: usize = 256;

/// Flags of `kvkeep-bench device`.
#[derive(Args, Debug)]
pub struct DeviceCommand {
    /// Pairs of windows, one of ours and one of fio in random order; at least 5
    #[arg(long, default_value_t = 9)]
    pairs: u32,
    /// Milliseconds of one window
    #[arg(long, default_value_t = 1000)]
    window_ms: u64,
    /// MiB that are read from; twice what the arena holds is stored on top
    #[arg(long, default_value_t = 2048)]
    mib: usize,
    /// Folder on the device to measure [default: beside this program]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// What the orders are drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The node's program [default: kvkeepd beside this one]
    #[arg(long)]
    kvkeepd: Option<PathBuf>,
    /// Write the report to this file as JSON; `-` is standard output
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    ours_gb_per_s: f64,
    fio_gb_per_s: f64,
    ratio: f64,
    load_average: f64,
}

/// The report: `kvkeep.bench.device` version 1.
#[derive(Serialize)]
struct DeviceReport {
    schema: &'static str,
    version: u32,
    block_bytes: usize,
    batch: usize,
    calls: usize,
    reads_in_flight: usize,
    working_set_bytes: usize,
    seed: u64,
    /// Of the parts that were got: those that came from NVMe, all of them straight into the region.
    nvme_parts: u64,
    other_parts: u64,
    ratio_median: f64,
    ratio_min: f64,
    ratio_max: f64,
    pairs: Vec<Pair>,
}

/// Runs `kvkeep-bench device`.
pub async fn command(command: DeviceCommand) -> anyhow::Result<bool> {
    ensure!(command.pairs >= 5, "--pairs is at least 5");
    ensure!((BATCH..=1 << 20).contains(&command.mib), "--mib is {BATCH} to 1048576");
    ensure!((1..=60_000).contains(&command.window_ms), "--window-ms is 1 to 60000");
    fio::version().context("fio is needed to compare with: install it")?;
    let data = DataDir::open(command.data_dir.as_deref())?;
    let mut bench = Bench::start(&command, &data).await?;
    let window = Duration::from_millis(command.window_ms);
    let mut rng = StdRng::seed_from_u64(command.seed);
    // Not recorded: pages of both programs, and the device's own caches.
    bench.ours(window).await?;
    let mut pairs = Vec::new();
    for number in 0..command.pairs {
        let fio = |seed| fio(data.path(), window, seed);
        let (ours, fio) = if rand::Rng::random(&mut rng) {
            let ours = bench.ours(window).await?;
            (ours, fio(u64::from(number))?)
        } else {
            let fio = fio(u64::from(number))?;
            (bench.ours(window).await?, fio)
        };
        let pair = Pair { ours_gb_per_s: ours, fio_gb_per_s: fio, ratio: ours / fio, load_average: load_average() };
        eprintln!("pair {}: ours {ours:.2} GB/s, fio {fio:.2} GB/s, {:.2} of it", number + 1, pair.ratio);
        pairs.push(pair);
    }
    let ratios: Vec<f64> = pairs.iter().map(|p| p.ratio).collect();
    let report = DeviceReport {
        schema: "kvkeep.bench.device",
        version: 1,
        block_bytes: BLOCK_BYTES,
        batch: BATCH,
        calls: CALLS,
        reads_in_flight: READS_IN_FLIGHT,
        working_set_bytes: bench.blocks * BLOCK_BYTES,
        seed: command.seed,
        nvme_parts: bench.lanes.iter().map(|lane| lane.from_nvme).sum(),
        other_parts: bench.lanes.iter().map(|lane| lane.from_elsewhere).sum(),
        ratio_median: median(&ratios),
        ratio_min: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratio_max: ratios.iter().copied().fold(0.0, f64::max),
        pairs,
    };
    eprintln!(
        "NVMe into a region, {CALLS} calls of {BATCH} x 1 MiB at a time: {:.2} of fio (median of {}, {:.2} to {:.2}); {} parts from NVMe, {} from elsewhere",
        report.ratio_median,
        report.pairs.len(),
        report.ratio_min,
        report.ratio_max,
        report.nvme_parts,
        report.other_parts
    );
    write_json(&report, command.json.as_deref())?;
    bench.node.stop().await?;
    Ok(report.other_parts == 0)
}

struct Bench {
    node: Node,
    lanes: [Lane; CALLS],
    blocks: usize,
}

/// One caller and its memory.
struct Lane {
    namespace: Namespace,
    region: Region,
    blocks: usize,
    /// Numbers of blocks still to be read in this turn through all of them.
    order: Vec<usize>,
    /// Numbers of the blocks that the region holds.
    holds: Vec<usize>,
    rng: StdRng,
    from_nvme: u64,
    from_elsewhere: u64,
}

fn position(n: usize) -> PutPosition {
    let id = PrefixId(n as u64);
    let seed = Seed::of(&id.key(), GroupId(0), ShardId(0));
    PutPosition::of(bytes::Bytes::copy_from_slice(id.key().as_bytes()), block_bytes::block(seed, BLOCK_BYTES))
}

impl Bench {
    async fn start(command: &DeviceCommand, data: &DataDir) -> anyhow::Result<Self> {
        let (arena_blocks, blocks) = (ARENA_MIB * (1 << 20) / BLOCK_BYTES, command.mib * (1 << 20) / BLOCK_BYTES);
        let config = data.path().join("device.toml");
        // Every read is one of the device, however often a block is asked for.
        std::fs::write(&config, "[nvme]\npromote_at_use = 0\n").context("the node's settings")?;
        let nvme = format!("{}MiB", 2 * (command.mib + ARENA_MIB));
        let arena = format!("{ARENA_MIB}MiB");
        let more = ["--config", &config.display().to_string(), "--arena-bytes", &arena, "--nvme-bytes", &nvme]
            .map(str::to_owned);
        let node = Recipe::kvkeepd(command.kvkeepd.as_deref(), data, &more)?.start("127.0.0.1:0").await?;
        let way = WayWish::Only(Wire::Socket);
        let client = Client::connect(ClientConfig {
            way,
            lost: Lost::Errors,
            patience: Duration::from_secs(5),
            ..ClientConfig::to(node.endpoint())
        })
        .await?;
        let namespace = client.register_namespace("device", &any_size_format(BLOCK_BYTES as u64), "generated").await?;
        eprintln!("storing {} blocks of 1 MiB, durable", blocks + 2 * arena_blocks);
        for first in (0..blocks + 2 * arena_blocks).step_by(FILL_BATCH) {
            let positions = (first..first + FILL_BATCH).map(position).collect();
            let put = Put { positions, unordered: true, class: Some(Class::Durable), ..Put::default() };
            let outcomes = namespace.put(&put, &Call::default()).await?;
            ensure!(outcomes.iter().all(|o| o.is_kept()), "a block was refused: {outcomes:?}");
        }
        let lane = |n| {
            anyhow::Ok(Lane {
                namespace: namespace.clone(),
                region: Region::new(BATCH * BLOCK_BYTES)?,
                blocks,
                order: Vec::new(),
                holds: Vec::new(),
                rng: StdRng::seed_from_u64(command.seed ^ n),
                from_nvme: 0,
                from_elsewhere: 0,
            })
        };
        Ok(Self { node, lanes: [lane(1)?, lane(2)?], blocks })
    }

    /// GB/s of one window.
    async fn ours(&mut self, window: Duration) -> anyhow::Result<f64> {
        let began = Instant::now();
        let [one, other] = &mut self.lanes;
        let (some, more) = tokio::try_join!(one.run(began, window), other.run(began, window))?;
        let (bytes, took) = (some + more, began.elapsed());
        self.lanes.iter().try_for_each(Lane::verify)?;
        Ok(gb_per_s(bytes, took))
    }
}

impl Lane {
    /// Gets batches until the window is over; how many bytes.
    async fn run(&mut self, began: Instant, window: Duration) -> anyhow::Result<u64> {
        let mut bytes = 0;
        while began.elapsed() < window {
            if self.order.len() < BATCH {
                self.order = (0..self.blocks).collect();
                self.order.shuffle(&mut self.rng);
            }
            self.holds = self.order.split_off(self.order.len() - BATCH);
            let items: Vec<_> = self.holds.iter().map(|n| GetItem::of(position_key(*n))).collect();
            // SAFETY: one call is in flight per lane, and the region is nobody else's.
            let places: Vec<_> =
                (0..BATCH).map(|n| unsafe { self.region.place(n * BLOCK_BYTES, BLOCK_BYTES) }).collect();
            let got = self.namespace.get_into_region(&items, &places, None, &Call::default()).await?;
            bytes += (BATCH * BLOCK_BYTES) as u64;
            for (number, got) in self.holds.iter().zip(&got) {
                ensure!(got.is_hit() && got.len == BLOCK_BYTES, "block {number} came back short: {got:?}");
                let nvme = got.tier == Some(Tier::Nvme);
                *if nvme { &mut self.from_nvme } else { &mut self.from_elsewhere } += 1;
            }
        }
        Ok(bytes)
    }

    /// Compares what the region holds, which is the window's last batch.
    fn verify(&self) -> anyhow::Result<()> {
        let mut landed = vec![0; BLOCK_BYTES];
        for (place, number) in self.holds.iter().enumerate() {
            self.region.read(place * BLOCK_BYTES, &mut landed);
            ensure!(landed == position(*number).parts[0].data, "wrong bytes in block {number}");
        }
        Ok(())
    }
}

fn position_key(n: usize) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(PrefixId(n as u64).key().as_bytes())
}

/// GB/s of fio over the node's segment files.
fn fio(data: &Path, window: Duration, seed: u64) -> anyhow::Result<f64> {
    let more = [
        "--rw=randread".to_owned(),
        "--norandommap".to_owned(),
        "--randrepeat=0".to_owned(),
        "--time_based".to_owned(),
        "--file_service_type=random".to_owned(),
        format!("--runtime={}ms", window.as_millis()),
        format!("--randseed={}", seed + 1),
    ];
    fio::read(&fio::whole_segments(data)?, BLOCK_BYTES as u64, READS_IN_FLIGHT, &more)
}
