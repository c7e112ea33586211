//! What is remembered of positions that left the node: 32 bytes each, the longest gone forgotten first.
//!
//! Half of the bound is for all of the recent ones. One in [`SAMPLED`] of those that fall out of it, chosen by digest, is
//! remembered further in the other half and stands for as many; so the learned sees further back than what can be
//! remembered whole.

use std::collections::VecDeque;

use hashbrown::HashTable;

use crate::ids::{Digest, Instant};

use super::classes::ClassId;

/// One in so many of the older ones is remembered.
pub(super) const SAMPLED: u32 = 8;
/// Ghosts of one chunk of a ring.
const CHUNK: usize = 4096;
/// Hash tables: each grows alone, so that no call pays for all.
const TABLES: usize = 256;

/// What is left of a position: 24 bytes, and 8 in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ghost {
    /// First eight bytes of the digest.
    print: u64,
    pub last: Instant,
    pub class: ClassId,
    pub uses: u8,
    pub session: u8,
    pub shared: bool,
    /// It came back or was taken along: only its place is left.
    empty: bool,
}

const _: () = assert!(size_of::<Ghost>() == 24);

impl Ghost {
    pub(super) fn new(digest: &Digest, last: Instant, class: ClassId, uses: u8) -> Self {
        Self { print: digest.as_table_hash(), last, class, uses, session: 0, shared: false, empty: false }
    }

    fn is_sampled(&self) -> bool {
        // Bits that neither the choice of a table nor the table itself looks at first.
        (self.print >> 20).is_multiple_of(u64::from(SAMPLED))
    }
}

/// A queue of ghosts in chunks, each with a number that stays its own.
#[derive(Default)]
struct Ring {
    chunks: VecDeque<Vec<Ghost>>,
    /// Number of the first ghost of the first chunk.
    base: u32,
    /// Ghosts of the first chunk that have left.
    left: usize,
    /// Ghosts that have a place, empty ones included.
    len: usize,
}

impl Ring {
    fn push(&mut self, ghost: Ghost) -> u32 {
        if self.chunks.back().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push_back(Vec::with_capacity(CHUNK));
        }
        let chunks = self.chunks.len();
        let last = &mut self.chunks[chunks - 1];
        last.push(ghost);
        self.len += 1;
        self.base.wrapping_add(((chunks - 1) * CHUNK + last.len() - 1) as u32)
    }

    fn pop(&mut self) -> Option<Ghost> {
        let ghost = *self.chunks.front()?.get(self.left)?;
        self.left += 1;
        self.len -= 1;
        if self.left == CHUNK {
            self.chunks.pop_front();
            self.base = self.base.wrapping_add(CHUNK as u32);
            self.left = 0;
        }
        Some(ghost)
    }

    fn get_mut(&mut self, number: u32) -> &mut Ghost {
        let at = number.wrapping_sub(self.base) as usize;
        &mut self.chunks[at / CHUNK][at % CHUNK]
    }

    fn get(&self, number: u32) -> &Ghost {
        let at = number.wrapping_sub(self.base) as usize;
        &self.chunks[at / CHUNK][at % CHUNK]
    }
}

/// What became of a ghost that fell out of the recent ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fell {
    /// It stands for [`SAMPLED`] from now on.
    Sampled(Ghost),
    /// Others stand for it.
    Forgotten(Ghost),
    /// It had stood for [`SAMPLED`], and nobody does any more.
    Lost(Ghost),
}

/// The ghosts. See the module.
pub(super) struct Ghosts {
    /// Most places of each ring.
    half: usize,
    /// Recent ones, then sampled ones.
    rings: [Ring; 2],
    /// Numbers of those in the rings, per ring and table.
    tables: [Box<[HashTable<u32>]>; 2],
}

fn table_of(print: u64) -> usize {
    (print >> 32) as usize % TABLES
}

impl Ghosts {
    /// Remembers at most `most`.
    pub(super) fn new(most: u32) -> Self {
        let tables = || std::iter::repeat_with(HashTable::new).take(TABLES).collect();
        Self { half: most as usize / 2, rings: Default::default(), tables: [tables(), tables()] }
    }

    /// Places taken.
    pub(super) fn len(&self) -> usize {
        self.rings.iter().map(|ring| ring.len).sum()
    }

    /// Remembers one, and tells what became of the one that fell out for it.
    pub(super) fn remember(&mut self, ghost: Ghost, mut fell: impl FnMut(Fell)) {
        if self.half == 0 {
            // One remembered, and forgotten at once.
            fell(if ghost.is_sampled() { Fell::Sampled(ghost) } else { Fell::Forgotten(ghost) });
            if ghost.is_sampled() {
                fell(Fell::Lost(ghost));
            }
            return;
        }
        self.push(0, ghost);
        if self.rings[0].len > self.half
            && let Some(old) = self.pop(0)
        {
            if old.is_sampled() {
                fell(Fell::Sampled(old));
                self.push(1, old);
            } else {
                fell(Fell::Forgotten(old));
            }
        }
        if self.rings[1].len > self.half
            && let Some(old) = self.pop(1)
        {
            fell(Fell::Lost(old));
        }
    }

    /// The ghost of a position that came back, and how many it stands for.
    pub(super) fn take(&mut self, digest: &Digest) -> Option<(Ghost, u32)> {
        let print = digest.as_table_hash();
        for (r, weight) in [(0, 1), (1, SAMPLED)] {
            let ring = &mut self.rings[r];
            let found = self.tables[r][table_of(print)].find_entry(print, |number| ring.get(*number).print == print);
            if let Ok(found) = found {
                let ghost = ring.get_mut(found.remove().0);
                ghost.empty = true;
                return Some((*ghost, weight));
            }
        }
        None
    }

    fn push(&mut self, r: usize, ghost: Ghost) {
        let ring = &mut self.rings[r];
        let number = ring.push(ghost);
        self.tables[r][table_of(ghost.print)].insert_unique(ghost.print, number, |number| ring.get(*number).print);
    }

    fn pop(&mut self, r: usize) -> Option<Ghost> {
        let ring = &self.rings[r];
        let number = ring.base.wrapping_add(ring.left as u32);
        let ghost = self.rings[r].pop()?;
        if ghost.empty {
            return None;
        }
        if let Ok(found) = self.tables[r][table_of(ghost.print)].find_entry(ghost.print, |other| *other == number) {
            found.remove();
        }
        Some(ghost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::testing::digest;

    fn ghost(n: u32) -> Ghost {
        Ghost::new(&digest(n), Instant(u64::from(n)), ClassId(0), 1)
    }

    #[test]
    fn recent_ones_are_all_remembered_and_older_ones_in_part() {
        const MOST: u32 = 20_000;
        let mut ghosts = Ghosts::new(MOST);
        let (mut sampled, mut forgotten, mut lost) = (0, 0, 0);
        for n in 0..200_000 {
            ghosts.remember(ghost(n), |fell| match fell {
                Fell::Sampled(_) => sampled += 1,
                Fell::Forgotten(_) => forgotten += 1,
                Fell::Lost(_) => lost += 1,
            });
            assert!(ghosts.len() <= MOST as usize);
        }
        assert_eq!(sampled + forgotten, 190_000);
        assert!((20_000..28_000).contains(&sampled), "one in eight of 190,000: {sampled}");
        assert_eq!(lost, sampled - 10_000, "the other half is full");
        for n in 190_000..200_000 {
            let (found, weight) = ghosts.take(&digest(n)).expect("recent");
            assert_eq!((found.last, weight), (Instant(u64::from(n)), 1));
        }
        let older = (0..190_000).filter_map(|n| ghosts.take(&digest(n))).collect::<Vec<_>>();
        assert_eq!(older.len(), 10_000);
        assert!(older.iter().all(|(_, weight)| *weight == SAMPLED));
        assert_eq!(ghosts.take(&digest(199_999)), None, "taken once");
    }

    #[test]
    fn one_that_came_back_and_left_again_is_remembered_as_it_was_last() {
        let mut ghosts = Ghosts::new(8);
        let mut fallen = Vec::new();
        ghosts.remember(ghost(1), |fell| fallen.push(fell));
        assert!(ghosts.take(&digest(1)).is_some());
        let again = Ghost { last: Instant(9), ..ghost(1) };
        ghosts.remember(again, |fell| fallen.push(fell));
        // The empty place falls out first and says nothing.
        for n in 2..5 {
            ghosts.remember(ghost(n), |fell| fallen.push(fell));
        }
        assert_eq!(fallen, []);
        assert_eq!(ghosts.take(&digest(1)).map(|(g, _)| g.last), Some(Instant(9)));
    }

    #[test]
    fn with_no_room_nothing_is_remembered() {
        let mut ghosts = Ghosts::new(1);
        ghosts.remember(ghost(1), |_| {});
        assert_eq!((ghosts.len(), ghosts.take(&digest(1))), (0, None));
    }
}
