//! What the policy has learned, in the file `DATA/policy`: written now and then and at a clean stop, read at the start.
//!
//! A hint, never a truth: the bytes carry their own version and sum, and a file that is missing or damaged costs minutes of
//! learning and nothing else.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvkeep_core::Directory;

use super::Store;

/// Between two writes: how much of what was learned a crash may cost.
const SAVE_EVERY: Duration = Duration::from_secs(300);
/// Between two looks whether it is time to learn. Short, for a replay that is faster than the clock.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Largest file that is read; what is written is a few hundred KiB.
const BYTES_MAX: u64 = 16 << 20;

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("policy")
}

/// Lets a directory begin with what the last life learned.
pub(super) fn load(data_dir: &Path, directory: &mut Directory) {
    let path = path(data_dir);
    // Of a write that a crash cut off, mostly not there.
    let _ = fs::remove_file(path.with_extension("new"));
    let Ok(file) = File::open(&path) else { return };
    let mut bytes = Vec::new();
    let read = file.take(BYTES_MAX).read_to_end(&mut bytes);
    if read.is_err() || !directory.load_learned(&bytes) {
        tracing::warn!(path = %path.display(), "what the policy had learned is not readable: it begins with nothing");
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    File::create(&new)?.write_all(bytes)?;
    fs::rename(&new, path)
}

impl Store {
    /// Writes what the policy has learned; the old file or the new one is there.
    pub(super) fn save_learned(&self) {
        let bytes = self.directory.lock().learned();
        if bytes.is_empty() {
            return;
        }
        let path = path(&self.config.data_dir);
        if let Err(error) = write(&path, &bytes) {
            tracing::warn!(path = %path.display(), %error, "what the policy has learned was not written");
        }
    }

    /// Lets the policy learn when it is time to, beside the calls: they wait for the copy of what was observed at most.
    pub(super) async fn learn(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let Some(fit) = self.directory.lock().begin_fit() else { continue };
            if let Ok(fitted) = tokio::task::spawn_blocking(move || fit.run()).await {
                self.directory.lock().end_fit(fitted);
            }
        }
    }

    /// Writes it now and then.
    pub(super) async fn keep_learned(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(SAVE_EVERY) => {}
            }
            let store = Arc::clone(&self);
            // It ends with the file written or a warning; nothing depends on it.
            let _ = tokio::task::spawn_blocking(move || store.save_learned()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use kvkeep_core::{DirectoryLimits, PolicyKind};

    use super::*;

    fn directory() -> Directory {
        Directory::new(DirectoryLimits::default(), PolicyKind::Sage)
    }

    /// Written, read, damaged, cut off, absent: only the first begins with anything, and none is an error.
    #[test]
    fn a_readable_file_is_read_and_any_other_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        load(folder.path(), &mut directory());
        let good = directory().learned();
        write(&path, &good).unwrap();
        assert_eq!(fs::read(&path).unwrap(), good);
        assert!(!path.with_extension("new").exists());
        assert!(directory().load_learned(&fs::read(&path).unwrap()));
        let mut bad = good.clone();
        bad[100] ^= 1;
        for bytes in [&bad[..], &good[..50], b"", b"not this"] {
            write(&path, bytes).unwrap();
            let mut fresh = directory();
            load(folder.path(), &mut fresh);
            assert_eq!(fresh.learned(), good, "what nothing was learned by");
        }
    }
}
