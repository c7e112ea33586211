//! [`FlushCoordinator`]: one per device. Callers that want their writes durable share device flushes, and the first flush
//! that fails ends all writing.
//!
//! A flush covers the writes that had ended when it began, and no others: a caller that arrives while one is running
//! waits for the next, which then covers everyone who has arrived meanwhile. So at any time a file has one flush running
//! and at most one to come, however many wait.
//!
//! After a failed fsync the kernel takes the lost pages for clean, and the next fsync succeeds without having saved them
//! ("fsyncgate"). So a failure is not retried: the device is **poisoned** until it is opened again and what it holds has
//! been checked. Reads go on.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvkeep_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use tokio::sync::Mutex as Turn;

use super::buf::{IoBuf, Region};
use super::disk::{Disk, EngineInfo, FileId, Flush, Io, Io2, Registration, Space};
use super::file::FLUSH_FAILED;

/// A [`Disk`] whose flushes are shared and whose failures stick.
pub struct FlushCoordinator<D: Disk> {
    shared: Arc<Shared<D>>,
}

struct Shared<D> {
    disk: D,
    poisoned: AtomicBool,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    states: HashMap<FileId, Arc<FileState>>,
    /// So that a removed file takes its state along.
    names: HashMap<String, FileId>,
}

#[derive(Default)]
struct FileState {
    /// Writes that have ended, successfully or not, or whose caller has gone.
    ended: AtomicU64,
    /// Who holds it drives the flush; the others queue here.
    turn: Turn<Progress>,
}

#[derive(Default)]
struct Progress {
    /// `ended` when the last flush that succeeded began. None yet: what a previous process wrote may need one.
    covered: Option<u64>,
    /// A flush under way, and `ended` when it began. It stays here, not in a caller's future, so that its answer is heard
    /// even if the caller that began it goes away: the kernel tells of a lost page only once.
    running: Option<(u64, Flush)>,
}

impl<D: Disk> FlushCoordinator<D> {
    /// Coordinates the flushes of `disk`.
    pub fn new(disk: D) -> Self {
        Self { shared: Arc::new(Shared { disk, poisoned: AtomicBool::new(false), files: Mutex::default() }) }
    }

    /// The disk below. Writes and flushes that go there directly are not seen here.
    pub fn inner(&self) -> &D {
        &self.shared.disk
    }
}

impl<D: Disk> Shared<D> {
    fn file(&self, file: FileId) -> Arc<FileState> {
        Arc::clone(self.files.lock().states.entry(file).or_default())
    }

    fn enter(&self, name: &str, file: FileId) {
        self.files.lock().names.insert(name.to_owned(), file);
    }

    fn check(&self) -> io::Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "a flush of this device failed: it takes no more writes until it is opened again",
            ));
        }
        Ok(())
    }

    fn check_kept(&self) -> Result<()> {
        self.check().map_err(|e| Error::new(ErrorKind::Io, "device is poisoned").with("cause", e))
    }

    /// Making and removing files flushes too, and such a failure poisons like any other.
    fn hear<T>(&self, changed: Result<T>) -> Result<T> {
        changed.inspect_err(|error| {
            if error.message() == FLUSH_FAILED {
                self.poison(error);
            }
        })
    }

    fn poison(&self, error: &dyn fmt::Display) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            tracing::error!(%error, "a flush failed: the device takes no more writes; reads go on");
            metrics::counter!("kvkeep_device_poisoned_total").increment(1);
        }
    }

    async fn flush(&self, file: FileId) -> io::Result<()> {
        let state = self.file(file);
        let wanted = state.ended.load(Ordering::Acquire);
        let mut progress = state.turn.lock().await;
        // At most two rounds: the one that was running when we came, which may not cover us, and our own.
        loop {
            self.check()?;
            if progress.running.is_none() {
                if progress.covered.is_some_and(|covered| covered >= wanted) {
                    return Ok(());
                }
                progress.running = Some((state.ended.load(Ordering::Acquire), self.disk.flush(file)));
            }
            if let Some((begun, flush)) = &mut progress.running {
                let (begun, result) = (*begun, flush.await);
                progress.running = None;
                match result {
                    Ok(()) => progress.covered = Some(begun),
                    Err(e) => {
                        self.poison(&e);
                        return Err(e);
                    }
                }
            }
        }
    }
}

/// Counts a write as ended when it has ended, or when nobody is left who could claim it.
struct Writing(Arc<FileState>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
    }
}

impl<D: Disk> Disk for FlushCoordinator<D> {
    fn create(&self, name: &str, bytes: u64) -> Result<FileId> {
        self.shared.check_kept()?;
        let file = self.shared.hear(self.shared.disk.create(name, bytes))?;
        self.shared.enter(name, file);
        Ok(file)
    }

    fn open(&self, name: &str) -> Result<(FileId, u64)> {
        let (file, bytes) = self.shared.disk.open(name)?;
        self.shared.enter(name, file);
        Ok((file, bytes))
    }

    fn list(&self) -> Result<Vec<(String, u64)>> {
        self.shared.disk.list()
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.shared.check_kept()?;
        self.shared.hear(self.shared.disk.remove(name))?;
        let mut files = self.shared.files.lock();
        if let Some(file) = files.names.remove(name) {
            files.states.remove(&file);
        }
        Ok(())
    }

    fn read(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        self.shared.disk.read(file, offset, buf)
    }

    fn write(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if let Err(e) = shared.check() {
                return (buf, Err(e));
            }
            let _ends = Writing(shared.file(file));
            shared.disk.write(file, offset, buf).await
        })
    }

    fn write2(&self, file: FileId, offset: u64, head: IoBuf, body: IoBuf) -> Io2 {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if let Err(e) = shared.check() {
                return (head, body, Err(e));
            }
            let _ends = Writing(shared.file(file));
            shared.disk.write2(file, offset, head, body).await
        })
    }

    fn flush(&self, file: FileId) -> Flush {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.flush(file).await })
    }

    fn space(&self) -> Result<Space> {
        self.shared.disk.space()
    }

    fn engine(&self) -> EngineInfo {
        self.shared.disk.engine()
    }

    fn register(&self, index: u16, region: Region) -> Registration {
        self.shared.disk.register(index, region)
    }

    fn unregister(&self, index: u16) {
        self.shared.disk.unregister(index);
    }

    fn is_poisoned(&self) -> bool {
        self.shared.poisoned.load(Ordering::Acquire)
    }
}
