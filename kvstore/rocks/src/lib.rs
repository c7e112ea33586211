//! RocksDB as this house uses it: bounded memory, batches that are whole or not there, a write-ahead log that is written at
//! every batch and synced when asked. The only crate that names `rocksdb`.
//!
//! Read in this order: [`settings`] (what differs from user to user, and the bounds that do not) -> [`database`] (open, get,
//! write, sync, scan) -> [`error`].
//!
//! The promise of a [`Database`] after a power cut: the effect of a prefix of its batches, each whole or not at all, over all
//! families together, and at least of those before the last [`Database::sync`] that answered `Ok`. A user that keeps more
//! than one database has that promise from each, and none across them.

pub mod database;
pub mod error;
pub mod settings;

pub use database::{Batch, Database, Visit};
pub use error::{Error, ErrorKind, Result};
pub use settings::{Family, Settings};
