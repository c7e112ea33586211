//! What stands in an arena file beside the payload, so that the next life of the server can adopt it.
//!
//! Little-endian. A unit is 4 KiB; places are unit numbers in the file. A file lives on tmpfs: what a killed process had
//! stored is what the next one finds, in the order of the stores, and a power cut leaves nothing at all.
//!
//! ```text
//! file     = header unit | extents and holes, in any order
//! extent   = table (entries, padded to units) | slot 0 | slot 1 | ...
//!
//! header unit
//!   0   8  "KVKARENA"
//!   8   4  layout version (1)
//!  12   4  tenant: the isolation domain of the whole file
//!  16   8  bytes of the file
//!  24   8  nonce of the file; every crc below covers it, so a record of an older file can never be taken for one of this
//!  32   4  crc32 of 0..32
//!  64  32  extent record 0, then 1, ... (EXTENTS_MAX of them)
//!
//! extent record
//!   0   4  first unit, of the table
//!   4   4  slots
//!   8   4  units of one slot
//!  12   4  crc32 of nonce, record number and 0..12; written last, cleared first
//!  16  16  zero
//!
//! entry (one per slot; ENTRY_FIXED_BYTES + 4 per 64 KiB of slot, rounded up to 64)
//!   0   4  state: 0 empty, "PUBL" published; written last, cleared first
//!   4   4  crc32 of nonce, the slot's first unit and 8..216+4n
//!   8   8  generation
//!  16   4  payload bytes
//!  20   4  tenant            24  4  namespace         28  4  revision
//!  32   8  version           40  4  position in chain
//!  44   2  group             46  2  shard
//!  48   1  class code        49  1  fidelity code     50  1  key bytes         51  1  bit 0: has a parent
//!  52   4  n, number of sums
//!  56  16  digest            72 16  parent's digest or zero
//!  88 128  key, zero-padded
//! 216  4n  crc32 of each 64 KiB of payload
//! ```

use kvkeep_core::checksum::{ChunkSums, SUM_CHUNK_BYTES};
use kvkeep_core::ids::{
    BlockId, Digest, GroupId, Handle, KEY_BYTES_MAX, Key, NamespaceId, Revision, ShardId, TenantId,
};
use kvkeep_core::slot_entry::{GENERATION_AT, STATE_AT, STATE_EMPTY};
use kvkeep_core::{BlockMeta, Class, Fidelity, Version};

use super::memory::UNIT_BYTES;

const MAGIC: &[u8; 8] = b"KVKARENA";
/// Raised when a reader of the older layout would misread the newer one; files of another version are removed.
const LAYOUT_VERSION: u32 = 1;

/// Bytes of the file's own facts.
pub(super) const HEADER_BYTES: usize = 64;
/// Bytes of an extent record.
pub(super) const RECORD_BYTES: usize = 32;
/// Where its crc stands.
pub(super) const RECORD_CRC_AT: usize = 12;
/// Most extents of one file.
pub(super) const EXTENTS_MAX: usize = (UNIT_BYTES - HEADER_BYTES) / RECORD_BYTES;

/// Bytes of an entry before its sums.
pub(super) const ENTRY_FIXED_BYTES: usize = 216;

/// The facts of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) tenant: TenantId,
    pub(super) bytes: u64,
    pub(super) nonce: u64,
}

impl FileHeader {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&LAYOUT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.tenant.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        out[24..32].copy_from_slice(&self.nonce.to_le_bytes());
        let crc = crc32fast::hash(&out[..32]);
        out[32..36].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` for anything but a header of this layout version.
    pub(super) fn decode(unit: &[u8]) -> Option<Self> {
        let ours = unit.get(..8)? == MAGIC
            && u32_at(unit, 8)? == LAYOUT_VERSION
            && u32_at(unit, 32)? == crc32fast::hash(unit.get(..32)?);
        ours.then_some(Self { tenant: TenantId(u32_at(unit, 12)?), bytes: u64_at(unit, 16)?, nonce: u64_at(unit, 24)? })
    }
}

/// The shape of one extent: where, how many slots, how large. Everything else follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// First unit, of the table.
    pub(super) start: u32,
    /// Number of slots, at least 1.
    pub(super) slots: u32,
    /// Units of one slot, at least 1.
    pub(super) slot_units: u32,
}

impl Shape {
    pub(super) fn entry_bytes(&self) -> usize {
        entry_bytes(self.slot_units)
    }

    pub(super) fn table_units(&self) -> u32 {
        table_units(self.slots, self.slot_units)
    }

    /// First unit behind the extent.
    pub(super) fn end(&self) -> u32 {
        self.start + self.table_units() + self.slots * self.slot_units
    }

    pub(super) fn slot_unit(&self, slot: u32) -> u32 {
        self.start + self.table_units() + slot * self.slot_units
    }

    /// Which slot starts at `unit`.
    pub(super) fn slot_at(&self, unit: u32) -> Option<u32> {
        let into = unit.checked_sub(self.start + self.table_units())?;
        (into.is_multiple_of(self.slot_units) && into / self.slot_units < self.slots).then(|| into / self.slot_units)
    }

    pub(super) fn slot_bytes(&self) -> u64 {
        u64::from(self.slot_units) * UNIT_BYTES as u64
    }

    pub(super) fn encode(&self, nonce: u64, record: usize) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        out[..4].copy_from_slice(&self.start.to_le_bytes());
        out[4..8].copy_from_slice(&self.slots.to_le_bytes());
        out[8..12].copy_from_slice(&self.slot_units.to_le_bytes());
        let crc = crc(nonce, record as u32, &out[..12]);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` where the record is empty, torn, or does not fit into a file of `file_units`.
    pub(super) fn decode(bytes: &[u8], nonce: u64, record: usize, file_units: u32) -> Option<Self> {
        if u32_at(bytes, RECORD_CRC_AT)? != crc(nonce, record as u32, bytes.get(..12)?) {
            return None;
        }
        let shape = Self { start: u32_at(bytes, 0)?, slots: u32_at(bytes, 4)?, slot_units: u32_at(bytes, 8)? };
        let small = |n: u32| (1..file_units).contains(&n);
        if !small(shape.start) || !small(shape.slots) || !small(shape.slot_units) {
            return None;
        }
        let units = u64::from(shape.slots) * u64::from(shape.slot_units);
        // Checked in 64 bits first: `end` could wrap.
        (units < u64::from(file_units) && shape.end() <= file_units).then_some(shape)
    }
}

/// Bytes of a table entry for slots of this size.
pub(super) fn entry_bytes(slot_units: u32) -> usize {
    (ENTRY_FIXED_BYTES + 4 * (slot_units as usize * UNIT_BYTES).div_ceil(SUM_CHUNK_BYTES)).next_multiple_of(64)
}

/// Units of the table of `slots` slots.
pub(super) fn table_units(slots: u32, slot_units: u32) -> u32 {
    // Fits: a table is never larger than its slots, and those fit into a file of at most 1 GiB.
    (slots as usize * entry_bytes(slot_units)).div_ceil(UNIT_BYTES) as u32
}

/// Units of the slot for a payload of `len` bytes.
pub(super) fn slot_units(len: u64) -> u32 {
    u32::try_from(len.div_ceil(UNIT_BYTES as u64)).unwrap_or(u32::MAX).max(1)
}

/// An entry, all but its state, which the caller stores last.
pub(super) fn encode_entry(meta: &BlockMeta, nonce: u64, unit: u32, generation: u64) -> Vec<u8> {
    let sums = meta.sums.as_slice();
    let key = meta.key.as_bytes();
    let mut out = vec![0; ENTRY_FIXED_BYTES + 4 * sums.len()];
    out[GENERATION_AT..GENERATION_AT + 8].copy_from_slice(&generation.to_le_bytes());
    out[16..20].copy_from_slice(&meta.len.to_le_bytes());
    out[20..24].copy_from_slice(&meta.tenant.0.to_le_bytes());
    out[24..28].copy_from_slice(&meta.handle.namespace.0.to_le_bytes());
    out[28..32].copy_from_slice(&meta.handle.revision.0.to_le_bytes());
    out[32..40].copy_from_slice(&meta.version.0.to_le_bytes());
    out[40..44].copy_from_slice(&meta.position.to_le_bytes());
    out[44..46].copy_from_slice(&meta.id.group.0.to_le_bytes());
    out[46..48].copy_from_slice(&meta.id.shard.0.to_le_bytes());
    out[48] = meta.class.code();
    out[49] = meta.fidelity.code();
    out[50] = key.len() as u8; // 1..=128, which `Key` guarantees
    out[51] = u8::from(meta.parent.is_some());
    out[52..56].copy_from_slice(&(sums.len() as u32).to_le_bytes());
    out[56..72].copy_from_slice(meta.id.digest.as_bytes());
    if let Some(parent) = &meta.parent {
        out[72..88].copy_from_slice(parent.as_bytes());
    }
    out[88..88 + key.len()].copy_from_slice(key);
    for (i, sum) in sums.iter().enumerate() {
        let at = ENTRY_FIXED_BYTES + 4 * i;
        out[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    }
    let crc = crc(nonce, unit, &out[8..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The state word of an entry.
pub(super) fn entry_state(entry: &[u8]) -> u32 {
    u32_at(entry, STATE_AT).unwrap_or(STATE_EMPTY)
}

/// Generation and facts; `None` for an entry that is not, in every bit, one that was written for this slot of this file.
pub(super) fn decode_entry(entry: &[u8], nonce: u64, unit: u32, slot_bytes: u64) -> Option<(u64, BlockMeta)> {
    let sums_count = u32_at(entry, 52)? as usize;
    let end = ENTRY_FIXED_BYTES.checked_add(sums_count.checked_mul(4)?)?;
    if u32_at(entry, 4)? != crc(nonce, unit, entry.get(8..end)?) {
        return None;
    }
    let len = u32_at(entry, 16)?;
    if len == 0 || u64::from(len) > slot_bytes || sums_count != ChunkSums::count_for(len as usize) {
        return None;
    }
    let key_len = usize::from(entry[50]);
    if key_len > KEY_BYTES_MAX || entry[51] > 1 {
        return None;
    }
    let sums: Vec<u32> = (0..sums_count).map_while(|i| u32_at(entry, ENTRY_FIXED_BYTES + 4 * i)).collect();
    let meta = BlockMeta {
        id: entry_id(entry)?,
        tenant: TenantId(u32_at(entry, 20)?),
        handle: Handle { namespace: NamespaceId(u32_at(entry, 24)?), revision: Revision(u32_at(entry, 28)?) },
        key: Key::new(&entry[88..88 + key_len]).ok()?,
        version: Version(u64_at(entry, 32)?),
        class: Class::from_code(entry[48])?,
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::from_code(entry[49])?,
        position: u32_at(entry, 40)?,
        parent: if entry[51] == 1 { Some(Digest::from_slice(&entry[72..88]).ok()?) } else { None },
        len,
        sums: ChunkSums::from_slice(&sums),
    };
    Some((u64_at(entry, GENERATION_AT)?, meta))
}

/// Which block an entry is of.
pub(super) fn entry_id(entry: &[u8]) -> Option<BlockId> {
    Some(BlockId {
        digest: Digest::from_slice(entry.get(56..72)?).ok()?,
        group: GroupId(u16_at(entry, 44)?),
        shard: ShardId(u16_at(entry, 46)?),
    })
}

/// Whether an entry is of this block under this key, without reading the rest of it.
pub(super) fn entry_names(entry: &[u8], id: &BlockId, key: &[u8]) -> bool {
    entry_id(entry).as_ref() == Some(id)
        && entry.get(50).is_some_and(|n| usize::from(*n) == key.len())
        && entry.get(88..88 + key.len()) == Some(key)
}

fn crc(nonce: u64, place: u32, bytes: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&nonce.to_le_bytes());
    h.update(&place.to_le_bytes());
    h.update(bytes);
    h.finalize()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}
