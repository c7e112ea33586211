//! Which position goes next. The directory owns the facts (entries, chains, leases, classes); a policy owns the order.
//!
//! - [`sage`]: learned from how long positions like it stayed unused before they were used again, leaves first.
//! - [`lru`]: least recently used, leaves first.
//!
//! A policy keeps lists through the entries' two policy seats (one per level) and has a byte per entry and level (which
//! list) and three bytes per entry of its own. It is told of everything that changes its order.

mod last_resort;
pub(crate) mod lru;
pub(crate) mod sage;
pub(crate) mod weight;

use crate::directory::entry::{EntryId, Level};
use crate::directory::slab::Slab;
use crate::ids::Instant;
use crate::words::{PolicyKind, RequestInfo};

use self::sage::fit::{Fit, Fitted};
use self::weight::Weight;

/// What stands in the way of evicting a position from a level now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// Positions after it are resident there: not a leaf.
    Children,
    /// Somebody was promised that it stays readable.
    Leased,
    /// A session wants it there.
    Pinned,
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
    } else if e.has(Entry::PINNED[level as usize]) {
        Some(Obstacle::Pinned)
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

/// What becomes of a victim that is leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leased {
    /// Others go in its place, and itself as a last resort.
    PassOver,
    /// Nobody goes before it.
    WaitFor,
}

/// One access, as a policy is told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access<'a> {
    /// What the request said.
    pub info: &'a RequestInfo,
    /// On the policy's clock.
    pub now: Instant,
    /// The access before this one; `None`: the position was not here, this is the commit of its first part.
    pub last: Option<Instant>,
    /// The prompt ends in this position and does not fill it.
    pub tail: bool,
    /// The weight that the position has from now on; `None`: as before.
    pub weight: Option<Weight>,
}

/// An order of eviction. Calls name entries that are resident on the level named, `enter` before all others.
pub(crate) trait Policy: Send {
    /// `id` has become resident on `level`.
    fn enter(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// `id` was accessed; its last access and count are already those of this access. Also said of the commit of its
    /// first part, after `enter`.
    fn access(&mut self, slab: &mut Slab, id: EntryId, access: &Access<'_>);

    /// Something that kept `id` has ended: its last resident child left, its last lease ended, its copy is on NVMe.
    fn freed(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// `id` is not resident on `level` any more. Its seat must be left.
    fn leave(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// `id` has left its last tier: `evicted` in its turn, or taken out for another reason.
    fn gone(&mut self, slab: &mut Slab, id: EntryId, evicted: bool);

    /// The entry to evict next, still in place: asked twice with nothing done in between, the same. Where it is leased,
    /// `leased` says what then.
    fn victim(&mut self, slab: &mut Slab, level: Level, now: Instant, leased: Leased) -> Option<EntryId>;

    /// Not now: others first, without counting as an access.
    fn defer(&mut self, slab: &mut Slab, id: EntryId, level: Level);

    /// The client of a resident `id` says with `info` what comes of its session, and gives it a weight; no access.
    fn hint(&mut self, _slab: &mut Slab, _id: EntryId, _info: &RequestInfo, _weight: Option<Weight>, _now: Instant) {}

    /// An evictable entry whose session has certainly ended and that `wanted` takes; it stays in place.
    fn finished(&self, _slab: &Slab, _level: Level, _wanted: &dyn Fn(EntryId) -> bool) -> Option<EntryId> {
        None
    }

    /// What keeping a resident `id` is worth now, hits per second of one position's room at a weight of 1; `None`: the
    /// policy has no such measure.
    fn value(&self, _slab: &Slab, _id: EntryId, _now: Instant) -> Option<f32> {
        None
    }

    /// What was learned, for a later life; empty where nothing is.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Begins with what an earlier life learned, in place of what was learned until now. `false`: it is not readable,
    /// and nothing has changed.
    fn load(&mut self, _bytes: &[u8]) -> bool {
        false
    }

    /// From now on somebody asks for what is to be learned, and learns apart from here.
    fn fit_elsewhere(&mut self) {}

    /// What is to be learned from, if it is time to.
    fn begin_fit(&mut self) -> Option<Fit> {
        None
    }

    /// Takes over what came of [`Policy::begin_fit`].
    fn end_fit(&mut self, _fitted: Fitted) {}

    /// Positions that it remembers although they left.
    fn ghosts(&self) -> usize {
        0
    }

    /// Entries that may be evicted some day, the best kept first. A parent may be missing where its child is given.
    fn hottest(&self, slab: &Slab, level: Level, visit: &mut dyn FnMut(EntryId) -> bool);
}

/// The policy of that name.
pub(crate) fn make(kind: PolicyKind, ghosts_max: u32) -> Box<dyn Policy> {
    match kind {
        PolicyKind::Sage => Box::new(sage::Sage::new(ghosts_max)),
        PolicyKind::Lru => Box::new(lru::Lru::new()),
    }
}
