//! Parts that may go before any leaf: those of `window` and `state` groups that lie behind the last usable boundary of
//! their chain, where nothing asks for them any more.
//!
//! A chain's *ends* are its leaves and its forks (the next request may leave the chain where others have). Whenever a
//! position becomes an end, or an end changes, it is queued; before spare parts are handed out the queue is worked off: from
//! each end up its chain, first the positions that its last usable boundary needs (they are not spare), then, up to the
//! next fork, those that it does not (they are). Where no boundary is usable nothing is spare.

use super::Directory;
use super::entry::{Entry, EntryId, Level, Parts};
use super::home::Need;

/// Queue entries and chain positions looked at in one call for a victim. Until the queue is empty, leaves go.
const TRIM_STEPS: u32 = 4096;
/// Positions above an end, beyond its longest window, among which a usable boundary is looked for.
const TRIM_SEARCH_POSITIONS: u32 = 256;

impl Directory {
    /// `id` may have become the end of a chain, or an end that is used differently.
    pub(super) fn note_end(&mut self, id: EntryId) {
        let e = &self.slab[id];
        let boxed = matches!(e.parts, Parts::Many(_)) && !self.homes.get(e.home).shape.plain;
        if boxed && e.children != 1 && !e.has(Entry::TRIM) {
            self.slab[id].set(Entry::TRIM, true);
            self.trim.push_back(&mut self.slab, id);
        }
    }

    /// The position whose spare parts have waited longest.
    pub(super) fn spare_victim(&mut self, level: Level) -> Option<EntryId> {
        let mut steps = 0;
        while let Some(end) = self.trim.front() {
            if steps >= TRIM_STEPS {
                return None;
            }
            self.trim.unlink(&mut self.slab, end);
            self.slab[end].set(Entry::TRIM, false);
            steps += 1 + self.trim_chain(end);
        }
        self.spare[level as usize].front()
    }

    /// Tells needed from spare in the chain above one end. Returns the positions it looked at.
    fn trim_chain(&mut self, end: EntryId) -> u32 {
        if self.slab[end].children == 1 {
            return 0;
        }
        let shape = &self.homes.get(self.slab[end].home).shape;
        let (unit, window) = (shape.unit, shape.window_positions);
        // At the start of a chain a window has fewer blocks: the first one ends the search.
        let first_block = shape.groups.iter().filter(|g| matches!(g.need, Need::Last(_))).map(|g| g.span).min();
        let first_block = first_block.unwrap_or(1);
        let search = window.saturating_add(TRIM_SEARCH_POSITIONS);

        let mut steps = 0;
        let mut at = end;
        let mut boundary = None;
        loop {
            steps += 1;
            if at != end && self.slab[at].children > 1 {
                return steps;
            }
            self.set_spare(at, false);
            let e = &self.slab[at];
            let shape = &self.homes.get(e.home).shape;
            if shape.whole(e.position, e.parts.as_slice(), |need| matches!(need, Need::Last(_))) {
                let state = || shape.whole(e.position, e.parts.as_slice(), |need| need == Need::State);
                if boundary.is_none() && (u64::from(e.position) + 1).is_multiple_of(unit) && state() {
                    boundary = Some(e.position);
                }
                if boundary.is_some_and(|b| b - e.position + 1 >= window || e.position < first_block) {
                    break;
                }
            } else {
                boundary = None;
            }
            match e.parent.some() {
                Some(parent) if steps < search => at = parent,
                _ => return steps,
            }
        }
        // All above is behind that boundary, up to what was found out before and to the next fork.
        while let Some(parent) = self.slab[at].parent.some() {
            if self.slab[parent].children > 1 || self.slab[parent].has(Entry::SPARE) {
                break;
            }
            self.set_spare(parent, true);
            at = parent;
            steps += 1;
        }
        steps
    }

    fn set_spare(&mut self, id: EntryId, spare: bool) {
        self.slab[id].set(Entry::SPARE, spare);
        self.refresh_spare(id);
    }

    /// Brings an entry's seats in the spare lists in line with its flag, parts, class and leases.
    pub(super) fn refresh_spare(&mut self, id: EntryId) {
        // Only a position that was found spare has ever been listed; few are.
        if !self.slab[id].has(Entry::SPARE | Entry::SPARE_LISTED[0] | Entry::SPARE_LISTED[1]) {
            return;
        }
        for level in Level::BOTH {
            let e = &self.slab[id];
            let listed = e.has(Entry::SPARE_LISTED[level as usize]);
            let wanted = e.has(Entry::SPARE) && self.may_go_early(e, level);
            if wanted && !listed {
                self.slab[id].set(Entry::SPARE_LISTED[level as usize], true);
                self.spare[level as usize].push_back(&mut self.slab, id);
            } else if listed && !wanted {
                self.leave_spare(id, level);
            }
        }
    }

    fn may_go_early(&self, e: &Entry, level: Level) -> bool {
        let groups = &self.homes.get(e.home).shape.groups;
        let early = |need: Need| need != Need::All;
        e.leases == 0
            && (!e.has(Entry::DURABLE) || (level == Level::Dram && e.saved()))
            && e.parts.as_slice().iter().any(|p| p.on(level) && early(groups[usize::from(p.group().0)].need))
    }

    pub(super) fn leave_spare(&mut self, id: EntryId, level: Level) {
        self.slab[id].set(Entry::SPARE_LISTED[level as usize], false);
        self.spare[level as usize].unlink(&mut self.slab, id);
    }

    /// Leaves every list that lives in the box of the entry's parts.
    pub(super) fn leave_seats(&mut self, id: EntryId) {
        for level in Level::BOTH {
            if self.slab[id].has(Entry::SPARE_LISTED[level as usize]) {
                self.leave_spare(id, level);
            }
        }
        if self.slab[id].has(Entry::TRIM) {
            self.slab[id].set(Entry::TRIM, false);
            self.trim.unlink(&mut self.slab, id);
        }
    }
}
