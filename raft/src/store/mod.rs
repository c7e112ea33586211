//! [`LogStore`]: the seam between raft and the disk. One store holds all groups of a process.
//!
//! [`rocks`] is the real one, [`mem`] forgets what was not synced. What is written into them is drawn in [`crate::format`];
//! the store knows bytes only, so both hold the same.

pub mod mem;
pub mod rocks;

use std::ops::ControlFlow;

use crate::error::Result;

/// An ordered map of its own within the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// The store's own record, hard states and starts of logs.
    Meta,
    /// Entries.
    Log,
    /// What state machines keep, and how far each has applied.
    State,
}

/// One change of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a value.
    Put(Table, Vec<u8>, Vec<u8>),
    /// Removes a key; not an error where there is none.
    Delete(Table, Vec<u8>),
    /// Removes every key from the first up to and without the second.
    DeleteRange(Table, Vec<u8>, Vec<u8>),
}

/// Called with one key and its value, in key order; `Break` ends the scan.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// An ordered map of bytes per table with one write-ahead log. All calls block.
///
/// The promise: after a power cut the store holds the effect of a prefix of the batches written, each whole or not at all, and
/// at least of those before the last [`LogStore::sync`] that answered `Ok`.
pub trait LogStore: Send + Sync {
    /// The value of a key.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if the store cannot say.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Makes all changes, in order, or none. Seen by reads at once, durable after the next sync.
    ///
    /// # Errors
    /// `Io`; then it is unknown whether they were made, and the caller must not write on.
    fn write(&self, changes: &[Change]) -> Result<()>;

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// `Io`; then it is unknown what is durable, and the caller must not write on.
    fn sync(&self) -> Result<()>;

    /// The last call of a life: makes everything durable, in the form in which damage is found best.
    ///
    /// # Errors
    /// `Io`.
    fn close(&self) -> Result<()> {
        self.sync()
    }

    /// Visits every key of a table from `from` on, in order, as they were at one moment.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if the table cannot be read to the end.
    fn scan(&self, table: Table, from: &[u8], visit: &mut Visit<'_>) -> Result<()>;
}
