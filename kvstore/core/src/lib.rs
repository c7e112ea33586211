//! The words and the decisions of KVKeep, and nothing that touches the outside world.
//!
//! Read in this order: [`ids`] (names that must not be swapped) -> [`format`](mod@format) (how the KV of one model
//! looks) -> [`words`] (tiers, classes, statuses, reasons) -> [`block`] (what is known of a stored block) -> [`checksum`] -> [`error`].
//!
//! This crate does no I/O, starts no thread, reads no clock (time is passed in as [`ids::Instant`]) and knows neither
//! RocksDB, tonic, tokio nor CUDA, directly or through anything else; `tests/tests/rooms.rs` asserts it.

pub mod block;
pub mod checksum;
pub mod error;
pub mod format;
pub mod ids;
pub mod words;

pub use block::{BlockMeta, NvmePlace, SlotRef};
pub use checksum::{ChunkSums, SUM_CHUNK_BYTES};
pub use error::{Error, ErrorKind, Result};
pub use format::{Format, Group, Rule, SizeRule, Topology};
pub use ids::{
    BlockId, Digest, DigestKey, GroupId, Handle, InstanceId, Instant, Key, KeyDomain, LeaseId, NamespaceId, RequestId,
    Revision, ShardId, TenantId, Version,
};
pub use words::{Class, Fidelity, MissReason, PartStatus, RequestInfo, RequestKind, Tier};
