//! Write-behind: blocks of class `cache` go to NVMe after they were acknowledged, so that DRAM can drop them freely. And
//! the other ways to NVMe: class `durable`, and a class that rises.
//!
//! The queue is bounded by bytes (`arena.dirty_bytes_max`). A put that asked to keep everything waits for a place; any
//! other is simply not written when there is none, and leaves with its DRAM copy.
//!
//! The NVMe index has one copy of a block, and the put that ends last is that copy. So one block is written by one task at
//! a time, from the look at the directory until the directory knows the outcome: that is what a [`Claim`] is.

use std::collections::HashSet;
use std::sync::Arc;

use kvkeep_core::directory::Directory;
use kvkeep_core::{BlockId, BlockMeta, Class, Error, ErrorKind, Handle, Keeper, NvmePlace, Result, SlotRef};
use kvkeep_tiers::nvme::{Admission, BlockCopy};
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};

use super::Store;
use super::room::RoomMade;

/// Bytes per permit: the semaphore counts in u32.
const UNIT: u64 = 4096;
/// Turns of evicting and trying again before NVMe counts as full: others may take the room first.
const NVME_TRIES_MAX: usize = 8;

/// One block on its way down.
pub(super) struct Job {
    meta: BlockMeta,
    slot: SlotRef,
    keep: bool,
    _bytes: OwnedSemaphorePermit,
}

/// The queue, and which blocks are being written.
pub struct Behind {
    bytes: Arc<Semaphore>,
    bytes_max: u64,
    queue: mpsc::UnboundedSender<Job>,
    /// Queued or being written from the queue: DRAM does not drop them before they are down.
    queued: Mutex<HashSet<BlockId>>,
    claimed: Mutex<HashSet<BlockId>>,
    released: Notify,
}

/// How much a block is wanted on NVMe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Within the write budget.
    BestEffort,
    /// Its caller asked to keep everything.
    Kept,
    /// Flushed and synced before anybody is told.
    Durable,
}

/// The right to write one block to NVMe. Ends when dropped.
pub(super) struct Claim<'a> {
    behind: &'a Behind,
    id: BlockId,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.behind.claimed.lock().remove(&self.id);
        self.behind.released.notify_waiters();
    }
}

impl Behind {
    /// The queue and its far end. The channel has no bound of its own: every job in it holds its bytes' permits.
    pub(super) fn new(bytes_max: u64) -> (Self, mpsc::UnboundedReceiver<Job>) {
        let (queue, jobs) = mpsc::unbounded_channel();
        let permits = usize::try_from(bytes_max / UNIT).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        let behind = Self {
            bytes: Arc::new(Semaphore::new(permits)),
            // Whole units: what is left of the last one would count as dirty for ever.
            bytes_max: permits as u64 * UNIT,
            queue,
            queued: Mutex::default(),
            claimed: Mutex::default(),
            released: Notify::new(),
        };
        (behind, jobs)
    }

    /// Whether the block is on its way down and must not be dropped before it is there.
    pub fn is_queued(&self, id: &BlockId) -> bool {
        self.queued.lock().contains(id)
    }

    /// Bytes queued or being written.
    pub fn dirty_bytes(&self) -> u64 {
        self.bytes_max.saturating_sub(self.bytes.available_permits() as u64 * UNIT)
    }

    fn permits(&self, len: u32) -> u32 {
        u32::try_from(u64::from(len).div_ceil(UNIT).min(self.bytes_max / UNIT).max(1)).unwrap_or(u32::MAX)
    }

    /// Waits until nobody else writes this block.
    pub(super) async fn claim(&self, id: BlockId) -> Claim<'_> {
        loop {
            let mut released = std::pin::pin!(self.released.notified());
            released.as_mut().enable();
            if self.claimed.lock().insert(id) {
                return Claim { behind: self, id };
            }
            released.await;
        }
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
        self.behind.queued.lock().insert(meta.id);
        let permit =
            if keep { room.acquire_many_owned(permits).await.ok() } else { room.try_acquire_many_owned(permits).ok() };
        let queued = permit
            .is_some_and(|bytes| self.behind.queue.send(Job { meta: meta.clone(), slot, keep, _bytes: bytes }).is_ok());
        if !queued {
            // No room in the queue, or the node stops.
            self.behind.queued.lock().remove(&meta.id);
            self.counters.nvme_skipped_parts.one();
        }
    }

    /// Writes what is queued, `nvme.write_behind_depth` blocks at a time, until the node stops.
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
        let meta = &job.meta;
        let claim = self.behind.claim(meta.id).await;
        let found = self.directory.lock().locate(&meta.id.digest, meta.id.group, meta.id.shard);
        // Removed, replaced or written by another way since it was queued: nothing to do.
        if found.is_some_and(|f| f.version == meta.version && f.place.is_none())
            && let Err(error) =
                self.write_down(meta, job.slot, if job.keep { Wanted::Kept } else { Wanted::BestEffort }).await
        {
            self.counters.nvme_skipped_parts.one();
            tracing::debug!(block = ?meta.id, %error, "not written to nvme");
        }
        drop(claim);
        self.behind.queued.lock().remove(&meta.id);
        self.may_leave();
    }

    /// Writes a published slot to NVMe and tells the directory. The caller holds the block's claim.
    async fn write_down(self: &Arc<Self>, meta: &BlockMeta, slot: SlotRef, wanted: Wanted) -> Result<()> {
        let place = self.put_nvme(meta, slot, wanted).await?;
        {
            let mut directory = self.directory.lock();
            // The copy and its class at once: in between it could be evicted.
            if directory.set_nvme(&meta.id, meta.version, place) {
                directory.raise_class(&meta.id, meta.version, meta.class, meta.keeper);
                return Ok(());
            }
        }
        self.free_places(&[BlockCopy { handle: meta.handle, id: meta.id, place }]).await;
        Err(Error::new(ErrorKind::Expired, "the block was removed while it was written"))
    }

    /// Writes a published slot to NVMe; where it is wanted durable, it is on the device and in the synced index when this
    /// returns. The directory does not know yet: the caller keeps the block's claim until it does.
    pub(super) async fn put_nvme(
        self: &Arc<Self>,
        meta: &BlockMeta,
        slot: SlotRef,
        wanted: Wanted,
    ) -> Result<NvmePlace> {
        let durable = wanted == Wanted::Durable;
        let nvme = self.nvme.clone().ok_or_else(no_tier)?;
        let mut tries = 0;
        while tries < NVME_TRIES_MAX {
            let made = self.nvme_room.made();
            match nvme.admit(meta.len, if durable { Class::Durable } else { meta.class }) {
                Admission::Yes => {}
                // Who asked to keep everything is not dropped for a budget.
                Admission::OverBudget if wanted != Wanted::BestEffort => {}
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
                    match self.make_nvme_room(meta.len, made).await {
                        RoomMade::Here => tries += 1,
                        RoomMade::Elsewhere => {}
                        RoomMade::None => break,
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
                Err(e) if e.kind() == ErrorKind::Full => match self.make_nvme_room(meta.len, made).await {
                    RoomMade::Here => tries += 1,
                    RoomMade::Elsewhere => {}
                    RoomMade::None => break,
                },
                Err(e) => return Err(e),
            }
        }
        Err(Error::new(
            ErrorKind::Full,
            "no room on NVMe: nvme.bytes is full of blocks that may not be evicted (durable, leased), or the file system has \
             no more than nvme.keep_free_bytes left",
        )
            .with("bytes", meta.len)
            .retry_after(super::put::NO_ROOM_RETRY))
    }

    /// Raises a stored block to durable: from its NVMe copy if it has one, else from DRAM.
    pub(super) async fn make_durable(self: &Arc<Self>, handle: Handle, id: BlockId, keeper: Keeper) -> Result<()> {
        let nvme = self.nvme.clone().ok_or_else(no_tier)?;
        let gone = || Error::new(ErrorKind::Expired, "the block left before its class was raised; put it again");
        let _claim = self.behind.claim(id).await;
        let locate = |directory: &Directory| directory.locate(&id.digest, id.group, id.shard).ok_or_else(gone);
        let found = locate(&self.directory.lock())?;
        if let Some(place) = found.place {
            let copy = BlockCopy { handle, id, place };
            nvme.set_class(&[copy], Class::Durable, keeper).await?;
            let entries = self.index_entries(vec![(handle, id)]).await;
            let durable = entries.iter().any(|e| e.place == place && e.class == Class::Durable);
            // Nobody hears `durable` before the device has it; and a copy that was evicted meanwhile does not count.
            let mut directory = self.directory.lock();
            let stayed = durable && locate(&directory)?.place == Some(place);
            return if stayed && directory.raise_class(&id, found.version, Class::Durable, keeper) {
                Ok(())
            } else {
                Err(gone())
            };
        }
        let slot = found.slot.ok_or_else(gone)?;
        let mut meta = self.arena.pin(slot).ok_or_else(gone)?.meta()?;
        (meta.class, meta.keeper) = (Class::Durable, keeper);
        self.write_down(&meta, slot, Wanted::Durable).await
    }
}

fn no_tier() -> Error {
    Error::new(ErrorKind::Unavailable, "this node has no NVMe tier")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_queue_has_nothing_dirty_whatever_its_bound() {
        for bound in [1, UNIT - 1, UNIT, 10 * UNIT + 7, 1 << 30] {
            assert_eq!(Behind::new(bound).0.dirty_bytes(), 0, "{bound}");
        }
    }
}
