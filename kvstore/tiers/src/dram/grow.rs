//! Files come and go: the folder and its lock, the thread that keeps spares ready, the engine that wants to know.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use kvkeep_core::{Error, ErrorKind, Result};

use super::arena::Shared;
use super::file::ArenaFile;
use super::memory::{Mapping, UNIT_BYTES, effective_uid};
use super::state::{GROW_RETRY, Place, State};
use crate::io::buf::Region;

/// Name of the lock in the folder.
const LOCK_FILE: &str = "lock";

/// An error of the file system, with the path it was about.
pub(super) fn io_error(message: &'static str, path: &Path, error: &io::Error) -> Error {
    Error::new(ErrorKind::Io, message).with("path", path.display()).with("cause", error)
}

/// The folder is ours: no other arena, in this process or another, opens it before every mapping of its files is gone.
pub(super) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Makes the folder where it is missing, checks that it is private, and locks it.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| io_error("cannot make the arena's folder", dir, &e))?;
        let facts = fs::symlink_metadata(dir).map_err(|e| io_error("cannot look at the arena's folder", dir, &e))?;
        if !facts.is_dir() || facts.uid() != effective_uid() {
            return Err(Error::new(ErrorKind::Denied, "the arena's folder must be a folder of this user")
                .with("path", dir.display())
                .with("owner", facts.uid()));
        }
        if facts.mode() & 0o077 != 0 {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
                .map_err(|e| io_error("cannot make the arena's folder private", dir, &e))?;
        }
        let path = dir.join(LOCK_FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| io_error("cannot open the arena's lock", &path, &e))?;
        match file.try_lock() {
            // One that its last owner removed meanwhile locks nobody out.
            Ok(()) if file.metadata().is_ok_and(|m| m.nlink() == 0) => Self::take(dir),
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {
                Err(Error::new(ErrorKind::Conflict, "another server has this arena's folder open")
                    .with("path", dir.display()))
            }
            Err(TryLockError::Error(e)) => Err(io_error("cannot lock the arena's folder", &path, &e)),
        }
    }
}

/// Removes the lock and the folder where nothing else is in it. We hold the lock still: whoever waits for the folder finds
/// its lock gone and makes both anew.
pub(super) fn remove_folder(dir: &Path) {
    if fs::read_dir(dir).is_ok_and(|entries| entries.flatten().all(|e| e.file_name() == LOCK_FILE)) {
        // What stays behind is an empty folder with a lock: no reason to fail a stop.
        let _ = fs::remove_file(dir.join(LOCK_FILE)).and_then(|()| fs::remove_dir(dir));
    }
}

/// One mapped file, as an engine registers it. Holding it keeps the memory mapped.
pub struct FixedRegion(Arc<Mapping>);

impl FixedRegion {
    pub(super) fn new(mapping: &Arc<Mapping>) -> Self {
        Self(Arc::clone(mapping))
    }

    /// Index of the file: what [`FixedBuf`](crate::io::buf::FixedBuf) names. Below 1,024; a new file may take the index of a
    /// removed one.
    pub fn index(&self) -> u16 {
        self.0.index()
    }

    /// Where it starts; page-aligned.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    /// Bytes, at most 1 GiB.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The file as an engine's table of registered buffers takes it.
    pub fn region(&self) -> Region {
        self.0.region()
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An engine that registers the arena's files. Called from one thread at a time, never under the allocator's lock.
pub trait Registrar: Send + Sync {
    /// Registers a file under its index. `false`: not registered (over a limit); its buffers then name no index.
    fn register(&self, region: &FixedRegion) -> bool;

    /// The file is about to be unmapped. No operation uses it any more; when this returns the index stands for nothing.
    fn unregister(&self, index: u16);
}

pub(super) fn set_registrar(shared: &Shared, registrar: Arc<dyn Registrar>) {
    let mut slot = shared.registrar.lock();
    let regions: Vec<FixedRegion> = shared.state.lock().all_files().map(|f| FixedRegion::new(&f.mapping)).collect();
    for region in regions {
        region.0.set_registered(registrar.register(&region));
    }
    *slot = Some(registrar);
}

/// Path of the file with this index.
pub(super) fn path_of(dir: &Path, index: u16) -> PathBuf {
    dir.join(format!("arena-{index:04}.slots"))
}

/// Index of the file with this name.
pub(super) fn index_of(name: &str) -> Option<u16> {
    let digits = name.strip_prefix("arena-")?.strip_suffix(".slots")?;
    (digits.len() == 4).then(|| digits.parse().ok())?
}

/// A number that no other file of this folder had: seeds the checksums of its records.
fn nonce() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // The state is random per process and thread.
    RandomState::new().hash_one((SystemTime::now(), std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
}

enum Job {
    /// Make a file of so many bytes.
    Make(u16, u64),
    /// Remove an empty one.
    Remove(Box<ArenaFile>),
}

fn next_job(state: &mut State, shared: &Shared) -> Option<Job> {
    while let Some(index) = state.doomed.pop() {
        let place = &mut state.files[usize::from(index)];
        match std::mem::replace(place, Place::Absent) {
            Place::Here(file) => {
                *place = Place::Building;
                state.metadata_bytes -= UNIT_BYTES as u64;
                return Some(Job::Remove(file));
            }
            other => *place = other,
        }
    }
    if !state.wants_spare(&shared.config) {
        return None;
    }
    let (index, bytes) = state.next_file(&shared.config, Instant::now())?;
    begin(state, index, bytes);
    Some(Job::Make(index, bytes))
}

fn begin(state: &mut State, index: u16, bytes: u64) {
    state.file_bytes += bytes;
    while state.files.len() <= usize::from(index) {
        state.files.push(Place::Absent);
    }
    state.files[usize::from(index)] = Place::Building;
}

fn make(shared: &Shared, index: u16, bytes: u64) -> Result<()> {
    match build(shared, index, bytes) {
        Ok(file) => {
            let registrar = shared.registrar.lock();
            if let Some(registrar) = &*registrar {
                let region = FixedRegion::new(&file.mapping);
                file.mapping.set_registered(registrar.register(&region));
            }
            shared.state.lock().install(file);
            Ok(())
        }
        Err(error) => {
            let path = path_of(&shared.config.dir, index);
            // What was made of it holds memory; a file that was never made is no news.
            let _ = fs::remove_file(&path);
            let mut state = shared.state.lock();
            state.files[usize::from(index)] = Place::Absent;
            state.file_bytes -= bytes;
            state.grow_failed = Some(Instant::now());
            state.grow_failures += 1;
            Err(io_error("cannot get memory for an arena file", &path, &error).with("file_bytes", bytes))
        }
    }
}

fn build(shared: &Shared, index: u16, bytes: u64) -> io::Result<Box<ArenaFile>> {
    let path = path_of(&shared.config.dir, index);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    file.set_len(bytes)?;
    let len = usize::try_from(bytes).map_err(io::Error::other)?;
    let mapping = Mapping::new(&file, len, index, shared.config.huge_pages, shared.lock.clone())?;
    let file = ArenaFile::new(mapping, path, nonce()).ok_or_else(|| io::Error::other("the file is too short"))?;
    Ok(Box::new(file))
}

fn remove(shared: &Shared, file: Box<ArenaFile>) {
    let (index, bytes, path) = (file.mapping.index(), file.bytes(), file.path.clone());
    if let Some(registrar) = &*shared.registrar.lock() {
        registrar.unregister(index);
        file.mapping.set_registered(false);
    }
    if let Err(error) = fs::remove_file(&path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove an arena file");
    }
    // Unmaps: the memory is the system's again before its bytes are counted as free.
    drop(file);
    let mut state = shared.state.lock();
    state.files[usize::from(index)] = Place::Absent;
    state.file_bytes -= bytes;
}

/// Makes the first file in the caller's thread, so that an arena that cannot have any does not open.
pub(super) fn first_file(shared: &Shared) -> Result<()> {
    let mut state = shared.state.lock();
    let Some((index, bytes)) = state.next_file(&shared.config, Instant::now()) else {
        return Err(Error::new(ErrorKind::Config, "the arena has no room for a file"));
    };
    begin(&mut state, index, bytes);
    drop(state);
    make(shared, index, bytes)
}

/// Starts the thread that makes and removes files. It ends when the state is closed.
pub(super) fn spawn(shared: Arc<Shared>) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("kvkeep-arena".into())
        .spawn(move || run(&shared))
        .map_err(|e| Error::new(ErrorKind::Io, "cannot start the arena's thread").with("cause", e))
}

fn run(shared: &Shared) {
    loop {
        let mut state = shared.state.lock();
        let job = loop {
            if state.closed {
                shared.settled.notify_all();
                return;
            }
            if let Some(job) = next_job(&mut state, shared) {
                break job;
            }
            shared.settled.notify_all();
            if state.grow_failed.is_some() {
                shared.wake.wait_for(&mut state, GROW_RETRY);
            } else {
                shared.wake.wait(&mut state);
            }
        };
        drop(state);
        match job {
            Job::Remove(file) => remove(shared, file),
            Job::Make(index, bytes) => match make(shared, index, bytes) {
                Ok(()) => shared.state.lock().grow_failed = None,
                Err(error) => tracing::warn!(%error, "the arena stays smaller than configured"),
            },
        }
    }
}

pub(super) fn wait_settled(shared: &Shared, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    let mut state = shared.state.lock();
    while !state.closed && state.is_growing(&shared.config, Instant::now()) {
        if shared.settled.wait_until(&mut state, deadline).timed_out() {
            return false;
        }
    }
    true
}
