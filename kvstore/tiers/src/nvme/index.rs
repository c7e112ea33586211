//! [`Index`]: the seam between the store and what remembers where blocks lie.

use std::ops::ControlFlow;

use kvkeep_core::error::Result;

/// One change of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a value.
    Put(Vec<u8>, Vec<u8>),
    /// Removes a key; not an error where there is none.
    Delete(Vec<u8>),
}

impl Change {
    /// The key that changes.
    pub fn key(&self) -> &[u8] {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// Called with one key and its value, in key order; `Break` ends the scan.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// An ordered map of bytes with a write-ahead log. All calls block; only the writer thread of a store changes it.
///
/// The promise, which the conformance suite checks: after a power cut the map holds the effect of a prefix of the batches
/// written, each whole or not at all, and at least of those before the last [`Index::sync`] that answered `Ok`.
pub trait Index: Send + Sync + 'static {
    /// The value of a key.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if the index cannot say.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Makes all changes, in order, or none. Seen by reads at once, durable after the next sync.
    ///
    /// # Errors
    /// `Io`; then it is unknown whether they were made.
    fn write(&self, batch: &[Change]) -> Result<()>;

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// `Io`; then it is unknown what is durable, and the caller must not write on.
    fn sync(&self) -> Result<()>;

    /// Visits every key from `from` on, in order.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if the index cannot be read to the end.
    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<()>;
}
