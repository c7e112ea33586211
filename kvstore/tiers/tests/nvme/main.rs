//! The NVMe store from outside: against a model over an unkind disk, against real files and RocksDB, and fault by fault.
//!
//! `harness`: blocks and rigs. Then one subject per file.

#![expect(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod faults;
mod golden;
mod harness;
mod indexes;
mod model;
mod opening;
mod reads;
mod real;
mod room;
mod syncs;
