//! Tiers: where a block's bytes are, and how they move.
//!
//! Read in this order: [`io`] (buffers, the disk seam and its engines) -> [`dram`] (L2: the arena) -> [`nvme`] (L3:
//! segments and their index).
//!
//! Decisions (what to keep, what to evict) are made in `kvkeep-core` and arrive as plain values. `unsafe` lives in
//! [`io::buf`], `io::uring::ring` and `dram::memory` and nowhere else.

pub mod dram;
pub mod io;
pub mod nvme;
