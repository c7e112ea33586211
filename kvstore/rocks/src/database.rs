//! [`Database`]: opened in one place, with one set of options.

use std::ops::ControlFlow;
use std::path::Path;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, Options,
    ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use super::error::{Error, Result};
use super::settings::{
    BACKGROUND_JOBS_MAX, BLOOM_BITS, Family, INFO_LOG_BYTES_MAX, INFO_LOGS_MAX, OPEN_FILES_MAX, SCAN_READAHEAD_BYTES,
    Settings, TABLE_BLOCK_BYTES,
};

/// Called with one key and its value, in key order; `Break` ends the scan.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// An ordered map of bytes per family. All calls block.
pub struct Database {
    db: DB,
    write: WriteOptions,
    families: &'static [&'static str],
}

impl Database {
    /// Opens or makes the database in `folder`.
    ///
    /// # Errors
    /// `Busy` if it is open elsewhere, `Corrupt` if its files are damaged, `Io` otherwise. Nothing is repaired by guessing.
    pub fn open(folder: &Path, settings: &Settings) -> Result<Self> {
        let cache = Cache::new_lru_cache(settings.block_cache_bytes);
        let buffers = WriteBufferManager::new_write_buffer_manager(settings.write_buffer_bytes, true);
        let options = options(settings, &cache, &buffers);
        let descriptors = std::iter::once(rocksdb::DEFAULT_COLUMN_FAMILY_NAME)
            .chain(settings.families.iter().copied())
            .map(|name| ColumnFamilyDescriptor::new(name, options.clone()));
        let db = DB::open_cf_descriptors(&options, folder, descriptors).map_err(|e| Error::opening(folder, &e))?;
        let mut write = WriteOptions::default();
        write.set_sync(false);
        Ok(Self { db, write, families: settings.families })
    }

    fn family(&self, family: Family) -> &ColumnFamily {
        let name = match family.0.checked_sub(1) {
            None => rocksdb::DEFAULT_COLUMN_FAMILY_NAME,
            Some(at) => self.families[at],
        };
        self.db.cf_handle(name).expect("every family of the settings was opened or made")
    }

    /// The value of a key.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if RocksDB cannot say.
    pub fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db.get_cf(self.family(family), key).map_err(|e| Error::new("read a key", &e))
    }

    /// An empty batch.
    pub fn batch(&self) -> Batch<'_> {
        let families = (0..=self.families.len()).map(|at| self.family(Family(at))).collect();
        Batch { families, changes: WriteBatch::default() }
    }

    /// Makes all changes, in order, or none. Seen by reads at once, durable after the next sync.
    ///
    /// # Errors
    /// `Io`; then it is unknown whether they were made.
    pub fn write(&self, batch: Batch<'_>) -> Result<()> {
        self.db.write_opt(batch.changes, &self.write).map_err(|e| Error::new("write a batch", &e))
    }

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// `Io`; then it is unknown what is durable, and the caller must not write on.
    pub fn sync(&self) -> Result<()> {
        self.db.flush_wal(true).map_err(|e| Error::new("sync its log", &e))
    }

    /// Writes out everything that only the log holds. What stands in tables is checked whenever it is read; of a damaged log
    /// the next open takes what stands before the damage, for the tail of a log that a crash left looks the same.
    ///
    /// # Errors
    /// `Io`.
    pub fn flush(&self) -> Result<()> {
        (0..=self.families.len())
            .try_for_each(|at| self.db.flush_cf(self.family(Family(at))))
            .map_err(|e| Error::new("write its tables out", &e))
    }

    /// Visits every key from `from` on, in order, as they were when the scan began.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if the database cannot be read to the end.
    pub fn scan(&self, family: Family, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let mut options = ReadOptions::default();
        options.set_readahead_size(SCAN_READAHEAD_BYTES);
        // A scan of everything would push everything else out of the cache.
        options.fill_cache(false);
        // The raw iterator lends keys and values where the other one copies each.
        let mut at = self.db.raw_iterator_cf_opt(self.family(family), options);
        at.seek(from);
        while let Some((key, value)) = at.item() {
            if visit(key, value) == ControlFlow::Break(()) {
                return Ok(());
            }
            at.next();
        }
        at.status().map_err(|e| Error::new("scan", &e))
    }
}

/// Changes that are made together.
pub struct Batch<'a> {
    families: Vec<&'a ColumnFamily>,
    changes: WriteBatch,
}

impl Batch<'_> {
    /// Sets a value.
    pub fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        self.changes.put_cf(self.families[family.0], key, value);
    }

    /// Removes a key; not an error where there is none.
    pub fn delete(&mut self, family: Family, key: &[u8]) {
        self.changes.delete_cf(self.families[family.0], key);
    }

    /// Removes every key from `from` up to and without `to`.
    pub fn delete_range(&mut self, family: Family, from: &[u8], to: &[u8]) {
        self.changes.delete_range_cf(self.families[family.0], from, to);
    }
}

fn options(settings: &Settings, cache: &Cache, buffers: &WriteBufferManager) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_block_size(TABLE_BLOCK_BYTES);
    table.set_bloom_filter(BLOOM_BITS, false);
    table.set_format_version(6);
    // Filters and table indexes grow with the entries; inside the cache they are bounded with everything else.
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);

    let mut o = Options::default();
    o.create_if_missing(true);
    o.create_missing_column_families(true);
    o.set_block_based_table_factory(&table);
    // Digests and keys do not compress; the rest of a value is half zeros, and LZ4 costs less than the I/O it saves.
    o.set_compression_type(DBCompressionType::Lz4);
    o.set_write_buffer_size(settings.write_buffer_bytes / 2);
    o.set_max_write_buffer_number(2);
    o.set_write_buffer_manager(buffers);
    o.set_max_total_wal_size(settings.wal_bytes_max);
    o.set_max_open_files(OPEN_FILES_MAX);
    o.set_max_background_jobs(BACKGROUND_JOBS_MAX);
    o.set_keep_log_file_num(INFO_LOGS_MAX);
    o.set_max_log_file_size(INFO_LOG_BYTES_MAX);
    // A torn tail of the log is what a crash leaves; anything else that is wrong with it is damage, and is refused.
    o.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    o.set_paranoid_checks(true);
    o
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const SETTINGS: Settings = Settings {
        families: &["one"],
        write_buffer_bytes: 4 << 20,
        block_cache_bytes: 1 << 20,
        wal_bytes_max: 8 << 20,
    };

    fn keys(db: &Database, family: Family, from: &[u8]) -> Vec<Vec<u8>> {
        let mut keys = Vec::new();
        db.scan(family, from, &mut |key, _| {
            keys.push(key.to_vec());
            ControlFlow::Continue(())
        })
        .unwrap();
        keys
    }

    #[test]
    fn families_are_maps_of_their_own_in_one_batch() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path(), &SETTINGS).unwrap();
        let mut batch = db.batch();
        for n in 0..4u8 {
            batch.put(Family(1), &[n], b"x");
        }
        batch.put(Family::DEFAULT, b"a", b"y");
        batch.delete_range(Family(1), &[1], &[3]);
        db.write(batch).unwrap();
        db.sync().unwrap();
        db.flush().unwrap();
        drop(db);
        let db = Database::open(dir.path(), &SETTINGS).unwrap();
        assert_eq!(keys(&db, Family(1), &[]), [[0], [3]]);
        assert_eq!(keys(&db, Family::DEFAULT, &[]), [b"a"]);
        assert_eq!(db.get(Family(1), b"a").unwrap(), None);
    }

    #[test]
    fn a_second_opener_is_told_that_the_folder_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Database::open(dir.path(), &SETTINGS).unwrap();
        let e = Database::open(dir.path(), &SETTINGS).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
        assert!(e.is_retryable());
    }
}
