//! The allocator: which file is whose, which slot is free. Everything here runs under the arena's one lock and touches
//! tables, never payload.
//!
//! A reservation takes, in this order: a free slot of its size -> a new extent from a hole in the tenant's files -> the same
//! after empty extents of other sizes became holes -> a spare file -> a free slot at most [`LARGER_SLOT_PERCENT`] larger.
//! The first step is O(1); the others happen once per extent.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Excluded, Included};
use std::time::{Duration, Instant};

use kvkeep_core::ids::TenantId;

use super::file::{ArenaFile, Cell};
use super::layout::slot_units;
use super::memory::UNIT_BYTES;
use super::slot::{FILES_MAX, GENERATION_MAX, Purpose, SlotAt};
use super::{ArenaConfig, NoRoom, NoRoomReason, ReclaimHint};

/// Spare files that are kept ready: a reservation never waits for the kernel to hand out memory.
pub(super) const SPARE_FILES: usize = 2;
/// How much larger than asked a slot may be when nothing else is free, percent. The rest counts as stranded.
pub(super) const LARGER_SLOT_PERCENT: u32 = 25;
/// Length of the windows in which emptiness and activity are judged.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// How long a place that was emptied for somebody is kept for it.
pub(super) const PROMISE: Duration = Duration::from_secs(10);
/// Pause after the system refused a file, before the next try.
pub(super) const GROW_RETRY: Duration = Duration::from_secs(1);

/// One place in the table of files.
pub(super) enum Place {
    /// No file.
    Absent,
    /// The grower is making or removing one.
    Building,
    /// A file.
    Here(Box<ArenaFile>),
}

/// Slots of one size of one tenant.
#[derive(Default)]
pub(super) struct Class {
    /// Extents with free slots that may be handed out: (file, first unit).
    open: Vec<(u16, u32)>,
    /// Free slots of all its extents.
    pub(super) free: u64,
    pub(super) extents: u32,
    /// Least `free` in this window and in the whole one before it.
    low: u64,
    low_before: Option<u64>,
}

impl Class {
    /// Slots that nobody used for at least a whole window.
    pub(super) fn idle(&self) -> u64 {
        self.low_before.map_or(0, |before| before.min(self.low))
    }
}

/// One isolation domain.
#[derive(Default)]
pub(super) struct Domain {
    pub(super) files: Vec<u16>,
    /// By units of a slot.
    pub(super) classes: BTreeMap<u32, Class>,
    pub(super) used_bytes: u64,
    pub(super) blocks: u64,
}

/// A reservation that was granted.
pub(super) struct Granted {
    pub(super) at: SlotAt,
    pub(super) slot_bytes: u64,
}

pub(super) struct State {
    pub(super) files: Vec<Place>,
    pub(super) domains: HashMap<TenantId, Domain>,
    pub(super) spares: Vec<u16>,
    /// A spare that was made by emptying a file for this tenant.
    pub(super) spare_promises: Vec<(TenantId, Instant)>,
    /// Files without a live slot, to be replaced by new ones.
    pub(super) doomed: Vec<u16>,
    pub(super) next_generation: u64,
    pub(super) closed: bool,
    pub(super) grow_failed: Option<Instant>,
    pub(super) grow_failures: u64,
    /// Number of the current window and when it began.
    pub(super) window: u64,
    window_began: Instant,
    /// Window of the last reservation that found no room.
    pub(super) pressed: Option<u64>,

    pub(super) file_bytes: u64,
    pub(super) metadata_bytes: u64,
    /// Of slots reserved, published or leaving.
    pub(super) used_bytes: u64,
    /// Of their payloads.
    pub(super) payload_bytes: u64,
    pub(super) quarantined_bytes: u64,
    /// Slot bytes reserved and not yet published, by purpose.
    pub(super) in_flight: [u64; Purpose::COUNT],
}

impl State {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            files: Vec::new(),
            domains: HashMap::new(),
            spares: Vec::new(),
            spare_promises: Vec::new(),
            doomed: Vec::new(),
            next_generation: 1,
            closed: false,
            grow_failed: None,
            grow_failures: 0,
            window: 2,
            window_began: now,
            pressed: None,
            file_bytes: 0,
            metadata_bytes: 0,
            used_bytes: 0,
            payload_bytes: 0,
            quarantined_bytes: 0,
            in_flight: [0; Purpose::COUNT],
        }
    }

    pub(super) fn file(&self, index: u16) -> Option<&ArenaFile> {
        match self.files.get(usize::from(index))? {
            Place::Here(file) => Some(file),
            Place::Absent | Place::Building => None,
        }
    }

    pub(super) fn file_mut(&mut self, index: u16) -> Option<&mut ArenaFile> {
        match self.files.get_mut(usize::from(index))? {
            Place::Here(file) => Some(file),
            Place::Absent | Place::Building => None,
        }
    }

    pub(super) fn all_files(&self) -> impl Iterator<Item = &ArenaFile> {
        self.files.iter().filter_map(|p| match p {
            Place::Here(file) => Some(&**file),
            Place::Absent | Place::Building => None,
        })
    }

    /// Puts a finished file into its place, as a spare or, when it was adopted, as its tenant's.
    pub(super) fn install(&mut self, file: Box<ArenaFile>) {
        let index = file.mapping.index();
        self.metadata_bytes += UNIT_BYTES as u64;
        match file.tenant {
            None => self.spares.push(index),
            Some(tenant) => self.domains.entry(tenant).or_default().files.push(index),
        }
        while self.files.len() <= usize::from(index) {
            self.files.push(Place::Absent);
        }
        self.files[usize::from(index)] = Place::Here(file);
    }

    /// Size of the file to make next and its index; `None` where the arena has its files.
    pub(super) fn next_file(&self, config: &ArenaConfig, now: Instant) -> Option<(u16, u64)> {
        if self.closed || self.grow_failed.is_some_and(|at| now.duration_since(at) < GROW_RETRY) {
            return None;
        }
        let left = config.capacity_bytes.saturating_sub(self.file_bytes) / UNIT_BYTES as u64 * UNIT_BYTES as u64;
        let whole = config.file_bytes();
        // What is left at the end makes a shorter file where that is worth an index.
        let bytes = if left >= whole { whole } else { left };
        if bytes < whole / 4 || bytes < 4 * UNIT_BYTES as u64 {
            return None;
        }
        let absent = self.files.iter().position(|p| matches!(p, Place::Absent)).unwrap_or(self.files.len());
        (absent < FILES_MAX).then(|| (u16::try_from(absent).unwrap_or(u16::MAX), bytes))
    }

    /// Whether another file should stand ready.
    pub(super) fn wants_spare(&self, config: &ArenaConfig) -> bool {
        let spares = self.spares.len();
        spares < SPARE_FILES || (spares as u64).saturating_mul(config.file_bytes()) < config.ready_bytes
    }

    /// Whether more memory is on its way to spares.
    pub(super) fn is_growing(&self, config: &ArenaConfig, now: Instant) -> bool {
        !self.doomed.is_empty()
            || self.files.iter().any(|p| matches!(p, Place::Building))
            || (self.wants_spare(config) && self.next_file(config, now).is_some())
    }

    /// Free bytes, allocated or not.
    pub(super) fn free_bytes(&self, config: &ArenaConfig) -> u64 {
        config.capacity_bytes.saturating_sub(self.metadata_bytes + self.used_bytes + self.quarantined_bytes)
    }

    /// Begins a new window where the old one is over.
    pub(super) fn roll_window(&mut self, now: Instant) {
        if now.duration_since(self.window_began) < WINDOW {
            return;
        }
        self.window += 1;
        self.window_began = now;
        for class in self.domains.values_mut().flat_map(|d| d.classes.values_mut()) {
            class.low_before = Some(class.low);
            class.low = class.free;
        }
        self.spare_promises.retain(|(_, until)| now < *until);
    }

    /// A slot for `len` bytes, or why not.
    pub(super) fn allocate(
        &mut self,
        config: &ArenaConfig,
        tenant: TenantId,
        len: u32,
        purpose: Purpose,
        now: Instant,
    ) -> Result<Granted, NoRoom> {
        let units = slot_units(u64::from(len));
        let want = u64::from(units) * UNIT_BYTES as u64;
        if self.closed {
            return Err(NoRoom::never(NoRoomReason::Closed));
        }
        if len == 0 || u64::from(len) > config.slot_bytes_max {
            return Err(NoRoom::never(NoRoomReason::TooLarge));
        }
        self.roll_window(now);
        let kept = config.reserves.kept_from(purpose, &self.in_flight);
        let short = (want + kept).saturating_sub(self.free_bytes(config));
        if short > 0 {
            self.pressed = Some(self.window);
            return Err(NoRoom { reason: NoRoomReason::Full, short_bytes: short, hint: Some(ReclaimHint::AnyBytes) });
        }
        let Some((file, start)) = self.pick(tenant, units, now) else {
            return Err(self.no_slot(config, tenant, units, now));
        };
        Ok(self.grant(file, start, tenant, len, purpose))
    }

    /// Finds an extent with a free slot of this size, making one where it must.
    fn pick(&mut self, tenant: TenantId, units: u32, now: Instant) -> Option<(u16, u32)> {
        self.open_extent(tenant, units)
            .or_else(|| self.carve(tenant, units, now))
            .or_else(|| if self.dissolve_empty(tenant) { self.carve(tenant, units, now) } else { None })
            .or_else(|| if self.claim_spare(tenant, units, now) { self.carve(tenant, units, now) } else { None })
            .or_else(|| self.resume(tenant, units, now))
            .or_else(|| {
                let largest = units + units * LARGER_SLOT_PERCENT / 100;
                let classes = &self.domains.get(&tenant)?.classes;
                classes.range((Excluded(units), Included(largest))).find_map(|(_, c)| c.open.last().copied())
            })
    }

    fn open_extent(&self, tenant: TenantId, units: u32) -> Option<(u16, u32)> {
        self.domains.get(&tenant)?.classes.get(&units)?.open.last().copied()
    }

    fn grant(&mut self, file: u16, start: u32, tenant: TenantId, len: u32, purpose: Purpose) -> Granted {
        let (window, generation) = (self.window, self.next_generation);
        self.next_generation = if generation == GENERATION_MAX { 1 } else { generation + 1 };
        let extent = self
            .file_mut(file)
            .and_then(|f| f.extents.get_mut(&start))
            .expect("an extent on an open list exists: it leaves the list before it is dissolved");
        let slot = extent.free.pop().expect("an extent on an open list has a free slot: it leaves with its last one");
        extent.cells[slot as usize] = Cell::Reserved;
        extent.live += 1;
        extent.touched = window;
        let (unit, slot_bytes, full) =
            (extent.shape.slot_unit(slot), extent.shape.slot_bytes(), extent.free.is_empty());
        let units = extent.shape.slot_units;
        let domain = self.domains.entry(tenant).or_default();
        domain.used_bytes += slot_bytes;
        let class = domain.classes.entry(units).or_default();
        class.free -= 1;
        class.low = class.low.min(class.free);
        if full {
            // It is at the end, unless it was taken from a class that `pick` looked through: then it is found.
            class.open.retain(|e| *e != (file, start));
        }
        self.used_bytes += slot_bytes;
        self.payload_bytes += u64::from(len);
        self.in_flight[purpose.index()] += slot_bytes;
        Granted { at: SlotAt { file, unit, generation }, slot_bytes }
    }

    fn carve(&mut self, tenant: TenantId, units: u32, now: Instant) -> Option<(u16, u32)> {
        let files = self.domains.get(&tenant)?.files.clone();
        let window = self.window;
        for index in files {
            let Some(file) = self.file_mut(index) else { continue };
            if file.is_kept_from(units, now) {
                continue;
            }
            if let Some(start) = file.carve(units, window) {
                file.promised = None;
                let extent = &file.extents[&start];
                let (slots, table) = (u64::from(extent.shape.slots), extent.table_bytes());
                self.metadata_bytes += table;
                self.count_extent(tenant, units, slots, (index, start));
                return Some((index, start));
            }
        }
        None
    }

    /// A new extent, all free, joins its class.
    pub(super) fn count_extent(&mut self, tenant: TenantId, units: u32, free: u64, at: (u16, u32)) {
        let class = self.domains.entry(tenant).or_default().classes.entry(units).or_default();
        class.extents += 1;
        class.free += free;
        if free > 0 {
            class.open.push(at);
        }
    }

    /// Makes a hole of an extent without live slots; `false` where it is in use.
    pub(super) fn dissolve(&mut self, index: u16, start: u32) -> bool {
        let Some(file) = self.file_mut(index) else { return false };
        let (Some(tenant), Some(table)) = (file.tenant, file.extents.get(&start).map(|e| e.table_bytes())) else {
            return false;
        };
        let Some(shape) = file.dissolve(start) else { return false };
        self.metadata_bytes -= table;
        if let Some(domain) = self.domains.get_mut(&tenant)
            && let Some(class) = domain.classes.get_mut(&shape.slot_units)
        {
            class.extents -= 1;
            class.free -= u64::from(shape.slots);
            class.low = class.low.min(class.free);
            class.open.retain(|e| *e != (index, start));
            if class.extents == 0 {
                domain.classes.remove(&shape.slot_units);
            }
        }
        true
    }

    /// Makes holes of all empty extents of a tenant. Whether there was one.
    fn dissolve_empty(&mut self, tenant: TenantId) -> bool {
        let Some(domain) = self.domains.get(&tenant) else { return false };
        let empty: Vec<(u16, u32)> = domain
            .files
            .iter()
            .filter_map(|index| Some((*index, self.file(*index)?)))
            .flat_map(|(index, file)| {
                file.extents.iter().filter(|(_, e)| e.is_empty()).map(move |(start, _)| (index, *start))
            })
            .collect();
        empty.into_iter().fold(false, |any, (index, start)| self.dissolve(index, start) || any)
    }

    /// Makes a spare the tenant's, if one has room for such a slot and is not promised to others.
    fn claim_spare(&mut self, tenant: TenantId, units: u32, now: Instant) -> bool {
        let promised = self.spare_promises.iter().filter(|(to, until)| *to != tenant && now < *until).count();
        if self.spares.len() <= promised {
            return false;
        }
        let fits = |file: &ArenaFile| super::file::slots_that_fit(file.largest_hole(), units) > 0;
        let Some(at) = self.spares.iter().position(|index| self.file(*index).is_some_and(fits)) else { return false };
        let index = self.spares.swap_remove(at);
        let Some(file) = self.file_mut(index) else { return false };
        file.claim(tenant);
        self.domains.entry(tenant).or_default().files.push(index);
        if let Some(mine) = self.spare_promises.iter().position(|(to, _)| *to == tenant) {
            self.spare_promises.swap_remove(mine);
        }
        true
    }

    /// Gives back to use what was being emptied for somebody who never came.
    fn resume(&mut self, tenant: TenantId, units: u32, now: Instant) -> Option<(u16, u32)> {
        let files = self.domains.get(&tenant)?.files.clone();
        let mut open = Vec::new();
        for index in files {
            let Some(file) = self.file_mut(index) else { continue };
            for (start, extent) in &mut file.extents {
                if extent.draining.is_some_and(|until| until <= now) {
                    extent.draining = None;
                    file.leaving_for = None;
                    if !extent.free.is_empty() {
                        open.push((extent.shape.slot_units, (index, *start)));
                    }
                }
            }
        }
        let domain = self.domains.get_mut(&tenant)?;
        for (units, at) in open {
            domain.classes.entry(units).or_default().open.push(at);
        }
        self.open_extent(tenant, units)
    }

    fn no_slot(&mut self, config: &ArenaConfig, tenant: TenantId, units: u32, now: Instant) -> NoRoom {
        let want = u64::from(units) * UNIT_BYTES as u64;
        if !self.is_growing(config, now) {
            self.doom_an_empty_file(tenant, now);
        }
        if self.is_growing(config, now) {
            return NoRoom { reason: NoRoomReason::Growing, short_bytes: want, hint: None };
        }
        self.pressed = Some(self.window);
        let same = self.domains.get(&tenant).is_some_and(|d| d.classes.contains_key(&units));
        let hint = if same { ReclaimHint::SameSize } else { ReclaimHint::OtherSizes };
        NoRoom { reason: NoRoomReason::NoSlot, short_bytes: want, hint: Some(hint) }
    }

    /// Where another tenant's file is empty, has it replaced by a spare for this one.
    fn doom_an_empty_file(&mut self, tenant: TenantId, now: Instant) {
        let empty = self.all_files().find(|f| f.tenant.is_some_and(|t| t != tenant) && f.is_empty());
        if let Some(index) = empty.map(|f| f.mapping.index()) {
            self.doom(index, tenant, now);
        }
    }

    /// Hands an empty file to the grower, which replaces it; the spare is then kept for `wanted_by`.
    pub(super) fn doom(&mut self, index: u16, wanted_by: TenantId, now: Instant) {
        let Some(file) = self.file(index).filter(|f| f.is_empty()) else { return };
        let (tenant, starts): (_, Vec<u32>) = (file.tenant, file.extents.keys().copied().collect());
        for start in starts {
            self.dissolve(index, start);
        }
        if let Some(domain) = tenant.and_then(|t| self.domains.get_mut(&t)) {
            domain.files.retain(|f| *f != index);
        }
        self.domains.retain(|_, d| !d.files.is_empty());
        self.doomed.push(index);
        self.spare_promises.retain(|(to, until)| *to != wanted_by && now < *until);
        self.spare_promises.push((wanted_by, now + PROMISE));
    }

    /// A slot's memory is free again: nobody holds any of it. Whether the grower has something to do now.
    pub(super) fn release(&mut self, at: SlotAt, tenant: TenantId, purpose: Purpose, len: u32, now: Instant) -> bool {
        let Some(file) = self.file_mut(at.file) else { return false };
        let leaving_for = file.leaving_for;
        let Some((extent, slot)) = file.slot_mut(at.unit) else { return false };
        let was = std::mem::replace(&mut extent.cells[slot as usize], Cell::Free);
        let (start, units, slot_bytes) = (extent.shape.start, extent.shape.slot_units, extent.shape.slot_bytes());
        extent.live -= 1;
        let condemned = matches!(was, Cell::Leaving { condemned: true });
        let mut opens = false;
        if condemned {
            extent.cells[slot as usize] = Cell::Quarantined;
            extent.quarantined += 1;
        } else {
            extent.free.push(slot);
            opens = extent.free.len() == 1 && extent.draining.is_none();
        }
        let drained = extent.draining.is_some() && extent.is_empty();
        if matches!(was, Cell::Reserved) {
            self.in_flight[purpose.index()] -= slot_bytes;
        }
        self.used_bytes -= slot_bytes;
        self.payload_bytes -= u64::from(len);
        if let Some(domain) = self.domains.get_mut(&tenant) {
            domain.used_bytes -= slot_bytes;
            if let Some(class) = domain.classes.get_mut(&units) {
                class.free += u64::from(!condemned);
                if opens {
                    class.open.push((at.file, start));
                }
            }
        }
        if condemned {
            self.quarantined_bytes += slot_bytes;
        }
        if drained {
            self.dissolve(at.file, start);
        }
        let empty = self.file(at.file).is_some_and(ArenaFile::is_empty);
        match leaving_for {
            Some(wanted_by) if empty => {
                self.doom(at.file, wanted_by, now);
                true
            }
            _ => false,
        }
    }

    /// Stops handing out slots of an extent until `until`.
    pub(super) fn drain(&mut self, index: u16, start: u32, until: Instant) {
        let Some(file) = self.file_mut(index) else { return };
        let (Some(tenant), Some(extent)) = (file.tenant, file.extents.get_mut(&start)) else { return };
        extent.draining = Some(until);
        let units = extent.shape.slot_units;
        if let Some(class) = self.domains.get_mut(&tenant).and_then(|d| d.classes.get_mut(&units)) {
            class.open.retain(|e| *e != (index, start));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_idle_when_nobody_used_them_for_a_whole_window() {
        let began = Instant::now();
        let mut state = State::new(began);
        let tenant = TenantId(1);
        state.count_extent(tenant, 4, 10, (0, 1));
        let idle = |state: &State| state.domains[&tenant].classes[&4].idle();
        let use_some = |state: &mut State, free: u64| {
            let class = state.domains.get_mut(&tenant).expect("made above").classes.get_mut(&4).expect("made above");
            class.free = free;
            class.low = class.low.min(free);
        };
        let windows = |n: u32| began + WINDOW * n;
        state.roll_window(windows(1) - Duration::from_millis(1));
        assert_eq!(idle(&state), 0);
        state.roll_window(windows(1));
        assert_eq!(idle(&state), 0, "they have not been there for a whole window");
        state.roll_window(windows(2));
        assert_eq!(idle(&state), 10);
        use_some(&mut state, 3);
        use_some(&mut state, 9);
        assert_eq!(idle(&state), 3);
        state.roll_window(windows(3));
        assert_eq!(idle(&state), 3, "seven were used within the last two windows");
        state.roll_window(windows(4));
        assert_eq!(idle(&state), 9);
    }
}
