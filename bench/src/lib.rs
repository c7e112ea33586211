//! `kvkeep-bench`: load, trace replay with every byte verified, the main job, and paired comparisons.
//!
//! The commands: [`replay`] (a workload through the real API) -> [`main_job`] (what `make run` runs: a replay with the node
//! killed half-way) -> [`load`] (closed and open loop) -> [`grpc`] (against a bare service) -> [`matching`] (cost of match)
//! -> [`sessions`] (what appends and restores cost) -> [`peers`] (beside other stores and plain references) -> [`device`] (NVMe into a region, beside fio) -> [`policy`] (what
//! eviction policies would keep) -> [`tiers`] (what DRAM and NVMe serve, simulated and live) ->
//! [`background`] (what gets feel of the node's work behind them).
//! What they stand on: [`trace`] (workloads), [`block_bytes`] and [`keys`] (bytes and names made from ids), [`measure`]
//! (histograms, CPU, load), [`progress`], [`units`], [`node`] (starting and killing `kvkeepd`), `fio`.
//!
//! Every JSON names its schema and version. Timings are reported, never asserted.

pub mod background;
pub mod block_bytes;
pub mod device;
mod fio;
pub mod grpc;
pub mod keys;
pub mod load;
pub mod main_job;
pub mod matching;
pub mod measure;
pub mod node;
pub mod peers;
pub mod policy;
pub mod progress;
pub mod replay;
pub mod sessions;
pub mod tiers;
pub mod trace;
pub mod units;
