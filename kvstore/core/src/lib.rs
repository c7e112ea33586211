//! The words and the decisions of KVKeep, and nothing that touches the outside world.
//!
//! Read in this order: [`ids`] (names that must not be swapped) -> [`format`](mod@format) (how the KV of one model
//! looks) -> [`words`] (tiers, classes, statuses, reasons) -> [`block`] (what is known of a stored block) -> [`checksum`]
//! -> [`error`]. Then the decisions: [`catalogue`] (tenants, namespaces, revisions) -> [`directory`] (what is where, what
//! matches, what goes next; `policy` orders it) -> [`lease`] (what stays readable) -> [`history`] (why something is absent)
//! -> [`events`] (what watchers are told). And the steps that processes take side by side: [`call_word`] (whose memory it is
//! while a call is under way), [`slot_entry`] (whether a slot is still the block's that was read), [`holds`] (which slots are
//! kept for readers). [`size`] reads and writes numbers of bytes.
//!
//! This crate does no I/O, starts no thread, reads no clock (time is passed in as [`ids::Instant`]) and knows neither
//! RocksDB, tonic, tokio nor CUDA, directly or through anything else; `tests/tests/rooms.rs` asserts it.

pub mod block;
pub mod call_word;
pub mod catalogue;
pub mod checksum;
pub mod directory;
pub mod error;
pub mod events;
pub mod format;
pub mod history;
pub mod holds;
pub mod ids;
pub mod lease;
mod policy;
pub mod session;
pub mod size;
pub mod slot_entry;
pub mod words;

pub use block::{BlockMeta, NvmePlace, SlotRef};
pub use catalogue::{Catalogue, Namespace};
pub use checksum::{ChunkSums, SUM_CHUNK_BYTES};
pub use directory::{Directory, DirectoryLimits, MatchOutcome, Matcher};
pub use error::{Error, ErrorKind, Result};
pub use format::{Format, Group, Rule, SizeRule, Topology};
pub use ids::{
    BlockId, Digest, DigestKey, GroupId, Handle, InstanceId, Instant, Key, KeyDomain, LeaseId, NamespaceId, RequestId,
    Revision, ShardId, TenantId, Version,
};
pub use lease::{LeaseAsk, LeaseInfo, LeaseLimits};
pub use words::{
    Class, EventKind, Fidelity, Happening, Hint, Keeper, MissReason, PartStatus, PolicyKind, Priority, RequestInfo,
    RequestKind, Tier,
};
