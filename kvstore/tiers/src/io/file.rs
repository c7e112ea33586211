//! [`Folder`]: the files of a device, opened, made, listed and removed. The engines differ only in how bytes move.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvkeep_core::{Error, ErrorKind, Result};
use parking_lot::{Mutex, RwLock};
use rustix::fs::FallocateFlags;

use super::buf::IO_ALIGN;
use super::disk::{FileId, Space, not_open};

/// Longest name of a segment file, bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// What the error says when the flush inside `create` or `remove` fails. Like any failed flush it poisons the device.
pub(crate) const FLUSH_FAILED: &str = "flushing the folder or a new segment file failed";

/// A file that is open, and stays so while an operation on it is in flight.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) id: FileId,
    pub(crate) file: File,
    removed: AtomicBool,
}

impl OpenFile {
    /// Whether it has lost its name, so that only operations in flight keep it.
    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }
}

#[derive(Debug, Default)]
struct Table {
    next: u32,
    by_id: HashMap<FileId, Arc<OpenFile>>,
    by_name: HashMap<String, FileId>,
}

/// One folder and its open files.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    direct: bool,
    table: RwLock<Table>,
    /// Held while the folder itself changes, so that two creates of one name do not meet.
    changes: Mutex<()>,
}

impl Folder {
    /// Opens the folder, which must exist, and finds out whether its filesystem knows O_DIRECT.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let probe = path.join(".probe-direct");
        let failed = |what, e: io::Error| io_error(what, &probe, &e);
        let plain = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&probe);
        drop(plain.map_err(|e| failed("folder of segment files is not writable", e))?);
        let direct = match open_file(&probe, true) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(e) => Err(failed("cannot tell whether the filesystem knows O_DIRECT", e)),
        };
        std::fs::remove_file(&probe).map_err(|e| failed("cannot remove the probe file", e))?;
        Ok(Self::with_direct(path, direct?))
    }

    /// Opens the folder, for O_DIRECT or not.
    pub(crate) fn with_direct(path: &Path, direct: bool) -> Self {
        Self { path: path.to_owned(), direct, table: RwLock::default(), changes: Mutex::default() }
    }

    /// Whether files are opened with O_DIRECT.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(crate) fn create(&self, name: &str, bytes: u64) -> Result<Arc<OpenFile>> {
        check_name(name)?;
        check_size(bytes)?;
        let path = self.path.join(name);
        let _changes = self.changes.lock();
        // Asked before, because a filesystem that runs out half-way has meanwhile refused everybody else.
        let free = self.space()?.free;
        if bytes > free {
            return Err(Error::new(ErrorKind::Full, "no room for another segment file")
                .with("bytes", bytes)
                .with("free", free)
                .with("file", path.display()));
        }
        let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let made = made.map_err(|e| io_error("cannot create a segment file", &path, &e))?;
        let made = (|| {
            let allocated = retry_interrupted(|| rustix::fs::fallocate(&made, FallocateFlags::empty(), 0, bytes));
            allocated.map_err(|e| io_error("cannot allocate a segment file", &path, &e).with("bytes", bytes))?;
            made.sync_all().and_then(|()| self.sync()).map_err(|e| io_error(FLUSH_FAILED, &path, &e))?;
            open_file(&path, self.direct).map_err(|e| io_error("cannot open a segment file", &path, &e))
        })();
        made.map(|file| self.enter(name, file)).inspect_err(|_| {
            // Half a segment is worth nothing; if even removing it fails, `list` shows it and the store decides.
            if let Err(left) = std::fs::remove_file(&path).and_then(|()| self.sync()) {
                tracing::warn!(file = %path.display(), error = %left, "an incomplete segment file stays behind");
            }
        })
    }

    pub(crate) fn open_named(&self, name: &str) -> Result<(Arc<OpenFile>, u64)> {
        check_name(name)?;
        let path = self.path.join(name);
        let _changes = self.changes.lock();
        let known = {
            let table = self.table.read();
            table.by_name.get(name).and_then(|id| table.by_id.get(id)).cloned()
        };
        let file = match known {
            Some(file) => file,
            None => {
                let file = open_file(&path, self.direct);
                self.enter(name, file.map_err(|e| io_error("cannot open a segment file", &path, &e))?)
            }
        };
        let bytes = file.file.metadata().map_err(|e| io_error("cannot measure a segment file", &path, &e))?.size();
        Ok((file, bytes))
    }

    pub(crate) fn list(&self) -> Result<Vec<(String, u64)>> {
        let failed = |e: io::Error| io_error("cannot list the folder of segment files", &self.path, &e);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                // Removed between the listing and the look: as if it had been gone before.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(failed(e)),
            };
            // Names that are not ours to make (hidden, not UTF-8) are not ours to show.
            if let (true, Ok(name)) = (meta.is_file(), entry.file_name().into_string())
                && check_name(&name).is_ok()
            {
                files.push((name, meta.len()));
            }
        }
        files.sort_unstable();
        Ok(files)
    }

    /// Removes a file; says which id it had, if it was open.
    pub(crate) fn remove(&self, name: &str) -> Result<Option<FileId>> {
        check_name(name)?;
        let path = self.path.join(name);
        let _changes = self.changes.lock();
        std::fs::remove_file(&path).map_err(|e| io_error("cannot remove a segment file", &path, &e))?;
        let id = {
            let mut table = self.table.write();
            let id = table.by_name.remove(name);
            if let Some(file) = id.and_then(|id| table.by_id.remove(&id)) {
                file.removed.store(true, Ordering::Release);
            }
            id
        };
        self.sync().map_err(|e| io_error(FLUSH_FAILED, &self.path, &e))?;
        Ok(id)
    }

    /// The file behind an id.
    pub(crate) fn get(&self, id: FileId) -> io::Result<Arc<OpenFile>> {
        self.table.read().by_id.get(&id).cloned().ok_or_else(|| not_open(id))
    }

    pub(crate) fn space(&self) -> Result<Space> {
        let stat = rustix::fs::statvfs(&self.path)
            .map_err(|e| io_error("cannot ask the filesystem for its room", &self.path, &e.into()))?;
        Ok(Space { free: stat.f_bavail * stat.f_frsize, total: stat.f_blocks * stat.f_frsize })
    }

    fn enter(&self, name: &str, file: File) -> Arc<OpenFile> {
        let mut table = self.table.write();
        let id = FileId::nth(table.next).expect("a disk opens far fewer than 2^32 files in its life");
        table.next += 1;
        let file = Arc::new(OpenFile { id, file, removed: AtomicBool::new(false) });
        table.by_id.insert(id, Arc::clone(&file));
        table.by_name.insert(name.to_owned(), id);
        file
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

fn open_file(path: &Path, direct: bool) -> io::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_NOFOLLOW).open(path)
}

fn retry_interrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    // fallocate of a big file may be interrupted by any signal; what it has allocated so far stays allocated.
    rustix::io::retry_on_intr(&mut call).map_err(io::Error::from)
}

/// Only plain visible names: what is in the folder stays in the folder.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "a segment file's name is 1..128 letters, digits, '-', '_' and '.', and does not start with '.'",
        )
        .with("name", name.escape_default()));
    }
    Ok(())
}

/// Whole pages, and not none.
pub(crate) fn check_size(bytes: u64) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(IO_ALIGN as u64) || i64::try_from(bytes).is_err() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "a segment file is whole pages of 4096 bytes, at least one",
        )
        .with("bytes", bytes));
    }
    Ok(())
}

/// The error of a failed file operation, with the kind that tells the store what to do.
pub(crate) fn io_error(what: &'static str, path: &Path, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => ErrorKind::Full,
        io::ErrorKind::AlreadyExists => ErrorKind::Conflict,
        _ => ErrorKind::Io,
    };
    Error::new(kind, what).with("file", path.display()).with("cause", error)
}
