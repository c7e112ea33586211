//! How fast tiers have been lately, for the estimate of a load.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Assumed before anything was measured, bytes per second.
const DRAM_BYTES_PER_S: u64 = 4_000_000_000;
/// Assumed before anything was measured, bytes per second.
const NVME_BYTES_PER_S: u64 = 1_000_000_000;
/// A new reading counts for 1/8.
const SHIFT: u32 = 3;

/// Moving averages, bytes per second.
#[derive(Debug)]
pub struct Rates {
    dram: AtomicU64,
    nvme: AtomicU64,
}

impl Default for Rates {
    fn default() -> Self {
        Self { dram: AtomicU64::new(DRAM_BYTES_PER_S), nvme: AtomicU64::new(NVME_BYTES_PER_S) }
    }
}

impl Rates {
    /// A get moved so many bytes of DRAM hits in so long.
    pub fn dram_moved(&self, bytes: u64, took: Duration) {
        note(&self.dram, bytes, took);
    }

    /// A get moved so many bytes of NVMe hits in so long.
    pub fn nvme_moved(&self, bytes: u64, took: Duration) {
        note(&self.nvme, bytes, took);
    }

    /// Estimated time to load so much, with `reads_ahead` reads of about a MiB queued before it, microseconds.
    pub fn load_us(&self, dram_bytes: u64, nvme_bytes: u64, reads_ahead: u64) -> u64 {
        let us = |bytes: u64, rate: u64| (u128::from(bytes) * 1_000_000 / u128::from(rate.max(1))) as u64;
        let queued = if nvme_bytes > 0 { reads_ahead << 20 } else { 0 };
        us(dram_bytes, self.dram.load(Ordering::Relaxed)) + us(nvme_bytes + queued, self.nvme.load(Ordering::Relaxed))
    }

    /// (DRAM, NVMe), bytes per second.
    pub fn read(&self) -> (u64, u64) {
        (self.dram.load(Ordering::Relaxed), self.nvme.load(Ordering::Relaxed))
    }
}

fn note(average: &AtomicU64, bytes: u64, took: Duration) {
    // Small reads measure latency, not the rate.
    if bytes < 256 * 1024 || took.is_zero() {
        return;
    }
    let now = (bytes as f64 / took.as_secs_f64()) as u64;
    let old = average.load(Ordering::Relaxed);
    average.store(old - (old >> SHIFT) + (now >> SHIFT), Ordering::Relaxed);
}
