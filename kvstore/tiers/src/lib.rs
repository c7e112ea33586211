//! Tiers: where a block's bytes are, and how they move.
//!
//! Read in this order: [`io`] (buffers, the disk seam and its engines) -> [`dram`] (L2: the arena) -> [`nvme`] (L3:
//! segments and their index) -> [`region`] (memory of clients).
//! [`copy`] moves bytes around the cache.
//!
//! Decisions (what to keep, what to evict) are made in `kvkeep-core` and arrive as plain values. `unsafe` lives in
//! [`copy`], [`io::buf`], `io::uring::ring`, `dram::memory` and `region::memory` and nowhere else.

pub mod copy;
pub mod dram;
pub mod io;
pub mod nvme;
pub mod region;
