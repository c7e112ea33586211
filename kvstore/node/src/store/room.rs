//! Room: evicting ahead of demand, and making a slot's worth when a put finds none.
//!
//! A DRAM copy whose block is on NVMe is dropped (a demotion). One that is on its way there waits for its write, and one
//! that is not is dropped for good. NVMe evicts by the same policy, `durable` excepted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvkeep_core::directory::{Dropped, Victim, VictimPart};
use kvkeep_core::{BlockId, Error, ErrorKind, MissReason, Result, SlotRef, TenantId, Tier};
use kvkeep_tiers::dram::{NoRoom, NoRoomReason, Purpose, ReclaimHint, Reserved};
use kvkeep_tiers::nvme::BlockCopy;

use super::Store;
use super::journal::{Moved, Subject};
use super::put::NO_ROOM_RETRY;

/// Victims looked at before others get a turn.
const VICTIMS_PER_SLICE: usize = 64;
/// How long one wait for room lasts before looking again.
const ROOM_POLL: Duration = Duration::from_millis(5);
/// A read that finds no slot waits so long at most.
const READ_ROOM_WAIT_MAX: Duration = Duration::from_millis(500);
/// Watermarks are looked at so often even when nothing asks.
const WATERMARK_POLL: Duration = Duration::from_millis(100);
/// NVMe is evicted in batches of this many bytes, one index batch and one sync for all, but of a small share of it at most:
/// half of a batch is empty on average.
const NVME_EVICT_BYTES: u64 = 16 << 20;
/// One of so many parts.
const NVME_EVICT_SHARE: u64 = 64;

/// Whose turn it is to evict from NVMe, and how often that made room.
#[derive(Default)]
pub(super) struct NvmeRoom {
    turn: tokio::sync::Mutex<()>,
    made: AtomicU64,
}

impl NvmeRoom {
    /// Evictions that made room until now: read before a write is tried.
    pub(super) fn made(&self) -> u64 {
        self.made.load(Ordering::Acquire)
    }
}

/// What eviction does about a victim that is leased or on its way to NVMe.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hurry {
    /// It stops there: the end of the lease or of the write says when to go on.
    No,
    /// It takes the next.
    Yes,
}

/// What came of a wish for room on NVMe.
pub(super) enum RoomMade {
    /// This caller evicted.
    Here,
    /// Another did meanwhile: try again.
    Elsewhere,
    /// Nothing may be evicted.
    None,
}

impl Store {
    /// A slot for bytes that a client brings. Waits for room until `deadline`.
    pub(super) async fn slot_for_put(
        self: &Arc<Self>,
        tenant: TenantId,
        len: u32,
        deadline: tokio::time::Instant,
    ) -> Result<Reserved> {
        if !self.reservations.lock().has_room(u64::from(len)) {
            return Err(Error::new(ErrorKind::Throttled, "too much is reserved and not committed")
                .with("limits.reserved_bytes_max", self.config.limits.reserved_bytes_max)
                .retry_after(NO_ROOM_RETRY));
        }
        self.slot(tenant, len, Purpose::Put, deadline).await.ok_or_else(|| {
            Error::new(ErrorKind::Full, "no room in the arena: everything is leased, being read or being written")
                .with("bytes", len)
                .retry_after(NO_ROOM_RETRY)
        })
    }

    /// A slot for a block that comes up from NVMe.
    pub(super) async fn slot_for_read(
        self: &Arc<Self>,
        tenant: TenantId,
        len: u32,
        purpose: Purpose,
    ) -> Option<Reserved> {
        self.slot(tenant, len, purpose, tokio::time::Instant::now() + READ_ROOM_WAIT_MAX).await
    }

    async fn slot(
        self: &Arc<Self>,
        tenant: TenantId,
        len: u32,
        purpose: Purpose,
        deadline: tokio::time::Instant,
    ) -> Option<Reserved> {
        let mut waited = false;
        // Room freed between the look and the wait must not be missed.
        let mut freed = std::pin::pin!(self.room.notified());
        loop {
            freed.as_mut().enable();
            match self.arena.reserve(tenant, len, purpose) {
                Ok(slot) => {
                    self.pressure.notify_one();
                    return Some(slot);
                }
                Err(NoRoom { reason: NoRoomReason::TooLarge | NoRoomReason::Closed, .. }) => return None,
                Err(no_room) if self.make_room(tenant, len, &no_room) => continue,
                Err(_) => {}
            }
            if !std::mem::replace(&mut waited, true) {
                self.counters.put_waits.one();
            }
            if tokio::time::Instant::now() >= deadline {
                return None;
            }
            let until = deadline.min(tokio::time::Instant::now() + ROOM_POLL);
            let _ = tokio::time::timeout_at(until, freed.as_mut()).await;
            freed.set(self.room.notified());
        }
    }

    /// Evicts towards one slot; `false` where nothing could be freed now, or nothing needs to be.
    fn make_room(&self, tenant: TenantId, len: u32, no_room: &NoRoom) -> bool {
        match no_room.hint {
            // Memory is on its way.
            None => false,
            Some(ReclaimHint::AnyBytes) => self.evict_dram(no_room.short_bytes.max(u64::from(len)), Hurry::Yes) > 0,
            // What is coldest mostly has the size that is wanted; where it has not, the cheapest extent is emptied.
            Some(ReclaimHint::SameSize) => self.evict_dram(u64::from(len), Hurry::Yes) > 0 || self.reclaim(tenant, len),
            Some(ReclaimHint::OtherSizes) => {
                self.reclaim(tenant, len) || self.evict_dram(u64::from(len), Hurry::Yes) > 0
            }
        }
    }

    /// Empties the extent, or file, that costs the fewest bytes; `false` where nothing of it could be dropped.
    fn reclaim(&self, tenant: TenantId, len: u32) -> bool {
        let mut freed = false;
        for (slot, id) in self.arena.reclaim_candidates(tenant, len) {
            let found = self.directory.lock().locate(&id.digest, id.group, id.shard);
            // What the directory does not know is on its way in or out.
            let Some(found) = found.filter(|f| f.slot == Some(slot)) else { continue };
            if self.may_drop(&id, found.place.is_some(), found.leased, Some(slot)) {
                freed |= self.drop_dram(&id, slot);
            }
        }
        freed
    }

    /// A leased block leaves DRAM where NVMe has it, except from under a client that reads it in place. (Without the lease
    /// it may: its memory is then kept, see `mapped`.)
    fn may_drop(&self, id: &BlockId, on_nvme: bool, leased: bool, slot: Option<SlotRef>) -> bool {
        match (on_nvme, leased) {
            (true, false) => true,
            (true, true) => !slot.is_some_and(|slot| self.arena.is_pinned(slot)),
            (false, leased) => !leased && !self.behind.is_queued(id),
        }
    }

    /// Frees at least `bytes` of DRAM by policy, or what can be found; answers how many.
    fn evict_dram(&self, bytes: u64, hurry: Hurry) -> u64 {
        let now = self.clock.policy();
        let mut freed = 0;
        for _ in 0..VICTIMS_PER_SLICE {
            if freed >= bytes {
                break;
            }
            let victim = match hurry {
                Hurry::No => self.directory.lock().victim_in_turn(Tier::Dram, now),
                Hurry::Yes => self.directory.lock().victim(Tier::Dram, now),
            };
            let Some(victim) = victim else { break };
            let is_dirty = |p: &VictimPart| p.place.is_none() && self.behind.is_queued(&block(&victim, p));
            if hurry == Hurry::No && victim.parts.iter().any(is_dirty) {
                break;
            }
            let held = |p: &VictimPart| !self.may_drop(&block(&victim, p), p.place.is_some(), victim.leased, p.slot);
            if victim.parts.iter().any(held) {
                self.directory.lock().defer(&victim.digest, Tier::Dram);
                continue;
            }
            for part in &victim.parts {
                if let Some(slot) = part.slot
                    && self.drop_dram(&block(&victim, part), slot)
                {
                    freed += u64::from(part.len);
                }
            }
        }
        freed
    }

    pub(super) fn drop_dram(&self, id: &BlockId, slot: SlotRef) -> bool {
        let meta = self.arena.pin(slot).and_then(|p| p.meta().ok());
        let now = self.clock.policy();
        let (worth, dropped) = {
            let mut directory = self.directory.lock();
            (directory.index_value(&id.digest, now), directory.drop_slot(id, slot, MissReason::Evicted))
        };
        let (counter, moved) = match dropped {
            Dropped::None => return false,
            Dropped::StillOnNvme | Dropped::StillInDram => (&self.counters.demoted_parts, Moved::Demoted),
            Dropped::PartGone | Dropped::PositionGone => (&self.counters.evicted_parts, Moved::Evicted),
        };
        counter.one();
        self.arena.free(slot);
        if let Some(meta) = meta {
            let tier = if moved == Moved::Demoted { Tier::Nvme } else { Tier::Dram };
            self.journal.moved(&Subject::of(&meta), moved, tier, worth);
        }
        self.room.notify_waiters();
        true
    }

    /// Keeps DRAM between its watermarks; woken by puts and once in a while.
    pub(super) async fn keep_dram_free(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.pressure.notified() => {}
                // Not with each put: while there is pressure, what has ended is evicted first anyway.
                () = tokio::time::sleep(WATERMARK_POLL) => self.let_finished_go().await,
            }
            let usage = self.arena.usage();
            let share = |percent: u8| usage.capacity_bytes / 100 * u64::from(percent);
            let low = share(self.config.arena.low_watermark_percent);
            // While there is room, what should go first and cannot yet is waited for: in its place others would go that are
            // worth more. So is what is being written: it may be what should go first, and is no victim yet.
            let room = usage.free_bytes >= low / 2;
            let (hurry, free) = if room {
                (Hurry::No, usage.free_bytes + usage.reserved_bytes)
            } else {
                (Hurry::Yes, usage.free_bytes)
            };
            if free >= low {
                continue;
            }
            let mut wanted = share(self.config.arena.high_watermark_percent).saturating_sub(free);
            // Before the look, so that what ends during it is not missed.
            self.short.store(true, Ordering::Release);
            while wanted > 0 {
                let freed = self.evict_dram(wanted, hurry);
                if freed == 0 {
                    break;
                }
                wanted = wanted.saturating_sub(freed);
                tokio::task::yield_now().await;
            }
            if wanted == 0 {
                self.short.store(false, Ordering::Release);
            }
        }
    }

    /// Drops the DRAM copies of sessions that have ended and that NVMe has, before anybody wants their room.
    async fn let_finished_go(&self) {
        loop {
            for _ in 0..VICTIMS_PER_SLICE {
                let Some(victim) = self.directory.lock().finished_victim() else { return };
                // One that is read in place keeps its slot without a lease, too: it goes when its turn comes.
                let gone = victim.parts.iter().filter(|part| {
                    let free = part.slot.filter(|slot| !self.arena.is_pinned(*slot));
                    free.is_some_and(|slot| self.drop_dram(&block(&victim, part), slot))
                });
                if gone.count() == 0 {
                    return;
                }
                self.counters.finished_positions.one();
            }
            tokio::task::yield_now().await;
        }
    }

    /// Something has ended that may have kept blocks in DRAM: a write to NVMe, a lease.
    pub(super) fn may_leave(&self) {
        self.room.notify_waiters();
        if self.short.swap(false, Ordering::AcqRel) {
            self.pressure.notify_one();
        }
    }

    /// Makes room on NVMe for a block that found none when so many evictions had `made` some. One evicts at a time: writers
    /// that all found the device full would else empty it.
    pub(super) async fn make_nvme_room(&self, len: u32, made: u64) -> RoomMade {
        let _turn = self.nvme_room.turn.lock().await;
        if self.nvme_room.made() != made {
            return RoomMade::Elsewhere;
        }
        let batch = NVME_EVICT_BYTES.min(self.config.nvme.bytes.0 / NVME_EVICT_SHARE);
        if self.evict_nvme(batch.max(u64::from(len))).await == 0 {
            return RoomMade::None;
        }
        self.nvme_room.made.fetch_add(1, Ordering::Release);
        RoomMade::Here
    }

    /// Frees at least `bytes` of NVMe by policy, or what can be found; answers how many.
    pub(super) async fn evict_nvme(&self, bytes: u64) -> u64 {
        let now = self.clock.policy();
        let (mut freed, mut copies) = (0, Vec::new());
        let (mut gone, mut worth) = (Vec::new(), HashMap::new());
        while freed < bytes && copies.len() < VICTIMS_PER_SLICE {
            let mut directory = self.directory.lock();
            let Some(victim) = directory.victim(Tier::Nvme, now) else { break };
            let before = copies.len();
            worth.insert(victim.digest, directory.index_value(&victim.digest, now));
            for part in &victim.parts {
                let Some(place) = part.place else { continue };
                let id = block(&victim, part);
                match directory.drop_place(&id, place, MissReason::Evicted) {
                    Dropped::None => continue,
                    Dropped::PartGone | Dropped::PositionGone => gone.push((victim.handle, id)),
                    Dropped::StillOnNvme | Dropped::StillInDram => {}
                }
                freed += u64::from(part.len);
                copies.push(BlockCopy { handle: victim.handle, id, place });
            }
            if copies.len() == before {
                break;
            }
        }
        self.counters.evicted_parts.add(gone.len() as u64);
        for entry in self.index_entries(gone).await {
            let worth = worth.get(&entry.id.digest).copied().flatten();
            self.journal.moved(&Subject::of_entry(&entry), Moved::Evicted, Tier::Nvme, worth);
        }
        self.free_places(&copies).await;
        freed
    }
}

fn block(victim: &Victim, part: &VictimPart) -> BlockId {
    BlockId { digest: victim.digest, group: part.group, shard: part.shard }
}
