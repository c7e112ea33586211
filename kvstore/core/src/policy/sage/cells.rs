//! Evictable positions of one tier and weight by class and bucket of age, and which cell goes first.
//!
//! A cell is a list, the longest unused in front; a position moves on to the next bucket's cell as it ages. Cells are
//! ranked by their index at each fit; a bitmap in the order of ranks finds the first that holds anything. Moves are O(1),
//! ageing is at most one move per position and bucket, a victim is a scan of at most [`CELLS`] bits.

use crate::directory::entry::{EntryId, Level};
use crate::directory::list::{List, Seat};
use crate::directory::slab::Slab;
use crate::ids::Instant;

use super::ages::{Ages, BUCKETS};
use super::classes::{CLASSES, ClassId};
use super::hazards::Index;

/// All cells.
pub(super) const CELLS: usize = CLASSES * BUCKETS;
/// Positions of a bucket that move on in one call. The others are late, and go on with the next call: what matters is
/// that more become old than are evicted.
const MOVES_MAX: u32 = 256;
/// A bucket's cells are looked at so many times while a position is in it.
const LOOKS: u64 = 8;

const CLASS_WORDS: usize = CLASSES.div_ceil(64);
const CELL_WORDS: usize = CELLS.div_ceil(64);

/// Number of a cell: class after class.
fn cell(class: ClassId, bucket: usize) -> usize {
    class.index() * BUCKETS + bucket
}

/// The order in which cells go, the same for both tiers and all weights.
pub(super) struct Ranks {
    /// By cell.
    rank: Box<[u16; CELLS]>,
    /// By rank.
    cell: Box<[u16; CELLS]>,
    /// Hits per second, by rank.
    value: Box<[f32; CELLS]>,
}

const _: () = assert!(CELLS <= u16::MAX as usize, "cells are numbered by 16 bits");

impl Ranks {
    /// By index; of equal ones the older bucket first, then by class.
    pub(super) fn new(index: &Index) -> Self {
        let mut order: Vec<(f32, usize, u16)> = Vec::with_capacity(CELLS);
        for class in 0..CLASSES {
            for bucket in 0..BUCKETS {
                let id = ClassId(class as u8);
                order.push((index[class][bucket], BUCKETS - bucket, cell(id, bucket) as u16));
            }
        }
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
        let (mut rank, mut at, mut value) = (Box::new([0; CELLS]), Box::new([0; CELLS]), Box::new([0.0; CELLS]));
        for (r, (index, _, cell)) in order.iter().enumerate() {
            rank[usize::from(*cell)] = r as u16;
            at[r] = *cell;
            value[r] = *index;
        }
        Self { rank, cell: at, value }
    }

    /// The index of the cell with that rank.
    pub(super) fn value(&self, rank: usize) -> f32 {
        self.value[rank]
    }

    /// The index of a cell.
    pub(super) fn value_of(&self, class: ClassId, bucket: usize) -> f32 {
        self.value[usize::from(self.rank[cell(class, bucket)])]
    }
}

/// The cells of one tier. An entry's seat byte is its bucket plus one while it is in here.
pub(super) struct Cells {
    level: Level,
    lists: Vec<List>,
    /// Per bucket, the classes with somebody in that bucket.
    classes: Box<[[u64; CLASS_WORDS]; BUCKETS]>,
    /// Cells with somebody in them, by rank.
    ranked: Box<[u64; CELL_WORDS]>,
    /// Per bucket, when its cells are looked at next, milliseconds.
    look: [u64; BUCKETS],
}

fn set(words: &mut [u64], bit: usize, on: bool) {
    if on {
        words[bit / 64] |= 1 << (bit % 64);
    } else {
        words[bit / 64] &= !(1 << (bit % 64));
    }
}

impl Cells {
    pub(super) fn new(level: Level) -> Self {
        Self {
            level,
            lists: (0..CELLS).map(|_| List::new(Seat::Policy(level))).collect(),
            classes: Box::new([[0; CLASS_WORDS]; BUCKETS]),
            ranked: Box::new([0; CELL_WORDS]),
            look: [0; BUCKETS],
        }
    }

    fn note(&mut self, ranks: &Ranks, class: ClassId, bucket: usize) {
        let at = cell(class, bucket);
        let any = self.lists[at].len() > 0;
        set(&mut self.classes[bucket], class.index(), any);
        set(&mut *self.ranked, usize::from(ranks.rank[at]), any);
    }

    /// Adds an entry at the young end of a cell, or at its old end unless that one is older.
    pub(super) fn push(&mut self, slab: &mut Slab, ranks: &Ranks, id: EntryId, bucket: usize, oldest: bool) {
        let class = ClassId(slab[id].class);
        let list = &mut self.lists[cell(class, bucket)];
        let last = slab[id].last_access;
        if oldest && list.front().is_none_or(|front| last <= slab[front].last_access) {
            list.push_front(slab, id);
        } else {
            list.push_back(slab, id);
        }
        slab[id].seat[self.level as usize] = bucket as u8 + 1;
        self.note(ranks, class, bucket);
    }

    /// Takes an entry out that is in here, under the class that it came in with.
    pub(super) fn unlink(&mut self, slab: &mut Slab, ranks: &Ranks, id: EntryId) {
        let class = ClassId(slab[id].class);
        let bucket = usize::from(slab[id].seat[self.level as usize]) - 1;
        self.lists[cell(class, bucket)].unlink(slab, id);
        self.note(ranks, class, bucket);
    }

    /// The rank of the first cell that holds anything.
    pub(super) fn first_rank(&self) -> Option<usize> {
        let word = self.ranked.iter().position(|word| *word != 0)?;
        Some(word * 64 + self.ranked[word].trailing_zeros() as usize)
    }

    /// The entry that has been in the first cell longest.
    pub(super) fn first(&self, ranks: &Ranks) -> Option<EntryId> {
        self.lists[usize::from(ranks.cell[self.first_rank()?])].front()
    }

    /// All entries of these classes.
    pub(super) fn of(&self, slab: &Slab, classes: impl Iterator<Item = ClassId>) -> impl Iterator<Item = EntryId> {
        let full =
            move |class: ClassId| (0..BUCKETS).filter(move |bucket| self.has(class, *bucket)).map(move |b| (class, b));
        classes.flat_map(full).flat_map(move |(class, bucket)| {
            let list = &self.lists[cell(class, bucket)];
            std::iter::successors(list.back(), move |id| list.before(slab, *id))
        })
    }

    fn has(&self, class: ClassId, bucket: usize) -> bool {
        self.classes[bucket][class.index() / 64] >> (class.index() % 64) & 1 == 1
    }

    /// The last rank below that one whose cell holds anything; `None`: of all.
    pub(super) fn rank_before(&self, rank: Option<usize>) -> Option<usize> {
        let end = rank.unwrap_or(CELLS);
        let below = |word: usize| match end.saturating_sub(word * 64) {
            0 => 0,
            bits @ 1..64 => self.ranked[word] & ((1 << bits) - 1),
            64.. => self.ranked[word],
        };
        let word = (0..end.div_ceil(64)).rev().find(|word| below(*word) != 0)?;
        Some(word * 64 + 63 - below(word).leading_zeros() as usize)
    }

    /// The entries of the cell with that rank, the youngest first; `false`: `visit` has seen enough.
    pub(super) fn last_of(
        &self,
        slab: &Slab,
        ranks: &Ranks,
        rank: usize,
        visit: &mut dyn FnMut(EntryId) -> bool,
    ) -> bool {
        let list = &self.lists[usize::from(ranks.cell[rank])];
        std::iter::successors(list.back(), |id| list.before(slab, *id)).all(visit)
    }

    /// Takes over a new order.
    pub(super) fn rank(&mut self, ranks: &Ranks) {
        self.ranked.fill(0);
        for (at, list) in self.lists.iter().enumerate().filter(|(_, list)| list.len() > 0) {
            debug_assert!(list.front().is_some());
            set(&mut *self.ranked, usize::from(ranks.rank[at]), true);
        }
    }

    /// Moves on those that have grown out of their bucket.
    pub(super) fn age(&mut self, slab: &mut Slab, ranks: &Ranks, ages: &Ages, now: Instant) {
        for bucket in (0..BUCKETS).rev() {
            let Some(end) = ages.end_ms(bucket).filter(|_| self.look[bucket] <= now.0) else { continue };
            let mut moves = 0;
            for word in 0..CLASS_WORDS {
                let mut bits = self.classes[bucket][word];
                while bits != 0 {
                    let class = ClassId((word * 64 + bits.trailing_zeros() as usize) as u8);
                    bits &= bits - 1;
                    while let Some(id) = self.lists[cell(class, bucket)].front().filter(|_| moves < MOVES_MAX) {
                        let last = slab[id].last_access;
                        if now.0.saturating_sub(last.0) < end {
                            break;
                        }
                        moves += 1;
                        self.lists[cell(class, bucket)].unlink(slab, id);
                        self.push(slab, ranks, id, ages.since(now, last), false);
                    }
                    self.note(ranks, class, bucket);
                }
            }
            if moves < MOVES_MAX {
                self.look[bucket] = now.0 + (ages.width_ms(bucket) / LOOKS).max(1);
            }
        }
    }

    /// How many entries are in here.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lists.iter().map(|list| list.len() as usize).sum()
    }
}
