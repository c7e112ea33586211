//! One arena file: its header, its holes, its extents. Knows nothing of other files or of who wants what.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use kvkeep_core::ids::TenantId;
use kvkeep_core::slot_entry::{self, EntryWriter};

use super::layout::{
    EXTENTS_MAX, FileHeader, HEADER_BYTES, RECORD_BYTES, RECORD_CRC_AT, Shape, entry_bytes, table_units,
};
use super::memory::{Mapping, Reading, Taken, UNIT_BYTES};
use super::slot::SlotEnd;

/// Largest target size of an extent, bytes.
pub(super) const EXTENT_BYTES_MAX: u64 = 64 << 20;
/// A file is cut into about this many extents, so that a small arena has room for more than one slot size.
pub(super) const EXTENTS_PER_FILE: u64 = 16;

/// What one slot is doing.
pub(super) enum Cell {
    /// Nobody has it.
    Free,
    /// Being written.
    Reserved,
    /// Readable. The table's own hold on it; pins are further ones.
    Published(Reading<SlotEnd>),
    /// Freed or condemned while somebody still reads it.
    Leaving { condemned: bool },
    /// Its memory gave back other bytes than were put: never used again in this life.
    Quarantined,
}

/// Slots of one size.
pub(super) struct Extent {
    pub(super) shape: Shape,
    /// Its number in the header's directory.
    record: usize,
    table: Taken,
    pub(super) cells: Vec<Cell>,
    pub(super) free: Vec<u32>,
    /// Slots reserved, published or leaving.
    pub(super) live: u32,
    pub(super) quarantined: u32,
    /// Number of the window (see `state`) in which it was last used.
    pub(super) touched: u64,
    /// Its slots are being evicted to make room for another size: none is handed out before this time.
    pub(super) draining: Option<Instant>,
}

impl Extent {
    pub(super) fn entry(&self, slot: u32) -> &[u8] {
        let at = slot as usize * self.shape.entry_bytes();
        &self.table.bytes()[at..at + self.shape.entry_bytes()]
    }

    /// Writes an entry and makes it count. The slot's payload is complete.
    pub(super) fn publish_entry(&mut self, slot: u32, entry: &[u8]) {
        slot_entry::publish(&mut self.entry_mut(slot), entry);
    }

    /// Makes an entry count no longer. Whoever reads the slot in place sees that before anything else lies there.
    pub(super) fn clear_entry(&mut self, slot: u32) {
        slot_entry::clear(&mut self.entry_mut(slot));
    }

    fn entry_mut(&mut self, slot: u32) -> EntryMut<'_> {
        let bytes = self.shape.entry_bytes();
        EntryMut { start: slot as usize * bytes, bytes, table: &mut self.table }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.live == 0 && self.quarantined == 0
    }

    pub(super) fn table_bytes(&self) -> u64 {
        self.table.len() as u64
    }
}

/// One entry of a table.
struct EntryMut<'a> {
    table: &'a mut Taken,
    start: usize,
    bytes: usize,
}

impl EntryWriter for EntryMut<'_> {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.table.bytes_mut()[self.start..self.start + self.bytes][at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn store_last(&mut self, at: usize, word: u32) {
        self.table.store_last(self.start + at, word);
    }
}

/// A file that is mapped and belongs to one tenant, or is a spare.
pub(super) struct ArenaFile {
    pub(super) mapping: Arc<Mapping>,
    pub(super) path: PathBuf,
    pub(super) nonce: u64,
    /// `None`: a spare, without a header on purpose: the next life removes it.
    pub(super) tenant: Option<TenantId>,
    header: Taken,
    /// Free runs by first unit: (first, end). Never adjacent to each other.
    holes: BTreeMap<u32, u32>,
    /// By first unit.
    pub(super) extents: BTreeMap<u32, Extent>,
    /// Only slots of so many units may be carved from its holes before this time: they were emptied for them.
    pub(super) promised: Option<(u32, Instant)>,
    /// It is being emptied for another tenant.
    pub(super) leaving_for: Option<TenantId>,
}

impl ArenaFile {
    /// `None` where the mapping is shorter than a header and one slot, or its units are in use.
    pub(super) fn new(mapping: Arc<Mapping>, path: PathBuf, nonce: u64) -> Option<Self> {
        let units = u32::try_from(mapping.len() / UNIT_BYTES).ok()?;
        let header = mapping.take(0, 1)?;
        let holes = BTreeMap::from([(1, units)]);
        (units > 2).then_some(Self {
            mapping,
            path,
            nonce,
            tenant: None,
            header,
            holes,
            extents: BTreeMap::new(),
            promised: None,
            leaving_for: None,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    pub(super) fn units(&self) -> u32 {
        (self.mapping.len() / UNIT_BYTES) as u32 // at most 1 GiB / 4 KiB
    }

    pub(super) fn header_bytes(&self) -> &[u8] {
        self.header.bytes()
    }

    /// Makes it a tenant's. Once, while it is empty.
    pub(super) fn claim(&mut self, tenant: TenantId) {
        let header = FileHeader { tenant, bytes: self.bytes(), nonce: self.nonce };
        self.header.bytes_mut()[..HEADER_BYTES].copy_from_slice(&header.encode());
        self.tenant = Some(tenant);
    }

    /// Takes over a header that was found in the file and is right.
    pub(super) fn adopt_header(&mut self, header: &FileHeader) {
        self.tenant = Some(header.tenant);
        self.nonce = header.nonce;
    }

    /// Nothing lives in it and nothing of it is bad: it may be removed.
    pub(super) fn is_empty(&self) -> bool {
        self.extents.values().all(Extent::is_empty)
    }

    /// Units the largest hole has.
    pub(super) fn largest_hole(&self) -> u32 {
        self.holes.iter().map(|(start, end)| end - start).max().unwrap_or(0)
    }

    pub(super) fn hole_units(&self) -> impl Iterator<Item = u32> {
        self.holes.iter().map(|(start, end)| end - start)
    }

    /// Units of the hole that ends where `start` begins, and of the one that begins at `end`.
    pub(super) fn holes_beside(&self, start: u32, end: u32) -> (u32, u32) {
        let before = self.holes.range(..start).next_back().filter(|(_, e)| **e == start).map_or(0, |(s, e)| e - s);
        let after = self.holes.get(&end).map_or(0, |e| e - end);
        (before, after)
    }

    /// Whether no carving for slots of another size than `slot_units` may touch the holes now.
    pub(super) fn is_kept_from(&self, slot_units: u32, now: Instant) -> bool {
        self.leaving_for.is_some() || self.promised.is_some_and(|(units, until)| units != slot_units && now < until)
    }

    /// Cuts an extent for slots of `slot_units` out of the holes: the first hole with room for a whole one, else the largest
    /// with room for a slot. What would be left over as a sliver goes into the extent. Returns its first unit.
    pub(super) fn carve(&mut self, slot_units: u32, window: u64) -> Option<u32> {
        let record = self.free_record()?;
        let target = (u64::from(self.units()) * UNIT_BYTES as u64 / EXTENTS_PER_FILE).clamp(1, EXTENT_BYTES_MAX);
        let target_units = (target / UNIT_BYTES as u64) as u32;
        let whole = target_units.div_ceil(slot_units).max(1);
        let fits = |(start, end): (&u32, &u32)| (*start, slots_that_fit(end - start, slot_units), end - start);
        let (start, most, hole) = self
            .holes
            .iter()
            .map(fits)
            .find(|(_, most, _)| *most >= whole)
            .or_else(|| self.holes.iter().map(fits).max_by_key(|(_, most, _)| *most))
            .filter(|(_, most, _)| *most > 0)?;
        let mut slots = whole.min(most);
        let used = slots * slot_units + table_units(slots, slot_units);
        if hole - used < target_units / 2 {
            slots = most;
        }
        let shape = Shape { start, slots, slot_units };
        let mut extent = self.extent(shape, record)?;
        let end = self.holes.remove(&start)?;
        if shape.end() < end {
            self.holes.insert(shape.end(), end);
        }
        for slot in 0..slots {
            extent.clear_entry(slot);
        }
        let bytes = shape.encode(self.nonce, record);
        let at = HEADER_BYTES + record * RECORD_BYTES;
        self.header.bytes_mut()[at..at + RECORD_CRC_AT].copy_from_slice(&bytes[..RECORD_CRC_AT]);
        let crc = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        self.header.store_last(at + RECORD_CRC_AT, crc);
        extent.touched = window;
        self.extents.insert(start, extent);
        Some(start)
    }

    /// Takes over an extent whose record was found in the header; its slots are all free until told otherwise. `None` where
    /// it overlaps another.
    pub(super) fn adopt_extent(&mut self, shape: Shape, record: usize) -> Option<u32> {
        let (start, end) = self.holes.range(..=shape.start).next_back().map(|(s, e)| (*s, *e))?;
        if shape.end() > end {
            return None;
        }
        let extent = self.extent(shape, record)?;
        self.holes.remove(&start);
        if start < shape.start {
            self.holes.insert(start, shape.start);
        }
        if shape.end() < end {
            self.holes.insert(shape.end(), end);
        }
        self.extents.insert(shape.start, extent);
        Some(shape.start)
    }

    fn extent(&self, shape: Shape, record: usize) -> Option<Extent> {
        let table = self.mapping.take(shape.start, shape.table_units())?;
        Some(Extent {
            shape,
            record,
            table,
            cells: (0..shape.slots).map(|_| Cell::Free).collect(),
            free: (0..shape.slots).rev().collect(),
            live: 0,
            quarantined: 0,
            touched: 0,
            draining: None,
        })
    }

    fn free_record(&self) -> Option<usize> {
        let mut used = [false; EXTENTS_MAX];
        self.extents.values().for_each(|e| used[e.record] = true);
        used.iter().position(|u| !u)
    }

    /// Makes an empty extent a hole again. `None` where it is not empty.
    pub(super) fn dissolve(&mut self, start: u32) -> Option<Shape> {
        if !self.extents.get(&start)?.is_empty() {
            return None;
        }
        let extent = self.extents.remove(&start)?;
        self.clear_record(extent.record);
        let (before, after) = self.holes_beside(start, extent.shape.end());
        self.holes.remove(&extent.shape.end());
        self.holes.insert(start - before, extent.shape.end() + after);
        Some(extent.shape)
    }

    /// Makes a record of the directory count no longer.
    pub(super) fn clear_record(&mut self, record: usize) {
        let at = HEADER_BYTES + record * RECORD_BYTES;
        // Not zero: that might be the crc. The complement of what stands there cannot be.
        let crc = Shape::decode(&self.header.bytes()[at..], self.nonce, record, self.units())
            .map(|s| s.encode(self.nonce, record));
        if let Some(b) = crc {
            self.header.store_last(at + RECORD_CRC_AT, !u32::from_le_bytes([b[12], b[13], b[14], b[15]]));
        }
    }

    /// The extent that `unit` lies in, and the slot that starts there.
    pub(super) fn slot_mut(&mut self, unit: u32) -> Option<(&mut Extent, u32)> {
        let extent = self.extents.range_mut(..=unit).next_back()?.1;
        let slot = extent.shape.slot_at(unit)?;
        Some((extent, slot))
    }

    /// As [`Self::slot_mut`].
    pub(super) fn slot(&self, unit: u32) -> Option<(&Extent, u32)> {
        let extent = self.extents.range(..=unit).next_back()?.1;
        let slot = extent.shape.slot_at(unit)?;
        Some((extent, slot))
    }
}

/// How many slots, with their table, fit into a hole of so many units.
pub(super) fn slots_that_fit(hole: u32, slot_units: u32) -> u32 {
    let per_slot = u64::from(slot_units) * UNIT_BYTES as u64 + entry_bytes(slot_units) as u64;
    let mut slots = (u64::from(hole) * UNIT_BYTES as u64 / per_slot) as u32;
    // Rounding the table up to whole units can cost one slot.
    while slots > 0 && table_units(slots, slot_units) + slots * slot_units > hole {
        slots -= 1;
    }
    slots
}

/// Bytes of the smallest file with room for one slot of `len` bytes of payload.
pub(super) fn file_bytes_for_one(len: u64) -> u64 {
    let units = super::layout::slot_units(len);
    (1 + u64::from(table_units(1, units)) + u64::from(units)) * UNIT_BYTES as u64
}
