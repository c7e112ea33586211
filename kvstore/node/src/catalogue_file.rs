//! The catalogue on disk: one small file, replaced as a whole.
//!
//! ```text
//! | at | size | field                                   |
//! |----|------|-----------------------------------------|
//! |  0 |  4   | magic `KVC1` (the digit is the version) |
//! |  4 |  4   | crc32 of the snapshot, little-endian    |
//! |  8 |  8   | bytes of the snapshot, little-endian    |
//! | 16 |  n   | snapshot of the state machine (JSON)    |
//! ```
//! Written to a temporary file, synced, renamed over the old one, and the folder synced: after a power cut either the old
//! or the new catalogue is there. Until raft arrives this is what stands behind the state-machine trait.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use kvkeep_core::{Error, ErrorKind, Result};

const MAGIC: &[u8; 4] = b"KVC1";
const HEADER_BYTES: usize = 16;
/// Largest catalogue that is read, in bytes.
const SNAPSHOT_BYTES_MAX: u64 = 256 << 20;

/// The file.
pub struct CatalogueFile {
    path: PathBuf,
}

impl CatalogueFile {
    /// In this folder.
    pub fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join("catalogue") }
    }

    /// The snapshot that was stored last; `None` where none ever was.
    pub fn load(&self) -> Result<Option<Vec<u8>>> {
        let io = |e: io::Error| {
            Error::new(ErrorKind::Io, "the catalogue cannot be read").with("path", self.path.display()).with("cause", e)
        };
        match fs::metadata(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
            Ok(m) if m.len() > SNAPSHOT_BYTES_MAX => return Err(self.corrupt("it is larger than any catalogue")),
            Ok(_) => {}
        }
        self.decode(&fs::read(&self.path).map_err(io)?).map(Some)
    }

    fn decode(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let (head, snapshot) =
            bytes.split_at_checked(HEADER_BYTES).ok_or_else(|| self.corrupt("it is shorter than its header"))?;
        if &head[..4] != MAGIC {
            return Err(self.corrupt("its magic is not KVC1: another file, or a newer version"));
        }
        let number = |at: usize| {
            let mut b = [0; 4];
            b.copy_from_slice(&head[at..at + 4]);
            u32::from_le_bytes(b)
        };
        let len = u64::from(number(8)) | u64::from(number(12)) << 32;
        if len != snapshot.len() as u64 || number(4) != crc32fast::hash(snapshot) {
            return Err(self.corrupt("its checksum is wrong"));
        }
        Ok(snapshot.to_vec())
    }

    fn corrupt(&self, why: &'static str) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            "the catalogue is damaged: without it no block can be told from another. Restore it from a backup, or move the \
             data folder away to start empty",
        )
        .with("path", self.path.display())
        .with("why", why)
    }

    /// Stores a snapshot; durable when this returns.
    pub fn store(&self, snapshot: &[u8]) -> Result<()> {
        self.replace(snapshot).map_err(|e| {
            Error::new(ErrorKind::Io, "the catalogue cannot be written")
                .with("path", self.path.display())
                .with("cause", e)
        })
    }

    fn replace(&self, snapshot: &[u8]) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(MAGIC)?;
        file.write_all(&crc32fast::hash(snapshot).to_le_bytes())?;
        file.write_all(&(snapshot.len() as u64).to_le_bytes())?;
        file.write_all(snapshot)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_stored_last_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let file = CatalogueFile::new(dir.path());
        assert_eq!(file.load().unwrap(), None);
        file.store(b"one").unwrap();
        file.store(b"two").unwrap();
        assert_eq!(file.load().unwrap().as_deref(), Some(&b"two"[..]));
    }

    /// Any changed byte of the file is noticed.
    #[test]
    fn a_flipped_bit_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = CatalogueFile::new(dir.path());
        file.store(b"snapshot").unwrap();
        let path = dir.path().join("catalogue");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            assert_eq!(file.load().unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = CatalogueFile::new(Path::new("x")).decode(&bytes);
        }
    }
}
