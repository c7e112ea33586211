//! [`RocksIndex`]: the index on RocksDB.

use std::path::Path;

use kvkeep_core::error::{Error, ErrorKind, Result};
use kvkeep_rocks::{Database, Family, Settings};

use super::index::{Change, Index, Visit};

/// Memory of tables that are being filled, all together, in bytes.
pub const WRITE_BUFFER_BYTES: usize = 64 * 1024 * 1024;
/// Memory of blocks, filters and table indexes that were read, in bytes.
pub const BLOCK_CACHE_BYTES: usize = 64 * 1024 * 1024;
/// Write-ahead log kept at most before tables are written out, in bytes. Bounds the time of the next start, too.
pub const WAL_BYTES_MAX: u64 = 256 * 1024 * 1024;

const SETTINGS: Settings = Settings {
    families: &[],
    write_buffer_bytes: WRITE_BUFFER_BYTES,
    block_cache_bytes: BLOCK_CACHE_BYTES,
    wal_bytes_max: WAL_BYTES_MAX,
};

/// RocksDB with bounded memory and a write-ahead log that is written at every batch and synced when asked.
pub struct RocksIndex(Database);

impl RocksIndex {
    /// Opens or makes the database in `folder`.
    ///
    /// # Errors
    /// `Conflict` if another process has it open, `Corrupt` if its files are damaged, `Io` otherwise. A damaged index is
    /// never repaired by guessing: removing the folder gives up the blocks of this device and nothing else.
    pub fn open(folder: &Path) -> Result<Self> {
        Database::open(folder, &SETTINGS).map(Self).map_err(|e| {
            let message = match e.kind() {
                kvkeep_rocks::ErrorKind::Busy => "another process has this nvme index open",
                _ => "cannot open the nvme index; without its folder the device starts empty",
            };
            error(message, &e).with("folder", folder.display())
        })
    }
}

fn error(message: &'static str, e: &kvkeep_rocks::Error) -> Error {
    let kind = match e.kind() {
        kvkeep_rocks::ErrorKind::Busy => ErrorKind::Conflict,
        kvkeep_rocks::ErrorKind::Corrupt => ErrorKind::Corrupt,
        kvkeep_rocks::ErrorKind::Io => ErrorKind::Io,
    };
    Error::new(kind, message).with("rocksdb", e.cause())
}

impl Index for RocksIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.0.get(Family::DEFAULT, key).map_err(|e| error("cannot read the nvme index", &e))
    }

    fn write(&self, batch: &[Change]) -> Result<()> {
        let mut rocks = self.0.batch();
        for change in batch {
            match change {
                Change::Put(key, value) => rocks.put(Family::DEFAULT, key, value),
                Change::Delete(key) => rocks.delete(Family::DEFAULT, key),
            }
        }
        self.0.write(rocks).map_err(|e| error("cannot write the nvme index", &e))
    }

    fn sync(&self) -> Result<()> {
        self.0.sync().map_err(|e| error("cannot sync the log of the nvme index", &e))
    }

    fn scan(&self, from: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.0.scan(Family::DEFAULT, from, visit).map_err(|e| error("cannot scan the nvme index", &e))
    }
}
