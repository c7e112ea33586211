//! The one error type of this crate.

use std::fmt;
use std::path::{Path, PathBuf};

/// What kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Another process, or another part of this one, has the folder open.
    Busy,
    /// The files are not what was written.
    Corrupt,
    /// A file could not be read, written or synced.
    Io,
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of RocksDB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    doing: &'static str,
    cause: String,
    folder: Option<PathBuf>,
}

impl Error {
    pub(crate) fn new(doing: &'static str, e: &rocksdb::Error) -> Self {
        let kind = match e.kind() {
            rocksdb::ErrorKind::Corruption => ErrorKind::Corrupt,
            _ => ErrorKind::Io,
        };
        Self { kind, doing, cause: e.to_string(), folder: None }
    }

    pub(crate) fn opening(folder: &Path, e: &rocksdb::Error) -> Self {
        let mut error = Self { folder: Some(folder.into()), ..Self::new("open", e) };
        // RocksDB gives its LOCK file no code of its own.
        if e.kind() == rocksdb::ErrorKind::IOError && e.as_ref().contains("LOCK") {
            error.kind = ErrorKind::Busy;
        }
        error
    }

    /// What kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// RocksDB's own words.
    pub fn cause(&self) -> &str {
        &self.cause
    }

    /// Whether trying again, unchanged, can help: only where somebody else has the folder. A write or a sync that failed is
    /// never retried, for nobody knows what it left.
    pub fn is_retryable(&self) -> bool {
        self.kind == ErrorKind::Busy
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RocksDB failed to {}: {}", self.doing, self.cause)?;
        match &self.folder {
            Some(folder) => write!(f, " (folder={})", folder.display()),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}
