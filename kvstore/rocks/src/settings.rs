//! What differs from database to database, and the bounds that are the same for all.

/// Open files of one database.
pub const OPEN_FILES_MAX: i32 = 512;
/// Threads that write tables out and merge them, for all of RocksDB in this process.
pub const BACKGROUND_JOBS_MAX: i32 = 2;
/// Files of RocksDB's own log that are kept.
pub(crate) const INFO_LOGS_MAX: usize = 4;
/// Bytes of one of them.
pub(crate) const INFO_LOG_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bits of a Bloom filter per key: most look-ups are for keys that are not there.
pub(crate) const BLOOM_BITS: f64 = 10.0;
/// Bytes of one block of a table.
pub(crate) const TABLE_BLOCK_BYTES: usize = 16 * 1024;
/// Bytes that a scan reads ahead.
pub(crate) const SCAN_READAHEAD_BYTES: usize = 4 * 1024 * 1024;

/// A column family: a map of its own under the one write-ahead log. The number is its place in [`Settings::families`],
/// counted from 1; 0 is the one that every database has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family(pub usize);

impl Family {
    /// The one that every database has.
    pub const DEFAULT: Self = Self(0);
}

/// Of one database.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Names of the families beside the default one. Made if missing; a database is opened with all it has.
    pub families: &'static [&'static str],
    /// Memory of tables that are being filled, all families together, in bytes.
    pub write_buffer_bytes: usize,
    /// Memory of blocks, filters and table indexes that were read, in bytes.
    pub block_cache_bytes: usize,
    /// Write-ahead log kept at most before tables are written out, in bytes. Bounds the time of the next start, too.
    pub wal_bytes_max: u64,
}
