//! Get: from DRAM, or up from NVMe.
//!
//! Floor of one 1 MiB part out of DRAM over gRPC, beyond what the library costs: one pass for the sums, no copy (the
//! message's payload is the slot itself), no syscall. From NVMe: one O_DIRECT read of header and payload into the slot.

use std::sync::Arc;

use kvkeep_core::directory::Located;
use kvkeep_core::words::Happening;
use kvkeep_core::{
    BlockId, BlockMeta, Error, ErrorKind, Fidelity, Handle, Key, MissReason, PartStatus, SUM_CHUNK_BYTES, Tier, Version,
};
use kvkeep_tiers::dram::{Pinned, Purpose};
use kvkeep_tiers::nvme::{Expect, Read, padded};

use super::Store;
use super::inflight::Flight;
use super::journal::{Moved, Subject};
use super::put::Caller;

/// One part, or a range of it.
#[derive(Clone, Debug)]
pub struct PartRead {
    /// Which block.
    pub id: BlockId,
    /// The engine's key, compared with the stored one.
    pub key: Key,
    /// Range within the part.
    pub offset: u64,
    /// Length of the range; 0: to the end of the part.
    pub length: u64,
    /// Only this version.
    pub version: Option<Version>,
    /// Least that is accepted.
    pub fidelity: Fidelity,
}

/// What came of it.
#[derive(Debug)]
pub enum Fetched {
    /// Verified bytes.
    Hit {
        /// The whole part, held for as long as this lives.
        part: Pinned,
        /// Its description.
        meta: Box<BlockMeta>,
        /// The range asked, within the part.
        range: std::ops::Range<usize>,
        /// Where it was found.
        tier: Tier,
    },
    /// No bytes.
    No(PartStatus, MissReason),
    /// The request itself is wrong.
    Bad(Error),
}

impl Store {
    /// Reads one part. Doubt is a miss, counted and explained.
    pub async fn fetch(self: &Arc<Self>, caller: Caller, handle: Handle, read: PartRead) -> Fetched {
        let fetched = self.fetch_uncounted(caller, handle, read).await;
        match &fetched {
            Fetched::Hit { range, tier, .. } => {
                let parts =
                    if *tier == Tier::Dram { &self.counters.get_dram_parts } else { &self.counters.get_nvme_parts };
                parts.one();
                self.counters.get_bytes.add(range.len() as u64);
                self.first_hit();
            }
            Fetched::No(_, reason) => self.counters.missed(*reason),
            Fetched::Bad(_) => {}
        }
        fetched
    }

    async fn fetch_uncounted(self: &Arc<Self>, caller: Caller, handle: Handle, read: PartRead) -> Fetched {
        // A copy can move between the look-up and the read (evicted, promoted); each turn looks again.
        for _ in 0..3 {
            let Some(found) = self.directory.lock().locate(&read.id.digest, read.id.group, read.id.shard) else {
                return self.absent(&read);
            };
            if found.handle != handle {
                return Fetched::No(PartStatus::Miss, MissReason::Revision);
            }
            if read.version.is_some_and(|v| v != found.version) {
                return Fetched::No(PartStatus::Miss, MissReason::Removed);
            }
            if found.fidelity > read.fidelity {
                return Fetched::No(PartStatus::Miss, MissReason::Format);
            }
            if let Some(slot) = found.slot
                && let Some(part) = self.arena.pin(slot)
            {
                match self.check_dram(&read, &found, &part) {
                    Ok(Some((meta, range))) => {
                        return Fetched::Hit { part, meta: Box::new(meta), range, tier: Tier::Dram };
                    }
                    Ok(None) => {
                        drop(part);
                        self.dram_copy_is_bad(&read.id, slot).await;
                        continue;
                    }
                    Err(e) => return Fetched::Bad(e),
                }
            }
            match self.read_up(caller, &read.id, handle, Some(&read.key), &found, Purpose::Promote).await {
                Flight::Ready(part) => match self.range_of(&read, part.len()) {
                    Ok(range) => {
                        let Ok(meta) = part.meta() else { continue };
                        if meta.key != read.key || meta.version != found.version {
                            return Fetched::No(PartStatus::Miss, MissReason::Quarantined);
                        }
                        return Fetched::Hit { part, meta: Box::new(meta), range, tier: Tier::Nvme };
                    }
                    Err(e) => return Fetched::Bad(e),
                },
                Flight::Again => {}
                Flight::No(status, reason) => return Fetched::No(status, reason),
            }
        }
        Fetched::No(PartStatus::Throttled, MissReason::Pending)
    }

    fn absent(&self, read: &PartRead) -> Fetched {
        if self.reservations.lock().in_progress(&read.id).is_some() {
            return Fetched::No(PartStatus::Pending, MissReason::Pending);
        }
        Fetched::No(PartStatus::Miss, self.journal.why_absent(&read.id.digest).unwrap_or(MissReason::NeverStored))
    }

    fn range_of(&self, read: &PartRead, len: usize) -> Result<std::ops::Range<usize>, Error> {
        let len = len as u64;
        let end = if read.length == 0 { Some(len) } else { read.offset.checked_add(read.length) };
        match end {
            Some(end) if read.offset < len && end <= len => Ok(read.offset as usize..end as usize),
            _ => Err(Error::new(ErrorKind::InvalidArgument, "the range lies outside of the part")
                .with("offset", read.offset)
                .with("length", read.length)
                .with("part_bytes", len)),
        }
    }

    /// Compares what the slot says of itself with what was asked, and the sums of every 64 KiB that the range touches.
    /// `None`: the copy is bad.
    fn check_dram(
        &self,
        read: &PartRead,
        found: &Located,
        part: &Pinned,
    ) -> Result<Option<(BlockMeta, std::ops::Range<usize>)>, Error> {
        let range = self.range_of(read, part.len())?;
        let Ok(meta) = part.meta() else { return Ok(None) };
        if meta.id != read.id || meta.key != read.key || meta.version != found.version {
            return Ok(None);
        }
        let first = range.start / SUM_CHUNK_BYTES;
        let last = range.end.div_ceil(SUM_CHUNK_BYTES);
        let covered = &part[first * SUM_CHUNK_BYTES..(last * SUM_CHUNK_BYTES).min(part.len())];
        Ok(meta.sums.first_mismatch(first, covered).is_none().then_some((meta, range)))
    }

    async fn dram_copy_is_bad(&self, id: &BlockId, slot: kvkeep_core::SlotRef) {
        tracing::error!(block = ?id, "a DRAM copy failed its check: quarantined");
        self.counters.corrupt_copies.one();
        self.arena.quarantine(slot);
        self.directory.lock().drop_slot(id, slot, MissReason::Quarantined);
        self.journal.note(&id.digest, Happening::Quarantined, Tier::Dram, Some(MissReason::Quarantined));
    }

    /// Brings one part up from NVMe into a slot, once for all who wait for it.
    pub(super) async fn read_up(
        self: &Arc<Self>,
        caller: Caller,
        id: &BlockId,
        handle: Handle,
        key: Option<&Key>,
        found: &Located,
        purpose: Purpose,
    ) -> Flight {
        let (Some(nvme), Some(place)) = (self.nvme.as_ref(), found.place) else { return Flight::Again };
        let store = Arc::clone(self);
        let (id, found, key, nvme) = (*id, *found, key.cloned(), nvme.clone());
        self.flights
            .join(id, found.version, move || async move {
                let Some(mut slot) = store.slot_for_read(caller.tenant, found.len, purpose).await else {
                    return Flight::No(PartStatus::Throttled, MissReason::Late);
                };
                let expect = Expect { id, handle, key, version: found.version, len: found.len };
                let into = slot.io_buf();
                debug_assert_eq!(into.len(), padded(found.len), "a slot is its payload rounded up to whole pages");
                match nvme.get(&expect, place, into).await {
                    Read::Ok { meta, payload } => {
                        drop(payload);
                        store.counters.nvme_read_bytes.add(u64::from(found.len));
                        let at = match slot.publish(&meta) {
                            Ok(at) => at,
                            Err(error) => {
                                tracing::error!(block = ?id, %error, "a block that was read could not be published");
                                return Flight::No(PartStatus::Miss, MissReason::Io);
                            }
                        };
                        let Some(part) = store.arena.pin(at) else { return Flight::Again };
                        if store.directory.lock().set_slot(&id, found.version, at) {
                            store.counters.promoted_parts.one();
                            store.journal.moved(&Subject::of(&meta), Moved::Promoted, Tier::Dram);
                        } else {
                            // Gone or promoted by another way meanwhile; the pin keeps the bytes for who asked.
                            store.arena.free(at);
                        }
                        Flight::Ready(part)
                    }
                    Read::Stale => {
                        store.directory.lock().drop_place(&id, place, MissReason::Evicted);
                        Flight::Again
                    }
                    Read::Corrupt(why) => {
                        tracing::error!(block = ?id, %why, "an NVMe copy failed its check: quarantined");
                        store.counters.corrupt_copies.one();
                        store.directory.lock().drop_place(&id, place, MissReason::Quarantined);
                        store.journal.note(
                            &id.digest,
                            Happening::Quarantined,
                            Tier::Nvme,
                            Some(MissReason::Quarantined),
                        );
                        Flight::Again
                    }
                    Read::Io(error) => {
                        tracing::error!(block = ?id, %error, "an NVMe read failed");
                        Flight::No(PartStatus::Miss, MissReason::Io)
                    }
                }
            })
            .await
    }
}
