//! What the parts of an open store share: the device, the index, the free space, the sequence, and whether it is poisoned.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvkeep_core::error::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::budget::Budget;
use super::config::NvmeConfig;
use super::entry::IndexEntry;
use super::extents::Extents;
use super::index::Index;
use super::place::{SegmentNo, Sequence, UNIT_BYTES};
use crate::io::{Disk, FileId};

/// Puts in flight at most.
pub(crate) const PUTS_MAX: u32 = 1024;

pub(crate) struct Shared {
    pub config: NvmeConfig,
    pub disk: Arc<dyn Disk>,
    pub index: Arc<dyn Index>,
    pub space: Mutex<Space>,
    pub budget: Option<Mutex<Budget>>,
    /// One permit per put in flight; closed with the store.
    pub puts: Arc<Semaphore>,
    /// Held while a segment is made. Not held by anything that reads, frees or finds room.
    pub growth: Semaphore,
    /// The last sequence of an earlier life.
    pub opened_after: Sequence,
    /// Up to here an earlier life flushed everything before it stopped.
    pub flushed: Sequence,
    next: AtomicU64,
    mark: AtomicU64,
    poison: OnceLock<String>,
    /// Locked against a second store on the folder. The last field: unlocked when the index is closed.
    _lock: Option<File>,
}

/// What is where. Locked for moments, never across an await or an I/O.
pub(crate) struct Space {
    pub extents: Extents,
    pub files: BTreeMap<SegmentNo, FileId>,
    pub blocks: Blocks,
    /// When the filesystem last had no room for a segment, on the store's clock.
    pub growth_refused: Option<std::time::Duration>,
}

/// The blocks in the index, together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub entries: u64,
    pub payload_bytes: u64,
    pub extent_bytes: u64,
}

impl Blocks {
    pub fn add(&mut self, entry: &IndexEntry) {
        self.entries += 1;
        self.payload_bytes += u64::from(entry.len);
        self.extent_bytes += entry.extent().bytes();
    }

    pub fn remove(&mut self, entry: &IndexEntry) {
        self.entries -= 1;
        self.payload_bytes -= u64::from(entry.len);
        self.extent_bytes -= entry.extent().bytes();
    }
}

impl Shared {
    pub fn new(
        config: NvmeConfig,
        disk: Arc<dyn Disk>,
        index: Arc<dyn Index>,
        space: Space,
        last: Sequence,
        flushed: Sequence,
        lock: Option<File>,
    ) -> Self {
        let now = (config.clock)();
        Self {
            budget: config.write_budget_bytes_per_day.map(|bytes| Mutex::new(Budget::new(bytes, now))),
            config,
            disk,
            index,
            space: Mutex::new(space),
            puts: Arc::new(Semaphore::new(PUTS_MAX as usize)),
            growth: Semaphore::new(1),
            opened_after: last,
            flushed,
            next: AtomicU64::new(last.0 + 1),
            // Nothing is reserved yet: the first put writes the mark.
            mark: AtomicU64::new(last.0),
            poison: OnceLock::new(),
            _lock: lock,
        }
    }

    /// Draws the sequence of a put. It may be used once [`Self::mark`] has reached it.
    pub fn draw_sequence(&self) -> Sequence {
        Sequence(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The last sequence drawn.
    pub fn last_sequence(&self) -> Sequence {
        Sequence(self.next.load(Ordering::Relaxed) - 1)
    }

    /// Sequences up to this one survive a crash as used.
    pub fn mark(&self) -> Sequence {
        Sequence(self.mark.load(Ordering::Acquire))
    }

    /// Only for the writer thread.
    pub fn set_mark(&self, mark: Sequence) {
        self.mark.store(mark.0, Ordering::Release);
    }

    /// Ends all writing until the store is opened again: nobody knows what is on the device.
    pub fn poison(&self, what: &str, why: &dyn std::fmt::Display) {
        if self.poison.set(format!("{what}: {why}")).is_ok() {
            tracing::error!(what, error = %why, "nvme device poisoned: no more writes until it is opened again; reads go on");
            metrics::counter!("kvkeep_nvme_poisoned_total").increment(1);
        }
    }

    pub fn is_poisoned(&self) -> bool {
        self.poison.get().is_some() || self.disk.is_poisoned()
    }

    pub fn check_writable(&self) -> Result<()> {
        if !self.is_poisoned() {
            return Ok(());
        }
        let cause = self.poison.get().map_or("a device flush failed", String::as_str);
        Err(Error::new(ErrorKind::Io, "the nvme device is poisoned and takes no writes; it must be opened again")
            .with("cause", cause))
    }

    pub fn file(&self, segment: SegmentNo) -> Result<FileId> {
        self.space
            .lock()
            .files
            .get(&segment)
            .copied()
            .ok_or_else(|| Error::new(ErrorKind::Io, "no such nvme segment").with("segment", segment))
    }
}

impl Space {
    /// Bytes of all segments.
    pub fn segment_bytes(&self) -> u64 {
        self.extents.counts().total * UNIT_BYTES
    }
}
