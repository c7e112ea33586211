//! [`NvmeStore`]: put, free, class, flush, close; what is used and what is admitted. Reading is in `read.rs`, opening in
//! `open.rs`, checking in `scrub.rs`.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use kvkeep_core::block::{BlockMeta, NvmePlace};
use kvkeep_core::error::{Error, ErrorKind, Result};
use kvkeep_core::format::BLOCK_BYTES_MAX;
use kvkeep_core::ids::{BlockId, Handle};
use kvkeep_core::words::{Class, Keeper};

use super::config::SyncPoint;
use super::entry::{Heat, IndexEntry, index_key};
use super::header::{Header, PAGE_BYTES, Shape};
use super::place::{Extent, SegmentNo, Sequence, UNIT_BYTES};
use super::shared::{PUTS_MAX, Shared};
use super::writer::{BlockCopy, Inserted, Op, Writer};
use crate::io::IoBuf;

/// One NVMe device: blocks in segment files, found through an index. Clones are the same store.
///
/// # The order of steps
///
/// ```text
/// put    header and payload -> device flush (durable) -> index insert -> log sync (durable) -> acknowledged
/// free   index delete -> log sync -> reads in flight are zero -> free list
/// class  device flush -> index update -> log sync -> acknowledged
/// ```
/// A put that has begun runs to its end, whatever becomes of its caller. A put of a block that is here already supersedes
/// it, at the higher class of the two: the index has one copy of a block, and the old one's extent is freed as above.
///
/// Needs a tokio runtime around its async calls.
#[derive(Clone)]
pub struct NvmeStore {
    // Dropped first: it ends the thread that shares the rest.
    pub(crate) writer: Arc<Writer>,
    pub(crate) shared: Arc<Shared>,
}

/// How the device is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeUsage {
    /// All segments together may have so many bytes.
    pub capacity_bytes: u64,
    /// Segments have been made for so many.
    pub segment_bytes: u64,
    /// Number of segments.
    pub segments: usize,
    /// In the free list of the segments there are.
    pub free_bytes: u64,
    /// The longest contiguous part of that.
    pub largest_free_bytes: u64,
    /// In blocks, and in puts that have not ended.
    pub used_bytes: u64,
    /// Freed, but still being read.
    pub leaving_bytes: u64,
    /// Out of use because their bytes were not what was written.
    pub quarantined_bytes: u64,
    /// Blocks in the index.
    pub entries: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// What headers and padding add to it.
    pub overhead_bytes: u64,
    /// What may be written now under the write budget; `None` without one.
    pub budget_left_bytes: Option<u64>,
    /// Whether a failed flush or sync has ended all writing.
    pub poisoned: bool,
}

/// Whether a block may be written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may. The filesystem may still turn out to have no room for another segment; then the put says `Full`.
    Yes,
    /// The day's write budget is used up; durable blocks are admitted all the same.
    OverBudget,
    /// No room for a block of this size; something must be freed first.
    Full,
    /// The device takes no writes any more.
    Poisoned,
}

impl NvmeStore {
    /// Stores a block. `payload` is the raw bytes padded to whole pages of 4096; what the padding holds is written with
    /// them. The bytes are compared with `meta.sums` before they go out. `durable`: flushed and synced before the answer;
    /// so is every block of class durable.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not fit together, `Checksum` if the bytes are not what was summed, `Full`
    /// without room, `Io` if the device failed or is poisoned (then it is unknown whether the block is there),
    /// `Unavailable` once the store is closed.
    pub async fn put(&self, meta: &BlockMeta, payload: IoBuf, durable: bool) -> Result<NvmePlace> {
        check_payload(meta, &payload)?;
        self.shared.check_writable()?;
        let permit = Arc::clone(&self.shared.puts).acquire_owned().await.map_err(|_| closed())?;
        let (store, meta) = (self.clone(), meta.clone());
        // In a task of its own: the extent of a put whose caller went away must not be given to another while the device
        // still writes it.
        let put = tokio::spawn(async move {
            let _permit = permit;
            store.put_to_the_end(meta, payload, durable).await
        });
        put.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "the runtime stopped during an nvme put")))
    }

    async fn put_to_the_end(&self, meta: BlockMeta, payload: IoBuf, durable: bool) -> Result<NvmePlace> {
        let shared = &self.shared;
        if !meta.sums.matches(&payload.as_slice()[..meta.len as usize]) {
            return Err(Error::new(
                ErrorKind::Checksum,
                "the block's bytes are not what was summed; nothing was written",
            ));
        }
        let durable = durable || meta.class == Class::Durable;
        let extent = self.alloc(Shape::of(meta.len).units).await?;
        let entry = match self.draw_sequence().await {
            Ok(sequence) => IndexEntry::new(&meta, meta.class, extent, sequence),
            Err(e) => return Err(self.give_back(extent, e)),
        };
        if let Some(budget) = &shared.budget {
            budget.lock().charge(extent.bytes());
        }
        if let Err(e) = self.write(extent, Header { meta, sequence: entry.sequence }, payload).await {
            if e.kind() == io::ErrorKind::StorageFull {
                return Err(
                    self.give_back(extent, Error::new(ErrorKind::Full, "the device has no room for a segment's bytes"))
                );
            }
            // These units may be bad. Not written down: the next life may try them again.
            shared.space.lock().extents.quarantine(extent);
            metrics::counter!("kvkeep_nvme_write_errors_total").increment(1);
            return Err(Error::new(ErrorKind::Io, "cannot write a block")
                .with("segment", extent.segment)
                .with("unit", extent.unit)
                .with("cause", e));
        }
        match self.insert(extent, &entry, durable).await {
            Ok(()) => Ok(entry.place),
            // On a poisoned device it is unknown whether the entry is there: the extent stays taken.
            Err(e) if shared.is_poisoned() => Err(e),
            Err(e) => Err(self.give_back(extent, e)),
        }
    }

    async fn insert(&self, extent: Extent, entry: &IndexEntry, mut durable: bool) -> Result<()> {
        loop {
            if durable && self.shared.config.sync_plan.runs(SyncPoint::PutFlush) {
                self.flush_segment(extent.segment).await?;
            }
            let entry = Box::new(entry.clone());
            match self.writer.ask(|done| Op::Insert { entry, durable, done }).await? {
                Inserted::Yes => return Ok(()),
                // What was promised of the copy that it supersedes holds for this one.
                Inserted::FlushFirst => durable = true,
            }
        }
    }

    fn give_back(&self, extent: Extent, why: Error) -> Error {
        self.shared.space.lock().extents.release(extent);
        why
    }

    async fn draw_sequence(&self) -> Result<Sequence> {
        let sequence = self.shared.draw_sequence();
        if sequence > self.shared.mark() {
            self.writer.ask(|done| Op::Mark { need: sequence, done }).await?;
        }
        Ok(sequence)
    }

    async fn write(&self, extent: Extent, header: Header, payload: IoBuf) -> io::Result<()> {
        let file = self.shared.file(extent.segment).map_err(io::Error::other)?;
        let shape = Shape::of(header.meta.len);
        let mut head = IoBuf::alloc(shape.header_bytes());
        header.encode(head.as_mut_slice());
        match shape.inline_at {
            Some(at) => {
                let len = header.meta.len as usize;
                head.as_mut_slice()[at..at + len].copy_from_slice(&payload.as_slice()[..len]);
                self.shared.disk.write(file, extent.offset(), head).await.1.map(|_| ())
            }
            None => self.shared.disk.write2(file, extent.offset(), head, payload).await.2,
        }
    }

    pub(crate) async fn flush_segment(&self, segment: SegmentNo) -> Result<()> {
        let file = self.shared.file(segment)?;
        self.shared.disk.flush(file).await.map_err(|e| {
            self.shared.poison("device flush", &e);
            Error::new(ErrorKind::Io, "the device could not flush").with("segment", segment).with("cause", e)
        })
    }

    /// Frees copies. One that is not where the caller believes it to be is left alone. Answers how many were freed, once
    /// that is durable; an extent that is still being read goes to the free list with its last reader.
    ///
    /// # Errors
    /// `Io` if the index failed or the device is poisoned; then it is unknown which are still there.
    pub async fn free(&self, copies: &[BlockCopy]) -> Result<u64> {
        self.writer.ask(|done| Op::Free { copies: copies.to_vec(), done }).await
    }

    /// Raises the class of copies, or the keeper of the same class; never lowers one. For `durable` the blocks and the index are durable before the answer.
    /// Answers how many rose: a copy that is gone, or had the class already, is not counted.
    ///
    /// # Errors
    /// `Io` if the device or the index failed.
    pub async fn set_class(&self, copies: &[BlockCopy], class: Class, keeper: Keeper) -> Result<u64> {
        if class == Class::Durable && self.shared.config.sync_plan.runs(SyncPoint::ClassFlush) {
            let segments: BTreeSet<SegmentNo> =
                copies.iter().filter_map(|c| super::place::Place::unpack(c.place)).map(|p| p.segment).collect();
            for segment in segments {
                self.flush_segment(segment).await?;
            }
        }
        self.writer.ask(|done| Op::Raise { copies: copies.to_vec(), class, keeper, done }).await
    }

    /// Writes down what the policy knows, so that it survives a restart roughly. Not synced.
    ///
    /// # Errors
    /// `Io` if the index failed.
    pub async fn set_heat(&self, heats: &[(BlockCopy, Heat)]) -> Result<u64> {
        self.writer.ask(|done| Op::Heat { heats: heats.to_vec(), done }).await
    }

    /// Makes durable every put, free and class that was acknowledged before, whatever its class.
    ///
    /// # Errors
    /// `Io`; then the device is poisoned.
    pub async fn flush_all(&self) -> Result<()> {
        self.sync_all(false).await
    }

    /// Waits for puts in flight, makes everything durable and ends writing. Reads go on until the last clone is dropped.
    ///
    /// # Errors
    /// As [`Self::flush_all`]; the store is closed all the same.
    pub async fn close(&self) -> Result<()> {
        let all = Arc::clone(&self.shared.puts).acquire_many_owned(PUTS_MAX).await.map_err(|_| closed())?;
        self.shared.puts.close();
        drop(all);
        self.sync_all(true).await
    }

    async fn sync_all(&self, clean: bool) -> Result<()> {
        if self.shared.config.sync_plan.runs(SyncPoint::AllFlush) {
            let segments: Vec<SegmentNo> = self.shared.space.lock().files.keys().copied().collect();
            for segment in segments {
                self.flush_segment(segment).await?;
            }
        }
        self.writer.ask(|done| Op::Sync { clean, done }).await
    }

    /// What the index says of a block.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if it cannot say.
    pub fn entry(&self, handle: Handle, id: BlockId) -> Result<Option<IndexEntry>> {
        let key = index_key(handle, id);
        let Some(value) = self.shared.index.get(&key)? else { return Ok(None) };
        IndexEntry::decode(&key, &value)
            .map(Some)
            .map_err(|e| Error::new(ErrorKind::Corrupt, "the index value of a block is damaged").with("cause", e))
    }

    /// How the device is used.
    pub fn usage(&self) -> NvmeUsage {
        let now = (self.shared.config.clock)();
        let budget_left_bytes = self.shared.budget.as_ref().map(|b| b.lock().left(now));
        let space = self.shared.space.lock();
        let (counts, blocks) = (space.extents.counts(), space.blocks);
        NvmeUsage {
            capacity_bytes: self.shared.config.capacity_bytes,
            segment_bytes: space.segment_bytes(),
            segments: space.extents.segment_count(),
            free_bytes: counts.free * UNIT_BYTES,
            largest_free_bytes: u64::from(space.extents.largest_free()) * UNIT_BYTES,
            used_bytes: counts.used * UNIT_BYTES,
            leaving_bytes: counts.leaving * UNIT_BYTES,
            quarantined_bytes: counts.quarantined * UNIT_BYTES,
            entries: blocks.entries,
            payload_bytes: blocks.payload_bytes,
            overhead_bytes: blocks.extent_bytes - blocks.payload_bytes,
            budget_left_bytes,
            poisoned: self.shared.is_poisoned(),
        }
    }

    /// Checks that the free list, the map of units and the counts agree. Walks every unit of the device: for fsck and tests.
    ///
    /// # Errors
    /// `Corrupt`, saying what disagrees: a bug.
    pub fn check_space(&self) -> Result<()> {
        self.shared.space.lock().extents.check().map_err(|what| {
            Error::new(ErrorKind::Corrupt, "the free space of the nvme device does not add up").with("what", what)
        })
    }

    /// Whether a block of `len` bytes may be written now. Asked by those who can choose not to write; a put does not ask.
    pub fn admit(&self, len: u32, class: Class) -> Admission {
        if self.shared.is_poisoned() {
            return Admission::Poisoned;
        }
        let now = (self.shared.config.clock)();
        if class != Class::Durable && self.shared.budget.as_ref().is_some_and(|b| !b.lock().admits(now)) {
            return Admission::OverBudget;
        }
        let units = Shape::of(len).units;
        let space = self.shared.space.lock();
        if space.extents.largest_free() >= units || self.shared.next_segment_units(&space).is_some_and(|n| n >= units) {
            return Admission::Yes;
        }
        Admission::Full
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Unavailable, "the nvme store is closed")
}

/// Bytes of a payload buffer for a block of `len` bytes.
pub fn padded(len: u32) -> usize {
    (len as usize).next_multiple_of(PAGE_BYTES)
}

fn check_payload(meta: &BlockMeta, payload: &IoBuf) -> Result<()> {
    let refuse = |why| {
        Err(Error::new(ErrorKind::InvalidArgument, why)
            .with("len", meta.len)
            .with("payload_bytes", payload.len())
            .with("sums", meta.sums.as_slice().len()))
    };
    if meta.len == 0 || u64::from(meta.len) > BLOCK_BYTES_MAX {
        return refuse("a block has 1 byte to 128 MiB");
    }
    if payload.len() != padded(meta.len) {
        return refuse("a payload is padded to whole pages of 4096 bytes");
    }
    if meta.sums.as_slice().len() != kvkeep_core::checksum::ChunkSums::count_for(meta.len as usize) {
        return refuse("a block has one sum per 64 KiB");
    }
    Ok(())
}
