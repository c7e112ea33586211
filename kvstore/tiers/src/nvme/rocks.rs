//! [`RocksIndex`]: the index on RocksDB. The one place that opens it.

use std::ops::ControlFlow;
use std::path::Path;

use kvkeep_core::error::{Error, ErrorKind, Result};
use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use super::index::{Change, Index, Visit};

/// Memory of tables that are being filled, all together, in bytes.
pub const WRITE_BUFFER_BYTES: usize = 64 * 1024 * 1024;
/// Memory of blocks, filters and table indexes that were read, in bytes.
pub const BLOCK_CACHE_BYTES: usize = 64 * 1024 * 1024;
/// Write-ahead log kept at most before tables are written out, in bytes. Bounds the time of the next start, too.
pub const WAL_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Open files.
pub const OPEN_FILES_MAX: i32 = 512;
/// Threads that write tables out and merge them, for all of RocksDB in this process.
pub const BACKGROUND_JOBS_MAX: i32 = 2;
/// Files of RocksDB's own log that are kept.
const INFO_LOGS_MAX: usize = 4;
/// Bytes of one of them.
const INFO_LOG_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bits of a Bloom filter per key: a put asks whether its block is here already, and mostly it is not.
const BLOOM_BITS: f64 = 10.0;
/// Bytes that a scan reads ahead.
const SCAN_READAHEAD_BYTES: usize = 4 * 1024 * 1024;

/// RocksDB with bounded memory and a write-ahead log that is written at every batch and synced when asked.
pub struct RocksIndex {
    db: DB,
    write: WriteOptions,
}

impl RocksIndex {
    /// Opens or makes the database in `folder`.
    ///
    /// # Errors
    /// `Conflict` if another process has it open, `Corrupt` if its files are damaged, `Io` otherwise. A damaged index is
    /// never repaired by guessing: removing the folder gives up the blocks of this device and nothing else.
    pub fn open(folder: &Path) -> Result<Self> {
        let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&cache);
        table.set_block_size(16 * 1024);
        table.set_bloom_filter(BLOOM_BITS, false);
        table.set_format_version(6);
        // Filters and table indexes grow with the entries; inside the cache they are bounded with everything else.
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);

        let mut o = Options::default();
        o.create_if_missing(true);
        o.set_block_based_table_factory(&table);
        // Digests and keys do not compress; the rest of a value is half zeros, and LZ4 costs less than the I/O it saves.
        o.set_compression_type(DBCompressionType::Lz4);
        o.set_write_buffer_size(WRITE_BUFFER_BYTES / 2);
        o.set_max_write_buffer_number(2);
        o.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager(WRITE_BUFFER_BYTES, true));
        o.set_max_total_wal_size(WAL_BYTES_MAX);
        o.set_max_open_files(OPEN_FILES_MAX);
        o.set_max_background_jobs(BACKGROUND_JOBS_MAX);
        o.set_keep_log_file_num(INFO_LOGS_MAX);
        o.set_max_log_file_size(INFO_LOG_BYTES_MAX);
        // A torn tail of the log is what a crash leaves; anything else that is wrong with it is damage, and is refused.
        o.set_wal_recovery_mode(rocksdb::DBRecoveryMode::PointInTime);
        o.set_paranoid_checks(true);

        let db = DB::open(&o, folder).map_err(|e| {
            let e = match e.kind() {
                // RocksDB gives its LOCK file no code of its own.
                rocksdb::ErrorKind::IOError if e.as_ref().contains("LOCK") => {
                    Error::new(ErrorKind::Conflict, "another process has this nvme index open").with("rocksdb", e)
                }
                _ => error("cannot open the nvme index; without its folder the device starts empty", &e),
            };
            e.with("folder", folder.display())
        })?;
        let mut write = WriteOptions::default();
        write.set_sync(false);
        Ok(Self { db, write })
    }
}

fn error(message: &'static str, e: &rocksdb::Error) -> Error {
    let kind = match e.kind() {
        rocksdb::ErrorKind::Corruption => ErrorKind::Corrupt,
        _ => ErrorKind::Io,
    };
    Error::new(kind, message).with("rocksdb", e)
}

impl Index for RocksIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db.get(key).map_err(|e| error("cannot read the nvme index", &e))
    }

    fn write(&self, batch: &[Change]) -> Result<()> {
        let mut rocks = WriteBatch::default();
        for change in batch {
            match change {
                Change::Put(key, value) => rocks.put(key, value),
                Change::Delete(key) => rocks.delete(key),
            }
        }
        self.db.write_opt(rocks, &self.write).map_err(|e| error("cannot write the nvme index", &e))
    }

    fn sync(&self) -> Result<()> {
        self.db.flush_wal(true).map_err(|e| error("cannot sync the log of the nvme index", &e))
    }

    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let mut options = ReadOptions::default();
        options.set_readahead_size(SCAN_READAHEAD_BYTES);
        // A scan of everything would push everything else out of the cache.
        options.fill_cache(false);
        // The raw iterator lends keys and values where the other one copies each.
        let mut at = self.db.raw_iterator_opt(options);
        at.seek(from);
        while let Some((key, value)) = at.item() {
            if visit(key, value) == ControlFlow::Break(()) {
                return Ok(());
            }
            at.next();
        }
        at.status().map_err(|e| error("cannot scan the nvme index", &e))
    }
}
