//! [`RocksLog`]: the store on RocksDB, a family per table.

use std::path::Path;

use kvkeep_rocks::{Database, Family, Settings};

use super::{Change, LogStore, Table, Visit};
use crate::error::Result;

/// Memory of tables that are being filled, all together, in bytes.
pub const WRITE_BUFFER_BYTES: usize = 64 << 20;
/// Memory of what was read, in bytes. Logs are read at a start and for members that lag.
pub const BLOCK_CACHE_BYTES: usize = 16 << 20;
/// Write-ahead log kept at most before tables are written out, in bytes.
pub const WAL_BYTES_MAX: u64 = 128 << 20;

const SETTINGS: Settings = Settings {
    families: &["log", "state"],
    write_buffer_bytes: WRITE_BUFFER_BYTES,
    block_cache_bytes: BLOCK_CACHE_BYTES,
    wal_bytes_max: WAL_BYTES_MAX,
};

/// All groups of a process in one RocksDB.
pub struct RocksLog(Database);

impl RocksLog {
    /// Opens or makes the store in `folder`.
    ///
    /// # Errors
    /// `Conflict` if it is open elsewhere, `Corrupt` if its files are damaged, `Io` otherwise.
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Self(Database::open(folder, &SETTINGS)?))
    }
}

fn family(table: Table) -> Family {
    match table {
        Table::Meta => Family::DEFAULT,
        Table::Log => Family(1),
        Table::State => Family(2),
    }
}

impl LogStore for RocksLog {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.get(family(table), key)?)
    }

    fn write(&self, changes: &[Change]) -> Result<()> {
        let mut batch = self.0.batch();
        for change in changes {
            match change {
                Change::Put(table, key, value) => batch.put(family(*table), key, value),
                Change::Delete(table, key) => batch.delete(family(*table), key),
                Change::DeleteRange(table, from, to) => batch.delete_range(family(*table), from, to),
            }
        }
        Ok(self.0.write(batch)?)
    }

    fn sync(&self) -> Result<()> {
        Ok(self.0.sync()?)
    }

    fn close(&self) -> Result<()> {
        self.0.sync()?;
        Ok(self.0.flush()?)
    }

    fn scan(&self, table: Table, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        Ok(self.0.scan(family(table), from, visit)?)
    }
}
