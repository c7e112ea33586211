//! Write-behind: blocks of class `cache` go to NVMe after they were acknowledged, so that DRAM can drop them freely.
//!
//! The queue is bounded by bytes (`arena.dirty_bytes_max`). A put that asked to keep everything waits for a place; any
//! other is simply not written when there is none, and leaves with its DRAM copy.

use std::collections::HashSet;
use std::sync::Arc;

use kvkeep_core::directory::Located;
use kvkeep_core::{BlockId, BlockMeta, Class, Error, ErrorKind, NvmePlace, Result, SlotRef};
use kvkeep_tiers::nvme::{Admission, BlockCopy};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::Store;
use super::room::NVME_EVICT_BYTES;

/// Bytes per permit: the semaphore counts in u32.
const UNIT: u64 = 4096;

/// One block on its way down.
pub(super) struct Job {
    meta: BlockMeta,
    slot: SlotRef,
    keep: bool,
    _bytes: OwnedSemaphorePermit,
}

/// The queue.
pub struct Behind {
    bytes: Arc<Semaphore>,
    bytes_max: u64,
    queue: mpsc::UnboundedSender<Job>,
    kept: Mutex<HashSet<BlockId>>,
}

impl Behind {
    /// The queue and its far end. The channel has no bound of its own: every job in it holds its bytes' permits.
    pub(super) fn new(bytes_max: u64) -> (Self, mpsc::UnboundedReceiver<Job>) {
        let (queue, jobs) = mpsc::unbounded_channel();
        let permits = usize::try_from(bytes_max / UNIT).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        (Self { bytes: Arc::new(Semaphore::new(permits)), bytes_max, queue, kept: Mutex::default() }, jobs)
    }

    /// Whether the block is on its way down and must not be dropped before it is there.
    pub fn is_kept(&self, id: &BlockId) -> bool {
        self.kept.lock().contains(id)
    }

    /// Bytes queued or being written.
    pub fn dirty_bytes(&self) -> u64 {
        self.bytes_max.saturating_sub(self.bytes.available_permits() as u64 * UNIT)
    }

    fn permits(&self, len: u32) -> u32 {
        u32::try_from(u64::from(len).div_ceil(UNIT).min(self.bytes_max / UNIT).max(1)).unwrap_or(u32::MAX)
    }
}

impl Store {
    /// Queues a committed block. Waits only where `keep` is asked and the queue is full.
    pub(super) async fn write_behind(self: &Arc<Self>, meta: &BlockMeta, slot: SlotRef, keep: bool) {
        if self.nvme.is_none() {
            return;
        }
        let permits = self.behind.permits(meta.len);
        let room = Arc::clone(&self.behind.bytes);
        let permit = if keep {
            self.behind.kept.lock().insert(meta.id);
            room.acquire_many_owned(permits).await.ok()
        } else {
            room.try_acquire_many_owned(permits).ok()
        };
        let Some(permit) = permit else {
            self.counters.nvme_skipped_parts.one();
            return;
        };
        let job = Job { meta: meta.clone(), slot, keep, _bytes: permit };
        if let Err(refused) = self.behind.queue.send(job) {
            // The writer has stopped: so has the node.
            self.behind.kept.lock().remove(&refused.0.meta.id);
        }
    }

    /// Writes what is queued, `nvme.write_behind_depth` blocks at a time, until the queue is closed and empty.
    pub(super) async fn write_queued(self: Arc<Self>, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let depth = Arc::new(Semaphore::new(self.config.nvme.write_behind_depth as usize));
        loop {
            let job = tokio::select! {
                biased;
                job = jobs.recv() => job,
                () = self.stopping.cancelled() => None,
            };
            let Some(job) = job else { return };
            let Ok(turn) = Arc::clone(&depth).acquire_owned().await else { return };
            let store = Arc::clone(&self);
            tokio::spawn(async move {
                store.write_one(job).await;
                drop(turn);
            });
        }
    }

    async fn write_one(self: &Arc<Self>, job: Job) {
        let id = job.meta.id;
        let written = self.write_down(&job.meta, job.slot, false, job.keep).await;
        if let Err(error) = &written {
            self.counters.nvme_skipped_parts.one();
            tracing::debug!(block = ?id, %error, "not written to nvme");
        }
        self.behind.kept.lock().remove(&id);
        self.room.notify_waiters();
    }

    /// Writes a published slot to NVMe and tells the directory.
    async fn write_down(
        self: &Arc<Self>,
        meta: &BlockMeta,
        slot: SlotRef,
        durable: bool,
        keep: bool,
    ) -> Result<NvmePlace> {
        let place = self.put_nvme(meta, slot, durable, keep).await?;
        let told = self.directory.lock().set_nvme(&meta.id, meta.version, place);
        if !told {
            self.free_places(&[BlockCopy { handle: meta.handle, id: meta.id, place }]).await;
        }
        Ok(place)
    }

    /// A durable block's write: on the device and in the synced index when this returns; the directory does not know yet.
    pub(super) async fn write_durable(self: &Arc<Self>, meta: &BlockMeta, slot: SlotRef) -> Result<NvmePlace> {
        self.put_nvme(meta, slot, true, true).await
    }

    async fn put_nvme(
        self: &Arc<Self>,
        meta: &BlockMeta,
        slot: SlotRef,
        durable: bool,
        keep: bool,
    ) -> Result<NvmePlace> {
        let no_tier = || Error::new(ErrorKind::Unavailable, "this node has no NVMe tier");
        let nvme = self.nvme.clone().ok_or_else(no_tier)?;
        // Evicting makes room for one block; others may take it first, so a few turns.
        for _ in 0..8 {
            match nvme.admit(meta.len, meta.class) {
                Admission::Yes => {}
                Admission::OverBudget if keep => {}
                Admission::OverBudget => {
                    return Err(Error::new(
                        ErrorKind::Throttled,
                        "over the write budget (nvme.write_budget_bytes_per_day)",
                    ));
                }
                Admission::Poisoned => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        "the device failed a flush and takes no more writes; restart the node",
                    ));
                }
                Admission::Full => {
                    if self.evict_nvme(u64::from(meta.len).max(NVME_EVICT_BYTES)).await == 0 {
                        break;
                    }
                    continue;
                }
            }
            let Some(part) = self.arena.pin(slot) else {
                return Err(Error::new(ErrorKind::Expired, "the block left DRAM before it was written"));
            };
            match nvme.put(meta, part.io_buf(), durable).await {
                Ok(place) => {
                    self.counters.nvme_written_parts.one();
                    self.counters.nvme_written_bytes.add(u64::from(meta.len));
                    return Ok(place);
                }
                Err(e) if e.kind() == ErrorKind::Full => {
                    if self.evict_nvme(u64::from(meta.len).max(NVME_EVICT_BYTES)).await == 0 {
                        break;
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Err(Error::new(ErrorKind::Full, "NVMe is full of blocks that may not be evicted (durable or leased)")
            .with("bytes", meta.len)
            .retry_after(super::put::NO_ROOM_RETRY))
    }

    /// Raises a stored block to durable: from its NVMe copy if it has one, else from DRAM.
    pub(super) async fn make_durable(self: &Arc<Self>, wanted: &BlockMeta, found: &Located) -> Result<()> {
        let no_tier = || Error::new(ErrorKind::Unavailable, "this node has no NVMe tier");
        let nvme = self.nvme.clone().ok_or_else(no_tier)?;
        if let Some(place) = found.place {
            let copy = BlockCopy { handle: wanted.handle, id: wanted.id, place };
            return nvme.set_class(&[copy], Class::Durable).await.map(|_| ());
        }
        let gone = || Error::new(ErrorKind::Expired, "the block left before its class was raised; put it again");
        let slot = found.slot.ok_or_else(gone)?;
        let part = self.arena.pin(slot).ok_or_else(gone)?;
        let mut meta = part.meta()?;
        drop(part);
        meta.class = wanted.class;
        self.write_down(&meta, slot, true, true).await.map(|_| ())
    }
}
