//! Our side: `depth` tasks on one thread, each with a buffer of registered memory, one operation after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvkeep_core::ChunkSums;
use kvkeep_tiers::io::sim::Dice;
use kvkeep_tiers::io::{Disk, Region, Registration};
use rustix::time::{ClockId, clock_gettime};

use super::memory::Memory;
use super::{Cell, FILE, FLUSH_EVERY_BYTES, Run};

/// Where the buffers are registered.
const INDEX: u16 = 0;

pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().build()
}

pub(super) fn run(
    disk: &Arc<dyn Disk>,
    memory: &Memory,
    cell: Cell,
    window: Duration,
    file_bytes: u64,
    seed: u64,
    sums: bool,
) -> anyhow::Result<Run> {
    let (file, _) = disk.open(FILE)?;
    let block = cell.block_bytes as usize;
    let mut arena = memory.map()?;
    if disk.register(INDEX, Region::of(&arena)) == Registration::Unregistered && disk.engine().name == "uring" {
        anyhow::bail!("the buffers could not be registered: raise RLIMIT_MEMLOCK");
    }
    let mut bufs = Vec::new();
    for _ in 0..cell.depth {
        let (buf, rest) = arena.split_at(block);
        bufs.push(buf.with_fixed(INDEX));
        arena = rest;
    }
    let (blocks, flush_every) = (file_bytes / cell.block_bytes, (FLUSH_EVERY_BYTES / cell.block_bytes).max(1));
    let written = Arc::new(AtomicU64::new(0));
    let mut latencies: Vec<Duration> = Vec::new();

    let (cpu, start) = (cpu_time(), Instant::now());
    runtime()?.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for (n, mut buf) in bufs.into_iter().enumerate() {
            let (disk, written) = (Arc::clone(disk), Arc::clone(&written));
            let mut dice = Dice::new(seed ^ n as u64);
            tasks.spawn(async move {
                let mut latencies = Vec::new();
                while start.elapsed() < window {
                    let offset = dice.below(blocks) * cell.block_bytes;
                    let mut known = ChunkSums::default();
                    let began = Instant::now();
                    if cell.write && sums {
                        known = ChunkSums::of(buf.as_slice());
                    }
                    let (back, result) = if cell.write {
                        disk.write(file, offset, buf).await
                    } else {
                        disk.read(file, offset, buf).await
                    };
                    anyhow::ensure!(result? == back.len(), "a short operation inside the file");
                    if !cell.write && sums {
                        known = ChunkSums::of(back.as_slice());
                    }
                    latencies.push(began.elapsed());
                    std::hint::black_box(known);
                    buf = back;
                    if cell.write && written.fetch_add(1, Ordering::Relaxed) % flush_every == flush_every - 1 {
                        disk.flush(file).await?;
                    }
                }
                Ok(latencies)
            });
        }
        while let Some(ended) = tasks.join_next().await {
            latencies.extend(ended??);
        }
        anyhow::Ok(())
    })?;
    let (elapsed, cpu) = (start.elapsed(), cpu_time() - cpu);
    disk.unregister(INDEX);

    anyhow::ensure!(!latencies.is_empty(), "nothing ended in the time given");
    latencies.sort_unstable();
    let percentile = |p: usize| latencies[(latencies.len() * p).div_ceil(100) - 1].as_secs_f64() * 1e6;
    let bytes = latencies.len() as f64 * cell.block_bytes as f64;
    Ok(Run {
        bytes_per_second: bytes / elapsed.as_secs_f64(),
        p50_us: percentile(50),
        p99_us: percentile(99),
        cpu_seconds_per_gb: cpu.as_secs_f64() / (bytes / 1e9),
    })
}

/// User and system time of all threads of this process, the kernel's workers for it included.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
