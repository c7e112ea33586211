//! [`Disk`]: the seam between the segment store and a device, and the words that every engine shares.
//!
//! Rules that hold for every engine, and that the conformance suite checks for each:
//! - Offsets, lengths and addresses are whole pages of [`IO_ALIGN`] bytes, whether or not the file is open with O_DIRECT;
//!   anything else is refused with `InvalidInput` before the device sees it.
//! - Buffers go in by value and come back with the answer. An operation starts when its future is first polled; from
//!   then on it runs to its end even if the future is dropped, and the engine keeps the buffer until it has ended.
//! - At most [`DiskOptions::queue_depth`] operations are in flight; the others wait in the order in which they came,
//!   inside their own futures: nothing is queued without a bound.

use std::fmt;
use std::future::Future;
use std::io;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;

use kvkeep_core::{Error, ErrorKind, Result};

use super::buf::{IO_ALIGN, IoBuf, Region};

/// Default of [`DiskOptions::queue_depth`], operations: more than a single NVMe device needs to be busy with blocks of
/// 128 KiB, and few enough that the last one in does not wait for long.
pub const DEFAULT_QUEUE_DEPTH: u32 = 64;

/// Most that [`DiskOptions::queue_depth`] may be, operations.
pub const MAX_QUEUE_DEPTH: u32 = 4096;

/// Size of the table of registered buffers, entries: indexes of [`Disk::register`] lie below it.
pub const MAX_REGISTERED_BUFFERS: u16 = 1024;

/// An open file of one [`Disk`]. Never used again for another file while that disk lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(NonZeroU32);

impl FileId {
    /// The `n`-th file that a disk opened, from 0.
    pub(crate) fn nth(n: u32) -> Option<Self> {
        NonZeroU32::new(n.checked_add(1)?).map(Self)
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file-{}", self.0)
    }
}

/// Room on the filesystem below a [`Disk`], bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this process may still allocate.
    pub free: u64,
    /// Bytes that the filesystem has in all.
    pub total: u64,
}

/// What runs the I/O of a [`Disk`], to be said at start and in `doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// `uring`, `pread` or `sim`.
    pub name: &'static str,
    /// Whether files are open with O_DIRECT.
    pub direct: bool,
    /// Operations in flight at most.
    pub queue_depth: u32,
    /// What differs from the best there is, and why; empty where nothing does.
    pub notes: Vec<String>,
}

impl fmt::Display for EngineInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = if self.direct { "O_DIRECT" } else { "through the page cache" };
        write!(f, "{}, {cache}, at most {} operations in flight", self.name, self.queue_depth)?;
        self.notes.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

/// What became of a request to register memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// Operations whose [`IoBuf`] names this index skip the pinning of pages.
    Fixed,
    /// The engine has no use for registrations, or the kernel refused; operations work all the same.
    Unregistered,
}

/// How to open a [`Disk`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Operations in flight at most, 1..=[`MAX_QUEUE_DEPTH`].
    pub queue_depth: u32,
}

impl DiskOptions {
    /// # Errors
    /// `Config` if a value is out of range.
    pub fn check(&self) -> Result<()> {
        if !(1..=MAX_QUEUE_DEPTH).contains(&self.queue_depth) {
            return Err(Error::new(ErrorKind::Config, "the queue depth of a disk is 1..=4096 operations")
                .with("queue_depth", self.queue_depth));
        }
        Ok(())
    }
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { queue_depth: DEFAULT_QUEUE_DEPTH }
    }
}

/// A read or write under way: the buffer, and the bytes moved or what went wrong.
pub type Io = Pin<Box<dyn Future<Output = (IoBuf, io::Result<usize>)> + Send>>;

/// A write of two buffers under way. Written whole, or an error.
pub type Io2 = Pin<Box<dyn Future<Output = (IoBuf, IoBuf, io::Result<()>)> + Send>>;

/// A flush under way.
pub type Flush = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// One folder of segment files on one device.
///
/// `create`, `open`, `list`, `remove`, `space` and `register` block the calling thread.
pub trait Disk: Send + Sync + 'static {
    /// Makes a file of `bytes` bytes, allocated on the device, and flushes file and folder before it answers.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is not a plain file name or a size that is not whole pages, `Conflict` if the
    /// name exists, `Full` without room, `Io` otherwise. A file that could not be completed is removed again.
    fn create(&self, name: &str, bytes: u64) -> Result<FileId>;

    /// Opens a file and says how long it is, bytes. A file that is open already keeps its id.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad name, `Io` otherwise.
    fn open(&self, name: &str) -> Result<(FileId, u64)>;

    /// The plain files of the folder with their lengths in bytes, by name.
    ///
    /// # Errors
    /// `Io` if the folder cannot be read.
    fn list(&self) -> Result<Vec<(String, u64)>>;

    /// Removes a file and flushes the folder. Operations in flight on it end undisturbed, new ones are refused.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad name, `Io` otherwise.
    fn remove(&self, name: &str) -> Result<()>;

    /// Reads into the whole of `buf`. Fewer bytes than that mean that the file ends there.
    fn read(&self, file: FileId, offset: u64, buf: IoBuf) -> Io;

    /// Writes the whole of `buf`, or fails.
    fn write(&self, file: FileId, offset: u64, buf: IoBuf) -> Io;

    /// Writes `head` at `offset` and `body` right behind it, as one operation: a block's header pages and its payload.
    fn write2(&self, file: FileId, offset: u64, head: IoBuf, body: IoBuf) -> Io2;

    /// Makes durable what was written to `file` by operations that had ended before this one began. Behind a
    /// [`FlushCoordinator`](super::flush::FlushCoordinator) callers share one device flush.
    fn flush(&self, file: FileId) -> Flush;

    /// Room on the filesystem.
    ///
    /// # Errors
    /// `Io` if it does not say.
    fn space(&self) -> Result<Space>;

    /// What runs the I/O.
    fn engine(&self) -> EngineInfo;

    /// Registers `region` (a whole arena file) under `index`; from then on an [`IoBuf`] inside it that carries that
    /// index costs less. The disk keeps `region`'s owner until [`Disk::unregister`], or until it is dropped.
    ///
    /// # Panics
    /// If `index` is not below [`MAX_REGISTERED_BUFFERS`].
    fn register(&self, index: u16, region: Region) -> Registration {
        drop((index, region));
        Registration::Unregistered
    }

    /// Ends a registration; operations in flight end undisturbed.
    fn unregister(&self, index: u16) {
        let _ = index;
    }

    /// Whether a flush failed and the device takes no more writes.
    fn is_poisoned(&self) -> bool {
        false
    }
}

impl<D: Disk + ?Sized> Disk for Arc<D> {
    fn create(&self, name: &str, bytes: u64) -> Result<FileId> {
        (**self).create(name, bytes)
    }
    fn open(&self, name: &str) -> Result<(FileId, u64)> {
        (**self).open(name)
    }
    fn list(&self) -> Result<Vec<(String, u64)>> {
        (**self).list()
    }
    fn remove(&self, name: &str) -> Result<()> {
        (**self).remove(name)
    }
    fn read(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        (**self).read(file, offset, buf)
    }
    fn write(&self, file: FileId, offset: u64, buf: IoBuf) -> Io {
        (**self).write(file, offset, buf)
    }
    fn write2(&self, file: FileId, offset: u64, head: IoBuf, body: IoBuf) -> Io2 {
        (**self).write2(file, offset, head, body)
    }
    fn flush(&self, file: FileId) -> Flush {
        (**self).flush(file)
    }
    fn space(&self) -> Result<Space> {
        (**self).space()
    }
    fn engine(&self) -> EngineInfo {
        (**self).engine()
    }
    fn register(&self, index: u16, region: Region) -> Registration {
        (**self).register(index, region)
    }
    fn unregister(&self, index: u16) {
        (**self).unregister(index);
    }
    fn is_poisoned(&self) -> bool {
        (**self).is_poisoned()
    }
}

/// Refuses what O_DIRECT would refuse, alike in every engine. `bufs` lie one behind the other from `offset` on.
pub(crate) fn check_aligned(offset: u64, bufs: &[&IoBuf]) -> io::Result<()> {
    let page = IO_ALIGN as u64;
    let whole = |buf: &&IoBuf| buf.len().is_multiple_of(IO_ALIGN) && buf.as_ptr().addr().is_multiple_of(IO_ALIGN);
    if !offset.is_multiple_of(page) || !bufs.iter().all(whole) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "offset, length and address of an operation must be whole pages of 4096 bytes",
        ));
    }
    let bytes: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
    match offset.checked_add(bytes) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "operation ends beyond the largest file offset")),
    }
}

/// What an operation on an id that is not open answers.
pub(crate) fn not_open(file: FileId) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{file} is not open on this disk"))
}

/// What an operation answers once the engine is shutting down.
pub(crate) fn shut_down() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the disk is shutting down")
}
