//! What a node knows of every committed position, and every decision about it. Pure: no clock, no I/O; one mutex of the
//! node guards it, and no call works on more than a slice (256 keys) at a time.
//!
//! ```text
//! mod.rs       Directory: commit, locate, promote, drop, remove
//!  ├ entry.rs     one position, 112 bytes          ├ access.rs    accesses, victims, heat
//!  ├ slab.rs      entries by id and by digest      ├ spare.rs     window/state parts that go before any leaf
//!  ├ home.rs      what a handle's entries share    ├ leasing.rs   leases over positions
//!  ├ list.rs      lists through the entries        ├ matching.rs  the largest usable boundary of a chain
//!  ├ ../policy    the order of eviction            ├ upkeep.rs    ttl, stale revisions, views, totals
//!  └ sessions.rs  pins, and what no manifest names
//! ```
//!
//! **Chains.** An entry names its parent by id. A parent that is not here (its put comes later, as when an index is
//! loaded in digest order; or it was removed while children are here) has an entry without parts, which goes with its last child.
//! A parent's chain index is always smaller than its child's, whatever a client claims: no cycles.
//!
//! **Residence.** A position is resident in a tier when any of its parts has a copy there; a leaf of a tier is resident
//! there and has no child that is.

mod access;
pub(crate) mod entry;
pub(crate) mod home;
mod leasing;
pub(crate) mod list;
mod matching;
mod sessions;
pub(crate) mod slab;
mod spare;
mod upkeep;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::block::{BlockMeta, NvmePlace, SlotRef};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::ids::{BlockId, Digest, GroupId, Handle, Instant, LeaseId, ShardId, Version};
use crate::lease::{LeaseLimits, LeaseTable, Parting};
pub use crate::policy::sage::fit::{Fit, Fitted};
use crate::policy::{self, Policy, sage::GHOSTS_MAX};
use crate::words::{Class, Fidelity, Keeper, MissReason, PolicyKind, Priority, RequestInfo};

pub use access::{Victim, VictimPart};
pub use home::Usage;
pub use matching::{MatchOutcome, Matcher, SLICE};
pub use sessions::{SessionSlice, Standing};
pub use upkeep::{PartView, PositionView, StaleSlice};

use entry::{Entry, EntryId, Level, Part};
use home::{HomeId, Homes};
use list::{List, Seat};
use slab::Slab;

/// Default bound of tracked positions: 128 bytes each.
pub const POSITIONS_MAX: u32 = 64 * 1024 * 1024;

/// Bounds of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryLimits {
    /// Most tracked positions, those included that stand for their children only.
    pub positions_max: u32,
    /// Most positions that the policy remembers after they left, at 32 bytes each.
    pub ghosts_max: u32,
    /// Bounds of leases.
    pub leases: LeaseLimits,
}

impl Default for DirectoryLimits {
    fn default() -> Self {
        Self { positions_max: POSITIONS_MAX, ghosts_max: GHOSTS_MAX, leases: LeaseLimits::default() }
    }
}

/// Where the bytes of a commit lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// In the arena.
    Dram(SlotRef),
    /// In a segment.
    Nvme(NvmePlace),
}

/// What a commit came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The part is tracked here now: it is new, or this is one more copy of the version that was.
    Stored,
    /// Another put committed first and is kept: the caller frees its own copy.
    Exists {
        /// Of the kept one.
        version: Version,
        /// Of the kept one.
        class: Class,
    },
    /// The part is tracked now, exact instead of near: the caller frees the copies of the old version.
    Superseded(RemovedPart),
}

/// Where a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Of the put that made the bytes.
    pub version: Version,
    /// Raw bytes.
    pub len: u32,
    /// Reached so far.
    pub class: Class,
    /// On whose word it stays, if it is durable.
    pub keeper: Keeper,
    /// Of the bytes.
    pub fidelity: Fidelity,
    /// Its copy in DRAM.
    pub slot: Option<SlotRef>,
    /// Its copy on NVMe.
    pub place: Option<NvmePlace>,
    /// Accesses of the position since it is tracked; its put is the first.
    pub accesses: u32,
    /// Of the position.
    pub handle: Handle,
    /// Somebody holds a lease over the position.
    pub leased: bool,
}

/// What dropping a copy came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Nothing: no such copy is tracked (any more).
    None,
    /// The part is readable from NVMe.
    StillOnNvme,
    /// The part is readable from DRAM.
    StillInDram,
    /// It was the part's last copy; other parts of the position are here.
    PartGone,
    /// It was the position's last copy.
    PositionGone,
}

/// A part that was taken out: the caller frees its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemovedPart {
    /// Of its group.
    pub group: GroupId,
    /// Of its shard.
    pub shard: ShardId,
    /// Of the put that made the bytes.
    pub version: Version,
    /// Raw bytes.
    pub len: u32,
    /// The copy in DRAM to free.
    pub slot: Option<SlotRef>,
    /// The copy on NVMe to free.
    pub place: Option<NvmePlace>,
}

impl From<&Part> for RemovedPart {
    fn from(p: &Part) -> Self {
        Self { group: p.group(), shard: p.shard(), version: p.version, len: p.len, slot: p.slot, place: p.place }
    }
}

/// Every committed position of a node. See the module.
pub struct Directory {
    limits: DirectoryLimits,
    slab: Slab,
    homes: Homes,
    policy: Box<dyn Policy>,
    leases: LeaseTable,
    /// Positions of large leases that have ended, still counted as leased.
    parting: VecDeque<Parting>,
    /// Positions with at least one lease.
    leased: u32,
    /// Positions with parts that may go before any leaf, per level.
    spare: [List; 2],
    /// Ends of chains whose spare parts are to be found out.
    trim: List,
    /// Times to live, of the few positions that have one.
    expiry: BTreeSet<(Instant, Digest)>,
    expiry_of: HashMap<Digest, Instant>,
    /// How many sessions want a position kept in DRAM, on NVMe; whether it is here or not. Bounded by who pins.
    pins: HashMap<Digest, [u32; 2]>,
}

impl Directory {
    /// An empty directory that evicts by that policy.
    pub fn new(limits: DirectoryLimits, kind: PolicyKind) -> Self {
        // The id `u32::MAX` means none.
        let positions_max = limits.positions_max.min(u32::MAX - 1);
        Self {
            limits: DirectoryLimits { positions_max, ..limits },
            slab: Slab::new(),
            homes: Homes::default(),
            policy: policy::make(kind, limits.ghosts_max),
            leases: LeaseTable::new(limits.leases),
            parting: VecDeque::new(),
            leased: 0,
            spare: Level::BOTH.map(|level| List::new(Seat::Spare(level))),
            trim: List::new(Seat::Trim),
            expiry: BTreeSet::new(),
            expiry_of: HashMap::new(),
            pins: HashMap::new(),
        }
    }

    /// Makes a committed part readable. The first commit of a part wins, but exact bytes supersede near ones. The commit
    /// of a position's first part counts as its first access.
    ///
    /// `meta.parent` names the position with parts before this one in its chain; it need not be here (yet).
    ///
    /// # Errors
    /// `InvalidArgument` and `WrongSize` for a part that does not fit `format`; `Full` at `positions_max`.
    pub fn insert(
        &mut self,
        meta: &BlockMeta,
        format: &Format,
        at: Placed,
        info: &RequestInfo,
        now: Instant,
    ) -> Result<Inserted> {
        format.check_part(meta.position, meta.id.group, meta.id.shard, u64::from(meta.len))?;
        let id = match self.slab.find(&meta.id.digest) {
            Some(id) => id,
            None => {
                self.check_room()?;
                let home = self.homes.intern(meta.handle, format);
                self.make_entry(meta.id.digest, home, meta.position, now)
            }
        };
        let (group, shard) = (meta.id.group, meta.id.shard);
        let mut old = None;
        if let Some(known) = self.slab[id].parts.find(group, shard).copied() {
            if known.version == meta.version {
                let added = match at {
                    Placed::Dram(slot) => self.set_slot(&meta.id, meta.version, slot),
                    Placed::Nvme(place) => self.set_nvme(&meta.id, meta.version, place),
                };
                self.raise_class(&meta.id, meta.version, meta.class, meta.keeper);
                let exists = Inserted::Exists { version: known.version, class: known.class() };
                return Ok(if added { Inserted::Stored } else { exists });
            }
            if !(known.fidelity() == Fidelity::Near && meta.fidelity == Fidelity::Exact) {
                return Ok(Inserted::Exists { version: known.version, class: known.class() });
            }
            old = self.take_part(id, group, shard);
        }
        let first = self.slab[id].parts.is_empty() && old.is_none();
        self.place_in_chain(id, meta);
        let mut part = Part::new(group, shard, meta.version, meta.len, meta.class, meta.keeper, meta.fidelity);
        match at {
            Placed::Dram(slot) => part.slot = Some(slot),
            Placed::Nvme(place) => part.place = Some(place),
        }
        self.add_part(id, part);
        if first {
            let weight = self.weight_of(id, info.priority.unwrap_or(Priority::Normal));
            let e = &mut self.slab[id];
            e.set_weight(weight);
            e.gone = 0;
            e.last_access = now;
            e.accesses = e.accesses.saturating_add(1);
        }
        self.after_change(id, None);
        if first {
            self.tell_access(id, info, None, now);
        }
        self.note_end(id);
        Ok(old.as_ref().map_or(Inserted::Stored, |part| Inserted::Superseded(part.into())))
    }

    /// The parts of a position that a lease holds, in (group, shard) order; none where it does not hold the position.
    pub fn leased_parts(
        &self,
        lease: LeaseId,
        digest: &Digest,
    ) -> impl Iterator<Item = (GroupId, ShardId, Located)> + '_ {
        let entry = self.slab.find(digest);
        let held = entry.filter(|id| self.leases.get(lease).is_some_and(|l| l.positions.contains(*id)));
        held.into_iter().flat_map(move |id| {
            let e = &self.slab[id];
            e.parts.as_slice().iter().map(move |p| (p.group(), p.shard(), self.located(e, p)))
        })
    }

    /// Where a part is, if it is readable.
    pub fn locate(&self, digest: &Digest, group: GroupId, shard: ShardId) -> Option<Located> {
        let e = &self.slab[self.slab.find(digest)?];
        Some(self.located(e, e.parts.find(group, shard)?))
    }

    fn located(&self, e: &Entry, p: &Part) -> Located {
        Located {
            version: p.version,
            len: p.len,
            class: p.class(),
            keeper: p.keeper(),
            fidelity: p.fidelity(),
            slot: p.slot,
            place: p.place,
            handle: self.homes.get(e.home).handle,
            leased: e.leases > 0,
            accesses: e.accesses,
        }
    }

    /// The part has been written to NVMe. `false`: it is gone, another version, or there already; the caller frees the
    /// place.
    pub fn set_nvme(&mut self, id: &BlockId, version: Version, place: NvmePlace) -> bool {
        self.set_copy(id, version, Placed::Nvme(place))
    }

    /// The part has been promoted to DRAM. `false`: it is gone, another version, or there already; the caller frees the
    /// slot.
    pub fn set_slot(&mut self, id: &BlockId, version: Version, slot: SlotRef) -> bool {
        self.set_copy(id, version, Placed::Dram(slot))
    }

    /// Drops the copy in `slot`. Where it was the last one, `reason` says why the part went.
    pub fn drop_slot(&mut self, id: &BlockId, slot: SlotRef, reason: MissReason) -> Dropped {
        self.drop_copy(id, Placed::Dram(slot), reason)
    }

    /// Drops the copy at `place`. Where it was the last one, `reason` says why the part went.
    pub fn drop_place(&mut self, id: &BlockId, place: NvmePlace, reason: MissReason) -> Dropped {
        self.drop_copy(id, Placed::Nvme(place), reason)
    }

    /// The part has reached a stronger class, or a stronger keeper of the same. `false`: it is gone or another version.
    /// Never weakens.
    pub fn raise_class(&mut self, id: &BlockId, version: Version, class: Class, keeper: Keeper) -> bool {
        let Some(entry) = self.slab.find(&id.digest) else { return false };
        let Some(part) = self.slab[entry].parts.find_mut(id.group, id.shard).filter(|p| p.version == version) else {
            return false;
        };
        let rises = class > part.class() || class == part.class() && keeper > part.keeper();
        if rises {
            part.set_class(class, keeper);
            self.after_change(entry, None);
        }
        true
    }

    /// Makes a position unreadable at once, whatever its leases and class. `None`: nothing of it was readable.
    pub fn remove(&mut self, digest: &Digest, reason: MissReason) -> Option<Vec<RemovedPart>> {
        let id = self.slab.find(digest)?;
        let parts = self.slab[id].parts.as_slice().to_vec();
        if parts.is_empty() {
            return None;
        }
        for p in &parts {
            self.take_part(id, p.group(), p.shard());
        }
        self.after_change(id, Some(reason));
        Some(parts.iter().map(RemovedPart::from).collect())
    }

    fn check_room(&self) -> Result<()> {
        if self.slab.len() >= self.limits.positions_max {
            return Err(Error::new(ErrorKind::Full, "as many positions are tracked as may be")
                .with("positions_max", self.limits.positions_max));
        }
        Ok(())
    }

    fn make_entry(&mut self, digest: Digest, home: HomeId, position: u32, now: Instant) -> EntryId {
        self.homes.enter(home);
        let id = self.slab.insert(Entry::new(digest, home, position, now));
        self.note_pins(id);
        id
    }

    /// Gives an entry its chain index and its parent, as far as they do not contradict what is known.
    fn place_in_chain(&mut self, id: EntryId, meta: &BlockMeta) {
        let e = &mut self.slab[id];
        if e.parent != EntryId::NONE {
            return;
        }
        // What stood for its children until now had the largest index that they allow.
        e.position = e.position.min(meta.position);
        let (home, position, now) = (e.home, e.position, e.last_access);
        let Some(parent) = meta.parent.filter(|parent| position > 0 && *parent != meta.id.digest) else { return };
        let parent = match self.slab.find(&parent) {
            Some(parent) => parent,
            // At the bound the position stands alone.
            None if self.check_room().is_err() => return,
            None => self.make_entry(parent, home, position - 1, now),
        };
        let p = &mut self.slab[parent];
        if p.position >= position && p.parts.is_empty() && p.parent == EntryId::NONE {
            p.position = position - 1;
        }
        if p.home != home || p.position >= position {
            return;
        }
        p.children += 1;
        for level in Level::BOTH {
            if self.slab[id].resident(level) {
                self.slab[parent].resident_children[level as usize] += 1;
            }
        }
        self.slab[id].parent = parent;
        self.note_end(parent);
    }

    fn set_copy(&mut self, id: &BlockId, version: Version, at: Placed) -> bool {
        let Some(entry) = self.slab.find(&id.digest) else { return false };
        let e = &mut self.slab[entry];
        let Some(part) = e.parts.find_mut(id.group, id.shard).filter(|p| p.version == version) else { return false };
        let level = match at {
            Placed::Dram(slot) if part.slot.is_none() => {
                part.slot = Some(slot);
                Level::Dram
            }
            Placed::Nvme(place) if part.place.is_none() => {
                part.place = Some(place);
                Level::Nvme
            }
            Placed::Dram(_) | Placed::Nvme(_) => return false,
        };
        *self.homes.get_mut(e.home).usage.bytes_mut(level) += u64::from(part.len);
        self.after_change(entry, None);
        true
    }

    fn drop_copy(&mut self, id: &BlockId, at: Placed, reason: MissReason) -> Dropped {
        let Some(entry) = self.slab.find(&id.digest) else { return Dropped::None };
        let e = &mut self.slab[entry];
        let Some(part) = e.parts.find_mut(id.group, id.shard) else { return Dropped::None };
        let level = match at {
            Placed::Dram(slot) if part.slot == Some(slot) => {
                part.slot = None;
                Level::Dram
            }
            Placed::Nvme(place) if part.place == Some(place) => {
                part.place = None;
                Level::Nvme
            }
            Placed::Dram(_) | Placed::Nvme(_) => return Dropped::None,
        };
        *self.homes.get_mut(e.home).usage.bytes_mut(level) -= u64::from(part.len);
        let left = match (part.slot, part.place) {
            (Some(_), _) => Dropped::StillInDram,
            (None, Some(_)) => Dropped::StillOnNvme,
            (None, None) => {
                self.take_part(entry, id.group, id.shard);
                if self.slab[entry].parts.is_empty() { Dropped::PositionGone } else { Dropped::PartGone }
            }
        };
        self.after_change(entry, Some(reason));
        left
    }

    fn add_part(&mut self, id: EntryId, part: Part) {
        let e = &mut self.slab[id];
        let home = self.homes.get_mut(e.home);
        if e.parts.is_empty() {
            home.usage.positions += 1;
        }
        home.usage.parts += 1;
        for level in Level::BOTH {
            *home.usage.bytes_mut(level) += if part.on(level) { u64::from(part.len) } else { 0 };
        }
        e.parts.add(part, home.shape.parts_at(e.position), !home.shape.plain);
    }

    /// Takes a part out of its position; [`Directory::after_change`] must follow.
    fn take_part(&mut self, id: EntryId, group: GroupId, shard: ShardId) -> Option<Part> {
        let e = &mut self.slab[id];
        let part = e.parts.take(group, shard)?;
        let usage = &mut self.homes.get_mut(e.home).usage;
        usage.parts -= 1;
        if e.parts.is_empty() {
            usage.positions -= 1;
        }
        for level in Level::BOTH {
            *usage.bytes_mut(level) -= if part.on(level) { u64::from(part.len) } else { 0 };
        }
        Some(part)
    }

    /// Brings everything that follows from an entry's parts in line with them: class, residence, its parent's count,
    /// lists, and whether the entry itself stays. The only place that does.
    fn after_change(&mut self, id: EntryId, reason: Option<MissReason>) {
        let e = &mut self.slab[id];
        e.set(Entry::DURABLE, e.class() == Class::Durable);
        for level in Level::BOTH {
            let (was, is) = {
                let e = &mut self.slab[id];
                let is = e.parts.as_slice().iter().any(|p| p.on(level));
                let was = e.resident(level);
                e.set_resident(level, is);
                (was, is)
            };
            if is && !was {
                if let Some(parent) = self.slab[id].parent.some() {
                    self.slab[parent].resident_children[level as usize] += 1;
                }
                self.policy.enter(&mut self.slab, id, level);
            } else if was && !is {
                self.policy.leave(&mut self.slab, id, level);
                if let Some(parent) = self.slab[id].parent.some() {
                    self.child_left(parent, level);
                }
            }
        }
        // A weaker class, or a copy on NVMe at last, may have been what kept it.
        for level in Level::BOTH {
            if self.slab[id].resident(level) {
                self.policy.freed(&mut self.slab, id, level);
            }
        }
        if self.slab[id].parts.is_empty() {
            self.leave_seats(id);
            let e = &mut self.slab[id];
            e.parts.forget_empty();
            e.gone = reason.map_or(e.gone, MissReason::code);
            let digest = e.digest;
            self.policy.gone(&mut self.slab, id, reason == Some(MissReason::Evicted));
            let e = &mut self.slab[id];
            if e.has(Entry::EXPIRES) {
                e.set(Entry::EXPIRES, false);
                self.forget_expiry(&digest);
            }
            self.release_entry(id);
        } else {
            self.refresh_spare(id);
        }
    }

    /// One child less of `parent` is resident on `level`.
    fn child_left(&mut self, parent: EntryId, level: Level) {
        let p = &mut self.slab[parent];
        p.resident_children[level as usize] -= 1;
        if p.resident_children[level as usize] == 0 && p.resident(level) {
            self.policy.freed(&mut self.slab, parent, level);
        }
    }

    /// Gives an entry back if nothing needs it: no parts, no children, no leases; then perhaps its parent.
    fn release_entry(&mut self, id: EntryId) {
        let mut next = Some(id);
        while let Some(id) = next {
            let e = &self.slab[id];
            if !e.parts.is_empty() || e.children > 0 || e.leases > 0 {
                return;
            }
            let (parent, home) = (e.parent.some(), e.home);
            self.homes.leave(home);
            self.slab.remove(id);
            if let Some(parent) = parent {
                self.slab[parent].children -= 1;
                self.note_end(parent);
            }
            next = parent;
        }
    }
}
