//! How a store is opened, and the names of its files.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep_core::error::{Error, ErrorKind, Result};

use super::place::{SEGMENT_UNITS_MAX, SEGMENTS_MAX, SegmentNo, UNIT_BYTES};

/// Bytes of a segment file on a device that is large enough for eight of them.
pub const SEGMENT_BYTES_DEFAULT: u64 = 1 << 30;
/// Smallest segment file, in bytes.
pub const SEGMENT_BYTES_MIN: u64 = 64 * 1024;
/// Largest segment file, in bytes.
pub const SEGMENT_BYTES_MAX: u64 = SEGMENT_UNITS_MAX as u64 * UNIT_BYTES;
/// Bytes of a segment on a small device: the largest block fits.
const SEGMENT_BYTES_SMALL: u64 = 256 << 20;
/// Keep-free floor unless said otherwise, in bytes.
pub const KEEP_FREE_BYTES_DEFAULT: u64 = 10 << 30;

/// Time since some start that never goes back; passed in so that tests own it.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The machine's monotonic clock.
pub fn system_clock() -> Clock {
    let start = Instant::now();
    Arc::new(move || start.elapsed())
}

/// How to open an [`NvmeStore`](super::NvmeStore).
#[derive(Clone)]
pub struct NvmeConfig {
    /// The device's folder, locked while the store lives. `None` where there is none (simulated disks).
    pub dir: Option<PathBuf>,
    /// Bytes of all segment files together, at most.
    pub capacity_bytes: u64,
    /// No segment is added that would leave the filesystem less than this, in bytes.
    pub keep_free_bytes: u64,
    /// Bytes of a new segment file: whole 4 KiB units, [`SEGMENT_BYTES_MIN`] to [`SEGMENT_BYTES_MAX`]. A block larger
    /// than a segment cannot be stored.
    pub segment_bytes: u64,
    /// Bytes that may be written in a day, durable ones beside; `None`: no limit.
    pub write_budget_bytes_per_day: Option<u64>,
    /// What the write budget is measured with.
    pub clock: Clock,
    /// Which sync to leave out, to show that a test notices. Never set outside tests.
    #[doc(hidden)]
    pub sync_plan: SyncPlan,
}

impl NvmeConfig {
    /// Defaults for a device of this capacity, in bytes.
    pub fn new(dir: Option<PathBuf>, capacity_bytes: u64) -> Self {
        let segment_bytes = (capacity_bytes / 8)
            .clamp(SEGMENT_BYTES_SMALL, SEGMENT_BYTES_DEFAULT)
            .min(capacity_bytes)
            .next_multiple_of(UNIT_BYTES);
        Self {
            dir,
            capacity_bytes,
            keep_free_bytes: KEEP_FREE_BYTES_DEFAULT,
            segment_bytes,
            write_budget_bytes_per_day: None,
            clock: system_clock(),
            sync_plan: SyncPlan::default(),
        }
    }

    /// Checks every value and how they relate.
    ///
    /// # Errors
    /// `Config`, naming the fields that disagree.
    pub fn check(&self) -> Result<()> {
        let refuse = |why| Err(Error::new(ErrorKind::Config, why).with("segment_bytes", self.segment_bytes));
        if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&self.segment_bytes) {
            return refuse("nvme segments have 64 KiB to 16 GiB");
        }
        if !self.segment_bytes.is_multiple_of(UNIT_BYTES) {
            return refuse("nvme segments are whole units of 4096 bytes");
        }
        let capacity = |e: Error| e.with("capacity_bytes", self.capacity_bytes);
        if self.segment_bytes > self.capacity_bytes {
            return refuse("an nvme segment is larger than the capacity").map_err(capacity);
        }
        if self.capacity_bytes.div_ceil(self.segment_bytes) > u64::from(SEGMENTS_MAX) {
            return refuse("an nvme device has at most 65535 segments; choose larger ones").map_err(capacity);
        }
        if self.write_budget_bytes_per_day == Some(0) {
            return refuse("a write budget of 0 bytes a day stores nothing; leave it out for no limit");
        }
        Ok(())
    }
}

/// Where the segments of a device lie, below its folder.
pub fn segments_dir(dir: &Path) -> PathBuf {
    dir.join("segments")
}

/// Where the index of a device lies, below its folder.
pub fn index_dir(dir: &Path) -> PathBuf {
    dir.join("index")
}

/// Makes the folders of a device, where they are not there yet, and flushes their names: a segment or an index in a folder
/// that a power cut takes away would be flushed in vain.
///
/// # Errors
/// `Io` if they cannot be made.
pub fn make_dirs(dir: &Path) -> Result<()> {
    for folder in [dir.to_owned(), segments_dir(dir), index_dir(dir)] {
        make_dir(&folder).map_err(|e| {
            Error::new(ErrorKind::Io, "cannot make an nvme folder").with("folder", folder.display()).with("cause", e)
        })?;
    }
    Ok(())
}

/// Makes a folder and those above it, and flushes its name, whoever made it.
///
/// # Errors
/// As the filesystem says.
pub fn make_dir(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => return Ok(()),
    };
    match File::open(parent) {
        Ok(parent) => parent.sync_all(),
        // Somebody else's folder, in which an operator made ours: its flush is not ours to do either.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(e) => Err(e),
    }
}

/// The lock file of a device.
pub(crate) fn lock_path(dir: &Path) -> PathBuf {
    dir.join("lock")
}

const SEGMENT_PREFIX: &str = "segment-";

/// The file name of a segment: `segment-00001`.
pub fn segment_name(no: SegmentNo) -> String {
    format!("{SEGMENT_PREFIX}{:05}", no.0)
}

/// Back from the name; `None` for anything that [`segment_name`] does not make.
pub fn segment_no(name: &str) -> Option<SegmentNo> {
    let no = SegmentNo(name.strip_prefix(SEGMENT_PREFIX)?.parse().ok().filter(|&n| n > 0)?);
    (segment_name(no) == name).then_some(no)
}

/// A place where the store waits for something to be durable, or gone.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPoint {
    /// Device flush before a durable put enters the index.
    PutFlush,
    /// Log sync before a durable put is acknowledged.
    PutSync,
    /// Device flush before a class rises to durable.
    ClassFlush,
    /// Log sync before a risen class is acknowledged.
    ClassSync,
    /// Log sync before freed extents go to the free list and the free is acknowledged.
    FreeSync,
    /// Log sync before a put reuses what it superseded.
    SupersedeSync,
    /// Log sync of what an open dropped, before the first put.
    OpenSync,
    /// Log sync of the sequence mark before a sequence above the old one is used.
    MarkSync,
    /// Device flush of `flush_all` and `close`.
    AllFlush,
    /// Log sync of `flush_all` and `close`.
    AllSync,
}

/// Which sync is left out.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncPlan {
    pub skip: Option<SyncPoint>,
}

impl SyncPlan {
    pub(crate) fn runs(self, point: SyncPoint) -> bool {
        self.skip != Some(point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass_their_own_check() {
        for capacity in [300 << 20, 1 << 30, 100 << 30, 60 << 40] {
            NvmeConfig::new(None, capacity).check().unwrap();
        }
    }

    #[test]
    fn sizes_that_disagree_are_refused() {
        let ok = NvmeConfig::new(None, 1 << 30);
        for segment_bytes in [0, 4096, SEGMENT_BYTES_MIN + 1, SEGMENT_BYTES_MAX + UNIT_BYTES, 2 << 30] {
            let e = NvmeConfig { segment_bytes, ..ok.clone() }.check().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Config, "{segment_bytes}");
        }
        assert!(NvmeConfig { capacity_bytes: 1 << 50, ..ok }.check().is_err());
    }

    #[test]
    fn only_our_own_names_are_segments() {
        assert_eq!(segment_no(&segment_name(SegmentNo(65535))), Some(SegmentNo(65535)));
        for name in
            ["segment-0", "segment-00000", "segment-1", "segment-65536", "segment-+0001", "segment-00001.bak", ""]
        {
            assert_eq!(segment_no(name), None, "{name}");
        }
    }
}
