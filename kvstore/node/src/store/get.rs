//! Get: from DRAM, or up from NVMe.
//!
//! Floor of one 1 MiB part out of DRAM over gRPC, beyond what the library costs: one pass for the sums, no copy (the
//! message's payload is the slot itself), no syscall. From NVMe: one O_DIRECT read of header and payload into the slot.

use std::sync::Arc;

use kvkeep_core::directory::Located;
use kvkeep_core::words::Happening;
use kvkeep_core::{
    BlockId, BlockMeta, Error, ErrorKind, Fidelity, Handle, Key, MissReason, NvmePlace, PartStatus, SUM_CHUNK_BYTES,
    Tier, Version,
};
use kvkeep_tiers::dram::{Pinned, Purpose};
use kvkeep_tiers::io::IoBuf;
use kvkeep_tiers::nvme::{Expect, Read, padded};
use rand::Rng as _;

use super::Store;
use super::inflight::Flight;
use super::journal::{Moved, Subject};
use super::put::Caller;

/// Looks at where a part is before a get gives it up.
const TURNS_MAX: usize = 4;

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

/// What of a DRAM copy is compared with its sums before it is given away. Its entry always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// Every chunk that the range touches.
    All,
    /// Those of its first bytes, at least so many. The rest is left to [`Store::compare_to`].
    First(usize),
    /// One of them.
    One,
    /// None.
    None,
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
        /// What lies before this byte of the part was compared with its sums, from the start of the range on.
        compared: usize,
    },
    /// No bytes.
    No(PartStatus, MissReason),
    /// The request itself is wrong.
    Bad(Error),
}

/// What came of a part whose reader offers memory of its own.
#[derive(Debug)]
pub enum Obtained {
    /// Here it is, or why it is not.
    Fetched(Fetched),
    /// Verified bytes, read from NVMe straight into that memory.
    Landed(Box<BlockMeta>),
}

/// A DRAM copy that is what was asked for.
struct Checked {
    meta: BlockMeta,
    range: std::ops::Range<usize>,
    compared: usize,
}

/// Whether these chunks of 64 KiB have their sums.
fn chunks_match(part: &Pinned, meta: &BlockMeta, chunks: std::ops::Range<usize>) -> bool {
    let bytes = chunks.start * SUM_CHUNK_BYTES..(chunks.end * SUM_CHUNK_BYTES).min(part.len());
    chunks.is_empty() || meta.sums.first_mismatch(chunks.start, &part[bytes]).is_none()
}

impl Store {
    /// Reads one part. Doubt is a miss, counted and explained.
    pub async fn fetch(self: &Arc<Self>, caller: Caller, handle: Handle, read: PartRead, compare: Compare) -> Fetched {
        match self.fetch_or_land(caller, handle, read, compare, |_| None).await {
            Obtained::Fetched(fetched) => fetched,
            Obtained::Landed(_) => unreachable!("nothing lands where no memory is given"),
        }
    }

    /// The same, but where the block is on NVMe alone and not used often, the device reads it straight into the memory that
    /// `landing` gives for so many bytes, if it gives any. That is asked at most once per try, and only for a whole part
    /// without padding.
    pub async fn fetch_or_land(
        self: &Arc<Self>,
        caller: Caller,
        handle: Handle,
        read: PartRead,
        compare: Compare,
        landing: impl FnOnce(u64) -> Option<IoBuf>,
    ) -> Obtained {
        let obtained = self.obtain(caller, handle, read, compare, landing).await;
        match &obtained {
            Obtained::Landed(meta) => {
                self.counters.get_straight_parts.one();
                self.served(Tier::Nvme, u64::from(meta.len));
            }
            Obtained::Fetched(Fetched::Hit { range, tier, .. }) => self.served(*tier, range.len() as u64),
            Obtained::Fetched(Fetched::No(_, reason)) => self.counters.missed(*reason),
            Obtained::Fetched(Fetched::Bad(_)) => {}
        }
        obtained
    }

    fn served(&self, tier: Tier, bytes: u64) {
        let parts = if tier == Tier::Dram { &self.counters.get_dram_parts } else { &self.counters.get_nvme_parts };
        parts.one();
        self.counters.get_bytes.add(bytes);
        self.first_hit();
    }

    async fn obtain(
        self: &Arc<Self>,
        caller: Caller,
        handle: Handle,
        read: PartRead,
        compare: Compare,
        landing: impl FnOnce(u64) -> Option<IoBuf>,
    ) -> Obtained {
        let no = |status, reason| Obtained::Fetched(Fetched::No(status, reason));
        let bad = |error| Obtained::Fetched(Fetched::Bad(error));
        let mut landing = Some(landing);
        // A copy can move between the look-up and the read (evicted, promoted); each turn looks again.
        for _ in 0..TURNS_MAX {
            let Some(found) = self.directory.lock().locate(&read.id.digest, read.id.group, read.id.shard) else {
                return Obtained::Fetched(self.absent(&read));
            };
            if found.handle != handle {
                return no(PartStatus::Miss, MissReason::Revision);
            }
            if read.version.is_some_and(|v| v != found.version) {
                return no(PartStatus::Miss, MissReason::Removed);
            }
            if found.fidelity > read.fidelity {
                return no(PartStatus::Miss, MissReason::Format);
            }
            if let Some(slot) = found.slot
                && let Some(part) = self.arena.pin(slot)
            {
                match self.check_dram(&read, &found, &part, compare) {
                    Ok(Some(Checked { meta, range, compared })) => {
                        let meta = Box::new(meta);
                        return Obtained::Fetched(Fetched::Hit { part, meta, range, tier: Tier::Dram, compared });
                    }
                    Ok(None) => {
                        drop(part);
                        self.drop_bad_copy(&read.id, slot);
                        continue;
                    }
                    Err(e) => return bad(e),
                }
            }
            if self.may_land(&read, &found)
                && let Some(buf) = landing.take().and_then(|landing| landing(u64::from(found.len)))
            {
                match self.read_straight(&read, &found, buf).await {
                    Ok(meta) => return Obtained::Landed(meta),
                    Err(Flight::No(status, reason)) => return no(status, reason),
                    // Moved or damaged meanwhile: look again; there is no second landing.
                    Err(_) => continue,
                }
            }
            match self.read_up(caller, &read.id, handle, Some(&read.key), &found, Purpose::Promote).await {
                Flight::Ready(part) => match self.range_of(&read, part.len()) {
                    Ok(range) => {
                        let Ok(meta) = part.meta() else { continue };
                        if meta.key != read.key || meta.version != found.version {
                            return no(PartStatus::Miss, MissReason::Quarantined);
                        }
                        let meta = Box::new(meta);
                        // Header and payload were compared when they were read.
                        let compared = part.len();
                        return Obtained::Fetched(Fetched::Hit { part, meta, range, tier: Tier::Nvme, compared });
                    }
                    Err(e) => return bad(e),
                },
                Flight::Again => {}
                Flight::No(status, reason) => return no(status, reason),
            }
        }
        no(PartStatus::Throttled, MissReason::Pending)
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
        compare: Compare,
    ) -> Result<Option<Checked>, Error> {
        let range = self.range_of(read, part.len())?;
        let Ok(meta) = part.meta() else { return Ok(None) };
        if meta.id != read.id || meta.key != read.key || meta.version != found.version {
            return Ok(None);
        }
        let (first, last) = (range.start / SUM_CHUNK_BYTES, range.end.div_ceil(SUM_CHUNK_BYTES));
        let (chunks, compared) = match compare {
            Compare::All => (first..last, range.end),
            Compare::First(bytes) => {
                let end = range.start.saturating_add(bytes).min(range.end);
                (first..end.div_ceil(SUM_CHUNK_BYTES), end)
            }
            Compare::One => {
                let one = rand::rng().random_range(first..last);
                (one..one + 1, range.start)
            }
            Compare::None => (first..first, range.start),
        };
        Ok(chunks_match(part, &meta, chunks).then_some(Checked { meta, range, compared }))
    }

    /// Compares a part that [`Compare::First`] was asked of from where it was `compared` to up to the byte `end`; `false`: the
    /// copy is bad.
    pub fn compare_to(&self, part: &Pinned, meta: &BlockMeta, compared: &mut usize, end: usize) -> bool {
        if end <= *compared {
            return true;
        }
        // A chunk that a frame's end lies in was compared whole with that frame.
        let chunks = compared.div_ceil(SUM_CHUNK_BYTES)..end.div_ceil(SUM_CHUNK_BYTES);
        *compared = end;
        chunks_match(part, meta, chunks)
    }

    /// A DRAM copy has other bytes than were put: it is not used again. Whoever finds it first counts it.
    pub fn drop_bad_copy(&self, id: &BlockId, slot: kvkeep_core::SlotRef) {
        if self.arena.quarantine(slot) {
            tracing::error!(block = ?id, "a DRAM copy failed its check: quarantined");
            self.counters.corrupt_copies.one();
            self.journal.note(&id.digest, Happening::Quarantined, Tier::Dram, Some(MissReason::Quarantined));
        }
        self.directory.lock().drop_slot(id, slot, MissReason::Quarantined);
    }

    /// Whether a part may be read past the arena: all of it, in whole pages, and not so often used that DRAM should have it.
    fn may_land(&self, read: &PartRead, found: &Located) -> bool {
        let whole = read.offset == 0 && (read.length == 0 || read.length == u64::from(found.len));
        let uses = self.config.nvme.promote_at_use;
        whole
            && found.place.is_some()
            && padded(found.len) == found.len as usize
            && (uses == 0 || found.accesses < uses)
    }

    /// Reads a part from NVMe into a buffer of the caller's.
    async fn read_straight(&self, read: &PartRead, found: &Located, buf: IoBuf) -> Result<Box<BlockMeta>, Flight> {
        let (Some(nvme), Some(place)) = (self.nvme.as_ref(), found.place) else { return Err(Flight::Again) };
        let expect = Expect {
            id: read.id,
            handle: found.handle,
            key: Some(read.key.clone()),
            version: found.version,
            len: found.len,
        };
        let answer = nvme.get(&expect, place, buf).await;
        self.judge(&read.id, place, answer).map(|(meta, _)| {
            self.counters.nvme_read_bytes.add(u64::from(found.len));
            meta
        })
    }

    /// What a read of NVMe came to; the directory is told where it found no such copy.
    fn judge(&self, id: &BlockId, place: NvmePlace, read: Read) -> Result<(Box<BlockMeta>, IoBuf), Flight> {
        match read {
            Read::Ok { meta, payload } => Ok((meta, payload)),
            Read::Stale => {
                self.directory.lock().drop_place(id, place, MissReason::Evicted);
                Err(Flight::Again)
            }
            Read::Corrupt(why) => {
                tracing::error!(block = ?id, %why, "an NVMe copy failed its check: quarantined");
                self.counters.corrupt_copies.one();
                self.directory.lock().drop_place(id, place, MissReason::Quarantined);
                self.journal.note(&id.digest, Happening::Quarantined, Tier::Nvme, Some(MissReason::Quarantined));
                Err(Flight::Again)
            }
            Read::Io(error) => {
                tracing::error!(block = ?id, %error, "an NVMe read failed");
                Err(Flight::No(PartStatus::Miss, MissReason::Io))
            }
        }
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
                let answer = nvme.get(&expect, place, into).await;
                let meta = match store.judge(&id, place, answer) {
                    Ok((meta, payload)) => {
                        // The slot may be published once its buffer is back.
                        drop(payload);
                        meta
                    }
                    Err(other) => return other,
                };
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
                    store.pressure.notify_one();
                    store.counters.promoted_parts.one();
                    store.journal.moved(&Subject::of(&meta), Moved::Promoted, Tier::Dram, None);
                } else {
                    // Gone or promoted by another way meanwhile; the pin keeps the bytes for who asked.
                    store.arena.free(at);
                }
                Flight::Ready(part)
            })
            .await
    }
}
