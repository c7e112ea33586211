//! Opening a device: what the index says is checked against the segments there are and against itself, and what is free
//! is what is left.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvkeep_core::error::{Error, ErrorKind, Result};

use super::config::{NvmeConfig, SyncPoint, lock_path, segment_no};
use super::entry::{EntryError, INDEX_KEY_BYTES, IndexEntry, IndexKey};
use super::extents::{Extents, Misfit};
use super::index::{Change, Index};
use super::place::{Extent, SEGMENT_UNITS_MAX, SegmentNo, Sequence, UNIT_BYTES};
use super::records::{self, DeviceRecord};
use super::shared::{Blocks, Shared, Space};
use super::store::NvmeStore;
use super::writer::{BlockCopy, Writer};
use crate::io::{Disk, FileId};

/// Entries dropped at open are deleted in batches of this many.
const DROP_BATCH: usize = 4096;
/// Overlaps that are looked into. More than that is no stray entry but an index that does not belong to these segments.
const CONFLICTS_MAX: usize = 100_000;

/// Entries that the scanning thread hands over at a time.
const SCAN_BATCH: usize = 1024;
/// Batches that it may be ahead.
const BATCHES_AHEAD_MAX: usize = 8;

/// An entry, or the key of one that cannot be believed.
type Found = Result<IndexEntry, (IndexKey, EntryError)>;

/// What the owner of the store wants of an entry found at open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The block stays.
    Yes,
    /// Its namespace or revision is gone: the entry is deleted, its extent is free.
    Drop,
}

/// What an open found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Blocks taken over.
    pub entries: u64,
    /// Segments found.
    pub segments: usize,
    /// Entries whose segment is missing or too short.
    pub dropped_out_of_range: u64,
    /// Entries whose extent overlaps a newer one's.
    pub dropped_overlapping: u64,
    /// Entries that are not what was written.
    pub dropped_damaged: u64,
    /// Entries the visitor did not want.
    pub dropped_unwanted: u64,
    /// Extents that stay out of use.
    pub quarantined: u64,
    /// Blocks that were shown to the visitor and then lost to a newer one with an overlapping extent. Forget them.
    pub retracted: Vec<BlockCopy>,
    /// How long it took.
    pub took: Duration,
}

impl NvmeStore {
    /// Opens the device, or an empty one. Shows `visit` every block, in the order of namespace, revision and position,
    /// before anything can be written. Blocks the thread.
    ///
    /// Blocks are never found by their headers: what the index does not name is free space.
    ///
    /// # Errors
    /// `Config` for a configuration that cannot work or a device of a newer version, `Conflict` if another store has the
    /// folder, `Corrupt` if the index is damaged, `Io` otherwise.
    pub fn open(
        config: NvmeConfig,
        disk: Arc<dyn Disk>,
        index: Arc<dyn Index>,
        visit: &mut dyn FnMut(&IndexEntry) -> Keep,
    ) -> Result<(Self, OpenReport)> {
        let start = Instant::now();
        config.check()?;
        let lock = config.dir.as_deref().map(lock_folder).transpose()?;
        let record = index.get(DeviceRecord::key())?.map(|v| DeviceRecord::decode(&v)).transpose()?;

        let mut opening = Opening {
            index: &*index,
            visit,
            extents: Extents::new(),
            blocks: Blocks::default(),
            last: record.map_or(Sequence(0), |r| r.mark),
            drops: Vec::new(),
            conflicts: Vec::new(),
            report: OpenReport::default(),
        };
        let files = opening.segments(&*disk)?;
        opening.quarantines()?;
        opening.entries()?;
        opening.resolve()?;
        opening.extents.settle();
        let flushed = record.map_or(Sequence(0), |r| r.flushed);
        // Durable before the first put: an entry that was dropped here must not come back over an extent that was reused.
        opening.drop_now()?;
        index.write(&[DeviceRecord { mark: opening.last, flushed }.to_change()])?;
        if config.sync_plan.runs(SyncPoint::OpenSync) {
            index.sync()?;
        }

        let Opening { extents, blocks, last, mut report, .. } = opening;
        report.entries = blocks.entries;
        report.segments = files.len();
        report.took = start.elapsed();
        let space = Space { extents, files, blocks, growth_refused: None };
        let shared = Arc::new(Shared::new(config, disk, index, space, last, flushed, lock));
        let writer = Arc::new(Writer::start(Arc::clone(&shared))?);
        Ok((Self { writer, shared }, report))
    }
}

fn lock_folder(dir: &Path) -> Result<File> {
    let path = lock_path(dir);
    let io = |e: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Io, "cannot lock the nvme folder").with("file", path.display()).with("cause", e)
    };
    fs::create_dir_all(dir).map_err(|e| io(&e))?;
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(|e| io(&e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::new(ErrorKind::Conflict, "another store has this nvme folder").with("file", path.display()))
        }
        Err(TryLockError::Error(e)) => Err(io(&e)),
    }
}

struct Opening<'a> {
    index: &'a dyn Index,
    visit: &'a mut dyn FnMut(&IndexEntry) -> Keep,
    extents: Extents,
    blocks: Blocks,
    last: Sequence,
    drops: Vec<Change>,
    /// Entries whose extent was taken when they came.
    conflicts: Vec<IndexEntry>,
    report: OpenReport,
}

impl Opening<'_> {
    /// Opens the segment files. One that is shorter than it was counts for what it still has.
    fn segments(&mut self, disk: &dyn Disk) -> Result<BTreeMap<SegmentNo, FileId>> {
        let mut files = BTreeMap::new();
        for (name, _) in disk.list()? {
            let Some(no) = segment_no(&name) else {
                tracing::warn!(file = name, "not a segment, left alone");
                continue;
            };
            let (file, bytes) = disk.open(&name)?;
            let units = u32::try_from(bytes / UNIT_BYTES).unwrap_or(u32::MAX).min(SEGMENT_UNITS_MAX);
            if units == 0 {
                // Nothing can be in it; its number is wanted.
                disk.remove(&name)?;
                continue;
            }
            self.extents.add_unsorted_segment(no, units);
            files.insert(no, file);
        }
        Ok(files)
    }

    fn quarantines(&mut self) -> Result<()> {
        let Self { extents, drops, report, .. } = self;
        self.index.scan(records::QUARANTINE_PREFIX, &mut |key, value| {
            if !key.starts_with(records::QUARANTINE_PREFIX) {
                return ControlFlow::Break(());
            }
            if let Some(extent) = records::as_quarantine(key, value) {
                if extents.claim(extent).is_ok() {
                    extents.quarantine(extent);
                    report.quarantined += 1;
                } else {
                    // Its segment is gone, and with it what was wrong.
                    drops.push(Change::Delete(key.to_vec()));
                }
            }
            ControlFlow::Continue(())
        })
    }

    /// One thread reads and decodes, this one claims extents and shows the blocks: together they take as long as the
    /// slower of the two.
    fn entries(&mut self) -> Result<()> {
        let index = self.index;
        thread::scope(|scope| {
            let (found, batches) = mpsc::sync_channel::<Vec<Found>>(BATCHES_AHEAD_MAX);
            let scan = scope.spawn(move || {
                let mut batch = Vec::with_capacity(SCAN_BATCH);
                // Nobody listens any more once the other side has failed; it knows why.
                index.scan(&[], &mut |key, value| {
                    let Ok(key) = <&IndexKey>::try_from(key) else { return ControlFlow::Continue(()) };
                    batch.push(IndexEntry::decode(key, value).map_err(|why| (*key, why)));
                    if batch.len() < SCAN_BATCH {
                        return ControlFlow::Continue(());
                    }
                    match found.send(std::mem::replace(&mut batch, Vec::with_capacity(SCAN_BATCH))) {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(_) => ControlFlow::Break(()),
                    }
                })?;
                let _ = found.send(batch);
                Ok(())
            });
            let taken = self.take(batches);
            let scanned = scan.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            taken.and(scanned)
        })
    }

    fn take(&mut self, batches: mpsc::Receiver<Vec<Found>>) -> Result<()> {
        for found in batches.into_iter().flatten() {
            match found {
                Ok(entry) => self.entry(entry),
                Err((key, why)) => {
                    tracing::debug!(error = %why, "damaged nvme index entry dropped");
                    self.report.dropped_damaged += 1;
                    self.drops.push(Change::Delete(key.to_vec()));
                }
            }
            if self.drops.len() >= DROP_BATCH {
                self.drop_now()?;
            }
            if self.conflicts.len() > CONFLICTS_MAX {
                return Err(Error::new(ErrorKind::Corrupt, "the nvme index does not belong to these segments")
                    .with("overlapping_entries", self.conflicts.len()));
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: IndexEntry) {
        self.last = self.last.max(entry.sequence);
        match self.extents.claim(entry.extent()) {
            Ok(()) => self.show(&entry),
            Err(Misfit::OutOfRange) => {
                self.report.dropped_out_of_range += 1;
                self.drop_entry(&entry);
            }
            Err(Misfit::Overlap) => self.conflicts.push(entry),
        }
    }

    /// Shows a claimed entry to the visitor.
    fn show(&mut self, entry: &IndexEntry) {
        match (self.visit)(entry) {
            Keep::Yes => self.blocks.add(entry),
            Keep::Drop => {
                self.extents.unclaim(entry.extent());
                self.report.dropped_unwanted += 1;
                self.drop_entry(entry);
            }
        }
    }

    fn drop_entry(&mut self, entry: &IndexEntry) {
        self.drops.push(Change::Delete(entry.index_key().to_vec()));
    }

    fn drop_now(&mut self) -> Result<()> {
        let drops = std::mem::take(&mut self.drops);
        if drops.is_empty() { Ok(()) } else { self.index.write(&drops) }
    }

    /// Where extents overlap, the entry with the higher sequence is right: units are given away again only after the
    /// entry that had them before is gone. So whatever overlaps it is a leftover.
    fn resolve(&mut self) -> Result<()> {
        if self.conflicts.is_empty() {
            return Ok(());
        }
        tracing::warn!(entries = self.conflicts.len(), "overlapping nvme index entries; the newer ones stay");
        // So that a second scan does not meet what the first one dropped.
        self.drop_now()?;
        let mut all: Vec<(IndexEntry, bool)> =
            std::mem::take(&mut self.conflicts).into_iter().map(|e| (e, false)).collect();
        let mut late: Vec<Extent> = all.iter().map(|(e, _)| e.extent()).collect();
        late.sort_unstable();
        let late_keys: std::collections::BTreeSet<_> = all.iter().map(|(e, _)| e.index_key()).collect();
        self.index.scan(&[], &mut |key, value| {
            if let Ok(key) = <&[u8; INDEX_KEY_BYTES]>::try_from(key)
                && !late_keys.contains(key)
                && let Ok(entry) = IndexEntry::decode(key, value)
                && overlaps_any(entry.extent(), &late)
            {
                all.push((entry, true));
            }
            ControlFlow::Continue(())
        })?;
        for (entry, _) in all.iter().filter(|(_, shown)| *shown) {
            self.extents.unclaim(entry.extent());
        }
        all.sort_unstable_by_key(|(entry, _)| std::cmp::Reverse(entry.sequence));
        for (entry, shown) in all {
            match (self.extents.claim(entry.extent()), shown) {
                (Ok(()), true) => {}
                (Ok(()), false) => self.show(&entry),
                (Err(_), shown) => {
                    self.report.dropped_overlapping += 1;
                    if shown {
                        self.blocks.remove(&entry);
                        self.report.retracted.push(BlockCopy {
                            handle: entry.handle,
                            id: entry.id,
                            place: entry.place,
                        });
                    }
                    self.drop_entry(&entry);
                }
            }
        }
        Ok(())
    }
}

/// Whether `e` shares a unit with one of `sorted`, which may overlap among themselves.
fn overlaps_any(e: Extent, sorted: &[Extent]) -> bool {
    // An extent that starts before `e` by more than the longest possible one cannot reach it.
    let longest = super::header::Shape::of(kvkeep_core::format::BLOCK_BYTES_MAX as u32).units;
    let from = sorted.partition_point(|o| (o.segment, o.unit) < (e.segment, e.unit.saturating_sub(longest)));
    sorted[from..]
        .iter()
        .take_while(|o| o.segment == e.segment && o.unit < e.unit + e.units)
        .any(|o| o.unit + o.units > e.unit)
}
