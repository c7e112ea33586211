//! How many open positions of each class were accessed when: counts by time of last access, finer for recent times.
//!
//! Times fall into slots. Slots of level 0 are [`SLOT_MS`] wide, those of each further level twice as wide; once a level
//! has as many as it may, its two oldest become one of the next level. So a slot is never wider than a sixteenth of its
//! age, a count is found from the time alone, and nothing has to be moved as positions age.

use crate::ids::Instant;

use super::classes::{CLASSES, ClassId};

/// Width of the finest slots, milliseconds.
const SLOT_MS: u64 = 128;
/// Slots kept by a level before its oldest move on.
const KEPT: u64 = 32;
/// Places of a level's ring: what is kept, and two that move on.
const RING: u64 = 64;
/// The last level's slots are nine hours wide; what is older than twelve days shares its oldest slot.
const LEVELS: usize = 19;
const COUNTS: usize = RING as usize * LEVELS;

/// Counts of open positions. See the module.
#[derive(Clone)]
pub(crate) struct Calendar {
    /// First unit of time (of [`SLOT_MS`]) that each level covers; the level above it ends there. A multiple of twice the
    /// level's width.
    from: [u64; LEVELS],
    /// The newest unit.
    newest: u64,
    /// Per class, made when it is first used: rings of slots, level after level.
    counts: Vec<Option<Box<[u32; COUNTS]>>>,
}

impl Calendar {
    pub(crate) fn new() -> Self {
        Self { from: [0; LEVELS], newest: 0, counts: (0..CLASSES).map(|_| None).collect() }
    }

    /// Open positions of a class that were accessed at `at`, so many more.
    pub(crate) fn add(&mut self, class: ClassId, at: Instant, count: u32) {
        self.advance(at.0 / SLOT_MS);
        let place = self.place(at);
        let counts = self.counts[class.index()].get_or_insert_with(|| Box::new([0; COUNTS]));
        counts[place] += count;
    }

    /// So many less. They must have been added at the same time and under the same class.
    pub(crate) fn take(&mut self, class: ClassId, at: Instant, count: u32) {
        let place = self.place(at);
        if let Some(counts) = &mut self.counts[class.index()] {
            debug_assert!(counts[place] >= count, "taken from the calendar and never added");
            counts[place] = counts[place].saturating_sub(count);
        }
    }

    /// Visits the counts of a class that are not zero, with the time in the middle of their slot, milliseconds.
    pub(crate) fn visit(&self, class: ClassId, mut visit: impl FnMut(Instant, u32)) {
        let Some(counts) = &self.counts[class.index()] else { return };
        let mut end = self.newest + 1;
        for level in 0..LEVELS {
            for slot in self.from[level] >> level..end.div_ceil(1 << level) {
                let count = counts[Self::index(level, slot)];
                if count > 0 {
                    // The newest slot has not ended yet.
                    let last = (((slot + 1) << level) * SLOT_MS).min((self.newest + 1) * SLOT_MS);
                    visit(Instant(((slot << level) * SLOT_MS + last) / 2), count);
                }
            }
            end = self.from[level];
        }
    }

    fn index(level: usize, slot: u64) -> usize {
        level * RING as usize + (slot % RING) as usize
    }

    /// Where the count of a time is.
    fn place(&self, at: Instant) -> usize {
        let unit = at.0 / SLOT_MS;
        let level = self.from.iter().position(|from| unit >= *from).unwrap_or(LEVELS - 1);
        Self::index(level, unit.max(self.from[level]) >> level)
    }

    /// Makes room for a newer time.
    fn advance(&mut self, unit: u64) {
        if unit <= self.newest {
            return;
        }
        // What each level held before; beyond it there is nothing to move.
        let mut end = self.newest + 1;
        self.newest = unit;
        let mut reach = unit + 1;
        for level in 0..LEVELS {
            let (from, width) = (self.from[level], 1 << level);
            if reach.saturating_sub(from) < KEPT * width {
                return;
            }
            let next = (reach - KEPT * width).next_multiple_of(2 * width);
            let mut slot = from >> level;
            while slot << level < next.min(end) {
                self.merge(level, slot, next >> level);
                slot += 1;
            }
            self.from[level] = next;
            end = end.min(next);
            reach = next;
        }
    }

    /// Adds a slot to the slot of the next level that covers it; in the last level to the oldest one that stays.
    fn merge(&mut self, level: usize, slot: u64, oldest: u64) {
        let from = Self::index(level, slot);
        let to = if level + 1 < LEVELS { Self::index(level + 1, slot >> 1) } else { Self::index(level, oldest) };
        for counts in self.counts.iter_mut().flatten() {
            counts[to] += std::mem::take(&mut counts[from]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn seen(calendar: &Calendar, class: ClassId) -> Vec<(u64, u32)> {
        let mut seen = Vec::new();
        calendar.visit(class, |at, count| seen.push((at.0, count)));
        seen
    }

    proptest! {
        /// Everything that was added and not taken is seen once, near its time; a count is always found again.
        #[test]
        fn counts_are_found_again_and_seen_near_their_time(
            steps in prop::collection::vec((0u8..4, 0u32..40, 0usize..50, any::<bool>()), 1..200),
        ) {
            let mut calendar = Calendar::new();
            let mut open: Vec<(u64, u8)> = Vec::new();
            let mut now = 0u64;
            for (class, jump, pick, take) in steps {
                // From a millisecond to twelve days.
                now += 1 << jump.min(30);
                if take && !open.is_empty() {
                    let (at, class) = open.remove(pick % open.len());
                    calendar.take(ClassId(class), Instant(at), 1);
                } else {
                    calendar.add(ClassId(class), Instant(now), 1);
                    open.push((now, class));
                }
                for class in 0..4 {
                    let mut left: BTreeMap<u64, u32> = BTreeMap::new();
                    open.iter().filter(|(_, c)| *c == class).for_each(|(at, _)| *left.entry(*at).or_default() += 1);
                    let seen = seen(&calendar, ClassId(class));
                    prop_assert_eq!(seen.iter().map(|(_, n)| n).sum::<u32>(), left.values().sum::<u32>());
                    // Match them up, the oldest with the oldest.
                    let mut seen: Vec<u64> = seen.iter().flat_map(|(at, n)| vec![*at; *n as usize]).collect();
                    seen.sort_unstable();
                    let left = left.iter().flat_map(|(at, n)| vec![*at; *n as usize]);
                    let horizon = now.saturating_sub(11 * 24 * 3600 * 1000);
                    for (seen, at) in seen.into_iter().zip(left).filter(|(_, at)| *at > horizon) {
                        let allowed = SLOT_MS + (now - at) / 12;
                        prop_assert!(seen.abs_diff(at) <= allowed, "seen at {seen}, was at {at}, now {now}");
                    }
                }
            }
        }
    }
}
