//! Device bench: our engine against fio, side by side on the same file.
//!
//! ```text
//! cargo run --release -p kvkeep-tiers --example device_bench -- --dir /var/tmp --json device.json
//! ```
//!
//! One file of `--file-gib` is written once. Then, for every cell (read or write, block size, depth) and every pair, three
//! sides run one after the other in an order drawn from `--seed`: fio, ours, and ours with the checksums that the store
//! makes. All three touch blocks at random, with O_DIRECT, registered buffers and registered files, and flush after the
//! same number of bytes, from and into the same pages of one tmpfs file. No pair is ever discarded. A ratio is taken within a pair; the table shows the medians.
//!
//! The floor of one operation: its bytes over the device once; one io_uring entry and one completion (fio needs no more
//! than that); on our side also two hand-overs between threads, the caller's and the ring's.
//!
//! Bars: throughput at least 0.9 of fio, p99 at most 2 times, CPU seconds per GB without checksum at most 1.3 times.

mod fio;
mod memory;
mod ours;
mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kvkeep_tiers::io::sim::Dice;
use kvkeep_tiers::io::{Disk, DiskOptions, EngineChoice, IoBuf, probe};

/// The file under test.
const FILE: &str = "device-bench.seg";

/// Bytes written between two flushes, on both sides.
const FLUSH_EVERY_BYTES: u64 = 64 << 20;

#[derive(Parser)]
#[command(about = "Our disk engine against fio, paired, on the same file")]
struct Args {
    /// Folder on the device to be measured; a temporary folder is made inside.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Size of the file, GiB.
    #[arg(long, default_value_t = 2)]
    file_gib: u64,
    /// Pairs per cell.
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// Length of one run of one side, seconds.
    #[arg(long, default_value_t = 1.2)]
    seconds: f64,
    /// Decides orders and offsets.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Engine: auto, uring, pread.
    #[arg(long, default_value = "auto")]
    engine: EngineChoice,
    /// Operations: read, write.
    #[arg(long, value_delimiter = ',', default_value = "read,write")]
    ops: Vec<String>,
    /// Block sizes, KiB.
    #[arg(long, value_delimiter = ',', default_value = "128,512,1024,4096")]
    block_kib: Vec<u64>,
    /// Operations in flight.
    #[arg(long, value_delimiter = ',', default_value = "1,8,16")]
    depths: Vec<u32>,
    /// A tmpfs, for the buffers that all sides share.
    #[arg(long, default_value = "/dev/shm")]
    memory: PathBuf,
    /// Where to write the result as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One cell of the table.
#[derive(Clone, Copy, Debug)]
struct Cell {
    write: bool,
    block_bytes: u64,
    depth: u32,
}

/// What one side did in one run.
#[derive(Clone, Copy, Debug)]
struct Run {
    bytes_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_seconds_per_gb: f64,
}

/// The sides of a pair, in the order of the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Fio,
    Ours,
    OursSummed,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let version = fio::version()?;
    let folder = tempfile::Builder::new().prefix("kvkeep-device-bench-").tempdir_in(&args.dir)?;
    let opened = probe::open(folder.path(), args.engine, DiskOptions::default())?;
    eprintln!("ours: {}\nfio: {version}", opened.said);
    let file_bytes = args.file_gib << 30;
    prepare(&opened.disk, file_bytes)?;

    let window = Duration::from_secs_f64(args.seconds);
    let mut dice = Dice::new(args.seed);
    let mut rows = Vec::new();
    for op in &args.ops {
        let write = match op.as_str() {
            "read" => false,
            "write" => true,
            other => anyhow::bail!("an operation is read or write, not {other:?}"),
        };
        for kib in &args.block_kib {
            for depth in &args.depths {
                let cell = Cell { write, block_bytes: kib << 10, depth: *depth };
                let memory = memory::Memory::new(&args.memory, (cell.block_bytes * u64::from(cell.depth)) as usize)?;
                let mut row = report::Row::new(cell);
                for _ in 0..args.pairs {
                    let mut order = [Side::Fio, Side::Ours, Side::OursSummed];
                    for last in (1..order.len()).rev() {
                        order.swap(last, dice.below(last as u64 + 1) as usize);
                    }
                    for side in order {
                        let seed = dice.next_u64();
                        let run = match side {
                            Side::Fio => fio::run(folder.path(), &memory, cell, window, file_bytes, seed)?,
                            _ => {
                                let sums = side == Side::OursSummed;
                                ours::run(&opened.disk, &memory, cell, window, file_bytes, seed, sums)?
                            }
                        };
                        row.add(side, run);
                    }
                }
                eprintln!("{}", row.line());
                rows.push(row);
            }
        }
    }
    let report = report::Report { args: &args, engine: &opened.said, fio: &version, rows: &rows };
    println!("{}", report.table());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report.json())?)?;
    }
    Ok(())
}

/// Makes the file and writes every byte of it once, so that no side meets unwritten extents.
fn prepare(disk: &Arc<dyn Disk>, bytes: u64) -> anyhow::Result<()> {
    const STEP: u64 = 4 << 20;
    let file = disk.create(FILE, bytes)?;
    ours::runtime()?.block_on(async {
        let mut buf = IoBuf::alloc(STEP as usize);
        let mut dice = Dice::new(0);
        buf.as_mut_slice().chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&dice.next_u64().to_le_bytes()));
        for at in (0..bytes).step_by(STEP as usize) {
            let (back, result) = disk.write(file, at, buf).await;
            result?;
            buf = back;
        }
        disk.flush(file).await?;
        Ok(())
    })
}
