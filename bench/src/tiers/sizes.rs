//! How large a node's tiers are made so that a wanted number of blocks stays in each.
//!
//! DRAM: the arena is larger than the blocks that stay, by the room that one request needs on its way, and eviction ahead
//! of demand (the watermarks, one percent apart) brings what is resident back to the wanted number: the upper end of the
//! watermarks' band is that number. NVMe: it is full at the wanted number, and evicts a batch at a time.

use anyhow::{Context, ensure};

use super::simulate::Blocks;

/// The smallest arena of a node, and NVMe of one.
const ARENA_BYTES_MIN: u64 = 64 << 20;
const NVME_BYTES_MIN: u64 = 64 << 20;
/// What the arena's page is, and NVMe's unit.
const UNIT_BYTES: u64 = 4096;
/// Bytes of a slot's entry in its extent's table.
const SLOT_ENTRY_BYTES: u64 = 256;
/// What an arena's files have beside tables and slots.
const FILE_BYTES: u64 = 64 << 10;
/// Largest share of the arena that watermarks may keep free, percent.
const FREE_PERCENT_MAX: u64 = 74;

/// What a node is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Sizes {
    /// `arena.bytes`.
    pub arena_bytes: u64,
    /// `arena.low_watermark_percent`.
    pub low_watermark_percent: u64,
    /// `arena.high_watermark_percent`.
    pub high_watermark_percent: u64,
    /// `nvme.bytes`.
    pub nvme_bytes: u64,
}

impl Sizes {
    /// For so many blocks of `block_bytes` in each tier, where one request has at most `request` blocks.
    ///
    /// # Errors
    /// The tiers would be smaller than a node's may be.
    pub fn of(room: Blocks, block_bytes: u64, request: usize) -> anyhow::Result<Self> {
        let slot = block_bytes.next_multiple_of(UNIT_BYTES);
        let kept = room.dram as u64 * slot + FILE_BYTES;
        // Extents are carved whole, so that the tables of all slots are there.
        let tables = SLOT_ENTRY_BYTES as f64 / (slot + SLOT_ENTRY_BYTES) as f64;
        let arena = |free: u64| (kept as f64 / (1.0 - free as f64 / 100.0 - tables)) as u64;
        // Another request's worth comes in before anything has to leave, and its reads and reservations need some more.
        let passing = request as u64 * slot * 5 / 4;
        let low = (1..FREE_PERCENT_MAX).find(|free| {
            let arena = arena(*free);
            arena >= ARENA_BYTES_MIN && arena / 100 * free >= passing.min(kept)
        });
        let low = low.context("so few blocks do not fit the smallest arena: choose larger blocks (--block-bytes)")?;
        // A block of 16 KiB has a header page of its own.
        let nvme_bytes = room.nvme as u64 * (slot + UNIT_BYTES);
        ensure!(
            nvme_bytes >= NVME_BYTES_MIN,
            "{} blocks are less than the smallest NVMe tier: choose larger blocks (--block-bytes)",
            room.nvme
        );
        Ok(Self {
            arena_bytes: arena(low).next_multiple_of(UNIT_BYTES),
            low_watermark_percent: low,
            high_watermark_percent: low + 1,
            nvme_bytes: nvme_bytes.next_multiple_of(UNIT_BYTES),
        })
    }

    /// The node's configuration file.
    pub fn toml(&self) -> String {
        format!(
            "[arena]\nbytes = {}\nlow_watermark_percent = {}\nhigh_watermark_percent = {}\n\n[nvme]\nbytes = {}\n",
            self.arena_bytes, self.low_watermark_percent, self.high_watermark_percent, self.nvme_bytes
        )
    }

    /// Free bytes of the arena from which on it evicts nothing ahead of demand.
    pub fn free_bytes(&self) -> u64 {
        self.arena_bytes / 100 * self.low_watermark_percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 16 << 10;

    #[test]
    fn the_wanted_blocks_fill_the_arena_up_to_the_watermark() {
        for (dram, request) in [(1839, 244), (1831, 1747), (100_000, 300)] {
            let sizes = Sizes::of(Blocks { dram, nvme: 100_000 }, BLOCK, request).unwrap();
            let tables = sizes.arena_bytes / (BLOCK + SLOT_ENTRY_BYTES) * SLOT_ENTRY_BYTES;
            let blocks = (sizes.arena_bytes - sizes.free_bytes() - tables - FILE_BYTES) / BLOCK;
            assert!(blocks.abs_diff(dram as u64) <= dram as u64 / 200 + 1, "{blocks} for {dram}: {sizes:?}");
            assert!(sizes.arena_bytes >= ARENA_BYTES_MIN && sizes.high_watermark_percent <= 75);
            assert!(sizes.free_bytes() >= (request as u64 * BLOCK).min(dram as u64 * BLOCK));
        }
    }

    #[test]
    fn tiers_below_a_nodes_smallest_are_refused() {
        assert!(Sizes::of(Blocks { dram: 10, nvme: 100_000 }, BLOCK, 10).is_err());
        assert!(Sizes::of(Blocks { dram: 2000, nvme: 10 }, BLOCK, 10).is_err());
    }
}
