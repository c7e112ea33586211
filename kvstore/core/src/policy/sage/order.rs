//! Evictable positions of one tier in the order in which they go: cells, once for each weight.
//!
//! The index of a cell times the weight of its positions decides; of equal ones the smaller weight goes first. Weights that
//! nobody has cost nothing: most nodes use one.

use crate::directory::entry::{EntryId, Level};
use crate::directory::slab::Slab;
use crate::ids::Instant;
use crate::policy::weight::{WEIGHTS, Weight};

use super::ages::Ages;
use super::cells::{Cells, Ranks};
use super::classes::ClassId;

/// See the module.
pub(super) struct Order {
    level: Level,
    by_weight: [Option<Box<Cells>>; WEIGHTS],
}

impl Order {
    pub(super) fn new(level: Level) -> Self {
        Self { level, by_weight: std::array::from_fn(|_| None) }
    }

    /// The cells that are in use, by weight.
    fn used(&self) -> impl Iterator<Item = (Weight, &Cells)> {
        Weight::all().filter_map(|w| Some((w, self.by_weight[w.index()].as_deref()?)))
    }

    /// Adds an entry at the young end of its cell, or at the old end unless that one is older.
    pub(super) fn push(&mut self, slab: &mut Slab, ranks: &Ranks, id: EntryId, bucket: usize, oldest: bool) {
        let level = self.level;
        let cells = self.by_weight[slab[id].weight().index()].get_or_insert_with(|| Box::new(Cells::new(level)));
        cells.push(slab, ranks, id, bucket, oldest);
    }

    /// Takes an entry out that is in here, under the class and the weight that it came in with.
    pub(super) fn unlink(&mut self, slab: &mut Slab, ranks: &Ranks, id: EntryId) {
        if let Some(cells) = &mut self.by_weight[slab[id].weight().index()] {
            cells.unlink(slab, ranks, id);
        }
    }

    /// The entry that goes first.
    pub(super) fn first(&self, ranks: &Ranks) -> Option<EntryId> {
        let firsts = self.used().filter_map(|(w, cells)| Some((ranks.value(cells.first_rank()?) * w.factor(), cells)));
        firsts.min_by(|a, b| a.0.total_cmp(&b.0)).and_then(|(_, cells)| cells.first(ranks))
    }

    /// The first entry of one of these classes that `wanted` takes, out of so many.
    pub(super) fn first_of(
        &self,
        slab: &Slab,
        classes: impl Iterator<Item = ClassId> + Clone,
        most: usize,
        wanted: impl Fn(EntryId) -> bool,
    ) -> Option<EntryId> {
        let all = self.used().flat_map(|(_, cells)| cells.of(slab, classes.clone()));
        all.take(most).find(|id| wanted(*id))
    }

    /// All entries, those that go last first, until `visit` has seen enough.
    pub(super) fn last_to_first(&self, slab: &Slab, ranks: &Ranks, visit: &mut dyn FnMut(EntryId) -> bool) {
        let mut left: Vec<_> = self.used().map(|(w, cells)| (w, cells, cells.rank_before(None))).collect();
        loop {
            let value = |(w, _, rank): &(Weight, &Cells, Option<usize>)| rank.map(|r| ranks.value(r) * w.factor());
            let highest = left.iter_mut().filter(|one| one.2.is_some()).max_by(|a, b| {
                let (a, b) = (value(a).unwrap_or_default(), value(b).unwrap_or_default());
                a.total_cmp(&b)
            });
            let Some((_, cells, next)) = highest else { return };
            let Some(rank) = *next else { return };
            if !cells.last_of(slab, ranks, rank, visit) {
                return;
            }
            *next = cells.rank_before(Some(rank));
        }
    }

    /// Takes over a new order.
    pub(super) fn rank(&mut self, ranks: &Ranks) {
        self.by_weight.iter_mut().flatten().for_each(|cells| cells.rank(ranks));
    }

    /// Moves on those that have grown out of their bucket.
    pub(super) fn age(&mut self, slab: &mut Slab, ranks: &Ranks, ages: &Ages, now: Instant) {
        self.by_weight.iter_mut().flatten().for_each(|cells| cells.age(slab, ranks, ages, now));
    }

    /// How many entries are in here.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.used().map(|(_, cells)| cells.len()).sum()
    }
}
