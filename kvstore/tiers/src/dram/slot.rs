//! A slot in the hands of the arena's users: [`Reserved`] while it is written, [`Pinned`] while it is read.

use std::fmt;
use std::ops::{Bound, Deref, RangeBounds};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use kvkeep_core::ids::{BlockId, TenantId};
use kvkeep_core::{BlockMeta, ChunkSums, Error, ErrorKind, Result, SlotRef};

use super::arena::Shared;
use super::memory::{Reading, UNIT_BYTES, Writing};
use crate::copy::copy_cold;
use crate::io::buf::IoBuf;

/// What memory is wanted for. Each has a reserve of its own; `Put` has none and leaves the others' alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// A client's put.
    Put,
    /// A block on its way up from L3.
    Promote,
    /// A replica sent by another node.
    Replica,
    /// Scratch of a codec.
    Encode,
    /// A block being repaired.
    Repair,
}

impl Purpose {
    pub(super) const COUNT: usize = 5;

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

/// Where a slot lies, unpacked from a [`SlotRef`].
///
/// ```text
/// bits 54..64 file | 36..54 first unit of the slot in the file | 0..36 generation, never 0
/// ```
/// Generations count the reservations of one life of the arena. After 2^36 of them they begin again at 1: a stale reference
/// would have to meet the very slot, exactly that many reservations later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotAt {
    pub(super) file: u16,
    pub(super) unit: u32,
    pub(super) generation: u64,
}

const UNIT_BITS: u32 = 18;
const GENERATION_BITS: u32 = 36;
/// Most files of an arena: 10 bits.
pub(super) const FILES_MAX: usize = 1 << (64 - UNIT_BITS - GENERATION_BITS);
/// Largest generation.
pub(super) const GENERATION_MAX: u64 = (1 << GENERATION_BITS) - 1;

impl SlotAt {
    pub(super) fn pack(self) -> SlotRef {
        let raw = u64::from(self.file) << (UNIT_BITS + GENERATION_BITS)
            | u64::from(self.unit) << GENERATION_BITS
            | self.generation;
        SlotRef::from_raw(raw).expect("a generation is never 0")
    }

    pub(super) fn unpack(slot: SlotRef) -> Self {
        let raw = slot.raw();
        Self {
            file: (raw >> (UNIT_BITS + GENERATION_BITS)) as u16,
            unit: (raw >> GENERATION_BITS) as u32 & ((1 << UNIT_BITS) - 1),
            generation: raw & GENERATION_MAX,
        }
    }
}

/// How much is pinned now. Apart from the allocator, so that pinning and its end need no lock twice.
#[derive(Default)]
pub(super) struct PinGauge {
    pub(super) slots: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// What a slot in use knows of itself, and what gives it back to the allocator when the last hold on its memory ends.
pub(super) struct SlotEnd {
    pub(super) shared: Weak<Shared>,
    pub(super) gauge: Arc<PinGauge>,
    pub(super) at: SlotAt,
    pub(super) tenant: TenantId,
    pub(super) purpose: Purpose,
    /// Payload bytes.
    pub(super) len: u32,
    pub(super) slot_bytes: u64,
    /// Of the file, which cannot change while the slot is in use.
    pub(super) nonce: u64,
    pub(super) pins: AtomicU32,
}

impl Drop for SlotEnd {
    fn drop(&mut self) {
        // Without an arena there is nobody to give it to; the mapping ends by itself.
        if let Some(shared) = self.shared.upgrade() {
            shared.release(self);
        }
    }
}

/// A slot that one caller writes. Dropping it frees the slot, as soon as no [`IoBuf`] of it is left.
pub struct Reserved {
    memory: Writing<SlotEnd>,
}

impl Reserved {
    pub(super) fn new(memory: Writing<SlotEnd>) -> Self {
        Self { memory }
    }

    fn still_lent() -> Error {
        Error::new(
            ErrorKind::Conflict,
            "an I/O buffer of this slot is still out; wait for the engine's answer and drop it",
        )
    }

    /// Payload bytes that were asked for.
    pub fn len(&self) -> usize {
        self.memory.end().len as usize
    }

    /// Never: a slot has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The isolation domain it was reserved in.
    pub fn tenant(&self) -> TenantId {
        self.memory.end().tenant
    }

    /// The payload as far as it was written; the rest holds whatever the slot held before (of the same tenant). `Conflict`
    /// while an [`IoBuf`] of it is out.
    pub fn bytes(&self) -> Result<&[u8]> {
        self.memory.bytes().map(|b| &b[..self.len()]).ok_or_else(Self::still_lent)
    }

    /// The payload, to be written. `Conflict` while an [`IoBuf`] of it is out.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        let len = self.len();
        self.memory.bytes_mut().map(|b| &mut b[..len]).ok_or_else(Self::still_lent)
    }

    /// Copies `bytes` to payload offset `at`, around the cache where they are many. `InvalidArgument` where they do not fit,
    /// `Conflict` while an [`IoBuf`] is out.
    pub fn write_at(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let len = self.len();
        let to = at.checked_add(bytes.len()).and_then(|end| self.bytes_mut().map(|b| b.get_mut(at..end)).transpose());
        match to {
            Some(Ok(to)) => {
                copy_cold(to, bytes);
                Ok(())
            }
            Some(Err(e)) => Err(e),
            None => Err(Error::new(ErrorKind::InvalidArgument, "the bytes do not fit into the slot")
                .with("offset", at)
                .with("bytes", bytes.len())
                .with("slot_bytes", len)),
        }
    }

    /// The whole slot, padded to 4 KiB, for an engine to read into (or write from). It keeps the slot taken, even past the
    /// end of this value; until it is dropped this value's bytes are out of reach.
    pub fn io_buf(&mut self) -> IoBuf {
        self.memory.io_buf()
    }

    /// Makes the slot readable under what is known of the block. `meta.sums` are the caller's word: this does not read the
    /// payload again. On an error the slot is freed.
    ///
    /// # Errors
    /// `InvalidArgument` where `meta` disagrees with the slot (length, tenant, number of sums); `Conflict` while an
    /// [`IoBuf`] is out; `Unavailable` when the arena is gone.
    pub fn publish(mut self, meta: &BlockMeta) -> Result<SlotRef> {
        let len = self.len();
        let end = self.memory.end();
        if meta.len as usize != len
            || meta.tenant != end.tenant
            || meta.sums.as_slice().len() != ChunkSums::count_for(len)
        {
            return Err(Error::new(ErrorKind::InvalidArgument, "the block's facts are not those of its slot")
                .with("slot_bytes", len)
                .with("block_bytes", meta.len)
                .with("slot_tenant", end.tenant)
                .with("block_tenant", meta.tenant)
                .with("sums", meta.sums.as_slice().len()));
        }
        let shared =
            end.shared.upgrade().ok_or_else(|| Error::new(ErrorKind::Unavailable, "the arena has been closed"))?;
        // The padding goes to disk with the payload: nothing of an older block may.
        self.memory.bytes_mut().ok_or_else(Self::still_lent)?[len..].fill(0);
        let memory = self.memory.finish().map_err(|_| Self::still_lent())?;
        shared.publish(memory, meta)
    }
}

impl fmt::Debug for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reserved").field("at", &self.memory.end().at).field("len", &self.len()).finish()
    }
}

/// Where a slot lies, for a process that mapped its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Nonce of the file.
    pub file: u64,
    /// Of the payload in the file, bytes.
    pub offset: u64,
    /// Of the slot's entry in the file, bytes.
    pub entry: u64,
    /// What the entry holds as long as the slot is this block's.
    pub generation: u64,
}

/// A readable slot. Its bytes stay what they are for as long as this, a clone, or any `Bytes` or [`IoBuf`] made of it lives,
/// whether or not the slot has been freed meanwhile.
pub struct Pinned {
    memory: Reading<SlotEnd>,
}

impl Pinned {
    pub(super) fn new(memory: Reading<SlotEnd>) -> Self {
        let end = memory.end();
        if end.pins.fetch_add(1, Ordering::Relaxed) == 0 {
            end.gauge.slots.fetch_add(1, Ordering::Relaxed);
            end.gauge.bytes.fetch_add(end.slot_bytes, Ordering::Relaxed);
        }
        Self { memory }
    }

    /// Which slot it is.
    pub fn slot(&self) -> SlotRef {
        self.memory.end().at.pack()
    }

    /// What was published with it, read back from the slot's entry.
    ///
    /// # Errors
    /// `Corrupt` where the entry's own checksum fails; `Unavailable` when the arena is gone.
    pub fn meta(&self) -> Result<BlockMeta> {
        let end = self.memory.end();
        let shared =
            end.shared.upgrade().ok_or_else(|| Error::new(ErrorKind::Unavailable, "the arena has been closed"))?;
        shared.meta(end).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "the slot's entry is not what was written").with("slot", end.at.pack().raw())
        })
    }

    /// The sums of the payload, one per 64 KiB. Errors as [`Self::meta`].
    pub fn sums(&self) -> Result<ChunkSums> {
        self.meta().map(|m| m.sums)
    }

    /// Whether the slot's entry names this very block and key: the compare before a byte is served, without building a
    /// [`BlockMeta`].
    pub fn holds(&self, id: &BlockId, key: &[u8]) -> bool {
        let end = self.memory.end();
        end.shared.upgrade().is_some_and(|shared| shared.names(end, id, key))
    }

    /// Where another process that mapped the file finds it. `None` when the arena is gone.
    pub fn site(&self) -> Option<Site> {
        let end = self.memory.end();
        end.shared.upgrade()?.site(end)
    }

    /// The whole slot, zero-padded to 4 KiB, as the source of a write.
    pub fn io_buf(&self) -> IoBuf {
        self.memory.io_buf()
    }

    /// Bytes of the padded slot.
    pub fn padded_len(&self) -> usize {
        (self.len()).next_multiple_of(UNIT_BYTES)
    }

    /// The payload as `Bytes`, without a copy; it holds this pin.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// A part of the payload as `Bytes`, without a copy; it holds a pin. `None` where the range lies outside.
    pub fn range(&self, range: impl RangeBounds<usize>) -> Option<Bytes> {
        let from = match range.start_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n.checked_add(1)?,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(n) => n.checked_add(1)?,
            Bound::Excluded(n) => *n,
            Bound::Unbounded => self.len(),
        };
        self.get(from..to)?;
        Some(self.clone().into_bytes().slice(from..to))
    }
}

impl Clone for Pinned {
    fn clone(&self) -> Self {
        Self::new(self.memory.clone())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let end = self.memory.end();
        if end.pins.fetch_sub(1, Ordering::Relaxed) == 1 {
            end.gauge.slots.fetch_sub(1, Ordering::Relaxed);
            end.gauge.bytes.fetch_sub(end.slot_bytes, Ordering::Relaxed);
        }
    }
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.memory.end().len as usize]
    }
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Pinned> for Bytes {
    fn from(pinned: Pinned) -> Self {
        pinned.into_bytes()
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned").field("at", &self.memory.end().at).field("len", &self.len()).finish()
    }
}
