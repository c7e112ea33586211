//! Which position goes next. The directory owns the facts (entries, chains, leases, classes); a policy owns the order.
//!
//! - [`lru`]: least recently used, leaves first. What a node runs today.
//!
//! A policy keeps lists through the entries' two policy seats (one per level) and may keep one byte per entry and level
//! (which list); the entry has three bytes to spare for more. It is told of everything that changes its order. A learned
//! policy keeps one list per class in order of last access, a cursor per age bucket, and evicts the oldest leaf of the
//! worst cell: the same calls.

pub(crate) mod lru;

use crate::directory::entry::{EntryId, Level};
use crate::directory::slab::Slab;
use crate::ids::Instant;
use crate::words::RequestInfo;

/// What stands in the way of evicting a position from a level now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// Positions after it are resident there: not a leaf.
    Children,
    /// Somebody was promised that it stays readable.
    Leased,
    /// Its class says that it stays on NVMe.
    Durable,
    /// Durable, and not yet on NVMe: DRAM holds its only copy.
    Unsaved,
}

/// What keeps `id` on `level`; `None`: it may go.
pub(crate) fn obstacle(slab: &Slab, id: EntryId, level: Level) -> Option<Obstacle> {
    use crate::directory::entry::Entry;
    let e = &slab[id];
    let durable = e.has(Entry::DURABLE);
    if level == Level::Nvme && durable {
        Some(Obstacle::Durable)
    } else if e.resident_children[level as usize] > 0 {
        Some(Obstacle::Children)
    } else if level == Level::Dram && durable && !e.saved() {
        Some(Obstacle::Unsaved)
    } else if e.leases > 0 {
        Some(Obstacle::Leased)
    } else {
        None
    }
}

/// An order of eviction. Calls name entries that are resident on the level named, `enter` before all others.
pub(crate) trait Policy: Send {
    /// `id` has become resident on `level`.
    fn enter(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// `id` was accessed; its last access and count are already those of this access. Also said of the commit of its
    /// first part, after `enter`.
    fn access(&mut self, slab: &mut Slab, id: EntryId, info: &RequestInfo, now: Instant);

    /// Something that kept `id` has ended: its last resident child left, its last lease ended, its copy is on NVMe.
    fn freed(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// `id` is not resident on `level` any more. Its seat must be left.
    fn leave(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// The entry to evict next, still in place: asked twice with nothing done in between, the same.
    fn victim(&mut self, slab: &mut Slab, level: Level, now: Instant) -> Option<EntryId>;

    /// Not now: as if it had just been accessed, without counting.
    fn defer(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// Entries that may be evicted some day, the best kept first. A parent may be missing where its child is given.
    fn hottest(&self, slab: &Slab, level: Level, visit: &mut dyn FnMut(EntryId) -> bool);
}
