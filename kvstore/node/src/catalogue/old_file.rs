//! Where the catalogue was before it came into raft group 0: one file, `DATA/catalogue`. It is read once, becomes the group's
//! first state, and is put aside as `catalogue.before-raft` when that is durable. A crash in between changes nothing: while
//! there is no group the file is read again, and once there is one it is only put aside.
//!
//! ```text
//! | at | size | field                                   |
//! |----|------|-----------------------------------------|
//! |  0 |  4   | magic `KVC1` (the digit is the version) |
//! |  4 |  4   | crc32 of the snapshot, little-endian    |
//! |  8 |  8   | bytes of the snapshot, little-endian    |
//! | 16 |  n   | snapshot (JSON)                         |
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use kvkeep_core::catalogue::Parts;
use kvkeep_core::{Error, ErrorKind, Result};

const MAGIC: &[u8; 4] = b"KVC1";
const HEADER_BYTES: usize = 16;
/// Largest old catalogue that is read, in bytes.
const OLD_CATALOGUE_BYTES_MAX: u64 = 256 << 20;

/// The file.
pub struct OldFile {
    path: PathBuf,
}

impl OldFile {
    /// In this folder.
    pub fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join("catalogue") }
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// What it holds; `None` where there is none.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub fn load(&self) -> Result<Option<Parts>> {
        let io = |e: io::Error| {
            Error::new(ErrorKind::Io, "the catalogue cannot be read").with("path", self.path.display()).with("cause", e)
        };
        match fs::metadata(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
            Ok(m) if m.len() > OLD_CATALOGUE_BYTES_MAX => return Err(self.damaged("it is larger than any catalogue")),
            Ok(_) => {}
        }
        self.decode(&fs::read(&self.path).map_err(io)?).map(Some)
    }

    fn decode(&self, bytes: &[u8]) -> Result<Parts> {
        let (head, snapshot) =
            bytes.split_at_checked(HEADER_BYTES).ok_or_else(|| self.damaged("it is shorter than its header"))?;
        if &head[..4] != MAGIC {
            return Err(self.damaged("its magic is not KVC1: another file, or a newer version"));
        }
        let number = |at: usize| {
            let mut b = [0; 4];
            b.copy_from_slice(&head[at..at + 4]);
            u32::from_le_bytes(b)
        };
        let len = u64::from(number(8)) | u64::from(number(12)) << 32;
        if len != snapshot.len() as u64 || number(4) != crc32fast::hash(snapshot) {
            return Err(self.damaged("its checksum is wrong"));
        }
        Parts::from_old_file(snapshot).map_err(|e| self.damaged(e))
    }

    /// The error of a file that cannot be believed.
    pub fn damaged(&self, why: impl std::fmt::Display) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            "the catalogue is damaged: without it no block can be told from another. Restore it from a backup, or move the \
             data folder away to start empty",
        )
        .with("path", self.path.display())
        .with("why", why)
    }

    /// Puts the file aside, if there is one. To be called once the group is durable.
    ///
    /// # Errors
    /// `Io`.
    pub fn retire(&self) -> Result<()> {
        let aside = self.path.with_extension("before-raft");
        let renamed = match fs::rename(&self.path, &aside) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => Err(e),
            Ok(()) => File::open(self.path.parent().unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()),
        };
        renamed.map_err(|e| {
            Error::new(ErrorKind::Io, "the old catalogue cannot be put aside")
                .with("path", self.path.display())
                .with("cause", e)
        })?;
        tracing::info!(old = %aside.display(), "the catalogue is in the raft log now");
        Ok(())
    }
}

/// A file as the last version wrote it.
#[cfg(test)]
pub fn old_file(json: &[u8]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend_from_slice(&crc32fast::hash(json).to_le_bytes());
    file.extend_from_slice(&(json.len() as u64).to_le_bytes());
    file.extend_from_slice(json);
    file
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EMPTY: &[u8] = br#"{"version":1,"secret":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16],"tenants":["default"],"next_namespace":7,"namespaces":[]}"#;

    /// Any changed byte of the file is noticed, and a piece of it is not taken for the whole.
    #[test]
    fn a_flipped_bit_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = OldFile::new(dir.path());
        assert!(file.load().unwrap().is_none() && !file.exists());
        let path = dir.path().join("catalogue");
        let good = old_file(EMPTY);
        fs::write(&path, &good).unwrap();
        assert_eq!(file.load().unwrap().unwrap().next_namespace, 7);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            for bad in [&bad[..], &good[..at]] {
                fs::write(&path, bad).unwrap();
                let e = file.load().unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Corrupt, "byte {at}");
                assert!(e.to_string().contains(&path.display().to_string()), "{e}");
            }
        }
    }

    #[test]
    fn it_is_put_aside_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = OldFile::new(dir.path());
        file.retire().unwrap();
        fs::write(dir.path().join("catalogue"), b"old").unwrap();
        file.retire().unwrap();
        file.retire().unwrap();
        assert!(!file.exists());
        assert_eq!(fs::read(dir.path().join("catalogue.before-raft")).unwrap(), b"old");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = OldFile::new(Path::new("x")).decode(&bytes);
        }
    }
}
